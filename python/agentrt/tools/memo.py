"""`tool_memo`: reuse a result, join an execution in flight, or execute and keep.

:class:`Memo` decides; it never runs a tool and never waits. A driver (:mod:`agentrt.tools.runtime`) asks
:meth:`Memo.begin`, does what it is told and reports back with :meth:`Memo.finish` or :meth:`Memo.fail`. Each step is
atomic, so the steps can be interleaved one by one: that is what the model check in the tests does.

Invariants: only calls that write nothing are reused; an answer obeys the rules of :mod:`agentrt.tools.store`; at most
one registered execution per key, and a failed or cancelled one hands over (its followers begin again, one of them
leads); nothing crosses a trust domain, because the domain is part of the key.

Nested calls: a tool that calls tools depends on what they read and has the effects they have. A :class:`Frame`
collects both, so that an outer result is invalidated by what its inner calls read, and is not kept if an inner call
wrote.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from random import Random
from typing import Any

from agentrt.tools.canonical import canonical_text, decode, encode
from agentrt.tools.resources import Resource
from agentrt.tools.spec import Call
from agentrt.tools.store import Entry, Store, StoreUnavailableError

__all__ = ["Flight", "Frame", "Memo", "MemoStats", "current_frame"]


@dataclass(slots=True, eq=False)
class Frame:
    """One execution in progress, as seen by the calls it makes."""

    reads: set[Resource]
    labels: set[str] = field(default_factory=set)
    keep: bool = True
    """False once something happened that makes the result not reusable."""
    speculative: bool = False
    outer: Frame | None = None

    def reading(self, reads: Iterable[Resource]) -> None:
        """An inner call is about to read these.

        Recorded before it does, and in every execution around it: whoever joins one of those meanwhile must see what
        it may already have read.
        """
        frame: Frame | None = self
        while frame is not None:
            frame.reads.update(reads)
            frame = frame.outer

    def absorb(self, reads: Iterable[Resource], labels: Iterable[str], keep: bool) -> None:
        """Takes over what an inner call read and carries."""
        self.reading(reads)
        self.labels.update(labels)
        self.keep = self.keep and keep


current_frame: ContextVar[Frame | None] = ContextVar("agentrt_tool_frame", default=None)


class Flight:
    """An execution in progress; followers wait for its outcome."""

    __slots__ = ("_lock", "_waiters", "call", "check", "done", "epoch", "frame", "outcome", "registered", "started_s")

    def __init__(self, call: Call, epoch: int | None, started_s: float, check: Entry | None) -> None:
        self.call = call
        self.epoch = epoch
        self.started_s = started_s
        self.check = check
        """The entry that this execution verifies."""
        self.frame = Frame(set(call.reads), set(call.spec.labels))
        self.registered = False
        self.done = False
        self.outcome: Entry | None = None
        """What followers get; None after a failure, or for a result without an exact form."""
        self._lock = threading.Lock()
        self._waiters: list[Callable[[], None]] = []

    def on_done(self, wake: Callable[[], None]) -> None:
        """Calls `wake` once the outcome is there, at once if it already is."""
        with self._lock:
            if not self.done:
                self._waiters.append(wake)
                return
        wake()

    def land(self, outcome: Entry | None) -> None:
        """Sets the outcome and wakes the followers."""
        with self._lock:
            self.outcome = outcome
            self.done = True
            waiters, self._waiters = self._waiters, []
        for wake in waiters:
            wake()

    def wait(self) -> Entry | None:
        """Blocks the thread until the outcome is there."""
        event = threading.Event()
        self.on_done(event.set)
        event.wait()
        return self.outcome


@dataclass(slots=True)
class MemoStats:
    """Counters of one memo since it was made."""

    hits: int = 0
    joined: int = 0
    executed: int = 0
    kept: int = 0
    raced: int = 0
    """Results not kept because a write came between."""
    writes: int = 0
    checks: int = 0
    differences: int = 0
    saved_s: float = 0.0
    store_errors: int = 0


class Memo:
    """The decisions of `tool_memo`. Thread-safe.

    Args:
        store: Where results and epochs live.
        verify_rate: Share of would-be hits that are executed all the same and compared.
        probation: This many first would-be hits of each tool are all verified.
        off_below_s: A tool whose answers differ after less than twice this age is switched off.
        settle_s: How long a write that failed or was cancelled may still take effect.
        max_entry_bytes: Larger results are not kept.
        seed: Of the sampling.
    """

    def __init__(
        self,
        store: Store,
        *,
        verify_rate: float = 0.01,
        probation: int = 0,
        off_below_s: float = 1.0,
        settle_s: float = 5.0,
        max_entry_bytes: int = 4 << 20,
        seed: int = 0,
    ) -> None:
        self.store = store
        self.stats = MemoStats()
        self._verify_rate = verify_rate
        self._probation = probation
        self._off_below_s = off_below_s
        self._settle_s = settle_s
        self._max_entry_bytes = max_entry_bytes
        self._random = Random(seed)  # noqa: S311 - samples, guards nothing
        self._lock = threading.Lock()
        self._flights: dict[bytes, Flight] = {}
        self._agreed: dict[str, int] = {}
        self._off: set[str] = set()

    # Reads ------------------------------------------------------------------------------------------------------

    def begin(self, call: Call, may_follow: bool = True) -> tuple[Entry | None, Flight | None, bool]:
        """What to do with a call that writes nothing: ``(entry, flight, leads)``.

        An entry: answer with it. A flight that one leads: execute, then :meth:`finish` or :meth:`fail`. A flight
        that one does not lead: wait for its outcome; if that is None, begin again.
        """
        key, store = call.key, self.store
        if key is None or not call.spec.cache or call.spec.streams or call.spec.name in self._off:
            return None, self._lead(call, None, None, None), True
        try:
            entry = store.lookup(key)
            if entry is not None:
                if not self._to_verify(call.spec.name):
                    self.stats.hits += 1
                    self.stats.saved_s += entry.seconds
                    return entry, None, False
                return None, self._lead(call, store.start(call.reads), entry, None), True
            with self._lock:
                flight = self._flights.get(key)
                if flight is not None and may_follow and self._may_join(flight):
                    self.stats.joined += 1
                    return None, flight, False
                return None, self._lead(call, store.start(call.reads), None, key), True
        except StoreUnavailableError:
            self.stats.store_errors += 1
            return None, self._lead(call, None, None, None), True

    def _may_join(self, flight: Flight) -> bool:
        """Whether that execution's answer is one the caller could have got itself."""
        return flight.epoch is not None and self.store.unchanged(tuple(flight.frame.reads), flight.epoch)

    def _lead(self, call: Call, epoch: int | None, check: Entry | None, register: bytes | None) -> Flight:
        flight = Flight(call, epoch, self.store.clock(), check)
        if register is not None and epoch is not None:
            # A newer execution takes the place of an older one that can no longer be joined.
            self._flights[register] = flight
            flight.registered = True
        self.stats.executed += 1
        return flight

    def _to_verify(self, tool: str) -> bool:
        if self._agreed.get(tool, 0) < self._probation:
            return True
        return self._verify_rate > 0 and self._random.random() < self._verify_rate

    def finish(self, flight: Flight, value: Any, seconds: float) -> None:
        """The execution returned `value`."""
        data = encode(value) if flight.epoch is not None and flight.frame.keep else None
        self._settle(flight, data, None, seconds)

    def fail(self, flight: Flight, error: BaseException, seconds: float) -> None:
        """The execution raised; followers begin again unless the tool says this exception is an answer."""
        name = None
        data = None
        if flight.epoch is not None and flight.frame.keep and type(error) in flight.call.spec.cache_errors:
            name = _class_name(type(error))
            data = encode(list(error.args))
        self._settle(flight, data, name, seconds)

    def _settle(self, flight: Flight, data: bytes | None, error: str | None, seconds: float) -> None:
        outcome: Entry | None = None
        try:
            if data is not None and flight.epoch is not None and flight.call.key is not None:
                entry = self._entry(flight, flight.epoch, data, error, seconds)
                if flight.check is not None:
                    self._verify(flight, flight.check, entry)
                if len(data) <= self._max_entry_bytes and self.store.commit(flight.call.key, entry):
                    self.stats.kept += 1
                else:
                    self.stats.raced += 1
                # Followers joined while the answer was theirs too, whether or not it may be kept.
                outcome = entry
        except StoreUnavailableError:
            self.stats.store_errors += 1
        finally:
            if flight.registered:
                key = flight.call.key
                with self._lock:
                    if key is not None and self._flights.get(key) is flight:
                        del self._flights[key]
            flight.land(outcome)

    def _entry(self, flight: Flight, epoch: int, data: bytes, error: str | None, seconds: float) -> Entry:
        spec = flight.call.spec
        return Entry(
            tool=spec.name,
            data=data,
            error=error,
            reads=tuple(flight.frame.reads),
            epoch=epoch,
            created_s=flight.started_s,
            seconds=seconds,
            ttl_s=spec.ttl_s,
            labels=frozenset(flight.frame.labels),
        )

    def _verify(self, flight: Flight, kept: Entry, fresh: Entry) -> None:
        """Learns from one answer that was known and executed all the same."""
        if not self.store.unchanged(kept.reads, kept.epoch):
            return
        tool = flight.call.spec.name
        self.stats.checks += 1
        if _same(kept, fresh):
            self._agreed[tool] = self._agreed.get(tool, 0) + 1
            return
        self.stats.differences += 1
        lifetime_s = (flight.started_s - kept.created_s) / 2
        if lifetime_s < self._off_below_s:
            lifetime_s = 0.0
            self._off.add(tool)
        self.store.shorten(tool, lifetime_s)
        self.store.discard_tool(tool)

    def is_off(self, tool: str) -> bool:
        """Whether a tool was switched off because its answers differ."""
        return tool in self._off or self.store.lifetime_s(tool) <= 0.0

    # Writes -----------------------------------------------------------------------------------------------------

    def begin_write(self, call: Call) -> int:
        """Announces a call with effects, before it runs.

        Raises :class:`StoreUnavailableError`: running it unannounced would leave others with stale answers.
        """
        self.stats.writes += 1
        return self.store.begin_write(call.writes)

    def end_write(self, write: int, returned: bool) -> None:
        """Ends it. One that did not return may still land, so it stays in flight for `settle_s`."""
        try:
            self.store.end_write(write, 0.0 if returned else self._settle_s)
        except StoreUnavailableError:
            # The write stays in flight in the store: nothing it touches is reused. Safe, and counted.
            self.stats.store_errors += 1


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _same(a: Entry, b: Entry) -> bool:
    if a.error != b.error:
        return False
    return a.data == b.data or canonical_text(decode(a.data)) == canonical_text(decode(b.data))


def answer(call: Call, entry: Entry) -> Any:
    """The value of an entry, or its exception raised afresh."""
    if entry.error is None:
        return decode(entry.data)
    for kind in call.spec.cache_errors:
        if _class_name(kind) == entry.error:
            raise kind(*decode(entry.data))
    raise RuntimeError(f"{entry.tool} no longer declares this exception: {entry.error}")
