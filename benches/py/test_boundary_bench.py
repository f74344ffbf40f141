"""What a call through Python costs, each beside the same work in plain Python, with equal results asserted.

Run: python -m pytest benches/py --benchmark-enable --benchmark-only --benchmark-columns=median,min,rounds
The figures mean a release build only; ``build`` in the extra info says which one ran. ``per_item_ns`` is the median per
event, block or victim.
"""

from __future__ import annotations

import resource
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import agentrt

BATCH = 256
SESSIONS = 16
AGENTS = 6
POOL = 50_000
SCORED = 4096


@pytest.fixture(autouse=True)
def optimised() -> None:
    if agentrt.build_info().endswith("(debug)"):
        pytest.fail("benchmarks need a release build: make develop")


def _report(benchmark: BenchmarkFixture, items: int, correct: bool) -> None:
    assert correct
    benchmark.extra_info.update(
        build=agentrt.build_info(),
        correct=correct,
        per_item_ns=round(benchmark.stats.stats.median * 1e9 / items, 1),
    )


class Twin:
    """What observe keeps, in plain Python: transitions per pair of agents, residency, the order of last use."""

    def __init__(self, pool_blocks: int) -> None:
        self.last: dict[int, int] = {}
        self.transitions: Counter[tuple[int, int]] = Counter()
        self.resident: OrderedDict[int, None] = OrderedDict()
        self.calls: dict[int, list[int]] = {}
        self.events = 0

    def observe(self, kinds: list[int], sessions: list[int], agents: list[int], calls: list[int],
                blocks: list[list[int]] | None = None) -> int:  # fmt: skip
        hits = 0
        for i, kind in enumerate(kinds):
            prompt = blocks[i] if blocks else []
            self.events += 1
            if kind == 0:
                session, agent = sessions[i], agents[i]
                if session in self.last:
                    self.transitions[self.last[session], agent] += 1
                self.last[session] = agent
                for block in prompt:
                    if block not in self.resident:
                        break
                    hits += 1
                self.calls[calls[i]] = list(prompt)
            elif kind == 1:
                for block in prompt:
                    self.resident[block] = None
            else:
                for block in reversed(self.calls.pop(calls[i], [])):
                    self.resident.move_to_end(block)
        return hits

    def predict(self, session: int) -> int:
        last = self.last[session]
        return max(range(AGENTS), key=lambda agent: self.transitions[last, agent])

    def evict(self, n: int) -> list[int]:
        return [self.resident.popitem(last=False)[0] for _ in range(min(n, len(self.resident)))]


