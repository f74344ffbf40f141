//! `speculation`: prefills in idle capacity.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::SeedableRng;
use rand_distr::{Distribution, LogNormal};

use super::traces::pipeline;
use super::{higher, lower, Metric, Scenario};
use crate::engine::EngineOptions;
use crate::outcome::{mean, percentile};
use crate::workload::Workload;

const METRICS: &[Metric] = &[
    lower("mean TTFT", "ms"),
    lower("p99 TTFT", "ms"),
    higher("hit rate", "%"),
    lower("device time spent on prefills ahead", "%"),
];
/// Predictability of the next agent.
const PREDICTABILITIES: [f64; 6] = [1.0, 0.7, 0.5, 0.3, 0.15, 0.0];
const SESSIONS: usize = 4;
/// Sessions that the pool holds: not all agents of those that run.
const POOL_SESSIONS: f64 = 1.5;

pub(super) fn scenarios() -> Vec<Scenario> {
    let one = |r: f64| Scenario {
        name: format!("sequential R={r}"),
        about: "four sessions of eight agents in turn, one or two seconds between calls",
        metrics: METRICS,
        baselines: &["fcfs"],
        measure: Box::new(move |setting, seed, policies| {
            let mut trace = pipeline(40, 48, r, seed);
            let gap = LogNormal::new(1.5f64.ln(), 0.4).expect("sigma is positive");
            let mut rng = StdRng::seed_from_u64(seed);
            for call in &mut trace.calls {
                call.tool_latency_s = Some(gap.sample(&mut rng));
            }
            let options = EngineOptions::new((trace.mean_session_blocks() * POOL_SESSIONS) as usize);
            let workload = Workload::closed(Arc::new(trace), SESSIONS, seed)?;
            let outcome = setting.run(&workload, &options, policies)?;
            let ttft = outcome.ttft_s(|_| true);
            Ok(vec![
                1e3 * mean(&ttft),
                1e3 * percentile(&ttft, 0.99),
                100.0 * outcome.hit_rate(|_| true),
                100.0 * outcome.speculative_us as f64 / outcome.busy_us.max(1) as f64,
            ])
        }),
    };
    PREDICTABILITIES.into_iter().map(one).collect()
}
