"""Writes live traffic as an agentrt trace: block numbers, agents, sessions, times, counts. Never text or tokens.

One line per finished call, see docs/traces.md. Blocks are numbered densely within a file, so a file stands alone and
the table of numbers is as bounded as the file. A file that has reached its size is renamed to ``NAME.1``, ``NAME.2``,
..; the oldest is deleted. Lines are written by a thread of their own behind a bounded queue; a line that finds no room
is dropped and counted, never waited for. Lines of a session stand in the order in which its calls arrived:
one that ends before an earlier one of its session waits for it.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

__all__ = ["Recorder"]

QUEUED_CALLS = 4_096
# Calls of one session that wait for an earlier one; then they are written without it.
HELD_CALLS = 256


class _Arrival(NamedTuple):
    number: int
    session: int


class _Line(NamedTuple):
    number: int
    session: int
    agent: str
    arrived_us: int
    started_us: int | None
    ended_us: int
    prompt_tokens: int
    output_tokens: int
    prompt: Sequence[int]
    output: Sequence[int]


class Recorder:
    """Writes one trace.

    Args:
        path: The file.
        workload: Name in the trace.
        block_size: Tokens of a block.
        max_bytes: Size at which a file is rotated.
        files: Files kept, the current one included.
    """

    def __init__(self, path: str, workload: str, block_size: int, max_bytes: int = 64 << 20, files: int = 4) -> None:
        self.path = Path(path)
        self.workload = workload
        self.block_size = block_size
        self.max_bytes = max_bytes
        self.files = max(files, 1)
        self.dropped = 0
        self.written = 0
        self._numbers: dict[int, int] = {}
        self._steps: dict[int, int] = {}
        self._last_us: dict[int, int] = {}
        # Calls in flight and lines that wait for them, by session, in order of arrival.
        self._open: dict[int, dict[int, _Line | None]] = {}
        # Where the clock of the file starts.
        self._start_us: int | None = None
        self._file: IO[bytes] | None = None
        self._bytes = 0
        self._queue: queue.Queue[_Arrival | _Line | None] = queue.Queue(QUEUED_CALLS)
        self._thread = threading.Thread(target=self._work, name="agentrt-record", daemon=True)
        self._thread.start()

    def arrived(self, number: int, session: int, now_us: int) -> None:
        """A call waits from now on; numbers increase."""
        if self._start_us is None:
            self._start_us = now_us
        self._put(_Arrival(number, session))

    def call(
        self,
        *,
        number: int,
        session: int,
        agent: str,
        arrived_us: int,
        started_us: int | None,
        ended_us: int,
        prompt_tokens: int,
        output_tokens: int,
        prompt: Sequence[int],
        output: Sequence[int],
    ) -> None:
        """Queues one finished call; one that has never started is not written."""
        self._put(
            _Line(
                number, session, agent, arrived_us, started_us, ended_us, prompt_tokens, output_tokens, prompt, output
            )
        )

    def _put(self, what: _Arrival | _Line) -> None:
        try:
            self._queue.put_nowait(what)
        except queue.Full:
            self.dropped += isinstance(what, _Line)

    def close(self) -> None:
        """Writes what is queued and closes the file."""
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _work(self) -> None:
        while (what := self._queue.get()) is not None:
            for line in self._in_order(what):
                try:
                    self._write(line)
                except (OSError, ValueError):  # noqa: PERF203 - a write at a time may fail
                    # A full disk must not end the recording for good.
                    self.dropped += 1
        if self._file is not None:
            self._file.close()

    def _in_order(self, what: _Arrival | _Line) -> list[_Line]:
        """The lines that can be written now."""
        calls = self._open.setdefault(what.session, {})
        calls[what.number] = what if isinstance(what, _Line) else None
        ready = []
        while calls:
            number = next(iter(calls))
            line = calls[number]
            if line is None and len(calls) <= HELD_CALLS:
                break
            del calls[number]
            if line is not None and line.started_us is not None:
                ready.append(line)
        if not calls:
            del self._open[what.session]
        return ready

    def _write(self, line: _Line) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rotate()
            self._file = self.path.open("wb", buffering=1 << 16)
        if self._start_us is None:
            self._start_us = line.arrived_us
        start_us = self._start_us
        step = self._steps.get(line.session, 0)
        # A trace wants arrivals that never run back, which those held back for too long would.
        arrived_us = max(line.arrived_us, self._last_us.get(line.session, line.arrived_us), start_us)
        began_us = max(line.started_us or 0, arrived_us)
        self._steps[line.session] = step + 1
        self._last_us[line.session] = arrived_us
        row = {
            "schema_version": 1,
            "workload": self.workload,
            "session_id": f"{line.session:016x}",
            "step": step,
            "agent": line.agent,
            "t_arrival": (arrived_us - start_us) / 1e6,
            "t_scope": "global",
            "queue_s": (began_us - arrived_us) / 1e6,
            "llm_latency_s": max(line.ended_us - began_us, 0) / 1e6,
            "prompt_tokens": line.prompt_tokens,
            "output_tokens": line.output_tokens,
            "block_size": self.block_size,
            "blocks": self._runs(line.prompt),
            "out_blocks": self._runs(line.output),
        }
        data = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        self._file.write(data)
        self._file.flush()
        self.written += 1
        self._bytes += len(data)
        if self._bytes >= self.max_bytes:
            self._file.close()
            self._file = None
            # The next file begins where this one ends.
            self._start_us = line.ended_us

    def _rotate(self) -> None:
        for i in range(self.files - 1, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{i}")
            newer = self.path if i == 1 else self.path.with_name(f"{self.path.name}.{i - 1}")
            if newer.exists():
                newer.replace(older)
        self._numbers.clear()
        self._steps.clear()
        self._last_us.clear()
        self._bytes = 0

    def _runs(self, keys: Sequence[int]) -> list[list[int]]:
        """``[[first, count], ...]`` of the keys' numbers."""
        numbers = self._numbers
        runs: list[list[int]] = []
        for key in keys:
            number = numbers.setdefault(key, len(numbers))
            if runs and runs[-1][0] + runs[-1][1] == number:
                runs[-1][1] += 1
            else:
                runs.append([number, 1])
        return runs
