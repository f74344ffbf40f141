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
use super::sharing::{self, Curve};

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

/// e to the power of x, to 2e-7 of it and, where x is far from 0, to x / 2^23: without branches, so that a whole grid goes
/// through vector registers.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding it rounds to an integer, which then stands in the last bits.
    const ROUND: f32 = 12_582_912.0;
    let y = (x * std::f32::consts::LOG2_E).clamp(-126.0, 126.0);
    let rounded = y + ROUND;
    let f = y - (rounded - ROUND);
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3F80_0000));
    let high = 0.009_618_13 + f * (0.001_333_36 + f * 0.000_154_04);
    power * (1.0 + f * (std::f32::consts::LN_2 + f * (0.240_226_5 + f * (0.055_504_11 + f * high))))
}

/// The natural logarithm of a number above 0, to 1e-7, likewise.
#[inline(always)]
fn ln(x: f32) -> f32 {
    let (exponent, t) = gaps::split(x);
    let square = t * t;
    let series = 2.0 / 3.0 + square * (2.0 / 5.0 + square * (2.0 / 7.0 + square * (2.0 / 9.0)));
    exponent * std::f32::consts::LN_2 + t * (2.0 + square * series)
}

/// `f` of each: a loop, which goes through vector registers where `array::map` does not.
#[inline(always)]
fn each<const N: usize>(mut values: [f32; N], f: impl Fn(f32) -> f32) -> [f32; N] {
    for value in &mut values {
        *value = f(*value);
    }
    values
}

/// Cumulative hazard over gap buckets.
#[derive(Clone, Debug)]
struct Cumulative([f32; BUCKETS + 1]);

impl Cumulative {
    fn new(hazards: &[f32; BUCKETS]) -> Self {
        let survived = each(*hazards, |hazard| ln(1.0 - hazard));
        let mut sum = [0.0; BUCKETS + 1];
        for b in 0..BUCKETS {
            sum[b + 1] = sum[b] - survived[b];
        }
        Self(sum)
    }

    #[inline]
    fn at(&self, seconds: f32) -> f32 {
        self.at_position(gaps::position(seconds))
    }

    #[inline]
    fn at_position(&self, position: f32) -> f32 {
        let b = position as usize;
        self.0[b] + (self.0[b + 1] - self.0[b]) * (position - b as f32)
    }
}

/// What the times of the calls of all sessions with the same kind of gap have in common.
#[derive(Clone, Debug)]
pub(crate) struct Cycle {
    gap: Cumulative,
    /// Seconds that a call waits once it has arrived.
    queue_s: f32,
    /// P(the next call starts within t) once the last one has ended.
    later: [f32; GRID],
    /// By a call and then a gap.
    delay: Delay,
}

impl Cycle {
    /// `hazards` of the gap; `queue_s`: seconds that a call waits once it has arrived.
    pub(crate) fn new(hazards: &[f32; BUCKETS], services: &Services, queue_s: f32) -> Self {
        let gap = Cumulative::new(hazards);
        let later = called(&gap, 0.0, queue_s);
        let cycle = masses(services.call.of(&later));
        let delay = Delay::new(&each(cycle, |mass| if mass <= 1e-6 { 0.0 } else { mass }));
        Self { gap, queue_s, later, delay }
    }
}

/// What the time of a session's next calls depends on.
pub(crate) struct Silence<'a> {
    pub(crate) cycle: &'a Cycle,
    /// Seconds since the last call ended.
    pub(crate) age_s: f32,
    /// Seconds since the running call started, if one runs, and how long calls take.
    pub(crate) running: Option<(f32, &'a Services)>,
    /// Seconds until a waiting call starts.
    pub(crate) queued_s: f32,
    /// P(there is a next call), before the silence was seen.
    pub(crate) continues: f32,
    /// P(there is a further call) after each of the next ones.
    pub(crate) continues_later: [f32; STEPS - 1],
}

/// What distributions become by a delay that has these masses in the cells of the grid: a linear map of which only the
/// diagonals next to the main one are not empty.
#[derive(Clone, Debug)]
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
        let ended = each(each(GRID_TABLE.position, |at| cumulative.at_position(at)), |hazard| 1.0 - exp(-hazard));
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
        let services = &self.cumulative;
        let begun = services.at(since_s);
        let t = &GRID_TABLE.t;
        if more_s == 0.0 {
            let positions = each(*t, |t| gaps::position(since_s + t));
            let hazards = each(positions, |at| services.at_position(at));
            return Delay::new(&masses(each(hazards, |hazard| 1.0 - exp(begun - hazard))));
        }
        let ended =
            |t: f32| over_waits(more_s, |wait_s| 1.0 - exp(begun - services.at(since_s + (t - wait_s).max(0.0))));
        Delay::new(&masses(t.map(ended)))
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

/// The mean over likely waits around `mean_s`.
fn over_waits(mean_s: f32, mut f: impl FnMut(f32) -> f32) -> f32 {
    WAITS.iter().map(|wait| f(wait * mean_s)).sum::<f32>() / WAITS.len() as f32
}

