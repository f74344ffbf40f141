//! Sharing: when will *another* session use a segment?
//!
//! Hazards over the age, the time for which its session has had a segment (octaves from 1/16 s to two hours), of private
//! segments and of those that several sessions have used. A use by another session is an event, and the segment is that
//! one's from then on; an eviction ends the observation (censored), which was at risk in half of its last bucket (the
//! actuarial estimator: octaves are wide, and many observations end in them). Uses by its own session end nothing: they say
//! little of when others come, and an age since the last use would be long only where the session has gone on to something
//! else.
//!
//! Relative risks multiply the hazard: uses seen over uses due of the owner's agent, of the session's step, of how many
//! sessions have used the segment (2, 3-4, 5-8, 9-16, 17-64, more) and of its depth (below 16, 64, 256 blocks, deeper),
//! each worked out with the others given.
//!
//! A segment that several sessions used is still that after an eviction: its last block and degree are remembered in a
//! direct-mapped table, and blocks that are stored again above such a block take up where they left.

use crate::histogram::{Counters, Often};
use crate::ids::mix;
use crate::sync::{AtomicU32, Ordering::Relaxed};

use super::content::ROWS;
use super::gaps::log2;
use super::Config;

/// Age buckets.
pub(crate) const AGES: usize = 18;
/// Private segments, and shared ones.
const GROUPS: usize = 2;
const GHOSTS: usize = 512;
/// Steps to the vote in ratios, and where these halve.
const STEPS_TO_VOTE: u32 = 4;
pub(super) const RATIO_HALVES: u32 = 0x2000;
/// Agents, steps, numbers of sessions and depths with a ratio of their own, for private and for shared segments.
const AGENTS: usize = ROWS + 1;
const STEPS: usize = 12;
const DEGREES: usize = 6;
const DEPTHS: usize = 4;
const RATIOS: usize = GROUPS * (AGENTS + STEPS + DEGREES + DEPTHS);

/// Uses that are expected at an age of which nothing has been seen, of one observation.
const FLOOR: f32 = 0.001;
/// Weight, in blocks' votes, of "as the group says".
const RATIO_PRIOR: f32 = 8.0;

/// Class of a session's step: exact up to eight, then octaves.
fn step_class(step: u8) -> usize {
    match step {
        0..=8 => usize::from(step),
        _ => (9 + (u32::from(step) / 9).ilog2() as usize).min(STEPS - 1),
    }
}

/// What a segment's use by others depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    /// Sessions that have used it; depth of its first block.
    pub(crate) degree: u8,
    pub(crate) depth: u32,
    /// Agent of the lane that used it last.
    pub(crate) agent: u16,
    /// The session's step at which it used it first.
    pub(crate) born: u8,
}

impl Owner {
    /// Private (0) or shared (1).
    pub(crate) fn group(self) -> usize {
        class(self.degree, self.depth)[0]
    }

    fn cells(self) -> [usize; 4] {
        let [group, degree, depth] = class(self.degree, self.depth);
        let agents = group * (AGENTS + STEPS + DEGREES + DEPTHS);
        let (steps, degrees) = (agents + AGENTS, agents + AGENTS + STEPS);
        [
            agents + usize::from(self.agent).min(AGENTS - 1),
            steps + step_class(self.born),
            degrees + degree,
            degrees + DEGREES + depth,
        ]
    }
}

/// Hazards of a group, cumulated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Curve {
    /// -ln P(no use) up to each age bucket.
    cumulative: [f32; AGES + 1],
    /// Uses that an observation which ends in a bucket was due: one trial in each bucket that it reached.
    due: [f32; AGES],
}

impl Curve {
    const NEVER: Self = Self { cumulative: [0.0; AGES + 1], due: [0.0; AGES] };

    pub(crate) fn new(hazards: &[f32; AGES]) -> Self {
        let mut curve = Self::NEVER;
        let mut due = 0.0;
        for (age, hazard) in hazards.iter().enumerate() {
            due += hazard;
            curve.due[age] = due;
            curve.cumulative[age + 1] = curve.cumulative[age] - (1.0 - hazard).ln();
        }
        curve
    }

    /// Uses that an observation was due that ended in a bucket, by a use or otherwise: then it was at risk in half of that.
    fn due(&self, age: usize, used: bool) -> f32 {
        let before = if age == 0 { 0.0 } else { self.due[age - 1] };
        if used {
            self.due[age]
        } else {
            f32::midpoint(before, self.due[age])
        }
    }

    pub(crate) fn at(&self, age_s: f32) -> f32 {
        self.at_position(position(age_s))
    }

    /// At a [`position`].
    #[inline]
    pub(crate) fn at_position(&self, position: f32) -> f32 {
        let age = position as usize;
        self.cumulative[age] + (self.cumulative[age + 1] - self.cumulative[age]) * (position - age as f32)
    }
}

/// The curves of one workload, as of a few dozen observations ago: they change slowly and cost microseconds.
#[derive(Clone, Debug)]
pub(crate) struct Curves {
    workload: u32,
    left: u32,
    groups: [Curve; GROUPS],
}

