//! `Runtime`, `Workload` and `Session` for Python: the four calls on frozen objects that any thread may use.
//!
//! Two doors for batches: `observe` takes one numpy array per field and copies nothing, `observe_lists` takes lists.
//! Arguments are checked before the core is entered, so that a refused call has changed nothing. Work that takes longer
//! than some tens of microseconds runs without the interpreter's lock.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use numpy::prelude::*;
use numpy::{PyArray1, PyUntypedArray};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PySlice, PyString, PyTuple, PyType};
use runtime_core::ids::{mix, AgentId, WorkloadId};
use runtime_core::kv::{self, Expected};
use runtime_core::policy::{built_in, Action, Event, Kind, Policies, Policy, Request, BUILT_IN};
use runtime_core::runtime::{EventKind, Events, Observed, Options, Scoring};

use crate::clock::Clock;
use crate::convert::{
    array, integer, key_of, kind_of, list, microseconds, output, output_rows, session_key, type_error, value_error,
    Keys,
};
use crate::errors::{from_core, BadOptionError, NoMemoryError, OutOfRangeError, UnknownPolicyError};
use crate::live_policy::{LivePolicy, Trouble};

/// Items (events, blocks) of one call from which on it runs without the interpreter's lock.
const DETACH_ITEMS: usize = 8192;
/// Victims of one call from which on it does.
const DETACH_VICTIMS: usize = 1024;
/// Steps and candidates of the longest prediction: 6 steps of 7 agents.
const MAX_STEPS: usize = 6;
const MAX_PREDICTIONS: usize = MAX_STEPS * 8;

/// Names and their numbers, dense from 0.
#[derive(Default)]
struct Interner {
    numbers: HashMap<String, u16>,
    names: Vec<String>,
}

/// Interned agents and tools of one workload.
#[derive(Default)]
struct Names {
    agents: RwLock<Interner>,
    tools: RwLock<Interner>,
}

/// The number of `name`, given if it is new.
fn intern(names: &RwLock<Interner>, name: &str, what: &str) -> PyResult<u16> {
    let known = names.read().unwrap_or_else(PoisonError::into_inner).numbers.get(name).copied();
    if let Some(number) = known {
        return Ok(number);
    }
    const MAX_NAMES: usize = AgentId::UNKNOWN.0 as usize - 1;
    let mut names = names.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(&number) = names.numbers.get(name) {
        return Ok(number);
    }
    let number = names.names.len();
    if number == MAX_NAMES {
        return Err(OutOfRangeError::new_err((format!("number of {what} names"), 0, MAX_NAMES, MAX_NAMES + 1)));
    }
    names.names.push(name.to_owned());
    names.numbers.insert(name.to_owned(), number as u16);
    Ok(number as u16)
}

/// The names of all workloads, by workload id.
#[derive(Default)]
pub(crate) struct NameTable(RwLock<Vec<Arc<Names>>>);

impl NameTable {
    fn of(&self, workload: WorkloadId) -> Arc<Names> {
        let at = workload.0 as usize;
        if let Some(names) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(at) {
            return Arc::clone(names);
        }
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        while all.len() <= at {
            all.push(Arc::default());
        }
        Arc::clone(&all[at])
    }

    /// The name of an agent; its number where it was never named.
    pub(crate) fn agent(&self, workload: WorkloadId, agent: u16) -> String {
        agent_name(&self.of(workload), agent)
    }
}

fn agent_name(names: &Names, agent: u16) -> String {
    let agents = names.agents.read().unwrap_or_else(PoisonError::into_inner);
    agents.names.get(usize::from(agent)).map_or_else(|| agent.to_string(), Clone::clone)
}

/// Counts since the runtime was made.
#[derive(Default)]
struct Counts {
    events: AtomicU64,
    calls: AtomicU64,
    prompt_blocks: AtomicU64,
    hit_blocks: AtomicU64,
    evicted_blocks: AtomicU64,
    missing_victims: AtomicU64,
}

pub(crate) struct Shared {
    pub(crate) core: runtime_core::Runtime,
    pub(crate) policies: Policies,
    pub(crate) names: Arc<NameTable>,
    trouble: Arc<Trouble>,
    counts: Counts,
    clock: Clock,
}

impl Shared {
    pub(crate) fn time_us(&self, time: Option<f64>) -> PyResult<u64> {
        match time {
            Some(seconds) => microseconds(seconds),
            None => Ok(self.clock.now_us()),
        }
    }

