"""What vLLM reports becomes events; before vLLM allocates, victims are put in place.

| vLLM calls | the adapter |
|---|---|
| ``on_new_request`` | finds session and agent; the call starts and pins its resident prefix in the core |
| ``get_num_new_matched_tokens`` | right before the allocation: prepares the head of the queue for it |
| ``update_state_after_alloc`` | the prompt's new blocks are stored |
| ``build_connector_meta`` | end of the step: prepares what running requests will take in the next one |
| ``request_finished`` | the call ends: the answer's blocks are stored, the prefix is unpinned |

vLLM does not tell when it reuses a block by itself (an allocation nothing was prepared for). The core then believes the
block resident until it names it as a victim, sees that it is not one any more and goes on to the next. A prefix-cache
reset is noticed by vLLM's map being another object.

Memory is bounded by the pool's blocks and the requests vLLM holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agentrt.engines.vllm.core import Core, make_core
from agentrt.engines.vllm.identity import Identities, Identity
from agentrt.engines.vllm.ranker import Ranker
from agentrt.engines.vllm.record import Recorder

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Adapter", "Settings"]

logger = logging.getLogger("vllm.agentrt")

_NO_KEYS: NDArray[np.uint64] = np.zeros(0, np.uint64)


def keys_of(hashes: Sequence[bytes]) -> NDArray[np.uint64]:
    """The keys of block hashes: their last 8 bytes, as vLLM's KV events write them."""
    if not hashes:
        return _NO_KEYS
    width = len(hashes[0])
    if width % 8:
        return np.array([int.from_bytes(h[-8:], "big") for h in hashes], np.uint64)
    words = np.frombuffer(b"".join(hashes), dtype=">u8")
    return words[width // 8 - 1 :: width // 8].astype(np.uint64)


@dataclass(frozen=True)
class Settings:
    """Options of the adapter, from ``kv_connector_extra_config``."""

    policy: str = "agentrt"
    workload: str = "vllm"
    control_file: str | None = None
    record: str | None = None
    record_bytes: int = 64 << 20
    record_files: int = 4
    log_interval_s: float = 60.0

    @classmethod
    def read(cls, extra: dict[str, Any], environ: dict[str, str]) -> Settings:
        """Reads options; the environment (``AGENTRT_VLLM_POLICY``, ..) wins over the server's flags."""
        known = {name: extra[name] for name in cls.__dataclass_fields__ if name in extra}
        for name in cls.__dataclass_fields__:
            value = environ.get(f"AGENTRT_VLLM_{name.upper()}")
            if value is not None:
                known[name] = value
        kinds: dict[str, Callable[[Any], Any]] = {
            "record_bytes": int,
            "record_files": int,
            "log_interval_s": float,
        }
        return cls(**{name: kinds.get(name, str)(value) for name, value in known.items()})


@dataclass(slots=True)
class _Call:
    number: int
    identity: Identity
    keys: list[int]
    key_array: NDArray[np.uint64]
    started_us: int
    # Leading blocks the core held to be resident; None while the core does not know the call.
    core_hit: int | None
    hit: int = 0
    # Blocks whose keys are registered with the ranker.
    registered: int = 0
    allocated: bool = False
    counted: bool = False


@dataclass
class Counters:
    """What has been seen, for logs, metrics and tests."""

    requests: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    resets: int = 0
    sessions_inferred: int = 0
    agents_inferred: int = 0
    steps: int = 0


class Adapter:
    """The scheduler's side of agentrt for one engine.

    Args:
        pool: vLLM's ``BlockPool``.
        settings: Options.
        block_size: Tokens of a block.
        groups: KV cache groups of the model; with more than one, order is left to vLLM.
        now_us: The clock.
        core: The policy, for tests; made from the settings otherwise.
    """

    def __init__(
        self,
        pool: Any,
        settings: Settings,
        block_size: int,
        groups: int = 1,
        now_us: Callable[[], int] | None = None,
        core: Core | None = None,
    ) -> None:
        self.pool = pool
        self.settings = settings
        self.block_size = block_size
        self.now_us = now_us or (lambda: time.monotonic_ns() // 1000)
        self.core = core if core is not None else make_core(settings.policy, pool.num_gpu_blocks, settings.workload)
        self.acting = settings.policy != "observe"
        if groups != 1 or getattr(pool, "hash_block_size", block_size) != block_size or not pool.enable_caching:
            self.acting = False
            why = "prefix caching is off" if not pool.enable_caching else f"{groups} KV cache groups or split hashes"
            logger.warning("agentrt: observing only, eviction order is vLLM's own: %s", why)
        self.identities = Identities()
        self.counters = Counters()
        self.ranker = Ranker(pool, None if self.core is None else self._evict)
        self.recorder = (
            Recorder(settings.record, settings.workload, block_size, settings.record_bytes, settings.record_files)
            if settings.record
            else None
        )
        self.calls: dict[str, _Call] = {}
        # Blocks that admitted prompts will still take in later chunks.
        self._prefilling: dict[str, int] = {}
        self._numbers = 0
        self._map = pool.cached_block_hash_to_block
        self._next_log = 0.0

    def _evict(self, n: int) -> Sequence[int]:
        assert self.core is not None  # noqa: S101 - only given to the ranker where there is one
        return self.core.evict(n, self.now_us())

    # ---- hooks, in the order of a request's life ----

    def new_request(self, request: Any) -> None:
        """A request has been queued."""
        if request.request_id not in self.calls:
            self._arrive(request)

    def _arrive(self, request: Any) -> _Call:
        self._check_reset()
        n_blocks = request.num_prompt_tokens // self.block_size
        array = keys_of(request.block_hashes[:n_blocks])
        keys: list[int] = array.tolist()
        identity = self.identities.resolve(request, keys)
        self._numbers += 1
        call = _Call(self._numbers, identity, keys, array, self.now_us(), None)
        self.calls[request.request_id] = call
        self.counters.requests += 1
        self.counters.sessions_inferred += identity.session_inferred
        self.counters.agents_inferred += identity.agent_inferred
        self._start(call)
        return call

    def _start(self, call: _Call) -> None:
        if self.core is None:
            call.core_hit = 0
        else:
            identity = call.identity
            call.core_hit = self.core.call_started(
                identity.session, identity.agent, call.number, self.now_us(), call.key_array
            )

    def before_allocation(self, request: Any, num_computed_tokens: int) -> None:
        """Blocks for the request's prompt are about to be allocated; so many of its tokens are hits."""
        self._check_reset()
        call = self.calls.get(request.request_id) or self._arrive(request)
        if call.core_hit is None:
            self._start(call)
        call.hit = num_computed_tokens // self.block_size
        if not call.counted:
            call.counted = True
            self.counters.prompt_tokens += request.num_prompt_tokens
            self.counters.hit_tokens += num_computed_tokens
        if not self.acting:
            return
        need = -(-request.num_tokens // self.block_size) - call.hit
        if need <= 0 or need > self.pool.free_block_queue.num_free_blocks:
            return
        self._prefilling.pop(request.request_id, None)
        spare: Collection[int] = ()
        if call.hit > (call.core_hit or 0) and self.ranker.pending:
            spare = self._hit_ids(request, call)
        self.ranker.prepare(need + sum(self._prefilling.values()), spare=spare)
        self._prefilling[request.request_id] = need

    def _hit_ids(self, request: Any, call: _Call) -> set[int]:
        """Blocks the request hits that the core no longer holds: some may stand at the head as victims."""
        ids: set[int] = set()
        for block_hash in request.block_hashes[call.core_hit : call.hit]:
            for block in self.pool.get_cached_block(block_hash, [0]) or ():
                ids.add(block.block_id)
        return ids

    def allocated(self, request: Any, blocks: Sequence[Any]) -> None:
        """The request has its blocks."""
        call = self.calls.get(request.request_id)
        if call is None:
            return
        core_hit = call.core_hit or 0
        # Admitted again after a preemption: what is not a hit has new blocks.
        call.registered = min(call.registered if call.allocated else core_hit, call.hit)
        self._register(call, call.keys, blocks)
        if not call.allocated:
            call.allocated = True
            # What is recorded: a replay must not hold blocks for a call that still waits.
            call.started_us = self.now_us()
            if self.core is not None and core_hit < len(call.keys):
                self.core.stored(call.number, self.now_us(), call.key_array[core_hit:])

    def _register(self, call: _Call, keys: list[int], blocks: Sequence[Any]) -> None:
        if self.core is None:
            return
        lost = self.ranker.register(keys[call.registered : len(blocks)], blocks[call.registered :])
        call.registered = min(len(keys), len(blocks))
        if lost:
            self.core.removed(self.now_us(), np.array(lost, np.uint64))

    def step_ended(self, num_scheduled_tokens: dict[str, int]) -> None:
        """A step has been scheduled: prepares what running requests will take in the next one."""
        self.counters.steps += 1
        self._check_reset()
        if not self.acting:
            return
        running = len(num_scheduled_tokens)
        if not running:
            return
        waiting = 0
        if self._prefilling:
            size = self.block_size
            for request_id, left in list(self._prefilling.items()):
                tokens = num_scheduled_tokens.get(request_id)
                if tokens is None:
                    waiting += left
                elif left * size <= tokens + size:
                    del self._prefilling[request_id]
                else:
                    self._prefilling[request_id] = left - tokens // size
                    waiting += left - tokens // size
        low = waiting + running // self.block_size + 1
        self.ranker.prepare(low)

    def finished(self, request: Any, block_ids: Sequence[int]) -> None:
        """The request is over, one way or another; its blocks are freed next."""
        request_id = request.request_id
        self._prefilling.pop(request_id, None)
        call = self.calls.pop(request_id, None)
        if call is None:
            return
        self._check_reset()
        now_us = self.now_us()
        self.counters.finished += 1
        computed = min(request.num_computed_tokens // self.block_size, len(block_ids))
        n_prompt = len(call.keys)
        output = keys_of(request.block_hashes[n_prompt:computed]) if computed > n_prompt else _NO_KEYS
        self.identities.ended(call.identity, output)
        if call.allocated:
            blocks = self.pool.blocks
            keys = call.keys + output.tolist()
            at = call.registered
            call.registered = 0
            self._register(call, keys[at:computed], [blocks[i] for i in block_ids[at:]])
        if self.core is not None and call.core_hit is not None:
            self.core.call_ended(call.identity.session, call.number, now_us, output if call.allocated else _NO_KEYS)
            if call.allocated and computed < n_prompt:
                # Cut short in the middle of its prompt: the rest was never computed.
                self.core.removed(now_us, call.key_array[computed : computed + 1])
            if call.identity.session_ends:
                self.core.session_ended(call.identity.session, now_us)
        if self.recorder is not None and call.allocated:
            self.recorder.call(
                session=call.identity.session,
                agent=self.identities.name(call.identity.agent),
                arrived_us=call.started_us,
                ended_us=now_us,
                prompt_tokens=request.num_prompt_tokens,
                output_tokens=request.num_tokens - request.num_prompt_tokens,
                prompt=call.keys,
                output=output.tolist(),
            )

    def reset(self) -> None:
        """Forgets all blocks; what was learned stays."""
        self._map = self.pool.cached_block_hash_to_block
        self.ranker.clear()
        self._prefilling.clear()
        self.counters.resets += 1
        for call in self.calls.values():
            # They are queued again and start anew.
            call.core_hit, call.allocated, call.registered = None, False, 0
        if self.core is not None:
            self.core.reset(self.now_us())

    def close(self) -> None:
        """The engine shuts down."""
        if self.recorder is not None:
            self.recorder.close()

    def _check_reset(self) -> None:
        if self.pool.cached_block_hash_to_block is not self._map:
            self.reset()
