"""Replay of recorded or generated workloads under many cache policies.

``run`` is the whole interface: traces in, one :class:`Result` per workload, capacity, policy and seed out. The work
is done by Rust threads; this module converts. The command ``agentrt replay`` is a thin layer over it.

    >>> import agentrt
    >>> tiny = agentrt.replay.Trace.generate("pipeline", sessions=4, seed=0)
    >>> replay = agentrt.replay.run([tiny], policies=["lru", "min"], capacities=["25%"], sessions=2)
    >>> [result.policy for result in replay.results]
    ['lru', 'min']
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from agentrt._core import ReplayCall, Trace, models, workloads
from agentrt._core import policies as _policies
from agentrt._core import replay as _replay

__all__ = [
    "DEFAULT_CAPACITIES",
    "DEFAULT_MODEL",
    "DEFAULT_POLICIES",
    "DEFAULT_STRIPPED_POLICIES",
    "SCHEMA_VERSION",
    "Replay",
    "ReplayCall",
    "ReplayPolicy",
    "Result",
    "Trace",
    "TtftMs",
    "five_workloads",
    "model_names",
    "models",
    "policies",
    "policy_names",
    "predictability",
    "run",
    "workloads",
]

SCHEMA_VERSION = 1
DEFAULT_CAPACITIES = ("5%", "10%", "25%")
#: What runs when no policy is named; :func:`policy_names` has them all.
DEFAULT_POLICIES = ("lru", "s3fifo", "arc", "lhd", "kvflow", "cachesage", "cachescout", "agentrt", "min")
#: The same where sessions and agents are hidden: those that can do without.
DEFAULT_STRIPPED_POLICIES = ("lru", "s3fifo", "arc", "lhd", "agentrt", "min")
DEFAULT_MODEL = "llama-3.1-8b-h100"


#: One line on each published policy; agentrt's variants bring their own.
_ABOUT = {
    "lru": "least recently used, leaf first: what vLLM does today",
    "lru-session-end": "LRU that is told when a session has ended and lets its blocks go first",
    "lfu": "least frequently used",
    "s3fifo": "S3-FIFO: three queues, quick demotion of what is seen once",
    "sieve": "SIEVE: one queue, a hand that spares what was visited",
    "arc": "ARC: balances recency and frequency by ghost lists",
    "lhd": "LHD: least hit density, learned from hits and ages without agents",
    "depth": "deepest block first: keeps what many prompts may share",
    "kvflow": "KVFlow: steps to the agent's next turn in the workload's static graph",
    "continuum": "Continuum: keeps a session through its tool call for a learned time to live",
    "cachesage": "CacheSage as published: one global transition chain, survival and recency",
    "cachescout": "CacheScout as published (Eq. 9, literally)",
    "cachescout-fixed": "CacheScout with the two fixes of its replication",
    "min": "Belady's MIN: the offline optimum, which knows the whole future",
    "min-prefetch": "the same, and with a host tier everything is brought back in time",
}


class ReplayPolicy(Protocol):
    """A cache policy in Python. Pass the class, or any function without arguments that makes one, to :func:`run`.

    One object serves one replay and hears its events in time order. Block ids are dense integers; equal ids mean
    equal full prefixes. Keep your own bookkeeping of what is idle: blocks enter through ``call_start`` (the whole
    prompt becomes resident) and leave use through ``call_finish`` (``call.released``).
    """

    def call_start(self, call: ReplayCall, /) -> object:
        """A call starts: its prompt blocks are in use until it finishes."""

    def call_finish(self, call: ReplayCall, /) -> object:
        """A call has finished: ``call.output`` is resident now, nothing uses ``call.released`` any more."""

    def evict(self, n: int, time_us: int, /) -> Sequence[int]:
        """Names at least ``n`` victims, children before parents.

        Blocks in use, absent, or with a resident child are skipped and counted (``Replay.invalid_victims``); where
        too few remain, the replay chooses itself and counts that too (``Result.forced_evictions``).
        """


PolicyArgument: TypeAlias = "str | Callable[[], ReplayPolicy]"
TraceArgument: TypeAlias = "str | os.PathLike[str] | Trace"


@dataclass(frozen=True)
class TtftMs:
    """Modelled time to first token over all calls of a replay, milliseconds."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Result:
    """One policy on one workload at one capacity."""

    workload: str
    policy: str
    sessions: int
    #: Pool size as a fraction of the live working set; None where it was given in blocks.
    capacity_fraction: float | None
    capacity_blocks: int
    #: Calls that used the cache.
    calls: int
    prompt_blocks: int
    hit_blocks: int
    hit_rate: float
    host_hit_rate: float | None
    ttft_ms: TtftMs
    makespan_s: float
    #: (hit rate - LRU) / (MIN - LRU); None where MIN is not above LRU.
    gap_closed: float | None
    evictions: int
    prefetched_blocks: int | None
    prefetch_used_blocks: int | None
    seed: int
    #: Calls larger than the pool, which ran without the cache and are in no other figure but the times.
    bypassed_calls: int
    #: Victims that the replay chose because the policy named too few.
    forced_evictions: int
    #: Hit rates of ``lru`` and ``min`` in the same setting.
    lru_hit_rate: float
    min_hit_rate: float
    #: Mean time to first token of ``lru`` in the same setting.
    lru_ttft_mean_ms: float
    #: Mean time to first token where blocks that were brought back while a call waited for room are there no sooner
    #: than if their loading had begun when it arrived.
    strict_ttft_mean_ms: float
    #: Wall seconds of this replay; the only field that differs between two equal runs.
    replay_s: float

    @property
    def capacity(self) -> str:
        """The capacity as it was given: ``5%`` or ``1500``."""
        if self.capacity_fraction is None:
            return str(self.capacity_blocks)
        return f"{self.capacity_fraction * 100:.6g}%"

    @property
    def headroom(self) -> float:
        """Hit rate of MIN minus that of LRU: what any policy could gain here."""
        return self.min_hit_rate - self.lru_hit_rate

    @property
    def ttft_change(self) -> float:
        """Mean time to first token relative to ``lru``: -0.1 is ten percent less."""
        return self.ttft_ms.mean / self.lru_ttft_mean_ms - 1 if self.lru_ttft_mean_ms else 0.0


