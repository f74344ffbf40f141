//! A hash table of slot numbers that loads few keys: the keys stay where the slots are, and each entry says how far it
//! lies from its home.
//!
//! Linear probing, deletion by backward shift: no tombstones, nothing is ever rehashed. The bits of an entry that slot
//! numbers leave free hold its distance, so that a probe loads the keys of entries with the same home only, and a
//! deletion none; what lies farther than they can say has its home worked out. The caller knows where the home of a key
//! is, and sees to it that some entries stay vacant. This is for tables of a block each, of whose keys few are in the
//! cache; see `table.rs` for small ones.
//!
//! One writer. Other threads may look for a key meanwhile, and may miss one that is being moved. One word, one fact:
//! `Relaxed`.

use super::index::NONE;
use crate::sync::{AtomicU32, Ordering::Relaxed};

/// As many slot bits as the slots need, and any length.
pub(super) const ANY: u32 = 0;

/// See the module's page. Where it is known when compiling how many bits of an entry say which slot, the length is a
/// power of two as well: that saves the guard's shadow an eighth of its instructions.
#[derive(Debug)]
pub(super) struct Tagged<const SLOT_BITS: u32> {
    /// [`NONE`] where vacant.
    entries: Box<[AtomicU32]>,
    slot_bits: u32,
}

