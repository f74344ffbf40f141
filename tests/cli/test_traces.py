"""``agentrt profile``, ``generate`` and ``convert`` end to end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from tests.support import Run, trace_line


def test_profile_answers_on_one_screen_whether_it_is_worth_it(
    agentrt_cli: Run, tiny_trace: Path, tmp_path: Path
) -> None:
    figures = tmp_path / "profile.json"
    done = agentrt_cli("profile", tiny_trace, "--sessions", "4", "--json", figures)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) <= 30
    for word in ("2 agents", "live working set", "order 2", "lru hit %", "min hit %", "Is it worth it? "):
        assert word in done.stdout
    for pool in ("5%", "10%", "25%", "50%", "100%"):
        assert f"{pool} " in done.stdout
    written = json.loads(figures.read_text())
    assert written["profile"]["calls"] == 30
    assert {row["policy"] for row in written["pools"]} >= {"lru", "min"}


def test_verdict_is_no_where_nothing_is_used_twice(agentrt_cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "fresh.jsonl"
    lines = [trace_line(session_id=f"s{i}", blocks=[[10 * i, 4]], out_blocks=[[10 * i + 4, 1]]) for i in range(20)]
    path.write_text("\n".join(lines) + "\n")
    done = agentrt_cli("profile", path)
    assert done.returncode == 0, done.stderr
    assert "Is it worth it? No." in done.stdout


def test_generated_workload_can_be_replayed_and_profiled(agentrt_cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "debate.jsonl.gz"
    done = agentrt_cli("generate", "debate", "--sessions", "3", "--seed", "2", "-o", out)
    assert done.returncode == 0, done.stderr
    assert "3 sessions" in done.stdout
    with gzip.open(out, "rt") as file:
        assert json.loads(next(file))["workload"] == "debate"
    assert agentrt_cli("profile", out).returncode == 0


def test_generate_without_a_name_lists_what_there_is(agentrt_cli: Run) -> None:
    done = agentrt_cli("generate")
    assert done.returncode == 0
    for name in ("pipeline", "debate", "selector_chat", "research_tree", "coding_team"):
        assert name in done.stdout


def test_generate_names_the_missing_output(agentrt_cli: Run) -> None:
    done = agentrt_cli("generate", "pipeline")
    assert done.returncode == 1
    assert done.stderr == "error: --output: no file named; write agentrt generate pipeline -o pipeline.jsonl.gz\n"


def test_convert_writes_the_same_workload(agentrt_cli: Run, tiny_trace: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl.gz"
    done = agentrt_cli("convert", tiny_trace, copy)
    assert done.returncode == 0, done.stderr
    tables = [agentrt_cli("replay", path, "-p", "lru,min", "--sessions", "3").stdout for path in (tiny_trace, copy)]
    assert tables[0] == tables[1]


def test_convert_reads_mooncake(agentrt_cli: Run, tmp_path: Path) -> None:
    source = tmp_path / "mooncake.jsonl"
    lines = [
        {"timestamp": 1000 * i, "input_length": 512 * (i + 1) - 3, "output_length": 5, "hash_ids": list(range(i + 1))}
        for i in range(4)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    target = tmp_path / "out.jsonl"
    done = agentrt_cli("convert", source, target)
    assert done.returncode == 0, done.stderr
    assert "4 calls" in done.stdout
