"""Running ahead: what is learned, what is handed over, and that nothing else ever shows."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest

from agentrt.tools import Memo, MemoryStore, Scope, SpeculationRefusedError, Speculator, ToolRuntime, scope
from agentrt.tools.memo import Flight
from agentrt.tools.spec import ToolSpec

EAGER: dict[str, Any] = {"min_probability": 0.3, "waste_weight": 0.0, "allowance_s": 1e9, "min_predictability": 0.0}


def noop(**arguments: Any) -> None: ...


def feed(speculator: Speculator, here: Scope, steps: list[tuple[str, dict[str, Any], Any]]) -> None:
    """Shows a session to the speculator as if each tool took a second and the model thought for one."""
    now = 0.0
    for tool, arguments, result in steps:
        call = ToolSpec.of(noop, name=tool, reads=(), writes=()).bind((), arguments, here)
        speculator.called(call, now)
        speculator.returned(call, result, 1.0, now + 1.0, True)
        now += 2.0


def taught(lesson: Any, sessions: int = 12) -> Speculator:
    speculator = Speculator(**EAGER)
    for n in range(sessions):
        feed(speculator, Scope(f"t{n}"), lesson(n))
    return speculator


def predicted(speculator: Speculator, steps: list[tuple[str, dict[str, Any], Any]]) -> dict[str, Any] | None:
    here = Scope("new")
    feed(speculator, here, steps)
    worth = speculator.predict(here)
    return worth[0].arguments if worth else None


def test_a_field_of_the_last_result_becomes_an_argument() -> None:
    speculator = taught(
        lambda n: [("search", {"q": f"q{n}"}, {"hits": [{"id": 100 + n}, {"id": 5}]}), ("get", {"id": 100 + n}, {})]
    )
    assert predicted(speculator, [("search", {"q": "new"}, {"hits": [{"id": 7}, {"id": 8}]})]) == {"id": 7}


def test_constants_copies_and_templates_are_told_apart() -> None:
    speculator = taught(
        lambda n: [
            ("list", {"repo": f"repo-{n}"}, {"first": f"file{n}.py"}),
            ("read", {"path": f"/src/file{n}.py", "repo": f"repo-{n}", "mode": "r"}, ""),
        ]
    )
    found = predicted(speculator, [("list", {"repo": "mine"}, {"first": "main.py"})])
    assert found == {"path": "/src/main.py", "repo": "mine", "mode": "r"}


def test_the_next_element_of_an_earlier_list_is_found() -> None:
    def lesson(n: int) -> list[tuple[str, dict[str, Any], Any]]:
        pages = [f"u{n}-{i}" for i in range(4)]
        return [("search", {"q": n}, {"urls": pages}), *(("open", {"url": u}, "text") for u in pages[:3])]

    speculator = taught(lesson)
    pages = ["x", "y", "z"]
    steps: list[tuple[str, dict[str, Any], Any]] = [
        ("search", {"q": 0}, {"urls": pages}),
        ("open", {"url": "x"}, "text"),
    ]
    assert predicted(speculator, steps) == {"url": "y"}


def test_what_one_domain_taught_another_does_not_learn() -> None:
    speculator = taught(lambda n: [("a", {}, {}), ("b", {"key": "secret"}, {})])
    red, blue = Scope("s"), Scope("s", domain="blue")
    for here in (red, blue):
        feed(speculator, here, [("a", {}, {})])
    assert [p.arguments for p in speculator.predict(red)] == [{"key": "secret"}]
    assert speculator.predict(blue) == []


def test_an_unpredictable_agent_is_left_alone() -> None:
    rng = random.Random(0)
    speculator = Speculator(min_probability=0.1, waste_weight=0.0, min_predictability=0.2)
    here = Scope()
    feed(speculator, here, [(rng.choice("abcde"), {"x": 1}, {}) for _ in range(400)])
    assert speculator.predict(here) == []


def test_waste_is_bounded_by_the_budget() -> None:
    speculator = taught(lambda n: [("a", {}, {}), ("b", {}, {})])
    feed(speculator, Scope("s"), [("a", {}, {})])
    assert speculator.predict(Scope("s"))
    speculator._wasted(2e9)
    assert speculator.predict(Scope("s")) == []
    # A bad start is forgotten in time.
    feed(speculator, Scope("t"), [("a", {}, {})] * 200)
    feed(speculator, Scope("u"), [("a", {}, {}), ("b", {}, {})] * 300)
    feed(speculator, Scope("s"), [("a", {}, {})])
    assert speculator.predict(Scope("s"))


# End to end -----------------------------------------------------------------------------------------------------------


def make_runtime(**options: Any) -> ToolRuntime:
    return ToolRuntime(memo=Memo(MemoryStore(), verify_rate=0.0), speculation=Speculator(**{**EAGER, **options}))


async def pipeline(runtime: ToolRuntime, sessions: int, think_s: float, effects: list[str], wrong: float = 0.0) -> None:
    """Search -> get(id of the first hit) -> buy; in a share `wrong` of the sessions another id is taken."""
    rng = random.Random(5)

    async def search(q: str) -> dict[str, Any]:
        await asyncio.sleep(0.002)
        return {"hits": [f"{q}-1", f"{q}-2"]}

    async def get(item: str) -> str:
        await asyncio.sleep(0.004)
        return "item " + item

    async def buy(item: str) -> None:
        effects.append(item)

    search_tool = runtime.wrap(search, reads=["catalogue"], writes=())
    get_tool = runtime.wrap(get, reads=["catalogue"], writes=())
    buy_tool = runtime.wrap(buy, reads=(), writes=["orders"])
    for n in range(sessions):
        with scope(session=f"s{n}"):
            hits = (await search_tool(f"q{n}"))["hits"]
            await asyncio.sleep(think_s)
            chosen = hits[1] if rng.random() < wrong else hits[0]
            assert await get_tool(chosen) == "item " + chosen
            await asyncio.sleep(think_s)
            await buy_tool(chosen)
            runtime.end_session(Scope(f"s{n}"))


def test_a_call_run_ahead_answers_exactly_the_call_it_was_for() -> None:
    runtime = make_runtime()
    effects: list[str] = []
    asyncio.run(pipeline(runtime, 30, 0.006, effects))
    assert runtime.speculator is not None
    assert runtime.speculator.stats.committed > 15
    assert runtime.speculator.stats.saved_s > 0
    assert effects == [f"q{n}-1" for n in range(30)]


def test_wrong_predictions_have_no_effect_and_no_trace() -> None:
    runtime = make_runtime()
    effects: list[str] = []
    asyncio.run(pipeline(runtime, 60, 0.001, effects, wrong=0.5))
    stats = runtime.speculator.stats  # type: ignore[union-attr]
    assert stats.mismatched > 5
    # Sixty purchases were made, and not one more.
    assert len(effects) == 60
    # What was not asked for is not in the store either.
    assert len(runtime.memo.store) == 120  # type: ignore[arg-type]


def test_tools_with_effects_never_run_ahead() -> None:
    ran: list[int] = []
    runtime = make_runtime()
    look = runtime.wrap(lambda: 1, name="look", reads=(), writes=(), cache=False)
    act = runtime.wrap(lambda: ran.append(1), name="act", writes=["x"])
    unknown = runtime.wrap(lambda: ran.append(2), name="unknown")
    private = runtime.wrap(lambda: ran.append(3), name="private", reads=(), writes=(), cache=False, speculate=False)
    for n in range(20):
        with scope(session=f"s{n}"):
            for tool in (look, act, look, unknown, look, private):
                tool()
    runtime.close()
    assert ran == [1, 2, 3] * 20


def test_a_read_only_tool_that_lies_is_stopped_before_the_effect() -> None:
    ran: list[int] = []
    runtime = make_runtime()
    write = runtime.wrap(lambda: ran.append(1), name="write", writes=["x"])
    refused: list[bool] = []

    def liar() -> int:
        try:
            write()
        except SpeculationRefusedError:
            refused.append(True)
            raise
        return 1

    look = runtime.wrap(lambda: time.sleep(0.001), name="look", reads=(), writes=(), cache=False)
    lie = runtime.wrap(liar, name="liar", reads=(), writes=(), cache=False)
    calls = 0
    for n in range(12):
        with scope(session=f"s{n}"):
            look()
            time.sleep(0.002)
            lie()
            calls += 1
    runtime.close()
    assert refused
    assert len(ran) == calls


def test_a_write_in_between_spoils_what_ran_ahead() -> None:
    state = [0]
    runtime = make_runtime()

    def read(k: int) -> int:
        time.sleep(0.001)
        return state[0]

    look = runtime.wrap(lambda: time.sleep(0.001), name="look", reads=(), writes=(), cache=False)
    read_tool = runtime.wrap(read, reads=["state"], writes=())
    write = runtime.wrap(lambda: state.__setitem__(0, state[0] + 1), name="write", writes=["state"])
    for n in range(15):
        with scope(session="another"):
            write()
        with scope(session=f"s{n}"):
            look()
            time.sleep(0.003)
            with scope(session="another"):
                write()
            assert read_tool(1) == state[0]
    assert runtime.speculator is not None
    assert runtime.speculator.stats.stale > 0
    runtime.close()


def test_closing_cancels_what_runs_ahead() -> None:
    async def main() -> None:
        runtime = make_runtime()
        begun: list[int] = []
        ended: list[int] = []

        async def slow() -> int:
            begun.append(1)
            await asyncio.sleep(0.002 if len(ended) < 12 else 60)
            ended.append(1)
            return 1

        async def first() -> int:
            await asyncio.sleep(0.001)
            return 1

        a = runtime.wrap(first, name="a", reads=(), writes=(), cache=False)
        b = runtime.wrap(slow, name="b", reads=(), writes=(), cache=False)
        for n in range(12):
            with scope(session=f"s{n}"):
                await a()
                await asyncio.sleep(0.003)
                await b()
        await a()
        await asyncio.sleep(0)
        waiting = len(runtime._tasks)
        assert waiting == 1
        runtime.close()
        await asyncio.sleep(0.01)
        assert not runtime._tasks

    asyncio.run(main())


def test_results_run_ahead_are_for_one_session_and_grow_old() -> None:
    speculator = Speculator(**EAGER)
    spec = ToolSpec.of(noop, name="t", reads=(), writes=())
    call = spec.bind((), {"x": 1}, Scope("one"))
    ticket = speculator.reserve(call, Flight(call, 0, 0.0, None))
    assert ticket is not None
    assert speculator.reserve(call, Flight(call, 0, 0.0, None)) is None
    assert speculator.claim(spec.bind((), {"x": 1}, Scope("two"))) is None
    assert speculator.claim(spec.bind((), {"x": 1}, Scope("one", domain="other"))) is None
    assert speculator.too_old(ticket, 31.0)
    assert speculator.claim(call) is ticket


def test_results_of_silent_sessions_do_not_pile_up() -> None:
    speculator = Speculator(**EAGER)
    spec = ToolSpec.of(noop, name="t", reads=(), writes=())
    for n in range(100):
        call = spec.bind((), {"x": n}, Scope(f"s{n}"))
        flight = Flight(call, 0, float(n * 10), None)
        assert speculator.reserve(call, flight) is not None
        flight.land(None)
    assert len(speculator._tickets) <= 5
    assert speculator.stats.mismatched >= 95


def test_a_policy_that_does_not_allow_is_not_run_ahead_of(tmp_path: Path) -> None:
    from agentrt.safety import Guard

    path = tmp_path / "p.toml"
    path.write_text(
        "version=1\n[tools.a]\nprivileged=false\n[tools.b]\nprivileged=true\n"
        "[[rules]]\nid='a'\neffect='allow'\ntools=['a']\n[[rules]]\nid='b'\neffect='ask'\ntools=['b']\n"
    )
    ran: list[int] = []
    guard = Guard(path, approve=lambda call, decision: True)
    runtime = ToolRuntime(memo=Memo(MemoryStore()), speculation=Speculator(**EAGER), guard=guard)
    a = runtime.wrap(lambda: time.sleep(0.001), name="a", reads=(), writes=(), cache=False)
    b = runtime.wrap(lambda: ran.append(1), name="b", reads=(), writes=(), cache=False)
    for n in range(12):
        with scope(session=f"s{n}"):
            a()
            time.sleep(0.002)
            b()
    runtime.close()
    assert len(ran) == 12
    assert runtime.speculator is not None
    assert runtime.speculator.stats.launched == 0


def test_the_callers_see_one_call_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The history that a framework keeps is made of returned calls; what ran ahead returns to nobody."""
    runtime = make_runtime()
    effects: list[str] = []
    returned: list[str] = []
    original = Speculator.returned

    def record(self: Speculator, call: Any, *rest: Any) -> None:
        returned.append(call.spec.name)
        original(self, call, *rest)

    monkeypatch.setattr(Speculator, "returned", record)
    asyncio.run(pipeline(runtime, 20, 0.002, effects, wrong=0.3))
    assert returned == ["search", "get", "buy"] * 20
