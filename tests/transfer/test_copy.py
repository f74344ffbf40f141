"""Copies against the naive model: every backend, every layout, on host memory and on a simulated device."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.transfer.naive import Shape, copied, memory, pool_over

from agentrt.kernels import reference
from agentrt.transfer import BlockPool, CopyPlan, HostStream, Int8Encoding, PairError, SimulatedDriver
from agentrt.transfer.backends import merge

LAYOUTS = ["layers_blocks", "blocks_layers"]
WAYS = [
    ("pageable", "pageable", ["rust", "reference", "auto"]),
    ("pinned", "device", ["merged", "dma_batch", "dma_2d", "triton", "bulk", "auto"]),
    ("device", "pinned", ["merged", "dma_batch", "dma_2d", "triton", "bulk", "auto"]),
    ("device", "device", ["merged", "dma_batch", "dma_2d", "triton", "bulk", "auto"]),
    ("pageable", "device", ["merged", "auto"]),
]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Shape, list[tuple[int, int]], list[int] | None]:
    shape = Shape(
        layers=draw(st.integers(1, 4)),
        parts=draw(st.integers(1, 2)),
        src_blocks=draw(st.integers(1, 12)),
        dst_blocks=draw(st.integers(1, 12)),
        block_bytes=16 * draw(st.integers(1, 5)),
        src_layout=draw(st.sampled_from(LAYOUTS)),
        dst_layout=draw(st.sampled_from(LAYOUTS)),
        gap=16 * draw(st.integers(0, 2)),
    )
    # Targets are distinct, sources may repeat; runs are common, so that merging happens; some pairs are padding.
    targets = draw(st.lists(st.integers(0, shape.dst_blocks - 1), unique=True, max_size=shape.dst_blocks))
    if draw(st.booleans()):
        targets.sort()
        offset = draw(st.integers(-3, 3))
        pairs = [((target + offset) % shape.src_blocks, target) for target in targets]
    else:
        pairs = [(draw(st.integers(0, shape.src_blocks - 1)), target) for target in targets]
    pairs += draw(st.lists(st.sampled_from([(-1, 0), (0, -1), (-7, -1)]), max_size=3))
    layers = draw(st.none() | st.lists(st.integers(0, shape.layers - 1), unique=True, min_size=1))
    return shape, pairs, layers


@pytest.mark.parametrize(
    ("src_space", "dst_space", "backend"), [(src, dst, name) for src, dst, names in WAYS for name in names]
)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases())
def test_every_backend_moves_exactly_the_named_blocks(
    src_space: str, dst_space: str, backend: str, case: tuple[Shape, list[tuple[int, int]], list[int] | None]
) -> None:
    shape, pairs, layers = case
    rng = np.random.default_rng(7)
    driver = SimulatedDriver()
    src, source = pool_over(shape.src_layout, shape, shape.src_blocks, src_space, driver, rng)
    dst, target = pool_over(shape.dst_layout, shape, shape.dst_blocks, dst_space, driver, rng)
    chosen = range(shape.layers) if layers is None else layers
    buffers = [layer * shape.parts + part for layer in sorted(chosen) for part in range(shape.parts)]
    before = source.copy()
    # The whole memory, guard bytes and gaps included.
    surroundings = memory(dst).copy()
    expected = copied(source, target, pairs, buffers)
    plan = CopyPlan(src, dst, driver=driver if "device" in (src_space, dst_space) else None)
    if backend == "dma_2d" and layers is not None and len({b - a for a, b in pairwise(buffers)}) > 1:
        backend = "merged"  # these layers are not evenly spaced
    handle = plan.copy(pairs, layers=layers, backend=backend)
    assert handle.wait()
    assert handle.done()
    assert np.array_equal(target, expected)
    assert np.array_equal(source, before)
    live = sum(1 for a, b in pairs if a >= 0 and b >= 0)
    assert handle.bytes == live * len(buffers) * shape.block_bytes
    assert not src.in_flight
    assert not dst.in_flight
    target[:] = 0
    np.lib.stride_tricks.as_strided(surroundings[16:], target.shape, target.strides)[:] = 0
    assert np.array_equal(memory(dst), surroundings)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_merged_runs_cover_the_same_bytes(
    case: tuple[Shape, list[tuple[int, int]], list[int] | None],
) -> None:
    shape, pairs, _ = case
    rng = np.random.default_rng(3)
    src, _ = pool_over(shape.src_layout, shape, shape.src_blocks, "pageable", None, rng)
    dst, _ = pool_over(shape.dst_layout, shape, shape.dst_blocks, "pageable", None, rng)
    array = np.array([pair for pair in pairs if min(pair) >= 0], np.int64).reshape(-1, 2)
    buffers = np.arange(len(src.bases))
    runs = merge(src, dst, array[:, 0], array[:, 1], buffers).descriptors()
    moved = {
        (int(s) + i, int(d) + i) for s, d, n in zip(runs.src, runs.dst, runs.sizes, strict=True) for i in range(int(n))
    }
    plain = zip(src.addresses(array[:, 0], buffers).ravel(), dst.addresses(array[:, 1], buffers).ravel(), strict=True)
    assert moved == {(int(s) + i, int(d) + i) for s, d in plain for i in range(shape.block_bytes)}
    assert int(runs.sizes.sum()) == len(moved)


def test_blocks_side_by_side_on_both_sides_become_one_run() -> None:
    src = BlockPool.allocate(layers=3, num_blocks=8, block_bytes=32)
    dst = BlockPool.allocate(layers=3, num_blocks=8, block_bytes=32)
    runs = merge(src, dst, np.array([4, 2, 3]), np.array([5, 3, 4]), np.arange(3)).descriptors()
    assert runs.sizes.tolist() == [3 * 3 * 32]
    split = merge(src, dst, np.array([4, 2, 3]), np.array([5, 3, 7]), np.arange(3)).descriptors()
    assert sorted(split.sizes.tolist()) == [96, 96, 96]
    one_layer = merge(src, dst, np.array([2, 3]), np.array([2, 3]), np.array([1])).descriptors()
    assert one_layer.sizes.tolist() == [32, 32]


@pytest.fixture
def plan() -> CopyPlan:
    rng = np.random.default_rng(5)
    shape = Shape(2, 1, 6, 6, 32, "layers_blocks", "blocks_layers")
    src, _ = pool_over(shape.src_layout, shape, 6, "pageable", None, rng)
    dst, _ = pool_over(shape.dst_layout, shape, 6, "pageable", None, rng)
    return CopyPlan(src, dst)


@pytest.mark.parametrize(
    ("pairs", "message", "blocks"),
    [
        ([(0, 1), (6, 2)], r"source block is outside the pool's 6 blocks: \[6\]", (6,)),
        ([(0, 1), (1, 99)], r"destination block is outside the pool's 6 blocks: \[99\]", (99,)),
        ([(0, 1), (1, 1)], r"destination block is named twice: \[1\]", (1,)),
        ([(0, 1, 2)], r"rows \(source block, destination block\)", ()),
        ([(0.5, 1.0)], "must be integers, got: float64", ()),
        (np.array([[2**63 + 1, 0]], np.uint64), "out of range", (2**63 + 1,)),
    ],
)
def test_bad_pairs_raise_and_move_nothing(
    plan: CopyPlan, pairs: list[tuple[int, int]], message: str, blocks: tuple[int, ...]
) -> None:
    before = plan.dst.view().copy()
    with pytest.raises(PairError, match=message) as caught:
        plan.copy(pairs)
    assert caught.value.blocks == blocks
    assert np.array_equal(plan.dst.view(), before)
    assert not plan.dst.in_flight


@pytest.mark.parametrize(
    ("layers", "message"), [([2], "outside the pool's 2 layers"), ([0, 0], "twice"), ([], "no layers")]
)
def test_bad_layers_raise_and_move_nothing(plan: CopyPlan, layers: list[int], message: str) -> None:
    before = plan.dst.view().copy()
    with pytest.raises(PairError, match=message):
        plan.copy([(0, 0)], layers=layers)
    assert np.array_equal(plan.dst.view(), before)


def test_an_empty_list_is_a_finished_copy(plan: CopyPlan) -> None:
    handle = plan.copy([])
    assert handle.done()
    assert handle.bytes == 0
    assert plan.copy([(-1, 3), (2, -1)]).bytes == 0


def test_within_one_pool_a_block_cannot_be_source_and_destination() -> None:
    array = np.arange(4 * 16, dtype=np.uint8).reshape(1, 4, 16)
    pool = BlockPool.from_array(array, "layers_blocks")
    plan = CopyPlan(pool, pool)
    with pytest.raises(PairError, match=r"source and a destination of one copy: \[1\]"):
        plan.copy([(0, 1), (1, 2)])
    assert (array[0, 1] == np.arange(16, 32)).all()
    plan.copy([(0, 1), (0, 2)]).wait()
    assert (array[0, 1] == array[0, 0]).all()
    assert (array[0, 2] == array[0, 0]).all()


def test_pools_that_share_memory_are_checked_by_address() -> None:
    array = np.arange(8 * 16, dtype=np.uint8).reshape(1, 8, 16)
    lower, upper = (
        BlockPool.from_array(array[:, :6], "layers_blocks"),
        BlockPool.from_array(array[:, 2:], "layers_blocks"),
    )
    plan = CopyPlan(lower, upper)
    with pytest.raises(PairError, match="share memory"):
        plan.copy([(3, 0), (2, 4)])  # block 0 of the upper pool is block 2 of the lower
    plan.copy([(0, 4), (1, 5)]).wait()
    assert (array[0, 6] == array[0, 0]).all()


def test_layers_arrive_one_by_one() -> None:
    rng = np.random.default_rng(11)
    driver = SimulatedDriver()
    driver.paused = True
    shape = Shape(4, 2, 6, 6, 32, "blocks_layers", "layers_blocks")
    src, source = pool_over(shape.src_layout, shape, 6, "pinned", driver, rng)
    dst, target = pool_over(shape.dst_layout, shape, 6, "device", driver, rng)
    plan = CopyPlan(src, dst, driver=driver)
    handles = plan.prefetch([(0, 5), (3, 2)], order=[2, 0, 1, 3])
    assert list(handles) == [2, 0, 1, 3]
    stream = plan._own_stream()
    for layer, handle in handles.items():
        assert not handle.done()
        while not handle.done():
            assert driver.run(stream, 1) == 1
        buffers = [2 * layer, 2 * layer + 1]
        assert np.array_equal(target[buffers][:, [5, 2]], source[buffers][:, [0, 3]])
    assert sum(handle.bytes for handle in handles.values()) == 2 * 8 * 32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_int8_transport_stays_within_its_stated_error(dtype: str, where: str) -> None:
    rng = np.random.default_rng(13)
    driver = SimulatedDriver() if where == "device" else None
    layers, blocks, rows, row = 2, 5, 6, 32
    item = 4 if dtype == "float32" else 2
    encoding = Int8Encoding(row=row, dtype=dtype)
    size = rows * row * item
    plain_shape = Shape(layers, 1, blocks, blocks, size, "layers_blocks", "layers_blocks")
    coded_shape = Shape(
        layers, 1, blocks, blocks, encoding.encoded_bytes(size), "blocks_layers", "blocks_layers", gap=8
    )
    plain, values = pool_over("layers_blocks", plain_shape, blocks, where if driver else "pageable", driver, rng)
    host, _ = pool_over("blocks_layers", coded_shape, blocks, "pinned" if driver else "pageable", driver, rng)
    host.encoding = encoding
    x = rng.normal(size=(layers, blocks, rows * row)).astype(np.float32) * 10.0 ** rng.integers(
        -3, 3, (layers, blocks, 1)
    )
    x[0, 2] = 0
    values[:] = reference.from_float32(x, dtype)
    original = reference.to_float32(values, dtype)
    CopyPlan(plain, host, driver=driver).copy([(0, 3), (1, 1), (2, 4), (4, 0)]).wait()
    back = CopyPlan(host, plain, driver=driver)
    values[:] = 0xEE
    handle = back.copy([(3, 0), (1, 1), (4, 2), (0, 4)])
    handle.wait()
    assert handle.backend == ("int8" if driver else "reference")
    chosen = [0, 1, 2, 4]
    restored = reference.to_float32(values, dtype)[:, chosen].reshape(layers, 4, rows, row)
    wanted = original[:, chosen].reshape(layers, 4, rows, row)
    error = np.abs(restored - wanted).max(axis=-1)
    absmax = np.abs(wanted).max(axis=-1)
    assert (error <= reference.INT8_ERROR_BOUND * absmax).all()
    # The bound means something: an error of this size does occur.
    assert (error > 0.2 * reference.INT8_ERROR_BOUND * absmax).any()
    assert (values[:, 3] == 0xEE).all()


def test_host_streams_run_copies_in_order_behind_the_caller() -> None:
    rng = np.random.default_rng(17)
    shape = Shape(2, 1, 8, 8, 64, "layers_blocks", "blocks_layers")
    a, first = pool_over("layers_blocks", shape, 8, "pageable", None, rng)
    b, second = pool_over("blocks_layers", shape, 8, "pageable", None, rng)
    c, third = pool_over("layers_blocks", shape, 8, "pageable", None, rng)
    stream = HostStream()
    out = CopyPlan(a, b).copy([(0, 1), (1, 2)], stream)
    again = CopyPlan(b, c).copy([(1, 3), (2, 4)], stream)
    assert again.wait()
    assert out.done()
    assert np.array_equal(third[:, [3, 4]], first[:, [0, 1]])
    assert np.array_equal(second[:, [1, 2]], first[:, [0, 1]])
    assert again.gb_per_s > 0
