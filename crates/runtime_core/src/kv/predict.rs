//! Who calls next, for those who have no pool: any thread may ask, from what a workload has learned and where a session
//! stands.

use super::chain::{Chain, LANES, STEPS};
use super::density::{self, CallTimes, Cycle, Services};
use super::plan::{call_times, expected_ends};
use super::workload::{self, standing_of_live, Sessions, Standing, Workload};
use super::Config;
use crate::sessions::SessionHandle;

/// One guess about a session's future.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// The agent.
    pub agent: u16,
    /// Which of the session's next calls, from 1.
    pub step: u8,
    /// P(that call is made, and by this agent).
    pub probability: f32,
    /// Median seconds from now until that call, given that it is made.
    pub median_s: f32,
}

/// The agents that may speak next in a session: recent ones and successors of the last ones.
fn candidates(workload: &Workload, recent: workload::Recent, at: &Standing) -> ([u16; LANES], usize) {
    use crate::ids::AgentId;
    use crate::successors::{after_tool, context_of, context_of_two};
    let (mut agents, mut n) = ([0u16; LANES], 0);
    let mut add = |agent: u16| {
        if n < LANES && agent != AgentId::UNKNOWN.0 && !agents[..n].contains(&agent) {
            agents[n] = agent;
            n += 1;
        }
    };
    let recent = recent.agents();
    recent[..3].iter().for_each(|&agent| add(agent));
    let (pair, one) = (context_of_two(AgentId(at.prev), AgentId(at.last)), context_of(AgentId(at.last)));
    let contexts = match at.tool_runs() {
        Some(true) => [after_tool(pair), after_tool(one)],
        _ => [pair, one],
    };
    for context in contexts {
        let mut row = [(0u16, 0u32); workload::SUCCESSORS];
        let found = workload.transitions.row(context, &mut row);
        row[..found].sort_unstable_by_key(|&(_, count)| std::cmp::Reverse(count));
        row[..found].iter().for_each(|&(agent, _)| add(agent));
    }
    recent[3..].iter().for_each(|&agent| add(agent));
    (agents, n)
}

/// As [`call_times`], for those who keep nothing and know of no queue.
fn fresh_call_times(workload: &Workload, at: &Standing, now_us: u64, config: &Config) -> CallTimes {
    let services = Services::new(&workload.services.hazards());
    let hazards = workload.gaps.hazards(workload.gaps.kind(at.context, config));
    let ends = expected_ends(workload, at, config);
    call_times(at, now_us, None, &Cycle::new(&hazards, &services, 0.0), &services, ends)
}

/// Fills `out` with the likeliest agents of the session's next `steps` calls, by step, likeliest first. Wait-free.
pub(crate) fn predict(
    workload: &Workload,
    sessions: &Sessions,
    handle: SessionHandle,
    config: &Config,
    steps: usize,
    out: &mut [Prediction],
) -> usize {
    let Some(at) = standing_of_live(sessions, handle) else { return 0 };
    let recent = workload::Recent::load(sessions, handle);
    let (agents, n) = candidates(workload, recent, &at);
    let mut chain = Chain::new(workload, config, &agents[..n], at.tool_runs());
    let steps = steps.min(STEPS);
    let mut marginals = [[0.0; LANES + 1]; STEPS];
    chain.marginals(at.prev, at.last, &mut marginals[..steps]);
    let mut filled = 0;
    let mut alive = workload.ends.continues(at.features, config);
    let later: [f32; STEPS] = workload.ends.later(at.features.steps, config);
    for (step, row) in marginals[..steps].iter().enumerate() {
        let from = filled;
        for (agent, &p) in agents[..n].iter().zip(row) {
            if filled < out.len() && p > 0.001 {
                out[filled] =
                    Prediction { agent: *agent, step: step as u8 + 1, probability: p * alive, median_s: f32::NAN };
                filled += 1;
            }
        }
        out[from..filled].sort_unstable_by(|a, b| b.probability.total_cmp(&a.probability));
        alive *= later[step];
    }
    filled
}

/// Adds the median times to predictions of one session.
pub(crate) fn time_predictions(
    workload: &Workload,
    sessions: &Sessions,
    handle: SessionHandle,
    config: &Config,
    now_us: u64,
    out: &mut [Prediction],
) {
    let Some(at) = standing_of_live(sessions, handle) else { return };
    let times = fresh_call_times(workload, &at, now_us, config);
    for prediction in out {
        let row = &times[prediction.step as usize - 1];
        prediction.median_s = density::quantile_s(row, 0.5);
    }
}

/// P(the session calls `agent` within `horizon_s`), for each of `agents`. Wait-free.
#[expect(clippy::too_many_arguments, reason = "a struct for one caller would say no more")]
pub(crate) fn score_agents(
    workload: &Workload,
    sessions: &Sessions,
    handle: SessionHandle,
    config: &Config,
    now_us: u64,
    horizon_s: f32,
    agents: &[u16],
    out: &mut [f32],
) {
    let Some(at) = standing_of_live(sessions, handle) else {
        out.fill(0.0);
        return;
    };
    let recent = workload::Recent::load(sessions, handle);
    let (known, n) = candidates(workload, recent, &at);
    let weights = Chain::new(workload, config, &known[..n], at.tool_runs()).weights(at.prev, at.last);
    let times = fresh_call_times(workload, &at, now_us, config);
    for (agent, out) in agents.iter().zip(out) {
        *out = known[..n].iter().position(|a| a == agent).map_or(0.0, |i| {
            let first = &weights[i].0[0];
            (0..STEPS).map(|step| first[step] * density::within(&times[step], horizon_s)).sum::<f32>().min(1.0)
        });
    }
}
