//! `Identity` for Python: sessions and agents inferred from prompts, see `runtime_core::identity`.

use std::sync::{Mutex, MutexGuard, TryLockError};

use pyo3::prelude::*;
use runtime_core::identity::{self, Options, Started};

use crate::convert::array;
use crate::errors::{from_core, BusyError};

/// Tells whose calls are that do not say so. One thread at a time; a second one gets `BusyError`.
#[pyclass(frozen, module = "agentrt._core")]
pub(crate) struct Identity {
    inner: Mutex<identity::Identity>,
}

impl Identity {
    /// As `ended` of Python.
    pub(crate) fn ended_now(&self, call: u32, keys: &[u64]) -> PyResult<()> {
        self.writer()?.ended(Started::from_bits(call), keys);
        Ok(())
    }

    fn writer(&self) -> PyResult<MutexGuard<'_, identity::Identity>> {
        match self.inner.try_lock() {
            Ok(guard) => Ok(guard),
            // Every state of the tables is a valid one: guesses may be worse, nothing breaks.
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(BusyError::new_err(("the identities",))),
        }
    }
}

#[pymethods]
impl Identity {
    #[new]
    #[pyo3(signature = (*, blocks = 65_536, sessions = 4_096))]
    fn new(blocks: usize, sessions: usize) -> PyResult<Self> {
        let inner = identity::Identity::new(Options { blocks, sessions }).map_err(from_core)?;
        Ok(Self { inner: Mutex::new(inner) })
    }

    /// A call with these prompt blocks starts: (session, agent, call, whether the session is new).
    #[pyo3(signature = (blocks, /))]
    fn started(&self, blocks: &Bound<'_, PyAny>) -> PyResult<(u64, u16, u32, bool)> {
        let keys = array::<u64>("blocks", blocks)?;
        let inferred = self.writer()?.started(keys.as_slice()?);
        Ok((inferred.session, inferred.agent, inferred.call.to_bits(), inferred.is_new))
    }

    /// The call has ended; these are the full blocks of its answer.
    #[pyo3(signature = (call, blocks, /))]
    fn ended(&self, call: u32, blocks: &Bound<'_, PyAny>) -> PyResult<()> {
        let keys = array::<u64>("blocks", blocks)?;
        self.ended_now(call, keys.as_slice()?)
    }

    /// Bytes in use; none of it grows.
    fn memory(&self) -> PyResult<usize> {
        Ok(self.writer()?.bytes())
    }
}
