//! The decision: hit density, a Gittins index.
//!
//! score = max over n of P(reuse within n) / E[min(time of reuse, n)], in hits per second of holding one block. The
//! maximum over n removes the horizon as a parameter; a block that was just used and will be used late scores low, so a
//! thrashing pool lets it go first. With F_i the distribution of the time of the session's i-th next call and c_i the
//! probability that this call is the first to use the segment,
//! P(reuse within n) = 1 - (1 - sum_i c_i F_i(n)) (1 - P_shared(n | age)).
//!
//! Times lie on a grid of 24 points from 30 ms by factors of 2^(3/4); F_(i+1) is the convolution of F_i with one cycle
//! (a call, then a fresh gap). The grid is geometric, so t_j less the middle of a cell before it lies few points below t_j:
//! a convolution is a sum of as many shifted vectors ([`Delay`]).

use std::sync::LazyLock;

use super::chain::STEPS;
use super::gaps::{self, BUCKETS};
use super::sharing::Curve;

/// Points of the time grid.
pub(crate) const GRID: usize = 24;

/// F_1..F_6 on the grid.
pub(crate) type CallTimes = [[f32; GRID]; STEPS];

/// Points by which a [`Delay`] shifts at most; of these, 0 and 1 are those of all cells, the others of the last two.
const REACH: usize = 3;
const FAR: usize = REACH - 1;

/// Constants of the grid, the same for everybody.
struct Grid {
    t: [f32; GRID],
    /// Where t_j lies among the buckets of gaps.
    position: [f32; GRID],
    /// F(t_j - middle of cell b) = sum over d of `minus` F(t_(j-d)), by b, d and j for small d; for others by j - b.
    near: [[[f32; GRID]; 2]; GRID],
    far: [[[f32; GRID]; 2]; FAR],
}

/// A place on the grid: F = F_(i-1) + f (F_i - F_(i-1)).
#[derive(Clone, Copy)]
struct At {
    i: i8,
    f: f32,
}

static GRID_TABLE: LazyLock<Grid> = LazyLock::new(|| {
    let t: [f32; GRID] = std::array::from_fn(|j| 0.03 * (j as f32 * 0.75).exp2());
    let middle = |b: usize| if b == 0 { t[0] / 2.0 } else { (t[b] * t[b - 1]).sqrt() };
    let mut near = [[[0.0; GRID]; 2]; GRID];
    let mut far = [[[0.0; GRID]; 2]; FAR];
    for b in 0..GRID {
        for j in b..GRID {
            let At { i, f } = locate(&t, t[j] - middle(b));
            let mut add = |d: usize, share: f32| match d {
                0 | 1 => near[b][d][j] = share,
                _ => far[d - 2][j - b][j] = share,
            };
            add(j - i as usize, f);
            if i > 0 {
                add(j + 1 - i as usize, 1.0 - f);
            }
        }
    }
    Grid { t, position: t.map(gaps::position), near, far }
});

/// Computes the grid, so that no later call waits for another one that does.
pub(crate) fn prepare() {
    LazyLock::force(&GRID_TABLE);
}

fn locate(t: &[f32; GRID], x: f32) -> At {
    if x <= 0.0 {
        return At { i: -1, f: 0.0 };
    }
    if x < t[0] {
        return At { i: 0, f: x / t[0] };
    }
    let i = t.iter().position(|&t| x < t).unwrap_or(GRID - 1);
    At { i: i as i8, f: ((x - t[i - 1]) / (t[i] - t[i - 1])).min(1.0) }
}

#[inline]
fn eval(f: &[f32; GRID], at: At) -> f32 {
    match at.i {
        -1 => 0.0,
        0 => f[0] * at.f,
        i => f[i as usize - 1] + (f[i as usize] - f[i as usize - 1]) * at.f,
    }
}

/// Cumulative hazard over gap buckets.
#[derive(Debug)]
struct Cumulative([f32; BUCKETS + 1]);

impl Cumulative {
    fn new(hazards: &[f32; BUCKETS]) -> Self {
        let mut sum = [0.0; BUCKETS + 1];
        for b in 0..BUCKETS {
            sum[b + 1] = sum[b] - (1.0 - hazards[b]).ln();
        }
        Self(sum)
    }

    fn at(&self, seconds: f32) -> f32 {
        self.at_position(gaps::position(seconds))
    }

