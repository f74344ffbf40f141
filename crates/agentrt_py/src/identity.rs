//! `Identity` for Python: sessions and agents inferred from prompts, see `runtime_core::identity`.

use std::sync::{Mutex, MutexGuard, TryLockError};

use pyo3::prelude::*;
use pyo3::types::PyList;
use runtime_core::identity::{self, Options, Started, ANCHORS, ANSWER_MARKS, PROMPT_MARKS};

use crate::convert::{array, type_error};
use crate::errors::{from_core, BusyError};

/// Of longer texts, the last so many tokens are looked at.
const MAX_TOKENS: usize = 16_384;

/// The marks of a text in tokens.
fn marks(tokens: &Bound<'_, PyAny>, limit: usize) -> PyResult<Vec<u64>> {
    let mut read = Vec::new();
    let mut put = |token: Bound<'_, PyAny>| -> PyResult<()> {
        let token = token.extract::<i64>().map_err(|_| {
            type_error("tokens", "has something that is no token".into(), "pass the ids of a prompt's tokens".into())
        })?;
        read.push(token as u32);
        Ok(())
    };
    let start = tokens.len()?.saturating_sub(MAX_TOKENS);
    match tokens.cast::<PyList>() {
        Ok(list) => (start..list.len()).try_for_each(|i| put(list.get_item(i)?))?,
        Err(_) => tokens.try_iter()?.skip(start).try_for_each(|token| put(token?))?,
    }
    let mut found = Vec::new();
    identity::marks(read, limit, &mut found);
    Ok(found)
}

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

    /// As `answered` of Python.
    pub(crate) fn answered_now(&self, call: u32, tokens: &Bound<'_, PyAny>) -> PyResult<()> {
        let marks = marks(tokens, ANSWER_MARKS)?;
        self.writer()?.answered(Started::from_bits(call), &marks);
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
    #[pyo3(signature = (*, blocks = 65_536, sessions = 4_096, marks = 32_768))]
    fn new(blocks: usize, sessions: usize, marks: usize) -> PyResult<Self> {
        let inner = identity::Identity::new(Options { blocks, sessions, marks }).map_err(from_core)?;
        Ok(Self { inner: Mutex::new(inner) })
    }

    /// A call with these prompt blocks starts: (session, agent, call, whether the session is new).
    #[pyo3(signature = (blocks, /))]
    fn started(&self, blocks: &Bound<'_, PyAny>) -> PyResult<(u64, u16, u32, bool)> {
        let keys = array::<u64>("blocks", blocks)?;
        let inferred = self.writer()?.started(keys.as_slice()?);
        Ok((inferred.session, inferred.agent, inferred.call.to_bits(), inferred.is_new))
    }

    /// Whose is a call that starts a session, if its prompt has these tokens: (session, agent), None where it quotes
    /// no answer.
    #[pyo3(signature = (call, tokens, /))]
    fn join(&self, call: u32, tokens: &Bound<'_, PyAny>) -> PyResult<Option<(u64, u16)>> {
        let marks = marks(tokens, PROMPT_MARKS)?;
        let joined = self.writer()?.join(Started::from_bits(call), &marks);
        Ok(joined.map(|joined| (joined.session, joined.agent)))
    }

    /// The call's answer has these tokens.
    #[pyo3(signature = (call, tokens, /))]
    fn answered(&self, call: u32, tokens: &Bound<'_, PyAny>) -> PyResult<()> {
        self.answered_now(call, tokens)
    }

    /// Agents with higher numbers are named by their place in a run, not by an anchor.
    #[classattr]
    fn anchors() -> usize {
        ANCHORS
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
