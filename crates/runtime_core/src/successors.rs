//! Which agent follows which context: a frequency table of fixed size.
//!
//! [`SuccessorTable`] counts `(context, successor)` pairs, where a context is a hash of whatever
//! precedes: the last agent, the last two, a bigram of classes. One type replaces the dense matrix
//! (few agents) and the sparse one (many): its size depends on `SETS` and `WAYS` alone.
//!
//! | part | bytes |
//! |---|---|
//! | ways: context tag 24 bits, count 24, successor 16 | `8 * SETS * WAYS` |
//! | misses of each full set | `SETS` (rounded up to 8) |
//!
//! All successors of a context lie in one set. While a set is not full its counts are exact (every
//! `add` of any thread is in them); a full set keeps its frequent pairs, gives the weakest way to
//! newcomers and forgets under pressure. Two contexts share a tag with probability 2^-24.
//! Give a context with many successors (the empty one: all agents) a table of its own with few sets
//! and many ways.
//!
//! | operation | progress | allocates | worst case |
//! |---|---|---|---|
//! | `add`, `learn` | lock-free | no | `WAYS` loads and one exchange, per retry; every 32nd miss `WAYS` exchanges |
//! | `row`, `count`, `total`, `likeliest` | wait-free | no | `WAYS` loads |
//! | `discount` | lock-free | no | three exchanges a way |
//!
//! Counts are single words, `Relaxed`; a row read during an `add` or a halving mixes before and
//! after, which moves a probability by at most the change itself.

use crate::ids::{spread, AgentId};
use crate::protocol::{set_add, way_count, way_halve, way_key, Added, COUNT_BITS, SUCCESSOR_BITS};
use crate::sync::{AtomicU64, AtomicU8, Ordering::Relaxed};

/// Hash of the empty context (unigram).
pub const NO_CONTEXT: u64 = 0;

/// Hash of the context "last agent".
#[inline]
pub const fn context_of(last: AgentId) -> u64 {
    1 << 32 | last.0 as u64
}

/// Hash of the context "the agent before last, the last agent".
#[inline]
pub const fn context_of_two(previous: AgentId, last: AgentId) -> u64 {
    2 << 32 | (previous.0 as u64) << 16 | last.0 as u64
}

/// The same context where a tool ran after the last call.
#[inline]
pub const fn after_tool(context: u64) -> u64 {
    context | 1 << 48
}

/// Set-associative table of successor counts; see the module's page.
///
/// A set halves when one of its counts reaches `HALVE_AT`, so a row follows the last
/// `HALVE_AT / share of its most frequent successor` observations or so.
#[derive(Debug)]
#[repr(C)]
pub struct SuccessorTable<const SETS: usize, const WAYS: usize, const HALVE_AT: u32 = 1024> {
    ways: [[AtomicU64; WAYS]; SETS],
    misses: [AtomicU8; SETS],
}

impl<const SETS: usize, const WAYS: usize, const HALVE_AT: u32> Default for SuccessorTable<SETS, WAYS, HALVE_AT> {
    fn default() -> Self {
        const {
            assert!(SETS > 0 && WAYS > 0);
            assert!(HALVE_AT >= 2 && HALVE_AT <= 1 << (COUNT_BITS - 1));
        };
        Self {
            ways: std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))),
            misses: std::array::from_fn(|_| AtomicU8::new(0)),
        }
    }
}

impl<const SETS: usize, const WAYS: usize, const HALVE_AT: u32> SuccessorTable<SETS, WAYS, HALVE_AT> {
    /// Set and tag of a context: disjoint bits of one hash.
    #[inline]
    fn locate(context: u64) -> (usize, u64) {
        // Contexts of up to 40 agents lie more evenly in the sets than if these were drawn.
        let hash = spread(context);
        let set = ((hash >> 32) * SETS as u64) >> 32;
        (set as usize, hash & 0xFF_FFFF)
    }

    /// Count `successor` after `context`. `false`: the set was full of stronger pairs, whose weakest
    /// lost half its count instead.
    pub fn add(&self, context: u64, successor: u16) -> bool {
        self.count_votes(context, successor, (1, 1)).counted
    }

    /// [`Self::add`], `votes` times at once, at most `HALVE_AT`.
    #[inline]
    pub(crate) fn add_votes(&self, context: u64, successor: u16, votes: u32) {
        debug_assert!(votes <= HALVE_AT);
        self.count_votes(context, successor, (votes, votes));
    }

    /// [`Self::add`]; returns what [`Self::likeliest`] said before. Where the set is full of other pairs, this counts as so
    /// many misses (none, or a power of two).
    #[inline]
    pub fn learn(&self, context: u64, successor: u16, misses: u32) -> Option<u16> {
        let strongest = self.count_votes(context, successor, (1, misses)).strongest;
        (strongest > 0).then_some(strongest as u16)
    }

    #[inline(always)]
    fn count_votes(&self, context: u64, successor: u16, (votes, misses): (u32, u32)) -> Added {
        let (set, tag) = Self::locate(context);
        let key = tag << SUCCESSOR_BITS | successor as u64;
        set_add(&self.ways[set], &self.misses[set], key, (u64::from(votes), misses), HALVE_AT as u64)
    }

