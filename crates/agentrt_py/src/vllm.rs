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

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyString};
use runtime_core::ids::mix;

use crate::convert::{array, type_error, value_error};
use crate::runtime::Runtime;

/// Blocks in use that are looked at in vain.
const FEW: usize = 4;
/// How often the policy is asked again where it names blocks that cannot go.
const ROUNDS: usize = 4;
/// Victims put in place ahead in one step, each of which costs about a microsecond.
const IN_QUIET_STEPS: usize = 64;
const IN_OTHER_STEPS: usize = 32;
/// Of those beyond what is needed as many have to be there: what is needed may turn out to be a little more.
const SLACK: usize = 4;
/// Bytes that vLLM appends to a block's hash: the number of its cache group.
const GROUP_BYTES: usize = 4;

/// Keys are hashes already; mixing them once is enough.
#[derive(Clone, Copy, Default)]
pub(crate) struct KeyHash(u64);

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

/// A naming; `number` tells two namings of one block apart.
#[derive(Clone, Copy)]
struct Naming {
    number: u64,
    key: u64,
}

/// Which block carries which key, and which are named.
pub(crate) struct Blocks {
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
    fn new(n: usize, null_block: u32) -> Self {
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
    pub(crate) fn carry_all(&mut self, keys: &[u64], ids: &[u32], lost: &mut Vec<u64>) -> PyResult<()> {
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
    pub(crate) fn goes_first(&mut self, id: u32) {
        if self.duplicates.len() < self.keys.len() && (id as usize) < self.keys.len() && id != self.null_block {
            self.duplicates.push_back(id);
        }
    }

    /// Where the block of a key is that is named next: whoever gets it has no key to look for.
    pub(crate) fn take(&mut self, key: u64) -> Option<u32> {
        let id = self.known.remove(&key)?;
        self.keys[id as usize] = 0;
        Some(id)
    }

    /// A block that was taken is to stay, unless it carries another key by now.
    pub(crate) fn give_back(&mut self, id: u32, key: u64) {
        if self.keys.get(id as usize) == Some(&0) {
            self.carries(id, key);
        }
    }

    /// Reads where the blocks of `keys` are known to be.
    pub(crate) fn look_for(&self, keys: &[u64]) {
        std::hint::black_box(keys.iter().fold(0, |sum, key| sum ^ self.known.get(key).copied().unwrap_or(0)));
    }

    /// A block is no victim any more.
    fn unname(&mut self, id: u32) {
        if let Some(naming) = self.named.remove(&id) {
            if self.named_at.get(&naming.key) == Some(&id) {
                self.named_at.remove(&naming.key);
            }
        }
    }

    fn name(&mut self, id: u32, key: u64) {
        self.namings += 1;
        let number = self.namings;
        self.named.insert(id, Naming { number, key });
        self.named_at.insert(key, id);
        self.front.push_back((id, number));
    }

    fn is_named(&self, id: u32) -> bool {
        self.named.contains_key(&id)
    }

    /// A block carries a key (0: none) from now on; returns the key that it has lost.
    fn carries(&mut self, id: u32, key: u64) -> Option<u64> {
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
    fn pop_front_until(&mut self, id: u32, key: u64) -> bool {
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

    fn forget_all(&mut self) {
        self.known.clear();
        self.keys.fill(0);
        self.duplicates.clear();
        self.forget_front();
    }

    fn forget_front(&mut self) {
        self.front.clear();
        self.named.clear();
        self.named_at.clear();
    }
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
    tables: Arc<Mutex<Blocks>>,
    /// Blocks named at once beyond what is needed.
    #[pyo3(get, set)]
    batch: usize,
    #[pyo3(get)]
    ranked_blocks: u64,
    #[pyo3(get)]
    pub(crate) stale_blocks: u64,
    #[pyo3(get)]
    duplicate_blocks: u64,
    #[pyo3(get)]
    short_rankings: u64,
    keys: Vec<u64>,
    asked: Vec<(u32, u64)>,
    seen: HashSet<u32, KeyHash>,
}

/// Victims that are to stand ready beyond those that are needed, in the course of some steps.
#[derive(Clone, Copy, Default)]
pub(crate) struct Ahead {
    pub(crate) most: usize,
    /// Whether nothing else has happened in this step: then is the time to put them in place. Where hardly any are left,
    /// other steps do it as well, or the next arrivals find none.
    pub(crate) quiet: bool,
}

impl Ahead {
    /// How many to put in place where `ready` stand ready, `n` of which are needed.
    fn wanted(self, n: usize, ready: usize, free: usize) -> usize {
        let missing = (n + self.most).min(free).saturating_sub(ready);
        if self.quiet {
            missing.min(IN_QUIET_STEPS)
        } else if ready < n + self.most / 16 {
            missing.min(IN_OTHER_STEPS)
        } else {
            0
        }
    }
}

/// Appends up to so many victims, of which so many are needed: blocks and the keys that they carry.
pub(crate) type Ask<'a> = dyn FnMut(usize, usize, &mut Vec<(u32, u64)>) -> PyResult<()> + 'a;

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
            tables: Arc::new(Mutex::new(Blocks::new(n, null_block))),
            batch,
            ranked_blocks: 0,
            stale_blocks: 0,
            duplicate_blocks: 0,
            short_rankings: 0,
            keys: Vec::new(),
            asked: Vec::new(),
            seen: HashSet::default(),
        })
    }

