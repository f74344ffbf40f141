"""Prefetch in the loop: the budget to the byte, cancellation, faults, and a small paged-KV engine end to end."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.transfer.naive import Shape, pool_over

from agentrt.transfer import (
    BlockPool,
    CopyFaultError,
    CopyPlan,
    HostStream,
    PairError,
    PrefetchExecutor,
    SimulatedDriver,
    TokenBucket,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECOND = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


# ---- the budget ------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rate=st.integers(0, 10**9),
    burst=st.integers(0, 10**6),
    steps=st.lists(st.tuples(st.integers(-5, 10**9), st.integers(0, 10**6)), max_size=40),
)
def test_bytes_never_exceed_burst_plus_rate_times_time(rate: int, burst: int, steps: list[tuple[int, int]]) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    granted: list[tuple[int, int]] = []
    latest = 0
    for advance, want in steps:
        clock.ns += advance
        latest = max(latest, clock.ns)
        if bucket.take(want):
            granted.append((latest, want))
        else:
            assert bucket.available() < want
    # In every window, not only from the start.
    for i, (begin, _) in enumerate(granted):
        total = 0
        for at, sent in granted[i:]:
            total += sent
            assert total * SECOND <= burst * SECOND + rate * (at - begin)


def test_a_bucket_loses_nothing_to_rounding() -> None:
    clock = Clock()
    bucket = TokenBucket(1, 10, clock)
    assert bucket.take(10)
    # A third of a second at one byte a second, three times.
    for _ in range(3):
        assert bucket.available() == 0
        clock.ns += SECOND // 3 + 1
    assert bucket.take(1)


# ---- the executor ----------------------------------------------------------------------------------------------------


class World:
    """Host tier and cache on a simulated device, one executor between them. A block is 2 layers of 64 bytes."""

    BLOCK = 128

    def __init__(self, *, blocks_per_s: int = 10, burst: int = 4, paused: bool = True) -> None:
        rng = np.random.default_rng(59)
        self.driver = SimulatedDriver()
        shape = Shape(2, 1, 16, 16, 64, "blocks_layers", "layers_blocks")
        self.host, self.host_bytes = pool_over("blocks_layers", shape, 16, "pinned", self.driver, rng)
        self.cache, self.cache_bytes = pool_over("layers_blocks", shape, 16, "device", self.driver, rng)
        self.clock = Clock()
        self.plan = CopyPlan(self.host, self.cache, driver=self.driver)
        self.stream = self.driver.stream_create(0)
        self.driver.paused = paused
        self.executor = PrefetchExecutor(
            self.plan,
            bytes_per_s=blocks_per_s * self.BLOCK,
            burst_bytes=burst * self.BLOCK,
            stream=self.stream,
            clock_ns=self.clock,
        )


def test_the_most_urgent_go_first_as_far_as_the_budget_reaches() -> None:
    world = World()
    executor = world.executor
    assert executor.request([(n, n, float(n % 4)) for n in range(10)]) == 10
    report = executor.step()
    assert report.sent_bytes == 4 * World.BLOCK
    assert world.cache.in_flight == {3, 7, 2, 6}
    assert executor.step().sent_bytes == 0
    world.clock.ns += SECOND // 10
    assert executor.step().sent_bytes == World.BLOCK
    world.clock.ns += 100 * SECOND
    # However long the pause, no more than a burst.
    assert executor.step().sent_bytes == 4 * World.BLOCK
    world.driver.run(world.stream)
    done = executor.step()
    # Of the three least urgent the last to arrive is left.
    assert sorted(done.ready) == [(n, n) for n in range(10) if n != 8]
    assert executor.totals.sent == 9 * World.BLOCK
    assert executor.queued == 1


def test_a_block_is_ready_only_after_its_copy_and_then_holds_its_source() -> None:
    world = World()
    world.executor.request([(3, 5, 1.0)])
    assert world.executor.step().ready == []
    assert world.executor.reserved == {5}
    assert world.executor.step().ready == []
    world.driver.run(world.stream)
    assert world.executor.step().ready == [(3, 5)]
    assert np.array_equal(world.cache_bytes[:, 5], world.host_bytes[:, 3])
    assert not world.executor.reserved


def test_a_failed_prediction_drops_what_is_queued_and_counts_what_was_sent() -> None:
    world = World()
    executor = world.executor
    executor.request([(n, n, 1.0) for n in range(8)])
    executor.step()  # 0..3 are on their way
    assert executor.cancel([0, 1, 5]) == 1
    assert executor.cancel() == 3
    assert executor.queued == 0
    world.driver.run(world.stream)
    report = executor.step()
    assert not report.ready
    assert sorted(report.wasted) == [(n, n) for n in range(4)]
    assert not executor.reserved
    totals = executor.totals
    assert (totals.requested, totals.cancelled, totals.wasted) == tuple(World.BLOCK * n for n in (8, 4, 4))
    # The block can be asked for again, and this time it counts.
    world.clock.ns += SECOND
    executor.request([(0, 0, 1.0)])
    executor.step()
    world.driver.run(world.stream)
    assert executor.step().ready == [(0, 0)]


def test_asking_again_replaces_the_queued_request() -> None:
    world = World(burst=1)
    assert world.executor.request([(1, 1, 1.0), (2, 2, 2.0)]) == 2
    assert world.executor.request([(7, 1, 3.0)]) == 0
    world.executor.step()
    assert world.host.in_flight == {7}
    assert world.executor.request([(9, 1, 9.0)]) == 0
    assert world.executor.queued == 1
    with pytest.raises(PairError, match="outside its pool: 16 -> 0"):
        world.executor.request([(16, 0, 1.0)])


def test_a_block_somebody_else_uses_waits_without_blocking_the_rest() -> None:
    world = World()
    busy = world.driver.stream_create(0)
    evicting = CopyPlan(world.cache, world.host, driver=world.driver).copy([(2, 9)], stream=busy)
    world.executor.request([(1, 2, 9.0), (3, 4, 1.0), (9, 6, 5.0)])
    assert world.executor.step().sent_bytes == World.BLOCK
    assert world.executor.queued == 2
    evicting.wait()
    assert world.executor.step().sent_bytes == 2 * World.BLOCK


def test_a_fault_is_reported_and_leaves_everything_else_as_it_was() -> None:
    world = World()
    source, target = world.host_bytes.copy(), world.cache_bytes.copy()
    world.executor.request([(1, 4, 1.0), (2, 5, 1.0)])
    world.executor.step()
    world.driver.fail_execution_after = 1
    world.driver.run(world.stream)
    report = world.executor.step()
    assert not report.ready
    assert sorted((f.source, f.destination) for f in report.failed) == [(1, 4), (2, 5)]
    assert np.array_equal(world.host_bytes, source)
    others = [n for n in range(16) if n not in (4, 5)]
    assert np.array_equal(world.cache_bytes[:, others], target[:, others])
    assert world.cache.torn == {4, 5}
    assert not world.executor.reserved
    assert world.executor.totals.failed == 2 * World.BLOCK


def test_a_refusal_by_the_driver_is_a_failure_not_a_crash() -> None:
    world = World()
    world.driver.fail_submission_after = 0
    world.executor.request([(1, 4, 1.0)])
    report = world.executor.step()
    assert [f.destination for f in report.failed] == [4]
    world.driver.fail_submission_after = None
    world.executor.request([(1, 4, 1.0)])
    world.clock.ns += SECOND
    world.executor.step()
    world.driver.run(world.stream)
    assert world.executor.step().ready == [(1, 4)]
    assert not world.cache.torn


def test_a_burst_too_small_for_a_block_is_refused_and_no_rate_means_no_prefetch() -> None:
    world = World()
    with pytest.raises(ValueError, match="at least one block of 128 bytes: 100"):
        PrefetchExecutor(world.plan, bytes_per_s=1000, burst_bytes=100)
    silent = PrefetchExecutor(world.plan, bytes_per_s=0, burst_bytes=0, clock_ns=world.clock)
    silent.request([(1, 1, 1.0)])
    world.clock.ns += 10**15
    assert silent.step().sent_bytes == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_happens_each_request_ends_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    world = World(blocks_per_s=50, burst=6)
    executor, ended = world.executor, 0
    for _ in range(40):
        action = rng.integers(0, 5)
        if action == 0:
            executor.request([(int(rng.integers(16)), int(rng.integers(16)), float(rng.random())) for _ in range(4)])
        elif action == 1:
            executor.cancel(None if rng.random() < 0.3 else rng.integers(0, 16, 3).tolist())
        elif action == 2:
            world.driver.run(world.stream, int(rng.integers(1, 6)))
        elif action == 3:
            world.clock.ns += int(rng.integers(0, SECOND // 5))
        report = executor.step()
        for source, target in report.ready:
            assert np.array_equal(world.cache_bytes[:, target], world.host_bytes[:, source])
        ended += len(report.ready) + len(report.wasted) + len(report.failed)
    report = executor.drain()
    ended += len(report.ready) + len(report.wasted) + len(report.failed)
    executor.cancel()
    totals = executor.totals
    assert totals.requested == totals.ready + totals.wasted + totals.failed + totals.cancelled
    assert totals.requested == ended * World.BLOCK + totals.cancelled
    assert totals.sent == totals.ready + totals.wasted + totals.failed
    assert not world.cache.in_flight
    assert not executor.reserved


# ---- end to end ------------------------------------------------------------------------------------------------------


class PagedEngine:
    """A paged-KV engine reduced to its bookkeeping: a cache of blocks, a host tier, an LRU order, checkable contents.

    A block's content is a function of its key, so a wrong or torn byte anywhere shows at the next `use`.
    """

    def __init__(
        self,
        cache: BlockPool,
        host: BlockPool,
        executor: PrefetchExecutor,
        offload: CopyPlan,
        write: Callable[[int, int], None],
        read: Callable[[int], bytes],
    ) -> None:
        self.cache, self.host, self.executor, self.offload = cache, host, executor, offload
        self.write, self.read = write, read
        self.resident: OrderedDict[int, int] = OrderedDict()  # key -> cache block, least recent first
        self.tier: dict[int, int] = {}  # key -> host block
        self.free = set(range(cache.num_blocks))
        self.free_host = list(range(host.num_blocks))
        self.coming: dict[int, int] = {}  # cache block -> key
        self.hits = self.misses = 0

    @staticmethod
    def content(key: int, nbytes: int) -> bytes:
        return np.random.default_rng(key).bytes(nbytes)

    def _evict_one(self) -> None:
        busy = self.cache.in_flight
        victim, block = next((k, b) for k, b in self.resident.items() if b not in busy)
        if victim not in self.tier:
            slot = self.free_host.pop()
            # The engine may rewrite the block only after its bytes have left.
            self.offload.copy([(block, slot)]).wait()
            self.tier[victim] = slot
        del self.resident[victim]
        self.cache.check_reusable([block])
        self.free.add(block)

    def take_block(self) -> int:
        if not self.free:
            self._evict_one()
        return self.free.pop()

    def use(self, key: int) -> None:
        """A call touches a block: a hit reads it, a miss computes it afresh. Either way its bytes must be the key's."""
        if key in self.resident:
            self.hits += 1
            self.resident.move_to_end(key)
        else:
            self.misses += 1
            block = self.take_block()
            self.write(block, key)
            self.cache.repair([block])
            self.resident[key] = block
        block = self.resident[key]
        got = self.read(block)
        assert got == self.content(key, len(got)), f"block of key {key} is not what was stored"

    def prefetch(self, keys: list[int]) -> None:
        wanted = [k for k in keys if k in self.tier and k not in self.resident and k not in self.coming.values()]
        actions = []
        for rank, key in enumerate(wanted):
            block = self.take_block()
            self.coming[block] = key
            actions.append((self.tier[key], block, -float(rank)))
        self.executor.request(actions)

    def give_up(self) -> None:
        """The prediction failed: blocks of requests never sent are free again at once."""
        queued = set(self.coming) - {
            b for _, requests in self.executor._running for b in (r.destination for r in requests)
        }
        self.executor.cancel()
        for block in queued:
            del self.coming[block]
            self.free.add(block)

    def between_steps(self) -> None:
        report = self.executor.step()
        for _, block in report.ready:
            self.resident[self.coming.pop(block)] = block
        for _, block in report.wasted:
            del self.coming[block]
            self.free.add(block)
        for failure in report.failed:
            del self.coming[failure.destination]
            self.free.add(failure.destination)


