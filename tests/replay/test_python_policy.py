"""A cache policy written in Python runs beside the built-in ones."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from agentrt import errors, replay


# [lru in Python: docs/guide shows this class]
class PythonLru:
    """Least recently used, leaf first."""

    def __init__(self) -> None:
        self.idle: dict[int, None] = {}  # blocks nobody uses, oldest first: a dict keeps insertion order

    def call_start(self, call: replay.ReplayCall) -> None:
        for block in call.prompt:  # in use from now on
            self.idle.pop(block, None)

    def call_finish(self, call: replay.ReplayCall) -> None:
        for block in reversed(call.released):  # deepest first, so that children go before their parents
            self.idle[block] = None

    def evict(self, n: int, time_us: int) -> list[int]:
        victims = list(islice(self.idle, n))
        for block in victims:
            del self.idle[block]
        return victims


# [end]


def test_lru_in_python_equals_the_built_in_one(tiny_trace: Path) -> None:
    for order in ("closed", "file"):
        done = replay.run([tiny_trace], policies=["lru", PythonLru], capacities=["10%", "30%"], sessions=4, order=order)
        hits: dict[str, list[int]] = {}
        for result in done.results:
            hits.setdefault(result.policy, []).append(result.hit_blocks)
            assert result.forced_evictions == 0
        assert hits["PythonLru"] == hits["lru"]
        assert done.invalid_victims == {"PythonLru": 0}


def test_victims_that_cannot_go_are_skipped_counted_and_replaced(tiny_trace: Path) -> None:
    class Nonsense(PythonLru):
        def evict(self, n: int, time_us: int) -> list[int]:
            return [4_000_000_000, 0, 0]

    done = replay.run([tiny_trace], policies=[Nonsense], capacities=["10%"], sessions=4)
    (result,) = done.results
    assert done.invalid_victims["Nonsense"] > 0
    assert result.forced_evictions > 0
    assert result.calls > 0


@pytest.mark.parametrize("answer", [None, "abc", [-1], [2**40], [1.5]])
def test_an_answer_that_is_no_list_of_blocks_stops_the_replay(answer: object, tiny_trace: Path) -> None:
    class Wrong(PythonLru):
        def evict(self, n: int, time_us: int) -> list[int]:
            return answer  # type: ignore[return-value]

    with pytest.raises(errors.PolicyError, match="evict") as error:
        replay.run([tiny_trace], policies=[Wrong], capacities=["10%"])
    assert error.value.policy == "Wrong"


def test_an_exception_of_the_policy_is_chained(tiny_trace: Path) -> None:
    class Broken(PythonLru):
        def call_finish(self, call: replay.ReplayCall) -> None:
            raise RuntimeError("on purpose")

    with pytest.raises(errors.PolicyError, match="on purpose") as error:
        replay.run([tiny_trace], policies=["lru", Broken], capacities=["10%"])
    assert isinstance(error.value.__cause__, RuntimeError)


def test_each_replay_gets_a_policy_of_its_own(tiny_trace: Path) -> None:
    made = []

    def make() -> PythonLru:
        made.append(PythonLru())
        return made[-1]

    replay.run([tiny_trace], policies=[make], capacities=["10%", "20%", "30%"])
    assert len(made) == 3
