"""Where results wait: entries, and the epochs that say whether they are still true.

A store keeps a **clock** that each write advances, and per resource the clock value of its last write. An entry
carries the clock value read *before* its execution began. The rules, which every store applies atomically:

1. A write is announced before its tool runs: clock + 1, stamped on the written resources, and the write is *in
   flight* until it ends. From that moment nothing that read those resources is answered from the store.
2. A read that starts while a conflicting write is in flight has no epoch (`start` returns None) and is not kept:
   it may have seen the state before or after.
3. A result is kept only if no conflicting write has begun since the read started, and none is in flight (`commit`).
4. An entry answers only if the same still holds (`lookup`), and a caller joins an execution in flight only if the
   same holds for that execution (`unchanged`): its answer is then one the caller could have got itself.
5. A write that did not return normally may still land (a timed-out request, a cancelled task, a killed process):
   it stays in flight for `settle_s` longer.

So an answer from the store equals what an execution at the moment of the look-up would have returned, provided the
declared reads and writes are true. `tests/tools/model.py` checks exactly these rules by interleaving, and shows
that each of them is needed.

Bounds: entries by `max_bytes` (evicted by seconds saved per byte, GreedyDual-Size-Frequency), stamped resources by
`max_resources` (the older half is folded into one stamp on everything: safe, some entries are lost).
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from agentrt.errors import AgentRTError
from agentrt.tools.resources import Resource, conflicts

__all__ = ["Entry", "MemoryStore", "Store", "StoreUnavailableError"]

# Bytes of bookkeeping per entry (key, reads, labels, heap slot), counted against the bound.
ENTRY_OVERHEAD_BYTES = 400


class StoreUnavailableError(AgentRTError, RuntimeError):
    """The store cannot record what it must; the message names the remedy."""


@dataclass(slots=True)
class Entry:
    """One kept result."""

    tool: str
    data: bytes
    error: str | None
    """Name of the declared exception class when an exception was kept, else None."""
    reads: tuple[Resource, ...]
    epoch: int
    created_s: float
    seconds: float
    """What the execution took, and so what a hit saves."""
    ttl_s: float
    labels: frozenset[str]

    @property
    def size_bytes(self) -> int:
        """Bytes that this entry counts for."""
        return len(self.data) + ENTRY_OVERHEAD_BYTES


class Store(Protocol):
    """What :class:`agentrt.tools.memo.Memo` needs of a store. Each method is atomic."""

    clock: Callable[[], float]

    def start(self, reads: Sequence[Resource]) -> int | None:
        """The epoch of a read that begins now; None where its result must not be kept."""

    def unchanged(self, reads: Sequence[Resource], epoch: int) -> bool:
        """Whether no conflicting write began since `epoch` and none is in flight."""

    def lookup(self, key: bytes) -> Entry | None:
        """The entry of `key` if it is still true."""

    def commit(self, key: bytes, entry: Entry) -> bool:
        """Keeps `entry` if nothing it read has changed since its epoch."""

    def begin_write(self, writes: Sequence[Resource]) -> int:
        """Announces a write; raises :class:`StoreUnavailableError` where that cannot be recorded."""

    def end_write(self, write: int, settle_s: float) -> None:
        """Ends a write; with `settle_s` > 0 it stays in flight that much longer."""

    def discard(self, key: bytes) -> None:
        """Forgets one entry."""

    def discard_tool(self, tool: str) -> None:
        """Forgets every entry of a tool."""

    def lifetime_s(self, tool: str) -> float:
        """The learned lifetime of a tool's results; infinite until a difference was seen."""

    def shorten(self, tool: str, seconds: float) -> None:
        """Lowers the learned lifetime of a tool."""

    def close(self) -> None:
        """Releases what the store holds."""

    def size_bytes(self) -> int:
        """Bytes that the entries count for."""