def numpy_world() -> Iterator[tuple[PagedEngine, Callable[[], None]]]:
    cache_memory = np.zeros((2, 12, 4, 16), np.float16)
    tier_memory = np.zeros((64, 2, 4, 16), np.float16)
    cache = BlockPool.from_array(cache_memory, "layers_blocks")
    tier = BlockPool.from_array(tier_memory, "blocks_layers")
    clock, stream = Clock(), HostStream()
    block = 2 * cache.block_bytes
    executor = PrefetchExecutor(
        CopyPlan(tier, cache), bytes_per_s=200 * block, burst_bytes=3 * block, stream=stream, clock_ns=clock
    )

    def write(target: int, key: int) -> None:
        data = np.frombuffer(PagedEngine.content(key, block), np.float16).reshape(2, 4, 16)
        cache_memory[:, target] = data

    def tick() -> None:
        clock.ns += SECOND // 100
        stream.synchronize()

    yield PagedEngine(cache, tier, executor, CopyPlan(cache, tier), write, lambda b: cache_memory[:, b].tobytes()), tick


def torch_world() -> Iterator[tuple[PagedEngine, Callable[[], None]]]:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    cache_memory = torch.zeros(2, 12, 4, 16, dtype=torch.bfloat16)
    tier_memory = torch.zeros(64, 2, 4, 16, dtype=torch.bfloat16)
    cache = BlockPool.from_array(cache_memory, "layers_blocks")
    tier = BlockPool.from_array(tier_memory, "blocks_layers")
    clock, stream = Clock(), HostStream()
    block = 2 * cache.block_bytes
    executor = PrefetchExecutor(
        CopyPlan(tier, cache), bytes_per_s=200 * block, burst_bytes=3 * block, stream=stream, clock_ns=clock
    )

    def write(target: int, key: int) -> None:
        data = bytearray(PagedEngine.content(key, block))
        cache_memory[:, target] = torch.frombuffer(data, dtype=torch.bfloat16).reshape(2, 4, 16)

    def read(target: int) -> bytes:
        return bytes(cache_memory[:, target].contiguous().view(torch.uint8).numpy().tobytes())

    def tick() -> None:
        clock.ns += SECOND // 100
        stream.synchronize()

    yield PagedEngine(cache, tier, executor, CopyPlan(cache, tier), write, read), tick


