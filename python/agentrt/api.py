"""The four calls on a default runtime: ``agentrt.observe``, ``score``, ``predict``, ``act``.

    >>> import agentrt
    >>> runtime = agentrt.configure(pool_blocks=1024)
    >>> session = agentrt.workload("support").session("run-1")
    >>> session.call_start("planner", [11, 12, 13], time=0.0)
    0
    >>> session.stored([11, 12, 13], time=0.1)
    >>> session.call_end([14], time=0.5)
    >>> agentrt.act("evict", 2, time=1.0).tolist()
    [14, 13]

One process that serves one engine needs no more. Several engines, or tests, make :class:`agentrt.Runtime` objects of
their own. All objects are frozen and may be used from any thread.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from agentrt._core import Prediction, Prefetch, Runtime, Workload
from agentrt.errors import NotConfiguredError
from agentrt.policy import Policy

__all__ = ["EventKind", "act", "configure", "default_runtime", "observe", "predict", "score", "workload"]


class EventKind(enum.IntEnum):
    """What happened: the codes in ``kinds``."""

    #: A session calls an agent; blocks: the prompt's full blocks, root first.
    CALL_START = 0
    #: Further blocks of a call in flight have entered the pool.
    STORED = 1
    #: A call has ended; blocks: the answer's full blocks, following the prompt's.
    CALL_END = 2
    #: A tool of the session starts; the agent field holds ``Workload.tool(name)``.
    TOOL_START = 3
    #: It has ended.
    TOOL_END = 4
    #: The engine has dropped blocks by itself.
    REMOVED = 5
    #: The session is over.
    SESSION_END = 6
    #: The engine has reset its cache: nothing is resident any more.
    RESET = 7
    #: A call has arrived and waits in the engine's queue; blocks: the prompt's full blocks, root first. Its start
    #: follows under the same call, or its end if it is cancelled.
    CALL_QUEUED = 8


_default: Runtime | None = None


def configure(pool_blocks: int, sessions: int = 4096, policies: Sequence[str | Policy] = ("kv_cache",)) -> Runtime:
    """Makes the default runtime; a later call replaces it.

    Args:
        pool_blocks: KV blocks of the engine's pool, 1 to 2^31. About 32 bytes are allocated for each.
        sessions: Sessions remembered, 8 to 2^24; the least recently used is forgotten first.
        policies: Who decides, in order: ``"kv_cache"`` (learned), ``"lru"``, or objects that follow :class:`Policy`.

    Raises:
        OutOfRangeError: A size cannot be had.
        NoMemoryError: The pool's index does not fit into memory.
        UnknownPolicyError: No built-in policy has this name.
    """
    global _default  # noqa: PLW0603 - the default runtime is what this module is for
    _default = Runtime(pool_blocks, sessions, tuple(policies))
    return _default


def default_runtime() -> Runtime:
    """The runtime that :func:`configure` made.

    There is no default pool size: a guess would evict at the wrong time without anyone noticing.

    Raises:
        NotConfiguredError: There is none yet.
    """
    if _default is None:
        raise NotConfiguredError
    return _default


def workload(name: str) -> Workload:
    """The workload of the default runtime called ``name``, made if it is new."""
    return default_runtime().workload(name)


def observe(
    workload: str,
    kinds: NDArray[np.uint8],
    sessions: NDArray[np.uint64],
    agents: NDArray[np.uint16],
    calls: NDArray[np.uint64],
    times_us: NDArray[np.uint64],
    offsets: NDArray[np.uint32] | None = None,
    blocks: NDArray[np.uint64] | None = None,
    /,
) -> int:
    """Feeds a batch of events to a workload of the default runtime, see :meth:`agentrt.Workload.observe`."""
    return default_runtime().workload(workload).observe(kinds, sessions, agents, calls, times_us, offsets, blocks)


def score(blocks: NDArray[np.uint64] | Sequence[int], out: NDArray[np.float32] | None = None, /) -> NDArray[np.float32]:
    """Scores blocks of the default runtime, see :meth:`agentrt.Runtime.score`."""
    return default_runtime().score(blocks, out)


def predict(workload: str, session: str | int, steps: int = 4, time: float | None = None) -> list[Prediction]:
    """Predicts the next agents of a session of the default runtime, see :meth:`agentrt.Session.predict`."""
    return default_runtime().workload(workload).session(session).predict(steps, time)


@overload
def act(
    kind: Literal["evict"], n: int, out: NDArray[np.uint64] | None = None, time: float | None = None
) -> NDArray[np.uint64]: ...
@overload
def act(kind: Literal["prefetch"], n: int, out: None = None, time: float | None = None) -> list[Prefetch]: ...
def act(kind: Any, n: int, out: Any = None, time: float | None = None) -> Any:
    """Asks the policies of the default runtime to decide, see :meth:`agentrt.Runtime.act`."""
    return default_runtime().act(kind, n, out, time)
