//! Content: will the owner's next call use a segment again?
//!
//! Per agent a, misses k (calls of the owner since the last one that used the segment, 0 to 7) and class c (0 to 15),
//! count expected and kept promises: at a call of the lane, all blocks of one (k, c) are one vote, of which the share
//! that the prompt uses is a hit. With pooled counts over all agents as prior:
//!
//! - r0 = (H_k + 1/4) / (E_k + 1/2), over all agents and classes,
//! - r1 = (H_kc + 2 r0) / (E_kc + 2), over all agents,
//! - r2 = (H_akc + 2 q) / (E_akc + 2) with q = r1, or the mean of r1 and the agent's own rate at k where (a, k, c) is empty.

use crate::histogram::{Ratio, UNIT};

use super::Config;

/// Misses distinguished; the last class collects all further ones.
pub(crate) const MISSES: usize = 8;
/// Content classes.
pub(crate) const CLASSES: usize = 16;
/// Agents with counts of their own.
pub(crate) const ROWS: usize = if cfg!(feature = "unbounded") { 10_240 } else { 11 };

/// A decoded answer that no prompt has repeated yet.
pub(crate) const OUTPUT: u8 = 1;
/// Used by two calls of the session.
const TWICE: u8 = 3;
/// Used by three or four.
const FEW: u8 = 4;
/// Used by five or more.
const OFTEN: u8 = 5;
/// First use by the session, eight classes by distance from the prompt's end.
const FIRST: u8 = 8;

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

/// Kept promises by agent, misses and class.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Content {
    pooled: Ratio<{ MISSES * CLASSES }>,
    rows: PerAgent<Ratio<{ MISSES * CLASSES }>>,
}

impl Content {
    /// One call's vote on `blocks` blocks of a cell, of which it used `hits`.
    pub(crate) fn vote(&self, agent: u16, misses: usize, class: usize, blocks: u32, hits: u32) {
        let cell = misses * CLASSES + class;
        self.pooled.vote(cell, blocks, hits);
        if let Some(row) = self.rows.get(agent as usize) {
            row.vote(cell, blocks, hits);
        }
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = &Ratio<{ MISSES * CLASSES }>> {
        std::iter::once(&self.pooled).chain(self.rows.iter())
    }

    fn sums(row: &Ratio<{ MISSES * CLASSES }>, misses: usize) -> (f32, f32) {
        (0..CLASSES).fold((0.0, 0.0), |(e, h), class| {
            let (expected, hit) = cell(row, misses, class);
            (e + expected, h + hit)
        })
    }

    /// Votes expected and kept at `misses`, of an agent with counts of its own or of all agents.
    pub(crate) fn totals(&self, agent: Option<u16>, misses: usize) -> (f32, f32) {
        Self::sums(agent.and_then(|agent| self.rows.get(agent as usize)).unwrap_or(&self.pooled), misses)
    }

    /// Rates of `agent` for `class` at `misses` and the two calls after, a miss assumed each time.
    pub(crate) fn rates(&self, agent: u16, misses: u32, class: u8, config: &Config) -> [f32; 3] {
        let class = if config.content_classes { class as usize } else { 0 };
        std::array::from_fn(|further| {
            let misses = if config.superseded { (misses as usize + further).min(MISSES - 1) } else { 0 };
            let (expected, hit) = Self::sums(&self.pooled, misses);
            let r0 = (hit + 0.25) / (expected + 0.5);
            let (expected, hit) = if config.content_classes {
                cell(&self.pooled, misses, class)
            } else {
                Self::sums(&self.pooled, misses)
            };
            let r1 = (hit + 2.0 * r0) / (expected + 2.0);
            let Some(row) = self.rows.get(agent as usize) else { return r1 };
            let own = if config.content_classes { cell(row, misses, class) } else { Self::sums(row, misses) };
            let prior = if own.0 < 0.5 {
                let (expected, hit) = Self::sums(row, misses);
                f32::midpoint(r1, (hit + 2.0 * r0) / (expected + 2.0))
            } else {
                r1
            };
            (own.1 + 2.0 * prior) / (own.0 + 2.0)
        })
    }
}

fn cell(row: &Ratio<{ MISSES * CLASSES }>, misses: usize, class: usize) -> (f32, f32) {
    let (expected, hit) = row.get(misses * CLASSES + class);
    (f32::from(expected) / UNIT as f32, f32::from(hit) / UNIT as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_the_votes_and_fall_with_misses() {
        let content = Content::default();
        for _ in 0..50 {
            content.vote(0, 0, FIRST as usize, 10, 9);
            content.vote(0, 1, FIRST as usize, 10, 1);
        }
        let rates = content.rates(0, 0, FIRST, &Config::default());
        assert!((rates[0] - 0.9).abs() < 0.03, "{rates:?}");
        assert!(rates[1] < 0.2, "{rates:?}");
    }

    #[test]
    fn an_agent_without_counts_gets_the_pooled_rate() {
        let content = Content::default();
        for _ in 0..50 {
            content.vote(0, 0, 3, 1, 1);
        }
        let config = Config::default();
        assert!(content.rates(900, 0, 3, &config)[0] > 0.9);
        assert!(content.rates(5, 0, 3, &config)[0] > 0.8);
    }
}
