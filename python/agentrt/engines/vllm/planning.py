"""The adapter with initiative: prefills in idle capacity (``speculation``), and silent sessions (``tool_gap``).

A subclass, made only where ``scheduling`` names one of the two: what neither needs stays as fast as it is.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from agentrt._core import FreeQueue, block_keys
from agentrt.engines.vllm.adapter import FREES, MAX_BATCH, STARTS, Adapter, Settings
from agentrt.engines.vllm.core import POLICIES, RuntimeCore, names_of
from agentrt.engines.vllm.gaps import Gaps, Released
from agentrt.engines.vllm.prefill import Prefills
from agentrt.engines.vllm.scheduling import CoreScheduling

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PlanningAdapter", "make_adapter"]

logger = logging.getLogger("vllm.agentrt")

PREFILL, GAPS = "speculation", "tool_gap"
# Tokens that a step computes, where vLLM does not say.
STEP_TOKENS = 2_048


def make_adapter(
    pool: Any, settings: Settings, block_size: int, groups: int, step_tokens: int, scheduler: Any
) -> Adapter:
    """The adapter that the settings need; ``scheduler``: vLLM's, None where it was not found."""
    names = names_of(settings.scheduling)
    if settings.policy not in POLICIES[:1] or not {PREFILL, GAPS} & set(names):
        return Adapter(pool, settings, block_size, groups, step_tokens=step_tokens)
    return PlanningAdapter(pool, settings, block_size, groups, step_tokens, scheduler)


