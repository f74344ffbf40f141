//! The residency index: which blocks the engine holds, grouped into segments.
//!
//! A *segment* is a chain of blocks, each the parent of the next, that were last used by the same calls. All blocks
//! of a segment share one score, so there are far fewer segments than blocks. Children hang below the *last* block
//! of a segment only: a call that uses the first part of a segment splits it. A segment without children and pins is
//! a *leaf*; victims are the last blocks of the leaf with the lowest score, so a parent never goes before its child.
//!
//! One writer. Any thread may look a block up meanwhile through [`Published`]: it finds the block's segment and that
//! segment's published score, or nothing while the writer is moving the entry.
//!
//! | part | bytes per pool block |
//! |---|---|
//! | key and segment ([`PublishedEntry`]) | 16 |
//! | parent | 4 |
//! | hash table, load 3/4 | 5.3 |
//! | segments and their scores, one for every thirteen blocks | 6.5 |
//! | together | 31.8, plus at most 180 kB for small pools |

use std::sync::Arc;

use super::tagged::{Tagged, ANY};
use crate::ids::mix;
use crate::protocol::PublishedEntry;
use crate::sync::{AtomicU32, Ordering::Relaxed};

/// Marks "none" in every index of this module.
pub(crate) const NONE: u32 = u32::MAX;

/// Score classes of the victim queue.
pub(crate) const CLASSES: usize = 256;

/// Bytes of the victim queue's heads.
pub(crate) const QUEUE_BYTES: usize = CLASSES * 4 + CLASSES / 8;

/// The part of the index that any thread may read.
#[derive(Debug)]
pub(crate) struct Published {
    /// Block slots by hash.
    table: Tagged<ANY>,
    /// Key and segment of each slot.
    entries: Box<[PublishedEntry]>,
    /// Score of each segment, `f32` bits.
    scores: Box<[AtomicU32]>,
}

impl Published {
    #[inline]
    fn home(&self, key: u64) -> usize {
        ((u128::from(mix(key)) * self.table.len() as u128) >> 64) as usize
    }

    /// The published score of a block: `None` where it is not resident, or is being moved this moment. Wait-free.
    pub(crate) fn score(&self, key: u64) -> Option<f32> {
        let key = nonzero(key);
        let segment = self.table.find_meanwhile(self.home(key), |slot| self.entries[slot as usize].get(key))?;
        let bits = self.scores.get(segment as usize)?.load(Relaxed);
        Some(f32::from_bits(bits))
    }
}

/// Key 0 marks a vacant entry; a block of that hash shares the entry of hash 1.
#[inline]
pub(crate) fn nonzero(key: u64) -> u64 {
    key.max(1)
}

/// Attributes and links of a run of blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// Microseconds of the last use (end of the last call that used it).
    pub(crate) last_use_us: u64,
    /// First and last block.
    pub(crate) top: u32,
    pub(crate) tail: u32,
    pub(crate) len: u32,
    /// Depth of the first block.
    pub(crate) depth: u32,
    /// Owner: the lane of the last call that used it. Links of the lane's list.
    pub(crate) lane: u32,
    pub(crate) lane_prev: u32,
    pub(crate) lane_next: u32,
    /// Links of the victim queue. Out of the queue: the bits of [`Segment::own_score`]; on the free list, the next free
    /// segment.
    pub(crate) queue_prev: u32,
    pub(crate) queue_next: u32,
    /// Links of the recency list.
    pub(crate) older: u32,
    pub(crate) newer: u32,
    /// Number of the lane's call that last used it.
    pub(crate) touch_call: u32,
    pub(crate) children: u32,
    pub(crate) pins: u16,
    /// Victim queue the segment is in, [`NOT_QUEUED`] where it is no leaf.
    pub(crate) bucket: u16,
    /// Content class, see `content.rs`.
    pub(crate) class: u8,
    /// Times that the owner's session has used it, saturating.
    pub(crate) touches: u8,
    /// Sessions that have used it, saturating.
    pub(crate) degree: u8,
    /// Step class of the session's call that first used it.
    pub(crate) born: u8,
    /// When that was, see [`Segment::had_s`].
    pub(crate) born_at: u32,
    /// Number of the lane's call that first used it since it has been in the pool, saturating; of an answer, and of what
    /// was brought back, of the lane's next call.
    pub(crate) ordinal: u8,
    /// Brought back from a lower tier and not used since: the kind of offer, see `offers.rs`; else 0.
    pub(crate) restored: u8,
    /// Tickets of the first and the last waiting call that will use it, 0 for none; see `queue.rs`.
    pub(crate) awaited: (u16, u16),
}