    /// Raises Ctrl-C if it came while a policy ran.
    fn interrupted(&self) -> PyResult<()> {
        match self.trouble.interrupt.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(interrupt) => Err(interrupt),
            None => Ok(()),
        }
    }

    fn feed(&self, py: Python<'_>, workload: WorkloadId, events: &Events<'_>) -> PyResult<Observed> {
        self.feed_scoring(py, workload, events, Scoring::Now)
    }

    fn feed_scoring(
        &self,
        py: Python<'_>,
        workload: WorkloadId,
        events: &Events<'_>,
        scoring: Scoring,
    ) -> PyResult<Observed> {
        let observe = || self.core.observe_scoring(workload, events, scoring, |_, _| {}).map_err(refused);
        let observed = if self.policies.listens() {
            let mut hits = Vec::new();
            let observed =
                self.core.observe_scoring(workload, events, scoring, |i, hit| hits.push((i, hit))).map_err(refused)?;
            let mut hits = hits.into_iter().peekable();
            for (i, &code) in events.kinds.iter().enumerate() {
                let Some(kind) = EventKind::from_code(code) else { continue };
                let span = |i: usize| events.offsets.get(i).map_or(0, |&offset| offset as usize);
                let blocks = events.blocks.get(span(i)..span(i + 1)).unwrap_or(&[]);
                let hit = hits.next_if(|&(at, _)| at == i).map_or(0, |(_, hit)| hit.min(blocks.len()));
                let (session, agent) = (events.sessions[i], events.agents[i]);
                let (call, time_us) = (events.calls[i], events.times_us[i]);
                self.policies
                    .observe(&self.core, &Event { workload, kind, session, agent, call, time_us, blocks, hit });
            }
            self.interrupted()?;
            observed
        } else if events.kinds.len() + events.blocks.len() >= DETACH_ITEMS {
            py.detach(observe)?
        } else {
            observe()?
        };
        self.count(events, &observed);
        Ok(observed)
    }

    /// Counts what the core has observed.
    pub(crate) fn count(&self, events: &Events<'_>, observed: &Observed) {
        let calls: u64 = events.kinds.iter().map(|&kind| u64::from(kind == EventKind::CallStart as u8)).sum();
        self.counts.events.fetch_add(observed.events as u64, Relaxed);
        self.counts.calls.fetch_add(calls, Relaxed);
        self.counts.prompt_blocks.fetch_add(observed.prompt_blocks, Relaxed);
        self.counts.hit_blocks.fetch_add(observed.hit_blocks, Relaxed);
    }

    /// Appends the keys of `n` victims.
    pub(crate) fn name_victims(&self, n: usize, now_us: u64, keys: &mut Vec<u64>) -> Result<(), runtime_core::Error> {
        let n = n.min(self.core.options().pool_blocks);
        let request = Request { kind: Kind::Evict, n, now_us };
        let before = keys.len();
        let mut take = |action: Action| {
            if let Action::Evicted(victim) = action {
                keys.push(victim.key());
            }
        };
        let done = self.policies.act(&self.core, &request, &mut take);
        let filled = keys.len() - before;
        self.counts.evicted_blocks.fetch_add(filled as u64, Relaxed);
        self.counts.missing_victims.fetch_add((n - filled) as u64, Relaxed);
        done.map(drop)
    }

    /// Whether `kv_cache` is all there is: no policy that needs the interpreter, none that is asked by step.
    fn is_plain(&self) -> bool {
        let mut names = self.policies.about().map(|about| about.name);
        names.next().as_deref() == Some("kv_cache") && names.next().is_none()
    }
}

/// What the core found wrong with a batch, said in terms of the arrays.
fn refused(error: runtime_core::Error) -> PyErr {
    use runtime_core::Error::OutOfRange;
    match error {
        OutOfRange { what: "offset", min, max, requested } => value_error(
            "offsets",
            format!("has {requested} where {min} to {max} is possible"),
            "offsets start each event's blocks, never decrease, and end within len(blocks)".into(),
        ),
        OutOfRange { what: "event kind", requested, .. } => {
            value_error("kinds", format!("has the unknown kind {requested}"), "pass codes of agentrt.EventKind".into())
        }
        error => from_core(error),
    }
}

fn same_length(name: &str, len: usize, expected: usize, per: &str) -> PyResult<()> {
    if len == expected {
        return Ok(());
    }
    Err(value_error(name, format!("has {len} items, expected {expected}"), per.into()))
}

/// One value per field of the events.
struct Batch<'a> {
    kinds: &'a [u8],
    sessions: &'a [u64],
    agents: &'a [u16],
    calls: &'a [u64],
    times_us: &'a [u64],
    offsets: &'a [u32],
    blocks: &'a [u64],
}

impl<'a> Batch<'a> {
    fn check(self) -> PyResult<Events<'a>> {
        let Self { kinds, sessions, agents, calls, times_us, offsets, blocks } = self;
        let n = kinds.len();
        let per = "pass one item per event, as many as in `kinds`";
        same_length("sessions", sessions.len(), n, per)?;
        same_length("agents", agents.len(), n, per)?;
        same_length("calls", calls.len(), n, per)?;
        same_length("times_us", times_us.len(), n, per)?;
        if offsets.is_empty() {
            same_length("blocks", blocks.len(), 0, "pass `offsets` to say which event each block belongs to")?;
        } else {
            same_length("offsets", offsets.len(), n + 1, "pass one item per event and one for the end")?;
        }
        Ok(Events { kinds, sessions, agents, calls, times_us, offsets, blocks })
    }
}

/// A 64-bit block key for an engine's hash.
#[pyfunction]
#[pyo3(signature = (digest, /))]
pub(crate) fn block_key(digest: &Bound<'_, PyAny>) -> PyResult<u64> {
    if let Ok(bytes) = digest.cast::<PyBytes>() {
        return Ok(key_of(bytes.as_bytes()));
    }
    let problem = format!("is a {}, expected bytes", kind_of(digest));
    Err(type_error("digest", problem, "pass the engine's hash as bytes; 64-bit integers are keys already".into()))
}

