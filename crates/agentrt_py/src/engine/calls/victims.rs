//! What has to stand at the head of vLLM's free queue: for the call that is allocated next, and for those that run.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use super::EngineCalls;
use crate::engine::queue::{Ahead, FreeQueue};

impl EngineCalls {
    /// Victims for what running requests will take in the next step.
    pub(super) fn prepare_next(
        &mut self,
        scheduler_output: &Bound<'_, PyAny>,
        scheduled: &Bound<'_, PyDict>,
    ) -> PyResult<()> {
        let (py, running) = (scheduled.py(), scheduled.len());
        self.decoding.step();
        let mut prefilled = (0, 0);
        let waiting = if self.prefilling.is_empty() { 0 } else { self.still_waiting(scheduled, &mut prefilled)? };
        let decoding = running.saturating_sub(prefilled.0);
        let decoded = match scheduler_output.getattr_opt(intern!(py, "total_num_scheduled_tokens"))? {
            Some(tokens) => tokens.extract::<usize>()?.saturating_sub(prefilled.1),
            None => decoding,
        };
        let takers = self.decoding.next_takers();
        let average = if decoded > decoding { decoded.div_ceil(self.block_size) } else { decoding / self.block_size };
        let soon = waiting + takers.max(average);
        match &self.queue {
            // No more than that: a block named in vain is one that the cache does without.
            Some(queue) if soon > 0 => {
                let queue = queue.clone_ref(py).into_bound(py);
                let ahead = Ahead { most: self.ahead(), quiet: self.starting.is_empty() };
                self.prepare(&queue, soon, ahead, &[])
            }
            _ => Ok(()),
        }
    }

    /// Puts victims in place for `n` allocations, and some of those that are to stand ready beyond them.
    pub(super) fn prepare(
        &mut self,
        queue: &Bound<'_, FreeQueue>,
        n: usize,
        ahead: Ahead,
        spare: &[u32],
    ) -> PyResult<()> {
        let (py, now_us) = (queue.py(), self.now_us);
        if self.planned.is_none() {
            return queue.borrow_mut().prepare_now(py, n, now_us, spare).map(drop);
        }
        let ask = &mut |n: usize, must: usize, victims: &mut Vec<(u32, u64)>| self.name(py, (n, must), now_us, victims);
        queue.borrow_mut().prepare_asking(py, n, now_us, spare, Some((ahead, ask)))?;
        if let Some(planned) = &mut self.planned {
            queue.borrow_mut().stale_blocks += planned.take_stale();
        }
        Ok(())
    }

    /// Victims that are named already, and where these do not suffice, such as the core names now.
    pub(super) fn name(
        &mut self,
        py: Python<'_>,
        (n, must): (usize, usize),
        now_us: u64,
        victims: &mut Vec<(u32, u64)>,
    ) -> PyResult<()> {
        let Some(planned) = &mut self.planned else { return Ok(()) };
        let short = must.saturating_sub(planned.take(n, victims));
        if short == 0 {
            return Ok(());
        }
        self.flush(py)?;
        if let Some(planned) = &mut self.planned {
            let mut step = planned.blank();
            step.name(short, now_us, planned.core());
            victims.append(&mut step.victims);
            self.answered(py, step);
        }
        Ok(())
    }

    /// Blocks that a request hits beyond what the core holds: some may stand at the head as victims.
    pub(super) fn hit_ids(&self, request: &Bound<'_, PyAny>, core_hit: usize, hit: usize) -> PyResult<Vec<u32>> {
        let py = request.py();
        let find = self.pool.bind(py).getattr(intern!(py, "get_cached_block"))?;
        let hashes = request.getattr(intern!(py, "block_hashes"))?;
        let hashes = hashes.cast::<PyList>()?;
        let groups = PyList::new(py, [0u32])?;
        let mut ids = Vec::new();
        for at in core_hit..hit.min(hashes.len()) {
            let found = find.call1((hashes.get_item(at)?, &groups))?;
            if found.is_truthy()? {
                for block in found.try_iter()? {
                    ids.push(block?.getattr(intern!(py, "block_id"))?.extract()?);
                }
            }
        }
        Ok(ids)
    }

    /// Blocks that admitted prompts will take after this step; those that are computed decode from the next one on.
    /// Counts the scheduled ones and their tokens.
    pub(super) fn still_waiting(
        &mut self,
        scheduled: &Bound<'_, PyDict>,
        counts: &mut (usize, usize),
    ) -> PyResult<usize> {
        let (py, mut waiting) = (scheduled.py(), 0);
        let mut at = 0;
        while let Some(call) = self.prefilling.get(at) {
            let mut one = call.bind(py).borrow_mut();
            if let Some(tokens) = scheduled.get_item(one.request_id.bind(py))? {
                let tokens: usize = tokens.extract()?;
                *counts = (counts.0 + 1, counts.1 + tokens);
                one.computed += tokens;
                if one.computed >= one.tokens {
                    one.decodes = Some(self.decoding.join(one.computed));
                    drop(one);
                    self.prefilling.swap_remove(at);
                    continue;
                }
            }
            waiting += one.left(self.block_size);
            at += 1;
        }
        Ok(waiting)
    }
}
