"""Lossy transport of KV blocks: int8 with one float32 scale per row, quantised and restored on the fly (Triton).

Layout: pools as in `agentrt.kernels`. A plain block is ROWS rows of ROW elements (float16, bfloat16 or float32). An
encoded block is ROWS * ROW int8 values, then ROWS float32 scales: about half the bytes of a 16-bit block (0.516 at
ROW = 128). Grid: persistent, one-dimensional; work items are (buffer, pair, group of TILE rows). Bytes moved: one
plain and one encoded block per (buffer, pair).

scale = absmax(row) / 127, value = round-half-away(x / scale). A restored element is within absmax / 254 of the
original, plus the rounding of the element type: 0.8 % of the row's absmax at worst. Rows with an infinity or NaN do
not survive.
"""

# ruff: noqa: N803, N806 - compile-time constants are written in capitals
import triton
import triton.language as tl


@triton.jit
def _address(table, n_pairs, n_buffers, src_stride, dst_stride, item, tiles):
    """Source and destination address of a work item, and whether its pair is real."""
    pair = (item // tiles) % n_pairs
    buffer = item // tiles // n_pairs
    src_block = tl.load(table + 2 * pair)
    dst_block = tl.load(table + 2 * pair + 1)
    bases = table + 2 * n_pairs + buffer
    src = tl.load(bases) + src_block * src_stride
    dst = tl.load(bases + n_buffers) + dst_block * dst_stride
    return src, dst, (src_block >= 0) & (dst_block >= 0)


@triton.jit
def kv_encode_int8(
    table,
    n_pairs,
    n_buffers,
    src_stride,
    dst_stride,
    ROWS: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Plain source blocks to encoded destination blocks. WIDTH is ROW rounded up to a power of two."""
    TILES: tl.constexpr = (ROWS + TILE - 1) // TILE
    column = tl.arange(0, WIDTH)[None, :]
    item = tl.program_id(0)
    while item < n_pairs * n_buffers * TILES:
        src, dst, live = _address(table, n_pairs, n_buffers, src_stride, dst_stride, item, TILES)
        row = item % TILES * TILE + tl.arange(0, TILE)
        inside = (row < ROWS) & live
        mask = inside[:, None] & (column < ROW)
        at = row[:, None] * ROW + column
        plain = tl.multiple_of(src.to(tl.pointer_type(TYPE)), ALIGN)
        x = tl.load(plain + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.max(tl.abs(x), axis=1) / 127.0
        # A row of zeros has scale 0; dividing by 1 instead keeps its zeros.
        y = x / tl.where(scale > 0.0, scale, 1.0)[:, None]
        q = (y + tl.where(y >= 0.0, 0.5, -0.5)).to(tl.int8)
        tl.store(tl.multiple_of(dst.to(tl.pointer_type(tl.int8)), ALIGN) + at, q, mask=mask)
        scales = (dst + ROWS * ROW).to(tl.pointer_type(tl.float32))
        tl.store(scales + row, scale, mask=inside)
        item += tl.num_programs(0)


@triton.jit
def kv_decode_int8(
    table,
    n_pairs,
    n_buffers,
    src_stride,
    dst_stride,
    ROWS: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Encoded source blocks to plain destination blocks."""
    TILES: tl.constexpr = (ROWS + TILE - 1) // TILE
    column = tl.arange(0, WIDTH)[None, :]
    item = tl.program_id(0)
    while item < n_pairs * n_buffers * TILES:
        src, dst, live = _address(table, n_pairs, n_buffers, src_stride, dst_stride, item, TILES)
        row = item % TILES * TILE + tl.arange(0, TILE)
        inside = (row < ROWS) & live
        mask = inside[:, None] & (column < ROW)
        at = row[:, None] * ROW + column
        q = tl.load(tl.multiple_of(src.to(tl.pointer_type(tl.int8)), ALIGN) + at, mask=mask, other=0)
        scale = tl.load((src + ROWS * ROW).to(tl.pointer_type(tl.float32)) + row, mask=inside, other=0.0)
        x = q.to(tl.float32) * scale[:, None]
        plain = tl.multiple_of(dst.to(tl.pointer_type(TYPE)), ALIGN)
        tl.store(plain + at, x.to(TYPE), mask=mask)
        item += tl.num_programs(0)
