//! Content: how much likelier a block is used again than its cell says.
//!
//! A cell of `content.rs` knows how often an agent uses its blocks again. Its sessions differ in that, and so do the
//! blocks of one cell:
//!
//! - *habit*: what the lane did when it called last (it used nearly all, some, or hardly any of what its call before had
//!   used, or has not called twice), how many calls in a row it had then made at once, nobody else of its session calling in
//!   between (none, one, more), and how many calls of its session ago that was. For blocks that this call used.
//! - *place* in the lane's last prompt, in fifths, or behind it;
//! - *sessions* that have used the block: one, two, more.
//!
//! Each is a factor on the odds, by what was seen and what was due: used / due to be used x due to be passed over / passed
//! over. What was due is what the cell and the other factors say (indirect standardisation, as in `sharing.rs`). At a call of
//! the lane all its blocks in one place, and so on, are one vote.

use crate::histogram::{Counters, Often, UNIT};
use crate::ids::mix;

use super::sharing::RATIO_HALVES;
use super::Config;

/// What a lane's last call used of what the one before had used: hardly any, some, nearly all; or there was none before.
const KEPT: usize = 4;
/// Calls at once in a row up to its last one: that one came after others, or at once, or so did the one before it.
const RUNS: usize = 3;
/// Calls of the session since the lane's last one: none, one, more.
const SINCE: usize = 3;
/// Fifths of the prompt, and what follows it.
const PLACES: usize = 6;
/// Sessions: one, two, more.
const DEGREES: usize = 3;
/// Places and sessions, for blocks that the lane's last call used and for those it did not.
const BLOCKS: usize = 2 * (PLACES + DEGREES);
const CELLS: usize = KEPT * RUNS * SINCE + BLOCKS;
/// Weight, in votes, of "as the cell says".
const PRIOR: f32 = 1.0;

/// How a cell's votes are kept: used, due to be used, passed over, due to be passed over.
type Cell = Counters<1, RATIO_HALVES>;

/// See the module's page.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Odds([Cell; CELLS]);

impl Default for Odds {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Cell::default()))
    }
}

/// What a lane's last call was like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Habit {
    kept: u8,
    run: u8,
}

impl Habit {
    /// Of a lane that has not called twice.
    pub(crate) const NEW: Self = Self { kept: KEPT as u8 - 1, run: 0 };

    /// After one more call, which used so much, see [`Votes::kept`].
    pub(crate) fn next(self, kept: u8, at_once: bool) -> Self {
        Self { kept, run: if at_once { (self.run + 1).min(RUNS as u8 - 1) } else { 0 } }
    }

    fn cell(self, since: u16) -> usize {
        let lane = usize::from(self.kept) * RUNS + usize::from(self.run);
        BLOCKS + lane * SINCE + usize::from(since).min(SINCE - 1)
    }
}

/// Cells of a block: its place and its sessions.
fn block(misses: u32, depth: u32, prompt_len: u32, degree: u8) -> [usize; 2] {
    let passed = usize::from(misses > 0);
    let place = (u64::from(depth) * 5 / u64::from(prompt_len.max(1))).min(PLACES as u64 - 1) as usize;
    let sessions = usize::from(degree.clamp(1, DEGREES as u8)) - 1;
    [2 * place + passed, 2 * (PLACES + sessions) + passed]
}

/// A probability whose odds are multiplied.
pub(crate) fn adjusted(probability: f32, odds: f32) -> f32 {
    let p = probability.clamp(0.001, 0.999);
    p * odds / (1.0 - p + p * odds)
}

impl Odds {
    pub(super) fn rows(&self) -> impl Iterator<Item = &Cell> {
        self.0.iter()
    }

    fn of(&self, cell: usize) -> f32 {
        let [used, due, passed, passed_due] =
            std::array::from_fn(|i| f32::from(self.0[cell].get(i)) / UNIT as f32 + PRIOR);
        (used * passed_due / (due * passed)).clamp(0.01, 100.0)
    }

    /// Of a block that its lane has passed over `misses` times since it used it, by place and sessions.
    pub(crate) fn of_block(&self, misses: u32, depth: u32, prompt_len: u32, degree: u8, config: &Config) -> f32 {
        if config.content_odds {
            block(misses, depth, prompt_len, degree).map(|cell| self.of(cell)).iter().product()
        } else {
            1.0
        }
    }

