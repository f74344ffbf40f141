"""Policies for the engine benchmark, behind the adapter's own seam (``policy`` = ``benches.e2e.cores:NAME``).

``CacheScout``: Zhang et al., "Learning Agent Execution for KV-Cache Management in Agentic Serving", arXiv 2608.14624,
as published; constants, order of equals and omissions are those of ``crates/replay/src/policies/cachescout.rs``, which
``tests/engines/vllm/test_cores.py`` compares it with. ``Optimal``: evicts what a recorded order of calls needs last.

Both keep blocks in a tree of resident prefixes and name leaves only. A call's prompt is pinned from its arrival to its
end, so nothing that a waiting call would hit is named. Costs are O(leaves) and O(log blocks) a victim.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Block:
    """A block of a prefix; ``resident`` says whether the engine holds it."""

    __slots__ = ("agent", "children", "depth", "dispatch", "key", "parent", "pins", "resident")

    def __init__(self, key: int, parent: Block | None) -> None:
        self.key = key
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children = 0
        self.pins = 0
        self.resident = False
        # The last use.
        self.agent = 0
        self.dispatch = 0

    @property
    def evictable(self) -> bool:
        """Resident, not in use, and no resident block needs it."""
        return self.resident and not self.pins and not self.children


class Tree:
    """Which blocks are resident and which are in use; subclasses say what goes first."""

    def __init__(self, pool_blocks: int, workload: str) -> None:
        del pool_blocks, workload
        self.blocks: dict[int, Block] = {}
        self.calls: dict[int, list[Block]] = {}
        self.agents: dict[int, int] = {}

    def call_started(self, session: int, agent: int, call: int, now_us: int, keys: NDArray[np.uint64]) -> int:
        """A call starts; its resident prefix is hit."""
        del session, now_us
        path: list[Block] = []
        parent: Block | None = None
        hits = 0
        for key in keys.tolist():
            block = self.blocks.get(key)
            if block is None:
                block = self.blocks[key] = Block(key, parent)
            block.pins += 1
            hits += block.resident and hits == len(path)
            path.append(block)
            parent = block
        self.calls[call] = path
        self.agents[call] = agent
        self.used(path, agent)
        return hits

    def stored(self, call: int, now_us: int, keys: NDArray[np.uint64]) -> None:
        """The prompt's blocks are resident."""
        del now_us, keys
        for block in self.calls.get(call, ()):
            self._enter(block)

    def call_ended(self, session: int, call: int, now_us: int, keys: NDArray[np.uint64]) -> None:
        """A call ends: its answer's blocks are resident, nothing of it is in use."""
        del session, now_us
        path = self.calls.pop(call, [])
        agent = self.agents.pop(call, 0)
        parent = path[-1] if path else None
        answer: list[Block] = []
        for key in keys.tolist():
            block = self.blocks.get(key)
            if block is None:
                block = self.blocks[key] = Block(key, parent)
            answer.append(block)
            self._enter(block)
            parent = block
        self.answered(answer, agent)
        for block in path:
            block.pins -= 1
        self.released([*path, *answer])
        for block in reversed(path):
            self._forget(block)

    def _enter(self, block: Block) -> None:
        if not block.resident:
            block.resident = True
            if block.parent is not None:
                block.parent.children += 1

    def _leave(self, block: Block) -> None:
        if block.resident:
            block.resident = False
            if block.parent is not None:
                block.parent.children -= 1

    def _forget(self, block: Block) -> None:
        if not (block.resident or block.pins or block.children) and self.blocks.get(block.key) is block:
            del self.blocks[block.key]

    def session_ended(self, session: int, now_us: int) -> None:
        """Nobody here listens."""

    def removed(self, now_us: int, keys: NDArray[np.uint64]) -> None:
        """The engine dropped blocks by itself."""
        del now_us
        for key in keys.tolist():
            block = self.blocks.get(key)
            if block is not None:
                self._leave(block)
                if block.parent is not None:
                    self.released([block.parent])
                self._forget(block)

    def reset(self, now_us: int) -> None:
        """The engine dropped all blocks."""
        del now_us
        for block in self.blocks.values():
            block.resident = False
            block.children = 0

    def evict(self, n: int, now_us: int) -> Sequence[int]:
        """Names victims, and counts them as gone."""
        del now_us
        return [block.key for block in self.victims(n)]

    @property
    def source(self) -> Callable[[int, int], Sequence[int]]:
        """Who names victims, where the adapter asks for that."""
        return self.evict

    def gone(self, block: Block) -> Block | None:
        """A block was named; returns its parent where that can go next."""
        self._leave(block)
        self._forget(block)
        parent = block.parent
        return parent if parent is not None and parent.evictable else None

    def used(self, path: list[Block], agent: int) -> None:
        """A call of ``agent`` uses these blocks."""
        raise NotImplementedError

    def answered(self, blocks: list[Block], agent: int) -> None:
        """An answer of ``agent`` was stored in these blocks."""
        raise NotImplementedError

    def released(self, blocks: Iterable[Block]) -> None:
        """These blocks may have become evictable."""
        raise NotImplementedError

    def victims(self, n: int) -> list[Block]:
        """The next blocks to go; calls :meth:`gone` for each."""
        raise NotImplementedError


EPSILON, THRESHOLD, MAX_HOPS, DECAY_PER_DISPATCH, DELTA = 0.01, 0.1, 6, 0.005, 0.01


