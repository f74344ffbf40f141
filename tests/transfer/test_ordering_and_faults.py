"""What protects the data while copies run: pins, ordering, and what a failure leaves behind."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.transfer.naive import Shape, pool_over

from agentrt.transfer import (
    BackendUnavailableError,
    BlockPool,
    CopyFaultError,
    CopyPlan,
    DriverError,
    HostStream,
    InFlightError,
    SimulatedDriver,
    TornBlockError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


class World:
    """A host tier and a device cache on a paused simulated device."""

    def __init__(self) -> None:
        rng = np.random.default_rng(23)
        self.driver = SimulatedDriver()
        shape = Shape(2, 1, 8, 8, 64, "blocks_layers", "layers_blocks")
        self.host, self.host_bytes = pool_over("blocks_layers", shape, 8, "pinned", self.driver, rng)
        self.cache, self.cache_bytes = pool_over("layers_blocks", shape, 8, "device", self.driver, rng)
        self.up = CopyPlan(self.host, self.cache, driver=self.driver)
        self.down = CopyPlan(self.cache, self.host, driver=self.driver)
        self.driver.paused = True

    def stream(self) -> int:
        return self.driver.stream_create(0)


@pytest.fixture
def world() -> World:
    return World()


def test_both_sides_stay_pinned_until_the_event_completes(world: World) -> None:
    handle = world.up.copy([(1, 4), (2, 5)], stream=world.stream())
    assert not handle.done()
    assert world.host.in_flight == {1, 2}
    assert world.cache.in_flight == {4, 5}
    with pytest.raises(InFlightError, match=r"in flight and cannot be reused, wait for their copy: \[4\]"):
        world.cache.check_reusable([3, 4])
    world.cache.check_reusable([3, 6])
    assert handle.wait()
    assert handle.done()
    assert not world.host.in_flight
    assert not world.cache.in_flight
    world.cache.check_reusable(range(8))


@pytest.mark.parametrize(
    ("first", "second", "racing"),
    [
        ("up", [(7, 4)], [4]),  # two writers of block 4
        ("down", [(4, 6)], [4]),  # reads block 4 while it is written
    ],
)
def test_a_copy_that_would_race_is_refused_and_moves_nothing(
    world: World, first: str, second: list[tuple[int, int]], racing: list[int]
) -> None:
    running = world.up.copy([(1, 4)], stream=world.stream())
    before = world.cache_bytes.copy(), world.host_bytes.copy()
    plan = world.up if first == "up" else world.down
    with pytest.raises(InFlightError, match="are in flight, put this copy on the same stream") as caught:
        plan.copy(second, stream=world.stream())
    assert list(caught.value.blocks) == racing
    assert np.array_equal(world.cache_bytes, before[0])
    assert np.array_equal(world.host_bytes, before[1])
    assert world.cache.in_flight == {4}
    running.wait()
    plan.copy(second, stream=world.stream()).wait()


def test_reading_one_block_twice_at_once_is_no_race(world: World) -> None:
    world.up.copy([(1, 4)], stream=world.stream())
    world.up.copy([(1, 5)], stream=world.stream())
    assert world.host.in_flight == {1}


def test_copies_ordered_by_stream_or_by_after_may_follow_each_other(world: World) -> None:
    one, two = world.stream(), world.stream()
    original = world.host_bytes[:, 1].copy()
    arrived = world.up.copy([(1, 4)], stream=one)
    back = world.down.copy([(4, 6)], stream=one)
    with pytest.raises(InFlightError):
        world.up.copy([(6, 0)], stream=two)
    again = world.up.copy([(6, 0)], stream=two, after=back)
    # The second stream is held back by the event, not by luck.
    world.driver.run(two)
    assert not again.done()
    world.driver.run(one)
    world.driver.run(two)
    assert again.done()
    assert arrived.done()
    assert np.array_equal(world.cache_bytes[:, 0], original)


def test_a_copy_waits_for_the_event_of_whoever_writes_its_source(world: World) -> None:
    writer, event = world.stream(), world.driver.event_create(0)

    def write() -> bool:
        world.cache_bytes[:, 3] = 0x5A
        return True

    world.driver._stream(writer).queue.append(write)
    world.driver.event_record(0, event, writer)
    stream = world.stream()
    handle = world.down.copy([(3, 2)], stream=stream, after=event)
    world.driver.run(stream)
    assert not handle.done()
    world.driver.run(writer)
    world.driver.run(stream)
    assert handle.done()
    assert (world.host_bytes[:, 2] == 0x5A).all()


def test_a_stream_that_waits_for_a_handle_runs_after_it(world: World) -> None:
    handle = world.up.copy([(1, 4)], stream=world.stream())
    compute = world.stream()
    handle.wait(compute)
    seen: list[bool] = []

    def look() -> bool:
        seen.append(np.array_equal(world.cache_bytes[:, 4], world.host_bytes[:, 1]))
        return True

    world.driver._stream(compute).queue.append(look)
    world.driver.run(compute)
    assert not seen
    handle.wait()
    world.driver.run(compute)
    assert seen == [True]


def test_different_layers_of_a_block_do_not_race(world: World) -> None:
    world.up.copy([(1, 4)], layers=[0], stream=world.stream())
    world.up.copy([(1, 4)], layers=[1], stream=world.stream())
    with pytest.raises(InFlightError):
        world.up.copy([(2, 4)], layers=[1], stream=world.stream())


def test_a_second_description_of_the_same_memory_sees_the_pins(world: World) -> None:
    alias = BlockPool.from_pointers(
        world.cache.bases.tolist(),
        block_bytes=world.cache.block_bytes,
        stride_bytes=world.cache.stride_bytes,
        num_blocks=6,
        layers=2,
        space="device",
        device=0,
        owner=world,
    )
    world.up.copy([(1, 4)], stream=world.stream())
    other = CopyPlan(world.host, alias, driver=world.driver)
    with pytest.raises(InFlightError):
        other.copy([(2, 4)], stream=world.stream())
    other.copy([(2, 3)], stream=world.stream())


def test_memory_of_a_running_copy_outlives_every_other_reference() -> None:
    world = World()
    driver = world.driver
    stream = world.stream()
    target = world.cache_bytes
    wanted = world.host_bytes[:, 1].copy()
    world.up.copy([(1, 4)], stream=stream)
    kept = len(driver._memory)
    del world
    gc.collect()
    assert len(driver._memory) == kept
    driver.run(stream)
    assert np.array_equal(target[:, 4], wanted)


# A kernel copy is two submissions (table, launch), the others here are three or more.
@pytest.mark.parametrize(
    ("backend", "accepted"),
    [
        (name, n)
        for name in ("merged", "dma_batch", "dma_2d", "triton", "bulk")
        for n in range(2 if name in ("triton", "bulk") else 3)
    ],
)
def test_a_fault_at_submission_tears_its_targets_and_nothing_else(world: World, backend: str, accepted: int) -> None:
    source, target = world.host_bytes.copy(), world.cache_bytes.copy()
    pairs = [(1, 4), (3, 5), (6, 0)]
    world.driver.fail_submission_after = accepted
    with pytest.raises(CopyFaultError, match="copy failed at submission") as caught:
        world.up.copy(pairs, backend=backend)
    world.driver.fail_submission_after = None
    assert sorted(caught.value.blocks) == [0, 4, 5]
    assert isinstance(caught.value.__cause__, DriverError)
    assert np.array_equal(world.host_bytes, source)
    others = [1, 2, 3, 6, 7]
    assert np.array_equal(world.cache_bytes[:, others], target[:, others])
    assert not world.cache.in_flight
    assert not world.host.in_flight
    assert world.cache.torn == {0, 4, 5}
    assert not world.host.torn
    with pytest.raises(TornBlockError, match=r"undefined since a copy into them failed: \[4\]"):
        world.down.copy([(2, 2), (4, 3)])
    # Copied whole again, the blocks are sound.
    world.up.copy(pairs, backend=backend).wait()
    assert not world.cache.torn
    assert np.array_equal(world.cache_bytes[:, [4, 5, 0]], source[:, [1, 3, 6]])


def test_a_fault_while_running_is_raised_by_the_handle(world: World) -> None:
    source = world.host_bytes.copy()
    handle = world.up.copy([(1, 4), (3, 5)], stream=world.stream(), backend="merged")
    world.driver.fail_execution_after = 1
    with pytest.raises(CopyFaultError, match="2 destination blocks are undefined") as caught:
        handle.wait()
    assert caught.value.blocks == (4, 5)
    with pytest.raises(CopyFaultError):
        handle.done()
    assert world.cache.torn == {4, 5}
    assert not world.cache.in_flight
    assert np.array_equal(world.host_bytes, source)


def test_a_partial_rewrite_leaves_a_torn_block_torn_until_repaired(world: World) -> None:
    world.driver.fail_submission_after = 0
    with pytest.raises(CopyFaultError):
        world.up.copy([(1, 4)])
    world.driver.fail_submission_after = None
    world.up.copy([(1, 4)], layers=[0]).wait()
    assert world.cache.torn == {4}
    world.cache.repair([4])
    assert not world.cache.torn


def test_what_depends_on_a_failed_copy_is_not_started(world: World) -> None:
    failed = world.up.copy([(1, 4)], stream=world.stream())
    world.driver.fail_execution_after = 0
    with pytest.raises(CopyFaultError):
        failed.wait()
    world.driver.fail_execution_after = None
    before = world.cache_bytes.copy()
    with pytest.raises(CopyFaultError):
        world.up.copy([(2, 5)], stream=world.stream(), after=[failed])
    assert np.array_equal(world.cache_bytes, before)
    assert 5 not in world.cache.torn


def host_pools() -> tuple[BlockPool, BlockPool, NDArray[np.uint8], NDArray[np.uint8]]:
    a = np.random.default_rng(29).integers(0, 256, (2, 8, 32), dtype=np.uint8)
    b = np.zeros((8, 2, 32), np.uint8)
    return BlockPool.from_array(a, "layers_blocks"), BlockPool.from_array(b, "blocks_layers"), a, b


def blocked_stream() -> tuple[HostStream, Callable[[], None]]:
    gate, stream = threading.Event(), HostStream()
    stream.submit(lambda: float(gate.wait(30)))
    return stream, gate.set


def test_host_copies_pin_their_blocks_too() -> None:
    src, dst, a, b = host_pools()
    stream, release = blocked_stream()
    plan = CopyPlan(src, dst)
    handle = plan.copy([(1, 4)], stream)
    assert not handle.done()
    assert not handle.wait(timeout=0.001)
    assert dst.in_flight == {4}
    assert src.in_flight == {1}
    with pytest.raises(InFlightError):
        plan.copy([(2, 4)])
    chained = plan.copy([(2, 4)], stream)
    release()
    assert chained.wait()
    assert handle.done()
    assert np.array_equal(b[4], a[:, 2])
    assert not dst.in_flight


def test_a_failing_host_copy_tears_only_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst, a, b = host_pools()
    plan = CopyPlan(src, dst)
    monkeypatch.setattr("agentrt.transfer.backends.copy_host_blocks", lambda *_: 1 / 0)
    with pytest.raises(CopyFaultError, match="division by zero"):
        plan.copy([(1, 4)])
    stream = HostStream()
    handle = plan.copy([(2, 5)], stream)
    with pytest.raises(CopyFaultError):
        handle.wait()
    assert dst.torn == {4, 5}
    assert not b.any()
    monkeypatch.undo()
    plan.copy([(1, 4), (2, 5)]).wait()
    assert not dst.torn
    assert np.array_equal(b[[4, 5]], a[:, [1, 2]].swapaxes(0, 1))


def test_a_graph_copy_replays_with_new_pairs(world: World) -> None:
    stream = world.stream()
    fixed = world.up.graph_copy(capacity=4)
    replays = [[(1, 4), (2, 5)], [(3, 0)], [(6, 7), (5, 6), (4, 1), (0, 2)]]
    for pairs in replays:
        expected = world.cache_bytes.copy()
        for source, target in pairs:
            expected[:, target] = world.host_bytes[:, source]
        fixed.set_pairs(pairs)
        assert world.cache.in_flight == {target for _, target in pairs}
        with pytest.raises(InFlightError, match="set already"):
            fixed.set_pairs(pairs)
        fixed.enqueue(stream)  # stands for the graph's replay: the same two operations
        handle = fixed.launched(stream)
        with pytest.raises(InFlightError, match="still running"):
            fixed.set_pairs(pairs)
        handle.wait()
        assert np.array_equal(world.cache_bytes, expected)
    with pytest.raises(ValueError, match="the graph holds 4 pairs, got: 5"):
        fixed.set_pairs([(n, n) for n in range(5)])
    fixed.set_pairs([(1, 1)])
    fixed.cancel()
    assert not world.cache.in_flight


def test_a_capturing_stream_is_refused_with_the_way_out(world: World) -> None:
    stream = world.stream()
    world.driver._stream(stream).capturing = True
    with pytest.raises(BackendUnavailableError, match="use graph_copy"):
        world.up.copy([(1, 4)], stream=stream)
    assert not world.cache.in_flight


def test_many_threads_on_one_plan_move_every_block_once() -> None:
    src, dst, a, b = host_pools()
    plan = CopyPlan(src, dst)
    start = threading.Barrier(8)
    failures: list[BaseException] = []

    def work(block: int) -> None:
        start.wait()
        try:
            for _ in range(50):
                plan.copy([(block, block)]).wait()
        except BaseException as error:  # noqa: BLE001 - reported below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(block,)) for block in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert np.array_equal(b, a.swapaxes(0, 1))
    assert not dst.in_flight
