//! Is the pool consistent? For tests: walks everything, in time linear in the pool, and says what it found.

use std::collections::{HashMap, HashSet};

use super::index::{Index, CLASSES, NONE, NOT_QUEUED};
use super::KvCache;

/// One resident block, as the index has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Resident {
    /// Its key.
    pub key: u64,
    /// Key of the block above, 0 at the root.
    pub parent: u64,
    /// Blocks above it.
    pub depth: u32,
    /// Whether a call in flight holds its segment.
    pub pinned: bool,
    /// Its published score.
    pub score: f32,
}

fn chain(first: u32, limit: usize, next: impl Fn(u32) -> u32, what: &str) -> Vec<u32> {
    let (mut at, mut all) = (first, Vec::new());
    while at != NONE {
        all.push(at);
        assert!(all.len() <= limit, "the list of {what} is a ring");
        at = next(at);
    }
    all
}

fn once(all: &[u32], what: &str) -> HashSet<u32> {
    let set: HashSet<u32> = all.iter().copied().collect();
    assert_eq!(set.len(), all.len(), "{what} are listed twice");
    set
}

impl Index {
    /// Segments in use.
    fn audit_segments(&self) -> Vec<u32> {
        let n = self.segments.len();
        let mut used = chain(self.oldest, n, |s| self.seg(s).newer, "segments by recency");
        let mut backwards = chain(self.newest, n, |s| self.seg(s).older, "segments by recency, backwards");
        backwards.reverse();
        assert_eq!(used, backwards, "recency links disagree");
        let free = chain(self.free_segment, n, |s| self.seg(s).queue_next, "free segments");
        let unused = once(&free, "free segments");
        used.extend((0..n as u32).filter(|s| self.is_aside(*s) && !unused.contains(s)));
        assert!(once(&used, "segments").is_disjoint(&unused), "a free segment is in use");
        assert_eq!(used.len() + free.len(), n, "a segment is lost");
        used
    }

    fn audit_blocks(&self, used: &[u32]) -> HashMap<u32, u32> {
        let n = self.parents.len();
        let free = once(&chain(self.free_block, n, |b| self.parent(b), "free blocks"), "free blocks");
        let mut depth_of = HashMap::new();
        for &s in used {
            let x = self.seg(s);
            assert!(x.len > 0, "segment {s} is empty");
            let mut block = x.tail;
            for i in (0..x.len).rev() {
                assert_eq!(self.segment_of(block), s, "block {block} of segment {s} says otherwise");
                assert!(!free.contains(&block), "free block {block} is in segment {s}");
                assert!(depth_of.insert(block, x.depth + i).is_none(), "block {block} is in two segments");
                assert_eq!(self.find(self.key(block)), block, "block {block} is not found by its key");
                if i == 0 {
                    assert_eq!(x.top, block, "segment {s} starts elsewhere");
                } else {
                    block = self.parent(block);
                }
            }
        }
        assert_eq!(depth_of.len(), self.resident, "blocks resident");
        assert_eq!(depth_of.len() + free.len(), n, "a block is lost");
        assert_eq!(self.audit_table(), self.resident, "entries of the hash table");
        depth_of
    }

    fn audit_links(&self, used: &[u32], depth_of: &HashMap<u32, u32>) {
        let mut children: HashMap<u32, u32> = HashMap::new();
        for &s in used {
            let x = self.seg(s);
            let parent = self.parent(x.top);
            let expected = if parent == NONE { 0 } else { depth_of[&parent] + 1 };
            assert_eq!(x.depth, expected, "depth of segment {s}");
            if parent != NONE {
                let above = self.segment_of(parent);
                assert_eq!(self.seg(above).tail, parent, "segment {s} hangs in the middle of {above}");
                *children.entry(above).or_default() += 1;
            }
        }
        for &s in used {
            assert_eq!(self.seg(s).children, children.get(&s).copied().unwrap_or(0), "children of segment {s}");
        }
    }

    fn audit_queue(&self, used: &[u32]) {
        let mut queued = HashSet::new();
        for b in 0..CLASSES {
            let head = self.heads[b];
            assert_eq!(self.bitmap[b / 64] >> (b % 64) & 1 == 1, head != NONE, "bit of class {b}");
            let mut s = head;
            while s != NONE {
                assert_eq!(self.seg(s).bucket as usize, b, "class of segment {s}");
                assert!(queued.insert(s), "segment {s} is queued twice");
                let next = self.seg(s).queue_next;
                assert_eq!(self.seg(next).queue_prev, s, "queue links disagree");
                s = if next == head { NONE } else { next };
            }
        }
        for &s in used {
            let x = self.seg(s);
            let leaf = x.children == 0 && x.pins == 0;
            assert_eq!(queued.remove(&s), leaf, "segment {s} in the queue: {x:?}");
            assert_eq!(x.bucket != NOT_QUEUED, leaf, "class of segment {s}");
        }
        assert!(queued.is_empty(), "segments not in use are queued");
    }
}

