"""What each part and what prediction is worth, computed from results."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import Run

from agentrt import replay
from agentrt.replay.summary import parts, prediction


@pytest.fixture(scope="module")
def ablated() -> replay.Replay:
    trace = replay.Trace.generate("research_tree", sessions=25, seed=1)
    policies = ["agentrt", "agentrt-no-prediction", "lru"]
    return replay.run([trace], policies=policies, capacities=["10%", "20%"], sessions=8, seed=[0, 1])


def test_parts_name_the_variants_and_the_share_of_the_gain_that_is_lost(ablated: replay.Replay) -> None:
    whole, without = parts(ablated)
    assert (whole.policy, without.policy) == ("agentrt", "agentrt-no-prediction")
    assert whole.lost == 0
    assert without.lost == pytest.approx(1 - without.gap_closed / whole.gap_closed)
    assert len(whole.by_seed) == 2
    assert whole.gap_closed == pytest.approx(sum(whole.by_seed) / 2)


def test_prediction_pays_where_a_planner_hands_over_to_researchers(ablated: replay.Replay) -> None:
    one, predictable = prediction(ablated, {"research_tree": 0.64})
    assert (one.name, one.r, one.cells) == ("research_tree", 0.64, 4)
    assert (predictable.r, predictable.cells, predictable.lost) == (None, 4, one.lost)
    assert one.lost > 0.25
    (_, below) = prediction(ablated, {"research_tree": 0.1})
    assert below.name == "R below"


def test_results_without_variants_have_no_parts(tiny_trace: Path) -> None:
    done = replay.run([tiny_trace], policies=["agentrt", "lru"], capacities=["25%"], sessions=3)
    assert parts(done) == []
    assert prediction(done, {"tiny": 1.0}) == []


def test_predictability_goes_by_the_names_of_results() -> None:
    trace = replay.Trace.generate("pipeline", sessions=4)
    assert replay.predictability([trace, trace]) == {"pipeline": 1.0, "pipeline#2": 1.0}


def test_the_command_prints_both_tables(agentrt_cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl.gz"
    replay.Trace.generate("selector_chat", sessions=20, seed=1).write(path)
    done = agentrt_cli(
        "replay", path, "--policy", "agentrt,agentrt-no-prediction,oracle-time", "-c", "15%", "--sessions", "8"
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "What each part is worth",
        "oracle-time",
        "What foreseeing the next agent is worth",
        "R of 0.4 or more",
    ):
        assert words in done.stdout, words
