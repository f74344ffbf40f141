//! Hit density: max over n of P(reuse within n) / E[time held up to n].
use super::chain::{Lanes, STEPS};
use super::index::NONE;
use super::learned::{A, G};

pub(crate) const GRID: usize = 24;

fn grid(j: usize) -> f32 {
    0.03 * (j as f32 * 0.75).exp2()
}

pub(crate) struct Lut {
    t: [f32; GRID],
    /// Position of t_j - tau_b on the grid.
    at: [[(u8, f32); GRID]; GRID],
    /// Share of mass in cell b that lies before t_j.
    _pad: u8,
}
impl Lut {
    pub(crate) fn new() -> Self {
        let mut t = [0.0; GRID];
        for (j, t) in t.iter_mut().enumerate() {
            *t = grid(j);
        }
        let mut at = [[(0u8, 0.0f32); GRID]; GRID];
        for j in 0..GRID {
            for b in 0..GRID {
                let mid = if b == 0 {
                    t[0] * 0.5
                } else {
                    (t[b] * t[b - 1]).sqrt()
                };
                at[j][b] = locate(&t, t[j] - mid);
            }
        }
        Self { t, at, _pad: 0 }
    }
}
/// Index i and weight f so that F(x) = (1-f) F_{i-1} + f F_i, F_{-1} = 0; i = 255 for x <= 0.
fn locate(t: &[f32; GRID], x: f32) -> (u8, f32) {
    if x <= 0.0 {
        return (255, 0.0);
    }
    if x < t[0] {
        return (0, x / t[0]);
    }
    for i in 1..GRID {
        if x < t[i] {
            return (i as u8, (x - t[i - 1]) / (t[i] - t[i - 1]));
        }
    }
    (GRID as u8 - 1, 1.0)
}
fn eval(f: &[f32; GRID], at: (u8, f32)) -> f32 {
    match at.0 {
        255 => 0.0,
        0 => f[0] * at.1,
        i => f[i as usize - 1] + (f[i as usize] - f[i as usize - 1]) * at.1,
    }
}

pub(crate) struct SessionView {
    pub(crate) session: u32,
    pub(crate) now_us: u64,
    f: [[f32; GRID]; STEPS],
    t: [f32; GRID],
    pub(crate) lanes: Lanes,
}
impl Default for SessionView {
    fn default() -> Self {
        Self {
            session: NONE,
            now_us: 0,
            f: [[0.0; GRID]; STEPS],
            t: [0.0; GRID],
            lanes: Lanes::default(),
        }
    }
}

/// Cumulative hazard at x seconds.
fn cumulative(h: &[f32; G + 1], x_s: f32) -> f32 {
    let b = ((x_s * 1000.0).max(1e-3).log2() * 2.0).max(0.0);
    let i = (b as usize).min(G - 1);
    let f = (b - i as f32).min(1.0);
    h[i] + (h[i + 1] - h[i]) * f
}

impl SessionView {
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn fill(
        &mut self,
        session: u32,
        now_us: u64,
        hazards: &[f32; G],
        age_us: u64,
        wait_s: f32,
        alive: f32,
        later: f32,
        service_s: f32,
        lut: &Lut,
    ) {
        self.session = session;
        self.now_us = now_us;
        self.t = lut.t;
        let mut cum = [0.0f32; G + 1];
        for b in 0..G {
            cum[b + 1] = cum[b] - (1.0 - hazards[b]).ln();
        }
        let age_s = age_us as f32 / 1e6;
        let h0 = cumulative(&cum, age_s);
        let s0 = (-h0).exp();
        let alive_now = alive * s0 / (alive * s0 + 1.0 - alive).max(1e-9);
        for j in 0..GRID {
            let x = lut.t[j] - wait_s;
            self.f[0][j] = if x <= 0.0 {
                0.0
            } else {
                alive_now * (1.0 - (h0 - cumulative(&cum, age_s + x)).exp())
            };
        }
        // One further cycle: service, then a fresh gap.
        let mut cycle = [0.0f32; GRID];
        let mut before = 0.0;
        for j in 0..GRID {
            let x = lut.t[j] - service_s;
            let c = if x <= 0.0 {
                0.0
            } else {
                later * (1.0 - (-cumulative(&cum, x)).exp())
            };
            cycle[j] = c - before;
            before = c;
        }
        for i in 1..STEPS {
            let (head, rest) = self.f.split_at_mut(i);
            let previous = &head[i - 1];
            for j in 0..GRID {
                let mut sum = 0.0;
                for b in 0..=j {
                    if cycle[b] > 0.0 {
                        sum += cycle[b] * eval(previous, lut.at[j][b]);
                    }
                }
                rest[0][j] = sum;
            }
        }
    }

