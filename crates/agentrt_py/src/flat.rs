//! Flat key streams through the replay's policies, for cross-checks against other cache libraries.

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Replays `keys` one at a time under `policy`; one flag per key, true where it was in the cache.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "PyO3 hands extracted arguments over by value")]
pub(crate) fn replay_flat<'py>(
    py: Python<'py>,
    policy: &str,
    keys: PyReadonlyArray1<'py, u32>,
    capacity: usize,
) -> PyResult<Bound<'py, PyArray1<bool>>> {
    let keys = keys.as_slice()?;
    let hits = py.detach(|| replay::policies::replay_flat(policy, keys, capacity));
    Ok(hits.map_err(|e| PyValueError::new_err(e.to_string()))?.into_pyarray(py))
}
