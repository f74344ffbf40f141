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

__all__ = ["Core", "RuntimeCore", "make_core"]

POLICIES = ("agentrt", "lru", "observe")


class Core(Protocol):
    """What the adapter reports and asks. Keys are numpy ``uint64``; times are microseconds of one monotone clock."""

    def call_started(self, session: int, agent: int, call: int, now_us: int, keys: NDArray[np.uint64]) -> int:
        """A call starts; returns how many leading blocks the core holds to be resident."""

    def stored(self, call: int, now_us: int, keys: NDArray[np.uint64]) -> None:
        """Blocks that follow those the call has so far have entered the pool."""

    def call_ended(self, session: int, call: int, now_us: int, keys: NDArray[np.uint64]) -> None:
        """A call has ended; ``keys``: the full blocks of its answer."""

    def session_ended(self, session: int, now_us: int) -> None:
        """No more calls of this session."""

    def removed(self, now_us: int, keys: NDArray[np.uint64]) -> None:
        """The engine no longer has these blocks."""

    def reset(self, now_us: int) -> None:
        """The engine has no block any more."""

    def evict(self, n: int, now_us: int) -> Sequence[int]:
        """Names up to ``n`` blocks to go, lowest first, and counts them as gone."""


CALL_START, STORED, CALL_END, REMOVED, SESSION_END, RESET = 0, 1, 2, 5, 6, 7


class RuntimeCore:
    """agentrt's runtime for one pool.

    Args:
        pool_blocks: Blocks of the pool.
        workload: Name under which state is learned.
    """

    def __init__(self, pool_blocks: int, workload: str = "vllm") -> None:
        import agentrt

        # Room for blocks that vLLM has reused on its own and that are found out only when they are named.
        self.runtime: Any = vars(agentrt)["Runtime"](pool_blocks + pool_blocks // 8 + 64)
        self.workload = self.runtime.workload(workload)
        self._kinds = np.zeros(1, np.uint8)
        self._sessions = np.zeros(1, np.uint64)
        self._agents = np.zeros(1, np.uint16)
        self._calls = np.zeros(1, np.uint64)
        self._times = np.zeros(1, np.uint64)
        self._offsets = np.zeros(2, np.uint32)
        self._none = np.zeros(0, np.uint64)

    def _observe(self, kind: int, session: int, agent: int, call: int, now_us: int, keys: NDArray[np.uint64]) -> int:
        self._kinds[0] = kind
        self._sessions[0] = session
        self._agents[0] = agent
        self._calls[0] = call
        self._times[0] = now_us
        self._offsets[1] = len(keys)
        hits: int = self.workload.observe(
            self._kinds, self._sessions, self._agents, self._calls, self._times, self._offsets, keys
        )
        return hits

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
        self._observe(SESSION_END, session, 0, 0, now_us, self._none)

    def removed(self, now_us: int, keys: NDArray[np.uint64]) -> None:
        """The engine has dropped blocks."""
        self._observe(REMOVED, 0, 0, 0, now_us, keys)

    def reset(self, now_us: int) -> None:
        """The engine has dropped all blocks."""
        self._observe(RESET, 0, 0, 0, now_us, self._none)

    def evict(self, n: int, now_us: int) -> Sequence[int]:
        """Names victims."""
        victims: NDArray[np.uint64] = self.runtime.act("evict", n, None, now_us / 1e6)
        keys: list[int] = victims.tolist()
        return keys


def make_core(policy: str, pool_blocks: int, workload: str) -> Core | None:
    """The core of a policy: ``agentrt``, ``observe`` (learns, never acts), ``lru`` or a ``module:attribute``."""
    if policy == "lru":
        return None
    if policy in POLICIES:
        return RuntimeCore(pool_blocks, workload)
    module, _, attribute = policy.partition(":")
    if not attribute:
        known = ", ".join(POLICIES)
        raise ValueError(f"unknown policy `{policy}`; known: {known}, or `module:attribute`")
    factory: Callable[[int, str], Core] = getattr(import_module(module), attribute)
    return factory(pool_blocks, workload)
