//! End of session: is there a next call at all?
//!
//! Every finished call is a trial: success when the session calls again, failure once it has been silent for longer than
//! 98 % of all gaps (taken back if it calls after all). By agent, step (exact up to eight, then half octaves), size
//! of the last answer (octaves) and the tool that runs (its result has to go somewhere), combined in log-odds around the global rate:
//! logit p = logit p_0 + sum over features f of (logit p_f - logit p_0).

use crate::histogram::{Counters, UNIT};

use super::content::ROWS;
use super::gaps::TOOLS;
use super::Config;

const STEPS: usize = 24;
const SIZES: usize = 16;
const CELLS: usize = 1 + ROWS + STEPS + SIZES + TOOLS;

/// What the end of a session may depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    pub(crate) agent: u16,
    /// Calls so far.
    pub(crate) steps: u16,
    /// Bits of the last answer's length in blocks.
    pub(crate) size: u8,
    /// The tool that runs now, 0 for none.
    pub(crate) tool: u8,
}

fn step_class(steps: u16) -> usize {
    if steps <= 8 {
        steps as usize
    } else {
        (2.0 * (f32::from(steps) / 8.0).log2()) as usize + 9
    }
}

/// Trials and successes, one lane each; all fade together.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Ends {
    lanes: Counters<{ (2 * CELLS).div_ceil(4) }>,
}

impl Ends {
    pub(super) fn row(&self) -> &Counters<{ (2 * CELLS).div_ceil(4) }> {
        &self.lanes
    }

    fn cells_of(features: Features) -> [Option<usize>; 5] {
        [
            Some(0),
            ((features.agent as usize) < ROWS).then_some(1 + features.agent as usize),
            Some(1 + ROWS + step_class(features.steps).min(STEPS - 1)),
            Some(1 + ROWS + STEPS + (features.size as usize).min(SIZES - 1)),
            Some(1 + ROWS + STEPS + SIZES + (features.tool as usize).min(TOOLS - 1)),
        ]
    }

    /// The session called again. `doubted`: its end had been counted already.
    pub(crate) fn went_on(&self, features: Features, doubted: bool) {
        for cell in Self::cells_of(features).into_iter().flatten() {
            // A doubted call was counted as a trial; only the success is missing.
            if !doubted {
                self.lanes.add_step(2 * cell, UNIT);
            }
            self.lanes.add_step(2 * cell + 1, UNIT);
        }
    }

    /// The session has been silent for too long.
    pub(crate) fn ended(&self, features: Features) {
        for cell in Self::cells_of(features).into_iter().flatten() {
            self.lanes.add_step(2 * cell, UNIT);
        }
    }

    fn rate(&self, cell: usize, prior: f32, weight: f32) -> f32 {
        let (trials, successes) = (self.lanes.get(2 * cell), self.lanes.get(2 * cell + 1));
        let unit = UNIT as f32;
        let rate = (f32::from(successes) / unit + weight * prior) / (f32::from(trials) / unit + weight);
        rate.clamp(0.001, 0.9995)
    }

    /// P(next call) over all sessions.
    pub(crate) fn overall(&self) -> f32 {
        self.rate(0, 0.9, 10.0)
    }

    /// P(next call) after a call of an agent, whatever else is known.
    pub(crate) fn of_agent(&self, agent: u16) -> f32 {
        let cell = Self::cells_of(Features { agent, ..Features::default() })[1];
        cell.map_or_else(|| self.overall(), |cell| self.rate(cell, self.overall(), 4.0))
    }

    /// P(next call) of a session.
    pub(crate) fn continues(&self, features: Features, config: &Config) -> f32 {
        if !config.session_end {
            return 0.999;
        }
        let logit = |p: f32| (p / (1.0 - p)).ln();
        let base = self.overall();
        let [_, rest @ ..] = Self::cells_of(features);
        let parts = rest.into_iter().flatten().map(|cell| logit(self.rate(cell, base, 4.0)) - logit(base));
        let sum = logit(base) + parts.sum::<f32>();
        (1.0 / (1.0 + (-sum).exp())).clamp(0.001, 0.9995)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_that_end_at_step_five_are_expected_to() {
        let ends = Ends::default();
        for _ in 0..40 {
            for steps in 1..5 {
                ends.went_on(Features { agent: 0, steps, size: 3, tool: 0 }, false);
            }
            ends.ended(Features { agent: 0, steps: 5, size: 3, tool: 0 });
        }
        let config = Config::default();
        let at = |steps| ends.continues(Features { agent: 0, steps, size: 3, tool: 0 }, &config);
        assert!(at(2) > 0.9 && at(5) < 0.2, "{} {}", at(2), at(5));
    }

    #[test]
    fn a_session_whose_tool_runs_is_expected_to_go_on() {
        let ends = Ends::default();
        for _ in 0..40 {
            ends.went_on(Features { agent: 0, steps: 9, size: 3, tool: 2 }, false);
            ends.ended(Features { agent: 0, steps: 9, size: 3, tool: 0 });
        }
        let at = |tool| ends.continues(Features { agent: 0, steps: 9, size: 3, tool }, &Config::default());
        assert!(at(2) > 0.9 && at(0) < 0.2, "{} {}", at(2), at(0));
    }

    #[test]
    fn a_return_after_a_counted_end_takes_it_back() {
        let ends = Ends::default();
        let features = Features { agent: 0, steps: 1, size: 0, tool: 0 };
        for _ in 0..100 {
            ends.ended(features);
            ends.went_on(features, true);
        }
        assert!(ends.overall() > 0.95);
    }
}
