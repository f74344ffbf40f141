"""What a client sends of its runs."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from agentrt.frameworks.runs import PER_REQUEST, WAITING, Run, Runs


def says(run: Run, agent: str = "planner", **more: Any) -> dict[str, Any]:
    body = run.extra_body(agent, **more)
    assert body.keys() == {"vllm_xargs"}
    names: dict[str, Any] = body["vllm_xargs"]
    return names


def test_a_request_names_its_run_and_agent() -> None:
    runs = Runs()
    assert says(runs.start("r"), tenant="t") == {"session_id": "r", "agent_id": "planner", "tenant": "t"}
    one, two = runs.start(), runs.start()
    assert says(one)["session_id"] == says(one)["session_id"] != says(two)["session_id"]


def test_the_next_request_says_which_runs_are_over_and_the_one_after_does_not() -> None:
    runs = Runs()
    other = runs.start("other")
    with runs.start("a") as a, runs.start("b") as b:
        assert "ended_sessions" not in says(a)
        assert "ended_sessions" not in says(b)
    assert says(other)["ended_sessions"] == ["b", "a"]
    assert "ended_sessions" not in says(other)


def test_a_run_that_fails_is_over() -> None:
    runs = Runs()
    with pytest.raises(KeyError), runs.start("fails"):
        raise KeyError
    assert says(runs.start("next"))["ended_sessions"] == ["fails"]


def test_as_many_requests_tell_as_there_are_servers() -> None:
    runs = Runs(servers=3)
    runs.start("a").end()
    other = runs.start("other")
    assert ["ended_sessions" in says(other) for _ in range(5)] == [True] * 3 + [False] * 2
    with pytest.raises(ValueError, match="servers must be at least 1, got 0"):
        Runs(servers=0)


def test_a_run_that_calls_again_is_not_over() -> None:
    runs = Runs(servers=2)
    run, other = runs.start("a"), runs.start("other")
    run.end()
    assert says(other)["ended_sessions"] == ["a"]
    assert "ended_sessions" not in says(run)
    assert "ended_sessions" not in says(other)


def test_a_run_that_is_open_twice_is_over_when_both_are() -> None:
    runs = Runs()
    other = runs.start("other")
    with runs.start("thread"):
        with runs.start("thread"):
            pass
        assert "ended_sessions" not in says(other)
    assert says(other)["ended_sessions"] == ["thread"]


def test_a_run_that_is_opened_again_is_not_over() -> None:
    runs = Runs()
    with runs.start("thread"):
        pass
    with runs.start("thread"):
        assert "ended_sessions" not in says(runs.start("other"))


def test_lists_are_short_and_so_is_memory() -> None:
    runs = Runs()
    for n in range(WAITING + 10):
        runs.start(str(n)).end()
    other, told = runs.start("other"), []
    while "ended_sessions" in (names := says(other)):
        assert len(names["ended_sessions"]) <= PER_REQUEST
        told += names["ended_sessions"]
    assert told == [str(n) for n in range(10, WAITING + 10)]


def test_threads_tell_each_end_once() -> None:
    runs, told, lock = Runs(), [], threading.Lock()

    def work(name: str) -> None:
        for n in range(300):
            with runs.start(f"{name}-{n}") as run:
                heard = says(run).get("ended_sessions", [])
            with lock:
                told.extend(heard)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while heard := says(runs.start("last")).get("ended_sessions"):
        told += heard
    assert len(told) == len(set(told)) == 1_200