impl KvCache {
    /// Checks every link, list and count; returns all resident blocks.
    ///
    /// # Panics
    /// Where something is inconsistent.
    pub(crate) fn audit(&self) -> Vec<Resident> {
        let used = self.index.audit_segments();
        let depth_of = self.index.audit_blocks(&used);
        self.index.audit_links(&used, &depth_of);
        self.index.audit_queue(&used);
        self.audit_pins(&used);
        self.audit_lanes(&used);
        self.audit_sessions();
        let resident = |(&block, &depth): (&u32, &u32)| {
            let (segment, parent) = (self.index.segment_of(block), self.index.parent(block));
            Resident {
                key: self.index.key(block),
                parent: if parent == NONE { 0 } else { self.index.key(parent) },
                depth,
                pinned: self.index.seg(segment).pins > 0,
                score: self.index.published_score(segment),
            }
        };
        depth_of.iter().map(resident).collect()
    }

    fn audit_pins(&self, used: &[u32]) {
        let mut pins: HashMap<u32, u16> = HashMap::new();
        for run in self.running.iter().filter(|run| run.tail != NONE) {
            let segment = self.index.segment_of(run.tail);
            assert_eq!(self.index.seg(segment).tail, run.tail, "call {} holds the middle of a segment", run.call);
            *pins.entry(segment).or_default() += 1;
        }
        for &s in used {
            assert_eq!(self.index.seg(s).pins, pins.get(&s).copied().unwrap_or(0), "pins of segment {s}");
        }
    }

    fn audit_lanes(&self, used: &[u32]) {
        let mut owned = HashSet::new();
        for lane in 0..self.lanes.len() as u32 {
            let mut before = NONE;
            for s in chain(self.lanes[lane as usize].head, used.len(), |s| self.index.seg(s).lane_next, "a lane") {
                assert!(owned.insert(s), "segment {s} has two owners");
                assert_eq!(self.index.seg(s).lane, lane, "owner of segment {s}");
                assert_eq!(self.index.seg(s).lane_prev, before, "links of lane {lane} disagree");
                before = s;
            }
        }
        assert_eq!(owned, used.iter().copied().collect(), "segments with owners");
        let free = chain(self.free_lane, self.lanes.len(), |l| self.lanes[l as usize].next, "free lanes");
        let mut known = once(&free, "free lanes");
        for lane in free {
            let x = self.lanes[lane as usize];
            assert!(x.session == NONE && x.head == NONE, "free lane {lane} has an owner or segments: {x:?}");
        }
        for (slot, tenant) in self.tenants.iter().enumerate() {
            let mut before = NONE;
            let lanes = chain(tenant.lanes, self.lanes.len(), |l| self.lanes[l as usize].next, "lanes");
            assert_eq!(lanes.len(), usize::from(tenant.n_lanes), "lanes of session {slot}");
            for lane in lanes {
                let x = self.lanes[lane as usize];
                assert_eq!((x.session, x.before), (slot as u32, before), "session and links of lane {lane}");
                let found = self.lane_table.find(super::lanes::lane_hash(x.session, x.agent), |other| other == lane);
                assert_eq!(found, lane, "lane {lane} is not in the table");
                before = lane;
                assert!(known.insert(lane), "lane {lane} is in two lists");
            }
            assert_eq!(tenant.last_lane, before, "last lane of session {slot}");
        }
        for (lane, x) in self.lanes.iter().enumerate() {
            assert_eq!(known.contains(&(lane as u32)), !self.is_nobodys(lane as u32), "lane {lane} is lost: {x:?}");
        }
    }

    fn audit_sessions(&self) {
        for (list, flag, what) in [
            (&self.dirty, self.tenants.iter().map(|t| t.dirty).collect::<Vec<_>>(), "dirty"),
            (&self.active, self.tenants.iter().map(|t| t.active).collect(), "active"),
        ] {
            let set = once(list, what);
            for (slot, flag) in flag.into_iter().enumerate() {
                assert_eq!(set.contains(&(slot as u32)), flag, "session {slot} is {what}");
            }
        }
    }
}
