//! `min`: the offline optimum (Belady, "A study of replacement algorithms for a virtual-storage computer", 1966).
//!
//! Evicts the block whose next use lies farthest in the future, the deepest on ties. Knows the schedule, hence also
//! when sessions end. Only prompts of calls that use the cache count as uses; storing an answer is none, and a block
//! that an answer will store again before its next use is as good as never used. Insertion is forced, as in an engine:
//! a call's blocks enter the pool whether or not they will be used again.
//!
//! Exact where one call runs at a time (`--order file`). With calls in flight the blocks in use cannot be victims, and
//! choosing the farthest next use among the rest is a near-optimum. It has no workload on which it does badly; it is
//! only not a policy that could be built.

use std::cmp::Reverse;

use super::leaves::RankedLeaves;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::schedule::{EventKind, Schedule};
use crate::trace::{Span, Trace};

/// Never used again.
const NEVER: u32 = u32::MAX;

/// Farthest next use first.
pub struct Min {
    /// Event at which each block is used next, seen from now.
    next_use: Vec<u32>,
    /// The same seen from each event, in the order in which events touch blocks, last event first.
    future: Vec<u32>,
    leaves: RankedLeaves<(Reverse<u32>, Reverse<u32>)>,
}

impl Min {
    /// The optimum for `schedule`.
    pub fn new(trace: &Trace, schedule: &Schedule) -> Self {
        let touched = |span: Span| trace.runs_of(span).iter().rev().flat_map(|r| (r.first..r.first + r.len).rev());
        let mut next_use = vec![NEVER; trace.n_blocks as usize];
        let mut future = Vec::new();
        for (position, event) in schedule.events.iter().enumerate().rev() {
            let call = &trace.calls[event.call as usize];
            let (span, use_at) = match event.kind {
                EventKind::Queued | EventKind::Bypass => continue,
                EventKind::Start => (call.prompt, position as u32),
                EventKind::Finish => (call.output, NEVER),
            };
            for block in touched(span) {
                future.push(next_use[block as usize]);
                next_use[block as usize] = use_at;
            }
        }
        Self { next_use, future, leaves: RankedLeaves::new() }
    }

    fn advance(&mut self, blocks: &[u32]) {
        for &block in blocks {
            self.next_use[block as usize] = self.future.pop().expect("one entry per block of each event");
        }
    }
}

impl CachePolicy for Min {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        self.advance(call.prompt);
    }

    fn evict(&mut self, n: usize, _now_us: u64, pool: &mut Pool) {
        self.leaves.evict(n, pool, |pool, b| (Reverse(self.next_use[b as usize]), Reverse(pool.depth(b))));
    }

    fn inserted(&mut self, _call: &CallView<'_>, _blocks: &[u32], _pool: &Pool) {}

    fn call_finish(&mut self, _call: &CallView<'_>, output: &[u32], released: &[u32], pool: &Pool) {
        self.advance(output);
        self.leaves.offer(released, pool, |pool, b| (Reverse(self.next_use[b as usize]), Reverse(pool.depth(b))));
    }
}
