//! vLLM's free queue, in one call from Python a hook: which block carries which key, which blocks have been named as
//! victims, and how they get to the head of the queue.
//!
//! A *key* is the low 64 bits of a block hash. vLLM allocates from the head of `BlockPool.free_block_queue`, a doubly
//! linked list of Python objects. Victims are linked in behind those named before (the *front*); blocks without a hash,
//! which vLLM itself puts at the head, stay before both. Runs of victims that are neighbours already, as the blocks of
//! one request are after vLLM has freed them, move in one piece.
//!
//! Invariants: everything is read and checked before the first link is written; links are written through the blocks'
//! own slots; every block in the queue stays in it, and their number does not change. A victim is moved only if it is
//! what its key says *now*: it carries that hash, nobody uses it, it is queued.
//!
//! Cost: a prepared front is found again in a few attribute reads, whatever its length; a victim costs some ten of
//! them. Memory: at most 80 bytes a block of the pool.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyString};
use runtime_core::ids::mix;

use crate::convert::{array, type_error, value_error};
use crate::runtime::Runtime;

/// Blocks used twice for the same content that are remembered, oldest first.
const MAX_DUPLICATES: usize = 65_536;
/// How often the policy is asked again where it names blocks that cannot go.
const ROUNDS: usize = 4;
/// Bytes that vLLM appends to a block's hash: the number of its cache group.
const GROUP_BYTES: usize = 4;

/// Keys are hashes already; mixing them once is enough.
#[derive(Clone, Copy, Default)]
struct KeyHash(u64);

