//! `min`: the offline optimum (Belady, "A study of replacement algorithms for a virtual-storage computer", 1966).
//!
//! Evicts the block whose next use lies farthest in the future, the deepest on ties. Knows the schedule, hence also
//! when sessions end. Only prompts of calls that use the cache count as uses; storing an answer is none, and a block
//! that an answer will store again before its next use is as good as never used. Insertion is forced, as in an engine:
//! a call's blocks enter the pool whether or not they will be used again.
//!
//! With a host tier, that goes by the same order, copies of what the pool holds first. `min-prefetch` also brings back the
//! blocks of the next eight calls, in their order, as far as the pool has room beside blocks in use and the link allows: what
//! perfect foresight is worth. Demand loading under `min` and `min-prefetch` bound what any policy can reach.
//!
//! Exact where one call runs at a time (`--order file`). With calls in flight the blocks in use cannot be victims, and
//! choosing the farthest next use among the rest is a near-optimum. It has no workload on which it does badly; it is
//! only not a policy that could be built.

use std::cmp::Reverse;

use super::leaves::RankedLeaves;
use crate::host::HostTier;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::schedule::{EventKind, Schedule};
use crate::trace::{Run, Span, Trace};

/// Never used again.
const NEVER: u32 = u32::MAX;
/// Calls for which blocks are brought back.
const AHEAD: usize = 8;

/// Farthest next use first.
pub struct Min {
    /// Event at which each block is used next, seen from now.
    next_use: Vec<u32>,
    /// The same seen from each event, in the order in which events touch blocks, last event first.
    future: Vec<u32>,
    leaves: RankedLeaves<(Reverse<u32>, Reverse<u32>)>,
    /// Prompts of the calls that use the cache, in their order; empty where nothing is brought back.
    prompts: Vec<Vec<Run>>,
    started: usize,
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
                EventKind::Queued | EventKind::Grow | EventKind::Bypass => continue,
                EventKind::Start => (call.prompt, position as u32),
                EventKind::Finish => (call.output, NEVER),
            };
            for block in touched(span) {
                future.push(next_use[block as usize]);
                next_use[block as usize] = use_at;
            }
        }
        Self { next_use, future, leaves: RankedLeaves::new(), prompts: Vec::new(), started: 0 }
    }

    /// The optimum that also brings blocks back from the host tier before they are used.
    pub fn with_prefetch(trace: &Trace, schedule: &Schedule) -> Self {
        let starts = schedule.events.iter().filter(|event| event.kind == EventKind::Start);
        let prompts = starts.map(|event| trace.runs_of(trace.calls[event.call as usize].prompt).to_vec()).collect();
        Self { prompts, ..Self::new(trace, schedule) }
    }

    fn rank(&self, pool: &Pool, block: u32) -> (Reverse<u32>, Reverse<u32>) {
        (Reverse(self.next_use[block as usize]), Reverse(pool.depth(block)))
    }

    fn advance(&mut self, blocks: &[u32]) {
        for &block in blocks {
            self.next_use[block as usize] = self.future.pop().expect("one entry per block of each event");
        }
    }
}

impl CachePolicy for Min {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        self.started += 1;
        self.advance(call.prompt);
    }

    fn host_room(&mut self, entering: &[u32], _now_us: u64, pool: &Pool, host: &mut HostTier) -> Vec<u32> {
        let mut need = entering.len() - host.free();
        need -= host.drop_doubles(pool, need);
        if need == 0 {
            return Vec::new();
        }
        let mut all: Vec<_> = host.copies().chain(entering.iter().copied()).map(|b| (self.rank(pool, b), b)).collect();
        if need < all.len() {
            all.select_nth_unstable(need - 1);
        }
        all.iter().take(need).map(|&(_, block)| block).filter(|&block| !host.drop_copy(block)).collect()
    }

    fn prefetch(&mut self, _now_us: u64, _budget_blocks: usize, pool: &Pool, _host: &HostTier) -> Vec<Vec<u32>> {
        let mut room = pool.capacity() - pool.pinned();
        let mut chains = Vec::new();
        for runs in self.prompts.iter().skip(self.started).take(AHEAD) {
            let mut chain: Vec<u32> = runs.iter().flat_map(|run| run.first..run.first + run.len).collect();
            let in_use = chain.iter().take_while(|&&b| pool.is_pinned(b)).count();
            chain.truncate(in_use + room);
            room -= chain.len() - in_use;
            if chain.iter().any(|&b| !pool.is_resident(b)) {
                chains.push(chain);
            }
        }
        chains
    }

    fn prefetched(&mut self, _chain: usize, blocks: &[u32], _now_us: u64, pool: &Pool) {
        let next_use = &self.next_use;
        self.leaves.offer(blocks, pool, |pool, b| (Reverse(next_use[b as usize]), Reverse(pool.depth(b))));
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
