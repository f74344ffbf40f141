//! `cachesage`: the policy of Zhang, Kim and Hu, "A Policy-Driven Runtime Layer for Agentic LLM Serving",
//! arXiv 2605.27744 (first version), as published.
//!
//! One first-order chain over all dispatched calls, whichever session they belong to; a change of agent counts, a
//! repetition does not. Edges of W(b | a) = n(a, b) / n(a) >= 0.01 form a graph; with hops counted from the agent
//! dispatched last, p_surv(a) = 1 - min(hops, 8) / 8 and score(b) = 4 p_surv(a_b) + rho_b, where a_b is the agent that
//! used the block last and rho_b the time of that use in dispatched calls, scaled to 0..1 over the candidates. The
//! lowest score goes first.
//!
//! Left out: the between-step warm-up calls (reported as worth at most one point alone) and the length of the sliding
//! window, which is not published; counts are kept. Agents are given, not inferred from prefix hashes.
//!
//! Does badly where sessions interleave: the chain learns the interleaving, at threshold 0.01 the graph becomes
//! complete, and the score is either constant (then this is LRU) or protects the dead histories of a frequent agent
//! (`whowhen_ag2` at 25 %: 0.8 points below `lru`).

use std::cmp::Reverse;

use super::agents::{LastUses, Transitions};
use super::leaves::LeafSet;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::Trace;

const THRESHOLD: f64 = 0.01;
const MAX_HOPS: u32 = 8;
const PREDICTION_WEIGHT: f64 = 4.0;

/// Survival by hops on one global chain, plus recency.
pub struct CacheSage {
    uses: LastUses,
    chain: Transitions,
    current: Option<u16>,
    leaves: LeafSet,
}

impl CacheSage {
    /// A policy for the blocks of `trace`.
    pub fn new(trace: &Trace) -> Self {
        Self {
            uses: LastUses::new(trace),
            chain: Transitions::default(),
            current: None,
            leaves: LeafSet::new(trace.n_blocks as usize),
        }
    }
}

impl CachePolicy for CacheSage {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        self.uses.start(call);
        self.chain.observe(self.current.unwrap_or(call.agent), call.agent);
        self.current = Some(call.agent);
    }

    fn evict(&mut self, n: usize, _now_us: u64, pool: &mut Pool) {
        let Some(current) = self.current else { return };
        let hops = self.chain.hops(current, 0.0, THRESHOLD);
        let now = self.uses.dispatch();
        let oldest = self.leaves.candidates(pool).map(|b| self.uses.of(b).dispatch).min().unwrap_or(now);
        let span = f64::from(now - oldest).max(1.0);
        self.leaves.evict_lowest(n, pool, |pool, b| {
            let last = self.uses.of(b);
            // The parent of an answer that went may be older than every candidate was.
            let recency = f64::from(last.dispatch.saturating_sub(oldest)) / span;
            let score = PREDICTION_WEIGHT * hops.survival(last.agent, MAX_HOPS) + recency;
            // Scores are not negative, so their bits sort like their values.
            (score.to_bits(), last.dispatch, Reverse(pool.depth(b)))
        });
    }

    fn inserted(&mut self, _call: &CallView<'_>, _blocks: &[u32], _pool: &Pool) {}

    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], released: &[u32], pool: &Pool) {
        self.uses.mark(call, output);
        self.leaves.offer(released, pool);
    }
}
