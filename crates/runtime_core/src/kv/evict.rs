//! What goes: the last blocks of the leaf that is worth least, or, while LRU has taken over, of the one that was used
//! longest ago; and what that teaches.

use super::index::{NONE, NOT_QUEUED};
use super::lost::Piece;
use super::workload::{Sessions, Workloads};
use super::KvCache;

impl KvCache {
    /// Takes the `n` least valuable blocks out of the index, lowest first; returns how many there were.
    pub(crate) fn evict(
        &mut self,
        workloads: &Workloads,
        sessions: &Sessions,
        n: usize,
        now_us: u64,
        mut victim: impl FnMut(u64),
    ) -> usize {
        if !self.guard.trusts() {
            return self.evict_oldest(workloads, sessions, n, now_us, victim);
        }
        self.guard.pressed(self.index.resident);
        self.clock(now_us);
        self.view.slot = NONE;
        if !self.pressed {
            self.pressed = true;
            if !self.postponed {
                self.settle(workloads, sessions);
            }
        }
        if self.postponed {
            self.settle_latest(workloads, sessions);
        }
        let mut done = 0;
        while done < n {
            let segment = self.index.lowest();
            if segment == NONE {
                break;
            }
            let x = *self.index.seg(segment);
            if self.is_nobodys(x.lane) {
                if let Some(workload) = workloads.get(self.workload_of(x.lane) as usize) {
                    self.score_leaf(segment, workload);
                    if self.index.seg(segment).bucket > x.bucket {
                        continue;
                    }
                }
            }
            done += self.evict_from(workloads, sessions, segment, n - done, &mut victim);
        }
        self.evicted(done);
        done
    }

    /// As [`Self::evict`], in the order of last use: what an engine without prediction does.
    pub(crate) fn evict_oldest(
        &mut self,
        workloads: &Workloads,
        sessions: &Sessions,
        n: usize,
        now_us: u64,
        mut victim: impl FnMut(u64),
    ) -> usize {
        self.guard.pressed(self.index.resident);
        self.clock(now_us);
        let mut done = 0;
        while done < n {
            let segment = self.index.oldest_leaf();
            if segment == NONE {
                break;
            }
            done += self.evict_from(workloads, sessions, segment, n - done, &mut victim);
        }
        self.evicted(done);
        done
    }

    /// Takes the block `key` out of the index if nothing needs it: it is resident, no call in flight uses it, no block
    /// hangs below it.
    pub(crate) fn evict_block(&mut self, workloads: &Workloads, sessions: &Sessions, key: u64, now_us: u64) -> bool {
        self.clock(now_us);
        let slot = self.index.find(key);
        if slot == NONE {
            return false;
        }
        let segment = self.index.segment_of(slot);
        let x = self.index.seg(segment);
        if x.tail != slot || x.bucket == NOT_QUEUED {
            return false;
        }
        let done = self.evict_from(workloads, sessions, segment, 1, &mut |_| {});
        self.evicted(done);
        done == 1
    }

    /// Takes at most `most` blocks off a leaf, deepest first, and learns from it.
    fn evict_from(
        &mut self,
        workloads: &Workloads,
        sessions: &Sessions,
        segment: u32,
        most: usize,
        victim: &mut dyn FnMut(u64),
    ) -> usize {
        let x = *self.index.seg(segment);
        let take = most.min(x.len as usize);
        if let Some(workload) = workloads.get(self.workload_of(x.lane) as usize) {
            self.refresh_curves(x.lane, workload);
            workload.sharing.learn(self.curves(x.lane), self.owner(&x), x.had_s(self.now_us), take as u32, false);
            if x.degree > 1 {
                workload.sharing.remember(self.index.key(x.tail), x.degree);
            }
        }
        self.offers.resolved(x.restored, take, false);
        self.offers.went(self.index.published_score(segment));
        let last = self.index.key(x.tail);
        let (exposed, first) = self.take_from(segment, take, victim);
        if self.config.lost && !self.is_nobodys(x.lane) {
            let (len, depth) = (take as u32, x.depth + x.len - take as u32);
            self.lost.add(x.lane, Piece { first, last, depth, len, touch_call: x.touch_call, class: x.class });
        }
        if exposed != NONE {
            self.score_exposed(workloads, sessions, exposed);
        }
        take
    }

    /// Learns the pace of evictions.
    fn evicted(&mut self, done: usize) {
        if done > 0 {
            let interval = self.now_us.saturating_sub(self.last_eviction_us) as f32 / 1e6 / done as f32;
            self.eviction_interval_s += 0.02 * (interval - self.eviction_interval_s);
            self.last_eviction_us = self.now_us;
        }
    }

    /// For how long a block stays on average, as the pace of evictions has it.
    pub(super) fn residence_s(&self) -> f32 {
        self.eviction_interval_s * self.pool_blocks as f32
    }
}
