//! Calls arrive, start, store and end; sessions end; the engine drops blocks. What happens to the pool then, and in
//! which order. Learning what a call's use of its blocks teaches is in `touch.rs`.

use super::calls::Running;
use super::followers::Kin;
use super::index::NONE;
use super::segments::Origin;
use super::workload::Workload;
use super::{FutureStarts, Hint, KvCache};
use crate::sessions::SessionHandle;

/// A call that starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallStart<'a> {
    pub(crate) call: u64,
    /// The caller's name of the session.
    pub(crate) session: u64,
    pub(crate) agent: u16,
    pub(crate) now_us: u64,
    /// The prompt's blocks, root first.
    pub(crate) keys: &'a [u64],
    /// The future of each, for oracles; else empty.
    pub(crate) hints: &'a [Hint],
}

impl KvCache {
    /// A call starts. Pins the resident prefix; returns its length, and the session of a call that had to be let go.
    #[inline(always)]
    pub(crate) fn call_started(
        &mut self,
        workload: (u32, &Workload),
        handle: SessionHandle,
        start: &CallStart<'_>,
    ) -> (usize, Option<SessionHandle>) {
        let &CallStart { call, session, agent, now_us, keys, .. } = start;
        let now_us = self.clock(now_us);
        let slot = handle.slot() as u32;
        debug_assert_eq!(self.running.find(call), None);
        let let_go = if self.running.is_full() { self.make_way() } else { None };
        let tenant = self.tenant(handle, workload.0, session);
        tenant.calls = tenant.calls.saturating_add(1);
        // Who has had no blocks needs no lanes, and has nothing to touch or to score.
        if keys.is_empty() && tenant.lanes == NONE {
            self.ticket = 0;
            self.running.push(Running::new(call, now_us, handle, workload.0, agent));
            return (0, let_go);
        }
        // Made here, not before: what other code is to see has to be written down first.
        let run = Running::new(call, now_us, handle, workload.0, agent);
        let start = CallStart { ..*start };
        (self.blocks_started(workload.1, run, slot, &start), let_go)
    }

    /// The rest of [`Self::call_started`] where there are blocks.
    fn blocks_started(&mut self, workload: &Workload, run: Running, slot: u32, start: &CallStart<'_>) -> usize {
        let &CallStart { session, agent, keys, hints, .. } = start;
        self.find_path(keys);
        let hit = self.path.len();
        self.offers.called((slot, run.handle.generation(), agent), keys);
        let shadow = if self.config.guard { self.guard.started(session, keys, hit) } else { NONE };
        let lane = self.lane(slot, agent);
        let mut whole = true;
        let in_step_us = self.in_step_since(slot, run.started_us);
        let has_kin = self.tenants[slot as usize].kin[0] != Kin::NONE;
        if !self.path.is_empty() || has_kin || self.lanes[lane as usize].head != NONE || self.lost.any(lane) {
            self.refresh_curves(lane, workload);
            whole = self.touch(workload, lane, slot, run.started_us, in_step_us, keys, hints);
        }
        self.walk(slot, lane, keys);
        let at = self.tenants[slot as usize].calls;
        let x = &mut self.lanes[lane as usize];
        (x.calls, x.at, x.prompt_len) = (x.calls.wrapping_add(1), at, keys.len() as u32);
        self.ticket = 0;
        let tail = match self.path.last() {
            Some(&block) => self.pin(block),
            None => NONE,
        };
        let prompt_len = keys.len() as u32;
        self.running.push(Running { lane, tail, len: hit as u32, prompt_len, cut: !whole, shadow, ..run });
        self.mark(slot);
        hit
    }

    /// Whether a call that has arrived is to be tracked. What is not is heard of when it starts.
    pub(crate) fn may_queue(&mut self, call: u64) -> bool {
        if !self.config.queue {
            return false;
        }
        let known = self.queue.holds(call) || self.running.find(call).is_some();
        self.repairs.duplicate_calls += u64::from(known);
        self.repairs.untracked_calls += u64::from(!known && self.queue.is_full());
        !known && !self.queue.is_full()
    }