impl Hasher for KeyHash {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = mix(self.0 ^ u64::from(byte));
        }
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
fn tail(hash: &[u8], behind: usize) -> Option<u64> {
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
pub(crate) fn read_keys(hashes: &Bound<'_, PyAny>, start: usize, stop: usize, keys: &mut Vec<u64>) -> PyResult<()> {
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

/// Who names victims.
enum Source {
    /// Nobody: the queue's own order.
    Queue,
    /// The runtime's policies.
    Runtime(Py<Runtime>),
    /// Python: `evict(n, now_us)` returns keys.
    Callable(Py<PyAny>),
}

/// What is known of a block, in one place: blocks come in no order, so each is a line of cache.
#[derive(Clone, Copy, Default)]
struct Known {
    /// The key last seen on it and not asked for since; 0: none.
    key: u64,
    /// Its naming: `number` tells two namings of one block apart. 0: not named.
    number: u64,
    named_key: u64,
}

/// Which block carries which key and which have been named; puts victims in place.
#[pyclass(module = "agentrt._core")]
pub(crate) struct FreeQueue {
    pool: Py<PyAny>,
    blocks: Py<PyList>,
    /// The slot that holds a block's hash.
    hash_slot: Py<PyString>,
    null_block: u32,
    source: Source,
    /// Where each key's block is, and the other way round.
    known: HashMap<u64, u32, KeyHash>,
    at: Vec<Known>,
    /// Where the block of each named key is.
    named_at: HashMap<u64, u32, KeyHash>,
    /// Namings in the order in which they stand in the queue.
    front: VecDeque<(u32, u64)>,
    /// Of these, such as have neither been hit nor forgotten.
    live: usize,
    duplicates: VecDeque<u32>,
    namings: u64,
    /// Blocks named at once beyond what is needed.
    #[pyo3(get, set)]
    batch: usize,
    #[pyo3(get)]
    ranked_blocks: u64,
    #[pyo3(get)]
    stale_blocks: u64,
    #[pyo3(get)]
    duplicate_blocks: u64,
    #[pyo3(get)]
    short_rankings: u64,
    keys: Vec<u64>,
}

/// A block of the queue that may go, with what was read of it.
struct Candidate<'py> {
    block: Bound<'py, PyAny>,
    /// The block behind it when it was read.
    next: Bound<'py, PyAny>,
    id: u32,
    key: u64,
}

#[pymethods]
impl FreeQueue {
    /// Checks that `pool` is built as expected; raises where it is not.
    #[new]
    #[pyo3(signature = (pool, source, batch, /))]
    fn new(pool: &Bound<'_, PyAny>, source: &Bound<'_, PyAny>, batch: usize) -> PyResult<Self> {
        let py = pool.py();
        let blocks = pool.getattr(intern!(py, "blocks"))?;
        let blocks = blocks.cast::<PyList>().map_err(|_| {
            type_error("pool.blocks", "is not a list".into(), "this version of the engine is not known".into())
        })?;
        let n = blocks.len();
        let private = intern!(py, "_block_hash");
        let has_private = n > 0 && blocks.get_item(0)?.hasattr(private)?;
        let hash_slot = if has_private { private } else { intern!(py, "block_hash") };
        let null_block = match pool.getattr_opt(intern!(py, "null_block"))? {
            Some(block) if !block.is_none() => block.getattr(intern!(py, "block_id"))?.extract()?,
            _ => u32::MAX,
        };
        // Everything that is read or written later is read and written once, changing nothing.
        let head = pool.getattr(intern!(py, "free_block_queue"))?.getattr(intern!(py, "fake_free_list_head"))?;
        let first = head.getattr(intern!(py, "next_free_block"))?;
        if !first.is_none() {
            head.setattr(intern!(py, "next_free_block"), &first)?;
            let before = first.getattr(intern!(py, "prev_free_block"))?;
            if !before.is(&head) {
                let problem = "is not linked as expected".into();
                return Err(value_error("pool.free_block_queue", problem, "this version is not known".into()));
            }
            first.setattr(intern!(py, "prev_free_block"), &before)?;
        }
        if n > 0 {
            let block = blocks.get_item(n - 1)?;
            block.getattr(intern!(py, "ref_cnt"))?.extract::<i64>()?;
            block.getattr(hash_slot)?;
            if block.getattr(intern!(py, "block_id"))?.extract::<usize>()? != n - 1 {
                let problem = "are not in the order of their ids".into();
                return Err(value_error("pool.blocks", problem, "this version is not known".into()));
            }
        }
        let source = if source.is_none() {
            Source::Queue
        } else if let Ok(runtime) = source.cast::<Runtime>() {
            Source::Runtime(runtime.clone().unbind())
        } else {
            Source::Callable(source.clone().unbind())
        };
        Ok(Self {
            pool: pool.clone().unbind(),
            blocks: blocks.clone().unbind(),
            hash_slot: hash_slot.clone().unbind(),
            null_block,
            source,
            known: HashMap::with_capacity_and_hasher(n, KeyHash(0)),
            at: vec![Known::default(); n],
            named_at: HashMap::with_hasher(KeyHash(0)),
            front: VecDeque::new(),
            live: 0,
            duplicates: VecDeque::new(),
            namings: 0,
            batch,
            ranked_blocks: 0,
            stale_blocks: 0,
            duplicate_blocks: 0,
            short_rankings: 0,
            keys: Vec::new(),
        })
    }

    /// The prefix cache has been reset.
    fn clear(&mut self) {
        self.forget_all();
    }

    /// Blocks named and not allocated or hit since, as far as is known.
    #[getter]
    fn pending_blocks(&self) -> usize {
        self.live
    }

    /// Keys whose block is known.
    #[getter]
    fn known_blocks(&self) -> usize {
        self.known.len()
    }

    /// `block_ids[start:]` carry `keys` from now on, blocks beyond the keys none.
    ///
    /// Returns the keys that the engine has evicted by itself to make room for them, or None.
    #[pyo3(signature = (keys, start, block_ids, /))]
    fn register<'py>(
        &mut self,
        py: Python<'py>,
        keys: &Bound<'py, PyAny>,
        start: usize,
        block_ids: &Bound<'py, PyList>,
    ) -> PyResult<Option<Bound<'py, PyArray1<u64>>>> {
        let keys: PyReadonlyArray1<'_, u64> = array("keys", keys)?;
        let ids: Vec<u32> =
            (start..block_ids.len()).map(|i| block_ids.get_item(i)?.extract()).collect::<PyResult<_>>()?;
        let lost = self.carry_all(keys.as_slice()?, &ids)?;
        Ok(if lost.is_empty() { None } else { Some(PyArray1::from_vec(py, lost)) })
    }

    /// Makes the next `n` allocations take blocks without a hash and victims; returns how many were named.
    ///
    /// `spare`: ids of blocks that are about to leave the queue because the arriving request hits them.
    #[pyo3(signature = (n, now_us, spare = None, /))]
    fn prepare(&mut self, py: Python<'_>, n: usize, now_us: u64, spare: Option<Vec<u32>>) -> PyResult<usize> {
        self.prepare_now(py, n, now_us, &spare.unwrap_or_default())
    }
}

impl FreeQueue {
    /// As `clear` of Python.
    pub(crate) fn forget_all(&mut self) {
        self.known.clear();
        self.at.fill(Known::default());
        self.named_at.clear();
        self.front.clear();
        self.live = 0;
        self.duplicates.clear();
    }

