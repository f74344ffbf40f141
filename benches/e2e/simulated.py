"""Hits, TTFT and calls a second in simulated time: vLLM's real scheduler, the calls and pools of `run.py`, no model.

A step takes `--step-us`, and `--token-us` for each token that it computes, as fitted to runs of `run.py` on a 2-core
VM. A run takes a second or two instead of half a minute and comes out the same every time, so that a tenth of a percent
can be told. Left out: the time that agentrt itself takes (`overhead.py`), and that attention takes longer the longer
the prompt.

    python benches/e2e/simulated.py
    python benches/e2e/simulated.py --policies stock,agentrt --scheduling batch_shaping
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benches.e2e import cores  # noqa: E402
from benches.e2e.run import CORES, PREFETCH, PREFETCHING, TOLD  # noqa: E402
from benches.e2e.workloads import (  # noqa: E402
    BATCH,
    CALLS,
    CONCURRENCY,
    GENERATED,
    LONGEST,
    RECORDED,
    Call,
    ClosedLoop,
    calls_of,
    capacities,
    orders_of,
    sessions,
)
from tests.engines.vllm.scheduler import Server, transfer  # noqa: E402

from agentrt.frameworks.runs import Runs  # noqa: E402

STEP_US, TOKEN_US, NOISE = 11_000, 80, 0.05


@dataclass
class Outcome:
    """What a run was like; times in simulated microseconds."""

    tokens: int = 0
    hit: int = 0
    took_us: int = 0
    ttft_us: list[int] = field(default_factory=list)
    # Keys of the calls' full blocks, in the order in which they were sent.
    keys: list[list[int]] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Of the prompts' tokens."""
        return self.hit / self.tokens

    @property
    def calls_per_s(self) -> float:
        """In simulated seconds."""
        return len(self.ttft_us) * 1e6 / self.took_us

    def ttft_ms(self, share: float | None = None) -> float:
        """The mean, or a percentile."""
        if share is None:
            return statistics.mean(self.ttft_us) / 1e3
        return sorted(self.ttft_us)[int(len(self.ttft_us) * share)] / 1e3


