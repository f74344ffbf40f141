"""Handles of running copies: events, pins and what a failure leaves behind.

A handle is complete once its event is. Whoever looks first (`done`, `wait`, or a pool asked for `in_flight`) settles
it: the pins go, and after a failure the destination blocks are torn. Until then this module holds a reference, so the
memory of a running copy outlives every other reference to it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, Protocol

from agentrt.transfer.errors import CopyFaultError, TransferError
from agentrt.transfer.pool import LEDGER, BlockPool, Ids, Pin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agentrt.transfer.driver import Driver

_RUNNING: set[CopyHandle] = set()


class Completion(Protocol):
    """How a handle learns that its copy is over."""

    def done(self) -> bool:
        """True once complete. Raises what the copy failed with."""

    def wait(self, timeout: float | None) -> bool:
        """Blocks until complete, or returns False after `timeout` seconds. Raises what the copy failed with."""

    def seconds(self) -> float:
        """Time from the first to the last byte, once complete."""


class HostStream:
    """A queue of host copies on one worker thread: the stand-in for a CUDA stream on a machine without a GPU."""

    def __init__(self, name: str = "agentrt-copy") -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    def submit(self, work: Callable[[], float]) -> Future[float]:
        """Queues work that returns the seconds it took."""
        return self._pool.submit(work)

    def synchronize(self) -> None:
        """Blocks until everything queued so far has run."""
        self._pool.submit(lambda: None).result()


class HostCompletion:
    """Completion of a copy on a `HostStream`."""

    def __init__(self, future: Future[float]) -> None:
        self.future = future

    def done(self) -> bool:
        """See `Completion`."""
        return self.future.done() and self.future.result() >= 0

    def wait(self, timeout: float | None) -> bool:
        """See `Completion`."""
        try:
            self.future.result(timeout)
        except FutureTimeout:
            if self.future.done():
                raise
            return False
        return True

    def seconds(self) -> float:
        """See `Completion`."""
        return self.future.result()


class Instant:
    """Completion of a copy that was over before its handle existed."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def done(self) -> bool:
        """See `Completion`."""
        return True

    def wait(self, timeout: float | None) -> bool:  # noqa: ARG002 - the interface
        """See `Completion`."""
        return True

    def seconds(self) -> float:
        """See `Completion`."""
        return self._seconds


class DeviceCompletion:
    """Completion of a copy on a CUDA stream: two events around it."""

    def __init__(self, driver: Driver, device: int, start: int, end: int) -> None:
        self.driver = driver
        self.device = device
        self.start = start
        self.end = end

    def done(self) -> bool:
        """See `Completion`."""
        return self.driver.event_done(self.device, self.end)

    def wait(self, timeout: float | None) -> bool:
        """See `Completion`."""
        if timeout is None:
            self.driver.event_wait(self.device, self.end)
            return True
        deadline = time.monotonic() + timeout
        while not self.done():
            if time.monotonic() >= deadline:
                return False
            time.sleep(20e-6)
        return True

    def seconds(self) -> float:
        """See `Completion`."""
        return self.driver.event_seconds(self.device, self.start, self.end)

    def __del__(self) -> None:
        # Destroying an event that is still pending is allowed: the driver frees it when it completes.
        # At interpreter exit the driver may be gone already.
        with contextlib.suppress(Exception):
            for event in (self.start, self.end):
                self.driver.event_destroy(self.device, event)


