//! Calls in flight: found by their id; the oldest is known, for where there are too many.
//!
//! A bounded slab, a hash table over it, and a list from the oldest call to the newest: every step takes as long with
//! thousands of calls in flight as with one. One writer.

use std::ops::{Index, IndexMut};

use super::index;
use super::table::{Homes, Table, EMPTY};
use crate::ids::spread;
use crate::sessions::SessionHandle;

/// Calls in flight that are tracked; the oldest gives way.
pub(super) const MAX_CALLS: usize = 4096;
const NONE: u16 = u16::MAX;

/// A call in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running {
    pub(super) call: u64,
    pub(super) started_us: u64,
    pub(super) handle: SessionHandle,
    pub(super) workload: u32,
    /// Its lane, as long as that is this agent's ([`index::NONE`] before the session's first blocks): see
    /// `KvCache::lane_of`.
    pub(super) lane: u32,
    pub(super) agent: u16,
    /// Last block of the call that is indexed, always the last of its segment, which is pinned; and how many there are.
    pub(super) tail: u32,
    pub(super) len: u32,
    pub(super) prompt_len: u32,
    /// Blocks that could not be indexed: nothing may be hung below.
    pub(super) cut: bool,
    /// Where the guard's shadow holds it.
    pub(super) shadow: u32,
}

impl Running {
    /// A call without blocks.
    #[inline(always)]
    pub(super) const fn new(call: u64, started_us: u64, handle: SessionHandle, workload: u32, agent: u16) -> Self {
        Self {
            call,
            started_us,
            handle,
            workload,
            lane: index::NONE,
            agent,
            tail: index::NONE,
            len: 0,
            prompt_len: 0,
            cut: false,
            shadow: index::NONE,
        }
    }
}

/// A call, and where it stands in line.
#[derive(Clone, Copy, Debug)]
struct Slot {
    run: Running,
    older: u16,
    /// Of a slot that is free, the next one.
    newer: u16,
}

const _: () = assert!(size_of::<Slot>() == 64);

/// See the module's page.
#[derive(Debug)]
pub(super) struct Calls {
    /// Slots that were in use at some time; the first of them are in the cache.
    slots: Vec<Slot>,
    table: Table,
    len: usize,
    free: u16,
    oldest: u16,
    newest: u16,
}

impl Calls {
    pub(super) fn new() -> Self {
        Self {
            slots: Vec::with_capacity(MAX_CALLS),
            table: Table::new(MAX_CALLS),
            len: 0,
            free: NONE,
            oldest: NONE,
            newest: NONE,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>() + self.table.bytes()
    }

    /// Where any thread may look whether a call is perhaps here.
    pub(super) fn homes(&self) -> Homes {
        self.table.homes()
    }

    pub(super) fn is_full(&self) -> bool {
        self.len == MAX_CALLS
    }

    /// The slot of a call.
    #[inline]
    pub(super) fn find(&self, call: u64) -> Option<usize> {
        if self.len == 0 {
            return None;
        }
        let slot = self.table.find(spread(call), |slot| self.slots[slot as usize].run.call == call);
        (slot != EMPTY).then_some(slot as usize)
    }

    /// The slot of the call that started first.
    pub(super) fn oldest(&self) -> Option<usize> {
        (self.oldest != NONE).then_some(usize::from(self.oldest))
    }

    /// The slot of the call that started next.
    pub(super) fn newer(&self, slot: usize) -> Option<usize> {
        let newer = self.slots[slot].newer;
        (newer != NONE).then_some(usize::from(newer))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Running> {
        std::iter::successors(self.oldest(), |&slot| self.newer(slot)).map(|slot| &self.slots[slot].run)
    }

    /// Adds a call that is not there; there must be room.
    #[inline(always)]
    pub(super) fn push(&mut self, run: Running) {
        debug_assert!(!self.is_full() && self.find(run.call).is_none());
        let new = Slot { run, older: self.newest, newer: NONE };
        let slot = if self.free == NONE {
            self.slots.push(new);
            self.slots.len() as u16 - 1
        } else {
            let slot = self.free;
            let free = &mut self.slots[usize::from(slot)];
            self.free = free.newer;
            *free = new;
            slot
        };
        if self.newest == NONE {
            self.oldest = slot;
        } else {
            self.slots[usize::from(self.newest)].newer = slot;
        }
        self.newest = slot;
        self.table.insert(spread(run.call), u32::from(slot));
        self.len += 1;
    }

    /// Takes out the call in `slot`.
    #[inline(always)]
    pub(super) fn remove(&mut self, slot: usize) -> &Running {
        let Slot { run: Running { call, .. }, older, newer } = self.slots[slot];
        match older {
            NONE => self.oldest = newer,
            older => self.slots[usize::from(older)].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.slots[usize::from(newer)].older = older,
        }
        self.slots[slot].newer = self.free;
        self.free = slot as u16;
        self.len -= 1;
        let slots = &self.slots;
        self.table.remove(spread(call), slot as u32, |slot| spread(slots[slot as usize].run.call));
        &self.slots[slot].run
    }

    pub(super) fn clear(&mut self) {
        self.slots.clear();
        self.table.clear();
        self.len = 0;
        (self.free, self.oldest, self.newest) = (NONE, NONE, NONE);
    }
}

impl Index<usize> for Calls {
    type Output = Running;

    #[inline]
    fn index(&self, slot: usize) -> &Running {
        &self.slots[slot].run
    }
}

impl IndexMut<usize> for Calls {
    #[inline]
    fn index_mut(&mut self, slot: usize) -> &mut Running {
        &mut self.slots[slot].run
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::mix;
    use crate::kv::workload::Sessions;

    fn run(call: u64) -> Running {
        let handle = Sessions::new(8).unwrap().enter(crate::ids::SessionKey(1)).0;
        let (tail, len, prompt_len, shadow) = (index::NONE, 0, 0, index::NONE);
        Running {
            call,
            started_us: 0,
            handle,
            workload: 0,
            lane: 0,
            agent: 0,
            tail,
            len,
            prompt_len,
            cut: false,
            shadow,
        }
    }

    #[test]
    fn calls_are_found_and_kept_in_order_whatever_comes_and_goes() {
        let (mut calls, mut expected) = (Calls::new(), Vec::new());
        for step in 0..40_000 {
            let random = mix(step);
            if expected.len() == MAX_CALLS || (random % 5 < 2 && !expected.is_empty()) {
                let gone = expected.remove((random >> 32) as usize % expected.len().min(97));
                let slot = calls.find(gone).unwrap();
                assert_eq!(calls.remove(slot).call, gone);
                assert_eq!(calls.find(gone), None);
            } else {
                calls.push(run(step));
                expected.push(step);
            }
        }
        assert!(expected.len() > MAX_CALLS / 2);
        let homes = calls.homes();
        assert!(expected.iter().all(|&call| homes.may_hold(spread(call))));
        let unknown = (1 << 32..(1 << 32) + 1_000).filter(|&call| homes.may_hold(spread(call))).count();
        assert!(unknown < 600, "{unknown} of 1,000 calls that are not there are looked for in a half full table");
        assert_eq!(calls.iter().map(|run| run.call).collect::<Vec<_>>(), expected);
        for &call in &expected {
            assert_eq!(calls[calls.find(call).unwrap()].call, call);
        }
        assert_eq!(calls[calls.oldest().unwrap()].call, expected[0]);
    }
}
