//! vLLM's free queue: how victims get to its head.
//!
//! vLLM allocates from the head of `BlockPool.free_block_queue`, a doubly linked list of Python objects. Victims are linked
//! in behind those named before (the *front*); blocks without a hash, which vLLM itself puts at the head, stay before
//! both. Runs of victims that are neighbours already, as the blocks of one request are after vLLM has freed them, move in
//! one piece.
//!
//! Invariants: everything is read and checked before the first link is written; links are written through the blocks'
//! own slots; every block in the queue stays in it, and their number does not change. A victim is moved only if it is
//! what its key says *now*: it carries that hash, nobody uses it, it is queued.
//!
//! Cost: a prepared front is found again in a few attribute reads, whatever its length; a victim costs some ten of them.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyString};

use super::blocks::{tail, Blocks, KeyHash, GROUP_BYTES};
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

/// Who names victims.
enum Source {
    /// Nobody: the queue's own order.
    Queue,
    /// The runtime's policies.
    Runtime(Py<Runtime>),
    /// Python: `evict(n, now_us)` returns keys.
    Callable(Py<PyAny>),
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
    pub(super) stale_blocks: u64,
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
pub(super) struct Ahead {
    pub(super) most: usize,
    /// Whether nothing else has happened in this step: then is the time to put them in place. Where hardly any are left,
    /// other steps do it as well, or the next arrivals find none.
    pub(super) quiet: bool,
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
pub(super) type Ask<'a> = dyn FnMut(usize, usize, &mut Vec<(u32, u64)>) -> PyResult<()> + 'a;

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
        self.tables().n_named()
    }

    /// Keys whose block is known.
    #[getter]
    fn known_blocks(&self) -> usize {
        self.tables().n_known()
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
    pub(super) fn share(&self) -> Arc<Mutex<Blocks>> {
        Arc::clone(&self.tables)
    }

    pub(super) fn tables(&self) -> MutexGuard<'_, Blocks> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As `clear` of Python.
    pub(super) fn forget_all(&self) {
        self.tables().forget_all();
    }

    /// The same, where whoever shares the tables may never let go of them.
    pub(super) fn forsake(&mut self, py: Python<'_>) {
        self.tables = Arc::new(Mutex::new(Blocks::new(self.blocks.bind(py).len(), self.null_block)));
    }

    /// After a time in which nobody was told anything: what the queue holds, oldest first, goes before what the policy
    /// names. Nobody else would ever name it, and what is known would have to live on the room that is left.
    pub(super) fn strangers_first(&self, py: Python<'_>) -> PyResult<()> {
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
    pub(super) fn has_named(&self) -> bool {
        self.tables().n_named() > 0
    }

    /// Whether blocks with these keys may be among the named ones, or be named by whoever names.
    pub(super) fn may_spare(&self, keys: &[u64]) -> bool {
        let tables = self.tables();
        match self.source {
            _ if tables.n_named() == 0 => false,
            // The runtime names nothing below what it does not hold. (What goes before its victims may be hit: then there is a
            // block too few, and the engine takes the next one in its own order.)
            Source::Runtime(_) => keys.iter().any(|&key| tables.named_at(key).is_some()),
            _ => true,
        }
    }

    /// Blocks that are named under these keys.
    pub(super) fn named(&self, keys: &[u64]) -> Vec<u32> {
        let tables = self.tables();
        if tables.n_named() == 0 {
            return Vec::new();
        }
        keys.iter().filter_map(|&key| tables.named_at(key)).collect()
    }

    /// Named blocks with these keys are in use again: no victims any more.
    pub(super) fn in_use(&self, keys: &[u64]) {
        self.tables().in_use(keys);
    }

    /// As `prepare` of Python.
    pub(super) fn prepare_now(&mut self, py: Python<'_>, n: usize, now_us: u64, spare: &[u32]) -> PyResult<usize> {
        self.prepare_asking(py, n, now_us, spare, None)
    }

    /// The same, where somebody else is asked for victims, and some are to stand ready beyond `n`.
    pub(super) fn prepare_asking(
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
            ready += of_blocks().n_named();
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
        while let Some((id, key)) = tables.last_named() {
            let block = blocks.get_item(id as usize)?;
            if is_queued(&block)? && self.key_of(&block)? == Some(key) {
                return Ok(Some(block));
            }
            tables.unname(id);
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
        for _ in 0..tables.n_going_first().min(want) {
            let Some(id) = tables.next_going_first() else { break };
            let block = blocks.get_item(id as usize)?;
            let Some(key) = self.key_of(&block)? else { continue };
            if tables.is_known_at(key, id) {
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
