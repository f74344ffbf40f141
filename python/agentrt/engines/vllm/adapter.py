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

What a hook does is done in Rust (:class:`agentrt._core.EngineCalls`), which :class:`agentrt._core.EngineHooks` calls
itself where nothing here adds to it (``plain``); here is what only some need: order and holds of waiting calls, and
recording.

Memory is bounded by the pool's blocks and the requests vLLM holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentrt._core import EngineCalls, FreeQueue, monotonic_us
from agentrt.engines.vllm.callers import CALLERS
from agentrt.engines.vllm.core import Core, RuntimeCore, make_core, make_scheduling, names_of
from agentrt.engines.vllm.gate import Gate, Load, Service, Waiting
from agentrt.engines.vllm.identity import Identities, Identity
from agentrt.engines.vllm.record import Recorder

if TYPE_CHECKING:
    from agentrt._core import EngineCall, EngineCounts

__all__ = ["Adapter", "Settings"]

logger = logging.getLogger("vllm.agentrt")

STARTS = (0, False)
ASK_AGAIN = (None, False)
MAX_TENANTS = 4_096
FREES = (False, None)
# Blocks named at once beyond what is needed, and their share of the pool: what is named too early may be wanted yet.
MAX_BATCH = 64
BATCH_SHARE = 1024
# Victims named ahead by a thread, and their share of the pool; in small pools that is too early for too many.
AHEAD_SHARE = 512
LEAST_AHEAD = 16


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
        self.now_us = now_us or monotonic_us
        self.core = core if core is not None else self._make_core(settings, pool)
        acting = settings.policy != "observe"
        if groups != 1 or getattr(pool, "hash_block_size", block_size) != block_size or not pool.enable_caching:
            acting = False
            why = "prefix caching is off" if not pool.enable_caching else f"{groups} KV cache groups or split hashes"
            logger.warning("agentrt: observing only, eviction order is vLLM's own: %s", why)
        self.identities = Identities()
        queue = self._queue(pool)
        told: Any = self.core.workload if isinstance(self.core, RuntimeCore) else self.core
        self.held = EngineCalls(pool, block_size, told, self.identities, queue)
        self.held.acting = acting and queue is not None
        ahead = pool.num_gpu_blocks // AHEAD_SHARE
        self.held.ahead = ahead if ahead >= LEAST_AHEAD else 0
        self.counters: EngineCounts = self.held.counts
        #: By request id.
        self.calls: dict[str, EngineCall] = self.held.calls
        self.step_tokens = step_tokens
        self.gate = None
        if self.acting and settings.scheduling:
            scheduling = make_scheduling(settings.scheduling, self.core, block_size)
            self.gate = Gate(scheduling, int(settings.hold_s * 1e6))
        self._tenants: dict[object, int] = {}
        self.recorder = (
            Recorder(settings.record, settings.workload, block_size, settings.record_bytes, settings.record_files)
            if settings.record
            else None
        )

    @property
    def acting(self) -> bool:
        """Whether victims are put in place."""
        return self.held.acting

    @acting.setter
    def acting(self, acting: bool) -> None:
        self.held.acting = acting

    @property
    def plain(self) -> bool:
        """Whether a hook does no more than tell ``held``, as long as nobody asks for callers."""
        return type(self) is Adapter and self.gate is None and self.recorder is None

    @property
    def ranker(self) -> Any:
        """The :class:`agentrt._core.FreeQueue`; None where the pool is built otherwise than expected."""
        return self.held.queue

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
            logger.warning("agentrt: observing only, this block pool is built otherwise than expected", exc_info=True)
            return None

    def _evict(self, n: int, now_us: int) -> Sequence[int]:
        core: Any = self.core
        victims: Sequence[int] = core.evict(n, now_us)
        return victims

    # ---- hooks, in the order of a request's life ----

    def new_request(self, request: Any) -> None:
        """A request has been queued."""
        call = self.held.new_request(request, self.now_us())
        if call is not None and (self.gate is not None or self.recorder is not None or CALLERS.wanted):
            self._arrived(request, call)

    def _arrived(self, request: Any, call: EngineCall) -> None:
        if self.recorder is not None:
            self.recorder.arrived(call.number, call.session, call.arrived_us)
        if CALLERS.wanted:
            CALLERS.put(request.request_id, Identity.of(call))
            for session in call.ended_sessions:
                CALLERS.end(session)
        if self.gate is not None:
            tokens, tenant = request.num_prompt_tokens, self._tenant(request)
            self.gate.arrived(Waiting(call.number, call.session, call.agent, call.arrived_us, tokens, 0, 0, tenant))

    def before_allocation(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Blocks for the request's prompt are about to be allocated; so many of its tokens are hits.

        Returns what vLLM wants to know: no tokens come from outside.
        """
        if self.gate is not None or self.recorder is not None or CALLERS.wanted:
            if request.request_id not in self.calls:
                # Its arrival was missed, by a fault or a pause.
                Adapter.new_request(self, request)
            if self.gate is not None:
                call = self.held.asked(request, num_computed_tokens, self.now_us())
                if not self.gate.starts(call.number, num_computed_tokens, call.group, self._load()):
                    return ASK_AGAIN
        self.held.before_allocation(request, num_computed_tokens, self.now_us())
        return STARTS

    def _load(self) -> Load:
        size, counters = self.block_size, self.counters
        return Load(
            now_us=self.now_us(),
            running_calls=counters.running,
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

    def allocated(self, request: Any, blocks: Any = None, num_external_tokens: int = 0) -> None:  # noqa: ARG002
        """The request has its blocks."""
        call = self.held.allocated(request, blocks)
        if call is not None and self.gate is not None:
            self.gate.admitted(call.number, call.started_us)

    def step_ended(self, scheduler_output: Any) -> None:
        """A step has been scheduled: prepares what running requests will take in the next one."""
        self.held.step_ended(scheduler_output, self.now_us())
        if self.gate is not None:
            self.gate.step_ended()

    def finished(self, request: Any, block_ids_by_group: Sequence[Sequence[int]]) -> tuple[bool, None]:
        """The request is over, one way or another; its blocks are freed next.

        Returns what vLLM wants to know: it may free the blocks, and the client is told nothing.
        """
        now_us = self.now_us()
        call = self.held.finished(request, block_ids_by_group, now_us)
        if call is None:
            return FREES
        if self.gate is not None:
            prompt, decoded = request.num_prompt_tokens, request.num_tokens - request.num_prompt_tokens
            held = (prompt + decoded // 2) * max(now_us - call.started_us, 0) if call.allocated else 0
            # A preempted call may hit what it has generated itself.
            prefilled = max(prompt - call.hit * self.block_size, 0)
            self.gate.ended(call.number, now_us, Service(prefilled, decoded, held))
        if self.recorder is not None:
            self.recorder.call(
                number=call.number,
                session=call.session,
                agent=self.identities.name(call.agent),
                arrived_us=call.arrived_us,
                started_us=call.started_us if call.allocated else None,
                ended_us=now_us,
                prompt_tokens=request.num_prompt_tokens,
                output_tokens=request.num_tokens - request.num_prompt_tokens,
                prompt=call.keys.tolist(),
                output=call.output.tolist(),
            )
        return FREES

    def reset(self) -> None:
        """Forgets all blocks; what was learned stays."""
        self.held.reset(self.now_us())

    def restart(self) -> None:
        """Starts over after a time without hooks: what was in flight may be gone."""
        if self.gate is not None:
            self.gate.clear()
        self.held.restart(self.now_us())

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
