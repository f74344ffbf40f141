"""``agentrt simulate`` end to end: scenarios in, table and JSON out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support import Run


def test_json_has_exactly_the_documented_fields(agentrt_cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = agentrt_cli("simulate", "vtc", "--only", "flood", "--runs", "2", "--seed", "7", "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert list(result) == ["version", "policy", "seed", "scenarios"]
    assert (result["version"], result["policy"], result["seed"]) == (1, "vtc", 7)
    for scenario in result["scenarios"]:
        assert list(scenario) == ["name", "metric", "unit", "better", "baseline_name", "baseline", "policy", "runs"]
        assert scenario["name"] == "flood"
        assert scenario["better"] in ("higher", "lower")
        assert scenario["runs"] == 2
    own = [s for s in result["scenarios"] if s["baseline_name"] == "vtc"]
    assert own
    assert all(s["policy"] == s["baseline"] for s in own)
    assert "flood" in done.stdout
    assert "±" in done.stdout


@pytest.mark.parametrize(
    ("policy", "scenario", "first"),
    [
        ("batch_shaping", "light/pipeline", "mean session completion"),
        ("fairness", "two tenants", "service gap over its bound"),
        ("tool_gap", "bimodal", "mean session completion"),
        ("speculation", "R=0.7", "mean TTFT"),
    ],
)
def test_every_policy_runs_in_its_own_scenarios_beside_every_baseline(
    agentrt_cli: Run, tmp_path: Path, policy: str, scenario: str, first: str
) -> None:
    out = tmp_path / "out.json"
    # Each takes about two seconds; the limit is for machines that are busy with other work.
    arguments = ("--only", scenario, "--runs", "1", "--seed", "3", "--json", out)
    done = agentrt_cli("simulate", policy, *arguments, timeout=100)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert (result["policy"], result["seed"]) == (policy, 3)
    assert result["scenarios"][0]["metric"] == first
    listed = agentrt_cli("simulate", policy, "--list").stdout
    beside = {entry["baseline_name"] for entry in result["scenarios"]}
    assert beside
    assert all(name in listed for name in beside)
    assert all(scenario in entry["name"] for entry in result["scenarios"])
    assert scenario in done.stdout


def test_the_same_command_writes_the_same_bytes(agentrt_cli: Run, tmp_path: Path) -> None:
    outs = [tmp_path / "one.json", tmp_path / "two.json"]
    for out in outs:
        done = agentrt_cli("simulate", "lpm", "--only", "light/pipeline", "--runs", "1", "--json", out)
        assert done.returncode == 0, done.stderr
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_list_names_scenarios_and_baselines_of_every_policy(agentrt_cli: Run) -> None:
    done = agentrt_cli("simulate", "--list")
    assert done.returncode == 0, done.stderr
    for word in ("batch_shaping", "fairness", "tool_gap", "speculation", "fcfs", "continuum", "newcomer", "R=0.5"):
        assert word in done.stdout


def test_what_cannot_be_run_is_refused_with_a_remedy(agentrt_cli: Run) -> None:
    cases = {
        ("nonsense",): "unknown policy",
        ("vtc", "--only", "nowhere"): "--list",
        ("vtc", "--cache", "min", "--only", "flood"): "choose one that learns",
        (): "name a policy",
    }
    for arguments, words in cases.items():
        done = agentrt_cli("simulate", *arguments)
        assert done.returncode in (1, 2), arguments
        assert done.stderr.startswith("error: "), arguments
        assert words in done.stderr, arguments
