"""The engine benchmark in simulated time: the same every time, and stock vLLM's hits under policy `lru`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benches.e2e.simulated import Outcome, run
from benches.e2e.workloads import sessions
from tests.engines.vllm.scheduler import transfer

pytestmark = pytest.mark.usefixtures("vllm")

CALLS, BLOCKS = 150, 280


def outcome(flag: dict[str, Any] | None) -> Outcome:
    return run(sessions("coding_team", Path(), 0), CALLS, BLOCKS, 0, flag, lambda tokens: 10_000 + 80 * tokens)


@pytest.fixture(autouse=True)
def same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """All chains of hashes begin with the same one."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")


def test_a_run_can_be_repeated_to_the_digit() -> None:
    assert outcome(transfer("agentrt")) == outcome(transfer("agentrt"))


def test_in_its_own_order_vllm_hits_what_it_hits_alone_and_answers_as_soon() -> None:
    stock, neutral = outcome(None), outcome(transfer("lru"))
    assert len(stock.ttft_us) == CALLS
    assert 0 < stock.hit < stock.tokens
    assert (neutral.hit, neutral.keys) == (stock.hit, stock.keys)
    # Looking at the simulated clock takes the adapter a few microseconds.
    assert neutral.ttft_ms() == pytest.approx(stock.ttft_ms(), rel=0.01)


def test_more_hits_are_sooner_answers() -> None:
    stock, ours = outcome(None), outcome(transfer("agentrt"))
    assert ours.hit_rate > stock.hit_rate
    assert ours.ttft_ms() < stock.ttft_ms()
    assert ours.calls_per_s > stock.calls_per_s