impl<const SLOT_BITS: u32> Tagged<SLOT_BITS> {
    /// A table of `len` entries, more than there will be slots, for the slots below `slots`.
    pub(super) fn new(len: usize, slots: usize) -> Self {
        // Wide enough for one slot more than there are, so that no entry is `NONE`.
        let slot_bits = usize::BITS - slots.leading_zeros();
        assert!(SLOT_BITS == ANY || (slot_bits <= SLOT_BITS && len.is_power_of_two()), "{len} entries, {slots} slots");
        Self { entries: (0..len).map(|_| AtomicU32::new(NONE)).collect(), slot_bits }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.entries)
    }

    pub(super) fn clear(&self) {
        self.entries.iter().for_each(|entry| entry.store(NONE, Relaxed));
    }

    /// Entries in use; for tests.
    pub(super) fn audit(&self) -> usize {
        self.entries.iter().filter(|entry| entry.load(Relaxed) != NONE).count()
    }

    #[inline]
    fn slot_bits(&self) -> u32 {
        if SLOT_BITS == ANY {
            self.slot_bits
        } else {
            SLOT_BITS
        }
    }

    #[inline]
    fn after(&self, at: usize) -> usize {
        if SLOT_BITS != ANY {
            (at + 1) & (self.entries.len() - 1)
        } else if at + 1 == self.entries.len() {
            0
        } else {
            at + 1
        }
    }

    #[inline]
    fn between(&self, from: usize, to: usize) -> usize {
        if SLOT_BITS != ANY {
            to.wrapping_sub(from) & (self.entries.len() - 1)
        } else if to >= from {
            to - from
        } else {
            to + self.entries.len() - from
        }
    }

    #[inline]
    fn most_distance(&self) -> usize {
        (1 << (32 - self.slot_bits())) - 1
    }

    /// The entry of a slot at `distance` from its home, as far as that can be told.
    #[inline]
    fn entry(&self, slot: u32, distance: usize) -> u32 {
        (u64::from(slot) | (distance.min(self.most_distance()) as u64) << self.slot_bits()) as u32
    }

    #[inline]
    fn slot(&self, entry: u32) -> u32 {
        (u64::from(entry) & ((1 << self.slot_bits()) - 1)) as u32
    }

    #[inline]
    fn distance(&self, entry: u32) -> usize {
        (u64::from(entry) >> self.slot_bits()) as usize
    }

    /// The slot with this home for which `is` holds, [`NONE`] if there is none.
    #[inline]
    pub(super) fn find(&self, home: usize, is: impl Fn(u32) -> bool) -> u32 {
        let (mut at, mut distance, most) = (home, 0, self.most_distance());
        loop {
            let entry = self.entries[at].load(Relaxed);
            if entry == NONE {
                return NONE;
            }
            let slot = self.slot(entry);
            if self.distance(entry) == distance && is(slot) {
                return slot;
            }
            at = self.after(at);
            distance = (distance + 1).min(most);
        }
    }

    /// What `of` says of the first slot with this home of which it says anything; for threads that do not write: it
    /// ends, whatever is moved meanwhile. Wait-free.
    pub(super) fn find_meanwhile<T>(&self, home: usize, of: impl Fn(u32) -> Option<T>) -> Option<T> {
        let (mut at, most) = (home, self.most_distance());
        for distance in 0..self.entries.len() {
            let entry = self.entries[at].load(Relaxed);
            if entry == NONE {
                return None;
            }
            if self.distance(entry) == distance.min(most) {
                if let Some(found) = of(self.slot(entry)) {
                    return Some(found);
                }
            }
            at = self.after(at);
        }
        None
    }

    /// The slot at this home, if what is there is at home as far as it can say; and the word that was read. For loads
    /// that are to overlap.
    #[inline]
    pub(super) fn at_home(&self, home: usize) -> (Option<u32>, u32) {
        let entry = self.entries[home].load(Relaxed);
        ((entry != NONE && self.distance(entry) == 0).then(|| self.slot(entry)), entry)
    }

    /// Adds a slot that is not there.
    #[inline]
    pub(super) fn insert(&self, home: usize, slot: u32) {
        let (mut at, mut distance) = (home, 0);
        while self.entries[at].load(Relaxed) != NONE {
            at = self.after(at);
            distance += 1;
        }
        self.entries[at].store(self.entry(slot, distance), Relaxed);
    }

    /// Takes out a slot that is there; `home_of` another slot is asked where an entry lies too far to say.
    #[inline]
    pub(super) fn remove(&self, home: usize, slot: u32, home_of: impl Fn(u32) -> usize) {
        let most = self.most_distance();
        let mut hole = home;
        while self.slot(self.entries[hole].load(Relaxed)) != slot {
            hole = self.after(hole);
        }
        let mut next = self.after(hole);
        loop {
            let moved = self.entries[next].load(Relaxed);
            if moved == NONE {
                break;
            }
            let slot = self.slot(moved);
            let mut distance = self.distance(moved);
            if distance == most {
                distance = self.between(home_of(slot), next);
            }
            let gap = self.between(hole, next);
            if distance >= gap {
                self.entries[hole].store(self.entry(slot, distance - gap), Relaxed);
                hole = next;
            }
            next = self.after(next);
        }
        self.entries[hole].store(NONE, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Slots come and go, few homes for many: those that are there are found, and no others.
    fn holds_what_was_put_in<const SLOT_BITS: u32>(table: &Tagged<SLOT_BITS>, slots: &[u32]) {
        let home_of = |slot: u32| table.len() - 1 - (slot % 3) as usize;
        let mut there = Vec::new();
        for &slot in slots {
            if let Some(at) = there.iter().position(|&other| other == slot) {
                there.swap_remove(at);
                table.remove(home_of(slot), slot, home_of);
            } else {
                there.push(slot);
                table.insert(home_of(slot), slot);
            }
            for slot in 0..12 {
                let found = if there.contains(&slot) { slot } else { NONE };
                assert_eq!(table.find(home_of(slot), |other| other == slot), found);
                let meanwhile = table.find_meanwhile(home_of(slot), |other| (other == slot).then_some(slot));
                assert_eq!(meanwhile.unwrap_or(NONE), found);
            }
            assert_eq!(table.audit(), there.len());
            for home in 0..table.len() {
                let at_home = table.at_home(home).0;
                let right = |slot| home_of(slot) == home || table.most_distance() == 0;
                assert!(at_home.is_none_or(|slot| there.contains(&slot) && right(slot)));
            }
        }
        table.clear();
        assert_eq!(table.audit(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_was_put_in_is_found_wherever_it_had_to_go(slots in proptest::collection::vec(0u32..12, 0..80)) {
            holds_what_was_put_in(&Tagged::<ANY>::new(13, 12), &slots);
            holds_what_was_put_in(&Tagged::<4>::new(16, 12), &slots);
        }

        #[test]
        fn what_lies_farther_than_entries_can_say_is_found(slots in proptest::collection::vec(0u32..12, 0..80)) {
            // One bit is left for distances, or none.
            holds_what_was_put_in(&Tagged::<ANY>::new(13, 1 << 30), &slots);
            holds_what_was_put_in(&Tagged::<ANY>::new(13, 1 << 31), &slots);
            holds_what_was_put_in(&Tagged::<31>::new(16, 12), &slots);
        }
    }

    #[test]
    fn no_slot_is_taken_for_a_vacant_entry() {
        for slots in [1usize, 2, 3, 4, 1 << 16, (1 << 31) - 1, 1 << 31] {
            let table = Tagged::<ANY>::new(16, slots);
            // As far from home as can be told, or farther.
            for slot in 0..15 {
                table.insert(15, (slots as u32 - 1).saturating_sub(slot));
            }
            assert_eq!(table.audit(), 15, "{slots} slots");
        }
    }
}