impl Curves {
    /// Observations, or leaves scored, between two looks at the counts.
    const HOLD: u32 = 64;

    pub(crate) fn new() -> Self {
        Self { workload: u32::MAX, left: 0, groups: [Curve::NEVER; GROUPS] }
    }

    /// Brings the curves up to date for a workload, if it is time.
    pub(crate) fn refresh(&mut self, workload: u32, sharing: &Sharing) {
        if self.workload == workload && self.left > 0 {
            self.left -= 1;
            return;
        }
        (self.workload, self.left) = (workload, Self::HOLD);
        self.groups = [0, 1].map(|group| Curve::new(&sharing.hazards(group)));
    }

    pub(crate) fn of(&self, group: usize) -> &Curve {
        &self.groups[group]
    }
}

/// Class of a segment at `depth` that `degree` sessions have used: its group, and in that the cells of both.
pub(crate) fn class(degree: u8, depth: u32) -> [usize; 3] {
    let sessions = match degree {
        0..=2 => 0,
        3..=4 => 1,
        5..=8 => 2,
        9..=16 => 3,
        17..=64 => 4,
        _ => 5,
    };
    let depth = match depth {
        0..=15 => 0,
        16..=63 => 1,
        64..=255 => 2,
        _ => 3,
    };
    [usize::from(degree > 1), sessions, depth]
}

fn bucket(age_s: f32) -> usize {
    position(age_s) as usize
}

/// Position of an age on the bucket axis, fractional: bucket 0 is linear, then octaves.
#[inline(always)]
pub(crate) fn position(age_s: f32) -> f32 {
    let x = age_s * 16.0;
    // Both are worked out, so that many ages go through vector registers.
    let (linear, octaves) = (x.max(0.0) * 0.999, (log2(x.max(1.0)) + 1.0).min((AGES - 1) as f32 + 0.999));
    if x <= 1.0 {
        linear
    } else {
        octaves
    }
}

/// Uses by other sessions, and remembered anchors.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Sharing {
    /// Events in the first half of the lanes, ends of observation in the second.
    counts: [Counters<{ AGES * 2 / 4 }>; GROUPS],
    ghosts: [AtomicU32; GHOSTS],
    /// Uses by other sessions that were seen and that were due, by agent and by step; two cells a word.
    ratios: [Counters<1, RATIO_HALVES>; RATIOS / 2],
}

impl Default for Sharing {
    fn default() -> Self {
        Self {
            counts: std::array::from_fn(|_| Counters::default()),
            ghosts: std::array::from_fn(|_| AtomicU32::new(0)),
            ratios: std::array::from_fn(|_| Counters::default()),
        }
    }
}

impl Sharing {
    pub(super) fn rows(&self) -> impl Iterator<Item = &Counters<{ AGES * 2 / 4 }>> {
        self.counts.iter()
    }

    pub(super) fn ratios(&self) -> impl Iterator<Item = &Counters<1, RATIO_HALVES>> {
        self.ratios.iter()
    }

    /// An observation of `n` blocks ended at `age_s`: by another session's use, or otherwise.
    pub(crate) fn learn(&self, curves: &Curves, of: Owner, age_s: f32, n: u32, shared: bool) {
        let weight = n.ilog2() + 1;
        let group = of.group();
        self.counts[group].add_step(bucket(age_s) + if shared { 0 } else { AGES }, weight);
        let cells = of.cells();
        let ratios = cells.map(|cell| self.ratio(cell));
        let all: f32 = ratios.iter().product();
        let weight = (STEPS_TO_VOTE * weight) as f32;
        let due = weight * curves.of(group).due(bucket(age_s), shared);
        let seen = if shared { weight } else { 0.0 };
        for (cell, ratio) in cells.into_iter().zip(ratios) {
            // Steps are whole, what is due is not: it is rounded up as often as it must be, by the bits of that and of the age.
            let bits = u64::from(age_s.to_bits()) << 32 | u64::from(due.to_bits());
            let chance = (mix(bits ^ cell as u64) >> 40) as f32 / (1u64 << 24) as f32;
            let due = (due * all / ratio + chance) as u32;
            self.ratios[cell / 2].add_steps(cell % 2 * 2, [seen as u32, due], Often::ALWAYS);
        }
    }

    /// Uses seen over uses due in a cell.
    fn ratio(&self, cell: usize) -> f32 {
        let get = |i: usize| f32::from(self.ratios[cell / 2].get(cell % 2 * 2 + i)) / STEPS_TO_VOTE as f32;
        ((get(0) + RATIO_PRIOR) / (get(1) + RATIO_PRIOR)).clamp(0.02, 50.0)
    }

    /// How much likelier than its class says a use is, by the owner's agent and the session's step.
    pub(crate) fn risk(&self, of: Owner, config: &Config) -> f32 {
        let [agent, step, degree, depth] = of.cells();
        let mut risk = 1.0;
        if config.sharing_agents {
            risk *= self.ratio(agent) * self.ratio(step);
        }
        if config.sharing_classes {
            risk *= self.ratio(degree) * self.ratio(depth);
        }
        risk
    }

