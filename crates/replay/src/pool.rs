//! The simulated KV pool: which blocks are resident, pinned, and free to go.
//!
//! Invariant (prefix closure): a resident block's parent is resident. [`Pool::evict`] refuses a block that
//! a running call uses or that has a resident child, so a policy cannot break it.

use crate::trace::{Trace, NO_BLOCK};

/// Residency, pins and child counts of every block of a trace.
pub struct Pool {
    capacity: usize,
    resident: usize,
    pinned: usize,
    reserved: usize,
    /// Bit 31: resident. Bits 0..16: pins.
    state: Vec<u32>,
    children: Vec<u32>,
    parents: Vec<u32>,
    depths: Vec<u32>,
    evictions: u64,
    /// Blocks evicted since they were last asked for; kept only where there is a host tier.
    left: Option<Vec<u32>>,
}

const RESIDENT: u32 = 1 << 31;
const PINS: u32 = 0xFFFF;

impl Pool {
    /// An empty pool of `capacity` blocks for the blocks of `trace`.
    pub fn new(trace: &Trace, capacity: usize) -> Self {
        let n = trace.n_blocks as usize;
        let mut depths = vec![u32::MAX; n];
        let mut path = Vec::new();
        for b in 0..n as u32 {
            let mut at = b;
            while at != NO_BLOCK && depths[at as usize] == u32::MAX {
                path.push(at);
                at = trace.parents[at as usize];
            }
            let mut depth = if at == NO_BLOCK { 0 } else { depths[at as usize] + 1 };
            while let Some(top) = path.pop() {
                depths[top as usize] = depth;
                depth += 1;
            }
        }
        Self {
            capacity,
            resident: 0,
            pinned: 0,
            reserved: 0,
            state: vec![0; n],
            children: vec![0; n],
            parents: trace.parents.clone(),
            depths,
            evictions: 0,
            left: None,
        }
    }

    /// Blocks that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Blocks resident now.
    pub fn resident(&self) -> usize {
        self.resident
    }

    /// Blocks that can be inserted without an eviction.
    pub fn free(&self) -> usize {
        self.capacity - self.resident - self.reserved
    }

    /// Blocks evicted so far.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Number of distinct blocks in the trace.
    pub fn n_blocks(&self) -> usize {
        self.state.len()
    }

    /// Is the block in the pool?
    #[inline]
    pub fn is_resident(&self, block: u32) -> bool {
        self.state[block as usize] & RESIDENT != 0
    }

    /// Does a running call use the block?
    #[inline]
    pub fn is_pinned(&self, block: u32) -> bool {
        self.state[block as usize] & PINS != 0
    }

    /// Resident, not pinned, no resident child.
    #[inline]
    pub fn is_evictable(&self, block: u32) -> bool {
        self.state[block as usize] == RESIDENT && self.children[block as usize] == 0
    }

    /// Position of the block in its prompt, from 0.
    #[inline]
    pub fn depth(&self, block: u32) -> u32 {
        self.depths[block as usize]
    }

    /// The block's parent, [`NO_BLOCK`] at the root.
    #[inline]
    pub fn parent(&self, block: u32) -> u32 {
        self.parents[block as usize]
    }

    /// Evicts one block.
    ///
    /// Returns false, and changes nothing, where the block is not [evictable](Self::is_evictable).
    #[inline]
    pub fn evict(&mut self, block: u32) -> bool {
        if !self.is_evictable(block) {
            return false;
        }
        self.state[block as usize] = 0;
        let parent = self.parents[block as usize];
        if parent != NO_BLOCK {
            self.children[parent as usize] -= 1;
        }
        self.resident -= 1;
        self.evictions += 1;
        if let Some(left) = &mut self.left {
            left.push(block);
        }
        true
    }

    /// Keeps the blocks evicted from now on for [`Self::take_evicted`].
    pub fn keep_evicted(&mut self) {
        self.left = Some(Vec::new());
    }

    /// The blocks evicted since the last call, in order.
    pub fn take_evicted(&mut self) -> Vec<u32> {
        self.left.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Puts a block that is not there into a pool with room for it, below its resident parent.
    pub fn insert(&mut self, block: u32) {
        debug_assert!(!self.is_resident(block) && self.free() > 0);
        let parent = self.parents[block as usize];
        debug_assert!(parent == NO_BLOCK || self.is_resident(parent));
        self.state[block as usize] |= RESIDENT;
        if parent != NO_BLOCK {
            self.children[parent as usize] += 1;
        }
        self.resident += 1;
    }

    /// A call uses the block; pins are counted.
    pub fn pin(&mut self, block: u32) {
        self.pinned += usize::from(!self.is_pinned(block));
        self.state[block as usize] += 1;
    }

    /// Blocks that running calls use.
    pub fn pinned(&self) -> usize {
        self.pinned + self.reserved
    }

    /// Running calls use `n` more blocks without content that another call could use; there must be room.
    pub fn reserve(&mut self, n: usize) {
        debug_assert!(n <= self.free());
        self.reserved += n;
    }

    /// Gives back what was reserved.
    pub fn release(&mut self, n: usize) {
        self.reserved -= n;
    }

    /// Returns true when no call uses the block any more.
    pub fn unpin(&mut self, block: u32) -> bool {
        self.state[block as usize] -= 1;
        let free = !self.is_pinned(block);
        self.pinned -= usize::from(free);
        free
    }

    /// Checks the prefix-closure invariant over all blocks; for tests.
    pub fn is_prefix_closed(&self) -> bool {
        (0..self.state.len() as u32).all(|b| {
            let parent = self.parents[b as usize];
            !self.is_resident(b) || parent == NO_BLOCK || self.is_resident(parent)
        })
    }
}
