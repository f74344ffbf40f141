//! Which sessions do the same task, and what do their calls use of each other's blocks?
//!
//! Sessions become kin where a call uses what another session has used beyond the first third of the prompt
//! (`touch` finds that), or where it calls an agent for the first time with a prompt that another has walked along
//! (`trails.rs`, which remembers that beyond an eviction); so do the kin of these. Kin stand with the session, in both
//! directions, at most [`KIN`] of each; the seat of one that is gone is taken first. What kin teach is in `followers.rs`.

use super::followers::{Kin, Votes, KIN};
use super::{KvCache, Tenant, Workload, NONE};

/// Calls of a session whose starts are remembered: what its kin used before these, it has not taken from them in step.
pub(super) const RECENT: usize = 4;

impl KvCache {
    /// The blocks of `agent` that one of a session's kin holds now, which the session's call may use.
    pub(super) fn expected_of(&self, kin: Kin, agent: u16, call: u32) -> Option<Votes> {
        self.tenants.get(kin.slot as usize).filter(|x| x.generation == kin.generation)?;
        let mut votes = Votes::new(agent, call);
        let mut segment = match self.find_lane(kin.slot, agent) {
            NONE => NONE,
            lane => self.lanes[lane as usize].head,
        };
        while segment != NONE {
            let x = self.index.seg(segment);
            votes.expect(x.degree > 1, x.ordinal, x.len);
            segment = x.lane_next;
        }
        Some(votes)
    }

    /// Counts what a session's call used of its kin's, and makes `leads` kin.
    pub(super) fn follow(&mut self, workload: &Workload, slot: u32, votes: &[Option<Votes>; KIN], leads: [u32; KIN]) {
        let Tenant { kin, calls, .. } = self.tenants[slot as usize];
        for (kin, votes) in kin.iter().zip(votes) {
            if let Some(votes) = votes {
                workload.followers.learn(votes, calls.saturating_sub(kin.matched));
                self.mark(kin.slot);
            }
        }
        for lead in leads {
            if lead != NONE {
                self.relate(slot, lead);
            }
        }
    }

    /// A call starts: what the session's kin have used since this time, it uses in step with them.
    #[inline]
    pub(super) fn in_step_since(&mut self, slot: u32, now_us: u64) -> u64 {
        let recent_us = &mut self.tenants[slot as usize].recent_us;
        if recent_us[0] == u64::MAX {
            *recent_us = [now_us; RECENT];
        }
        let since_us = recent_us[RECENT - 1];
        recent_us.rotate_right(1);
        recent_us[0] = now_us;
        since_us
    }

    /// An agent is called for the first time: who has walked along its prompt before is kin from now on.
    #[inline]
    pub(super) fn walk(&mut self, slot: u32, lane: u32, keys: &[u64]) {
        if self.config.followers && self.lanes[lane as usize].calls == 0 {
            let generation = self.tenants[slot as usize].generation;
            for (lead, generation) in self.trails.walk(keys, slot, generation) {
                if lead != NONE && self.tenants[lead as usize].generation == generation {
                    self.relate(slot, lead);
                }
            }
        }
    }

    /// The session in `slot` asks for what the one in `lead` has used: they are kin, and so are those of that.
    fn relate(&mut self, slot: u32, lead: u32) {
        if !self.config.followers || self.tenants[slot as usize].workload != self.tenants[lead as usize].workload {
            return;
        }
        self.link(slot, lead, true, true);
        self.link(lead, slot, false, true);
        for kin in self.tenants[lead as usize].kin {
            if kin.slot != slot && self.is_there(kin) {
                self.link(slot, kin.slot, false, false);
                self.link(kin.slot, slot, false, false);
            }
        }
        self.mark(lead);
    }

    fn is_there(&self, kin: Kin) -> bool {
        self.tenants.get(kin.slot as usize).is_some_and(|x| x.generation == kin.generation)
    }

    /// Makes the session in `other` kin of the one in `slot`, which has just `used` something of it or may soon; in the
    /// place of one that is gone, or if need be (`certain`) of the one whose blocks were used longest ago.
    fn link(&mut self, slot: u32, other: u32, used: bool, certain: bool) {
        let generation = self.tenants[other as usize].generation;
        let Tenant { kin, calls, .. } = self.tenants[slot as usize];
        let known = kin.iter().position(|kin| kin.slot == other && kin.generation == generation);
        if known.is_some() && !used {
            return;
        }
        let longest = || (0..KIN).max_by_key(|&at| calls.saturating_sub(kin[at].matched)).filter(|_| certain);
        let gone = || kin.iter().position(|&kin| !self.is_there(kin));
        if let Some(at) = known.or_else(gone).or_else(longest) {
            self.tenants[slot as usize].kin[at] = Kin { slot: other, generation, matched: calls };
        }
    }
}