    fn at_position(&self, position: f32) -> f32 {
        let b = position as usize;
        self.0[b] + (self.0[b + 1] - self.0[b]) * (position - b as f32)
    }
}

/// What the time of a session's next calls depends on.
pub(crate) struct Silence<'a> {
    /// Hazards of the gap.
    pub(crate) hazards: &'a [f32; BUCKETS],
    /// Seconds since the last call ended.
    pub(crate) age_s: f32,
    /// Seconds since the running call started, if one runs.
    pub(crate) running_s: Option<f32>,
    /// Seconds until a waiting call starts; seconds that a call waits once it has arrived.
    pub(crate) queued_s: f32,
    pub(crate) queue_s: f32,
    /// P(there is a next call), before the silence was seen.
    pub(crate) continues: f32,
    /// The same for calls after the next.
    pub(crate) continues_later: f32,
    pub(crate) services: &'a Services,
}

/// What distributions become by a delay that has these masses in the cells of the grid: a linear map of which only the
/// diagonals next to the main one are not empty.
#[derive(Debug)]
struct Delay([[f32; GRID]; REACH + 1]);

impl Delay {
    fn new(masses: &[f32; GRID]) -> Self {
        let grid = &*GRID_TABLE;
        let (mut same, mut one) = ([0.0f32; GRID], [0.0f32; GRID]);
        for (&mass, [to_same, to_one]) in masses.iter().zip(&grid.near) {
            for j in 0..GRID {
                same[j] += mass * to_same[j];
                one[j] += mass * to_one[j];
            }
        }
        let [two, three] = [0, 1].map(|d| {
            let [own, before] = &grid.far[d];
            let mut row = [0.0f32; GRID];
            for j in 1..GRID {
                row[j] = masses[j - 1] * before[j] + masses[j] * own[j];
            }
            row
        });
        Self([same, one, two, three])
    }

    fn of(&self, times: &[f32; GRID]) -> [f32; GRID] {
        let mut before = [0.0; GRID + REACH];
        before[REACH..].copy_from_slice(times);
        let mut later = [0.0f32; GRID];
        for (d, row) in self.0.iter().enumerate().rev() {
            for ((later, share), time) in later.iter_mut().zip(row).zip(&before[REACH - d..]) {
                *later += share * time;
            }
        }
        later
    }
}

/// How long calls take.
#[derive(Debug)]
pub(crate) struct Services {
    hazards: [f32; BUCKETS],
    cumulative: Cumulative,
    /// By a whole call.
    call: Delay,
}

impl Services {
    pub(crate) fn new(hazards: &[f32; BUCKETS]) -> Self {
        let cumulative = Cumulative::new(hazards);
        let ended = GRID_TABLE.position.map(|at| 1.0 - (-cumulative.at_position(at)).exp());
        Self { hazards: *hazards, cumulative, call: Delay::new(&masses(ended)) }
    }

    /// As [`Self::new`], at once where the hazards are the same.
    pub(crate) fn renew(&mut self, hazards: &[f32; BUCKETS]) -> &Self {
        if self.hazards != *hazards {
            *self = Self::new(hazards);
        }
        self
    }

    /// By what is left of a call that has run for `since_s`, and `more_s` besides.
    fn rest(&self, since_s: f32, more_s: f32) -> Delay {
        let grid = &*GRID_TABLE;
        let services = &self.cumulative;
        let begun = services.at(since_s);
        Delay::new(&masses(std::array::from_fn(|b| {
            over_waits(more_s, |wait_s| 1.0 - (begun - services.at(since_s + (grid.t[b] - wait_s).max(0.0))).exp())
        })))
    }
}

/// The mass in each cell of a distribution.
fn masses(mut times: [f32; GRID]) -> [f32; GRID] {
    for j in (1..GRID).rev() {
        times[j] -= times[j - 1];
    }
    times
}

/// The thirds of a gamma distribution of shape 2 and mean 1: a wait in a queue is known to a factor, not to the second. Engines
/// admit in order, but after irregular intervals.
const WAITS: [f32; 3] = [0.37, 0.84, 1.79];

/// P(a wait of which `share` is the given part of its mean is over).
pub(crate) fn waited(share: f32) -> f32 {
    1.0 - (-2.0 * share).exp() * (1.0 + 2.0 * share)
}

