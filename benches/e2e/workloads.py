"""Workloads for a real engine: calls of a trace as prompts of token ids, and the order in which they are sent.

Prompts are scaled down: a block of a trace, which stands for ``TRACE_BLOCK`` tokens, becomes ``SCALED_BLOCK`` tokens
that depend on the block's number only, so equal prefixes stay equal prefixes and everything else differs. What a
recorded answer added to the next prompt is part of that prompt; what the engine answers itself is not fed back. A
session ends before its first call that is longer than ``LONGEST`` tokens: prompts cut to a common length would all be
alike.

    python benches/e2e/workloads.py        what the replay hits on the default run's calls
"""

from __future__ import annotations

import gzip
import json
import os
import random
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

RECORDED = ("whowhen_magentic", "marble_research", "taubench_airline")
GENERATED = ("coding_team", "research_tree")

TRACE_BLOCK = 16
SCALED_BLOCK = 4
# vLLM's own blocks: on a CPU a multiple of 32.
ENGINE_BLOCK = 32
LONGEST = 4096

# The default run.
CONCURRENCY = 16
BATCH = 4
CALLS = 500
# Of a generated workload: their prompts are long, and all runs are to end within 45 minutes.
GENERATED_CALLS = 300
CAPACITY_SEEDS = 3


@dataclass(frozen=True)
class Call:
    """One call: who, and the numbers of the prompt's blocks in the trace."""

    session: str
    agent: str
    step: int
    blocks: tuple[int, ...]

    @property
    def name(self) -> str:
        """Names the call within its workload."""
        return f"{self.session}/{self.step}"

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return max(len(self.blocks) * SCALED_BLOCK, 1)

    @property
    def engine_blocks(self) -> tuple[int, ...]:
        """The engine's full blocks, each named by the last trace block in it: an equal number is an equal prefix."""
        per_block = ENGINE_BLOCK // SCALED_BLOCK
        return self.blocks[per_block - 1 :: per_block]

    def tokens(self) -> list[int]:
        """The prompt."""
        return [token for block in self.blocks for token in _tokens_of(block)] or [1000]


@cache
def _tokens_of(block: int) -> tuple[int, ...]:
    rng = random.Random(block)
    return tuple(rng.randrange(1000, 31_000) for _ in range(SCALED_BLOCK))


def calls_of(name: str, calls: int) -> int:
    """How many calls a run of `calls` sends of this workload."""
    return min(calls, GENERATED_CALLS) if name in GENERATED else calls


def _rows(name: str, traces: Path, seed: int) -> list[dict[str, Any]]:
    path = traces / f"{name}.jsonl.gz"
    if path.exists():
        text = gzip.decompress(path.read_bytes())
    else:
        from agentrt.replay import Trace

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "generated.jsonl"
            Trace.generate(name, seed=seed).write(file)
            text = file.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def sessions(name: str, traces: Path, seed: int) -> list[list[Call]]:
    """The workload's sessions in a seeded order; ``name``: a recorded trace or a generator."""
    by_session: dict[str, list[Call]] = {}
    shared: dict[tuple[str, int], int] = {}
    for row in _rows(name, traces, seed):
        blocks = [b for first, n in row["blocks"] for b in range(first, first + n)]
        if row.get("sys_key"):
            # Calls with equal system prompts share their first blocks, whatever numbers a session gave them.
            for i in range(min(row["sys_blocks"], len(blocks))):
                blocks[i] = shared.setdefault((row["sys_key"], i), -1 - len(shared))
        calls = by_session.setdefault(row["session_id"], [])
        calls.append(Call(row["session_id"], row["agent"], len(calls), tuple(blocks)))
    for calls in by_session.values():
        too_long = next((call.step for call in calls if call.n_tokens > LONGEST), len(calls))
        del calls[too_long:]
    order = sorted(session for session, calls in by_session.items() if calls)
    random.Random(seed).shuffle(order)
    return [by_session[session] for session in order]


