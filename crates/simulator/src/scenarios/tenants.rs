//! `fairness`: whose turn it is, and whose blocks go.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replay::trace::Trace;
use replay::Result;

use super::traces::{generated, join, unique_prompts};
use super::{higher, lower, Metric, Scenario, Setting};
use crate::engine::EngineOptions;
use crate::outcome::{mean, Outcome};
use crate::workload::{Arrivals, Workload};

const BASELINES: &[&str] = &["fcfs", "rate-limit-10000", "drr", "vtc"];

/// Tenants with so many sessions each, all of which begin within ten seconds.
fn tenants(sessions: &[usize], seed: u64) -> Result<Workload> {
    let parts: Vec<Trace> = (0u64..)
        .zip(sessions)
        .map(|(tenant, &n)| generated("selector_chat", n, seed * 64 + tenant))
        .collect::<Result<_>>()?;
    let (trace, tenant) = join(&parts);
    let mut rng = StdRng::seed_from_u64(seed);
    let starts = tenant.iter().map(|_| rng.random_range(0..10_000_000)).collect();
    with_starts(trace, tenant, starts, seed)
}

fn with_starts(trace: Trace, tenant: Vec<u16>, starts: Vec<u64>, seed: u64) -> Result<Workload> {
    let trace = Arc::new(trace);
    let gaps = Workload::closed(Arc::clone(&trace), 1, seed)?.gap_us;
    Ok(Workload { trace, gap_us: gaps, tenant, arrivals: Arrivals::Open(starts) })
}

/// A pool of eight sessions, and few calls at a time: whoever comes has to wait.
fn engine(sessions: f64, block_mean: f64) -> EngineOptions {
    EngineOptions { max_running: 16, ..EngineOptions::new((sessions * block_mean) as usize) }
}

fn session_s_of(outcome: &Outcome, workload: &Workload, of: impl Fn(u16) -> bool) -> f64 {
    let all = outcome.session_s(&workload.trace);
    let chosen: Vec<f64> = all.iter().zip(&workload.tenant).filter(|(_, t)| of(**t)).map(|(s, _)| *s).collect();
    mean(&chosen)
}

fn compete(name: &str, about: &'static str, sessions: &'static [usize]) -> Scenario {
    const METRICS: &[Metric] = &[
        lower("service gap over its bound", "1"),
        higher("throughput", "tokens/s"),
        lower("mean session completion of the lighter half", "s"),
    ];
    Scenario {
        name: name.into(),
        about,
        metrics: METRICS,
        baselines: BASELINES,
        measure: Box::new(move |setting, seed, policies| {
            let workload = tenants(sessions, seed)?;
            let options = engine(8.0, workload.trace.mean_session_blocks());
            let outcome = setting.run(&workload, &options, policies)?;
            let lighter = sessions.len() as u16 / 2;
            Ok(vec![
                outcome.service_gap / outcome.service_bound,
                outcome.tokens_per_s(&workload),
                session_s_of(&outcome, &workload, |tenant| tenant >= lighter),
            ])
        }),
    }
}

