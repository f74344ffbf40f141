//! A hash table of slot numbers: the keys stay where the slots are.
//!
//! Linear probing, at most half full, deletion by backward shift: no tombstones, nothing is ever rehashed. One writer.

/// Marks an empty entry, and "not found".
pub(super) const EMPTY: u32 = u32::MAX;

/// Hash for a [`Table`]: a multiplication and a fold, each bit of a key reaches the low bits.
#[inline(always)]
pub(super) const fn hash(key: u64) -> u64 {
    let product = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    product ^ product >> 32
}

/// See the module's page.
#[derive(Debug)]
pub(super) struct Table {
    entries: Box<[u32]>,
}

impl Table {
    /// A table for at most `most` slots.
    pub(super) fn new(most: usize) -> Self {
        Self { entries: vec![EMPTY; (2 * most).next_power_of_two()].into_boxed_slice() }
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.entries)
    }

    /// The slot with this hash for which `is` holds, [`EMPTY`] if there is none.
    #[inline]
    pub(super) fn find(&self, hash: u64, is: impl Fn(u32) -> bool) -> u32 {
        let mask = self.entries.len() - 1;
        let mut at = hash as usize & mask;
        while self.entries[at] != EMPTY && !is(self.entries[at]) {
            at = (at + 1) & mask;
        }
        self.entries[at]
    }

    /// Adds a slot that is not there.
    #[inline]
    pub(super) fn insert(&mut self, hash: u64, slot: u32) {
        let mask = self.entries.len() - 1;
        let mut at = hash as usize & mask;
        while self.entries[at] != EMPTY {
            at = (at + 1) & mask;
        }
        self.entries[at] = slot;
    }

    /// Takes out a slot that is there.
    #[inline]
    pub(super) fn remove(&mut self, hash: u64, slot: u32, hash_of: impl Fn(u32) -> u64) {
        let mask = self.entries.len() - 1;
        let mut hole = hash as usize & mask;
        while self.entries[hole] != slot {
            hole = (hole + 1) & mask;
        }
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let next = self.entries[at];
            if next == EMPTY {
                break;
            }
            // Whatever does not lie between its home and here without the hole stays.
            if at.wrapping_sub(hash_of(next) as usize) & mask >= at.wrapping_sub(hole) & mask {
                self.entries[hole] = next;
                hole = at;
            }
        }
        self.entries[hole] = EMPTY;
    }

    pub(super) fn clear(&mut self) {
        self.entries.fill(EMPTY);
    }
}
