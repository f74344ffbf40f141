//! Which sessions do the same task, and what do their calls use of each other's blocks?
//!
//! Sessions become kin where a call uses what another session has used beyond the first third of the prompt (`touch`
//! finds that), or where it calls an agent for the first time with a prompt that another has walked along (`trails.rs`,
//! which remembers that beyond an eviction); so do the kin of these. Kin stand with the session, in both directions, at
//! most [`KIN`] of each; the seat of one that is gone is taken first. What kin teach is in `followers.rs`.

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

#[cfg(test)]
mod tests {
    use super::super::followers::COMMON;
    use super::super::sharing::{self, AGES};
    use super::super::workload::{Sessions, Workloads};
    use super::super::{CallStart, Config};
    use super::*;
    use crate::histogram::UNIT;
    use crate::ids::{mix, SessionKey};

    /// A pool with time, in which calls follow one another.
    struct Pool {
        kv: KvCache,
        workloads: Workloads,
        sessions: Sessions,
        calls: u64,
    }

    impl Pool {
        fn new() -> Self {
            let workloads = Workloads::new();
            assert_eq!((workloads.register("one"), workloads.register("another")), (Some(0), Some(1)));
            let kv = KvCache::new(4096, 256, Config::default());
            Self { kv, workloads, sessions: Sessions::new(256).unwrap(), calls: 0 }
        }

        fn learned(&self) -> &Workload {
            self.workloads.get(0).unwrap()
        }

        /// A session calls an agent, a second after the call before. Returns where it sits.
        fn call(&mut self, session: u64, agent: u16, keys: &[u64]) -> u32 {
            self.call_in(0, session, agent, keys)
        }

        fn call_in(&mut self, workload: usize, session: u64, agent: u16, keys: &[u64]) -> u32 {
            let (slot, hit) = self.start(workload, session, agent, keys);
            let (call, now_us) = (self.calls, self.now_us());
            self.kv.stored(self.workloads.get(workload).unwrap(), call, now_us, &keys[hit..], &[], false);
            let at = self.kv.find_call(call).unwrap();
            self.kv.call_finished(None, at, now_us);
            slot
        }

        fn start(&mut self, workload: usize, session: u64, agent: u16, keys: &[u64]) -> (u32, usize) {
            self.calls += 1;
            let (call, now_us) = (self.calls, self.now_us());
            let handle = self.sessions.enter(SessionKey(session)).0;
            let start = CallStart { call, session, agent, now_us, keys, hints: &[] };
            let learned = self.workloads.get(workload).unwrap();
            let (hit, _) = self.kv.call_started((workload as u32, learned), handle, &start);
            (handle.slot() as u32, hit)
        }

        /// A call starts: is the session in `slot` to be scored again?
        fn start_marks(&mut self, slot: u32, session: u64, agent: u16, keys: &[u64]) -> bool {
            while let Some(dirty) = self.kv.dirty.pop() {
                self.kv.tenants[dirty as usize].dirty = false;
            }
            self.start(0, session, agent, keys);
            self.kv.tenants[slot as usize].dirty
        }

        /// A session that has called agent 0 before: trails are not asked about it again.
        fn arrive(&mut self, session: u64) -> u32 {
            self.call(session, 0, &prompt(1000 + session, 12))
        }

        fn arrive_often(&mut self, session: u64, times: usize) {
            for _ in 0..times {
                self.arrive(session);
            }
        }

        fn now_us(&self) -> u64 {
            self.calls * 1_000_000
        }

        fn evict_all(&mut self) {
            let (all, now_us) = (self.kv.index.resident, self.now_us());
            self.kv.evict_oldest(&self.workloads, &self.sessions, all, now_us, |_| {});
            assert_eq!(self.kv.index.resident, 0);
        }

        /// Where the kin of the session in `slot` sit.
        fn kin(&self, slot: u32) -> Vec<u32> {
            let all = self.kv.tenants[slot as usize].kin;
            let mut kin: Vec<u32> = all.iter().filter(|kin| self.kv.is_there(**kin)).map(|kin| kin.slot).collect();
            kin.sort_unstable();
            kin
        }

