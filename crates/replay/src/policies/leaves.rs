//! Evictable blocks by rank.
//!
//! A block can go only when no call uses it and no child is resident, so of a prompt of a thousand blocks one - the
//! last - is a candidate. [`RankedLeaves`] holds the candidates alone: a finished call offers its last block, an
//! evicted block offers its parent. Blocks in the middle of a chain and blocks in use cost nothing until then.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::pool::Pool;
use crate::trace::NO_BLOCK;

/// A lazy min-heap of evictable blocks whose rank changes only when the block is used.
///
/// An entry is stale, and skipped, once the block's rank differs or the block is not evictable; whatever makes the
/// block evictable again offers it anew. `rank` must therefore be the block's present rank in every call.
pub(super) struct RankedLeaves<K: Ord> {
    heap: BinaryHeap<Reverse<(K, u32)>>,
}

impl<K: Ord> RankedLeaves<K> {
    pub(super) fn new() -> Self {
        Self { heap: BinaryHeap::new() }
    }

    /// Takes in those of `released` that can go now.
    pub(super) fn offer(&mut self, released: &[u32], pool: &Pool, rank: impl Fn(&Pool, u32) -> K) {
        let leaves = released.iter().copied().filter(|&b| pool.is_evictable(b));
        self.heap.extend(leaves.map(|b| Reverse((rank(pool, b), b))));
    }

    /// Evicts the `n` lowest-ranked blocks, leaf by leaf.
    pub(super) fn evict(&mut self, n: usize, pool: &mut Pool, rank: impl Fn(&Pool, u32) -> K) {
        let mut left = n;
        while left > 0 {
            let Some(Reverse((entry_rank, block))) = self.heap.pop() else { return };
            if entry_rank != rank(pool, block) || !pool.evict(block) {
                continue;
            }
            left -= 1;
            let parent = pool.parent(block);
            if parent != NO_BLOCK && pool.is_evictable(parent) {
                self.heap.push(Reverse((rank(pool, parent), parent)));
            }
        }
    }
}
