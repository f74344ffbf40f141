"""Copy KV blocks between two pools, one launch for all layers (Triton, any CUDA device; sees bytes, not dtypes).

Layout: the table described in `agentrt.kernels`. A block is NBYTES long and is seen as words of WORD bytes. Grid:
persistent, one-dimensional, any size; work items are (buffer, group of PAIRS pairs, chunk of CHUNK bytes), dealt out
round-robin. A program moves PAIRS x CHUNK bytes per step, so small blocks keep as many bytes in flight as large ones.
Bytes moved: n_buffers * n_pairs * NBYTES read and as many written, plus 16 bytes of table per (buffer, pair, chunk).

Pinned host memory is addressed directly, so the same kernel serves host to device, device to host and device to device.

Two habits here carry measured reasons. The alignment hint sits on the pointer, after the cast from integer: on the
integer it is dropped and every access is 8 instead of 16 bytes. The loop is a `while`: `tl.range` over a run-time
bound fails in the interpreter with NumPy 2.4 and Triton 3.6.
"""

# ruff: noqa: N803, N806 - compile-time constants are written in capitals
import triton
import triton.language as tl


@triton.jit
def kv_copy(
    table,
    n_pairs,
    n_buffers,
    src_stride,
    dst_stride,
    NBYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,
    WORD: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Move block `table[2p]` of every source buffer to block `table[2p + 1]` of the matching destination buffer."""
    W: tl.constexpr = CHUNK // WORD
    NW: tl.constexpr = NBYTES // WORD
    CHUNKS: tl.constexpr = (NW + W - 1) // W
    if WORD == 8:
        pointer: tl.constexpr = tl.pointer_type(tl.int64)
    elif WORD == 4:
        pointer: tl.constexpr = tl.pointer_type(tl.int32)
    elif WORD == 2:
        pointer: tl.constexpr = tl.pointer_type(tl.int16)
    else:
        pointer: tl.constexpr = tl.pointer_type(tl.int8)
    row = tl.arange(0, PAIRS)
    lane = tl.arange(0, W)
    groups = (n_pairs + PAIRS - 1) // PAIRS
    src_bases = table + 2 * n_pairs
    dst_bases = src_bases + n_buffers
    item = tl.program_id(0)
    while item < groups * n_buffers * CHUNKS:
        chunk = item % CHUNKS
        pair = (item // CHUNKS) % groups * PAIRS + row
        buffer = item // CHUNKS // groups
        here = pair < n_pairs
        src_block = tl.load(table + 2 * pair, mask=here, other=-1)
        dst_block = tl.load(table + 2 * pair + 1, mask=here, other=-1)
        live = (src_block >= 0) & (dst_block >= 0)
        src = tl.load(src_bases + buffer) + src_block * src_stride + chunk * CHUNK
        dst = tl.load(dst_bases + buffer) + dst_block * dst_stride + chunk * CHUNK
        src_words = tl.multiple_of(src.to(pointer), ALIGN)[:, None] + lane[None, :]
        dst_words = tl.multiple_of(dst.to(pointer), ALIGN)[:, None] + lane[None, :]
        mask = live[:, None]
        if NW % W != 0:
            mask = mask & ((chunk * W + lane) < NW)[None, :]
        tl.store(dst_words, tl.load(src_words, mask=mask), mask=mask)
        item += tl.num_programs(0)
