//! Content: will the owner's next call use a segment again?
//!
//! Per agent a, misses k (calls of the owner since the last one that used the segment, 0 to 7) and class c (0 to 11),
//! count expected and kept promises: at a call of the lane, all blocks of one (k, c) are one vote, of which the share
//! that the prompt uses is a hit. Up to one miss, an agent that calls again at once and one
//! that calls after others of its session are told apart: the former goes on with what it did (a tool has answered),
//! the latter often starts anew. With pooled counts over all agents as prior:
//!
//! - r0 = (H_k + 1/4) / (E_k + 1/2), over all agents and classes,
//! - r1 = (H_kc + 2 r0) / (E_kc + 2), over all agents,
//! - r2 = (H_akc + 2 q) / (E_akc + 2) with q = r1, or the mean of r1 and the agent's own rate at k where (a, k, c) is empty.

use crate::histogram::{Ratio, UNIT};

use super::Config;

/// Misses distinguished; the last class collects all further ones.
pub(crate) const MISSES: usize = 8;
/// Misses at which calls at once and later ones are told apart, and the slots that all take.
const TOLD_APART: usize = 2;
const SLOTS: usize = MISSES + TOLD_APART;
/// Content classes.
pub(crate) const CLASSES: usize = 12;
/// Agents with counts of their own.
pub(crate) const ROWS: usize = if cfg!(feature = "unbounded") { 10_240 } else { 11 };

/// A decoded answer that no prompt has repeated yet.
pub(crate) const OUTPUT: u8 = 0;
/// Used by two calls of the session.
const TWICE: u8 = 1;
/// Used by three or four.
const FEW: u8 = 2;
/// Used by five or more.
const OFTEN: u8 = 3;
/// First use by the session, eight classes by distance from the prompt's end.
const FIRST: u8 = 4;

/// Class of a block that a session uses for the first time, `distance` blocks before the prompt's end.
pub(crate) fn first_class(distance: u32) -> u8 {
    FIRST + (distance + 1).ilog2().min(7) as u8
}

/// Class of a block that its session has used `touches` times.
pub(crate) fn used_class(touches: u8) -> u8 {
    match touches {
        0..=2 => TWICE,
        3..=4 => FEW,
        _ => OFTEN,
    }
}

/// One for each agent with counts of its own.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct PerAgent<T>([T; ROWS]);

impl<T: Default> Default for PerAgent<T> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| T::default()))
    }
}

impl<T> std::ops::Deref for PerAgent<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

/// Votes by slot and class.
type Row = Ratio<{ SLOTS * CLASSES }>;

/// P(the next calls of a lane use a segment).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    /// The first one, where nobody else of the session has called since the lane did; and else.
    pub(crate) at_once: f32,
    pub(crate) later: f32,
    /// The two after that, a miss assumed each time.
    pub(crate) second: f32,
    pub(crate) third: f32,
}

/// Kept promises by agent, misses and class.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Content {
    pooled: Row,
    rows: PerAgent<Row>,
}

