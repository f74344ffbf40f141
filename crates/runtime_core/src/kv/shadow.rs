//! A prefix cache that evicts least recently used first, as engines do, with keys only and of fixed size.
//!
//! As in vLLM's block pool: a call holds its blocks while it runs; when it ends they join the list of free blocks, the last
//! block of the chain first, and the oldest free block makes room. Nothing is allocated after `new`.
//!
//! It may be of a sample of the blocks, by hash: of every chain the same ones, whoever asks.

use super::index::NONE;
use super::tagged::Tagged;
use crate::ids::mix;

/// Keys that are looked for at once, and blocks that make room.
const AHEAD: usize = 32;
/// The parent of a node that is not in use.
const GONE: u32 = NONE - 1;
/// Bits of a table entry that say which node.
const NODE_BITS: u32 = 17;

#[derive(Clone, Copy, Debug)]
struct Node {
    key: u64,
    /// The block above; it outlives this one.
    parent: u32,
    /// Calls that hold it; it is in the list of free blocks while there are none.
    pins: u32,
    older: u32,
    newer: u32,
}

/// The shadow of a pool.
#[derive(Debug)]
pub(crate) struct Shadow {
    /// Node by hash of its key, at half load.
    table: Tagged<NODE_BITS>,
    nodes: Vec<Node>,
    capacity: usize,
    /// Blocks are sampled of whose hash these bits are 0.
    unsampled: u64,
    /// Blocks that it may hold now, and holds.
    limit: usize,
    len: usize,
    /// Nodes not in use, by their links.
    vacant: u32,
    oldest: u32,
    newest: u32,
}

