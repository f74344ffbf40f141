//! `sieve`: Zhang et al., "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction Algorithm for Web Caches",
//! NSDI 2024; as in libcachesim.
//!
//! One FIFO queue and a hand that walks from the oldest block to the newest: a block used since the hand last passed
//! is spared once, the first other block is evicted.
//!
//! Deviation from the flat original: a block that the hand would evict but that cannot go - in use, or with resident
//! children - is set aside, and comes back under the hand as soon as it can go. Nothing is inspected twice meanwhile.
//!
//! Does badly where recency matters more than a single reuse: blocks of ended sessions that were used once stay while
//! the live sessions' new ones are swept (`whowhen_magentic` at 25 %: 40 points below `lru`).

use super::queue::Queue;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::{Trace, NO_BLOCK};

/// A FIFO queue, a visited bit and a hand.
pub struct Sieve {
    queue: Queue,
    /// The block to inspect next; the oldest where `None`.
    hand: Option<u32>,
    visited: Vec<bool>,
    /// Would have been evicted if it could go.
    aside: Vec<bool>,
}

impl Sieve {
    /// A policy for the blocks of `trace`.
    pub fn new(trace: &Trace) -> Self {
        let n = trace.n_blocks as usize;
        Self { queue: Queue::new(n), hand: None, visited: vec![false; n], aside: vec![false; n] }
    }

    fn reconsider(&mut self, block: u32, pool: &Pool) {
        if block == NO_BLOCK || !self.aside[block as usize] || !pool.is_evictable(block) {
            return;
        }
        self.aside[block as usize] = false;
        if let Some(hand) = self.hand {
            self.queue.insert_before(hand, block);
            self.hand = Some(block);
        } else {
            self.queue.push_front(block);
        }
    }
}

impl CachePolicy for Sieve {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        for &block in &call.prompt[..call.hit] {
            self.visited[block as usize] = true;
        }
    }

    fn evict(&mut self, n: usize, _now_us: u64, pool: &mut Pool) {
        let mut left = n;
        while left > 0 {
            let Some(block) = self.hand.or_else(|| self.queue.front()) else { return };
            self.hand = self.queue.after(block);
            if std::mem::take(&mut self.visited[block as usize]) {
                continue;
            }
            self.queue.remove(block);
            if pool.evict(block) {
                left -= 1;
                self.reconsider(pool.parent(block), pool);
            } else {
                self.aside[block as usize] = true;
            }
        }
    }

    fn inserted(&mut self, _call: &CallView<'_>, blocks: &[u32], _pool: &Pool) {
        for &block in blocks.iter().rev() {
            self.visited[block as usize] = false;
            self.queue.push_back(block);
        }
    }

    fn call_finish(&mut self, _call: &CallView<'_>, _output: &[u32], released: &[u32], pool: &Pool) {
        for &block in released {
            self.reconsider(block, pool);
        }
    }
}
