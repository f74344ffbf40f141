"""The kernels of this package in plain NumPy, on byte arrays.

The device code is compared with this file, and machines without a GPU use its int8 codec.

Pools are given as `memory[b, i]`: uint8 arrays of shape [buffers, blocks, bytes] (any strides), pairs as rows
(source id, destination id) with negative ids skipped. Nothing here is fast, everything is short.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

#: Largest error of the int8 transport as a fraction of the row's absmax, for every element type.
INT8_ERROR_BOUND = 0.008


def copy(source: Bytes, destination: Bytes, pairs: Iterable[tuple[int, int]]) -> None:
    """`kv_copy` and `kv_copy_bulk`."""
    for src, dst in pairs:
        if src >= 0 and dst >= 0:
            destination[:, dst] = source[:, src]


def to_float32(data: Bytes, dtype: str) -> Floats:
    """Bytes of `float16`, `bfloat16` or `float32` elements as float32; the last axis shrinks to elements."""
    data = np.ascontiguousarray(data)
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.dtype(dtype)).astype(np.float32)


def from_float32(values: Floats, dtype: str) -> Bytes:
    """Inverse of `to_float32`, rounding to nearest even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype(np.uint16).view(np.uint8)
    return np.ascontiguousarray(values.astype(np.dtype(dtype))).view(np.uint8)


def encode_int8(block: Bytes, row: int, dtype: str) -> Bytes:
    """One plain block (last axis: bytes) to int8 values followed by float32 scales, one per `row` elements."""
    x = to_float32(block, dtype)
    x = x.reshape(*x.shape[:-1], -1, row)
    scale = (np.abs(x).max(axis=-1) / np.float32(127.0)).astype(np.float32)
    y = x / np.where(scale > 0, scale, np.float32(1.0))[..., None]
    q = np.trunc(y + np.where(y >= 0, np.float32(0.5), np.float32(-0.5))).astype(np.int8)
    lead = block.shape[:-1]
    return np.concatenate([q.reshape(*lead, -1).view(np.uint8), scale.reshape(*lead, -1).view(np.uint8)], axis=-1)


def decode_int8(encoded: Bytes, row: int, dtype: str) -> Bytes:
    """Inverse of `encode_int8`, within `INT8_ERROR_BOUND`."""
    encoded = np.ascontiguousarray(encoded)
    rows = encoded.shape[-1] // (row + 4)
    lead = encoded.shape[:-1]
    q = encoded[..., : rows * row].view(np.int8).reshape(*lead, rows, row)
    scale = np.ascontiguousarray(encoded[..., rows * row : rows * (row + 4)]).view(np.float32).reshape(*lead, rows, 1)
    return from_float32((q.astype(np.float32) * scale).reshape(*lead, -1), dtype)
