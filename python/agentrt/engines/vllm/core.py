"""The policy behind the adapter.

:class:`RuntimeCore` is agentrt's own runtime. ``lru`` has no core at all: the adapter then names victims in the order
in which they stand in vLLM's queue, which proves that naming them changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentrt.engines.vllm.gate import Scheduling

__all__ = ["Core", "RuntimeCore", "make_core", "make_scheduling", "names_of"]

POLICIES = ("agentrt", "lru", "observe")


class Core(Protocol):
    """What the adapter reports and asks. Keys are numpy ``uint64``; times are microseconds of one monotone clock.

    A core with ``call_queued`` (arguments as ``call_started``) is also told of calls that cannot start at once.
    """

    def call_started(self, session: int, agent: int, call: int, now_us: int, keys: NDArray[np.uint64]) -> int:
        """A call starts; returns how many leading blocks the core holds to be resident."""

    def stored(self, call: int, now_us: int, keys: NDArray[np.uint64]) -> None:
        """Blocks that follow those the call has so far have entered the pool."""

    def call_ended(self, session: int, call: int, now_us: int, keys: NDArray[np.uint64]) -> None:
        """A call has ended; ``keys``: the full blocks of its answer."""

    def session_ended(self, session: int, now_us: int) -> None:
        """A session makes no more calls."""

    def removed(self, now_us: int, keys: NDArray[np.uint64]) -> None:
        """The engine no longer has these blocks."""

    def reset(self, now_us: int) -> None:
        """The engine has no block any more."""

    def evict(self, n: int, now_us: int) -> Sequence[int]:
        """Names up to ``n`` blocks to go, lowest first, and counts them as gone."""


CALL_START, STORED, CALL_END, TOOL_START, TOOL_END, REMOVED, SESSION_END, RESET, CALL_QUEUED = range(9)


class RuntimeCore:
    """agentrt's runtime for one pool.

    Args:
        pool_blocks: Blocks of the pool.
        workload: Name under which state is learned.
        policies: Those beside ``kv_cache``, by name.
        first: Policies in Python that are asked before all others.
    """

    def __init__(
        self, pool_blocks: int, workload: str = "vllm", policies: Sequence[str] = (), first: Sequence[Any] = ()
    ) -> None:
        import agentrt

        # Room for blocks that vLLM has reused on its own and that are found out only when they are named.
        room = pool_blocks + pool_blocks // 8 + 64
        self.runtime: Any = agentrt.Runtime(room, policies=(*first, "kv_cache", *policies))
        self.workload = self.runtime.workload(workload)
        #: What the engine reports or can do beyond what every adapter does, by the names of ``Scheduler.needs``.
        self.supplies: Sequence[str] = ()
        self._observe: Callable[..., int] = self.workload.observe_one

    def call_queued(self, session: int, agent: int, call: int, now_us: int, keys: NDArray[np.uint64]) -> None:
        """A call waits."""
        self._observe(CALL_QUEUED, session, agent, call, now_us, keys)

    def call_started(self, session: int, agent: int, call: int, now_us: int, keys: NDArray[np.uint64]) -> int:
        """A call starts."""
        return self._observe(CALL_START, session, agent, call, now_us, keys)

    def stored(self, call: int, now_us: int, keys: NDArray[np.uint64]) -> None:
        """Blocks have entered the pool."""
        self._observe(STORED, 0, 0, call, now_us, keys)

    def call_ended(self, session: int, call: int, now_us: int, keys: NDArray[np.uint64]) -> None:
        """A call has ended."""
        self._observe(CALL_END, session, 0, call, now_us, keys)

    def session_ended(self, session: int, now_us: int) -> None:
        """The session is over."""
        self._observe(SESSION_END, session, 0, 0, now_us)

    def removed(self, now_us: int, keys: NDArray[np.uint64]) -> None:
        """The engine has dropped blocks."""
        self._observe(REMOVED, 0, 0, 0, now_us, keys)

    def tool(self, name: str) -> int:
        """The number of a tool."""
        number: int = self.workload.tool(name)
        return number

    def tool_started(self, session: int, tool: int, now_us: int) -> None:
        """A tool of the session runs."""
        self._observe(TOOL_START, session, tool, 0, now_us)

    def tool_ended(self, session: int, tool: int, now_us: int) -> None:
        """It has returned."""
        self._observe(TOOL_END, session, tool, 0, now_us)

    def restored(self, session: int, agent: int, now_us: int, keys: NDArray[np.uint64]) -> None:
        """The pool holds this chain, although no call has brought it."""
        self.workload.session(session).restored(agent, keys, now_us / 1e6)

    def reset(self, now_us: int) -> None:
        """The engine has dropped all blocks."""
        self._observe(RESET, 0, 0, 0, now_us)

    def evict(self, n: int, now_us: int) -> Sequence[int]:
        """Names victims. The adapter asks the runtime itself, without this detour."""
        victims: NDArray[np.uint64] = self.runtime.act("evict", n, None, now_us / 1e6)
        keys: list[int] = victims.tolist()
        return keys


def _named(what: str, where: str, known: Sequence[str]) -> Any:
    """What ``module:attribute`` names."""
    module, _, attribute = where.partition(":")
    if not attribute:
        raise ValueError(f"unknown {what} `{where}`; known: {', '.join([*known, '`module:attribute`'])}")
    return getattr(import_module(module), attribute)


def make_core(policy: str, pool_blocks: int, workload: str, beside: Sequence[str] = ()) -> Core | None:
    """The core of a policy: ``agentrt``, ``observe`` (learns, never acts), ``lru`` or a ``module:attribute``."""
    if policy == "lru":
        return None
    if policy in POLICIES:
        return RuntimeCore(pool_blocks, workload, beside)
    core: Core = _named("policy", policy, POLICIES)(pool_blocks, workload)
    return core


def make_scheduling(where: str, core: Core | None, block_tokens: int) -> Scheduling:
    """Who orders and holds waiting calls: policies of the core, or what a ``module:attribute`` makes."""
    if ":" not in where and isinstance(core, RuntimeCore):
        from agentrt.engines.vllm.scheduling import CoreScheduling

        return CoreScheduling(core.runtime, core.workload, block_tokens, core.supplies)
    scheduling: Scheduling = _named("scheduling", where, ())()
    return scheduling


def names_of(scheduling: str | None) -> list[str]:
    """The core's policies among what the option ``scheduling`` says."""
    if scheduling is None or ":" in scheduling:
        return []
    return [name.strip() for name in scheduling.split(",") if name.strip()]
