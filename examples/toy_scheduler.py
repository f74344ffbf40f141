"""A toy scheduler that reports in batches, as an engine does, once with LRU and once with the learned policy.

Sessions run through the same team of agents; each agent's prompt is its own system prompt followed by the session's
growing history. The scheduler gathers the events of a step and reports them in one call of ``observe`` with one array
per field. Run it: python examples/toy_scheduler.py
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import agentrt
from agentrt import EventKind

POOL_BLOCKS = 220
TEAM = ("planner", "searcher", "writer", "critic")


@dataclass
class Run:
    """One workflow run: its agents take turns, a quarter of the runs stop after each round."""

    name: int
    turn: int = 0
    due_s: float = 0.0
    history: dict[str, list[int]] = field(default_factory=dict)


def key(*parts: object) -> int:
    """Stands for the engine's prefix hash."""
    return agentrt.block_key(repr(parts).encode())


class Batch:
    """Events of one step, gathered in lists and handed over as arrays."""

    def __init__(self) -> None:
        self.fields: list[list[int]] = [[], [], [], [], []]
        self.offsets, self.blocks = [0], []

    def add(self, kind: EventKind, run: Run, agent: int, now_s: float, blocks: list[int]) -> None:
        """One event."""
        for column, value in zip(self.fields, (kind, run.name, agent, run.name, round(now_s * 1e6)), strict=True):
            column.append(value)
        self.blocks += blocks
        self.offsets.append(len(self.blocks))

    def arrays(self) -> Any:
        """The arguments of ``observe``."""
        dtypes = (np.uint8, np.uint64, np.uint16, np.uint64, np.uint64)
        columns = [np.array(column, dtype) for column, dtype in zip(self.fields, dtypes, strict=True)]
        return (*columns, np.array(self.offsets, np.uint32), np.array(self.blocks, np.uint64))


def serve(policy: str) -> float:
    """Hit rate over 4,000 calls."""
    rng = random.Random(1)  # noqa: S311 - a toy
    runtime = agentrt.Runtime(POOL_BLOCKS, policies=(policy,))
    workload = runtime.workload("toy")
    agents = {name: workload.agent(name) for name in TEAM}
    runs = [Run(i, due_s=rng.random()) for i in range(12)]
    free, names, now_s = POOL_BLOCKS, len(runs), 0.0
    for _ in range(4000):
        run = min(runs, key=lambda run: run.due_s)
        now_s = max(now_s, run.due_s)
        agent = TEAM[run.turn % len(TEAM)]
        system = [key(agent, i) for i in range(6)]
        prompt = system + run.history.setdefault(agent, [])

        start = Batch()
        start.add(EventKind.CALL_START, run, agents[agent], now_s, prompt)
        resident = workload.observe(*start.arrays())
        new = [key(run.name, run.turn, i) for i in range(5)]
        short = len(prompt) + len(new) - resident - free
        if short > 0:
            free += len(runtime.act("evict", short, time=now_s))
        end = Batch()
        end.add(EventKind.STORED, run, 0, now_s, prompt[resident:])
        end.add(EventKind.CALL_END, run, 0, now_s + 0.2, new)
        run.history[agent] += new
        run.turn += 1
        over = run.turn % len(TEAM) == 0 and rng.random() < 0.25
        if over:
            end.add(EventKind.SESSION_END, run, 0, now_s + 0.2, [])
        workload.observe(*end.arrays())
        free -= len(prompt) + len(new) - resident
        now_s += 0.2
        if over:
            runs[runs.index(run)] = Run(names, due_s=now_s + rng.expovariate(0.2))
            names += 1
        else:
            run.due_s = now_s + rng.expovariate(2 if run.turn % len(TEAM) else 0.2)
    stats = runtime.stats()
    return stats["hit_blocks"] / stats["prompt_blocks"]


if __name__ == "__main__":
    for policy in ("lru", "kv_cache"):
        print(f"{policy:10} {100 * serve(policy):.1f} % of prompt blocks were cached")