    /// Whether blocks are named.
    pub(crate) fn has_named(&self) -> bool {
        self.live > 0
    }

    /// Whether blocks with these keys may be among the named ones, or be named by whoever names.
    pub(crate) fn may_spare(&self, keys: &[u64]) -> bool {
        match self.source {
            _ if self.live == 0 => false,
            // The runtime names nothing below what it does not hold.
            Source::Runtime(_) => keys.iter().any(|key| self.named_at.contains_key(key)),
            _ => true,
        }
    }

    /// As `register` of Python: `ids` carry `keys` from now on, ids beyond the keys none; returns the keys that are lost.
    pub(crate) fn carry_all(&mut self, keys: &[u64], ids: &[u32]) -> PyResult<Vec<u64>> {
        let mut lost = Vec::new();
        // Independent loads overlap where what follows would wait for one after the other.
        let had = ids.iter().filter_map(|&id| self.at.get(id as usize)).map(|at| at.key ^ at.number);
        std::hint::black_box(had.fold(0, |sum, had| sum ^ had));
        self.look_for(keys);
        for (i, &id) in ids.iter().enumerate() {
            if id as usize >= self.at.len() {
                return Err(value_error("block_ids", format!("has block {id}"), "pass blocks of the pool".into()));
            }
            if id != self.null_block {
                lost.extend(self.carries(id, keys.get(i).copied().unwrap_or(0)));
            }
        }
        Ok(lost)
    }

    /// As `prepare` of Python.
    pub(crate) fn prepare_now(&mut self, py: Python<'_>, n: usize, now_us: u64, spare: &[u32]) -> PyResult<usize> {
        let queue = self.pool.bind(py).getattr(intern!(py, "free_block_queue"))?;
        let free: usize = queue.getattr(intern!(py, "num_free_blocks"))?.extract()?;
        let next_slot = intern!(py, "next_free_block");
        // Unhashed blocks first, then the front.
        let leaving = spare.iter().filter(|&&id| self.is_named(id)).count();
        let n = (n + leaving).min(free);
        let mut ready = 0;
        let mut last = queue.getattr(intern!(py, "fake_free_list_head"))?;
        let mut block = last.getattr(next_slot)?;
        let mut fronted = false;
        while ready < n && !block.is_none() {
            let Some(key) = self.key_of(&block)? else {
                let next = block.getattr(next_slot)?;
                if next.is_none() {
                    // The end of the list.
                    break;
                }
                ready += 1;
                last = block;
                block = next;
                continue;
            };
            let id: u32 = block.getattr(intern!(py, "block_id"))?.extract()?;
            fronted = self.pop_front_until(id, key);
            break;
        }
        if ready >= n {
            // Whatever stands behind the unhashed blocks is still to come.
            return Ok(0);
        }
        if fronted {
            ready += self.live;
        } else {
            self.forget_front();
        }
        if ready >= n {
            return Ok(0);
        }
        if fronted {
            if let Some(tail) = self.end_of_front(py)? {
                last = tail;
            }
        }
        let want = (n + self.batch).min(free).saturating_sub(ready);
        let victims = match self.source {
            Source::Queue => self.in_queue_order(&last, want, spare)?,
            _ => self.victims(py, want, now_us, spare)?,
        };
        if victims.len() < want {
            self.short_rankings += 1;
        }
        place(last, &victims)?;
        for victim in &victims {
            self.namings += 1;
            let at = &mut self.at[victim.id as usize];
            (at.number, at.named_key) = (self.namings, victim.key);
            self.named_at.insert(victim.key, victim.id);
            self.front.push_back((victim.id, self.namings));
        }
        self.live += victims.len();
        self.ranked_blocks += victims.len() as u64;
        Ok(victims.len())
    }

    /// Reads where the blocks of `keys` are known to be.
    fn look_for(&self, keys: &[u64]) {
        std::hint::black_box(keys.iter().fold(0, |sum, key| sum ^ self.known.get(key).copied().unwrap_or(0)));
    }

    /// A block is no victim any more.
    fn unname(&mut self, id: u32) {
        let at = &mut self.at[id as usize];
        if std::mem::take(&mut at.number) != 0 {
            if self.named_at.get(&at.named_key) == Some(&id) {
                self.named_at.remove(&at.named_key);
            }
            self.live -= 1;
        }
    }

    fn is_named(&self, id: u32) -> bool {
        self.at.get(id as usize).is_some_and(|at| at.number != 0)
    }

    /// The key of the hash that a block carries now.
    fn key_of(&self, block: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
        key_in(&block.getattr(self.hash_slot.bind(block.py()))?)
    }

