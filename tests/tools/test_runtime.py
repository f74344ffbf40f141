"""The drivers: what a caller of a tool sees, synchronously, in asyncio and from threads."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import agentrt
from agentrt.tools import Memo, MemoryStore, ToolRuntime, ToolSpec, scope


def counted(log: list[int]) -> int:
    """Notes that the tool ran; how often it has."""
    log.append(1)
    return len(log)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def runtime(clock: Clock) -> ToolRuntime:
    return ToolRuntime(memo=Memo(MemoryStore(clock=clock), verify_rate=0.0))


def test_reads_are_reused_until_something_they_read_is_written(runtime: ToolRuntime) -> None:
    files = {"a": "1", "b": "2"}
    reads: list[str] = []

    def read(path: str) -> str:
        reads.append(path)
        return files[path]

    def write(path: str, text: str) -> None:
        files[path] = text

    read_tool = runtime.wrap(read, reads=["file/{path:path}"], writes=())
    write_tool = runtime.wrap(write, reads=(), writes=["file/{path:path}"])
    assert [read_tool("a"), read_tool("b"), read_tool("a"), read_tool(path="b")] == ["1", "2", "1", "2"]
    write_tool("a", "3")
    assert [read_tool("a"), read_tool("b")] == ["3", "2"]
    assert reads == ["a", "b", "a"]


def test_undeclared_tools_always_run_and_forget_everything(runtime: ToolRuntime) -> None:
    ran: list[str] = []
    known = runtime.wrap(lambda: ran.append("known"), name="known", reads=["x"], writes=())
    pure = runtime.wrap(lambda: ran.append("pure"), name="pure", reads=(), writes=())
    unknown = runtime.wrap(lambda: ran.append("unknown"), name="unknown")
    for tool in (known, pure, unknown, unknown, known, pure):
        tool()
    assert ran == ["known", "pure", "unknown", "unknown", "known"]


def test_state_changed_without_a_tool_can_be_declared(runtime: ToolRuntime) -> None:
    ran: list[int] = []
    tool = runtime.wrap(lambda: ran.append(1), name="t", reads=["db/users"], writes=())
    tool()
    runtime.invalidate("db/orders")
    tool()
    runtime.invalidate("db")
    tool()
    assert len(ran) == 2


def test_callers_cannot_change_each_others_results(runtime: ToolRuntime) -> None:
    tool = runtime.wrap(lambda: {"rows": [1]}, name="t", reads=(), writes=())
    tool()["rows"].append(2)
    tool()["rows"].append(3)
    assert tool() == {"rows": [1]}


def test_trust_domains_share_nothing(runtime: ToolRuntime) -> None:
    ran: list[int] = []
    tool = runtime.wrap(lambda: counted(ran), name="t", reads=(), writes=())
    answers = []
    for domain in ("red", "blue", "red"):
        with scope(domain=domain):
            answers.append(tool())
    assert answers == [1, 2, 1]


def test_time_to_live_ends_an_answer(runtime: ToolRuntime, clock: Clock) -> None:
    ran: list[int] = []
    tool = runtime.wrap(lambda: ran.append(1), name="t", reads=(), writes=(), ttl_s=10)
    tool()
    clock.now = 9.9
    tool()
    clock.now = 10.0
    tool()
    assert len(ran) == 2


def test_exceptions_are_answers_only_if_declared(runtime: ToolRuntime) -> None:
    ran: list[str] = []

    def find(key: str) -> str:
        ran.append(key)
        raise KeyError(key) if key == "missing" else OSError("down")

    tool = runtime.wrap(find, reads=["db"], writes=(), cache_errors=[KeyError])
    for _ in range(3):
        with pytest.raises(KeyError, match="missing"):
            tool("missing")
        with pytest.raises(OSError, match="down"):
            tool("other")
    assert ran.count("missing") == 1
    assert ran.count("other") == 3


def test_the_decorator_keeps_the_function_and_uses_the_active_runtime(runtime: ToolRuntime) -> None:
    @agentrt.tool(reads=["user/{user_id}"], writes=())
    def get_user(user_id: int, detail: bool = False) -> dict[str, int]:
        """Looks a user up."""
        return {"id": user_id}

    @agentrt.tool
    def anything() -> int:
        return 1

    assert (get_user.__name__, get_user.__doc__) == ("get_user", "Looks a user up.")
    with runtime.active():
        assert get_user(7) == get_user(user_id=7, detail=False) == {"id": 7}
        assert anything() == 1
    assert runtime.memo.stats.hits == 1
    with pytest.raises(TypeError):
        get_user(detail=True)  # type: ignore[call-arg]


def test_importing_agentrt_does_not_load_the_tools() -> None:
    code = (
        "import sys, agentrt; bad = [m for m in ('sqlite3', 'asyncio', 'agentrt.tools') if m in sys.modules];"
        "assert not bad, bad; agentrt.tool; assert 'agentrt.tools' in sys.modules and 'sqlite3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# Nested calls ---------------------------------------------------------------------------------------------------------


def test_an_outer_result_depends_on_what_inner_calls_read(runtime: ToolRuntime) -> None:
    rows = {"x": 1}
    ran: list[str] = []
    inner = runtime.wrap(lambda k: rows[k], name="inner", reads=["row/{k}"], writes=())
    put = runtime.wrap(lambda k, v: rows.update({k: v}), name="put", writes=["row/{k}"])

    def outer(k: str) -> int:
        ran.append(k)
        return int(inner(k)) * 10

    tool = runtime.wrap(outer, reads=(), writes=())
    assert [tool("x"), tool("x")] == [10, 10]
    put("x", 2)
    assert tool("x") == 20
    inner("x")
    put("x", 3)
    # The inner entry is fresh again, the outer one is not.
    assert [inner("x"), tool("x")] == [3, 30]
    assert len(ran) == 3


def test_an_outer_result_is_not_kept_if_an_inner_call_wrote(runtime: ToolRuntime) -> None:
    sent: list[str] = []
    send = runtime.wrap(sent.append, name="send", writes=["mail"])

    def notify(text: str) -> str:
        send(text)
        return "sent"

    tool = runtime.wrap(notify, reads=(), writes=())
    assert [tool("a"), tool("a")] == ["sent", "sent"]
    assert sent == ["a", "a"]


def test_an_outer_result_is_not_kept_if_an_inner_one_may_not_be(runtime: ToolRuntime) -> None:
    ran: list[int] = []
    clock = runtime.wrap(lambda: counted(ran), name="now", reads=(), writes=(), cache=False)
    tool = runtime.wrap(clock, name="outer", reads=(), writes=())
    assert [tool(), tool()] == [1, 2]


# Streams --------------------------------------------------------------------------------------------------------------


def test_streams_pass_through_and_writes_last_as_long_as_they_do(runtime: ToolRuntime) -> None:
    ran: list[str] = []

    def lines(path: str) -> Iterator[str]:
        ran.append(path)
        yield from ("a", "b")

    tool = runtime.wrap(lines, reads=["file"], writes=())
    assert [list(tool("x")), list(tool("x"))] == [["a", "b"]] * 2
    assert ran == ["x", "x"]

    state = [0]

    def slow_write() -> Iterator[int]:
        state[0] = 1
        yield 1
        state[0] = 2
        yield 2

    read = runtime.wrap(lambda: state[0], name="read", reads=["state"], writes=())
    write = runtime.wrap(slow_write, writes=["state"])
    assert read() == 0
    stream = write()
    seen = [next(stream), read(), next(stream), read()]
    assert seen == [1, 1, 2, 2]
    assert list(stream) == []
    assert [read(), read()] == [2, 2]
    assert runtime.memo.stats.hits == 1


def test_a_stream_that_is_dropped_ends_its_write_in_doubt(runtime: ToolRuntime, clock: Clock) -> None:
    ran: list[int] = []
    read = runtime.wrap(lambda: ran.append(1), name="read", reads=["s"], writes=())

    def writing() -> Iterator[int]:
        yield 1

    stream = runtime.wrap(writing, writes=["s"])()
    del stream
    gc.collect()
    read()
    read()
    clock.now = 6.0
    read()
    read()
    assert len(ran) == 3


async def _collect(stream: AsyncIterator[int]) -> list[int]:
    return [x async for x in stream]


def test_asynchronous_streams_pass_through(runtime: ToolRuntime) -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        yield 2

    tool = runtime.wrap(numbers, writes=["s"])
    assert asyncio.run(_collect(tool())) == [1, 2]
    assert runtime.memo.store.start([("s",)]) is not None


# Single flight --------------------------------------------------------------------------------------------------------


def test_identical_calls_in_flight_execute_once(runtime: ToolRuntime) -> None:
    async def main() -> None:
        ran: list[int] = []
        gate = asyncio.Event()

        async def slow(x: int) -> dict[str, int]:
            ran.append(x)
            await gate.wait()
            return {"x": x}

        tool = runtime.wrap(slow, reads=["r"], writes=())
        calls = [asyncio.create_task(tool(1)) for _ in range(10)]
        with scope(domain="other"):
            foreign = asyncio.create_task(tool(1))
        await asyncio.sleep(0)
        gate.set()
        results = await asyncio.gather(*calls)
        assert results == [{"x": 1}] * 10
        assert len({id(r) for r in results}) == 10
        await foreign
        assert ran == [1, 1]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["cancel", "fail"])
def test_a_leader_that_does_not_finish_hands_over(runtime: ToolRuntime, how: str) -> None:
    async def main() -> None:
        ran: list[int] = []
        gates = [asyncio.Event() for _ in range(9)]

        async def slow() -> int:
            n = len(ran)
            ran.append(n)
            await gates[n].wait()
            if n == 0 and how == "fail":
                raise OSError("down")
            return n

        tool = runtime.wrap(slow, reads=(), writes=())
        leader = asyncio.create_task(tool())
        await asyncio.sleep(0)
        followers = [asyncio.create_task(tool()) for _ in range(5)]
        await asyncio.sleep(0)
        assert ran == [0]
        if how == "cancel":
            leader.cancel()
        gates[0].set()
        with pytest.raises((asyncio.CancelledError, OSError)):
            await leader
        gates[1].set()
        assert await asyncio.gather(*followers) == [1] * 5
        assert ran == [0, 1]

    asyncio.run(main())


def test_a_follower_that_is_cancelled_leaves_the_others_alone(runtime: ToolRuntime) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def slow() -> int:
            await gate.wait()
            return 1

        tool = runtime.wrap(slow, reads=(), writes=())
        leader, follower, other = (asyncio.create_task(tool()) for _ in range(3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        follower.cancel()
        gate.set()
        assert list(await asyncio.gather(leader, other)) == [1, 1]

    asyncio.run(main())


def test_a_persistently_failing_tool_fails_every_caller_soon(runtime: ToolRuntime) -> None:
    async def main() -> None:
        ran: list[int] = []

        async def broken() -> int:
            ran.append(1)
            await asyncio.sleep(0)
            raise OSError("down")

        tool = runtime.wrap(broken, reads=(), writes=())
        results = await asyncio.gather(*(tool() for _ in range(20)), return_exceptions=True)
        assert all(isinstance(r, OSError) for r in results)
        assert len(ran) == 20

    asyncio.run(main())


def test_threads_share_one_execution(runtime: ToolRuntime) -> None:
    started, gate = threading.Event(), threading.Event()
    ran: list[int] = []

    def slow() -> int:
        ran.append(1)
        started.set()
        gate.wait(10)
        return 5

    tool = runtime.wrap(slow, reads=(), writes=())
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(tool())) for _ in range(8)]
    threads[0].start()
    started.wait(10)
    for thread in threads[1:]:
        thread.start()
    while runtime.memo.stats.joined < 7:
        pass
    gate.set()
    for thread in threads:
        thread.join()
    assert results == [5] * 8
    assert len(ran) == 1


def test_a_synchronous_call_on_a_loop_thread_never_waits(runtime: ToolRuntime) -> None:
    started, gate = threading.Event(), threading.Event()

    def slow() -> int:
        started.set()
        gate.wait(0.2 if started.is_set() else 10)
        return 1

    tool = runtime.wrap(slow, reads=(), writes=())

    async def main() -> int:
        other = asyncio.get_running_loop().run_in_executor(None, tool)
        await asyncio.to_thread(started.wait, 10)
        gate.set()
        return int(tool()) + int(await other)

    assert asyncio.run(main()) == 2


def test_a_synchronous_tool_may_be_awaited(runtime: ToolRuntime) -> None:
    spec = ToolSpec.of(lambda x: x + 1, name="inc", reads=(), writes=())

    async def main() -> list[int]:
        return [await runtime.acall(spec, 1), await runtime.acall(spec, 1)]

    assert asyncio.run(main()) == [2, 2]
    assert runtime.memo.stats.hits == 1


# Learning -------------------------------------------------------------------------------------------------------------


def test_a_tool_whose_answers_differ_is_switched_off(clock: Clock) -> None:
    runtime = ToolRuntime(memo=Memo(MemoryStore(clock=clock), verify_rate=0.2, seed=1))
    ran: list[int] = []
    noisy = runtime.wrap(lambda: counted(ran), name="noisy", reads=(), writes=())
    steady = runtime.wrap(lambda: {"a": 1}, name="steady", reads=(), writes=())
    for _ in range(100):
        noisy()
        steady()
        clock.now += 0.01
    assert runtime.memo.is_off("noisy")
    assert not runtime.memo.is_off("steady")
    before = len(ran)
    noisy()
    noisy()
    assert len(ran) == before + 2


def test_probation_verifies_before_the_first_answer_is_reused(clock: Clock) -> None:
    runtime = ToolRuntime(memo=Memo(MemoryStore(clock=clock), verify_rate=0.0, probation=2))
    ran: list[int] = []
    tool = runtime.wrap(lambda: ran.append(1), name="t", reads=(), writes=())
    for _ in range(6):
        tool()
    assert len(ran) == 3


def test_a_lifetime_is_learned_from_the_age_of_differences(clock: Clock) -> None:
    runtime = ToolRuntime(memo=Memo(MemoryStore(clock=clock), verify_rate=1.0))
    # Changes every 100 s, behind the back of every declaration.
    tool = runtime.wrap(lambda: int(clock.now // 100), name="t", reads=(), writes=())
    for _ in range(40):
        tool()
        clock.now += 15.0
    lifetime = runtime.memo.store.lifetime_s("t")
    assert 1.0 <= lifetime <= 100.0
    assert not runtime.memo.is_off("t")


def test_a_write_between_does_not_count_as_a_difference(clock: Clock) -> None:
    runtime = ToolRuntime(memo=Memo(MemoryStore(clock=clock), verify_rate=1.0))
    value = [0]
    read = runtime.wrap(lambda: value[0], name="read", reads=["v"], writes=())
    write = runtime.wrap(lambda: value.__setitem__(0, value[0] + 1), name="write", writes=["v"])
    for _ in range(20):
        read()
        write()
        clock.now += 1
    assert runtime.memo.stats.differences == 0
    assert not runtime.memo.is_off("read")


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_size_is_bounded_and_costly_results_stay(clock: Clock) -> None:
    store = MemoryStore(max_bytes=20_000, clock=clock)
    memo = Memo(store, verify_rate=0.0)
    spec = ToolSpec.of(lambda kind, n: None, name="t", reads=(), writes=())

    def run(kind: str, n: int, seconds: float) -> bool:
        from agentrt.tools import Scope

        call = spec.bind((kind, n), {}, Scope())
        entry, flight, _ = memo.begin(call)
        if flight is not None:
            memo.finish(flight, "x" * 600, seconds)
        return entry is not None

    for n in range(300):
        run("cheap", n, 0.001)
        if n < 5:
            run("costly", n, 5.0)
        assert store.size_bytes() <= 20_000
    assert all(run("costly", n, 5.0) for n in range(5))


def test_stamps_are_bounded_and_folding_is_safe(clock: Clock) -> None:
    store = MemoryStore(max_resources=100, clock=clock)
    runtime = ToolRuntime(memo=Memo(store, verify_rate=0.0))
    values: dict[int, int] = {}
    read = runtime.wrap(lambda k: values.get(k, 0), name="read", reads=["k/{k}"], writes=())
    write = runtime.wrap(lambda k: values.__setitem__(k, values.get(k, 0) + 1), name="write", writes=["k/{k}"])
    for n in range(1_000):
        k = n * 7 % 150
        read(k)
        write(k)
        assert read(k) == values[k]
    assert len(store._stamps) <= 100


def test_a_result_too_large_to_keep_is_still_returned(clock: Clock) -> None:
    runtime = ToolRuntime(memo=Memo(MemoryStore(clock=clock), max_entry_bytes=100))
    tool = runtime.wrap(lambda: "x" * 1000, name="t", reads=(), writes=())
    assert tool() == tool() == "x" * 1000
    assert runtime.memo.stats.hits == 0


def test_what_cannot_be_named_or_kept_is_executed(runtime: ToolRuntime) -> None:
    ran: list[Any] = []
    tool = runtime.wrap(lambda x: (counted(ran), object())[1], name="t", reads=(), writes=())
    assert tool(1) is not tool(1)
    tool(object())
    assert len(ran) == 3
