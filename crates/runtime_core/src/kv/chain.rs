//! Which lane of a session calls when: first-passage probabilities over the next six calls.
use super::index::NONE;
use super::learned::Transitions;
use super::{Config, Lane, Session};

pub(crate) const STEPS: usize = 6;
pub(crate) const L: usize = 8;

#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct LaneWeights {
    pub(crate) lane: u32,
    /// P(the lane's m-th further call is the session's i-th next call).
    pub(crate) w: [[f32; STEPS]; 3],
}

#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Lanes {
    pub(crate) n: usize,
    pub(crate) ids: [u32; L],
    pub(crate) agents: [u16; L],
    pub(crate) weights: [LaneWeights; L],
}

impl Lanes {
    pub(crate) fn of(lanes: &[Lane], session: &Session) -> Self {
        let mut out = Self::default();
        let mut lane = session.lanes;
        while lane != NONE && out.n < L {
            out.ids[out.n] = lane;
            out.agents[out.n] = lanes[lane as usize].agent;
            out.n += 1;
            lane = lanes[lane as usize].next;
        }
        out
    }

    pub(crate) fn weights(mut self, t: &Transitions, session: &Session, cfg: &Config) -> Self {
        let n = self.n;
        if n == 0 {
            return self;
        }
        let w = n + 1;
        // rows[(prev, last)] over lanes 0..n and "another agent" n.
        let mut rows = [[0.0f32; L + 1]; (L + 1) * (L + 1)];
        let mut known = [false; (L + 1) * (L + 1)];
        let position = |agent: u16| {
            self.agents[..n]
                .iter()
                .position(|&a| a == agent)
                .unwrap_or(n)
        };
        let start = position(session.prev) * w + 0;
        let agents = self.agents;
        let mut row = |state: usize, rows: &mut [[f32; L + 1]; (L + 1) * (L + 1)]| {
            if known[state] {
                return;
            }
            known[state] = true;
            let (p, l) = (state / w, state % w);
            let out = &mut rows[state];
            if !cfg.prediction {
                for x in out[..n].iter_mut() {
                    *x = 1.0 / (n as f32 + 0.5);
                }
                out[n] = 0.5 / (n as f32 + 0.5);
                return;
            }
            let total: f32 = t.rank.iter().sum::<f32>() + 4.0;
            // Recency list after `p`, `l` have spoken: l, p, then the rest.
            let mut order = [0usize; L + 1];
            let mut m = 0;
            for x in [l, p] {
                if x < n && !order[..m].contains(&x) {
                    order[m] = x;
                    m += 1;
                }
            }
            for x in 0..n {
                if !order[..m].contains(&x) {
                    order[m] = x;
                    m += 1;
                }
            }
            let mut sum = 0.0;
            for (r, &x) in order[..n].iter().enumerate() {
                out[x] = (t.rank[r] + 1.0 / (1.0 + r as f32)) / total;
                sum += out[x];
            }
            out[n] = (1.0 - sum).max(0.01);
            if l < n {
                let mut apply = |counts: &[(u16, f32)], kappa: f32| {
                    let total: f32 = counts.iter().map(|c| c.1).sum();
                    let mut rest = total;
                    let mut fresh = [0.0f32; L + 1];
                    for &(a, c) in counts {
                        if let Some(x) = agents[..n].iter().position(|&y| y == a) {
                            fresh[x] = c;
                            rest -= c;
                        }
                    }
                    fresh[n] = rest;
                    for x in 0..=n {
                        out[x] = (fresh[x] + kappa * out[x]) / (total + kappa);
                    }
                };
                if let Some(c) = t.order1.get(&agents[l]) {
                    apply(c, 4.0);
                }
                if cfg.order2 {
                    let prev = if p < n { agents[p] } else { super::NO_AGENT };
                    if let Some(c) = t.order2.get(&(prev, agents[l])) {
                        apply(c, 3.0);
                    }
                }
            }
        };
        let passage =
            |from: usize,
             target: usize,
             rows: &mut [[f32; L + 1]; (L + 1) * (L + 1)],
             row: &mut dyn FnMut(usize, &mut [[f32; L + 1]; (L + 1) * (L + 1)])| {
                let mut q = [0.0f32; STEPS];
                let mut now = [0.0f32; (L + 1) * (L + 1)];
                now[from] = 1.0;
                for q in q.iter_mut() {
                    let mut next = [0.0f32; (L + 1) * (L + 1)];
                    for state in 0..w * w {
                        let mass = now[state];
                        if mass < 0.004 {
                            continue;
                        }
                        row(state, rows);
                        let l = state % w;
                        for b in 0..w {
                            let x = mass * rows[state][b];
                            if b == target {
                                *q += x;
                            } else {
                                next[l * w + b] += x;
                            }
                        }
                    }
                    now = next;
                }
                q
            };
        let conv = |a: &[f32; STEPS], b: &[f32; STEPS]| {
            let mut out = [0.0; STEPS];
            for i in 0..STEPS {
                for j in 0..i {
                    out[i] += a[j] * b[i - j - 1];
                }
            }
            out
        };
        for a in 0..n {
            let q = passage(start, a, &mut rows, &mut row);
            let back = if a == 0 {
                q
            } else {
                passage(a, a, &mut rows, &mut row)
            };
            let w2 = conv(&q, &back);
            let w3 = conv(&w2, &back);
            self.weights[a] = LaneWeights {
                lane: self.ids[a],
                w: [q, w2, w3],
            };
        }
        self
    }
}
