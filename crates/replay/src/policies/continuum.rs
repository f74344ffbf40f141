//! `continuum`: the retention part of "Continuum: Efficient and Robust Multi-Turn LLM Agent Scheduling with KV Cache
//! Time-to-Live", arXiv 2511.02230.
//!
//! When a call finishes, its session's blocks are kept for a time to live chosen from the gaps seen before after the
//! same tool (after the same agent where no tool follows): tau = argmax P(gap <= tau) miss_cost - memory tau. The
//! miss cost is the modelled prefill of the call's prompt, the memory cost the share of the pool that the session
//! holds. Blocks whose time has run out go first, then the others, each in LRU order: a time to live can be broken
//! when nothing else is left, so that it cannot block the engine.
//!
//! Left out: the first-come-first-served order of programs and the out-of-order cost, which are scheduling; the order
//! of calls is fixed in this replay. Gaps of the last 256 returns are kept for each tool and agent; fewer than 8 fall
//! back to those of all tools, none to no retention.
//!
//! Does badly where gaps are alike for sessions that return and sessions that have ended, or longer than what memory
//! affords: then no time to live pays and it is LRU (`whowhen_magentic`, `mooncake_conversation`).

use std::cmp::Reverse;
use std::collections::VecDeque;

use super::agents::LastUses;
use super::leaves::LeafSet;
use crate::latency::LatencyModel;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::schedule::Schedule;
use crate::trace::Trace;

const KEPT_GAPS: usize = 256;
const FEWEST_GAPS: usize = 8;

/// Time to live by tool or agent.
pub struct Continuum {
    uses: LastUses,
    /// Gaps in seconds after each agent, then after each tool, then after any.
    gaps: Vec<VecDeque<f64>>,
    n_agents: usize,
    /// When each session's call last finished and which entry of `gaps` its return belongs to.
    waiting: Vec<Option<(u64, usize)>>,
    expires_us: Vec<u64>,
    model: LatencyModel,
    leaves: LeafSet,
}

impl Continuum {
    /// A policy for the blocks of `trace` with the latency model of `schedule`.
    pub fn new(trace: &Trace, schedule: &Schedule) -> Self {
        Self {
            uses: LastUses::new(trace),
            gaps: vec![VecDeque::new(); trace.agents.len() + trace.tools.len() + 1],
            n_agents: trace.agents.len(),
            waiting: vec![None; trace.sessions.len()],
            expires_us: vec![0; trace.sessions.len()],
            model: schedule.options.model,
            leaves: LeafSet::new(trace.n_blocks as usize),
        }
    }

    fn record_gap(&mut self, kind: usize, gap_s: f64) {
        let any = self.gaps.len() - 1;
        for kind in [kind, any] {
            let gaps = &mut self.gaps[kind];
            if gaps.len() == KEPT_GAPS {
                gaps.pop_front();
            }
            gaps.push_back(gap_s);
        }
    }

    /// The best time to live in seconds.
    fn time_to_live_s(&self, kind: usize, miss_cost_s: f64, memory_share: f64) -> f64 {
        let own = &self.gaps[kind];
        let gaps = if own.len() >= FEWEST_GAPS { own } else { &self.gaps[self.gaps.len() - 1] };
        let mut sorted: Vec<f64> = gaps.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let (mut best, mut best_value) = (0.0, 0.0);
        for (returned, &gap_s) in (1..).zip(&sorted) {
            let value = f64::from(returned) / sorted.len() as f64 * miss_cost_s - memory_share * gap_s;
            if value > best_value {
                (best, best_value) = (gap_s, value);
            }
        }
        best
    }
}

impl CachePolicy for Continuum {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        self.uses.start(call);
        if let Some((finished_us, kind)) = self.waiting[call.session as usize].take() {
            self.record_gap(kind, (call.time_us - finished_us) as f64 / 1e6);
        }
    }

    fn evict(&mut self, n: usize, now_us: u64, pool: &mut Pool) {
        self.leaves.evict_lowest(n, pool, |pool, b| {
            let last = self.uses.of(b);
            let kept = self.expires_us[last.session as usize] > now_us;
            (kept, last.dispatch, Reverse(pool.depth(b)))
        });
    }

    fn inserted(&mut self, _call: &CallView<'_>, _blocks: &[u32], _pool: &Pool) {}

    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], released: &[u32], pool: &Pool) {
        self.uses.mark(call, output);
        self.leaves.offer(released, pool);
        let kind = call.tool.map_or(usize::from(call.agent), |tool| self.n_agents + usize::from(tool));
        self.waiting[call.session as usize] = Some((call.time_us, kind));
        let miss_cost_s = self.model.prefill_s(f64::from(call.prompt_tokens), 0.0);
        let memory_share = (call.prompt.len() + output.len()) as f64 / pool.capacity() as f64;
        let time_to_live_us = self.time_to_live_s(kind, miss_cost_s, memory_share) * 1e6;
        self.expires_us[call.session as usize] = call.time_us + time_to_live_us.ceil() as u64;
    }
}
