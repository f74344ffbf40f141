"""Whose request it is, for whoever hears of requests by their ids only: vLLM's offload beside the connector."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentrt.engines.vllm.identity import Identity

__all__ = ["CALLERS", "Callers"]

REQUESTS = 16_384
ENDED_SESSIONS = 4_096


class Callers:
    """Identities by request, and sessions that are over. Keeps the latest of both, once somebody listens."""

    def __init__(self) -> None:
        self.wanted = False
        self._identities: dict[str, Identity] = {}
        self._ended: deque[int] = deque(maxlen=ENDED_SESSIONS)

    def listen(self) -> None:
        """From now on somebody asks."""
        self.wanted = True

    def put(self, request_id: str, identity: Identity) -> None:
        """Whose a request is: its session and agent."""
        identities = self._identities
        identities[request_id] = identity
        if len(identities) > REQUESTS:
            del identities[next(iter(identities))]

    def end(self, session: int) -> None:
        """A session is over."""
        self._ended.append(session)

    def ended(self) -> list[int]:
        """Sessions that are over and have not been asked for yet."""
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def find(self, request_id: str) -> Identity | None:
        """Whose request it is, if that is known."""
        return self._identities.get(request_id)


CALLERS = Callers()
