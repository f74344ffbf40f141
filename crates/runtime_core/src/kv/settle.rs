//! Which leaves are scored again, and when.
//!
//! Scores are worked out before they are needed: at the end of an event, or once in an engine's step and before its
//! evictions, those of sessions that events have marked, and of some whose silence has grown by a fifth. Each is
//! bounded by a constant below, so that no event and no step pays for many.

use super::index::{NONE, NOT_QUEUED};
use super::segments::LOOK_AHEAD;
use super::workload::{standing, Sessions, Workloads};
use super::KvCache;

/// Sessions visited per event in search of stale scores.
pub(super) const VISITS: usize = 64;
/// Of these, scored again at most.
const REFRESHES: usize = 4;
/// Leaves and blocks that are next to go for which it is prepared, and scorings per event for that.
const PREPARED_LEAVES: usize = 48;
const PREPARED_BLOCKS: usize = 512;
const PREPARED: usize = 16;
/// Sessions scored per event, or per step, because something happened to them: the latest; others have a later turn.
const MAX_DIRTY: usize = 64;

impl KvCache {
    /// Scores what events have changed and what silence has aged, once there is pressure: until the first eviction nothing
    /// is worth scoring. Called at the end of events, so that an eviction finds everything in its queue.
    pub(crate) fn settle(&mut self, workloads: &Workloads, sessions: &Sessions) {
        if !self.pressed {
            return;
        }
        self.refresh_dirty(workloads, sessions, false);
        self.age(workloads, sessions, REFRESHES, false);
        self.prepare(workloads, sessions);
    }

    /// Leaves the scores that the events before would have changed to the next eviction and to [`Self::settle_step`].
    pub(crate) fn postpone(&mut self) {
        self.postponed = true;
    }

    /// As [`Self::settle`], once at the end of an engine's step. Begins before there is pressure: at the first eviction
    /// sessions in arrears would go before older ones.
    pub(crate) fn settle_step(&mut self, workloads: &Workloads, sessions: &Sessions, now_us: u64) {
        if !self.pressed && self.index.resident * 2 < self.pool_blocks {
            return;
        }
        self.clock(now_us);
        self.settle_latest(workloads, sessions);
    }

    /// What an eviction within a step needs: sessions that changed last have their leaves in the queue, and silence has aged
    /// those of others. (One session aged a step, and none here, cost 1 to 3 points of hits in vLLM with 16 sessions. So did
    /// scoring the latest eight only, 1 point: a call marks its session's kin as well, and a leaf without a score goes last.)
    pub(super) fn settle_latest(&mut self, workloads: &Workloads, sessions: &Sessions) {
        self.postponed = false;
        self.refresh_dirty(workloads, sessions, true);
        self.age(workloads, sessions, REFRESHES, true);
    }

    fn refresh_dirty(&mut self, workloads: &Workloads, sessions: &Sessions, lazily: bool) {
        for _ in 0..MAX_DIRTY {
            let Some(slot) = self.dirty.pop() else { break };
            self.tenants[slot as usize].dirty = false;
            self.refresh(workloads, sessions, slot, lazily);
        }
    }

    /// Scores all leaves of a session, and counts its end if it has been silent for long. False where nothing of it is
    /// left to score or to count.
    ///
    /// `lazily`: what is expected of it is not looked at where no leaf is to be scored, as while its call runs.
    fn refresh(&mut self, workloads: &Workloads, sessions: &Sessions, slot: u32, lazily: bool) -> bool {
        let tenant = self.tenants[slot as usize];
        let Some(workload) = workloads.get(tenant.workload as usize) else { return false };
        let (mut idle_us, mut left) = (4_000, false);
        if let Some(handle) = sessions.at(slot as usize).filter(|h| h.generation() == tenant.generation) {
            if let Some(at) = standing(sessions, handle) {
                let since = if at.in_flight { at.last_start_us } else { at.last_finish_us };
                idle_us = self.now_us.saturating_sub(since).max(idle_us);
                left = !at.doubted && !at.over;
                if !at.in_flight && left && idle_us as f32 / 1e6 > workload.gaps.long_silence_s() {
                    workload.session_ended(sessions, handle, &at);
                }
            }
        }
        self.view.slot = NONE;
        let mut look = !lazily;
        let mut lane = tenant.lanes;
        while lane != NONE {
            let mut segment = self.lanes[lane as usize].head;
            left |= segment != NONE;
            while segment != NONE {
                let x = self.index.seg(segment);
                let next = x.lane_next;
                if x.bucket == NOT_QUEUED {
                    self.index.publish_score(segment, 0.0);
                    self.index.seg_mut(segment).set_own_score(None);
                } else {
                    look = true;
                }
                segment = next;
            }
            lane = self.lanes[lane as usize].next;
        }
        self.tenants[slot as usize].next_refresh_us = self.now_us.saturating_add(idle_us / 5);
        if !look {
            return left;
        }
        self.look(workload, sessions, slot);
        // Only now: a leaf of one agent raises what it hangs from, which may be another's.
        let mut lane = tenant.lanes;
        while lane != NONE {
            let mut segment = self.lanes[lane as usize].head;
            while segment != NONE {
                let x = self.index.seg(segment);
                let next = x.lane_next;
                if x.bucket != NOT_QUEUED {
                    self.score_leaf(segment, workload);
                }
                segment = next;
            }
            lane = self.lanes[lane as usize].next;
        }
        left
    }

