"""The slow, obvious model the transfer tests compare with: pools as NumPy arrays, a copy as two nested loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agentrt.transfer import BlockPool, SimulatedDriver, Space

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]


@dataclass
class Shape:
    """Both pools of a copy."""

    layers: int
    parts: int
    src_blocks: int
    dst_blocks: int
    block_bytes: int
    src_layout: str
    dst_layout: str
    gap: int = 0


def pool_over(
    layout: str, shape: Shape, blocks: int, space: str, driver: SimulatedDriver | None, rng: np.random.Generator
) -> tuple[BlockPool, Bytes]:
    """A pool of random bytes and a view [buffers, blocks, bytes] of it. Guard bytes surround it and fill its gaps."""
    buffers = shape.layers * shape.parts
    cell = shape.block_bytes + shape.gap
    total = buffers * blocks * cell + 64
    if space == "pageable":
        data = np.empty(total + 64, np.uint8)
        owner: Any = data
        # Aligned, so that alignment depends on the block size alone.
        first = -data.ctypes.data % 16
        data = data[first : first + total]
    else:
        assert driver is not None
        raw = BlockPool.allocate(layers=1, num_blocks=1, block_bytes=total, space=Space.PINNED, driver=driver)
        owner, data = raw, raw.view()[0, 0]
    data[:] = rng.integers(0, 256, total, dtype=np.uint8)
    base = data.ctypes.data + 16
    if layout == "layers_blocks":
        bases, stride = [base + b * blocks * cell for b in range(buffers)], cell
        strides = (blocks * cell, cell, 1)
    else:
        bases, stride = [base + b * cell for b in range(buffers)], buffers * cell
        strides = (cell, buffers * cell, 1)
    pool = BlockPool.from_pointers(
        bases,
        block_bytes=shape.block_bytes,
        stride_bytes=stride,
        num_blocks=blocks,
        layers=shape.layers,
        space=space,
        device=0 if space == "device" else None,
        owner=(owner, data),
    )
    view: Bytes = np.lib.stride_tricks.as_strided(data[16:], (buffers, blocks, shape.block_bytes), strides)
    return pool, view


def copied(src: Bytes, dst: Bytes, pairs: Iterable[tuple[int, int]], buffers: Iterable[int]) -> Bytes:
    """What `dst` holds afterwards."""
    result: Bytes = dst.copy()
    for buffer in buffers:
        for source, target in pairs:
            if source >= 0 and target >= 0:
                result[buffer, target] = src[buffer, source]
    return result


def memory(pool: BlockPool) -> Bytes:
    """All bytes of a pool made by `pool_over`, guard bytes and gaps included."""
    assert isinstance(pool.owner, tuple)
    found: Bytes = pool.owner[1]
    return found