def simulated_world(fault_every: int | None = None) -> Iterator[tuple[PagedEngine, Callable[[], None]]]:
    driver = SimulatedDriver()
    rng = np.random.default_rng(61)
    shape = Shape(2, 1, 64, 12, 128, "blocks_layers", "layers_blocks")
    tier, _ = pool_over("blocks_layers", shape, 64, "pinned", driver, rng)
    cache, cache_bytes = pool_over("layers_blocks", shape, 12, "device", driver, rng)
    clock = Clock()
    executor = PrefetchExecutor(
        CopyPlan(tier, cache, driver=driver), bytes_per_s=200 * 256, burst_bytes=3 * 256, clock_ns=clock
    )

    def write(target: int, key: int) -> None:
        cache_bytes[:, target] = np.frombuffer(PagedEngine.content(key, 256), np.uint8).reshape(2, 128)

    driver.paused = True
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        clock.ns += SECOND // 100
        for stream in list(driver._streams):
            driver.run(stream)
        if fault_every:
            # One submission fails now and then, at a different depth each time.
            driver.fail_submission_after = ticks % 3 if ticks % fault_every == 0 else None

    engine = PagedEngine(
        cache, tier, executor, CopyPlan(cache, tier, driver=driver), write, lambda b: cache_bytes[:, b].tobytes()
    )
    yield engine, tick


