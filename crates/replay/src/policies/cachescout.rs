//! `cachescout` and `cachescout-fixed`: Zhang et al., "Learning Agent Execution for KV-Cache Management in Agentic
//! Serving", arXiv 2608.14624, as published and with the two repairs of a replication.
//!
//! Equation 3: P_ij = (C_ij + eps) / sum_k (C_ik + eps), repetitions not counted. Equation 7: an edge where
//! P_ij >= tau. Equation 8: p(a) = 1 - min(E[a], E_max) / E_max with E the hops from the agent dispatched last.
//! Equation 9: score(b) = (p(a_b) + delta) (exp(-lambda age(b)) + delta) |b|; the lowest goes first, |b| is the same
//! for all blocks here, and age counts dispatched calls.
//!
//! The paper gives no constants; these are the replication's (MostafaaElhadidy/Agentic-KV-Cache-Management): eps
//! 0.01, tau 0.1, E_max 6, lambda 0.005 per step, delta 0.01. Its repairs, in `cachescout-fixed`: transitions are
//! counted between successive calls of the *same* session, and only anchors - blocks that two sessions or more have
//! used - carry an agent, the others count as p = 0. Left out: warm-up calls and the CPU tier.
//!
//! Does badly, as published, where sessions interleave (see `cachesage`; `whowhen_ag2` at 25 %: 1.9 points below
//! `lru`); repaired, where prefixes are shared by sessions that have ended: they are protected for ever
//! (`marble_research` at 25 %: 5 points below `lru`).

use std::cmp::Reverse;

use super::agents::{LastUses, Transitions};
use super::leaves::LeafSet;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::Trace;

const EPSILON: f64 = 0.01;
const THRESHOLD: f64 = 0.1;
const MAX_HOPS: u32 = 6;
const DECAY_PER_DISPATCH: f64 = 0.005;
const DELTA: f64 = 0.01;

const NOBODY: u32 = u32::MAX;
const SHARED: u32 = u32::MAX - 1;

/// Survival by hops times exponential recency.
pub struct CacheScout {
    uses: LastUses,
    chain: Transitions,
    current: Option<u16>,
    leaves: LeafSet,
    repairs: Option<Repairs>,
}

/// State of the replication's repairs.
struct Repairs {
    /// Agent of each session's last call.
    current: Vec<Option<u16>>,
    /// The only session that has used a block, [`SHARED`] once there are two.
    owner: Vec<u32>,
}

impl CacheScout {
    /// The policy as published.
    pub fn published(trace: &Trace) -> Self {
        Self {
            uses: LastUses::new(trace),
            chain: Transitions::default(),
            current: None,
            leaves: LeafSet::new(trace.n_blocks as usize),
            repairs: None,
        }
    }

    /// The policy with anchor-only labels and transitions by session.
    pub fn repaired(trace: &Trace) -> Self {
        let current = vec![None; trace.sessions.len()];
        let repairs = Repairs { current, owner: vec![NOBODY; trace.n_blocks as usize] };
        Self { repairs: Some(repairs), ..Self::published(trace) }
    }
}

impl Repairs {
    fn claim(&mut self, session: u32, blocks: &[u32]) {
        for &block in blocks {
            let owner = &mut self.owner[block as usize];
            *owner = if *owner == NOBODY || *owner == session { session } else { SHARED };
        }
    }
}

impl CachePolicy for CacheScout {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        self.uses.start(call);
        let previous = match &mut self.repairs {
            Some(repairs) => {
                repairs.claim(call.session, call.prompt);
                repairs.current[call.session as usize].replace(call.agent)
            }
            None => self.current,
        };
        self.chain.observe(previous.unwrap_or(call.agent), call.agent);
        self.current = Some(call.agent);
    }

    fn evict(&mut self, n: usize, _now_us: u64, pool: &mut Pool) {
        let Some(current) = self.current else { return };
        let hops = self.chain.hops(current, EPSILON, THRESHOLD);
        self.leaves.evict_lowest(n, pool, |pool, b| {
            let last = self.uses.of(b);
            let labelled = self.repairs.as_ref().is_none_or(|r| r.owner[b as usize] == SHARED);
            let p = if labelled { hops.survival(last.agent, MAX_HOPS) } else { 0.0 };
            let age = f64::from(self.uses.dispatch() - last.dispatch);
            let score = (p + DELTA) * ((-DECAY_PER_DISPATCH * age).exp() + DELTA);
            // Scores are positive, so their bits sort like their values.
            (score.to_bits(), last.dispatch, Reverse(pool.depth(b)))
        });
    }

    fn inserted(&mut self, _call: &CallView<'_>, _blocks: &[u32], _pool: &Pool) {}

    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], released: &[u32], pool: &Pool) {
        self.uses.mark(call, output);
        if let Some(repairs) = &mut self.repairs {
            repairs.claim(call.session, output);
        }
        self.leaves.offer(released, pool);
    }
}
