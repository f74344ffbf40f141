//! Sessions that walk the same path: what will they ask of each other?
//!
//! Sessions that have used the same blocks beyond the first third of a prompt are *kin*: they do the same task. Blocks
//! that have gone from session to session sixteen times are a system prompt, and make nobody kin. The agents of two runs
//! of one task are called with the same prompts in the same order, whatever comes between. So each call of a session is a
//! trial for the segments of its kin that were last used by the same agent, by how the number of the lane's call that
//! first used a segment compares with the number of this call of the agent in its own session, and by how many calls ago
//! the session last used anything of that one's. Private and shared segments are told apart: where a system prompt alone
//! is asked for, the rest is not. One vote per cell and call, worth the share of the blocks that the call used.

use crate::histogram::{Counters, Often, UNIT};

use super::chain::{Weights, STEPS};

/// What has gone from one session to another so often is a system prompt, and makes nobody kin.
pub(crate) const COMMON: u8 = 16;
/// Kin that a session remembers.
pub(crate) const KIN: usize = 6;
/// Calls since the session last used anything of the other's: 1, 2-3, more.
const LAGS: usize = 3;
/// How a segment's call compares with the agent's: behind, the same, the same and its first, ahead.
const OFFSETS: usize = 4;
/// Offsets at which agents are told apart.
const DUE: [usize; 2] = [1, 2];
/// Private segments, and shared ones.
const GROUPS: usize = 2;
/// Rows of agents: eleven have their own, the last is all others'.
const AGENTS: usize = 12;

type Cells = Counters<{ (2 * GROUPS * OFFSETS * LAGS).div_ceil(4) }>;
type Agents = Counters<{ (2 * GROUPS * AGENTS).div_ceil(4) }>;

/// Votes by offset and lag, and by agent where a segment is due.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Followers {
    cells: Cells,
    agents: Agents,
}

/// A session that walks the same path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kin {
    /// Where it sits, `u32::MAX` for none, and which of those that have sat there it is.
    pub(crate) slot: u32,
    pub(crate) generation: u16,
    /// Number of the own call that last used anything of it, or that it became kin at.
    pub(crate) matched: u16,
}

impl Kin {
    pub(crate) const NONE: Self = Self { slot: u32::MAX, generation: 0, matched: 0 };
}

/// How a segment first used by its lane's call `ordinal` compares with the agent's call number `call` in another session.
fn offset(ordinal: u8, call: u32) -> usize {
    match u32::from(ordinal).cmp(&call.min(u8::MAX.into())) {
        std::cmp::Ordering::Less => 0,
        std::cmp::Ordering::Equal => DUE[usize::from(call == 1)],
        std::cmp::Ordering::Greater => 3,
    }
}

fn lag(since: u16) -> usize {
    match since {
        0 | 1 => 0,
        2..=3 => 1,
        _ => 2,
    }
}

fn cell(shared: bool, offset: usize, since: u16) -> usize {
    let group = usize::from(shared);
    (group * OFFSETS + offset) * LAGS + lag(since)
}

fn row(shared: bool, agent: u16) -> usize {
    usize::from(shared) * AGENTS + usize::from(agent).min(AGENTS - 1)
}

/// Blocks that one of a session's kin holds of the agent that the session calls: how many there are, and how many the
/// call uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Votes {
    agent: u16,
    /// Number of the agent's call in its session.
    call: u32,
    blocks: [[(u32, u32); OFFSETS]; GROUPS],
}

impl Votes {
    pub(crate) const fn new(agent: u16, call: u32) -> Self {
        Self { agent, call, blocks: [[(0, 0); OFFSETS]; GROUPS] }
    }

    pub(crate) fn expect(&mut self, shared: bool, ordinal: u8, n: u32) {
        self.blocks[usize::from(shared)][offset(ordinal, self.call)].0 += n;
    }

    pub(crate) fn used(&mut self, shared: bool, ordinal: u8, n: u32) {
        self.blocks[usize::from(shared)][offset(ordinal, self.call)].1 += n;
    }
}

impl Followers {
    pub(super) fn rows(&self) -> (&Cells, &Agents) {
        (&self.cells, &self.agents)
    }

    /// A call, `since` calls after the last one that used anything of the other session's.
    pub(crate) fn learn(&self, votes: &Votes, since: u16) {
        let vote = |n: u32, used: u32| [UNIT, (UNIT * used.min(n) + n / 2) / n];
        for shared in [false, true] {
            let blocks = &votes.blocks[usize::from(shared)];
            for (offset, &(n, used)) in blocks.iter().enumerate().filter(|(_, (n, _))| *n > 0) {
                self.cells.add_steps(2 * cell(shared, offset, since), vote(n, used), Often::ALWAYS);
            }
            let (n, used) = DUE.iter().fold((0, 0), |sum, &due| (sum.0 + blocks[due].0, sum.1 + blocks[due].1));
            if n > 0 {
                self.agents.add_steps(2 * row(shared, votes.agent), vote(n, used), Often::ALWAYS);
            }
        }
    }

