"""The drivers: one tool call from decision to result, synchronously or in asyncio.

Order of a call: bind the arguments (a private copy when a guard is set) -> guard decides -> claim what was run ahead
-> look up, join or execute -> record labels -> run ahead what is likely next. The guard comes first, so a denied call
is answered neither from the store nor by speculation; it checks again right before execution.

Waiting rules that keep this free of deadlocks: a call made from inside another tool's execution never waits for
another execution; a synchronous call on a thread that runs an event loop never waits at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, Token, copy_context
from typing import TYPE_CHECKING, Any, Protocol

from agentrt.errors import AgentRTError
from agentrt.tools.memo import Flight, Frame, Memo, answer, current_frame
from agentrt.tools.resources import Resource, resource
from agentrt.tools.spec import Call, Scope, ToolSpec, current_scope
from agentrt.tools.speculation import Prediction, Speculator, Ticket
from agentrt.tools.store import Entry, MemoryStore, Store, StoreUnavailableError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GuardProtocol", "SpeculationRefusedError", "ToolRuntime", "current_runtime", "set_default_runtime"]


class SpeculationRefusedError(AgentRTError, RuntimeError):
    """A call run ahead reached a tool with effects; it stops there, before the effect."""


class GuardProtocol(Protocol):
    """What the runtime asks of a guard; :class:`agentrt.safety.Guard` is one."""

    def register(self, spec: ToolSpec) -> None:
        """A tool exists under this name."""

    def seal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A private copy of the arguments, so that nobody changes them after the decision."""

    def authorise(self, call: Call) -> Any:
        """A permit, or an exception that says why not."""

    def redeem(self, permit: Any, call: Call) -> None:
        """Right before execution: raises unless the permit is for exactly this call, now."""

    def would_allow(self, call: Call) -> bool:
        """Whether a call run ahead would be allowed without asking anyone."""

    def result_labels(self, call: Call) -> frozenset[str]:
        """Labels the result carries whoever asks: from the policy and from the resources it reads."""

    def wrote(self, call: Call) -> None:
        """A call with effects is about to run: what it writes takes the writer's labels."""

    def received(self, call: Call, labels: frozenset[str]) -> None:
        """A result with these labels entered the caller's context."""


class _WriteStream:
    """A stream from a tool with effects: the write lasts until the stream is exhausted or dropped."""

    def __init__(self, inner: Iterator[Any], end: Callable[[bool], None]) -> None:
        self._inner = inner
        self._end: Callable[[bool], None] | None = end

    def _finish(self, returned: bool) -> None:
        end, self._end = self._end, None
        if end is not None:
            end(returned)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._inner)
        except BaseException as error:
            self._finish(isinstance(error, StopIteration))
            raise

    def close(self) -> None:
        close = getattr(self._inner, "close", None)
        try:
            if close is not None:
                close()
        finally:
            self._finish(False)

    def __del__(self) -> None:
        self._finish(False)


class _AsyncWriteStream:
    """The same for an asynchronous stream."""

    def __init__(self, inner: AsyncIterator[Any], end: Callable[[bool], None]) -> None:
        self._inner = inner
        self._end: Callable[[bool], None] | None = end

    def _finish(self, returned: bool) -> None:
        end, self._end = self._end, None
        if end is not None:
            end(returned)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._inner.__anext__()
        except BaseException as error:
            self._finish(isinstance(error, StopAsyncIteration))
            raise

    async def aclose(self) -> None:
        close = getattr(self._inner, "aclose", None)
        try:
            if close is not None:
                await close()
        finally:
            self._finish(False)

    def __del__(self) -> None:
        self._finish(False)


def _is_stream(value: Any) -> bool:
    return hasattr(value, "__next__") or hasattr(value, "__anext__")


def _loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _arrival(flight: Flight) -> Entry | None:
    """Waits for a flight that may land on another thread."""
    loop = asyncio.get_running_loop()
    landed: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not landed.done():
            landed.set_result(None)

    def from_anywhere() -> None:
        # A closed loop has nobody left to wake.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(wake)

    flight.on_done(from_anywhere)
    await landed
    return flight.outcome


