"""Prefills in idle capacity and sessions in tool gaps, in vLLM's real scheduler."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm.scheduler import BLOCK, Server, prompt, transfer
from tests.engines.vllm.test_connector import number
from tests.engines.vllm.test_scheduler import asynchronously, both, busy, offload, small

pytestmark = pytest.mark.usefixtures("vllm")

POLICIES = ("speculation", "tool_gap", "batch_shaping,fairness,speculation,tool_gap")


class Turns:
    """One session in which four agents take turns, each with a prompt of 20 blocks; a pause after each call."""

    def __init__(self, folder: Path, scheduling: str | None = "speculation", blocks: int = 60, **more: Any) -> None:
        extra = {} if scheduling is None else {"scheduling": scheduling}
        self.server = Server(folder, blocks, transfer("agentrt", **extra), **more)
        self.now_us = 1_000_000
        self.adapter.now_us = lambda: self.now_us
        self.calls = 0

    @property
    def adapter(self) -> Any:
        return self.server.connector.adapter

    def add(self, agent: int, tokens: int = 1) -> str:
        self.calls += 1
        name = f"call-{self.calls}"
        blocks = range(100 * agent, 100 * agent + 20)
        self.server.add(name, prompt(*blocks), tokens, session_id="s", agent_id=f"a{agent}")
        return name

    def pause(self) -> int:
        """Lets the engine do what it likes; how many steps it made."""
        steps = 0
        while self.server.scheduler.has_requests():
            self.server.step()
            steps += 1
            assert steps < 200, "it never comes to rest"
        self.now_us += 1_000_000
        return steps

    def call(self, agent: int) -> int:
        """One call and a pause; blocks of its prompt that were hits."""
        name = self.add(agent)
        self.server.run()
        self.pause()
        return self.server.cached[name] // BLOCK

    def rounds(self, n: int) -> list[int]:
        return [self.call(step % 4) for step in range(n)]


def test_what_the_next_agent_begins_with_is_there_when_it_calls(tmp_path: Path) -> None:
    plain, eager = Turns(tmp_path, None), Turns(tmp_path)
    without, hits = plain.rounds(60), eager.rounds(60)
    assert sum(hits[20:]) == 40 * 20, "every call of the later rounds finds its whole prompt"
    assert sum(without[20:]) < sum(hits[20:]) * 0.8
    assert eager.adapter.prefills.computed_tokens > 0
    for turns in (plain, eager):
        turns.server.check()


def test_a_client_makes_prefills_give_way(tmp_path: Path) -> None:
    turns = Turns(tmp_path)
    turns.rounds(24)
    turns.add(0)
    turns.server.run()
    scheduler, prefills = turns.server.scheduler, turns.adapter.prefills
    for _ in range(5):
        if prefills.live:
            break
        turns.server.step()
    assert prefills.live, "there is something to prefill"
    name = turns.add(3)
    assert not prefills.live
    assert list(scheduler.requests) == [name]
    assert prefills.withdrawn > 0
    turns.server.run()
    turns.pause()
    turns.server.check()


def test_nothing_is_prefilled_beside_clients(tmp_path: Path) -> None:
    turns = Turns(tmp_path)
    turns.rounds(24)
    turns.add(2, tokens=400)
    before = turns.adapter.prefills.requests
    for _ in range(100):
        turns.server.step()
    assert turns.adapter.prefills.requests == before
    turns.server.run()
    turns.pause()
    turns.server.check()


def test_agents_in_no_order_are_left_alone(tmp_path: Path) -> None:
    turns, rng = Turns(tmp_path), random.Random(5)
    for _ in range(120):
        turns.call(rng.randrange(4))
    computed = turns.adapter.prefills.computed_tokens
    assert computed < 0.05 * turns.adapter.counters.prompt_tokens
    turns.server.check()


def test_an_idle_engine_comes_to_rest_even_if_prefills_leave_nothing(tmp_path: Path) -> None:
    turns = Turns(tmp_path)
    turns.rounds(24)
    # Whatever is computed, the core does not hear of it and wants it again.
    turns.adapter.runtime_core.restored = lambda *_: None
    turns.rounds(12)
    assert turns.adapter.prefills.requests < 200
    turns.server.check()


def test_a_sleeping_engine_is_left_alone(tmp_path: Path) -> None:
    from vllm.v1.core.sched.interface import PauseState

    turns = Turns(tmp_path)
    turns.rounds(24)
    turns.add(0)
    turns.server.run()
    turns.server.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    before = turns.adapter.prefills.requests
    assert not turns.adapter.pending()
    for _ in range(5):
        turns.server.step()
    assert turns.adapter.prefills.requests == before
    turns.server.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert turns.rounds(12)
    turns.server.check()


def test_token_ids_kept_for_prefills_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentrt.engines.vllm import prefill

    monkeypatch.setattr(prefill, "MOST_TOKENS", 2_000)
    turns = Turns(tmp_path)
    turns.rounds(24)
    prefills = turns.adapter.prefills
    assert 0 < prefills._tokens <= 2_000
    assert prefills._tokens == sum(len(prompt.tokens) for prompt in prefills._prompts.values())
    turns.server.check()


@asynchronously
@pytest.mark.parametrize("scheduling", POLICIES)
def test_everything_is_served_under_load_and_nothing_is_left_behind(
    tmp_path: Path, scheduling: str, asynchronous: bool
) -> None:
    server = small(tmp_path, transfer("agentrt", scheduling=scheduling), asynchronous=asynchronous)
    busy(server)
    while server.scheduler.has_requests():
        server.step()
    server.check()
    assert server.preempted, "the load presses hard enough"
    repairs = server.connector.adapter.core.runtime.repairs()
    assert repairs["unknown_calls"] == repairs["duplicate_calls"] == 0


@asynchronously
@pytest.mark.parametrize("scheduling", POLICIES)
def test_a_pool_of_one_session_serves_all(tmp_path: Path, scheduling: str, asynchronous: bool) -> None:
    """What is kept gives way: nothing can wait for ever."""
    kv = transfer("agentrt", scheduling=scheduling)
    server = Server(tmp_path, 24, kv, asynchronous=asynchronous, max_num_seqs=4)
    for turn in range(5):
        for session in range(4):
            blocks = range(100 * session, 100 * session + 12 + 2 * turn)
            server.add(f"{session}-{turn}", prompt(*blocks), 2, session_id=f"s{session}", agent_id="a")
        server.run()
    while server.scheduler.has_requests():
        server.step()
    server.check()
    assert len(server.order) >= 20


def test_sessions_in_a_gap_are_kept_while_there_is_room_and_go_when_there_is_none(tmp_path: Path) -> None:
    server = Server(tmp_path, 60, transfer("agentrt", scheduling="tool_gap"))
    adapter = server.connector.adapter
    now = [1_000_000]
    adapter.now_us = lambda: now[0]
    for turn in range(4):
        server.add(f"t{turn}", prompt(*range(10 + turn)), 1, session_id="s", agent_id="a", tool="search")
        server.run()
        now[0] += 300_000
    # Strangers pass by; together they need more than is left, each of them less.
    for n in range(6):
        server.add(
            f"x{n}",
            prompt(*range(1000 * n + 1000, 1000 * n + 1012)),
            1,
            session_id=f"x{n}",
            agent_id="b",
            session_end=True,
        )
        server.run()
        now[0] += 10_000
    server.add("back", prompt(*range(14)), 1, session_id="s", agent_id="a")
    server.run()
    assert server.cached["back"] == 13 * BLOCK, "it was kept"
    assert adapter.gaps.decided["keep"] > 0
    server.add("large", prompt(*range(50_000, 50_057)), 1, session_id="y", agent_id="b")
    server.run()
    assert adapter.gaps.given_blocks > 0 or adapter.gaps.released.named > 0, "and it gives way"
    server.check()


def test_a_session_that_is_over_is_in_no_gap(tmp_path: Path) -> None:
    server = Server(tmp_path, 60, transfer("agentrt", scheduling="tool_gap"))
    sessions = server.connector.adapter.gaps._sessions
    for name in ("s", "t"):
        server.add(f"{name}-1", prompt(*range(10)), 1, session_id=name, agent_id="a", tool="search")
        server.run()
    assert len(sessions) == 2
    server.add("u-1", prompt(*range(10)), 1, session_id="u", agent_id="a", ended_sessions=["s"])
    assert len(sessions) == 2
    assert number("s") not in sessions
    server.run()
    server.check()


def test_the_cpu_tier_beside_means_that_sessions_can_be_demoted(tmp_path: Path) -> None:
    server = Server(tmp_path, 96, both(transfer("agentrt", scheduling="speculation,tool_gap"), offload("agentrt")))
    assert server.connector.adapter.prefills is not None, "the scheduler is found behind a MultiConnector"
    for n in range(12):
        server.add(f"r{n}", prompt(n % 3, *range(10 * n, 10 * n + 9)), 4, session_id=f"s{n}", agent_id="a")
        server.step()
    server.run()
    assert not server.connector.guard.faults


def boom(*_: object, **__: object) -> Any:
    raise RuntimeError("injected")


PARTS = {
    "prefills": ["remember", "queue", "withdraw", "ended", "paused"],
    "gaps": ["arrived", "ended", "ask", "evict", "_resident", "_spare", "_answers"],
}


@pytest.mark.parametrize(("part", "method"), [(part, method) for part, methods in PARTS.items() for method in methods])
def test_a_part_that_raises_fails_no_request(tmp_path: Path, part: str, method: str) -> None:
    turns = Turns(tmp_path, "speculation,tool_gap")
    target = type(getattr(turns.adapter, part))
    broken = type(target.__name__, (target,), {method: property(boom) if method == "paused" else boom})
    getattr(turns.adapter, part).__class__ = broken
    for step in range(30):
        name = turns.add(step % 4)
        turns.server.run()
        turns.pause()
        assert name in turns.server.finished
    queue = turns.server.pool.free_block_queue
    assert queue.num_free_blocks == turns.server.pool.num_gpu_blocks - 1


@pytest.mark.parametrize("method", ["idle", "gaps"])
@pytest.mark.parametrize("answer", [None, 7, ["keep"] * 99, [None]])
def test_answers_that_make_no_sense_fail_no_request(tmp_path: Path, method: str, answer: object) -> None:
    turns = Turns(tmp_path, "speculation,tool_gap")
    setattr(turns.adapter.scheduling, method, lambda *_: answer)
    for step in range(30):
        name = turns.add(step % 4)
        turns.server.run()
        turns.pause()
        assert name in turns.server.finished


def test_without_a_scheduler_only_prefill_is_missing(tmp_path: Path) -> None:
    from agentrt.engines.vllm.adapter import Settings
    from agentrt.engines.vllm.planning import make_adapter

    server = Server(tmp_path, 60, transfer("agentrt"))
    settings = Settings(scheduling="speculation,tool_gap")
    adapter: Any = make_adapter(server.pool, settings, BLOCK, 1, 2048, None)
    assert adapter.prefills is None
    assert adapter.gaps is not None


def test_policies_that_need_none_of_it_get_the_plain_adapter(tmp_path: Path) -> None:
    from agentrt.engines.vllm.adapter import Adapter

    for extra in ({}, {"scheduling": "batch_shaping,fairness"}):
        server = Server(tmp_path, 60, transfer("agentrt", **extra))
        assert type(server.connector.adapter) is Adapter
        assert not server.connector.has_pending_push_work()
