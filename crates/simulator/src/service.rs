//! How evenly tenants are served while they compete: the quantity that fair schedulers bound.
//!
//! A tenant competes while one of its calls waits. For two tenants that both compete from t1 to t2, the difference of
//! what they are given in between is at most 2 max(w_p L, w_q M) under a virtual token counter (Sheng et al., "Fairness
//! in Serving Large Language Models", OSDI 2024, theorem 4.4). The largest such difference over all pairs and intervals
//! is, for each pair and each time without a break in which both compete, the largest minus the smallest value of the
//! difference of their counters. Costs one visit per pair of competing tenants and step.

/// Price of a prompt token.
pub(crate) const PROMPT_PRICE: f64 = 1.0;
/// Price of a generated token.
pub(crate) const OUTPUT_PRICE: f64 = 2.0;
/// Tenants beyond are not compared: pairs grow with the square.
const COMPARED: usize = 32;

/// Counters and the extremes of their differences.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    given: Vec<f64>,
    waiting: Vec<u32>,
    /// By pair: the extremes of the difference since both compete; none before.
    extremes: Vec<Option<(f64, f64)>>,
    largest: f64,
}

impl Service {
    pub(crate) fn new(tenants: usize) -> Self {
        let n = tenants.min(COMPARED);
        Self { given: vec![0.0; tenants], waiting: vec![0; tenants], extremes: vec![None; n * n], largest: 0.0 }
    }

    pub(crate) fn waits(&mut self, tenant: u16) {
        self.waiting[usize::from(tenant)] += 1;
    }

    pub(crate) fn no_longer_waits(&mut self, tenant: u16) {
        self.waiting[usize::from(tenant)] -= 1;
    }

    pub(crate) fn give(&mut self, tenant: u16, tokens: f64) {
        self.given[usize::from(tenant)] += tokens;
    }

    /// Called once a step, when nobody is about to be admitted.
    pub(crate) fn compare(&mut self) {
        let n = self.given.len().min(COMPARED);
        for a in 0..n {
            for b in 0..a {
                let extremes = &mut self.extremes[a * n + b];
                if self.waiting[a] == 0 || self.waiting[b] == 0 {
                    *extremes = None;
                    continue;
                }
                let difference = self.given[a] - self.given[b];
                let (low, high) = extremes.unwrap_or((difference, difference));
                let (low, high) = (low.min(difference), high.max(difference));
                *extremes = Some((low, high));
                self.largest = self.largest.max(high - low);
            }
        }
    }

    pub(crate) fn largest_gap(&self) -> f64 {
        self.largest
    }
}