    /// Of the blocks that a lane's last call has used, by that call, if its next one comes after `since` others of its
    /// session.
    pub(crate) fn of_habit(&self, habit: Habit, since: u16, config: &Config) -> f32 {
        if config.content_odds {
            self.of(habit.cell(since))
        } else {
            1.0
        }
    }

    /// A call's votes; `seed`: any number that differs from call to call.
    pub(crate) fn learn(&self, votes: &Votes, seed: u64) {
        for (i, vote) in votes.blocks.iter().enumerate().filter(|(_, vote)| vote.n > 0) {
            let cell = if i == BLOCKS { votes.habit } else { i };
            // Counts are whole, shares are not: both are rounded up as often as they must be, and together.
            let chance = (mix(seed ^ cell as u64) >> 40) as f32 / (1u64 << 24) as f32;
            let steps = |blocks: f32| ((UNIT as f32 * blocks / vote.n as f32 + chance) as u32).min(UNIT);
            let (used, due) = (steps(vote.used.min(vote.n) as f32), steps(vote.due));
            self.0[cell].add_steps(0, [used, due], Often::ALWAYS);
            self.0[cell].add_steps(2, [UNIT - used, UNIT - due], Often::ALWAYS);
        }
    }
}

/// Blocks that are told apart no further: how many there are, how many the call uses and how many were due.
#[derive(Clone, Copy, Debug, Default)]
struct Vote {
    n: u32,
    used: u32,
    due: f32,
}

/// A lane's blocks at one of its calls.
#[derive(Debug)]
pub(crate) struct Votes {
    habit: usize,
    prompt_len: u32,
    /// Those of places and sessions, then the one of the habit.
    odds: [f32; BLOCKS + 1],
    blocks: [Vote; BLOCKS + 1],
}

impl Votes {
    /// Of a call after `since` others of its session since the lane's last one, whose prompt had `prompt_len` blocks.
    pub(crate) fn new(odds: &Odds, habit: Habit, since: u16, prompt_len: u32) -> Self {
        let habit = habit.cell(since);
        let odds = std::array::from_fn(|i| odds.of(if i == BLOCKS { habit } else { i }));
        Self { habit, prompt_len, odds, blocks: [Vote::default(); BLOCKS + 1] }
    }

    fn cells(&self, misses: u32, depth: u32, degree: u8) -> impl Iterator<Item = usize> + use<> {
        let habit = (misses == 0).then_some(BLOCKS);
        block(misses, depth, self.prompt_len, degree).into_iter().chain(habit)
    }

    /// There are `n` blocks, which the call uses with a probability of `rate` for all their cell knows.
    pub(crate) fn expect(&mut self, misses: u32, depth: u32, degree: u8, rate: f32, n: u32) {
        let all: f32 = self.cells(misses, depth, degree).map(|cell| self.odds[cell]).product();
        for cell in self.cells(misses, depth, degree) {
            let vote = &mut self.blocks[cell];
            vote.n += n;
            vote.due += n as f32 * adjusted(rate, all / self.odds[cell]);
        }
    }

    /// What the call uses of what the one before has used, see [`Habit::next`]. None where nothing is known of that.
    pub(crate) fn kept(&self) -> Option<u8> {
        let Vote { n, used, .. } = self.blocks[BLOCKS];
        match (u64::from(used) * 4).checked_div(u64::from(n))? {
            0 => Some(0),
            1 | 2 => Some(1),
            _ => Some(2),
        }
    }

