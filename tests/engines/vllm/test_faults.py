"""Whatever goes wrong inside agentrt, vLLM serves every request, and its queue stays whole."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engines.vllm.pool import Call, Engine, faults
from tests.engines.vllm.test_ranker import Scripted

from agentrt.engines.vllm import guard as guard_module
from agentrt.engines.vllm.adapter import Adapter
from agentrt.engines.vllm.callers import CALLERS
from agentrt.engines.vllm.guard import Guard

pytestmark = pytest.mark.usefixtures("vllm")

HOOKS = ["new_request", "before_allocation", "allocated", "step_ended", "finished"]
CORE = ["call_queued", "call_started", "stored", "call_ended", "removed", "reset", "evict"]
SCRIPTED = "tests.engines.vllm.test_ranker:Scripted"


def workload(n: int = 120) -> list[Call]:
    """Sessions of two agents that extend their prompts and press on a pool of 60 blocks."""
    rng = random.Random(7)
    numbers = itertools.count()
    prompts: dict[tuple[int, str], list[int]] = {}
    calls = []
    for _ in range(n):
        session, agent = rng.randrange(6), rng.choice("ab")
        prompt = prompts.setdefault((session, agent), [next(numbers) for _ in range(4)])
        output = [next(numbers) for _ in range(rng.randrange(3))]
        calls.append(Call(f"s{session}", agent, list(prompt), output))
        prompt += output
        if len(prompt) > 20:
            prompts.pop((session, agent))
    return calls


def served(engine: Engine) -> list[int]:
    hits = [engine.call(call) for call in workload()]
    engine.check()
    assert not engine.running
    return hits


def boom(*_: object, **__: object) -> Any:
    raise RuntimeError("injected")


def break_hook(engine: Engine, *names: str) -> None:
    """Methods of the adapter raise: one of another class, so that the hooks call them."""
    connector = engine.connector
    assert connector is not None
    assert connector.adapter is not None
    connector.adapter.__class__ = type("Broken", (Adapter,), dict.fromkeys(names, boom))
    connector.hooks.adapter = connector.adapter


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_is_answered_by_vllm(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(60, SCRIPTED)
    break_hook(engine, hook)
    assert len(served(engine)) == 120
    assert engine.connector is not None
    ((kind, count),) = engine.connector.guard.faults.items()
    assert kind.endswith("RuntimeError")
    assert count > 10
    assert sum("fault `" in record.getMessage() for record in caplog.records) <= 1


def test_all_hooks_at_once_leave_stock_behaviour() -> None:
    engine, stock = Engine(60, SCRIPTED), Engine(60, None)
    break_hook(engine, *HOOKS)
    assert served(engine) == served(stock)
    assert engine.evicted == stock.evicted


class Raises:
    """Raises whatever is asked of it."""

    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error(name)


# By what vLLM calls: the adapter's name for it, how many arguments it has, and the answer that leaves vLLM as it is.
GUARDED: dict[str, tuple[str, int, Any]] = {
    "on_new_request": ("new_request", 1, None),
    "get_num_new_matched_tokens": ("before_allocation", 2, (0, False)),
    "update_state_after_alloc": ("allocated", 3, None),
    "request_finished_all_groups": ("finished", 2, (False, None)),
}


def kinds(connector: Any) -> dict[str, int]:
    """Faults by exception, but for slow hooks."""
    return {kind.partition(": ")[2]: n for kind, n in faults(connector).items()}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("hook", GUARDED)
def test_a_hook_that_is_given_nonsense_is_answered_by_vllm(hook: str, plain: bool) -> None:
    engine = Engine(60, SCRIPTED)
    if not plain:
        break_hook(engine)
    connector = engine.connector
    assert connector is not None
    name, n, default = GUARDED[hook]
    call = getattr(connector, hook)
    beside = [0] * (n - 1)
    assert call(Raises(RuntimeError), *beside) == default
    assert faults(connector) == {f"{name}: RuntimeError": 1}
    # A version of vLLM that tells less.
    assert call() == default
    assert kinds(connector) == {"RuntimeError": 1, "IndexError" if plain else "TypeError": 1}
    with pytest.raises(KeyboardInterrupt):
        call(Raises(KeyboardInterrupt), *beside)
    spent_s = connector.guard.spent_s
    engine.step({})
    assert connector.guard.spent_s > spent_s
    assert len(served(engine)) == 120


def test_a_step_of_nonsense_is_a_fault() -> None:
    engine = Engine(60, SCRIPTED)
    assert engine.connector is not None
    engine.connector.build_connector_meta(Raises(RuntimeError))
    assert faults(engine.connector) == {"step_ended: RuntimeError": 1}


@pytest.mark.parametrize("plain", [True, False])
def test_hooks_that_are_told_more_than_they_know_take_what_they_know(plain: bool) -> None:
    engine = Engine(60, SCRIPTED)
    if not plain:
        break_hook(engine)
    connector = engine.connector
    assert connector is not None
    for hook in GUARDED:
        real = getattr(connector, hook)
        setattr(connector, hook, lambda *told, real=real: real(*told, "more"))
    assert len(served(engine)) == 120
    assert connector.has_pending_push_work("more") is False
    assert not faults(connector)
    assert connector.adapter is not None
    assert connector.adapter.counters.finished == 120


@pytest.mark.parametrize("hook", [*GUARDED, "build_connector_meta", "has_pending_push_work"])
def test_a_panic_is_a_fault_after_which_the_adapter_starts_over(hook: str) -> None:
    engine = Engine(60, SCRIPTED)
    connector = engine.connector
    assert connector is not None
    assert connector.adapter is not None
    assert engine.admit(engine.request(workload()[0]))
    connector.hooks.panic_once()
    n = GUARDED[hook][1] if hook in GUARDED else int(hook == "build_connector_meta")
    getattr(connector, hook)(*[Raises(RuntimeError)] * n)
    assert list(kinds(connector)) == ["panic"]
    assert connector.adapter.calls
    engine.step({})
    assert not connector.adapter.calls
    for request in list(engine.running.values()):
        engine.finish(request)
    assert len(served(engine)) == 120
    assert kinds(connector) == {"panic": 1}


def test_whoever_asks_for_callers_hears_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(60, SCRIPTED)
    request = engine.request(Call("s", "a", [1], []))
    assert CALLERS.find(request.request_id) is None
    monkeypatch.setattr(CALLERS, "wanted", True)
    request = engine.request(Call("t", "a", [2], []))
    assert CALLERS.find(request.request_id) is not None


def test_too_many_faults_keep_the_hooks_away_and_they_come_back() -> None:
    engine = Engine(60, SCRIPTED)
    connector = engine.connector
    assert connector is not None
    now = [1.0]
    connector.guard.clock = lambda: now[0]
    for _ in range(guard_module.LIMIT + 50):
        connector.on_new_request(Raises(RuntimeError))
    assert faults(connector) == {"new_request: RuntimeError": guard_module.LIMIT + 1}
    assert connector.guard.pauses == 1
    assert connector.adapter is not None
    assert len(served(engine)) == 120
    assert connector.adapter.counters.finished == 0
    now[0] += guard_module.PAUSE_S + 1
    assert len(served(engine)) == 120
    # The first one was in flight when it started over.
    assert connector.adapter.counters.finished == 119


def test_a_hook_that_takes_long_is_a_fault() -> None:
    class Slow(Raises):
        def __getattr__(self, name: str) -> Any:
            time.sleep(1.5 * guard_module.SLOW_S)
            return super().__getattr__(name)

    engine = Engine(60, SCRIPTED)
    connector = engine.connector
    assert connector is not None
    connector.on_new_request(Slow(RuntimeError))
    assert connector.guard.faults == {"new_request: RuntimeError": 1, "new_request: slow": 1}


def test_a_panic_below_the_guard_is_a_fault_and_an_interrupt_is_not() -> None:
    panic = type("PanicException", (BaseException,), {})

    def raises(error: type[BaseException]) -> int:
        raise error

    guard = Guard()
    assert guard.run("hook", 7, raises, panic) == 7
    assert guard.faults == {"hook: PanicException": 1}
    with pytest.raises(KeyboardInterrupt):
        guard.run("hook", 7, raises, KeyboardInterrupt)


def test_only_an_adapter_that_adds_nothing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(Adapter, "new_request", lambda _, request: called.append(request))
    engine = Engine(60, SCRIPTED)
    engine.request(workload()[0])
    assert not called
    for engine in (Engine(60, record=os.devnull), Engine(60, scheduling="fairness")):
        engine.request(workload()[0])
        assert called.pop()
        assert engine.connector is not None
        engine.connector.shutdown()


@pytest.mark.parametrize("method", CORE)
def test_a_core_that_raises_is_survived(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, method, boom)
    assert len(served(Engine(60, SCRIPTED))) == 120


def test_a_request_that_says_what_is_over_is_known_even_if_the_core_will_not_hear_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Scripted, "session_ended", boom)
    engine = Engine(60, SCRIPTED)
    request = engine.request(Call("s", "a", [1], []), ended_sessions=["t", "u"])
    assert engine.connector is not None
    assert engine.connector.adapter is not None
    assert request.request_id in engine.connector.adapter.calls
    assert engine.admit(request)
    engine.finish(request)
    assert sum(engine.connector.guard.faults.values()) == 1


@pytest.mark.parametrize(
    "answer",
    [
        lambda _core, n, _now: [0] * n,
        lambda _core, n, _now: list(range(n)),
        lambda _core, n, _now: [(1 << 64) - 1] * (n * 1000),
        lambda _core, n, _now: [-1, None, "x", 1.5],
        lambda _core, _n, _now: None,
        lambda _core, _n, _now: 17,
    ],
    ids=["zeros", "small", "too many", "no keys", "none", "a number"],
)
def test_victims_that_make_no_sense_change_nothing(answer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "evict", answer)
    engine, stock = Engine(60, SCRIPTED), Engine(60, None)
    assert served(engine) == served(stock)
    assert engine.evicted == stock.evicted


@pytest.mark.parametrize("attribute", ["block_hashes", "num_prompt_tokens", "request_id", "num_tokens"])
def test_requests_without_an_attribute_are_served(attribute: str) -> None:
    class Without:
        """A request of some other version of vLLM."""

        def __init__(self, request: Any) -> None:
            self._request = request

        def __getattr__(self, name: str) -> Any:
            if name == attribute:
                raise AttributeError(name)
            return getattr(self._request, name)

    engine = Engine(60, SCRIPTED)
    connector = engine.connector
    assert connector is not None
    for hook in ("on_new_request", "get_num_new_matched_tokens", "request_finished_all_groups"):
        real = getattr(connector, hook)
        setattr(connector, hook, lambda request, *rest, real=real: real(Without(request), *rest))
    assert len(served(engine)) == 120
    assert connector.guard.faults


@pytest.mark.parametrize("attribute", ["prompt_token_ids", "output_token_ids"])
@pytest.mark.parametrize("tokens", [None, [], ["word"] * 40, [-1, 1 << 40] * 20, 7])
def test_tokens_of_any_shape_are_survived_and_the_core_hears_of_each_end(attribute: str, tokens: Any) -> None:
    class Strange:
        def __init__(self, request: Any) -> None:
            self._request = request

        def __getattr__(self, name: str) -> Any:
            return tokens if name == attribute else getattr(self._request, name)

    engine = Engine(60, SCRIPTED, named=False)
    connector = engine.connector
    assert connector is not None
    assert connector.adapter is not None
    for hook in ("on_new_request", "request_finished_all_groups"):
        real = getattr(connector, hook)
        setattr(connector, hook, lambda request, *rest, real=real: real(Strange(request), *rest))
    assert len(served(engine)) == 120
    assert not connector.adapter.calls
    kinds = [kind for kind, _ in connector.adapter.core.events]  # type: ignore[union-attr]
    assert kinds.count("start") == kinds.count("end")


@pytest.mark.parametrize(
    "identity",
    [
        {"session_id": None, "agent_id": 17},
        {"session_id": "x" * 10_000, "agent_id": ["a", {"b": 1}]},
        {"session_id": "\ud800", "agent_id": ""},
        {"kv_transfer_params": {"agentrt": "not a mapping"}},
        {"kv_transfer_params": {"agentrt": {"session_id": object(), "session_end": "yes"}}},
        {"session_id": "s", "agent_id": "a", "ended_sessions": ["s", 7, None, {}, "x" * 10_000, "\ud800"]},
        {"session_id": "s", "agent_id": "a", "ended_sessions": {"s": object()}},
        {"session_id": "s", "agent_id": "a", "ended_sessions": [str(n) for n in range(5_000)]},
    ],
)
def test_identities_of_any_shape_are_served(identity: dict[str, Any]) -> None:
    engine = Engine(60, SCRIPTED)
    real = engine.connector.on_new_request  # type: ignore[union-attr]

    def poisoned(request: Any) -> None:
        request.sampling_params.extra_args = identity
        request.kv_transfer_params = identity.get("kv_transfer_params")
        real(request)

    engine.connector.on_new_request = poisoned  # type: ignore[union-attr, method-assign]
    assert len(served(engine)) == 120
    assert not faults(engine.connector)


CLOCKS = {"negative": lambda: -5, "huge": lambda: 1 << 70, "nan": lambda: float("nan"), "raises": boom}


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS.keys())
@pytest.mark.parametrize("policy", [SCRIPTED, "agentrt"])
def test_clocks_of_any_kind_are_survived(clock: Callable[[], Any], policy: str) -> None:
    engine = Engine(60, policy)
    if engine.connector is not None and engine.connector.adapter is not None:
        engine.connector.adapter.now_us = clock
    assert len(served(engine)) == 120


def test_events_out_of_order_are_survived() -> None:
    engine = Engine(60, "agentrt")
    connector = engine.connector
    assert connector is not None
    ghost = SimpleNamespace(request_id="ghost")
    for _ in range(3):
        connector.request_finished_all_groups(ghost, ([1, 2, 3],))
        connector.update_state_after_alloc(ghost, SimpleNamespace(blocks=[[]]), 0)
        connector.get_num_new_matched_tokens(ghost, 10**9)
        connector.build_connector_meta(SimpleNamespace())
        connector.request_finished_all_groups(None, ())
    request = engine.request(workload()[0])
    connector.on_new_request(request)
    connector.get_num_new_matched_tokens(request, 10**9)
    connector.request_finished_all_groups(request, ([10**6],))
    assert len(served(engine)) == 120


class Opaque:
    """Passes on what the pool has, but for the queue at every time that ``fails`` says so."""

    def __init__(self, pool: Any, fails: Callable[[], bool]) -> None:
        self._pool = pool
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        if name == "free_block_queue" and self._fails():
            raise AttributeError(name)
        return getattr(self._pool, name)


def test_a_pool_without_the_expected_queue_is_observed_only() -> None:
    engine, stock = Engine(60, SCRIPTED), Engine(60, None)
    assert engine.connector is not None
    engine.connector._bind(Opaque(engine.pool, lambda: True))
    assert engine.connector.adapter is not None
    assert not engine.connector.adapter.acting
    assert served(engine) == served(stock)
    assert engine.connector.adapter.counters.finished == 120
    assert not engine.connector.guard.faults


def test_a_queue_that_comes_and_goes_loses_no_block() -> None:
    engine, count = Engine(60, "lru"), itertools.count(1)
    assert engine.connector is not None
    engine.connector._bind(Opaque(engine.pool, lambda: next(count) % 7 == 3))
    assert len(served(engine)) == 120
    assert engine.connector.guard.faults


def test_many_faults_pause_the_adapter_and_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    guard = Guard(clock=lambda: now[0])
    calls = []

    def action() -> int:
        calls.append(1)
        raise ValueError

    for _ in range(guard_module.LIMIT + 50):
        assert guard.run("hook", 7, action) == 7
    assert len(calls) == guard_module.LIMIT + 1
    assert guard.pauses == 1
    now[0] += guard_module.PAUSE_S + 1
    assert guard.run("hook", 7, lambda: 8) == 8


def test_slow_hooks_count_as_faults() -> None:
    now = [0.0]
    guard = Guard(clock=lambda: now[0])

    def slow() -> int:
        now[0] += 1.0
        return 3

    assert guard.run("hook", 0, slow) == 3
    assert guard.faults == {"hook: slow": 1}


def test_kinds_of_faults_are_bounded() -> None:
    guard = Guard()
    for i in range(guard_module.MAX_KINDS * 2):
        guard.note(f"kind {i}")
    assert len(guard.faults) == guard_module.MAX_KINDS + 1
    assert guard.faults["other"] == guard_module.MAX_KINDS
