//! Room `transfer`: host block copies. Turns NumPy arrays into regions and hands the batch to `kv_copy`, detached.

use kv_copy::{Batch, Region};
use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// An array of addresses or sizes as unsigned words; negative values become huge and fail the region check.
fn words(array: &PyReadonlyArray1<'_, i64>) -> PyResult<Vec<usize>> {
    Ok(array.as_slice()?.iter().map(|&word| word as usize).collect())
}

/// Copies `sizes[i]` bytes from address `sources[i]` to `destinations[i]` and returns the bytes moved.
///
/// Every range must lie inside one of `arrays`, and no destination may overlap another range: a `ValueError` names the
/// offender and nothing has moved. Other threads run meanwhile.
#[expect(clippy::needless_pass_by_value, reason = "PyO3 extracts arguments by value")]
#[pyfunction]
#[pyo3(signature = (arrays, sources, destinations, sizes, max_threads, /))]
pub(crate) fn copy_host_blocks(
    py: Python<'_>,
    arrays: Vec<Bound<'_, PyArray1<u8>>>,
    sources: PyReadonlyArray1<'_, i64>,
    destinations: PyReadonlyArray1<'_, i64>,
    sizes: PyReadonlyArray1<'_, i64>,
    max_threads: usize,
) -> PyResult<usize> {
    let mut regions = Vec::with_capacity(arrays.len());
    for array in &arrays {
        if !array.is_contiguous() {
            return Err(PyValueError::new_err("pool memory must be given as contiguous uint8 arrays"));
        }
        #[expect(unsafe_code, reason = "the only place that knows the memory to be alive")]
        // SAFETY: `arrays` keeps every NumPy array, and through it its owner, alive until this function returns, after the
        // batch is done. `agentrt.transfer` pins blocks in flight, which keeps other copies away from them.
        regions.push(unsafe { Region::new(array.data(), array.len()) });
    }
    let batch = Batch::new(&regions, &words(&sources)?, &words(&destinations)?, &words(&sizes)?)
        .map_err(|error| PyValueError::new_err(error.to_string()))?;
    py.detach(|| batch.run(max_threads));
    Ok(batch.bytes())
}
