//! Sessions and their lanes: whose a segment is.
//!
//! A *lane* is an agent of a session: the list of the segments that its calls used last. The *tenant* of a slot is the
//! session that has it now. Lanes come from one list of free ones; where there is none, the session's own least recent
//! one gives way, or another session's. What a lane loses that way, and what a session leaves whose slot goes to
//! another, is *nobody's*: each workload has one such lane, behind all others. Whatever happens to a session marks it:
//! its leaves are scored again, see `settle.rs`.

use super::calls::Running;
use super::chain::STEPS;
use super::followers::{Kin, KIN};
use super::index::{Segment, NONE};
use super::kin::RECENT;
use super::odds::Habit;
use super::sharing::{Curves, Owner};
use super::workload::{Workload, MAX_WORKLOADS};
use super::{KvCache, CURVES};
use crate::ids::spread;
use crate::sessions::SessionHandle;

/// Lanes of one session; the least recent gives way.
const MAX_LANES: usize = 64;

#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    /// Slot of the session; [`NONE`] on the free list and for nobody's lanes.
    pub(super) session: u32,
    pub(super) agent: u16,
    pub(super) calls: u32,
    /// First segment it owns.
    pub(super) head: u32,
    /// Next lane of the session, most recent first; next free lane.
    pub(super) next: u32,
    /// The lane before in that list, [`NONE`] for the first.
    pub(super) before: u32,
    /// Calls of its session when it called last.
    pub(super) at: u16,
    /// What that call was like, and the blocks of its prompt.
    pub(super) habit: Habit,
    pub(super) prompt_len: u32,
}

const VACANT: Lane = Lane {
    session: NONE,
    agent: 0,
    calls: 0,
    head: NONE,
    next: NONE,
    before: NONE,
    at: 0,
    habit: Habit::NEW,
    prompt_len: 0,
};

#[derive(Clone, Copy, Debug)]
pub(super) struct Tenant {
    pub(super) next_refresh_us: u64,
    /// The caller's name of the session.
    pub(super) session: u64,
    /// Its lanes: the most recent one, the least recent one, and how many there are.
    pub(super) lanes: u32,
    pub(super) last_lane: u32,
    /// Calls so far.
    pub(super) calls: u16,
    /// Sessions that walk the same path, one after the other; none where the first is none.
    pub(super) kin: [Kin; KIN],
    /// Starts of its last calls, the latest first, or of its first; `u64::MAX` before that.
    pub(super) recent_us: [u64; RECENT],
    pub(super) n_lanes: u8,
    pub(super) generation: u16,
    pub(super) workload: u16,
    pub(super) dirty: bool,
    /// In the list of sessions whose scores age.
    pub(super) active: bool,
}

impl Tenant {
    pub(super) const VACANT: Self = Self {
        next_refresh_us: u64::MAX,
        session: 0,
        lanes: NONE,
        last_lane: NONE,
        calls: 0,
        kin: [Kin::NONE; KIN],
        recent_us: [u64::MAX; RECENT],
        n_lanes: 0,
        generation: 0,
        workload: 0,
        dirty: false,
        active: false,
    };
}

impl KvCache {
    /// The tenant of a slot, made ready for the session of a handle.
    #[inline(always)]
    pub(super) fn tenant(&mut self, handle: SessionHandle, workload: u32, session: u64) -> &mut Tenant {
        if self.tenants[handle.slot()].generation != handle.generation() {
            self.new_tenant(handle, workload, session);
        }
        &mut self.tenants[handle.slot()]
    }

    /// Another session has the slot now: the old one's blocks stay, known to be nobody's.
    #[cold]
    fn new_tenant(&mut self, handle: SessionHandle, workload: u32, session: u64) {
        let slot = handle.slot();
        let mut lane = self.tenants[slot].lanes;
        while lane != NONE {
            let next = self.lanes[lane as usize].next;
            self.disown(lane);
            self.lane_forget(lane);
            self.lanes[lane as usize] = Lane { next: self.free_lane, ..VACANT };
            self.free_lane = lane;
            lane = next;
        }
        let tenant = &mut self.tenants[slot];
        (tenant.lanes, tenant.last_lane, tenant.n_lanes) = (NONE, NONE, 0);
        tenant.calls = 0;
        tenant.kin = [Kin::NONE; KIN];
        tenant.recent_us = [u64::MAX; RECENT];
        (tenant.next_refresh_us, tenant.session) = (u64::MAX, session);
        (tenant.generation, tenant.workload) = (handle.generation(), workload as u16);
        if let Some(starts) = self.starts.get_mut(slot) {
            *starts = [u64::MAX; STEPS];
        }
    }

