//! The requests that vLLM holds, in one call from Python a hook: whose they are, which blocks they carry, what the core
//! has been told of them, and what stands at the head of the free queue when they are allocated.
//!
//! What a hook has to tell the core goes there in one batch. Ends of calls and new blocks may wait for the next start or
//! the end of the step, whichever is first: neither is asked about before. They carry their own times and keep their
//! order. In large pools victims are named ahead, and all that a step has to tell may wait for a thread beside
//! (`steps.rs`); what depends on the core's answer, see `EngineCall::core_hit`, is settled when it comes.
//!
//! Everything rarer than that is Python's: identities that are not plain strings or are inferred, cores that are Python
//! objects, order and holds of waiting calls, recording.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;

use numpy::PyReadonlyArray1;
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use runtime_core::runtime::EventKind;

use super::blocks::read_keys;
use super::call::{add, Decoding, EngineCall, EngineCounts};
use super::names::Names;
use super::queue::{Ahead, FreeQueue};
use super::steps::{self, Planned, Told};
use crate::convert::array;
use crate::identity::Identity;
use crate::runtime::Workload;

mod arrival;
mod telling;
mod victims;

/// So many events wait at most.
const MAX_PENDING: usize = 256;

/// Whom the hooks tell.
enum Core {
    Nobody,
    Workload(Py<Workload>),
    Object(Py<PyAny>),
}

/// The requests that vLLM holds and what the core knows of them. One thread calls everything.
#[pyclass(module = "agentrt._core")]
pub(crate) struct EngineCalls {
    pool: Py<PyAny>,
    /// vLLM's map of cached blocks: another object after a reset.
    map: Py<PyAny>,
    block_size: usize,
    core: Core,
    /// The `FreeQueue`; None where the pool is built otherwise than expected.
    #[pyo3(get, set)]
    queue: Option<Py<FreeQueue>>,
    /// Whether victims are put in place.
    #[pyo3(get, set)]
    acting: bool,
    /// Whether the core is told everything at once.
    #[pyo3(get, set)]
    eager: bool,
    /// Called after a reset.
    #[pyo3(get, set)]
    on_reset: Option<Py<PyAny>>,
    /// Whose requests are, and who infers it where they do not say so.
    names: Names,
    inferring: Py<Identity>,
    /// By request id.
    #[pyo3(get)]
    calls: Py<PyDict>,
    #[pyo3(get)]
    counts: Py<EngineCounts>,
    /// Calls the core does not know of yet, in the order of their arrival, and such as it has heard of since.
    untold: Vec<Py<EngineCall>>,
    untold_calls: usize,
    /// Admitted calls whose prompts will take more blocks.
    prefilling: Vec<Py<EngineCall>>,
    decoding: Decoding,
    pending: Told,
    /// Who works steps off, and how many blocks are named for the steps to come; None where all is done at once.
    planned: Option<Planned>,
    /// Calls of which the core's answer is not here yet: those of the step that is being worked off, then those told since.
    starting: VecDeque<Py<EngineCall>>,
    /// What went wrong beside, and whether the thread is gone and nobody has started over yet.
    failed: Option<PyErr>,
    lost: bool,
    numbers: u64,
    /// The latest time a hook has been called at.
    now_us: u64,
    keys: Vec<u64>,
}

#[pymethods]
impl EngineCalls {
    /// `core`: a workload, any object with the methods of the adapter's `Core`, or None.
    #[new]
    #[pyo3(signature = (pool, block_size, core, identities, queue, /))]
    fn new(
        pool: &Bound<'_, PyAny>,
        block_size: usize,
        core: &Bound<'_, PyAny>,
        identities: &Bound<'_, PyAny>,
        queue: Option<Py<FreeQueue>>,
    ) -> PyResult<Self> {
        let py = pool.py();
        let core = if core.is_none() {
            Core::Nobody
        } else if let Ok(workload) = core.cast::<Workload>() {
            Core::Workload(workload.clone().unbind())
        } else {
            Core::Object(core.clone().unbind())
        };
        Ok(Self {
            pool: pool.clone().unbind(),
            map: pool.getattr(intern!(py, "cached_block_hash_to_block"))?.unbind(),
            block_size: block_size.max(1),
            core,
            queue,
            acting: false,
            eager: false,
            on_reset: None,
            names: Names::new(identities)?,
            inferring: identities.getattr("core")?.cast_into::<Identity>()?.unbind(),
            calls: PyDict::new(py).unbind(),
            counts: Py::new(py, EngineCounts::default())?,
            untold: Vec::new(),
            untold_calls: 0,
            prefilling: Vec::new(),
            decoding: Decoding::new(block_size),
            pending: Told::default(),
            planned: None,
            starting: VecDeque::new(),
            failed: None,
            lost: false,
            numbers: 0,
            now_us: 0,
            keys: Vec::new(),
        })
    }

