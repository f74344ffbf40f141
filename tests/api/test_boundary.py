"""The four calls through Python: what they answer, and how precisely they refuse."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import agentrt
import agentrt.api
from agentrt import EventKind, errors

KINDS = np.array([EventKind.CALL_START, EventKind.STORED, EventKind.CALL_END], np.uint8)
FIELDS: dict[str, Any] = {
    "kinds": KINDS,
    "sessions": np.full(3, 7, np.uint64),
    "agents": np.zeros(3, np.uint16),
    "calls": np.full(3, 1, np.uint64),
    "times_us": np.array([10, 20, 30], np.uint64),
    "offsets": np.array([0, 2, 4, 5], np.uint32),
    "blocks": np.array([1, 2, 1, 2, 3], np.uint64),
}


def _runtime(pool_blocks: int = 64, **options: Any) -> agentrt.Runtime:
    return agentrt.Runtime(pool_blocks, **options)


def _call(session: agentrt.Session, agent: str, blocks: list[int], at: float) -> int:
    resident = session.call_start(agent, blocks, time=at)
    session.stored(blocks[resident:], time=at)
    session.call_end(time=at + 0.1)
    return resident


def test_a_prompt_seen_before_is_resident() -> None:
    session = _runtime().workload("w").session("s")
    assert _call(session, "a", [1, 2, 3], 0) == 0
    assert _call(session, "a", [1, 2, 3, 4], 1) == 3
    assert _call(session, "b", [1, 2, 9], 2) == 2


def test_arrays_lists_and_single_events_do_the_same() -> None:
    workloads = [_runtime().workload("w") for _ in range(3)]
    workloads[0].observe(*FIELDS.values())
    kinds, sessions, agents, calls, times, *_ = (field.tolist() for field in FIELDS.values())
    workloads[1].observe_lists(kinds, sessions, agents, calls, times, [[1, 2], [1, 2], [3]])
    session = workloads[2].session(7)
    session.call_start(0, [1, 2], call=1, time=10e-6)
    session.stored([1, 2], call=1, time=20e-6)
    session.call_end([3], call=1, time=30e-6)
    assert [w.session(7).call_start(0, [1, 2, 3, 4], call=2, time=1) for w in workloads] == [3, 3, 3]


def test_a_batch_answers_how_many_prompt_blocks_were_resident() -> None:
    workload = _runtime().workload("w")
    assert workload.observe(*FIELDS.values()) == 0
    assert workload.observe(*FIELDS.values()) == 2
    assert workload.observe_lists([0], [1], [0], [9], [50], [[1, 2, 3, 8]]) == 3


def test_a_batch_without_blocks_needs_no_offsets() -> None:
    runtime = _runtime()
    identities = list(FIELDS.values())[:5]
    assert runtime.workload("w").observe(*identities) == 0
    assert runtime.stats()["events"] == 3
    empty = [field[:0] for field in identities]
    assert runtime.workload("w").observe(*empty) == 0
    assert runtime.stats()["events"] == 3


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "kinds"])
def test_a_wrong_length_names_its_array_and_applies_nothing(name: str) -> None:
    runtime = _runtime()
    fields = FIELDS | {name: FIELDS[name][:2]}
    if name == "blocks":
        name = "offsets"  # the offsets point beyond it
    with pytest.raises(errors.ArrayValueError, match=f"`{name}`") as error:
        runtime.workload("w").observe(*fields.values())
    assert error.value.array == name
    assert isinstance(error.value, ValueError)
    assert runtime.stats()["events"] == 0
    assert not runtime.workload("w").session(7).known


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("dtype", ["i8", "f8", ">u8", "i2", "O"])
def test_a_wrong_dtype_names_its_array_and_the_remedy(name: str, dtype: str) -> None:
    runtime = _runtime()
    with pytest.raises(errors.ArrayTypeError, match="astype") as error:
        runtime.workload("w").observe(*(FIELDS | {name: FIELDS[name].astype(dtype)}).values())
    assert error.value.array == name
    assert isinstance(error.value, TypeError)
    assert runtime.stats()["events"] == 0


@pytest.mark.parametrize("name", FIELDS)
def test_an_array_that_is_not_contiguous_or_not_aligned_is_refused(name: str) -> None:
    workload = _runtime().workload("w")
    array = FIELDS[name]
    spread = np.repeat(array, 2)[::2]
    with pytest.raises(errors.ArrayValueError, match="ascontiguousarray"):
        workload.observe(*(FIELDS | {name: spread}).values())
    with pytest.raises(errors.ArrayValueError, match="dimensions"):
        workload.observe(*(FIELDS | {name: array.reshape(1, -1)}).values())
    if array.itemsize > 1:
        shifted = np.frombuffer(b"\0" + array.tobytes(), dtype=np.uint8)[1:].view(array.dtype)
        assert not shifted.flags.aligned
        with pytest.raises(errors.ArrayValueError, match="aligned"):
            workload.observe(*(FIELDS | {name: shifted}).values())


def test_read_only_arrays_are_welcome() -> None:
    fields = [field.copy() for field in FIELDS.values()]
    for field in fields:
        field.flags.writeable = False
    assert _runtime().workload("w").observe(*fields) == 0


def test_each_door_names_the_other() -> None:
    workload = _runtime().workload("w")
    identities = list(FIELDS.values())[:5]
    with pytest.raises(errors.ArrayTypeError, match=r"Workload\.observe"):
        workload.observe_lists(*identities)
    with pytest.raises(errors.ArrayTypeError, match="blocks"):
        workload.observe_lists([0], [1], [0], [1], [1], FIELDS["blocks"])
    with pytest.raises(errors.ArrayTypeError, match="numpy array of uint8"):
        workload.observe([0], [1], [0], [1], [1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "item"),
    [(0, 256), (1, -1), (1, 2**64), (2, 65_536), (3, 1.5), (4, "now"), (4, None)],
)
def test_an_item_that_does_not_fit_is_shown(field: int, item: object) -> None:
    runtime = _runtime()
    lists: list[list[Any]] = [[6, 6], [1, 1], [0, 0], [1, 1], [1, 1]]
    lists[field][1] = item
    with pytest.raises(errors.ArrayTypeError, match="item 1"):
        runtime.workload("w").observe_lists(*lists)
    assert runtime.stats()["events"] == 0


@pytest.mark.parametrize("offsets", [[0, 2, 1, 5], [0, 2, 4, 6], [5, 4, 3, 2], [0, 0, 0, 2**32 - 1]])
def test_offsets_that_lead_nowhere_are_refused(offsets: list[int]) -> None:
    runtime = _runtime()
    with pytest.raises(errors.ArrayValueError, match="`offsets`"):
        runtime.workload("w").observe(*(FIELDS | {"offsets": np.array(offsets, np.uint32)}).values())
    assert runtime.stats()["events"] == 0


def test_an_unknown_kind_is_refused_as_a_whole() -> None:
    runtime = _runtime()
    with pytest.raises(errors.ArrayValueError, match="EventKind"):
        runtime.workload("w").observe(*(FIELDS | {"kinds": np.array([0, 1, 9], np.uint8)}).values())
    assert not runtime.workload("w").session(7).known


@pytest.mark.parametrize("size", [0, -1, 2**31 + 1, 2**32, 2**64, 10**30])
def test_a_pool_that_cannot_be_is_refused_with_its_numbers(size: int) -> None:
    with pytest.raises(errors.OutOfRangeError, match="pool_blocks") as error:
        agentrt.Runtime(size)
    assert (error.value.what, error.value.minimum, error.value.maximum) == ("pool_blocks", 1, 2**31)
    assert error.value.requested == size
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("sessions", [0, 7, 2**24 + 1, -5])
def test_a_session_table_that_cannot_be_is_refused(sessions: int) -> None:
    with pytest.raises(errors.OutOfRangeError, match="sessions"):
        agentrt.Runtime(64, sessions=sessions)


def test_sixty_four_workloads_and_no_more() -> None:
    runtime = _runtime()
    for i in range(64):
        runtime.workload(str(i))
    assert runtime.workload("5").name == "5"
    with pytest.raises(errors.OutOfRangeError, match="workloads"):
        runtime.workload("one more")


def test_agents_are_numbered_once_and_up_to_a_limit() -> None:
    workload = _runtime().workload("w")
    assert [workload.agent("a"), workload.agent("b"), workload.agent("a")] == [0, 1, 0]
    assert [workload.agent_name(1), workload.agent_name(9)] == ["b", "9"]
    for i in range(65_532):
        workload.agent(f"agent {i}")
    with pytest.raises(errors.OutOfRangeError, match="agent names"):
        workload.agent("one more")
    assert workload.agent("b") == 1


@pytest.mark.parametrize("time", [math.nan, math.inf, -math.inf, -1e-9, 1e300])
def test_a_time_that_is_none_is_refused(time: float) -> None:
    runtime = _runtime()
    session = runtime.workload("w").session("s")
    calls: list[Callable[[], object]] = [
        lambda: session.call_start("new agent", [1], time=time),
        lambda: session.stored([1], time=time),
        lambda: session.call_end(time=time),
        lambda: session.tool_start("t", time=time),
        lambda: session.tool_end(time=time),
        lambda: session.end(time=time),
        lambda: session.restored("a", [1], time=time),
        lambda: session.predict(time=time),
        lambda: session.score_agents(["a"], 1.0, time=time),
        lambda: session.score_agents(["a"], time),
        lambda: runtime.act("evict", 1, time=time),
    ]
    for call in calls:
        with pytest.raises(errors.BadTimeError) as error:
            call()
        assert error.value.seconds == time or math.isnan(time)
    assert runtime.stats()["events"] == 0
    assert not session.known
    assert runtime.workload("w").agent("the first name of all") == 0


def test_a_backward_clock_counts_as_now() -> None:
    runtime = _runtime()
    session = runtime.workload("w").session("s")
    _call(session, "a", [1, 2], 100)
    _call(session, "a", [1, 2], 50)
    assert runtime.repairs()["backward_clock"] > 0


def test_events_of_unknown_calls_and_sessions_are_data() -> None:
    runtime = _runtime()
    session = runtime.workload("w").session("never seen")
    session.call_end([1], call=5, time=1)
    session.tool_start("t", time=2)
    session.end(time=3)
    assert session.predict(time=4) == []
    assert session.score_agents(["a", 3], 10, time=4).tolist() == [0, 0]
    assert runtime.repairs()["unknown_calls"] > 0
    assert runtime.score([1, 2, 2**64 - 1]).tolist() == [0, 0, 0]


def test_starting_a_call_ends_the_one_before_it() -> None:
    runtime = _runtime()
    session = runtime.workload("w").session("s")
    session.call_start("a", [1, 2], time=0)
    session.stored([1, 2], time=0)
    session.call_start("a", [1, 2, 3], time=1)
    assert runtime.act("evict", 9, time=1).tolist() == []
    session.call_end(time=2)
    assert runtime.act("evict", 9, time=3).tolist() == [2, 1]
    assert runtime.repairs()["duplicate_calls"] == 1


def test_blocks_of_a_call_in_flight_are_no_victims() -> None:
    runtime = _runtime()
    workload = runtime.workload("w")
    _call(workload.session("s"), "a", [1, 2], 0)
    _call(workload.session("t"), "a", [8, 9], 1)
    assert workload.session("s").call_start("a", [1, 2], time=2) == 2
    assert runtime.act("evict", 9, time=3).tolist() == [9, 8]
    assert runtime.stats()["missing_victims"] == 7


def test_answers_are_written_where_the_caller_says() -> None:
    runtime = _runtime()
    _call(runtime.workload("w").session("s"), "a", [1, 2, 3], 0)
    scores = np.full(8, -1, np.float32)
    assert runtime.score(np.array([1, 9], np.uint64), scores) is scores
    assert scores[1] == 0
    assert (scores[2:] == -1).all()
    keys = np.zeros(4, np.uint64)
    victims = runtime.act("evict", 2, keys, time=1)
    assert np.shares_memory(victims, keys)
    assert keys.tolist() == [3, 2, 0, 0]


@pytest.mark.parametrize(
    "out",
    [
        np.zeros(1, np.float32),
        np.zeros(9, np.float64),
        np.zeros((2, 3), np.float32),
        np.zeros(8, np.float32)[::2],
        [0.0] * 4,
    ],
)
def test_an_output_that_cannot_be_written_is_refused(out: Any) -> None:
    with pytest.raises((errors.ArrayTypeError, errors.ArrayValueError), match="`out`"):
        _runtime().score([1, 2], out)
    with pytest.raises((errors.ArrayTypeError, errors.ArrayValueError), match="`out`"):
        _runtime().act("evict", 2, out)


def test_a_read_only_output_is_refused() -> None:
    out = np.zeros(2, np.float32)
    out.flags.writeable = False
    with pytest.raises(errors.ArrayValueError, match="read-only"):
        _runtime().score([1, 2], out)


def test_input_and_output_cannot_share_memory() -> None:
    both = np.zeros(4, np.uint64)
    with pytest.raises(errors.ArrayValueError, match="in use"):
        _runtime().score(both, both.view(np.float32))


def test_predictions_follow_what_was_seen() -> None:
    runtime = _runtime()
    workload = runtime.workload("w")
    for i in range(40):
        for j, agent in enumerate(("planner", "coder", "tester")):
            _call(workload.session(f"s{i % 4}"), agent, [], 10.0 * i + j)
    session = workload.session("s3")
    first, *_ = session.predict(steps=1, time=400)
    assert (first.agent, first.agent_id, first.step) == ("planner", workload.agent("planner"), 1)
    assert first.probability > 0.8
    assert [p.step for p in session.predict(steps=3, time=400)] == sorted(p.step for p in session.predict(3, 400))
    rows = np.zeros((24, 4), np.float32)
    n = workload.predict_into(session.key, 3, rows)
    assert n == len(session.predict(steps=3))
    assert rows[0, :2].tolist() == [first.agent_id, 1]
    likely = session.score_agents(["planner", "coder", "nobody"], 1e6, time=400)
    assert likely[0] > 0.5
    assert likely[2] == 0
    assert likely.dtype == np.float32


@pytest.mark.parametrize("steps", [0, 7, -1, 2**70])
def test_steps_beyond_the_horizon_are_refused(steps: int) -> None:
    session = _runtime().workload("w").session(1)
    with pytest.raises(errors.OutOfRangeError, match="steps"):
        session.predict(steps)


def test_unknown_decisions_are_refused() -> None:
    runtime = _runtime()
    with pytest.raises(errors.BadOptionError, match="evict or prefetch"):
        runtime.act("explode", 1)  # type: ignore[call-overload]
    with pytest.raises(errors.OutOfRangeError):
        runtime.act("evict", -1)
    assert runtime.act("evict", 2**63).tolist() == []


def test_blocks_that_come_back_are_resident() -> None:
    runtime = _runtime()
    session = runtime.workload("w").session("s")
    _call(session, "a", [1, 2, 3], 0)
    assert runtime.act("evict", 9, time=1).tolist() == [3, 2, 1]
    session.restored("a", [1, 2, 3], time=2)
    assert session.call_start("a", [1, 2, 3], time=3) == 3


def test_expected_sessions_are_named_for_prefetching() -> None:
    runtime = _runtime(32)
    workload = runtime.workload("w")
    # Few: before long the guard sees that what goes here need not have gone, and trusts the learned order no more.
    for i in range(6):
        _call(workload.session("s"), "a", [1, 2, 3], float(i))
        runtime.act("evict", 9, time=i + 0.2)
    (wanted, *_) = runtime.act("prefetch", 4, time=6.0)
    assert (wanted.workload, wanted.session, wanted.agent) == ("w", workload.session("s").key, "a")
    assert 0.6 <= wanted.probability <= 1
    assert wanted.score > 0
    assert not wanted.waits
    # Nothing is brought back on a promise before promises like it have come true.
    assert not workload.session("s").worth_restoring("a", [1, 2, 3])


def test_calls_that_wait_are_named_for_prefetching_before_all_others() -> None:
    runtime = _runtime(32)
    workload = runtime.workload("w")
    session = workload.session("s")
    _call(session, "a", [1, 2, 3], 0)
    assert runtime.act("evict", 9, time=1).tolist() == [3, 2, 1]
    session.call_queued("a", [1, 2, 3, 4], time=2)
    (wanted,) = runtime.act("prefetch", 4, time=2)
    assert (wanted.session, wanted.agent, wanted.waits, wanted.probability) == (session.key, "a", True, 1)
    assert wanted.room == 32
    assert "waits=True" in repr(wanted)
    assert session.worth_restoring("a", [1, 2, 3])
    session.restored("a", [1, 2, 3], time=3)
    assert session.call_start("a", [1, 2, 3, 4], time=4) == 3


def test_the_learned_state_fits_its_budget() -> None:
    runtime = _runtime(100_000)
    workload = runtime.workload("w")
    for i in range(10_000):
        workload.agent(f"agent {i}")
    assert workload.state_bytes() <= 20_000
    memory = runtime.memory()
    assert memory["state_bytes_per_workload"] == workload.state_bytes()
    assert memory["index_bytes"] <= 32 * 100_000


def test_block_keys_are_the_same_everywhere() -> None:
    assert agentrt.block_key(b"") == 16294208416658607535
    assert agentrt.block_key(b"\x00" * 8) != agentrt.block_key(b"\x00" * 9)
    keys = {agentrt.block_key(i.to_bytes(32, "little")) for i in range(10_000)}
    assert len(keys) == 10_000
    with pytest.raises(errors.ArrayTypeError, match="bytes"):
        agentrt.block_key("text")  # type: ignore[arg-type]


def test_objects_say_what_they_are_and_cannot_be_changed() -> None:
    runtime = _runtime(64, sessions=8, policies=("kv_cache", "lru"))
    assert repr(runtime) == 'Runtime(pool_blocks=64, sessions=8, policies=["kv_cache", "lru"])'
    assert runtime.policies == ("kv_cache", "lru")
    assert repr(runtime.workload("w")) == 'Workload("w")'
    with pytest.raises(AttributeError):
        runtime.pool_blocks = 5  # type: ignore[misc]


def test_the_default_runtime_wants_a_pool_size_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agentrt.api, "_default", None)
    with pytest.raises(errors.NotConfiguredError, match="configure"):
        agentrt.score([1])
    runtime = agentrt.configure(pool_blocks=64)
    assert agentrt.default_runtime() is runtime
    assert agentrt.observe("w", *FIELDS.values()) == 0
    assert agentrt.score([1, 99]).shape == (2,)
    assert agentrt.predict("w", 7, time=1)[0].agent == "0"
    assert agentrt.act("evict", 1, time=1).tolist() == [3]


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(agentrt.api).failed == 0
