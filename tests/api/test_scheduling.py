"""The scheduling policies by name, asked as an engine written in Python asks them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

import agentrt


def order(
    scheduler: agentrt.Scheduler,
    calls: Sequence[int] | NDArray[np.uint64],
    resident_tokens: Sequence[int] | NDArray[np.uint32] | None = None,
    groups: NDArray[np.uint64] | None = None,
    time: float | None = None,
) -> tuple[list[int], list[float]]:
    """What a full engine with four running calls is answered."""
    first, held = scheduler.order(
        calls, resident_tokens, groups, running_calls=4, pinned_blocks=300, free_blocks=0, time=time
    )
    return first.tolist(), held.tolist()


def engine(*policies: str) -> tuple[agentrt.Runtime, agentrt.Workload, agentrt.Scheduler]:
    runtime = agentrt.Runtime(1024, policies=(*policies, "kv_cache"))
    return runtime, runtime.workload("test"), agentrt.Scheduler(runtime)


def arrive(scheduler: agentrt.Scheduler, workload: agentrt.Workload, calls: list[tuple[str, int]]) -> list[int]:
    for call, (session, tenant) in enumerate(calls, start=1):
        scheduler.arrived(workload.session(session), "agent", call, 1000, tenant=tenant, time=call / 1000)
    return list(range(1, len(calls) + 1))


def test_without_a_scheduling_policy_calls_go_in_order_of_arrival() -> None:
    _, workload, scheduler = engine()
    calls = arrive(scheduler, workload, [("a", 0), ("b", 0), ("c", 0)])
    first, held = order(scheduler, [calls[2], calls[0], calls[1]], time=1.0)
    assert first == [1, 2, 0]
    assert held == [0.0, 0.0, 0.0]
    assert scheduler.needs == ()


def test_fairness_gives_turns_to_tenants_and_lists_equal_arrays() -> None:
    _, workload, scheduler = engine("fairness")
    calls = arrive(scheduler, workload, [("a", 0), ("b", 0), ("c", 0), ("d", 1), ("e", 1)])
    first, _ = order(scheduler, calls, time=1.0)
    assert first == [0, 3, 1, 4, 2]
    arrays = np.array(calls, np.uint64), np.zeros(5, np.uint32), np.zeros(5, np.uint64)
    assert order(scheduler, *arrays, time=1.0)[0] == first


def test_a_tenant_that_was_served_waits_for_the_other() -> None:
    _, workload, scheduler = engine("fairness")
    calls = arrive(scheduler, workload, [("a", 0), ("b", 0), ("c", 1)])
    scheduler.admitted(calls[0], resident_tokens=200, time=1.0)
    scheduler.served([calls[0]], [800], [50], [1_000_000], time=1.5)
    first, _ = order(scheduler, calls[1:], time=2.0)
    assert first == [1, 0]


def test_shaping_lets_calls_follow_that_share_a_resident_prefix() -> None:
    _, workload, scheduler = engine("batch_shaping")
    calls = arrive(scheduler, workload, [("a", 0), ("b", 0), ("c", 0)])
    first, held = order(scheduler, calls, [800, 0, 800], np.array([7, 0, 7], np.uint64), time=1.0)
    assert first == [0, 2, 1]
    assert held == [0.0, 0.0, 0.0]


def test_all_policies_together_are_listed_in_order_of_precedence() -> None:
    runtime = agentrt.Runtime(64, policies=("kv_cache", "batch_shaping", "fairness"))
    assert runtime.policies == ("fairness", "batch_shaping", "kv_cache")


def test_an_engine_that_lacks_an_event_is_refused_with_policy_and_event() -> None:
    runtime = agentrt.Runtime(64, policies=("fairness", "kv_cache"))
    with pytest.raises(agentrt.AgentRTError, match="fairness needs what this engine does not report: tokens served"):
        agentrt.Scheduler(runtime, without=["service"])
    with pytest.raises(agentrt.errors.BadOptionError, match="unknown name `weather`"):
        agentrt.Scheduler(runtime, without=["weather"])
    assert "service" in agentrt.Scheduler(runtime).needs


def test_every_policy_has_a_price_that_grows_with_what_it_is_asked() -> None:
    _, workload, scheduler = engine("fairness", "batch_shaping")
    nothing = {"questions": 0, "question_us": 0.0, "event_us": 0.0}
    assert scheduler.prices() == {"fairness": nothing, "batch_shaping": nothing, "kv_cache": nothing}
    calls = arrive(scheduler, workload, [("a", 0), ("b", 1)])
    for _ in range(3):
        order(scheduler, calls, time=1.0)
    prices = scheduler.prices()
    assert list(prices) == ["fairness", "batch_shaping", "kv_cache"]
    for name, price in prices.items():
        assert price["questions"] == 3
        assert 0 <= price["question_us"] < 1e6
        assert 0 <= price["event_us"] < 1e6
        if name != "kv_cache":
            assert price["question_us"] > 0
            assert price["event_us"] > 0


def test_unusable_arguments_name_the_remedy_and_change_nothing() -> None:
    _, workload, scheduler = engine("fairness")
    calls = arrive(scheduler, workload, [("a", 0), ("b", 0)])
    with pytest.raises(agentrt.errors.ArrayValueError, match="has not arrived"):
        order(scheduler, [77])
    with pytest.raises(agentrt.errors.ArrayValueError, match="expected 2"):
        order(scheduler, calls, [1])
    with pytest.raises(agentrt.errors.ArrayTypeError, match="uint32"):
        scheduler.order(calls, np.zeros(2, np.uint64), running_calls=1, pinned_blocks=1, free_blocks=1)
    with pytest.raises(agentrt.errors.BadTimeError):
        scheduler.arrived(workload.session("c"), "agent", 3, 10, time=float("nan"))
    with pytest.raises(agentrt.errors.OutOfRangeError):
        scheduler.arrived(workload.session("c"), "agent", 3, -1)
    first, _ = order(scheduler, calls, time=1.0)
    assert first == [0, 1]
    for unknown in (scheduler.ended, scheduler.preempted, scheduler.withdrawn, scheduler.admitted):
        unknown(99)


def in_turn(policy: str) -> tuple[agentrt.Runtime, agentrt.Workload, agentrt.Scheduler]:
    """A runtime that has seen three agents call in turn, each with a prompt of ten blocks of its own, and lost them."""
    runtime = agentrt.Runtime(1024, policies=(policy, "kv_cache"))
    workload = runtime.workload("turns")
    session = workload.session("s")
    for call in range(60):
        prompt = [1000 * (call % 3) + block for block in range(1, 11)]
        hit = session.call_start(f"agent-{call % 3}", prompt, call, time=2.0 * call)
        session.stored(prompt[hit:], call, time=2.0 * call)
        session.call_end([], call, time=2.0 * call + 1)
    runtime.act("evict", 1024, time=120.0)
    return runtime, workload, agentrt.Scheduler(runtime)


def idle(scheduler: agentrt.Scheduler, n: int = 8, tokens: int = 8192) -> list[agentrt.Prefill]:
    return scheduler.idle(n, running_calls=0, pinned_blocks=0, free_blocks=1024, budget_tokens=tokens, time=120.0)


def test_idle_capacity_is_for_what_the_next_agent_begins_with() -> None:
    _, workload, scheduler = in_turn("speculation")
    (wanted,) = idle(scheduler)
    session = workload.session("s")
    assert (wanted.workload, wanted.session, wanted.agent) == ("turns", session.key, "agent-0")
    assert wanted.agent_id == workload.agent("agent-0")
    assert (wanted.like_call, wanted.blocks) == (57, 10)
    assert 0.5 <= wanted.probability <= 1.0
    assert "agent-0" in repr(wanted)
    session.restored("agent-0", list(range(1, 11)), time=120.0)
    assert idle(scheduler) == []


def test_idle_capacity_is_not_exceeded_and_without_the_policy_nothing_is_wanted() -> None:
    _, _, scheduler = in_turn("speculation")
    (wanted,) = idle(scheduler, tokens=4 * 16)
    assert wanted.blocks == 4
    assert idle(scheduler, n=0) == []
    assert idle(in_turn("lru")[2]) == []
    with pytest.raises(agentrt.errors.OutOfRangeError):
        idle(scheduler, n=5000)
    with pytest.raises(agentrt.errors.OutOfRangeError):
        idle(scheduler, tokens=-1)


def test_sessions_in_a_gap_are_kept_while_they_fit_and_released_when_not() -> None:
    runtime = agentrt.Runtime(100, policies=("tool_gap", "kv_cache"))
    workload = runtime.workload("test")
    sessions = [workload.session(name) for name in "ab"]
    scheduler = agentrt.Scheduler(runtime)

    def gaps(pinned: int, of: agentrt.Scheduler = scheduler) -> tuple[list[str], list[float]]:
        found, back = of.gaps(
            sessions,
            [0, 0],
            [1, 1],
            [1.0, 1.0],
            [640, 640],
            running_calls=1,
            pinned_blocks=pinned,
            free_blocks=0,
            time=2.0,
        )
        return list(found), back.tolist()

    assert gaps(0) == (["keep", "keep"], [0.0, 0.0])
    assert sorted(gaps(50)[0]) == ["keep", "release"]
    assert gaps(90)[0] == ["release", "release"]
    plain = agentrt.Scheduler(agentrt.Runtime(100))
    assert gaps(0, plain)[0] == ["undecided", "undecided"]


def test_gaps_of_unequal_lengths_and_impossible_numbers_are_refused() -> None:
    runtime, workload, scheduler = engine("tool_gap")
    session = workload.session("s")

    def ask(sessions: list[agentrt.Session], agents: list[int], started: list[float], resident: list[int]) -> object:
        tools = [0] * len(sessions)
        return scheduler.gaps(
            sessions, agents, tools, started, resident, running_calls=0, pinned_blocks=0, free_blocks=0
        )[0]

    assert ask([], [], [], []) == []
    for agents, started, resident in (
        ([0, 0], [0.0], [0]),
        ([0], [], [0]),
        ([0], [0.0], [0, 1]),
        ([1 << 20], [0.0], [0]),
    ):
        with pytest.raises(agentrt.errors.ArrayValueError):
            ask([session], agents, started, resident)
    with pytest.raises(agentrt.errors.BadTimeError):
        ask([session], [0], [float("nan")], [0])
    with pytest.raises(TypeError):
        ask(["s"], [0], [0.0], [0])  # type: ignore[list-item]
    assert runtime.stats()["policy_errors"] == 0