    /// Victims named ahead at most, by a thread that works each step off while the model runs; 0: everything is done at
    /// once, as it is for cores and policies in Python.
    #[getter]
    fn ahead(&self) -> usize {
        self.planned.as_ref().map_or(0, Planned::most)
    }

    #[setter]
    fn set_ahead(&mut self, py: Python<'_>, ahead: usize) -> PyResult<()> {
        self.flush(py)?;
        self.planned = None;
        let (Core::Workload(workload), Some(queue)) = (&self.core, &self.queue) else { return Ok(()) };
        if let (Some((shared, workload)), true) = (workload.get().plain(), ahead > 0) {
            let blocks = queue.bind(py).borrow().share();
            self.planned = Some(Planned::start(steps::Core { shared, workload, blocks }, ahead)?);
        }
        Ok(())
    }

    /// Ends the thread as a panic in it would, for tests.
    fn lose_thread(&mut self) {
        if let Some(planned) = &mut self.planned {
            planned.lose_thread();
        }
    }

    /// Waits until the last step has been worked off.
    #[pyo3(name = "catch_up")]
    fn wait(&mut self, py: Python<'_>) {
        self.catch_up(py);
    }

    /// Admitted calls whose prompts will take more blocks.
    #[getter]
    fn prefilling_calls(&self) -> usize {
        self.prefilling.len()
    }

    /// Calls that arrived since the last step, whether the core has heard of them or not.
    #[getter]
    fn arrived_calls(&self) -> usize {
        self.untold.len()
    }