class Stream:
    """Batches of call starts and ends: agents follow each other in a ring, in every session."""

    def __init__(self) -> None:
        pairs = np.arange(BATCH // 2)
        self.kinds = np.tile(np.array([0, 2], np.uint8), BATCH // 2)
        self.sessions = np.repeat(pairs % SESSIONS, 2).astype(np.uint64)
        self.turn = np.repeat(pairs // SESSIONS, 2)
        self.number = 0

    def __call__(self) -> tuple[Any, ...]:
        agents = ((self.turn + self.number * (BATCH // 2 // SESSIONS)) % AGENTS).astype(np.uint16)
        times = (np.arange(BATCH, dtype=np.uint64) + np.uint64(self.number * BATCH)) * np.uint64(1000)
        self.number += 1
        return self.kinds, self.sessions, agents, self.sessions, times


def _lists(batch: tuple[Any, ...]) -> tuple[list[int], ...]:
    return tuple(column.tolist() for column in batch)


def _rounds(benchmark: BenchmarkFixture, call: Callable[..., object], inputs: Callable[[], tuple[Any, ...]]) -> None:
    benchmark.pedantic(call, setup=lambda: (inputs(), {}), rounds=2000, warmup_rounds=50)


def _agrees(workload: agentrt.Workload, runtime: agentrt.Runtime, twin: Twin, rounds: int) -> bool:
    """Feeds the twin what the runtime got and compares counts and predictions."""
    stream = Stream()
    for _ in range(rounds):
        kinds, sessions, agents, calls, _times = _lists(stream())
        twin.observe(kinds, sessions, agents, calls)
    predicted = [workload.session(session).predict(1)[0].agent_id for session in range(SESSIONS)]
    return (
        runtime.stats()["events"] == twin.events
        and runtime.stats()["sessions"] == len(twin.last)
        and predicted == [twin.predict(session) for session in range(SESSIONS)]
    )


@pytest.mark.benchmark(group="observe, 256 identity-only events")
def test_observe_arrays(benchmark: BenchmarkFixture) -> None:
    runtime, stream = agentrt.Runtime(POOL), Stream()
    workload = runtime.workload("bench")
    _rounds(benchmark, workload.observe, stream)
    _report(benchmark, BATCH, _agrees(workload, runtime, Twin(POOL), stream.number))


@pytest.mark.benchmark(group="observe, 256 identity-only events")
def test_observe_lists(benchmark: BenchmarkFixture) -> None:
    runtime, stream = agentrt.Runtime(POOL), Stream()
    workload = runtime.workload("bench")
    _rounds(benchmark, workload.observe_lists, lambda: _lists(stream()))
    _report(benchmark, BATCH, _agrees(workload, runtime, Twin(POOL), stream.number))


@pytest.mark.benchmark(group="observe, 256 identity-only events")
def test_observe_twin(benchmark: BenchmarkFixture) -> None:
    stream, twin = Stream(), Twin(POOL)
    _rounds(benchmark, lambda k, s, a, c, _t: twin.observe(k, s, a, c), lambda: _lists(stream()))
    _report(benchmark, BATCH, twin.events == stream.number * BATCH)


@pytest.mark.benchmark(group="observe, 256 events that teach nothing: the boundary alone")
def test_observe_boundary_alone(benchmark: BenchmarkFixture) -> None:
    runtime = agentrt.Runtime(POOL)
    workload = runtime.workload("bench")
    _, sessions, agents, calls, times = Stream()()
    kinds = np.full(BATCH, agentrt.EventKind.TOOL_END, np.uint8)
    benchmark(workload.observe, kinds, sessions, agents, calls, times)
    _report(benchmark, BATCH, runtime.stats()["events"] % BATCH == 0)


def _filled(policy: str) -> tuple[agentrt.Runtime, Twin]:
    """64 finished calls of 700 private blocks each."""
    runtime, twin = agentrt.Runtime(POOL, policies=(policy,)), Twin(POOL)
    workload = runtime.workload("bench")
    for call in range(64):
        blocks = list(range(1000 * call + 1, 1000 * call + 701))
        session = workload.session(call)
        at = float(call)
        assert session.call_start(call % AGENTS, blocks, time=at) == twin.observe([0], [call], [0], [call], [blocks])
        session.stored(blocks, time=at)
        session.call_end(time=at + 0.5)
        twin.observe([1, 2], [call, call], [0, 0], [call, call], [blocks, []])
    return runtime, twin


def _scored() -> np.ndarray:
    """Half of them resident."""
    rng = np.random.default_rng(1)
    resident = rng.integers(0, 64, SCORED) * 1000 + rng.integers(1, 701, SCORED)
    return np.where(np.arange(SCORED) % 2, resident, resident + 100_000_000).astype(np.uint64)


@pytest.mark.benchmark(group="score, 4,096 blocks")
def test_score(benchmark: BenchmarkFixture) -> None:
    runtime, twin = _filled("kv_cache")
    runtime.act("evict", 0, time=64.0)
    keys, out = _scored(), np.empty(SCORED, np.float32)
    benchmark(runtime.score, keys, out)
    _report(benchmark, SCORED, (out > 0).tolist() == [key in twin.resident for key in keys.tolist()])


@pytest.mark.benchmark(group="score, 4,096 blocks")
def test_score_twin(benchmark: BenchmarkFixture) -> None:
    _, twin = _filled("kv_cache")
    keys = _scored().tolist()
    scores = benchmark(lambda: [1.0 if key in twin.resident else 0.0 for key in keys])
    _report(benchmark, SCORED, sum(scores) == SCORED / 2)


def _taught() -> tuple[agentrt.Workload, Twin]:
    runtime, twin, stream = agentrt.Runtime(POOL), Twin(POOL), Stream()
    workload = runtime.workload("bench")
    for _ in range(50):
        batch = stream()
        workload.observe(*batch)
        twin.observe(*_lists(batch)[:4])
    return workload, twin


@pytest.mark.benchmark(group="predict, 4 steps")
def test_predict(benchmark: BenchmarkFixture) -> None:
    workload, twin = _taught()
    session = workload.session(3)
    predictions = benchmark(session.predict, 4)
    _report(benchmark, 1, predictions[0].agent_id == twin.predict(3))


@pytest.mark.benchmark(group="predict, 4 steps")
def test_predict_into(benchmark: BenchmarkFixture) -> None:
    workload, twin = _taught()
    rows = np.zeros((32, 4), np.float32)
    benchmark(workload.predict_into, 3, 4, rows)
    _report(benchmark, 1, int(rows[0, 0]) == twin.predict(3))


@pytest.mark.benchmark(group="predict, 4 steps")
def test_predict_twin(benchmark: BenchmarkFixture) -> None:
    """One step and the most frequent successor only."""
    workload, twin = _taught()
    agent = benchmark(twin.predict, 3)
    _report(benchmark, 1, agent == workload.session(3).predict(1)[0].agent_id)


@pytest.mark.benchmark(group="act, 64 victims")
@pytest.mark.parametrize("policy", ["kv_cache", "lru"])
def test_act(benchmark: BenchmarkFixture, policy: str) -> None:
    runtime, twin = _filled(policy)
    out = np.empty(64, np.uint64)
    victims: list[list[int]] = []
    benchmark.pedantic(
        lambda: runtime.act("evict", 64, out, 70.0), setup=lambda: victims.append(out.tolist()), rounds=200
    )
    victims.append(out.tolist())
    gone = [key for some in victims[1:] for key in some]
    correct = len(set(gone)) == len(gone) == 64 * 200 and set(gone) <= set(twin.resident)
    if policy == "lru":
        correct = correct and gone == twin.evict(64 * 200)
    _report(benchmark, 64, correct)


@pytest.mark.benchmark(group="act, 64 victims")
def test_act_twin(benchmark: BenchmarkFixture) -> None:
    _, twin = _filled("lru")
    before = len(twin.resident)
    benchmark.pedantic(twin.evict, args=(64,), rounds=200)
    _report(benchmark, 64, before - len(twin.resident) == 64 * 200)


@pytest.mark.benchmark(group="ten million hostile events, every id new")
def test_ten_million_hostile_events_leave_memory_bounded(benchmark: BenchmarkFixture) -> None:
    runtime = agentrt.Runtime(POOL)
    workload = runtime.workload("bench")
    batch, batches = 100_000, 100
    offsets = np.arange(batch + 1, dtype=np.uint32)
    kinds = np.tile(np.array([0, 1, 2, 3, 6], np.uint8), batch // 5)

    def rss() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def feed(number: int) -> None:
        new = np.arange(batch, dtype=np.uint64) + np.uint64(number * batch)
        workload.observe(kinds, new, new.astype(np.uint16), new, new, offsets, new)

    feed(0)
    before = rss()

    def all_of_them() -> float:
        begin = time.perf_counter()
        for number in range(1, batches):
            feed(number)
        return time.perf_counter() - begin

    benchmark.pedantic(all_of_them, rounds=1)
    grown = rss() - before
    benchmark.extra_info["resident_growth_bytes"] = grown
    _report(benchmark, batch * (batches - 1), grown < 16_000_000 and runtime.stats()["events"] == batch * batches)