    /// A call has arrived and waits: its resident prefix will be used, and when is nearly certain.
    pub(crate) fn call_queued(&mut self, workload: u32, handle: SessionHandle, start: &CallStart<'_>) {
        let now_us = self.clock(start.now_us);
        let slot = handle.slot() as u32;
        self.tenant(handle, workload, start.session);
        let ticket = self.queue.push(start.call, handle, start.agent, now_us);
        self.find_path(start.keys);
        self.queue.asks_for(start.keys.len(), self.path.len());
        let mut at = 0;
        while at < self.path.len() {
            let segment = self.index.segment_of(self.path[at]);
            let x = *self.index.seg(segment);
            let n = (self.path.len() - at).min(x.len as usize);
            if n < x.len as usize {
                // Where no segment can be had, more is believed to be awaited than is.
                self.split(segment, self.path[at + n - 1], n as u32);
            }
            let x = self.index.seg_mut(segment);
            let first = if self.queue.wait_s(x.awaited.0).is_some() { x.awaited.0 } else { ticket };
            x.awaited = (first, ticket);
            at += n;
            if at == self.path.len() && self.lanes[x.lane as usize].session != slot {
                // Another session's leaf, or nobody's.
                self.queue_unscored(segment);
            }
        }
        self.mark(slot);
    }

    /// A call starts: who it is if it waited until now.
    #[inline]
    pub(crate) fn admitted(&mut self, call: u64, now_us: u64) -> Option<(SessionHandle, u16)> {
        if self.queue.is_empty() {
            return None;
        }
        self.admitted_of_some(call, now_us)
    }

    fn admitted_of_some(&mut self, call: u64, now_us: u64) -> Option<(SessionHandle, u16)> {
        let waiting = self.queue.admit(call, now_us)?;
        self.ticket = waiting.ticket;
        let mut moved = [None; 11];
        moved.iter_mut().zip(self.queue.moved()).for_each(|(to, handle)| *to = Some(handle));
        moved.into_iter().flatten().for_each(|handle| self.session_changed(handle));
        Some((waiting.handle, waiting.agent))
    }

    /// Lets the oldest call in flight go.
    #[cold]
    fn make_way(&mut self) -> Option<SessionHandle> {
        let at = self.running.oldest()?;
        self.repairs.untracked_calls += 1;
        Some(self.let_go(at))
    }

    fn let_go(&mut self, at: usize) -> SessionHandle {
        let &Running { handle, tail, shadow, .. } = self.running.remove(at);
        self.guard.ended(shadow);
        if tail != NONE {
            self.unpin(tail);
        }
        handle
    }

    /// A session is over: so are its calls.
    pub(crate) fn session_over(&mut self, handle: SessionHandle) {
        self.queue.remove_session(handle);
        let mut next = self.running.oldest();
        while let Some(at) = next {
            next = self.running.newer(at);
            if self.running[at].handle == handle {
                self.let_go(at);
            }
        }
        self.session_changed(handle);
    }

    /// Blocks that follow what the call has so far have entered the pool: the rest of the prompt, or the answer.
    pub(crate) fn stored(
        &mut self,
        workload: &Workload,
        call: u64,
        now_us: u64,
        keys: &[u64],
        hints: &[Hint],
        output: bool,
    ) {
        let now_us = self.clock(now_us);
        if keys.is_empty() {
            return;
        }
        let Some(at) = self.running.find(call) else {
            self.repairs.unknown_calls += 1;
            return;
        };
        let mut run = self.running[at];
        run.lane = self.lane_of(&run);
        self.running[at].lane = run.lane;
        // An answer hangs below the whole prompt or nowhere.
        if run.cut || (output && run.len < run.prompt_len) {
            self.repairs.untracked_blocks += keys.len() as u64;
            return;
        }
        if output {
            self.guard.answered(keys, &mut self.running[at].shadow);
        }
        let (mut tail, mut len, mut skip) = (run.tail, run.len, 0);
        // Blocks that another call stored meanwhile.
        while let Some(&key) = keys.get(skip) {
            let slot = self.index.find_after(tail, key);
            if slot == NONE || self.index.parent(slot) != tail {
                break;
            }
            (tail, len, skip) = (slot, len + 1, skip + 1);
        }
        if skip > 0 {
            let segment = self.index.segment_of(tail);
            let x = *self.index.seg(segment);
            let whole = x.tail == tail || self.split(segment, tail, len - x.depth) != NONE;
            tail = self.pin(tail);
            if run.tail != NONE {
                self.unpin(run.tail);
            }
            if !whole {
                self.repairs.untracked_blocks += (keys.len() - skip) as u64;
                (self.running[at].tail, self.running[at].cut) = (tail, true);
                return;
            }
        }
        let first = tail;
        let (keys, hints) = (&keys[skip..], hints.get(skip..).unwrap_or(&[]));
        let origin = if output { Origin::Output } else { Origin::Prompt(run.prompt_len) };
        let cut = !self.append(workload, run.lane, now_us, keys, hints, origin, &mut tail, &mut len);
        if tail != first {
            self.pin(tail);
            if first != NONE {
                self.unpin(first);
            }
        }
        let run = &mut self.running[at];
        (run.tail, run.len, run.cut) = (tail, len, cut);
        let handle = run.handle;
        self.session_changed(handle);
    }