    /// The call uses `n` of them.
    pub(crate) fn used(&mut self, misses: u32, depth: u32, degree: u8, n: u32) {
        for cell in self.cells(misses, depth, degree) {
            self.blocks[cell].used += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: fn() -> Config = Config::default;

    fn kept(kept: u8) -> Habit {
        Habit { kept, run: 0 }
    }

    /// Calls of lanes with a habit: of ten blocks in the first fifth of the prompt and as many behind
    /// it, of which their cell says `rate`, they use so many.
    fn calls(odds: &Odds, habit: Habit, rate: f32, used: impl Fn(u64) -> [u32; 2]) {
        for call in 0..300 {
            let mut votes = Votes::new(odds, habit, 0, 50);
            for (depth, n) in [0, 50].into_iter().zip(used(call)) {
                votes.expect(0, depth, 1, rate, 10);
                votes.used(0, depth, 1, n);
            }
            odds.learn(&votes, call);
        }
    }

    #[test]
    fn a_lane_does_what_lanes_of_its_habit_do() {
        let odds = Odds::default();
        for _ in 0..4 {
            calls(&odds, kept(0), 0.5, |_| [0, 0]);
            calls(&odds, kept(2), 0.5, |_| [10, 10]);
        }
        let rate = |all, since| adjusted(0.5, odds.of_habit(kept(all), since, &CONFIG()));
        assert!(rate(0, 0) < 0.1 && rate(2, 0) > 0.9, "{} {}", rate(0, 0), rate(2, 0));
        assert_eq!(rate(0, 9), 0.5, "nothing was seen of lanes that called so long ago");
        let off = Config { content_odds: false, ..CONFIG() };
        assert_eq!((odds.of_habit(kept(0), 0, &off), odds.of_block(0, 0, 50, 1, &off)), (1.0, 1.0));
    }

    #[test]
    fn a_lane_that_has_called_twice_in_a_row_is_told_from_one_that_has_called_once() {
        let odds = Odds::default();
        let once = Habit::NEW.next(2, false);
        let twice = once.next(2, true);
        for _ in 0..4 {
            calls(&odds, once, 0.5, |_| [10, 10]);
            calls(&odds, twice, 0.5, |_| [0, 0]);
        }
        let rate = |habit: Habit| adjusted(0.5, odds.of_habit(habit, 0, &CONFIG()));
        assert!(rate(once) > 0.9 && rate(twice) < 0.1, "{} {}", rate(once), rate(twice));
        assert_eq!(rate(twice.next(2, true)), 0.5, "three in a row have not been seen");
        assert_eq!(twice.next(2, true).next(2, true), twice.next(2, true));
        assert_eq!(twice.next(2, false), once);
    }

    #[test]
    fn a_place_that_is_used_is_told_from_one_that_is_not() {
        let odds = Odds::default();
        calls(&odds, kept(1), 0.5, |_| [10, 0]);
        let rate = |depth| {
            let all = odds.of_block(0, depth, 50, 1, &CONFIG()) * odds.of_habit(kept(1), 0, &CONFIG());
            adjusted(0.5, all)
        };
        assert!(rate(9) > 0.9 && rate(50) < 0.1, "{} {}", rate(9), rate(50));
        // What the habit says is not said twice.
        assert!((adjusted(0.5, odds.of_habit(kept(1), 0, &CONFIG())) - 0.5).abs() < 0.1);
    }

    #[test]
    fn where_the_cell_is_right_nothing_is_added() {
        let odds = Odds::default();
        for rate in [5u32, 50, 98] {
            // So many calls in a hundred use everything, the others nothing.
            for _ in 0..3 {
                calls(&odds, kept(2), rate as f32 / 100.0, |call| {
                    [if mix(call) % 100 < u64::from(rate) { 10 } else { 0 }; 2]
                });
            }
            let p = adjusted(rate as f32 / 100.0, odds.of_habit(kept(2), 0, &CONFIG()));
            assert!((p - rate as f32 / 100.0).abs() < 0.04, "{rate} {p}");
        }
    }

    #[test]
    fn what_a_call_kept_is_the_habit() {
        let odds = Odds::default();
        let kept = |used| {
            let mut votes = Votes::new(&odds, Habit::NEW, 0, 50);
            votes.expect(0, 0, 1, 0.5, 8);
            votes.expect(3, 20, 1, 0.5, 100);
            votes.used(0, 0, 1, used);
            votes.kept()
        };
        assert_eq!([0, 1, 2, 5, 6, 8].map(kept), [Some(0), Some(0), Some(1), Some(1), Some(2), Some(2)]);
        assert_eq!(Votes::new(&odds, Habit::NEW, 0, 50).kept(), None);
    }
}