    /// What a segment's use by other sessions depends on.
    pub(super) fn owner(&self, x: &Segment) -> Owner {
        Owner { degree: x.degree, depth: x.depth, agent: self.lanes[x.lane as usize].agent, born: x.born }
    }

    pub(super) fn curves(&self, lane: u32) -> &Curves {
        &self.curves[self.workload_of(lane) as usize % CURVES]
    }

    /// Must have been called before segments of the lane's workload are scored or taught from.
    pub(super) fn refresh_curves(&mut self, lane: u32, workload: &Workload) {
        let id = self.workload_of(lane);
        self.curves[id as usize % CURVES].refresh(id, &workload.sharing);
    }

    fn first_nobodys(&self) -> u32 {
        (self.lanes.len() - MAX_WORKLOADS) as u32
    }

    pub(super) fn is_nobodys(&self, lane: u32) -> bool {
        lane >= self.first_nobodys()
    }

    /// The workload of a lane.
    pub(super) fn workload_of(&self, lane: u32) -> u32 {
        if self.is_nobodys(lane) {
            lane - self.first_nobodys()
        } else {
            let session = self.lanes[lane as usize].session;
            self.tenants.get(session as usize).map_or(0, |tenant| u32::from(tenant.workload))
        }
    }

    /// Gives a lane's segments to nobody. Every segment is given away at most once per time it was used.
    fn disown(&mut self, lane: u32) {
        let heir = self.first_nobodys() + self.workload_of(lane);
        loop {
            let segment = self.lanes[lane as usize].head;
            if segment == NONE {
                return;
            }
            self.lane_unlink(segment);
            self.lane_link(segment, heir);
            self.queue_unscored(segment);
        }
    }

    /// The lane of `agent`, [`NONE`] where it has none.
    #[inline]
    pub(super) fn find_lane(&self, slot: u32, agent: u16) -> u32 {
        let lanes = &self.lanes;
        let of = |lane: u32| (lanes[lane as usize].session, lanes[lane as usize].agent) == (slot, agent);
        self.lane_table.find(lane_hash(slot, agent), of)
    }

    /// The lane of `agent`, moved to the front of its session's list.
    #[inline]
    pub(super) fn lane(&mut self, slot: u32, agent: u16) -> u32 {
        let lane = self.find_lane(slot, agent);
        if lane == NONE {
            return self.new_lane(slot, agent);
        }
        if self.lanes[lane as usize].before != NONE {
            self.lane_detach(lane);
            self.lane_attach(lane, slot);
        }
        lane
    }

    /// A lane for an agent that has none.
    fn new_lane(&mut self, slot: u32, agent: u16) -> u32 {
        let Tenant { last_lane, n_lanes, .. } = self.tenants[slot as usize];
        let lane = if usize::from(n_lanes) == MAX_LANES || (self.free_lane == NONE && last_lane != NONE) {
            // The session's least recent agent gives way.
            self.take_lane(last_lane);
            last_lane
        } else if self.free_lane == NONE {
            // All belong to others, in turn.
            let lane = self.lane_hand;
            self.lane_hand = (lane + 1) % self.first_nobodys();
            self.take_lane(lane);
            lane
        } else {
            let lane = self.free_lane;
            self.free_lane = self.lanes[lane as usize].next;
            lane
        };
        self.lanes[lane as usize] = Lane { session: slot, agent, ..VACANT };
        self.lost.forget(lane);
        self.lane_attach(lane, slot);
        self.lane_table.insert(lane_hash(slot, agent), lane);
        lane
    }

    /// Takes a lane from its session; its segments are nobody's.
    fn take_lane(&mut self, lane: u32) {
        self.disown(lane);
        self.lane_detach(lane);
        self.lane_forget(lane);
    }

