"""The store as one SQLite file that the processes of one machine share.

Same rules as :class:`agentrt.tools.store.MemoryStore`; clock, stamps and writes in flight live in the file, so a
write in one process is seen by the next look-up of every other. WAL mode; each operation is one transaction; a
process killed at any point leaves the state before or after a transaction, never between.

* **Killed during a write.** Its row stays in flight. Whoever meets the row of a dead owner (same boot, same pid
  namespace, process gone or pid reused) gives it `settle_s` more, then it ends. Where the owner cannot be judged
  (another container), the row ends after `orphan_s`.
* **Power loss.** `synchronous=NORMAL` may lose the last transactions, and with them an invalidation whose effect
  survived elsewhere. So entries of an earlier boot are dropped at opening. Without a boot id (not Linux) the file
  runs with `synchronous=FULL` instead.
* **Format.** `PRAGMA user_version`; a file of another version is refused by name, never reinterpreted. Results are
  JSON, never pickles: opening a file of unknown origin runs no code. It can lie about results all the same, so
  keep it where only the processes that share it can write (it is created with mode 0600).
* Not for network file systems: WAL needs shared memory.

Cost, 2-core x86-64 VM: look-up about 40 us, commit and write announcement about 100 us each (`benches/py`).
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentrt.tools.resources import Resource, conflicts
from agentrt.tools.store import Entry, StoreUnavailableError

__all__ = ["SCHEMA_VERSION", "SqliteStore"]

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x61677274  # "agrt"
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE stamp (path TEXT PRIMARY KEY, own INTEGER NOT NULL, below INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE in_flight (id INTEGER PRIMARY KEY AUTOINCREMENT, writes TEXT NOT NULL, owner TEXT NOT NULL,
                        started_s REAL NOT NULL, until_s REAL);
CREATE TABLE entry (key BLOB PRIMARY KEY, tool TEXT NOT NULL, data BLOB NOT NULL, error TEXT, reads TEXT NOT NULL,
                    labels TEXT NOT NULL, epoch INTEGER NOT NULL, created_s REAL NOT NULL, seconds REAL NOT NULL,
                    ttl_s REAL NOT NULL, bytes INTEGER NOT NULL, priority REAL NOT NULL);
CREATE INDEX entry_priority ON entry (priority);
CREATE INDEX entry_tool ON entry (tool);
CREATE TABLE lifetime (tool TEXT PRIMARY KEY, seconds REAL NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('clock', 0), ('bytes', 0), ('inflation', 0.0), ('boot', '');
INSERT INTO stamp VALUES ('', 0, 0);
"""
_SEPARATOR = "\x1f"
_FLUSH_HITS = 64


