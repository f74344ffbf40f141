"""Whose request it is, for whoever hears of requests by their ids only: vLLM's offload beside the connector."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentrt.engines.vllm.identity import Identity

__all__ = ["CALLERS", "Callers"]

REQUESTS = 16_384


class Callers:
    """Identities by request. Keeps the latest ``REQUESTS``, once somebody listens."""

    def __init__(self) -> None:
        self.wanted = False
        self._identities: dict[str, Identity] = {}

    def listen(self) -> None:
        """From now on somebody asks."""
        self.wanted = True

    def put(self, request_id: str, identity: Identity) -> None:
        """This request is of this session and agent."""
        identities = self._identities
        identities[request_id] = identity
        if len(identities) > REQUESTS:
            del identities[next(iter(identities))]

    def find(self, request_id: str) -> Identity | None:
        """Whose request it is, if that is known."""
        return self._identities.get(request_id)


CALLERS = Callers()
