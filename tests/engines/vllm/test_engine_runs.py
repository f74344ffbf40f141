"""A real vLLM engine with a model of two layers: the same answers under every policy, whatever happens.

One stock engine and one with the connector serve all tests; see `benches/e2e/worker.py`. Calls come from a generator,
so no recorded trace is needed. Arithmetic is in float32: in bfloat16 answers may depend on what is batched together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benches.e2e.run import Engine, predict

BLOCKS = 180
CALLS = 180


class Engines:
    """Both engines."""

    def __init__(self, folder: Path) -> None:
        options = {"model": "tiny", "dtype": "float32", "batch": 4, "blocks": 2000}
        self.engines = [
            Engine(name, {**options, "stock": name == "stock", "model_folder": str(folder / name)}, folder)
            for name in ("connector", "stock")
        ]
        self.folder = folder

    def run(self, core: str, **job: Any) -> dict[str, Any]:
        """A run of 180 calls, unless asked otherwise; the cache is a small part of what they use."""
        usual = {
            "workload": "coding_team", "traces": str(self.folder), "seed": 0, "pool_blocks": BLOCKS, "concurrency": 8,
            "calls": CALLS, "max_tokens": 2, "named": True, "extra": {}, "future": None, "abort_every": 0,
        }  # fmt: skip
        result = self.engines[core == "stock"].run({**usual, "core": core, **job})
        assert result["leaked_blocks"] == 0
        # On a busy machine any hook may be slow.
        result["faults"] = {kind: n for kind, n in result["faults"].items() if not kind.endswith(": slow")}
        return result


@pytest.fixture(scope="module")
def engines(vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    found = Engines(tmp_path_factory.mktemp("engines"))
    try:
        for engine in found.engines:
            engine.answer()
        yield found
    finally:
        for engine in found.engines:
            engine.stop()


@pytest.fixture(scope="module")
def stock(engines: Engines) -> dict[str, Any]:
    return engines.run("stock")


def test_neutral_reproduces_stock_hit_for_hit(engines: Engines, stock: dict[str, Any]) -> None:
    neutral = engines.run("lru")
    assert neutral["faults"] == {}
    for what in ("hit_tokens", "prompt_tokens", "steps", "order", "outputs"):
        assert neutral[what] == stock[what]


@pytest.mark.parametrize("named", [True, False])
def test_agentrt_answers_as_stock_does(engines: Engines, stock: dict[str, Any], named: bool) -> None:
    agentrt = engines.run("agentrt", named=named)
    assert agentrt["faults"] == {}
    assert agentrt["outputs"] == stock["outputs"]
    assert agentrt["hit_tokens"] > 0


@pytest.mark.parametrize("scheduling", ["speculation", "batch_shaping,fairness,speculation,tool_gap"])
def test_scheduling_policies_change_no_answer(engines: Engines, stock: dict[str, Any], scheduling: str) -> None:
    # By the clock of the wall a loaded machine may predict the next call for a moment that has passed.
    run = engines.run("agentrt", extra={"scheduling": scheduling}, pause_every=6, step_clock_us=50_000)
    assert run["faults"] == {}
    # In another order other sessions' calls may be among the first so many.
    both = run["outputs"].keys() & stock["outputs"].keys()
    assert len(run["outputs"]) == CALLS
    assert len(both) > 0.9 * CALLS
    assert all(run["outputs"][name] == stock["outputs"][name] for name in both)
    assert run["prefilled_tokens"] > 0


def test_the_offline_order_hits_most(engines: Engines, stock: dict[str, Any]) -> None:
    optimal = engines.run("benches.e2e.cores:Optimal", future=stock["order"])
    published = engines.run("benches.e2e.cores:CacheScout")
    assert optimal["outputs"] == published["outputs"] == stock["outputs"]
    assert optimal["faults"] == published["faults"] == {}
    assert optimal["hit_tokens"] > max(stock["hit_tokens"], published["hit_tokens"])


# Time goes by steps, so a run and its recording are the same every time. A block that agentrt names a step earlier or
# later may change what follows.
@pytest.mark.parametrize(("policy", "tolerance"), [("lru", 0.003), ("agentrt", 0.01)])
def test_a_recording_replays_to_the_measured_hits(engines: Engines, policy: str, tolerance: float) -> None:
    path = engines.folder / "recording.jsonl"
    run = engines.run(policy, extra={"record": str(path)}, step_clock_us=50_000)
    assert len(path.read_text().splitlines()) == CALLS
    replayed = predict(path, BLOCKS, {"it": policy})["it"]
    assert replayed == pytest.approx(run["hit_rate"], abs=tolerance)


class Broken:
    """A policy of which nothing works."""

    def __init__(self, pool_blocks: int, workload: str) -> None:
        pass

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


def test_a_policy_that_only_raises_leaves_stock_behaviour(engines: Engines, stock: dict[str, Any]) -> None:
    broken = engines.run("tests.engines.vllm.test_engine_runs:Broken")
    # In every hook, until it has faulted too often and stays away.
    assert len(broken["faults"]) >= 3
    for what in ("hit_tokens", "prompt_tokens", "order", "outputs"):
        assert broken[what] == stock[what]


@pytest.mark.parametrize("core", ["lru", "agentrt"])
def test_calls_that_are_aborted_hurt_no_other(engines: Engines, stock: dict[str, Any], core: str) -> None:
    run = engines.run(core, abort_every=3)
    assert run["faults"] == {}
    assert run["calls"] == CALLS * 2 // 3
    assert all(run["outputs"][call] == stock["outputs"][call] for call in run["outputs"].keys() & stock["outputs"])


@pytest.mark.parametrize("core", ["lru", "agentrt"])
def test_preempted_calls_are_answered_the_same(engines: Engines, core: str) -> None:
    tight: dict[str, Any] = {"workload": "research_tree", "pool_blocks": 50, "max_tokens": 200, "calls": 24}
    stock = engines.run("stock", **tight)
    run = engines.run(core, **tight)
    assert min(run["preemptions"], stock["preemptions"]) > 0
    assert run["faults"] == {}
    assert {call: run["outputs"][call] for call in stock["outputs"]} == stock["outputs"]
