//! A policy written in Python, as a [`Policy`] of the core.
//!
//! The object follows the protocol `agentrt.Policy`, the same that the replay drives. It hears of calls, one at a time,
//! and names victims; the core takes only those that nothing needs. Whatever it raises is counted and logged once, and the
//! next policy decides: a broken policy costs quality, never the engine. No lock is held while Python runs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyException;
use pyo3::intern;
use pyo3::prelude::*;
use runtime_core::policy::{About, Action, Event, Kind, Policy, Request};
use runtime_core::runtime::EventKind;

use crate::python_policy::ReplayCall;
use crate::runtime::NameTable;

/// Calls in flight that are followed for one policy.
const MAX_CALLS: usize = 4096;

/// A call in flight.
struct Call {
    session: u64,
    agent: String,
    step: u32,
    prompt: Vec<u64>,
    hit: usize,
    /// Blocks in use: the resident prefix and what was stored since.
    used: Vec<u64>,
}

#[derive(Default)]
struct InFlight {
    calls: HashMap<u64, Call>,
    users: HashMap<u64, u32>,
}

impl InFlight {
    fn use_blocks(&mut self, call: u64, blocks: &[u64]) {
        if let Some(call) = self.calls.get_mut(&call) {
            call.used.extend_from_slice(blocks);
            for &block in blocks {
                *self.users.entry(block).or_insert(0) += 1;
            }
        }
    }

    /// Ends a call; with it the blocks that nobody uses any more, root first.
    fn end(&mut self, call: u64) -> Option<(Call, Vec<u64>)> {
        let call = self.calls.remove(&call)?;
        let mut released = Vec::new();
        for block in &call.used {
            if let Some(users) = self.users.get_mut(block) {
                *users -= 1;
                if *users == 0 {
                    self.users.remove(block);
                    released.push(*block);
                }
            }
        }
        Some((call, released))
    }
}

/// What the runtime reports of its policies in Python.
#[derive(Default)]
pub(crate) struct Trouble {
    /// Exceptions and answers that were no list of keys.
    pub(crate) errors: AtomicU64,
    /// Calls that were not followed because too many were in flight.
    pub(crate) untracked: AtomicU64,
    /// Ctrl-C and the like, to be raised when the core is done.
    pub(crate) interrupt: Mutex<Option<PyErr>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bridges one Python object to the core.
pub(crate) struct LivePolicy {
    pub(crate) name: String,
    pub(crate) object: Py<PyAny>,
    pub(crate) names: Arc<NameTable>,
    pub(crate) trouble: Arc<Trouble>,
    in_flight: Mutex<InFlight>,
    logged: AtomicU64,
}

impl LivePolicy {
    pub(crate) fn new(name: String, object: Py<PyAny>, names: Arc<NameTable>, trouble: Arc<Trouble>) -> Self {
        Self { name, object, names, trouble, in_flight: Mutex::default(), logged: AtomicU64::new(0) }
    }

    fn failed(&self, py: Python<'_>, method: &str, error: PyErr) {
        if !error.is_instance_of::<PyException>(py) {
            lock(&self.trouble.interrupt).get_or_insert(error);
            return;
        }
        self.trouble.errors.fetch_add(1, Relaxed);
        if self.logged.fetch_add(1, Relaxed) == 0 {
            // A logger that fails must not take the engine down either.
            let _ = py.import("logging").and_then(|logging| {
                let logger = logging.call_method1("getLogger", ("agentrt",))?;
                logger.call_method1(
                    "warning",
                    ("policy %s: %s() failed, further failures are only counted: %s", &self.name, method, error),
                )
            });
        }
    }

    fn tell(&self, method: &str, call: ReplayCall) {
        Python::attach(|py| {
            if let Err(error) = self.object.call_method1(py, method, (call,)) {
                self.failed(py, method, error);
            }
        });
    }

    fn finish(&self, event: &Event<'_>) {
        let ended = {
            let mut in_flight = lock(&self.in_flight);
            in_flight.use_blocks(event.call, event.blocks);
            in_flight.end(event.call)
        };
        if let Some((call, released)) = ended {
            let Call { session, agent, step, prompt, hit, .. } = call;
            let (time_us, output) = (event.time_us, event.blocks.to_vec());
            self.tell(
                "call_finish",
                ReplayCall { session, agent, step, time_us, prompt, hit, output, released, tool: None },
            );
        }
    }
}

impl Policy for LivePolicy {
    fn about(&self) -> About {
        About {
            name: self.name.clone().into(),
            observes: "calls and blocks",
            decides: "evict",
            costs: "some microseconds of Python a call",
        }
    }

    fn observe(&self, runtime: &runtime_core::Runtime, event: &Event<'_>) {
        match event.kind {
            EventKind::CallStart => {
                // A call that starts again has ended: the core sees it the same way.
                self.finish(&Event { blocks: &[], ..*event });
                let agent = self.names.agent(event.workload, event.agent);
                let step = runtime.session_calls(event.workload, event.session).saturating_sub(1) as u32;
                let (session, prompt, hit) = (event.session, event.blocks.to_vec(), event.hit);
                let call = Call { session, agent: agent.clone(), step, prompt: prompt.clone(), hit, used: Vec::new() };
                {
                    let mut in_flight = lock(&self.in_flight);
                    if in_flight.calls.len() == MAX_CALLS {
                        self.trouble.untracked.fetch_add(1, Relaxed);
                        return;
                    }
                    in_flight.calls.insert(event.call, call);
                    in_flight.use_blocks(event.call, &event.blocks[..event.hit]);
                }
                let (time_us, output, released) = (event.time_us, Vec::new(), Vec::new());
                self.tell(
                    "call_start",
                    ReplayCall { session, agent, step, time_us, prompt, hit, output, released, tool: None },
                );
            }
            EventKind::Stored => lock(&self.in_flight).use_blocks(event.call, event.blocks),
            EventKind::CallEnd => self.finish(event),
            EventKind::Reset => *lock(&self.in_flight) = InFlight::default(),
            EventKind::ToolStart
            | EventKind::ToolEnd
            | EventKind::Removed
            | EventKind::SessionEnd
            | EventKind::CallQueued => {}
        }
    }

    fn act(
        &self,
        _runtime: &runtime_core::Runtime,
        request: &Request,
        decide: &mut dyn FnMut(Action),
    ) -> runtime_core::Result<bool> {
        if request.kind != Kind::Evict {
            return Ok(false);
        }
        let victims = Python::attach(|py| {
            let answer = self
                .object
                .call_method1(py, intern!(py, "evict"), (request.n, request.now_us))
                .and_then(|answer| answer.extract::<Option<Vec<u64>>>(py));
            answer.unwrap_or_else(|error| {
                self.failed(py, "evict", error);
                None
            })
        });
        let Some(victims) = victims else { return Ok(false) };
        for key in victims {
            decide(Action::Evict(key));
        }
        Ok(true)
    }
}
