//! What comes back from a lower tier: which sessions are expected to call and for whom there is room, and what happens
//! to blocks that are back. Whether that pays is learned in `offers.rs`.

use super::density::{self, Foreign, GRID};
use super::index::NONE;
use super::offers::NO_KIND;
use super::segments::Origin;
use super::settle::VISITS;
use super::workload::{Sessions, Workload, Workloads};
use super::{content, KvCache};
use crate::sessions::SessionHandle;

/// Leaves visited to find what a block must be worth to stay for a while; and how many times that blocks must promise
/// to be brought back.
const FLOOR_LEAVES: usize = 256;
const ABOVE_FLOOR: f32 = 1.4;
/// Calls that wait for which blocks are brought back: those behind have the time until it is their turn.
const NEXT_IN_LINE: usize = 2;

/// A session that is expected to call an agent soon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expected {
    /// The caller's name of the session.
    pub session: u64,
    /// The workload.
    pub workload: u32,
    /// The agent.
    pub agent: u16,
    /// The call has arrived and waits: what is wanted is its prompt. Else the agent's last prompt, as it will probably come
    /// again.
    pub waits: bool,
    /// P(the session's next call is made, and by this agent).
    pub probability: f32,
    /// Hits per second that holding one block of that prompt promises.
    pub score: f32,
    /// Blocks that can be brought back without displacing what is worth more.
    pub room: u32,
}

impl Expected {
    /// Nobody; to fill arrays with.
    pub const NOBODY: Self =
        Self { session: 0, workload: 0, agent: 0, waits: false, probability: 0.0, score: 0.0, room: 0 };
}

impl KvCache {
    /// Fills `out` with sessions that are likelier than `least` to call an agent next and whose blocks would be worth
    /// more than what would have to go for them, best first. Visits some sessions, round robin.
    pub(crate) fn expected(
        &mut self,
        workloads: &Workloads,
        sessions: &Sessions,
        now_us: u64,
        least: f32,
        out: &mut [Expected],
    ) -> usize {
        self.clock(now_us);
        if !self.guard.trusts() {
            return 0;
        }
        if !self.queue.is_empty() {
            // Who calls now will wait as well: time enough to bring its blocks back.
            return self.awaited(out);
        }
        self.offers.ask();
        // Not only more than the next victims: enough to still be there when the call comes.
        let mut leaves = [NONE; FLOOR_LEAVES];
        let n = self.index.lowest_leaves(self.pool_blocks / 4, &mut leaves);
        let floor = leaves[..n].last().map_or(0.0, |&leaf| self.index.published_score(leaf));
        let below: usize = leaves[..n].iter().map(|&leaf| self.index.seg(leaf).len as usize).sum();
        let room = self.pool_blocks.saturating_sub(self.index.resident) + below;
        let mut filled = 0;
        for _ in 0..VISITS.min(self.active.len()) {
            self.expected_hand = if self.expected_hand + 1 < self.active.len() { self.expected_hand + 1 } else { 0 };
            let slot = self.active[self.expected_hand];
            let tenant = self.tenants[slot as usize];
            let Some(workload) = workloads.get(tenant.workload as usize) else { continue };
            self.offers.look(slot, tenant.generation);
            self.look(workload, sessions, slot);
            for i in 0..self.view.n {
                let first = self.view.weights[i].0[0];
                let probability = first[0] * self.view.times[0][GRID - 1];
                if probability < least || filled == out.len() {
                    continue;
                }
                let agent = self.lanes[self.view.lanes[i] as usize].agent;
                let rate = workload.content.rates(agent, 0, content::used_class(2), &self.config).later;
                let private = Foreign::At(f32::INFINITY);
                let score =
                    density::score(&self.view.times, &first.map(|p| p * rate), &private, std::iter::empty(), None);
                self.offers.found((slot, tenant.generation, agent), probability, score);
                if score > ABOVE_FLOOR * floor {
                    let (session, workload) = (tenant.session, u32::from(tenant.workload));
                    let (waits, room) = (false, room as u32);
                    out[filled] = Expected { session, workload, agent, waits, probability, score, room };
                    filled += 1;
                }
            }
        }
        out[..filled].sort_unstable_by(|a, b| b.score.total_cmp(&a.score));
        filled
    }

