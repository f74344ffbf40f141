"""vLLM's real cache manager and the real connector, driven as vLLM's scheduler drives them, without a model.

Block hashes are made from block numbers, so a recorded workload runs without a token.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BLOCK = 16


def block_hash(block: int) -> bytes:
    """A hash of 32 bytes for a block's number; its low 64 bits are spread as a real hash's are."""
    spread = (block + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    return b"agentrt-".ljust(16, b".") + (block + 1).to_bytes(8, "big") + spread.to_bytes(8, "big")


def words(number: int, tokens: int) -> list[int]:
    """The tokens of the answer of a call, unlike any other's."""
    return random.Random(number).choices(range(100, 50_000), k=tokens)


@dataclass
class Call:
    """One call of a workload: blocks are numbers of full prefixes, ``answer`` and ``quoted`` tokens where known."""

    session: str
    agent: str
    prompt: list[int]
    output: list[int]
    answer: list[int] = field(default_factory=list)
    quoted: list[int] = field(default_factory=list)

    def tokens(self) -> list[int]:
        """Those of the prompt, one more than its full blocks: vLLM always computes the last one."""
        n = len(self.prompt) * BLOCK + 1
        return [*[1] * n, *self.quoted][-n:]


def read_calls(path: Path, limit: int | None = None) -> list[Call]:
    """Calls of a recorded trace in file order."""
    calls: list[Call] = []
    answers: dict[tuple[str, int], list[int]] = {}
    with gzip.open(path, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            runs = row["blocks"], row.get("out_blocks") or []
            prompt, output = ([b for first, n in part for b in range(first, first + n)] for part in runs)
            call = Call(row["session_id"], row["agent"], prompt, output)
            if "step" in row:
                call.answer = answers[row["session_id"], row["step"]] = words(len(calls), len(output) * BLOCK)
            steps = [step for first, n in row.get("quotes", []) for step in range(first, first + n)]
            call.quoted = [token for step in steps for token in answers[row["session_id"], step]]
            calls.append(call)
            if len(calls) == limit:
                break
    return calls


class Engine:
    """A scheduler's worth of vLLM: admits, decodes and finishes requests against a real cache manager.

    Args:
        blocks: Usable blocks of the pool.
        policy: Policy of the connector; None for stock vLLM.
        named: Whether requests carry their session and agent.
        extra: More options of the connector.
    """

    def __init__(self, blocks: int, policy: str | None = "agentrt", named: bool = True, **extra: Any) -> None:
        import torch
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        from agentrt.engines.vllm.connector import AgentRTConnector

        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        config = KVCacheConfig(
            num_blocks=blocks + 1, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        self.manager = KVCacheManager(
            config, max_model_len=1 << 20, scheduler_block_size=BLOCK, hash_block_size=BLOCK, log_stats=False
        )
        self.pool = self.manager.block_pool
        self.named = named
        self.connector: AgentRTConnector | None = None
        self.now_us = 1_000_000
        if policy is not None:
            transfer = SimpleNamespace(
                kv_connector_extra_config={"policy": policy, **extra}, is_kv_producer=True, is_kv_consumer=False
            )
            self.connector = AgentRTConnector(
                SimpleNamespace(kv_transfer_config=transfer), KVConnectorRole.SCHEDULER, config
            )
            self.connector.bind_kv_cache_manager(self.manager)
            if self.connector.adapter is not None:
                self.connector.adapter.now_us = lambda: self.now_us
        self.running: dict[str, Any] = {}
        self.hit_blocks = 0
        self.prompt_blocks = 0
        self.hits: list[int] = []
        self.evicted: list[bytes] = []
        self._watch_evictions()
        self._requests = 0
        self._unsaid: dict[str, list[int]] = {}

    def _watch_evictions(self) -> None:
        forget = self.pool._remove_cached_block_hashes

        def watch(block: Any) -> list[bytes]:
            hashes: list[bytes] = forget(block)
            self.evicted += hashes
            return hashes

        self.pool._remove_cached_block_hashes = watch

    def request(self, call: Call, **says: Any) -> Any:
        """Queues a call; ``says``: what its ``kv_transfer_params`` tell agentrt."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        hashes = [block_hash(b) for b in (*call.prompt, *call.output)]

        self._requests += 1
        beyond = (self._requests + 1) << 32

        def hasher(request: Any) -> list[bytes]:
            # Answers longer than recorded have blocks of their own.
            hashes.extend(block_hash(beyond + i) for i in range(len(hashes), request.num_tokens // BLOCK))
            return hashes[len(request.block_hashes) : request.num_tokens // BLOCK]

        extra = {"session_id": call.session, "agent_id": call.agent} if self.named else None
        request = Request(
            request_id=f"r{self._requests}",
            prompt_token_ids=call.tokens(),
            sampling_params=SamplingParams(max_tokens=16, extra_args=extra),
            pooling_params=None,
            block_hasher=hasher,
        )
        request.kv_transfer_params = {"agentrt": says} if says else None
        if call.answer:
            self._unsaid[request.request_id] = call.answer[::-1]
        if self.connector is not None:
            self.connector.on_new_request(request)
        return request

    def admit(self, request: Any, chunk: int | None = None) -> bool:
        """Schedules a waiting request, or its first ``chunk`` tokens; False where it does not fit."""
        blocks, hit_tokens, _ = self.manager.get_computed_blocks(request)
        if self.connector is not None:
            tokens, _ = self.connector.get_num_new_matched_tokens(request, hit_tokens)
            if tokens is None:
                return False
            assert tokens == 0
        n = request.num_tokens - hit_tokens
        n = n if chunk is None else min(n, chunk)
        new = self.manager.allocate_slots(
            request, n, num_new_computed_tokens=hit_tokens, new_computed_blocks=blocks, full_sequence_must_fit=True
        )
        if new is None:
            return False
        if self.connector is not None:
            self.connector.update_state_after_alloc(request, self.manager.get_blocks(request.request_id), 0)
        if request.request_id not in self.running:
            self.hits.append(hit_tokens // BLOCK)
            self.hit_blocks += hit_tokens // BLOCK
            self.prompt_blocks += request.num_prompt_tokens // BLOCK
        request.num_computed_tokens = hit_tokens + n
        self.running[request.request_id] = request
        self.step({request.request_id: n})
        return True

    def step(self, scheduled: dict[str, int]) -> None:
        """Ends a scheduling step."""
        if self.connector is not None:
            output = {"num_scheduled_tokens": scheduled, "total_num_scheduled_tokens": sum(scheduled.values())}
            self.connector.build_connector_meta(SimpleNamespace(**output))

    def prefill(self, request: Any, tokens: int) -> bool:
        """Schedules the next chunk of a running request."""
        n = min(tokens, request.num_tokens - request.num_computed_tokens)
        if self.manager.allocate_slots(request, n) is None:
            return False
        request.num_computed_tokens += n
        self.step({request.request_id: n})
        return True

    def decode(self, request: Any, tokens: int) -> bool:
        """Generates so many tokens, a block's worth at a time."""
        while tokens > 0:
            n = min(tokens, BLOCK)
            unsaid = self._unsaid.get(request.request_id, [])
            request.append_output_token_ids([unsaid.pop() if unsaid else 1 for _ in range(n)])
            if self.manager.allocate_slots(request, n) is None:
                return False
            request.num_computed_tokens += n
            tokens -= n
            self.step({request.request_id: n})
        return True

    def finish(self, request: Any) -> None:
        """Ends a request, in whatever state it is."""
        self.running.pop(request.request_id, None)
        self._unsaid.pop(request.request_id, None)
        if self.connector is not None:
            ids = self.manager.get_block_ids(request.request_id)
            self.connector.request_finished_all_groups(request, ids)
        self.manager.free(request)

    def preempt(self, request: Any) -> None:
        """Takes a running request's blocks away; it waits again."""
        self.running.pop(request.request_id)
        self.manager.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1

    def call(self, call: Call, **says: Any) -> int:
        """Runs one call alone, start to end; returns its hit blocks."""
        request = self.request(call, **says)
        self.now_us += 1_000_000
        assert self.admit(request), "the pool is too small for this call"
        self.now_us += 1_000_000
        assert self.decode(request, max(len(call.output) * BLOCK, 1))
        self.finish(request)
        return self.hits[-1]

    def queue(self) -> Iterator[Any]:
        """The free queue, next block to go first."""
        yield from self.pool.free_block_queue.iter_blocks_after(None)

    def check(self) -> None:
        """The free queue is whole: as many blocks as it says, both ways, each once, none in use."""
        queue = self.pool.free_block_queue
        forth = [block.block_id for block in self.queue()]
        back = []
        block = queue.fake_free_list_tail.prev_free_block
        while block is not queue.fake_free_list_head:
            back.append(block.block_id)
            block = block.prev_free_block
        assert forth == back[::-1]
        assert len(forth) == len(set(forth)) == queue.num_free_blocks
        assert all(block.ref_cnt == 0 for block in self.queue())
        free = set(forth)
        assert all((b.block_id in free) == (b.ref_cnt == 0) for b in self.pool.blocks if not b.is_null)


def faults(connector: Any) -> dict[str, int]:
    """What went wrong, but for hooks that took long: on a busy machine any may."""
    return {kind: n for kind, n in connector.guard.faults.items() if not kind.endswith(": slow")}


def fits(calls: Sequence[Call], blocks: int) -> list[Call]:
    """The calls that a pool of so many blocks can hold."""
    return [call for call in calls if len(call.prompt) + len(call.output) + 1 <= blocks]
