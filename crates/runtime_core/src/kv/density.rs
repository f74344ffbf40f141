//! The decision: hit density, a Gittins index.
//!
//! score = max over n of P(reuse within n) / E[min(time of reuse, n)], in hits per second of holding one block. The
//! maximum over n removes the horizon as a parameter; a block that was just used and will be used late scores low, so a
//! thrashing pool lets it go first. With F_i the distribution of the time of the session's i-th next call and c_i the
//! probability that this call is the first to use the segment,
//! P(reuse within n) = 1 - (1 - sum_i c_i F_i(n)) (1 - P_shared(n | age)).
//!
//! Times lie on a grid of 24 points from 30 ms by factors of 2^(3/4); F_(i+1) is the convolution of F_i with one cycle
//! (a call, then a fresh gap).

use std::sync::LazyLock;

use super::chain::STEPS;
use super::gaps::{self, BUCKETS};
use super::sharing::Curve;

/// Points of the time grid.
pub(crate) const GRID: usize = 24;

/// F_1..F_6 on the grid.
pub(crate) type CallTimes = [[f32; GRID]; STEPS];

/// Constants of the grid, the same for everybody.
struct Grid {
    t: [f32; GRID],
    /// Where t_j minus the middle of cell b lies on the grid.
    minus: [[At; GRID]; GRID],
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
    let minus = std::array::from_fn(|j| std::array::from_fn(|b| locate(&t, t[j] - middle(b))));
    Grid { t, minus }
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
        let position = gaps::position(seconds);
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
    /// P(there is a further call) after each of the next ones.
    pub(crate) continues_later: [f32; STEPS - 1],
    /// Hazards of a call's duration.
    pub(crate) services: &'a [f32; BUCKETS],
}

/// The distribution `times`, later by what is left of a call that has run for `since_s`, and by `more_s`.
fn delayed(times: &[f32; GRID], services: &Cumulative, since_s: f32, more_s: f32) -> [f32; GRID] {
    let grid = &*GRID_TABLE;
    let begun = services.at(since_s);
    let mut ended_before = 0.0;
    let masses: [f32; GRID] = std::array::from_fn(|b| {
        let ended =
            over_waits(more_s, |wait_s| 1.0 - (begun - services.at(since_s + (grid.t[b] - wait_s).max(0.0))).exp());
        let mass = ended - ended_before;
        ended_before = ended;
        mass
    });
    std::array::from_fn(|j| masses.iter().zip(&grid.minus[j]).map(|(mass, &at)| mass * eval(times, at)).sum())
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
    let services = Cumulative::new(silence.services);
    let mut times = [[0.0; GRID]; STEPS];
    // P(the next call starts within t) once the last one has ended; the same for later ones.
    let (mut next, mut later) = ([0.0; GRID], [0.0; GRID]);
    for (j, &t) in grid.t.iter().enumerate() {
        let within = |from_s: f32, wait_s: f32| match t - wait_s {
            x if x > 0.0 => 1.0 - (cumulative.at(from_s) - cumulative.at(from_s + x)).exp(),
            _ => 0.0,
        };
        next[j] = alive * over_waits(silence.queue_s, |wait_s| within(silence.age_s, wait_s));
        later[j] = over_waits(silence.queue_s, |wait_s| within(0.0, wait_s));
    }
    times[0] = match silence.running_s {
        Some(since_s) => delayed(&next, &services, since_s, silence.queued_s),
        None => next,
    };
    // P(one cycle ends in cell b): a call, then a gap.
    let mut cycle = delayed(&later, &services, 0.0, 0.0);
    for j in (1..GRID).rev() {
        cycle[j] -= cycle[j - 1];
    }
    // One cycle more is a linear map of the grid: F_(i+1)(t_j) = sum_b P(cycle in cell b) F_i(t_j - middle of b).
    let mut map = [[0.0f32; GRID]; GRID];
    for (row, minus) in map.iter_mut().zip(&grid.minus) {
        for (&mass, &At { i, f }) in cycle.iter().zip(minus) {
            if i < 0 || mass <= 1e-6 {
                continue;
            }
            row[i as usize] += mass * f;
            if i > 0 {
                row[i as usize - 1] += mass * (1.0 - f);
            }
        }
    }
    for i in 1..STEPS {
        let previous = times[i - 1];
        for (time, row) in times[i].iter_mut().zip(&map) {
            let sum: f32 = row.iter().zip(&previous).map(|(m, f)| m * f).sum();
            *time = silence.continues_later[i - 1] * sum;
        }
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
                continues_later: [0.9; STEPS - 1],
                services: &[0.5; BUCKETS],
            })
        };
        assert!((times(0.0)[0][GRID - 1] - 0.9).abs() < 0.01);
        assert!(times(60.0)[0][GRID - 1] < 0.05);
        // Two calls take longer and are less likely than one.
        let fresh = times(0.0);
        assert!((0..GRID).all(|j| fresh[1][j] <= fresh[0][j] + 1e-6));
    }
}
