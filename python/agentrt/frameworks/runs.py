"""Whose request it is, for clients of vLLM's OpenAI-compatible server, and which runs are over.

    runs = Runs()
    with runs.start() as run:
        client.chat.completions.create(..., extra_body=run.extra_body("planner"))

Nothing is sent when a run ends: the next request of any run says so, once, and agentrt in the engine lets what only
that run needed go first. A request that gets lost takes this with it; the run then counts as one that may call again.
For LangGraph there is :func:`agentrt.frameworks.langgraph.identify`.
"""

from __future__ import annotations

import threading
import uuid
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Run", "Runs"]

# Ended runs that one request names, and that wait to be named; beyond that the oldest are forgotten.
PER_REQUEST = 64
WAITING = 4_096


class Runs:
    """The runs of a client. Threads and tasks may share one.

    Args:
        servers: Engines behind the address. A request reaches one of them, so an end is told with as many requests.

    Raises:
        ValueError: without servers.
    """

    def __init__(self, servers: int = 1) -> None:
        if servers < 1:
            raise ValueError(f"servers must be at least 1, got {servers}")
        self.servers = servers
        self._lock = threading.Lock()
        # How many more requests are to name it; the longest ended first.
        self._ended: dict[str, int] = {}
        # `with` blocks of a name that are open.
        self._open: dict[str, int] = {}

    def start(self, name: str | None = None) -> Run:
        """A run: all calls of one workflow, of whatever agents. Without a name it gets one that nobody else has."""
        return Run(self, uuid.uuid4().hex if name is None else name)

    def _enter(self, name: str) -> None:
        with self._lock:
            self._ended.pop(name, None)
            self._open[name] = self._open.get(name, 0) + 1

    def _leave(self, name: str) -> None:
        with self._lock:
            self._open[name] -= 1
            if not self._open[name]:
                del self._open[name]
                self._put(name)

    def _end(self, name: str) -> None:
        with self._lock:
            self._put(name)

    def _put(self, name: str) -> None:
        self._ended[name] = self.servers
        if len(self._ended) > WAITING:
            del self._ended[next(iter(self._ended))]

    def _calls(self, name: str) -> list[str]:
        """Ended runs that a request of this run is to name."""
        with self._lock:
            ended = self._ended
            ended.pop(name, None)
            told = list(ended)[:PER_REQUEST]
            for one in told:
                ended[one] -= 1
                if not ended[one]:
                    del ended[one]
            return told


class Run:
    """One run; :meth:`Runs.start` makes it. Leaving its `with` block ends it, the last one if several are open."""

    def __init__(self, runs: Runs, name: str) -> None:
        self.name = name
        self._runs = runs

    def extra_body(self, agent: str, **more: str | float) -> dict[str, Any]:
        """What a request of this run says besides.

        Make it anew for each request, or for each agent of a run where a framework takes no more than that: the names
        of ended runs in it are then sent more than once, which is no harm as long as none of them starts again.

        Args:
            agent: Who calls: the name of a role, the same in every run.
            more: Further names for `vllm_xargs`, such as `tenant` or `tool`.
        """
        told = self._runs._calls(self.name)
        names: dict[str, Any] = {"session_id": self.name, "agent_id": agent, **more}
        if told:
            names["ended_sessions"] = told
        return {"vllm_xargs": names}

    def end(self) -> None:
        """No more calls. One that comes all the same starts the run again."""
        self._runs._end(self.name)

    def __enter__(self) -> Self:
        self._runs._enter(self.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._runs._leave(self.name)
