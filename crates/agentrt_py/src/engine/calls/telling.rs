//! What the core is told, at once or beside, and its answers.

use numpy::PyArray1;
use pyo3::intern;
use pyo3::prelude::*;
use runtime_core::runtime::EventKind;

use super::{Core, EngineCalls, MAX_PENDING};
use crate::engine::call::EngineCall;
use crate::engine::steps::Step;
use crate::errors::AgentRTError;

impl EngineCalls {
    /// Tells of an event; the core's answer is worth having for starts only, see [`Self::start`].
    pub(super) fn tell(
        &mut self,
        py: Python<'_>,
        kind: EventKind,
        (session, agent): (u64, u16),
        call: u64,
        now_us: u64,
        keys: &[u64],
    ) -> PyResult<()> {
        let object = match &self.core {
            Core::Nobody => return Ok(()),
            Core::Workload(_) => {
                self.pending.push(kind, (session, agent), call, now_us, keys);
                return Ok(());
            }
            Core::Object(object) => object.bind(py),
        };
        let array = || PyArray1::from_slice(py, keys);
        let _ = match kind {
            EventKind::Stored => object.call_method1(intern!(py, "stored"), (call, now_us, array()))?,
            EventKind::CallEnd => object.call_method1(intern!(py, "call_ended"), (session, call, now_us, array()))?,
            EventKind::Removed => object.call_method1(intern!(py, "removed"), (now_us, array()))?,
            EventKind::SessionEnd => object.call_method1(intern!(py, "session_ended"), (session, now_us))?,
            EventKind::Reset => object.call_method1(intern!(py, "reset"), (now_us,))?,
            EventKind::CallQueued => {
                let name = intern!(py, "call_queued");
                match object.getattr_opt(name)? {
                    Some(tell) => tell.call1((session, agent, call, now_us, array()))?,
                    None => return Ok(()),
                }
            }
            EventKind::CallStart | EventKind::ToolStart | EventKind::ToolEnd => return Ok(()),
        };
        Ok(())
    }

    /// Tells what has waited to be told; returns the resident blocks of the call that starts with it.
    pub(super) fn flush(&mut self, py: Python<'_>) -> PyResult<u64> {
        self.catch_up(py);
        let Core::Workload(workload) = &self.core else { return Ok(0) };
        if self.pending.is_empty() {
            return Ok(0);
        }
        if let Some(planned) = &mut self.planned {
            let mut step = planned.blank();
            std::mem::swap(&mut step.told, &mut self.pending);
            step.tell(planned.core());
            self.answered(py, step);
            return Ok(0);
        }
        let told = workload.get().feed_by_step(py, &self.pending.events());
        // What has been refused would be refused again.
        self.pending.clear();
        told
    }

    /// The end of a hook whose events may wait.
    pub(super) fn settle_up(&mut self, py: Python<'_>) -> PyResult<()> {
        if self.eager || self.pending.kinds.len() >= MAX_PENDING {
            self.flush(py)?;
        }
        Ok(())
    }

    /// What has arrived since and does not start at once is certain to be needed.
    pub(super) fn tell_queued(&mut self, py: Python<'_>, starting: Option<&Bound<'_, EngineCall>>) -> PyResult<()> {
        let now_us = self.now_us;
        let mut queued = std::mem::take(&mut self.untold);
        self.untold_calls = 0;
        queued.retain(|call| {
            let mut one = call.bind(py).borrow_mut();
            if !one.untold {
                return false;
            }
            if starting.is_some_and(|starting| starting.is(call)) {
                self.untold_calls = 1;
                return false;
            }
            (one.untold, one.arrived_us) = (false, now_us);
            one.told = !matches!(self.core, Core::Nobody);
            true
        });
        if let (1, Some(starting)) = (self.untold_calls, starting) {
            self.untold.push(starting.clone().unbind());
        }
        for call in queued {
            let one = call.bind(py).borrow();
            if let Some(planned) = &mut self.planned {
                planned.keep(&one.keys);
            }
            self.tell(py, EventKind::CallQueued, (one.session, one.agent), one.number, now_us, &one.keys)?;
        }
        Ok(())
    }