impl Content {
    /// One call's vote on `blocks` blocks of a cell, of which it used `hits`; `later`: others of the session have called
    /// since the lane did.
    pub(crate) fn vote(&self, agent: u16, later: bool, misses: usize, class: usize, blocks: u32, hits: u32) {
        let cell = slot(misses, later) * CLASSES + class;
        self.pooled.vote(cell, blocks, hits);
        if let Some(row) = self.rows.get(agent as usize) {
            row.vote(cell, blocks, hits);
        }
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = &Row> {
        std::iter::once(&self.pooled).chain(self.rows.iter())
    }

    /// Votes at `misses`, of one class or of all.
    fn both(row: &Row, misses: usize, class: Option<usize>) -> (f32, f32) {
        let slots = slot(misses, false)..=slot(misses, true);
        let classes = class.map_or(0..CLASSES, |class| class..class + 1);
        slots.flat_map(|slot| classes.clone().map(move |class| cell(row, slot, class))).fold((0.0, 0.0), add)
    }

    /// Votes expected and kept at `misses`, of an agent with counts of its own or of all agents.
    pub(crate) fn totals(&self, agent: Option<u16>, misses: usize) -> (f32, f32) {
        let row = agent.and_then(|agent| self.rows.get(agent as usize)).unwrap_or(&self.pooled);
        Self::both(row, misses, None)
    }

    /// Rates of `agent` for `class` at `misses`, by whether the agent's next call is the session's next after its last.
    pub(crate) fn rates(&self, agent: u16, misses: u32, class: u8, config: &Config) -> Rates {
        let at = |misses| row(misses, config);
        let class = config.content_classes.then_some(usize::from(class));
        let (first, second, third) = (at(misses), at(misses.saturating_add(1)), at(misses.saturating_add(2)));
        Rates {
            at_once: self.rate(agent, first, false, class),
            later: self.rate(agent, first, true, class),
            second: self.rate(agent, second, true, class),
            third: self.rate(agent, third, true, class),
        }
    }

    /// Rate of `agent` for `class` at `misses` at a call that comes at once, or later.
    pub(crate) fn rate_now(&self, agent: u16, misses: u32, later: bool, class: u8, config: &Config) -> f32 {
        self.rate(agent, row(misses, config), later, config.content_classes.then_some(usize::from(class)))
    }

    fn rate(&self, agent: u16, misses: usize, later: bool, class: Option<usize>) -> f32 {
        let of_slot = |row: &Row| of_slot(row, slot(misses, later));
        let told = |row: &Row| class.map_or_else(|| of_slot(row), |class| cell(row, slot(misses, later), class));
        let (expected, hit) = of_slot(&self.pooled);
        let all = (hit + 0.25) / (expected + 0.5);
        let mut rate = if class.is_some() { refine(told(&self.pooled), all) } else { all };
        let Some(row) = self.rows.get(agent as usize) else { return rate };
        let own = told(row);
        if own.0 < 0.5 {
            rate = f32::midpoint(rate, refine(of_slot(row), all));
        }
        refine(own, rate)
    }
}

/// One step of the back-off.
fn refine((expected, hit): (f32, f32), prior: f32) -> f32 {
    (hit + 2.0 * prior) / (expected + 2.0)
}

fn add(sum: (f32, f32), more: (f32, f32)) -> (f32, f32) {
    (sum.0 + more.0, sum.1 + more.1)
}

fn row(misses: u32, config: &Config) -> usize {
    if config.superseded {
        (misses as usize).min(MISSES - 1)
    } else {
        0
    }
}

fn slot(misses: usize, later: bool) -> usize {
    if misses < TOLD_APART {
        2 * misses + usize::from(later)
    } else {
        misses + TOLD_APART
    }
}

/// Votes of all classes: in integers, which come to the same as the sum of the [`cell`]s, exactly.
fn of_slot(row: &Row, slot: usize) -> (f32, f32) {
    let (expected, hit) = row.sum(slot * CLASSES, CLASSES);
    (expected as f32 / UNIT as f32, hit as f32 / UNIT as f32)
}

fn cell(row: &Row, slot: usize, class: usize) -> (f32, f32) {
    let (expected, hit) = row.get(slot * CLASSES + class);
    (f32::from(expected) / UNIT as f32, f32::from(hit) / UNIT as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_the_votes_and_fall_with_misses() {
        let content = Content::default();
        for _ in 0..50 {
            content.vote(0, true, 0, FIRST as usize, 10, 9);
            content.vote(0, true, 1, FIRST as usize, 10, 1);
        }
        let rates = content.rates(0, 0, FIRST, &Config::default());
        assert!((rates.later - 0.9).abs() < 0.03, "{rates:?}");
        assert!(rates.second < 0.2, "{rates:?}");
    }

    #[test]
    fn an_agent_that_calls_again_at_once_is_told_from_one_that_calls_after_others() {
        let content = Content::default();
        for _ in 0..50 {
            content.vote(0, false, 0, FIRST as usize, 16, 16);
            content.vote(0, true, 0, FIRST as usize, 16, 2);
        }
        let rates = content.rates(0, 0, FIRST, &Config::default());
        assert!(rates.at_once > 0.9 && rates.later < 0.2, "{rates:?}");
        assert!((content.totals(Some(0), 0).1 / content.totals(Some(0), 0).0 - 9.0 / 16.0).abs() < 0.01);
    }

    #[test]
    fn an_agent_without_counts_gets_the_pooled_rate() {
        let content = Content::default();
        for _ in 0..50 {
            content.vote(0, true, 0, 3, 1, 1);
        }
        let config = Config::default();
        assert!(content.rates(900, 0, 3, &config).later > 0.9);
        assert!(content.rates(5, 0, 3, &config).later > 0.8);
    }
}
