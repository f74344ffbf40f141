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

/// The evictable blocks as a set, for ranks that change while nothing happens to the block.
///
/// Blocks that stopped being evictable are dropped when they are met.
pub(super) struct LeafSet {
    blocks: Vec<u32>,
    listed: Vec<bool>,
}

impl LeafSet {
    pub(super) fn new(n_blocks: usize) -> Self {
        Self { blocks: Vec::new(), listed: vec![false; n_blocks] }
    }

    /// Takes in those of `released` that can go now.
    pub(super) fn offer(&mut self, released: &[u32], pool: &Pool) {
        for &block in released {
            self.add(block, pool);
        }
    }

    fn add(&mut self, block: u32, pool: &Pool) {
        if pool.is_evictable(block) && !std::mem::replace(&mut self.listed[block as usize], true) {
            self.blocks.push(block);
        }
    }

    /// The blocks that can go now.
    pub(super) fn candidates<'a>(&'a self, pool: &'a Pool) -> impl Iterator<Item = u32> + 'a {
        self.blocks.iter().copied().filter(|&b| pool.is_evictable(b))
    }

    /// Evicts the `n` lowest-ranked blocks, leaf by leaf: one pass over the set, then a heap.
    pub(super) fn evict_lowest<K: Ord>(&mut self, n: usize, pool: &mut Pool, rank: impl Fn(&Pool, u32) -> K) {
        let listed = &mut self.listed;
        self.blocks.retain(|&b| {
            listed[b as usize] = pool.is_evictable(b);
            listed[b as usize]
        });
        let mut heap: BinaryHeap<_> = self.blocks.iter().map(|&b| Reverse((rank(pool, b), b))).collect();
        for _ in 0..n {
            let Some(Reverse((_, block))) = heap.pop() else { return };
            let evicted = pool.evict(block);
            debug_assert!(evicted, "the heap holds evictable blocks alone");
            let parent = pool.parent(block);
            if parent != NO_BLOCK && pool.is_evictable(parent) {
                self.add(parent, pool);
                heap.push(Reverse((rank(pool, parent), parent)));
            }
        }
    }

    /// Evicts the lowest-ranked of `samples` blocks that `pick` (a uniform index below its argument) chooses; `None`
    /// where nothing can go.
    pub(super) fn evict_sampled<K: PartialOrd>(
        &mut self,
        samples: usize,
        pool: &mut Pool,
        mut pick: impl FnMut(usize) -> usize,
        rank: impl Fn(u32) -> K,
    ) -> Option<u32> {
        let mut lowest: Option<(K, u32)> = None;
        let mut seen = 0;
        while seen < samples && !self.blocks.is_empty() {
            // A small set is inspected whole, from the end, so that dropping a block moves none not yet seen.
            let at = if self.blocks.len() <= samples {
                match self.blocks.len().checked_sub(seen + 1) {
                    Some(at) => at,
                    None => break,
                }
            } else {
                pick(self.blocks.len())
            };
            let block = self.blocks[at];
            if !pool.is_evictable(block) {
                self.listed[block as usize] = false;
                self.blocks.swap_remove(at);
                continue;
            }
            seen += 1;
            let block_rank = rank(block);
            if lowest.as_ref().is_none_or(|(r, _)| block_rank < *r) {
                lowest = Some((block_rank, block));
            }
        }
        let (_, victim) = lowest?;
        pool.evict(victim);
        let parent = pool.parent(victim);
        if parent != NO_BLOCK {
            self.add(parent, pool);
        }
        Some(victim)
    }
}
