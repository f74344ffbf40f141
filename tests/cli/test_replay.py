"""``agentrt replay`` end to end: files in, table, JSON and HTML out."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import Run

KEYS = [
    "workload", "policy", "sessions", "capacity_fraction", "capacity_blocks", "calls", "prompt_blocks", "hit_blocks",
    "hit_rate", "host_hit_rate", "ttft_ms", "makespan_s", "gap_closed", "evictions", "prefetched_blocks",
    "prefetch_used_blocks",
]  # fmt: skip


def test_json_has_exactly_the_documented_fields(agentrt_cli: Run, tiny_trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = agentrt_cli("replay", tiny_trace, "--policy", "lru,lfu,min", "--capacity", "25%,40", "--sessions", "3",
                       "--seed", "7", "--json", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert list(result) == ["version", "seed", "results"]
    assert result["version"] == 1
    assert result["seed"] == 7
    assert [list(row) for row in result["results"]] == [KEYS] * 6
    cells = [(row["policy"], row["capacity_fraction"], row["capacity_blocks"]) for row in result["results"]]
    assert cells == [(p, f, n) for f, n in ((0.25, 30), (None, 40)) for p in ("lru", "lfu", "min")]
    for row in result["results"]:
        assert row["workload"] == "tiny"
        assert row["sessions"] == 3
        assert row["hit_rate"] == row["hit_blocks"] / row["prompt_blocks"]
        assert sorted(row["ttft_ms"]) == ["mean", "p50", "p99"]
        assert row["host_hit_rate"] is None
        assert row["prefetched_blocks"] is None
        assert row["prefetch_used_blocks"] is None


def test_gap_closed_is_0_for_lru_and_1_for_min_even_where_only_one_is_asked_for(
    agentrt_cli: Run, tiny_trace: Path, tmp_path: Path
) -> None:
    gaps = {}
    for policy in ("lru", "min"):
        out = tmp_path / f"{policy}.json"
        done = agentrt_cli(
            "replay", tiny_trace, "--policy", policy, "--capacity", "30%", "--sessions", "4", "--json", out
        )
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(out.read_text())["results"]
        gaps[policy] = row["gap_closed"]
    assert gaps == {"lru": 0.0, "min": 1.0}


def test_same_command_writes_the_same_bytes_and_another_seed_does_not(
    agentrt_cli: Run, tiny_trace: Path, tmp_path: Path
) -> None:
    texts = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        out = tmp_path / name
        done = agentrt_cli(
            "replay", tiny_trace, "--policy", "lru,min", "--sessions", "3", "--seed", seed, "--json", out
        )
        assert done.returncode == 0, done.stderr
        texts.append(out.read_text().replace(f'"seed": {seed}', ""))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_several_seeds_are_told_apart(agentrt_cli: Run, tiny_trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = agentrt_cli("replay", tiny_trace, "-p", "lru", "-c", "25%", "--seed", "0,1,2", "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["seed"] == [0, 1, 2]
    assert [row["seed"] for row in result["results"]] == [0, 1, 2]


def test_table_names_each_workload_capacity_and_policy(agentrt_cli: Run, tiny_trace: Path) -> None:
    done = agentrt_cli("replay", tiny_trace, "--policy", "lru,min", "--capacity", "10%,50%")
    assert done.returncode == 0, done.stderr
    for word in ("tiny", "lru", "min", "10%", "50%", "gap", "TTFT"):
        assert word in done.stdout


def test_each_order_runs(agentrt_cli: Run, tiny_trace: Path) -> None:
    for order in ("closed", "open", "file"):
        done = agentrt_cli("replay", tiny_trace, "--order", order, "--policy", "lru")
        assert done.returncode == 0, done.stderr
        assert f"{order} order" in done.stdout


def test_without_a_trace_the_five_built_in_workloads_run(agentrt_cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = agentrt_cli("replay", "--policy", "lru", "--capacity", "5%", "--json", out)
    assert done.returncode == 0, done.stderr
    assert len({row["workload"] for row in json.loads(out.read_text())["results"]}) == 5


def test_report_is_one_page_that_loads_nothing(agentrt_cli: Run, tiny_trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = agentrt_cli("replay", tiny_trace, "--policy", "lru,min", "--seed", "5", "--html", page)
    assert done.returncode == 0, done.stderr
    assert str(page) in done.stderr
    html = page.read_text()
    markup = re.sub(r"<script[^>]*>.*?</script>", "<script></script>", html, flags=re.DOTALL)
    assert not re.search(r"""<(script|link|img)[^>]*\b(src|href)\s*=|@import|url\(""", markup)
    assert "agentrt replay" in html
    assert "seed 5" in html
    assert "vegaEmbed" in html
    assert html.count("</script>") == 2


def test_a_policy_of_ones_own_is_a_file_and_a_class(agentrt_cli: Run, tiny_trace: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "class Mine:\n"
        "    def call_start(self, call): pass\n"
        "    def call_finish(self, call): pass\n"
        "    def evict(self, n, time_us): return []\n"
    )
    out = tmp_path / "out.json"
    done = agentrt_cli("replay", tiny_trace, "--policy", f"lru,{mine}:Mine", "--json", out)
    assert done.returncode == 0, done.stderr
    assert {row["policy"] for row in json.loads(out.read_text())["results"]} == {"lru", "Mine"}


def test_help_of_every_command_shows_an_example(agentrt_cli: Run) -> None:
    assert "agentrt replay" in agentrt_cli("--help").stdout
    for command in (["replay"], ["explain"], ["profile"], ["generate"], ["convert"], ["policies"], ["policy", "check"]):
        done = agentrt_cli(*command, "--help")
        assert done.returncode == 0, done.stderr
        assert re.search(rf"^\W*agentrt {' '.join(command)}", done.stdout.split("Example")[1], re.MULTILINE), command


def test_every_policy_is_listed_with_a_line_on_what_it_does(agentrt_cli: Run) -> None:
    lines = agentrt_cli("policies").stdout.splitlines()
    assert {"lru", "agentrt", "min"} <= {line.split()[0] for line in lines}
    for line in lines:
        assert len(line.split()) > 2, line


def test_ctrl_c_stops_at_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agentrt", "replay", "--policy", "agentrt,lhd", "--capacity", "5%,6%,7%,8%,9%"]
    command += ["--seed", ",".join(map(str, range(40))), "--json", "out.json"]
    # What a shell runs in the background ignores interrupts, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGINT, before)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=3)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (stdout, stderr.strip()) == ("", "interrupted")
    assert list(tmp_path.iterdir()) == []
