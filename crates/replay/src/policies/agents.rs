//! What the agent policies share: who used a block last, and an online count of agent transitions.

use std::collections::{BTreeMap, VecDeque};

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

    /// Steps from `start` to each of `n_agents` agents along edges of at least probability `threshold`, where
    /// P(j | i) = (C_ij + epsilon) / sum over the agents k seen so far of (C_ik + epsilon); `limit` where no path is
    /// shorter.
    pub(super) fn hops(&self, start: u16, n_agents: usize, epsilon: f64, threshold: f64, limit: u32) -> Vec<u32> {
        breadth_first(start, n_agents, limit, |from| {
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

/// Steps from `start` to every agent, `limit` where there is no shorter path.
pub(super) fn breadth_first(start: u16, n_agents: usize, limit: u32, successors: impl Fn(u16) -> Vec<u16>) -> Vec<u32> {
    let mut hops = vec![limit; n_agents];
    hops[usize::from(start)] = 0;
    let mut queue = VecDeque::from([start]);
    while let Some(agent) = queue.pop_front() {
        let next = hops[usize::from(agent)] + 1;
        if next >= limit {
            continue;
        }
        for to in successors(agent) {
            if hops[usize::from(to)] == limit && to != start {
                hops[usize::from(to)] = next;
                queue.push_back(to);
            }
        }
    }
    hops
}