    /// Makes a lane the first of a session's.
    fn lane_attach(&mut self, lane: u32, slot: u32) {
        let tenant = &mut self.tenants[slot as usize];
        tenant.n_lanes += 1;
        let next = std::mem::replace(&mut tenant.lanes, lane);
        if next == NONE {
            tenant.last_lane = lane;
        } else {
            self.lanes[next as usize].before = lane;
        }
        let x = &mut self.lanes[lane as usize];
        (x.next, x.before) = (next, NONE);
    }

    /// Takes a lane out of its session's list.
    fn lane_detach(&mut self, lane: u32) {
        let Lane { session, next, before, .. } = self.lanes[lane as usize];
        let tenant = &mut self.tenants[session as usize];
        tenant.n_lanes -= 1;
        if before == NONE {
            tenant.lanes = next;
        } else {
            self.lanes[before as usize].next = next;
        }
        if next == NONE {
            tenant.last_lane = before;
        } else {
            self.lanes[next as usize].before = before;
        }
    }

    /// Takes a lane out of the table.
    fn lane_forget(&mut self, lane: u32) {
        let hash = |lane: u32| lane_hash(self.lanes[lane as usize].session, self.lanes[lane as usize].agent);
        self.lane_table.remove(hash(lane), lane, hash);
    }

    /// The lane that a call in flight stores for: nobody's, once its own has been given to somebody else.
    pub(super) fn lane_of(&mut self, run: &Running) -> u32 {
        let slot = run.handle.slot();
        if self.tenants[slot].generation != run.handle.generation() {
            return self.first_nobodys() + run.workload;
        }
        let Some(x) = self.lanes.get(run.lane as usize) else {
            let lane = self.lane(slot as u32, run.agent);
            self.lanes[lane as usize].calls = self.lanes[lane as usize].calls.max(1);
            return lane;
        };
        if x.session == slot as u32 && x.agent == run.agent {
            run.lane
        } else {
            self.first_nobodys() + run.workload
        }
    }

    pub(super) fn lane_link(&mut self, segment: u32, lane: u32) {
        let head = self.lanes[lane as usize].head;
        let x = self.index.seg_mut(segment);
        x.lane = lane;
        x.lane_prev = NONE;
        x.lane_next = head;
        if head != NONE {
            self.index.seg_mut(head).lane_prev = segment;
        }
        self.lanes[lane as usize].head = segment;
    }

    pub(super) fn lane_unlink(&mut self, segment: u32) {
        let Segment { lane, lane_prev, lane_next, .. } = *self.index.seg(segment);
        if lane_prev == NONE {
            self.lanes[lane as usize].head = lane_next;
        } else {
            self.index.seg_mut(lane_prev).lane_next = lane_next;
        }
        if lane_next != NONE {
            self.index.seg_mut(lane_next).lane_prev = lane_prev;
        }
    }

    #[inline(always)]
    pub(super) fn mark(&mut self, slot: u32) {
        let tenant = &mut self.tenants[slot as usize];
        if tenant.lanes == NONE {
            return;
        }
        if !tenant.dirty {
            tenant.dirty = true;
            self.dirty.push(slot);
        }
        if !tenant.active {
            tenant.active = true;
            self.active.push(slot);
        }
    }

    /// Something about the session has changed.
    #[inline(always)]
    pub(crate) fn session_changed(&mut self, handle: SessionHandle) {
        let tenant = &self.tenants[handle.slot()];
        if tenant.generation == handle.generation() {
            // The last one marked is the first one scored.
            for kin in tenant.kin {
                if kin == Kin::NONE {
                    break;
                }
                self.mark(kin.slot);
            }
            self.mark(handle.slot() as u32);
        }
    }
}

pub(super) fn lane_hash(slot: u32, agent: u16) -> u64 {
    spread(u64::from(slot) << 16 | u64::from(agent))
}

/// `n` lanes on the free list, then nobody's.
pub(super) fn free_lanes(n: usize) -> impl Iterator<Item = Lane> {
    (0..n + MAX_WORKLOADS).map(move |i| Lane { next: if i + 1 < n { i as u32 + 1 } else { NONE }, ..VACANT })
}
