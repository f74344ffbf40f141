"""Whose request is it? Session and agent of a request, as given by the client or inferred from its prefix.

Given, first match counts: ``kv_transfer_params["agentrt"]``, ``vllm_xargs`` (``extra_args`` in Python), vLLM's own
``session_id`` (body, ``X-Session-ID``). Names are hashed or interned and never kept as text beyond the agents' names.

Inferred, where no session is given: a session is a tree of prompts that share a private prefix. The owner of every
block seen is remembered; a prompt belongs to the owner of the deepest block it shares with an earlier one, unless
more than ``FORKS`` different blocks have followed that block - then it is an anchor (system prompt, tools) that many
sessions start with, and the prompt starts a new one. Agents that have system prompts of their own therefore become
sessions of their own. Where no agent is given: it is named by the deepest anchor among the prompt's blocks, ``?``
without one.

Memory is bounded: ``NODES`` blocks, ``AGENTS`` names; the oldest block is forgotten first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Identities", "Identity", "given"]

NODES = 262_144
AGENTS = 4_096
FORKS = 5
# Names longer than this are somebody's mistake; the hash of the beginning is as good.
NAME_CHARS = 256


class Given(NamedTuple):
    """What the client said; None where it said nothing."""

    session: str | None
    agent: str | None
    session_ends: bool


class Identity(NamedTuple):
    """Whose request it is."""

    session: int
    agent: int
    session_inferred: bool
    agent_inferred: bool
    session_ends: bool


def _name(value: object) -> str | None:
    if value is None or value == "":
        return None
    return str(value)[:NAME_CHARS]


def given(request: Any) -> Given:
    """Reads the identity off a vLLM request; whatever has an unexpected shape counts as not given."""
    session = agent = None
    ends = False
    params = getattr(request, "kv_transfer_params", None)
    params = params.get("agentrt") if isinstance(params, dict) else None
    extra = getattr(getattr(request, "sampling_params", None), "extra_args", None)
    for source in (params, extra):
        if not isinstance(source, dict):
            continue
        session = session or _name(source.get("session_id"))
        agent = agent or _name(source.get("agent_id"))
        ends = ends or bool(source.get("session_end"))
    session = session or _name(getattr(request, "session_id", None))
    return Given(session, agent, ends)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class _Node:
    """A block: who had it first, and how many different blocks have followed it."""

    __slots__ = ("forks", "owner")

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.forks = 0


class Identities:
    """Turns requests into session and agent numbers."""

    def __init__(self) -> None:
        self._agents: dict[str, int] = {}
        self._names: list[str] = []
        self._nodes: dict[int, _Node] = {}
        self._sessions = 0

    def name(self, agent: int) -> str:
        """The name of an agent's number."""
        return self._names[agent] if agent < len(self._names) else "other"

    def resolve(self, request: Any, keys: Sequence[int]) -> Identity:
        """The identity of a request whose prompt has these block keys."""
        says = given(request)
        session = None if says.session is None else _hash(says.session)
        anchor = None
        if session is None or says.agent is None:
            inferred, anchor = self._infer(keys, session)
            session = inferred if session is None else session
        name = says.agent
        if name is None:
            name = "?" if anchor is None else f"anchor-{anchor:016x}"
        agent = self.intern(name)
        return Identity(session, agent, says.session is None, says.agent is None, says.session_ends)

    def intern(self, name: str) -> int:
        """The number of an agent's name; names beyond the limit share the last number."""
        number = self._agents.get(name)
        if number is None:
            number = len(self._agents)
            if number >= AGENTS:
                return AGENTS
            self._agents[name] = number
            self._names.append(name)
        return number

    def _infer(self, keys: Sequence[int], session: int | None) -> tuple[int, int | None]:
        """The session and the anchor of a prompt; remembers its blocks."""
        nodes = self._nodes
        anchor, last, depth = None, None, 0
        for key in keys:
            node = nodes.get(key)
            if node is None:
                break
            if node.forks > FORKS:
                anchor = key
            last = node
            depth += 1
        if last is not None and depth < len(keys):
            last.forks += 1
            if last.forks > FORKS:
                anchor = keys[depth - 1]
        if session is None:
            if last is not None and last.forks <= FORKS:
                session = last.owner
            else:
                self._sessions += 1
                # The top bit keeps inferred sessions apart from hashed names for all practical numbers of either.
                session = (1 << 63) | self._sessions
        for key in keys[depth:]:
            nodes[key] = _Node(session)
        while len(nodes) > NODES:
            del nodes[next(iter(nodes))]
        return session, anchor
