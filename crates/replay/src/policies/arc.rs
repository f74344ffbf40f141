//! `arc`: Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003; fractional target as in
//! libcachesim.
//!
//! T1 holds blocks used once, T2 those used again, both in LRU order; B1 and B2 remember what left them. A miss that is
//! remembered in B1 enlarges the target of T1, one in B2 shrinks it.
//!
//! Deviations from the flat original: the misses of one call adapt the target before its evictions begin; answers are
//! stored without the policy being asked beforehand; a block that would be evicted but cannot go - in use, or with
//! resident children - is set aside, still counted in its list, and returns to that list's LRU end as soon as it can.
//!
//! Does badly where histories are used twice soon after they were written and never again, as those of finished
//! sessions are: T2 fills with them (`hyperagent` at 10 %: 1.8 points below `lru`).

use super::queue::Queue;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::{Trace, NO_BLOCK};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Miss {
    New,
    InB1,
    InB2,
}

/// Two LRU lists, their ghosts, and a target between them.
pub struct Arc {
    capacity: usize,
    /// T1 and T2.
    lists: [Queue; 2],
    /// Blocks in T1 and T2, those set aside included.
    sizes: [usize; 2],
    /// B1 and B2.
    ghosts: [Queue; 2],
    /// Target size of T1.
    target: f64,
    /// 0 in T1, 1 in T2.
    list_of: Vec<u8>,
    /// Enters T2: it was remembered when its call started.
    promote: Vec<bool>,
    aside: Vec<bool>,
    /// The missing blocks of the call that is starting, first victim's last.
    misses: Vec<Miss>,
}

impl Arc {
    /// A policy for the blocks of `trace` in a pool of `capacity` blocks.
    pub fn new(trace: &Trace, capacity: usize) -> Self {
        let n = trace.n_blocks as usize;
        Self {
            capacity,
            lists: [Queue::new(n), Queue::new(n)],
            sizes: [0, 0],
            ghosts: [Queue::new(n), Queue::new(n)],
            target: 0.0,
            list_of: vec![0; n],
            promote: vec![false; n],
            aside: vec![false; n],
            misses: Vec::new(),
        }
    }

    /// Looks a missing block up in the ghosts and adapts the target.
    fn look_up(&mut self, block: u32) -> Miss {
        let (b1, b2) = (self.ghosts[0].len() as f64, self.ghosts[1].len() as f64);
        if self.ghosts[0].remove(block) {
            self.target = (self.target + (b2 / b1).max(1.0)).min(self.capacity as f64);
            Miss::InB1
        } else if self.ghosts[1].remove(block) {
            self.target = (self.target - (b1 / b2).max(1.0)).max(0.0);
            Miss::InB2
        } else {
            Miss::New
        }
    }

    /// Takes the LRU end of T1 or T2; false where nothing can go.
    fn replace(&mut self, prefer_t1: bool, remember: bool, pool: &mut Pool) -> bool {
        let mut list = usize::from(!prefer_t1);
        loop {
            if self.lists[list].front().is_none() {
                list = 1 - list;
            }
            let Some(block) = self.lists[list].pop_front() else { return false };
            if pool.evict(block) {
                self.sizes[list] -= 1;
                if remember {
                    self.ghosts[list].push_back(block);
                }
                self.reconsider(pool.parent(block), pool);
                return true;
            }
            self.aside[block as usize] = true;
            list = usize::from(!prefer_t1);
        }
    }

    fn reconsider(&mut self, block: u32, pool: &Pool) {
        if block != NO_BLOCK && self.aside[block as usize] && pool.is_evictable(block) {
            self.aside[block as usize] = false;
            self.lists[usize::from(self.list_of[block as usize])].push_front(block);
        }
    }

    fn enter(&mut self, block: u32, list: u8) {
        self.list_of[block as usize] = list;
        self.lists[usize::from(list)].push_back(block);
        self.sizes[usize::from(list)] += 1;
    }
}

impl CachePolicy for Arc {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        for &block in call.prompt[..call.hit].iter().rev() {
            let list = usize::from(self.list_of[block as usize]);
            self.lists[list].remove(block);
            self.aside[block as usize] = false;
            self.sizes[list] -= 1;
            self.enter(block, 1);
        }
        self.misses.clear();
        for &block in &call.prompt[call.hit..] {
            let miss = self.look_up(block);
            self.promote[block as usize] = miss != Miss::New;
            self.misses.push(miss);
        }
    }

    fn evict(&mut self, n: usize, _now_us: u64, pool: &mut Pool) {
        for _ in 0..n {
            let miss = self.misses.pop().unwrap_or(Miss::New);
            let [t1, t2] = self.sizes;
            let mut remember = true;
            if miss == Miss::New {
                let (b1, b2) = (self.ghosts[0].len(), self.ghosts[1].len());
                if t1 + b1 >= self.capacity {
                    // The paper's case IV A: B1 makes room, or, where T1 fills the cache, its LRU block is forgotten.
                    remember = self.ghosts[0].pop_front().is_some();
                } else if t1 + t2 + b1 + b2 >= 2 * self.capacity {
                    self.ghosts[1].pop_front();
                }
            }
            let prefer_t1 =
                t1 > 0 && (t1 as f64 > self.target || (t1 as f64 == self.target && miss == Miss::InB2) || !remember);
            if !self.replace(prefer_t1, remember, pool) {
                return;
            }
        }
    }

    fn inserted(&mut self, _call: &CallView<'_>, blocks: &[u32], _pool: &Pool) {
        for &block in blocks.iter().rev() {
            let remembered = std::mem::take(&mut self.promote[block as usize]) || self.look_up(block) != Miss::New;
            self.enter(block, u8::from(remembered));
        }
        self.misses.clear();
        // One access at a time the directory never exceeds these bounds; the blocks of a call arrive together.
        while self.sizes[0] + self.ghosts[0].len() > self.capacity && self.ghosts[0].pop_front().is_some() {}
        while self.sizes[0] + self.sizes[1] + self.ghosts[0].len() + self.ghosts[1].len() > 2 * self.capacity
            && self.ghosts[1].pop_front().is_some()
        {}
    }

    fn call_finish(&mut self, _call: &CallView<'_>, _output: &[u32], released: &[u32], pool: &Pool) {
        for &block in released {
            self.reconsider(block, pool);
        }
    }
}
