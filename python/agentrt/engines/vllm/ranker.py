"""Puts victims at the head of vLLM's free queue. The only code that changes anything inside vLLM.

vLLM allocates from the head of ``BlockPool.free_block_queue``. Before an allocation of ``n`` blocks the first ``n``
blocks are made to be: blocks without a hash (they cost nothing), blocks named before and not allocated yet, then new
victims, leaf before parent. What stands there already is left alone, so the work is O(n) and independent of the pool.

A victim is taken only if it is what its key says *now*: the block carries that hash, nobody uses it, it is queued.
Whatever happens in between, no block is ever lost from the queue: blocks that were taken out are put back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import zip_longest
from typing import Any

__all__ = ["Ranker", "key_of"]

ROUNDS = 4
MAX_BATCH = 64
MAX_ORPHANS = 65_536


def key_of(block_hash: bytes) -> int:
    """The key of a block hash with the 4-byte group number that vLLM appends to it."""
    return int.from_bytes(block_hash[-12:-4], "big")


class Ranker:
    """Knows where blocks are and which have been named.

    Args:
        pool: vLLM's ``BlockPool``.
        evict: Names up to n victims by key, lowest first; None to take the queue's own order.
    """

    def __init__(self, pool: Any, evict: Callable[[int], Sequence[int]] | None) -> None:
        self.pool = pool
        self.evict = evict
        # Where each key's block is, and the other way round: the key last seen on each block.
        self.known: dict[int, Any] = {}
        self._key_at: list[int | None] = [None] * len(pool.blocks)
        self.pending: dict[int, bytes] = {}
        self._orphans: deque[Any] = deque(maxlen=MAX_ORPHANS)
        # Naming a few more at once spares the next steps a call into the core.
        self.batch = min(MAX_BATCH, len(pool.blocks) // 128)
        self.ranked_blocks = 0
        self.stale_blocks = 0
        self.orphaned_blocks = 0
        self.short_rankings = 0

    def clear(self) -> None:
        """The prefix cache has been reset."""
        self.known.clear()
        self.pending.clear()
        self._orphans.clear()
        self._key_at = [None] * len(self.pool.blocks)

    def register(self, keys: Sequence[int], blocks: Sequence[Any]) -> list[int]:
        """These blocks carry these keys from now on, blocks beyond the keys none.

        Returns the keys that vLLM has evicted by itself to make room for them.
        """
        known, pending, key_at = self.known, self.pending, self._key_at
        lost: list[int] = []
        for key, block in zip_longest(keys, blocks):
            at = block.block_id
            before = key_at[at]
            if before == key:
                if key is not None:
                    known[key] = block
                pending.pop(at, None)
                continue
            if before is not None and known.get(before) is block:
                del known[before]
                lost.append(before)
            key_at[at] = key
            if key is not None:
                other = known.get(key)
                if other is not None:
                    # vLLM does not merge equal blocks: the other copy is the first to go.
                    self._orphans.append(other)
                known[key] = block
            pending.pop(at, None)
        return lost

    def prepare(self, n: int, spare: Collection[int] = ()) -> int:
        """Makes the next ``n`` allocations take unhashed blocks and victims; returns how many were moved.

        Args:
            n: Blocks about to be allocated.
            spare: Ids of blocks that are about to leave the queue because the arriving request hits them.
        """
        queue = self.pool.free_block_queue
        n = min(n, queue.num_free_blocks)
        run: list[Any] = []
        pending = self.pending
        for block in queue.iter_blocks_after(None):
            if len(run) >= n:
                return 0
            if block.block_id in spare:
                continue
            block_hash = block.block_hash
            if block_hash is not None and pending.get(block.block_id) != block_hash:
                break
            run.append(block)
        if len(run) >= n:
            return 0
        want = min(n + self.batch, queue.num_free_blocks) - len(run)
        victims = (
            self._in_queue_order(want, run, spare) if self.evict is None else self._victims(want, self.evict, spare)
        )
        if len(victims) < want:
            self.short_rankings += 1
        if victims:
            self._place(run, victims)
        for block in victims:
            pending[block.block_id] = block.block_hash
        self.ranked_blocks += len(victims)
        return len(victims)

    def _place(self, run: list[Any], victims: list[Any]) -> None:
        queue = self.pool.free_block_queue
        taken: list[Any] = []
        try:
            for block in run:
                queue.remove(block)
                taken.append(block)
            for block in victims:
                queue.remove(block)
                taken.append(block)
        finally:
            queue.prepend_n(taken)

    def _free(self, block: Any) -> bool:
        return (
            block.ref_cnt == 0
            and not block.is_null
            and block.prev_free_block is not None
            and block.next_free_block is not None
        )

    def _in_queue_order(self, want: int, run: list[Any], spare: Collection[int]) -> list[Any]:
        victims: list[Any] = []
        ready = {block.block_id for block in run}
        for block in self.pool.free_block_queue.iter_blocks_after(None):
            if len(victims) >= want:
                break
            if block.block_id not in ready and block.block_id not in spare:
                victims.append(block)
        return victims

    def _victims(self, want: int, evict: Callable[[int], Sequence[int]], spare: Collection[int]) -> list[Any]:
        victims: list[Any] = []
        known, pending = self.known, self.pending
        seen: set[int] = set(spare)
        from_bytes = int.from_bytes
        for _ in range(min(len(self._orphans), want)):
            block = self._orphans.popleft()
            block_hash = block.block_hash
            if block_hash is None or known.get(key_of(block_hash)) is block:
                continue
            if not self._free(block):
                # Still in use; it will be free some day.
                self._orphans.append(block)
            elif (
                pending.get(block.block_id) != block_hash and block.block_id not in spare and block.block_id not in seen
            ):
                seen.add(block.block_id)
                victims.append(block)
                self.orphaned_blocks += 1
        for _ in range(ROUNDS):
            short = want - len(victims)
            if short <= 0:
                break
            keys = evict(short)
            if not len(keys):
                break
            for key in keys:
                block = known.pop(key, None)
                block_hash = None if block is None else block.block_hash
                if block_hash is None or from_bytes(block_hash[-12:-4], "big") != key:
                    # vLLM has reused the block meanwhile.
                    self.stale_blocks += 1
                elif block.ref_cnt or block.prev_free_block is None or block.is_null:
                    # Named before vLLM has released it: next time.
                    self._orphans.append(block)
                elif block.block_id not in seen:
                    seen.add(block.block_id)
                    victims.append(block)
        return victims