    /// Fills `out` with the calls that wait and are next in line, as far as there is room beside what is worth more.
    fn awaited(&mut self, out: &mut [Expected]) -> usize {
        let mut leaves = [NONE; FLOOR_LEAVES];
        let wanted = (0..NEXT_IN_LINE).filter_map(|place| self.queue.at(place)).map(|waiting| waiting.blocks as usize);
        let n = self.index.lowest_leaves(wanted.sum(), &mut leaves);
        let mut leaves = leaves[..n].iter().peekable();
        let mut room = self.pool_blocks.saturating_sub(self.index.resident);
        let mut filled = 0;
        for place in 0..NEXT_IN_LINE.min(out.len()) {
            let Some(waiting) = self.queue.at(place) else { break };
            let score = self.queue.wait_s(waiting.ticket).map_or(0.0, f32::recip);
            while let Some(&leaf) = leaves.next_if(|&&leaf| self.index.published_score(leaf) < score) {
                room += self.index.seg(leaf).len as usize;
            }
            if room == 0 {
                break;
            }
            let tenant = self.tenants[waiting.handle.slot()];
            out[filled] = Expected {
                session: tenant.session,
                workload: u32::from(tenant.workload),
                agent: waiting.agent,
                waits: true,
                probability: 1.0,
                score,
                room: room as u32,
            };
            filled += 1;
            // It will need that before those behind it.
            room = room.saturating_sub(waiting.missing as usize);
            self.queue.offer(place);
        }
        filled
    }

    /// Whether to bring back what is missing of `keys`, the chain of an agent that was named by [`Self::expected`].
    pub(crate) fn worth_restoring(&mut self, handle: SessionHandle, agent: u16, keys: &[u64]) -> bool {
        if self.queue.offered(handle, agent).is_some() {
            return true;
        }
        self.find_path(keys);
        self.offers.offered((handle.slot() as u32, handle.generation(), agent), keys, self.path.len())
    }

    /// Blocks of the agent's last prompt were brought back from a lower tier: `keys` is the chain from the root, of
    /// which the pool now holds all.
    pub(crate) fn restored(
        &mut self,
        workload: &Workload,
        handle: SessionHandle,
        agent: u16,
        now_us: u64,
        keys: &[u64],
    ) {
        let now_us = self.clock(now_us);
        if self.tenants[handle.slot()].generation != handle.generation() {
            self.repairs.untracked_blocks += keys.len() as u64;
            return;
        }
        let lane = self.lane(handle.slot() as u32, agent);
        let (mut tail, mut len) = (NONE, 0);
        for &key in keys {
            let slot = self.index.find_after(tail, key);
            if slot == NONE || self.index.parent(slot) != tail {
                break;
            }
            (tail, len) = (slot, len + 1);
        }
        if tail != NONE {
            let segment = self.index.segment_of(tail);
            let x = *self.index.seg(segment);
            if x.tail != tail && self.split(segment, tail, len - x.depth) == NONE {
                self.repairs.untracked_blocks += keys.len() as u64 - u64::from(len);
                return;
            }
            self.pin(tail);
        }
        let (above, from) = (tail, len as usize);
        let (mut kind, mut ticket) = (self.offers.kind((handle.slot() as u32, handle.generation(), agent)), 0);
        if let Some(waiting) = self.queue.offered(handle, agent) {
            waiting.missing = waiting.blocks.saturating_sub(keys.len() as u32);
            (kind, ticket) = (NO_KIND, waiting.ticket);
        }
        self.append(workload, lane, now_us, &keys[from..], &[], Origin::Restored(kind), &mut tail, &mut len);
        let mut at = tail;
        while ticket != 0 && at != above {
            let segment = self.index.segment_of(at);
            self.index.seg_mut(segment).awaited = (ticket, ticket);
            at = self.index.parent(self.index.seg(segment).top);
        }
        if above != NONE {
            self.unpin(above);
        }
        if tail != above {
            self.queue_unscored(self.index.segment_of(tail));
        }
        self.mark(handle.slot() as u32);
    }
}
