//! Who calls: a request that vLLM has queued, and what it says of sessions that are over.

use pyo3::intern;
use pyo3::prelude::*;
use runtime_core::runtime::EventKind;

use super::{numbers, EngineCalls};
use crate::engine::blocks::read_keys;
use crate::engine::call::{add, EngineCall};

impl EngineCalls {
    pub(super) fn arrive<'py>(
        &mut self,
        request: &Bound<'py, PyAny>,
        request_id: Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, EngineCall>> {
        let py = request.py();
        let tokens: usize = request.getattr(intern!(py, "num_prompt_tokens"))?.extract()?;
        let stop = tokens / self.block_size;
        let mut keys = Vec::with_capacity(stop.min(1 << 16));
        read_keys(&request.getattr(intern!(py, "block_hashes"))?, 0, stop, &mut keys)?;
        let named = match self.names.said(request)? {
            Some(named) => named,
            None => self.names.resolved(request, &keys)?,
        };
        let (session_inferred, agent_inferred, inferred) = named.inferred.unwrap_or_default();
        let mut told = Vec::new();
        for over in named.ended_sessions {
            // Who calls is not over, whatever the list says.
            if over == named.session || told.contains(&over) {
                continue;
            }
            match self.held_of(py, over)? {
                // Its blocks are in use: it is over when this call is.
                Some(held) => held.borrow_mut().session_ends = true,
                None => told.push(over),
            }
        }
        self.numbers += 1;
        let call = Bound::new(
            py,
            EngineCall {
                number: self.numbers,
                session: named.session,
                agent: named.agent,
                session_ends: named.session_ends,
                session_inferred,
                agent_inferred,
                ended_sessions: told.clone(),
                inferred,
                low: keys.len(),
                keys,
                output: Vec::new(),
                arrived_us: self.now_us,
                started_us: self.now_us,
                told: false,
                untold: true,
                started: false,
                core_hit: None,
                hit: 0,
                allocated: false,
                tokens: 0,
                computed: 0,
                decodes: None,
                request_id: request_id.clone().unbind(),
            },
        )?;
        self.calls.bind(py).set_item(request_id, &call)?;
        self.untold.push(call.clone().unbind());
        self.untold_calls += 1;
        let counts = self.counts.get();
        add(&counts.requests, 1);
        add(&counts.sessions_inferred, u64::from(session_inferred));
        add(&counts.agents_inferred, u64::from(agent_inferred));
        add(&counts.sessions_ended, told.len() as u64);
        for over in told {
            self.tell(py, EventKind::SessionEnd, (over, 0), 0, self.now_us, &[])?;
        }
        Ok(call)
    }

    /// A request has ended of which nothing is known: so is nothing of its blocks, and the core will never name them.
    pub(super) fn strangers(&self, block_ids_by_group: &Bound<'_, PyAny>) -> PyResult<()> {
        let Some(queue) = self.queue.as_ref().filter(|_| self.acting) else { return Ok(()) };
        if block_ids_by_group.len()? > 0 {
            let ids = numbers(&block_ids_by_group.get_item(0)?, 0)?;
            let queue = queue.bind(block_ids_by_group.py()).borrow();
            let mut tables = queue.tables();
            ids.into_iter().rev().for_each(|id| tables.goes_first(id));
        }
        Ok(())
    }

    /// A call has given up waiting. Blocks of its prompt that had been named stayed for its sake, and no start has brought
    /// them back to the core.
    #[cold]
    pub(super) fn left_behind(&mut self, py: Python<'_>, call: &Bound<'_, EngineCall>) -> PyResult<()> {
        self.flush(py)?;
        if let Some(planned) = &self.planned {
            let mut blocks = planned.core().tables();
            for &key in &call.borrow().keys {
                if !planned.core().shared.core.is_resident(key) {
                    if let Some(id) = blocks.take(key) {
                        blocks.goes_first(id);
                    }
                }
            }
        }
        Ok(())
    }

    /// The youngest call of a session that vLLM holds.
    pub(super) fn held_of<'py>(&self, py: Python<'py>, session: u64) -> PyResult<Option<Bound<'py, EngineCall>>> {
        let mut youngest: Option<Bound<'py, EngineCall>> = None;
        for (_, call) in self.calls.bind(py) {
            let call = call.cast_into::<EngineCall>()?;
            let one = call.borrow();
            let older = youngest.as_ref().is_some_and(|other| other.borrow().number > one.number);
            if one.session == session && !older {
                drop(one);
                youngest = Some(call);
            }
        }
        Ok(youngest)
    }

    /// A call has ended that was to be its session's last. It is not where the session has called again since, and not
    /// yet where an earlier call of it still runs.
    pub(super) fn is_last(&self, call: &Bound<'_, EngineCall>) -> PyResult<bool> {
        let (session, number) = (call.borrow().session, call.borrow().number);
        let Some(other) = self.held_of(call.py(), session)? else { return Ok(true) };
        let mut other = other.borrow_mut();
        other.session_ends |= other.number < number;
        Ok(false)
    }
}
