"""Figures over many results: what each policy is worth on average, and where it loses."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from agentrt.replay import Replay, Result

__all__ = [
    "HEADROOM_POINTS",
    "PREDICTABLE",
    "Part",
    "PolicySummary",
    "Prediction",
    "average_seeds",
    "parts",
    "prediction",
    "summarise",
]

#: Cells in which MIN is less than this far above LRU leave nothing to gain: they count for losses only.
HEADROOM_POINTS = 3.0


#: From this R on, who calls next counts as predictable.
PREDICTABLE = 0.4


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


@dataclass(frozen=True)
class Part:
    """What a variant of agentrt reaches, and so what the part that it leaves out, or is told, is worth."""

    policy: str
    sessions: int
    #: Gap closed, mean over seeds; and of each seed.
    gap_closed: float
    by_seed: tuple[float, ...]
    #: The largest loss against LRU over all cells and seeds, in points; negative where the variant lost.
    worst_points: float
    #: 1 - gap closed / gap closed by agentrt: the share of the gain that is lost, negative where more is gained.
    lost: float


def parts(replay: Replay) -> list[Part]:
    """One entry per session count and variant of agentrt, itself included; empty where it ran without variants."""
    summaries = [s for s in summarise(replay) if s.gap_closed is not None]
    found = []
    for sessions in dict.fromkeys(s.sessions for s in summaries):
        runs: dict[str, list[PolicySummary]] = {}
        for s in summaries:
            if s.sessions == sessions and s.policy.startswith(("agentrt", "oracle-")):
                runs.setdefault(s.policy, []).append(s)
        if "agentrt" not in runs or len(runs) == 1:
            continue
        whole = fmean(s.gap_closed or 0.0 for s in runs["agentrt"])
        for policy, of in runs.items():
            by_seed = tuple(s.gap_closed or 0.0 for s in of)
            lost = 1 - fmean(by_seed) / whole if whole else 0.0
            found.append(Part(policy, sessions, fmean(by_seed), by_seed, min(s.worst_points for s in of), lost))
    return found


@dataclass(frozen=True)
class Prediction:
    """What foreseeing the next agent is worth on one workload, or on all that are predictable, or not."""

    name: str
    sessions: int
    #: How predictable the next agent is; None for several workloads.
    r: float | None
    #: Cells with headroom, over all seeds.
    cells: int
    #: Mean gap closed over these with and without prediction.
    with_it: float
    without: float

    @property
    def lost(self) -> float:
        """Share of the gain that is lost without prediction; 0 where there is none."""
        return 1 - self.without / self.with_it if self.with_it > 0 else 0.0


def prediction(replay: Replay, r: dict[str, float]) -> list[Prediction]:
    """What prediction is worth by how predictable a workload is; empty where it was not run with and without.

    Args:
        replay: The results; policies ``agentrt`` and ``agentrt-no-prediction`` are compared.
        r: R of each workload.
    """
    with_it, without = ({(x.workload, x.sessions, x.seed, x.capacity): x for x in replay.results if x.policy == policy}
                        for policy in ("agentrt", "agentrt-no-prediction"))  # fmt: skip
    room = [key for key, x in with_it.items() if key in without and x.headroom * 100 >= HEADROOM_POINTS]

    def mean(name: str, sessions: int, value: float | None, keys: list[tuple[str, int, int, str]]) -> Prediction:
        gaps = [fmean(of[key].gap_closed or 0.0 for key in keys) for of in (with_it, without)]
        return Prediction(name, sessions, value, len(keys), *gaps)

    found = []
    for sessions in dict.fromkeys(key[1] for key in room):
        here = [key for key in room if key[1] == sessions]
        workloads = sorted({key[0] for key in here}, key=lambda workload: -r.get(workload, 0.0))
        found += [mean(w, sessions, r.get(w, 0.0), [key for key in here if key[0] == w]) for w in workloads]
        for name, chosen in (
            (f"R of {PREDICTABLE} or more", [key for key in here if r.get(key[0], 0.0) >= PREDICTABLE]),
            ("R below", [key for key in here if r.get(key[0], 0.0) < PREDICTABLE]),
        ):
            if chosen:
                found.append(mean(name, sessions, None, chosen))
    return found
