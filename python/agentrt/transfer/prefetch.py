"""Prefetch in the loop: brings predicted blocks back within a budget, and stops when the prediction fails.

A policy hands over `(source_block, destination_block, priority)`; the engine calls `step` between its steps. Each
step sends what the token bucket allows, most urgent first, in the order of arrival between equals. Requests still
queued can be cancelled at no cost; those in flight cannot be recalled, but are reported as wasted, so that a policy
can learn from them.

Invariants: over any time t, bytes sent never exceed burst + rate * t (exactly, in integer arithmetic); a destination
block is reported as ready only after its copy is complete; after a fault the blocks concerned are queued no more and
not ready, their sources are as before. One thread drives an executor.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentrt.transfer.errors import CopyFaultError, InFlightError, PairError, TornBlockError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agentrt.transfer.handle import CopyHandle
    from agentrt.transfer.plan import CopyPlan

_NS = 1_000_000_000


class TokenBucket:
    """Bytes that may be sent: `rate` a second, at most `burst` at once. In integers, so nothing is lost to rounding."""

    def __init__(self, bytes_per_s: int, burst_bytes: int, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        if bytes_per_s < 0 or burst_bytes < 0:
            raise ValueError(f"rate and burst must not be negative: {bytes_per_s}, {burst_bytes}")
        self.bytes_per_s = int(bytes_per_s)
        self.burst_bytes = int(burst_bytes)
        self._clock_ns = clock_ns
        self._at_ns = clock_ns()
        # In byte-nanoseconds per second: one byte is _NS of these.
        self._level = self.burst_bytes * _NS

    def available(self) -> int:
        """Bytes that `take` would grant now."""
        now = self._clock_ns()
        # A clock that steps back grants nothing, and nothing twice.
        if now > self._at_ns:
            self._level = min(self._level + (now - self._at_ns) * self.bytes_per_s, self.burst_bytes * _NS)
            self._at_ns = now
        return self._level // _NS

    def take(self, nbytes: int) -> bool:
        """Takes exactly `nbytes`, or nothing."""
        if nbytes > self.available():
            return False
        self._level -= nbytes * _NS
        return True

    def put_back(self, nbytes: int) -> None:
        """Returns bytes taken but not sent."""
        self._level = min(self._level + nbytes * _NS, self.burst_bytes * _NS)


@dataclass(order=True)
class _Request:
    #: Negated, so that the smallest comes first.
    rank: float
    number: int
    source: int = field(compare=False)
    destination: int = field(compare=False)


@dataclass(frozen=True)
class Failure:
    """A request that came to nothing."""

    source: int
    destination: int
    reason: str


@dataclass
class StepReport:
    """What one step did, as (source block, destination block)."""

    #: Complete since the last step and still wanted: the engine may map the destination to the source's content.
    ready: list[tuple[int, int]] = field(default_factory=list)
    #: Complete, but cancelled meanwhile: the destination is free again.
    wasted: list[tuple[int, int]] = field(default_factory=list)
    #: Refused or failed; the destination is not to be read.
    failed: list[Failure] = field(default_factory=list)
    #: Bytes put on the link by this step.
    sent_bytes: int = 0


@dataclass
class Totals:
    """Counters over an executor's life, in bytes."""

    requested: int = 0
    sent: int = 0
    ready: int = 0
    wasted: int = 0
    cancelled: int = 0
    failed: int = 0