    /// Write the successors of `context` with their counts into `out`; returns how many there are
    /// in `out` (at most `WAYS`). Each successor appears once; the order is that of first claims.
    #[inline]
    pub fn row(&self, context: u64, out: &mut [(u16, u32)]) -> usize {
        let mut length = 0;
        self.visit(context, |successor, count| {
            // A full set under concurrent take-over can hold a pair twice: its counts add up.
            let known = out[..length].iter().position(|(known, _)| *known == successor);
            if let Some(index) = known {
                out[index].1 += count;
            } else if length < out.len() {
                out[length] = (successor, count);
                length += 1;
            }
        });
        length
    }

    /// The most frequent successor of `context`; of equally frequent ones that of the largest number.
    #[inline]
    pub fn likeliest(&self, context: u64) -> Option<u16> {
        let mut strongest = (0, 0);
        self.visit(context, |successor, count| strongest = strongest.max((count, successor)));
        (strongest.0 > 0).then_some(strongest.1)
    }

    /// Brings all counts down to an eighth (at least 1), because what they count is over.
    #[cold]
    pub fn discount(&self) {
        for way in self.ways.iter().flatten() {
            for _ in 0..3 {
                if way_count(way.load(Relaxed)) > 1 {
                    way_halve(way);
                }
            }
        }
    }

    /// How often `successor` was counted after `context`.
    #[inline]
    pub fn count(&self, context: u64, successor: u16) -> u32 {
        let mut sum = 0;
        self.visit(context, |found, count| sum += if found == successor { count } else { 0 });
        sum
    }

    /// How often anything was counted after `context`.
    #[inline]
    pub fn total(&self, context: u64) -> u32 {
        let mut sum = 0;
        self.visit(context, |_, count| sum += count);
        sum
    }

    /// Tells of each way of `context` its successor and count; in a full set under concurrent take-over one may come twice.
    #[inline]
    pub(crate) fn visit(&self, context: u64, mut seen: impl FnMut(u16, u32)) {
        let (set, tag) = Self::locate(context);
        for way in &self.ways[set] {
            let word = way.load(Relaxed);
            if word >> (COUNT_BITS + SUCCESSOR_BITS) == tag && word != 0 {
                seen(word as u16, way_count(word) as u32);
            }
        }
    }

    /// Ways in use over all sets: how full the table is.
    pub fn occupied(&self) -> usize {
        self.ways.iter().flatten().filter(|way| way.load(Relaxed) != 0).count()
    }

    /// Pairs that fit.
    pub const fn capacity(&self) -> usize {
        SETS * WAYS
    }

    /// Count a pair of another table of this type, by the key that [`Self::for_each`] gave, `count` times.
    pub fn absorb(&self, key: u64, count: u32) {
        let (set, pair) = ((key >> 40) as usize, key & ((1 << 40) - 1));
        if let (Some(ways), Some(misses)) = (self.ways.get(set), self.misses.get(set)) {
            for _ in 0..count.min(HALVE_AT) {
                set_add(ways, misses, pair, (1, 1), u64::from(HALVE_AT));
            }
        }
    }