class ClosedLoop:
    """Which call is sent when: so many sessions at a time, and never by the clock.

    A session sends its next call when a drawn number of calls of others have ended; a session that has ended is
    replaced by the next. The order of calls is therefore the same under every policy up to calls that overtake each
    other inside the engine. Nothing more is sent after ``calls`` calls, so that all sessions are busy to the end.
    """

    def __init__(self, sessions: Iterable[list[Call]], concurrency: int, calls: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._upcoming: Iterator[list[Call]] = iter(sessions)
        self._concurrency = concurrency
        self._left = calls
        self._ready: list[tuple[int, int, list[Call], int]] = []
        self._number = self._ended = self._live = 0
        for _ in range(concurrency):
            self._enqueue(None, 0)

    def _enqueue(self, session: list[Call] | None, step: int) -> None:
        if session is None or step == len(session):
            session, step = next(self._upcoming, None), 0
        if session is not None:
            wait = self._rng.randrange(self._concurrency) if self._ended else 0
            self._number += 1
            self._ready.append((self._ended + wait, self._number, session, step))

    def due(self) -> Iterator[tuple[list[Call], int]]:
        """Sessions, and their steps, whose calls are to be sent now."""
        self._ready.sort(key=lambda entry: entry[:2])
        while self._ready and self._left and (self._ready[0][0] <= self._ended or not self._live):
            _, _, session, step = self._ready.pop(0)
            self._left -= 1
            self._live += 1
            yield session, step

    def ended(self, session: list[Call], step: int) -> None:
        """A call has ended."""
        self._ended += 1
        self._live -= 1
        self._enqueue(session, step + 1)


def order_of_calls(sessions: list[list[Call]], concurrency: int, calls: int, seed: int) -> list[Call]:
    """The order in which an engine that ends calls in their order is sent them."""
    loop = ClosedLoop(sessions, concurrency, calls, seed)
    order: list[Call] = []
    live: list[tuple[list[Call], int]] = []
    while True:
        for session, step in loop.due():
            order.append(session[step])
            live.append((session, step))
        if not live:
            return order
        loop.ended(*live.pop(0))


def orders_of(name: str, traces: Path, concurrency: int, calls: int) -> list[list[Call]]:
    """Orders of calls from which a workload's pools are found."""
    return [order_of_calls(sessions(name, traces, seed), concurrency, calls, seed) for seed in range(CAPACITY_SEEDS)]


def write_trace(calls: Iterable[Call], workload: str, batch: int, path: Path) -> None:
    """Writes scaled calls as a trace in the engine's blocks: a call a second, ``batch`` of them running at a time."""
    numbers: dict[int, int] = {}
    with path.open("w") as file:
        for second, call in enumerate(calls):
            blocks = [[numbers.setdefault(b, len(numbers)), 1] for b in call.engine_blocks]
            row = {
                "schema_version": 1,
                "workload": workload,
                "session_id": call.session,
                "agent": call.agent,
                "t_arrival": second,
                "t_scope": "global",
                "llm_latency_s": batch - 0.5,
                "prompt_tokens": call.n_tokens,
                "output_tokens": 1,
                "block_size": ENGINE_BLOCK,
                "blocks": blocks,
            }
            file.write(json.dumps(row) + "\n")


@dataclass(frozen=True)
class Capacities:
    """Pool sizes of a workload, in blocks of the engine."""

    pressure: int
    fits: int
    # Block hit rates that the replay gives at ``pressure``.
    lru: float
    optimal: float


def replayed(
    orders: list[list[Call]], workload: str, batch: int, policies: list[str], sizes: list[int]
) -> dict[tuple[int, str], float]:
    """Block hit rates by pool and policy, all orders together."""
    from agentrt import replay

    with tempfile.TemporaryDirectory() as folder:
        traces = []
        for i, order in enumerate(orders):
            path = Path(folder) / f"{workload}-{i}.jsonl"
            write_trace(order, workload, batch, path)
            traces.append(path)
        results = replay.run(traces, policies=policies, capacities=sizes, order="open").results
    rates: dict[tuple[int, str], float] = {}
    for size in sizes:
        for policy in policies:
            rows = [r for r in results if (r.capacity_blocks, r.policy) == (size, policy)]
            rates[size, policy] = sum(r.hit_blocks for r in rows) / sum(r.prompt_blocks for r in rows)
    return rates


SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8)


def capacities(orders: list[list[Call]], workload: str, concurrency: int, batch: int) -> Capacities:
    """The pool at which MIN - LRU is largest in the replay of these orders, and one into which all of them fit.

    Looked for among ``SHARES`` of the live working set (concurrent sessions times their mean distinct blocks); a pool
    holds at least the longest prompts that run at once.
    """
    fits, least, live = 0, 0, []
    for order in orders:
        distinct: dict[str, set[int]] = {}
        for call in order:
            distinct.setdefault(call.session, set()).update(call.engine_blocks)
        live.append(concurrency * statistics.mean(map(len, distinct.values())))
        # An answer takes a block, and so does the unfinished end of a prompt.
        fits = max(fits, len(set().union(*distinct.values())) + 2 * len(order))
        least = max(least, *(len(call.engine_blocks) for call in order))
    typical = statistics.mean(len(call.engine_blocks) for order in orders for call in order)
    least = max(least + 4, int(batch * (typical + 2)))
    sizes = sorted({max(least, int(share * statistics.mean(live))) for share in SHARES})
    rates = replayed(orders, workload, batch, ["lru", "min"], sizes)
    best = max(sizes, key=lambda size: rates[size, "min"] - rates[size, "lru"])
    return Capacities(best, fits, rates[best, "lru"], rates[best, "min"])


def main() -> None:
    traces = Path(os.environ.get("AGENTRT_TRACES", Path(__file__).resolve().parents[3] / "shared" / "traces"))
    policies = ["lru", "cachescout", "agentrt", "min"]
    print("| workload | blocks |", " | ".join(policies), "|")
    for name in (*RECORDED, *GENERATED):
        orders = orders_of(name, traces, CONCURRENCY, calls_of(name, CALLS))
        pool = capacities(orders, name, CONCURRENCY, BATCH)
        rates = replayed(orders, name, BATCH, policies, [pool.pressure])
        print(f"| `{name}` | {pool.pressure} |", " | ".join(f"{rates[pool.pressure, p]:.1%}" for p in policies), "|")


if __name__ == "__main__":
    main()