class PrefetchExecutor:
    """Executes prefetch decisions. See the module for the rules."""

    def __init__(
        self,
        plan: CopyPlan,
        *,
        bytes_per_s: int,
        burst_bytes: int | None = None,
        max_blocks_per_step: int = 64,
        stream: Any = None,
        backend: str = "auto",
        max_ctas: int | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.plan = plan
        #: Bytes one block costs the link.
        self.block_bytes = plan.dst.block_bytes * len(plan.dst.bases)
        if burst_bytes is None:
            burst_bytes = max(self.block_bytes, bytes_per_s // 100)
        if 0 < burst_bytes < self.block_bytes:
            raise ValueError(f"burst must hold at least one block of {self.block_bytes} bytes: {burst_bytes}")
        self.bucket = TokenBucket(bytes_per_s, burst_bytes, clock_ns)
        self.max_blocks_per_step = max_blocks_per_step
        self.totals = Totals()
        self._options: dict[str, Any] = {"stream": stream, "backend": backend, "max_ctas": max_ctas}
        self._queue: list[_Request] = []
        self._number = 0
        self._running: list[tuple[CopyHandle, list[_Request]]] = []
        self._unwanted: set[int] = set()

    # ---- decisions ---------------------------------------------------------------------------------------------------

    def request(self, actions: Iterable[tuple[int, int, float]]) -> int:
        """Queues (source block, destination block, priority) and returns how many are new.

        A destination that is queued already gets the new source and priority; one whose copy is under way is left
        alone.
        """
        new = 0
        flying = {request.destination for _, requests in self._running for request in requests}
        queued = {request.destination: request for request in self._queue}
        for source, destination, priority in actions:
            if not (0 <= source < self.plan.src.num_blocks and 0 <= destination < self.plan.dst.num_blocks):
                raise PairError(f"block is outside its pool: {source} -> {destination}", [source, destination])
            if destination in flying:
                continue
            if destination in queued:
                self._queue.remove(queued[destination])
            else:
                new += 1
                self.totals.requested += self.block_bytes
            self._number += 1
            queued[destination] = _Request(-float(priority), self._number, int(source), int(destination))
            self._queue.append(queued[destination])
        self._queue.sort()
        return new

    def cancel(self, destinations: Iterable[int] | None = None) -> int:
        """Drops these queued requests (None: all) and returns how many; running ones will end as `wasted`."""
        chosen = None if destinations is None else {int(block) for block in destinations}
        kept = [request for request in self._queue if chosen is not None and request.destination not in chosen]
        dropped = len(self._queue) - len(kept)
        self._queue = kept
        self.totals.cancelled += dropped * self.block_bytes
        for _, requests in self._running:
            self._unwanted.update(r.destination for r in requests if chosen is None or r.destination in chosen)
        return dropped

    # ---- progress ----------------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Requests not yet sent."""
        return len(self._queue)

    @property
    def reserved(self) -> frozenset[int]:
        """Destination blocks that are queued or in flight: the engine must not hand them out."""
        flying = {request.destination for _, requests in self._running for request in requests}
        return frozenset(flying.union(request.destination for request in self._queue))

    def step(self, after: Any = None) -> StepReport:
        """Collects what has arrived and sends what the budget allows. Call between engine steps.

        Never blocks on a copy to or from a device. `after` is the event behind which the destinations may be written.
        """
        report = StepReport()
        self._collect(report)
        self._send(report, after)
        # A host copy without a stream is over already.
        self._collect(report)
        return report

    def drain(self) -> StepReport:
        """Waits for everything in flight; sends nothing new."""
        for handle, _ in self._running:
            with contextlib.suppress(CopyFaultError):  # reported by the collection below
                handle.wait()
        report = StepReport()
        self._collect(report)
        return report

    def _collect(self, report: StepReport) -> None:
        running = []
        for handle, requests in self._running:
            if not handle.poll():
                running.append((handle, requests))
                continue
            pairs = [(request.source, request.destination) for request in requests]
            size = self.block_bytes
            try:
                handle.wait()
            except CopyFaultError as fault:
                report.failed += [Failure(source, destination, str(fault)) for source, destination in pairs]
                self.totals.failed += size * len(pairs)
            else:
                for source, destination in pairs:
                    unwanted = destination in self._unwanted
                    (report.wasted if unwanted else report.ready).append((source, destination))
                    if unwanted:
                        self.totals.wasted += size
                    else:
                        self.totals.ready += size
            self._unwanted.difference_update(destination for _, destination in pairs)
        self._running = running

    def _send(self, report: StepReport, after: Any) -> None:
        batch: list[_Request] = []
        blocked: list[_Request] = []
        busy_from, busy_to = self._busy()
        torn = self.plan.src.torn
        while self._queue and len(batch) < self.max_blocks_per_step:
            request = self._queue[0]
            if request.source in torn:
                self._queue.pop(0)
                report.failed.append(
                    Failure(
                        request.source, request.destination, "source block is undefined since a copy into it failed"
                    )
                )
                self.totals.failed += self.block_bytes
                continue
            if request.source in busy_from or request.destination in busy_to:
                # Somebody still writes the source or uses the destination: next step.
                blocked.append(self._queue.pop(0))
                continue
            if not self.bucket.take(self.block_bytes):
                break
            batch.append(self._queue.pop(0))
        self._queue = sorted(blocked + self._queue)
        if not batch:
            return
        pairs = [(request.source, request.destination) for request in batch]
        try:
            handle = self.plan.copy(pairs, after=after, **self._options)
        except (InFlightError, TornBlockError):
            # Another thread was faster; nothing has moved.
            self.bucket.put_back(self.block_bytes * len(batch))
            self._queue = sorted(batch + self._queue)
            return
        except CopyFaultError as fault:
            report.failed += [Failure(source, destination, str(fault)) for source, destination in pairs]
            self.totals.failed += self.block_bytes * len(batch)
            return
        except BaseException:
            self.bucket.put_back(self.block_bytes * len(batch))
            self._queue = sorted(batch + self._queue)
            raise
        self._running.append((handle, batch))
        report.sent_bytes += self.block_bytes * len(batch)
        self.totals.sent += self.block_bytes * len(batch)

    def _busy(self) -> tuple[frozenset[int], frozenset[int]]:
        """Blocks that other copies keep us from: sources being written, destinations being read or written."""
        written = frozenset(int(block) for pin in list(self.plan.src._pins) if pin.writes for block in pin.blocks)
        return written, self.plan.dst.in_flight