/// The mean over likely waits around `mean_s`; one is enough where nothing waits.
fn over_waits(mean_s: f32, mut f: impl FnMut(f32) -> f32) -> f32 {
    if mean_s == 0.0 {
        return f(0.0);
    }
    WAITS.iter().map(|wait| f(wait * mean_s)).sum::<f32>() / WAITS.len() as f32
}

/// F_1..F_6 of a session.
pub(crate) fn call_times(silence: &Silence<'_>) -> CallTimes {
    let grid = &*GRID_TABLE;
    let cumulative = Cumulative::new(silence.hazards);
    let before = cumulative.at(silence.age_s);
    let survived = (-before).exp();
    let alive = silence.continues * survived / (silence.continues * survived + 1.0 - silence.continues).max(1e-9);
    let mut times = [[0.0; GRID]; STEPS];
    // P(the next call starts within t) once the last one has ended; the same for later ones.
    let (mut next, mut later) = ([0.0; GRID], [0.0; GRID]);
    for (j, &t) in grid.t.iter().enumerate() {
        next[j] = alive
            * over_waits(silence.queue_s, |wait_s| match t - wait_s {
                x if x > 0.0 => 1.0 - (before - cumulative.at(silence.age_s + x)).exp(),
                _ => 0.0,
            });
        later[j] = silence.continues_later
            * over_waits(silence.queue_s, |wait_s| match t - wait_s {
                x if x == t => 1.0 - (-cumulative.at_position(grid.position[j])).exp(),
                x if x > 0.0 => 1.0 - (-cumulative.at(x)).exp(),
                _ => 0.0,
            });
    }
    times[0] = match silence.running_s {
        Some(since_s) => silence.services.rest(since_s, silence.queued_s).of(&next),
        None => next,
    };
    // One cycle more, a call and then a gap.
    let cycle = masses(silence.services.call.of(&later));
    let cycle = Delay::new(&cycle.map(|mass| if mass <= 1e-6 { 0.0 } else { mass }));
    for i in 1..STEPS {
        times[i] = cycle.of(&times[i - 1]);
    }
    times
}

/// F_1..F_6 of a session whose next calls are known, in seconds from now.
pub(crate) fn known_call_times(starts_s: [f32; STEPS]) -> CallTimes {
    let grid = &*GRID_TABLE;
    starts_s.map(|at| {
        std::array::from_fn(|j| {
            let from = if j == 0 { 0.0 } else { grid.t[j - 1] };
            ((grid.t[j] - at) / (grid.t[j] - from)).clamp(0.0, 1.0)
        })
    })
}

/// F at `seconds`.
pub(crate) fn within(times: &[f32; GRID], seconds: f32) -> f32 {
    eval(times, locate(&GRID_TABLE.t, seconds))
}

/// Seconds by which the given share of a (possibly defective) distribution has happened; infinite where it is empty.
pub(crate) fn quantile_s(times: &[f32; GRID], share: f32) -> f32 {
    let target = share * times[GRID - 1];
    if target <= 1e-6 {
        return f32::INFINITY;
    }
    let grid = &*GRID_TABLE;
    let j = times.iter().position(|&f| f >= target).unwrap_or(GRID - 1);
    let (f0, t0) = if j == 0 { (0.0, 0.0) } else { (times[j - 1], grid.t[j - 1]) };
    t0 + (grid.t[j] - t0) * ((target - f0) / (times[j] - f0).max(1e-9)).min(1.0)
}

/// Use by other sessions: the learned curve of a class, how much likelier a use is than that, and the age; or the time that
/// an oracle knows.
pub(crate) enum Foreign<'a> {
    Learned { curve: &'a Curve, risk: f32, age_s: f32 },
    At(f32),
}

/// When a session that follows the owner calls next, and P(its i-th next call is the first to use the segment).
pub(crate) type Followed<'a> = (&'a CallTimes, &'a [f32; STEPS]);