    /// A block carries a key (0: none) from now on; returns the key that it has lost.
    fn carries(&mut self, id: u32, key: u64) -> Option<u64> {
        self.unname(id);
        let before = std::mem::replace(&mut self.at[id as usize].key, key);
        let mut lost = None;
        if before != key && before != 0 && self.known.get(&before) == Some(&id) {
            self.known.remove(&before);
            lost = Some(before);
        }
        if key != 0 {
            if let Some(other) = self.known.insert(key, id) {
                if other != id && self.duplicates.len() < MAX_DUPLICATES {
                    // The engine does not merge equal blocks: the other copy is the first to go.
                    self.duplicates.push_back(other);
                }
            }
        }
        lost
    }

    /// Drops namings before the one of this block, which stands at the head of the queue: they have been allocated.
    fn pop_front_until(&mut self, id: u32, key: u64) -> bool {
        let Some(&named) = self.at.get(id as usize) else { return false };
        if named.number == 0 || named.named_key != key {
            return false;
        }
        while let Some(&(at, number)) = self.front.front() {
            if number == named.number {
                return true;
            }
            self.front.pop_front();
            if self.at[at as usize].number == number {
                self.unname(at);
            }
        }
        false
    }

    fn forget_front(&mut self) {
        while let Some((at, number)) = self.front.pop_front() {
            if self.at[at as usize].number == number {
                self.unname(at);
            }
        }
        self.live = 0;
    }

    /// The last named block that still waits in the queue.
    fn end_of_front<'py>(&mut self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let blocks = self.blocks.bind(py).clone();
        while let Some(&(at, number)) = self.front.back() {
            let named = self.at[at as usize];
            if named.number == number {
                let block = blocks.get_item(at as usize)?;
                if is_queued(&block)? && self.key_of(&block)? == Some(named.named_key) {
                    return Ok(Some(block));
                }
                self.unname(at);
            }
            self.front.pop_back();
        }
        Ok(None)
    }

    /// The next blocks of the queue behind `last`.
    fn in_queue_order<'py>(
        &self,
        last: &Bound<'py, PyAny>,
        want: usize,
        spare: &[u32],
    ) -> PyResult<Vec<Candidate<'py>>> {
        let py = last.py();
        let next_slot = intern!(py, "next_free_block");
        let mut victims = Vec::with_capacity(want);
        let mut block = last.getattr(next_slot)?;
        while victims.len() < want {
            let next = block.getattr(next_slot)?;
            if next.is_none() {
                break;
            }
            let id: u32 = block.getattr(intern!(py, "block_id"))?.extract()?;
            if !spare.contains(&id) && !self.is_named(id) {
                let key = self.key_of(&block)?.unwrap_or(0);
                victims.push(Candidate { block, next: next.clone(), id, key });
            }
            block = next;
        }
        Ok(victims)
    }

    /// What the policy names, as far as it can go; duplicates first.
    fn victims<'py>(
        &mut self,
        py: Python<'py>,
        want: usize,
        now_us: u64,
        spare: &[u32],
    ) -> PyResult<Vec<Candidate<'py>>> {
        let blocks = self.blocks.bind(py).clone();
        let mut victims: Vec<Candidate<'py>> = Vec::with_capacity(want);
        for _ in 0..self.duplicates.len().min(want) {
            let Some(id) = self.duplicates.pop_front() else { break };
            let block = blocks.get_item(id as usize)?;
            let Some(key) = self.key_of(&block)? else { continue };
            if self.known.get(&key) == Some(&id) {
                continue;
            }
            match behind(&block)? {
                None => {
                    // Still in use; it will be free some day. One is enough to see: copies of a system prompt always are.
                    self.duplicates.push_back(id);
                    break;
                }
                Some(next) if !self.is_named(id) && !spare.contains(&id) && !victims.iter().any(|v| v.id == id) => {
                    victims.push(Candidate { block, next, id, key });
                    self.duplicate_blocks += 1;
                }
                Some(_) => {}
            }
        }
        for _ in 0..ROUNDS {
            let short = want.saturating_sub(victims.len());
            if short == 0 {
                break;
            }
            let mut keys = std::mem::take(&mut self.keys);
            keys.clear();
            self.ask(py, short, now_us, &mut keys)?;
            let none = keys.is_empty();
            // In rounds: the loads of each are independent and overlap.
            self.look_for(&keys);
            let mut named: Vec<(Bound<'py, PyAny>, u32, u64)> = Vec::with_capacity(keys.len());
            for &key in &keys {
                match self.known.remove(&key) {
                    Some(id) => {
                        // Whoever gets it next has no key to look for.
                        self.at[id as usize].key = 0;
                        named.push((blocks.get_item(id as usize)?, id, key));
                    }
                    None => self.stale_blocks += 1,
                }
            }
            let slot = self.hash_slot.bind(py);
            let hashes = named.iter().map(|(block, ..)| block.getattr(slot)).collect::<PyResult<Vec<_>>>()?;
            for ((block, id, key), hash) in named.into_iter().zip(&hashes) {
                if key_in(hash)? != Some(key) {
                    // The engine has reused the block meanwhile.
                    self.stale_blocks += 1;
                    continue;
                }
                match behind(&block)? {
                    // Named before the engine has released it: next time.
                    None => self.duplicates.push_back(id),
                    Some(next) if !spare.contains(&id) && !self.is_named(id) => {
                        victims.push(Candidate { block, next, id, key });
                    }
                    Some(_) => {}
                }
            }
            self.keys = keys;
            if none {
                break;
            }
        }
        Ok(victims)
    }

    /// Asks for `n` keys. What is no key counts as stale.
    fn ask(&mut self, py: Python<'_>, n: usize, now_us: u64, keys: &mut Vec<u64>) -> PyResult<()> {
        match &self.source {
            Source::Queue => Ok(()),
            Source::Runtime(runtime) => runtime.get().name_victims(n, now_us, keys),
            Source::Callable(evict) => {
                let named = evict.bind(py).call1((n, now_us))?;
                for key in named.try_iter()? {
                    match key?.extract() {
                        Ok(key) => keys.push(key),
                        Err(_) => self.stale_blocks += 1,
                    }
                }
                Ok(())
            }
        }
    }
}

