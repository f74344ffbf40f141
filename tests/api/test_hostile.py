"""Whatever comes in: a precise error or a counted repair, never a panic, never more memory."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import agentrt
from agentrt import errors

DTYPES = (np.uint8, np.uint64, np.uint16, np.uint64, np.uint64, np.uint32, np.uint64)

WRONG_DTYPES = ["i1", "i8", "f4", "f8", ">u8", "O", "U3", "M8[s]", "c8", "?"]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def hostile_batch(number: int, events: int) -> tuple[Any, ...]:
    """Every session, agent, call and block is new; calls start, a few end, clocks jump."""
    rng = np.random.default_rng(number)
    kinds = rng.choice(np.array([0, 0, 0, 0, 1, 2, 3, 5, 6], np.uint8), events)
    base = np.uint64(number * events)
    new = np.arange(events, dtype=np.uint64) + base
    times = rng.integers(0, 2**63, events, dtype=np.uint64)
    offsets = np.arange(events + 1, dtype=np.uint32)
    return kinds, new, new.astype(np.uint16), new, times, offsets, new


def test_a_million_hostile_events_leave_memory_as_it_was() -> None:
    """The full ten million run in benches/py/test_boundary_bench.py."""
    runtime = agentrt.Runtime(10_000, sessions=1024)
    workload = runtime.workload("w")
    events = 50_000
    workload.observe(*hostile_batch(0, events))
    before, reserved = resident_bytes(), runtime.memory()
    for number in range(1, 20):
        workload.observe(*hostile_batch(number, events))
    assert resident_bytes() - before < 8_000_000
    assert runtime.memory() == reserved
    stats, repairs = runtime.stats(), runtime.repairs()
    assert stats["events"] == 20 * events
    assert stats["sessions"] <= 1024
    assert stats["resident_blocks"] <= 10_000
    assert repairs["backward_clock"] > events
    assert repairs["untracked_calls"] > events
    assert repairs["unknown_calls"] > events
    # It still works: a session that behaves is served.
    session = workload.session("good")
    session.call_start("a", [1], time=1)
    assert session.known


@st.composite
def field(draw: st.DrawFn, dtype: Any, n: int, top: int) -> Any:
    """Mostly right, often hostile: values, length, dtype, layout, type."""
    hostile = ["length", "dtype", "strided", "list", "none", "text", "two", "short"]
    kind = draw(st.sampled_from(["right"] * 12 + hostile))
    if kind == "length":
        n = draw(st.integers(0, 12))
    if kind == "list":
        return draw(st.lists(st.integers(-(2**70), 2**70), min_size=n, max_size=n))
    if kind == "none":
        return None
    if kind == "text":
        return "abc"
    items = draw(st.lists(st.integers(0, top), min_size=n, max_size=n))
    array = np.array(items, dtype)
    if kind == "dtype":
        return array.astype(draw(st.sampled_from(WRONG_DTYPES)))
    if kind == "strided":
        return np.repeat(array, 2)[::2]
    if kind == "two":
        return array.reshape(1, -1)
    if kind == "short":
        return array[:0]
    return array


@st.composite
def batches(draw: st.DrawFn) -> list[Any]:
    n = draw(st.integers(0, 10))
    small = draw(st.booleans())
    top = 4 if small else 2**64 - 1
    tops = (draw(st.sampled_from([7, 7, 7, 9, 255])), top, min(top, 65_535), top, top, 12, top)
    lengths = (n, n, n, n, n, n + 1, 12)
    fields = [draw(field(dtype, length, top)) for dtype, length, top in zip(DTYPES, lengths, tops, strict=True)]
    if draw(st.integers(0, 3)) and isinstance(fields[5], np.ndarray) and fields[5].dtype == np.uint32:
        fields[5] = np.sort(fields[5].ravel())
    return fields


def _refusal(call: Callable[[], object]) -> errors.AgentRTError | None:
    """What the call was refused with; a panic, or an error that is not agentrt's own, fails the test."""
    try:
        call()
    except errors.AgentRTError as error:
        return error
    return None


