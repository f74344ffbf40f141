"""An agent-aware policy for vLLM's CPU offload tier, through vLLM's own seam: a ``CachePolicy`` chosen by name.

On with ``eviction_policy: agentrt`` in the extra options of vLLM's ``OffloadingConnector``. The tier is a pool of its
own for the runtime: each request that has used it is one call (its chunks in prefix order), and the runtime names the
chunks that go. Chunks it cannot name (of requests that are not over yet) go in the order in which they became free.

Whose request it is: what the scheduler's side of agentrt has found out, where its connector runs beside the offload;
otherwise ``kv_transfer_params["agentrt"]``; otherwise inferred.

Invariants, which are vLLM's: a chunk in transfer or in ``protected`` is never evicted; ``evict`` gives all it was asked
for or changes nothing. Whatever goes wrong in the runtime costs its opinion only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy

from agentrt import block_key
from agentrt._core import monotonic_us
from agentrt.engines.vllm.callers import CALLERS
from agentrt.engines.vllm.core import RuntimeCore
from agentrt.engines.vllm.guard import Guard
from agentrt.engines.vllm.identity import Identities

__all__ = ["AgentRTCachePolicy"]

ROUNDS = 4


class AgentRTCachePolicy(CachePolicy):  # type: ignore[misc, unused-ignore]
    """Evicts the chunks that promise the fewest hits.

    Args:
        cache_capacity: Chunks of the tier.
    """

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.guard = Guard()
        self.core = RuntimeCore(max(cache_capacity, 1), "offload")
        self.identities = Identities()
        self.chunks: dict[Any, Any] = {}
        # In the order in which they became free.
        self._free: dict[Any, None] = {}
        # Chunks the runtime has let go while they could not go; they are next.
        self._named: dict[Any, None] = {}
        self._keys: dict[int, Any] = {}
        self._calls = 0
        CALLERS.listen()

    # ---- what the tier holds ----

    def get(self, key: Any) -> Any:
        """The chunk, or None."""
        return self.chunks.get(key)

    def insert(self, key: Any, chunk: Any, *_more: Any, **_named: Any) -> None:
        """A chunk has been given to a key. Later versions of vLLM add the request."""
        self.chunks[key] = chunk
        self._keys[block_key(key)] = key
        if chunk.ref_cnt == 0:
            self._free[key] = None

    def remove(self, key: Any) -> None:
        """A store has failed."""
        del self.chunks[key]
        self._forget(key)

    def mark_evictable(self, key: Any) -> None:
        """No transfer uses the chunk any more."""
        self._free[key] = None

    def mark_non_evictable(self, key: Any) -> None:
        """A transfer uses the chunk."""
        self._free.pop(key, None)

    def clear(self) -> None:
        """The tier has been emptied; what was learned stays."""
        self.chunks.clear()
        self._free.clear()
        self._named.clear()
        self._keys.clear()
        self.guard.run("reset", None, self.core.reset, monotonic_us())

    def _forget(self, key: Any) -> None:
        self._free.pop(key, None)
        self._named.pop(key, None)
        self._keys.pop(block_key(key), None)

    # ---- who uses what ----

    def touch(self, keys: Iterable[Any], req_context: Any) -> None:
        """Chunks are in use; versions of vLLM that do not tell of ends of requests tell of their chunks here."""
        keys = list(keys)
        if hasattr(CachePolicy, "on_request_finished"):
            self._renew(keys)
        else:
            self.on_request_finished((keys,), set(), set(), req_context)

    def on_store_miss(self, keys: Iterable[Any], req_context: Any) -> None:
        """Chunks are about to be stored: nothing to learn before the request is over."""

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[Any]],
        insertion_only_keys: set[Any],  # noqa: ARG002 - vLLM passes it
        reused_keys: set[Any],  # noqa: ARG002
        req_context: Any,
    ) -> None:
        """A request is over: one call of its session, with these chunks."""
        keys = [key for group in key_groups for key in group]
        position = getattr(req_context, "get_offload_key_position", None)
        if position is not None and len(key_groups) > 1:
            at = {key: position(key) for key in keys}
            if None not in at.values():
                keys.sort(key=at.__getitem__)
        # What the end of a prompt needs goes before what its beginning needs.
        self._renew(reversed(keys))
        if keys:
            self.guard.run("on_request_finished", None, self._call, keys, req_context)

    def _renew(self, keys: Iterable[Any]) -> None:
        for key in keys:
            if key in self._free:
                del self._free[key]
                self._free[key] = None

    def _call(self, keys: list[Any], req_context: Any) -> None:
        array: Any = np.array([block_key(key) for key in keys], np.uint64)
        found = CALLERS.find(req_context.req_id)
        # Of what the scheduler's side has inferred, it tells the end itself.
        identity = found._replace(call=None) if found else self.identities.resolve(req_context, array)
        self._calls += 1
        now_us = monotonic_us()
        self._end_sessions(identity.ended_sessions, now_us)
        hit = self.core.call_started(identity.session, identity.agent, self._calls, now_us, array)
        # Chunks that found no room end the chain.
        held = next((i for i, key in enumerate(keys) if key not in self.chunks), len(keys))
        if hit < held:
            self.core.stored(self._calls, now_us, array[hit:held])
        self.core.call_ended(identity.session, self._calls, now_us, array[:0])
        self.identities.ended(identity, array[:0])
        if identity.session_ends:
            self.core.session_ended(identity.session, now_us)
        for key in keys[:held]:
            self._named.pop(key, None)

    def _end_sessions(self, sessions: Iterable[int], now_us: int) -> None:
        """These are over, and those of which the scheduler's side has heard."""
        for session in (*CALLERS.ended(), *sessions):
            self.core.session_ended(session, now_us)

    # ---- what goes ----

    def evict(self, n: int, protected: set[Any]) -> list[tuple[Any, Any]] | None:
        """Evicts exactly ``n`` chunks, or None and nothing."""
        if n == 0:
            return []
        if n > len(self._free):
            return None
        chosen = {key: None for key in self._named if key in self._free and key not in protected}
        if len(chosen) > n:
            chosen = dict.fromkeys(list(chosen)[:n])
        self.guard.run("evict", None, self._choose, chosen, n, protected)
        for key in self._free:
            if len(chosen) >= n:
                break
            if key not in protected:
                chosen[key] = None
        if len(chosen) < n:
            return None
        evicted = [(key, self.chunks.pop(key)) for key in chosen]
        gone = [block_key(key) for key in chosen if key not in self._named]
        for key in chosen:
            self._forget(key)
        self.guard.run("removed", None, self.core.removed, monotonic_us(), np.array(gone, np.uint64))
        return evicted

    def _choose(self, chosen: dict[Any, None], n: int, protected: set[Any]) -> None:
        """Adds what the runtime names; what cannot go now is remembered."""
        self._end_sessions((), monotonic_us())
        for _ in range(ROUNDS):
            if len(chosen) >= n:
                return
            victims = self.core.runtime.act("evict", n - len(chosen), None, monotonic_us() / 1e6).tolist()
            if not victims:
                return
            for number in victims:
                key = self._keys.get(number)
                if key is None:
                    continue
                self._named[key] = None
                if key in self._free and key not in protected:
                    chosen[key] = None
