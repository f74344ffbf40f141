//! End of session: is there a next call at all?
//!
//! Every finished call is a trial: success when the session calls again, failure once it has been silent for longer than
//! 98 % of all gaps (taken back if it calls after all). By agent, step (exact up to eight, then half octaves), size
//! of the last answer (octaves) and the tool that runs (its result has to go somewhere), combined in log-odds around the global rate:
//! logit p = logit p_0 + sum over features f of (logit p_f - logit p_0). Of calls after the next only the step is known.

use crate::histogram::{Counters, Lanes, Often, OFTEN, UNIT};

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
    let steps = u32::from(steps);
    if steps <= 8 {
        steps as usize
    } else {
        // Half octaves above 8: the octave, and whether the square lies in the upper half of the octave of squares.
        let octave = steps.ilog2();
        let upper = (steps * steps) >> (2 * octave + 1);
        (2 * (octave - 3) + upper) as usize + 9
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

    #[inline]
    fn cells_of(features: Features) -> [Option<usize>; 5] {
        [
            Some(0),
            ((features.agent as usize) < ROWS).then_some(1 + features.agent as usize),
            Some(1 + ROWS + step_class(features.steps).min(STEPS - 1)),
            Some(1 + ROWS + STEPS + (features.size as usize).min(SIZES - 1)),
            Some(1 + ROWS + STEPS + SIZES + (features.tool as usize).min(TOOLS - 1)),
        ]
    }

    /// Whether calls of the agent were counted many times, if they are counted by themselves.
    #[inline]
    pub(crate) fn are_many(&self, agent: u16) -> bool {
        let agent = agent as usize;
        agent >= ROWS || u32::from(self.lanes.get(2 * (1 + agent))) >= OFTEN
    }

    /// The session called again. `doubted`: its end had been counted already.
    pub(crate) fn went_on(&self, features: Features, doubted: bool, often: Often) {
        // A doubted call was counted as a trial; only the success is missing.
        let trial = if doubted { 0 } else { UNIT };
        self.add(features, [trial, UNIT], often);
    }

    /// The session has been silent for too long.
    pub(crate) fn ended(&self, features: Features, often: Often) {
        self.add(features, [UNIT, 0], often);
    }

    #[inline]
    fn add(&self, features: Features, steps: [u32; 2], often: Often) {
        let [all, agent, step, size, tool] = Self::cells_of(features);
        if let Some(weight) = often.drawn() {
            let put = |cell: Option<usize>| {
                if let Some(cell) = cell {
                    self.lanes.put(Lanes::new(2 * cell, steps, weight));
                }
            };
            put(all);
            put(agent);
            put(step);
            put(size);
            return put(tool);
        }
        let add = |cell: Option<usize>| {
            if let Some(cell) = cell {
                self.lanes.add_steps(2 * cell, steps, often);
            }
        };
        // One by one: a loop over the array would build it first.
        add(all);
        add(agent);
        add(step);
        add(size);
        add(tool);
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

    /// P(next call) after each of a session's next calls, the first of which will be its call number `steps` + 1: by step
    /// alone, as nothing else is known of them.
    pub(crate) fn later<const N: usize>(&self, steps: u16, config: &Config) -> [f32; N] {
        let base = self.overall();
        if !config.session_end {
            return [base; N];
        }
        std::array::from_fn(|i| {
            let features = Features { steps: steps.saturating_add(1 + i as u16), ..Features::default() };
            let cell = Self::cells_of(features)[2];
            cell.map_or(base, |cell| self.rate(cell, base, 4.0))
        })
    }

    /// P(next call) of a session.
    pub(crate) fn continues(&self, features: Features, config: &Config) -> f32 {
        if !config.session_end {
            return 0.999;
        }
        // Sums of log-odds are products of odds.
        let odds = |p: f32| p / (1.0 - p);
        let base = self.overall();
        let [_, rest @ ..] = Self::cells_of(features);
        let parts = rest.into_iter().flatten().map(|cell| odds(self.rate(cell, base, 4.0)) / odds(base));
        let odds = odds(base) * parts.product::<f32>();
        (odds / (1.0 + odds)).clamp(0.001, 0.9995)
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
                ends.went_on(Features { agent: 0, steps, size: 3, tool: 0 }, false, Often::ALWAYS);
            }
            ends.ended(Features { agent: 0, steps: 5, size: 3, tool: 0 }, Often::ALWAYS);
        }
        let config = Config::default();
        let at = |steps| ends.continues(Features { agent: 0, steps, size: 3, tool: 0 }, &config);
        assert!(at(2) > 0.9 && at(5) < 0.2, "{} {}", at(2), at(5));
    }

    #[test]
    fn calls_after_the_next_are_known_by_their_step() {
        let (ends, config) = (Ends::default(), Config::default());
        for _ in 0..40 {
            for steps in 1..5 {
                ends.went_on(Features { steps, ..Features::default() }, false, Often::ALWAYS);
            }
            ends.ended(Features { steps: 5, ..Features::default() }, Often::ALWAYS);
        }
        let later: [f32; 3] = ends.later(2, &config);
        assert!(later[0] > 0.9 && later[1] > 0.9 && later[2] < 0.2, "{later:?}");
    }

    #[test]
    fn a_session_whose_tool_runs_is_expected_to_go_on() {
        let ends = Ends::default();
        for _ in 0..40 {
            ends.went_on(Features { agent: 0, steps: 9, size: 3, tool: 2 }, false, Often::ALWAYS);
            ends.ended(Features { agent: 0, steps: 9, size: 3, tool: 0 }, Often::ALWAYS);
        }
        let at = |tool| ends.continues(Features { agent: 0, steps: 9, size: 3, tool }, &Config::default());
        assert!(at(2) > 0.9 && at(0) < 0.2, "{} {}", at(2), at(0));
    }

    #[test]
    fn a_return_after_a_counted_end_takes_it_back() {
        let ends = Ends::default();
        let features = Features { agent: 0, steps: 1, size: 0, tool: 0 };
        for _ in 0..100 {
            ends.ended(features, Often::ALWAYS);
            ends.went_on(features, true, Often::ALWAYS);
        }
        assert!(ends.overall() > 0.95);
    }
}