    /// The prefix cache has been reset.
    fn clear(&mut self) {
        self.forget_all();
    }

    /// Blocks named and not allocated or hit since, as far as is known.
    #[getter]
    fn pending_blocks(&self) -> usize {
        self.tables().named.len()
    }

    /// Keys whose block is known.
    #[getter]
    fn known_blocks(&self) -> usize {
        self.tables().known.len()
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
        let mut lost = Vec::new();
        self.tables().carry_all(keys.as_slice()?, &ids, &mut lost)?;
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
    /// The tables, also for a thread beside, which has them while nobody else calls.
    pub(crate) fn share(&self) -> Arc<Mutex<Blocks>> {
        Arc::clone(&self.tables)
    }

    pub(crate) fn tables(&self) -> MutexGuard<'_, Blocks> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As `clear` of Python.
    pub(crate) fn forget_all(&self) {
        self.tables().forget_all();
    }

    /// The same, where whoever shares the tables may never let go of them.
    pub(crate) fn forsake(&mut self, py: Python<'_>) {
        self.tables = Arc::new(Mutex::new(Blocks::new(self.blocks.bind(py).len(), self.null_block)));
    }

    /// After a time in which nobody was told anything: what the queue holds, oldest first, goes before what the policy
    /// names. Nobody else would ever name it, and what is known would have to live on the room that is left.
    pub(crate) fn strangers_first(&self, py: Python<'_>) -> PyResult<()> {
        let next_slot = intern!(py, "next_free_block");
        let queue = self.pool.bind(py).getattr(intern!(py, "free_block_queue"))?;
        let mut block = queue.getattr(intern!(py, "fake_free_list_head"))?.getattr(next_slot)?;
        let mut tables = self.tables();
        while !block.is_none() {
            let next = block.getattr(next_slot)?;
            if !next.is_none() && self.key_of(&block)?.is_some() {
                tables.goes_first(block.getattr(intern!(py, "block_id"))?.extract()?);
            }
            block = next;
        }
        Ok(())
    }

    /// Whether blocks are named.
    pub(crate) fn has_named(&self) -> bool {
        !self.tables().named.is_empty()
    }

    /// Whether blocks with these keys may be among the named ones, or be named by whoever names.
    pub(crate) fn may_spare(&self, keys: &[u64]) -> bool {
        let tables = self.tables();
        match self.source {
            _ if tables.named.is_empty() => false,
            // The runtime names nothing below what it does not hold. (What goes before its victims may be hit: then there is a
            // block too few, and the engine takes the next one in its own order.)
            Source::Runtime(_) => keys.iter().any(|key| tables.named_at.contains_key(key)),
            _ => true,
        }
    }

    /// Blocks that are named under these keys.
    pub(crate) fn named(&self, keys: &[u64]) -> Vec<u32> {
        let tables = self.tables();
        if tables.named.is_empty() {
            return Vec::new();
        }
        keys.iter().filter_map(|key| tables.named_at.get(key).copied()).collect()
    }

    /// Named blocks with these keys are in use again: no victims any more.
    pub(crate) fn in_use(&self, keys: &[u64]) {
        let mut tables = self.tables();
        for key in keys {
            // Where another copy is known, that is the one in use.
            if let Some(&id) = tables.named_at.get(key).filter(|_| !tables.known.contains_key(key)) {
                tables.carries(id, *key);
            }
        }
    }

    /// As `prepare` of Python.
    pub(crate) fn prepare_now(&mut self, py: Python<'_>, n: usize, now_us: u64, spare: &[u32]) -> PyResult<usize> {
        self.prepare_asking(py, n, now_us, spare, None)
    }

    /// The same, where somebody else is asked for victims, and some are to stand ready beyond `n`.
    pub(crate) fn prepare_asking(
        &mut self,
        py: Python<'_>,
        n: usize,
        now_us: u64,
        spare: &[u32],
        asking: Option<(Ahead, &mut Ask<'_>)>,
    ) -> PyResult<usize> {
        let queue = self.pool.bind(py).getattr(intern!(py, "free_block_queue"))?;
        let free: usize = queue.getattr(intern!(py, "num_free_blocks"))?.extract()?;
        let next_slot = intern!(py, "next_free_block");
        // Not kept locked while somebody is asked.
        let tables = self.share();
        let of_blocks = || tables.lock().unwrap_or_else(PoisonError::into_inner);
        // Unhashed blocks first, then the front.
        let leaving = if spare.is_empty() {
            0
        } else {
            let blocks = of_blocks();
            spare.iter().filter(|&&id| blocks.is_named(id)).count()
        };
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
            fronted = of_blocks().pop_front_until(id, key);
            break;
        }
        if ready >= n {
            // Whatever stands behind the unhashed blocks is still to come.
            return Ok(0);
        }
        if fronted {
            ready += of_blocks().named.len();
        } else {
            of_blocks().forget_front();
        }
        let short = n.saturating_sub(ready);
        let beyond = |extra: usize| if short == 0 { 0 } else { (n + extra).min(free).saturating_sub(ready) };
        let (must, want, ask) = match asking {
            Some((ahead, ask)) => {
                let must = beyond(self.batch.min(SLACK));
                (must, must.max(ahead.wanted(n, ready, free)), Some(ask))
            }
            None => (short, beyond(self.batch), None),
        };
        if want == 0 {
            return Ok(0);
        }
        if fronted {
            if let Some(tail) = self.end_of_front(py, &mut of_blocks())? {
                last = tail;
            }
        }
        let victims = match self.source {
            Source::Queue => self.in_queue_order(&last, want, spare, &of_blocks())?,
            _ => self.victims(py, (want, must), now_us, spare, &tables, ask)?,
        };
        if victims.len() < want {
            self.short_rankings += 1;
        }
        place(last, &victims)?;
        let mut blocks = of_blocks();
        for victim in &victims {
            blocks.name(victim.id, victim.key);
        }
        self.ranked_blocks += victims.len() as u64;
        Ok(victims.len())
    }

    /// The key of the hash that a block carries now.
    fn key_of(&self, block: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
        key_in(&block.getattr(self.hash_slot.bind(block.py()))?)
    }

    /// The last named block that still waits in the queue.
    fn end_of_front<'py>(&self, py: Python<'py>, tables: &mut Blocks) -> PyResult<Option<Bound<'py, PyAny>>> {
        let blocks = self.blocks.bind(py);
        while let Some(&(at, number)) = tables.front.back() {
            if let Some(&naming) = tables.named.get(&at).filter(|naming| naming.number == number) {
                let block = blocks.get_item(at as usize)?;
                if is_queued(&block)? && self.key_of(&block)? == Some(naming.key) {
                    return Ok(Some(block));
                }
                tables.unname(at);
            }
            tables.front.pop_back();
        }
        Ok(None)
    }

    /// The next blocks of the queue behind `last`.
    fn in_queue_order<'py>(
        &self,
        last: &Bound<'py, PyAny>,
        want: usize,
        spare: &[u32],
        tables: &Blocks,
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
            if !spare.contains(&id) && !tables.is_named(id) {
                let key = self.key_of(&block)?.unwrap_or(0);
                victims.push(Candidate { block, next: next.clone(), id, key });
            }
            block = next;
        }
        Ok(victims)
    }

    /// Second copies of other blocks, as far as they can go.
    fn second_copies<'py>(
        &mut self,
        py: Python<'py>,
        want: usize,
        spare: &[u32],
        tables: &mut Blocks,
    ) -> PyResult<Vec<Candidate<'py>>> {
        let blocks = self.blocks.bind(py).clone();
        let mut victims: Vec<Candidate<'py>> = Vec::with_capacity(want);
        let mut in_use = 0;
        for _ in 0..tables.duplicates.len().min(want) {
            let Some(id) = tables.duplicates.pop_front() else { break };
            let block = blocks.get_item(id as usize)?;
            let Some(key) = self.key_of(&block)? else { continue };
            if tables.known.get(&key) == Some(&id) {
                continue;
            }
            match behind(&block)? {
                None => {
                    // Still in use; it will be free some day. A few are enough to see: copies of a system prompt always are.
                    tables.goes_first(id);
                    in_use += 1;
                    if in_use == FEW {
                        break;
                    }
                }
                Some(next) if !tables.is_named(id) && !spare.contains(&id) && !victims.iter().any(|v| v.id == id) => {
                    victims.push(Candidate { block, next, id, key });
                    self.duplicate_blocks += 1;
                }
                Some(_) => {}
            }
        }
        Ok(victims)
    }

    /// What the policy names, as far as it can go; duplicates first.
    fn victims<'py>(
        &mut self,
        py: Python<'py>,
        (want, must): (usize, usize),
        now_us: u64,
        spare: &[u32],
        tables: &Mutex<Blocks>,
        mut ask: Option<&mut Ask<'_>>,
    ) -> PyResult<Vec<Candidate<'py>>> {
        let of_blocks = || tables.lock().unwrap_or_else(PoisonError::into_inner);
        let blocks = self.blocks.bind(py).clone();
        let mut victims = self.second_copies(py, want, spare, &mut of_blocks())?;
        // A block that were linked in twice would cut the queue in two.
        let (mut seen, mut asked) = (std::mem::take(&mut self.seen), std::mem::take(&mut self.asked));
        seen.clear();
        seen.extend(victims.iter().map(|victim| victim.id));
        for _ in 0..ROUNDS {
            let short = want.saturating_sub(victims.len());
            if short == 0 {
                break;
            }
            asked.clear();
            let none = if let Some(ask) = &mut ask {
                ask(short, must.saturating_sub(victims.len()), &mut asked)?;
                asked.is_empty()
            } else {
                self.ask(py, short, now_us)?;
                let mut tables = of_blocks();
                // In rounds: the loads of each are independent and overlap.
                tables.look_for(&self.keys);
                for &key in &self.keys {
                    match tables.take(key) {
                        Some(id) => asked.push((id, key)),
                        None => self.stale_blocks += 1,
                    }
                }
                self.keys.is_empty()
            };
            if none {
                break;
            }
            let mut named: Vec<(Bound<'py, PyAny>, u32, u64)> = Vec::with_capacity(asked.len());
            for &(id, key) in &asked {
                named.push((blocks.get_item(id as usize)?, id, key));
            }
            let slot = self.hash_slot.bind(py);
            let hashes = named.iter().map(|(block, ..)| block.getattr(slot)).collect::<PyResult<Vec<_>>>()?;
            let mut tables = of_blocks();
            for ((block, id, key), hash) in named.into_iter().zip(&hashes) {
                if key_in(hash)? != Some(key) {
                    // The engine has reused the block meanwhile.
                    self.stale_blocks += 1;
                    continue;
                }
                match behind(&block)? {
                    // Named before the engine has released it: next time.
                    None => tables.goes_first(id),
                    Some(next) if !spare.contains(&id) && !tables.is_named(id) && seen.insert(id) => {
                        victims.push(Candidate { block, next, id, key });
                    }
                    Some(_) => {}
                }
            }
        }
        (self.seen, self.asked) = (seen, asked);
        Ok(victims)
    }

    /// Asks for `n` keys. What is no key counts as stale.
    fn ask(&mut self, py: Python<'_>, n: usize, now_us: u64) -> PyResult<()> {
        let keys = &mut self.keys;
        keys.clear();
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
