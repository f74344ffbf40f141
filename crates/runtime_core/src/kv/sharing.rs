//! Sharing: when will *another* session use a segment?
//!
//! Hazards over the age since the last use (octaves from 1/16 s to two hours) by class: how many sessions have used the
//! segment (1, 2, 3-4, 5-8, 9-16, 17-64, more) x depth (below 16, 64, 256 blocks, deeper). A use by another session is
//! an event; a use by the same session or an eviction ends the observation (censored). Prior of a class: all private
//! (or all shared) segments together.
//!
//! A segment that several sessions used is still that after an eviction: its last block and degree are remembered in a
//! direct-mapped table, and blocks that are stored again above such a block take up where they left.

use crate::histogram::Counters;
use crate::sync::{AtomicU32, Ordering::Relaxed};

use super::Config;

/// Age buckets.
pub(crate) const AGES: usize = 18;
const DEGREES: usize = 7;
const DEPTHS: usize = 4;
const CLASSES: usize = DEGREES * DEPTHS;
const GHOSTS: usize = 256;
/// Weight of the pooled hazard.
const KAPPA: f32 = 4.0;

/// Class of a segment at `depth` that `degree` sessions have used.
pub(crate) fn class(degree: u8, depth: u32) -> usize {
    let degree = match degree {
        0 | 1 => 0,
        2 => 1,
        3..=4 => 2,
        5..=8 => 3,
        9..=16 => 4,
        17..=64 => 5,
        _ => 6,
    };
    let depth = match depth {
        0..=15 => 0,
        16..=63 => 1,
        64..=255 => 2,
        _ => 3,
    };
    degree * DEPTHS + depth
}

fn bucket(age_s: f32) -> usize {
    position(age_s) as usize
}

/// Position of an age on the bucket axis, fractional: bucket 0 is linear, then octaves.
pub(crate) fn position(age_s: f32) -> f32 {
    let x = age_s * 16.0;
    if x <= 1.0 {
        x.max(0.0) * 0.999
    } else {
        (x.log2() + 1.0).min((AGES - 1) as f32 + 0.999)
    }
}

/// Uses by other sessions, and remembered anchors.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Sharing {
    /// Events in the first half of the lanes, ends of observation in the second.
    counts: [Counters<{ AGES * 2 / 4 }>; CLASSES],
    ghosts: [AtomicU32; GHOSTS],
}

impl Default for Sharing {
    fn default() -> Self {
        Self {
            counts: std::array::from_fn(|_| Counters::default()),
            ghosts: std::array::from_fn(|_| AtomicU32::new(0)),
        }
    }
}

impl Sharing {
    pub(super) fn rows(&self) -> impl Iterator<Item = &Counters<{ AGES * 2 / 4 }>> {
        self.counts.iter()
    }

    /// An observation ended at `age_s`: by another session's use, or otherwise.
    pub(crate) fn learn(&self, class: usize, age_s: f32, shared: bool) {
        self.counts[class].add(bucket(age_s) + if shared { 0 } else { AGES });
    }

    /// Hazard per age bucket of a class.
    pub(crate) fn hazards(&self, class: usize, config: &Config) -> [f32; AGES] {
        let group = if class < DEPTHS { 0..DEPTHS } else { DEPTHS..CLASSES };
        let (mut events, mut ends) = ([0.0f32; AGES], [0.0f32; AGES]);
        for class in group {
            add_counts(&self.counts[class], &mut events, &mut ends);
        }
        let mut hazards = [0.0; AGES];
        refine(&mut hazards, &events, &ends, 1.0, 0.001);
        if config.sharing_classes {
            let (mut events, mut ends) = ([0.0f32; AGES], [0.0f32; AGES]);
            add_counts(&self.counts[class], &mut events, &mut ends);
            refine(&mut hazards, &events, &ends, KAPPA, 0.0);
        }
        hazards
    }

    fn ghost(key: u64) -> (usize, u32) {
        let hash = crate::ids::mix(key);
        ((hash >> 40) as usize % GHOSTS, (hash as u32) & 0xFF_FFFF)
    }

    /// Remembers the last block of an evicted segment that `degree` sessions used.
    pub(crate) fn remember(&self, key: u64, degree: u8) {
        let (at, tag) = Self::ghost(key);
        self.ghosts[at].store(tag << 8 | u32::from(degree), Relaxed);
    }

    /// How many sessions had used the block when it was evicted, 0 if that is not remembered.
    pub(crate) fn recall(&self, key: u64) -> u8 {
        let (at, tag) = Self::ghost(key);
        let word = self.ghosts[at].load(Relaxed);
        if word >> 8 == tag {
            word as u8
        } else {
            0
        }
    }
}

fn add_counts(counts: &Counters<{ AGES * 2 / 4 }>, events: &mut [f32; AGES], ends: &mut [f32; AGES]) {
    let mut lanes = [0u16; AGES * 2];
    counts.snapshot(&mut lanes);
    for age in 0..AGES {
        events[age] += f32::from(lanes[age]);
        ends[age] += f32::from(lanes[AGES + age]);
    }
}

fn refine(hazards: &mut [f32; AGES], events: &[f32; AGES], ends: &[f32; AGES], kappa: f32, floor: f32) {
    let mut at_risk: f32 = events.iter().chain(ends).sum();
    for age in 0..AGES {
        hazards[age] = ((events[age] + floor + kappa * hazards[age]) / (at_risk + kappa)).min(0.95);
        at_risk -= events[age] + ends[age];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_classes_learn_their_own_pace() {
        let sharing = Sharing::default();
        for _ in 0..200 {
            sharing.learn(class(20, 0), 1.0, true);
            sharing.learn(class(1, 100), 50.0, false);
        }
        let config = Config::default();
        let anchor = sharing.hazards(class(20, 0), &config);
        let tail = sharing.hazards(class(1, 100), &config);
        assert!(anchor[bucket(1.0)] > 0.9, "{anchor:?}");
        assert!(tail.iter().all(|&h| h < 0.05), "{tail:?}");
    }

    #[test]
    fn an_evicted_anchor_is_recalled_by_its_last_block() {
        let sharing = Sharing::default();
        sharing.remember(42, 9);
        assert_eq!(sharing.recall(42), 9);
        assert_eq!(sharing.recall(43), 0);
    }
}
