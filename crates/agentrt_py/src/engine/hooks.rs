//! The hooks that vLLM calls, guarded: what goes wrong in one is counted by Python's `Guard` and answered as if agentrt
//! were not there. Only interrupts (`KeyboardInterrupt` and the like) pass. After a panic the adapter starts over at the end
//! of the step.
//!
//! Where the adapter does no more than tell `EngineCalls` (`Adapter.plain`), that is told from here, and nothing of a hook
//! runs in Python; otherwise the adapter's method of the hook's name is called.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyException;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pyclass::{PyTraverseError, PyVisit};
use pyo3::types::PyTuple;

use super::calls::EngineCalls;
use crate::clock::CLOCK;

/// What a hook does where the adapter has nothing to add.
type Direct = fn(&mut EngineCalls, &Bound<'_, PyTuple>, u64) -> PyResult<()>;

/// One of vLLM's hooks.
struct Hook {
    /// The adapter's method.
    name: &'static str,
    /// Arguments it knows; what a later version of vLLM adds is left out.
    arguments: usize,
    /// Whether `direct` asks for the time.
    timed: bool,
    direct: Direct,
}

const NEW_REQUEST: Hook = Hook {
    name: "new_request",
    arguments: 1,
    timed: true,
    direct: |held, of, now_us| held.new_request(&of.get_item(0)?, now_us).map(drop),
};
const BEFORE_ALLOCATION: Hook = Hook {
    name: "before_allocation",
    arguments: 2,
    timed: true,
    direct: |held, of, now_us| held.before_allocation(&of.get_item(0)?, of.get_item(1)?.extract()?, now_us),
};
const ALLOCATED: Hook = Hook {
    name: "allocated",
    arguments: 3,
    timed: false,
    direct: |held, of, _| held.allocated(&of.get_item(0)?, &of.get_item(1)?).map(drop),
};
const STEP_ENDED: Hook = Hook {
    name: "step_ended",
    arguments: 1,
    timed: true,
    direct: |held, of, now_us| held.step_ended(&of.get_item(0)?, now_us),
};
const PENDING: Hook = Hook { name: "pending", arguments: 0, timed: false, direct: |_, _, _| Ok(()) };
const FINISHED: Hook = Hook {
    name: "finished",
    arguments: 2,
    timed: true,
    direct: |held, of, now_us| held.finished(&of.get_item(0)?, &of.get_item(1)?, now_us).map(drop),
};

/// An adapter, and whom its hooks tell.
struct Live {
    adapter: Py<PyAny>,
    held: Py<EngineCalls>,
    plain: bool,
}

/// vLLM's hooks for one connector.
#[pyclass(module = "agentrt._core")]
pub(crate) struct EngineHooks {
    #[pyo3(get)]
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
    /// A hook has panicked, and nobody has started over yet.
    panicked: AtomicBool,
    panics: AtomicBool,
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
            panicked: AtomicBool::new(false),
            panics: AtomicBool::new(false),
        })
    }

    #[setter]
    fn set_guard(&mut self, guard: Py<PyAny>) {
        self.guard = guard;
        *self.spent_ns.get_mut() = 0;
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
        self.run(&NEW_REQUEST, arguments, &arguments.py().None())
    }

    /// Right before the allocation of a waiting request; nothing comes from outside.
    #[pyo3(signature = (*arguments))]
    fn get_num_new_matched_tokens(&self, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        self.run(&BEFORE_ALLOCATION, arguments, &self.starts)
    }

    /// The request has its blocks.
    #[pyo3(signature = (*arguments))]
    fn update_state_after_alloc(&self, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        self.run(&ALLOCATED, arguments, &arguments.py().None())
    }

    /// The step has been scheduled.
    #[pyo3(signature = (*arguments))]
    fn step_ended(&self, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        let py = arguments.py();
        if self.panicked.swap(false, Relaxed) {
            if let Some(live) = &self.live {
                let restart = || live.adapter.bind(py).call_method0(intern!(py, "restart")).map(drop);
                self.guarded("restart", py, restart)?;
            }
        }
        let answer = self.run(&STEP_ENDED, arguments, &py.None());
        let guard = self.guard.bind(py);
        let spent_s: f64 = guard.getattr(intern!(py, "spent_s"))?.extract()?;
        guard.setattr(intern!(py, "spent_s"), spent_s + self.spent_ns.swap(0, Relaxed) as f64 / 1e9)?;
        answer
    }

    /// Whether to make a step although no client waits.
    #[pyo3(signature = (*arguments))]
    fn has_pending_push_work(&self, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        let no = false.into_pyobject(arguments.py())?.to_owned().into_any().unbind();
        self.run(&PENDING, arguments, &no)
    }

    /// The request is over; its blocks, one list a cache group, are freed next.
    #[pyo3(signature = (*arguments))]
    fn request_finished_all_groups(&self, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        self.run(&FINISHED, arguments, &self.frees)
    }

    /// The next hook panics, for tests.
    fn panic_once(&self) {
        self.panics.store(true, Relaxed);
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
    fn run(&self, hook: &Hook, arguments: &Bound<'_, PyTuple>, default: &Py<PyAny>) -> PyResult<Py<PyAny>> {
        let py = arguments.py();
        let Some(live) = &self.live else { return Ok(default.clone_ref(py)) };
        let answer = self.guarded(hook.name, py, || self.call(live, hook, arguments))?;
        Ok(answer.flatten().unwrap_or_else(|| default.clone_ref(py)))
    }

    /// As `Guard.run` of Python, whatever goes wrong; None then, and while agentrt stays away.
    fn guarded<T>(
        &self,
        name: &'static str,
        py: Python<'_>,
        action: impl FnOnce() -> PyResult<T>,
    ) -> PyResult<Option<T>> {
        let guard = self.guard.bind(py);
        if is_paused(guard)? {
            return Ok(None);
        }
        let started = Instant::now();
        let done = catch_unwind(AssertUnwindSafe(|| {
            assert!(!self.panics.swap(false, Relaxed), "for a test");
            action()
        }));
        let answer = match done {
            Ok(Ok(answer)) => Ok(Some(answer)),
            Ok(Err(error)) if error.is_instance_of::<PyException>(py) => {
                guard.call_method1(intern!(py, "failed"), (name, error.into_value(py))).map(|_| None)
            }
            Ok(Err(interrupt)) => Err(interrupt),
            Err(_) => {
                // What it was at is half done.
                self.panicked.store(true, Relaxed);
                guard.call_method1(intern!(py, "note"), (format!("{name}: panic"),)).map(|_| None)
            }
        };
        let took = started.elapsed();
        self.spent_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(0), Relaxed);
        if took > self.slow {
            guard.call_method1(intern!(py, "note"), (format!("{name}: slow"),))?;
        }
        answer
    }

    /// The adapter's answer; None where it has none of its own.
    fn call(&self, live: &Live, hook: &Hook, arguments: &Bound<'_, PyTuple>) -> PyResult<Option<Py<PyAny>>> {
        let py = arguments.py();
        let adapter = live.adapter.bind(py);
        if !live.plain || self.callers.bind(py).getattr(intern!(py, "wanted"))?.is_truthy()? {
            let known = arguments.get_slice(0, hook.arguments);
            return Ok(Some(adapter.call_method1(hook.name, known)?.unbind()));
        }
        let now_us = if hook.timed { self.now_us(adapter)? } else { 0 };
        let mut held = live.held.bind(py).try_borrow_mut()?;
        (hook.direct)(&mut held, arguments, now_us)?;
        Ok(None)
    }

    /// By the adapter's clock.
    fn now_us(&self, adapter: &Bound<'_, PyAny>) -> PyResult<u64> {
        let py = adapter.py();
        let clock = adapter.getattr(intern!(py, "now_us"))?;
        match CLOCK.get(py) {
            Some(now) if clock.is(&self.monotonic_us) => Ok(now.now_us()),
            _ => clock.call0()?.extract(),
        }
    }
}

/// Whether too many faults keep agentrt away for now.
fn is_paused(guard: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = guard.py();
    let until: f64 = guard.getattr(intern!(py, "paused_until"))?.extract()?;
    Ok(until > 0.0 && guard.call_method0(intern!(py, "clock"))?.extract::<f64>()? < until)
}