def _consistent(runtime: agentrt.Runtime) -> None:
    assert runtime.stats()["resident_blocks"] <= runtime.pool_blocks
    runtime.act("evict", 1, time=0)
    runtime.score([0, 1, 2, 3, 4])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(batches(), min_size=1, max_size=6))
def test_any_arrays_are_applied_or_refused_precisely(sequence: list[list[Any]]) -> None:
    runtime = agentrt.Runtime(4, sessions=8)
    workload = runtime.workload("w")
    for fields in sequence:
        before = runtime.stats()
        refusal = _refusal(lambda fields=fields: workload.observe(*fields))  # type: ignore[misc]
        if refusal is None:
            assert runtime.stats()["events"] == before["events"] + len(fields[0])
        else:
            assert runtime.stats() == before
            assert isinstance(refusal, (errors.ArrayTypeError, errors.ArrayValueError))
            assert refusal.array in str(refusal)
        _consistent(runtime)


integers = st.one_of(st.integers(-(2**70), 2**70), st.integers(0, 5), st.none(), st.floats(), st.text(max_size=2))
lists = st.one_of(st.lists(integers, max_size=4), st.none(), st.integers(), st.text(max_size=3))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(kinds=lists, sessions=lists, agents=lists, calls=lists, times=lists, blocks=st.one_of(st.lists(lists), lists))
def test_any_lists_are_applied_or_refused_precisely(
    kinds: Any, sessions: Any, agents: Any, calls: Any, times: Any, blocks: Any
) -> None:
    runtime = agentrt.Runtime(4, sessions=8)
    refusal = _refusal(lambda: runtime.workload("w").observe_lists(kinds, sessions, agents, calls, times, blocks))
    if refusal is not None:
        assert runtime.stats()["events"] == 0
        assert isinstance(refusal, (errors.ArrayTypeError, errors.ArrayValueError))
    _consistent(runtime)


anything = st.one_of(integers, st.lists(integers, max_size=3), st.binary(max_size=3))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(a=anything, b=anything, time=st.one_of(st.none(), st.floats()))
def test_any_arguments_of_single_calls_are_applied_or_refused(a: Any, b: Any, time: Any) -> None:
    runtime = agentrt.Runtime(4, sessions=8)
    workload = runtime.workload("w")
    session = workload.session(1)
    for call in (
        lambda: session.call_start(a, b, time=time),
        lambda: session.call_start("a", [1, 2, 3], a, time),
        lambda: session.stored(b, a, time),
        lambda: session.call_end(a, b, time),
        lambda: session.tool_start(a, time),
        lambda: session.restored(a, b, time),
        lambda: session.score_agents(a, 1.0, time),
        lambda: session.predict(a, time),
        lambda: workload.session(a).end(time),
        lambda: workload.predict_into(1, a, b),
        lambda: runtime.score(a, b),
        lambda: runtime.act("evict", a, None, time),
        lambda: agentrt.Runtime(4, a, b),
        lambda: agentrt.block_key(a),
    ):
        refusal = _refusal(call)
        assert refusal is None or str(refusal)
        _consistent(runtime)


@pytest.mark.parametrize("blocks", [[5] * 100, [1, 2, 1, 2, 1], list(range(100)), [0, 1], [2**64 - 1]])
def test_prompts_with_repeated_or_too_many_blocks_leave_a_usable_pool(blocks: list[int]) -> None:
    runtime = agentrt.Runtime(8)
    session = runtime.workload("w").session("s")
    for at in range(5):
        resident = session.call_start("a", blocks, time=at)
        session.stored(blocks[resident:], time=at)
        session.stored(blocks[resident:], time=at)
        session.call_end(blocks, time=at)
        session.call_end(blocks, time=at)
        assert runtime.stats()["resident_blocks"] <= 8
    victims = runtime.act("evict", 100, time=9).tolist()
    assert len(victims) <= 8
    assert runtime.stats()["resident_blocks"] == 0