    /// A call that does not run has ended, or gives up waiting.
    pub(crate) fn call_cancelled(&mut self, call: u64, now_us: u64) {
        self.clock(now_us);
        match self.queue.remove(call) {
            Some(waiting) => self.session_changed(waiting.handle),
            None => self.repairs.unknown_calls += 1,
        }
    }

    /// A call in flight, found at `at`, has ended: its blocks may go.
    #[inline(always)]
    pub(crate) fn call_finished(&mut self, workload: Option<&Workload>, at: usize, now_us: u64) {
        let now_us = self.clock(now_us);
        let &Running { handle, started_us, tail, shadow, .. } = self.running.remove(at);
        if let Some(workload) = workload {
            let often = workload.often(handle, started_us);
            if !often.is_never() {
                workload.services.learn(now_us.saturating_sub(started_us) as f32 / 1e6, often);
            }
        }
        self.guard.ended(shadow);
        if tail != NONE {
            self.blocks_finished(tail, now_us);
        }
        self.session_changed(handle);
    }

    /// A call that ends at the block `tail` has ended.
    fn blocks_finished(&mut self, tail: u32, now_us: u64) {
        let mut segment = self.index.segment_of(tail);
        while segment != NONE {
            self.index.seg_mut(segment).last_use_us = now_us;
            self.index.recency_remove(segment);
            self.index.recency_push(segment);
            segment = self.index.parent_segment(segment);
        }
        self.unpin(tail);
    }

    /// Where a call in flight is kept, until another call starts or ends.
    #[inline]
    pub(crate) fn find_call(&self, call: u64) -> Option<usize> {
        self.running.find(call)
    }

    /// The session of a call in flight.
    pub(crate) fn session_of(&self, at: usize) -> SessionHandle {
        self.running[at].handle
    }

    /// The session of a call in flight, if the caller calls it by this name.
    #[inline]
    pub(crate) fn caller(&self, at: usize, workload: u32, session: u64) -> Option<SessionHandle> {
        let handle = self.running[at].handle;
        let tenant = &self.tenants[handle.slot()];
        let same = tenant.session == session && u32::from(tenant.workload) == workload;
        (same && tenant.generation == handle.generation()).then_some(handle)
    }

    /// Gives an oracle the starts of the session's next calls.
    pub(crate) fn foretell(&mut self, handle: SessionHandle, workload: u32, session: u64, starts: FutureStarts) {
        self.tenant(handle, workload, session);
        if let Some(at) = self.starts.get_mut(handle.slot()) {
            *at = starts;
        }
    }

    /// The engine has dropped a block by itself, and with it everything below. Returns the blocks dropped.
    pub(crate) fn removed(&mut self, key: u64) -> usize {
        let slot = self.index.find(key);
        if slot == NONE {
            return 0;
        }
        let segment = self.index.segment_of(slot);
        // Where a call in flight or another segment below keeps the block, it stays.
        let x = *self.index.seg(segment);
        if x.children > 0 || x.pins > 0 {
            return 0;
        }
        let (mut block, mut n) = (x.tail, 1);
        while block != slot {
            block = self.index.parent(block);
            n += 1;
        }
        let (exposed, _) = self.take_from(segment, n, &mut |_| {});
        if exposed != NONE {
            self.queue_unscored(exposed);
        }
        n
    }
}
