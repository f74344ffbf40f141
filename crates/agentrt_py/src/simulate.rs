//! The simulator for Python: runs a policy and its baselines in Rust threads while Python shows progress.
#![expect(clippy::needless_pass_by_value, reason = "PyO3 hands extracted arguments over by value")]

use std::path::PathBuf;
use std::sync::Arc;

use ::replay::sweep::Progress;
use ::simulator::scenarios::{self as suite, SuiteOptions};
use pyo3::prelude::*;

use crate::errors::from_replay;
use crate::replay::{to_json, watched};

/// Runs a policy and its baselines in all scenarios of the policy and returns the figures as JSON.
///
/// `progress(done, total)` is called some ten times a second. An exception in it, Ctrl-C included, stops the runs.
#[pyfunction]
#[pyo3(signature = (policy, *, seed = 0, runs = 5, cache = "lru", only = "", traces = None, threads = 0, progress = None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
pub(crate) fn simulate(
    py: Python<'_>,
    policy: &str,
    seed: u64,
    runs: usize,
    cache: &str,
    only: &str,
    traces: Option<PathBuf>,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let options =
        SuiteOptions { policy: policy.into(), seed, runs, traces, cache: cache.into(), only: only.into(), threads };
    let shared = Arc::new(Progress::default());
    let rows = watched(py, &shared, progress.as_ref(), move |progress| suite::run(&options, progress))?;
    to_json(&rows.map_err(from_replay)?)
}

/// Scenarios of a policy: (name, one line, baselines).
#[pyfunction]
#[pyo3(signature = (policy, *, traces = None))]
pub(crate) fn scenarios(
    policy: &str,
    traces: Option<PathBuf>,
) -> PyResult<Vec<(String, &'static str, Vec<&'static str>)>> {
    let all = suite::scenarios(policy, traces.as_deref()).map_err(from_replay)?;
    Ok(all.into_iter().map(|scenario| (scenario.name, scenario.about, scenario.baselines.to_vec())).collect())
}
