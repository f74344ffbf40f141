"""Pools of KV blocks: where block `i` of each layer lies, and which blocks are in flight.

A pool is a set of equal **buffers** (one layer's K, V, or both), each a row of blocks at a fixed stride:

    address(buffer b, block i) = bases[b] + i * stride_bytes        length: block_bytes

Two layouts cover what engines and host tiers use:

    layers_blocks  [layers, blocks, ...]   one buffer per layer, blocks of a layer side by side (device caches)
    blocks_layers  [blocks, layers, ...]   all layers of a block side by side (host tier: one block = one long run)

A pool describes memory, it does not own it, but keeps its owner alive, as does every copy in flight. Blocks of a
running copy are **pinned**: `in_flight` lists them, and a copy that would race with one is refused. A block whose
copy failed is **torn**: its bytes are undefined and it cannot be a source until something rewrites it.

Invariants: buffers of a pool never overlap; pin and torn state changes only under the module's lock. Any thread may
call anything here.
"""

from __future__ import annotations

import ctypes
import enum
import math
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from agentrt.transfer.errors import InFlightError, PoolError, TornBlockError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from agentrt.transfer.driver import Driver
    from agentrt.transfer.handle import CopyHandle

Ids = NDArray[np.int64]
Layout = Literal["layers_blocks", "blocks_layers"]

#: Guards pins, torn sets and the set of live pools. Held for microseconds, never while a driver call blocks.
LEDGER = threading.RLock()
_LIVE: weakref.WeakSet[BlockPool] = weakref.WeakSet()


class Space(str, enum.Enum):
    """Where a pool's memory is, which decides what can reach it."""

    DEVICE = "device"
    #: Page-locked host memory: copy engines and kernels address it directly.
    PINNED = "pinned"
    #: Ordinary host memory: the driver stages every copy through its own buffers.
    PAGEABLE = "pageable"


@dataclass(frozen=True)
class Int8Encoding:
    """Lossy form of a pool's blocks: int8 rows followed by one float32 scale per row. See `agentrt.kernels.kv_int8`."""

    #: Elements per row, one head's worth as a rule.
    row: int
    #: Type of the plain elements: float16, bfloat16 or float32.
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_BYTES:
            raise PoolError(f"int8 transport encodes float16, bfloat16 or float32, not: {self.dtype}")
        if self.row < 4 or self.row % 4:
            raise PoolError(f"a row must hold a positive multiple of 4 elements: {self.row}")

    def rows(self, plain_bytes: int) -> int:
        """Rows in a plain block of that size."""
        row_bytes = self.row * _ITEM_BYTES[self.dtype]
        if plain_bytes % row_bytes:
            raise PoolError(f"block is not a whole number of {row_bytes}-byte rows: {plain_bytes} bytes")
        return plain_bytes // row_bytes

    def encoded_bytes(self, plain_bytes: int) -> int:
        """Bytes of an encoded block: the values and the scales, without padding."""
        return self.rows(plain_bytes) * (self.row + 4)


_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Pin:
    """One copy's hold on blocks of one pool."""

    handle: CopyHandle
    blocks: Ids
    buffers: Ids
    writes: bool


def ranges_overlap(a: Ids, a_bytes: int, b: Ids, b_bytes: int) -> bool:
    """True if any range [a, a + a_bytes) meets any range [b, b + b_bytes). Ranges of `b` are disjoint."""
    if not len(a) or not len(b):
        return False
    b = np.sort(b)
    first = np.searchsorted(b, a - b_bytes, side="right")
    inside = first < len(b)
    return bool(np.any(b[first[inside]] < a[inside] + a_bytes))


