//! A cache policy written in Python, as a [`CachePolicy`] of the replay.
//!
//! The object follows the protocol `agentrt.replay.ReplayPolicy`. Victims that cannot go (pinned, absent, or with a
//! resident child) are skipped and counted; where too few remain the replay chooses itself. The first exception
//! stops the sweep and is raised in the thread that asked for it. Each event costs a few microseconds of Python.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ::replay::policy::{CachePolicy, CallView};
use ::replay::pool::Pool;
use ::replay::sweep::Progress;
use ::replay::trace::Trace;
use pyo3::prelude::*;

use crate::errors::PolicyError;

/// What a policy may know of a call.
#[pyclass(frozen, get_all, module = "agentrt._core")]
pub(crate) struct ReplayCall {
    /// Number of the session.
    pub(crate) session: u64,
    /// Name of the agent.
    pub(crate) agent: String,
    /// Position of the call in its session, from 0.
    pub(crate) step: u32,
    /// Time of the event, microseconds.
    pub(crate) time_us: u64,
    /// Full prompt blocks, root first.
    pub(crate) prompt: Vec<u64>,
    /// How many leading prompt blocks were resident when the call started.
    pub(crate) hit: usize,
    /// Full blocks of the answer; empty until the call finishes.
    pub(crate) output: Vec<u64>,
    /// Blocks that no running call uses any more, root first; empty until the call finishes.
    pub(crate) released: Vec<u64>,
    /// Tool that runs next; None until the call finishes.
    pub(crate) tool: Option<String>,
}

/// What all replays of one Python policy share.
pub(crate) struct Shared {
    /// Name for reports and errors.
    pub(crate) name: String,
    /// Makes a fresh policy: a class or any callable without arguments.
    pub(crate) factory: Py<PyAny>,
    /// Victims that could not go.
    pub(crate) invalid_victims: AtomicU64,
    /// The first exception.
    pub(crate) failure: Mutex<Option<PyErr>>,
    /// Stops the sweep after a failure.
    pub(crate) progress: Arc<Progress>,
}

impl Shared {
    fn fail(&self, py: Python<'_>, what: &str, cause: PyErr) {
        let error = PolicyError::new_err((self.name.clone(), format!("{what}: {cause}")));
        error.set_cause(py, Some(cause));
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.progress.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Bridges one Python object to the replay.
pub(crate) struct PythonPolicy {
    shared: Arc<Shared>,
    /// None where the factory failed.
    object: Option<Py<PyAny>>,
    agents: Vec<String>,
    tools: Vec<String>,
}

impl PythonPolicy {
    /// A fresh policy for one replay of `trace`.
    pub(crate) fn new(shared: &Arc<Shared>, trace: &Trace) -> Self {
        let object = Python::attach(|py| match shared.factory.call0(py) {
            Ok(object) => Some(object),
            Err(error) => {
                shared.fail(py, "cannot be created", error);
                None
            }
        });
        Self { shared: Arc::clone(shared), object, agents: trace.agents.clone(), tools: trace.tools.clone() }
    }

    fn call(&self, view: &CallView<'_>, output: &[u32], released: &[u32]) -> ReplayCall {
        let wide = |blocks: &[u32]| blocks.iter().map(|&block| u64::from(block)).collect();
        ReplayCall {
            session: u64::from(view.session),
            agent: self.agents.get(view.agent as usize).cloned().unwrap_or_default(),
            step: view.step,
            time_us: view.time_us,
            prompt: wide(view.prompt),
            hit: view.hit,
            output: wide(output),
            released: wide(released),
            tool: view.tool.and_then(|t| self.tools.get(t as usize).cloned()),
        }
    }

    fn tell(&self, method: &str, call: ReplayCall) {
        let Some(object) = self.active() else { return };
        Python::attach(|py| {
            if let Err(error) = object.call_method1(py, method, (call,)) {
                self.shared.fail(py, &format!("{method}() raised"), error);
            }
        });
    }

    fn active(&self) -> Option<&Py<PyAny>> {
        self.object.as_ref().filter(|_| !self.shared.progress.cancelled.load(Ordering::Relaxed))
    }
}

impl CachePolicy for PythonPolicy {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        self.tell("call_start", self.call(call, &[], &[]));
    }

    fn evict(&mut self, n: usize, now_us: u64, pool: &mut Pool) {
        let Some(object) = self.active() else { return };
        let victims = Python::attach(|py| {
            let answer = object.call_method1(py, "evict", (n, now_us)).and_then(|v| v.extract::<Vec<u32>>(py));
            answer.unwrap_or_else(|error| {
                self.shared.fail(py, "evict() must return a list of block ids", error);
                Vec::new()
            })
        });
        let mut gone = 0;
        for victim in victims {
            if gone == n {
                break;
            }
            if (victim as usize) < pool.n_blocks() && pool.evict(victim) {
                gone += 1;
            } else {
                self.shared.invalid_victims.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn inserted(&mut self, _call: &CallView<'_>, _blocks: &[u32], _pool: &Pool) {}

    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], released: &[u32], _pool: &Pool) {
        self.tell("call_finish", self.call(call, output, released));
    }
}