/// Three quiet tenants beside one that sends long prompts that nobody sends again; the same without it.
fn flood(setting: &Setting, seed: u64, policies: &str) -> Result<Vec<f64>> {
    const QUIET: u16 = 3;
    const SESSIONS: usize = 10;
    let quiet: Vec<Trace> = (0..u64::from(QUIET))
        .map(|tenant| generated("selector_chat", SESSIONS, seed * 64 + tenant))
        .collect::<Result<_>>()?;
    let run = |calls: usize| -> Result<(f64, f64)> {
        let mut parts = quiet.clone();
        let blocks = parts[0].mean_session_blocks();
        parts.push(unique_prompts(calls, 8192, 8));
        let (trace, tenant) = join(&parts);
        let mut rng = StdRng::seed_from_u64(seed);
        let starts = tenant
            .iter()
            .map(|&tenant| match tenant {
                // About two thirds of what the device can prefill.
                QUIET => rng.random_range(0..FLOOD_S * 1_000_000),
                _ => rng.random_range(0..FLOOD_S * 500_000),
            })
            .collect();
        let mut workload = with_starts(trace, tenant, starts, seed)?;
        // Long enough between calls for others to come between.
        workload.gap_us.iter_mut().for_each(|gap_us| *gap_us *= 8);
        let options = EngineOptions::new((blocks * f64::from(QUIET) * SESSIONS as f64) as usize);
        let outcome = setting.run(&workload, &options, policies)?;
        let of_quiet = |call: usize| workload.tenant[workload.trace.calls[call].session as usize] != QUIET;
        Ok((100.0 * outcome.hit_rate(of_quiet), 1e3 * mean(&outcome.ttft_s(of_quiet))))
    };
    const FLOOD_S: u64 = 120;
    let ((alone, alone_ms), (flooded, flooded_ms)) = (run(1)?, run(FLOOD_S as usize * 3)?);
    Ok(vec![alone - flooded, flooded, flooded_ms - alone_ms])
}

/// One tenant has more work than the engine can do; another has little, then none, then as much. For how long
/// the first one gets nothing after the other's return.
fn newcomer(setting: &Setting, seed: u64, policies: &str) -> Result<Vec<f64>> {
    const RETURN_US: u64 = 90_000_000;
    const WATCHED_US: u64 = 30_000_000;
    let parts = [generated("selector_chat", 120, seed * 64)?, generated("selector_chat", 60, seed * 64 + 1)?];
    let (trace, tenant) = join(&parts);
    let blocks = trace.mean_session_blocks();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut early = 4;
    let starts = tenant.iter().map(|&tenant| match tenant {
        0 => rng.random_range(0..60_000_000),
        _ if early > 0 => {
            early -= 1;
            0
        }
        _ => RETURN_US + rng.random_range(0..1_000_000),
    });
    let starts = starts.collect();
    let workload = with_starts(trace, tenant, starts, seed)?;
    let outcome = setting.run(&workload, &engine(8.0, blocks), policies)?;
    let of_other = |call: usize| workload.tenant[workload.trace.calls[call].session as usize] == 0;
    let admitted = (0..outcome.calls.len()).filter(|&call| of_other(call)).map(|call| outcome.calls[call].admitted_us);
    let mut admitted: Vec<u64> =
        admitted.filter(|at| (RETURN_US..RETURN_US + WATCHED_US).contains(at)).chain([RETURN_US]).collect();
    admitted.sort_unstable();
    let longest_us = admitted.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(WATCHED_US);
    Ok(vec![longest_us as f64 / 1e6, outcome.service_gap / outcome.service_bound])
}

pub(super) fn scenarios() -> Vec<Scenario> {
    const FLOOD: &[Metric] = &[
        lower("hit rate that the others lose", "points"),
        higher("hit rate of the others", "%"),
        lower("mean TTFT that the others lose", "ms"),
    ];
    const NEWCOMER: &[Metric] =
        &[lower("longest time without an admission of the other", "s"), lower("service gap over its bound", "1")];
    vec![
        compete("two tenants", "one with four times the sessions of the other", &[80, 20]),
        compete("many tenants", "sixteen tenants, 40 sessions to 2", MANY),
        Scenario {
            name: "flood".into(),
            about: "one tenant sends long prompts once each, three work in what is left",
            metrics: FLOOD,
            baselines: BASELINES,
            measure: Box::new(flood),
        },
        Scenario {
            name: "newcomer".into(),
            about: "a tenant that was idle comes back with much to do",
            metrics: NEWCOMER,
            baselines: BASELINES,
            measure: Box::new(newcomer),
        },
    ]
}

/// In proportion to 1 / (number of the tenant).
const MANY: &[usize] = &[40, 20, 13, 10, 8, 7, 6, 5, 4, 4, 4, 3, 3, 3, 3, 2];
