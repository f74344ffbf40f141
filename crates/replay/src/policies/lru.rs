//! `lru`: the order of vLLM's block pool (Kwon et al., "Efficient Memory Management for Large Language Model Serving
//! with PagedAttention", SOSP 2023; `FreeKVCacheBlockQueue` of vLLM 0.30-0.33).
//!
//! A queue of the resident blocks that no running call uses. A call that finishes appends its blocks deepest first, a
//! hit takes its blocks out, the head is evicted. Because a call that uses a block uses its ancestors too, an ancestor
//! is never ahead of its descendants, and no search for a leaf is needed.
//!
//! Does badly where the live sessions' blocks exceed the pool and sessions take turns: every block is evicted shortly
//! before its session comes back (`whowhen_magentic` at 10 % of the live blocks: 27 points below the optimum).

use super::queue::Queue;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::Trace;

/// vLLM's free queue.
pub struct Lru {
    pub(super) free: Queue,
}

impl Lru {
    /// A policy for the blocks of `trace`.
    pub fn new(trace: &Trace) -> Self {
        Self { free: Queue::new(trace.n_blocks as usize) }
    }
}

impl CachePolicy for Lru {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        for &block in &call.prompt[..call.hit] {
            self.free.remove(block);
        }
    }

    fn evict(&mut self, n: usize, _now_us: u64, pool: &mut Pool) {
        let mut left = n;
        while left > 0 {
            let Some(block) = self.free.pop_front() else { return };
            // Refused only where the answer that is being stored extends over blocks that were free: they are in
            // use until its call finishes, which appends them again.
            left -= usize::from(pool.evict(block));
        }
    }

    fn inserted(&mut self, _call: &CallView<'_>, _blocks: &[u32], _pool: &Pool) {}

    fn call_finish(&mut self, _call: &CallView<'_>, _output: &[u32], released: &[u32], _pool: &Pool) {
        for &block in released.iter().rev() {
            self.free.remove(block);
            self.free.push_back(block);
        }
    }
}
