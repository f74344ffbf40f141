//! A hash table of slot numbers: the keys stay where the slots are.
//!
//! Linear probing, at most half full, deletion by backward shift: no tombstones, nothing is ever rehashed. One writer.
//!
//! Other threads may look at a key's *home*, the entry at its hash: it is never empty while the key is in the table, since
//! a key lies beyond its home only where that is taken, and moves back before it is emptied. One word, one fact: `Relaxed`.
//! The workspace `runtime_core_loom` includes this file, too.

use std::sync::Arc;

use crate::sync::{AtomicU32, Ordering::Relaxed};

/// Marks an empty entry, and "not found".
pub(super) const EMPTY: u32 = u32::MAX;

/// See the module's page.
#[derive(Debug)]
pub(super) struct Table {
    entries: Arc<[AtomicU32]>,
}

/// What any thread may ask about a [`Table`].
#[derive(Clone, Debug)]
pub(super) struct Homes(Arc<[AtomicU32]>);

impl Homes {
    /// False where no key of this hash is in the table; true may also mean that another one is. Wait-free.
    #[inline]
    pub(super) fn may_hold(&self, hash: u64) -> bool {
        self.0[hash as usize & (self.0.len() - 1)].load(Relaxed) != EMPTY
    }
}

impl Table {
    /// A table for at most `most` slots.
    pub(super) fn new(most: usize) -> Self {
        Self { entries: (0..(2 * most).next_power_of_two()).map(|_| AtomicU32::new(EMPTY)).collect() }
    }

    pub(super) fn homes(&self) -> Homes {
        Homes(Arc::clone(&self.entries))
    }

    #[inline(always)]
    fn entry(&self, at: usize) -> u32 {
        self.entries[at].load(Relaxed)
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.entries)
    }

    /// The slot with this hash for which `is` holds, [`EMPTY`] if there is none.
    #[inline]
    pub(super) fn find(&self, hash: u64, is: impl Fn(u32) -> bool) -> u32 {
        self.find_place(hash, is).1
    }

    /// [`Self::find`], and the place of the entry, good until another one is taken out.
    #[inline(always)]
    fn find_place(&self, hash: u64, is: impl Fn(u32) -> bool) -> (usize, u32) {
        let mask = self.entries.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = self.entry(at);
            if slot == EMPTY || is(slot) {
                return (at, slot);
            }
            at = (at + 1) & mask;
        }
    }

    /// Adds a slot that is not there.
    #[inline]
    pub(super) fn insert(&mut self, hash: u64, slot: u32) {
        let mask = self.entries.len() - 1;
        let mut at = hash as usize & mask;
        while self.entry(at) != EMPTY {
            at = (at + 1) & mask;
        }
        self.entries[at].store(slot, Relaxed);
    }

    /// Takes out a slot that is there.
    #[inline(always)]
    pub(super) fn remove(&mut self, hash: u64, slot: u32, hash_of: impl Fn(u32) -> u64) {
        let mask = self.entries.len() - 1;
        let (hole, _) = self.find_place(hash, |entry| entry == slot);
        if self.entry((hole + 1) & mask) == EMPTY {
            self.entries[hole].store(EMPTY, Relaxed);
        } else {
            self.close::<true>(hole, hash_of);
        }
    }

    /// Takes out an entry that others follow. Without `FILLED` it is emptied before what belongs there has moved back.
    pub(super) fn close<const FILLED: bool>(&mut self, mut hole: usize, hash_of: impl Fn(u32) -> u64) {
        let mask = self.entries.len() - 1;
        let mut at = hole;
        if !FILLED {
            self.entries[hole].store(EMPTY, Relaxed);
        }
        loop {
            at = (at + 1) & mask;
            let next = self.entry(at);
            if next == EMPTY {
                break;
            }
            // Whatever does not lie between its home and here without the hole stays.
            if at.wrapping_sub(hash_of(next) as usize) & mask >= at.wrapping_sub(hole) & mask {
                self.entries[hole].store(next, Relaxed);
                hole = at;
            }
        }
        self.entries[hole].store(EMPTY, Relaxed);
    }

    pub(super) fn clear(&mut self) {
        self.entries.iter().for_each(|entry| entry.store(EMPTY, Relaxed));
    }
}
