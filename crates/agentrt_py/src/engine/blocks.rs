//! Which block of vLLM's pool carries which key, and which blocks have been named as victims.
//!
//! A *key* is the low 64 bits of a block hash. Memory: at most 80 bytes a block of the pool.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use runtime_core::ids::mix;

use crate::convert::{type_error, value_error};

/// Bytes that vLLM appends to a block's hash: the number of its cache group.
pub(super) const GROUP_BYTES: usize = 4;

/// Keys are hashes already; mixing them once is enough.
#[derive(Clone, Copy, Default)]
pub(super) struct KeyHash(u64);

impl Hasher for KeyHash {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = mix(self.0 ^ u64::from(byte));
        }
    }

    fn write_u32(&mut self, id: u32) {
        self.0 = mix(u64::from(id));
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = mix(key);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl BuildHasher for KeyHash {
    type Hasher = Self;

    fn build_hasher(&self) -> Self {
        Self(0)
    }
}

/// The last 8 bytes before the `behind` last ones.
pub(super) fn tail(hash: &[u8], behind: usize) -> Option<u64> {
    let end = hash.len().checked_sub(behind)?;
    let bytes = hash.get(end.checked_sub(8)?..end)?;
    bytes.try_into().ok().map(u64::from_be_bytes)
}

/// Keys of `hashes[start:stop]`: their last 8 bytes, the integers of vLLM's KV events.
#[pyfunction]
#[pyo3(signature = (hashes, start, stop, /))]
pub(crate) fn block_keys<'py>(
    py: Python<'py>,
    hashes: &Bound<'py, PyAny>,
    start: usize,
    stop: usize,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let mut keys = Vec::new();
    read_keys(hashes, start, stop, &mut keys)?;
    Ok(PyArray1::from_vec(py, keys))
}

/// Appends what [`block_keys`] returns.
pub(super) fn read_keys(hashes: &Bound<'_, PyAny>, start: usize, stop: usize, keys: &mut Vec<u64>) -> PyResult<()> {
    let hashes = hashes.cast::<PyList>().map_err(|_| {
        type_error("hashes", "is not a list".into(), "pass the list of a request's block hashes".into())
    })?;
    let stop = stop.min(hashes.len());
    keys.reserve(stop.saturating_sub(start));
    for i in start..stop {
        let hash = hashes.get_item(i)?;
        let key = hash.cast::<PyBytes>().ok().and_then(|hash| tail(hash.as_bytes(), 0));
        keys.push(key.ok_or_else(|| {
            value_error("hashes", format!("item {i} is no hash"), "pass bytes, at least 8 of them".into())
        })?);
    }
    Ok(())
}

/// A naming; `number` tells two namings of one block apart.
#[derive(Clone, Copy)]
struct Naming {
    number: u64,
    key: u64,
}

/// Which block carries which key, and which are named.
pub(super) struct Blocks {
    null_block: u32,
    /// Where each key's block is, and the other way round; 0: none, or asked for since.
    known: HashMap<u64, u32, KeyHash>,
    keys: Vec<u64>,
    named: HashMap<u32, Naming, KeyHash>,
    /// Where the block of each named key is.
    named_at: HashMap<u64, u32, KeyHash>,
    /// Namings in the order in which they stand in the queue.
    front: VecDeque<(u32, u64)>,
    namings: u64,
    /// Blocks that go before what the policy names: second copies of others, and those that it knows nothing of.
    duplicates: VecDeque<u32>,
}

impl Blocks {
    pub(super) fn new(n: usize, null_block: u32) -> Self {
        Self {
            null_block,
            known: HashMap::with_capacity_and_hasher(n, KeyHash(0)),
            keys: vec![0; n],
            named: HashMap::default(),
            named_at: HashMap::default(),
            front: VecDeque::new(),
            namings: 0,
            duplicates: VecDeque::new(),
        }
    }

    /// `ids` carry `keys` from now on, ids beyond the keys none; appends the keys that are lost.
    pub(super) fn carry_all(&mut self, keys: &[u64], ids: &[u32], lost: &mut Vec<u64>) -> PyResult<()> {
        // Independent loads overlap where what follows would wait for one after the other.
        let had = ids.iter().filter_map(|&id| self.keys.get(id as usize));
        std::hint::black_box(had.fold(0, |sum, had| sum ^ had));
        self.look_for(keys);
        for (i, &id) in ids.iter().enumerate() {
            if id as usize >= self.keys.len() {
                return Err(value_error("block_ids", format!("has block {id}"), "pass blocks of the pool".into()));
            }
            if id != self.null_block {
                lost.extend(self.carries(id, keys.get(i).copied().unwrap_or(0)));
            }
        }
        Ok(())
    }

