"""Inside vLLM's real scheduler: preemption, aborts, chunks, resets, hybrid models, other connectors beside."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm.scheduler import Server, prompt, transfer

pytestmark = pytest.mark.usefixtures("vllm")


def busy(server: Server, seed: int = 3, requests: int = 120) -> None:
    """Sessions that extend their prompts, more of them at a time than the pool holds; some requests are aborted.

    What is sent, and what is aborted after how many steps, is the same whatever the policy; time goes by steps.
    """
    from vllm.v1.request import RequestStatus

    sessions = [random.Random(1000 * seed + n) for n in range(12)]
    prompts: list[list[int]] = [[] for _ in sessions]
    left = [requests // len(sessions)] * len(sessions)
    pause, abort = [0] * len(sessions), dict[str, int]()
    steps = 0
    if server.connector is not None:
        server.connector.adapter.now_us = lambda: 1_000_000 + 30_000 * steps
    while any(left) or server.scheduler.requests:
        # A session has one request at a time.
        running = {name.split("-")[0] for name in server.scheduler.requests}
        for n, rng in enumerate(sessions):
            if not left[n] or f"s{n}" in running:
                continue
            if pause[n]:
                pause[n] -= 1
                continue
            if not prompts[n] or len(prompts[n]) > 40:
                prompts[n] = [n % 3, 1, 2]
            prompts[n] += (100_000 * n + 10 * left[n] + 100 + i for i in range(rng.randint(1, 4)))
            name = f"s{n}-{left[n]}"
            server.add(name, prompt(*prompts[n]), rng.randint(1, 120), session_id=f"s{n}", agent_id=f"a{n % 3}")
            left[n] -= 1
            pause[n] = rng.randrange(5)
            if rng.random() < 0.1:
                abort[name] = rng.randrange(60)
        server.step()
        steps += 1
        for name in [name for name in abort if name in server.scheduler.requests]:
            abort[name] -= 1
            if abort[name] < 0:
                del abort[name]
                server.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    server.check()


def small(folder: Path, kv_transfer: dict[str, Any] | None, **more: Any) -> Server:
    """A server with a pool that a few sessions fill, and prompts computed in chunks."""
    return Server(folder, 96, kv_transfer, max_num_batched_tokens=512, max_num_seqs=8, **more)


# As vLLM schedules on CPUs, and by default on GPUs.
asynchronously = pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])


@asynchronously
def test_lru_is_stock_vllm_with_preemptions_chunks_and_aborts(tmp_path: Path, asynchronous: bool) -> None:
    stock, neutral = (small(tmp_path, kv, asynchronous=asynchronous) for kv in (None, transfer("lru")))
    for server in (stock, neutral):
        busy(server)
    assert stock.preempted, "the load presses hard enough"
    assert neutral.order == stock.order
    assert neutral.cached == stock.cached
    assert neutral.preempted == stock.preempted
    assert neutral.connector.adapter.ranker.ranked_blocks > 100


@asynchronously
@pytest.mark.parametrize("role", ["kv_producer", "kv_both"])
def test_everything_is_served_with_preemptions_chunks_and_aborts(tmp_path: Path, role: str, asynchronous: bool) -> None:
    server = small(tmp_path, {**transfer("agentrt"), "kv_role": role}, asynchronous=asynchronous)
    busy(server)
    assert server.preempted
    assert server.connector.adapter.ranker.ranked_blocks > 100
    repairs = server.connector.adapter.core.runtime.repairs()
    assert repairs["unknown_calls"] == repairs["duplicate_calls"] == 0


@asynchronously
@pytest.mark.parametrize("role", ["kv_producer", "kv_both"])
def test_agentrt_hits_more_than_vllms_own_order(tmp_path: Path, role: str, asynchronous: bool) -> None:
    hits = []
    for policy in ("lru", "agentrt"):
        server = small(tmp_path, {**transfer(policy), "kv_role": role}, asynchronous=asynchronous)
        busy(server, requests=400)
        hits.append(sum(server.cached.values()))
    assert hits[1] > 1.1 * hits[0]


@asynchronously
def test_a_reset_under_load_starts_over(tmp_path: Path, asynchronous: bool) -> None:
    server = small(tmp_path, transfer("agentrt"), asynchronous=asynchronous)
    for n in range(4):
        server.add(f"r{n}", prompt(*range(10 * n, 10 * n + 10)), 20, session_id=f"s{n}")
    for _ in range(3):
        server.step()
    # As `/reset_prefix_cache` and `/sleep` do.
    assert server.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    server.run()
    assert server.connector.adapter.counters.resets == 1
    server.add("again", prompt(*range(10)), 1)
    server.run()
    assert server.cached["again"] == 320
    server.check()


def test_a_paused_engine_sleeps_and_wakes(tmp_path: Path) -> None:
    from vllm.v1.core.sched.interface import PauseState

    server = small(tmp_path, transfer("agentrt"))
    server.add("before", prompt(*range(8)), 2)
    server.run()
    server.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    server.scheduler.reset_prefix_cache(reset_connector=True)
    server.add("while it sleeps", prompt(*range(8)), 2)
    assert server.step() == []
    server.scheduler.set_pause_state(PauseState.UNPAUSED)
    server.run()
    assert server.cached["while it sleeps"] == 0
    server.check()


def test_models_with_several_cache_groups_run_in_vllms_order(tmp_path: Path) -> None:
    stock, hybrid = (small(tmp_path, kv, windows=[64]) for kv in (None, transfer("agentrt")))
    for server in (stock, hybrid):
        busy(server)
    adapter = hybrid.connector.adapter
    assert not adapter.acting
    assert adapter.counters.finished > 100
    assert hybrid.cached == stock.cached
    assert hybrid.preempted == stock.preempted


def offload(policy: str) -> dict[str, Any]:
    """VLLM's own CPU offload with a policy for its tier."""
    extra = {"cpu_bytes_to_use": 1 << 20, "eviction_policy": policy}
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def both(*connectors: dict[str, Any]) -> dict[str, Any]:
    """Several connectors in one engine."""
    return {
        "kv_connector": "MultiConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": list(connectors)},
    }  # fmt: skip


@pytest.mark.parametrize("first", [True, False], ids=["in front", "behind"])
def test_another_connector_may_stand_beside(tmp_path: Path, first: bool) -> None:
    pair = [transfer("agentrt"), offload("agentrt")]
    server = Server(tmp_path, 96, both(*(pair if first else pair[::-1])))
    for n in range(12):
        server.add(f"r{n}", prompt(n % 3, *range(10 * n, 10 * n + 9)), 4, session_id=f"s{n}", agent_id="a")
        server.step()
    server.run()
    assert server.connector.adapter.acting
    assert server.connector.adapter.ranker.ranked_blocks > 0
    assert server.connector.adapter.counters.finished == 12
    assert not server.connector.guard.faults