    /// Hazard per age bucket of a group.
    pub(crate) fn hazards(&self, group: usize) -> [f32; AGES] {
        let mut counts = [0u16; AGES * 2];
        self.counts[group].snapshot(&mut counts);
        let (events, ends) = counts.split_at(AGES);
        let mut at_risk = counts.iter().map(|&n| f32::from(n)).sum::<f32>();
        std::array::from_fn(|age| {
            let (events, ends) = (f32::from(events[age]), f32::from(ends[age]));
            // What ended in the bucket was at risk in half of it.
            let hazard = (events + FLOOR) / (at_risk - ends / 2.0 + 1.0);
            at_risk -= events + ends;
            hazard.min(0.95)
        })
    }

    fn ghost(key: u64) -> (usize, u32) {
        let hash = mix(key);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(degree: u8, depth: u32, agent: u16, born: u8) -> Owner {
        Owner { degree, depth, agent, born }
    }

    #[test]
    fn private_and_shared_segments_learn_their_own_pace() {
        let sharing = Sharing::default();
        let (anchor, tail) = (owner(20, 0, 0, 1), owner(1, 100, 0, 1));
        for _ in 0..200 {
            sharing.learn(&Curves::new(), anchor, 1.0, 1, true);
            sharing.learn(&Curves::new(), tail, 50.0, 1, false);
        }
        let [private, shared] = [0, 1].map(|group| sharing.hazards(group));
        assert!(shared[bucket(1.0)] > 0.9, "{shared:?}");
        assert!(private.iter().all(|&h| h < 0.05), "{private:?}");
    }

    #[test]
    fn popular_and_shallow_segments_are_told_from_others() {
        let (sharing, config, mut curves) = (Sharing::default(), Config::default(), Curves::new());
        for round in 0..2_000 {
            curves.refresh(0, &sharing);
            sharing.learn(&curves, owner(40, 0, 0, 1), 2.0, 16, true);
            sharing.learn(&curves, owner(40, 300, 0, 1), 2.0, 16, round % 3 == 0);
            sharing.learn(&curves, owner(2, 0, 0, 1), 2.0, 16, round % 20 == 0);
            sharing.learn(&curves, owner(2, 300, 0, 1), 2.0, 16, round % 50 == 0);
        }
        let risk = |degree, depth| sharing.risk(owner(degree, depth, 0, 1), &config);
        assert!(risk(40, 0) > 1.3 && risk(2, 300) < 0.3, "{} {}", risk(40, 0), risk(2, 300));
        assert!(risk(40, 0) > risk(40, 300) && risk(40, 0) > risk(2, 0), "{} {}", risk(40, 300), risk(2, 0));
        let off = Config { sharing_classes: false, sharing_agents: false, ..config };
        assert!((sharing.risk(owner(2, 300, 0, 1), &off) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn agents_and_steps_whose_blocks_others_use_are_told_from_those_whose_they_do_not() {
        let (sharing, config, mut curves) = (Sharing::default(), Config::default(), Curves::new());
        // Others use what agent 0 wrote, in its session's first step more than in its ninth.
        for round in 0..2_000 {
            curves.refresh(0, &sharing);
            sharing.learn(&curves, owner(1, 100, 0, 1), 2.0, 16, true);
            sharing.learn(&curves, owner(1, 100, 0, 9), 2.0, 16, round % 3 == 0);
            sharing.learn(&curves, owner(1, 100, 1, 1), 2.0, 16, round % 20 == 0);
            sharing.learn(&curves, owner(1, 100, 1, 9), 2.0, 16, round % 50 == 0);
        }
        let risk = |agent, born| sharing.risk(owner(1, 100, agent, born), &config);
        assert!(risk(0, 1) > 1.3 && risk(1, 9) < 0.3, "{} {}", risk(0, 1), risk(1, 9));
        assert!(risk(0, 1) > risk(0, 9) && risk(0, 1) > risk(1, 1), "{} {}", risk(0, 9), risk(1, 1));
        let off = Config { sharing_classes: false, sharing_agents: false, ..config };
        assert!((sharing.risk(owner(1, 100, 1, 9), &off) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn what_is_due_is_what_is_seen_where_nothing_tells_agents_apart() {
        let (sharing, config, mut curves) = (Sharing::default(), Config::default(), Curves::new());
        for round in 0..20_000u32 {
            curves.refresh(0, &sharing);
            let x = mix(u64::from(round));
            let of = owner(1, 100, (x % 5) as u16, (x / 5 % 7) as u8);
            sharing.learn(&curves, of, (x / 35 % 60) as f32, 8, x / 2_100 % 4 == 0);
        }
        for agent in 0..5 {
            let risk = sharing.risk(owner(1, 100, agent, 3), &config);
            assert!((0.8..1.25).contains(&risk), "agent {agent}: {risk}");
        }
    }

    #[test]
    fn an_evicted_anchor_is_recalled_by_its_last_block() {
        let sharing = Sharing::default();
        sharing.remember(42, 9);
        assert_eq!(sharing.recall(42), 9);
        assert_eq!(sharing.recall(43), 0);
    }
}
