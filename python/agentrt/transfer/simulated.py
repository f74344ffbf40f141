"""A device made of host memory: the `Driver` interface with CUDA's ordering rules and no GPU.

For tests, dry runs and engine stand-ins. Streams are queues whose work runs when somebody waits for it, or, in
`paused` mode, only when told to (`run`), so that a test can look at the world between submission and completion.
Faults can be injected at submission and at execution. Kernels are emulated from their tables, so table layout is
exercised too.

Not a performance model: every copy is a `memmove`.
"""

# ruff: noqa: ARG002 - methods take what the interface passes
from __future__ import annotations

import ctypes
import functools
import itertools
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from agentrt.kernels import reference
from agentrt.transfer.driver import DeviceInfo, Kernel
from agentrt.transfer.errors import DriverError

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentrt.transfer.device_code import KernelSpec
    from agentrt.transfer.pool import Ids, Space

_NOT_PERMITTED, _LAUNCH_FAILED, _INVALID_VALUE = 800, 719, 1


@dataclass
class _Stream:
    queue: deque[Callable[[], bool]] = field(default_factory=deque)
    error: DriverError | None = None
    capturing: bool = False


@dataclass
class _Event:
    #: Number of the latest record, and of the latest that has been reached.
    recorded: int = 0
    reached: int = 0
    stream: int = 0
    at: float = 0.0
    error: DriverError | None = None


@dataclass
class _Emulated:
    spec: KernelSpec


