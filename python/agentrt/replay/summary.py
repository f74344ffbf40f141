"""Figures over many results: what each policy is worth on average, and where it loses."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from agentrt.replay import Replay, Result

__all__ = ["HEADROOM_POINTS", "PolicySummary", "average_seeds", "summarise"]

#: Cells in which MIN is less than this far above LRU leave nothing to gain: they count for losses only.
HEADROOM_POINTS = 3.0


@dataclass(frozen=True)
class PolicySummary:
    """One policy over all cells of one (seed, session count)."""

    policy: str
    sessions: int
    seed: int
    #: Cells with headroom, and all cells.
    cells: int
    all_cells: int
    #: Means over the cells with headroom; None without one.
    gap_closed: float | None
    lift_points: float | None
    ttft_change: float | None
    #: The largest loss against LRU over all cells, in points of hit rate; negative where the policy lost.
    worst_points: float
    worst_cell: str

    @property
    def loses(self) -> bool:
        """Whether the largest loss shows at one decimal."""
        return self.worst_points <= -0.05


def summarise(replay: Replay) -> list[PolicySummary]:
    """One summary per policy, session count and seed, in the order of the results."""
    groups: dict[tuple[str, int, int], list[Result]] = {}
    for result in replay.results:
        groups.setdefault((result.policy, result.sessions, result.seed), []).append(result)
    summaries = []
    for (policy, sessions, seed), results in groups.items():
        room = [r for r in results if r.headroom * 100 >= HEADROOM_POINTS]
        worst = min(results, key=lambda r: r.hit_rate - r.lru_hit_rate)
        summaries.append(
            PolicySummary(
                policy=policy,
                sessions=sessions,
                seed=seed,
                cells=len(room),
                all_cells=len(results),
                gap_closed=fmean(r.gap_closed or 0.0 for r in room) if room else None,
                lift_points=fmean((r.hit_rate - r.lru_hit_rate) * 100 for r in room) if room else None,
                ttft_change=fmean(r.ttft_change for r in room) if room else None,
                worst_points=(worst.hit_rate - worst.lru_hit_rate) * 100,
                worst_cell=f"{worst.workload} {worst.capacity}",
            )
        )
    return summaries


@dataclass(frozen=True)
class MeanResult:
    """A cell averaged over its seeds."""

    workload: str
    policy: str
    sessions: int
    capacity: str
    hit_rate: float
    gap_closed: float | None
    ttft_mean_ms: float
    ttft_p99_ms: float
    ttft_change: float
    makespan_s: float
    lru_hit_rate: float
    min_hit_rate: float


def average_seeds(replay: Replay) -> list[MeanResult]:
    """One entry per workload, policy, session count and capacity, in the order of the results."""
    groups: dict[tuple[str, str, int, str], list[Result]] = {}
    for r in replay.results:
        groups.setdefault((r.workload, r.policy, r.sessions, r.capacity), []).append(r)
    means = []
    for (workload, policy, sessions, capacity), results in groups.items():
        gaps = [r.gap_closed for r in results if r.gap_closed is not None]
        means.append(
            MeanResult(
                workload=workload,
                policy=policy,
                sessions=sessions,
                capacity=capacity,
                hit_rate=fmean(r.hit_rate for r in results),
                gap_closed=fmean(gaps) if gaps else None,
                ttft_mean_ms=fmean(r.ttft_ms.mean for r in results),
                ttft_p99_ms=fmean(r.ttft_ms.p99 for r in results),
                ttft_change=fmean(r.ttft_change for r in results),
                makespan_s=fmean(r.makespan_s for r in results),
                lru_hit_rate=fmean(r.lru_hit_rate for r in results),
                min_hit_rate=fmean(r.min_hit_rate for r in results),
            )
        )
    return means
