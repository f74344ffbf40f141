//! A call uses what of its prompt is there: promises kept and broken are counted, and the path becomes its lane's.
//!
//! Everything that a use teaches is taught here: content (`content.rs` and `odds.rs`, and of what was evicted `lost.rs`), sharing
//! (`sharing.rs`), kin (`kin.rs`, `followers.rs`), and offers (`offers.rs`).

use super::content::{CLASSES, MISSES};
use super::followers::{Kin, COMMON, KIN};
use super::index::{Segment, NONE};
use super::lanes::{Lane, Tenant};
use super::offers::NO_KIND;
use super::segments::ordinal;
use super::workload::Workload;
use super::{content, odds, sharing, Hint, KvCache};

impl KvCache {
    /// Counts promises kept and broken, and makes the path the lane's. False where a segment could not be split.
    #[expect(clippy::too_many_arguments, reason = "a struct for one caller would say no more")]
    pub(super) fn touch(
        &mut self,
        workload: &Workload,
        lane: u32,
        slot: u32,
        now_us: u64,
        in_step_us: u64,
        keys: &[u64],
        hints: &[Hint],
    ) -> bool {
        let prompt_len = keys.len() as u32;
        let Lane { agent, calls, at: called_at, habit, prompt_len: last_len, .. } = self.lanes[lane as usize];
        let Tenant { kin, calls: step, .. } = self.tenants[slot as usize];
        // Calls of others since the lane's last one.
        let since = step.wrapping_sub(called_at).saturating_sub(1);
        let later = since > 0;
        let rate = |misses, class| workload.content.rate_now(agent, misses, later, class, &self.config);
        // One vote per (misses, class) cell: all blocks of the lane, used or not, evicted or not.
        let mut expected = [[0u32; CLASSES]; MISSES];
        let mut used = [[0u32; CLASSES]; MISSES];
        let mut compared = odds::Votes::new(&workload.odds, habit, since, last_len);
        let misses = |touch_call: u32| calls.wrapping_sub(touch_call);
        let row = |misses: u32| (misses as usize).min(MISSES - 1);
        let mut segment = self.lanes[lane as usize].head;
        while segment != NONE {
            let x = self.index.seg(segment);
            let misses = misses(x.touch_call);
            expected[row(misses)][x.class as usize] += x.len;
            compared.expect(misses, x.depth, x.degree, rate(misses, x.class), x.len);
            segment = x.lane_next;
        }
        for piece in self.lost.of(lane) {
            let (misses, class, n) = (misses(piece.touch_call), piece.class as usize, piece.used(keys));
            expected[row(misses)][class] += piece.len;
            used[row(misses)][class] += n;
            compared.expect(misses, piece.depth, 1, rate(misses, piece.class), piece.len);
            compared.used(misses, piece.depth, 1, n);
        }
        self.lost.forget(lane);
        let mut votes = [None; KIN];
        if kin[0] != Kin::NONE {
            votes = kin.map(|kin| self.expected_of(kin, agent, calls + 1));
        }
        let mut leads = [NONE; KIN];
        let (mut at, mut previous, mut whole) = (0, NONE, true);
        while at < self.path.len() {
            let segment = self.index.segment_of(self.path[at]);
            let old = *self.index.seg(segment);
            let mut n = (self.path.len() - at).min(old.len as usize);
            if !hints.is_empty() {
                n = hints[at..at + n].iter().take_while(|&h| *h == hints[at]).count();
                self.hints[segment as usize] = hints[at];
            }
            let Lane { session: holder, agent: holders_agent, .. } = self.lanes[old.lane as usize];
            if old.lane == lane {
                let misses = misses(old.touch_call);
                used[row(misses)][old.class as usize] += n as u32;
                compared.used(misses, old.depth, old.degree, n as u32);
            }
            if holder != slot {
                // What kin use in step with the owner is foreseen by that.
                let mut foreseen = false;
                if holder != NONE {
                    let votes = kin.iter().zip(&mut votes).find(|(kin, _)| kin.slot == holder);
                    if let Some((_, Some(votes))) = votes {
                        if holders_agent == agent {
                            foreseen = old.last_use_us >= in_step_us;
                            votes.used(old.degree > 1, old.ordinal, n as u32);
                        }
                    }
                    if at * 3 >= prompt_len as usize && old.degree < COMMON && !leads.contains(&holder) {
                        leads.rotate_right(1);
                        leads[0] = holder;
                    }
                }
                // Uses by the holder's session are no end of what is observed: they say nothing of others.
                let (curves, owner, had_s) = (self.curves(old.lane), self.owner(&old), old.had_s(now_us));
                workload.sharing.learn(curves, owner, had_s, n as u32, !foreseen);
            }
            if n < old.len as usize {
                let lower = self.split(segment, self.path[at + n - 1], n as u32);
                if lower == NONE {
                    // The call uses only a part of what now counts as used; nothing may be hung into the middle.
                    whole = at + n != self.path.len();
                } else if !hints.is_empty() {
                    self.hints[lower as usize] = hints.get(at + n).copied().unwrap_or(Hint::NONE);
                }
            }
            if old.lane != lane {
                self.lane_unlink(segment);
                self.lane_link(segment, lane);
                self.index.seg_mut(segment).ordinal = ordinal(calls.saturating_add(1));
            }
            self.offers.resolved(old.restored, n, true);
            let x = self.index.seg_mut(segment);
            x.restored = NO_KIND;
            if self.ticket != 0 && x.awaited.0 == self.ticket {
                x.awaited.0 = if x.awaited.1 == self.ticket { 0 } else { x.awaited.1 };
            }
            x.touch_call = calls + 1;
            x.last_use_us = now_us;
            if holder == slot {
                x.touches = x.touches.saturating_add(1);
                x.class = content::used_class(x.touches);
            } else {
                x.touches = 1;
                (x.born, x.born_at) = (step.min(255) as u8, Segment::moment(now_us));
                x.degree = x.degree.saturating_add(1);
                x.class = content::first_class(prompt_len - (at + n) as u32);
            }
            at += n;
            if previous != NONE && self.indistinct(previous, segment) {
                self.lane_unlink(segment);
                self.index.join(previous, segment);
            } else {
                previous = segment;
            }
        }
        self.follow(workload, slot, &votes, leads);
        workload.odds.learn(&compared, now_us);
        if let Some(kept) = compared.kept() {
            self.lanes[lane as usize].habit = habit.next(kept, calls > 0 && !later);
        }
        for (misses, (expected, used)) in expected.iter().zip(&used).enumerate() {
            for (class, (&n, &m)) in expected.iter().zip(used).enumerate() {
                if n > 0 {
                    workload.content.vote(agent, later, misses, class, n, m);
                }
            }
        }
        whole
    }

    /// Nothing tells a segment from the only one below it any more. Both were just used by the same call.
    fn indistinct(&self, upper: u32, lower: u32) -> bool {
        let (up, low) = (self.index.seg(upper), self.index.seg(lower));
        up.children == 1
            && up.pins == 0
            && (self.hints.is_empty() || self.hints[upper as usize] == self.hints[lower as usize])
            && (self.index.segments_are_scarce()
                || (up.class == low.class
                    && up.touches.min(5) == low.touches.min(5)
                    && sharing::class(up.degree, up.depth) == sharing::class(low.degree, low.depth)))
    }
}