class CopyHandle:
    """One running or finished copy."""

    def __init__(
        self,
        src: BlockPool,
        dst: BlockPool,
        src_blocks: Ids,
        dst_blocks: Ids,
        buffers: Ids,
        layers: Sequence[int],
        copied_bytes: int,
    ) -> None:
        self.src = src
        self.dst = dst
        #: Layers the copy covers.
        self.layers = tuple(layers)
        #: Bytes that arrive in the destination.
        self.bytes = copied_bytes
        #: Backend that was chosen.
        self.backend = ""
        #: What the stream was ordered behind.
        self.stream: object = None
        self._whole = len(buffers) == len(dst.bases)
        self._dst_blocks = dst_blocks
        self._pins: tuple[tuple[BlockPool, Pin], ...] = (
            (src, Pin(self, src_blocks, buffers, False)),
            (dst, Pin(self, dst_blocks, buffers, True)),
        )
        self._completion: Completion | None = None
        self._error: CopyFaultError | None = None
        self._settled = threading.Event()

    # The plan calls these three; users do not.

    def _pin(self) -> None:
        """Call with the ledger held."""
        for pool, pin in self._pins:
            pool._pins.append(pin)
        _RUNNING.add(self)

    def _started(self, completion: Completion, backend: str, stream: object) -> None:
        self.backend = backend
        self.stream = stream
        self._completion = completion

    def _settle(self, error: BaseException | None) -> None:
        with LEDGER:
            if self._settled.is_set():
                return
            for pool, pin in self._pins:
                pool._pins = [held for held in pool._pins if held is not pin]
            # The handle may outlive the pools' interest in it; without this it would keep itself alive until collected.
            self._pins = ()
            if error is not None:
                ids = self._dst_blocks.tolist()
                self.dst._torn.update(ids)
                self._error = CopyFaultError(
                    f"copy failed, its {len(ids)} destination blocks are undefined: {error}", ids
                )
                self._error.__cause__ = error
            elif self._whole and self.dst._torn:
                self.dst._torn.difference_update(self._dst_blocks.tolist())
            _RUNNING.discard(self)
            self._settled.set()

    def poll(self) -> bool:
        """Like `done`, but a failed copy is just over: nothing is raised."""
        if self._settled.is_set():
            return True
        if self._completion is None:
            return False
        try:
            if self._completion.done():
                self._settle(None)
        except Exception as error:  # noqa: BLE001 - kept, and raised as CopyFaultError
            self._settle(error)
        return self._settled.is_set()

    def done(self) -> bool:
        """True once every byte has arrived. Raises `CopyFaultError` if the copy failed."""
        over = self.poll()
        if self._error is not None:
            raise self._error
        return over

    @property
    def event(self) -> int | Future[float] | None:
        """The CUDA event's handle, the future of a copy on a `HostStream`, or None for a copy that ran at once."""
        if isinstance(self._completion, DeviceCompletion):
            return self._completion.end
        return self._completion.future if isinstance(self._completion, HostCompletion) else None

    def wait(self, stream: Any = None, *, timeout: float | None = None) -> bool:
        """Without a stream: blocks until the copy is complete and returns True, or False after `timeout` seconds.

        With a CUDA stream: returns at once, and work put on that stream later runs after the copy.
        """
        if self._completion is None:
            raise TransferError("copy was never started")
        if stream is not None and isinstance(self._completion, DeviceCompletion):
            completion = self._completion
            completion.driver.stream_wait_event(completion.device, stream_handle(stream), completion.end)
            return True
        if not self._settled.is_set():
            try:
                if not self._completion.wait(timeout):
                    return False
                self._settle(None)
            except Exception as error:  # noqa: BLE001 - kept, and raised as CopyFaultError
                self._settle(error)
        if self._error is not None:
            raise self._error
        return True

    @property
    def seconds(self) -> float:
        """Duration of the copy on its stream; waits for it."""
        self.wait()
        assert self._completion is not None  # noqa: S101 - for the type checker
        return self._completion.seconds()

    @property
    def gb_per_s(self) -> float:
        """Bytes that arrived per second, in 1e9; waits for the copy."""
        seconds = self.seconds
        return self.bytes / seconds / 1e9 if seconds > 0 else 0.0

    def __repr__(self) -> str:
        state = "failed" if self._error else "done" if self._settled.is_set() else "running"
        return f"CopyHandle({state}, backend={self.backend!r}, bytes={self.bytes}, layers={len(self.layers)})"


def stream_handle(stream: Any) -> int:
    """The CUDA handle of an int, a torch stream, or anything with `__cuda_stream__`."""
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    raise TypeError(
        f"not a CUDA stream (an int, a torch stream, or an object with __cuda_stream__): {type(stream).__name__}"
    )


def event_handle(event: Any) -> int:
    """The CUDA handle of an int or a torch event."""
    handle = event if isinstance(event, int) else getattr(event, "cuda_event", None)
    if not isinstance(handle, int):
        raise TypeError(f"not a CUDA event (an int, or a torch event): {type(event).__name__}")
    if handle == 0:
        raise TransferError("the event has not been recorded yet: call event.record(stream) first")
    return handle