/// A guess about a session's future.
#[pyclass(frozen, get_all, module = "agentrt._core")]
pub(crate) struct Prediction {
    /// Name of the agent.
    agent: String,
    /// Its number.
    agent_id: u16,
    /// Which of the session's next calls, from 1.
    step: u8,
    /// P(that call is made, and by this agent).
    probability: f32,
    /// Median seconds until then.
    median_s: f32,
}

#[pymethods]
impl Prediction {
    fn __repr__(&self) -> String {
        let Self { agent, agent_id, step, probability, median_s } = self;
        format!(
            "Prediction(agent={agent:?}, agent_id={agent_id}, step={step}, probability={probability:.3}, \
             median_s={median_s:.3})"
        )
    }
}

/// A session that is expected to call soon and whose blocks are worth bringing back.
#[pyclass(frozen, get_all, module = "agentrt._core")]
pub(crate) struct Prefetch {
    /// Name of the workload.
    workload: String,
    /// Key of the session.
    session: u64,
    /// Name of the agent.
    agent: String,
    /// Its number.
    agent_id: u16,
    /// The call has arrived and waits: its prompt is wanted. Else the agent's last one, as it will probably come again.
    waits: bool,
    /// P(the session's next call is made, and by this agent).
    probability: f32,
    /// Hits per second that holding one block of that prompt promises.
    score: f32,
    /// Blocks that can be brought back without displacing what is worth more.
    room: u32,
}

#[pymethods]
impl Prefetch {
    fn __repr__(&self) -> String {
        let Self { workload, session, agent, agent_id, waits, probability, score, room } = self;
        let waits = if *waits { "True" } else { "False" };
        format!(
            "Prefetch(workload={workload:?}, session={session}, agent={agent:?}, agent_id={agent_id}, waits={waits}, \
             probability={probability:.3}, score={score:.3e}, room={room})"
        )
    }
}

/// Learned state, sessions and residency index of one engine's block pool.
#[pyclass(frozen, module = "agentrt._core")]
pub(crate) struct Runtime {
    pub(crate) shared: Arc<Shared>,
}

fn policies(
    given: Option<&Bound<'_, PyAny>>,
    names: &Arc<NameTable>,
    trouble: &Arc<Trouble>,
) -> PyResult<Vec<Box<dyn Policy>>> {
    let Some(given) = given else { return Ok(built_in(BUILT_IN[0]).into_iter().collect()) };
    let bad = |problem: String| {
        let remedy = "pass a tuple of names and policy objects, for example (MyPolicy(), 'kv_cache')";
        BadOptionError::new_err(("policies".to_owned(), problem, remedy.to_owned()))
    };
    if given.cast::<PyString>().is_ok() {
        return Err(bad("is a string, expected a sequence".into()));
    }
    let mut list: Vec<Box<dyn Policy>> = Vec::new();
    for item in given.try_iter().map_err(|_| bad(format!("is a {}, expected a sequence", kind_of(given))))? {
        let item = item?;
        if let Ok(name) = item.cast::<PyString>() {
            let name = name.to_cow()?;
            list.push(
                built_in(&name).ok_or_else(|| UnknownPolicyError::new_err((name.into_owned(), BUILT_IN.join(", "))))?,
            );
            continue;
        }
        // A class stands for an object of it, as in the replay.
        let object = if item.cast::<PyType>().is_ok() { item.call0()? } else { item };
        let name = kind_of(&object);
        for method in ["call_start", "call_finish", "evict"] {
            if !object.getattr_opt(method)?.is_some_and(|method| method.is_callable()) {
                return Err(bad(format!("{name} has no method {method}()")));
            }
        }
        list.push(Box::new(LivePolicy::new(name, object.unbind(), Arc::clone(names), Arc::clone(trouble))));
    }
    if list.is_empty() {
        return Err(bad("is empty".into()));
    }
    Ok(list)
}

