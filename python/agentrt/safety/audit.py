"""The audit log: every decision, with rule, reason and labels, never content.

One JSON object a line, written with a single `write` to a file opened for appending, so lines of several processes
do not mix. Each writer numbers its lines and chains them (`chain` is a digest of the writer's previous chain and the
line): a line removed or changed later is found by :func:`verify`. The tail of a file that was cut off is not, unless
the last chain value is kept elsewhere.

Rotation renames (``audit.jsonl`` -> ``audit.jsonl.1`` -> ...) and starts a new file; nothing is ever rewritten. The
number of old files is bounded; keep or ship them before they fall off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

__all__ = ["AuditLog", "verify"]


def _chain(previous: str, line: str) -> str:
    return hashlib.blake2b((previous + line).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


class AuditLog:
    """Append-only log of decisions. Thread-safe; several processes may share a file.

    Args:
        path: The current file, made with mode 0600.
        max_bytes: Size at which it is rotated.
        keep: Old files kept.
        clock: Wall-clock seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int = 16 << 20,
        keep: int = 8,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = Path(path)
        self._max_bytes = max_bytes
        self._keep = keep
        self._clock = clock
        self._lock = threading.Lock()
        self._writer = uuid.uuid4().hex[:12]
        self._sequence = 0
        self._last = ""
        self._file = self._open()
        self._size = os.fstat(self._file).st_size

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def record(self, **fields: object) -> None:
        """Appends one line. Fields must not hold content: :class:`agentrt.safety.Guard` passes names and labels."""
        with self._lock:
            body = {"t": round(self._clock(), 6), "writer": self._writer, "n": self._sequence, **fields}
            line = json.dumps(body, separators=(",", ":"))
            self._last = _chain(self._last, line)
            self._sequence += 1
            data = f'{line[:-1]},"chain":"{self._last}"}}\n'.encode()
            if self._size + len(data) > self._max_bytes:
                self._rotate()
            os.write(self._file, data)
            self._size += len(data)

    def _rotate(self) -> None:
        lock = os.open(f"{self._path}.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another process may have rotated already: then the path is another file than ours.
            if self._path.exists() and os.fstat(self._file).st_ino == self._path.stat().st_ino:
                for n in range(self._keep - 1, 0, -1):
                    old = Path(f"{self._path}.{n}")
                    if old.exists():
                        old.rename(f"{self._path}.{n + 1}")
                if self._keep > 0:
                    self._path.rename(f"{self._path}.1")
                else:
                    self._path.unlink()
        finally:
            os.close(lock)
        os.close(self._file)
        self._file = self._open()
        self._size = os.fstat(self._file).st_size

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            os.close(self._file)


def verify(*paths: str | os.PathLike[str]) -> list[str]:
    """What is wrong with some log files, given oldest first; an empty list if nothing is.

    A writer whose first lines were rotated away starts where it is first seen.
    """
    problems: list[str] = []
    state: dict[str, tuple[int, str]] = {}
    for path in paths:
        for number, text in enumerate(Path(path).read_text().splitlines(), 1):
            where = f"{path}:{number}"
            try:
                body = json.loads(text)
                chain, writer, n = body.pop("chain"), body["writer"], body["n"]
            except (ValueError, KeyError, TypeError, AttributeError):
                problems.append(f"{where}: not a log line")
                continue
            line = text[: text.rindex(',"chain":')] + "}"
            known = state.get(writer)
            if known is not None and n != known[0] + 1:
                problems.append(f"{where}: lines missing before {n} of writer {writer}")
            elif (known is not None or n == 0) and chain != _chain(known[1] if known else "", line):
                problems.append(f"{where}: changed after it was written")
            state[writer] = (n, chain)
    return problems
