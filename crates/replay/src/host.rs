//! The host tier: copies of blocks that left the pool, in the order in which they left.
//!
//! A block that is evicted from the pool enters the host tier; where that is full, the policy may say what leaves it
//! ([`CachePolicy::host_room`]), else it is what has been there longest without use. A call that finds the first blocks of its prompt in the pool and the next ones in the host tier loads these
//! (demand loading). Between calls a policy may bring blocks back ahead of time ([`CachePolicy::prefetch`]), within a
//! budget of bytes per second: a token bucket that holds one second's worth, in whole numbers. In any t seconds at most
//! (t + 1) times the budget is brought back, to the byte.
//!
//! [`CachePolicy::host_room`]: crate::policy::CachePolicy::host_room
//! [`CachePolicy::prefetch`]: crate::policy::CachePolicy::prefetch

use crate::policies::queue::Queue;
use crate::pool::Pool;

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

const MICRO: u128 = 1_000_000;

/// The host tier of one replay.
pub struct HostTier {
    options: HostOptions,
    blocks: Queue,
    /// Of these, those that the pool may hold too.
    doubled: Queue,
    /// Prefetched and not used since: when the copy is complete, microseconds; 0 for other blocks.
    ready_us: Vec<u64>,
    /// Millionths of a byte, so that a microsecond adds a whole number.
    budget: u128,
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
            doubled: Queue::new(n_blocks),
            ready_us: vec![0; n_blocks],
            budget: u128::from(options.prefetch_bytes_per_s as u64) * MICRO,
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
        let elapsed_us = u128::from(now_us.saturating_sub(self.filled_us)).min(MICRO);
        self.filled_us = self.filled_us.max(now_us);
        let rate = u128::from(self.options.prefetch_bytes_per_s as u64);
        self.budget = (self.budget + elapsed_us * rate).min(rate * MICRO);
        (self.budget / self.block_cost()) as usize
    }

    fn block_cost(&self) -> u128 {
        u128::from((self.options.block_bytes.ceil() as u64).max(1)) * MICRO
    }

    /// The block has left the pool. Returns true where it had been prefetched in vain.
    pub fn evicted(&mut self, block: u32) -> bool {
        self.drop_copy(block);
        if self.options.blocks > 0 {
            if self.blocks.len() == self.options.blocks {
                let oldest = self.blocks.front().expect("a full queue has a front");
                self.drop_copy(oldest);
            }
            self.blocks.push_back(block);
        }
        std::mem::take(&mut self.ready_us[block as usize]) != 0
    }

    /// Blocks that fit without a victim.
    pub fn free(&self) -> usize {
        self.options.blocks - self.blocks.len()
    }

    /// Copies, in the order in which they came or were used last.
    pub fn copies(&self) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(self.blocks.front(), |&b| self.blocks.after(b))
    }

    /// Drops a copy; false where there is none.
    pub fn drop_copy(&mut self, block: u32) -> bool {
        self.doubled.remove(block);
        self.blocks.remove(block)
    }

    /// Drops at most `most` copies of blocks that the pool holds too, least recently loaded first; returns how many.
    pub fn drop_doubles(&mut self, pool: &Pool, most: usize) -> usize {
        let mut done = 0;
        while done < most {
            let Some(block) = self.doubled.pop_front() else { break };
            done += usize::from(pool.is_resident(block) && self.blocks.remove(block));
        }
        done
    }

    /// The block has left the pool and is not copied. Returns true where it had been prefetched in vain.
    pub(crate) fn refused(&mut self, block: u32) -> bool {
        std::mem::take(&mut self.ready_us[block as usize]) != 0
    }

    /// A call loads the block.
    pub fn loaded(&mut self, block: u32) {
        self.drop_copy(block);
        self.blocks.push_back(block);
        self.doubled.push_back(block);
    }

    /// The block is copied to the pool ahead of its use.
    pub fn prefetched(&mut self, block: u32, now_us: u64) {
        self.budget =
            self.budget.checked_sub(self.block_cost()).expect("no more than `budget_blocks` are brought back");
        let took_us = (self.options.block_bytes / self.options.bytes_per_s * 1e6).ceil() as u64;
        self.link_free_us = self.link_free_us.max(now_us) + took_us;
        self.ready_us[block as usize] = self.link_free_us.max(1);
        self.loaded(block);
    }

    /// A call uses a block of the pool: when its copy is complete, where it had been prefetched.
    pub fn used(&mut self, block: u32) -> Option<u64> {
        let ready_us = std::mem::take(&mut self.ready_us[block as usize]);
        (ready_us > 0).then_some(ready_us)
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
        assert_eq!(host.used(0), Some(100_000));
        assert_eq!(host.used(1), Some(200_000));
        assert_eq!(host.used(1), None);
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
