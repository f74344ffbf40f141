//! `kvflow`: Pan et al., "KVFlow: Efficient Prefix Caching for Accelerating LLM-Based Multi-Agent Workflows",
//! arXiv 2507.07400 (NeurIPS 2025).
//!
//! The workflow declares an agent step graph; a block's priority is the number of steps until its agent runs again,
//! the farthest goes first, the least recently used on ties. A parent needed by several agents has the smallest of
//! their steps, which evicting leaves alone amounts to.
//!
//! This policy is *given* the truth that KVFlow would be told: an edge where at least 5 % of all transitions of the
//! whole trace out of an agent, repetitions included, lead to another. Deviations: steps count from the session's own
//! last call for every block its agents used, histories included (the paper ranks fixed prompts alone and evicts
//! dynamic suffixes first; recorded sessions share almost no fixed prompt); no prefetch from the host.
//!
//! Does badly where sessions end, because their blocks still have a next step (`whowhen_magentic` at 25 %: 9 points
//! below `lru`), and where anyone may follow anyone, because all steps are then equal (`whowhen_ag2` at 10 %).

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::agents::{Hops, LastUses};
use super::leaves::LeafSet;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::Trace;

const EDGE_SHARE: f64 = 0.05;
/// An agent that no path leads to.
const NEVER: u32 = u32::MAX;

/// The declared graph.
struct Plan {
    /// Successors of each agent.
    graph: Vec<Vec<u16>>,
    /// Steps from an agent to the others, and back to itself; filled on demand.
    steps: Vec<Option<(Hops, u32)>>,
}

/// Steps to execution on the declared graph.
pub struct KvFlow {
    uses: LastUses,
    plan: Plan,
    /// Agent of each session's last call.
    current: Vec<u16>,
    leaves: LeafSet,
}

impl KvFlow {
    /// A policy that knows the transitions of the whole `trace`.
    pub fn new(trace: &Trace) -> Self {
        let n_agents = trace.agents.len();
        let mut counts: Vec<BTreeMap<u16, u32>> = vec![BTreeMap::new(); n_agents];
        for session in &trace.sessions {
            for pair in session.calls.windows(2) {
                let [from, to] = [pair[0], pair[1]].map(|c| trace.calls[c as usize].agent);
                *counts[usize::from(from)].entry(to).or_insert(0) += 1;
            }
        }
        let edges = |row: &BTreeMap<u16, u32>| {
            let total = f64::from(row.values().sum::<u32>());
            row.iter().filter(|(_, &count)| f64::from(count) >= EDGE_SHARE * total).map(|(&to, _)| to).collect()
        };
        Self {
            uses: LastUses::new(trace),
            plan: Plan { graph: counts.iter().map(edges).collect(), steps: (0..n_agents).map(|_| None).collect() },
            current: vec![0; trace.sessions.len()],
            leaves: LeafSet::new(trace.n_blocks as usize),
        }
    }
}

impl Plan {
    fn learn_steps_from(&mut self, agent: u16) {
        if self.steps[usize::from(agent)].is_some() {
            return;
        }
        let hops = Hops::new(agent, |from| self.graph[usize::from(from)].clone());
        let predecessors = (0..self.graph.len() as u16).filter(|&a| self.graph[usize::from(a)].contains(&agent));
        let back = predecessors.map(|a| hops.to(a, NEVER).saturating_add(1)).min().unwrap_or(NEVER);
        self.steps[usize::from(agent)] = Some((hops, back));
    }

    /// Steps until `agent` runs after `current`, at least one.
    fn steps(&self, current: u16, agent: u16) -> u32 {
        let Some((hops, back)) = &self.steps[usize::from(current)] else { return NEVER };
        if agent == current {
            *back
        } else {
            hops.to(agent, NEVER)
        }
    }
}

impl CachePolicy for KvFlow {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        self.uses.start(call);
        self.current[call.session as usize] = call.agent;
        self.plan.learn_steps_from(call.agent);
    }

    fn evict(&mut self, n: usize, _now_us: u64, pool: &mut Pool) {
        self.leaves.evict_lowest(n, pool, |pool, b| {
            let last = self.uses.of(b);
            let steps = self.plan.steps(self.current[last.session as usize], last.agent);
            (Reverse(steps), last.dispatch, Reverse(pool.depth(b)))
        });
    }

    fn inserted(&mut self, _call: &CallView<'_>, _blocks: &[u32], _pool: &Pool) {}

    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], released: &[u32], pool: &Pool) {
        self.uses.mark(call, output);
        self.leaves.offer(released, pool);
    }
}
