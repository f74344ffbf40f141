"""What cannot be used is refused with one line that names the remedy, a non-zero status, and no output file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tests.support import Run, tiny_lines, trace_line


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _truncated_gzip() -> bytes:
    whole = gzip.compress("\n".join(tiny_lines(sessions=50)).encode())
    return whole[: len(whole) // 2]


GOOD = trace_line()
BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "empty file": ("", "empty"),
    "blank lines only": ("\n\n\n", ""),
    "not JSON": ("hello\n", ":1:"),
    "JSON but no object": ("[1, 2]\n", ":1:"),
    "truncated gzip": (_truncated_gzip(), ""),
    "gzip of nothing": (gzip.compress(b""), "empty"),
    "binary": (bytes(range(256)) * 40, ""),
    "missing blocks": (trace_line(drop=["blocks"]) + "\n", "blocks"),
    "missing session": (GOOD + "\n" + trace_line(drop=["session_id"]) + "\n", ":2:"),
    "text for a number": (trace_line(prompt_tokens="many") + "\n", "prompt_tokens"),
    "negative tokens": (trace_line(output_tokens=-1) + "\n", "output_tokens"),
    "block id beyond 32 bits": (trace_line(blocks=[[2**33, 4]]) + "\n", "blocks"),
    "block run of negative length": (trace_line(blocks=[[0, -4]]) + "\n", "blocks"),
    "block run too long": (trace_line(blocks=[[0, 2**31]]) + "\n", "blocks"),
    "runs that are no pairs": (trace_line(blocks=[0, 1, 2]) + "\n", "blocks"),
    "block size 0": (trace_line(block_size=0) + "\n", "block_size"),
    "unknown schema version": (json.dumps({"schema": "agentrt-trace", "version": 99}) + "\n" + GOOD + "\n", ""),
    "time that runs backwards": (
        trace_line(t_arrival=10.0, t_scope="session") + "\n"
        + trace_line(step=1, t_arrival=5.0, t_scope="session") + "\n", ":2:",
    ),
    "not a number as time": (trace_line(t_arrival="soon", t_scope="session") + "\n", "t_arrival"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_unusable_trace_is_refused(name: str, agentrt_cli: Run, tmp_path: Path) -> None:
    content, expected = BAD_FILES[name]
    path = _write(tmp_path / "bad.jsonl", content)
    out = tmp_path / "out.json"
    out.write_text("what was there before")
    done = agentrt_cli("replay", path, "--policy", "lru", "--json", out)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path}"), line
    assert expected in line
    assert "; " in line, f"no remedy: {line}"
    assert out.read_text() == "what was there before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "out.json"]


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--policy", "lru,nosuch"], 1, "unknown policy `nosuch`; known policies: lru"),
        (["--policy", "lru,lru"], 1, "named twice"),
        (["--policy", ""], 1, "--policy"),
        (["--policy", "absent.py:Mine"], 1, "not a Python file"),
        (["--capacity", "0%"], 1, "--capacity"),
        (["--capacity", "lots"], 1, "--capacity"),
        (["--capacity", "-5"], 1, "--capacity"),
        (["--capacity", "nan%"], 1, "--capacity"),
        (["--sessions", "0"], 1, "--sessions"),
        (["--sessions", "few"], 1, "--sessions"),
        (["--seed", "-1"], 1, "--seed"),
        (["--seed", "x"], 1, "--seed"),
        (["--json", "no/such/folder/out.json"], 1, "create it first"),
        (["--json", "."], 1, "is a directory"),
        (["--order", "random"], 2, "--order"),
        (["--model", "gpt-2"], 2, "--model"),
        (["--nosuch"], 2, "--nosuch"),
    ],
)
def test_unusable_option_is_refused(
    arguments: list[str], status: int, expected: str, agentrt_cli: Run, tiny_trace: Path
) -> None:
    done = agentrt_cli("replay", tiny_trace, *arguments)
    assert done.returncode == status, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert ";" in line, f"no remedy: {line}"


def test_absent_file_and_unknown_names(agentrt_cli: Run, tmp_path: Path) -> None:
    for arguments, expected in (
        (["replay", tmp_path / "absent.jsonl"], "No such file"),
        (["profile", tmp_path / "absent.jsonl"], "No such file"),
        (["replay", tmp_path], "directory"),
        (["generate", "nosuch", "-o", tmp_path / "x.jsonl"], "unknown workload `nosuch`; known workloads: "),
        (["convert", tmp_path / "absent.jsonl", tmp_path / "x.jsonl"], "No such file"),
        (["policy", "check", tmp_path / "absent.toml"], ""),
    ):
        done = agentrt_cli(*arguments)
        assert done.returncode == 1, (arguments, done.stderr)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert expected in line
    assert list(tmp_path.iterdir()) == []


def test_unknown_command_is_a_usage_error(agentrt_cli: Run) -> None:
    done = agentrt_cli("nosuch")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: No such command 'nosuch'")


def test_skip_bad_leaves_bad_lines_out_and_counts_them(agentrt_cli: Run, tmp_path: Path) -> None:
    path = _write(tmp_path / "some.jsonl", "\n".join([*tiny_lines(), "hello", trace_line(drop=["blocks"])]) + "\n")
    done = agentrt_cli("replay", path, "--policy", "lru", "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert "bad lines left out: 2" in done.stderr
