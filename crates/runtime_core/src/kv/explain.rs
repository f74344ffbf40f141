//! What has been learned, in plain numbers: for reports and for the measurement of calibration. Nothing here is on the hot
//! path, and nothing here changes what the policy decides.

use crate::ids::AgentId;
use crate::successors::{after_tool, context_of};

use super::content::MISSES;
use super::gaps::{self, BUCKETS};
use super::index::NONE;
use super::workload::{Sessions, SUCCESSORS};
use super::{density, KvCache, Workload, Workloads};

/// P(the session has called again), by seconds since the end of an agent's call.
#[derive(Clone, Debug, PartialEq)]
pub struct SilenceCurve {
    /// P(there is a next call at all).
    pub continues: f32,
    /// Seconds, and P(no next call yet) by then.
    pub curve: Vec<(f32, f32)>,
}

/// How often a block was used again by the next call of the agent that owns it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Promise {
    /// Votes counted; they fade.
    pub expected: f32,
    /// Of these, kept.
    pub kept: f32,
}

impl Workload {
    /// The agents that have followed `last`, with their (fading) counts, most frequent first.
    pub fn successors(&self, last: u16) -> Vec<(u16, u32)> {
        let mut row: Vec<(u16, u32)> = Vec::new();
        for context in [context_of(AgentId(last)), after_tool(context_of(AgentId(last)))] {
            let mut found = [(0, 0); SUCCESSORS];
            let n = self.transitions.row(context, &mut found);
            for &(agent, count) in &found[..n] {
                match row.iter_mut().find(|(known, _)| *known == agent) {
                    Some((_, sum)) => *sum += count,
                    None => row.push((agent, count)),
                }
            }
        }
        row.sort_unstable_by_key(|&(agent, count)| (std::cmp::Reverse(count), agent));
        row
    }

    /// How long sessions are silent after a call of `agent`; over all steps and answers, without a tool.
    pub fn silence(&self, agent: u16) -> SilenceCurve {
        let hazards = self.gaps.agent_hazards(agent);
        let continues = self.ends.of_agent(agent);
        let mut silent = 1.0;
        let curve = (0..BUCKETS)
            .map(|bucket| {
                silent *= 1.0 - hazards[bucket];
                (gaps::edge_s(bucket + 1), 1.0 - continues * (1.0 - silent))
            })
            .collect();
        SilenceCurve { continues, curve }
    }

    /// Whether the agent has promises of its own; those of all others are one.
    pub fn knows_promises_of(&self, agent: u16) -> bool {
        usize::from(agent) < super::content::ROWS
    }

    /// Promises of an agent's blocks (all agents together where it has no counts of its own) by misses: calls of the agent
    /// in the same session since one that used the block.
    pub fn promises(&self, agent: Option<u16>) -> [Promise; MISSES] {
        std::array::from_fn(|misses| {
            let (expected, kept) = self.content.totals(agent, misses);
            Promise { expected, kept }
        })
    }
}

impl KvCache {
    /// P(a resident block is used within the residence time), and the seconds that were meant; `None` where it is not
    /// resident or nothing has been evicted yet. Leaves no trace: what is remembered of sessions is as before.
    pub(crate) fn survival(
        &mut self,
        workloads: &Workloads,
        sessions: &Sessions,
        key: u64,
        now_us: u64,
    ) -> Option<(f32, f32)> {
        let slot = self.index.find(key);
        if slot == NONE || !self.pressed {
            return None;
        }
        let segment = self.index.segment_of(slot);
        let x = *self.index.seg(segment);
        let workload = workloads.get(self.workload_of(x.lane) as usize)?;
        let horizon_s = density::on_grid(self.residence_s());
        let session = self.lanes[x.lane as usize].session;
        let (before, view) = (self.now_us, self.view.clone());
        self.now_us = now_us.max(before);
        self.view.slot = NONE;
        // Looking brings the next look at the counts of sharing nearer.
        let at = self.workload_of(x.lane) as usize % self.curves.len();
        let curves = self.curves[at].clone();
        self.refresh_curves(x.lane, workload);
        let probability = if self.is_nobodys(x.lane) {
            self.score(segment, &x, workload, Some(horizon_s))
        } else {
            let at = session as usize % self.plans.len();
            let plan = self.plans[at].clone();
            self.plans[at].identity = (NONE, 0, 0, None);
            self.look(workload, sessions, session);
            let probability = self.score(segment, &x, workload, Some(horizon_s));
            self.plans[at] = plan;
            probability
        };
        self.curves[at] = curves;
        (self.now_us, self.view) = (before, view);
        Some((probability, horizon_s))
    }
}
