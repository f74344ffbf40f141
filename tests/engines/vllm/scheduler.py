"""vLLM's real scheduler with the real connectors, and a model that always says the same: seconds instead of minutes.

Prompts are token ids and hashes are vLLM's own, so everything but the worker is as in a server.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLOCK = 32
STOP = 9
TRANSFER = {"kv_connector": "AgentRTConnector", "kv_role": "kv_producer"}
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 1000,
    "max_position_embeddings": 32_768, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def transfer(policy: str, **extra: Any) -> dict[str, Any]:
    """The flag that switches agentrt on."""
    return {**TRANSFER, "kv_connector_extra_config": {"policy": policy, **extra}}


class Server:
    """A scheduler and the requests in it.

    Args:
        folder: Where the model's configuration is written.
        blocks: Usable blocks of the pool.
        kv_transfer: The flag; None for stock vLLM.
        windows: Sliding windows of further cache groups beside the full attention of the first.
        asynchronous: A step is scheduled while the one before it still computes, as vLLM does on GPUs. Every other
            answer then ends unforeseen, when the step after its last one has been scheduled.
        options: Further options of the engine.
    """

    def __init__(
        self,
        folder: Path,
        blocks: int,
        kv_transfer: dict[str, Any] | None,
        windows: Sequence[int] = (),
        asynchronous: bool = False,
        **options: Any,
    ) -> None:
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from agentrt.engines.vllm.plugin import register

        register()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        self.config = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            block_size=BLOCK,
            enable_prefix_caching=True,
            num_gpu_blocks_override=blocks + 1,
            kv_transfer_config=kv_transfer,
            **{"max_num_seqs": 16, "max_num_batched_tokens": 2048, "max_model_len": blocks * BLOCK, **options},
        ).create_engine_config()
        self.config.cache_config.num_gpu_blocks = blocks + 1
        shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}
        groups = [KVCacheGroupSpec(["layer.0"], FullAttentionSpec(**shape))]
        for i, window in enumerate(windows):
            groups.append(KVCacheGroupSpec([f"layer.{i + 1}"], SlidingWindowSpec(**shape, sliding_window=window)))
        caches = KVCacheConfig(num_blocks=blocks + 1, kv_cache_tensors=[], kv_cache_groups=groups)
        # For CPUs vLLM switches it off.
        self.config.scheduler_config.async_scheduling = asynchronous
        self.scheduler: Any = (AsyncScheduler if asynchronous else Scheduler)(
            self.config, caches, StructuredOutputManager(self.config), block_size=BLOCK, log_stats=True
        )
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(BLOCK, hash_function)
        # Steps that compute, as (what was scheduled, what comes out of it).
        self._computing: deque[tuple[Any, Any]] = deque()
        self._ahead = 1 if asynchronous else 0
        # Tokens that are still to come of answers that end with a stop token.
        self._until_stop: dict[str, int] = {}
        self._added = 0
        self.order: list[str] = []
        self.finished: list[str] = []
        self.preempted: list[str] = []
        self.cached: dict[str, int] = {}

    @property
    def connector(self) -> Any:
        """Agentrt's connector, also where it is one of several."""
        connector = self.scheduler.connector
        for one in getattr(connector, "_connectors", [connector]):
            if type(one).__name__ == "AgentRTConnector":
                return one
        return None

    @property
    def pool(self) -> Any:
        """The block pool."""
        return self.scheduler.kv_cache_manager.block_pool

    def add(self, name: str, prompt: Sequence[int], tokens: int = 1, priority: int = 0, **identity: Any) -> Any:
        """Queues a request that generates so many tokens."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self._added += 1
        longest = tokens
        if self._ahead and self._added % 2:
            self._until_stop[name] = tokens
            longest = 2 * tokens + 2
        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(
                max_tokens=longest, ignore_eos=True, stop_token_ids=[STOP], extra_args=identity or None
            ),
            pooling_params=None,
            priority=priority,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        return request

    def step(self) -> list[str]:
        """Schedules, computes and reports one step; names of the requests that were scheduled."""
        from vllm.v1.outputs import ModelRunnerOutput

        out = self.scheduler.schedule()
        for new in out.scheduled_new_reqs:
            self.order.append(new.req_id)
            self.cached[new.req_id] = new.num_computed_tokens
        self.preempted += sorted(out.preempted_req_ids or ())
        names = list(out.num_scheduled_tokens)
        sampled = [[] if self.scheduler.requests[name].is_prefill_chunk else [self._token(name)] for name in names]
        made = ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=sampled
        )
        self._computing.append((out, made))
        before = list(self.scheduler.requests)
        while len(self._computing) > (self._ahead if names else 0):
            self.scheduler.update_from_output(*self._computing.popleft())
        # As they arrived, which is the order in which an engine reports them.
        self.finished += [name for name in before if name not in self.scheduler.requests]
        return names

    def _token(self, name: str) -> int:
        left = self._until_stop.get(name)
        if left is None:
            return 7
        self._until_stop[name] = left - 1
        return 7 if left > 1 else STOP

    def run(self, steps: int = 10_000) -> int:
        """Steps until nothing is left; how many it took."""
        for n in range(steps):
            if not self.scheduler.requests:
                return n
            self.step()
        raise AssertionError(f"still there after {steps} steps: {sorted(self.scheduler.requests)}")

    def check(self) -> None:
        """No fault, nothing left behind, and a whole queue with all blocks in it."""
        while self._computing:
            self.scheduler.update_from_output(*self._computing.popleft())
        queue = self.pool.free_block_queue
        forth = [block.block_id for block in queue.iter_blocks_after(None)]
        assert len(forth) == len(set(forth)) == queue.num_free_blocks == self.pool.num_gpu_blocks - 1
        if self.connector is not None:
            assert not {kind: n for kind, n in self.connector.guard.faults.items() if not kind.endswith("slow")}
            assert not self.connector.adapter.calls
            assert not self.connector.adapter.held.prefilling_calls


def prompt(*blocks: int, rest: int = 1) -> list[int]:
    """A prompt of these blocks, each of one token id all over, and some tokens more."""
    return [10 + block for block in blocks for _ in range(BLOCK)] + [5] * rest