#[pymethods]
impl Runtime {
    #[new]
    #[pyo3(
        signature = (pool_blocks, sessions = None, policies = None),
        text_signature = "(pool_blocks, sessions=4096, policies=None)"
    )]
    fn new(
        py: Python<'_>,
        pool_blocks: &Bound<'_, PyAny>,
        sessions: Option<&Bound<'_, PyAny>>,
        policies: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let pool_blocks = integer("pool_blocks", 1, 1 << 31, pool_blocks)? as usize;
        let mut options = Options::for_pool(pool_blocks);
        if let Some(sessions) = sessions {
            options.sessions = integer("sessions", 8, 1 << 24, sessions)? as usize;
        }
        // The core allocates at once and cannot report failure: ask first.
        let needed = pool_blocks * 40 + options.sessions * 320 + (1 << 20);
        if Vec::<u8>::new().try_reserve_exact(needed).is_err() {
            return Err(NoMemoryError::new_err((pool_blocks, needed)));
        }
        let (names, trouble) = (Arc::<NameTable>::default(), Arc::<Trouble>::default());
        let list = self::policies(policies, &names, &trouble)?;
        let core = py.detach(|| runtime_core::Runtime::new(options)).map_err(from_core)?;
        let shared = Shared {
            core,
            policies: Policies::new(list),
            names,
            trouble,
            counts: Counts::default(),
            clock: Clock::new(py)?,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The workload called `name`, made if it is new.
    #[pyo3(signature = (name, /))]
    fn workload(&self, name: &str) -> PyResult<Workload> {
        let id = self.shared.core.workload(name).map_err(from_core)?;
        Ok(Workload { shared: Arc::clone(&self.shared), id, names: self.shared.names.of(id), name: name.to_owned() })
    }

    /// Hits per second that holding each block promises; 0 where it is not resident.
    #[pyo3(signature = (blocks, out = None, /))]
    fn score<'py>(
        &self,
        py: Python<'py>,
        blocks: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let keys = Keys::new("blocks", blocks)?;
        let keys = keys.as_slice();
        let score = |scores: &mut [f32]| {
            if keys.len() >= DETACH_ITEMS {
                py.detach(|| self.shared.core.score_blocks(keys, scores));
            } else {
                self.shared.core.score_blocks(keys, scores);
            }
        };
        if let Some(out) = out {
            let mut scores = output::<f32>("out", out, keys.len())?;
            score(scores.as_slice_mut()?);
            return Ok(out.clone());
        }
        let scores = PyArray1::<f32>::zeros(py, keys.len(), false);
        score(scores.try_readwrite()?.as_slice_mut()?);
        Ok(scores.into_any())
    }

    /// Decides: keys of blocks to evict, or sessions to prefetch for.
    #[pyo3(signature = (kind, n, out = None, time = None))]
    fn act<'py>(
        &self,
        py: Python<'py>,
        kind: &str,
        n: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        time: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let now_us = self.shared.time_us(time)?;
        let n = (integer("n", 0, u64::MAX, n)?).min(self.shared.core.options().pool_blocks as u64) as usize;
        match kind {
            "evict" => self.evict(py, n, out, now_us),
            "prefetch" => self.prefetch(py, n, now_us),
            _ => Err(BadOptionError::new_err((
                "kind".to_owned(),
                format!("`{kind}` is not a kind of decision"),
                "choose evict or prefetch".to_owned(),
            ))),
        }
    }

    /// Bytes of learned state, residency index and sessions.
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let memory = self.shared.core.memory().map_err(from_core)?;
        let dict = PyDict::new(py);
        dict.set_item("state_bytes_per_workload", memory.state_bytes)?;
        dict.set_item("index_bytes", memory.index_bytes)?;
        dict.set_item("session_bytes", memory.session_bytes)?;
        Ok(dict)
    }

    /// Oddities of the input that were repaired, by kind.
    fn repairs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let repairs = self.shared.core.repairs().map_err(from_core)?;
        let dict = PyDict::new(py);
        dict.set_item("backward_clock", repairs.backward_clock)?;
        dict.set_item("untracked_calls", repairs.untracked_calls)?;
        dict.set_item("untracked_blocks", repairs.untracked_blocks)?;
        dict.set_item("forgotten_blocks", repairs.forgotten_blocks)?;
        dict.set_item("unknown_calls", repairs.unknown_calls)?;
        dict.set_item("duplicate_calls", repairs.duplicate_calls)?;
        Ok(dict)
    }

    /// Counts since the runtime was made.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (shared, counts) = (&self.shared, &self.shared.counts);
        let dict = PyDict::new(py);
        dict.set_item("events", counts.events.load(Relaxed))?;
        dict.set_item("calls", counts.calls.load(Relaxed))?;
        dict.set_item("prompt_blocks", counts.prompt_blocks.load(Relaxed))?;
        dict.set_item("hit_blocks", counts.hit_blocks.load(Relaxed))?;
        dict.set_item("evicted_blocks", counts.evicted_blocks.load(Relaxed))?;
        dict.set_item("missing_victims", counts.missing_victims.load(Relaxed))?;
        dict.set_item("sessions", shared.core.known_sessions())?;
        dict.set_item("resident_blocks", shared.core.resident_blocks().map_err(from_core)?)?;
        dict.set_item("lru_takeovers", shared.core.takeovers().map_err(from_core)?)?;
        dict.set_item("refused_victims", shared.policies.refused_victims())?;
        dict.set_item("policy_errors", shared.trouble.errors.load(Relaxed))?;
        dict.set_item("policy_untracked_calls", shared.trouble.untracked.load(Relaxed))?;
        Ok(dict)
    }

    /// Blocks of the pool.
    #[getter]
    fn pool_blocks(&self) -> usize {
        self.shared.core.options().pool_blocks
    }

    /// Names of the active policies, in the order in which they are asked.
    #[getter]
    fn policies<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.shared.policies.about().map(|about| about.name.into_owned()).collect::<Vec<_>>())
    }

    fn __repr__(&self) -> String {
        let options = self.shared.core.options();
        let (blocks, sessions) = (options.pool_blocks, options.sessions);
        format!("Runtime(pool_blocks={blocks}, sessions={sessions}, policies={:?})", self.shared.policies)
    }
}

impl Runtime {
    /// Appends the keys of `n` victims; for callers in this crate that hold no Python array.
    pub(crate) fn name_victims(&self, n: usize, now_us: u64, keys: &mut Vec<u64>) -> PyResult<()> {
        self.shared.name_victims(n, now_us, keys).map_err(from_core)?;
        self.shared.interrupted()
    }