pub(crate) const NOT_QUEUED: u16 = u16::MAX;

// `NONE` says in the place of a score that there is none.
const _: () = assert!(f32::from_bits(NONE).is_nan());

impl Segment {
    /// The score that a segment which is no leaf would have as one, where that was worked out in advance.
    pub(crate) fn own_score(&self) -> Option<f32> {
        let score = f32::from_bits(self.queue_prev);
        (self.bucket == NOT_QUEUED && !score.is_nan()).then_some(score)
    }

    /// Keeps or forgets it; of a segment that is no leaf.
    pub(crate) fn set_own_score(&mut self, score: Option<f32>) {
        debug_assert!(self.bucket == NOT_QUEUED);
        self.queue_prev = score.map_or(NONE, f32::to_bits);
    }

    /// A time as it is kept in `born_at`: in 2^13 us, modulo 407 days.
    pub(crate) const fn moment(now_us: u64) -> u32 {
        (now_us >> 13) as u32
    }

    /// Seconds for which its session has had it.
    pub(crate) fn had_s(&self, now_us: u64) -> f32 {
        let had = Self::moment(now_us).wrapping_sub(self.born_at) as i32;
        had.max(0) as f32 * (8_192.0 / 1e6)
    }

    const EMPTY: Self = Self {
        last_use_us: 0,
        top: NONE,
        tail: NONE,
        len: 0,
        depth: 0,
        lane: NONE,
        lane_prev: NONE,
        lane_next: NONE,
        queue_prev: NONE,
        queue_next: NONE,
        older: NONE,
        newer: NONE,
        touch_call: 0,
        children: 0,
        pins: 0,
        bucket: NOT_QUEUED,
        class: 0,
        touches: 0,
        degree: 0,
        born: 0,
        born_at: 0,
        ordinal: 0,
        restored: 0,
        awaited: (0, 0),
    };
}

/// Blocks, segments, recency list and victim queue.
#[derive(Debug)]
pub(crate) struct Index {
    pub(crate) published: Arc<Published>,
    /// Slot of the parent block; next free slot on the free list.
    pub(super) parents: Vec<u32>,
    pub(super) free_block: u32,
    pub(crate) resident: usize,
    pub(super) segments: Vec<Segment>,
    pub(super) free_segment: u32,
    live_segments: usize,
    pub(super) heads: [u32; CLASSES],
    pub(super) bitmap: [u64; CLASSES / 64],
    pub(super) oldest: u32,
    pub(super) newest: u32,
}

impl Index {
    /// Segments that an index for `blocks` pool blocks has.
    pub(crate) fn segments_for(blocks: usize) -> usize {
        (blocks / 13).max(blocks.min(2048)).max(16)
    }

