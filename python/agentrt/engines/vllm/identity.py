"""Whose request is it? Session and agent of a request, as given by the client or inferred from its prefix.

Given, first match counts: ``kv_transfer_params["agentrt"]``, ``vllm_xargs`` (``extra_args`` in Python), vLLM's own
``session_id`` (body, ``X-Session-ID``). Names are hashed or interned and never kept as text beyond the agents' names.
A request may also name sessions that are over since (``ended_sessions``), of both places.

Inferred, where no session or no agent is given, by the core (:class:`agentrt._core.Identity`): a session is a growing
conversation, and what quotes its answers: agents that have system prompts of their own are of the run whose answers
their first prompt contains, word for word. An agent is named by the system prompt that many sessions start with;
without one it is ``?``, or ``?1``, ``?2``, .. by its place in the run. Of answers, hashes of some pieces of twelve
tokens are kept.

Memory is bounded: the core's tables, and ``AGENTS`` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentrt import _core

if TYPE_CHECKING:
    from agentrt._core import EngineCall

__all__ = ["Identities", "Identity", "given"]

AGENTS = 4_096
# Names longer than this are somebody's mistake; the hash of the beginning is as good.
NAME_CHARS = 256
# Of a longer list the rest is left out.
ENDED_SESSIONS = 256


class Given(NamedTuple):
    """What the client said; None where it said nothing."""

    session: str | None
    agent: str | None
    session_ends: bool
    ended: tuple[str, ...] = ()


class Identity(NamedTuple):
    """Whose request it is."""

    session: int
    agent: int
    session_inferred: bool
    agent_inferred: bool
    session_ends: bool
    #: What :meth:`Identities.ended` needs of it; None where nothing was inferred.
    call: int | None = None
    #: Other sessions of which it says that they are over.
    ended_sessions: tuple[int, ...] = ()

    @classmethod
    def of(cls, call: EngineCall) -> Identity:
        """That of a request that vLLM holds."""
        return cls(call.session, call.agent, call.session_inferred, call.agent_inferred, call.session_ends)


def _name(value: object) -> str | None:
    if value is None or value == "":
        return None
    return str(value)[:NAME_CHARS]


def _ended(value: object) -> list[str]:
    """Names of a list; one name is a list of one, anything else of none."""
    names = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    return [name for name in map(_name, names[:ENDED_SESSIONS]) if name is not None]


def given(request: Any) -> Given:
    """Reads the identity off a vLLM request; whatever has an unexpected shape counts as not given."""
    session = agent = None
    ends = False
    ended: list[str] = []
    params = getattr(request, "kv_transfer_params", None)
    params = params.get("agentrt") if isinstance(params, dict) else None
    extra = getattr(getattr(request, "sampling_params", None), "extra_args", None)
    for source in (params, extra):
        if not isinstance(source, dict):
            continue
        session = session or _name(source.get("session_id"))
        agent = agent or _name(source.get("agent_id"))
        ends = ends or bool(source.get("session_end"))
        ended += _ended(source.get("ended_sessions"))
    session = session or _name(getattr(request, "session_id", None))
    return Given(session, agent, ends, tuple(ended))


class Identities:
    """Turns requests into session and agent numbers."""

    def __init__(self) -> None:
        #: Numbers by name, which :class:`agentrt._core.EngineCalls` reads.
        self.agents: dict[str, int] = {}
        self.core = _core.Identity()
        self._names: list[str] = []

    def name(self, agent: int) -> str:
        """The name of an agent's number."""
        return self._names[agent] if agent < len(self._names) else "other"

    def resolve(self, request: Any, keys: Sequence[int] | NDArray[np.uint64]) -> Identity:
        """The identity of a request whose prompt has these block keys; tell :meth:`ended` when it has ended."""
        says = given(request)
        ended = tuple(map(self.session, says.ended))
        if says.session is not None and says.agent is not None:
            session, agent = self.session(says.session), self.intern(says.agent)
            return Identity(session, agent, False, False, says.session_ends, None, ended)
        session, number, call, is_new = self.core.started(np.ascontiguousarray(keys, np.uint64))
        if says.session is not None:
            session = self.session(says.session)
        elif is_new:
            # None where the prompt is embeddings.
            tokens = getattr(request, "prompt_token_ids", None)
            session, number = (tokens and self.core.join(call, tokens)) or (session, number)
        name = says.agent
        if name is None:
            place = number - self.core.anchors
            name = f"?{place}" if place > 0 else f"anchor-{number}" if number else "?"
        agent = self.intern(name)
        return Identity(session, agent, says.session is None, says.agent is None, says.session_ends, call, ended)

    def ended(self, identity: Identity, output: NDArray[np.uint64]) -> None:
        """The request has ended, its answer filled these blocks."""
        if identity.call is not None:
            self.core.ended(identity.call, output)

    def intern(self, name: str) -> int:
        """The number of an agent's name; names beyond the limit share the last number."""
        number = self.agents.get(name)
        if number is None:
            number = len(self.agents)
            if number >= AGENTS:
                return AGENTS
            self.agents[name] = number
            self._names.append(name)
        return number

    def session(self, name: str) -> int:
        """The number of a session's name, as :class:`agentrt._core.EngineCalls` has it."""
        return _core.block_key(name.encode("utf-8", "surrogatepass"))
