//! A prefix cache that evicts least recently used first, as engines do, with keys only and of fixed size.
//!
//! As in vLLM's block pool: a call holds its blocks while it runs; when it ends they join the list of free blocks, the last
//! block of the chain first, and the oldest free block makes room. Nothing is allocated after `new`.

use super::index::NONE;
use crate::ids::mix;

/// Keys that are looked for at once.
const AHEAD: usize = 64;

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
    /// Node by hash of its key, [`NONE`] where vacant; linear probing at half load.
    table: Vec<u32>,
    nodes: Vec<Node>,
    capacity: usize,
    /// Blocks that it may hold now, and holds.
    limit: usize,
    len: usize,
    /// Nodes not in use, by their links.
    vacant: u32,
    oldest: u32,
    newest: u32,
}

impl Shadow {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            table: vec![NONE; (2 * capacity).next_power_of_two()],
            nodes: Vec::with_capacity(capacity),
            capacity,
            limit: capacity,
            len: 0,
            vacant: NONE,
            oldest: NONE,
            newest: NONE,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.len() * 4 + self.capacity * size_of::<Node>()
    }

    pub(crate) fn clear(&mut self) {
        self.table.fill(NONE);
        self.nodes.clear();
        self.len = 0;
        (self.oldest, self.newest, self.vacant) = (NONE, NONE, NONE);
    }

    /// Holds at most so many blocks from now on; what is too much goes as new blocks come.
    pub(crate) fn limit(&mut self, blocks: usize) {
        self.limit = blocks.clamp(1, self.capacity);
    }

    /// A call uses `keys` below the node `tail` (or from the root); how many of them, leading, were there.
    ///
    /// `tail` moves to the last one. Where all blocks are held by calls the rest is left out.
    pub(crate) fn hold(&mut self, keys: &[u64], tail: &mut u32) -> usize {
        let mut found = 0;
        for (i, &key) in keys.iter().enumerate() {
            if i % AHEAD == 0 {
                self.look_for(&keys[i..keys.len().min(i + AHEAD)]);
            }
            let mut node = self.table[self.place(key)];
            if node == NONE {
                node = self.insert(key, *tail);
                if node == NONE {
                    break;
                }
            } else if self.nodes[node as usize].parent != *tail {
                // No hash of this prefix.
                break;
            } else {
                if self.nodes[node as usize].pins == 0 {
                    self.unlink(node);
                }
                self.nodes[node as usize].pins += 1;
                found += usize::from(found == i);
            }
            *tail = node;
        }
        found
    }

    /// Reads where the keys are: independent loads overlap where what follows would wait for one after the other.
    fn look_for(&self, keys: &[u64]) {
        let sum = keys.iter().fold(0, |sum, &key| {
            let node = self.table[self.home(key)];
            sum ^ self.nodes.get(node as usize).map_or(0, |node| node.parent)
        });
        std::hint::black_box(sum);
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
            self.vacate(self.place(self.nodes[oldest as usize].key));
            self.unlink(oldest);
            self.nodes[oldest as usize].older = self.vacant;
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
        let at = self.place(key);
        self.table[at] = node;
        node
    }

    fn home(&self, key: u64) -> usize {
        mix(key) as usize & (self.table.len() - 1)
    }

    /// Where the key is, or belongs.
    fn place(&self, key: u64) -> usize {
        let mut at = self.home(key);
        while self.table[at] != NONE && self.nodes[self.table[at] as usize].key != key {
            at = (at + 1) & (self.table.len() - 1);
        }
        at
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

    /// Empties a place; what probed past it moves up (Knuth 6.4, algorithm R).
    fn vacate(&mut self, mut hole: usize) {
        let mask = self.table.len() - 1;
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let node = self.table[at];
            if node == NONE {
                break;
            }
            let home = self.home(self.nodes[node as usize].key);
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(hole) & mask {
                self.table[hole] = node;
                hole = at;
            }
        }
        self.table[hole] = NONE;
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
            let (mut shadow, mut model) = (Shadow::new(capacity), Model::default());
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
