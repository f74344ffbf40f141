"""The ways to move blocks, behind one interface.

Each takes a `Job` whose ids have been checked and queues it on its stream.

| backend | moves | one submission is | cannot |
|---|---|---|---|
| `merged` | runs contiguous on both sides | one `cuMemcpyAsync` per run | |
| `dma_batch` | runs contiguous on both sides | one `cuMemcpyBatchAsync` | driver below 12.8, default stream, pageable |
| `dma_2d` | all layers of a block as rows | one `cuMemcpy2DAsync` per pair | unevenly spaced layers, pageable memory |
| `triton` | 16 bytes per thread and access, all layers | one launch | pageable memory, no triton, two devices |
| `bulk` | shared-memory ring, all layers | one launch | below sm_90, alignment below 16 bytes |
| `int8` | quantised on the way | one launch | plain pools; chosen by the pools' encoding alone |
| `rust` | host to host, several threads | one call without the GIL | device memory |

`reference` (host to host, plain NumPy) stands beside them for tests.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from agentrt._core import copy_host_blocks
from agentrt.kernels import reference
from agentrt.transfer import device_code
from agentrt.transfer.errors import BackendUnavailableError
from agentrt.transfer.pool import BlockPool, Ids, Space

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentrt.transfer.driver import Driver

#: CTAs of a kernel over the host link unless the caller says otherwise: enough bytes in flight, few SMs taken from
#: the model.
DEFAULT_CTAS = {"triton": 8, "bulk": 4, "int8": 16}
#: Threads of a host copy.
HOST_THREADS = min(4, os.cpu_count() or 1)
#: CU_DEVICE_ATTRIBUTE_MAX_PITCH of every device so far.
_MAX_PITCH = (1 << 31) - 1


@dataclass(frozen=True)
class Descriptors:
    """Addresses and sizes, as the copy engine wants them."""

    src: Ids
    dst: Ids
    sizes: Ids


@dataclass(frozen=True)
class Runs:
    """A copy as runs contiguous on both sides: `lengths[i]` blocks from `src[i]` to `dst[i]`, in each group of layers.

    Counting them is cheap; addresses are made only for the engines that need them.
    """

    src_bases: Ids
    dst_bases: Ids
    #: Bytes of one block in each group of layers.
    widths: Ids
    src: Ids
    dst: Ids
    lengths: Ids
    strides: tuple[int, int]

    def __len__(self) -> int:
        return len(self.widths) * len(self.lengths)

    def mean_bytes(self) -> int:
        """Average length of a run."""
        return int(self.widths.sum()) * int(self.lengths.sum()) // max(len(self), 1)

    def descriptors(self) -> Descriptors:
        """Addresses and sizes."""
        return Descriptors(
            (self.src_bases[:, None] + self.src[None, :] * self.strides[0]).ravel(),
            (self.dst_bases[:, None] + self.dst[None, :] * self.strides[1]).ravel(),
            (self.widths[:, None] * self.lengths[None, :]).ravel(),
        )


@dataclass
class Job:
    """One checked copy: block `src[i]` of each buffer to `dst[i]`."""

    src_pool: BlockPool
    dst_pool: BlockPool
    src: Ids
    dst: Ids
    buffers: Ids
    stream: int = 0
    max_ctas: int | None = None
    _merged: Runs | None = field(default=None, repr=False)

    @property
    def merged(self) -> Runs:
        """The job as runs contiguous on both sides."""
        if self._merged is None:
            self._merged = merge(self.src_pool, self.dst_pool, self.src, self.dst, self.buffers)
        return self._merged


def merge(src_pool: BlockPool, dst_pool: BlockPool, src: Ids, dst: Ids, buffers: Ids) -> Runs:
    """Joins what is contiguous on both sides: first layers that lie side by side in both pools, then blocks that do.

    Only ids are sorted, once for all layers and only where blocks can continue each other.
    """
    block = src_pool.block_bytes
    src_bases, dst_bases = src_pool.bases[buffers], dst_pool.bases[buffers]
    widths = np.array([block])
    if len(buffers) > 1:
        order = np.argsort(src_bases)
        src_bases, dst_bases = src_bases[order], dst_bases[order]
        joined = (np.diff(src_bases) == block) & (np.diff(dst_bases) == block)
        first = np.flatnonzero(np.append(True, ~joined))
        widths = np.diff(np.append(first, len(buffers))) * block
        src_bases, dst_bases = src_bases[first], dst_bases[first]
    lengths = np.ones(len(src), np.int64)
    # Neighbouring blocks continue each other only where a group of layers fills the whole stride of both pools.
    strides = (src_pool.stride_bytes, dst_pool.stride_bytes)
    if len(src) and strides[0] == strides[1] and (widths == strides[0]).all():
        order = np.argsort(src)
        src, dst = src[order], dst[order]
        starts = np.flatnonzero(np.append(True, (np.diff(src) != 1) | (np.diff(dst) != 1)))
        lengths = np.diff(np.append(starts, len(src)))
        src, dst = src[starts], dst[starts]
    return Runs(src_bases, dst_bases, widths, src, dst, lengths, strides)


def alignment(*pools: BlockPool) -> int:
    """The largest power of two, up to 16, that divides every address and size of these pools."""
    values = np.concatenate([np.append(pool.bases, [pool.stride_bytes, pool.block_bytes]) for pool in pools])
    bits = int(np.bitwise_or.reduce(values)) | 16
    return bits & -bits


# ---- host ------------------------------------------------------------------------------------------------------------


def run_rust(job: Job) -> float:
    """Host to host through `agentrt._core`; returns the seconds it took."""
    runs = job.merged.descriptors()
    arrays = [array.view(np.ndarray) for array in (*job.src_pool.arrays, *job.dst_pool.arrays)]
    start = time.perf_counter()
    copy_host_blocks(arrays, runs.src, runs.dst, runs.sizes, HOST_THREADS)
    return time.perf_counter() - start


def run_reference(job: Job) -> float:
    """Host to host in NumPy, plain or int8."""
    src, dst = job.src_pool.view()[job.buffers], job.dst_pool.view()
    start = time.perf_counter()
    encode, decode = job.dst_pool.encoding, job.src_pool.encoding
    for source, target in zip(job.src.tolist(), job.dst.tolist(), strict=True):
        block = src[:, source]
        if encode is not None and decode is None:
            block = reference.encode_int8(block, encode.row, encode.dtype)
        elif decode is not None and encode is None:
            rows = decode.rows(job.dst_pool.block_bytes)
            block = reference.decode_int8(block[:, : rows * (decode.row + 4)], decode.row, decode.dtype)
        dst[job.buffers, target, : block.shape[1]] = block
    return time.perf_counter() - start


# ---- copy engines ----------------------------------------------------------------------------------------------------


def submit_merged(driver: Driver, device: int, job: Job) -> None:
    """One asynchronous copy per run."""
    runs = job.merged.descriptors()
    driver.copy_many(device, runs.dst, runs.src, runs.sizes, job.stream)


def submit_dma_batch(driver: Driver, device: int, job: Job) -> None:
    """All runs in one call."""
    runs = job.merged.descriptors()
    driver.copy_batch(device, runs.dst, runs.src, runs.sizes, job.stream)


def pitch(pool: BlockPool, buffers: Ids) -> int | None:
    """Distance between the selected buffers if it is the same throughout, fits a row and suits the copy engine."""
    steps = np.unique(np.diff(pool.bases[buffers]))
    if len(buffers) == 1:
        return pool.block_bytes
    return int(steps[0]) if len(steps) == 1 and pool.block_bytes <= steps[0] <= _MAX_PITCH else None


def submit_dma_2d(driver: Driver, device: int, job: Job) -> None:
    """All layers of a pair as the rows of one pitched copy."""
    src_pitch, dst_pitch = pitch(job.src_pool, job.buffers), pitch(job.dst_pool, job.buffers)
    if src_pitch is None or dst_pitch is None:
        raise BackendUnavailableError("layers are not evenly spaced")
    src = job.src_pool.addresses(job.src, job.buffers[:1])[0].tolist()
    dst = job.dst_pool.addresses(job.dst, job.buffers[:1])[0].tolist()
    for source, target in zip(src, dst, strict=True):
        driver.copy_2d(
            device, target, dst_pitch, source, src_pitch, job.src_pool.block_bytes, len(job.buffers), job.stream
        )


# ---- kernels ---------------------------------------------------------------------------------------------------------


class Tables:
    """Staging memory for kernel tables: page-locked, for an asynchronous upload, and reused once its copy is done."""

    def __init__(self, driver: Driver, device: int) -> None:
        self.driver = driver
        self.device = device
        self._slots: list[tuple[BlockPool, BlockPool, Callable[[], bool]]] = []
        self._lock = threading.Lock()

    def take(self, words: int) -> tuple[BlockPool, BlockPool]:
        """Host and device memory of at least that many words, free of earlier copies. Call `give` after submission."""
        with self._lock:
            for index, (host, device, free) in enumerate(self._slots):
                if host.block_bytes >= 8 * words and free():
                    del self._slots[index]
                    return host, device
        nbytes = 8 * device_code.power_of_two_at_least(max(words, 512))
        return (
            BlockPool.allocate(
                layers=1, num_blocks=1, block_bytes=nbytes, space=Space.PINNED, driver=self.driver, device=self.device
            ),
            BlockPool.allocate(
                layers=1, num_blocks=1, block_bytes=nbytes, space=Space.DEVICE, driver=self.driver, device=self.device
            ),
        )

    def give(self, host: BlockPool, device: BlockPool, free: Callable[[], bool]) -> None:
        """Puts memory back; `free` says when its copy is done."""
        with self._lock:
            self._slots.append((host, device, free))


def kernel_bases(driver: Driver, device: int, pool: BlockPool) -> Ids:
    """Base addresses as a kernel on the device sees them."""
    if pool.space is Space.DEVICE:
        return pool.bases
    return np.array([driver.device_alias(int(base), device) for base in pool.bases], np.int64)


def fill_table(words: Ids, src: Ids, dst: Ids, src_bases: Ids, dst_bases: Ids) -> None:
    """The layout described in `agentrt.kernels`."""
    n, b = len(src), len(src_bases)
    words[0 : 2 * n : 2] = src
    words[1 : 2 * n : 2] = dst
    words[2 * n : 2 * n + b] = src_bases
    words[2 * n + b : 2 * n + 2 * b] = dst_bases


class KernelPath:
    """One kernel for one pair of pools: its machine code, its bases, its tables."""

    def __init__(self, driver: Driver, device: int, name: str, src: BlockPool, dst: BlockPool, tables: Tables) -> None:
        self.driver = driver
        self.device = device
        self.name = name
        self.strides = (src.stride_bytes, dst.stride_bytes)
        self.bases = (kernel_bases(driver, device, src), kernel_bases(driver, device, dst))
        self.tables = tables
        align = alignment(src, dst)
        if name == "bulk":
            spec = device_code.bulk_spec(src.block_bytes)
        elif name == "int8":
            encode = dst.encoding is not None
            encoding = dst.encoding or src.encoding
            assert encoding is not None  # noqa: S101 - for the type checker
            rows = encoding.rows((src if encode else dst).block_bytes)
            kind: Literal["kv_encode_int8", "kv_decode_int8"] = "kv_encode_int8" if encode else "kv_decode_int8"
            spec = device_code.int8_spec(kind, rows, encoding.row, encoding.dtype, align)
        else:
            spec = device_code.copy_spec(src.block_bytes, align)
        self.kernel = driver.load(spec, device)
        self.default_ctas = DEFAULT_CTAS[name]
        if src.space is Space.DEVICE and dst.space is Space.DEVICE:
            # Within the device nothing but its own memory limits the copy.
            self.default_ctas = 2 * driver.info(device).multiprocessors

    def grid(self, n_pairs: int, n_buffers: int, max_ctas: int | None) -> int:
        """CTAs to launch: the cap, or the work if that is less."""
        items = self.kernel.spec.items(n_pairs, n_buffers)
        if items >= 1 << 31:
            raise BackendUnavailableError(f"one launch cannot hold so many work items, split the pairs: {items}")
        return max(1, min(items, max_ctas or self.default_ctas))

    def submit(self, job: Job, free: Callable[[], bool]) -> None:
        """Uploads the table and launches. `free` tells when the table may be overwritten."""
        n, b = len(job.src), len(job.buffers)
        grid = self.grid(n, b, job.max_ctas)
        words = 2 * n + 2 * b
        host, device = self.tables.take(words)
        try:
            table = host.arrays[0].view(np.ndarray).view(np.int64)
            fill_table(table[:words], job.src, job.dst, self.bases[0][job.buffers], self.bases[1][job.buffers])
            address = int(device.bases[0])
            self.driver.copy(self.device, address, int(host.bases[0]), 8 * words, job.stream)
            self.driver.launch(self.device, self.kernel, grid, address, (n, b), self.strides, job.stream)
        finally:
            self.tables.give(host, device, free)


class FixedKernelCopy:
    """A kernel copy whose launch never changes, for CUDA graphs: table address, pair count and grid are fixed.

    Rows of the table that are not in use hold -1, which the kernel skips.
    """

    def __init__(self, path: KernelPath, capacity: int, buffers: Ids, max_ctas: int | None) -> None:
        self.path = path
        self.capacity = capacity
        words = 2 * capacity + 2 * len(buffers)
        self._words = words
        self._buffers = len(buffers)
        self._host, self._device = path.tables.take(words)
        self.table: Ids = self._host.arrays[0].view(np.ndarray).view(np.int64)[:words]
        none = np.full(capacity, -1, np.int64)
        fill_table(self.table, none, none, path.bases[0][buffers], path.bases[1][buffers])
        self._grid = path.grid(capacity, len(buffers), max_ctas)

    def set(self, src: Ids, dst: Ids) -> None:
        """Writes the pairs of the next replay."""
        pairs = self.table[: 2 * self.capacity].reshape(-1, 2)
        pairs[:] = -1
        pairs[: len(src), 0] = src
        pairs[: len(dst), 1] = dst

    def submit(self, stream: int) -> None:
        """Queues (or captures) the upload and the launch."""
        path = self.path
        address = int(self._device.bases[0])
        path.driver.copy(path.device, address, int(self._host.bases[0]), 8 * self._words, stream)
        path.driver.launch(
            path.device, path.kernel, self._grid, address, (self.capacity, self._buffers), path.strides, stream
        )
