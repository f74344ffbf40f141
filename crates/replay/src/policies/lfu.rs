//! `lfu`: least frequently used, the oldest access on ties (in-cache LFU: an evicted block forgets its count), as in
//! libcachesim and cachetools.
//!
//! Deviation from the flat original: the lowest-ranked block *that can go* is taken - not in use, no resident child.
//! Within one chain the counts already fall with depth.
//!
//! Does badly where popularity moves on: the prefix of a finished session that was called often outlives every block
//! of the sessions that run now (`whowhen_magentic` at 25 %: 46 points below `lru`).

use super::leaves::RankedLeaves;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::Trace;

/// Uses since insertion, and when the last one was.
type Rank = (u32, u64);

/// Least frequently used.
pub struct Lfu {
    rank: Vec<Rank>,
    accesses: u64,
    leaves: RankedLeaves<Rank>,
}

impl Lfu {
    /// A policy for the blocks of `trace`.
    pub fn new(trace: &Trace) -> Self {
        Self { rank: vec![(0, 0); trace.n_blocks as usize], accesses: 0, leaves: RankedLeaves::new() }
    }
}

impl CachePolicy for Lfu {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        for &block in call.prompt[..call.hit].iter().rev() {
            self.accesses += 1;
            let (uses, last) = &mut self.rank[block as usize];
            *uses += 1;
            *last = self.accesses;
        }
    }

    fn evict(&mut self, n: usize, _now_us: u64, pool: &mut Pool) {
        self.leaves.evict(n, pool, |_, b| self.rank[b as usize]);
    }

    fn inserted(&mut self, _call: &CallView<'_>, blocks: &[u32], _pool: &Pool) {
        for &block in blocks.iter().rev() {
            self.accesses += 1;
            self.rank[block as usize] = (1, self.accesses);
        }
    }

    fn call_finish(&mut self, _call: &CallView<'_>, _output: &[u32], released: &[u32], pool: &Pool) {
        self.leaves.offer(released, pool, |_, b| self.rank[b as usize]);
    }
}
