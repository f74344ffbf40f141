//! Whose a request of vLLM is: what it says of itself, read without Python where it says it plainly.
//!
//! Identities that are no plain strings, or that have to be inferred, are Python's (`agentrt.engines.vllm.identity`).

use numpy::PyArray1;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};

use crate::convert::key_of;

/// Names longer than this are somebody's mistake; Python cuts them.
const NAME_CHARS: usize = 256;
/// Of a longer list of ended sessions Python leaves out the rest.
const MAX_ENDED: usize = 256;

/// Who a request says it is of.
pub(super) struct Named {
    pub(super) session: u64,
    pub(super) agent: u16,
    pub(super) session_ends: bool,
    pub(super) ended_sessions: Vec<u64>,
    /// Whether session and agent were inferred, and what `Identity.ended` needs; None where nothing was.
    pub(super) inferred: Option<(bool, bool, Option<u32>)>,
}

/// Python's `Identities`, with its table of agents' numbers by name.
pub(super) struct Names {
    identities: Py<PyAny>,
    agents: Py<PyDict>,
}

impl Names {
    pub(super) fn new(identities: &Bound<'_, PyAny>) -> PyResult<Self> {
        let agents = identities.getattr("agents")?.cast_into::<PyDict>()?.unbind();
        Ok(Self { identities: identities.clone().unbind(), agents })
    }

    /// What a request says of itself, as `identity.given` reads it; None where it says too little or says it strangely.
    pub(super) fn said(&self, request: &Bound<'_, PyAny>) -> PyResult<Option<Named>> {
        let py = request.py();
        let params = match dict(request.getattr_opt(intern!(py, "kv_transfer_params"))?) {
            Some(params) => dict(params.get_item(intern!(py, "agentrt"))?),
            None => None,
        };
        let extra = match request.getattr_opt(intern!(py, "sampling_params"))? {
            Some(sampling) if !sampling.is_none() => dict(sampling.getattr_opt(intern!(py, "extra_args"))?),
            _ => None,
        };
        let (mut session, mut agent, mut session_ends) = (None, None, false);
        let mut ended_sessions = Vec::new();
        for source in [params, extra].into_iter().flatten() {
            if session.is_none() {
                session = source.get_item(intern!(py, "session_id"))?.filter(is_said);
            }
            if agent.is_none() {
                agent = source.get_item(intern!(py, "agent_id"))?.filter(is_said);
            }
            if !session_ends {
                session_ends = source.get_item(intern!(py, "session_end"))?.map_or(Ok(false), |end| end.is_truthy())?;
            }
            if let Some(ended) = source.get_item(intern!(py, "ended_sessions"))? {
                let Some(ended) = sessions_of(&ended)? else { return Ok(None) };
                ended_sessions.extend(ended);
            }
        }
        if session.is_none() {
            session = request.getattr_opt(intern!(py, "session_id"))?.filter(is_said);
        }
        let (Some(session), Some(agent)) = (session, agent) else { return Ok(None) };
        if !is_name(&session)? || !is_name(&agent)? {
            return Ok(None);
        }
        let Some(session) = session_of(&session) else { return Ok(None) };
        let agent = match self.agents.bind(py).get_item(&agent)? {
            Some(agent) => agent,
            None => self.identities.bind(py).call_method1(intern!(py, "intern"), (agent,))?,
        };
        Ok(Some(Named { session, agent: agent.extract()?, session_ends, ended_sessions, inferred: None }))
    }

    /// Asks Python.
    pub(super) fn resolved(&self, request: &Bound<'_, PyAny>, keys: &[u64]) -> PyResult<Named> {
        let py = request.py();
        let keys = PyArray1::from_slice(py, keys);
        let identity = self.identities.bind(py).call_method1(intern!(py, "resolve"), (request, keys))?;
        let (session, agent, session_inferred, agent_inferred, session_ends, call, ended_sessions) =
            identity.cast::<PyTuple>()?.as_any().extract::<(u64, u16, bool, bool, bool, Option<u32>, Vec<u64>)>()?;
        let inferred = Some((session_inferred, agent_inferred, call));
        Ok(Named { session, agent, session_ends, ended_sessions, inferred })
    }
}

/// A dictionary; None for anything else.
fn dict(object: Option<Bound<'_, PyAny>>) -> Option<Bound<'_, PyDict>> {
    object.and_then(|object| object.cast_into::<PyDict>().ok())
}

/// Whether something has been said: neither None nor an empty string.
fn is_said(value: &Bound<'_, PyAny>) -> bool {
    !value.is_none() && value.cast::<PyString>().map_or(true, |text| text.len().map_or(true, |len| len > 0))
}

/// Whether it is a name as it is.
fn is_name(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    match value.cast_exact::<PyString>() {
        Ok(name) => Ok(name.len()? <= NAME_CHARS),
        Err(_) => Ok(false),
    }
}

/// The number of a session's name; None for a name that is no text.
fn session_of(name: &Bound<'_, PyAny>) -> Option<u64> {
    Some(key_of(name.cast::<PyString>().ok()?.to_cow().ok()?.as_bytes()))
}

/// The numbers of a list of names; None for anything else.
fn sessions_of(names: &Bound<'_, PyAny>) -> PyResult<Option<Vec<u64>>> {
    let Ok(names) = names.cast::<PyList>() else { return Ok(None) };
    if names.len() > MAX_ENDED {
        return Ok(None);
    }
    let mut sessions = Vec::with_capacity(names.len());
    for name in names {
        match session_of(&name) {
            Some(session) if is_name(&name)? && is_said(&name) => sessions.push(session),
            _ => return Ok(None),
        }
    }
    Ok(Some(sessions))
}