    /// P(the i-th next call of a session is the first to use a segment of its kin's): the agent has been called `calls`
    /// times there, is called again by `weights`, and the session last used anything of the other's `since` calls ago.
    pub(crate) fn first_use(
        &self,
        shared: bool,
        ordinal: u8,
        agent: u16,
        calls: u32,
        since: u16,
        weights: &Weights,
    ) -> [f32; STEPS] {
        let votes = |expected: u16, used: u16| (f32::from(expected) / UNIT as f32, f32::from(used) / UNIT as f32);
        let of_cell = |i: usize| votes(self.cells.get(2 * i), self.cells.get(2 * i + 1));
        // How the agent's blocks compare with all that are due.
        let due = DUE.iter().flat_map(|&due| (0..LAGS).map(move |lag| cell(shared, due, 0) + lag)).map(of_cell);
        let (all, all_used) = due.fold((0.0, 0.0), |sum, more| (sum.0 + more.0, sum.1 + more.1));
        let base = (all_used + 0.1) / (all + 2.0);
        let at = 2 * row(shared, agent);
        let (expected, used) = votes(self.agents.get(at), self.agents.get(at + 1));
        let risk = (used + 4.0 * base) / ((expected + 4.0) * base);
        let (mut left, mut out) = (1.0, [0.0; STEPS]);
        for (further, weights) in (1u16..).zip(&weights.0) {
            let offset = offset(ordinal, calls.saturating_add(further.into()));
            let rates: [f32; LAGS] = std::array::from_fn(|lag| {
                let (expected, used) = of_cell(cell(shared, offset, 0) + lag);
                ((used + 0.1) / (expected + 2.0) * risk).min(0.95)
            });
            // Votes are by the session's calls: at its i-th next one, the last that used anything is i calls longer ago.
            let (mut uses, mut called) = (0.0, 1e-6);
            for ((i, out), weight) in (1u16..).zip(&mut out).zip(weights) {
                let use_then = rates[lag(since.saturating_add(i))] * weight;
                *out += left * use_then;
                (uses, called) = (uses + use_then, called + weight);
            }
            left *= 1.0 - uses / called;
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// P(the agent is called by the i-th next call): certainly by the next, the third and the fifth.
    const WEIGHTS: Weights = Weights([[1., 0., 0., 0., 0., 0.], [0., 0., 1., 0., 0., 0.], [0., 0., 0., 0., 1., 0.]]);

    /// Sessions whose agent uses all that was used by the same call of the agent in another session, and nothing else.
    fn in_step(followers: &Followers, agent: u16, uses: bool) {
        for round in 0..150 {
            let mut votes = Votes::new(agent, 4);
            for ordinal in [2, 4, 5, 9] {
                votes.expect(false, ordinal, 8);
            }
            if uses {
                votes.used(false, 4, 8);
            }
            followers.learn(&votes, 1 + round % 5);
        }
    }

    #[test]
    fn what_the_same_call_of_the_agent_has_used_is_expected_of_it() {
        let followers = Followers::default();
        in_step(&followers, 0, true);
        // The agent has been called three times, the last of which used something of the other session's.
        let first_use = |ordinal| followers.first_use(false, ordinal, 0, 3, 0, &WEIGHTS);
        let (next, third, passed) = (first_use(4), first_use(6), first_use(2));
        assert!(next[0] > 0.8, "{next:?}");
        assert!(third[0] < 0.1 && third[2] < 0.1 && third[4] > 0.7, "{third:?}");
        assert!(passed.iter().sum::<f32>() < 0.1, "{passed:?}");
    }

    #[test]
    fn what_is_used_by_an_agent_that_is_not_called_is_not_expected() {
        let followers = Followers::default();
        in_step(&followers, 0, true);
        let never = followers.first_use(false, 4, 0, 3, 0, &Weights::default());
        assert_eq!(never, [0.0; STEPS]);
    }

    #[test]
    fn first_calls_of_an_agent_are_told_from_later_ones() {
        let followers = Followers::default();
        for _ in 0..50 {
            for (call, uses) in [(1, 8), (2, 0)] {
                let mut votes = Votes::new(0, call);
                votes.expect(false, call as u8, 8);
                votes.used(false, call as u8, uses);
                followers.learn(&votes, 1);
            }
        }
        let at = |ordinal, calls| followers.first_use(false, ordinal, 0, calls, 0, &WEIGHTS)[0];
        assert!(at(1, 0) > 5.0 * at(2, 1), "{} {}", at(1, 0), at(2, 1));
    }

    #[test]
    fn agents_whose_prompts_differ_are_told_from_those_whose_prompts_do_not() {
        let followers = Followers::default();
        in_step(&followers, 0, true);
        in_step(&followers, 1, false);
        let of = |agent| followers.first_use(false, 4, agent, 3, 0, &WEIGHTS)[0];
        assert!(of(0) > 5.0 * of(1), "{} {}", of(0), of(1));
    }

    #[test]
    fn nothing_is_expected_of_kin_before_some_have_been_seen() {
        let first = Followers::default().first_use(false, 4, 0, 3, 0, &WEIGHTS);
        assert!(first.iter().sum::<f32>() < 0.3, "{first:?}");
    }
}