def run(
    todo: list[list[Call]],
    calls: int,
    blocks: int,
    seed: int,
    flag: dict[str, Any] | None,
    step_us: Callable[[int], int],
    told_ends: bool = False,
    asynchronous: bool = False,
) -> Outcome:
    """Runs sessions in a closed loop; ``step_us`` says how long a step with so many tokens takes."""
    now_us = 1_000_000

    def clock() -> int:
        nonlocal now_us
        now_us += 3
        return now_us

    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(
            Path(folder), blocks, flag, asynchronous=asynchronous, max_num_seqs=BATCH, max_model_len=LONGEST + 64
        )
        adapter = server.connector.adapter if flag else None
        if adapter is not None:
            adapter.now_us = clock
        schedule = server.scheduler.schedule

        def timed() -> object:
            nonlocal now_us
            output = schedule()
            now_us += step_us(output.total_num_scheduled_tokens)
            return output

        server.scheduler.schedule = timed
        loop, runs, start_us = ClosedLoop(todo, CONCURRENCY, calls, seed), Runs(), now_us
        live: dict[str, tuple[list[Call], int]] = {}
        # Until their first token: when they were sent, and the request.
        silent: dict[str, tuple[int, Any]] = {}
        while True:
            for session, step in loop.due():
                call = session[step]
                live[call.name] = session, step
                outcome.tokens += call.n_tokens
                names = runs.start(call.session).extra_body(call.agent)["vllm_xargs"]
                request = server.add(call.name, call.tokens(), tokens=2, **names)
                silent[call.name] = now_us, request
                outcome.keys.append([int.from_bytes(value[-8:], "big") for value in request.block_hashes])
            if not live:
                break
            before = len(server.finished)
            server.step()
            for name in [name for name, (_, request) in silent.items() if request.num_output_tokens > 0]:
                outcome.ttft_us.append(now_us - silent.pop(name)[0])
            for name in server.finished[before:]:
                outcome.hit += server.cached[name]
                session, step = live.pop(name)
                if told_ends and step + 1 == len(session):
                    runs.start(session[-1].session).end()
                loop.ended(session, step)
        server.check()
        if adapter is not None:
            adapter.close()
    outcome.took_us = now_us - start_us
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--traces", type=Path, default=os.environ.get("AGENTRT_TRACES", ROOT.parent / "shared" / "traces")
    )
    parser.add_argument("--workloads", help=f"of {','.join((*RECORDED, *GENERATED))}")
    parser.add_argument("--policies", default="stock,agentrt,agentrt-told-ends,optimal", help=f"of {','.join(CORES)}")
    parser.add_argument("--scheduling", help="also run agentrt with this order of waiting calls")
    parser.add_argument("--seeds", type=int, default=3, help="draws of sessions")
    parser.add_argument("--step-us", type=int, default=STEP_US)
    parser.add_argument("--token-us", type=int, default=TOKEN_US)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    # Else the hash that all chains begin with is drawn anew in every run, and with it all keys.
    os.environ.setdefault("PYTHONHASHSEED", "0")
    recorded = [name for name in RECORDED if (asked.traces / f"{name}.jsonl.gz").exists()]
    names = asked.workloads.split(",") if asked.workloads else [*recorded, *GENERATED]
    policies = {name: PREFETCHING if name == PREFETCH else {} for name in asked.policies.split(",")}
    if unknown := set(policies) - set(CORES):
        raise SystemExit(f"error: unknown policy `{min(unknown)}`; known: {', '.join(CORES)}")
    if "stock" not in policies:
        raise SystemExit("error: everything is compared with `stock`; add it to --policies")
    policies = {"stock": policies.pop("stock"), **policies}
    if asked.scheduling:
        policies[f"agentrt, {asked.scheduling}"] = {"scheduling": asked.scheduling}
    print("workload", "blocks", "policy", "hits", "TTFT ms", "p99 ms", "calls/s", "TTFT", "p99", "calls/s", sep="\t")
    changes: dict[tuple[bool, str], list[tuple[float, ...]]] = {}
    for name in names:
        orders = orders_of(name, asked.traces, CONCURRENCY, calls_of(name, CALLS))
        blocks = capacities(orders, name, CONCURRENCY, BATCH).pressure
        draws = [sessions(name, asked.traces, seed) for seed in range(asked.seeds)]
        stock: list[Outcome] = []
        for policy, extra in policies.items():
            outcomes = []
            for seed, todo in enumerate(draws):
                rng = random.Random(seed)

                def step_us(tokens: int, rng: random.Random = rng) -> int:
                    return int((asked.step_us + asked.token_us * tokens) * rng.lognormvariate(0, NOISE))

                if policy == "optimal":
                    cores.Optimal.default_future = stock[seed].keys
                flag = None if policy == "stock" else transfer(CORES.get(policy, "agentrt"), **extra)
                calls = calls_of(name, CALLS)
                outcomes.append(run(todo, calls, blocks, seed, flag, step_us, told_ends=policy == TOLD))
            stock = stock or outcomes
            means = [
                (statistics.mean(o.ttft_ms() for o in of), statistics.mean(o.ttft_ms(0.99) for o in of),
                 statistics.mean(o.calls_per_s for o in of))
                for of in (outcomes, stock)
            ]  # fmt: skip
            hits = [statistics.mean(o.hit_rate for o in of) for of in (outcomes, stock)]
            change = tuple(mine / theirs - 1 for mine, theirs in zip(*means, strict=True))
            changes.setdefault((name in RECORDED, policy), []).append((hits[0] - hits[1], *change))
            print(
                name, blocks, policy, f"{hits[0]:.1%}", *(f"{value:.1f}" for value in means[0]),
                *(f"{value:+.1%}" for value in change), sep="\t", flush=True,
            )  # fmt: skip
    for (of_recorded, policy), rows in sorted(changes.items(), key=lambda item: not item[0][0]):
        if policy != "stock":
            hits_more, ttft, p99, rate = (statistics.mean(column) for column in zip(*rows, strict=True))
            print(
                f"{'recorded' if of_recorded else 'generated'}, {policy}: hits {100 * hits_more:+.1f} points, "
                f"mean TTFT {ttft:+.1%}, 99th percentile {p99:+.1%}, calls/s {rate:+.1%}"
            )


if __name__ == "__main__":
    main()
