//! `s3fifo`: Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023; variant and parameters of
//! libcachesim's `S3FIFO`.
//!
//! New blocks enter a small FIFO queue (10 % of the pool; while the pool fills, those that find it full enter the main
//! queue). Used at least twice there, a block moves to the main queue, else it goes and is remembered in a ghost queue
//! (90 % of the pool); a block that is remembered enters the main queue at once. The main queue spares a block once
//! per use, three times at most.
//!
//! Deviation from the flat original: a block that would be evicted but cannot go - in use, or with resident children -
//! is set aside, still counted in its queue, and returns to that queue's head as soon as it can go.
//!
//! Does badly where a session's history is written once and read for many turns: it is demoted before its second use
//! whenever more sessions are live than the small queue holds (`whowhen_magentic` at 25 %: 28 points below `lru`).

use super::queue::Queue;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::{Trace, NO_BLOCK};

const SMALL_FRACTION: f64 = 0.1;
const GHOST_FRACTION: f64 = 0.9;
const USES_TO_MAIN: u32 = 2;
const MOST_USES: u32 = 3;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Small = 0,
    Main = 1,
}

/// A small and a main FIFO queue and a ghost.
pub struct S3Fifo {
    queues: [Queue; 2],
    /// Blocks in each queue, those set aside included.
    sizes: [usize; 2],
    ghost: Queue,
    small_limit: usize,
    main_limit: usize,
    ghost_limit: usize,
    place: Vec<Place>,
    uses: Vec<u32>,
    aside: Vec<bool>,
    /// Enters the main queue: it was remembered when its call started.
    promote: Vec<bool>,
    has_evicted: bool,
}

impl S3Fifo {
    /// A policy for the blocks of `trace` in a pool of `capacity` blocks.
    pub fn new(trace: &Trace, capacity: usize) -> Self {
        let n = trace.n_blocks as usize;
        let small_limit = (capacity as f64 * SMALL_FRACTION) as usize;
        Self {
            queues: [Queue::new(n), Queue::new(n)],
            sizes: [0, 0],
            ghost: Queue::new(n),
            small_limit,
            main_limit: capacity - small_limit,
            ghost_limit: (capacity as f64 * GHOST_FRACTION) as usize,
            place: vec![Place::Small; n],
            uses: vec![0; n],
            aside: vec![false; n],
            promote: vec![false; n],
            has_evicted: false,
        }
    }

    fn enter(&mut self, block: u32, place: Place) {
        self.place[block as usize] = place;
        self.uses[block as usize] = 0;
        self.queues[place as usize].push_back(block);
        self.sizes[place as usize] += 1;
    }

    fn remember(&mut self, block: u32) {
        if self.ghost_limit == 0 {
            return;
        }
        if self.ghost.len() == self.ghost_limit {
            self.ghost.pop_front();
        }
        self.ghost.push_back(block);
    }

    fn reconsider(&mut self, block: u32, pool: &Pool) {
        if block != NO_BLOCK && self.aside[block as usize] && pool.is_evictable(block) {
            self.aside[block as usize] = false;
            self.queues[self.place[block as usize] as usize].push_front(block);
        }
    }
}

impl CachePolicy for S3Fifo {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        for &block in &call.prompt[..call.hit] {
            self.uses[block as usize] += 1;
        }
        // Before the evictions, which may push a block out of the ghost queue.
        for &block in &call.prompt[call.hit..] {
            self.promote[block as usize] = self.ghost.remove(block);
        }
    }

    fn evict(&mut self, n: usize, _now_us: u64, pool: &mut Pool) {
        let mut left = n;
        self.has_evicted = true;
        // The queue is chosen once for each victim: blocks that move from small to main meanwhile do not change it.
        let mut chosen = None;
        while left > 0 {
            let main_first = self.sizes[Place::Main as usize] > self.main_limit;
            let preferred = chosen.unwrap_or(if main_first { Place::Main } else { Place::Small });
            let place = match (self.queues[0].front(), self.queues[1].front()) {
                (None, None) => return,
                (None, Some(_)) => Place::Main,
                (Some(_), None) => Place::Small,
                (Some(_), Some(_)) => preferred,
            };
            chosen = Some(place);
            let block = self.queues[place as usize].pop_front().expect("has a front");
            let uses = self.uses[block as usize];
            if place == Place::Small && uses >= USES_TO_MAIN {
                self.sizes[Place::Small as usize] -= 1;
                self.enter(block, Place::Main);
            } else if place == Place::Main && uses > 0 {
                self.uses[block as usize] = uses.min(MOST_USES) - 1;
                self.queues[Place::Main as usize].push_back(block);
            } else if pool.evict(block) {
                left -= 1;
                chosen = None;
                self.sizes[place as usize] -= 1;
                if place == Place::Small {
                    self.remember(block);
                }
                self.reconsider(pool.parent(block), pool);
            } else {
                self.aside[block as usize] = true;
            }
        }
    }

    fn inserted(&mut self, _call: &CallView<'_>, blocks: &[u32], _pool: &Pool) {
        for &block in blocks.iter().rev() {
            let filling = !self.has_evicted && self.sizes[Place::Small as usize] >= self.small_limit;
            let remembered = std::mem::take(&mut self.promote[block as usize]) || self.ghost.remove(block);
            let place = if remembered || filling { Place::Main } else { Place::Small };
            self.enter(block, place);
        }
    }

    fn call_finish(&mut self, _call: &CallView<'_>, _output: &[u32], released: &[u32], pool: &Pool) {
        for &block in released {
            self.reconsider(block, pool);
        }
    }
}
