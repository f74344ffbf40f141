"""The shared file: one truth for several processes, whole after a kill, refused when it is another version."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agentrt.tools import Memo, StoreUnavailableError, ToolRuntime
from agentrt.tools.sqlite_store import SCHEMA_VERSION, SqliteStore, _owner_is_dead

WORKER = Path(__file__).with_name("sqlite_worker.py")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(path: Path, **options: Any) -> ToolRuntime:
    return ToolRuntime(memo=Memo(SqliteStore(path, **options), verify_rate=0.0))


def start(store: Path, world: Path, seed: int, seconds: float, settle_s: float = 0.2) -> subprocess.Popen[str]:
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        str(WORKER),
        str(store),
        str(world),
        str(seed),
        str(seconds),
        str(settle_s),
    ]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    directory = tmp_path / "world"
    directory.mkdir()
    for name in "abc":
        (directory / name).write_bytes(b"")
    return directory


def test_a_result_outlives_its_runtime_and_a_write_elsewhere_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "tools.sqlite"
    ran: list[int] = []

    def tool() -> int:
        ran.append(1)
        return len(ran)

    for _ in range(2):
        runtime = make(path)
        assert runtime.wrap(tool, version="1", reads=["x"], writes=())() == 1
        runtime.close()
    first, second = make(path), make(path)
    first.wrap(lambda: None, name="w", writes=["x"])()
    assert second.wrap(tool, version="1", reads=["x"], writes=())() == 2
    first.close()
    second.close()
    assert path.stat().st_mode & 0o077 == 0


def test_processes_never_see_each_others_stale_results(tmp_path: Path, world: Path) -> None:
    workers = [start(tmp_path / "s.sqlite", world, seed, 2.0) for seed in range(3)]
    output = "".join(worker.communicate(timeout=25)[0] for worker in workers)
    assert "STALE" not in output, output
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    hits = [int(n) for n in re.findall(r"hits (\d+)", output)]
    assert sum(hits) > 50, output


def test_killed_at_any_moment_the_file_stays_whole_and_true(tmp_path: Path, world: Path) -> None:
    store = tmp_path / "s.sqlite"
    survivor = start(store, world, 99, 4.5)
    for seed in range(8):
        worker = start(store, world, seed, 30.0)
        time.sleep(0.25 + 0.03 * seed)
        worker.send_signal(signal.SIGKILL)
        out, _ = worker.communicate(timeout=10)
        assert "STALE" not in out
    out, _ = survivor.communicate(timeout=20)
    assert survivor.returncode == 0
    assert "STALE" not in out, out
    db = sqlite3.connect(store)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    total = db.execute("SELECT coalesce(sum(bytes), 0) FROM entry").fetchone()
    assert total == db.execute("SELECT value FROM meta WHERE key='bytes'").fetchone()
    db.close()


def test_a_write_of_a_killed_process_ends_after_its_settling_time(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    code = (
        "import os, sys; from agentrt.tools.sqlite_store import SqliteStore;"
        "SqliteStore(sys.argv[1]).begin_write([('x',)]); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], check=False)
    clock = Clock()
    store = SqliteStore(path, settle_s=5.0, clock=clock)
    assert store.start([("x", "y")]) is None
    assert store.start([("z",)]) is not None
    clock.now += 4.0
    assert store.start([("x",)]) is None
    clock.now += 2.0
    store.start([("x",)])
    assert store.start([("x",)]) is not None
    store.close()


def test_a_write_of_a_living_process_lasts_until_it_ends(tmp_path: Path) -> None:
    clock = Clock()
    store, other = (SqliteStore(tmp_path / "s.sqlite", clock=clock) for _ in range(2))
    write = store.begin_write([("x",)])
    clock.now += 10_000.0
    assert other.start([("x",)]) is None
    store.end_write(write, 0.0)
    assert other.start([("x",)]) is not None
    for s in (store, other):
        s.close()


def test_a_process_is_known_by_more_than_its_number() -> None:
    from agentrt.tools import sqlite_store

    mine = sqlite_store._owner()
    boot, namespace, pid, started = mine.split("|")
    assert _owner_is_dead(mine) is False
    assert _owner_is_dead(f"{boot}|{namespace}|{pid}|{started}1") is True
    assert _owner_is_dead(f"other|{namespace}|{pid}|{started}") is True
    assert _owner_is_dead(f"{boot}|other|{pid}|{started}") is None


def test_entries_of_an_earlier_boot_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.sqlite"
    for boot, expected in [("one", 1), ("one", 1), ("two", 2)]:
        monkeypatch.setattr("agentrt.tools.sqlite_store._boot_id", lambda boot=boot: boot)
        runtime = make(path)
        runtime.wrap(lambda: 1, name="t", version="1", reads=(), writes=())()
        assert runtime.memo.stats.executed + (1 if boot == "two" else 0) + runtime.memo.stats.hits == expected
        runtime.close()


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be read as one" * 20, None])
def test_a_file_that_is_something_else_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "other.sqlite"
    if content is None:
        SqliteStore(path).close()
        db = sqlite3.connect(path)
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
        db.commit()
        db.close()
    else:
        path.write_bytes(content)
    with pytest.raises(StoreUnavailableError, match=r"other\.sqlite"):
        SqliteStore(path)


def test_when_the_store_fails_reads_run_and_writes_do_not(tmp_path: Path) -> None:
    runtime = make(tmp_path / "s.sqlite", busy_timeout_s=0.05)
    ran: list[str] = []
    read = runtime.wrap(lambda: ran.append("read"), name="r", reads=["x"], writes=())
    write = runtime.wrap(lambda: ran.append("write"), name="w", writes=["x"])
    blocker = sqlite3.connect(tmp_path / "s.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    read()
    with pytest.raises(StoreUnavailableError, match="locked"):
        write()
    assert ran == ["read"]
    assert runtime.memo.stats.store_errors > 0
    blocker.execute("ROLLBACK")
    write()
    assert ran == ["read", "write"]
    blocker.close()
    runtime.close()


def test_size_and_stamps_are_bounded(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.sqlite", max_bytes=10_000, max_resources=50)
    runtime = ToolRuntime(memo=Memo(store, verify_rate=0.0))
    values: dict[int, int] = {}
    read = runtime.wrap(lambda k: values.get(k, 0), name="read", version="1", reads=["k/{k}"], writes=())
    write = runtime.wrap(lambda k: values.__setitem__(k, values.get(k, 0) + 1), name="write", writes=["k/{k}"])
    for n in range(600):
        read(n * 7 % 90)
        write(n * 7 % 90)
        assert read(n * 7 % 90) == values[n * 7 % 90]
    assert store.size_bytes() <= 10_000
    with store._transaction("BEGIN") as db:
        assert db.execute("SELECT count(*) FROM stamp").fetchone()[0] <= 50 + 256
    runtime.close()


def test_a_child_after_fork_uses_its_own_connection(tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    code = (
        "import os, sys\n"
        "from agentrt.tools.sqlite_store import SqliteStore\n"
        "s = SqliteStore(sys.argv[1])\n"
        "pid = os.fork()\n"
        "w = s.begin_write([('child' if pid == 0 else 'parent',)])\n"
        "s.end_write(w, 0.0)\n"
        "if pid: _, status = os.waitpid(pid, 0); assert status == 0; print(s.start([]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "s.sqlite")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "2"
