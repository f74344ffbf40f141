//! `agentrt explain` for Python: workloads in, figures out as JSON.
#![expect(clippy::needless_pass_by_value, reason = "PyO3 hands extracted arguments over by value")]

use ::replay::explain::{self as told, ExplainOptions};
use ::replay::sweep::Capacity;
use pyo3::prelude::*;

use crate::errors::from_replay;
use crate::replay::{model, order, to_json, Trace};

/// Replays one trace under agentrt, LRU and MIN and returns what there is to see as JSON; see `agentrt.replay.explain`.
#[pyfunction]
#[pyo3(signature = (trace, *, order, sessions, seed, capacity, model))]
pub(crate) fn explain(
    py: Python<'_>,
    trace: PyRef<'_, Trace>,
    order: &str,
    sessions: usize,
    seed: u64,
    capacity: &str,
    model: &str,
) -> PyResult<String> {
    let options = ExplainOptions {
        order: self::order(order)?,
        sessions,
        seed,
        capacity: Capacity::parse(capacity).map_err(from_replay)?,
        model: self::model(model)?,
    };
    let trace = trace.shared();
    to_json(&py.detach(|| told::explain(&trace, &options)).map_err(from_replay)?)
}
