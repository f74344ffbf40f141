//! What each policy is judged by: workloads, engines, figures, and whom it is compared with.
//!
//! | file | scenarios |
//! |---|---|
//! | `order.rs` | `batch_shaping`: overload and light load |
//! | `tenants.rs` | `fairness`: tenants that compete, one that floods the cache, one that comes back |
//! | `gaps.rs` | `tool_gap`: recorded and drawn tool times |
//! | `idle.rs` | `speculation`: pipelines with idle gaps, more and less predictable |
//! | `traces.rs` | traces made for them: parts of others, several in one, a pipeline of given predictability |
//!
//! A scenario is a function from a seed and the names of policies to its figures; equal seeds give every contender the
//! same workload. The engine is Llama-3.1-8B on one H100 as [`EngineOptions::new`] has it, where nothing else is said.

mod gaps;
mod idle;
mod order;
mod tenants;
pub(crate) mod traces;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rayon::prelude::*;
pub use replay::sweep::Progress;
use replay::{Error, Result};
use serde::Serialize;

use crate::baselines;
use crate::engine::{simulate, EngineOptions};
use crate::outcome::Outcome;
use crate::workload::Workload;

/// A figure of a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Metric {
    /// What it is.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// More of it is better.
    pub higher: bool,
}

const fn lower(name: &'static str, unit: &'static str) -> Metric {
    Metric { name, unit, higher: false }
}

const fn higher(name: &'static str, unit: &'static str) -> Metric {
    Metric { name, unit, higher: true }
}

/// Figures under a seed and policies (names joined by `+`), one for each metric.
type Measure = Box<dyn Fn(&Setting, u64, &str) -> Result<Vec<f64>> + Send + Sync>;

/// One situation.
pub struct Scenario {
    /// Its name.
    pub name: String,
    /// One line on it.
    pub about: &'static str,
    /// Its figures.
    pub metrics: &'static [Metric],
    /// Whom a policy is compared with; the first is the engine without one.
    pub baselines: &'static [&'static str],
    measure: Measure,
}

impl std::fmt::Debug for Scenario {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Scenario({})", self.name)
    }
}

/// What all scenarios of a run have in common.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The cache policy of the engine.
    pub cache: String,
}

impl Setting {
    fn run(&self, workload: &Workload, options: &EngineOptions, policies: &str) -> Result<Outcome> {
        let options = EngineOptions { cache: self.cache.clone(), ..options.clone() };
        let policies = baselines::build_for(policies, &workload.trace, &options.model)?;
        simulate(workload, &options, policies, &mut |_| {})
    }
}

/// The policies that have scenarios.
pub const FAMILIES: [&str; 4] = ["batch_shaping", "fairness", "tool_gap", "speculation"];

/// Whose scenarios a policy, or a baseline, is run in.
fn family(name: &str) -> Option<&'static str> {
    let of = |list: &[&str]| list.iter().any(|start| name.starts_with(start));
    Some(match name {
        _ if of(&["batch_shaping", "lpm", "priority", "cap-", "oracle-remaining", "learned-remaining"]) => {
            "batch_shaping"
        }
        _ if of(&["fairness", "agent_fairness", "rate-limit-", "drr", "vtc"]) => "fairness",
        _ if of(&["tool_gap", "ttl-", "continuum", "keep"]) => "tool_gap",
        _ if of(&["speculation"]) => "speculation",
        _ => return None,
    })
}

/// The scenarios for a policy or several (names joined by `+`); recorded workloads where `traces` has them.
pub fn scenarios(policy: &str, traces: Option<&Path>) -> Result<Vec<Scenario>> {
    let mut families: Vec<&str> = policy.split('+').filter_map(|name| family(name.trim())).collect();
    if families.is_empty() {
        families = FAMILIES.to_vec();
    }
    families.dedup();
    let mut all = Vec::new();
    for family in families {
        all.extend(match family {
            "batch_shaping" => order::scenarios(traces),
            "fairness" => tenants::scenarios(),
            "tool_gap" => gaps::scenarios(traces),
            _ => idle::scenarios(),
        });
    }
    Ok(all)
}

/// What to run.
#[derive(Clone, Debug)]
pub struct SuiteOptions {
    /// The policy: a name, or several joined by `+`.
    pub policy: String,
    /// First of the seeds.
    pub seed: u64,
    /// How many seeds.
    pub runs: usize,
    /// Folder with recorded workloads.
    pub traces: Option<PathBuf>,
    /// The cache policy of the engine.
    pub cache: String,
    /// Only scenarios whose name contains this.
    pub only: String,
    /// Worker threads; 0 takes one per core.
    pub threads: usize,
}

/// A figure of the policy beside that of one baseline, by seed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The scenario.
    pub scenario: String,
    /// The figure.
    pub metric: Metric,
    /// The baseline.
    pub baseline_name: String,
    /// Its values.
    pub baseline: Vec<f64>,
    /// The policy's.
    pub policy: Vec<f64>,
}

/// Runs the policy and its baselines in all its scenarios; progress counts runs. Returns an empty list where it was cancelled.
pub fn run(options: &SuiteOptions, progress: &Progress) -> Result<Vec<Row>> {
    baselines::build(&options.policy)?;
    let mut scenarios = scenarios(&options.policy, options.traces.as_deref())?;
    scenarios.retain(|scenario| scenario.name.contains(&options.only));
    if scenarios.is_empty() || options.runs == 0 {
        return Err(Error::BadOption {
            option: "--only".into(),
            problem: "nothing to run".into(),
            remedy: "`agentrt simulate --list` names the scenarios; at least one run is needed".into(),
        });
    }
    let setting = Setting { cache: options.cache.clone() };
    let mut jobs = Vec::new();
    for scenario in &scenarios {
        for contender in std::iter::once(options.policy.as_str()).chain(scenario.baselines.iter().copied()) {
            for run in 0..options.runs as u64 {
                jobs.push((scenario, contender, options.seed + run));
            }
        }
    }
    progress.total.store(jobs.len() as u64, Ordering::Relaxed);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build().map_err(|e| Error::BadOption {
        option: "threads".into(),
        problem: e.to_string(),
        remedy: "ask for fewer threads".into(),
    })?;
    let one = |(scenario, contender, seed): &(&Scenario, &str, u64)| -> Result<Vec<f64>> {
        if progress.cancelled.load(Ordering::Relaxed) {
            return Ok(vec![0.0; scenario.metrics.len()]);
        }
        let figures = (scenario.measure)(&setting, *seed, contender);
        progress.done.fetch_add(1, Ordering::Relaxed);
        figures
    };
    let figures: Vec<Vec<f64>> = pool.install(|| jobs.par_iter().with_max_len(1).map(one).collect::<Result<_>>())?;
    if progress.cancelled.load(Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let mut rows = Vec::new();
    let mut rest = figures.as_slice();
    for scenario in &scenarios {
        let (policy, others) = rest.split_at(options.runs);
        for (number, &metric) in scenario.metrics.iter().enumerate() {
            let of = |runs: &[Vec<f64>]| runs.iter().map(|figures| figures[number]).collect();
            for (baseline, name) in others.chunks(options.runs).zip(scenario.baselines) {
                rows.push(Row {
                    scenario: scenario.name.clone(),
                    metric,
                    baseline_name: (*name).into(),
                    baseline: of(baseline),
                    policy: of(policy),
                });
            }
        }
        rest = &others[scenario.baselines.len() * options.runs..];
    }
    Ok(rows)
}
