"""What vLLM reports becomes events; before vLLM allocates, victims are put in place.

| vLLM calls | the adapter |
|---|---|
| ``on_new_request`` | finds session and agent |
| ``get_num_new_matched_tokens`` | before an allocation: who else waits is told, the call starts, victims are named |
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agentrt._core import FreeQueue, block_keys
from agentrt.engines.vllm.callers import CALLERS
from agentrt.engines.vllm.core import Core, RuntimeCore, make_core, make_scheduling, names_of
from agentrt.engines.vllm.gate import Gate, Load, Service, Waiting
from agentrt.engines.vllm.identity import Identities, Identity
from agentrt.engines.vllm.record import Recorder

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Adapter", "Settings"]

logger = logging.getLogger("vllm.agentrt")

_NO_KEYS: NDArray[np.uint64] = np.zeros(0, np.uint64)
STARTS = (0, False)
ASK_AGAIN = (None, False)
MAX_TENANTS = 4_096
FREES = (False, None)
# Blocks named at once beyond what is needed, and their share of the pool: what is named too early may be wanted yet.
MAX_BATCH = 64
BATCH_SHARE = 1024


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
    scheduling: str | None = None
    hold_s: float = 2.0

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
            "hold_s": float,
        }
        return cls(**{name: kinds.get(name, str)(value) for name, value in known.items()})


class _Call:
    """A request that vLLM holds."""

    __slots__ = (
        "allocated",
        "arrived_us",
        "core_hit",
        "hit",
        "identity",
        "keys",
        "low",
        "number",
        "started_us",
        "told",
    )

    def __init__(self, number: int, identity: Identity, keys: NDArray[np.uint64], arrived_us: int) -> None:
        self.number = number
        self.identity = identity
        self.keys = keys
        # From when it was told to the core as waiting, or started: that moment.
        self.arrived_us = arrived_us
        self.started_us = arrived_us
        # Whether the core knows of it.
        self.told = False
        # Leading blocks the core held to be resident when the call started; None before.
        self.core_hit: int | None = None
        self.hit = 0
        # Blocks from here on may be new since the core was asked.
        self.low = len(keys)
        self.allocated = False


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
        step_tokens: Tokens that a step computes at most; 0 where it is not known.
    """

    def __init__(
        self,
        pool: Any,
        settings: Settings,
        block_size: int,
        groups: int = 1,
        now_us: Callable[[], int] | None = None,
        core: Core | None = None,
        step_tokens: int = 0,
    ) -> None:
        self.pool = pool
        self.settings = settings
        self.block_size = block_size
        self.now_us = now_us or (lambda: time.monotonic_ns() // 1000)
        self.core = core if core is not None else self._make_core(settings, pool)
        self.acting = settings.policy != "observe"
        if groups != 1 or getattr(pool, "hash_block_size", block_size) != block_size or not pool.enable_caching:
            self.acting = False
            why = "prefix caching is off" if not pool.enable_caching else f"{groups} KV cache groups or split hashes"
            logger.warning("agentrt: observing only, eviction order is vLLM's own: %s", why)
        self.identities = Identities()
        self.counters = Counters()
        # A FreeQueue; None where the pool is built otherwise than expected.
        self.ranker: Any = self._queue(pool)
        self.step_tokens = step_tokens
        self.gate = None
        if self.acting and settings.scheduling:
            scheduling = make_scheduling(settings.scheduling, self.core, block_size)
            self.gate = Gate(scheduling, int(settings.hold_s * 1e6))
        self._tenants: dict[object, int] = {}
        self._running = 0
        self.recorder = (
            Recorder(settings.record, settings.workload, block_size, settings.record_bytes, settings.record_files)
            if settings.record
            else None
        )
        self.calls: dict[str, _Call] = {}
        # Calls that the core does not know of yet, by number.
        self._untold: dict[int, _Call] = {}
        # Blocks that admitted prompts will still take in later chunks.
        self._prefilling: dict[str, int] = {}
        self._numbers = 0
        self._map = pool.cached_block_hash_to_block
        self._next_log = 0.0

    @staticmethod
    def _make_core(settings: Settings, pool: Any) -> Core | None:
        beside = names_of(settings.scheduling)
        return make_core(settings.policy, pool.num_gpu_blocks, settings.workload, beside)

    def _queue(self, pool: Any) -> FreeQueue | None:
        batch = min(MAX_BATCH, pool.num_gpu_blocks // BATCH_SHARE)
        source: Any = None
        if isinstance(self.core, RuntimeCore):
            source = self.core.runtime
        elif self.core is not None:
            source = self._evict
        try:
            return FreeQueue(pool, source, batch)
        except Exception:
            self.acting = False
            logger.warning("agentrt: observing only, this block pool is built otherwise than expected", exc_info=True)
            return None

    def _evict(self, n: int, now_us: int) -> Sequence[int]:
        core: Any = self.core
        victims: Sequence[int] = core.evict(n, now_us)
        return victims

    # ---- hooks, in the order of a request's life ----

    def new_request(self, request: Any) -> None:
        """A request has been queued."""
        if request.request_id not in self.calls:
            self._arrive(request)

    def _arrive(self, request: Any) -> _Call:
        keys = block_keys(request.block_hashes, 0, request.num_prompt_tokens // self.block_size)
        identity = self.identities.resolve(request, keys)
        self._numbers += 1
        call = _Call(self._numbers, identity, keys, self.now_us())
        self.calls[request.request_id] = call
        self._untold[call.number] = call
        if self.recorder is not None:
            self.recorder.arrived(call.number, identity.session, call.arrived_us)
        if CALLERS.wanted:
            CALLERS.put(request.request_id, identity)
        counters = self.counters
        counters.requests += 1
        counters.sessions_inferred += identity.session_inferred
        counters.agents_inferred += identity.agent_inferred
        if self.gate is not None:
            session, agent, *_ = identity
            tokens, tenant = request.num_prompt_tokens, self._tenant(request)
            self.gate.arrived(Waiting(call.number, session, agent, call.arrived_us, tokens, 0, 0, tenant))
        return call

    def _tell_queued(self, starting: _Call | None = None) -> None:
        """What has arrived since and does not start at once is certain to be needed."""
        tell: Callable[..., None] | None = getattr(self.core, "call_queued", None)
        now_us = self.now_us()
        untold, self._untold = self._untold, {}
        for call in untold.values():
            if call is starting:
                self._untold[call.number] = call
                continue
            call.arrived_us = now_us
            if tell is not None:
                call.told = True
                session, agent, *_ = call.identity
                tell(session, agent, call.number, now_us, call.keys)

    def _start(self, call: _Call, now_us: int) -> None:
        if self._untold.pop(call.number, None) is not None:
            # It did not have to wait.
            call.arrived_us = now_us
        if self.core is None:
            call.core_hit = 0
            return
        call.told = True
        session, agent, *_ = call.identity
        call.core_hit = self.core.call_started(session, agent, call.number, now_us, call.keys)

    def before_allocation(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Blocks for the request's prompt are about to be allocated; so many of its tokens are hits.

        Returns what vLLM wants to know: no tokens come from outside.
        """
        self._check_reset()
        call = self.calls.get(request.request_id) or self._arrive(request)
        if self._untold and (len(self._untold) > 1 or call.number not in self._untold):
            # Others wait, too: their blocks must not make room for this one.
            self._tell_queued(call)
        call.hit = hit = num_computed_tokens // self.block_size
        if self.gate is not None:
            group = int(call.keys[hit - 1]) if 0 < hit <= len(call.keys) else 0
            if not self.gate.starts(call.number, num_computed_tokens, group, self._load()):
                return ASK_AGAIN
        need = -(-request.num_tokens // self.block_size) - hit
        if need > self.pool.get_num_free_blocks():
            # It will have to wait.
            return STARTS
        now_us = self.now_us()
        if not call.allocated:
            call.started_us = now_us
        if call.core_hit is None:
            self._start(call, now_us)
        if need <= 0 or not self.acting or self.ranker is None:
            return STARTS
        self._prefilling.pop(request.request_id, None)
        spare = None
        if hit > (call.core_hit or 0) and self.ranker.pending_blocks:
            spare = self._hit_ids(request, call)
        total = need if not self._prefilling else need + sum(self._prefilling.values())
        self.ranker.prepare(total, now_us, spare)
        self._prefilling[request.request_id] = need
        return STARTS

    def _load(self) -> Load:
        size, counters = self.block_size, self.counters
        return Load(
            now_us=self.now_us(),
            running_calls=self._running,
            pool_blocks=self.pool.num_gpu_blocks,
            block_tokens=size,
            free_blocks=self.pool.get_num_free_blocks(),
            prompt_blocks=counters.prompt_tokens // size,
            hit_blocks=counters.hit_tokens // size,
            step_tokens=self.step_tokens,
        )

    def _tenant(self, request: Any) -> int:
        """The number of the tenant that a request names beside its session, from 1; 0 without one."""
        params = getattr(request, "kv_transfer_params", None)
        params = params.get("agentrt") if isinstance(params, dict) else None
        extra = getattr(getattr(request, "sampling_params", None), "extra_args", None)
        for source in (params, extra):
            name = source.get("tenant") if isinstance(source, dict) else None
            if name:
                if len(self._tenants) < MAX_TENANTS:
                    return self._tenants.setdefault(str(name)[:256], len(self._tenants) + 1)
                return self._tenants.get(str(name)[:256], 0)
        return 0

    def _hit_ids(self, request: Any, call: _Call) -> list[int]:
        """Blocks the request hits that the core no longer holds: some may stand at the head as victims."""
        ids: list[int] = []
        for block_hash in request.block_hashes[call.core_hit : call.hit]:
            ids += (block.block_id for block in self.pool.get_cached_block(block_hash, [0]) or ())
        return ids

    def allocated(self, request: Any, blocks: Any = None, num_external_tokens: int = 0) -> None:  # noqa: ARG002
        """The request has its blocks."""
        call = self.calls.get(request.request_id)
        if call is None:
            return
        self._has_blocks(request, blocks)
        core_hit = call.core_hit or 0
        # Admitted again after a preemption: what is not a hit has new blocks.
        call.low = min(call.low, core_hit, call.hit)
        if call.hit > core_hit and self.ranker is not None and self.ranker.pending_blocks:
            # Named blocks that are in use again are no victims any more. Behind a MultiConnector `blocks` is empty.
            hit_ids = self._hit_ids(request, call)
            if len(hit_ids) == call.hit - core_hit:
                self._register(call.keys[core_hit : call.hit], 0, hit_ids)
        if not call.allocated:
            call.allocated = True
            counters = self.counters
            counters.prompt_tokens += request.num_prompt_tokens
            counters.hit_tokens += call.hit * self.block_size
            if self.gate is not None:
                self.gate.admitted(call.number, call.started_us)
            if self.core is not None:
                if call.core_hit is None:
                    # Its start was missed, by a fault or a pause.
                    self._start(call, call.started_us)
                if core_hit < len(call.keys):
                    self.core.stored(call.number, call.started_us, call.keys[core_hit:])

    def _has_blocks(self, request: Any, blocks: Any) -> None:
        """Of an admitted prompt, only what later chunks take is still to come; a MultiConnector does not tell."""
        groups = getattr(blocks, "blocks", None)
        if groups and groups[0] and request.request_id in self._prefilling:
            left = -(-request.num_tokens // self.block_size) - len(groups[0])
            if left > 0:
                self._prefilling[request.request_id] = left
            else:
                del self._prefilling[request.request_id]

    def _register(self, keys: NDArray[np.uint64], start: int, block_ids: list[int]) -> None:
        """``block_ids[start:]`` carry these keys; what vLLM evicted for them by itself, the core hears of now."""
        if self.ranker is None:
            return
        lost = self.ranker.register(keys, start, block_ids)
        if lost is not None and self.core is not None:
            self.core.removed(self.now_us(), lost)

    def step_ended(self, scheduler_output: Any) -> None:
        """A step has been scheduled: prepares what running requests will take in the next one."""
        num_scheduled_tokens: dict[str, int] = scheduler_output.num_scheduled_tokens
        self.counters.steps += 1
        self._check_reset()
        self._running = len(num_scheduled_tokens)
        if self._untold:
            self._tell_queued()
        if self.gate is not None:
            self.gate.step_ended()
        if not self.acting or self.ranker is None:
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
        self.ranker.prepare(low, self.now_us())

    def finished(self, request: Any, block_ids_by_group: Sequence[Sequence[int]]) -> tuple[bool, None]:
        """The request is over, one way or another; its blocks are freed next.

        Returns what vLLM wants to know: it may free the blocks, and the client is told nothing.
        """
        request_id = request.request_id
        self._prefilling.pop(request_id, None)
        call = self.calls.pop(request_id, None)
        if call is None:
            return FREES
        block_ids = block_ids_by_group[0] if block_ids_by_group else ()
        self._check_reset()
        now_us = self.now_us()
        self.counters.finished += 1
        core, n_prompt, output = self.core, len(call.keys), _NO_KEYS
        computed = n_prompt
        if call.allocated:
            # Blocks in use cannot be victims, so it is early enough to learn now which carries what.
            computed = min(request.num_computed_tokens // self.block_size, len(block_ids))
            low = min(call.low, computed)
            keys = block_keys(request.block_hashes, low, computed)
            if core is not None:
                self._register(keys, low, block_ids if isinstance(block_ids, list) else list(block_ids))
            if computed > n_prompt:
                output = keys[n_prompt - low :]
        self.identities.ended(call.identity, output)
        self._untold.pop(call.number, None)
        if core is not None and call.told:
            core.call_ended(call.identity.session, call.number, now_us, output)
            if computed < n_prompt:
                # Cut short in the middle of its prompt: the rest was never computed.
                core.removed(now_us, call.keys[computed : computed + 1])
        if core is not None and call.identity.session_ends:
            core.session_ended(call.identity.session, now_us)
        if self.gate is not None:
            prompt, decoded = request.num_prompt_tokens, request.num_tokens - request.num_prompt_tokens
            held = (prompt + decoded // 2) * max(now_us - call.started_us, 0) if call.allocated else 0
            # A preempted call may hit what it has generated itself.
            prefilled = max(prompt - call.hit * self.block_size, 0)
            self.gate.ended(call.number, now_us, Service(prefilled, decoded, held))
        if self.recorder is not None:
            self.recorder.call(
                number=call.number,
                session=call.identity.session,
                agent=self.identities.name(call.identity.agent),
                arrived_us=call.arrived_us,
                started_us=call.started_us if call.allocated else None,
                ended_us=now_us,
                prompt_tokens=request.num_prompt_tokens,
                output_tokens=request.num_tokens - request.num_prompt_tokens,
                prompt=call.keys.tolist(),
                output=output.tolist(),
            )
        return FREES

    def reset(self) -> None:
        """Forgets all blocks; what was learned stays."""
        self._map = self.pool.cached_block_hash_to_block
        if self.ranker is not None:
            self.ranker.clear()
        self._prefilling.clear()
        self.counters.resets += 1
        for call in self.calls.values():
            # They are queued again and start anew.
            call.core_hit, call.allocated, call.low = None, False, len(call.keys)
        if self.core is not None:
            self.core.reset(self.now_us())

    def restart(self) -> None:
        """Starts over after a time without hooks: what was in flight may be gone."""
        for call in self.calls.values():
            self.identities.ended(call.identity, _NO_KEYS)
            if call.told and self.core is not None:
                self.core.call_ended(call.identity.session, call.number, self.now_us(), _NO_KEYS)
        self.calls.clear()
        self._untold.clear()
        if self.gate is not None:
            self.gate.clear()
        self.reset()

    def pending(self) -> bool:
        """Whether vLLM is to make a step although no client waits."""
        return False

    def also(self) -> str:
        """What the log says besides."""
        return ""

    def close(self) -> None:
        """The engine shuts down."""
        if self.recorder is not None:
            self.recorder.close()

    def _check_reset(self) -> None:
        if self.pool.cached_block_hash_to_block is not self._map:
            self.reset()
