"""Prefills in idle capacity: requests of agentrt's own, of which nobody reads the answer.

A connector cannot compute. What it can do is queue a request with vLLM's scheduler, as a client does: the beginning of
an earlier prompt, one token to generate. vLLM computes it (or loads it from whatever tier stands beside), caches its
blocks, and drops the answer, since no client knows the request. KV is therefore vLLM's own, whatever the device.

In idle capacity only: asked when vLLM has no request at all, a step's worth at a time; what still waits or runs when a
client's request arrives is withdrawn, and what it has computed until then stays. vLLM is woken for it only where the
policies may name something: after the last request has ended, and after each prefill. What has been named is not
computed again before the next client's request, so that an idle engine comes to rest.

The scheduler is not handed to connectors. It is found once, among those who call when vLLM hands its block pool over.

Memory: token ids of the last prompt of each agent of a session, ``MOST_TOKENS`` together (4 bytes each).
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from agentrt._core import block_keys

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    import numpy as np
    from numpy.typing import NDArray

    import agentrt

__all__ = ["Prefills", "scheduler_of"]

MOST_TOKENS = 1 << 22
# vLLM serves the lowest priority first.
LAST = 1 << 30


def scheduler_of(pool: Any) -> Any:
    """The scheduler to which a block pool belongs, if it is among those who are calling; else None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        manager = getattr(owner, "kv_cache_manager", None)
        if manager is not None and getattr(manager, "block_pool", None) is pool and hasattr(owner, "add_request"):
            return owner
        frame = frame.f_back
    return None


class _Prompt(NamedTuple):
    session: int
    agent: int
    tokens: array[int]
    keys: NDArray[np.uint64]
    hasher: Any


class _Prefill(NamedTuple):
    session: int
    agent: int
    blocks: int


class Prefills:
    """Queues prefills and withdraws them.

    Args:
        scheduler: vLLM's.
        block_size: Tokens of a block.
    """

    def __init__(self, scheduler: Any, block_size: int) -> None:
        self.scheduler = scheduler
        self.block_size = block_size
        self.live: dict[str, _Prefill] = {}
        #: Whether the policies may name something.
        self.wanted = False
        self.requests = 0
        self.withdrawn = 0
        self.computed_tokens = 0
        self._prompts: dict[int, _Prompt] = {}
        self._calls: dict[tuple[int, int], int] = {}
        self._tokens = 0
        # Named since a client was last here: the same again would be without end.
        self._named: set[tuple[int, int]] = set()

    @property
    def paused(self) -> bool:
        """Whether vLLM is about to sleep, or sleeps."""
        return bool(getattr(self.scheduler, "pause_state", 0))

    def remember(self, request: Any, session: int, agent: int, number: int, keys: NDArray[np.uint64]) -> None:
        """A client's call has ended: its prompt may be asked for."""
        tokens = request.prompt_token_ids
        hasher = getattr(request, "_block_hasher", None)
        # What makes the hash of a block differ although its tokens are the same is not repeated here.
        plain = not (
            getattr(request, "lora_request", None)
            or getattr(request, "mm_features", None)
            or getattr(request, "cache_salt", None)
            or getattr(request, "prompt_embeds", None) is not None
            or getattr(request, "pooling_params", None)
        )
        self._forget(self._calls.pop((session, agent), None))
        if tokens is None or hasher is None or not plain or not len(keys):
            return
        n = len(keys) * self.block_size
        self._prompts[number] = _Prompt(session, agent, array("I", tokens[:n]), keys, hasher)
        self._calls[session, agent] = number
        self._tokens += n
        while self._tokens > MOST_TOKENS:
            oldest = next(iter(self._prompts))
            prompt = self._prompts[oldest]
            del self._calls[prompt.session, prompt.agent]
            self._forget(oldest)

    def _forget(self, number: int | None) -> None:
        prompt = self._prompts.pop(number, None) if number is not None else None
        if prompt is not None:
            self._tokens -= len(prompt.tokens)

    def queue(self, named: Sequence[agentrt.Prefill]) -> None:
        """Queues what the policies have named."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self.wanted = False
        for one in named:
            prompt = self._prompts.get(one.like_call)
            if prompt is None or one.blocks > len(prompt.keys) or (one.like_call, one.blocks) in self._named:
                continue
            self._named.add((one.like_call, one.blocks))
            self.requests += 1
            request = Request(
                request_id=f"agentrt-prefill-{self.requests}",
                prompt_token_ids=prompt.tokens[: one.blocks * self.block_size].tolist(),
                sampling_params=SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True),
                pooling_params=None,
                priority=LAST,
                block_hasher=prompt.hasher,
            )
            if block_keys(request.block_hashes, one.blocks - 1, one.blocks)[0] != prompt.keys[one.blocks - 1]:
                # Its blocks would be others than those the earlier call had.
                continue
            self.live[request.request_id] = _Prefill(one.session, one.agent_id, one.blocks)
            try:
                self.scheduler.add_request(request)
            except BaseException:
                del self.live[request.request_id]
                raise

    def withdraw(self) -> None:
        """Makes way for a client."""
        self.wanted = False
        self._named.clear()
        if self.live:
            from vllm.v1.request import RequestStatus

            self.withdrawn += len(self.live)
            self.scheduler.finish_requests(list(self.live), RequestStatus.FINISHED_ABORTED)
            # Whatever went wrong when they ended.
            self.live.clear()

    def ended(self, request: Any, computed_blocks: int, hit_blocks: int) -> _Prefill:
        """A prefill is over; so many of its blocks are there, and so many were before."""
        self.computed_tokens += max(computed_blocks - hit_blocks, 0) * self.block_size
        prefill = self.live.pop(request.request_id)
        self.wanted = computed_blocks == prefill.blocks
        return prefill

    def clear(self) -> None:
        """What was queued is not there any more."""
        self.live.clear()
        self.wanted = False
