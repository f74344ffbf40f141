//! Segments found, pinned, cut, extended and taken apart, on behalf of calls. What they are is in `index.rs`; whose
//! they are, in `lanes.rs`. Here both are kept in step: a segment is in one lane's list, and in the victim queue where
//! it has become a leaf.

use super::index::{self, Segment, NONE, NOT_QUEUED};
use super::offers::NO_KIND;
use super::workload::Workload;
use super::{content, Hint, KvCache};

/// Longest resident prefix that is looked at, in blocks.
pub(super) const MAX_PATH: usize = 1 << 16;
/// Score class of a leaf that has not been scored yet: it goes last.
const UNSCORED: u16 = (index::CLASSES - 1) as u16;
/// Blocks whose hash-table entries are read together when a leaf is taken apart.
pub(super) const LOOK_AHEAD: usize = 16;

/// Where new blocks come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A prompt of so many blocks.
    Prompt(u32),
    /// A decoded answer.
    Output,
    /// A lower tier, on an offer of this kind: the session has used them before.
    Restored(u8),
}

impl Origin {
    fn class(self, position: u32) -> u8 {
        match self {
            Self::Prompt(len) => content::first_class(len.saturating_sub(position + 1)),
            Self::Output => content::OUTPUT,
            Self::Restored(_) => content::used_class(2),
        }
    }
}

impl KvCache {
    /// The resident prefix of a prompt.
    pub(super) fn find_path(&mut self, keys: &[u64]) {
        self.path.clear();
        let (mut hint, mut parent) = (NONE, NONE);
        for &key in keys.iter().take(self.pool_blocks.min(MAX_PATH)) {
            let at = self.index.find_after(hint, key);
            if at == NONE || self.index.parent(at) != parent {
                break;
            }
            self.path.push(at);
            (hint, parent) = (at, at);
        }
    }

    /// Pins the segment of a block; returns its last block. Splits and joins keep pins with that.
    pub(super) fn pin(&mut self, block: u32) -> u32 {
        let segment = self.index.segment_of(block);
        self.index.dequeue(segment);
        let x = self.index.seg_mut(segment);
        x.pins += 1;
        x.tail
    }

    pub(super) fn unpin(&mut self, tail: u32) {
        let segment = self.index.segment_of(tail);
        let x = self.index.seg_mut(segment);
        x.pins -= 1;
        self.queue_unscored(segment);
    }

    /// A segment may have become a leaf. It is queued last and its session is marked for scoring; or, if it is
    /// nobody's, queued first: it is scored before it goes.
    pub(super) fn queue_unscored(&mut self, segment: u32) {
        let x = *self.index.seg(segment);
        if x.children == 0 && x.pins == 0 {
            self.index.dequeue(segment);
            if self.is_nobodys(x.lane) {
                self.index.enqueue(segment, 0);
            } else {
                self.index.enqueue(segment, UNSCORED);
                self.mark(self.lanes[x.lane as usize].session);
            }
        }
    }

    /// Cuts a segment; the lower part stays with its owner. [`NONE`] where no segment can be had.
    pub(super) fn split(&mut self, segment: u32, upper_tail: u32, upper_len: u32) -> u32 {
        if !self.have_segment(segment) {
            return NONE;
        }
        let lower = self.index.split(segment, upper_tail, upper_len);
        let lane = self.index.seg(segment).lane;
        self.lane_link(lower, lane);
        lower
    }

    /// Frees a segment if none is free, by dropping the lowest leaf (never `keep`, if any) from the index.
    fn have_segment(&mut self, keep: u32) -> bool {
        if self.index.has_free_segment() {
            return true;
        }
        let bucket = if keep == NONE { NOT_QUEUED } else { self.index.seg(keep).bucket };
        if bucket != NOT_QUEUED {
            self.index.dequeue(keep);
        }
        let leaf = self.index.lowest();
        if bucket != NOT_QUEUED {
            self.index.enqueue(keep, bucket);
        }
        if leaf == NONE {
            return false;
        }
        let len = self.index.seg(leaf).len as usize;
        self.repairs.forgotten_blocks += len as u64;
        let (exposed, _) = self.take_from(leaf, len, &mut |_| {});
        if exposed != NONE {
            self.queue_unscored(exposed);
        }
        true
    }