    /// Visit every pair as `(key, count)`, where equal keys of two tables of this type mean equal
    /// pairs; for merging states. Allocation-free; each count as of some moment of the visit.
    pub fn for_each(&self, mut visit: impl FnMut(u64, u32)) {
        for (set, ways) in self.ways.iter().enumerate() {
            for way in ways {
                let word = way.load(Relaxed);
                if word != 0 {
                    let key = (set as u64) << 40 | way_key(word);
                    visit(key, way_count(word) as u32);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::mix;
    use std::collections::HashSet;

    #[test]
    fn contexts_of_few_agents_lie_evenly_in_the_sets_and_those_of_many_have_tags_of_their_own() {
        type Table = SuccessorTable<80, 8>;
        for agents in [4, 6, 8, 10, 12, 16, 20, 24, 32, 40] {
            let pairs = (0..agents * agents).map(|i| context_of_two(AgentId(i / agents), AgentId(i % agents)));
            let contexts: Vec<_> = pairs.chain((0..agents).map(|last| context_of(AgentId(last)))).collect();
            let mut sets = [0.0f64; 80];
            for &context in &contexts {
                sets[Table::locate(context).0] += 1.0;
            }
            let mean = contexts.len() as f64 / 80.0;
            let variance = sets.iter().map(|n| (n - mean).powi(2)).sum::<f64>() / 80.0;
            assert!(variance < mean, "{agents} agents: variance {variance:.2}, {mean:.2} if sets were drawn");
        }
        let pairs = (0..250u16).flat_map(|i| (0..250).map(move |k| context_of_two(AgentId(40 * i), AgentId(40 * k))));
        let contexts: Vec<_> = pairs.chain((0..10_000).map(|last| context_of(AgentId(last)))).collect();
        let places: HashSet<_> = contexts.iter().map(|&context| Table::locate(context)).collect();
        // Of so many tags that are drawn, two are expected to meet.
        assert!(contexts.len() - places.len() < 10, "{} of {}", places.len(), contexts.len());
    }

    #[test]
    fn a_row_lists_each_successor_once_with_its_exact_count() {
        let table = SuccessorTable::<64, 8>::default();
        let context = context_of_two(AgentId(1), AgentId(2));
        for successor in [5, 6, 5, 5, 7] {
            assert!(table.add(context, successor));
        }
        let mut row = [(0, 0); 8];
        let length = table.row(context, &mut row);
        assert_eq!(row[..length], [(5, 3), (6, 1), (7, 1)]);
        assert_eq!(table.total(context), 5);
        assert_eq!(table.count(context, 5), 3);
        assert_eq!(table.total(context_of(AgentId(2))), 0, "another order, another context");
    }

    #[test]
    fn a_short_output_gets_the_first_successors() {
        let table = SuccessorTable::<1, 4>::default();
        for successor in [3, 1, 2] {
            table.add(NO_CONTEXT, successor);
        }
        let mut row = [(0, 0); 2];
        assert_eq!(table.row(NO_CONTEXT, &mut row), 2);
        assert_eq!(row, [(3, 1), (1, 1)]);
    }

    #[test]
    fn halving_keeps_row_order_and_stays_below_the_limit() {
        let table = SuccessorTable::<1, 4, 64>::default();
        for step in 0..1000_u32 {
            table.add(NO_CONTEXT, u16::from(step % 4 == 0));
        }
        let (often, seldom) = (table.count(NO_CONTEXT, 0), table.count(NO_CONTEXT, 1));
        assert!(often < 64 && seldom > 0);
        let ratio = f64::from(often) / f64::from(seldom);
        assert!((2.0..4.5).contains(&ratio), "{often} : {seldom}");
    }

    #[test]
    fn heavy_successors_survive_a_stream_of_new_ones() {
        let table = SuccessorTable::<1, 8>::default();
        for step in 0..20_000_u16 {
            // Four regulars at 1/8 each, and noise in which no id comes twice.
            let regular = step % 8;
            table.add(NO_CONTEXT, if regular < 4 { regular } else { 100 + step });
        }
        for regular in 0..4 {
            assert!(table.count(NO_CONTEXT, regular) >= 4, "{regular} was pushed out");
        }
    }

    #[test]
    fn a_drawn_vote_stands_for_four_and_one_that_was_not_drawn_leaves_a_full_set_alone() {
        let table = SuccessorTable::<1, 2>::default();
        for successor in [1, 1, 2] {
            table.add_votes(NO_CONTEXT, successor, 4);
        }
        assert_eq!((table.count(NO_CONTEXT, 1), table.count(NO_CONTEXT, 2)), (8, 4));
        assert_eq!(table.learn(NO_CONTEXT, 3, 0), Some(1), "it still tells what was expected");
        assert_eq!((table.count(NO_CONTEXT, 2), table.count(NO_CONTEXT, 3)), (4, 0));
        // Four misses at once: 4, 2, 1, and the way is taken over.
        table.add_votes(NO_CONTEXT, 3, 4);
        assert_eq!((table.count(NO_CONTEXT, 2), table.count(NO_CONTEXT, 3)), (0, 4));
    }

    #[test]
    fn a_full_set_follows_drift() {
        let table = SuccessorTable::<1, 8>::default();
        for phase in 0..3_u16 {
            for step in 0..8_000_u16 {
                table.add(NO_CONTEXT, phase * 8 + step % 8);
            }
        }
        let mut row = [(0, 0); 8];
        let length = table.row(NO_CONTEXT, &mut row);
        let current: u32 = row[..length].iter().filter(|(id, _)| *id >= 16).map(|(_, n)| n).sum();
        assert!(current * 10 >= table.total(NO_CONTEXT) * 9, "{row:?}");
    }

    /// `docs/concurrency.md` quotes this: the share of the best eight successors' mass that eight
    /// ways hold, while Zipf-distributed successors change places three times.
    #[test]
    fn eight_ways_hold_most_of_a_drifting_zipf_row() {
        let weight = |rank: usize| 1.0 / (rank + 1) as f64;
        let all: f64 = (0..64).map(weight).sum();
        let best: f64 = (0..8).map(weight).sum();
        let table = SuccessorTable::<1, 8>::default();
        for phase in 0..4 {
            let successor = |rank: usize| ((rank * 37 + phase * 11) % 64) as u16;
            let mut held = 0.0;
            for step in 0..4000 {
                let uniform = mix(phase as u64 * 4000 + step) as f64 / u64::MAX as f64;
                let mut left = uniform * all;
                let drawn = (0..63).find(|rank| {
                    left -= weight(*rank);
                    left < 0.0
                });
                table.add(NO_CONTEXT, successor(drawn.unwrap_or(63)));
                if step >= 2000 {
                    let kept = |rank: &usize| table.count(NO_CONTEXT, successor(*rank)) > 0;
                    held += (0..64).filter(kept).map(weight).sum::<f64>() / 2000.0;
                }
            }
            assert!(held / best > 0.9, "phase {phase}: {held} of {best}");
        }
    }
}
