"""The CUDA driver, as little of it as copies need, through `ctypes` on `libcuda.so.1`: no torch, toolkit or headers.

Streams, events and addresses are plain integers, so handles of any framework fit. Each call makes the device's primary
context (the one torch uses) current for its duration. Calls release the GIL, as every `ctypes` call does.

`Driver` is the interface; `CudaDriver` implements it here, `agentrt.transfer.simulated.SimulatedDriver` on host memory.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_longlong, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from agentrt.transfer import device_code
from agentrt.transfer.errors import BackendUnavailableError, DriverError
from agentrt.transfer.pool import Ids, Space

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class DeviceInfo:
    """What calibration and dispatch need to know of a device."""

    name: str
    #: Compute capability as one number: 90 for 9.0.
    sm: int
    multiprocessors: int
    #: Newest CUDA version the driver supports, 13000 for 13.0.
    driver_version: int


class Kernel(Protocol):
    """A kernel loaded on a device."""

    spec: device_code.KernelSpec


class Driver(Protocol):
    """What copies need from a device. Addresses, streams and events are integers."""

    #: `cuMemcpyBatchAsync` exists.
    has_batch: bool
    #: Kernels can be launched (False keeps every kernel backend away).
    has_kernels: bool

    def info(self, device: int) -> DeviceInfo:
        """Properties of a device."""

    def allocate(self, nbytes: int, space: Space, device: int) -> int:
        """Device or page-locked memory."""

    def free(self, address: int, space: Space, device: int) -> None:
        """Pairs with `allocate`."""

    def device_alias(self, address: int, device: int) -> int:
        """The address under which a kernel reaches page-locked memory."""

    def stream_create(self, device: int) -> int:
        """A stream of the highest priority that does not synchronise with the default stream."""

    def stream_synchronize(self, device: int, stream: int) -> None:
        """Blocks until the stream is empty."""

    def stream_wait_event(self, device: int, stream: int, event: int) -> None:
        """Later work on the stream runs after the event."""

    def stream_capturing(self, device: int, stream: int) -> bool:
        """True while the stream records a CUDA graph."""

    def event_create(self, device: int) -> int:
        """A timing event."""

    def event_record(self, device: int, event: int, stream: int) -> None:
        """The event completes when all earlier work of the stream has."""

    def event_done(self, device: int, event: int) -> bool:
        """True once complete."""

    def event_wait(self, device: int, event: int) -> None:
        """Blocks until complete."""

    def event_seconds(self, device: int, start: int, end: int) -> float:
        """Time between two completed events."""

    def event_destroy(self, device: int, event: int) -> None:
        """Pairs with `event_create`."""

    def copy(self, device: int, dst: int, src: int, nbytes: int, stream: int) -> None:
        """One asynchronous copy."""

    def copy_many(self, device: int, dsts: Ids, srcs: Ids, sizes: Ids, stream: int) -> None:
        """A loop of `copy`."""

    def copy_batch(self, device: int, dsts: Ids, srcs: Ids, sizes: Ids, stream: int) -> None:
        """Many asynchronous copies in one call."""

    def copy_2d(
        self, device: int, dst: int, dst_pitch: int, src: int, src_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        """`rows` runs of `width` bytes, a pitch apart."""

    def load(self, spec: device_code.KernelSpec, device: int) -> Kernel:
        """Compiles (or finds) a kernel and loads it."""

    def launch(
        self,
        device: int,
        kernel: Kernel,
        grid: int,
        table: int,
        counts: tuple[int, int],
        strides: tuple[int, int],
        stream: int,
    ) -> None:
        """Launches a kernel on a table (see `agentrt.kernels`) of `counts` pairs and buffers."""


class Allocation:
    """Memory of a driver, freed when nobody refers to this object."""

    def __init__(self, driver: Driver, nbytes: int, space: Space, device: int) -> None:
        self.address = driver.allocate(nbytes, space, device)
        self.nbytes = nbytes
        weakref.finalize(self, driver.free, self.address, space, device).atexit = False


class _Location(Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _BatchAttributes(Structure):
    """CUmemcpyAttributes."""

    _fields_ = [("src_access_order", c_int), ("src", _Location), ("dst", _Location), ("flags", c_uint)]


class _Copy2D(Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [
        ("src_x", c_size_t),
        ("src_y", c_size_t),
        ("src_type", c_int),
        ("src_host", c_void_p),
        ("src_device", c_uint64),
        ("src_array", c_void_p),
        ("src_pitch", c_size_t),
        ("dst_x", c_size_t),
        ("dst_y", c_size_t),
        ("dst_type", c_int),
        ("dst_host", c_void_p),
        ("dst_device", c_uint64),
        ("dst_array", c_void_p),
        ("dst_pitch", c_size_t),
        ("width", c_size_t),
        ("height", c_size_t),
    ]


# Values of cuda.h; the tests compile them against the header.
_INVALID_VALUE, _NOT_READY = 1, 600
_SM_COUNT, _SM_MAJOR, _SM_MINOR = 16, 75, 76
_POINTER_DEVICE_ADDRESS = 3
_STREAM_NON_BLOCKING = 1
_HOST_PORTABLE, _HOST_MAPPED = 1, 2
_UNIFIED_MEMORY = 4
_FUNC_DYNAMIC_SHARED = 8
#: Source access orders of a batch.
ORDER_STREAM, ORDER_ANY = 1, 3
FLAG_OVERLAP = 1

_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuCtxGetStreamPriorityRange": [POINTER(c_int), POINTER(c_int)],
    "cuStreamCreateWithPriority": [POINTER(c_void_p), c_uint, c_int],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamWaitEvent": [c_void_p, c_void_p, c_uint],
    "cuStreamIsCapturing": [c_void_p, POINTER(c_int)],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuEventElapsedTime": [POINTER(c_float), c_void_p, c_void_p],
    "cuEventDestroy_v2": [c_void_p],
    "cuMemAlloc_v2": [POINTER(c_uint64), c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemHostAlloc": [POINTER(c_void_p), c_size_t, c_uint],
    "cuMemFreeHost": [c_void_p],
    "cuPointerGetAttribute": [c_void_p, c_int, c_uint64],
    "cuMemcpyAsync": [c_uint64, c_uint64, c_size_t, c_void_p],
    "cuMemcpy2DAsync_v2": [POINTER(_Copy2D), c_void_p],
    "cuModuleLoadData": [POINTER(c_void_p), c_void_p],
    "cuModuleGetFunction": [POINTER(c_void_p), c_void_p, c_char_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
}
_BATCH = [c_void_p, c_void_p, c_void_p, c_size_t, POINTER(_BatchAttributes), POINTER(c_size_t), c_size_t]


@dataclass
class _Loaded:
    spec: device_code.KernelSpec
    function: int
    threads: int
    shared_bytes: int
    scratch_pointers: int


class CudaDriver:
    """`libcuda.so.1`."""

    has_kernels = True

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise BackendUnavailableError(f"no CUDA driver on this machine: {error}") from error
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = c_int
        # CUDA 13 dropped the fail index; a 12.8 or 12.9 driver has only the older form.
        self._batch_v2 = getattr(self._library, "cuMemcpyBatchAsync_v2", None)
        self._batch_v1 = getattr(self._library, "cuMemcpyBatchAsync", None)
        if self._batch_v2 is not None:
            self._batch_v2.argtypes, self._batch_v2.restype = [*_BATCH, c_void_p], c_int
        if self._batch_v1 is not None:
            self._batch_v1.argtypes, self._batch_v1.restype = [*_BATCH, POINTER(c_size_t), c_void_p], c_int
        self._call("cuInit", 0)
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        self.version = version.value
        self.has_batch = (self._batch_v2 is not None or self._batch_v1 is not None) and self.version >= 12080
        self._lock = threading.Lock()
        self._contexts: dict[int, c_void_p] = {}
        self._kernels: dict[tuple[int, device_code.KernelSpec], _Loaded] = {}
        self._batch_order, self._batch_flags = ORDER_STREAM, 0

    def _call(self, name: str, *arguments: Any) -> int:
        code: int = getattr(self._library, name)(*arguments)
        if code not in (0, _NOT_READY):
            raise DriverError(f"{name} failed: {self._error_name(code)}", code)
        return code

    def _error_name(self, code: int) -> str:
        text = c_char_p()
        self._library.cuGetErrorName(code, byref(text))
        return text.value.decode() if text.value else f"error {code}"

    @contextmanager
    def _on(self, device: int) -> Iterator[None]:
        context = self._contexts.get(device)
        if context is None:
            with self._lock:
                context = self._contexts.get(device)
                if context is None:
                    context = c_void_p()
                    handle = c_int()
                    self._call("cuDeviceGet", byref(handle), device)
                    self._call("cuDevicePrimaryCtxRetain", byref(context), handle)
                    self._contexts[device] = context
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(byref(c_void_p()))

    def info(self, device: int) -> DeviceInfo:
        """See `Driver`."""
        handle = c_int()
        self._call("cuDeviceGet", byref(handle), device)
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, 256, handle)

        def attribute(which: int) -> int:
            value = c_int()
            self._call("cuDeviceGetAttribute", byref(value), which, handle)
            return value.value

        sm = 10 * attribute(_SM_MAJOR) + attribute(_SM_MINOR)
        return DeviceInfo(name.value.decode(), sm, attribute(_SM_COUNT), self.version)

    def allocate(self, nbytes: int, space: Space, device: int) -> int:
        """See `Driver`."""
        with self._on(device):
            if space is Space.DEVICE:
                address = c_uint64()
                self._call("cuMemAlloc_v2", byref(address), nbytes)
                return address.value
            pointer = c_void_p()
            self._call("cuMemHostAlloc", byref(pointer), nbytes, _HOST_PORTABLE | _HOST_MAPPED)
            return int(pointer.value or 0)

    def free(self, address: int, space: Space, device: int) -> None:
        """See `Driver`."""
        with self._on(device):
            self._call("cuMemFree_v2" if space is Space.DEVICE else "cuMemFreeHost", address)

    def device_alias(self, address: int, device: int) -> int:
        """See `Driver`. Memory pinned by `cudaHostRegister` may have an address of its own on the device."""
        alias = c_uint64()
        with self._on(device):
            code = self._library.cuPointerGetAttribute(byref(alias), _POINTER_DEVICE_ADDRESS, address)
        if code == _INVALID_VALUE:
            raise BackendUnavailableError(
                f"the device cannot address host memory at {address:#x}: it is not page-locked"
            )
        if code:
            raise DriverError(f"cuPointerGetAttribute failed: {self._error_name(code)}", code)
        return alias.value

    def stream_create(self, device: int) -> int:
        """See `Driver`."""
        with self._on(device):
            least, greatest, stream = c_int(), c_int(), c_void_p()
            self._call("cuCtxGetStreamPriorityRange", byref(least), byref(greatest))
            self._call("cuStreamCreateWithPriority", byref(stream), _STREAM_NON_BLOCKING, greatest.value)
            return int(stream.value or 0)

    def stream_synchronize(self, device: int, stream: int) -> None:
        """See `Driver`."""
        with self._on(device):
            self._call("cuStreamSynchronize", stream)

    def stream_wait_event(self, device: int, stream: int, event: int) -> None:
        """See `Driver`."""
        with self._on(device):
            self._call("cuStreamWaitEvent", stream, event, 0)

    def stream_capturing(self, device: int, stream: int) -> bool:
        """See `Driver`."""
        status = c_int()
        with self._on(device):
            self._call("cuStreamIsCapturing", stream, byref(status))
        return status.value != 0

    def event_create(self, device: int) -> int:
        """See `Driver`."""
        event = c_void_p()
        with self._on(device):
            self._call("cuEventCreate", byref(event), 0)
        return int(event.value or 0)

    def event_record(self, device: int, event: int, stream: int) -> None:
        """See `Driver`."""
        with self._on(device):
            self._call("cuEventRecord", event, stream)

    def event_done(self, device: int, event: int) -> bool:
        """See `Driver`."""
        with self._on(device):
            return self._call("cuEventQuery", event) == 0

    def event_wait(self, device: int, event: int) -> None:
        """See `Driver`."""
        with self._on(device):
            self._call("cuEventSynchronize", event)

    def event_seconds(self, device: int, start: int, end: int) -> float:
        """See `Driver`."""
        milliseconds = c_float()
        with self._on(device):
            self._call("cuEventElapsedTime", byref(milliseconds), start, end)
        return milliseconds.value / 1e3

    def event_destroy(self, device: int, event: int) -> None:
        """See `Driver`. Errors are ignored: this runs in finalizers, and at exit the driver may be gone."""
        with self._on(device):
            self._library.cuEventDestroy_v2(event)

    def copy(self, device: int, dst: int, src: int, nbytes: int, stream: int) -> None:
        """See `Driver`."""
        with self._on(device):
            self._call("cuMemcpyAsync", dst, src, nbytes, stream)

    def copy_many(self, device: int, dsts: Ids, srcs: Ids, sizes: Ids, stream: int) -> None:
        """See `Driver`. One context switch for all."""
        with self._on(device):
            for dst, src, nbytes in zip(dsts.tolist(), srcs.tolist(), sizes.tolist(), strict=True):
                self._call("cuMemcpyAsync", dst, src, nbytes, stream)

    def copy_batch(self, device: int, dsts: Ids, srcs: Ids, sizes: Ids, stream: int) -> None:
        """See `Driver`.

        Sources are read in stream order: `ANY` would let the engine read a block before its writer is done.
        """
        attributes = _BatchAttributes(src_access_order=self._batch_order, flags=self._batch_flags)
        first = c_size_t(0)
        columns = [np.ascontiguousarray(column, np.int64) for column in (dsts, srcs, sizes)]
        common = (*(column.ctypes.data for column in columns), len(sizes), byref(attributes), byref(first), 1)
        with self._on(device):
            if self._batch_v2 is not None:
                self._call("cuMemcpyBatchAsync_v2", *common, stream)
            else:
                self._call("cuMemcpyBatchAsync", *common, byref(c_size_t()), stream)

    def batch_options(self, order: int, flags: int) -> None:
        """Source access order and flags of later batches, for benchmarks."""
        self._batch_order, self._batch_flags = order, flags

    def copy_2d(
        self, device: int, dst: int, dst_pitch: int, src: int, src_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        """See `Driver`."""
        shape = _Copy2D(
            src_type=_UNIFIED_MEMORY,
            src_device=src,
            src_pitch=src_pitch,
            dst_type=_UNIFIED_MEMORY,
            dst_device=dst,
            dst_pitch=dst_pitch,
            width=width,
            height=rows,
        )
        with self._on(device):
            self._call("cuMemcpy2DAsync_v2", byref(shape), stream)

    def load(self, spec: device_code.KernelSpec, device: int) -> Kernel:
        """See `Driver`."""
        key = (device, spec)
        loaded = self._kernels.get(key)
        if loaded is None:
            code = device_code.compile_kernel(spec, self.info(device).sm)
            module, function = c_void_p(), c_void_p()
            with self._on(device):
                self._call("cuModuleLoadData", byref(module), code.cubin)
                self._call("cuModuleGetFunction", byref(function), module, code.entry.encode())
                if code.shared_bytes > 48 << 10:
                    self._call("cuFuncSetAttribute", function, _FUNC_DYNAMIC_SHARED, code.shared_bytes)
            loaded = _Loaded(spec, int(function.value or 0), code.threads, code.shared_bytes, code.scratch_pointers)
            with self._lock:
                loaded = self._kernels.setdefault(key, loaded)
        return loaded

    def launch(
        self,
        device: int,
        kernel: Kernel,
        grid: int,
        table: int,
        counts: tuple[int, int],
        strides: tuple[int, int],
        stream: int,
    ) -> None:
        """See `Driver`."""
        assert isinstance(kernel, _Loaded)  # noqa: S101 - for the type checker
        values: list[Any] = [
            c_uint64(table),
            c_int(counts[0]),
            c_int(counts[1]),
            c_longlong(strides[0]),
            c_longlong(strides[1]),
        ]
        values += [c_uint64(0)] * kernel.scratch_pointers
        pointers = (c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        with self._on(device):
            self._call(
                "cuLaunchKernel",
                kernel.function,
                grid,
                1,
                1,
                kernel.threads,
                1,
                1,
                kernel.shared_bytes,
                stream,
                pointers,
                None,
            )


_default: CudaDriver | None = None
_default_lock = threading.Lock()


def default_driver() -> CudaDriver:
    """The process's driver; raises `BackendUnavailableError` on a machine without one."""
    global _default  # noqa: PLW0603 - one driver per process, made on first use
    with _default_lock:
        if _default is None:
            _default = CudaDriver()
        return _default


def driver_or_reason() -> tuple[CudaDriver | None, str]:
    """The driver, or why there is none."""
    try:
        return default_driver(), ""
    except (BackendUnavailableError, DriverError, AttributeError) as error:
        return None, str(error)
