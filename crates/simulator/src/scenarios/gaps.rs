//! `tool_gap`: what is kept while a tool runs. Llama-3.1-70B on four H100, where computing a long context again takes
//! seconds, and a host tier as large as the pool.

use std::path::Path;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, LogNormal, Pareto};
use replay::host::HostOptions;
use replay::latency::LatencyModel;
use replay::trace::Trace;
use replay::Result;

use super::traces::{generated, Recorded};
use super::{higher, lower, Metric, Scenario};
use crate::engine::EngineOptions;
use crate::outcome::mean;
use crate::workload::Workload;

const METRICS: &[Metric] = &[
    lower("mean session completion", "s"),
    lower("mean TTFT", "ms"),
    higher("hit rate", "%"),
    lower("preemptions", "1"),
];
const BASELINES: &[&str] = &["fcfs", "ttl-0.3", "ttl-1", "ttl-10", "continuum", "keep"];

/// Sessions at a time, and those that the pool holds.
const SESSIONS: usize = 24;
const POOL_SESSIONS: f64 = 2.5;
/// The host tier in pools.
const HOST_POOLS: usize = 1;

fn engine(trace: &Trace, pool_sessions: f64) -> EngineOptions {
    let largest = trace.calls.iter().map(|call| trace.blocks_in(call.prompt) + trace.blocks_in(call.output)).max();
    let pool = ((trace.mean_session_blocks() * pool_sessions) as usize).max(largest.unwrap_or(0));
    let options = EngineOptions { model: LatencyModel::LLAMA_3_1_70B_4XH100, ..EngineOptions::new(pool) };
    let host = HostOptions {
        blocks: HOST_POOLS * pool,
        bytes_per_s: options.model.host_bytes_per_s,
        prefetch_bytes_per_s: options.model.host_bytes_per_s / 2.0,
        block_bytes: options.model.kv_bytes_per_token * f64::from(trace.block_size),
    };
    EngineOptions { host: Some(host), ..options }
}

fn scenario(
    name: String,
    about: &'static str,
    sessions: usize,
    pool_sessions: f64,
    trace: impl Fn(u64) -> Result<Arc<Trace>> + Send + Sync + 'static,
) -> Scenario {
    Scenario {
        name,
        about,
        metrics: METRICS,
        baselines: BASELINES,
        measure: Box::new(move |setting, seed, policies| {
            let trace = trace(seed)?;
            let options = engine(&trace, pool_sessions);
            let workload = Workload::closed(trace, sessions, seed)?;
            let outcome = setting.run(&workload, &options, policies)?;
            Ok(vec![
                mean(&outcome.session_s(&workload.trace)),
                1e3 * mean(&outcome.ttft_s(|_| true)),
                100.0 * outcome.hit_rate(|_| true),
                outcome.preemptions as f64,
            ])
        }),
    }
}

/// A coding team whose tools take what `draw` says.
fn drawn(seed: u64, draw: impl Fn(&mut StdRng) -> f64) -> Result<Arc<Trace>> {
    let mut trace = generated("coding_team", 48, seed)?;
    let mut rng = StdRng::seed_from_u64(seed ^ 0x7001);
    for call in &mut trace.calls {
        let latency_s = draw(&mut rng);
        call.tool_latency_s = call.tool.map(|_| latency_s);
    }
    Ok(Arc::new(trace))
}

pub(super) fn scenarios(folder: Option<&Path>) -> Vec<Scenario> {
    let log_normal = |median_s: f64, sigma| LogNormal::new(f64::ln(median_s), sigma).expect("sigma is positive");
    let mut all = vec![
        scenario("short".into(), "tools take about 0.3 s", SESSIONS, POOL_SESSIONS, move |seed| {
            drawn(seed, |rng| log_normal(0.3, 0.5).sample(rng))
        }),
        scenario("heavy-tailed".into(), "tools take 0.5 s, or much longer", SESSIONS, POOL_SESSIONS, |seed| {
            drawn(seed, |rng| Pareto::new(0.5, 1.1).expect("both are positive").sample(rng))
        }),
        scenario("bimodal".into(), "tools take 0.2 s or 30 s", SESSIONS, POOL_SESSIONS, move |seed| {
            drawn(seed, |rng| log_normal(if rng.random_bool(0.7) { 0.2 } else { 30.0 }, 0.2).sample(rng))
        }),
    ];
    let recorded = [("claude_code_sub", 17, 100, 2.0), ("claude_code_main", 40, 50, 6.0)];
    for (name, sessions, calls, pool) in recorded {
        if let Some(recorded) = Recorded::find(folder, name, sessions, calls) {
            let about = "recorded prompts and tool times";
            all.push(scenario(format!("recorded/{name}"), about, 12, pool, move |_| recorded.get()));
        }
    }
    all
}