    fn evict<'py>(
        &self,
        py: Python<'py>,
        n: usize,
        out: Option<&Bound<'py, PyAny>>,
        now_us: u64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let shared = &*self.shared;
        let request = Request { kind: Kind::Evict, n, now_us };
        // Writes victims to `slots`; Python policies may run, so nothing of Python is locked meanwhile.
        let fill = |slots: &mut [u64]| -> PyResult<usize> {
            let mut filled = 0;
            let mut take = |action: Action| {
                if let Action::Evicted(victim) = action {
                    slots[filled] = victim.key();
                    filled += 1;
                }
            };
            if n >= DETACH_VICTIMS {
                py.detach(|| shared.policies.act(&shared.core, &request, &mut take)).map_err(from_core)?;
            } else {
                shared.policies.act(&shared.core, &request, &mut take).map_err(from_core)?;
            }
            shared.counts.evicted_blocks.fetch_add(filled as u64, Relaxed);
            shared.counts.missing_victims.fetch_add((n - filled) as u64, Relaxed);
            Ok(filled)
        };
        let (keys, filled) = if let Some(out) = out {
            let mut slots = output::<u64>("out", out, n)?;
            (out.clone(), fill(slots.as_slice_mut()?)?)
        } else {
            let mut slots = vec![0; n];
            let filled = fill(&mut slots)?;
            slots.truncate(filled);
            (PyArray1::from_vec(py, slots).into_any(), filled)
        };
        shared.interrupted()?;
        if keys.len()? == filled {
            return Ok(keys);
        }
        keys.get_item(PySlice::new(py, 0, filled as isize, 1))
    }

    fn prefetch<'py>(&self, py: Python<'py>, n: usize, now_us: u64) -> PyResult<Bound<'py, PyAny>> {
        let shared = &*self.shared;
        let mut expected: Vec<Expected> = Vec::new();
        let request = Request { kind: Kind::Prefetch, n, now_us };
        shared
            .policies
            .act(&shared.core, &request, &mut |action| {
                if let Action::Prefetch(one) = action {
                    expected.push(one);
                }
            })
            .map_err(from_core)?;
        let named = |one: Expected| Prefetch {
            workload: shared.core.workload_name(WorkloadId(one.workload)).unwrap_or_default().to_owned(),
            session: one.session,
            agent: shared.names.agent(WorkloadId(one.workload), one.agent),
            agent_id: one.agent,
            waits: one.waits,
            probability: one.probability,
            score: one.score,
            room: one.room,
        };
        Ok(expected.into_iter().map(named).collect::<Vec<_>>().into_pyobject(py)?.into_any())
    }
}

/// One application on one model: its agents and what was learned of them.
#[pyclass(frozen, module = "agentrt._core")]
pub(crate) struct Workload {
    shared: Arc<Shared>,
    id: WorkloadId,
    names: Arc<Names>,
    name: String,
}

impl Workload {
    /// Feeds events of an engine's step; for callers in this crate. Returns the resident blocks of the calls that start.
    pub(crate) fn feed_by_step(&self, py: Python<'_>, events: &Events<'_>) -> PyResult<u64> {
        Ok(self.shared.feed_scoring(py, self.id, events, Scoring::ByStep)?.hit_blocks)
    }

    /// What a thread beside the engine's needs; None where a policy needs more than the core.
    pub(crate) fn plain(&self) -> Option<(Arc<Shared>, WorkloadId)> {
        self.shared.is_plain().then(|| (Arc::clone(&self.shared), self.id))
    }

    /// That step has ended.
    pub(crate) fn settle_step(&self, now_us: u64) -> PyResult<()> {
        self.shared.core.settle_step(now_us).map_err(from_core)
    }
}

#[pymethods]
impl Workload {
    /// The session called `name`: any string or 64-bit integer.
    #[pyo3(signature = (name, /))]
    fn session(&self, name: &Bound<'_, PyAny>) -> PyResult<Session> {
        let key = session_key(name)?;
        Ok(Session { shared: Arc::clone(&self.shared), workload: self.id, names: Arc::clone(&self.names), key })
    }

    /// The number of the agent called `name`, given if it is new.
    #[pyo3(signature = (name, /))]
    fn agent(&self, name: &str) -> PyResult<u16> {
        intern(&self.names.agents, name, "agent")
    }

    /// The name of an agent; its number as text where it was never named.
    #[pyo3(signature = (agent, /))]
    fn agent_name(&self, agent: u16) -> String {
        agent_name(&self.names, agent)
    }

    /// The number of the tool called `name`, from 1.
    #[pyo3(signature = (name, /))]
    fn tool(&self, name: &str) -> PyResult<u16> {
        intern(&self.names.tools, name, "tool").map(|number| number + 1)
    }