    /// Hangs new blocks below `tail`. False where not all found room.
    #[expect(clippy::too_many_arguments, reason = "a struct for one caller would say no more")]
    pub(super) fn append(
        &mut self,
        workload: &Workload,
        lane: u32,
        now_us: u64,
        keys: &[u64],
        hints: &[Hint],
        origin: Origin,
        tail: &mut u32,
        len: &mut u32,
    ) -> bool {
        let (mut anchor_len, mut anchor_degree) = (0, 0);
        if self.config.anchors && origin != Origin::Output {
            for (i, &key) in keys.iter().enumerate() {
                let degree = workload.sharing.recall(key);
                if degree > 0 {
                    (anchor_len, anchor_degree) = (i + 1, degree);
                }
            }
        }
        let scarce = self.index.segments_are_scarce();
        let mut segment = NONE;
        let mut class_now = 0;
        self.index.look_for(keys);
        for (i, &key) in keys.iter().enumerate() {
            // A key that hangs elsewhere is no hash of this prefix.
            if self.index.is_full() || self.index.find(key) != NONE {
                self.repairs.untracked_blocks += (keys.len() - i) as u64;
                return false;
            }
            let class = origin.class(*len);
            let boundary = segment == NONE
                || i == anchor_len
                || (class != class_now && !scarce)
                || (!hints.is_empty() && hints[i] != hints[i - 1]);
            let above = if *tail == NONE { NONE } else { self.index.segment_of(*tail) };
            let fresh = if boundary && self.have_segment(NONE) { self.index.new_segment() } else { NONE };
            if fresh == NONE && segment == NONE {
                self.repairs.untracked_blocks += (keys.len() - i) as u64;
                return false;
            }
            if fresh != NONE {
                let touch_call = self.lanes[lane as usize].calls;
                let born = match self.lanes[lane as usize].session {
                    NONE => 0,
                    slot => self.tenants[slot as usize].calls.min(255) as u8,
                };
                let x = self.index.seg_mut(fresh);
                x.class = class;
                (x.touches, x.restored) = match origin {
                    Origin::Restored(kind) => (2, kind),
                    Origin::Prompt(_) | Origin::Output => (1, NO_KIND),
                };
                x.degree = if i < anchor_len { anchor_degree.saturating_add(1) } else { 1 };
                x.depth = *len;
                (x.born, x.born_at) = (born, Segment::moment(now_us));
                x.ordinal = ordinal(touch_call.saturating_add((!matches!(origin, Origin::Prompt(_))).into()));
                x.touch_call = touch_call;
                x.last_use_us = now_us;
                if let Some(&hint) = hints.get(i) {
                    self.hints[fresh as usize] = hint;
                }
                self.lane_link(fresh, lane);
                self.index.recency_push(fresh);
                if above != NONE {
                    self.index.dequeue(above);
                    self.index.seg_mut(above).children += 1;
                }
                (segment, class_now) = (fresh, class);
            }
            let slot = self.index.add_block(key, *tail, segment);
            let x = self.index.seg_mut(segment);
            if x.len == 0 {
                x.top = slot;
            }
            x.tail = slot;
            x.len += 1;
            *tail = slot;
            *len += 1;
        }
        true
    }

    /// Takes the last `n` blocks of a leaf; returns the segment above if that has become a leaf, not yet queued.
    pub(super) fn take_from(&mut self, segment: u32, n: usize, victim: &mut dyn FnMut(u64)) -> (u32, u64) {
        let x = *self.index.seg(segment);
        let (mut block, mut key) = (x.tail, 0);
        for i in 0..n {
            if i % LOOK_AHEAD == 0 {
                self.index.look_ahead(block, LOOK_AHEAD.min(n - i));
            }
            key = self.index.key(block);
            victim(key);
            let parent = self.index.parent(block);
            self.index.remove_block(block);
            block = parent;
        }
        if n < x.len as usize {
            let left = self.index.seg_mut(segment);
            left.tail = block;
            left.len -= n as u32;
            return (NONE, key);
        }
        self.index.dequeue(segment);
        self.lane_unlink(segment);
        self.index.recency_remove(segment);
        self.index.free_segment(segment);
        if block == NONE {
            return (NONE, key);
        }
        let above = self.index.segment_of(block);
        let y = self.index.seg_mut(above);
        y.children -= 1;
        if y.children == 0 && y.pins == 0 {
            (above, key)
        } else {
            (NONE, key)
        }
    }
}

/// Number of a lane's call as segments keep it.
pub(super) fn ordinal(call: u32) -> u8 {
    call.min(u8::MAX.into()) as u8
}
