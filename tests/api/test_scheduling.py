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
