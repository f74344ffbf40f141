//! Small counters that forget: 16-bit lanes, halved together before they overflow.
//!
//! [`Counters`] is one histogram (or any row of counts that is normalised together), [`Ratio`] is
//! a row of "m hits out of n expected" cells. Both may be fed by any number of threads; decay is by
//! halving, which keeps ratios and makes a count the sum of a window that fades by half each time
//! the largest count doubles.
//!
//! Counts are in units the caller chooses. A vote worth a fraction is a step in sixteenths:
//! [`UNIT`] is one whole vote, [`MAX_STEP`] the largest step.
//!
//! A count that is large already need not see every vote: [`Often`] lets a caller count one in four, fourfold, and save
//! the others.
//!
//! Invariants: nothing is lost that is counted one by one, and no lane carries into its neighbour. A lane is at most
//! `HALVE_AT` plus one step per thread inside `add`, because whoever sees the limit brings the lane
//! below it before returning; with steps of at most 256 and a limit of at most 0x4000, 192 threads
//! fit into the 49,151 of slack.
//!
//! | operation | progress | allocates | worst case |
//! |---|---|---|---|
//! | `Counters::add` | wait-free but for halving (lock-free) | no | one `fetch_add`; halving: `WORDS` exchanges |
//! | `Counters::add_steps` | as `add` | no | a load and a `fetch_add`, two where the lanes lie in two words |
//! | `Ratio::add` | wait-free but for halving (lock-free) | no | one `fetch_add`; halving: one exchange |
//! | reads | wait-free | no | one load a word |
//!
//! A snapshot reads words one by one: it may hold one word from before a halving and the next from
//! after, a factor of two for the moment.

use crate::protocol::{lane, lanes_add, lanes_halve, lanes_put, ratio_add, LANES};
use crate::sync::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// One whole vote when steps are sixteenths.
pub const UNIT: u32 = 16;
/// Largest step of one `add`; larger ones count as this.
pub const MAX_STEP: u32 = 256;
/// A count of so many steps of [`UNIT`] is large: see [`Often`].
pub const OFTEN: u32 = 64 * UNIT;
/// Set in the lowest two lanes by counts of [`OFTEN`] and more, and by no smaller ones.
const TWO_REACHED: u64 = {
    assert!(OFTEN.is_power_of_two());
    (0x1_0000 - OFTEN as u64) * 0x1_0001
};

/// What a vote weighs where counts are small, and where one of its counts is large.
///
/// A caller that draws a weight at random with mean one, and 0 mostly, saves most additions: expectations stay what they
/// are and variances grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Often {
    /// While both counts that a vote goes to are below [`OFTEN`].
    pub small: u32,
    /// Where one of them is not.
    pub large: u32,
}

impl Often {
    /// Every vote counts once.
    pub const ALWAYS: Self = Self { small: 1, large: 1 };

    /// Whether this vote counts nowhere.
    #[inline]
    pub const fn is_never(self) -> bool {
        self.small | self.large == 0
    }

    /// The weight of a vote that has been drawn and counts as much everywhere.
    #[inline(always)]
    pub(crate) fn drawn(self) -> Option<u32> {
        (self.small == self.large && self.large > 1).then_some(self.large)
    }

    /// The weight for counts of which the two lanes are the lowest of `lanes`.
    #[inline(always)]
    const fn weight(self, lanes: u64) -> u32 {
        if lanes & TWO_REACHED == 0 {
            self.small
        } else {
            self.large
        }
    }
}

/// Steps at a count and the one after it, as they lie in words: worked out once for several rows alike.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lanes {
    word: usize,
    addend: u64,
    /// What goes to the word after.
    beyond: u64,
}

impl Lanes {
    /// `steps[0]` at `index` and `steps[1]` at the count after it, `weight` times (each at most [`MAX_STEP`] then).
    #[inline(always)]
    pub(crate) fn new(index: usize, steps: [u32; 2], weight: u32) -> Self {
        debug_assert!(steps.iter().all(|step| step * weight <= MAX_STEP));
        let both = u64::from((steps[0] | steps[1] << 16) * weight);
        let shift = index % LANES * 16;
        let beyond = if shift == 48 { both >> 16 } else { 0 };
        Self { word: index / LANES, addend: both << shift, beyond }
    }
}

/// A histogram of `4 * WORDS` 16-bit counts (8 bytes a word) that halves as a whole when one count
/// reaches `HALVE_AT`. For several independent rows use an array of these.
#[derive(Debug)]
#[repr(C)]
pub struct Counters<const WORDS: usize, const HALVE_AT: u32 = 0x4000> {
    words: [AtomicU64; WORDS],
}

