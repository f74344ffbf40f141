//! Are agentrt's probabilities true? Predictions of survival, sampled during a replay, against what then happened.
//!
//! *Survival* of a resident block is P(a call starts whose prompt holds the block, within the residence time), where the
//! residence time is what the policy itself believes a block stays: pool size x mean time between evictions of a block.
//! The outcome depends on the order of calls alone, not on what any policy evicts meanwhile: it asks whether keeping the
//! block would have been rewarded. A sample whose residence time reaches beyond the end of the replay has no outcome and
//! is left out.

use serde::Serialize;

use crate::schedule::{EventKind, Schedule};
use crate::trace::Trace;

/// Bins of a reliability diagram, of equal width.
pub const BINS: usize = 10;

/// One prediction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Position in [`Schedule::events`] after which it was made.
    pub event: u32,
    /// The block.
    pub block: u32,
    /// Microseconds within which the block was to be used.
    pub horizon_us: u64,
    /// How likely that was said to be.
    pub probability: f32,
}

/// Predictions of about the same probability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Bin {
    /// Predictions.
    pub n: u64,
    /// Their mean.
    pub predicted: f64,
    /// Share of them that came true.
    pub observed: f64,
}

/// How true a set of predictions was.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Reliability {
    /// Predictions with an outcome.
    pub n: u64,
    /// Mean prediction.
    pub predicted: f64,
    /// Share that came true.
    pub observed: f64,
    /// Mean squared error; 0 is perfect.
    pub brier: f64,
    /// The same of somebody who always says `observed`: predictions below it know something.
    pub brier_of_mean: f64,
    /// Expected calibration error: mean over bins, weighted by predictions, of |predicted - observed|.
    pub ece: f64,
    /// By probability, from 0 to 1 in steps of a tenth.
    pub bins: Vec<Bin>,
}

impl Reliability {
    /// Of predictions and whether they came true.
    pub fn of(outcomes: impl IntoIterator<Item = (f32, bool)>) -> Self {
        let mut bins = [(0u64, 0.0f64, 0u64); BINS];
        let mut squares = 0.0;
        for (probability, came_true) in outcomes {
            let p = f64::from(probability).clamp(0.0, 1.0);
            let bin = &mut bins[((p * BINS as f64) as usize).min(BINS - 1)];
            bin.0 += 1;
            bin.1 += p;
            bin.2 += u64::from(came_true);
            squares += (p - f64::from(u8::from(came_true))).powi(2);
        }
        let n: u64 = bins.iter().map(|b| b.0).sum();
        let share = |part: f64| part / n.max(1) as f64;
        let observed = share(bins.iter().map(|b| b.2 as f64).sum());
        Self {
            n,
            predicted: share(bins.iter().map(|b| b.1).sum()),
            observed,
            brier: share(squares),
            brier_of_mean: observed * (1.0 - observed),
            ece: share(bins.iter().map(|b| (b.1 - b.2 as f64).abs()).sum()),
            bins: bins
                .iter()
                .map(|&(n, sum, hits)| Bin {
                    n,
                    predicted: sum / n.max(1) as f64,
                    observed: hits as f64 / n.max(1) as f64,
                })
                .collect(),
        }
    }
}

/// What happened to each sample: true where its block was used in time, `None` where the replay ended too early to tell.
/// `samples` are in the order of their events.
pub fn outcomes(trace: &Trace, schedule: &Schedule, samples: &[Sample]) -> Vec<Option<bool>> {
    let end_us = schedule.events.last().map_or(0, |event| event.time_us);
    let mut next_us = vec![u64::MAX; trace.n_blocks as usize];
    let mut known = vec![None; samples.len()];
    let mut left = samples.len();
    for (position, event) in schedule.events.iter().enumerate().rev() {
        while left > 0 && samples[left - 1].event as usize == position {
            left -= 1;
            let sample = samples[left];
            let until_us = event.time_us.saturating_add(sample.horizon_us);
            known[left] = (until_us <= end_us).then(|| next_us[sample.block as usize] <= until_us);
        }
        if event.kind == EventKind::Start {
            for block in trace.blocks(trace.calls[event.call as usize].prompt) {
                next_us[block as usize] = event.time_us;
            }
        }
    }
    known
}