class CacheScout(Tree):
    """Survival by hops on the learned agent graph, times exponential recency."""

    def __init__(self, pool_blocks: int, workload: str) -> None:
        super().__init__(pool_blocks, workload)
        self.rows: dict[int, dict[int, int]] = {}
        self.current: int | None = None
        self.dispatch = 0
        self.leaves: dict[Block, None] = {}

    def used(self, path: list[Block], agent: int) -> None:
        """A call of ``agent`` is dispatched."""
        self.dispatch += 1
        before, self.current = self.current, agent
        self.rows.setdefault(agent, {})
        if before is not None and before != agent:
            row = self.rows.setdefault(before, {})
            row[agent] = row.get(agent, 0) + 1
        self.answered(path, agent)

    def answered(self, blocks: list[Block], agent: int) -> None:
        """Marks the last use."""
        for block in blocks:
            block.agent = agent
            block.dispatch = self.dispatch

    def released(self, blocks: Iterable[Block]) -> None:
        """Takes leaves in."""
        for block in blocks:
            if block.evictable:
                self.leaves[block] = None

    def hops(self) -> dict[int, int]:
        """Steps from the agent dispatched last along likely edges, as far as ``MAX_HOPS``."""
        assert self.current is not None
        hops = {self.current: 0}
        todo = deque([self.current])
        while todo:
            agent = todo.popleft()
            row = self.rows[agent]
            total = sum(row.values()) + EPSILON * len(self.rows)
            likely = self.rows if EPSILON / total >= THRESHOLD else row
            for other in likely:
                if (row.get(other, 0) + EPSILON) / total >= THRESHOLD and other not in hops:
                    hops[other] = hops[agent] + 1
                    todo.append(other)
        return hops

    def victims(self, n: int) -> list[Block]:
        """The lowest leaves; a parent joins as soon as its last child has gone."""
        if self.current is None:
            return []
        hops = self.hops()
        scores: dict[tuple[int, int], float] = {}

        def rank(block: Block) -> tuple[float, int, int, int]:
            # Blocks last used by the same call score the same.
            use = block.agent, block.dispatch
            score = scores.get(use)
            if score is None:
                p = 1.0 - min(hops.get(block.agent, MAX_HOPS), MAX_HOPS) / MAX_HOPS
                age = self.dispatch - block.dispatch
                score = scores[use] = (p + DELTA) * (math.exp(-DECAY_PER_DISPATCH * age) + DELTA)
            return score, block.dispatch, -block.depth, block.key

        self.leaves = {block: None for block in self.leaves if block.evictable}
        heap = [(rank(block), block) for block in self.leaves]
        heapq.heapify(heap)
        chosen: list[Block] = []
        while heap and len(chosen) < n:
            _, block = heapq.heappop(heap)
            chosen.append(block)
            del self.leaves[block]
            parent = self.gone(block)
            if parent is not None:
                self.leaves[parent] = None
                heapq.heappush(heap, (rank(parent), parent))
        return chosen


class Optimal(Tree):
    """Evicts the block whose next use in a recorded order of calls is farthest away.

    ``future`` holds each call's keys in the recorded order. The calls of a run may overtake each other: what counts is
    the next use by a call that has not arrived yet.
    """

    #: For cores that the adapter makes.
    default_future: Sequence[Sequence[int]] = ()

    def __init__(self, pool_blocks: int, workload: str, future: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(pool_blocks, workload)
        future = self.default_future if future is None else future
        self.uses: dict[int, list[int]] = {}
        self.waiting: dict[tuple[int, int], deque[int]] = {}
        self.arrived = bytearray(len(future))
        for position in range(len(future) - 1, -1, -1):
            keys = future[position]
            for key in keys:
                # The soonest use is at the end.
                self.uses.setdefault(key, []).append(position)
            self.waiting.setdefault(self._shape(keys), deque()).appendleft(position)
        self.heap: list[tuple[int, int, int, Block]] = []
        self._entries = itertools.count()

    @staticmethod
    def _shape(keys: Sequence[int]) -> tuple[int, int]:
        # A key names the whole prefix.
        return len(keys), keys[-1] if keys else 0

    def used(self, path: list[Block], agent: int) -> None:
        """A call has arrived: it is not in the future any more."""
        del agent
        positions = self.waiting.get(self._shape([block.key for block in path]))
        if positions:
            self.arrived[positions.popleft()] = True

    def answered(self, blocks: list[Block], agent: int) -> None:
        """Answers are not fed back: nobody will ask for them."""

    def next_use(self, block: Block) -> int:
        """Position of the next call that uses the block."""
        uses = self.uses.get(block.key)
        while uses and self.arrived[uses[-1]]:
            uses.pop()
        return uses[-1] if uses else len(self.arrived)

    def _push(self, block: Block) -> None:
        heapq.heappush(self.heap, (-self.next_use(block), -block.depth, next(self._entries), block))

    def released(self, blocks: Iterable[Block]) -> None:
        """Takes leaves in."""
        for block in blocks:
            if block.evictable:
                self._push(block)

    def victims(self, n: int) -> list[Block]:
        """The farthest leaves. An entry is stale once its block's next use is another; release offers it anew."""
        chosen: list[Block] = []
        while self.heap and len(chosen) < n:
            before, _, _, block = heapq.heappop(self.heap)
            if not block.evictable:
                continue
            if before != -self.next_use(block):
                self._push(block)
                continue
            chosen.append(block)
            parent = self.gone(block)
            if parent is not None:
                self._push(parent)
        return chosen
