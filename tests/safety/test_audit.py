"""The audit log: every decision, no content, tamper-evident, rotating, shared by threads and processes."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest

from agentrt.safety import AuditLog, DeniedError, Guard, verify
from agentrt.tools import ToolRuntime, scope


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_decision_is_logged_without_content(guard: Guard, tmp_path: Path) -> None:
    runtime = ToolRuntime(guard=guard)
    marker = "swordfish-4711"
    read = runtime.wrap(lambda path: marker, name="read_file", reads=["file"], writes=())
    mail = runtime.wrap(lambda to, text: None, name="send_mail", writes=["mail"])
    with scope(session="s", agent="a", domain="d") as here:
        read(f"/srv/{marker}")
        read(f"/srv/{marker}")
        with pytest.raises(DeniedError):
            read(f"/etc/{marker}")
        guard.taint.add(here, ["web"])
        with pytest.raises(DeniedError):
            mail("x@corp.example", marker)
    log = tmp_path / "audit.jsonl"
    assert marker not in log.read_text()
    decided = [(r["tool"], r["effect"], r["rule"], r["reason"], r["labels"]) for r in lines(log)]
    assert decided == [
        ("read_file", "allow", None, "default", []),
        ("read_file", "allow", None, "default", []),
        ("read_file", "deny", "no-etc", "rule", []),
        ("send_mail", "deny", "mail", "taint", ["web"]),
    ]
    assert verify(log) == []


def test_rotation_keeps_whole_lines_and_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = AuditLog(path, max_bytes=2_000, keep=3)
    for n in range(60):
        log.record(tool=f"t{n}")
    log.close()
    files = [Path(f"{path}.{n}") for n in (3, 2, 1)] + [path]
    assert all(f.stat().st_size <= 2_000 for f in files)
    assert not Path(f"{path}.4").exists()
    assert verify(*files) == []
    assert lines(path)[-1]["tool"] == "t59"


def test_changed_and_missing_lines_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = AuditLog(path)
    for n in range(5):
        log.record(effect="deny", number=n)
    log.close()
    good = path.read_text().splitlines()
    for bad, problem in [
        ([*good[:2], good[2].replace("deny", "allow"), *good[3:]], "changed"),
        ([*good[:2], *good[3:]], "missing"),
        ([*good[:2], "nonsense", *good[3:]], "not a log line"),
    ]:
        path.write_text("\n".join(bad) + "\n")
        assert any(problem in p for p in verify(path)), problem


def _write(path: str, n: int) -> None:
    log = AuditLog(path, max_bytes=20_000, keep=50)
    for i in range(n):
        log.record(tool="x" * 50, i=i)
    log.close()


def test_processes_and_threads_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "a.jsonl")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(path, 200)) for _ in range(2)]
    for worker in workers:
        worker.start()
    threads = [threading.Thread(target=_write, args=(path, 200)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for process in workers:
        process.join()
    for thread in threads:
        thread.join()
    old = sorted(tmp_path.glob("a.jsonl.[0-9]*"), key=lambda f: -int(f.name.rpartition(".")[2]))
    # Which file a line of another writer lands in during a rotation is not ordered, so completeness is what counts.
    records = [r for f in [*old, Path(path)] for r in lines(f)]
    assert len(records) == 800
    assert len({(r["writer"], r["n"]) for r in records}) == 800