    pub(super) fn start(&mut self, call: &Bound<'_, EngineCall>, now_us: u64) -> PyResult<()> {
        let py = call.py();
        {
            let mut one = call.borrow_mut();
            if std::mem::take(&mut one.untold) {
                // It did not have to wait.
                self.untold_calls -= 1;
                one.arrived_us = now_us;
            }
            one.told = !matches!(self.core, Core::Nobody);
            one.started = true;
        }
        let hit = {
            let one = call.borrow();
            match &self.core {
                Core::Nobody => 0,
                Core::Workload(_) => {
                    let who = (one.session, one.agent);
                    self.pending.push(EventKind::CallStart, who, one.number, now_us, &one.keys);
                    if self.planned.is_some() {
                        self.starting.push_back(call.clone().unbind());
                        return Ok(());
                    }
                    self.flush(py)? as usize
                }
                Core::Object(object) => {
                    let keys = PyArray1::from_slice(py, &one.keys);
                    let started = (one.session, one.agent, one.number, now_us, keys);
                    object.bind(py).call_method1(intern!(py, "call_started"), started)?.extract()?
                }
            }
        };
        call.borrow_mut().core_hit = Some(hit);
        Ok(())
    }

    pub(super) fn stored(&mut self, call: &Bound<'_, EngineCall>) -> PyResult<()> {
        let one = call.borrow();
        let keys = match one.core_hit {
            // What it has not hit, see [`Step`].
            None if self.planned.is_some() => &[],
            core_hit => one.after(core_hit.unwrap_or(0)),
        };
        if !keys.is_empty() || (self.planned.is_some() && one.core_hit.is_none()) {
            self.tell(call.py(), EventKind::Stored, (0, 0), one.number, one.started_us, keys)?;
        }
        drop(one);
        self.settle_up(call.py())
    }

    /// `ids` carry `keys` from now on, ids beyond the keys none.
    pub(super) fn carry(&mut self, py: Python<'_>, keys: &[u64], ids: &[u32]) -> PyResult<()> {
        let Some(queue) = &self.queue else { return Ok(()) };
        if self.planned.is_some() {
            self.pending.push_carried(keys, ids, self.now_us);
            return Ok(());
        }
        let mut lost = Vec::new();
        queue.bind(py).borrow().tables().carry_all(keys, ids, &mut lost)?;
        if !lost.is_empty() {
            self.tell(py, EventKind::Removed, (0, 0), 0, self.now_us, &lost)?;
        }
        Ok(())
    }

    /// Hands what has been written down to the thread beside.
    pub(super) fn post(&mut self) {
        if let Some(planned) = &mut self.planned {
            let mut step = planned.blank();
            std::mem::swap(&mut step.told, &mut self.pending);
            planned.post(step, self.acting, self.now_us);
        }
    }

    /// Takes the answers of the step that is being worked off, if one is.
    pub(super) fn catch_up(&mut self, py: Python<'_>) {
        let Some(planned) = self.planned.as_mut().filter(|planned| planned.is_busy()) else { return };
        match planned.fetch() {
            Some(step) => self.answered(py, step),
            None => self.alone(py),
        }
    }

    /// The thread is gone, and with it what it had been told.
    #[cold]
    pub(super) fn alone(&mut self, py: Python<'_>) {
        if let Some(mut planned) = self.planned.take() {
            planned.forget_all();
        }
        self.lost = true;
        self.starting.clear();
        self.pending.clear();
        if let Some(queue) = &self.queue {
            queue.bind(py).borrow_mut().forsake(py);
        }
        let what = "the thread that works steps off is gone; everything is done at once from now on";
        self.failed.get_or_insert_with(|| AgentRTError::new_err(what));
    }

    /// The core has answered what it was told.
    pub(super) fn answered(&mut self, py: Python<'_>, mut step: Box<Step>) {
        for hit in step.hits() {
            let Some(call) = self.starting.pop_front() else { break };
            let mut one = call.bind(py).borrow_mut();
            (one.core_hit, one.low) = (Some(hit), one.low.min(hit));
        }
        if let Some(error) = step.failed() {
            self.failed.get_or_insert(error);
        }
        if let Some(planned) = &mut self.planned {
            planned.answered(step);
        }
    }
}