class SimulatedDriver:
    """See the module. All public state is for tests to read and set."""

    def __init__(
        self, *, sm: int = 90, has_batch: bool = True, has_kernels: bool = True, name: str = "simulated device"
    ) -> None:
        self.sm = sm
        self.name = name
        self.has_batch = has_batch
        self.has_kernels = has_kernels
        #: Only `run` makes streams progress; waiting for something that has not run raises.
        self.paused = False
        #: Copies and launches to accept before one fails at submission; None: never.
        self.fail_submission_after: int | None = None
        #: Queued operations to execute before one fails; None: never.
        self.fail_execution_after: int | None = None
        #: Names of the calls that moved data, in order, with their descriptor counts.
        self.log: list[tuple[str, int]] = []
        self._memory: dict[int, np.ndarray[tuple[int], np.dtype[np.uint8]]] = {}
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, _Event] = {}
        self._ids = itertools.count(0x1000)
        self._lock = threading.RLock()

    # ---- memory ------------------------------------------------------------------------------------------------------

    def info(self, device: int) -> DeviceInfo:
        """See `Driver`."""
        return DeviceInfo(self.name, self.sm, 4, 13000)

    def allocate(self, nbytes: int, space: Space, device: int) -> int:
        """See `Driver`."""
        memory = np.zeros(nbytes + 256, np.uint8)
        address = -(-memory.ctypes.data // 256) * 256
        with self._lock:
            self._memory[address] = memory
        return address

    def free(self, address: int, space: Space, device: int) -> None:
        """See `Driver`."""
        with self._lock:
            self._memory.pop(address, None)

    def device_alias(self, address: int, device: int) -> int:
        """See `Driver`."""
        return address

    # ---- streams and events ------------------------------------------------------------------------------------------

    def stream_create(self, device: int) -> int:
        """See `Driver`."""
        with self._lock:
            handle = next(self._ids)
            self._streams[handle] = _Stream()
            return handle

    def _stream(self, stream: int) -> _Stream:
        # Stream 0 is the default stream, which exists without being created.
        return self._streams.setdefault(stream, _Stream())

    def run(self, stream: int, steps: int | None = None) -> int:
        """Executes up to `steps` queued operations of a stream (all of them by default), as far as its waits allow."""
        with self._lock:
            state = self._stream(stream)
            done = 0
            while state.queue and (steps is None or done < steps):
                try:
                    if state.error is None and not state.queue[0]():
                        break
                except DriverError as error:
                    # As on a device, the stream keeps reporting its first error.
                    state.error = error
                if state.error is not None:
                    self._fail_rest(state)
                    break
                state.queue.popleft()
                done += 1
            return done

    def _fail_rest(self, state: _Stream) -> None:
        for event in self._events.values():
            if self._streams.get(event.stream) is state and event.reached < event.recorded:
                event.error = state.error
        state.queue.clear()

    def _progress(self, stream: int) -> None:
        if self.paused:
            return
        self.run(stream)
        # A wait on another stream's event: let every stream move until nothing does.
        while self._stream(stream).queue and any(self.run(other) for other in list(self._streams)):
            pass

    def stream_synchronize(self, device: int, stream: int) -> None:
        """See `Driver`."""
        with self._lock:
            if self.paused:
                self.run(stream)
            self._progress(stream)
            error = self._stream(stream).error
            if error is not None:
                raise error

    def stream_wait_event(self, device: int, stream: int, event: int) -> None:
        """See `Driver`."""
        with self._lock:
            state = self._events[event]
            target = state.recorded
            self._stream(stream).queue.append(lambda: state.reached >= target or state.error is not None)

    def stream_capturing(self, device: int, stream: int) -> bool:
        """See `Driver`."""
        return self._stream(stream).capturing

    def event_create(self, device: int) -> int:
        """See `Driver`."""
        with self._lock:
            handle = next(self._ids)
            self._events[handle] = _Event()
            return handle

    def event_record(self, device: int, event: int, stream: int) -> None:
        """See `Driver`."""
        with self._lock:
            state = self._events[event]
            state.recorded += 1
            state.stream = stream
            number = state.recorded

            def reach() -> bool:
                state.reached = max(state.reached, number)
                state.at = time.perf_counter()
                return True

            self._stream(stream).queue.append(reach)

    def event_done(self, device: int, event: int) -> bool:
        """See `Driver`."""
        with self._lock:
            state = self._events[event]
            if state.reached < state.recorded:
                self._progress(state.stream)
            if state.error is not None:
                raise state.error
            return state.reached >= state.recorded

    def event_wait(self, device: int, event: int) -> None:
        """See `Driver`. In `paused` mode an event that cannot be reached is an error; a device would block for ever."""
        with self._lock:
            state = self._events[event]
            if self.paused:
                self.run(state.stream)
            if not self.event_done(device, event):
                raise DriverError("simulated stream is blocked for ever", _NOT_PERMITTED)

    def event_seconds(self, device: int, start: int, end: int) -> float:
        """See `Driver`."""
        return max(self._events[end].at - self._events[start].at, 1e-9)

    def event_destroy(self, device: int, event: int) -> None:
        """See `Driver`."""
        with self._lock:
            self._events.pop(event, None)

    # ---- work --------------------------------------------------------------------------------------------------------

    def _submit(self, name: str, count: int, stream: int, works: list[Callable[[], None]]) -> None:
        with self._lock:
            state = self._stream(stream)
            if state.error is not None:
                raise state.error
            for work in works:
                if self.fail_submission_after is not None:
                    if self.fail_submission_after <= 0:
                        raise DriverError(f"simulated failure of {name}", _INVALID_VALUE)
                    self.fail_submission_after -= 1

                def step(work: Callable[[], None] = work) -> bool:
                    if self.fail_execution_after is not None:
                        if self.fail_execution_after <= 0:
                            raise DriverError(f"simulated failure while {name} ran", _LAUNCH_FAILED)
                        self.fail_execution_after -= 1
                    work()
                    return True

                state.queue.append(step)
            self.log.append((name, count))

    def copy(self, device: int, dst: int, src: int, nbytes: int, stream: int) -> None:
        """See `Driver`."""
        self._submit("copy", 1, stream, [lambda: _move(dst, src, nbytes)])

    def copy_many(self, device: int, dsts: Ids, srcs: Ids, sizes: Ids, stream: int) -> None:
        """See `Driver`."""
        self._submit("copy_many", len(sizes), stream, _moves(dsts, srcs, sizes))

    def copy_batch(self, device: int, dsts: Ids, srcs: Ids, sizes: Ids, stream: int) -> None:
        """See `Driver`. Like the real one it refuses the default stream and captures, and keeps no order within."""
        if stream == 0 or self._stream(stream).capturing:
            raise DriverError("batched copies need a stream of their own", _INVALID_VALUE)
        self._submit("copy_batch", len(sizes), stream, _moves(dsts, srcs, sizes)[::-1])

    def copy_2d(
        self, device: int, dst: int, dst_pitch: int, src: int, src_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        """See `Driver`."""
        if width > min(dst_pitch, src_pitch):
            raise DriverError("pitch is shorter than a row", _INVALID_VALUE)

        def work() -> None:
            for row in range(rows):
                _move(dst + row * dst_pitch, src + row * src_pitch, width)

        self._submit("copy_2d", rows, stream, [work])

    def load(self, spec: KernelSpec, device: int) -> Kernel:
        """See `Driver`. Nothing is compiled."""
        return _Emulated(spec)

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
        if grid <= 0:
            raise DriverError("empty grid", _INVALID_VALUE)
        self._submit(kernel.spec.kind, counts[0], stream, [lambda: _emulate(kernel.spec, table, counts, strides)])


def _move(dst: int, src: int, nbytes: int) -> None:
    ctypes.memmove(dst, src, nbytes)


def _moves(dsts: Ids, srcs: Ids, sizes: Ids) -> list[Callable[[], None]]:
    rows = zip(dsts.tolist(), srcs.tolist(), sizes.tolist(), strict=True)
    return [functools.partial(_move, dst, src, nbytes) for dst, src, nbytes in rows]


def _emulate(spec: KernelSpec, table: int, counts: tuple[int, int], strides: tuple[int, int]) -> None:
    n_pairs, n_buffers = counts
    words = np.ctypeslib.as_array((ctypes.c_int64 * (2 * n_pairs + 2 * n_buffers)).from_address(table))
    options = spec.options
    for buffer in range(n_buffers):
        src_base, dst_base = int(words[2 * n_pairs + buffer]), int(words[2 * n_pairs + n_buffers + buffer])
        for pair in range(n_pairs):
            src_block, dst_block = int(words[2 * pair]), int(words[2 * pair + 1])
            if src_block < 0 or dst_block < 0:
                continue
            src, dst = src_base + src_block * strides[0], dst_base + dst_block * strides[1]
            if spec.kind in ("kv_copy", "kv_copy_bulk"):
                _move(dst, src, int(options["NBYTES" if spec.kind == "kv_copy" else "BLOCK"]))
                continue
            rows, row, dtype = int(options["ROWS"]), int(options["ROW"]), str(options["TYPE"])
            plain, encoded = rows * row * (4 if dtype == "float32" else 2), rows * (row + 4)
            encode = spec.kind == "kv_encode_int8"
            data = np.ctypeslib.as_array((ctypes.c_uint8 * (plain if encode else encoded)).from_address(src)).copy()
            result = (reference.encode_int8 if encode else reference.decode_int8)(data, row, dtype)
            _move(dst, result.ctypes.data, result.size)
