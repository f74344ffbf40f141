"""Metrics of the adapter among vLLM's own, on the server's ``/metrics``.

The scheduler's process sends what has been counted since it last did, once a second and when the last call has ended;
the front end adds it up. vLLM carries such reports for connectors: ``KVConnectorStats`` from the one,
``KVConnectorPromMetrics`` in the other.
"""

from __future__ import annotations

from collections import Counter as Tally
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

if TYPE_CHECKING:
    from agentrt.engines.vllm.adapter import Adapter
    from agentrt.engines.vllm.guard import Guard

__all__ = ["COUNTERS", "FAULTS", "AgentRTPromMetrics", "AgentRTStats", "Report"]

#: Name, and what it counts.
COUNTERS = {
    "agentrt_calls": "Calls that have ended.",
    "agentrt_prompt_tokens": "Prompt tokens of calls that were admitted.",
    "agentrt_hit_tokens": "Of these, tokens found in the prefix cache.",
    "agentrt_sessions_inferred": "Calls whose session was inferred from their prompt.",
    "agentrt_agents_inferred": "Calls whose agent was inferred from their prompt.",
    "agentrt_sessions_ended": "Times that a call said of a session that it is over.",
    "agentrt_blocks_ranked": "KV blocks named as victims.",
    "agentrt_blocks_stale": "Of these, blocks that vLLM had reused by itself.",
    "agentrt_cache_resets": "Resets of the prefix cache.",
    "agentrt_lru_takeovers": "Times the guard made the pool follow LRU.",
    "agentrt_steps": "Scheduler steps seen.",
    "agentrt_hook_seconds": "Time spent in agentrt's hooks.",
    "agentrt_pauses": "Times agentrt stayed away after too many faults.",
}
FAULTS = "agentrt_faults"
FAULTS_ABOUT = "Faults answered with vLLM's own behaviour, by hook and kind."


def totals(adapter: Adapter, guard: Guard) -> dict[str, float]:
    """What has been counted from the start, by name; faults by ``name:kind``."""
    counters, queue = adapter.counters, adapter.ranker
    runtime = getattr(adapter.core, "runtime", None)
    adapter.held.catch_up()
    found: dict[str, float] = {
        "agentrt_calls": counters.finished,
        "agentrt_prompt_tokens": counters.prompt_tokens,
        "agentrt_hit_tokens": counters.hit_tokens,
        "agentrt_sessions_inferred": counters.sessions_inferred,
        "agentrt_agents_inferred": counters.agents_inferred,
        "agentrt_sessions_ended": counters.sessions_ended,
        "agentrt_blocks_ranked": 0 if queue is None else queue.ranked_blocks,
        "agentrt_blocks_stale": 0 if queue is None else queue.stale_blocks,
        "agentrt_cache_resets": counters.resets,
        "agentrt_lru_takeovers": 0 if runtime is None else runtime.stats()["lru_takeovers"],
        "agentrt_steps": counters.steps,
        "agentrt_hook_seconds": guard.spent_s,
        "agentrt_pauses": guard.pauses,
    }
    found.update((f"{FAULTS}:{kind}", n) for kind, n in guard.faults.items())
    return found


class Report:
    """Turns totals into what came since the last report."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def since(self, adapter: Adapter, guard: Guard) -> AgentRTStats | None:
        """What has been counted since the last call; None where that is nothing."""
        found = totals(adapter, guard)
        data = {name: n - self._told.get(name, 0) for name, n in found.items() if n > self._told.get(name, 0)}
        if data.keys() <= {"agentrt_hook_seconds"}:
            # The time that a report takes is nothing to report.
            return None
        self._told = found
        return AgentRTStats(data=data)


class AgentRTStats(KVConnectorStats):  # type: ignore[misc, unused-ignore]
    """What was counted in a while; travels between processes as its ``data``."""

    data: dict[str, float]

    def reset(self) -> None:
        """Forgets everything."""
        self.data = {}

    def aggregate(self, other: AgentRTStats) -> AgentRTStats:
        """Adds what ``other`` counted."""
        self.data = dict(Tally(self.data) + Tally(other.data))
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's log says of the last interval."""
        tokens, hits = (int(self.data.get(f"agentrt_{name}_tokens", 0)) for name in ("prompt", "hit"))
        faults = sum(n for name, n in self.data.items() if name.startswith(FAULTS))
        return {
            "agentrt calls": int(self.data.get("agentrt_calls", 0)),
            "agentrt prefix hits %": round(100 * hits / max(tokens, 1), 1),
            "agentrt faults": int(faults),
        }

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.data


class AgentRTPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc, unused-ignore]
    """Prometheus counters, one series an engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[Counter]
        self._labels = per_engine_labelvalues
        self._counters = {name: make(name, about, labelnames=labelnames) for name, about in COUNTERS.items()}
        self._faults = make(FAULTS, FAULTS_ABOUT, labelnames=[*labelnames, "kind"])
        for values in per_engine_labelvalues.values():
            for counter in self._counters.values():
                counter.labels(*values)

    def observe(self, transfer_stats_data: dict[str, float], engine_idx: int = 0) -> None:
        """Adds a report of one engine."""
        values = self._labels[engine_idx]
        for name, n in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name].labels(*values).inc(n)
            elif name.startswith(f"{FAULTS}:"):
                self._faults.labels(*values, name.removeprefix(f"{FAULTS}:")).inc(n)
