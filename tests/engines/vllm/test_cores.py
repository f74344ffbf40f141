"""The benchmark's policies behind the adapter's seam against the replay's own. Needs no vLLM."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from benches.e2e.cores import CacheScout, Optimal, Tree

from agentrt import replay


class InReplay:
    """Drives a core as the adapter does, from the events of a replay."""

    def __init__(self, core: Tree) -> None:
        self.core = core
        self.numbers = itertools.count()
        self.agents: dict[str, int] = {}
        self.live: dict[tuple[int, int], int] = {}

    def call_start(self, call: replay.ReplayCall) -> None:
        number = self.live[call.session, call.step] = next(self.numbers)
        keys = np.array(call.prompt, np.uint64)
        agent = self.agents.setdefault(call.agent, len(self.agents))
        hit = self.core.call_started(0, agent, number, 0, keys)
        assert hit == call.hit
        self.core.stored(number, 0, keys[hit:])

    def call_finish(self, call: replay.ReplayCall) -> None:
        number = self.live.pop((call.session, call.step))
        self.core.call_ended(0, number, 0, np.array(call.output, np.uint64))

    def evict(self, n: int, time_us: int) -> Sequence[int]:
        return self.core.evict(n, time_us)


class Listener:
    """Writes down the order of calls; the replay chooses all victims."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def call_start(self, call: replay.ReplayCall) -> None:
        self.prompts.append(list(call.prompt))

    def call_finish(self, call: replay.ReplayCall) -> None:
        pass

    def evict(self, n: int, time_us: int) -> Sequence[int]:
        return []


def hits(trace: replay.Trace, policy: str | Callable[[], replay.ReplayPolicy], name: str, blocks: int) -> int:
    results = replay.run([trace], policies=[policy], capacities=[blocks], sessions=6, seed=1).results
    return next(row.hit_blocks for row in results if row.policy == name)


@pytest.fixture(scope="module", params=["coding_team", "research_tree"])
def trace(request: pytest.FixtureRequest) -> replay.Trace:
    return replay.Trace.generate(request.param, sessions=12, seed=3)


@pytest.mark.parametrize("blocks", [400, 1500])
def test_cachescout_is_the_replays_cachescout(trace: replay.Trace, blocks: int) -> None:
    def made() -> InReplay:
        return InReplay(CacheScout(0, ""))

    assert hits(trace, made, "made", blocks) == pytest.approx(
        hits(trace, "cachescout", "cachescout", blocks), rel=0.002
    )


@pytest.mark.parametrize("blocks", [400, 1500])
def test_optimal_is_the_replays_optimum(trace: replay.Trace, blocks: int) -> None:
    listener = Listener()
    # Calls larger than the pool are not heard of, so each pool has an order of its own.
    hits(trace, lambda: listener, "<lambda>", blocks)

    def made() -> InReplay:
        return InReplay(Optimal(0, "", listener.prompts))

    assert hits(trace, made, "made", blocks) == pytest.approx(hits(trace, "min", "min", blocks), rel=0.002)