/// The score, in hits per second; or, with a horizon, P(reuse within it).
pub(crate) fn score(
    times: &CallTimes,
    first_use: &[f32; STEPS],
    foreign: &Foreign<'_>,
    follower: Option<Followed<'_>>,
    horizon_s: Option<f32>,
) -> f32 {
    let grid = &*GRID_TABLE;
    let (mut best, mut held, mut before, mut from) = (0.0f32, 0.0f32, 0.0f32, 0.0f32);
    for (j, &t) in grid.t.iter().enumerate() {
        let own: f32 = (0..STEPS).map(|i| first_use[i] * times[i][j]).sum();
        let not_foreign = match foreign {
            Foreign::Learned { curve, risk, age_s } => (risk * (curve.at(*age_s) - curve.at(age_s + t))).exp(),
            Foreign::At(when) => f32::from(u8::from(*when > t)),
        };
        let followed: f32 = follower.map_or(0.0, |(times, first)| (0..STEPS).map(|i| first[i] * times[i][j]).sum());
        let reuse = 1.0 - (1.0 - own) * not_foreign * (1.0 - followed);
        held += (t - from) * (1.0 - 0.5 * (reuse + before));
        (from, before) = (t, reuse);
        match horizon_s {
            None => best = best.max(reuse / held),
            Some(horizon) if t <= horizon || j == 0 => best = reuse,
            Some(_) => {}
        }
    }
    best
}

/// The longest time of the grid that is no longer than `seconds`: what a horizon of [`score`] comes to.
pub(crate) fn on_grid(seconds: f32) -> f32 {
    let t = &GRID_TABLE.t;
    t.iter().copied().rev().find(|&t| t <= seconds).unwrap_or(t[0])
}

/// Score class: 6.4 to the octave over 40 octaves, monotone in the score.
pub(crate) fn bucket(score: f32) -> u16 {
    ((score.max(1e-12).log2() + 32.0) * 6.4).clamp(0.0, 255.0) as u16
}

/// The score at a class's lower edge.
#[cfg(test)]
pub(crate) fn bucket_score(bucket: u16) -> f32 {
    (f32::from(bucket) / 6.4 - 32.0).exp2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_moves_a_distribution_by_the_middle_of_its_cell() {
        let t = &GRID_TABLE.t;
        let times: [f32; GRID] = std::array::from_fn(|j| 1.0 - (-t[j] / 7.0).exp());
        for b in 0..GRID {
            let mut masses = [0.0; GRID];
            masses[b] = 0.5;
            let later = Delay::new(&masses).of(&times);
            let middle_s = if b == 0 { t[0] / 2.0 } else { (t[b] * t[b - 1]).sqrt() };
            for j in 0..GRID {
                assert!((later[j] - 0.5 * within(&times, t[j] - middle_s)).abs() < 1e-6, "{b} {j}");
            }
        }
    }

    fn never() -> Foreign<'static> {
        Foreign::At(f32::INFINITY)
    }

    #[test]
    fn sooner_and_likelier_reuse_scores_higher() {
        let at = |seconds: f32, p: f32| {
            let times = known_call_times([seconds; STEPS]);
            score(&times, &[p, 0.0, 0.0, 0.0, 0.0, 0.0], &never(), None, None)
        };
        assert!(at(1.0, 0.9) > at(10.0, 0.9));
        assert!(at(10.0, 0.9) > at(10.0, 0.3));
        assert!(at(10.0, 0.9) > at(1000.0, 0.9));
        // A sure use in ten seconds is worth about a tenth of a hit per second.
        assert!((at(10.0, 1.0) - 0.1).abs() < 0.04, "{}", at(10.0, 1.0));
    }

    #[test]
    fn classes_are_monotone_in_the_score() {
        let mut last = 0;
        for i in 0..4000 {
            let class = bucket((i as f32 * 0.01 - 30.0).exp2());
            assert!(class >= last);
            last = class;
        }
        assert!(bucket(bucket_score(100) * 1.01) == 100);
    }

    #[test]
    fn a_long_silence_makes_an_end_likely() {
        let mut hazards = [0.0; BUCKETS];
        let bucket = gaps::position(1.0) as usize;
        hazards[bucket] = 0.98;
        hazards[bucket + 1] = 0.98;
        let times = |age_s: f32| {
            call_times(&Silence {
                hazards: &hazards,
                age_s,
                running_s: None,
                queued_s: 0.0,
                queue_s: 0.0,
                continues: 0.9,
                continues_later: 0.9,
                services: &Services::new(&[0.5; BUCKETS]),
            })
        };
        assert!((times(0.0)[0][GRID - 1] - 0.9).abs() < 0.01);
        assert!(times(60.0)[0][GRID - 1] < 0.05);
        // Two calls take longer and are less likely than one.
        let fresh = times(0.0);
        assert!((0..GRID).all(|j| fresh[1][j] <= fresh[0][j] + 1e-6));
    }
}