class BlockPool:
    """Description of a pool of equal blocks.

    Made by `from_array`, `from_arrays`, `from_pointers` or `allocate`.
    """

    def __init__(
        self,
        bases: Sequence[int] | Ids,
        *,
        block_bytes: int,
        stride_bytes: int,
        num_blocks: int,
        layers: int,
        space: Space | str,
        device: int | None = None,
        dtype: str | None = None,
        encoding: Int8Encoding | None = None,
        owner: object = None,
        arrays: Sequence[NDArray[np.uint8]] = (),
    ) -> None:
        self.bases: Ids = np.array(bases, dtype=np.int64).reshape(-1)
        self.block_bytes = int(block_bytes)
        self.stride_bytes = int(stride_bytes)
        self.num_blocks = int(num_blocks)
        self.layers = int(layers)
        self.space = Space(space)
        self.device = device
        self.dtype = dtype
        self.encoding = encoding
        #: Whatever keeps the memory mapped.
        self.owner = owner
        #: Contiguous byte arrays that cover a host pool's memory (empty for a device pool).
        self.arrays = tuple(arrays)
        self._pins: list[Pin] = []
        self._torn: set[int] = set()
        self._check()
        with LEDGER:
            #: Other living pools whose extent meets this one's: their pins matter here.
            self._neighbours: weakref.WeakSet[BlockPool] = weakref.WeakSet()
            for other in list(_LIVE):
                if self._extents_meet(other):
                    self._neighbours.add(other)
                    other._neighbours.add(self)
            _LIVE.add(self)

    def _check(self) -> None:
        for name in ("block_bytes", "stride_bytes", "num_blocks", "layers"):
            if getattr(self, name) <= 0:
                raise PoolError(f"{name} must be positive: {getattr(self, name)}")
        if len(self.bases) == 0 or len(self.bases) % self.layers:
            raise PoolError(f"{len(self.bases)} buffers cannot be shared by layers: {self.layers}")
        if self.num_blocks > 1 and self.stride_bytes < self.block_bytes:
            raise PoolError(f"stride of {self.stride_bytes} bytes is shorter than a block: {self.block_bytes} bytes")
        if self.bases.min() <= 0:
            raise PoolError("a buffer has no memory: base address 0")
        if (self.space is Space.DEVICE) != (self.device is not None):
            raise PoolError(f"device must be given for device memory and only there: {self.device}")
        order = np.sort(self.bases)
        span = (self.num_blocks - 1) * self.stride_bytes + self.block_bytes
        near = np.flatnonzero(order[1:] < order[:-1] + span)
        if len(near):
            # Interleaved buffers (blocks_layers): within one stride they must lie side by side, and so they do in all
            # strides.
            phase = np.sort((self.bases - order[0]) % self.stride_bytes)
            gaps = np.diff(np.append(phase, phase[0] + self.stride_bytes))
            if gaps.min() < self.block_bytes:
                raise PoolError("buffers overlap each other")

    # ---- construction ------------------------------------------------------------------------------------------------

    @classmethod
    def from_array(cls, array: Any, layout: Layout, **options: Any) -> BlockPool:
        """A pool over one NumPy array or torch tensor, `[layers, blocks, ...]` or `[blocks, layers, ...]`.

        The dimensions after those two are one block of one layer and must be contiguous.
        """
        if layout not in ("layers_blocks", "blocks_layers"):
            raise PoolError(f"layout must be layers_blocks or blocks_layers: {layout}")
        if array.ndim < 2:
            raise PoolError(f"array needs a layer and a block dimension: shape {tuple(array.shape)}")
        if layout == "layers_blocks":
            parts = [array[layer] for layer in range(array.shape[0])]
        else:
            parts = [array[:, layer] for layer in range(array.shape[1])]
        return cls._over(parts, 0, whole=array, **options)

    @classmethod
    def from_arrays(cls, arrays: Sequence[Any], block_axis: int = 0, **options: Any) -> BlockPool:
        """A pool over one array or tensor per layer.

        Each is `[blocks, ...]`, or with `block_axis=1` `[parts, blocks, ...]`: K and V apart, as engines often do.
        """
        if block_axis not in (0, 1):
            raise PoolError(f"block_axis must be 0 or 1: {block_axis}")
        if not arrays:
            raise PoolError("no arrays given")
        return cls._over(list(arrays), block_axis, whole=None, **options)

    @classmethod
    def _over(
        cls,
        per_layer: list[Any],
        block_axis: int,
        whole: Any,
        encoding: Int8Encoding | None = None,
        block_bytes: int | None = None,
    ) -> BlockPool:
        bases: list[int] = []
        shapes = set()
        for layer in per_layer:
            parts = [layer] if block_axis == 0 else [layer[part] for part in range(layer.shape[0])]
            for part in parts:
                item = part.itemsize if isinstance(part, np.ndarray) else part.element_size()
                strides = part.strides if isinstance(part, np.ndarray) else [s * item for s in part.stride()]
                expected = item
                for size, stride in zip(reversed(part.shape[1:]), reversed(strides[1:]), strict=True):
                    if size != 1 and stride != expected:
                        raise PoolError(
                            f"a block's bytes are not contiguous: shape {tuple(part.shape)}, strides {tuple(strides)}"
                        )
                    expected *= size
                content = item * math.prod(part.shape[1:])
                # A dimension of one block has no meaningful stride.
                stride = int(strides[0]) if part.shape[0] > 1 else content
                shapes.add((tuple(part.shape), stride, content, str(part.dtype)))
                bases.append(part.ctypes.data if isinstance(part, np.ndarray) else part.data_ptr())
        if len(shapes) != 1:
            raise PoolError(f"buffers differ in shape, stride or dtype: {len(shapes)} kinds")
        ((shape, stride, content, dtype),) = shapes
        kept = [whole] if whole is not None else per_layer
        space, device, arrays = Space.PAGEABLE, None, []
        for array in kept:
            if isinstance(array, np.ndarray):
                arrays.append(
                    _bytes_over(array.ctypes.data, _extent(array.shape, array.strides, array.itemsize), array)
                )
            elif array.device.type == "cpu":
                item = array.element_size()
                extent = _extent(array.shape, [s * item for s in array.stride()], item)
                arrays.append(_bytes_over(array.data_ptr(), extent, array))
                space = Space.PINNED if array.is_pinned() else Space.PAGEABLE
            elif array.device.type == "cuda":
                space, device = Space.DEVICE, array.device.index or 0
            else:
                raise PoolError(f"memory must be on the CPU or a CUDA device: {array.device}")
        if block_bytes is not None and not 0 < block_bytes <= content:
            raise PoolError(f"block_bytes must be within the {content} bytes of a block: {block_bytes}")
        return cls(
            bases,
            block_bytes=block_bytes or content,
            stride_bytes=stride,
            num_blocks=shape[0],
            layers=len(per_layer),
            space=space,
            device=device,
            dtype=dtype.removeprefix("torch."),
            encoding=encoding,
            owner=kept,
            arrays=arrays,
        )

    @classmethod
    def from_pointers(
        cls,
        bases: Sequence[int],
        *,
        block_bytes: int,
        stride_bytes: int,
        num_blocks: int,
        layers: int,
        space: Space | str,
        owner: object,
        device: int | None = None,
        dtype: str | None = None,
        encoding: Int8Encoding | None = None,
    ) -> BlockPool:
        """A pool over raw addresses.

        `owner` is mandatory: the object whose lifetime is the memory's. It is kept alive as long as the pool or a copy
        needs the memory.
        """
        if owner is None:
            raise PoolError("raw addresses need an owner: pass the object that keeps the memory mapped")
        span = (num_blocks - 1) * stride_bytes + block_bytes
        host = Space(space) is not Space.DEVICE
        arrays = [_bytes_over(int(base), span, owner) for base in bases] if host and span > 0 and min(bases) > 0 else []
        return cls(
            bases,
            block_bytes=block_bytes,
            stride_bytes=stride_bytes,
            num_blocks=num_blocks,
            layers=layers,
            space=space,
            device=device,
            dtype=dtype,
            encoding=encoding,
            owner=owner,
            arrays=arrays,
        )

    @classmethod
    def allocate(
        cls,
        *,
        layers: int,
        num_blocks: int,
        block_bytes: int,
        space: Space | str = Space.PAGEABLE,
        layout: Layout = "blocks_layers",
        device: int | None = None,
        driver: Driver | None = None,
        dtype: str | None = None,
        encoding: Int8Encoding | None = None,
    ) -> BlockPool:
        """A pool over fresh memory, freed with the pool. Page-locked and device memory come from the CUDA driver.

        `block_bytes` is one layer's share of a block. The default layout is the host tier's.
        """
        space = Space(space)
        total = layers * num_blocks * block_bytes
        if min(layers, num_blocks, block_bytes) <= 0:
            raise PoolError(
                f"layers, num_blocks and block_bytes must be positive: {layers}, {num_blocks}, {block_bytes}"
            )
        owner: object
        if space is Space.PAGEABLE:
            memory = np.zeros(total + 63, np.uint8)
            base = -(-memory.ctypes.data // 64) * 64
            owner = memory
        else:
            from agentrt.transfer.driver import Allocation, default_driver

            driver = driver or default_driver()
            owner = Allocation(driver, total, space, device or 0)
            base = owner.address
        inner, outer = (
            (block_bytes, layers * block_bytes)
            if layout == "blocks_layers"
            else (num_blocks * block_bytes, block_bytes)
        )
        return cls(
            [base + layer * inner for layer in range(layers)],
            block_bytes=block_bytes,
            stride_bytes=outer,
            num_blocks=num_blocks,
            layers=layers,
            space=space,
            device=(device or 0) if space is Space.DEVICE else None,
            dtype=dtype,
            encoding=encoding,
            owner=owner,
            arrays=[_bytes_over(base, total, owner)] if space is not Space.DEVICE else (),
        )

    # ---- addresses ---------------------------------------------------------------------------------------------------

    @property
    def buffers_per_layer(self) -> int:
        """2 where K and V are apart, else 1."""
        return len(self.bases) // self.layers

    @property
    def total_bytes(self) -> int:
        """Bytes of all blocks of all layers."""
        return len(self.bases) * self.num_blocks * self.block_bytes

    def addresses(self, blocks: Ids, buffers: Ids) -> Ids:
        """Addresses [len(buffers), len(blocks)] of the given blocks."""
        found: Ids = self.bases[buffers][:, None] + blocks[None, :] * self.stride_bytes
        return found

    def view(self) -> NDArray[np.uint8]:
        """Bytes [buffers, blocks, block_bytes] of a host pool whose buffers are evenly spaced, without copying."""
        if self.space is Space.DEVICE:
            raise PoolError("device memory cannot be viewed from the host")
        pitch = np.unique(np.diff(self.bases))
        if len(pitch) > 1 or (len(pitch) == 1 and pitch[0] < 0):
            raise PoolError("buffers are not evenly spaced")
        step = int(pitch[0]) if len(pitch) else self.block_bytes
        first = int(self.bases[0])
        shape = (len(self.bases), self.num_blocks, self.block_bytes)
        strides = (step, self.stride_bytes, 1)
        flat = _bytes_over(first, _extent(shape, strides, 1), self.owner)
        return np.lib.stride_tricks.as_strided(flat, shape, strides)

    def _span(self) -> int:
        return (self.num_blocks - 1) * self.stride_bytes + self.block_bytes

    def _extents_meet(self, other: BlockPool) -> bool:
        if (self.space is Space.DEVICE) != (other.space is Space.DEVICE) or self.device != other.device:
            return False
        starts, others = self.bases[:, None], other.bases[None, :]
        return bool(np.any((starts < others + other._span()) & (others < starts + self._span())))

    def _meets(self, blocks: Ids, buffers: Ids, other: BlockPool, other_blocks: Ids, other_buffers: Ids) -> Ids:
        """Those of `blocks` whose bytes meet a block of the other pool (ids, unordered)."""
        if self is other:
            if not np.intersect1d(buffers, other_buffers).size:
                return blocks[:0]
            return np.intersect1d(blocks, other_blocks)
        if not self._extents_meet(other):
            return blocks[:0]
        theirs = np.unique(other.addresses(other_blocks, other_buffers))
        mine = [
            block
            for block in np.unique(blocks)
            if ranges_overlap(
                self.addresses(np.array([block]), buffers).ravel(), self.block_bytes, theirs, other.block_bytes
            )
        ]
        return np.array(mine, np.int64)

    # ---- pins --------------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Lets go of copies that have completed. Call with the ledger held."""
        for pin in list(self._pins):
            pin.handle.poll()

    @property
    def in_flight(self) -> frozenset[int]:
        """Blocks that a running copy reads or writes: neither evict nor rewrite them."""
        with LEDGER:
            self._reap()
            return frozenset(int(block) for pin in self._pins for block in pin.blocks)

    @property
    def torn(self) -> frozenset[int]:
        """Blocks left undefined by a failed copy."""
        with LEDGER:
            self._reap()
            return frozenset(self._torn)

    def repair(self, blocks: Iterable[int]) -> None:
        """Declares torn blocks whole again, after the engine has rewritten them by its own means."""
        with LEDGER:
            self._torn.difference_update(int(block) for block in blocks)

    def check_reusable(self, blocks: Iterable[int]) -> None:
        """Raises `InFlightError` if any of these blocks is in flight: call before evicting or rewriting them."""
        busy = sorted(self.in_flight.intersection(int(block) for block in blocks))
        if busy:
            raise InFlightError(f"blocks are in flight and cannot be reused, wait for their copy: {busy[:8]}", busy)

    def _conflicts(
        self, blocks: Ids, buffers: Ids, writes: bool, ordered: Callable[[CopyHandle], bool]
    ) -> list[tuple[CopyHandle, Ids]]:
        """Running copies that touch these blocks, one side writing, and that the new copy is not ordered behind.

        Call with the ledger held, after `_reap`.
        """
        found = []
        for pool in (self, *self._neighbours):
            for pin in pool._pins:
                # The cheap questions first: hundreds of copies may be queued on one stream.
                if (writes or pin.writes) and not ordered(pin.handle):
                    shared = self._meets(blocks, buffers, pool, pin.blocks, pin.buffers)
                    if shared.size:
                        found.append((pin.handle, shared))
        return found

    def _refuse_torn(self, blocks: Ids) -> None:
        if self._torn:
            torn = sorted(self._torn.intersection(blocks.tolist()))
            if torn:
                raise TornBlockError(f"source blocks are undefined since a copy into them failed: {torn[:8]}", torn)

    def __repr__(self) -> str:
        return (
            f"BlockPool({self.space.value}, layers={self.layers}, buffers={len(self.bases)}, blocks={self.num_blocks}, "
            f"block_bytes={self.block_bytes}, stride_bytes={self.stride_bytes}, dtype={self.dtype})"
        )


def _extent(shape: Sequence[int], strides: Sequence[int], item: int) -> int:
    """Bytes from the first to past the last element of a strided array."""
    if min(strides, default=1) < 0:
        raise PoolError("arrays with negative strides cannot hold a pool")
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + item


class _Owned(np.ndarray[Any, np.dtype[np.uint8]]):
    """A byte array over foreign memory that keeps the memory's owner alive."""

    owner: object


def _bytes_over(address: int, nbytes: int, owner: object) -> NDArray[np.uint8]:
    if nbytes <= 0 or address <= 0:
        raise PoolError(f"no memory to describe: {nbytes} bytes at {address:#x}")
    array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address)).view(_Owned)
    array.owner = owner
    return array
