"""Policies by name and in Python: who decides, what the core refuses, and how failures stay harmless."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from tests.support import ROOT

import agentrt
from agentrt import errors, replay


def _policy_of_the_docs() -> Any:
    text = (ROOT / "docs" / "policies" / "README.md").read_text()
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert len(snippet.splitlines()) <= 30
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    return scope["ReusedLast"]


ReusedLast: Any = _policy_of_the_docs()


class Lru:
    """The same order as the built-in one."""

    def __init__(self) -> None:
        self.idle: dict[int, None] = {}
        self.heard: list[tuple[Any, ...]] = []

    def call_start(self, call: agentrt.PolicyCall) -> None:
        self.heard.append(("start", call.session, call.agent, call.step, call.hit, call.prompt))
        for block in call.prompt:
            self.idle.pop(block, None)

    def call_finish(self, call: agentrt.PolicyCall) -> None:
        self.heard.append(("finish", call.agent, call.output, call.released))
        for block in reversed(call.released):
            self.idle[block] = None

    def evict(self, n: int, time_us: int) -> list[int] | None:
        victims = list(self.idle)[:n]
        for block in victims:
            del self.idle[block]
        return victims


def _drive(runtime: agentrt.Runtime, steps: int = 300, pool: int = 48) -> tuple[list[int], int]:
    """A toy engine: sessions that grow two agents' prompts; returns victims in order, and hits."""
    workload = runtime.workload("w")
    victims: list[int] = []
    resident_now = hits = 0
    for step in range(steps):
        run, agent = step * 7 % 5, step * 3 % 2
        session = workload.session(run)
        prompt = [10, 11 + agent] + [1000 * (1 + run) + 500 * agent + i for i in range(4 + step // 60)]
        at = float(step)
        resident = session.call_start(f"agent{agent}", prompt, time=at)
        hits += resident
        short = resident_now + len(prompt) - resident - pool
        if short > 0:
            gone = runtime.act("evict", short, time=at).tolist()
            assert len(gone) == short
            victims += gone
            resident_now -= short
        session.stored(prompt[resident:], time=at)
        resident_now += len(prompt) - resident
        session.call_end(time=at + 0.5)
    return victims, hits


def test_an_lru_in_python_equals_the_built_in_one() -> None:
    built_in = _drive(agentrt.Runtime(48, policies=("lru",)))
    python = agentrt.Runtime(48, policies=(Lru(),))
    assert _drive(python) == built_in
    assert len(built_in[0]) > 100
    assert python.stats()["refused_victims"] == 0


def test_policies_are_chosen_by_name_and_differ() -> None:
    victims = {name: _drive(agentrt.Runtime(48, policies=(name,)))[0] for name in ("kv_cache", "lru")}
    assert victims["kv_cache"] != victims["lru"]


def test_the_policy_of_the_docs_runs_in_a_runtime_and_in_the_replay() -> None:
    runtime = agentrt.Runtime(48, policies=(ReusedLast, "lru"))
    assert runtime.policies == ("ReusedLast", "lru")
    victims, _ = _drive(runtime)
    assert victims
    assert runtime.stats()["refused_victims"] == 0
    assert runtime.stats()["policy_errors"] == 0
    trace = replay.Trace.generate("pipeline", sessions=8, seed=1)
    done = replay.run([trace], policies=["lru", ReusedLast], capacities=["25%"], sessions=4)
    assert [result.policy for result in done.results] == ["lru", "ReusedLast"]
    assert done.invalid_victims == {"ReusedLast": 0}
    assert all(result.forced_evictions == 0 for result in done.results)


def test_a_policy_hears_of_calls_and_of_what_they_release() -> None:
    policy = Lru()
    runtime = agentrt.Runtime(64, policies=(policy,))
    session = runtime.workload("w").session(42)
    session.call_start("planner", [1, 2], time=1)
    session.stored([1, 2], time=1)
    session.call_end([3], time=2)
    session.call_start("coder", [1, 7], call=5, time=3)
    assert policy.heard == [
        ("start", 42, "planner", 0, 0, [1, 2]),
        ("finish", "planner", [3], [1, 2, 3]),
        ("start", 42, "coder", 1, 1, [1, 7]),
    ]


def test_only_what_nothing_needs_goes() -> None:
    class Greedy(Lru):
        def evict(self, n: int, time_us: int) -> list[int]:
            return [99, 2, 1, 2, 7, 8]

    runtime = agentrt.Runtime(64, policies=(Greedy(),))
    workload = runtime.workload("w")
    for name, prompt in (("s", [1, 2]), ("t", [7, 8])):
        workload.session(name).call_start("a", prompt, time=0)
        workload.session(name).stored(prompt, time=0)
    workload.session("s").call_end(time=1)
    # 99 is absent, 7 and 8 are in use; the second 2 is gone already.
    assert runtime.act("evict", 6, time=2).tolist() == [2, 1]
    assert runtime.stats()["refused_victims"] == 4
    assert runtime.stats()["resident_blocks"] == 2


def test_the_next_policy_names_what_is_missing() -> None:
    class Silent(Lru):
        def evict(self, n: int, time_us: int) -> None:
            return None

    expected = _drive(agentrt.Runtime(48, policies=("lru",)))
    assert _drive(agentrt.Runtime(48, policies=(Silent(), "lru"))) == expected


@pytest.mark.parametrize("answer", ["abc", [-1], [2**64], [1.5], 5])
def test_an_answer_that_is_no_list_of_keys_is_counted_and_passed_over(answer: object) -> None:
    class Wrong(Lru):
        def evict(self, n: int, time_us: int) -> Any:
            return answer

    runtime = agentrt.Runtime(48, policies=(Wrong(), "lru"))
    assert _drive(runtime) == _drive(agentrt.Runtime(48, policies=("lru",)))
    assert runtime.stats()["policy_errors"] > 0


def test_exceptions_are_counted_logged_once_and_harmless(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def call_start(self, call: agentrt.PolicyCall) -> None:
            raise RuntimeError("on purpose")

        def call_finish(self, call: agentrt.PolicyCall) -> None:
            raise RuntimeError("on purpose")

        def evict(self, n: int, time_us: int) -> list[int]:
            raise RuntimeError("on purpose")

    runtime = agentrt.Runtime(48, policies=(Broken(), "lru"))
    with caplog.at_level(logging.WARNING, logger="agentrt"):
        assert _drive(runtime) == _drive(agentrt.Runtime(48, policies=("lru",)))
    assert runtime.stats()["policy_errors"] > 600
    (record,) = [record for record in caplog.records if record.name == "agentrt"]
    assert "Broken" in record.getMessage()
    assert "on purpose" in record.getMessage()


def test_an_interrupt_in_a_policy_is_raised() -> None:
    class Interrupted(Lru):
        def call_start(self, call: agentrt.PolicyCall) -> None:
            raise KeyboardInterrupt

    session = agentrt.Runtime(48, policies=(Interrupted(),)).workload("w").session(1)
    with pytest.raises(KeyboardInterrupt):
        session.call_start("a", [1], time=0)
    session.call_end(time=1)


def test_a_policy_may_ask_the_runtime_that_asks_it() -> None:
    class Curious(Lru):
        runtime: agentrt.Runtime

        def evict(self, n: int, time_us: int) -> list[int] | None:
            self.runtime.score(list(self.idle))
            self.runtime.stats()
            return super().evict(n, time_us)

    policy = Curious()
    policy.runtime = agentrt.Runtime(48, policies=(policy,))
    assert _drive(policy.runtime) == _drive(agentrt.Runtime(48, policies=("lru",)))
    assert policy.runtime.stats()["policy_errors"] == 0


@pytest.mark.parametrize(
    ("policies", "error"),
    [
        (("nonsense",), errors.UnknownPolicyError),
        ("kv_cache", errors.BadOptionError),
        ((), errors.BadOptionError),
        ((object(),), errors.BadOptionError),
        (5, errors.BadOptionError),
    ],
)
def test_policies_that_cannot_be_are_refused(policies: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        agentrt.Runtime(48, policies=policies)


def test_classes_that_follow_the_protocol_are_policies() -> None:
    assert isinstance(Lru(), agentrt.Policy)
    assert isinstance(ReusedLast(), agentrt.Policy)
    assert not isinstance(object(), agentrt.Policy)