    /// Feeds a batch of events, one array per field.
    #[pyo3(signature = (kinds, sessions, agents, calls, times_us, offsets = None, blocks = None, /))]
    #[expect(clippy::too_many_arguments, reason = "one argument per field of an event")]
    fn observe(
        &self,
        py: Python<'_>,
        kinds: &Bound<'_, PyAny>,
        sessions: &Bound<'_, PyAny>,
        agents: &Bound<'_, PyAny>,
        calls: &Bound<'_, PyAny>,
        times_us: &Bound<'_, PyAny>,
        offsets: Option<&Bound<'_, PyAny>>,
        blocks: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let kinds = array::<u8>("kinds", kinds)?;
        let sessions = array::<u64>("sessions", sessions)?;
        let agents = array::<u16>("agents", agents)?;
        let calls = array::<u64>("calls", calls)?;
        let times_us = array::<u64>("times_us", times_us)?;
        let offsets = offsets.map(|offsets| array::<u32>("offsets", offsets)).transpose()?;
        let blocks = blocks.map(|blocks| array::<u64>("blocks", blocks)).transpose()?;
        let events = Batch {
            kinds: kinds.as_slice()?,
            sessions: sessions.as_slice()?,
            agents: agents.as_slice()?,
            calls: calls.as_slice()?,
            times_us: times_us.as_slice()?,
            offsets: offsets.as_ref().map_or(Ok(&[][..]), |offsets| offsets.as_slice())?,
            blocks: blocks.as_ref().map_or(Ok(&[][..]), |blocks| blocks.as_slice())?,
        };
        Ok(self.shared.feed(py, self.id, &events.check()?)?.hit_blocks)
    }

    /// Feeds one event; as `observe` with one item per field.
    #[pyo3(signature = (kind, session, agent, call, time_us, blocks = None, /))]
    #[expect(clippy::too_many_arguments, reason = "one argument per field of an event")]
    fn observe_one(
        &self,
        py: Python<'_>,
        kind: u8,
        session: u64,
        agent: u16,
        call: u64,
        time_us: u64,
        blocks: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let blocks = blocks.map(|blocks| array::<u64>("blocks", blocks)).transpose()?;
        let events = Batch {
            kinds: &[kind],
            sessions: &[session],
            agents: &[agent],
            calls: &[call],
            times_us: &[time_us],
            offsets: &[0, blocks.as_ref().map_or(0, |blocks| blocks.len() as u32)],
            blocks: blocks.as_ref().map_or(Ok(&[][..]), |blocks| blocks.as_slice())?,
        };
        Ok(self.shared.feed(py, self.id, &events.check()?)?.hit_blocks)
    }

    /// Feeds a batch of events, one list per field; `blocks` holds a list of keys, or None, per event.
    #[pyo3(signature = (kinds, sessions, agents, calls, times_us, blocks = None, /))]
    #[expect(clippy::too_many_arguments, reason = "one argument per field of an event")]
    fn observe_lists(
        &self,
        py: Python<'_>,
        kinds: &Bound<'_, PyAny>,
        sessions: &Bound<'_, PyAny>,
        agents: &Bound<'_, PyAny>,
        calls: &Bound<'_, PyAny>,
        times_us: &Bound<'_, PyAny>,
        blocks: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        const DOOR: &str = "Workload.observe";
        let kinds: Vec<u8> = list("kinds", kinds, DOOR)?;
        let sessions: Vec<u64> = list("sessions", sessions, DOOR)?;
        let agents: Vec<u16> = list("agents", agents, DOOR)?;
        let calls: Vec<u64> = list("calls", calls, DOOR)?;
        let times_us: Vec<u64> = list("times_us", times_us, DOOR)?;
        let (mut offsets, mut keys): (Vec<u32>, Vec<u64>) = (Vec::new(), Vec::new());
        if let Some(blocks) = blocks {
            if blocks.cast::<PyUntypedArray>().is_ok() {
                return Err(type_error(
                    "blocks",
                    "is a numpy array, expected a list".into(),
                    format!("pass arrays to {DOOR}"),
                ));
            }
            let per_event = blocks.try_iter().map_err(|_| {
                let problem = format!("is a {}, expected a list", kind_of(blocks));
                type_error("blocks", problem, "pass one list of keys, or None, per event".into())
            })?;
            offsets.push(0);
            for (i, one) in per_event.enumerate() {
                let one = one?;
                if !one.is_none() {
                    keys.extend_from_slice(Keys::new(&format!("blocks[{i}]"), &one)?.as_slice());
                }
                offsets.push(u32::try_from(keys.len()).map_err(|_| {
                    let problem = format!("has {} keys", keys.len());
                    value_error("blocks", problem, "pass fewer than 2^32 keys in one batch".into())
                })?);
            }
            same_length("blocks", offsets.len() - 1, kinds.len(), "pass one list of keys, or None, per event")?;
        }
        let events = Batch {
            kinds: &kinds,
            sessions: &sessions,
            agents: &agents,
            calls: &calls,
            times_us: &times_us,
            offsets: &offsets,
            blocks: &keys,
        };
        Ok(self.shared.feed(py, self.id, &events.check()?)?.hit_blocks)
    }

