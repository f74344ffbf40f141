"""Session and agent of a request, given or inferred. Needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from agentrt.engines.vllm import identity as module
from agentrt.engines.vllm.identity import Identities, Identity, given


def request(session_id: Any = None, extra: Any = None, params: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        session_id=session_id, sampling_params=SimpleNamespace(extra_args=extra), kv_transfer_params=params
    )


NOBODY = request()


def test_the_agentrt_parameters_win_over_xargs_and_those_over_the_header() -> None:
    said = given(request("header", {"session_id": "xargs", "agent_id": "x"}, {"agentrt": {"session_id": "params"}}))
    assert (said.session, said.agent) == ("params", "x")
    assert given(request("header", {"agent_id": 3})) == ("header", "3", False, ())
    assert given(SimpleNamespace()) == (None, None, False, ())


def test_ended_sessions_are_a_list_of_names_in_either_place() -> None:
    def ended(params: Any, extra: Any = None) -> tuple[str, ...]:
        return given(request(None, {"ended_sessions": extra}, {"agentrt": {"ended_sessions": params}})).ended

    assert ended(["a", "b"], ["c"]) == ("a", "b", "c")
    assert ended("one") == ("one",)
    assert ended([7, None, "", "x" * 1000]) == ("7", "x" * 256)
    for strange in (None, 7, {"a": 1}, object(), b"x"):
        assert ended(strange) == ()
    assert len(ended([str(n) for n in range(5_000)])) == module.ENDED_SESSIONS


def test_ended_sessions_are_those_that_were_named_before() -> None:
    known = Identities()
    over = known.resolve(request("s", {"agent_id": "planner"}), [])
    for says in (request("t", {"agent_id": "a", "ended_sessions": ["s"]}), request(None, {"ended_sessions": ["s"]})):
        assert known.resolve(says, [1]).ended_sessions == (over.session,)


def test_equal_names_are_the_same_session_and_agent() -> None:
    known = Identities()
    one = known.resolve(request("s", {"agent_id": "planner"}), [])
    two = known.resolve(request(None, {"session_id": "s", "agent_id": "planner"}), [5])
    other = known.resolve(request("t", {"agent_id": "coder"}), [])
    assert (one.session, one.agent) == (two.session, two.agent)
    assert other.session != one.session
    assert known.name(other.agent) == "coder"


def ask(known: Identities, keys: list[int]) -> Identity:
    """One request from start to end, without an answer."""
    identity = known.resolve(NOBODY, keys)
    known.ended(identity, np.empty(0, np.uint64))
    return identity


def test_a_prompt_that_extends_another_is_the_same_session() -> None:
    known = Identities()
    first = ask(known, [1, 2, 3])
    second = ask(known, [1, 2, 3, 4, 5])
    stranger = ask(known, [7, 8])
    rewritten = ask(known, [1, 2, 3, 9])
    assert first.session == second.session == rewritten.session != stranger.session
    assert first.session_inferred


def test_what_runs_at_once_is_not_one_session_and_an_answer_is_part_of_it() -> None:
    known = Identities()
    running = known.resolve(NOBODY, [1, 2, 3])
    beside = known.resolve(NOBODY, [1, 2, 3])
    assert running.session != beside.session
    known.ended(running, np.array([4, 5], np.uint64))
    assert ask(known, [1, 2, 3, 4, 5, 6]).session == running.session


def test_sessions_that_share_an_anchor_are_told_apart_once_it_is_known() -> None:
    known = Identities()
    anchor = [1, 2, 3]
    found = [ask(known, [*anchor, 100 + i]) for i in range(20)]
    late = [i.session for i in found[10:]]
    assert len(set(late)) == len(late)
    extended = ask(known, [*anchor, 119, 500])
    assert extended.session == found[19].session


def test_agents_are_named_by_the_anchor_they_start_with() -> None:
    known = Identities()
    for i in range(40):
        ask(known, [1, 2, 100 + i])
        ask(known, [3, 5, 6, 300 + i])
    planner = {ask(known, [1, 2, 1000 + i]).agent for i in range(5)}
    coder = {ask(known, [3, 5, 6, 2000 + i]).agent for i in range(5)}
    assert len(planner) == len(coder) == 1
    assert planner != coder
    assert known.name(min(planner)).startswith("anchor-")


def said(name: int, tokens: int = 200) -> list[int]:
    """The tokens of a text unlike any other."""
    return [int(token) for token in np.random.default_rng(name).integers(0, 50_000, tokens)]


def reads(known: Identities, keys: list[int], texts: list[list[int]], answer: list[int]) -> Identity:
    """One request whose prompt has these texts, from start to end."""
    prompt = SimpleNamespace(**vars(NOBODY), prompt_token_ids=[token for text in texts for token in text])
    identity = known.resolve(prompt, keys)
    known.ended(identity, np.empty(0, np.uint64))
    assert identity.call is not None
    known.core.answered(identity.call, answer)
    return identity


def test_an_agent_that_quotes_an_answer_is_of_the_run_in_which_it_was_given() -> None:
    known = Identities()
    task, plan, code = said(1), said(2), said(3)
    planner = reads(known, [1, 2], [said(10), task], plan)
    stranger = reads(known, [5, 6], [said(10), said(4)], said(5))
    coder = reads(known, [11, 12], [said(20), task, plan], code)
    tester = reads(known, [21, 22], [said(30), plan[40:], code], [])
    again = reads(known, [11, 12, 13], [said(20), task, plan, code], [])
    assert planner.session == coder.session == tester.session == again.session != stranger.session
    assert [known.name(call.agent) for call in (planner, coder, tester, again)] == ["?", "?1", "?2", "?1"]


def test_a_session_that_is_given_wins_over_what_is_quoted() -> None:
    known = Identities()
    plan = said(2)
    reads(known, [1, 2], [said(10)], plan)
    named = SimpleNamespace(**vars(request("mine")), prompt_token_ids=plan)
    assert known.resolve(named, [7, 8]).session == known.session("mine")


def test_prompts_without_tokens_are_strangers() -> None:
    known = Identities()
    plan = said(2)
    first = reads(known, [1, 2], [plan], plan)
    for number, tokens in enumerate((None, list[int]())):
        prompt = SimpleNamespace(**vars(NOBODY), prompt_token_ids=tokens)
        assert known.resolve(prompt, [100 + number]).session != first.session


def test_agents_named_are_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "AGENTS", 10)
    known = Identities()
    for i in range(500):
        known.resolve(request(None, {"agent_id": f"agent {i}"}), [10 * i, 10 * i + 1])
    assert len(known._names) == 10
    assert known.name(known.intern("one more")) == "other"
