"""Victims named ahead by a thread that works steps off: as much is hit, and results do not depend on how fast it is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benches.e2e.pool import closed_loop
from tests.engines.vllm.pool import Call, Engine, block_hash, faults, read_calls
from tests.engines.vllm.scheduler import Server, prompt, transfer
from tests.engines.vllm.test_scheduler import asynchronously, busy, small

pytestmark = pytest.mark.usefixtures("vllm")


def ahead(made: Engine | Server, blocks: int) -> Any:
    """Switches it on or off, whatever the size of the pool; returns what holds the calls."""
    held: Any = made.connector.adapter.held  # type: ignore[union-attr]
    held.ahead = blocks
    return held


def test_it_is_on_in_large_pools_only() -> None:
    assert ahead_of(Engine(2_000)) == 0
    assert ahead_of(Engine(9_000)) == 17
    assert ahead_of(Engine(9_000, "lru")) == 0


def cached(made: Engine, block: int) -> bool:
    return made.pool.get_cached_block(block_hash(block), [0]) is not None


def ahead_of(made: Engine) -> int:
    blocks: int = made.connector.adapter.held.ahead  # type: ignore[union-attr]
    return blocks


def run(path: Path, blocks: int, pause_s: float = 0.0) -> Engine:
    made = Engine(3_000)
    held = ahead(made, blocks)
    step = made.step

    def slowly(scheduled: dict[str, int]) -> None:
        step(scheduled)
        time.sleep(pause_s)

    if pause_s:
        made.step = slowly  # type: ignore[method-assign]
    closed_loop(read_calls(path, 600), made, 3_000, concurrency=8, seed=0)
    held.catch_up()
    made.check()
    assert not faults(made.connector)
    repairs = made.connector.adapter.core.runtime.repairs()  # type: ignore[union-attr]
    assert repairs["unknown_calls"] == repairs["duplicate_calls"] == 0
    ranker = made.connector.adapter.ranker  # type: ignore[union-attr]
    # Some blocks vLLM takes by itself before they are put in place.
    assert ranker.stale_blocks < ranker.ranked_blocks / 200
    return made


@pytest.mark.parametrize("workload", ["whowhen_magentic", "marble_research"])
def test_as_much_is_hit(recorded_traces: list[Path], workload: str) -> None:
    path = next(p for p in recorded_traces if p.name == f"{workload}.jsonl.gz")
    at_once, by_thread = run(path, 0), run(path, 16)
    assert len(by_thread.evicted) > 1_000
    assert abs(by_thread.hit_blocks - at_once.hit_blocks) < 0.01 * at_once.prompt_blocks


def test_results_do_not_depend_on_how_fast_the_thread_is(recorded_traces: list[Path]) -> None:
    path = next(p for p in recorded_traces if p.name == "whowhen_magentic.jsonl.gz")
    # Without a pause nearly all steps are taken back before the thread has seen them, with one hardly any.
    quick, slow = run(path, 16), run(path, 16, pause_s=0.0015)
    assert quick.hits == slow.hits
    assert quick.evicted == slow.evicted


@asynchronously
@pytest.mark.parametrize("role", ["kv_producer", "kv_both"])
@pytest.mark.parametrize("blocks", [1, 8, 64])
def test_everything_is_served(tmp_path: Path, role: str, asynchronous: bool, blocks: int) -> None:
    server = small(tmp_path, {**transfer("agentrt"), "kv_role": role}, asynchronous=asynchronous)
    held = ahead(server, blocks)
    busy(server)
    held.catch_up()
    assert server.preempted
    assert server.connector.adapter.ranker.ranked_blocks > 100
    repairs = server.connector.adapter.core.runtime.repairs()
    assert repairs["unknown_calls"] == repairs["duplicate_calls"] == 0


@asynchronously
def test_a_reset_under_load_starts_over(tmp_path: Path, asynchronous: bool) -> None:
    server = small(tmp_path, transfer("agentrt"), asynchronous=asynchronous)
    ahead(server, 8)
    for n in range(4):
        server.add(f"r{n}", prompt(*range(10 * n, 10 * n + 10)), 20, session_id=f"s{n}", agent_id="a")
    for _ in range(3):
        server.step()
    assert server.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    server.run()
    server.add("again", prompt(*range(10)), 1, session_id="s0", agent_id="a")
    server.run()
    assert server.cached["again"] == 320
    server.check()


def test_what_is_named_ahead_and_hit_again_stays() -> None:
    made = Engine(64)
    held = ahead(made, 40)
    sessions = [Call(f"s{n}", "a", list(range(20 * n, 20 * n + 9)), [20 * n + 9, 20 * n + 10]) for n in range(8)]
    for call in (*sessions, *sessions):
        made.call(call)
    held.catch_up()
    ranker = made.connector.adapter.ranker  # type: ignore[union-attr]
    assert ranker.pending_blocks > 8

    def resident(call: Call) -> int:
        there = [cached(made, b) for b in call.prompt]
        return [*there, False].index(False)

    # What is resident is hit, whether it has been named or not, and can be named again.
    before = len(made.hits)
    for call in sorted(sessions, key=resident, reverse=True):
        expected = resident(call)
        assert made.call(call) == expected
    held.catch_up()
    made.check()
    assert sum(made.hits[before:]) >= 9
    assert not faults(made.connector)


def test_a_call_that_ends_in_the_step_in_which_it_starts_is_told_whole() -> None:
    made = Engine(64)
    held = ahead(made, 8)
    assert made.connector is not None
    request = made.request(Call("s", "a", [0, 1, 2, 3], []))
    step, made.step = made.step, lambda scheduled: None  # type: ignore[method-assign]
    assert made.admit(request)
    made.finish(request)
    made.step = step  # type: ignore[method-assign]
    made.step({})
    held.catch_up()
    runtime = made.connector.adapter.core.runtime  # type: ignore[union-attr]
    assert runtime.repairs()["unknown_calls"] == 0
    assert made.call(Call("s", "a", [0, 1, 2, 3], [])) == 4
    assert runtime.stats()["hit_blocks"] == 4
    assert not faults(made.connector)


def test_without_its_thread_everything_is_done_at_once() -> None:
    made = Engine(64)
    held = ahead(made, 8)
    assert made.connector is not None
    for n in range(8):
        made.call(Call(f"s{n % 2}", "a", list(range(20 * n, 20 * n + 12)), []))
    held.lose_thread()
    for n in range(8):
        made.call(Call(f"s{n % 2}", "a", list(range(20 * n, 20 * n + 12)), []))
    assert list(faults(made.connector).values()) == [1]
    assert held.ahead == 0
    # It has started over: what it names now is there, and nothing of before stays for good.
    for n in range(10, 40):
        made.call(Call(f"s{n % 2}", "a", list(range(20 * n, 20 * n + 12)), [20 * n + 12]))
    assert not any(cached(made, b) for b in range(200))
    assert list(faults(made.connector).values()) == [1]
    made.check()


@pytest.mark.parametrize("blocks", [0, 16])
def test_calls_that_give_up_waiting_leave_nothing_for_good(blocks: int) -> None:
    made = Engine(64)
    ahead(made, blocks)
    assert made.connector is not None
    old = [Call(f"s{n}", "a", list(range(20 * n, 20 * n + 9)), [20 * n + 9, 20 * n + 10]) for n in range(8)]
    for call in (*old, *old):
        made.call(call)
    for n in range(90, 96):
        requests = [made.request(call) for call in old]
        made.step({})
        made.step({})
        for request in requests:
            made.connector.request_finished_all_groups(request, ([],))
        # Makes room for itself, so that more is named ahead.
        made.call(Call(f"s{n}", "a", list(range(20 * n, 20 * n + 4)), [20 * n + 4, 20 * n + 5]))
    for n in range(100, 160):
        made.call(Call(f"s{n}", "a", list(range(20 * n, 20 * n + 9)), [20 * n + 9, 20 * n + 10]))
    assert not any(cached(made, b) for b in range(200))
    assert not faults(made.connector)
    made.check()


def test_a_refused_event_is_one_fault_and_the_rest_is_told() -> None:
    made = Engine(64)
    held = ahead(made, 8)
    assert made.connector is not None
    made.call(Call("s", "a", [0, 1, 2], []))
    # No pool has such blocks.
    held.register(np.array([1], dtype=np.uint64), [1_000], 0)
    made.step({})
    held.catch_up()
    made.step({})
    assert list(faults(made.connector).values()) == [1]
    assert made.call(Call("s", "a", [0, 1, 2], [])) == 3