class PlanningAdapter(Adapter):
    """As its base; arguments as :func:`make_adapter`."""

    def __init__(
        self, pool: Any, settings: Settings, block_size: int, groups: int, step_tokens: int, scheduler: Any
    ) -> None:
        names = names_of(settings.scheduling)
        self.prefills: Prefills | None = None
        self.gaps: Gaps | None = None
        if PREFILL in names and scheduler is None:
            logger.warning("agentrt: no idle prefill, vLLM's scheduler was not found; the rest works")
            names.remove(PREFILL)
        released = Released()
        first = (released,) if GAPS in names else ()
        core = RuntimeCore(pool.num_gpu_blocks, settings.workload, names, first)
        core.supplies = ("tools", "idle_capacity")
        super().__init__(pool, settings, block_size, groups, core=core, step_tokens=step_tokens)
        self.runtime_core = core
        # What is idle or silent is asked about at any time.
        self.held.eager = True
        self.held.ahead = 0
        self._hits: dict[str, int] = {}
        scheduling = self.gate.scheduling if self.gate is not None else None
        if not isinstance(scheduling, CoreScheduling) or self.ranker is None:
            return
        self.scheduling = scheduling
        if PREFILL in names:
            self.prefills = Prefills(scheduler, block_size)
        if GAPS in names:
            self.gaps = Gaps(scheduling, core, released, pool, block_size)
            batch = min(MAX_BATCH, pool.num_gpu_blocks // 128)
            self.held.queue = FreeQueue(pool, partial(self._victims, self.gaps), batch)
            self.held.on_reset = self.gaps.clear

    def _victims(self, gaps: Gaps, n: int, now_us: int) -> Sequence[int]:
        load = self._load()
        # What is about to be taken is no room any more.
        gaps.ask(load._replace(free_blocks=max(load.free_blocks - n, 0)))
        return gaps.evict(n, now_us)

    # ---- hooks ----

    def pending(self) -> bool:
        """Whether vLLM is to make a step although no client waits."""
        prefills = self.prefills
        if prefills is None or not prefills.wanted or prefills.live or self.calls:
            return False
        return not prefills.paused

    def new_request(self, request: Any) -> None:
        """A request has been queued, a client's or one of ours."""
        if self.prefills is not None:
            if request.request_id in self.prefills.live:
                return
            self.prefills.withdraw()
        super().new_request(request)
        call = self.calls.get(request.request_id)
        if self.gaps is not None and call is not None:
            for session in call.ended_sessions:
                self.gaps.over(session)
            self.gaps.arrived(call.session, call.arrived_us)

    def before_allocation(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Blocks are about to be allocated."""
        if self.prefills is None or request.request_id not in self.prefills.live:
            return super().before_allocation(request, num_computed_tokens)
        self.held.check_reset(self.now_us())
        hit = num_computed_tokens // self.block_size
        self._hits[request.request_id] = hit
        ids: list[int] = []
        for block_hash in request.block_hashes[:hit]:
            ids += (block.block_id for block in self.pool.get_cached_block(block_hash, [0]) or ())
        need = -(-request.num_tokens // self.block_size) - hit
        if 0 < need <= self.pool.get_num_free_blocks():
            self.ranker.prepare(need, self.now_us(), ids)
        return STARTS

    def step_ended(self, scheduler_output: Any) -> None:
        """A step has been scheduled; with nothing in it and nobody there, capacity is idle."""
        super().step_ended(scheduler_output)
        prefills = self.prefills
        if prefills is not None and prefills.wanted and not self.calls and not prefills.live:
            if scheduler_output.num_scheduled_tokens or prefills.paused:
                return
            load = self._load()._replace(running_calls=0, step_tokens=self.step_tokens or STEP_TOKENS)
            prefills.queue(self.scheduling.idle(load))

    def finished(self, request: Any, block_ids_by_group: Sequence[Sequence[int]]) -> tuple[bool, None]:
        """A request is over."""
        prefills, gaps = self.prefills, self.gaps
        if prefills is not None and request.request_id in prefills.live:
            return self._prefilled(prefills, request, block_ids_by_group)
        call = self.calls.get(request.request_id)
        super().finished(request, block_ids_by_group)
        if call is None:
            return FREES
        session, agent = call.session, call.agent
        if prefills is not None:
            if call.allocated:
                prefills.remember(request, session, agent, call.number, call.keys)
            prefills.wanted = not self.calls
        if gaps is not None:
            if call.session_ends:
                gaps.over(session)
            elif call.allocated:
                blocks = min(request.num_computed_tokens // self.block_size, len(request.block_hashes))
                tool = self._tool(request)
                gaps.ended(self._load(), session, agent, tool, request, blocks, call.hit)
            else:
                gaps.withdrawn(session)
        return FREES

    def _prefilled(
        self, prefills: Prefills, request: Any, block_ids_by_group: Sequence[Sequence[int]]
    ) -> tuple[bool, None]:
        hit = self._hits.pop(request.request_id, 0)
        block_ids = list(block_ids_by_group[0]) if block_ids_by_group else []
        computed = min(request.num_computed_tokens // self.block_size, len(block_ids), len(request.block_hashes))
        prefill = prefills.ended(request, computed, hit)
        if computed > 0:
            keys = block_keys(request.block_hashes, 0, computed)
            self.held.register(keys, block_ids, self.now_us())
            self.runtime_core.restored(prefill.session, prefill.agent, self.now_us(), keys)
        return FREES

    def _tool(self, request: Any) -> int:
        """The number of the tool that a request says will run after it; 0 without one."""
        params = getattr(request, "kv_transfer_params", None)
        params = params.get("agentrt") if isinstance(params, dict) else None
        extra = getattr(getattr(request, "sampling_params", None), "extra_args", None)
        for source in (params, extra):
            name = source.get("tool") if isinstance(source, dict) else None
            if name:
                return self.runtime_core.tool(str(name)[:256])
        return 0

    def restart(self) -> None:
        """Starts over after a time without hooks."""
        if self.prefills is not None:
            self.prefills.clear()
        super().restart()

    def also(self) -> str:
        """What the log says besides."""
        parts = []
        if self.prefills is not None:
            parts.append(f", prefilled when idle: {self.prefills.computed_tokens} tokens")
        if self.gaps is not None:
            parts.append(f", blocks spared: {self.gaps.spared_blocks}, released: {self.gaps.released.named}")
        return "".join(parts)
