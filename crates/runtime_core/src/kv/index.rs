//! The residency index: which blocks the engine holds, grouped into segments.
//!
//! A *segment* is a chain of blocks, each the parent of the next, that were last used by the same calls. All blocks
//! of a segment share one score, so there are far fewer segments than blocks. Children hang below the *last* block
//! of a segment only: a call that uses the first part of a segment splits it. A segment without children and pins is
//! a *leaf*; victims are the last blocks of the leaf with the lowest score, so a parent never goes before its child.
//!
//! Memory: [`Block`] 16 bytes, hash table 4 bytes at a load of at most 1/2, [`Segment`] 80 bytes for every tenth
//! block: 32 bytes per block of the pool. Single writer.

/// Marks "none" in every index of this module.
pub const NONE: u32 = u32::MAX;

/// Number of score classes of the victim queue.
pub const N_BUCKETS: usize = 256;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) key: u64,
    /// Slot of the parent block; next free slot on the free list.
    pub(crate) parent: u32,
    pub(crate) segment: u32,
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
    /// Links of the victim queue or, on the free list, the next free segment.
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
    pub(crate) flags: u8,
}

pub(crate) const NOT_QUEUED: u16 = u16::MAX;

/// Blocks, segments, recency list and victim queue.
pub(crate) struct Index {
    pub(crate) blocks: Vec<Block>,
    free_block: u32,
    pub(crate) resident: usize,
    table: Vec<u32>,
    mask: usize,
    pub(crate) segments: Vec<Segment>,
    free_segment: u32,
    pub(crate) live_segments: usize,
    heads: [u32; N_BUCKETS],
    bitmap: [u64; N_BUCKETS / 64],
    oldest: u32,
    newest: u32,
}

#[inline]
fn mix(key: u64) -> u64 {
    // Fibonacci hashing with a final fold: engine hashes are random already, replay ids are small integers.
    let x = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x ^ (x >> 32)
}

impl Index {
    pub(crate) fn new(pool_blocks: usize) -> Self {
        Self::with_segments(
            pool_blocks,
            (pool_blocks / 10).max(pool_blocks.min(1024)).max(16),
        )
    }

    pub(crate) fn with_segments(pool_blocks: usize, n_segments: usize) -> Self {
        let slots = (pool_blocks.max(8) * 2).next_power_of_two();
        let blocks = (0..pool_blocks as u32)
            .map(|i| Block {
                key: 0,
                parent: if i + 1 == pool_blocks as u32 {
                    NONE
                } else {
                    i + 1
                },
                segment: NONE,
            })
            .collect();
        let empty = Segment {
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
            flags: 0,
        };
        let segments = (0..n_segments as u32)
            .map(|i| Segment {
                queue_next: if i + 1 == n_segments as u32 {
                    NONE
                } else {
                    i + 1
                },
                ..empty
            })
            .collect();
        Self {
            blocks,
            free_block: if pool_blocks == 0 { NONE } else { 0 },
            resident: 0,
            table: vec![NONE; slots],
            mask: slots - 1,
            segments,
            free_segment: 0,
            live_segments: 0,
            heads: [NONE; N_BUCKETS],
            bitmap: [0; N_BUCKETS / 64],
            oldest: NONE,
            newest: NONE,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.blocks.len() * size_of::<Block>()
            + self.table.len() * 4
            + self.segments.len() * size_of::<Segment>()
    }

    // ---- blocks ----

    #[inline]
    pub(crate) fn find(&self, key: u64) -> u32 {
        let mut at = mix(key) as usize & self.mask;
        loop {
            let slot = self.table[at];
            if slot == NONE || self.blocks[slot as usize].key == key {
                return slot;
            }
            at = (at + 1) & self.mask;
        }
    }

    /// The slot of `key`, trying the slot after `hint` first: blocks stored together lie side by side.
    #[inline]
    pub(crate) fn find_after(&self, hint: u32, key: u64) -> u32 {
        if let Some(block) = self.blocks.get(hint.wrapping_add(1) as usize) {
            if block.key == key && block.segment != NONE {
                return hint.wrapping_add(1);
            }
        }
        self.find(key)
    }

    /// Takes a free slot for `key`; `NONE` where the index is full.
    pub(crate) fn add_block(&mut self, key: u64, parent: u32, segment: u32) -> u32 {
        let slot = self.free_block;
        if slot == NONE {
            return NONE;
        }
        self.free_block = self.blocks[slot as usize].parent;
        self.blocks[slot as usize] = Block {
            key,
            parent,
            segment,
        };
        let mut at = mix(key) as usize & self.mask;
        while self.table[at] != NONE {
            at = (at + 1) & self.mask;
        }
        self.table[at] = slot;
        self.resident += 1;
        slot
    }

    pub(crate) fn remove_block(&mut self, slot: u32) {
        let key = self.blocks[slot as usize].key;
        let mut at = mix(key) as usize & self.mask;
        while self.table[at] != slot {
            at = (at + 1) & self.mask;
        }
        // Backward-shift deletion keeps probe sequences short without tombstones.
        let mut hole = at;
        let mut next = (at + 1) & self.mask;
        while self.table[next] != NONE {
            let home = mix(self.blocks[self.table[next] as usize].key) as usize & self.mask;
            if (next.wrapping_sub(home) & self.mask) >= (next.wrapping_sub(hole) & self.mask) {
                self.table[hole] = self.table[next];
                hole = next;
            }
            next = (next + 1) & self.mask;
        }
        self.table[hole] = NONE;
        self.blocks[slot as usize] = Block {
            key: 0,
            parent: self.free_block,
            segment: NONE,
        };
        self.free_block = slot;
        self.resident -= 1;
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
            let seg = &mut self.segments[s as usize];
            *seg = Segment {
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
                flags: 0,
            };
            self.live_segments += 1;
        }
        s
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
        let parent = self.blocks[self.seg(s).top as usize].parent;
        if parent == NONE {
            NONE
        } else {
            self.blocks[parent as usize].segment
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
            self.blocks[block as usize].segment = lower;
            top = block;
            block = self.blocks[block as usize].parent;
        }
        let queued = old.bucket;
        self.dequeue(s);
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
        debug_assert!(
            self.seg(upper).children == 1
                && self.blocks[low.top as usize].parent == self.seg(upper).tail
        );
        let mut block = low.tail;
        loop {
            self.blocks[block as usize].segment = upper;
            if block == low.top {
                break;
            }
            block = self.blocks[block as usize].parent;
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
    }

    pub(crate) fn dequeue(&mut self, s: u32) {
        let Segment {
            bucket,
            queue_prev,
            queue_next,
            ..
        } = *self.seg(s);
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
        self.seg_mut(s).bucket = NOT_QUEUED;
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

    fn recency_insert_before(&mut self, s: u32, anchor: u32) {
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
    pub(crate) fn oldest_leaf(&self) -> u32 {
        let mut s = self.oldest;
        while s != NONE && self.seg(s).bucket == NOT_QUEUED {
            s = self.seg(s).newer;
        }
        s
    }
}
