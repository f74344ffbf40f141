"""The policy of the CPU tier inside vLLM's real offloading manager."""

from __future__ import annotations

import random
from typing import Any

import pytest

from agentrt.engines.vllm.callers import CALLERS
from agentrt.engines.vllm.identity import Identities, Identity

pytestmark = pytest.mark.usefixtures("vllm")


def key(number: int) -> Any:
    from vllm.v1.kv_offload.base import make_offload_key

    return make_offload_key(number.to_bytes(32, "big"), 0)


def manager(policy: str, chunks: int) -> Any:
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

    from agentrt.engines.vllm.plugin import register

    register()
    return CPUOffloadingManager(chunks, cache_policy=policy)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock that the tests turn."""
    from agentrt.engines.vllm import offload

    now = [1_000_000]
    monkeypatch.setattr(offload, "monotonic_us", lambda: now[0])
    return now


def request(made: Any, name: str, chain: list[int], params: dict[str, Any] | None = None) -> int:
    """One request: loads what is there, stores the rest; how many chunks were there."""
    from vllm.v1.kv_offload.base import LookupResult, ReqContext

    context = ReqContext(req_id=name, kv_transfer_params=params)
    keys = [key(n) for n in chain]
    if hasattr(context, "set_offload_key_position"):
        for i, one in enumerate(keys):
            context.set_offload_key_position(one, i)
    made.on_new_request(context)
    hit = 0
    while hit < len(keys) and made.lookup(keys[hit], context) is LookupResult.HIT:
        hit += 1
    if hit:
        made.prepare_load(keys[:hit], context)
        made.complete_load(keys[:hit], context)
    if keys[hit:]:
        stored = made.prepare_store(keys[hit:], context)
        if stored is not None:
            made.complete_store(stored.keys_to_store, context)
    if not hasattr(type(made._policy).__mro__[1], "on_request_finished"):
        made.touch(keys, context)  # as vLLM 0.30 does
    made.on_request_finished(context)
    return hit


def test_vllm_finds_it_by_name() -> None:
    from agentrt.engines.vllm.offload import AgentRTCachePolicy

    assert isinstance(manager("agentrt", 8)._policy, AgentRTCachePolicy)


def test_it_keeps_what_is_used_again_where_lru_keeps_nothing(clock: list[int]) -> None:
    """Four agents take turns, each with a prompt of its own; the tier holds three of them."""
    hits = {}
    for policy in ("lru", "agentrt"):
        made = manager(policy, 30)
        hits[policy] = 0
        for turn in range(80):
            agent = turn % 4
            clock[0] += 1_000_000
            named = {"agentrt": {"session_id": "run", "agent_id": f"a{agent}"}}
            hits[policy] += request(made, f"r{turn}", [100 * agent + i for i in range(10)], named)
    assert hits["lru"] == 0
    assert hits["agentrt"] > 0.4 * 80 * 10
    assert made._policy.core.runtime.stats()["evicted_blocks"] > 0
    assert not made._policy.guard.faults


def test_chunks_in_transfer_and_protected_ones_stay(clock: list[int]) -> None:
    from vllm.v1.kv_offload.base import ReqContext

    made, context = manager("agentrt", 8), ReqContext(req_id="loads")
    request(made, "one", [1, 2, 3, 4])
    request(made, "two", [11, 12, 13, 14])
    made.prepare_load([key(1), key(2)], context)
    # Six can go, seven are wanted: nothing goes.
    assert made.prepare_store([key(n) for n in range(20, 27)], context) is None
    assert all(made._policy.get(key(n)) is not None for n in (1, 2, 3, 4, 11, 12, 13, 14))
    # Protected chunks are not counted upon either.
    assert made._policy.evict(6, {key(3)}) is None
    assert made.prepare_store([key(n) for n in range(20, 24)], context) is not None
    assert made._policy.get(key(1)) is not None
    assert made._policy.get(key(2)) is not None


def test_the_tier_never_holds_more_than_it_can_nor_loses_a_chunk(clock: list[int]) -> None:
    rng, made = random.Random(5), manager("agentrt", 40)
    prompts = {s: [1000 * s + i for i in range(6)] for s in range(9)}
    for turn in range(600):
        session = rng.randrange(9)
        clock[0] += rng.randrange(1, 2_000_000)
        request(made, f"r{turn}", prompts[session][: rng.randint(1, 12)])
        prompts[session].append(100_000 + turn)
        policy = made._policy
        held = [chunk.chunk_id for chunk in policy.chunks.values()]
        assert len(set(held)) == len(held) <= 40
        assert set(policy._free) == set(policy.chunks)
        assert len(held) + made._get_num_free_chunks() == 40
        assert set(policy._keys.values()) == set(policy.chunks)
    assert not made._policy.guard.faults
    made.reset_cache()
    assert request(made, "after", prompts[0][:5]) == 0
    assert request(made, "again", prompts[0][:5]) == 5


def test_a_runtime_that_fails_leaves_the_oldest_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    made = manager("agentrt", 8)

    def boom(*_: object, **__: object) -> Any:
        raise RuntimeError("injected")

    monkeypatch.setattr(made._policy.core, "call_started", boom)
    monkeypatch.setattr(made._policy.core, "removed", boom)
    made._policy.core.runtime = None
    for turn in range(20):
        request(made, f"r{turn}", [10 * turn + i for i in range(4)])
    assert request(made, "last", [190, 191, 192, 193]) == 4
    assert made._policy.guard.faults


def test_the_connector_beside_it_says_whose_request_it_is(clock: list[int]) -> None:
    made = manager("agentrt", 8)
    seen: list[tuple[int, int]] = []
    CALLERS.put("known", Identity(7, 3, False, False, False))

    def started(session: int, agent: int, *_: object) -> int:
        seen.append((session, agent))
        return 0

    made._policy.core.call_started = started
    request(made, "known", [1, 2])
    assert seen == [(7, 3)]


@pytest.mark.parametrize("beside", [True, False], ids=["the connector says", "the request says"])
def test_sessions_that_are_over_go_first(clock: list[int], beside: bool) -> None:
    for over, stays in (("old", "new"), ("new", "old")):
        made = manager("agentrt", 24)
        for session, first in (("old", 0), ("new", 100)):
            for turn in range(1, 6):
                clock[0] += 1_000_000
                names: dict[str, Any] = {"session_id": session, "agent_id": "a"}
                request(made, f"{session}-{turn}", list(range(first, first + 2 * turn)), {"agentrt": names})
        names = {"session_id": "other", "agent_id": "b"}
        if beside:
            CALLERS.end(Identities().session(over))
        else:
            names["ended_sessions"] = [over]
        request(made, "tells", list(range(200, 202)), {"agentrt": names})
        request(made, "takes", list(range(300, 306)), {"agentrt": {"session_id": "third", "agent_id": "b"}})
        held = {name: made._policy.get(key(block)) is not None for name, block in (("old", 9), ("new", 109))}
        assert held == {over: False, stays: True}


def test_a_store_that_fails_gives_its_chunks_back() -> None:
    from vllm.v1.kv_offload.base import ReqContext

    made, context = manager("agentrt", 4), ReqContext(req_id="fails")
    stored = made.prepare_store([key(1), key(2)], context)
    made.complete_store(stored.keys_to_store, context, success=False)
    made.on_request_finished(context)
    assert made._get_num_free_chunks() == 4
    assert request(made, "next", [1, 2, 3, 4]) == 0
    assert request(made, "next again", [1, 2, 3, 4]) == 4