def serve(
    engine: PagedEngine, tick: Callable[[], None], predict: Callable[[int], int | None], calls: int = 120
) -> None:
    """Agents take turns, each call touches its agent's four blocks; the next agent is predicted, sometimes wrongly."""
    rng = np.random.default_rng(67)
    agent = 0
    for call in range(calls):
        for key in range(4 * agent, 4 * agent + 4):
            engine.use(key)
        guess = predict(agent)
        following = (agent + 1) % 6 if rng.random() < 0.8 else int(rng.integers(6))
        if guess is not None:
            engine.prefetch(list(range(4 * guess, 4 * guess + 4)))
            for step in range(3):
                engine.between_steps()
                tick()
                if step == 0 and guess != following:
                    engine.give_up()
            engine.between_steps()
        # Every block is in exactly one place.
        blocks = [*engine.resident.values(), *engine.free, *engine.coming]
        assert sorted(blocks) == list(range(12)), call
        agent = following


@pytest.mark.parametrize("world", [numpy_world, torch_world, simulated_world], ids=lambda w: w.__name__)
def test_evicted_blocks_come_back_byte_identical_and_prediction_pays(
    world: Callable[[], Iterator[tuple[PagedEngine, Callable[[], None]]]],
) -> None:
    ((without, tick),) = world()
    serve(without, tick, lambda agent: None)
    ((engine, tick),) = world()
    serve(engine, tick, lambda agent: (agent + 1) % 6)
    engine.executor.cancel()
    engine.executor.drain()
    totals = engine.executor.totals
    assert totals.ready > 0
    assert totals.wasted > 0
    assert totals.cancelled > 0
    assert engine.hits > 2 * without.hits
    assert not engine.cache.in_flight


