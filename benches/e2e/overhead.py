"""What the adapter adds to a scheduler step of vLLM, measured with vLLM's real cache manager and no model.

A pool of 50,000 blocks, 256 running requests, one token each a step; a request that has reached its length ends and the
next call of a session arrives, its prompt longer by the answer. Prompts grow from 40 to 160 blocks of 16 tokens,
answers have 4 to 20 blocks, and 2,000 sessions share the pool, so that a third of the prompt blocks miss and every
allocation evicts. That is 1.3 arrivals a step; steps without an arrival are also reported apart. Between steps 2 ms
pass, as the model of such a batch would take at least: agentrt's thread works then, unless ``--at-once`` does without.

Counted: every hook vLLM calls during a step, together. Every run does exactly the same work, so on a machine with other
work the least time of each step over ``--repeat`` runs is what the step costs, and so for each hook in it; the times as
they came are printed too.
`record` is `observe` that also writes a trace, as `agentrt record` does; what the writing thread takes shows in
`cpu_us_per_step`, the processor time of the whole process, harness and vLLM included.

    python benches/e2e/overhead.py
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.engines.vllm.pool import BLOCK, Call, Engine

POOL = 50_000
RUNNING = 256
SESSIONS = 2_000
# What the model of such a batch takes at least.
MODEL_S = 0.002


class Load:
    """Sessions that extend their prompts."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.numbers = count()
        self.anchors = [[next(self.numbers) for _ in range(20)] for _ in range(8)]
        self.prompts: list[list[int]] = [[] for _ in range(SESSIONS)]

    def next(self) -> Call:
        session = self.rng.randrange(SESSIONS)
        prompt = self.prompts[session]
        if not prompt or len(prompt) > 160:
            prompt = [*self.anchors[session % 8], *(next(self.numbers) for _ in range(20))]
        output = [next(self.numbers) for _ in range(self.rng.randint(4, 20))]
        self.prompts[session] = prompt + output
        return Call(f"s{session}", f"agent{session % 8}", prompt, output)


class Times(NamedTuple):
    """Nanoseconds in the hooks, together and each, and arrivals, by step; and what is the same in every run."""

    spent: list[int]
    by_hook: dict[str, list[int]]
    arrivals: list[int]
    cpu_us_per_step: float
    facts: dict[str, Any]


def run(policy: str, steps: int, warm_up: int, at_once: bool) -> Times:
    with tempfile.TemporaryDirectory() as folder:
        extra = {"record": f"{folder}/trace.jsonl"} if policy == "record" else {}
        engine = Engine(POOL, "observe" if extra else policy, **extra)
        if at_once:
            engine.connector.adapter.held.ahead = 0  # type: ignore[union-attr]
        return measure(engine, steps, warm_up)


def measure(engine: Engine, steps: int, warm_up: int) -> Times:
    load = Load()
    connector = engine.connector
    assert connector is not None
    spent: dict[str, int] = {}
    per_step: list[int] = []
    by_hook: dict[str, list[int]] = {}
    arrivals: list[int] = []
    for hook in (
        "on_new_request",
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
        "request_finished_all_groups",
    ):
        real = getattr(connector, hook)

        def timed(*arguments: Any, real: Any = real, hook: str = hook, clock: Any = time.perf_counter_ns) -> Any:
            start = clock()
            try:
                return real(*arguments)
            finally:
                spent[hook] += clock() - start

        setattr(connector, hook, timed)
        by_hook[hook] = []
    live: list[tuple[Any, int]] = []
    step = engine.step
    engine.step = lambda scheduled: None  # type: ignore[method-assign]
    gc.collect()
    gc.freeze()
    cpu_start = 0.0
    for i in range(warm_up + steps):
        spent.update(dict.fromkeys(by_hook, 0))
        if i == warm_up:
            cpu_start = time.process_time()
        engine.now_us += 30_000
        scheduled: dict[str, int] = {}
        still = []
        for request, left in live:
            request.append_output_token_ids([1])
            assert engine.manager.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1
            scheduled[request.request_id] = 1
            still.append((request, left - 1))
        # A step admits at most four prompts until the batch is full, then as many as have ended.
        admitted = 0
        while len(still) < RUNNING and (admitted < 4 or len(live) == RUNNING):
            call = load.next()
            request = engine.request(call)
            assert engine.admit(request)
            scheduled[request.request_id] = request.num_tokens
            still.append((request, len(call.output) * BLOCK))
            admitted += 1
        step(scheduled)
        until = time.perf_counter() + MODEL_S
        while time.perf_counter() < until:
            pass
        live = []
        for request, left in still:
            if left <= 0:
                engine.finish(request)
            else:
                live.append((request, left))
        if i >= warm_up:
            per_step.append(sum(spent.values()))
            for hook, ns in spent.items():
                by_hook[hook].append(ns)
            arrivals.append(admitted)
    assert connector.adapter is not None
    connector.adapter.close()
    cpu_us_per_step = (time.process_time() - cpu_start) * 1e6 / steps
    engine.check()
    assert connector.adapter.ranker is not None
    facts = {
        "hit_rate": round(engine.hit_blocks / engine.prompt_blocks, 3),
        "evictions": len(engine.evicted),
        "ranked": connector.adapter.ranker.ranked_blocks,
        "stale": connector.adapter.ranker.stale_blocks,
        "faults": {kind: n for kind, n in connector.guard.faults.items() if not kind.endswith("slow")},
    }
    gc.unfreeze()
    return Times(per_step, by_hook, arrivals, cpu_us_per_step, facts)


def percentiles(spent: list[int], arrivals: list[int]) -> dict[str, Any]:
    quiet = [ns for ns, n in zip(spent, arrivals, strict=True) if n == 0]

    def us(values: list[int], q: float) -> float:
        return round(sorted(values)[int(len(values) * q)] / 1e3, 1)

    return {
        "median_us": us(spent, 0.5),
        "p90_us": us(spent, 0.9),
        "p99_us": us(spent, 0.99),
        "mean_us": round(sum(spent) / len(spent) / 1e3, 1),
        "without_arrival": {"steps": len(quiet), "median_us": us(quiet, 0.5), "p99_us": us(quiet, 0.99)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--warm-up", type=int, default=1200)
    parser.add_argument("--policies", default="observe,lru,agentrt")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--at-once", action="store_true", help="everything in the hooks, nothing beside")
    arguments = parser.parse_args()
    for policy in arguments.policies.split(","):
        runs = [run(policy, arguments.steps, arguments.warm_up, arguments.at_once) for _ in range(arguments.repeat)]
        arrivals = runs[0].arrivals
        assert all(one.arrivals == arrivals and one.facts == runs[0].facts for one in runs), "runs differ"
        least = [min(times) for times in zip(*(one.spent for one in runs), strict=True)]
        by_hook = {
            hook: round(
                sum(map(min, zip(*(one.by_hook[hook] for one in runs), strict=True))) / arguments.steps / 1e3, 1
            )
            for hook in runs[0].by_hook
        }
        result = {
            "policy": policy,
            "steps": arguments.steps,
            "arrivals_per_step": round(sum(arrivals) / len(arrivals), 2),
            "least_of_runs": percentiles(least, arrivals),
            "cpu_us_per_step": round(min(one.cpu_us_per_step for one in runs), 1),
            "mean_us_by_hook": by_hook,
            "first_run": percentiles(runs[0].spent, arrivals),
            **runs[0].facts,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
