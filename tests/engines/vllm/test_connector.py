"""The connector through the life of requests: preemption, aborts, chunks, resets, switches; and what it declares."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benches.e2e.pool import closed_loop
from tests.engines.vllm.pool import BLOCK, Call, Engine, faults, read_calls, words
from tests.engines.vllm.test_ranker import Scripted, cached, engine, key

from agentrt.engines.vllm.adapter import Adapter, Settings
from agentrt.engines.vllm.identity import Identities

pytestmark = pytest.mark.usefixtures("vllm")


def adapter_of(made: Engine) -> Adapter:
    assert made.connector is not None
    assert made.connector.adapter is not None
    return made.connector.adapter


def quiet(made: Engine) -> None:
    """A step later: no fault, no request left behind, a whole queue."""
    assert made.connector is not None
    made.step({})
    assert not faults(made.connector)
    assert not adapter_of(made).calls
    assert not adapter_of(made).held.prefilling_calls
    assert not adapter_of(made).held.arrived_calls
    made.check()


def test_requests_that_name_nobody_are_linked_by_the_answers_they_quote() -> None:
    made = Engine(200, "agentrt", named=False)
    plan = Call("one", "planner", [0, 1, 2], [3, 4, 5, 6], answer=words(1, 4 * BLOCK))
    code = Call("one", "coder", list(range(10, 18)), [18], answer=words(2, BLOCK), quoted=plan.answer)
    other = Call("two", "coder", list(range(20, 28)), [], quoted=words(3, 4 * BLOCK))
    sessions = []
    for call in (plan, code, other):
        request = made.request(call)
        sessions.append(adapter_of(made).calls[request.request_id].session)
        assert made.admit(request)
        assert made.decode(request, len(call.output) * BLOCK)
        made.finish(request)
    assert sessions[0] == sessions[1] != sessions[2]
    quiet(made)


def test_a_preempted_request_comes_back_and_its_blocks_are_found_again() -> None:
    made, core = engine(16)
    request = made.request(Call("s", "a", [0, 1, 2, 3], []))
    assert made.admit(request)
    assert made.decode(request, 20)
    made.preempt(request)
    made.call(Call("t", "a", list(range(10, 22)), []))  # takes some of them
    assert made.admit(request)
    made.finish(request)
    core.victims = [key(b) for b in (3, 2, 1, 0)]
    adapter_of(made).ranker.prepare(16, 0)
    assert adapter_of(made).ranker.stale_blocks == 0
    quiet(made)


def test_a_request_aborted_while_it_waits_leaves_nothing() -> None:
    made, core = engine(16)
    request = made.request(Call("s", "a", [0, 1, 2], []))
    assert made.connector is not None
    made.step({})
    made.connector.request_finished_all_groups(request, ([],))
    assert [kind for kind, _ in core.events] == ["queued", "end"]
    quiet(made)


def test_the_core_weighs_what_waiting_requests_need_before_one_takes_room() -> None:
    made, core = engine(16)
    requests = [made.request(Call(f"s{n}", "a", [10 * n, 10 * n + 1], [])) for n in range(3)]
    assert core.events == []
    assert made.admit(requests[0])
    assert [kind for kind, _ in core.events] == ["queued", "queued", "start", "stored"]
    made.finish(requests[0])
    for request in requests[1:]:
        assert made.admit(request)
        made.finish(request)
    assert [kind for kind, _ in core.events].count("start") == 3
    quiet(made)


def test_a_request_aborted_in_its_prompt_takes_back_what_was_not_computed() -> None:
    made, core = engine(16)
    request = made.request(Call("s", "a", [0, 1, 2, 3, 4, 5], []))
    assert made.admit(request, chunk=2 * BLOCK)
    made.finish(request)
    assert core.events[-2:] == [("end", []), ("removed", [key(2)])]
    quiet(made)


def test_a_chunked_prompt_finds_its_victims_ready_at_every_chunk() -> None:
    made, core = engine(16)
    made.call(Call("s", "a", [0, 1, 2, 3], []))
    made.call(Call("t", "a", [10, 11, 12, 13], []))
    request = made.request(Call("u", "a", list(range(20, 28)), []))
    core.victims = [key(13)]
    assert made.admit(request, chunk=3 * BLOCK)
    core.victims = [key(b) for b in (12, 11, 10)]
    while request.num_computed_tokens < request.num_tokens:
        assert made.prefill(request, 3 * BLOCK)
    assert all(cached(made, b) for b in (0, 1, 2, 3))
    made.finish(request)
    quiet(made)


def test_prompts_admitted_in_one_step_make_room_for_themselves_alone() -> None:
    made, core = engine(16)
    for session, first in (("s", 0), ("t", 10), ("u", 20)):
        made.call(Call(session, "a", list(range(first, first + 5)), []))
    requests = [made.request(Call(f"v{n}", "a", [30 + 2 * n, 31 + 2 * n], [])) for n in range(2)]
    step, made.step = made.step, lambda scheduled: None  # type: ignore[method-assign]
    core.victims = [key(first + i) for first in (0, 10, 20) for i in (4, 3, 2, 1, 0)]
    core.asked.clear()
    for request in requests:
        assert made.admit(request)
    # Three blocks each, the first of them an empty one.
    assert core.asked == [2, 3]
    step({request.request_id: 33 for request in requests})
    for request in requests:
        made.finish(request)
    quiet(made)


def test_a_prompt_that_does_not_fit_moves_nothing() -> None:
    made, core = engine(16)
    made.call(Call("s", "a", [0, 1, 2], []))
    running = made.request(Call("t", "a", list(range(10, 20)), []))
    assert made.admit(running)
    core.victims = [key(2), key(1), key(0)]
    order = [block.block_id for block in made.queue()]
    waiting = made.request(Call("u", "a", list(range(30, 45)), []))
    assert not made.admit(waiting)
    assert [block.block_id for block in made.queue()] == order
    made.finish(running)
    made.connector.request_finished_all_groups(waiting, ([],))  # type: ignore[union-attr]
    quiet(made)


def test_a_reset_of_the_prefix_cache_is_noticed() -> None:
    made, core = engine(16)
    made.call(Call("s", "a", [0, 1, 2], []))
    assert made.manager.reset_prefix_cache()
    assert made.call(Call("s", "a", [0, 1, 2], [])) == 0
    assert ("reset", []) in core.events
    assert adapter_of(made).counters.resets == 1
    assert made.call(Call("s", "a", [0, 1, 2], [])) == 3
    quiet(made)


def test_a_reset_with_running_requests_starts_them_anew() -> None:
    made, core = engine(16)
    request = made.request(Call("s", "a", [0, 1, 2], []))
    assert made.admit(request)
    made.preempt(request)
    assert made.manager.reset_prefix_cache()
    core.events.clear()
    assert made.admit(request)
    made.finish(request)
    assert [kind for kind, _ in core.events] == ["reset", "start", "stored", "end"]
    quiet(made)


def number(session: str) -> int:
    return Identities().session(session)


def test_the_end_of_a_session_is_passed_on() -> None:
    made, core = engine(16)
    made.finish(made.request(Call("s", "a", [0], [])))
    assert "session end" not in [kind for kind, _ in core.events]
    made.finish(made.request(Call("s", "a", [0], []), session_end=True))
    assert core.events[-1] == ("session end", [number("s")])
    assert adapter_of(made).counters.sessions_ended == 1


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("says", "sessions"), [(["s", "t"], ["s", "t"]), ("s", ["s"]), ([7, "s"], ["7", "s"]), ({"s": 1}, []), ([], [])]
)
def test_ends_are_told_by_whichever_request_comes_next(named: bool, says: Any, sessions: list[str]) -> None:
    made, core = engine(16)
    made.named = named
    request = made.request(Call("u", "a", [0, 1], []), ended_sessions=says)
    told = [("session end", [number(session)]) for session in sessions]
    assert core.events == told
    assert made.admit(request)
    assert [kind for kind, _ in core.events[len(told) :]] == ["start", "stored"]
    made.finish(request)
    assert adapter_of(made).counters.sessions_ended == len(told)
    quiet(made)


def test_a_session_that_calls_is_not_over_and_one_that_is_named_twice_is_over_once() -> None:
    made, core = engine(16)
    made.request(Call("s", "a", [0, 1], []), ended_sessions=["s", "t", "t"])
    assert core.events == [("session end", [number("t")])]


def ends_of(core: Scripted, session: str) -> list[int]:
    """Where among what the core has heard a session was said to be over."""
    return [at for at, event in enumerate(core.events) if event == ("session end", [number(session)])]


def test_a_session_whose_call_is_still_here_is_over_when_that_is() -> None:
    made, core = engine(16)
    running = made.request(Call("s", "a", [0, 1], []))
    assert made.admit(running)
    waiting = made.request(Call("s", "a", [5, 6], []))
    made.call(Call("u", "a", [10, 11], []), ended_sessions=["s"])
    assert not ends_of(core, "s")
    made.finish(waiting)
    assert not ends_of(core, "s"), "an earlier one still runs"
    made.finish(running)
    assert ends_of(core, "s") == [len(core.events) - 1]
    assert adapter_of(made).counters.sessions_ended == 1
    quiet(made)


def test_a_session_that_has_called_again_since_it_was_over_is_not() -> None:
    made, core = engine(16)
    running = made.request(Call("s", "a", [0, 1], []))
    assert made.admit(running)
    made.call(Call("u", "a", [10, 11], []), ended_sessions=["s"])
    again = made.request(Call("s", "a", [0, 1, 2], []))
    made.finish(running)
    assert made.admit(again)
    made.finish(again)
    assert not ends_of(core, "s")
    quiet(made)


def test_ends_in_the_midst_of_calls_leave_the_core_nothing_to_repair() -> None:
    made = Engine(60)
    open_: list[Any] = []
    for n in range(200):
        made.now_us += 100_000
        call = Call(f"s{n % 5}", "a", [100 * (n % 5) + i for i in range(4 + n // 20)], [])
        request = made.request(call, ended_sessions=[f"s{(n - k) % 5}" for k in range(3)])
        assert made.admit(request)
        open_.append(request)
        if len(open_) == 3:
            made.finish(open_.pop(0))
    for request in open_:
        made.finish(request)
    repairs = adapter_of(made).core.runtime.repairs()  # type: ignore[union-attr]
    assert repairs["unknown_calls"] == repairs["duplicate_calls"] == 0
    quiet(made)


@pytest.mark.parametrize("over", ["old", "new"])
def test_blocks_of_a_session_that_is_over_go_first(over: str) -> None:
    made = Engine(24)
    for session, first in (("old", 0), ("new", 10)):
        for turn in range(1, 6):
            made.call(Call(session, "a", list(range(first, first + 2 * turn)), []))
    request = made.request(Call("other", "b", list(range(30, 38)), []), ended_sessions=[over])
    assert made.admit(request)
    made.finish(request)
    assert {session: cached(made, block) for session, block in (("old", 9), ("new", 19))} == {
        session: session != over for session in ("old", "new")
    }
    quiet(made)


@pytest.mark.parametrize("how", ["switched off", "paused"])
@pytest.mark.parametrize("ahead", [0, 16])
def test_after_a_time_without_hooks_as_much_is_hit_as_ever(recorded_traces: list[Path], how: str, ahead: int) -> None:
    path = next(p for p in recorded_traces if p.name == "whowhen_magentic.jsonl.gz")
    calls = read_calls(path, 1_200)
    sessions = list(dict.fromkeys(call.session for call in calls))
    early = set(sessions[: len(sessions) // 2])
    hits = []
    for away in (False, True):
        made = Engine(2_000)
        connector = made.connector
        assert connector is not None
        adapter_of(made).held.ahead = ahead
        # Somebody runs throughout.
        running = made.request(Call("long", "a", list(range(10**6, 10**6 + 40)), []))
        assert made.admit(running)
        if away and how == "switched off":
            connector.hooks.adapter = None
        elif away:
            connector.guard.paused_until = 1e18
        closed_loop([call for call in calls if call.session in early], made, 1_900, concurrency=8, seed=0)
        if away and how == "switched off":
            connector.hooks.adapter = connector.adapter
            adapter_of(made).restart()
        elif away:
            connector.guard.paused_until = 0
            connector.guard.pauses += 1
            connector._next_look = 0.0
        made.finish(running)
        # The clock of the second loop starts where that of the first one has ended.
        before, start_us, made.now_us = made.hit_blocks, made.now_us, 0
        adapter_of(made).now_us = lambda: start_us + made.now_us  # noqa: B023 - called in this turn only
        closed_loop([call for call in calls if call.session not in early], made, 1_900, concurrency=8, seed=0)
        hits.append(made.hit_blocks - before)
        adapter_of(made).held.catch_up()
        made.check()
        assert not faults(connector)
    assert hits[1] > 0.97 * hits[0]


def test_a_control_file_switches_it_off_and_on_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrt.engines.vllm.connector.LOOK_INTERVAL_S", 0.0)
    switch = tmp_path / "switch"
    made = Engine(16, "tests.engines.vllm.test_ranker:Scripted", control_file=str(switch))
    core: Any = adapter_of(made).core
    made.call(Call("s", "a", [0], []))
    switch.write_text("off\n")
    made.call(Call("s", "a", [0, 1], []))  # sees the file at its first step
    n = len(core.events)
    made.call(Call("s", "a", [0, 1, 2], []))
    assert len(core.events) == n
    switch.unlink()
    made.call(Call("s", "a", [0, 1, 2, 3], []))
    made.call(Call("s", "a", [0, 1, 2, 3, 4], []))
    assert len(core.events) > n
    assert ("reset", []) in core.events
    quiet(made)


def test_observing_only_reports_and_never_ranks() -> None:
    made, core = engine(16)
    adapter_of(made).acting = False
    stock = Engine(16, None)
    for e in (made, stock):
        for i in range(6):
            e.call(Call(f"s{i}", "a", list(range(10 * i, 10 * i + 6)), []))
    assert made.evicted == stock.evicted
    assert adapter_of(made).ranker.ranked_blocks == 0
    assert {"start", "stored", "end", "removed"} <= {kind for kind, _ in core.events}


def test_models_with_several_cache_groups_are_observed_only() -> None:
    made, core = engine(16)
    assert not Adapter(made.pool, Settings(), BLOCK, groups=2, core=core).acting
    assert not Adapter(made.pool, Settings(), BLOCK * 2, groups=1, core=core).acting


def test_settings_come_from_the_flag_and_the_environment_wins() -> None:
    settings = Settings.read(
        {"policy": "lru", "record_bytes": "100", "unknown": 1}, {"AGENTRT_VLLM_POLICY": "observe", "OTHER": "x"}
    )
    assert settings.policy == "observe"
    assert settings.record_bytes == 100


def test_a_policy_that_does_not_exist_leaves_vllm_alone() -> None:
    made = Engine(16, "no-such-policy")
    assert made.connector is not None
    assert made.connector.adapter is None
    assert made.connector.guard.faults == {"bind: ValueError": 1}
    made.call(Call("s", "a", [0], []))


def test_it_declares_what_vllm_asks_for() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1 import supports_hma

    from agentrt.engines.vllm.connector import AgentRTConnector

    made, _ = engine(16)
    connector = made.connector
    assert connector is not None
    assert supports_hma(AgentRTConnector)
    assert connector.requires_kv_delivery is False
    assert connector.reset_cache() is True
    assert connector.has_pending_push_work() is False
    assert connector.get_finished(set()) == (None, None)
    connector.start_load_kv(None)
    connector.wait_for_layer_load("layer")
    connector.save_kv_layer("layer", None, None)
    connector.wait_for_save()
    connector.shutdown()


def test_the_entry_point_registers_the_connector_once_or_twice() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from agentrt.engines.vllm.connector import AgentRTConnector
    from agentrt.engines.vllm.plugin import CONNECTOR, register

    register()
    register()
    assert KVConnectorFactory.get_connector_class_by_name(CONNECTOR) is AgentRTConnector


def test_memory_stays_bounded_over_many_requests() -> None:
    made, _ = engine(64)
    adapter = adapter_of(made)
    for i in range(3000):
        request = made.request(Call(f"s{i}", "a", [i * 10, i * 10 + 1, i * 10 + 2], []))
        call = adapter.calls[request.request_id]
        assert made.admit(request)
        made.finish(request)
        made.step({})
        # Nobody but this test and the call of `getrefcount` still has it: it did not wait, so nothing was told of it.
        assert sys.getrefcount(call) == 2
    assert adapter.ranker.known_blocks <= made.pool.num_gpu_blocks
    assert adapter.ranker.pending_blocks <= made.pool.num_gpu_blocks
    quiet(made)


def test_worker_connectors_do_nothing() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from agentrt.engines.vllm.connector import AgentRTConnector

    transfer = SimpleNamespace(kv_connector_extra_config={}, is_kv_producer=True)
    worker = AgentRTConnector(SimpleNamespace(kv_transfer_config=transfer), KVConnectorRole.WORKER, None)
    worker.bind_gpu_block_pool(object())
    assert worker.adapter is None