class ToolRuntime:
    """Memo, speculation and safety around tool calls.

    Args:
        path: A SQLite file shared by processes; None keeps results in this process.
        memo: A ready :class:`Memo`, for options; overrides `path`.
        speculation: True, or a ready :class:`Speculator`.
        guard: Decides which calls run; see :class:`agentrt.safety.Guard`.

    >>> rt = ToolRuntime()
    >>> calls = []
    >>> double = rt.wrap(lambda x: calls.append(x) or 2 * x, name="double", version="1", reads=(), writes=())
    >>> double(4), double(4), calls
    (8, 8, [4])
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        memo: Memo | None = None,
        speculation: bool | Speculator = False,
        guard: GuardProtocol | None = None,
    ) -> None:
        if memo is None:
            store: Store
            if path is None:
                store = MemoryStore()
            else:
                from agentrt.tools.sqlite_store import SqliteStore

                store = SqliteStore(path)
            memo = Memo(store)
        self.memo = memo
        self.guard = guard
        # One clock for ages, durations and think times, so that a store with a virtual clock is virtual throughout.
        self._clock = memo.store.clock
        self.speculator = Speculator() if speculation is True else speculation or None
        self._specs: dict[str, ToolSpec] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    # Surface ----------------------------------------------------------------------------------------------------

    def wrap(self, function: Callable[..., Any], **declarations: Any) -> Callable[..., Any]:
        """A tool one may not edit, wrapped; declarations as for :meth:`ToolSpec.of`."""
        spec = ToolSpec.of(function, **declarations)
        if self.guard is not None:
            self.guard.register(spec)
        return bind_to_runtime(spec, lambda: self)

    @contextlib.contextmanager
    def active(self) -> Iterator[ToolRuntime]:
        """Tools made with :func:`agentrt.tool` use this runtime inside the block."""
        token = _active.set(self)
        try:
            yield self
        finally:
            _active.reset(token)

    def invalidate(self, *resources: str | Resource) -> None:
        """State changed without a tool: forget what read it."""
        write = self.memo.store.begin_write([resource(r) for r in resources])
        self.memo.store.end_write(write, 0.0)

    def end_session(self, caller: Scope) -> None:
        """The session is over: drops what runs ahead for it."""
        if self.speculator is not None:
            self.speculator.end_session(caller)

    def close(self) -> None:
        """Stops what runs ahead and closes the store."""
        for task in list(self._tasks):
            task.cancel()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self.memo.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # One call ---------------------------------------------------------------------------------------------------

    def call(self, spec: ToolSpec, /, *args: Any, **kwargs: Any) -> Any:
        """Runs one synchronous tool call."""
        call, permit = self._enter(spec, args, kwargs)
        began = self._clock()
        if call.writes:
            value = self._write(call, permit)
            self._leave(call, value, began, True)
            return value
        speculator, ticket = self._claim(call)
        if speculator is not None and ticket is not None:
            may_wait = not _loop_running() and current_frame.get() is None
            if ticket.flight.done or may_wait:
                ticket.flight.wait()
                if self._hand_over(speculator, call, permit, ticket, began):
                    self._leave(call, ticket.value, began, False)
                    return ticket.value
            else:
                ticket.cancel()
        attempts = 0
        nested = current_frame.get() is not None or _loop_running()
        while True:
            entry, flight, leads = self.memo.begin(call, may_follow=attempts < 2 and not nested)
            if flight is not None and not leads:
                entry = flight.wait()
                attempts += 1
                if entry is None:
                    continue
            if entry is not None or flight is None:
                return self._answer(call, entry, began)
            value = self._execute(call, permit, flight)
            self._leave(call, value, began, True)
            return value

    async def acall(self, spec: ToolSpec, /, *args: Any, **kwargs: Any) -> Any:
        """Runs one asynchronous tool call; a synchronous tool runs on a thread."""
        if not spec.is_async:
            return await asyncio.to_thread(self.call, spec, *args, **kwargs)
        call, permit = self._enter(spec, args, kwargs)
        began = self._clock()
        if call.writes:
            value = await self._awrite(call, permit)
            self._leave(call, value, began, True)
            return value
        speculator, ticket = self._claim(call)
        if speculator is not None and ticket is not None:
            if ticket.flight.done or current_frame.get() is None:
                await _arrival(ticket.flight)
                if self._hand_over(speculator, call, permit, ticket, began):
                    self._leave(call, ticket.value, began, False)
                    return ticket.value
            else:
                ticket.cancel()
        attempts = 0
        nested = current_frame.get() is not None
        while True:
            entry, flight, leads = self.memo.begin(call, may_follow=attempts < 2 and not nested)
            if flight is not None and not leads:
                entry = await _arrival(flight)
                attempts += 1
                if entry is None:
                    continue
            if entry is not None or flight is None:
                return self._answer(call, entry, began)
            value = await self._aexecute(call, permit, flight)
            self._leave(call, value, began, True)
            return value

    # Pieces -----------------------------------------------------------------------------------------------------

    def _enter(self, spec: ToolSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Any]:
        guard = self.guard
        if guard is not None:
            args, kwargs = guard.seal(args, kwargs)
        call = spec.bind(args, kwargs, current_scope())
        frame = current_frame.get()
        if frame is not None and frame.speculative and call.writes:
            raise SpeculationRefusedError(f"run ahead, and not read-only: {spec.name}")
        if self.speculator is not None and spec.name not in self._specs:
            self._specs[spec.name] = spec
        permit = None
        if guard is not None:
            if frame is not None and frame.speculative and not guard.would_allow(call):
                raise SpeculationRefusedError(f"run ahead, and not allowed without asking: {spec.name}")
            permit = guard.authorise(call)
        if self.speculator is not None and frame is None:
            self.speculator.called(call, self.memo.store.clock())
        return call, permit

    @staticmethod
    def _push(frame: Frame) -> Token[Frame | None]:
        """Makes `frame` the current one; what a call run ahead calls is run ahead too."""
        outer = frame.outer = current_frame.get()
        if outer is not None:
            frame.speculative = outer.speculative
            outer.reading(frame.reads)
        return current_frame.set(frame)

    def _execute(self, call: Call, permit: Any, flight: Flight) -> Any:
        token = self._push(flight.frame)
        began = self._clock()
        try:
            if self.guard is not None:
                self.guard.redeem(permit, call)
            value = call.execute()
        except BaseException as error:
            self._failed(call, flight, error, began)
            raise
        finally:
            current_frame.reset(token)
        self._finished(call, flight, value, began)
        return value

    async def _aexecute(self, call: Call, permit: Any, flight: Flight) -> Any:
        token = self._push(flight.frame)
        began = self._clock()
        try:
            if self.guard is not None:
                self.guard.redeem(permit, call)
            value = await call.execute()
        except BaseException as error:
            self._failed(call, flight, error, began)
            raise
        finally:
            current_frame.reset(token)
        self._finished(call, flight, value, began)
        return value

    def _failed(self, call: Call, flight: Flight, error: BaseException, began: float) -> None:
        self._label(call, flight.frame)
        self.memo.fail(flight, error, self._clock() - began)
        self._absorb(call, flight.frame.reads, flight.frame.labels, flight.frame.keep)

    def _finished(self, call: Call, flight: Flight, value: Any, began: float) -> None:
        self._label(call, flight.frame)
        if _is_stream(value):
            flight.frame.keep = False
        self.memo.finish(flight, value, self._clock() - began)
        # A result that is not kept for any reason (a race, an odd type) must not be kept inside an outer one
        # under fewer reads than it had, so the outer frame takes over all of them.
        keep = flight.frame.keep and flight.epoch is not None and call.spec.cache
        self._absorb(call, flight.frame.reads, flight.frame.labels, keep)

    def _label(self, call: Call, frame: Frame) -> None:
        if self.guard is not None:
            frame.labels.update(self.guard.result_labels(call))

    def _absorb(self, call: Call, reads: Any, labels: Any, keep: bool) -> None:
        frame = current_frame.get()
        if frame is not None:
            frame.absorb(reads, labels, keep)
        if self.guard is not None and not (frame is not None and frame.speculative):
            self.guard.received(call, frozenset(labels))

    def _answer(self, call: Call, entry: Entry | None, began: float) -> Any:
        if entry is None:
            raise RuntimeError("the memo gave neither an entry nor an execution")
        self._absorb(call, entry.reads, entry.labels, True)
        value = answer(call, entry)
        self._leave(call, value, began, False)
        return value

    def _write(self, call: Call, permit: Any) -> Any:
        flight = Flight(call, None, 0.0, None)
        write = self._announce(call, permit)
        token = current_frame.set(flight.frame)
        try:
            value = call.execute()
        except BaseException:
            self._written(call, flight, write, False)
            raise
        finally:
            current_frame.reset(token)
        return self._streamed(call, flight, write, value)

    async def _awrite(self, call: Call, permit: Any) -> Any:
        flight = Flight(call, None, 0.0, None)
        write = self._announce(call, permit)
        token = current_frame.set(flight.frame)
        try:
            value = await call.execute()
        except BaseException:
            self._written(call, flight, write, False)
            raise
        finally:
            current_frame.reset(token)
        return self._streamed(call, flight, write, value)

    def _announce(self, call: Call, permit: Any) -> int:
        if self.speculator is not None:
            self.speculator.claim(call)
        if self.guard is not None:
            self.guard.wrote(call)
        write = self.memo.begin_write(call)
        if self.guard is not None:
            try:
                self.guard.redeem(permit, call)
            except BaseException:
                self.memo.end_write(write, True)
                raise
        return write

    def _streamed(self, call: Call, flight: Flight, write: int, value: Any) -> Any:
        if not _is_stream(value):
            self._written(call, flight, write, True)
            return value
        end = functools.partial(self.memo.end_write, write)
        self._label(call, flight.frame)
        self._absorb(call, (), flight.frame.labels, False)
        return _AsyncWriteStream(value, end) if hasattr(value, "__anext__") else _WriteStream(value, end)

    def _written(self, call: Call, flight: Flight, write: int, returned: bool) -> None:
        self.memo.end_write(write, returned)
        self._label(call, flight.frame)
        self._absorb(call, (), flight.frame.labels, False)

    # Running ahead ----------------------------------------------------------------------------------------------

    def _claim(self, call: Call) -> tuple[Speculator | None, Ticket | None]:
        if self.speculator is None or current_frame.get() is not None:
            return None, None
        return self.speculator, self.speculator.claim(call)

    def _hand_over(self, speculator: Speculator, call: Call, permit: Any, ticket: Ticket, began: float) -> bool:
        """Whether the result run ahead answers this call."""
        flight = ticket.flight
        reads = tuple(flight.frame.reads)
        store = self.memo.store
        try:
            usable = (
                ticket.succeeded
                and flight.epoch is not None
                and not speculator.too_old(ticket, store.clock())
                and store.unchanged(reads, flight.epoch)
            )
        except StoreUnavailableError:
            usable = False
        if not usable:
            speculator.refused(ticket)
            return False
        if self.guard is not None:
            self.guard.redeem(permit, call)
        if call.spec.cache:
            # Only now does it become visible: as an ordinary result, under the epoch it was read at.
            kept = Flight(call, flight.epoch, flight.started_s, None)
            kept.frame = flight.frame
            self.memo.finish(kept, ticket.value, ticket.seconds)
        self._absorb(call, reads, flight.frame.labels, True)
        speculator.committed(ticket, self._clock() - began)
        return True

    def _leave(self, call: Call, value: Any, began: float, executed: bool) -> None:
        speculator = self.speculator
        if speculator is None or current_frame.get() is not None or _is_stream(value):
            return
        now_s = self.memo.store.clock()
        speculator.returned(call, value, self._clock() - began, now_s, executed)
        for prediction in speculator.predict(call.scope):
            self._launch(speculator, call.scope, prediction)

    def _launch(self, speculator: Speculator, caller: Scope, prediction: Prediction) -> None:
        spec = self._specs.get(prediction.tool)
        if spec is None or not spec.speculate or spec.streams:
            return
        arguments: dict[str, Any] = prediction.arguments
        if self.guard is not None:
            _, arguments = self.guard.seal((), arguments)
        try:
            call = spec.bind((), arguments, caller)
        except TypeError:
            return
        if call.writes or call.key is None:
            return
        if self.guard is not None and not self.guard.would_allow(call):
            return
        store = self.memo.store
        try:
            if spec.cache and store.lookup(call.key) is not None:
                return
            epoch = store.start(call.reads)
        except StoreUnavailableError:
            return
        if epoch is None:
            return
        flight = Flight(call, epoch, store.clock(), None)
        flight.frame.speculative = True
        ticket = speculator.reserve(call, flight)
        if ticket is None:
            return
        context = copy_context()
        context.run(current_frame.set, flight.frame)
        if spec.is_async:
            if not _loop_running():
                speculator.claim(call)
                flight.land(None)
                return
            task = context.run(asyncio.get_running_loop().create_task, self._ahead_async(ticket))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            ticket.cancel = task.cancel
        else:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(2, thread_name_prefix="agentrt-ahead")
            future = self._pool.submit(context.run, self._ahead, ticket)

            def cancel() -> None:
                if future.cancel():
                    flight.land(None)

            ticket.cancel = cancel

    def _ahead(self, ticket: Ticket) -> None:
        began = self._clock()
        try:
            value = ticket.flight.call.execute()
            if not _is_stream(value):
                ticket.value = value
        except Exception:  # noqa: BLE001, S110 - a call nobody made fails for nobody; the real one meets its own error
            pass
        finally:
            self._landed(ticket, began)

    async def _ahead_async(self, ticket: Ticket) -> None:
        began = self._clock()
        try:
            ticket.value = await ticket.flight.call.execute()
        except Exception:  # noqa: BLE001, S110 - see _ahead
            pass
        finally:
            self._landed(ticket, began)

    def _landed(self, ticket: Ticket, began: float) -> None:
        ticket.seconds = self._clock() - began
        self._label(ticket.flight.call, ticket.flight.frame)
        ticket.flight.land(None)


_active: ContextVar[ToolRuntime | None] = ContextVar("agentrt_tool_runtime", default=None)
# The process-wide runtime, once there is one.
_default: list[ToolRuntime] = []


def current_runtime() -> ToolRuntime:
    """The innermost active runtime, else the process-wide one (made at first use: in memory, no guard)."""
    active = _active.get()
    if active is not None:
        return active
    if not _default:
        _default.append(ToolRuntime())
    return _default[0]


def set_default_runtime(runtime: ToolRuntime) -> None:
    """Sets the process-wide runtime that tools made with :func:`agentrt.tool` use."""
    _default[:] = [runtime]


def bind_to_runtime(spec: ToolSpec, runtime: Callable[[], ToolRuntime]) -> Callable[..., Any]:
    """A function with the tool's own signature that calls it through a runtime."""
    wrapper: Callable[..., Any]
    if spec.is_async:

        async def call_async(*args: Any, **kwargs: Any) -> Any:
            return await runtime().acall(spec, *args, **kwargs)

        wrapper = call_async
    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            return runtime().call(spec, *args, **kwargs)

        wrapper = call
    functools.update_wrapper(wrapper, spec.function)
    wrapper.__dict__["spec"] = spec
    return wrapper