#: Fields of :class:`Result` that the result file does not hold.
_NOT_IN_FILE = (
    "seed",
    "bypassed_calls",
    "forced_evictions",
    "lru_hit_rate",
    "min_hit_rate",
    "lru_ttft_mean_ms",
    "strict_ttft_mean_ms",
    "replay_s",
)


@dataclass(frozen=True)
class Replay:
    """All results of a :func:`run`, in the order traces, sessions, seeds, capacities, policies."""

    results: tuple[Result, ...]
    order: str
    seeds: tuple[int, ...]
    model: str
    #: Per policy written in Python: victims that could not go.
    invalid_victims: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The result file as a dictionary. With several seeds, ``seed`` is a list and each result has its own."""
        rows = []
        for result in self.results:
            row = asdict(result)
            for field in _NOT_IN_FILE:
                del row[field]
            if len(self.seeds) > 1:
                row["seed"] = result.seed
            rows.append(row)
        seed = self.seeds[0] if len(self.seeds) == 1 else list(self.seeds)
        return {"version": SCHEMA_VERSION, "seed": seed, "results": rows}

    def to_json(self) -> str:
        """The result file: the same text for the same traces and options."""
        return json.dumps(self.to_dict(), indent=1) + "\n"


def policies() -> dict[str, str]:
    """Built-in policies by name, with one line on each."""
    return {name: _ABOUT.get(name) or about for name, about in _policies()}


def policy_names() -> list[str]:
    """Built-in policies that can be named, in the order of reports: baselines, agentrt, its ablations, oracles."""
    return list(policies())


def model_names() -> list[str]:
    """Latency models that can be named."""
    return [name for name, _ in models()]


def five_workloads() -> list[Trace]:
    """The five built-in multi-agent workloads in their default size."""
    return [Trace.generate(name) for name, _, _ in workloads()[:5]]


def predictability(traces: Iterable[Trace]) -> dict[str, float]:
    """How predictable the next agent is in each workload, by the name that it has in the results of a :func:`run`."""
    found: dict[str, float] = {}
    seen: dict[str, int] = {}
    for trace in traces:
        seen[trace.workload] = seen.get(trace.workload, 0) + 1
        name = trace.workload if seen[trace.workload] == 1 else f"{trace.workload}#{seen[trace.workload]}"
        found[name] = trace.predictability
    return found


def _load(trace: TraceArgument, *, skip_bad: bool, share_system_prefix: bool) -> Trace:
    if isinstance(trace, Trace):
        return trace
    return Trace.read(Path(trace), skip_bad=skip_bad, share_system_prefix=share_system_prefix)


def _many(value: int | Iterable[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def run(
    traces: Iterable[TraceArgument] | None = None,
    *,
    policies: Iterable[PolicyArgument] = DEFAULT_POLICIES,
    capacities: Iterable[str | int] = DEFAULT_CAPACITIES,
    order: str = "closed",
    sessions: int | Iterable[int] = 16,
    seed: int | Iterable[int] = 0,
    model: str = DEFAULT_MODEL,
    host: str | int | None = None,
    host_bandwidth: float | None = None,
    prefetch_bandwidth: float | None = None,
    strip_identity: bool = False,
    skip_bad: bool = False,
    share_system_prefix: bool = True,
    threads: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Replay:
    """Replays workloads under policies.

    Args:
        traces: Files or :class:`Trace` objects; the five built-in workloads where None.
        policies: Names (see :func:`policy_names`), or classes that follow :class:`ReplayPolicy`.
        capacities: ``"5%"`` of the live working set (sessions x mean distinct blocks of a session), or blocks.
        order: ``closed`` (so many sessions at a time), ``open`` (recorded arrivals), ``file`` (one call at a time).
        sessions: Concurrent sessions; several run one after the other.
        seed: Fixes the order of sessions and all drawn times; several run one after the other.
        model: Latency model, one of :func:`model_names`.
        host: Size of a host tier for evicted blocks: ``"4x"`` the pool, or blocks; none by default.
        host_bandwidth: Gigabytes per second between host and device; by default the latency model's.
        prefetch_bandwidth: Of these, what prefetching may use; half by default, 0 switches it off.
        strip_identity: Hide sessions and agents from policies: ``agentrt`` and your own infer them from prompts,
            baselines that need them are refused.
        skip_bad: Leave out unusable lines of trace files and count them, instead of raising.
        share_system_prefix: Let sessions with the same recorded system prefix share its blocks.
        threads: Worker threads; 0 takes one per core.
        progress: Called now and then with (done, total); what it raises stops the run.

    Returns:
        One result per trace, session count, seed, capacity and policy.

    Raises:
        AgentRTError: A trace, a policy or an option is not usable; nothing has run then.
    """
    if traces is None:
        loaded = five_workloads()
    else:
        loaded = [_load(t, skip_bad=skip_bad, share_system_prefix=share_system_prefix) for t in traces]
    seeds = _many(seed)
    text = _replay(
        loaded,
        [p if isinstance(p, str) else (str(getattr(p, "__name__", p)), p) for p in policies],
        order=order,
        sessions=_many(sessions),
        seeds=seeds,
        capacities=[str(c) for c in capacities],
        model=model,
        host=None if host is None else str(host),
        host_bandwidth=None if host_bandwidth is None else host_bandwidth * 1e9,
        prefetch_bandwidth=None if prefetch_bandwidth is None else prefetch_bandwidth * 1e9,
        strip_identity=strip_identity,
        threads=threads,
        progress=progress,
    )
    rows, invalid_victims = json.loads(text)
    results = []
    for row in rows:
        cell = row.pop("cell")
        cell["ttft_ms"] = TtftMs(**cell["ttft_ms"])
        results.append(Result(**cell, **row))
    return Replay(tuple(results), order, tuple(seeds), model, invalid_victims)