def _clock() -> Callable[[], float]:
    """Seconds that all processes of this boot agree on; wall clock where there is no such clock."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    if boottime is None:
        return time.time
    return lambda: time.clock_gettime(boottime)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id")


def _process_start(pid: int) -> str:
    stat = _read(f"/proc/{pid}/stat")
    # The command name may hold spaces and parentheses; fields are counted after its last one.
    return stat.rpartition(")")[2].split()[19] if stat else ""


def _pid_namespace() -> str:
    try:
        return os.fspath(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _owner() -> str:
    pid = os.getpid()
    return "|".join((_boot_id(), _pid_namespace(), str(pid), _process_start(pid)))


def _owner_is_dead(owner: str) -> bool | None:
    """True, False, or None where it cannot be told."""
    boot, namespace, pid, started = owner.split("|")
    if not boot or not namespace or not started:
        return None
    if boot != _boot_id():
        return True
    if namespace != _pid_namespace():
        return None
    return _process_start(int(pid)) != started


def _path(resource: Resource) -> str:
    return "".join(_SEPARATOR + segment.replace(_SEPARATOR, " ") for segment in resource)


def _prefixes(resource: Resource) -> list[str]:
    return [_path(resource[:n]) for n in range(len(resource) + 1)]


class SqliteStore:
    """See the module. One connection per process, reopened after a fork."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int = 256 << 20,
        max_resources: int = 65_536,
        settle_s: float = 5.0,
        orphan_s: float = 3600.0,
        busy_timeout_s: float = 5.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.clock = clock or _clock()
        self._file = os.fspath(path)
        self._max_bytes = max_bytes
        self._max_resources = max_resources
        self._settle_s = settle_s
        self._orphan_s = orphan_s
        self._busy_timeout_s = busy_timeout_s
        self._lock = threading.RLock()
        self._hits: dict[bytes, int] = {}
        # Connections inherited over forks: never used, never closed, since closing touches the parent's locks.
        self._forked: list[sqlite3.Connection] = []
        self._swept_s = -math.inf
        self._pid = -1
        self._owner = ""
        self._db = self._connect()

    # Connection -------------------------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                return self._open()
            except sqlite3.OperationalError as error:  # noqa: PERF203 - a handful of tries
                # Two processes that make the file at once: changing to WAL does not wait for the other by itself.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise self._unusable(error) from error
                time.sleep(0.01)
            except (sqlite3.Error, OSError) as error:
                raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> StoreUnavailableError:
        return StoreUnavailableError(f"cannot open the tool store ({error}); check or remove: {self._file}")

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
        db = sqlite3.connect(self._file, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        self._pid = os.getpid()
        self._owner = _owner()
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        boot = _boot_id()
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={'NORMAL' if boot else 'FULL'}")
        db.execute("BEGIN IMMEDIATE")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        elif version != SCHEMA_VERSION or db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            raise StoreUnavailableError(
                f"not a tool store of version {SCHEMA_VERSION} (found {version}); move it away: {self._file}"
            )
        if boot and db.execute("SELECT value FROM meta WHERE key='boot'").fetchone()[0] != boot:
            db.execute("DELETE FROM entry")
            db.execute("DELETE FROM in_flight")
            db.execute("UPDATE meta SET value=0 WHERE key='bytes'")
            db.execute("UPDATE meta SET value=? WHERE key='boot'", (boot,))
        db.execute("COMMIT")

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._pid != os.getpid():
                # A connection must not cross a fork; the parent's is left alone.
                self._hits = {}
                self._forked.append(self._db)
                self._db = self._connect()
            db = self._db
            try:
                db.execute(kind)
                try:
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
            except sqlite3.Error as error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise StoreUnavailableError(f"tool store: {error}: {self._file}") from error

    # The two questions ------------------------------------------------------------------------------------------

    def _changed_since(self, db: sqlite3.Connection, reads: Sequence[Resource], epoch: int) -> bool:
        for read in reads:
            prefixes = _prefixes(read)
            marks = ",".join("?" * len(prefixes))
            row = db.execute(
                f"SELECT max(CASE WHEN path=? THEN below ELSE own END) FROM stamp WHERE path IN ({marks})",  # noqa: S608
                (prefixes[-1], *prefixes),
            ).fetchone()
            if row[0] is not None and row[0] > epoch:
                return True
        return False

    def _write_in_flight(self, db: sqlite3.Connection, reads: Sequence[Resource]) -> bool:
        rows = db.execute("SELECT writes, owner, started_s, until_s FROM in_flight").fetchall()
        if not rows:
            return False
        now = self.clock()
        for writes, owner, started_s, until_s in rows:
            orphan = until_s is None and _owner_is_dead(owner) is None
            end_s = started_s + self._orphan_s if orphan else until_s
            if end_s is not None and end_s <= now:
                continue
            if any(conflicts(tuple(w), r) for w in json.loads(writes) for r in reads):
                return True
        return False

    def _sweep(self, db: sqlite3.Connection) -> None:
        """Ends what has settled, and gives the writes of dead processes their settling time. In a write transaction."""
        now = self.clock()
        rows = db.execute("SELECT id, owner, started_s, until_s FROM in_flight").fetchall()
        for write, owner, started_s, until_s in rows:
            end_s = until_s
            if end_s is None:
                dead = _owner_is_dead(owner)
                if dead is None:
                    end_s = started_s + self._orphan_s
                elif dead:
                    end_s = now + self._settle_s
                    db.execute("UPDATE in_flight SET until_s=? WHERE id=?", (end_s, write))
            if end_s is not None and end_s <= now:
                db.execute("DELETE FROM in_flight WHERE id=?", (write,))

    # Store ------------------------------------------------------------------------------------------------------

    def start(self, reads: Sequence[Resource]) -> int | None:
        """See :meth:`Store.start`."""
        with self._transaction("BEGIN") as db:
            if not self._write_in_flight(db, reads):
                return int(self._meta(db, "clock"))
        # A dead process may have left that write behind, and readers alone would never end it.
        if self.clock() - self._swept_s > self._settle_s / 4:
            self._swept_s = self.clock()
            with self._transaction("BEGIN IMMEDIATE") as db:
                self._sweep(db)
        return None

    def unchanged(self, reads: Sequence[Resource], epoch: int) -> bool:
        """See :meth:`Store.unchanged`."""
        with self._transaction("BEGIN") as db:
            return not (self._changed_since(db, reads, epoch) or self._write_in_flight(db, reads))

    def lookup(self, key: bytes) -> Entry | None:
        """See :meth:`Store.lookup`."""
        with self._transaction("BEGIN") as db:
            row = db.execute(
                "SELECT e.tool, e.data, e.error, e.reads, e.epoch, e.created_s, e.seconds, e.ttl_s, e.labels, l.seconds"
                " FROM entry e LEFT JOIN lifetime l ON l.tool = e.tool WHERE e.key=?",
                (key,),
            ).fetchone()
            if row is None:
                return None
            reads = tuple(tuple(r) for r in json.loads(row[3]))
            age_s = self.clock() - row[5]
            if age_s < 0 or age_s >= row[7] or (row[9] is not None and age_s >= row[9]):
                return None
            if self._changed_since(db, reads, row[4]) or self._write_in_flight(db, reads):
                return None
        self._hits[key] = self._hits.get(key, 0) + 1
        if len(self._hits) >= _FLUSH_HITS:
            self._flush_hits()
        labels = frozenset(json.loads(row[8]))
        return Entry(row[0], row[1], row[2], reads, row[4], row[5], row[6], row[7], labels)

    def _flush_hits(self) -> None:
        """Hits raise priorities in batches: a look-up stays a read."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            hits, self._hits = self._hits, {}
            inflation = self._meta(db, "inflation")
            db.executemany(
                "UPDATE entry SET priority=max(priority, ? + (1 + ?) * seconds / bytes) WHERE key=?",
                [(inflation, n, key) for key, n in hits.items()],
            )

    @staticmethod
    def _meta(db: sqlite3.Connection, key: str) -> Any:
        return db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()[0]

    def commit(self, key: bytes, entry: Entry) -> bool:
        """See :meth:`Store.commit`."""
        size = entry.size_bytes
        if size > self._max_bytes:
            return False
        with self._transaction("BEGIN IMMEDIATE") as db:
            self._sweep(db)
            if self._changed_since(db, entry.reads, entry.epoch) or self._write_in_flight(db, entry.reads):
                return False
            total = self._meta(db, "bytes") + size - self._delete(db, "key", key)
            inflation = self._meta(db, "inflation")
            while total > self._max_bytes:
                victim = db.execute("SELECT key, priority FROM entry ORDER BY priority LIMIT 1").fetchone()
                if victim is None:
                    break
                inflation = max(inflation, victim[1])
                total -= self._delete(db, "key", victim[0])
            db.execute(
                "INSERT INTO entry VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    key,
                    entry.tool,
                    entry.data,
                    entry.error,
                    json.dumps(entry.reads),
                    json.dumps(sorted(entry.labels)),
                    entry.epoch,
                    entry.created_s,
                    entry.seconds,
                    entry.ttl_s,
                    size,
                    inflation + entry.seconds / size,
                ),
            )
            db.execute("UPDATE meta SET value=? WHERE key='bytes'", (total,))
            db.execute("UPDATE meta SET value=? WHERE key='inflation'", (inflation,))
            return True

    @staticmethod
    def _delete(db: sqlite3.Connection, column: str, value: bytes | str) -> int:
        """Deletes entries by `key` or `tool`; returns the bytes they counted for."""
        query = f"SELECT coalesce(sum(bytes), 0) FROM entry WHERE {column}=?"  # noqa: S608
        freed = int(db.execute(query, (value,)).fetchone()[0])
        if freed:
            db.execute(f"DELETE FROM entry WHERE {column}=?", (value,))  # noqa: S608
        return freed

    def begin_write(self, writes: Sequence[Resource]) -> int:
        """See :meth:`Store.begin_write`."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            db.execute("UPDATE meta SET value=value+1 WHERE key='clock'")
            now = self._meta(db, "clock")
            rows: list[tuple[str, int, int]] = []
            for written in writes:
                *above, exact = _prefixes(written)
                rows.extend((path, 0, now) for path in above)
                rows.append((exact, now, now))
            db.executemany(
                "INSERT INTO stamp VALUES (?,?,?) ON CONFLICT (path) DO UPDATE"
                " SET own=max(own, excluded.own), below=excluded.below",
                rows,
            )
            if now % 256 == 0:
                self._fold(db)
            self._sweep(db)
            cursor = db.execute(
                "INSERT INTO in_flight (writes, owner, started_s) VALUES (?,?,?)",
                (json.dumps(list(writes)), self._owner, self.clock()),
            )
            return int(cursor.lastrowid or 0)

    def _fold(self, db: sqlite3.Connection) -> None:
        count = db.execute("SELECT count(*) FROM stamp").fetchone()[0]
        if count <= self._max_resources:
            return
        cut = db.execute("SELECT below FROM stamp ORDER BY below LIMIT 1 OFFSET ?", (count // 2,)).fetchone()[0]
        db.execute("DELETE FROM stamp WHERE below<=? AND path<>''", (cut,))
        db.execute("UPDATE stamp SET own=max(own, ?), below=max(below, ?) WHERE path=''", (cut, cut))

    def end_write(self, write: int, settle_s: float) -> None:
        """See :meth:`Store.end_write`."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            if settle_s > 0:
                db.execute("UPDATE in_flight SET until_s=? WHERE id=?", (self.clock() + settle_s, write))
            else:
                db.execute("DELETE FROM in_flight WHERE id=?", (write,))

    def discard(self, key: bytes) -> None:
        """See :meth:`Store.discard`."""
        self._discard("key", key)

    def discard_tool(self, tool: str) -> None:
        """See :meth:`Store.discard_tool`."""
        self._discard("tool", tool)

    def _discard(self, column: str, value: bytes | str) -> None:
        with self._transaction("BEGIN IMMEDIATE") as db:
            freed = self._delete(db, column, value)
            db.execute("UPDATE meta SET value=value-? WHERE key='bytes'", (freed,))

    def lifetime_s(self, tool: str) -> float:
        """See :meth:`Store.lifetime_s`."""
        with self._transaction("BEGIN") as db:
            row = db.execute("SELECT seconds FROM lifetime WHERE tool=?", (tool,)).fetchone()
            return math.inf if row is None else float(row[0])

    def shorten(self, tool: str, seconds: float) -> None:
        """See :meth:`Store.shorten`."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            db.execute(
                "INSERT INTO lifetime VALUES (?,?) ON CONFLICT (tool) DO UPDATE"
                " SET seconds=min(seconds, excluded.seconds)",
                (tool, seconds),
            )

    def size_bytes(self) -> int:
        """See :meth:`Store.size_bytes`."""
        with self._transaction("BEGIN") as db:
            return int(self._meta(db, "bytes"))

    def __len__(self) -> int:
        with self._transaction("BEGIN") as db:
            return int(db.execute("SELECT count(*) FROM entry").fetchone()[0])

    def close(self) -> None:
        """Writes buffered hits and closes the connection."""
        with self._lock:
            if self._pid == os.getpid():
                try:
                    if self._hits:
                        self._flush_hits()
                finally:
                    self._db.close()