/// P(a session that calls again and has been silent for `age_s` has called within t).
fn called(gap: &Cumulative, age_s: f32, queue_s: f32) -> [f32; GRID] {
    let (grid, before) = (&*GRID_TABLE, gap.at(age_s));
    if queue_s == 0.0 {
        let positions = if age_s == 0.0 { grid.position } else { each(grid.t, |t| gaps::position(age_s + t)) };
        return each(each(positions, |at| gap.at_position(at)), |hazard| 1.0 - exp(before - hazard));
    }
    grid.t.map(|t| {
        over_waits(queue_s, |wait_s| match t - wait_s {
            x if x > 0.0 => 1.0 - exp(before - gap.at(age_s + x)),
            _ => 0.0,
        })
    })
}

/// F_1..F_6 of a session.
pub(crate) fn call_times(silence: &Silence<'_>) -> CallTimes {
    let Cycle { gap, queue_s, later, delay } = silence.cycle;
    let survived = (-gap.at(silence.age_s)).exp();
    let alive = silence.continues * survived / (silence.continues * survived + 1.0 - silence.continues).max(1e-9);
    let mut times = [[0.0; GRID]; STEPS];
    let silent = if silence.age_s == 0.0 { *later } else { called(gap, silence.age_s, *queue_s) };
    let next = each(silent, |p| alive * p);
    times[0] = match silence.running {
        Some((since_s, services)) => services.rest(since_s, silence.queued_s).of(&next),
        None => next,
    };
    for i in 1..STEPS {
        times[i] = each(delay.of(&times[i - 1]), |p| silence.continues_later[i - 1] * p);
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

/// When one of the owner's kin calls next, and P(its i-th next call is the first to use the segment).
pub(crate) type Followed<'a> = (&'a CallTimes, &'a [f32; STEPS]);

/// The score, in hits per second; or, with a horizon, P(reuse within it).
pub(crate) fn score<'a>(
    times: &CallTimes,
    first_use: &[f32; STEPS],
    foreign: &Foreign<'_>,
    followed: impl Iterator<Item = Followed<'a>>,
    horizon_s: Option<f32>,
) -> f32 {
    let grid = &*GRID_TABLE;
    let sum = |times: &CallTimes, first: &[f32; STEPS]| {
        let mut sum = [0.0f32; GRID];
        for (first, times) in first.iter().zip(times) {
            for (sum, time) in sum.iter_mut().zip(times) {
                *sum += first * time;
            }
        }
        sum
    };
    let own = sum(times, first_use);
    let not_foreign = match foreign {
        Foreign::Learned { curve, risk, age_s } => {
            let now = curve.at(*age_s);
            let positions = each(grid.t, |t| sharing::position(age_s + t));
            each(each(positions, |at| risk * (now - curve.at_position(at))), exp)
        }
        Foreign::At(when) => each(grid.t, |t| f32::from(u8::from(*when > t))),
    };
    let mut reuses: [f32; GRID] = std::array::from_fn(|j| (1.0 - own[j]) * not_foreign[j]);
    for (times, first) in followed {
        let used = sum(times, first);
        reuses = std::array::from_fn(|j| reuses[j] * (1.0 - used[j]));
    }
    let (mut best, mut held, mut before, mut from) = (0.0f32, 0.0f32, 0.0f32, 0.0f32);
    for (j, &t) in grid.t.iter().enumerate() {
        let reuse = 1.0 - reuses[j];
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
    fn the_quick_functions_are_as_good_as_the_exact_ones() {
        for i in 0..200_000 {
            let x = i as f32 * -1e-3;
            let (quick, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((quick / exact.max(1.2e-38) - 1.0).abs() < 3e-7 + f64::from(-x) / 8e6 || exact < 1.2e-38, "{x}");
            let x = 1.0 - i as f32 * 4.9e-6;
            assert!((f64::from(ln(x)) - f64::from(x).ln()).abs() < 4e-7, "{x}");
        }
        assert_eq!((exp(0.0), ln(1.0)), (1.0, 0.0));
        assert!((0.0..1e-37).contains(&exp(-1000.0)));
    }

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
            score(&times, &[p, 0.0, 0.0, 0.0, 0.0, 0.0], &never(), std::iter::empty(), None)
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
                cycle: &Cycle::new(&hazards, &Services::new(&[0.5; BUCKETS]), 0.0),
                age_s,
                running: None,
                queued_s: 0.0,
                continues: 0.9,
                continues_later: [0.9; STEPS - 1],
            })
        };
        assert!((times(0.0)[0][GRID - 1] - 0.9).abs() < 0.01);
        assert!(times(60.0)[0][GRID - 1] < 0.05);
        // Two calls take longer and are less likely than one.
        let fresh = times(0.0);
        assert!((0..GRID).all(|j| fresh[1][j] <= fresh[0][j] + 1e-6));
    }
}