/// The key of a block's hash; None where it has none.
fn key_in(hash: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    if hash.is_none() {
        return Ok(None);
    }
    let hash = hash.cast::<PyBytes>()?;
    // A hash too short to have a key is a hash all the same.
    Ok(Some(tail(hash.as_bytes(), GROUP_BYTES).unwrap_or(0)))
}

/// Whether a block is in the queue.
fn is_queued(block: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = block.py();
    Ok(!block.getattr(intern!(py, "next_free_block"))?.is_none()
        && !block.getattr(intern!(py, "prev_free_block"))?.is_none())
}

/// The block behind one in the queue; None of a block that is not there, or that somebody uses.
fn behind<'py>(block: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = block.py();
    let references: i64 = block.getattr(intern!(py, "ref_cnt"))?.extract()?;
    if references != 0 {
        return Ok(None);
    }
    let next = block.getattr(intern!(py, "next_free_block"))?;
    Ok(Some(next).filter(|next| !next.is_none()))
}

/// Victims that are neighbours, in this order.
struct Run<'a, 'py> {
    first: &'a Bound<'py, PyAny>,
    end: &'a Bound<'py, PyAny>,
    /// What stands before and behind it.
    before: Bound<'py, PyAny>,
}

/// Moves blocks of the queue behind `last`, in this order; neighbours move together.
fn place<'py>(last: Bound<'py, PyAny>, victims: &[Candidate<'py>]) -> PyResult<()> {
    let py = last.py();
    let (prev_slot, next_slot) = (intern!(py, "prev_free_block"), intern!(py, "next_free_block"));
    // Everything is read before the first link is written.
    let mut runs: Vec<Run<'_, 'py>> = Vec::with_capacity(victims.len());
    for run in victims.chunk_by(|one, other| one.next.is(&other.block)) {
        let (first, end) = (&run[0].block, &run[run.len() - 1].block);
        let before = first.getattr(prev_slot)?;
        if before.is_none() {
            let problem = "is not linked as expected".into();
            return Err(value_error("pool.free_block_queue", problem, "this version is not known".into()));
        }
        runs.push(Run { first, end, before });
    }
    let mut last = last;
    for (i, Run { first, end, before }) in runs.into_iter().enumerate() {
        // Runs that have moved before may have stood beside this one.
        let before = if i == 0 { before } else { first.getattr(prev_slot)? };
        if !before.is(&last) {
            let (after, behind) = (end.getattr(next_slot)?, last.getattr(next_slot)?);
            before.setattr(next_slot, &after)?;
            after.setattr(prev_slot, &before)?;
            last.setattr(next_slot, first)?;
            first.setattr(prev_slot, &last)?;
            end.setattr(next_slot, &behind)?;
            behind.setattr(prev_slot, end)?;
        }
        last = end.clone();
    }
    Ok(())
}