class MemoryStore:
    """The store of one process. All operations take one lock for a few microseconds."""

    def __init__(
        self,
        max_bytes: int = 64 << 20,
        max_resources: int = 65_536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._max_bytes = max_bytes
        self._max_resources = max_resources
        self._lock = threading.Lock()
        self._now = 0
        # Per resource: clock of the last write to exactly it, and to it or anything below it.
        self._stamps: dict[Resource, list[int]] = {(): [0, 0]}
        self._in_flight: dict[int, tuple[tuple[Resource, ...], float | None]] = {}
        self._write_ids = itertools.count(1)
        self._entries: dict[bytes, Entry] = {}
        self._priority: dict[bytes, float] = {}
        self._heap: list[tuple[float, int, bytes]] = []
        self._order = itertools.count()
        self._inflation = 0.0
        self._bytes = 0
        self._lifetimes: dict[str, float] = {}

    # The two questions everything rests on; the caller holds the lock.

    def _changed_since(self, reads: Sequence[Resource], epoch: int) -> bool:
        stamps = self._stamps
        for read in reads:
            for n in range(len(read)):
                stamp = stamps.get(read[:n])
                if stamp is not None and stamp[0] > epoch:
                    return True
            stamp = stamps.get(read)
            if stamp is not None and stamp[1] > epoch:
                return True
        return False

    def _write_in_flight(self, reads: Sequence[Resource]) -> bool:
        if not self._in_flight:
            return False
        now = self.clock()
        for write, (writes, until) in list(self._in_flight.items()):
            if until is not None and until <= now:
                del self._in_flight[write]
            elif any(conflicts(w, r) for w in writes for r in reads):
                return True
        return False

    def start(self, reads: Sequence[Resource]) -> int | None:
        """See :meth:`Store.start`."""
        with self._lock:
            return None if self._write_in_flight(reads) else self._now

    def unchanged(self, reads: Sequence[Resource], epoch: int) -> bool:
        """See :meth:`Store.unchanged`."""
        with self._lock:
            return not (self._changed_since(reads, epoch) or self._write_in_flight(reads))

    def lookup(self, key: bytes) -> Entry | None:
        """See :meth:`Store.lookup`."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            age_s = self.clock() - entry.created_s
            if (
                age_s >= entry.ttl_s
                or age_s >= self._lifetimes.get(entry.tool, float("inf"))
                or self._changed_since(entry.reads, entry.epoch)
            ):
                self._remove(key)
                return None
            if self._write_in_flight(entry.reads):
                return None
            self._priority[key] = self._inflation + 2.0 * entry.seconds / entry.size_bytes
            return entry

    def commit(self, key: bytes, entry: Entry) -> bool:
        """See :meth:`Store.commit`."""
        with self._lock:
            size = entry.size_bytes
            if (
                self._changed_since(entry.reads, entry.epoch)
                or self._write_in_flight(entry.reads)
                or size > self._max_bytes
            ):
                return False
            if key in self._entries:
                self._remove(key)
            self._entries[key] = entry
            self._bytes += size
            priority = self._inflation + entry.seconds / size
            self._priority[key] = priority
            heapq.heappush(self._heap, (priority, next(self._order), key))
            while self._bytes > self._max_bytes:
                self._evict_one()
            return True

    def _evict_one(self) -> None:
        while True:
            priority, _, key = heapq.heappop(self._heap)
            current = self._priority.get(key)
            if current is None:
                continue
            if current > priority:
                heapq.heappush(self._heap, (current, next(self._order), key))
                continue
            self._inflation = priority
            self._remove(key)
            return

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self._priority.pop(key, None)
        self._bytes -= entry.size_bytes
        # Heap slots of removed entries go lazily, unless they pile up.
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [(p, next(self._order), k) for k, p in self._priority.items()]
            heapq.heapify(self._heap)

    def begin_write(self, writes: Sequence[Resource]) -> int:
        """See :meth:`Store.begin_write`."""
        with self._lock:
            self._stamp(writes)
            write = next(self._write_ids)
            self._in_flight[write] = (tuple(writes), None)
            return write

    def _stamp(self, writes: Sequence[Resource]) -> None:
        self._now += 1
        now, stamps = self._now, self._stamps
        for written in writes:
            for n in range(len(written)):
                stamp = stamps.get(written[:n])
                if stamp is None:
                    stamps[written[:n]] = [0, now]
                else:
                    stamp[1] = now
            stamps[written] = [now, now]
        if len(stamps) > self._max_resources:
            self._fold()

    def _fold(self) -> None:
        cut = sorted(stamp[1] for stamp in self._stamps.values())[len(self._stamps) // 2]
        root = self._stamps[()]
        self._stamps = {r: s for r, s in self._stamps.items() if s[1] > cut}
        self._stamps[()] = [max(root[0], cut), max(root[1], cut)]

    def end_write(self, write: int, settle_s: float) -> None:
        """See :meth:`Store.end_write`."""
        with self._lock:
            held = self._in_flight.pop(write, None)
            if held is not None and settle_s > 0:
                self._in_flight[write] = (held[0], self.clock() + settle_s)

    def discard(self, key: bytes) -> None:
        """See :meth:`Store.discard`."""
        with self._lock:
            self._remove(key)

    def discard_tool(self, tool: str) -> None:
        """See :meth:`Store.discard_tool`."""
        with self._lock:
            for key in [k for k, e in self._entries.items() if e.tool == tool]:
                self._remove(key)

    def lifetime_s(self, tool: str) -> float:
        """See :meth:`Store.lifetime_s`."""
        with self._lock:
            return self._lifetimes.get(tool, float("inf"))

    def shorten(self, tool: str, seconds: float) -> None:
        """See :meth:`Store.shorten`."""
        with self._lock:
            self._lifetimes[tool] = min(seconds, self._lifetimes.get(tool, float("inf")))

    def size_bytes(self) -> int:
        """See :meth:`Store.size_bytes`."""
        with self._lock:
            return self._bytes

    def close(self) -> None:
        """Nothing to release."""

    def __len__(self) -> int:
        return len(self._entries)