    /// Replaces the estimated call times by the true ones.
    pub(crate) fn foretell(&mut self, starts: &super::FutureStarts) {
        for (f, &at) in self.f.iter_mut().zip(starts) {
            let x = if at == u64::MAX {
                f32::INFINITY
            } else {
                at.saturating_sub(self.now_us) as f32 / 1e6
            };
            let mut t0 = 0.0;
            for (f, &t) in f.iter_mut().zip(&self.t) {
                *f = ((t - x) / (t - t0)).clamp(0.0, 1.0);
                t0 = t;
            }
        }
    }

    /// P(first reuse at the session's i-th next call) for a segment of `lane` with hit rates `r`.
    pub(crate) fn reuse(&self, lane: u32, r: [f32; 3]) -> [f32; STEPS] {
        let mut c = [0.0; STEPS];
        for x in &self.lanes.weights[..self.lanes.n] {
            if x.lane == lane {
                let (a, b, d) = (
                    r[0],
                    (1.0 - r[0]) * r[1],
                    (1.0 - r[0]) * (1.0 - r[1]) * r[2],
                );
                for i in 0..STEPS {
                    c[i] = a * x.w[0][i] + b * x.w[1][i] + d * x.w[2][i];
                }
            }
        }
        c
    }

    pub(crate) fn score(
        &self,
        c: &[f32; STEPS],
        shared: &[f32; A],
        age_us: u64,
        horizon: Option<f32>,
        shared_at: Option<f32>,
    ) -> f32 {
        let mut cum = [0.0f32; A + 1];
        for b in 0..A {
            cum[b + 1] = cum[b] - (1.0 - shared[b]).ln();
        }
        // Age bucket b ends at 2^b / 16 s.
        let at = |x_s: f32| {
            let x = x_s * 16.0;
            if x <= 1.0 {
                cum[0] + (cum[1] - cum[0]) * x
            } else {
                let l = x.log2() + 1.0;
                let i = (l as usize).min(A - 1);
                cum[i] + (cum[i + 1] - cum[i]) * (l - i as f32).min(1.0)
            }
        };
        let age_s = age_us as f32 / 1e6;
        let h0 = at(age_s);
        let (mut best, mut held, mut before, mut t0) = (0.0f32, 0.0f32, 0.0f32, 0.0f32);
        for j in 0..GRID {
            let mut own = 0.0;
            for i in 0..STEPS {
                own += c[i] * self.f[i][j];
            }
            let foreign = match shared_at {
                Some(at) => f32::from(u8::from(at > self.t[j])),
                None => (h0 - at(age_s + self.t[j])).exp(),
            };
            let p = 1.0 - (1.0 - own) * foreign;
            held += (self.t[j] - t0) * (1.0 - 0.5 * (p + before));
            t0 = self.t[j];
            before = p;
            match horizon {
                None => best = best.max(p / held),
                Some(h) => {
                    if t0 <= h || j == 0 {
                        best = p;
                    }
                }
            }
        }
        best
    }
}

pub(crate) fn bucket(score: f32) -> u16 {
    let x = (score.max(1e-12).log2() + 32.0) * 6.4;
    x.clamp(0.0, 255.0) as u16
}