    /// A request has been queued; None where it is known.
    #[pyo3(signature = (request, now_us, /))]
    pub(super) fn new_request<'py>(
        &mut self,
        request: &Bound<'py, PyAny>,
        now_us: u64,
    ) -> PyResult<Option<Bound<'py, EngineCall>>> {
        self.now_us = now_us;
        let id = request.getattr(intern!(request.py(), "request_id"))?;
        if self.calls.bind(request.py()).contains(&id)? {
            return Ok(None);
        }
        let call = self.arrive(request, id)?;
        if !call.borrow().ended_sessions.is_empty() {
            self.settle_up(request.py())?;
        }
        Ok(Some(call))
    }

    /// VLLM asks about a waiting request of which it has found so many tokens.
    #[pyo3(signature = (request, num_computed_tokens, now_us, /))]
    fn asked<'py>(
        &mut self,
        request: &Bound<'py, PyAny>,
        num_computed_tokens: usize,
        now_us: u64,
    ) -> PyResult<Bound<'py, EngineCall>> {
        let py = request.py();
        self.now_us = now_us;
        self.catch_up(py);
        self.check_reset_now(py)?;
        let id = request.getattr(intern!(py, "request_id"))?;
        let call = match self.call(py, &id)? {
            Some(call) => call,
            None => self.arrive(request, id)?,
        };
        if self.untold_calls > usize::from(call.borrow().untold) {
            // Others wait, too: their blocks must not make room for this one.
            self.tell_queued(py, Some(&call))?;
        }
        call.borrow_mut().hit = num_computed_tokens / self.block_size;
        Ok(call)
    }

    /// Blocks for a waiting request are about to be allocated: the call starts, and victims are put in place.
    #[pyo3(signature = (request, num_computed_tokens, now_us, /))]
    pub(super) fn before_allocation(
        &mut self,
        request: &Bound<'_, PyAny>,
        num_computed_tokens: usize,
        now_us: u64,
    ) -> PyResult<()> {
        let py = request.py();
        let call = self.asked(request, num_computed_tokens, now_us)?;
        let hit = call.borrow().hit;
        let tokens: usize = request.getattr(intern!(py, "num_tokens"))?.extract()?;
        let need = tokens.div_ceil(self.block_size).saturating_sub(hit);
        if need > self.free_blocks(py)? {
            // It will have to wait.
            return Ok(());
        }
        let started = {
            let mut one = call.borrow_mut();
            if !one.allocated {
                one.started_us = now_us;
            }
            one.started
        };
        if !started {
            self.start(&call, now_us)?;
        }
        if let Some(planned) = &mut self.planned {
            planned.keep(call.borrow().before(hit));
        }
        let core_hit = call.borrow().core_hit.unwrap_or(0);
        let Some(queue) = self.queue.as_ref().filter(|_| need > 0 && self.acting) else { return Ok(()) };
        let queue = queue.clone_ref(py).into_bound(py);
        let spare = if hit > core_hit {
            if self.planned.is_some() {
                queue.borrow().named(call.borrow().before(hit))
            } else if queue.borrow().may_spare(call.borrow().after(core_hit)) {
                self.hit_ids(request, core_hit, hit)?
            } else {
                Vec::new()
            }
        } else {
            Vec::new()
        };
        self.prefilling.retain(|other| !other.bind(py).is(&call));
        // What others still need is named at the end of the step, whichever of these blocks they have taken until then.
        self.prepare(&queue, need, Ahead::default(), &spare)?;
        {
            let mut one = call.borrow_mut();
            (one.tokens, one.computed) = (tokens, hit * self.block_size);
            // Where it has been preempted, it decodes no more.
            self.decoding.leave(one.decodes.take());
        }
        self.prefilling.push(call.unbind());
        Ok(())
    }

    /// A request has its blocks; returns its call the first time.
    #[pyo3(signature = (request, blocks, /))]
    pub(super) fn allocated<'py>(
        &mut self,
        request: &Bound<'py, PyAny>,
        blocks: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, EngineCall>>> {
        let py = request.py();
        self.catch_up(py);
        let Some(call) = self.call(py, &request.getattr(intern!(py, "request_id"))?)? else { return Ok(None) };
        // A MultiConnector does not tell the blocks.
        let group = match blocks.getattr_opt(intern!(py, "blocks"))? {
            Some(groups) if groups.is_truthy()? => Some(groups.get_item(0)?),
            _ => None,
        };
        let group = match group {
            Some(group) if group.is_truthy()? => Some(group),
            _ => None,
        };
        let (core_hit, hit) = {
            let mut one = call.borrow_mut();
            let unknown = if self.planned.is_some() { one.hit } else { 0 };
            let core_hit = one.core_hit.unwrap_or(unknown);
            // Admitted again after a preemption: what is not a hit has new blocks.
            one.low = one.low.min(core_hit).min(one.hit);
            (core_hit, one.hit)
        };
        let named = self.queue.as_ref().is_some_and(|queue| queue.bind(py).borrow().has_named());
        if self.planned.is_some() {
            if let (true, Some(queue)) = (named, &self.queue) {
                queue.bind(py).borrow().in_use(call.borrow().before(hit));
            }
        } else if hit > core_hit && named {
            // Named blocks that are in use again are no victims any more.
            let ids = match &group {
                Some(group) if group.len()? >= hit => ids_of(group, core_hit, hit)?,
                _ => self.hit_ids(request, core_hit, hit)?,
            };
            if ids.len() == hit - core_hit {
                let keys = call.borrow().after(core_hit).to_vec();
                self.carry(py, &keys[..keys.len().min(ids.len())], &ids)?;
            }
        }
        if call.borrow().allocated {
            return Ok(None);
        }
        let unstarted = {
            let mut one = call.borrow_mut();
            one.allocated = true;
            !one.started
        };
        let counts = self.counts.get();
        add(&counts.prompt_tokens, request.getattr(intern!(py, "num_prompt_tokens"))?.extract()?);
        add(&counts.hit_tokens, (hit * self.block_size) as u64);
        if unstarted {
            // Its start was missed, by a fault or a pause.
            let started_us = call.borrow().started_us;
            self.start(&call, started_us)?;
        }
        self.stored(&call)?;
        Ok(Some(call))
    }

    /// A step has been scheduled: prepares what running requests will take in the next one.
    #[pyo3(signature = (scheduler_output, now_us, /))]
    pub(super) fn step_ended(&mut self, scheduler_output: &Bound<'_, PyAny>, now_us: u64) -> PyResult<()> {
        let py = scheduler_output.py();
        self.now_us = now_us;
        let scheduled = scheduler_output.getattr(intern!(py, "num_scheduled_tokens"))?;
        let scheduled = scheduled.cast::<PyDict>().map_err(|_| PyTypeError::new_err("num_scheduled_tokens"))?;
        let running = scheduled.len();
        let counts = self.counts.get();
        add(&counts.steps, 1);
        counts.running.store(running as u64, Relaxed);
        self.catch_up(py);
        self.check_reset_now(py)?;
        if self.untold_calls > 0 {
            self.tell_queued(py, None)?;
        } else {
            // All that have arrived have started: where nobody ever waits, nothing else lets go of them.
            self.untold.clear();
        }
        if self.planned.is_none() {
            self.flush(py)?;
            if let Core::Workload(workload) = &self.core {
                workload.get().settle_step(now_us)?;
            }
        }
        let prepared = if running > 0 && self.acting { self.prepare_next(scheduler_output, scheduled) } else { Ok(()) };
        self.post();
        prepared?;
        if std::mem::take(&mut self.lost) {
            self.restart(py, now_us)?;
        }
        // What went wrong beside is nothing that a hook before could have done better.
        self.failed.take().map_or(Ok(()), Err)
    }

    /// A request is over, one way or another; its blocks are freed next.
    #[pyo3(signature = (request, block_ids_by_group, now_us, /))]
    pub(super) fn finished<'py>(
        &mut self,
        request: &Bound<'py, PyAny>,
        block_ids_by_group: &Bound<'py, PyAny>,
        now_us: u64,
    ) -> PyResult<Option<Bound<'py, EngineCall>>> {
        let py = request.py();
        self.now_us = now_us;
        self.catch_up(py);
        let id = request.getattr(intern!(py, "request_id"))?;
        let Some(call) = self.call(py, &id)? else {
            self.strangers(block_ids_by_group)?;
            return Ok(None);
        };
        self.calls.bind(py).del_item(&id)?;
        if self.planned.is_some() && call.borrow().started && call.borrow().core_hit.is_none() {
            // It ends in the step in which it started.
            self.flush(py)?;
        }
        self.prefilling.retain(|other| !other.bind(py).is(&call));
        self.check_reset_now(py)?;
        add(&self.counts.get().finished, 1);
        {
            let mut one = call.borrow_mut();
            if std::mem::take(&mut one.untold) {
                self.untold_calls -= 1;
            }
            self.decoding.leave(one.decodes.take());
        }
        let (prompt, mut computed) = (call.borrow().keys.len(), call.borrow().keys.len());
        if call.borrow().allocated {
            // Blocks in use cannot be victims, so it is early enough to learn now which carries what.
            let tokens: usize = request.getattr(intern!(py, "num_computed_tokens"))?.extract()?;
            let ids = match block_ids_by_group.len()? {
                0 => None,
                _ => Some(block_ids_by_group.get_item(0)?),
            };
            computed = (tokens / self.block_size).min(ids.as_ref().map_or(Ok(0), PyAnyMethods::len)?);
            let low = call.borrow().low.min(computed);
            let hashes = request.getattr(intern!(py, "block_hashes"))?;
            let mut keys = std::mem::take(&mut self.keys);
            keys.clear();
            // Those of the prompt have been read.
            keys.extend_from_slice(&call.borrow().keys[low..prompt.min(computed)]);
            read_keys(&hashes, low + keys.len(), computed, &mut keys)?;
            if let (Some(ids), false) = (ids, matches!(self.core, Core::Nobody)) {
                let ids = numbers(&ids, low)?;
                self.carry(py, &keys, &ids)?;
            }
            if computed > prompt {
                call.borrow_mut().output.extend_from_slice(keys.get(prompt - low..).unwrap_or(&[]));
            }
            self.keys = keys;
        }
        if call.borrow().session_ends {
            let last = self.is_last(&call)?;
            call.borrow_mut().session_ends = last;
        }
        let one = call.borrow();
        if let Some(inferred) = one.inferred {
            self.inferring.get().ended_now(inferred, &one.output)?;
        }
        if one.told {
            self.tell(py, EventKind::CallEnd, (one.session, 0), one.number, now_us, &one.output)?;
            if computed < prompt {
                // Cut short in the middle of its prompt: the rest was never computed.
                self.tell(py, EventKind::Removed, (0, 0), 0, now_us, &one.keys[computed..=computed])?;
            }
        }
        if one.session_ends {
            add(&self.counts.get().sessions_ended, 1);
            self.tell(py, EventKind::SessionEnd, (one.session, 0), 0, now_us, &[])?;
        }
        let says = one.inferred.filter(|_| one.session_inferred && one.allocated);
        let gave_up = self.planned.is_some() && !one.allocated;
        drop(one);
        self.settle_up(py)?;
        if gave_up {
            self.left_behind(py, &call)?;
        }
        // What it says, an agent of the same run may quote. Last, so that tokens of a strange shape spoil nothing else.
        if let (Some(inferred), Some(answer)) = (says, request.getattr_opt(intern!(py, "output_token_ids"))?) {
            self.inferring.get().answered_now(inferred, &answer)?;
        }
        Ok(Some(call))
    }

    /// `block_ids` carry `keys`; what vLLM has evicted for them by itself, the core hears of now.
    #[pyo3(signature = (keys, block_ids, now_us, /))]
    fn register(
        &mut self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        block_ids: &Bound<'_, PyAny>,
        now_us: u64,
    ) -> PyResult<()> {
        self.now_us = now_us;
        self.catch_up(py);
        let keys: PyReadonlyArray1<'_, u64> = array("keys", keys)?;
        self.carry(py, keys.as_slice()?, &numbers(block_ids, 0)?)?;
        self.settle_up(py)
    }

    /// Notices a reset of vLLM's prefix cache.
    #[pyo3(signature = (now_us, /))]
    fn check_reset(&mut self, py: Python<'_>, now_us: u64) -> PyResult<()> {
        self.now_us = now_us;
        self.check_reset_now(py)
    }

    /// Forgets all blocks; what was learned stays.
    #[pyo3(signature = (now_us, /))]
    fn reset(&mut self, py: Python<'_>, now_us: u64) -> PyResult<()> {
        self.now_us = now_us;
        // Starts of before are answered before, else their answers would stand.
        let told = if self.planned.is_some() { self.flush(py).map(drop) } else { Ok(()) };
        if let Some(planned) = &mut self.planned {
            planned.forget_all();
        }
        self.map = self.pool.bind(py).getattr(intern!(py, "cached_block_hash_to_block"))?.unbind();
        if let Some(queue) = &self.queue {
            queue.bind(py).borrow().forget_all();
        }
        self.prefilling.clear();
        self.decoding.clear();
        add(&self.counts.get().resets, 1);
        for call in self.calls.bind(py).values() {
            // They are queued again and start anew.
            let mut one = call.cast::<EngineCall>()?.borrow_mut();
            (one.started, one.core_hit, one.allocated) = (false, None, false);
            (one.low, one.decodes) = (one.keys.len(), None);
        }
        self.tell(py, EventKind::Reset, (0, 0), 0, now_us, &[])?;
        told.and(self.flush(py))?;
        match &self.on_reset {
            Some(on_reset) => on_reset.bind(py).call0().map(drop),
            None => Ok(()),
        }
    }

    /// Starts over after a time without hooks: what was in flight may be gone.
    #[pyo3(signature = (now_us, /))]
    fn restart(&mut self, py: Python<'_>, now_us: u64) -> PyResult<()> {
        let calls = self.calls.bind(py).values();
        self.calls.bind(py).clear();
        self.untold.clear();
        self.untold_calls = 0;
        for call in calls {
            let one = call.cast::<EngineCall>()?.borrow();
            if let Some(inferred) = one.inferred {
                self.inferring.get().ended_now(inferred, &[])?;
            }
            if one.told {
                self.tell(py, EventKind::CallEnd, (one.session, 0), one.number, now_us, &[])?;
            }
        }
        self.reset(py, now_us)?;
        match self.queue.as_ref().filter(|_| self.acting && !matches!(self.core, Core::Nobody)) {
            Some(queue) => queue.bind(py).borrow().strangers_first(py),
            None => Ok(()),
        }
    }
}