    /// Predicts into rows (agent, step, probability, median seconds); returns how many were filled.
    #[pyo3(signature = (session, steps, out, /))]
    fn predict_into(&self, session: u64, steps: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<usize> {
        let steps = integer("steps", 1, MAX_STEPS as u64, steps)? as usize;
        let mut rows = output_rows("out", out)?;
        let mut predictions = [NO_PREDICTION; MAX_PREDICTIONS];
        let rows = rows.as_slice_mut()?;
        let room = (rows.len() / 4).min(MAX_PREDICTIONS);
        let found = predict(&self.shared, self.id, session, steps, &mut predictions[..room], None)?;
        for (row, p) in rows.chunks_exact_mut(4).zip(&predictions[..found]) {
            row.copy_from_slice(&[f32::from(p.agent), f32::from(p.step), p.probability, p.median_s]);
        }
        Ok(found)
    }

    /// Bytes of learned state, at most 20,000.
    #[expect(clippy::unused_self, reason = "every workload has the same size today; callers ask the one they have")]
    fn state_bytes(&self) -> usize {
        kv::Workload::STATE_BYTES
    }

    /// Name of the workload.
    #[getter]
    fn name(&self) -> &str {
        &self.name
    }

    fn __repr__(&self) -> String {
        format!("Workload({:?})", self.name)
    }
}

const NO_PREDICTION: kv::Prediction = kv::Prediction { agent: 0, step: 0, probability: 0.0, median_s: f32::NAN };

fn predict(
    shared: &Shared,
    workload: WorkloadId,
    session: u64,
    steps: usize,
    out: &mut [kv::Prediction],
    time: Option<f64>,
) -> PyResult<usize> {
    let now_us = shared.time_us(time)?;
    let found = shared.core.predict(workload, session, steps, out).map_err(from_core)?;
    shared.core.predict_times(workload, session, now_us, &mut out[..found]).map_err(from_core)?;
    Ok(found)
}

/// One workflow run.
#[pyclass(frozen, module = "agentrt._core")]
pub(crate) struct Session {
    pub(crate) shared: Arc<Shared>,
    pub(crate) workload: WorkloadId,
    names: Arc<Names>,
    pub(crate) key: u64,
}

impl Session {
    pub(crate) fn agent_id(&self, agent: &Bound<'_, PyAny>) -> PyResult<u16> {
        match agent.cast::<PyString>() {
            Ok(name) => intern(&self.names.agents, &name.to_cow()?, "agent"),
            Err(_) => Ok(integer("agent", 0, u64::from(u16::MAX), agent)? as u16),
        }
    }

    /// The call meant where none is named: the session's only one.
    fn call_id(&self, call: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        match call {
            Some(call) => integer("call", 0, u64::MAX, call),
            None => Ok(mix(self.key ^ mix(u64::from(self.workload.0) ^ 0x6361_6C6C))),
        }
    }

    fn tell(
        &self,
        py: Python<'_>,
        kind: EventKind,
        agent: u16,
        call: u64,
        time: Option<f64>,
        blocks: &[u64],
    ) -> PyResult<u64> {
        let end = u32::try_from(blocks.len()).map_err(|_| {
            value_error("blocks", format!("has {} keys", blocks.len()), "pass fewer than 2^32 keys".into())
        })?;
        let events = Events {
            kinds: &[kind as u8],
            sessions: &[self.key],
            agents: &[agent],
            calls: &[call],
            times_us: &[self.shared.time_us(time)?],
            offsets: &[0, end],
            blocks,
        };
        Ok(self.shared.feed(py, self.workload, &events)?.hit_blocks)
    }
}

#[pymethods]
impl Session {
    /// A call of the session has arrived and waits in the engine's queue; its start follows under the same call.
    #[pyo3(signature = (agent, blocks, call = None, time = None))]
    fn call_queued(
        &self,
        py: Python<'_>,
        agent: &Bound<'_, PyAny>,
        blocks: &Bound<'_, PyAny>,
        call: Option<&Bound<'_, PyAny>>,
        time: Option<f64>,
    ) -> PyResult<()> {
        let (keys, call) = (Keys::new("blocks", blocks)?, self.call_id(call)?);
        let time = time.map(|time| microseconds(time).map(|_| time)).transpose()?;
        self.tell(py, EventKind::CallQueued, self.agent_id(agent)?, call, time, keys.as_slice()).map(drop)
    }

    /// The session calls an agent with a prompt; returns how many leading blocks are resident.
    #[pyo3(signature = (agent, blocks, call = None, time = None))]
    fn call_start(
        &self,
        py: Python<'_>,
        agent: &Bound<'_, PyAny>,
        blocks: &Bound<'_, PyAny>,
        call: Option<&Bound<'_, PyAny>>,
        time: Option<f64>,
    ) -> PyResult<u64> {
        let (keys, call) = (Keys::new("blocks", blocks)?, self.call_id(call)?);
        let time = time.map(|time| microseconds(time).map(|_| time)).transpose()?;
        self.tell(py, EventKind::CallStart, self.agent_id(agent)?, call, time, keys.as_slice())
    }

    /// Further blocks of the call have entered the pool.
    #[pyo3(signature = (blocks, call = None, time = None))]
    fn stored(
        &self,
        py: Python<'_>,
        blocks: &Bound<'_, PyAny>,
        call: Option<&Bound<'_, PyAny>>,
        time: Option<f64>,
    ) -> PyResult<()> {
        let (keys, call) = (Keys::new("blocks", blocks)?, self.call_id(call)?);
        self.tell(py, EventKind::Stored, 0, call, time, keys.as_slice()).map(drop)
    }

    /// The call has ended; `output_blocks` follow its prompt's.
    #[pyo3(signature = (output_blocks = None, call = None, time = None))]
    fn call_end(
        &self,
        py: Python<'_>,
        output_blocks: Option<&Bound<'_, PyAny>>,
        call: Option<&Bound<'_, PyAny>>,
        time: Option<f64>,
    ) -> PyResult<()> {
        let call = self.call_id(call)?;
        let keys = output_blocks.map(|blocks| Keys::new("output_blocks", blocks)).transpose()?;
        self.tell(py, EventKind::CallEnd, 0, call, time, keys.as_ref().map_or(&[], Keys::as_slice)).map(drop)
    }

