//! A doubly linked queue over dense block ids: O(1) append, removal and membership, 8 bytes per block of the trace.

use crate::trace::NO_BLOCK;

/// Marks a block that is not in the queue.
const ABSENT: u32 = NO_BLOCK - 1;

/// Blocks in the order in which they are considered for eviction: the front goes first.
pub(crate) struct Queue {
    next: Vec<u32>,
    previous: Vec<u32>,
    front: u32,
    back: u32,
    len: usize,
}

impl Queue {
    pub(crate) fn new(n_blocks: usize) -> Self {
        Self { next: vec![ABSENT; n_blocks], previous: vec![ABSENT; n_blocks], front: NO_BLOCK, back: NO_BLOCK, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn contains(&self, block: u32) -> bool {
        self.next[block as usize] != ABSENT
    }

    pub(crate) fn front(&self) -> Option<u32> {
        (self.front != NO_BLOCK).then_some(self.front)
    }

    /// The block behind `block`, which is in the queue.
    pub(crate) fn after(&self, block: u32) -> Option<u32> {
        let next = self.next[block as usize];
        (next != NO_BLOCK).then_some(next)
    }

    /// Appends a block that is not in the queue.
    #[inline]
    pub(crate) fn push_back(&mut self, block: u32) {
        debug_assert!(!self.contains(block));
        self.previous[block as usize] = self.back;
        self.next[block as usize] = NO_BLOCK;
        if self.back == NO_BLOCK {
            self.front = block;
        } else {
            self.next[self.back as usize] = block;
        }
        self.back = block;
        self.len += 1;
    }

    /// Puts a block that is not in the queue at its front.
    pub(crate) fn push_front(&mut self, block: u32) {
        match self.front() {
            Some(front) => self.insert_before(front, block),
            None => self.push_back(block),
        }
    }

    /// Puts a block that is not in the queue before one that is.
    pub(crate) fn insert_before(&mut self, position: u32, block: u32) {
        debug_assert!(!self.contains(block) && self.contains(position));
        let previous = self.previous[position as usize];
        self.previous[block as usize] = previous;
        self.next[block as usize] = position;
        self.previous[position as usize] = block;
        if previous == NO_BLOCK {
            self.front = block;
        } else {
            self.next[previous as usize] = block;
        }
        self.len += 1;
    }

    pub(crate) fn pop_front(&mut self) -> Option<u32> {
        let block = self.front()?;
        self.remove(block);
        Some(block)
    }

    /// Takes a block out; false where it is not in the queue.
    #[inline]
    pub(crate) fn remove(&mut self, block: u32) -> bool {
        if !self.contains(block) {
            return false;
        }
        let (previous, next) = (self.previous[block as usize], self.next[block as usize]);
        if previous == NO_BLOCK {
            self.front = next;
        } else {
            self.next[previous as usize] = next;
        }
        if next == NO_BLOCK {
            self.back = previous;
        } else {
            self.previous[next as usize] = previous;
        }
        self.next[block as usize] = ABSENT;
        self.len -= 1;
        true
    }
}