impl EngineCalls {
    fn call<'py>(&self, py: Python<'py>, id: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, EngineCall>>> {
        match self.calls.bind(py).get_item(id)? {
            Some(call) => Ok(Some(call.cast_into::<EngineCall>()?)),
            None => Ok(None),
        }
    }

    fn free_blocks(&self, py: Python<'_>) -> PyResult<usize> {
        let pool = self.pool.bind(py);
        match self.queue {
            Some(_) => {
                pool.getattr(intern!(py, "free_block_queue"))?.getattr(intern!(py, "num_free_blocks"))?.extract()
            }
            None => pool.call_method0(intern!(py, "get_num_free_blocks"))?.extract(),
        }
    }

    fn check_reset_now(&mut self, py: Python<'_>) -> PyResult<()> {
        let map = self.pool.bind(py).getattr(intern!(py, "cached_block_hash_to_block"))?;
        if map.is(&self.map) {
            return Ok(());
        }
        self.reset(py, self.now_us)
    }
}

/// Ids of `blocks[from..to]`.
fn ids_of(blocks: &Bound<'_, PyAny>, from: usize, to: usize) -> PyResult<Vec<u32>> {
    let py = blocks.py();
    (from..to).map(|at| blocks.get_item(at)?.getattr(intern!(py, "block_id"))?.extract()).collect()
}

/// `ids[from..]`.
fn numbers(ids: &Bound<'_, PyAny>, from: usize) -> PyResult<Vec<u32>> {
    let len = ids.len()?;
    let mut numbers = Vec::with_capacity(len.saturating_sub(from));
    if let Ok(list) = ids.cast::<PyList>() {
        for at in from..list.len() {
            numbers.push(list.get_item(at)?.extract()?);
        }
    } else {
        for at in from..len {
            numbers.push(ids.get_item(at)?.extract()?);
        }
    }
    Ok(numbers)
}