def test_the_engine_survives_faults_in_the_middle_of_copies() -> None:
    ((engine, tick),) = simulated_world(fault_every=5)
    offload = engine.offload.copy

    def patient(*arguments: object) -> object:
        # The engine's own offload tries again; the block it reads is untouched by the fault.
        for _ in range(4):
            with contextlib.suppress(CopyFaultError):
                return offload(*arguments)  # type: ignore[arg-type]
            tick()
        raise AssertionError("offload failed four times")

    engine.offload.copy = patient  # type: ignore[method-assign,assignment]
    serve(engine, tick, lambda agent: (agent + 1) % 6)
    assert engine.executor.totals.failed > 0
    assert engine.executor.totals.ready > 0
    assert engine.hits > 0


def test_prefetch_and_eviction_from_two_threads_never_share_a_block() -> None:
    ((engine, tick),) = numpy_world()
    for key in range(24):
        engine.use(key)
    stop = threading.Event()
    seen: list[BaseException] = []

    def watch() -> None:
        try:
            while not stop.is_set():
                flying = engine.cache.in_flight
                assert flying <= set(range(12))
        except BaseException as error:  # noqa: BLE001 - reported below
            seen.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        serve(engine, tick, lambda agent: (agent + 1) % 6, calls=60)
    finally:
        stop.set()
        thread.join()
    assert not seen
