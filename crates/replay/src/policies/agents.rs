//! What the agent policies share: who used a block last, and an online count of agent transitions.

use std::collections::{BTreeMap, VecDeque};

use rustc_hash::FxHashMap;

use crate::policy::CallView;
use crate::trace::Trace;

/// The last use of a block.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LastUse {
    pub(super) session: u32,
    pub(super) agent: u16,
    /// Number of the call, in order of starts: the clock of the published policies.
    pub(super) dispatch: u32,
}

/// The last use of every block.
pub(super) struct LastUses {
    by_block: Vec<LastUse>,
    dispatch: u32,
}

impl LastUses {
    pub(super) fn new(trace: &Trace) -> Self {
        Self { by_block: vec![LastUse::default(); trace.n_blocks as usize], dispatch: 0 }
    }

    /// A call starts: it uses all blocks of its prompt, those about to be inserted included.
    pub(super) fn start(&mut self, call: &CallView<'_>) {
        self.dispatch += 1;
        self.mark(call, call.prompt);
    }

    /// A call's answer was stored.
    pub(super) fn mark(&mut self, call: &CallView<'_>, blocks: &[u32]) {
        let last = LastUse { session: call.session, agent: call.agent, dispatch: self.dispatch };
        for &block in blocks {
            self.by_block[block as usize] = last;
        }
    }

    pub(super) fn of(&self, block: u32) -> LastUse {
        self.by_block[block as usize]
    }

    /// Calls started so far.
    pub(super) fn dispatch(&self) -> u32 {
        self.dispatch
    }
}

/// Counts of agent changes; an agent that follows itself does not count.
#[derive(Default)]
pub(super) struct Transitions {
    rows: BTreeMap<u16, BTreeMap<u16, u32>>,
}

impl Transitions {
    pub(super) fn observe(&mut self, from: u16, to: u16) {
        self.rows.entry(to).or_default();
        if from != to {
            *self.rows.entry(from).or_default().entry(to).or_insert(0) += 1;
        }
    }

    /// Steps from `start` along edges of at least probability `threshold`, where
    /// P(j | i) = (C_ij + epsilon) / sum over the agents k seen so far of (C_ik + epsilon).
    pub(super) fn hops(&self, start: u16, epsilon: f64, threshold: f64) -> Hops {
        Hops::new(start, |from| {
            let Some(row) = self.rows.get(&from) else { return Vec::new() };
            let total = f64::from(row.values().sum::<u32>()) + epsilon * self.rows.len() as f64;
            let likely = |count: u32| total > 0.0 && (f64::from(count) + epsilon) / total >= threshold;
            if likely(0) {
                return self.rows.keys().copied().collect();
            }
            row.iter().filter(|(_, &count)| likely(count)).map(|(&to, _)| to).collect()
        })
    }
}

/// Nearest agents looked at from one agent; those beyond count as unreachable. No recorded workload has as many.
const NEAREST: usize = 256;

/// Steps on an agent graph.
pub(super) struct Hops(FxHashMap<u16, u32>);

impl Hops {
    pub(super) fn new(start: u16, successors: impl Fn(u16) -> Vec<u16>) -> Self {
        let mut hops = FxHashMap::default();
        hops.insert(start, 0);
        let mut queue = VecDeque::from([(start, 0)]);
        while let Some((agent, steps)) = queue.pop_front() {
            for to in successors(agent) {
                if hops.len() < NEAREST && !hops.contains_key(&to) {
                    hops.insert(to, steps + 1);
                    queue.push_back((to, steps + 1));
                }
            }
        }
        Self(hops)
    }

    /// Steps to `agent`, `limit` where it is farther or out of reach.
    pub(super) fn to(&self, agent: u16, limit: u32) -> u32 {
        self.0.get(&agent).map_or(limit, |&steps| steps.min(limit))
    }

    /// The published survival proxy: 1 - min(hops, limit) / limit.
    pub(super) fn survival(&self, agent: u16, limit: u32) -> f64 {
        1.0 - f64::from(self.to(agent, limit)) / f64::from(limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hops_follow_likely_edges_and_ignore_repetitions() {
        let mut chain = Transitions::default();
        // 0 -> 1 -> 2 often, 0 -> 2 once in a hundred.
        for _ in 0..99 {
            chain.observe(0, 0);
            chain.observe(0, 1);
            chain.observe(1, 2);
        }
        chain.observe(0, 2);
        let likely = chain.hops(0, 0.0, 0.1);
        assert_eq!([0, 1, 2, 3].map(|a| likely.to(a, 8)), [0, 1, 2, 8]);
        // At the published threshold the rare edge counts as well.
        let published = chain.hops(0, 0.0, 0.01);
        assert_eq!([0, 1, 2].map(|a| published.to(a, 8)), [0, 1, 1]);
        assert_eq!([0, 1, 3].map(|a| published.survival(a, 8)), [1.0, 0.875, 0.0]);
    }

    #[test]
    fn smoothing_connects_an_agent_that_has_not_been_left_yet() {
        let mut chain = Transitions::default();
        chain.observe(0, 1);
        chain.observe(1, 2);
        // P(0 | 2) = 0.01 / 0.03 >= 0.1.
        assert_eq!(chain.hops(2, 0.01, 0.1).to(1, 6), 1);
        assert_eq!(chain.hops(2, 0.0, 0.1).to(1, 6), 6);
    }
}
