//! What is kept while a tool runs.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use rustc_hash::FxHashMap;

use replay::latency::LatencyModel;
use runtime_core::policy::{About, Policy};
use runtime_core::scheduling::{Decision, Gap, GapDecision, Happening, Load, Needs, Precedence, Retention, Waiting};
use runtime_core::Runtime;

use super::rank_by;

/// `ttl-S`, `keep`: a session's blocks stay for a fixed time from the start of its tool; for ever.
pub(super) struct Keep {
    pub(super) for_us: u64,
}

impl Policy for Keep {
    fn about(&self) -> About {
        About { name: "ttl-S".into(), observes: "tools", decides: "keep", costs: "a comparison a gap" }
    }

    fn needs(&self) -> Needs {
        Needs::TOOLS
    }

    fn gaps(&self, _: &Runtime, load: &Load, gaps: &[Gap], decisions: &mut [GapDecision]) {
        for (gap, decision) in gaps.iter().zip(decisions) {
            if load.now_us < gap.started_us.saturating_add(self.for_us) {
                decision.retention = Retention::Keep;
            }
        }
    }
}

/// `continuum`: the learned time to live and the order of "Continuum: Efficient and Robust Multi-Turn LLM Agent Scheduling
/// with KV Cache Time-to-Live", arXiv 2511.02230.
///
/// tau = argmax P(gap <= tau) cost - memory tau over the last gaps after the same tool, those after any tool while there
/// are fewer than 8. The cost of a miss is the modelled prefill of what is resident plus the mean wait of calls, which a
/// session that lost its blocks pays again; the memory cost is the share of the pool that it holds. Calls of sessions that
/// began first go first. Left out: the prefill's effect on others.
#[derive(Default)]
pub(super) struct Continuum {
    state: Mutex<Learned>,
}

#[derive(Default)]
struct Learned {
    gaps: FxHashMap<u16, VecDeque<f64>>,
    /// Tool and start of each session's gap, and the time to live chosen for it.
    open: FxHashMap<u64, (u16, u64, u64)>,
    began: FxHashMap<u64, u64>,
    mean_wait_s: f64,
}

/// Stands for all tools.
const ANY: u16 = 0;
const KEPT_GAPS: usize = 256;
const FEWEST_GAPS: usize = 8;

impl Learned {
    fn time_to_live_s(&self, tool: u16, miss_cost_s: f64, memory_share: f64) -> f64 {
        let of = |tool| self.gaps.get(&tool).filter(|gaps: &&VecDeque<f64>| tool == ANY || gaps.len() >= FEWEST_GAPS);
        let Some(gaps) = of(tool).or_else(|| of(ANY)) else { return 0.0 };
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

impl Policy for Continuum {
    fn about(&self) -> About {
        About { name: "continuum".into(), observes: "tools, waits", decides: "keep, order", costs: "a sort a gap" }
    }

    fn needs(&self) -> Needs {
        Needs::TOOLS.and(Needs::ARRIVALS).and(Needs::ADMISSIONS)
    }

    fn precedence(&self) -> Precedence {
        Precedence::Rest
    }

    fn hear(&self, _: &Runtime, now_us: u64, happening: &Happening) {
        let learned = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match happening {
            Happening::Arrived(call) => {
                let next = learned.began.len() as u64;
                learned.began.entry(call.session).or_insert(next);
                if let Some((tool, started_us, _)) = learned.open.remove(&call.session) {
                    for tool in [tool, ANY] {
                        let gaps = learned.gaps.entry(tool).or_default();
                        if gaps.len() == KEPT_GAPS {
                            gaps.pop_front();
                        }
                        gaps.push_back(now_us.saturating_sub(started_us) as f64 / 1e6);
                    }
                }
            }
            Happening::Admitted { call, again: false } => {
                let wait_s = now_us.saturating_sub(call.arrived_us) as f64 / 1e6;
                learned.mean_wait_s += (wait_s - learned.mean_wait_s) / 64.0;
            }
            _ => {}
        }
    }

    fn schedule(&self, _: &Runtime, _: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let learned = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        rank_by(decisions, |at| learned.began.get(&waiting[at].session).copied());
    }

    fn gaps(&self, _: &Runtime, load: &Load, gaps: &[Gap], decisions: &mut [GapDecision]) {
        let learned = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (gap, decision) in gaps.iter().zip(decisions) {
            let until_us = if let Some(&(_, _, until_us)) = learned.open.get(&gap.session) {
                until_us
            } else {
                let tokens = f64::from(gap.resident_tokens);
                let cost_s = LatencyModel::LLAMA_3_1_8B_H100.prefill_s(tokens, 0.0) + learned.mean_wait_s;
                let share = tokens / f64::from(load.pool_blocks * load.block_tokens).max(1.0);
                let keep_us = (learned.time_to_live_s(gap.tool, cost_s, share) * 1e6).ceil() as u64;
                let until_us = gap.started_us + keep_us;
                learned.open.insert(gap.session, (gap.tool, gap.started_us, until_us));
                until_us
            };
            if load.now_us <= until_us {
                decision.retention = Retention::Keep;
            }
        }
    }
}