impl Shadow {
    /// A shadow of at most 65,536 blocks, which holds one block of 2^`sparse`.
    pub(crate) fn new(capacity: usize, sparse: u32) -> Self {
        Self {
            table: Tagged::new((2 * capacity).next_power_of_two(), capacity),
            nodes: Vec::with_capacity(capacity),
            capacity,
            unsampled: !(u64::MAX >> sparse),
            limit: capacity,
            len: 0,
            vacant: NONE,
            oldest: NONE,
            newest: NONE,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.bytes() + self.capacity * size_of::<Node>()
    }

    pub(crate) fn clear(&mut self) {
        self.table.clear();
        self.nodes.clear();
        self.len = 0;
        (self.oldest, self.newest, self.vacant) = (NONE, NONE, NONE);
    }

    /// Holds at most so many blocks from now on; what is too much goes as new blocks come.
    pub(crate) fn limit(&mut self, blocks: usize) {
        self.limit = blocks.clamp(1, self.capacity);
    }

    #[inline]
    fn samples(&self, key: u64) -> bool {
        mix(key) & self.unsampled == 0
    }

    /// How many of these blocks are sampled.
    pub(crate) fn sampled(&self, keys: &[u64]) -> usize {
        keys.iter().filter(|&&key| self.samples(key)).count()
    }

    /// A call uses `keys` below the node `tail` (or from the root); how many of those that are sampled, leading, were there.
    ///
    /// `tail` moves to the last one. Where all blocks are held by calls the rest is left out.
    pub(crate) fn hold(&mut self, keys: &[u64], tail: &mut u32) -> usize {
        let (mut found, mut used, mut rest) = (0, 0, keys);
        let mut next = [0; AHEAD];
        while !rest.is_empty() {
            // As many of those that are sampled as are looked for at once.
            let mut n = 0;
            while let ([key, below @ ..], true) = (rest, n < AHEAD) {
                next[n] = *key;
                n += usize::from(self.samples(*key));
                rest = below;
            }
            let mut sought = false;
            for (i, &key) in next[..n].iter().enumerate() {
                let mut node = self.beside(*tail, key);
                if node == NONE {
                    if !sought {
                        sought = true;
                        self.look_for(&next[i..n]);
                    }
                    node = self.find(key);
                }
                if node == NONE {
                    node = self.insert(key, *tail);
                    if node == NONE {
                        return found;
                    }
                } else if self.nodes[node as usize].parent != *tail {
                    // No hash of this prefix.
                    return found;
                } else {
                    if self.nodes[node as usize].pins == 0 {
                        self.unlink(node);
                    }
                    self.nodes[node as usize].pins += 1;
                    found += usize::from(found == used);
                }
                used += 1;
                *tail = node;
            }
        }
        found
    }

    /// The block below `tail` that has this key, if it lies beside that: blocks stored together do, one way or the other.
    fn beside(&self, tail: u32, key: u64) -> u32 {
        for node in [tail.wrapping_add(1), tail.wrapping_sub(1)] {
            if self.nodes.get(node as usize).is_some_and(|x| x.key == key && x.parent == tail) {
                return node;
            }
        }
        NONE
    }

    /// Reads where the keys are: independent loads overlap where what follows would wait for one after the other.
    fn look_for(&self, keys: &[u64]) {
        let sum = keys.iter().fold(0, |sum, &key| {
            let (at_home, entry) = self.table.at_home(self.home(key));
            sum ^ at_home.map_or(entry, |node| self.nodes[node as usize].parent)
        });
        // As many blocks make room for those that are not there.
        let (mut oldest, mut homes) = (self.oldest, 0);
        for _ in keys {
            let Some(node) = self.nodes.get(oldest as usize) else { break };
            homes ^= self.table.at_home(self.home(node.key)).1;
            oldest = node.newer;
        }
        std::hint::black_box(sum ^ homes);
    }

    /// The call that holds everything from the root to `tail` has ended.
    pub(crate) fn release(&mut self, tail: u32) {
        let mut node = tail;
        while node != NONE {
            let x = &mut self.nodes[node as usize];
            let parent = x.parent;
            x.pins -= 1;
            if x.pins == 0 {
                self.link(node);
            }
            node = parent;
        }
    }

    /// A new block, held by one call; [`NONE`] where no block is free.
    fn insert(&mut self, key: u64, parent: u32) -> u32 {
        let new = Node { key, parent, pins: 1, older: NONE, newer: NONE };
        while self.len >= self.limit {
            let oldest = self.oldest;
            if oldest == NONE {
                return NONE;
            }
            let home_of = |node: u32| self.home(self.nodes[node as usize].key);
            self.table.remove(home_of(oldest), oldest, home_of);
            self.unlink(oldest);
            (self.nodes[oldest as usize].older, self.nodes[oldest as usize].parent) = (self.vacant, GONE);
            self.vacant = oldest;
            self.len -= 1;
        }
        self.len += 1;
        let node = if self.vacant == NONE {
            self.nodes.push(new);
            self.nodes.len() as u32 - 1
        } else {
            let node = self.vacant;
            self.vacant = self.nodes[node as usize].older;
            self.nodes[node as usize] = new;
            node
        };
        self.table.insert(self.home(key), node);
        node
    }

    fn home(&self, key: u64) -> usize {
        mix(key) as usize & (self.table.len() - 1)
    }

    /// The node of a key, [`NONE`] where it is not there.
    fn find(&self, key: u64) -> u32 {
        self.table.find(self.home(key), |node| self.nodes[node as usize].key == key)
    }

    fn link(&mut self, node: u32) {
        let newest = self.newest;
        (self.nodes[node as usize].older, self.nodes[node as usize].newer) = (newest, NONE);
        match newest {
            NONE => self.oldest = node,
            newest => self.nodes[newest as usize].newer = node,
        }
        self.newest = node;
    }

    fn unlink(&mut self, node: u32) {
        let Node { older, newer, .. } = self.nodes[node as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.nodes[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.nodes[newer as usize].older = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Free blocks, oldest first, and blocks held, of a pool made of lists.
    #[derive(Default)]
    struct Model {
        free: Vec<u64>,
        held: Vec<u64>,
    }

    impl Model {
        fn hold(&mut self, path: &[u64], capacity: usize) -> (usize, usize) {
            let (mut found, mut taken) = (0, 0);
            for (i, key) in path.iter().enumerate() {
                if self.held.contains(key) || self.free.contains(key) {
                    self.free.retain(|other| other != key);
                    found += usize::from(found == i);
                } else {
                    let mut held = self.held.clone();
                    held.sort_unstable();
                    held.dedup();
                    if held.len() + self.free.len() == capacity {
                        if self.free.is_empty() {
                            break;
                        }
                        self.free.remove(0);
                    }
                }
                self.held.push(*key);
                taken += 1;
            }
            (found, taken)
        }

        fn release(&mut self, path: &[u64]) {
            for key in path.iter().rev() {
                let at = self.held.iter().position(|other| other == key).unwrap();
                self.held.swap_remove(at);
                if !self.held.contains(key) {
                    self.free.push(*key);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 80, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn it_holds_what_a_pool_made_of_lists_holds(
            capacity in 1usize..24,
            calls in proptest::collection::vec((0u64..4, 1u64..8, any::<bool>()), 0..200)
        ) {
            let (mut shadow, mut model) = (Shadow::new(capacity, 0), Model::default());
            let mut running: Vec<(Vec<u64>, u32)> = Vec::new();
            for (root, len, end) in calls {
                if end && !running.is_empty() {
                    let (path, tail) = running.remove(root as usize % running.len());
                    shadow.release(tail);
                    model.release(&path);
                    continue;
                }
                // Paths of one root branch at their third block.
                let path: Vec<u64> = (0..len).map(|i| 1 + root * 1000 + if i > 2 { len * 100 } else { 0 } + i).collect();
                let mut tail = NONE;
                let found = shadow.hold(&path, &mut tail);
                let (expected, taken) = model.hold(&path, capacity);
                prop_assert_eq!(found, expected);
                running.push((path[..taken].to_vec(), tail));
            }
        }
    }
}
