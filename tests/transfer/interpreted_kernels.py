"""The Triton kernels, run by Triton's interpreter on host memory and compared byte for byte with the reference.

Not collected by itself: the interpreter must be on before triton is imported, and stays on in the whole process. So
`test_kernels_interpreted.py` runs this file in a process of its own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
import triton.language as tl
from tests.transfer.naive import Shape, copied, memory, pool_over

from agentrt.kernels import kv_copy as copy_module
from agentrt.kernels import kv_int8, reference
from agentrt.transfer import BlockPool, device_code
from agentrt.transfer.backends import alignment, fill_table
from agentrt.transfer.pool import Ids

DTYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.float32]
# (tokens, heads, elements) of a block; layers; blocks. From one element to odd shapes to a page.
SHAPES = [
    ((1, 1, 1), 1, 1),
    ((5, 3, 33), 1, 3),
    ((16, 2, 8), 3, 6),
    ((4, 1, 64), 2, 5),
    ((16, 4, 64), 1, 4),
    ((3, 5, 7), 2, 4),
]


def columns(pairs: list[tuple[int, int]]) -> tuple[Ids, Ids]:
    rows = np.array(pairs, np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def run_copy(src: BlockPool, dst: BlockPool, pairs: list[tuple[int, int]], grid: int, tile: int) -> None:
    """One launch of the kernel on pools, as `KernelPath` makes it, but with a smaller tile, for several chunks."""
    buffers = len(src.bases)
    rows = np.array(pairs, np.int64).reshape(-1, 2)
    words = np.zeros(2 * len(rows) + 2 * buffers, np.int64)
    fill_table(words, rows[:, 0], rows[:, 1], src.bases, dst.bases)
    spec = device_code.copy_spec(src.block_bytes, alignment(src, dst), tile=tile)
    table = torch.from_numpy(words)
    arguments = (table, len(pairs), buffers, src.stride_bytes, dst.stride_bytes)
    copy_module.kv_copy[(grid,)](*arguments, **spec.options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[0])))
@pytest.mark.parametrize(
    "layouts", [("layers_blocks", "blocks_layers"), ("blocks_layers", "layers_blocks")], ids="->".join
)
def test_copy_is_byte_exact(
    dtype: torch.dtype, shape: tuple[tuple[int, int, int], int, int], layouts: tuple[str, str]
) -> None:
    block, layers, blocks = shape
    rng = np.random.default_rng(37)
    size = int(np.prod(block)) * dtype.itemsize
    form = Shape(layers, 1, blocks, blocks + 1, size, *layouts)
    src, source = pool_over(layouts[0], form, blocks, "pageable", None, rng)
    dst, target = pool_over(layouts[1], form, blocks + 1, "pageable", None, rng)
    # Repeated sources, padding on either side, one target left alone.
    pairs = [(n % max(1, blocks - 1), blocks - n) for n in range(blocks)] + [(-1, 0), (0, -1)]
    surroundings = memory(dst).copy()
    expected = copied(source, target, pairs, range(layers))
    run_copy(src, dst, pairs, grid=3, tile=2048)
    assert np.array_equal(target, expected)
    target[:] = 0
    np.lib.stride_tricks.as_strided(surroundings[16:], target.shape, target.strides)[:] = 0
    assert np.array_equal(memory(dst), surroundings)
    # The reference is the same operation.
    mirror = expected.copy()
    reference.copy(source, mirror, pairs)
    assert np.array_equal(mirror, expected)


@pytest.mark.parametrize(("gap", "size"), [(16, 4096), (8, 4096), (4, 300), (2, 50), (1, 7)])
def test_copy_respects_strides_and_every_alignment(gap: int, size: int) -> None:
    rng = np.random.default_rng(41)
    form = Shape(2, 2, 4, 4, size, "layers_blocks", "blocks_layers", gap=gap)
    src, source = pool_over("layers_blocks", form, 4, "pageable", None, rng)
    dst, target = pool_over("blocks_layers", form, 4, "pageable", None, rng)
    pairs = [(3, 0), (3, 1), (0, 3)]
    expected = copied(source, target, pairs, range(4))
    run_copy(src, dst, pairs, grid=2, tile=1024)
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("grid", [1, 7, 64])
def test_copy_does_not_depend_on_the_grid(grid: int) -> None:
    rng = np.random.default_rng(43)
    form = Shape(2, 1, 9, 9, 768, "layers_blocks", "layers_blocks")
    src, source = pool_over("layers_blocks", form, 9, "pageable", None, rng)
    dst, target = pool_over("layers_blocks", form, 9, "pageable", None, rng)
    pairs = [(8 - n, n) for n in range(9)]
    run_copy(src, dst, pairs, grid=grid, tile=2048)
    assert np.array_equal(target, source[:, ::-1])


def test_an_empty_table_moves_nothing() -> None:
    rng = np.random.default_rng(47)
    form = Shape(1, 1, 2, 2, 64, "layers_blocks", "layers_blocks")
    src, _ = pool_over("layers_blocks", form, 2, "pageable", None, rng)
    dst, target = pool_over("layers_blocks", form, 2, "pageable", None, rng)
    before = target.copy()
    run_copy(src, dst, [], grid=1, tile=2048)
    run_copy(src, dst, [(-1, -1)] * 5, grid=1, tile=2048)
    assert np.array_equal(target, before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "row"), [(1, 4), (6, 32), (5, 36), (40, 128)])
def test_int8_kernels_agree_with_the_reference(dtype: str, rows: int, row: int) -> None:
    rng = np.random.default_rng(53)
    item = 4 if dtype == "float32" else 2
    plain_bytes, coded_bytes = rows * row * item, rows * (row + 4)
    layers, blocks = 2, 3
    plain_form = Shape(layers, 1, blocks, blocks, plain_bytes, "layers_blocks", "layers_blocks")
    coded_form = Shape(layers, 1, blocks, blocks, coded_bytes, "blocks_layers", "blocks_layers", gap=-coded_bytes % 16)
    plain, values = pool_over("layers_blocks", plain_form, blocks, "pageable", None, rng)
    coded, encoded = pool_over("blocks_layers", coded_form, blocks, "pageable", None, rng)
    x = rng.normal(size=(layers, blocks, rows * row)).astype(np.float32) * 10.0 ** rng.integers(
        -3, 3, (layers, blocks, 1)
    )
    x[0, 0, :row] = 0
    values[:] = reference.from_float32(x, dtype)
    original = values.copy()
    pairs = [(0, 2), (2, 1), (-1, 0)]
    untouched = encoded[:, 0].copy()
    words = np.zeros(2 * len(pairs) + 2 * layers, np.int64)
    fill_table(words, *columns(pairs), plain.bases, coded.bases)
    options = device_code.int8_spec("kv_encode_int8", rows, row, dtype, alignment(plain, coded)).options
    options["TYPE"] = getattr(tl, dtype)
    kv_int8.kv_encode_int8[(2,)](
        torch.from_numpy(words), len(pairs), layers, plain.stride_bytes, coded.stride_bytes, **options
    )
    assert np.array_equal(encoded[:, 0], untouched)
    for source, target in pairs[:2]:
        wanted = reference.encode_int8(original[:, source], row, dtype)
        got = encoded[:, target]
        assert np.array_equal(got[:, rows * row :], wanted[:, rows * row :])
        # A quotient on the edge between two integers may round either way: division differs in its last bit.
        values_apart = got[:, : rows * row].view(np.int8).astype(int) - wanted[:, : rows * row].view(np.int8)
        assert np.abs(values_apart).max() <= 1
        assert (values_apart != 0).mean() < 0.01
    values[:] = 0xEE
    back = [(2, 0), (1, 1), (0, -1)]
    fill_table(words, *columns(back), coded.bases, plain.bases)
    kv_int8.kv_decode_int8[(2,)](
        torch.from_numpy(words), len(back), layers, coded.stride_bytes, plain.stride_bytes, **options
    )
    for source, target in back[:2]:
        wanted = reference.decode_int8(encoded[:, source], row, dtype)
        if dtype == "bfloat16":
            # The interpreter cuts the low half off where a device rounds to nearest: one unit in the last place.
            units = values[:, target].view(np.uint16).astype(int) - wanted.view(np.uint16)
            assert np.abs(units).max() <= 1
        else:
            assert np.array_equal(values[:, target], wanted)
    assert (values[:, 2] == 0xEE).all()
    restored = reference.to_float32(values[:, :2], dtype).reshape(layers, 2, rows, row)
    wanted_rows = reference.to_float32(original[:, [0, 2]], dtype).reshape(layers, 2, rows, row)
    error, absmax = np.abs(restored - wanted_rows).max(-1), np.abs(wanted_rows).max(-1)
    assert (error <= reference.INT8_ERROR_BOUND * absmax).all()