    /// Such a block is named before others, unless it carries a known key by then. Not where it is one of very many.
    pub(super) fn goes_first(&mut self, id: u32) {
        if self.duplicates.len() < self.keys.len() && (id as usize) < self.keys.len() && id != self.null_block {
            self.duplicates.push_back(id);
        }
    }

    /// Where the block of a key is that is named next: whoever gets it has no key to look for.
    pub(super) fn take(&mut self, key: u64) -> Option<u32> {
        let id = self.known.remove(&key)?;
        self.keys[id as usize] = 0;
        Some(id)
    }

    /// A block that was taken is to stay, unless it carries another key by now.
    pub(super) fn give_back(&mut self, id: u32, key: u64) {
        if self.keys.get(id as usize) == Some(&0) {
            self.carries(id, key);
        }
    }

    /// Reads where the blocks of `keys` are known to be.
    pub(super) fn look_for(&self, keys: &[u64]) {
        std::hint::black_box(keys.iter().fold(0, |sum, key| sum ^ self.known.get(key).copied().unwrap_or(0)));
    }

    /// A block is no victim any more.
    pub(super) fn unname(&mut self, id: u32) {
        if let Some(naming) = self.named.remove(&id) {
            if self.named_at.get(&naming.key) == Some(&id) {
                self.named_at.remove(&naming.key);
            }
        }
    }

    /// A block has been put in place as a victim, behind those named before.
    pub(super) fn name(&mut self, id: u32, key: u64) {
        self.namings += 1;
        let number = self.namings;
        self.named.insert(id, Naming { number, key });
        self.named_at.insert(key, id);
        self.front.push_back((id, number));
    }

    pub(super) fn n_named(&self) -> usize {
        self.named.len()
    }

    pub(super) fn n_known(&self) -> usize {
        self.known.len()
    }

    /// The block that is named under a key.
    pub(super) fn named_at(&self, key: u64) -> Option<u32> {
        self.named_at.get(&key).copied()
    }

    /// The block of a key is the known one.
    pub(super) fn is_known_at(&self, key: u64, id: u32) -> bool {
        self.known.get(&key) == Some(&id)
    }

    /// Named blocks with these keys are in use again: no victims any more.
    pub(super) fn in_use(&mut self, keys: &[u64]) {
        for &key in keys {
            // Where another copy is known, that is the one in use.
            if let Some(id) = self.named_at(key).filter(|_| !self.known.contains_key(&key)) {
                self.carries(id, key);
            }
        }
    }

    /// The block that was named last and its key, as far as is known here.
    pub(super) fn last_named(&mut self) -> Option<(u32, u64)> {
        while let Some(&(id, number)) = self.front.back() {
            if let Some(naming) = self.named.get(&id).filter(|naming| naming.number == number) {
                return Some((id, naming.key));
            }
            self.front.pop_back();
        }
        None
    }

    pub(super) fn n_going_first(&self) -> usize {
        self.duplicates.len()
    }

    /// The next of those that go before what the policy names.
    pub(super) fn next_going_first(&mut self) -> Option<u32> {
        self.duplicates.pop_front()
    }

    pub(super) fn is_named(&self, id: u32) -> bool {
        self.named.contains_key(&id)
    }

    /// A block carries a key (0: none) from now on; returns the key that it has lost.
    pub(super) fn carries(&mut self, id: u32, key: u64) -> Option<u64> {
        self.unname(id);
        let before = std::mem::replace(&mut self.keys[id as usize], key);
        let mut lost = None;
        if before != key && before != 0 && self.known.get(&before) == Some(&id) {
            self.known.remove(&before);
            lost = Some(before);
        }
        if key != 0 {
            if let Some(other) = self.known.insert(key, id) {
                if other != id {
                    // The engine does not merge equal blocks: the other copy is the first to go.
                    self.goes_first(other);
                }
            }
        }
        lost
    }

    /// Drops namings before the one of this block, which stands at the head of the queue: they have been allocated.
    pub(super) fn pop_front_until(&mut self, id: u32, key: u64) -> bool {
        let Some(&naming) = self.named.get(&id) else { return false };
        if naming.key != key {
            return false;
        }
        while let Some(&(at, number)) = self.front.front() {
            if number == naming.number {
                return true;
            }
            self.front.pop_front();
            self.unname_numbered(at, number);
        }
        false
    }

    fn unname_numbered(&mut self, id: u32, number: u64) {
        if self.named.get(&id).is_some_and(|naming| naming.number == number) {
            self.unname(id);
        }
    }

    pub(super) fn forget_all(&mut self) {
        self.known.clear();
        self.keys.fill(0);
        self.duplicates.clear();
        self.forget_front();
    }

    pub(super) fn forget_front(&mut self) {
        self.front.clear();
        self.named.clear();
        self.named_at.clear();
    }
}