impl<const WORDS: usize, const HALVE_AT: u32> Default for Counters<WORDS, HALVE_AT> {
    fn default() -> Self {
        const { assert!(HALVE_AT >= 2 && HALVE_AT <= 0x4000) };
        Self { words: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

impl<const WORDS: usize, const HALVE_AT: u32> Counters<WORDS, HALVE_AT> {
    /// How many counts there are.
    pub const LEN: usize = WORDS * LANES;

    /// Count one at `index`. An index out of range counts in the last lane.
    #[inline]
    pub fn add(&self, index: usize) {
        self.add_step(index, 1);
    }

    /// Count `step` (at most [`MAX_STEP`]) at `index`.
    #[inline]
    pub fn add_step(&self, index: usize, step: u32) {
        let index = index.min(Self::LEN - 1);
        let addend = (step.min(MAX_STEP) as u64) << (index % LANES * 16);
        lanes_add(&self.words, index / LANES, addend, HALVE_AT as u64);
    }

    /// Count `steps[0]` at `index` and `steps[1]` at the lane after it, if there is one, as often as `often` says (each at
    /// most [`MAX_STEP`] then).
    #[inline(always)]
    pub fn add_steps(&self, index: usize, steps: [u32; 2], often: Often) {
        let index = index.min(Self::LEN - 1);
        let (word, shift) = (index / LANES, (index % LANES * 16) as u32);
        if shift == 48 {
            return self.add_across(word, steps, often);
        }
        let weight = often.weight(self.words[word].load(Relaxed) >> shift);
        if weight > 0 {
            let [first, second] = steps.map(|step| (step * weight).min(MAX_STEP) as u64);
            self.count_weighed(word, (first | second << 16) << shift, weight);
        }
    }

    /// Counts what was drawn, by load and store.
    #[inline(always)]
    pub(crate) fn put(&self, lanes: Lanes) {
        if lanes.word < WORDS {
            lanes_put(&self.words, lanes.word, lanes.addend, HALVE_AT as u64);
        }
        if lanes.beyond > 0 && lanes.word + 1 < WORDS {
            lanes_put(&self.words, lanes.word + 1, lanes.beyond, HALVE_AT as u64);
        }
    }

    #[inline(always)]
    fn count_weighed(&self, word: usize, addend: u64, weight: u32) {
        match weight {
            _ if addend == 0 => {}
            1 => lanes_add(&self.words, word, addend, HALVE_AT as u64),
            // A sample already.
            _ => lanes_put(&self.words, word, addend, HALVE_AT as u64),
        }
    }

    /// [`Self::add_steps`] to the last lane of a word and the first of the next.
    fn add_across(&self, word: usize, steps: [u32; 2], often: Often) {
        let next = self.words.get(word + 1).map_or(0, |next| next.load(Relaxed) << 16);
        let weight = often.weight(self.words[word].load(Relaxed) >> 48 | next);
        let [first, second] = steps.map(|step| (step * weight).min(MAX_STEP) as u64);
        self.count_weighed(word, first << 48, weight);
        if word + 1 < WORDS {
            self.count_weighed(word + 1, second, weight);
        }
    }

    /// The count at `index`, 0 if out of range.
    #[inline]
    pub fn get(&self, index: usize) -> u16 {
        let word = self.words.get(index / LANES);
        word.map_or(0, |word| lane(word.load(Relaxed), (index % LANES * 16) as u32) as u16)
    }

    /// Copy the counts into `out`, as many as fit.
    #[inline]
    pub fn snapshot(&self, out: &mut [u16]) {
        for (word, lanes) in self.words.iter().zip(out.chunks_mut(LANES)) {
            let word = word.load(Relaxed);
            for (position, value) in lanes.iter_mut().enumerate() {
                *value = lane(word, position as u32 * 16) as u16;
            }
        }
    }

    /// Sum of all counts.
    #[inline]
    pub fn total(&self) -> u32 {
        let sum = |word: u64| (0..LANES).map(|at| lane(word, at as u32 * 16) as u32).sum::<u32>();
        self.words.iter().map(|word| sum(word.load(Relaxed))).sum()
    }

    /// Halve every count (rounded down), losing no addition that arrives meanwhile.
    pub fn halve(&self) {
        for word in &self.words {
            lanes_halve(word);
        }
    }
}

/// `N` cells of "hits out of expected" (4 bytes each); a cell halves when its expected count reaches
/// `HALVE_AT`. Every reader sees `hits <= expected`, because one word carries both.
#[derive(Debug)]
#[repr(C)]
pub struct Ratio<const N: usize, const HALVE_AT: u32 = 0x4000> {
    cells: [AtomicU32; N],
}

impl<const N: usize, const HALVE_AT: u32> Default for Ratio<N, HALVE_AT> {
    fn default() -> Self {
        const { assert!(HALVE_AT >= 2 && HALVE_AT <= 0x4000) };
        Self { cells: std::array::from_fn(|_| AtomicU32::new(0)) }
    }
}

impl<const N: usize, const HALVE_AT: u32> Ratio<N, HALVE_AT> {
    /// Record `hits` out of `expected` (at most [`MAX_STEP`], hits at most expected) at `index`;
    /// out of range counts in the last cell.
    #[inline]
    pub fn add(&self, index: usize, expected: u32, hits: u32) {
        let expected = expected.min(MAX_STEP);
        let cell = &self.cells[index.min(N - 1)];
        ratio_add(cell, expected, hits.min(expected), HALVE_AT);
    }

    /// Record one vote (in units of [`UNIT`]) of a group of `blocks`, `hits` of which were hit.
    #[inline]
    pub fn vote(&self, index: usize, blocks: u32, hits: u32) {
        if blocks > 0 {
            let share = UNIT as u64 * hits.min(blocks) as u64 + blocks as u64 / 2;
            self.add(index, UNIT, (share / blocks as u64) as u32);
        }
    }

    /// `(expected, hits)` at `index`, zeros if out of range.
    #[inline]
    pub fn get(&self, index: usize) -> (u16, u16) {
        let word = self.cells.get(index).map_or(0, |cell| cell.load(Relaxed));
        ((word >> 16) as u16, word as u16)
    }

    /// The sum of [`Self::get`] over `n` cells from `first`.
    #[inline]
    pub fn sum(&self, first: usize, n: usize) -> (u32, u32) {
        let words = self.cells.iter().skip(first).take(n).map(|cell| cell.load(Relaxed));
        words.fold((0, 0), |(expected, hits), word| (expected + (word >> 16), hits + (word & 0xFFFF)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Not drawn; small counts see it all the same.
    const EXACT: Often = Often { small: 1, large: 0 };

    #[test]
    fn counts_are_kept_per_lane() {
        let counters = Counters::<2>::default();
        for index in [0, 3, 3, 4, 7, 7, 7] {
            counters.add(index);
        }
        let mut counts = [9; 8];
        counters.snapshot(&mut counts);
        assert_eq!(counts, [1, 0, 0, 2, 1, 0, 0, 3]);
        assert_eq!((counters.get(7), counters.get(8), counters.total()), (3, 0, 7));
    }

    #[test]
    fn a_sum_is_that_of_its_cells() {
        let ratio = Ratio::<8>::default();
        (0..8).for_each(|cell| ratio.add(cell, 16, cell as u32));
        assert_eq!((ratio.sum(2, 3), ratio.sum(6, 9), ratio.sum(8, 1)), ((48, 9), (32, 13), (0, 0)));
    }

    #[test]
    fn reaching_the_limit_halves_every_lane_and_keeps_neighbours_apart() {
        let counters = Counters::<2, 256>::default();
        for _ in 0..100 {
            counters.add(2);
            counters.add(6);
        }
        for _ in 0..256 {
            counters.add(3);
        }
        let mut counts = [0; 8];
        counters.snapshot(&mut counts);
        assert_eq!(counts, [0, 0, 50, 128, 0, 0, 50, 0]);
    }

    #[test]
    fn two_lanes_count_together_within_a_word_and_across_two() {
        let counters = Counters::<2>::default();
        for index in [0, 2, 3, 6, 7, 99] {
            counters.add_steps(index, [5, 11], EXACT);
        }
        let mut counts = [0; 8];
        counters.snapshot(&mut counts);
        // What would lie beyond the last lane is not counted.
        assert_eq!(counts, [5, 11, 5, 16, 11, 0, 5, 21]);
    }

    #[test]
    fn small_counts_are_exact_and_large_ones_right_on_average() {
        let counters = Counters::<2>::default();
        for vote in 1..=64 {
            counters.add_steps(1, [UNIT, 0], EXACT);
            assert_eq!(u32::from(counters.get(1)), vote * UNIT);
        }
        counters.add_steps(1, [UNIT, UNIT], EXACT);
        assert_eq!((counters.get(1), counters.get(2)), (64 * 16, 0), "a vote that is not drawn");
        for vote in 0..800 {
            let large = if crate::ids::mix(vote) % 4 == 0 { 4 } else { 0 };
            counters.add_steps(1, [UNIT, 0], Often { large, ..EXACT });
        }
        let votes = counters.get(1) / UNIT as u16;
        assert!((804..=924).contains(&votes), "{votes} of 864");
    }

    #[test]
    fn out_of_range_bins_count_in_the_last() {
        let counters = Counters::<1>::default();
        counters.add(usize::MAX);
        assert_eq!(counters.get(3), 1);
        let ratio = Ratio::<2>::default();
        ratio.add(9, 3, 1);
        assert_eq!((ratio.get(1), ratio.get(9)), ((3, 1), (0, 0)));
    }

    #[test]
    fn a_ratio_never_exceeds_one_and_survives_halving() {
        let ratio = Ratio::<1, 64>::default();
        for _ in 0..1000 {
            ratio.add(0, 3, 2);
            let (expected, hits) = ratio.get(0);
            assert!(hits <= expected && expected < 64);
        }
        let (expected, hits) = ratio.get(0);
        let share = f64::from(hits) / f64::from(expected);
        assert!((share - 2.0 / 3.0).abs() < 0.05, "{hits} / {expected}");
    }

    #[test]
    fn a_group_of_blocks_is_one_vote() {
        let ratio = Ratio::<1>::default();
        ratio.vote(0, 1000, 250);
        ratio.vote(0, 0, 0);
        assert_eq!(ratio.get(0), (16, 4));
    }
}
