//! The hooks that vLLM calls, guarded: what goes wrong in one is counted by Python's `Guard` and answered as if agentrt
//! were not there. Only interrupts (`KeyboardInterrupt` and the like) pass.
//!
//! Where the adapter does no more than tell `EngineCalls` (`Adapter.plain`), that is told from here, and nothing of a hook
//! runs in Python; otherwise the adapter's method of the hook's name is called.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyException;
use pyo3::intern;
use pyo3::panic::PanicException;
use pyo3::prelude::*;
use pyo3::pyclass::{PyTraverseError, PyVisit};
use pyo3::types::{PyString, PyTuple};

use super::calls::EngineCalls;
use crate::clock::CLOCK;

/// What a hook does where the adapter has nothing to add.
type Direct = fn(&mut EngineCalls, &Bound<'_, PyTuple>, u64) -> PyResult<()>;

/// An adapter, and whom its hooks tell.
struct Live {
    adapter: Py<PyAny>,
    held: Py<EngineCalls>,
    plain: bool,
}

/// vLLM's hooks for one connector.
#[pyclass(module = "agentrt._core")]
pub(crate) struct EngineHooks {
    #[pyo3(get, set)]
    guard: Py<PyAny>,
    callers: Py<PyAny>,
    monotonic_us: Py<PyAny>,
    slow: Duration,
    /// None while it is switched off.
    live: Option<Live>,
    /// What `get_num_new_matched_tokens` and `request_finished` answer: nothing comes from outside, blocks may be freed.
    starts: Py<PyAny>,
    frees: Py<PyAny>,
    /// Time in hooks that the guard has not been told of yet.
    spent_ns: AtomicU64,
}

#[pymethods]
impl EngineHooks {
    /// `guard`: a `Guard`; `callers`: has `wanted`; a hook that takes longer than `slow_s` is a fault.
    #[new]
    #[pyo3(signature = (guard, callers, slow_s, /))]
    fn new(py: Python<'_>, guard: Py<PyAny>, callers: Py<PyAny>, slow_s: f64) -> PyResult<Self> {
        Ok(Self {
            guard,
            callers,
            monotonic_us: py.import(intern!(py, "agentrt._core"))?.getattr(intern!(py, "monotonic_us"))?.unbind(),
            slow: Duration::try_from_secs_f64(slow_s).unwrap_or(Duration::MAX),
            live: None,
            starts: (0, false).into_pyobject(py)?.into_any().unbind(),
            frees: (false, py.None()).into_pyobject(py)?.into_any().unbind(),
            spent_ns: AtomicU64::new(0),
        })
    }

    /// Whom the hooks call; None: nobody, and vLLM runs as if there were none.
    #[getter]
    fn adapter(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.live.as_ref().map(|live| live.adapter.clone_ref(py))
    }

    #[setter]
    fn set_adapter(&mut self, adapter: Option<Bound<'_, PyAny>>) -> PyResult<()> {
        self.live = match adapter {
            Some(adapter) => Some(Live {
                plain: adapter.getattr("plain")?.is_truthy()?,
                held: adapter.getattr("held")?.cast_into::<EngineCalls>()?.unbind(),
                adapter: adapter.unbind(),
            }),
            None => None,
        };
        Ok(())
    }

    /// A request has been queued.
    #[pyo3(signature = (*arguments))]
    fn on_new_request(&self, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        let py = arguments.py();
        self.run(arguments, intern!(py, "new_request"), &py.None(), |held, of, now_us| {
            held.new_request(&of.get_item(0)?, now_us).map(drop)
        })
    }

    /// Right before the allocation of a waiting request; nothing comes from outside.
    #[pyo3(signature = (*arguments))]
    fn get_num_new_matched_tokens(&self, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        let py = arguments.py();
        self.run(arguments, intern!(py, "before_allocation"), &self.starts, |held, of, now_us| {
            held.before_allocation(&of.get_item(0)?, of.get_item(1)?.extract()?, now_us)
        })
    }

    /// The request has its blocks.
    #[pyo3(signature = (*arguments))]
    fn update_state_after_alloc(&self, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        let py = arguments.py();
        self.run(arguments, intern!(py, "allocated"), &py.None(), |held, of, _| {
            held.allocated(&of.get_item(0)?, &of.get_item(1)?).map(drop)
        })
    }

    /// The step has been scheduled.
    #[pyo3(signature = (*arguments))]
    fn step_ended(&self, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        let py = arguments.py();
        let answer = self.run(arguments, intern!(py, "step_ended"), &py.None(), |held, of, now_us| {
            held.step_ended(&of.get_item(0)?, now_us)
        });
        let guard = self.guard.bind(py);
        let spent_s: f64 = guard.getattr(intern!(py, "spent_s"))?.extract()?;
        guard.setattr(intern!(py, "spent_s"), spent_s + self.spent_ns.swap(0, Relaxed) as f64 / 1e9)?;
        answer
    }

    /// Whether to make a step although no client waits.
    #[pyo3(signature = (*arguments))]
    fn has_pending_push_work(&self, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        let py = arguments.py();
        let no = false.into_pyobject(py)?.to_owned().into_any().unbind();
        self.run(arguments, intern!(py, "pending"), &no, |_, _, _| Ok(()))
    }

    /// The request is over; its blocks, one list a cache group, are freed next.
    #[pyo3(signature = (*arguments))]
    fn request_finished_all_groups(&self, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        let py = arguments.py();
        self.run(arguments, intern!(py, "finished"), &self.frees, |held, of, now_us| {
            held.finished(&of.get_item(0)?, &of.get_item(1)?, now_us).map(drop)
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.guard)?;
        visit.call(&self.callers)?;
        let Some(live) = &self.live else { return Ok(()) };
        visit.call(&live.adapter)?;
        visit.call(&live.held)
    }

    fn __clear__(&mut self) {
        self.live = None;
    }
}

impl EngineHooks {
    /// One hook; `default` is the answer where the adapter has none of its own.
    fn run(
        &self,
        arguments: &Bound<'_, PyTuple>,
        name: &Bound<'_, PyString>,
        default: &Py<PyAny>,
        direct: Direct,
    ) -> PyResult<Py<PyAny>> {
        let py = arguments.py();
        let guard = self.guard.bind(py);
        let Some(live) = &self.live else { return Ok(default.clone_ref(py)) };
        if paused(guard)? {
            return Ok(default.clone_ref(py));
        }
        let started = Instant::now();
        let done = catch_unwind(AssertUnwindSafe(|| self.call(live, arguments, name, direct)));
        // Where the guard itself fails there is nobody left to tell.
        let answer = match done {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) if is_fault(py, &error) => {
                drop(guard.call_method1(intern!(py, "failed"), (name, error.into_value(py))));
                Ok(None)
            }
            Ok(Err(interrupt)) => Err(interrupt),
            Err(_panic) => {
                drop(guard.call_method1(intern!(py, "note"), (format!("{name}: panic"),)));
                Ok(None)
            }
        };
        let took = started.elapsed();
        self.spent_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(0), Relaxed);
        if took > self.slow {
            drop(guard.call_method1(intern!(py, "note"), (format!("{name}: slow"),)));
        }
        answer.map(|answer| answer.unwrap_or_else(|| default.clone_ref(py)))
    }

    /// The adapter's answer; None where it has none of its own.
    fn call(
        &self,
        live: &Live,
        arguments: &Bound<'_, PyTuple>,
        name: &Bound<'_, PyString>,
        direct: Direct,
    ) -> PyResult<Option<Py<PyAny>>> {
        let py = arguments.py();
        let adapter = live.adapter.bind(py);
        if !live.plain || self.callers.bind(py).getattr(intern!(py, "wanted"))?.is_truthy()? {
            return Ok(Some(adapter.call_method1(name, arguments)?.unbind()));
        }
        let clock = adapter.getattr(intern!(py, "now_us"))?;
        let now_us = match CLOCK.get(py) {
            Some(now) if clock.is(&self.monotonic_us) => now.now_us(),
            _ => clock.call0()?.extract()?,
        };
        let mut held = live.held.bind(py).try_borrow_mut()?;
        direct(&mut held, arguments, now_us)?;
        Ok(None)
    }
}

/// Whether too many faults keep agentrt away for now.
fn paused(guard: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = guard.py();
    let until: f64 = guard.getattr(intern!(py, "paused_until"))?.extract()?;
    Ok(until > 0.0 && guard.call_method0(intern!(py, "clock"))?.extract::<f64>()? < until)
}

/// Whether an exception is a fault, or somebody's wish to stop.
fn is_fault(py: Python<'_>, error: &PyErr) -> bool {
    error.is_instance_of::<PyException>(py) || error.is_instance_of::<PanicException>(py)
}
