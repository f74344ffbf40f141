"""With policy `lru` the adapter does all its work and changes nothing: same hits, same evictions, in the same order."""

from __future__ import annotations

from pathlib import Path

import pytest
from benches.e2e.pool import closed_loop
from tests.engines.vllm.pool import Engine, faults, fits, read_calls

from agentrt.replay import run

pytestmark = pytest.mark.usefixtures("vllm")

CALLS = 600
BLOCKS = 1500


@pytest.mark.parametrize("workload", ["whowhen_magentic", "marble_research", "taubench_airline"])
def test_lru_hits_and_evicts_as_stock_vllm_does(recorded_traces: list[Path], workload: str) -> None:
    path = next(p for p in recorded_traces if p.name == f"{workload}.jsonl.gz")
    calls = fits(read_calls(path, CALLS), BLOCKS)
    assert len(calls) >= 500
    stock, neutral = Engine(BLOCKS, None), Engine(BLOCKS, "lru")
    for call in calls:
        stock.call(call)
        neutral.call(call)
    neutral.check()
    assert neutral.connector is not None
    assert neutral.connector.adapter is not None
    assert not faults(neutral.connector)
    assert neutral.connector.adapter.ranker.ranked_blocks > 1000
    assert neutral.hits == stock.hits
    assert neutral.evicted == stock.evicted


def test_overlapping_calls_and_chunked_prefill_stay_neutral(recorded_traces: list[Path]) -> None:
    path = next(p for p in recorded_traces if p.name == "marble_research.jsonl.gz")
    calls = fits(read_calls(path, 500), 400)
    engines = Engine(1600, None), Engine(1600, "lru")
    for engine in engines:
        for first, second in zip(calls[::2], calls[1::2], strict=False):
            one, other = engine.request(first), engine.request(second)
            assert engine.admit(one, chunk=64)
            assert engine.admit(other)
            while one.num_computed_tokens < one.num_tokens:
                assert engine.prefill(one, 512)
            assert engine.decode(other, 40)
            assert engine.decode(one, 20)
            engine.finish(one)
            engine.finish(other)
        engine.check()
    stock, neutral = engines
    assert neutral.hits == stock.hits
    assert neutral.evicted == stock.evicted


def test_the_replays_lru_hits_what_vllm_hits(recorded_traces: list[Path]) -> None:
    path = next(p for p in recorded_traces if p.name == "whowhen_magentic.jsonl.gz")
    engine = Engine(BLOCKS + 1, "lru")  # the replay does not count the block with the last, partial tokens
    calls = read_calls(path)
    for call in fits(calls, BLOCKS):
        engine.call(call)
    replay = run([path], policies=["lru"], capacities=[BLOCKS], order="file", share_system_prefix=False)
    (result,) = replay.results
    assert result.calls == len(engine.hits)
    assert result.prompt_blocks == engine.prompt_blocks
    assert result.hit_blocks == engine.hit_blocks


@pytest.mark.parametrize("policy", ["lru", "agentrt"])
@pytest.mark.parametrize("workload", ["whowhen_magentic", "marble_research"])
def test_a_recording_replays_to_the_hit_rate_that_was_measured(
    recorded_traces: list[Path], tmp_path: Path, workload: str, policy: str
) -> None:
    path = next(p for p in recorded_traces if p.name == f"{workload}.jsonl.gz")
    live = tmp_path / "live.jsonl"
    engine = Engine(3000, policy, record=str(live))
    closed_loop(read_calls(path, 800), engine, 3000, concurrency=8, seed=0)
    assert engine.connector is not None
    engine.connector.shutdown()
    (replayed,) = run([live], policies=[policy], capacities=[3000], order="open").results
    assert replayed.calls == len(engine.hits)
    measured = engine.hit_blocks / engine.prompt_blocks
    assert abs(replayed.hit_blocks / replayed.prompt_blocks - measured) < 0.01
