"""The same oracle over the real runtime: asyncio with a seeded scheduler, memo and speculation on."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from agentrt.tools import Memo, MemoryStore, Speculator, ToolRuntime, scope


class ShuffledLoop(asyncio.SelectorEventLoop):
    """Runs ready callbacks in a seeded order instead of first come, first served."""

    rng = random.Random(0)

    def _run_once(self) -> None:
        ready = list(self._ready)  # type: ignore[attr-defined]
        self.rng.shuffle(ready)
        self._ready.clear()  # type: ignore[attr-defined]
        self._ready.extend(ready)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        Clock.now += 0.01
        return Clock.now


async def interleaving(seed: int) -> tuple[int, int, int]:
    rng = random.Random(seed)
    versions = {"a": 0, "b": 0}
    memo = Memo(MemoryStore(clock=Clock()), verify_rate=0.1, seed=seed, off_below_s=0.0)
    speculator = Speculator(min_probability=0.2, waste_weight=0.0, allowance_s=1e9, min_predictability=0.0)
    runtime = ToolRuntime(memo=memo, speculation=speculator)
    effects = [0]

    async def pause() -> None:
        for _ in range(rng.randint(0, 3)):
            await asyncio.sleep(0)

    async def read(key: str) -> int:
        await pause()
        value = versions[key]
        await pause()
        if rng.random() < 0.1:
            raise OSError("down")
        return value

    async def both() -> list[int]:
        return [await read_tool("a"), await read_tool("b")]

    async def write(key: str) -> None:
        await pause()
        versions[key] += 1
        effects[0] += 1
        await pause()

    read_tool: Any = runtime.wrap(read, reads=["v/{key}"], writes=())
    both_tool: Any = runtime.wrap(both, reads=(), writes=())
    write_tool: Any = runtime.wrap(write, writes=["v/{key}"])
    written = [0]
    checked = [0]

    async def session(name: str) -> None:
        with scope(session=name):
            for _ in range(5):
                key = rng.choice("ab")
                kind = rng.random()
                await pause()
                low = dict(versions)
                try:
                    if kind < 0.25:
                        written[0] += 1
                        await write_tool(key)
                    elif kind < 0.45:
                        x, y = await both_tool()
                        assert low["a"] <= x <= versions["a"]
                        assert low["b"] <= y <= versions["b"]
                        checked[0] += 1
                    else:
                        value = await read_tool(key)
                        assert low[key] <= value <= versions[key], (seed, low, value, versions)
                        checked[0] += 1
                except OSError:
                    pass

    tasks = [asyncio.create_task(session(f"s{n}")) for n in range(3)]
    if rng.random() < 0.3:
        victim = rng.choice(tasks)
        for _ in range(rng.randint(1, 20)):
            await asyncio.sleep(0)
        victim.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    for task in list(runtime._tasks):
        task.cancel()
    await asyncio.gather(*runtime._tasks, return_exceptions=True)
    # Nothing but the calls that were made has had an effect, whatever ran ahead.
    assert effects[0] <= written[0]
    return checked[0], memo.stats.hits + memo.stats.joined, speculator.stats.committed


def test_no_stale_answer_from_the_runtime_whatever_the_schedule() -> None:
    loop = ShuffledLoop()
    totals = [0, 0, 0]
    try:
        for seed in range(1_500):
            loop.rng = random.Random(seed)
            for i, n in enumerate(loop.run_until_complete(interleaving(seed))):
                totals[i] += n
    finally:
        loop.close()
    assert totals[0] > 10_000
    assert totals[1] > 1_000
    assert totals[2] > 40