        /// Uses by other sessions that have been counted, and observations that ended otherwise.
        fn shared(&self) -> (u32, u32) {
            let sum = |of: std::ops::Range<usize>| {
                let rows = self.learned().sharing.rows();
                rows.flat_map(|row| of.clone().map(|age| u32::from(row.get(age)))).sum()
            };
            (sum(0..AGES), sum(AGES..2 * AGES))
        }

        /// Votes counted of what kin hold of an agent: expected, and kept.
        fn votes(&self) -> (u32, u32) {
            let (cells, _) = self.learned().followers.rows();
            let sum = |first: usize| (first..48).step_by(2).map(|i| u32::from(cells.get(i))).sum();
            (sum(0), sum(1))
        }
    }

    fn prompt(seed: u64, len: u64) -> Vec<u64> {
        (0..len).map(|i| mix(seed << 32 | i)).collect()
    }

    /// A prompt that continues another.
    fn longer(prefix: &[u64], seed: u64, len: u64) -> Vec<u64> {
        prefix.iter().copied().chain(prompt(seed, len)).collect()
    }

    fn sorted(mut slots: Vec<u32>) -> Vec<u32> {
        slots.sort_unstable();
        slots
    }

    #[test]
    fn sessions_that_share_blocks_beyond_the_first_third_are_kin() {
        let mut pool = Pool::new();
        let head = prompt(1, 9);
        let task = longer(&head, 2, 11);
        // The second call uses the first one's blocks again: they are a segment of their own.
        pool.call(1, 0, &head);
        let first = pool.call(1, 0, &task);
        let second = pool.arrive(2);
        pool.call(2, 0, &longer(&head, 3, 20));
        assert_eq!((pool.kin(first), pool.kin(second)), (vec![], vec![]), "a system prompt alone makes nobody kin");
        pool.call(2, 0, &longer(&task, 4, 7));
        assert_eq!((pool.kin(first), pool.kin(second)), (vec![second], vec![first]));
    }

    #[test]
    fn kin_of_kin_are_kin() {
        let mut pool = Pool::new();
        let task = prompt(1, 20);
        let (first, second) = (pool.call(1, 0, &task), pool.arrive(2));
        pool.call(2, 0, &task);
        // The third session uses what only the second one has used.
        let more = longer(&task, 2, 40);
        pool.call(2, 0, &more);
        let third = pool.arrive(3);
        pool.call(3, 0, &more);
        assert_eq!(pool.kin(first), sorted(vec![second, third]));
        assert_eq!(pool.kin(third), sorted(vec![first, second]));
    }

    #[test]
    fn sessions_of_different_workloads_are_not_kin() {
        let mut pool = Pool::new();
        let task = prompt(1, 20);
        let first = pool.call_in(0, 1, 0, &task);
        let second = pool.call_in(1, 2, 0, &task);
        assert_eq!((pool.kin(first), pool.kin(second)), (vec![], vec![]));
    }

    #[test]
    fn what_sixteen_sessions_have_used_makes_nobody_kin() {
        let mut pool = Pool::new();
        let task = prompt(1, 20);
        pool.call(0, 0, &task);
        for session in 1..=u64::from(COMMON) {
            let slot = pool.arrive(session);
            pool.call(session, 0, &task);
            assert_eq!(pool.kin(slot).is_empty(), session == u64::from(COMMON), "session {session}");
        }
    }

