"""What agentrt sees in a workload, what it does with it, and what that costs.

>>> import agentrt
>>> from agentrt.replay.explanation import explain
>>> told = explain(agentrt.replay.Trace.generate("pipeline", sessions=12), capacity="20%", sessions=4)
>>> told.workload, told.agents[0].agent
('pipeline', 'planner')
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrt._core import Trace
from agentrt._core import explain as _explain
from agentrt.replay import DEFAULT_MODEL

__all__ = [
    "AgentFigures",
    "Bin",
    "Early",
    "Edge",
    "Explanation",
    "NextAgent",
    "PerPolicy",
    "Reliability",
    "Silence",
    "Tail",
    "Window",
    "explain",
]

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class PerPolicy:
    """One number for each of the three policies."""

    agentrt: float
    lru: float
    min: float


@dataclass(frozen=True)
class Window:
    """A stretch of calls."""

    #: Calls so far, at its end.
    calls: int
    #: Hit rates within it.
    hit_rate: PerPolicy


@dataclass(frozen=True)
class Edge:
    """One learned transition."""

    source: str
    target: str
    #: P(target is next | source was last, there is a next call).
    learned: float
    #: The same in the whole trace.
    observed: float


@dataclass(frozen=True)
class Silence:
    """How long sessions are silent after an agent's call."""

    #: Silences that a next call ended.
    ended: int
    #: Silences of which only the beginning was seen.
    censored: int
    #: (seconds, P(still silent)), Kaplan-Meier over the replay.
    observed: Curve
    #: The same, as learned.
    learned: Curve
    #: P(there is a next call at all), as learned.
    continues: float

    @property
    def median_s(self) -> float | None:
        """Seconds after which half of the silences that end have ended; None where none was seen to end."""
        if not self.ended:
            return None
        last = self.observed[-1][1]
        return next(seconds for seconds, silent in self.observed if silent <= last + (1 - last) / 2)


@dataclass(frozen=True)
class Tail:
    """How often blocks are used again that were passed over so many times."""

    #: Calls of the owning agent, in its session, since one that used the block; 7: or more.
    misses: int
    #: Votes behind the figure; they fade.
    votes: float
    #: Share of the blocks that the agent's next call used.
    used_again: float


@dataclass(frozen=True)
class AgentFigures:
    """Where the prompt blocks of an agent's calls were found, and what its blocks cost meanwhile."""

    agent: str
    calls: int
    prompt_blocks: int
    hit_blocks: PerPolicy
    #: Prompt blocks that had never been in the pool: no policy can have them.
    never_seen_blocks: int
    #: Prompt blocks that had been in the pool and that agentrt evicted too early.
    evicted_too_early_blocks: int
    #: Block-seconds for which the pool held blocks that this agent used last.
    held_block_s: float
    #: Of these, between the last use and the eviction: kept too long.
    kept_too_long_block_s: float
    silence: Silence
    tails: list[Tail]

    def share(self, blocks: float) -> float:
        """Blocks as a share of the agent's prompt blocks."""
        return blocks / max(self.prompt_blocks, 1)

    @property
    def kept_too_long(self) -> float:
        """Share of the space that the agent's blocks took which brought nothing."""
        return self.kept_too_long_block_s / self.held_block_s if self.held_block_s else 0.0


@dataclass(frozen=True)
class Early:
    """How well the next agent was foreseen soon after the start: the 200 transitions after the fiftieth."""

    transitions: int
    agentrt: float
    offline: float


@dataclass(frozen=True)
class NextAgent:
    """How well the next agent of a session was foreseen."""

    transitions: int
    #: 1 - H(next | last) / H(next).
    r: float
    #: Share foreseen by agentrt while it learned.
    agentrt: float
    #: Share foreseen by a model of order 2 that was trained on the whole trace.
    offline: float
    #: Share foreseen by guessing the same agent again.
    stay: float
    early: Early