    /// Scores what the next victims hang from, as far as they will leave it without children and it will go soon itself:
    /// an eviction then finds it scored.
    fn prepare(&mut self, workloads: &Workloads, sessions: &Sessions) {
        let mut leaves = [NONE; PREPARED_LEAVES];
        let n = self.index.lowest_leaves(PREPARED_BLOCKS, &mut leaves);
        let Some(&last) = leaves[..n].last() else { return };
        let (soon, mut scored) = (self.index.published_score(last), 0);
        for &leaf in &leaves[..n] {
            let mut segment = self.index.parent_segment(leaf);
            while segment != NONE {
                let x = self.index.seg(segment);
                let lane = x.lane;
                if x.children > 1 || x.pins > 0 || self.is_nobodys(lane) {
                    break;
                }
                let own_score = if let Some(score) = x.own_score() {
                    score
                } else {
                    let Some(workload) = workloads.get(self.workload_of(lane) as usize) else { break };
                    if scored == PREPARED {
                        return;
                    }
                    scored += 1;
                    self.look(workload, sessions, self.lanes[lane as usize].session);
                    self.refresh_curves(lane, workload);
                    let score = self.score(segment, self.index.seg(segment), workload, self.horizon_s());
                    self.index.seg_mut(segment).set_own_score(Some(score));
                    score
                };
                if own_score > soon {
                    break;
                }
                segment = self.index.parent_segment(segment);
            }
        }
    }

    /// Scores sessions again whose silence has grown by a fifth: visits some, round robin.
    fn age(&mut self, workloads: &Workloads, sessions: &Sessions, most: usize, lazily: bool) {
        self.look_ahead(sessions);
        let mut refreshed = 0;
        for _ in 0..VISITS.min(self.active.len()) {
            if self.hand >= self.active.len() {
                self.hand = 0;
            }
            let Some(&slot) = self.active.get(self.hand) else { return };
            self.hand += 1;
            if self.tenants[slot as usize].next_refresh_us > self.now_us {
                continue;
            }
            if !self.refresh(workloads, sessions, slot, lazily) {
                self.hand -= 1;
                self.active.swap_remove(self.hand);
                self.tenants[slot as usize].active = false;
            }
            refreshed += 1;
            if refreshed == most {
                return;
            }
        }
    }

    /// Reads what the next sessions to be scored again are: where that of one leads from place to place, those of several
    /// are read at once.
    fn look_ahead(&self, sessions: &Sessions) {
        let (mut segments, mut n, mut sum) = ([NONE; REFRESHES], 0, 0u32);
        for at in self.hand..self.active.len().min(self.hand + VISITS) {
            let slot = self.active[at];
            let tenant = &self.tenants[slot as usize];
            if tenant.next_refresh_us > self.now_us {
                continue;
            }
            if let Some(lane) = self.lanes.get(tenant.lanes as usize) {
                segments[n] = lane.head;
            }
            if let Some(handle) = sessions.at(slot as usize) {
                sum ^= u32::from(sessions.in_flight(handle));
            }
            n += 1;
            if n == REFRESHES {
                break;
            }
        }
        for _ in 0..LOOK_AHEAD {
            for segment in &mut segments {
                if *segment == NONE {
                    continue;
                }
                let x = self.index.seg(*segment);
                if x.bucket != NOT_QUEUED && self.index.parent(x.top) != NONE {
                    sum ^= self.index.segment_of(self.index.parent(x.top));
                }
                *segment = x.lane_next;
            }
        }
        std::hint::black_box(sum);
    }
}
