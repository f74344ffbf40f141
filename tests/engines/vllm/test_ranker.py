"""What stands at the head of vLLM's free queue before an allocation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tests.engines.vllm.pool import BLOCK, Call, Engine, block_hash, faults

pytestmark = pytest.mark.usefixtures("vllm")


def key(block: int) -> int:
    return int.from_bytes(block_hash(block)[-8:], "big")


class Scripted:
    """A core that names the blocks it is told to, in this order."""

    def __init__(self, *_: object) -> None:
        self.victims: list[int] = []
        self.events: list[tuple[str, list[int]]] = []
        self.asked: list[int] = []
        self.hit = 0

    def _note(self, kind: str, keys: Any) -> None:
        self.events.append((kind, [int(k) for k in keys]))

    def call_queued(self, session: int, agent: int, call: int, now_us: int, keys: Any) -> None:
        self._note("queued", keys)

    def call_started(self, session: int, agent: int, call: int, now_us: int, keys: Any) -> int:
        self._note("start", keys)
        return self.hit

    def stored(self, call: int, now_us: int, keys: Any) -> None:
        self._note("stored", keys)

    def call_ended(self, session: int, call: int, now_us: int, keys: Any) -> None:
        self._note("end", keys)

    def session_ended(self, session: int, now_us: int) -> None:
        self._note("session end", [session])

    def removed(self, now_us: int, keys: Any) -> None:
        self._note("removed", keys)

    def reset(self, now_us: int) -> None:
        self._note("reset", [])

    def evict(self, n: int, now_us: int) -> Sequence[int]:
        self.asked.append(n)
        named, self.victims = self.victims[:n], self.victims[n:]
        return named


def engine(blocks: int) -> tuple[Engine, Scripted]:
    made = Engine(blocks, "tests.engines.vllm.test_ranker:Scripted")
    assert made.connector is not None
    assert made.connector.adapter is not None
    core = made.connector.adapter.core
    assert isinstance(core, Scripted)
    return made, core


def cached(made: Engine, block: int) -> bool:
    return made.pool.get_cached_block(block_hash(block), [0]) is not None


def test_named_victims_go_and_older_blocks_stay() -> None:
    made, core = engine(12)
    made.call(Call("old", "a", [0, 1, 2, 3], []))
    made.call(Call("new", "a", [10, 11, 12, 13], []))
    core.victims = [key(13), key(12), key(11), key(10)]
    made.call(Call("next", "a", [20, 21, 22, 23, 24], []))
    assert [cached(made, b) for b in (0, 1, 2, 3)] == [True] * 4
    # Four unhashed blocks were there, six were needed.
    assert [cached(made, b) for b in (10, 11, 12, 13)] == [True, True, False, False]
    made.check()


def test_unhashed_blocks_go_before_any_victim() -> None:
    made, core = engine(12)
    made.call(Call("s", "a", [0, 1, 2], []))
    core.victims = [key(2), key(1), key(0)]
    made.call(Call("t", "a", [10, 11, 12, 13], []))
    assert core.victims, "nothing had to be named"
    assert all(cached(made, b) for b in (0, 1, 2))


def test_blocks_the_arriving_request_hits_are_never_its_victims() -> None:
    made, core = engine(9)
    made.call(Call("s", "a", [0, 1, 2, 3], []))
    made.call(Call("t", "a", [10, 11], []))
    # The core errs: it names the very blocks that the next prompt begins with.
    core.victims = [key(3), key(2), key(1), key(0), key(11), key(10)]
    assert made.call(Call("s", "a", [0, 1, 2, 3, 4, 5, 6], [])) == 4
    assert all(cached(made, b) for b in range(7))
    made.check()


def test_named_blocks_that_are_hit_before_they_go_are_told_to_the_core_again() -> None:
    made, core = engine(12)
    made.call(Call("s", "a", [0, 1, 2, 3], []))
    core.victims = [key(3), key(2)]
    made.connector.adapter.ranker.prepare(12, 0)  # type: ignore[union-attr]
    core.events.clear()
    assert made.call(Call("s", "a", [0, 1, 2, 3], [])) == 4
    assert ("stored", [key(b) for b in (0, 1, 2, 3)]) in core.events
    core.victims = [key(3)]
    made.call(Call("t", "a", list(range(20, 31)), []))
    made.check()


def test_a_key_that_names_no_block_or_another_one_is_skipped() -> None:
    made, core = engine(8)
    made.call(Call("s", "a", [0, 1, 2, 3, 4], []))
    core.victims = [key(999), 0, (1 << 64) - 1, key(4), key(4), key(3)]
    made.call(Call("t", "a", [10, 11, 12], []))
    assert made.connector is not None
    assert not faults(made.connector)
    assert not cached(made, 4)
    assert cached(made, 0)
    made.check()


def test_blocks_in_use_are_never_moved() -> None:
    made, core = engine(12)
    running = made.request(Call("s", "a", [0, 1, 2, 3], []))
    assert made.admit(running)
    made.call(Call("t", "a", [10, 11, 12], []))
    core.victims = [key(b) for b in (3, 2, 1, 0, 12, 11, 10)]
    made.call(Call("u", "a", [20, 21, 22, 23, 24], []))
    assert all(cached(made, b) for b in (0, 1, 2, 3))
    made.check()
    made.finish(running)
    made.check()


def test_a_block_that_vllm_reuses_by_itself_is_reported_as_removed() -> None:
    made, core = engine(8)
    made.call(Call("s", "a", [0, 1, 2, 3, 4], []))
    made.call(Call("t", "a", [10, 11, 12, 13], []))  # the core names nothing
    removed = [k for kind, keys in core.events if kind == "removed" for k in keys]
    assert sorted(removed) == sorted(key(b) for b in (4, 3))


def test_the_second_copy_of_a_block_goes_first() -> None:
    made, _ = engine(16)
    one, two = (made.request(Call(s, "a", [0, 1, 2], [])) for s in "st")
    # Both are matched before either has been stored: vLLM computes the prefix twice.
    hits = [made.manager.get_computed_blocks(r) for r in (one, two)]
    for request, (blocks, n, _) in zip((one, two), hits, strict=True):
        made.connector.get_num_new_matched_tokens(request, n)  # type: ignore[union-attr]
        made.manager.allocate_slots(request, request.num_tokens - n, n, blocks)
        made.connector.update_state_after_alloc(request, made.manager.get_blocks(request.request_id), 0)  # type: ignore[union-attr]
        request.num_computed_tokens = request.num_tokens
    for request in (one, two):
        made.finish(request)
    made.call(Call("u", "a", list(range(20, 32)), []))
    assert all(cached(made, b) for b in (0, 1, 2))
    assert made.connector.adapter.ranker.duplicate_blocks == 3  # type: ignore[union-attr]
    made.check()


def test_keys_are_the_integers_of_vllms_kv_events() -> None:
    from agentrt._core import block_keys

    hashes = [bytes(range(i, i + 32)) for i in range(5)]
    expected = [int.from_bytes(h, "big") & ((1 << 64) - 1) for h in hashes]
    assert block_keys(hashes, 0, 5).tolist() == expected
    assert block_keys([h[:20] for h in hashes], 0, 9).tolist() == [int.from_bytes(h[12:20], "big") for h in hashes]
    assert block_keys(hashes, 3, 4).tolist() == expected[3:4]
    assert block_keys([], 0, 3).dtype == np.uint64


def test_decoding_takes_victims_too() -> None:
    made, core = engine(12)
    made.call(Call("s", "a", [0, 1, 2], []))
    made.call(Call("t", "a", [10, 11, 12], []))
    request = made.request(Call("u", "a", [20, 21, 22], []))
    assert made.admit(request)
    core.victims = [key(b) for b in (12, 11, 10, 2, 1, 0)]
    assert made.decode(request, 5 * BLOCK)
    assert all(cached(made, b) for b in (0, 1, 2))
    made.finish(request)
    made.check()


def test_calls_that_take_a_block_in_the_same_step_find_victims_for_all_and_none_before() -> None:
    made, core = engine(15)
    for n in range(3):
        made.call(Call(f"s{n}", "a", [10 * n, 10 * n + 1, 10 * n + 2], []))
    step, made.step = made.step, lambda scheduled: None  # type: ignore[method-assign]
    running = [made.request(Call(f"t{n}", "a", [100 + n], [])) for n in range(3)]
    assert all(made.admit(request) for request in running)
    scheduled = {request.request_id: request.num_tokens for request in running}
    core.victims = [key(b) for b in (2, 12, 22, 1, 11, 21)]
    for tokens in range(1, 2 * BLOCK + 1):
        core.asked.clear()
        made.evicted.clear()
        step(scheduled)
        # A prompt has a token beyond its block, so a block is full at the 16th token of the answer.
        takes_one = tokens % BLOCK == 0
        assert core.asked == ([3] if takes_one else [])
        for request in running:
            request.append_output_token_ids([1])
            assert made.manager.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1
        assert len(made.evicted) == (3 if takes_one else 0)
        scheduled = dict.fromkeys(scheduled, 1)
    assert [cached(made, 10 * n) for n in range(3)] == [True] * 3
    for request in running:
        made.finish(request)
    made.check()


def test_victims_stay_named_while_unhashed_blocks_stand_before_them() -> None:
    made, core = engine(16)
    made.call(Call("s", "a", [0, 1, 2, 3], []))
    running = made.request(Call("t", "a", list(range(20, 30)), []))
    assert made.admit(running)
    ranker = made.connector.adapter.ranker  # type: ignore[union-attr]
    core.victims = [key(3), key(2), key(1)]
    assert ranker.prepare(3, 0) == 2, "one block without a hash is left"
    assert ranker.prepare(1, 0) == 0
    assert ranker.pending_blocks == 2
    assert ranker.prepare(3, 0) == 0
    assert core.victims == [key(1)]
    made.finish(running)
    made.check()
