"""A cache policy written in Python runs beside the built-in ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.support import ROOT

from agentrt import errors, replay


def _policy_of_the_docs() -> Any:
    """The class that docs/replay.md shows."""
    text = (ROOT / "docs" / "replay.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    return scope["MyLru"]


MyLru: Any = _policy_of_the_docs()


def test_lru_in_python_equals_the_built_in_one(tiny_trace: Path) -> None:
    for order in ("closed", "file"):
        done = replay.run([tiny_trace], policies=["lru", MyLru], capacities=["10%", "30%"], sessions=4, order=order)
        hits: dict[str, list[int]] = {}
        for result in done.results:
            hits.setdefault(result.policy, []).append(result.hit_blocks)
            assert result.forced_evictions == 0
        assert hits["MyLru"] == hits["lru"]
        assert done.invalid_victims == {"MyLru": 0}


def test_victims_that_cannot_go_are_skipped_counted_and_replaced(tiny_trace: Path) -> None:
    class Nonsense(MyLru):  # type: ignore[misc]
        def evict(self, n: int, time_us: int) -> list[int]:
            return [4_000_000_000, 0, 0]

    done = replay.run([tiny_trace], policies=[Nonsense], capacities=["10%"], sessions=4)
    (result,) = done.results
    assert done.invalid_victims["Nonsense"] > 0
    assert result.forced_evictions > 0
    assert result.calls > 0


@pytest.mark.parametrize("answer", [None, "abc", [-1], [2**40], [1.5]])
def test_an_answer_that_is_no_list_of_blocks_stops_the_replay(answer: object, tiny_trace: Path) -> None:
    class Wrong(MyLru):  # type: ignore[misc]
        def evict(self, n: int, time_us: int) -> object:
            return answer

    with pytest.raises(errors.PolicyError, match="evict") as error:
        replay.run([tiny_trace], policies=[Wrong], capacities=["10%"])
    assert error.value.policy == "Wrong"


def test_an_exception_of_the_policy_is_chained(tiny_trace: Path) -> None:
    class Broken(MyLru):  # type: ignore[misc]
        def call_finish(self, call: replay.ReplayCall) -> None:
            raise RuntimeError("on purpose")

    with pytest.raises(errors.PolicyError, match="on purpose") as error:
        replay.run([tiny_trace], policies=["lru", Broken], capacities=["10%"])
    assert isinstance(error.value.__cause__, RuntimeError)


def test_each_replay_gets_a_policy_of_its_own(tiny_trace: Path) -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(MyLru())
        return made[-1]

    replay.run([tiny_trace], policies=[make], capacities=["10%", "20%", "30%"])
    assert len(made) == 3