    #[test]
    fn of_more_than_six_kin_those_whose_blocks_were_used_longest_ago_give_way() {
        let mut pool = Pool::new();
        let leads: Vec<u32> = (1..=8).map(|lead| pool.call(lead, 0, &prompt(lead, 20))).collect();
        let slot = pool.arrive(9);
        for lead in 1..=6 {
            pool.call(9, 0, &prompt(lead, 20));
        }
        // What the session has used is its own, until the first of the six uses it again.
        pool.call(1, 0, &prompt(1, 20));
        for lead in [1, 7, 8] {
            pool.call(9, 0, &prompt(lead, 20));
        }
        assert_eq!(pool.kin(slot), sorted([0, 3, 4, 5, 6, 7].map(|lead| leads[lead]).to_vec()));
        assert_eq!(pool.kin(slot).len(), KIN);
    }

    #[test]
    fn kin_of_kin_take_the_seats_of_those_that_are_gone_and_no_others() {
        for gone in [false, true] {
            let mut pool = Pool::new();
            let leads: Vec<u32> = (1..=6).map(|lead| pool.call(lead, 0, &prompt(lead, 20))).collect();
            let slot = pool.arrive(9);
            for lead in 1..=5 {
                pool.call(9, 0, &prompt(lead, 20));
            }
            // The sixth has kin of its own, which share something else.
            let eighth = pool.call(8, 0, &prompt(8, 20));
            pool.call(6, 0, &prompt(8, 20));
            if gone {
                pool.kv.tenants[leads[1] as usize].generation += 1;
            }
            pool.call(9, 0, &prompt(6, 20));
            let mut kin = leads.clone();
            if gone {
                kin[1] = eighth;
            }
            assert_eq!(pool.kin(slot), sorted(kin), "one of the six is gone: {gone}");
        }
    }

    #[test]
    fn who_calls_an_agent_first_with_a_prompt_that_was_evicted_is_kin_all_the_same() {
        for calls_first in [true, false] {
            let mut pool = Pool::new();
            let task = prompt(1, 60);
            let first = pool.call(1, 0, &task);
            if !calls_first {
                pool.arrive(2);
            }
            pool.evict_all();
            let second = pool.call(2, 0, &task);
            let kin = if calls_first { (vec![second], vec![first]) } else { (vec![], vec![]) };
            assert_eq!((pool.kin(first), pool.kin(second)), kin);
        }
    }

    #[test]
    fn who_has_left_is_nobodys_kin() {
        let mut pool = Pool::new();
        let task = prompt(1, 60);
        let first = pool.call(1, 0, &task);
        pool.kv.tenants[first as usize].generation += 1;
        pool.evict_all();
        let second = pool.call(2, 0, &task);
        assert_eq!(pool.kin(second), vec![]);
    }

    #[test]
    fn what_kin_use_within_four_calls_of_each_other_is_no_use_by_a_stranger() {
        // Between the lead's use of its blocks and its kin's, that calls this many times with what is its own.
        let counted = |calls: usize, agent: u16| {
            let mut pool = Pool::new();
            let task = prompt(1, 20);
            pool.call(1, 0, &task);
            pool.arrive(2);
            pool.call(2, 0, &task);
            pool.arrive_often(2, 4);
            let step = longer(&task, 2, 30);
            // The lead uses in step what its kin has just used, and adds to it.
            pool.call(1, 0, &task);
            pool.call(1, agent, &step);
            pool.arrive_often(2, calls);
            let (used, ended) = pool.shared();
            pool.call(2, 0, &step);
            let (used, ended) = (pool.shared().0 - used, pool.shared().1 - ended);
            (used > 0, ended > 0)
        };
        assert_eq!(counted(0, 0), (false, true));
        assert_eq!(counted(RECENT - 1, 0), (false, true));
        assert_eq!(counted(RECENT, 0), (true, false));
        // Another agent's step is not this one's.
        assert_eq!(counted(0, 1), (true, false));
    }

    #[test]
    fn what_a_stranger_uses_is_counted_as_such_the_first_time() {
        let mut pool = Pool::new();
        let task = prompt(1, 20);
        pool.call(1, 0, &task);
        let before = pool.shared();
        pool.call(2, 0, &task);
        let after = pool.shared();
        assert!(after.0 > before.0 && after.1 == before.1, "{before:?} {after:?}");
    }

