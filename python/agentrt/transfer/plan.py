"""Copy plans: check once, then move blocks between two pools as often as needed.

    plan = CopyPlan(host_pool, device_pool)
    handle = plan.copy([(7, 0), (9, 3)], after=writer_event)
    handle.wait(compute_stream)

Everything that can be wrong is found before anything moves: pools that do not fit each other when the plan is made,
bad pairs when `copy` is called. Three rules keep the data right while copies run:

* A copy waits for `after` (the event of whoever wrote its sources), and both sides stay pinned until the copy's
  event.
* A copy that would race with a running one is refused, unless it is ordered behind it: same stream, or `after=[that
  handle]`.
* A copy that fails leaves its destination blocks torn, everything else as it was, and nothing in flight.

Costs per call, before the first byte: tens of microseconds of checks, `O(n log n)` in the pairs, independent of the
layers for kernels and linear in descriptors for the copy engines.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agentrt.transfer import backends, device_code
from agentrt.transfer.backends import Job
from agentrt.transfer.errors import (
    BackendUnavailableError,
    CopyFaultError,
    DriverError,
    InFlightError,
    PairError,
    PoolError,
)
from agentrt.transfer.handle import (
    CopyHandle,
    DeviceCompletion,
    HostCompletion,
    HostStream,
    Instant,
    event_handle,
    stream_handle,
)
from agentrt.transfer.pool import LEDGER, BlockPool, Ids, Space, ranges_overlap

if TYPE_CHECKING:
    from agentrt.transfer.calibration import Calibration
    from agentrt.transfer.driver import Driver

Pairs = Iterable[tuple[int, int]] | Ids

#: Backends of copies that touch a device, plain and encoded.
DEVICE_BACKENDS = ("merged", "dma_batch", "dma_2d", "triton", "bulk")
HOST_BACKENDS = ("rust", "reference")

# Dispatch without a calibration, from published measurements on one H100 (docs/transfer.md): above this payload the
# copy engine reaches the link's speed, below it and from this many descriptors on, a kernel does better from host to
# device.
_KERNEL_BELOW_BYTES = 28 << 10
_KERNEL_FROM_COUNT = 16
#: Up to this many runs, separate calls cost no more than one batch.
_FEW_RUNS = 4


class CopyPlan:
    """Copies from one pool to another. Any thread may use a plan."""

    def __init__(
        self, src: BlockPool, dst: BlockPool, *, driver: Driver | None = None, calibration: Calibration | None = None
    ) -> None:
        self.src = src
        self.dst = dst
        self._check_pools()
        #: `h2d`, `d2h`, `d2d` or `h2h`.
        self.direction = f"{'d' if src.space is Space.DEVICE else 'h'}2{'d' if dst.space is Space.DEVICE else 'h'}"
        #: The device whose stream the copies run on (the destination's, between two devices).
        self.device = dst.device if dst.device is not None else src.device
        #: True if blocks are quantised or restored on the way.
        self.encodes = src.encoding != dst.encoding
        self._lock = threading.Lock()
        self._paths: dict[str, backends.KernelPath] = {}
        self._stream: int | None = None
        self._driver: Driver | None = driver
        if self.direction != "h2h" and driver is None:
            from agentrt.transfer.driver import default_driver

            self._driver = default_driver()
        self._all_buffers: Ids = np.arange(len(src.bases), dtype=np.int64)
        if calibration is None and self.direction != "h2h":
            from agentrt.transfer.calibration import load_calibration

            calibration = load_calibration(self._device_driver.info(self._device))
        self.calibration = calibration
        #: Backends that cannot serve this plan, and why.
        self.unavailable: dict[str, str] = {}
        usable = []
        for name in HOST_BACKENDS if self.direction == "h2h" else (("int8",) if self.encodes else DEVICE_BACKENDS):
            reason = self._why_not(name)
            if reason:
                self.unavailable[name] = reason
            else:
                usable.append(name)
        #: Backends that can.
        self.available = tuple(usable)
        if self.encodes and not usable:
            raise BackendUnavailableError(f"int8 transport is not possible here: {self.unavailable}")

    # ---- checks at plan time -----------------------------------------------------------------------------------------

    def _check_pools(self) -> None:
        src, dst = self.src, self.dst
        if src.layers != dst.layers or len(src.bases) != len(dst.bases):
            raise PoolError(
                f"pools differ in layers or buffers: {src.layers} layers of {len(src.bases)} buffers "
                f"to {dst.layers} layers of {len(dst.bases)} buffers"
            )
        if src.encoding == dst.encoding:
            if src.block_bytes != dst.block_bytes:
                raise PoolError(f"blocks differ in size: {src.block_bytes} to {dst.block_bytes} bytes")
            if None not in (src.dtype, dst.dtype) and src.dtype != dst.dtype:
                raise PoolError(f"blocks differ in dtype: {src.dtype} to {dst.dtype}")
            return
        if None not in (src.encoding, dst.encoding):
            raise PoolError(f"pools are encoded differently: {src.encoding} to {dst.encoding}")
        plain, encoded = (src, dst) if dst.encoding is not None else (dst, src)
        encoding = encoded.encoding
        assert encoding is not None  # noqa: S101 - for the type checker
        needed = encoding.encoded_bytes(plain.block_bytes)
        if encoded.block_bytes < needed:
            raise PoolError(f"encoded blocks need {needed} bytes, the pool's have: {encoded.block_bytes}")
        if plain.dtype not in (None, encoding.dtype):
            raise PoolError(f"the encoding is for {encoding.dtype}, the plain pool holds: {plain.dtype}")
        if backends.alignment(src, dst) < 4:
            raise PoolError("int8 transport needs addresses and sizes that are multiples of 4")

    def _why_not(self, name: str) -> str:
        """Why a backend cannot serve this plan; empty if it can."""
        src, dst = self.src, self.dst
        if name == "rust":
            return "encoded pools: only the reference converts on the host" if self.encodes else ""
        if name == "reference":
            try:
                src.view(), dst.view()
            except PoolError as error:
                return str(error)
            return ""
        pageable = Space.PAGEABLE in (src.space, dst.space)
        driver = self._device_driver
        if name == "merged":
            return ""
        if pageable:
            return "pageable memory: the driver has to stage each copy"
        if name == "dma_batch":
            return "" if driver.has_batch else "driver is older than CUDA 12.8"
        if name == "dma_2d":
            even = backends.pitch(src, self._all_buffers) and backends.pitch(dst, self._all_buffers)
            return "" if even else "layers are not evenly spaced"
        if not driver.has_kernels:
            return "driver cannot launch kernels"
        if src.device is not None and dst.device is not None and src.device != dst.device:
            return "a kernel runs on one device"
        sm = driver.info(self._device).sm
        if name == "bulk":
            if sm < 90:
                return f"bulk copies need compute capability 9.0, this device has: {sm / 10}"
            if backends.alignment(src, dst) < 16:
                return "bulk copies need addresses and sizes that are multiples of 16"
            # A simulated device compiles nothing.
            return device_code.nvrtc_missing() if self._compiles else ""
        if sm < 80:
            return f"kernels need compute capability 8.0, this device has: {sm / 10}"
        return device_code.triton_missing() if self._compiles else ""

    @property
    def _compiles(self) -> bool:
        from agentrt.transfer.driver import CudaDriver

        return isinstance(self._driver, CudaDriver)

    @property
    def _device_driver(self) -> Driver:
        assert self._driver is not None  # noqa: S101 - for the type checker
        return self._driver

    @property
    def _device(self) -> int:
        assert self.device is not None  # noqa: S101 - for the type checker
        return self.device

    # ---- checks at copy time -----------------------------------------------------------------------------------------

    def _check_pairs(self, pairs: Pairs) -> tuple[Ids, Ids]:
        array = np.asarray(pairs if isinstance(pairs, np.ndarray) else list(pairs))
        if array.size == 0:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        if array.ndim != 2 or array.shape[1] != 2:
            raise PairError(f"pairs must be rows (source block, destination block), got shape: {array.shape}")
        if array.dtype.kind not in "iu":
            raise PairError(f"block ids must be integers, got: {array.dtype}")
        if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
            raise PairError("block id is out of range", [int(array.max())])
        src, dst = array[:, 0].astype(np.int64), array[:, 1].astype(np.int64)
        if src.min() < 0 or dst.min() < 0:
            real = (src >= 0) & (dst >= 0)
            src, dst = src[real], dst[real]
        for role, ids, pool in (("source", src, self.src), ("destination", dst, self.dst)):
            if len(ids) and ids.max() >= pool.num_blocks:
                wrong = np.unique(ids[ids >= pool.num_blocks])
                raise PairError(
                    f"{role} block is outside the pool's {pool.num_blocks} blocks: {wrong[:8].tolist()}", wrong.tolist()
                )
        ordered = np.sort(dst)
        same = ordered[1:] == ordered[:-1]
        if same.any():
            twice = np.unique(ordered[1:][same])
            raise PairError(f"destination block is named twice: {twice[:8].tolist()}", twice.tolist())
        return src, dst

    def _check_overlap(self, src: Ids, dst: Ids, buffers: Ids) -> None:
        """No destination may be a source of the same copy: which of the two happens first is not defined."""
        if self.src is self.dst:
            both = np.intersect1d(src, dst)
            if len(both):
                raise PairError(f"block is a source and a destination of one copy: {both[:8].tolist()}", both.tolist())
        elif self.src._extents_meet(self.dst):
            read = self.src.addresses(src, buffers).ravel()
            written = self.dst.addresses(dst, buffers).ravel()
            if ranges_overlap(read, self.src.block_bytes, written, self.dst.block_bytes):
                raise PairError("the pools share memory, and a source overlaps a destination", np.unique(dst).tolist())

    def _buffers(self, layers: Iterable[int] | None) -> tuple[Ids, tuple[int, ...]]:
        if layers is None:
            return self._all_buffers, tuple(range(self.src.layers))
        chosen = tuple(int(layer) for layer in layers)
        wrong = [layer for layer in chosen if not 0 <= layer < self.src.layers]
        if wrong:
            raise PairError(f"layer is outside the pool's {self.src.layers} layers: {wrong}")
        if len(set(chosen)) != len(chosen):
            raise PairError(f"layer is named twice: {list(chosen)}")
        if not chosen:
            raise PairError("no layers to copy: pass None for all of them")
        per = self.src.buffers_per_layer
        return (np.sort(np.array(chosen, np.int64))[:, None] * per + np.arange(per)).ravel(), chosen

    def _admit(
        self, handle: CopyHandle, src: Ids, dst: Ids, buffers: Ids, stream: object, after: Sequence[object]
    ) -> None:
        """Pins the blocks, or refuses if a running copy that this one is not ordered behind touches them."""
        with LEDGER:
            self.src._reap()
            self.dst._reap()
            self.src._refuse_torn(src)

            def ordered(other: CopyHandle) -> bool:
                return (stream is not None and other.stream == stream) or any(other is one for one in after)

            conflicts = self.src._conflicts(src, buffers, False, ordered)
            conflicts += self.dst._conflicts(dst, buffers, True, ordered)
            for other, blocks in conflicts:
                # It may have completed since the pools looked.
                if not other.poll():
                    first = blocks[:8].tolist()
                    raise InFlightError(
                        f"blocks are in flight, put this copy on the same stream or pass after=[handle]: {first}",
                        blocks.tolist(),
                    )
            # Known already, so that a copy submitted meanwhile on the same stream sees it.
            handle.stream = stream
            handle._pin()

    # ---- dispatch ----------------------------------------------------------------------------------------------------

    def choose(self, job: Job) -> str:
        """The backend `auto` takes for a job."""
        if self.direction == "h2h":
            return "reference" if self.encodes else "rust"
        if self.encodes:
            return "int8"
        runs = job.merged
        engine = "dma_batch" if "dma_batch" in self.available and job.stream != 0 else "merged"
        if len(runs) <= _FEW_RUNS or Space.PAGEABLE in (self.src.space, self.dst.space):
            return "merged"
        if self.calibration is not None:
            usable = set(self.available) - ({"dma_batch"} if job.stream == 0 else set())
            best = self.calibration.best(self.direction, runs.mean_bytes(), len(runs), usable)
            if best is not None:
                return best
        small = runs.mean_bytes() < _KERNEL_BELOW_BYTES
        if "triton" in self.available and (
            self.direction == "d2d" or (self.direction == "h2d" and small and len(runs) >= _KERNEL_FROM_COUNT)
        ):
            return "triton"
        return engine

    def _backend(self, name: str, job: Job) -> str:
        if name == "auto":
            return self.choose(job)
        if name not in self.available:
            known = (*DEVICE_BACKENDS, *HOST_BACKENDS, "int8")
            reason = self.unavailable.get(name) or (
                "it does not serve these pools" if name in known else f"unknown, use one of {known}"
            )
            raise BackendUnavailableError(f"backend {name} is not available: {reason}")
        if name == "dma_2d" and not all(backends.pitch(pool, job.buffers) for pool in (self.src, self.dst)):
            raise BackendUnavailableError("backend dma_2d is not available: the chosen layers are not evenly spaced")
        if name == "dma_batch" and job.stream == 0:
            raise BackendUnavailableError(
                "backend dma_batch is not available: the default stream takes no batched copies"
            )
        return name

    def _path(self, name: str) -> backends.KernelPath:
        with self._lock:
            path = self._paths.get(name)
            if path is None:
                tables = _tables(self._device_driver, self._device)
                path = backends.KernelPath(self._device_driver, self._device, name, self.src, self.dst, tables)
                self._paths[name] = path
            return path

    # ---- copies ------------------------------------------------------------------------------------------------------

    def copy(
        self,
        pairs: Pairs,
        stream: Any = None,
        layers: Iterable[int] | None = None,
        after: Any = None,
        backend: str = "auto",
        max_ctas: int | None = None,
    ) -> CopyHandle:
        """Moves block `source` to block `destination` for each pair; pairs with a negative id are padding.

        stream    a CUDA stream (int, torch stream), or a `HostStream` for host copies. None: the plan's own
                  high-priority stream, ordered behind nothing but `after`, or, on the host, the calling thread (the
                  copy is over when this returns).
        layers    the layers to copy; None: all.
        after     event, handle, or a list of them, that must complete first.
        backend   a name from `available`, or `auto`.
        max_ctas  upper limit of a kernel's CTAs; ignored by the copy engines.

        Raises `PairError` (`InFlightError`, `TornBlockError`), `BackendUnavailableError`, and `CopyFaultError` if the
        driver refuses part of the work. Except after `CopyFaultError`, nothing has moved.
        """
        return self._copy(self._check_pairs(pairs), stream, layers, after, backend, max_ctas)

    def prefetch(
        self,
        pairs: Pairs,
        order: Iterable[int] | None = None,
        stream: Any = None,
        after: Any = None,
        backend: str = "auto",
        max_ctas: int | None = None,
    ) -> dict[int, CopyHandle]:
        """Copies layer by layer, in `order` (default: first to last), and returns a handle for each layer.

        Layer `l` may be read as soon as its own handle is done, while later layers are still on their way. All copies
        go on one stream. If a later layer is refused, those queued before it complete as usual, pinned until then.
        """
        checked = self._check_pairs(pairs)
        layers = list(range(self.src.layers)) if order is None else [int(layer) for layer in order]
        self._buffers(layers)
        return {layer: self._copy(checked, stream, [layer], after, backend, max_ctas) for layer in layers}

    def _copy(
        self,
        checked: tuple[Ids, Ids],
        stream: Any,
        layers: Iterable[int] | None,
        after: Any,
        backend: str,
        max_ctas: int | None,
    ) -> CopyHandle:
        src, dst = checked
        buffers, chosen = self._buffers(layers)
        self._check_overlap(src, dst, buffers)
        if max_ctas is not None and max_ctas < 1:
            raise PairError(f"max_ctas must be at least 1: {max_ctas}")
        first = _as_list(after)
        handle = CopyHandle(
            self.src, self.dst, src, dst, buffers, chosen, len(dst) * len(buffers) * self.dst.block_bytes
        )
        job = Job(self.src, self.dst, src, dst, buffers, max_ctas=max_ctas)
        if self.direction == "h2h":
            return self._copy_on_host(handle, job, stream, first, backend)
        return self._copy_on_device(handle, job, stream, first, backend)

    def _copy_on_host(self, handle: CopyHandle, job: Job, stream: Any, after: list[Any], backend: str) -> CopyHandle:
        name = self._backend(backend, job)
        if not (stream is None or isinstance(stream, HostStream)):
            raise TypeError(
                f"host copies run on a HostStream or, without one, at once, not on: {type(stream).__name__}"
            )
        if not all(isinstance(one, CopyHandle) for one in after):
            raise TypeError("host copies can only wait for handles of other copies")
        if stream is None:
            for one in after:
                one.wait()
        run: Callable[[Job], float] = backends.run_rust if name == "rust" else backends.run_reference
        self._admit(handle, job.src, job.dst, job.buffers, stream, after)

        def work() -> float:
            for one in after:
                one.wait()
            return run(job) if len(job.src) else 0.0

        if isinstance(stream, HostStream):
            handle._started(HostCompletion(stream.submit(work)), name, stream)
            return handle
        try:
            handle._started(Instant(work()), name, None)
        except BaseException as error:
            handle._settle(error)
            raise CopyFaultError(f"copy failed: {error}", job.dst.tolist()) from error
        handle.poll()
        return handle

    def _copy_on_device(self, handle: CopyHandle, job: Job, stream: Any, after: list[Any], backend: str) -> CopyHandle:
        driver, device = self._device_driver, self._device
        queue = self._own_stream() if stream is None else stream_handle(stream)
        if stream is not None and driver.stream_capturing(device, queue):
            raise BackendUnavailableError(
                "the stream is capturing a graph: use graph_copy, whose pairs can change between replays"
            )
        job.stream = queue
        name = self._backend(backend, job)
        # Compilation and loading happen here, before anything is pinned or queued.
        path = self._path(name) if name in ("triton", "bulk", "int8") else None
        if path is not None:
            path.grid(len(job.src), len(job.buffers), job.max_ctas)
        events = [self._event_of(one) for one in after]
        self._admit(handle, job.src, job.dst, job.buffers, queue, after)
        start = end = 0
        try:
            start, end = driver.event_create(device), driver.event_create(device)
            for event in events:
                if event is not None:
                    driver.stream_wait_event(device, queue, event)
            driver.event_record(device, start, queue)
            if len(job.src):
                if path is not None:
                    gone = weakref.ref(handle)
                    # A dead handle has settled: a running one is kept alive by its module.
                    path.submit(job, lambda: (alive := gone()) is None or alive.poll())
                else:
                    _SUBMIT[name](driver, device, job)
            driver.event_record(device, end, queue)
        except BaseException as error:
            self._abandon(handle, queue, (start, end), error)
            raise CopyFaultError(
                f"copy failed at submission, its destination blocks are undefined: {error}", job.dst.tolist()
            ) from error
        handle._started(DeviceCompletion(driver, device, start, end), name, queue)
        return handle

    def _abandon(self, handle: CopyHandle, queue: int, events: tuple[int, int], error: BaseException) -> None:
        """Part of the copy may be queued: let it finish before its blocks are let go."""
        driver, device = self._device_driver, self._device
        # The stream reports what is being raised already; its work is over either way.
        with contextlib.suppress(DriverError):
            driver.stream_synchronize(device, queue)
        for event in events:
            if event:
                driver.event_destroy(device, event)
        handle._settle(error)

    def _event_of(self, one: object) -> int | None:
        if isinstance(one, CopyHandle):
            if one.poll():
                one.wait()  # Raises if what this copy depends on has failed.
                return None
            event = one.event
            if not isinstance(event, int):
                one.wait()
                return None
            return event
        return event_handle(one)

    def _own_stream(self) -> int:
        with self._lock:
            if self._stream is None:
                self._stream = self._device_driver.stream_create(self._device)
            return self._stream

    # ---- CUDA graphs -------------------------------------------------------------------------------------------------

    def graph_copy(
        self, capacity: int, layers: Iterable[int] | None = None, backend: str = "triton", max_ctas: int | None = None
    ) -> GraphCopy:
        """A copy of up to `capacity` pairs that a CUDA graph can hold, with pairs that change between replays."""
        if backend not in ("triton", "bulk", "int8"):
            raise BackendUnavailableError(f"only kernels can be captured with changing pairs, not: {backend}")
        buffers, chosen = self._buffers(layers)
        name = self._backend(
            backend, Job(self.src, self.dst, self._all_buffers[:0], self._all_buffers[:0], buffers, stream=1)
        )
        if capacity < 1:
            raise PairError(f"capacity must be at least 1: {capacity}")
        return GraphCopy(
            self, backends.FixedKernelCopy(self._path(name), capacity, buffers, max_ctas), buffers, chosen, name
        )


class GraphCopy:
    """A kernel copy inside a CUDA graph.

    fixed = plan.graph_copy(capacity=256)
    with torch.cuda.graph(graph):            # once
        fixed.enqueue(torch.cuda.current_stream())
    fixed.set_pairs(pairs)                   # before each replay: checks and pins the pairs
    graph.replay()
    handle = fixed.launched(stream)          # after each replay: its completion, which unpins them
    """

    def __init__(
        self, plan: CopyPlan, fixed: backends.FixedKernelCopy, buffers: Ids, layers: tuple[int, ...], backend: str
    ) -> None:
        self.plan = plan
        self._fixed = fixed
        self._buffers = buffers
        self._layers = layers
        self._backend = backend
        self._handle: CopyHandle | None = None
        self._pending = False

    def enqueue(self, stream: Any) -> None:
        """Queues the copy on a stream, normally one that is capturing."""
        self._fixed.submit(stream_handle(stream))

    def set_pairs(self, pairs: Pairs, after: Any = None) -> None:
        """Sets and pins the pairs of the next replay. The previous replay must be complete: its table is rewritten."""
        if self._pending:
            raise InFlightError("pairs are set already: replay the graph and call launched, or call cancel")
        if self._handle is not None and not self._handle.poll():
            raise InFlightError("the previous replay is still running: wait for its handle")
        plan = self.plan
        src, dst = plan._check_pairs(pairs)
        if len(src) > self._fixed.capacity:
            raise PairError(f"the graph holds {self._fixed.capacity} pairs, got: {len(src)}")
        plan._check_overlap(src, dst, self._buffers)
        handle = CopyHandle(
            plan.src,
            plan.dst,
            src,
            dst,
            self._buffers,
            self._layers,
            len(dst) * len(self._buffers) * plan.dst.block_bytes,
        )
        plan._admit(handle, src, dst, self._buffers, None, _as_list(after))
        self._fixed.set(src, dst)
        self._handle, self._pending = handle, True

    def cancel(self) -> None:
        """Lets go of pairs that were set but never replayed."""
        if self._pending and self._handle is not None:
            self._fixed.set(np.empty(0, np.int64), np.empty(0, np.int64))
            self._handle._completion = Instant(0.0)
            self._handle.poll()
        self._pending = False

    def launched(self, stream: Any) -> CopyHandle:
        """The handle of the replay just put on this stream. It times from now on, so its duration is a lower bound."""
        if not self._pending or self._handle is None:
            raise PairError("no pairs were set for this replay")
        driver, device, queue = self.plan._device_driver, self.plan._device, stream_handle(stream)
        start, end = driver.event_create(device), driver.event_create(device)
        driver.event_record(device, start, queue)
        driver.event_record(device, end, queue)
        self._handle._started(DeviceCompletion(driver, device, start, end), self._backend, queue)
        self._pending = False
        return self._handle


_SUBMIT = {"merged": backends.submit_merged, "dma_batch": backends.submit_dma_batch, "dma_2d": backends.submit_dma_2d}

_TABLES: dict[tuple[int, int], backends.Tables] = {}
_TABLES_LOCK = threading.Lock()


def _tables(driver: Driver, device: int) -> backends.Tables:
    """One set of staging tables per driver and device."""
    with _TABLES_LOCK:
        key = (id(driver), device)
        found = _TABLES.get(key)
        # The driver is compared too: an id can be reused after its object is gone.
        if found is None or found.driver is not driver:
            found = _TABLES[key] = backends.Tables(driver, device)
        return found


def _as_list(after: Any) -> list[Any]:
    if after is None:
        return []
    return list(after) if isinstance(after, (list, tuple)) else [after]
