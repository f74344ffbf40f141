//! The host tier: copies of blocks that left the pool, in the order in which they left.
//!
//! A block that is evicted from the pool enters the host tier; the block that has been there longest without use leaves
//! it. A call that finds the first blocks of its prompt in the pool and the next ones in the host tier loads these
//! (demand loading). Between calls a policy may bring blocks back ahead of time ([`CachePolicy::prefetch`]), within a
//! budget of bytes per second: a token bucket that holds one second's worth.
//!
//! [`CachePolicy::prefetch`]: crate::policy::CachePolicy::prefetch

use crate::policies::queue::Queue;

/// Size and speed of a host tier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostOptions {
    /// Blocks that it holds.
    pub blocks: usize,
    /// Bytes per second between host and device.
    pub bytes_per_s: f64,
    /// Of these, bytes per second that prefetching may use.
    pub prefetch_bytes_per_s: f64,
    /// Bytes of one block.
    pub block_bytes: f64,
}

/// The host tier of one replay.
pub struct HostTier {
    options: HostOptions,
    blocks: Queue,
    /// Prefetched and not used since: when the copy is complete, microseconds; 0 for other blocks.
    ready_us: Vec<u64>,
    budget_bytes: f64,
    filled_us: u64,
    link_free_us: u64,
}

/// What the host tier did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCounts {
    /// Prompt blocks loaded on demand.
    pub loaded_blocks: u64,
    /// Blocks prefetched.
    pub prefetched_blocks: u64,
    /// Of these, used by a call before they were evicted.
    pub prefetch_used_blocks: u64,
    /// Of these, evicted without having been used.
    pub prefetch_wasted_blocks: u64,
}

impl HostTier {
    /// An empty tier for a trace of `n_blocks` blocks.
    pub fn new(options: HostOptions, n_blocks: usize) -> Self {
        Self {
            options,
            blocks: Queue::new(n_blocks),
            ready_us: vec![0; n_blocks],
            budget_bytes: options.prefetch_bytes_per_s,
            filled_us: 0,
            link_free_us: 0,
        }
    }

    /// Is a copy of the block there?
    pub fn holds(&self, block: u32) -> bool {
        self.blocks.contains(block)
    }

    /// The blocks that the prefetch budget allows now.
    pub fn budget_blocks(&mut self, now_us: u64) -> usize {
        let elapsed_s = now_us.saturating_sub(self.filled_us) as f64 / 1e6;
        self.filled_us = self.filled_us.max(now_us);
        let rate = self.options.prefetch_bytes_per_s;
        self.budget_bytes = (self.budget_bytes + elapsed_s * rate).min(rate);
        (self.budget_bytes / self.options.block_bytes) as usize
    }

    /// The block has left the pool. Returns true where it had been prefetched in vain.
    pub fn evicted(&mut self, block: u32) -> bool {
        if self.blocks.contains(block) {
            self.blocks.remove(block);
        }
        if self.options.blocks > 0 {
            if self.blocks.len() == self.options.blocks {
                self.blocks.pop_front();
            }
            self.blocks.push_back(block);
        }
        std::mem::take(&mut self.ready_us[block as usize]) != 0
    }

    /// A call loads the block.
    pub fn loaded(&mut self, block: u32) {
        self.blocks.remove(block);
        self.blocks.push_back(block);
    }

    /// The block is copied to the pool ahead of its use.
    pub fn prefetched(&mut self, block: u32, now_us: u64) {
        self.budget_bytes -= self.options.block_bytes;
        let took_us = (self.options.block_bytes / self.options.bytes_per_s * 1e6).ceil() as u64;
        self.link_free_us = self.link_free_us.max(now_us) + took_us;
        self.ready_us[block as usize] = self.link_free_us.max(1);
        self.loaded(block);
    }

    /// A call uses a block of the pool. `None`: it had not been prefetched; else whether its copy is complete.
    pub fn used(&mut self, block: u32, now_us: u64) -> Option<bool> {
        match std::mem::take(&mut self.ready_us[block as usize]) {
            0 => None,
            ready_us => Some(ready_us <= now_us),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tier(blocks: usize) -> HostTier {
        HostTier::new(HostOptions { blocks, bytes_per_s: 100.0, prefetch_bytes_per_s: 50.0, block_bytes: 10.0 }, 100)
    }

    #[test]
    fn the_block_that_left_the_pool_first_leaves_the_host_first() {
        let mut host = tier(2);
        for block in [1, 2, 3] {
            host.evicted(block);
        }
        assert!(!host.holds(1) && host.holds(2) && host.holds(3));
        host.loaded(2);
        host.evicted(4);
        assert!(host.holds(2) && !host.holds(3));
    }

    #[test]
    fn the_budget_is_respected_to_the_byte() {
        let mut host = tier(100);
        assert!((0..50).all(|block| !host.evicted(block)));
        // One second's worth at the start, 50 bytes a second after.
        assert_eq!(host.budget_blocks(0), 5);
        (0..5).for_each(|block| host.prefetched(block, 0));
        assert_eq!(host.budget_blocks(0), 0);
        assert_eq!(host.budget_blocks(399_999), 1);
        assert_eq!(host.budget_blocks(400_000), 2);
        assert_eq!(host.budget_blocks(60_000_000), 5);
    }

    #[test]
    fn a_prefetched_block_is_ready_when_the_link_has_carried_it() {
        let mut host = tier(100);
        assert!((0..2).all(|block| !host.evicted(block)));
        host.prefetched(0, 0);
        host.prefetched(1, 0);
        assert_eq!(host.used(0, 100_000), Some(true));
        assert_eq!(host.used(1, 150_000), Some(false));
        assert_eq!(host.used(1, 150_000), None);
    }

    #[test]
    fn an_unused_prefetch_counts_as_wasted_when_it_leaves() {
        let mut host = tier(100);
        host.evicted(0);
        host.prefetched(0, 0);
        assert!(host.evicted(0));
        assert!(!host.evicted(0));
    }
}