    #[test]
    fn a_strangers_use_is_as_late_as_the_session_has_had_the_blocks_however_often_it_has_used_them() {
        let mut pool = Pool::new();
        let task = prompt(1, 20);
        pool.call(1, 0, &task);
        let before = pool.shared();
        for _ in 0..5 {
            pool.call(1, 0, &task);
        }
        assert_eq!(pool.shared(), before, "own uses are neither events nor ends");
        let used_at = |pool: &Pool| -> Vec<usize> {
            let rows = || pool.learned().sharing.rows();
            (0..AGES).filter(|&age| rows().any(|row| row.get(age) > 0)).collect()
        };
        pool.call(2, 0, &task);
        assert_eq!(used_at(&pool), [sharing::position(6.0) as usize], "not one second, as after the last use");
        // From here on they are the other session's.
        pool.call(3, 0, &task);
        assert_eq!(used_at(&pool), [1.0, 6.0].map(|s| sharing::position(s - 0.01) as usize));
    }

    #[test]
    fn each_call_votes_on_what_its_kin_hold_of_its_agent() {
        let mut pool = Pool::new();
        let task = prompt(1, 20);
        pool.call(1, 0, &task);
        pool.arrive(2);
        pool.call(2, 0, &task);
        assert_eq!(pool.votes(), (0, 0), "kin from now on");
        let step = longer(&task, 2, 30);
        pool.call(1, 0, &step);
        let kept = pool.votes();
        assert!(kept.1 > 0, "{kept:?}");
        // Of agent 1 they hold nothing.
        pool.call(2, 1, &prompt(3, 20));
        assert_eq!(pool.votes(), kept);
        pool.arrive(2);
        let broken = pool.votes();
        assert_eq!(broken, (kept.0 + 2 * UNIT, kept.1), "one on what they share, one on what the other has alone");
        pool.call(2, 0, &step);
        assert!(pool.votes().1 > broken.1);
    }

    #[test]
    fn nobody_votes_on_what_is_left_of_kin_that_are_gone() {
        let mut pool = Pool::new();
        let task = prompt(1, 20);
        let first = pool.call(1, 0, &task);
        pool.arrive(2);
        pool.call(2, 0, &task);
        pool.call(1, 0, &longer(&task, 2, 30));
        let before = pool.votes();
        pool.kv.tenants[first as usize].generation += 1;
        pool.arrive(2);
        assert_eq!(pool.votes(), before);
    }

    #[test]
    fn the_calls_of_a_session_have_its_kin_scored_again() {
        let mut pool = Pool::new();
        let task = prompt(1, 20);
        let first = pool.call(1, 0, &task);
        pool.arrive(2);
        assert!(!pool.start_marks(first, 2, 0, &prompt(2, 20)), "a stranger");
        assert!(pool.start_marks(first, 2, 0, &task), "kin from now on");
        assert!(pool.start_marks(first, 2, 0, &prompt(3, 20)), "kin");
    }

    #[test]
    fn who_sits_where_kin_sat_can_become_kin() {
        let mut pool = Pool::new();
        let slot = pool.arrive(9);
        let leads = [1, 2].map(|lead| pool.call(lead, 0, &prompt(lead, 20)));
        for lead in [1, 2] {
            pool.call(9, 0, &prompt(lead, 20));
        }
        // These were earlier sessions in the same places.
        for kin in &mut pool.kv.tenants[slot as usize].kin[..2] {
            kin.generation -= 1;
        }
        assert_eq!(pool.kin(slot), vec![]);
        // Another session's kin is who sits in the second place now.
        let other = pool.arrive(3);
        pool.call(2, 0, &prompt(4, 20));
        pool.kv.tenants[leads[1] as usize].kin[0] = Kin::NONE;
        pool.call(3, 0, &prompt(4, 20));
        pool.call(9, 0, &prompt(4, 20));
        assert_eq!(pool.kin(slot), sorted(vec![leads[1], other]));
    }
}
