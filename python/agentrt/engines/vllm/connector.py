"""The class vLLM instantiates. It carries no KV data: every worker hook does nothing, every scheduler hook is guarded.

On with ``--kv-transfer-config '{"kv_connector":"AgentRTConnector","kv_role":"kv_producer"}'``. The role is only a word
here; ``kv_producer`` keeps vLLM from deferring the release of blocks as it does for connectors that receive KV.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from agentrt._core import EngineHooks
from agentrt.engines.vllm.adapter import Adapter, Settings
from agentrt.engines.vllm.callers import CALLERS
from agentrt.engines.vllm.guard import SLOW_S, Guard
from agentrt.engines.vllm.planning import make_adapter
from agentrt.engines.vllm.prefill import scheduler_of

try:
    from agentrt.engines.vllm import metrics
except ImportError:  # vLLM without metrics of connectors, or without prometheus_client
    metrics = None  # type: ignore[assignment, unused-ignore]

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AgentRTConnector", "AgentRTMetadata"]

logger = logging.getLogger("vllm.agentrt")

LOOK_INTERVAL_S = 1.0


class AgentRTMetadata(KVConnectorMetadata):  # type: ignore[misc, unused-ignore]
    """Nothing to tell the workers."""


NOTHING = AgentRTMetadata()


class AgentRTConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc, unused-ignore]
    """Observes vLLM's scheduler and puts eviction victims in place."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None, *more: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config, *more)
        self.guard = Guard()
        self.adapter: Adapter | None = None
        self.hooks = EngineHooks(self.guard, CALLERS, SLOW_S)
        self.settings = Settings()
        self.enabled = True
        self._next_look = 0.0
        self._next_log = 0.0
        self._pauses = 0
        self._scheduler: Any = None
        self._report = None if metrics is None else metrics.Report()
        self._report_due = False
        if role == KVConnectorRole.SCHEDULER:
            extra = dict(getattr(self._kv_transfer_config, "kv_connector_extra_config", None) or {})
            self.settings = self.guard.run("settings", self.settings, Settings.read, extra, dict(os.environ))

    @property
    def requires_kv_delivery(self) -> bool:
        """No KV is handed to anybody."""
        return False

    # ---- scheduler side ----

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """VLLM hands its block pool over."""
        if self._role == KVConnectorRole.SCHEDULER:
            self.guard.run("bind", None, self._bind, gpu_block_pool)

    def _bind(self, pool: Any) -> None:
        groups = getattr(self._kv_cache_config, "kv_cache_groups", None) or [None]
        block_size = getattr(getattr(groups[0], "kv_cache_spec", None), "block_size", pool.hash_block_size)
        step_tokens = getattr(getattr(self._vllm_config, "scheduler_config", None), "max_num_batched_tokens", 0)
        self._scheduler = self.guard.run("scheduler", None, scheduler_of, pool) or self._scheduler
        self.adapter = make_adapter(pool, self.settings, block_size, len(groups), step_tokens, self._scheduler)
        self.hooks.adapter = self.adapter
        logger.info(
            "agentrt: policy `%s`, %d blocks of %d tokens, %s",
            self.settings.policy,
            pool.num_gpu_blocks,
            block_size,
            "acting" if self.adapter.acting else "observing only",
        )

    # However many arguments there are: too few are a fault, too many are cut.

    def on_new_request(self, *arguments: Any) -> None:
        """A request has been queued."""
        self.hooks.on_new_request(*arguments)

    def get_num_new_matched_tokens(self, *arguments: Any) -> tuple[int | None, bool]:
        """Right before the allocation of a waiting request; nothing comes from outside."""
        return self.hooks.get_num_new_matched_tokens(*arguments)

    def update_state_after_alloc(self, *arguments: Any) -> None:
        """The request has its blocks."""
        self.hooks.update_state_after_alloc(*arguments)

    def has_pending_push_work(self, *arguments: Any) -> bool:
        """Whether to make a step although no client waits."""
        return self.hooks.has_pending_push_work(*arguments)

    def request_finished_all_groups(self, *arguments: Any) -> tuple[bool, dict[str, Any] | None]:
        """The request is over; its blocks, one list a cache group, are freed next."""
        return self.hooks.request_finished_all_groups(*arguments)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The step has been scheduled."""
        self.hooks.step_ended(scheduler_output)
        if self.guard.clock() >= self._next_look:
            self.guard.run("housekeeping", None, self._housekeeping)
        return NOTHING

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, dict[str, Any] | None]:
        """As :meth:`request_finished_all_groups`, from versions of vLLM that know one group only."""
        return self.request_finished_all_groups(request, (block_ids,))

    def reset_cache(self) -> bool | None:
        """The operator resets connectors together with the prefix cache."""
        return True

    def shutdown(self) -> None:
        """The engine ends."""
        if (adapter := self.adapter) is not None:
            self.guard.run("shutdown", None, adapter.close)

    # ---- metrics ----

    def get_kv_connector_stats(self) -> Any:
        """What has been counted since the last report: once a second, and when nothing is in flight."""
        if (adapter := self.adapter) is None or (report := self._report) is None:
            return None
        if not self._report_due and adapter.calls:
            return None
        self._report_due = False
        return self.guard.run("metrics", None, report.since, adapter, self.guard)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        """A report from its contents, in another process."""
        return None if metrics is None else metrics.AgentRTStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any, **more: Any) -> Any:
        """The counters on ``/metrics``, in the front end."""
        return None if metrics is None else metrics.AgentRTPromMetrics(*arguments, **more)

    # ---- now and then ----

    def _housekeeping(self) -> None:
        now = self.guard.clock()
        self._next_look = now + LOOK_INTERVAL_S
        self._report_due = True
        if self.settings.control_file is not None:
            self._control(self.settings.control_file)
        if self.guard.pauses != self._pauses:
            # The first time after a pause: during one nothing is called.
            if self.hooks.adapter is not None:
                self.hooks.adapter.restart()
            self._pauses = self.guard.pauses
        if now >= self._next_log:
            first = self._next_log == 0.0
            self._next_log = now + self.settings.log_interval_s
            if not first and self.adapter is not None:
                logger.info("agentrt: %s", self.summary())

    def _control(self, path: str) -> None:
        try:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123 - once a second, on the scheduler's thread
                word = file.read(16).strip().lower()
        except OSError:
            word = ""
        enabled = word not in ("off", "0", "false")
        if enabled != self.enabled:
            self.enabled = enabled
            self.hooks.adapter = self.adapter if enabled else None
            if enabled and self.adapter is not None:
                # Much has happened unseen.
                self.adapter.restart()
            logger.info("agentrt: switched %s by %s", "on" if enabled else "off", path)

    def summary(self) -> str:
        """One line on what has been seen and done."""
        if self.adapter is None:
            return "not bound"
        counters, ranker = self.adapter.counters, self.adapter.ranker
        ranked, stale = (0, 0) if ranker is None else (ranker.ranked_blocks, ranker.stale_blocks)
        rate = counters.hit_tokens / max(counters.prompt_tokens, 1)
        per_step = self.guard.spent_s * 1e6 / max(counters.steps, 1)
        faults = sum(self.guard.faults.values())
        return (
            f"{counters.finished} calls, prefix hits: {rate:.1%} of tokens, blocks ranked: {ranked}, "
            f"stale: {stale}, us per step: {per_step:.0f}, faults: {faults}{self.adapter.also()}"
        )

    # ---- worker side: no data ----

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""