    /// A tool of the session starts.
    #[pyo3(signature = (tool, time = None))]
    fn tool_start(&self, py: Python<'_>, tool: &Bound<'_, PyAny>, time: Option<f64>) -> PyResult<()> {
        let tool = match tool.cast::<PyString>() {
            Ok(name) => {
                let name = name.to_cow()?;
                let time_us = time.map(microseconds).transpose();
                time_us.and_then(|_| intern(&self.names.tools, &name, "tool"))? + 1
            }
            Err(_) => integer("tool", 1, u64::from(u16::MAX), tool)? as u16,
        };
        self.tell(py, EventKind::ToolStart, tool, 0, time, &[]).map(drop)
    }

    /// The session's tool has ended.
    #[pyo3(signature = (time = None))]
    fn tool_end(&self, py: Python<'_>, time: Option<f64>) -> PyResult<()> {
        self.tell(py, EventKind::ToolEnd, 0, 0, time, &[]).map(drop)
    }

    /// The session is over.
    #[pyo3(signature = (time = None))]
    fn end(&self, py: Python<'_>, time: Option<f64>) -> PyResult<()> {
        self.tell(py, EventKind::SessionEnd, 0, 0, time, &[]).map(drop)
    }

    /// Whether to bring back what the pool lacks of this chain, for an agent named by `act("prefetch")`.
    #[pyo3(signature = (agent, blocks))]
    fn worth_restoring(&self, agent: &Bound<'_, PyAny>, blocks: &Bound<'_, PyAny>) -> PyResult<bool> {
        let keys = Keys::new("blocks", blocks)?;
        let agent = self.agent_id(agent)?;
        self.shared.core.worth_restoring(self.workload, self.key, agent, keys.as_slice()).map_err(from_core)
    }

    /// A lower tier has given back blocks of the agent's last prompt: the whole chain from the root is resident.
    #[pyo3(signature = (agent, blocks, time = None))]
    fn restored(&self, agent: &Bound<'_, PyAny>, blocks: &Bound<'_, PyAny>, time: Option<f64>) -> PyResult<()> {
        let (keys, now_us) = (Keys::new("blocks", blocks)?, self.shared.time_us(time)?);
        let agent = self.agent_id(agent)?;
        self.shared.core.restored(self.workload, self.key, agent, now_us, keys.as_slice()).map_err(from_core)
    }

    /// P(the session calls each agent within `horizon_s` seconds).
    #[pyo3(signature = (agents, horizon_s, time = None))]
    fn score_agents<'py>(
        &self,
        py: Python<'py>,
        agents: &Bound<'py, PyAny>,
        horizon_s: f64,
        time: Option<f64>,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        microseconds(horizon_s)?;
        let now_us = self.shared.time_us(time)?;
        let ids: Vec<u16> = if agents.cast::<PyUntypedArray>().is_ok() {
            array::<u16>("agents", agents)?.as_slice()?.to_vec()
        } else if agents.cast::<PyString>().is_ok() {
            let remedy = "pass a list of agents".into();
            return Err(type_error("agents", "is a str, expected a list of agents".into(), remedy));
        } else {
            let problem = |_| {
                let problem = format!("is a {}, expected a list of agents", kind_of(agents));
                type_error("agents", problem, "pass names, numbers, or an array of uint16".into())
            };
            agents.try_iter().map_err(problem)?.map(|agent| self.agent_id(&agent?)).collect::<PyResult<_>>()?
        };
        let mut scores = vec![0.0; ids.len()];
        let (core, horizon_s) = (&self.shared.core, horizon_s as f32);
        core.score_agents(self.workload, self.key, now_us, horizon_s, &ids, &mut scores).map_err(from_core)?;
        Ok(PyArray1::from_vec(py, scores))
    }

    /// The likeliest agents of the session's next calls, by step, likeliest first.
    #[pyo3(signature = (steps = None, time = None), text_signature = "($self, steps=4, time=None)")]
    fn predict(&self, steps: Option<&Bound<'_, PyAny>>, time: Option<f64>) -> PyResult<Vec<Prediction>> {
        let steps = steps.map_or(Ok(4), |steps| integer("steps", 1, MAX_STEPS as u64, steps))? as usize;
        let mut predictions = [NO_PREDICTION; MAX_PREDICTIONS];
        let found = predict(&self.shared, self.workload, self.key, steps, &mut predictions, time)?;
        let named = |p: &kv::Prediction| Prediction {
            agent: agent_name(&self.names, p.agent),
            agent_id: p.agent,
            step: p.step,
            probability: p.probability,
            median_s: p.median_s,
        };
        Ok(predictions[..found].iter().map(named).collect())
    }

    /// Whether the session is in the table.
    #[getter]
    fn known(&self) -> bool {
        self.shared.core.knows(self.workload, self.key)
    }

    /// The 64-bit key that the array door takes.
    #[getter]
    fn key(&self) -> u64 {
        self.key
    }

    fn __repr__(&self) -> String {
        format!("Session({})", self.key)
    }
}