@dataclass(frozen=True)
class Bin:
    """Predictions of about the same probability."""

    n: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Reliability:
    """How true predictions of survival were."""

    n: int
    predicted: float
    observed: float
    brier: float
    #: The same of somebody who always says ``observed``.
    brier_of_mean: float
    #: Expected calibration error.
    ece: float
    bins: list[Bin]


@dataclass(frozen=True)
class Explanation:
    """Everything about one workload."""

    workload: str
    sessions: int
    seed: int
    #: Pool size as a fraction of the live working set; None where it was given in blocks.
    capacity_fraction: float | None
    capacity_blocks: int
    calls: int
    #: Calls larger than the pool.
    bypassed_calls: int
    hit_rate: PerPolicy
    windows: list[Window]
    transitions: list[Edge]
    #: The twelve agents with the most calls, then all others together.
    agents: list[AgentFigures]
    #: The blocks of the whole pool by misses.
    tails: list[Tail]
    next_agent: NextAgent
    #: Median of the residence times for which survival was predicted, seconds.
    residence_s: float
    calibration: Reliability
    #: All of it as it came, for files.
    raw: dict[str, Any]

    @property
    def capacity(self) -> str:
        """The capacity as it was given: ``5%`` or ``1500``."""
        if self.capacity_fraction is None:
            return str(self.capacity_blocks)
        return f"{self.capacity_fraction * 100:.6g}%"

    def likely_next(self, agent: str, least: float = 0.05) -> list[Edge]:
        """Who follows an agent, likeliest first."""
        edges = [edge for edge in self.transitions if edge.source == agent and edge.learned >= least]
        return sorted(edges, key=lambda edge: -edge.learned)


def _points(rows: list[list[float]]) -> Curve:
    return [(x, y) for x, y in rows]


def _agent(row: dict[str, Any]) -> AgentFigures:
    silence = row["silence"]
    return AgentFigures(
        **{
            **row,
            "hit_blocks": PerPolicy(**row["hit_blocks"]),
            "silence": Silence(
                **{
                    **silence,
                    "observed": _points(silence["observed"]),
                    "learned": _points(silence["learned"]),
                }
            ),
            "tails": [Tail(**tail) for tail in row["tails"]],
        }
    )


def _parse(raw: dict[str, Any]) -> Explanation:
    calibration = raw["calibration"]
    parts = {
        "hit_rate": PerPolicy(**raw["hit_rate"]),
        "windows": [Window(row["calls"], PerPolicy(**row["hit_rate"])) for row in raw["windows"]],
        "transitions": [Edge(e["from"], e["to"], e["learned"], e["observed"]) for e in raw["transitions"]],
        "agents": [_agent(row) for row in raw["agents"]],
        "tails": [Tail(**tail) for tail in raw["tails"]],
        "next_agent": NextAgent(**{**raw["next_agent"], "early": Early(**raw["next_agent"]["early"])}),
        "calibration": Reliability(**{**calibration, "bins": [Bin(**row) for row in calibration["bins"]]}),
    }
    return Explanation(**{**raw, **parts}, raw=raw)


def explain(
    trace: str | os.PathLike[str] | Trace,
    *,
    capacity: str | int = "10%",
    order: str = "closed",
    sessions: int = 16,
    seed: int = 0,
    model: str = DEFAULT_MODEL,
) -> Explanation:
    """Replays a workload under agentrt, LRU and MIN, and tells what there is to see.

    Args:
        trace: A file or a :class:`~agentrt.replay.Trace`.
        capacity: ``"5%"`` of the live working set, or blocks.
        order: ``closed``, ``open`` or ``file``.
        sessions: Concurrent sessions.
        seed: Fixes the order of sessions and all drawn times.
        model: Latency model.

    Raises:
        AgentRTError: The trace or an option is not usable.
    """
    loaded = trace if isinstance(trace, Trace) else Trace.read(Path(trace))
    text = _explain(loaded, order=order, sessions=sessions, seed=seed, capacity=str(capacity), model=model)
    return _parse(json.loads(text))
