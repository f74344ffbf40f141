//! Sessions that walk another session's path: what will they ask of it?
//!
//! A session *follows* the session whose blocks its latest call used deep in its prompt (beyond the first third). Each
//! call of a follower is a trial for all of its leader's segments, by how far the leader's step at which a segment was
//! first used lies ahead of the follower's own step, and by how many calls ago the follower last used anything of the
//! leader's. Private and shared segments are told apart: of a leader whose system prompt alone is asked for, the rest is
//! not. One vote per cell and call, worth the share of the blocks that the call used.

use crate::histogram::{Counters, Often, UNIT};

use super::chain::STEPS;

/// Calls since the follower last used anything of the leader's: 0, 1-2, more.
const LAGS: usize = 3;
/// Offsets told apart: behind, the step itself, the one after, further ahead.
const OFFSETS: usize = 4;
/// Private segments, and shared ones.
const GROUPS: usize = 2;
/// The offset of the step itself.
const SAME: usize = 1;
/// Rows of agents: eleven have their own, the last is all others'.
const AGENTS: usize = 12;

type Cells = Counters<{ (2 * GROUPS * OFFSETS * LAGS).div_ceil(4) }>;
type Agents = Counters<{ (2 * GROUPS * AGENTS).div_ceil(4) }>;

/// Votes by offset and lag, and by agent at offset 0.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Followers {
    cells: Cells,
    agents: Agents,
}

/// Offset of a segment first used at the leader's step `born`, at the follower's call number `calls`.
pub(crate) fn offset(born: u8, calls: u16) -> usize {
    match i32::from(born) - i32::from(calls) {
        ..0 => 0,
        0 => 1,
        1 => 2,
        2.. => 3,
    }
}

fn cell(shared: bool, offset: usize, since: u16) -> usize {
    let lag = match since {
        0 | 1 => 0,
        2..=3 => 1,
        _ => 2,
    };
    let group = usize::from(shared);
    (group * OFFSETS + offset) * LAGS + lag
}

fn row(shared: bool, agent: u16) -> usize {
    usize::from(shared) * AGENTS + usize::from(agent).min(AGENTS - 1)
}

/// Blocks of the leader at a call of its follower: how many there were, and how many the call used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Votes {
    offsets: [[(u32, u32); OFFSETS]; GROUPS],
    agents: [[(u32, u32); AGENTS]; GROUPS],
}

impl Votes {
    pub(crate) fn expect(&mut self, shared: bool, offset: usize, agent: u16, n: u32) {
        self.each(shared, offset, agent, |(expected, _)| *expected += n);
    }

    pub(crate) fn used(&mut self, shared: bool, offset: usize, agent: u16, n: u32) {
        self.each(shared, offset, agent, |(_, used)| *used += n);
    }

    fn each(&mut self, shared: bool, offset: usize, agent: u16, count: impl Fn(&mut (u32, u32))) {
        let group = usize::from(shared);
        count(&mut self.offsets[group][offset]);
        if offset == SAME {
            count(&mut self.agents[group][usize::from(agent).min(AGENTS - 1)]);
        }
    }
}

impl Followers {
    pub(super) fn rows(&self) -> (&Cells, &Agents) {
        (&self.cells, &self.agents)
    }

    /// A call of a follower, `since` calls after the last one that used anything of the leader's.
    pub(crate) fn learn(&self, votes: &Votes, since: u16) {
        let vote = |n: u32, used: u32| [UNIT, (UNIT * used.min(n) + n / 2) / n];
        for shared in [false, true] {
            let group = usize::from(shared);
            for (offset, &(n, used)) in votes.offsets[group].iter().enumerate().filter(|(_, (n, _))| *n > 0) {
                self.cells.add_steps(2 * cell(shared, offset, since), vote(n, used), Often::ALWAYS);
            }
            for (agent, &(n, used)) in votes.agents[group].iter().enumerate().filter(|(_, (n, _))| *n > 0) {
                self.agents.add_steps(2 * row(shared, agent as u16), vote(n, used), Often::ALWAYS);
            }
        }
    }

    /// P(the follower's i-th next call is the first to use a segment).
    pub(crate) fn first_use(&self, shared: bool, born: u8, calls: u16, since: u16, agent: u16) -> [f32; STEPS] {
        let votes = |expected: u16, used: u16| (f32::from(expected) / UNIT as f32, f32::from(used) / UNIT as f32);
        let of_cell = |i: usize| votes(self.cells.get(2 * i), self.cells.get(2 * i + 1));
        // How the agent's blocks compare with all at offset 0.
        let (all, all_used) = (0..LAGS).fold((0.0, 0.0), |sum, lag| {
            let (expected, used) = of_cell(cell(shared, SAME, 0) + lag);
            (sum.0 + expected, sum.1 + used)
        });
        let base = (all_used + 0.1) / (all + 2.0);
        let (expected, used) =
            votes(self.agents.get(2 * row(shared, agent)), self.agents.get(2 * row(shared, agent) + 1));
        let risk = (used + 4.0 * base) / ((expected + 4.0) * base);
        let mut left = 1.0;
        std::array::from_fn(|i| {
            let ahead = 1 + i as u16;
            let (expected, used) =
                of_cell(cell(shared, offset(born, calls.saturating_add(ahead)), since.saturating_add(ahead)));
            let rate = ((used + 0.1) / (expected + 2.0) * risk).min(0.95);
            let first = left * rate;
            left -= first;
            first
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls of a follower that use all of what its leader did at the same step and nothing else.
    fn in_step(followers: &Followers, agent: u16, uses: bool) {
        for round in 0..150 {
            let mut votes = Votes::default();
            for offset in 0..OFFSETS {
                votes.expect(false, offset, agent, 8);
            }
            if uses {
                votes.used(false, SAME, agent, 8);
            }
            followers.learn(&votes, 1 + round % 5);
        }
    }

    #[test]
    fn a_follower_is_expected_to_take_the_steps_its_leader_took() {
        let followers = Followers::default();
        in_step(&followers, 0, true);
        // The follower has made three calls, the last of which used something of its leader's.
        let third_ahead = followers.first_use(false, 6, 3, 0, 0);
        let next = followers.first_use(false, 4, 3, 0, 0);
        let passed = followers.first_use(false, 2, 3, 0, 0);
        assert!(next[0] > 0.8, "{next:?}");
        assert!(third_ahead[0] < 0.1 && third_ahead[2] > 10.0 * third_ahead[1], "{third_ahead:?}");
        assert!(passed.iter().sum::<f32>() < 0.3, "{passed:?}");
    }

    #[test]
    fn agents_that_are_not_followed_are_told_from_those_that_are() {
        let followers = Followers::default();
        in_step(&followers, 0, true);
        in_step(&followers, 1, false);
        let (followed, alone) = (followers.first_use(false, 4, 3, 0, 0)[0], followers.first_use(false, 4, 3, 0, 1)[0]);
        assert!(followed > 5.0 * alone, "{followed} {alone}");
    }

    #[test]
    fn nothing_is_expected_of_followers_before_one_has_been_seen() {
        let first = Followers::default().first_use(false, 4, 3, 0, 0);
        assert!(first.iter().sum::<f32>() < 0.3, "{first:?}");
    }
}