    /// An index with room for `segments` segments.
    pub(crate) fn with_segments(blocks: usize, segments: usize) -> Self {
        let list = |n: usize| (0..n as u32).map(move |i| if i as usize + 1 == n { NONE } else { i + 1 });
        Self {
            published: Arc::new(Published {
                table: Tagged::new((blocks + blocks / 3).max(16), blocks),
                entries: (0..blocks).map(|_| PublishedEntry::default()).collect(),
                scores: (0..segments).map(|_| AtomicU32::new(0)).collect(),
            }),
            parents: list(blocks).collect(),
            free_block: if blocks == 0 { NONE } else { 0 },
            resident: 0,
            segments: list(segments).map(|next| Segment { queue_next: next, ..Segment::EMPTY }).collect(),
            free_segment: 0,
            live_segments: 0,
            heads: [NONE; CLASSES],
            bitmap: [0; CLASSES / 64],
            oldest: NONE,
            newest: NONE,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.parents.len() * (4 + size_of::<PublishedEntry>())
            + self.published.table.bytes()
            + self.segments.len() * (size_of::<Segment>() + 4)
    }

    pub(crate) fn n_segments(&self) -> usize {
        self.segments.len()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        let published = Arc::clone(&self.published);
        for entry in &published.entries {
            entry.retract();
        }
        published.table.clear();
        let (blocks, segments) = (self.parents.len(), self.segments.len());
        let list = |n: usize| (0..n as u32).map(move |i| if i as usize + 1 == n { NONE } else { i + 1 });
        for (parent, next) in self.parents.iter_mut().zip(list(blocks)) {
            *parent = next;
        }
        for (segment, next) in self.segments.iter_mut().zip(list(segments)) {
            *segment = Segment { queue_next: next, ..Segment::EMPTY };
        }
        self.free_block = if blocks == 0 { NONE } else { 0 };
        self.free_segment = 0;
        self.live_segments = 0;
        self.resident = 0;
        self.heads = [NONE; CLASSES];
        self.bitmap = [0; CLASSES / 64];
        (self.oldest, self.newest) = (NONE, NONE);
    }

    /// Entries of the hash table in use.
    pub(super) fn audit_table(&self) -> usize {
        self.published.table.audit()
    }

    // ---- blocks ----

    pub(crate) fn is_full(&self) -> bool {
        self.free_block == NONE
    }

    #[inline]
    pub(crate) fn key(&self, slot: u32) -> u64 {
        self.published.entries[slot as usize].key()
    }

    #[inline]
    pub(crate) fn parent(&self, slot: u32) -> u32 {
        self.parents[slot as usize]
    }

    #[inline]
    pub(crate) fn segment_of(&self, slot: u32) -> u32 {
        self.published.entries[slot as usize].value()
    }

    #[inline]
    pub(crate) fn find(&self, key: u64) -> u32 {
        let key = nonzero(key);
        let published = &*self.published;
        published.table.find(published.home(key), |slot| self.key(slot) == key)
    }

    /// The slot of `key`, trying the slot after `hint` first: blocks stored together lie side by side.
    #[inline]
    pub(crate) fn find_after(&self, hint: u32, key: u64) -> u32 {
        let next = hint.wrapping_add(1);
        if let Some(entry) = self.published.entries.get(next as usize) {
            if entry.key() == nonzero(key) {
                return next;
            }
        }
        self.find(key)
    }

    /// Takes a free slot for `key`, which must not be resident; the index must not be full.
    pub(crate) fn add_block(&mut self, key: u64, parent: u32, segment: u32) -> u32 {
        let key = nonzero(key);
        let slot = self.free_block;
        debug_assert!(slot != NONE);
        self.free_block = self.parents[slot as usize];
        self.parents[slot as usize] = parent;
        self.published.entries[slot as usize].publish(key, segment);
        self.published.table.insert(self.published.home(key), slot);
        self.resident += 1;
        slot
    }

    /// Reads the hash-table entries of `keys`, as [`Self::look_ahead`] does, and the keys of the blocks that are at home
    /// there.
    pub(crate) fn look_for(&self, keys: &[u64]) {
        let published = &*self.published;
        let sum = keys.iter().fold(0, |sum, &key| {
            let (at_home, entry) = published.table.at_home(published.home(nonzero(key)));
            sum ^ at_home.map_or(u64::from(entry), |slot| self.key(slot))
        });
        std::hint::black_box(sum);
    }

    /// Reads the hash-table entries of `n` blocks from `slot` upwards: independent loads overlap where the removals that
    /// follow would wait for one after the other.
    pub(crate) fn look_ahead(&self, slot: u32, n: usize) {
        let (mut slot, mut sum) = (slot, 0u32);
        for _ in 0..n {
            if slot == NONE {
                break;
            }
            sum ^= self.published.table.at_home(self.published.home(self.key(slot))).1;
            slot = self.parent(slot);
        }
        std::hint::black_box(sum);
    }

    pub(crate) fn remove_block(&mut self, slot: u32) {
        let published = &*self.published;
        published.table.remove(published.home(self.key(slot)), slot, |other| published.home(self.key(other)));
        published.entries[slot as usize].retract();
        self.parents[slot as usize] = self.free_block;
        self.free_block = slot;
        self.resident -= 1;
    }

    #[inline]
    pub(crate) fn publish_score(&self, segment: u32, score: f32) {
        self.published.scores[segment as usize].store(score.to_bits(), Relaxed);
    }

    #[inline]
    pub(crate) fn published_score(&self, segment: u32) -> f32 {
        f32::from_bits(self.published.scores[segment as usize].load(Relaxed))
    }

    // ---- segments ----

    #[inline]
    pub(crate) fn seg(&self, s: u32) -> &Segment {
        &self.segments[s as usize]
    }

    #[inline]
    pub(crate) fn seg_mut(&mut self, s: u32) -> &mut Segment {
        &mut self.segments[s as usize]
    }

    /// Takes a free segment, linked nowhere; `NONE` where there is none.
    pub(crate) fn new_segment(&mut self) -> u32 {
        let s = self.free_segment;
        if s != NONE {
            self.free_segment = self.segments[s as usize].queue_next;
            self.live_segments += 1;
            self.segments[s as usize] = Segment::EMPTY;
            self.publish_score(s, 0.0);
        }
        s
    }

    /// Less than a fifth of the segments is free: time to tell fewer apart.
    pub(crate) fn segments_are_scarce(&self) -> bool {
        self.live_segments * 5 > self.segments.len() * 4
    }

    pub(crate) fn has_free_segment(&self) -> bool {
        self.free_segment != NONE
    }

    /// Returns a segment that is in no list any more.
    pub(crate) fn free_segment(&mut self, s: u32) {
        self.segments[s as usize].len = 0;
        self.segments[s as usize].queue_next = self.free_segment;
        self.free_segment = s;
        self.live_segments -= 1;
    }

    /// The segment above, `NONE` at the root.
    pub(crate) fn parent_segment(&self, s: u32) -> u32 {
        let parent = self.parent(self.seg(s).top);
        if parent == NONE {
            NONE
        } else {
            self.segment_of(parent)
        }
    }

    /// Cuts a segment after `upper_len` blocks, the last of which is `upper_tail`.
    ///
    /// The upper part keeps the id; the lower part gets a new one with the same attributes, the pins and the
    /// children. Returns the lower part, `NONE` where no segment is free.
    pub(crate) fn split(&mut self, s: u32, upper_tail: u32, upper_len: u32) -> u32 {
        let lower = self.new_segment();
        if lower == NONE {
            return NONE;
        }
        let old = *self.seg(s);
        debug_assert!(upper_len > 0 && upper_len < old.len);
        let mut block = old.tail;
        let mut top = block;
        while block != upper_tail {
            self.published.entries[block as usize].set_value(lower);
            top = block;
            block = self.parent(block);
        }
        let queued = old.bucket;
        self.dequeue(s);
        self.publish_score(lower, self.published_score(s));
        {
            let part = self.seg_mut(lower);
            *part = Segment {
                top,
                len: old.len - upper_len,
                depth: old.depth + upper_len,
                lane_prev: NONE,
                lane_next: NONE,
                queue_prev: NONE,
                queue_next: NONE,
                older: NONE,
                newer: NONE,
                bucket: NOT_QUEUED,
                ..old
            };
        }
        {
            let part = self.seg_mut(s);
            part.tail = upper_tail;
            part.len = upper_len;
            part.children = 1;
            part.pins = 0;
        }
        if queued != NOT_QUEUED {
            self.enqueue(lower, queued);
        }
        self.recency_insert_before(lower, s);
        lower
    }

    /// Appends the only child of `upper` to it: both become one segment with the attributes of `upper`.
    pub(crate) fn join(&mut self, upper: u32, lower: u32) {
        let low = *self.seg(lower);
        debug_assert!(self.seg(upper).children == 1 && self.parent(low.top) == self.seg(upper).tail);
        let mut block = low.tail;
        loop {
            self.published.entries[block as usize].set_value(upper);
            if block == low.top {
                break;
            }
            block = self.parent(block);
        }
        let up = self.seg_mut(upper);
        up.tail = low.tail;
        up.len += low.len;
        up.children = low.children;
        up.pins = low.pins;
        self.dequeue(lower);
        self.recency_remove(lower);
        self.free_segment(lower);
    }

    // ---- victim queue: one circular list per score class ----

    pub(crate) fn enqueue(&mut self, s: u32, bucket: u16) {
        debug_assert!(self.seg(s).bucket == NOT_QUEUED);
        let b = bucket as usize;
        let head = self.heads[b];
        if head == NONE {
            self.heads[b] = s;
            self.bitmap[b / 64] |= 1 << (b % 64);
            let seg = self.seg_mut(s);
            seg.queue_prev = s;
            seg.queue_next = s;
        } else {
            let tail = self.seg(head).queue_prev;
            self.seg_mut(tail).queue_next = s;
            self.seg_mut(head).queue_prev = s;
            let seg = self.seg_mut(s);
            seg.queue_prev = tail;
            seg.queue_next = head;
        }
        self.seg_mut(s).bucket = bucket;
        if self.is_aside(s) {
            self.recency_push_oldest(s);
        }
    }

    pub(crate) fn dequeue(&mut self, s: u32) {
        let Segment { bucket, queue_prev, queue_next, .. } = *self.seg(s);
        if bucket == NOT_QUEUED {
            return;
        }
        let b = bucket as usize;
        if queue_next == s {
            self.heads[b] = NONE;
            self.bitmap[b / 64] &= !(1 << (b % 64));
        } else {
            self.seg_mut(queue_prev).queue_next = queue_next;
            self.seg_mut(queue_next).queue_prev = queue_prev;
            if self.heads[b] == s {
                self.heads[b] = queue_next;
            }
        }
        let seg = self.seg_mut(s);
        seg.bucket = NOT_QUEUED;
        seg.set_own_score(None);
    }

    /// The leaf to evict from next: the first of the lowest score class.
    pub(crate) fn lowest(&self) -> u32 {
        for (word, &bits) in self.bitmap.iter().enumerate() {
            if bits != 0 {
                return self.heads[word * 64 + bits.trailing_zeros() as usize];
            }
        }
        NONE
    }

    /// Fills `out` with leaves, lowest first, until they have `blocks` blocks; returns how many they are.
    pub(crate) fn lowest_leaves(&self, blocks: usize, out: &mut [u32]) -> usize {
        let (mut seen, mut n) = (0, 0);
        for (word, &bits) in self.bitmap.iter().enumerate() {
            let mut bits = bits;
            while bits != 0 {
                let head = self.heads[word * 64 + bits.trailing_zeros() as usize];
                bits &= bits - 1;
                let mut s = head;
                loop {
                    if n == out.len() {
                        return n;
                    }
                    let x = self.seg(s);
                    out[n] = s;
                    n += 1;
                    seen += x.len as usize;
                    if seen >= blocks {
                        return n;
                    }
                    s = x.queue_next;
                    if s == head {
                        break;
                    }
                }
            }
        }
        n
    }

    // ---- recency list ----

    pub(crate) fn recency_push(&mut self, s: u32) {
        let newest = self.newest;
        let seg = self.seg_mut(s);
        seg.older = newest;
        seg.newer = NONE;
        if newest == NONE {
            self.oldest = s;
        } else {
            self.seg_mut(newest).newer = s;
        }
        self.newest = s;
    }

    /// Not in the list: see [`Self::oldest_leaf`].
    #[inline]
    pub(super) fn is_aside(&self, s: u32) -> bool {
        self.seg(s).older == s
    }

    fn set_aside(&mut self, s: u32) {
        self.recency_remove(s);
        self.seg_mut(s).older = s;
    }

    fn recency_push_oldest(&mut self, s: u32) {
        let oldest = self.oldest;
        let seg = self.seg_mut(s);
        (seg.older, seg.newer) = (NONE, oldest);
        if oldest == NONE {
            self.newest = s;
        } else {
            self.seg_mut(oldest).older = s;
        }
        self.oldest = s;
    }

    fn recency_insert_before(&mut self, s: u32, anchor: u32) {
        if self.is_aside(anchor) {
            return self.recency_push_oldest(s);
        }
        // `s` becomes the older neighbour of `anchor`.
        let older = self.seg(anchor).older;
        {
            let seg = self.seg_mut(s);
            seg.older = older;
            seg.newer = anchor;
        }
        self.seg_mut(anchor).older = s;
        if older == NONE {
            self.oldest = s;
        } else {
            self.seg_mut(older).newer = s;
        }
    }

    pub(crate) fn recency_remove(&mut self, s: u32) {
        if self.is_aside(s) {
            return;
        }
        let Segment { older, newer, .. } = *self.seg(s);
        if older == NONE {
            self.oldest = newer;
        } else {
            self.seg_mut(older).newer = newer;
        }
        if newer == NONE {
            self.newest = older;
        } else {
            self.seg_mut(newer).older = older;
        }
    }

    /// The least recently used leaf.
    ///
    /// What is older and no leaf, because a call in flight needs it, is set aside until it is used again or becomes a leaf,
    /// the oldest then: it is passed over once, not by every search.
    pub(crate) fn oldest_leaf(&mut self) -> u32 {
        while self.oldest != NONE && self.seg(self.oldest).bucket == NOT_QUEUED {
            self.set_aside(self.oldest);
        }
        self.oldest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_has_had_a_segment_for_no_negative_time_also_where_the_clock_that_keeps_it_turns() {
        let had_s = |born_us: u64, now_us: u64| {
            let x = Segment { born_at: Segment::moment(born_us), ..Segment::EMPTY };
            x.had_s(now_us)
        };
        assert!((had_s(5_000_000, 7_000_000) - 2.0).abs() < 0.01);
        assert_eq!((had_s(5_000_000, 5_000_000), had_s(5_000_000, 1_000_000)), (0.0, 0.0));
        let turn_us = 1 << 45;
        assert!((had_s(turn_us - 1_000_000, turn_us + 1_000_000) - 2.0).abs() < 0.02);
    }
}
