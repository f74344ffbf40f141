//! The four calls: observe, score, predict, act.
//!
//! [`Runtime`] joins three parts: the session table (lock-free, any thread), the learned state of each workload
//! (lock-free, any thread), and the pool (one writer at a time). What only identities teach is learned before the pool
//! is asked for, so no count is lost when two threads report at once.
//!
//! | operation | progress | allocates | worst case |
//! |---|---|---|---|
//! | [`Runtime::observe`], events without blocks | lock-free | no | 4 exchanges and at most 14 additions an event, per retry; an end while the pool is taken, 256 loads |
//! | [`Runtime::observe`], events with blocks | one writer; a second one gets [`Error::Busy`], nothing applied | no | one hash probe a block, one visit a segment of the lane; from the first eviction on, one scoring per session that the batch changed (at most 64) and 4 for age; with [`Scoring::ByStep`] none |
//! | [`Runtime::settle_step`] | one writer, as above | no | one scoring per session that changed (at most 64) and 4 for age |
//! | [`Runtime::score_blocks`] | wait-free | no | one hash probe a block |
//! | [`Runtime::score_agents`], [`Runtime::predict`] | wait-free | no | 64 rows of 8 |
//! | [`Runtime::evict`] | one writer, as above | no | a hash probe and a list step a block, one scoring a segment that loses its last child |
//! | [`Runtime::expected`], [`Runtime::restored`] | one writer, as above | no | 64 sessions; one hash probe a block |
//! | [`Runtime::publish`], [`Runtime::absorb`] | wait-free reads, lock-free additions, cold | yes | the whole state |
//! | [`Runtime::workload`], [`Runtime::new`] | blocking, cold | yes | |
//!
//! Times are microseconds of any monotone clock. A time that runs backwards counts as "now", see [`Repairs`].

use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use crate::error::{Error, Result};
use crate::ids::{mix, SessionKey, WorkloadId};
use crate::kv::index::Published;
use crate::kv::workload::{Sessions, MAX_WORKLOADS};
use crate::kv::{
    self, CallStart, Config, Expected, FutureStarts, Guesses, Hint, Kept, KvCache, Prediction, Repairs, Workload,
    Workloads,
};
use crate::merge::Merged;
use crate::sessions::SessionHandle;

/// What happened; the codes of [`Events::kinds`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    /// A session calls an agent; `blocks`: the prompt's full blocks, root first (may be empty).
    CallStart = 0,
    /// Further blocks of a call in flight have entered the pool.
    Stored = 1,
    /// A call has ended; `blocks`: the answer's full blocks, following the prompt's.
    CallEnd = 2,
    /// A tool of the session has started; `agent`: number of the tool, from 1.
    ToolStart = 3,
    /// It has ended.
    ToolEnd = 4,
    /// The engine has dropped `blocks` by itself.
    Removed = 5,
    /// The session is over.
    SessionEnd = 6,
    /// The engine has reset its cache: no block is resident any more.
    Reset = 7,
    /// A call has arrived and waits in the engine's queue; `blocks`: the prompt's full blocks, root first. Its start
    /// follows under the same call, or its end if it is cancelled.
    CallQueued = 8,
}

impl EventKind {
    /// The kind of a code.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::CallStart,
            1 => Self::Stored,
            2 => Self::CallEnd,
            3 => Self::ToolStart,
            4 => Self::ToolEnd,
            5 => Self::Removed,
            6 => Self::SessionEnd,
            7 => Self::Reset,
            8 => Self::CallQueued,
            _ => return None,
        })
    }
}

/// A batch of events, one slice per field. All slices but the last two have one entry per event.
#[derive(Clone, Copy, Debug)]
pub struct Events<'a> {
    /// Codes of [`EventKind`].
    pub kinds: &'a [u8],
    /// Sessions (any 64-bit name).
    pub sessions: &'a [u64],
    /// Agents, as interned by the caller; for tool events the tool's number.
    pub agents: &'a [u16],
    /// Calls (any 64-bit name, unique among calls in flight).
    pub calls: &'a [u64],
    /// Microseconds.
    pub times_us: &'a [u64],
    /// Where each event's blocks start in `blocks`, and one entry more for the end. Empty: no event has blocks.
    pub offsets: &'a [u32],
    /// Block keys: hashes of the whole prefix up to the block's end.
    pub blocks: &'a [u64],
}

/// What a batch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Events applied.
    pub events: usize,
    /// Prompt blocks of the calls that started.
    pub prompt_blocks: u64,
    /// Of these, leading ones that were resident.
    pub hit_blocks: u64,
}

/// When sessions are scored that events have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// After the events.
    Now,
    /// Before an eviction and at the end of the step ([`Runtime::settle_step`]): a session in which several things happen
    /// within a step is scored once, and one whose call runs not before it ends.
    ByStep,
}

/// Sizes of a [`Runtime`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Blocks of the engine's pool, 1 to 2^31.
    pub pool_blocks: usize,
    /// Sessions remembered, 8 to 2^24; the least recently used is forgotten first.
    pub sessions: usize,
    /// Mechanisms of the `kv_cache` policy.
    pub config: Config,
}

impl Options {
    /// Defaults for a pool: 4,096 sessions, everything on.
    pub fn for_pool(pool_blocks: usize) -> Self {
        Self { pool_blocks, sessions: 4096, config: Config::default() }
    }
}

/// Bytes in use, by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Learned state per workload.
    pub state_bytes: usize,
    /// The residency index.
    pub index_bytes: usize,
    /// The session table and what the pool keeps beside it.
    pub session_bytes: usize,
}

/// Learned state, sessions and pool of one engine.
#[derive(Debug)]
pub struct Runtime {
    options: Options,
    workloads: Workloads,
    sessions: Sessions,
    published: Arc<Published>,
    // Never waited for: `try_lock` is the owner flag of the one writer.
    pool: Mutex<KvCache>,
    kept: Kept,
    missed: Missed,
    now_us: AtomicU64,
}

/// Calls whose end was reported while another thread was in the pool, which would otherwise hold their blocks for ever.
/// Whoever enters the pool next takes them out. Only ends that may concern the pool are posted (see [`Kept`]). A full box
/// loses ends; the pool lets its oldest calls go some day.
#[derive(Debug)]
struct Missed {
    calls: [AtomicU64; 256],
    posted: AtomicU64,
}

impl Missed {
    fn new() -> Self {
        Self { calls: std::array::from_fn(|_| AtomicU64::new(0)), posted: AtomicU64::new(0) }
    }

    fn post(&self, call: u64) {
        // From a place of the call's own: threads that post at once keep apart.
        let (later, first) = self.calls.split_at(mix(call) as usize % self.calls.len());
        for slot in first.iter().chain(later) {
            if slot.load(Relaxed) == 0 && slot.compare_exchange(0, call, Relaxed, Relaxed).is_ok() {
                // Pairs with the Acquire in `take`: who sees the count sees the call.
                self.posted.fetch_add(1, Release);
                return;
            }
        }
    }

    fn take(&self, mut ended: impl FnMut(u64)) {
        if self.posted.load(Relaxed) == 0 || self.posted.swap(0, Acquire) == 0 {
            return;
        }
        for slot in &self.calls {
            if slot.load(Relaxed) != 0 {
                ended(slot.swap(0, Relaxed));
            }
        }
    }
}

fn out_of_range(what: &'static str, min: u64, max: u64, requested: u64) -> Error {
    Error::OutOfRange { what, min, max, requested }
}

impl Runtime {
    /// A runtime for one pool. Allocates everything it will ever use.
    pub fn new(options: Options) -> Result<Self> {
        if options.pool_blocks == 0 || options.pool_blocks > 1 << 31 {
            return Err(out_of_range("pool_blocks", 1, 1 << 31, options.pool_blocks as u64));
        }
        let sessions = Sessions::new(options.sessions)?;
        let pool = KvCache::new(options.pool_blocks, sessions.capacity(), options.config);
        Ok(Self {
            options,
            workloads: Workloads::new(),
            published: Arc::clone(&pool.index.published),
            sessions,
            kept: pool.kept(),
            pool: Mutex::new(pool),
            missed: Missed::new(),
            now_us: AtomicU64::new(0),
        })
    }

    /// What this process has counted of a workload, encoded; `version` grows with every publication.
    pub fn publish(&self, workload: WorkloadId, replica: u64, version: u64) -> Result<Vec<u8>> {
        Ok(self.learned(workload)?.publication(replica, version).encode())
    }

    /// An empty sum of publications; see [`crate::merge`].
    pub fn merged(&self, workload: WorkloadId, replicas: usize) -> Result<Merged> {
        Ok(self.learned(workload)?.merged(replicas))
    }

    /// Adds what other replicas have counted: a fresh process starts where they are.
    pub fn absorb(&self, workload: WorkloadId, merged: &Merged, except: Option<u64>) -> Result<()> {
        self.learned(workload)?.absorb(&merged.sums(except));
        Ok(())
    }

    /// The options it was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The workload called `name`, registered if it is new.
    pub fn workload(&self, name: &str) -> Result<WorkloadId> {
        let id = self.workloads.register(name);
        let id = id.ok_or(out_of_range("workloads", 1, MAX_WORKLOADS as u64, MAX_WORKLOADS as u64 + 1))?;
        Ok(WorkloadId(id as u32))
    }

    /// The name of a workload.
    pub fn workload_name(&self, id: WorkloadId) -> Option<&str> {
        self.workloads.name(id.0 as usize)
    }

    fn learned(&self, id: WorkloadId) -> Result<&Workload> {
        let known = self.workloads.len() as u64;
        self.workloads
            .get(id.0 as usize)
            .ok_or_else(|| out_of_range("workload", 0, known.saturating_sub(1), u64::from(id.0)))
    }

    /// Bytes in use.
    pub fn memory(&self) -> Result<Memory> {
        let (index_bytes, beside) = self.writer()?.bytes();
        Ok(Memory { state_bytes: Workload::STATE_BYTES, index_bytes, session_bytes: self.sessions.bytes() + beside })
    }

    fn writer(&self) -> Result<MutexGuard<'_, KvCache>> {
        match self.pool.try_lock() {
            Ok(mut guard) => {
                self.missed.take(|call| match guard.find_call(call) {
                    Some(at) => guard.call_finished(None, at, self.now_us()),
                    None => guard.call_cancelled(call, self.now_us()),
                });
                Ok(guard)
            }
            Err(TryLockError::WouldBlock) => Err(Error::Busy { what: "the pool" }),
            // A panic inside the pool must not take the engine down with it: start again from an empty index.
            Err(TryLockError::Poisoned(poisoned)) => {
                let mut guard = poisoned.into_inner();
                guard.clear();
                self.pool.clear_poison();
                Ok(guard)
            }
        }
    }

    #[inline]
    fn key(workload: WorkloadId, session: u64) -> SessionKey {
        Salt::of(workload).session(session)
    }

    /// The latest time is the clock of those who ask without one.
    #[inline]
    fn heard_at(&self, time_us: u64) {
        if time_us > self.now_us.load(Relaxed) {
            self.now_us.fetch_max(time_us, Relaxed);
        }
    }

    fn check(events: &Events<'_>) -> Result<bool> {
        let n = events.kinds.len();
        let same = |what: &'static str, len: usize| {
            if len == n {
                Ok(())
            } else {
                Err(out_of_range(what, n as u64, n as u64, len as u64))
            }
        };
        same("length of sessions", events.sessions.len())?;
        same("length of agents", events.agents.len())?;
        same("length of calls", events.calls.len())?;
        same("length of times", events.times_us.len())?;
        if !events.offsets.is_empty() {
            if events.offsets.len() != n + 1 {
                return Err(out_of_range("length of offsets", n as u64 + 1, n as u64 + 1, events.offsets.len() as u64));
            }
            let mut last = 0;
            for &offset in events.offsets {
                if offset < last || offset as usize > events.blocks.len() {
                    return Err(out_of_range("offset", u64::from(last), events.blocks.len() as u64, u64::from(offset)));
                }
                last = offset;
            }
        }
        // The last two kinds are the pool's business, blocks or not.
        const { assert!(EventKind::Reset as u8 == 7 && EventKind::CallQueued as u8 == 8) };
        let largest = events.kinds.iter().copied().max().unwrap_or(0);
        if EventKind::from_code(largest).is_none() {
            return Err(out_of_range("event kind", 0, 8, u64::from(largest)));
        }
        let blocks = matches!(events.offsets, [first, .., last] if first < last);
        Ok(blocks || largest >= EventKind::Reset as u8)
    }

    #[inline]
    fn blocks_of<'a>(events: &Events<'a>, i: usize) -> &'a [u64] {
        if events.offsets.is_empty() {
            &[]
        } else {
            // Checked once already; a caller that shares the memory with other threads may have changed it since.
            events.blocks.get(events.offsets[i] as usize..events.offsets[i + 1] as usize).unwrap_or(&[])
        }
    }

    /// Applies a batch of events in order.
    ///
    /// A batch that is malformed, or that has blocks while another thread is in the pool, is refused as a whole.
    pub fn observe(&self, workload: WorkloadId, events: &Events<'_>) -> Result<Observed> {
        self.observe_each(workload, events, |_, _| {})
    }

    /// As [`Runtime::observe`]; tells of each call that starts its position in the batch and its resident blocks.
    #[inline]
    pub fn observe_each(
        &self,
        workload: WorkloadId,
        events: &Events<'_>,
        started: impl FnMut(usize, usize),
    ) -> Result<Observed> {
        self.observe_scoring(workload, events, Scoring::Now, started)
    }

    /// As [`Runtime::observe_each`], for engines that go by steps and may leave scoring to the end of the step.
    #[inline]
    pub fn observe_scoring(
        &self,
        workload: WorkloadId,
        events: &Events<'_>,
        scoring: Scoring,
        mut started: impl FnMut(usize, usize),
    ) -> Result<Observed> {
        let has_blocks = Self::check(events)?;
        let learned = self.learned(workload)?;
        let mut pool = match self.writer() {
            Ok(pool) => Some(pool),
            Err(busy) if has_blocks => return Err(busy),
            // Identities are learned all the same; the pool hears of the calls that end.
            Err(_) => None,
        };
        if let Some(&last) = events.times_us.iter().max() {
            self.heard_at(last);
        }
        let salt = Salt::of(workload);
        let n = events.kinds.len();
        let (sessions, agents) = (&events.sessions[..n], &events.agents[..n]);
        let (calls, times_us) = (&events.calls[..n], &events.times_us[..n]);
        let mut observed = Observed { events: n, ..Observed::default() };
        let mut guesses = Guesses::default();
        for (i, &code) in events.kinds.iter().enumerate() {
            let Some(kind) = EventKind::from_code(code) else { continue };
            let blocks = Self::blocks_of(events, i);
            let one = || One {
                name: sessions[i],
                session: salt.session(sessions[i]),
                agent: agents[i],
                call: salt.call(calls[i]),
                time_us: times_us[i],
                blocks,
                hints: &[],
            };
            match kind {
                EventKind::CallStart => {
                    let hit = self.start((workload, learned), &one(), pool.as_deref_mut(), &mut guesses);
                    observed.prompt_blocks += blocks.len() as u64;
                    observed.hit_blocks += hit as u64;
                    started(i, hit);
                }
                EventKind::CallEnd => self.end((workload, learned), &one(), pool.as_deref_mut()),
                _ => {
                    self.apply((workload, learned), kind, &one(), pool.as_deref_mut(), &mut guesses);
                }
            }
        }
        learned.count_guesses(&mut guesses);
        if let Some(mut pool) = pool {
            match scoring {
                Scoring::Now => pool.settle(&self.workloads, &self.sessions),
                Scoring::ByStep => pool.postpone(),
            }
        }
        Ok(observed)
    }

    /// An engine's step has ended: scores what events observed with [`Scoring::ByStep`] have changed and what silence has
    /// aged.
    pub fn settle_step(&self, now_us: u64) -> Result<()> {
        self.writer()?.settle_step(&self.workloads, &self.sessions, now_us);
        Ok(())
    }

    /// A call starts; returns its resident blocks.
    #[inline(always)]
    fn start(
        &self,
        (id, learned): (WorkloadId, &Workload),
        event: &One<'_>,
        pool: Option<&mut KvCache>,
        guesses: &mut Guesses,
    ) -> usize {
        let mut pool = pool;
        let mut queued = None;
        if let Some(pool) = pool.as_deref_mut() {
            if let Some(at) = pool.find_call(event.call) {
                self.sessions.end(pool.session_of(at));
                Workload::call_ended(&self.sessions, pool.session_of(at), event.time_us, 0);
                pool.call_finished(None, at, event.time_us);
                pool.repairs.duplicate_calls += 1;
            }
            queued = pool.admitted(event.call, event.time_us);
        }
        let handle = match queued {
            // What identities teach was learned when the call arrived.
            Some((handle, agent)) if agent == event.agent && self.sessions.find(event.session) == Some(handle) => {
                Workload::call_admitted(&self.sessions, handle, event.time_us);
                handle
            }
            other => {
                if let Some((handle, _)) = other {
                    self.sessions.end(handle);
                }
                learned.call_started(&self.sessions, event.session, event.agent, event.time_us, guesses)
            }
        };
        let Some(pool) = pool else { return 0 };
        let (hit, let_go) = pool.call_started((id.0, learned), handle, &Self::call_start(event));
        if let Some(other) = let_go {
            self.sessions.end(other);
        }
        hit
    }

    /// A call ends.
    #[inline(always)]
    fn end(&self, (id, learned): (WorkloadId, &Workload), event: &One<'_>, pool: Option<&mut KvCache>) {
        let at = pool.as_deref().and_then(|pool| pool.find_call(event.call));
        let known = pool.as_deref().zip(at).and_then(|(pool, at)| pool.caller(at, id.0, event.name));
        // The slot may have gone to another session since: then the session is looked for.
        let known = known.filter(|&handle| self.sessions.end(handle));
        let ended = known.or_else(|| {
            let found = self.sessions.find(event.session)?;
            self.sessions.end(found);
            Some(found)
        });
        if let Some(handle) = ended {
            Workload::call_ended(&self.sessions, handle, event.time_us, event.blocks.len() as u32);
        }
        if let Some(pool) = pool {
            if !event.blocks.is_empty() {
                pool.stored(learned, event.call, event.time_us, event.blocks, event.hints, true);
            }
            match at {
                Some(at) => pool.call_finished(Some(learned), at, event.time_us),
                None => pool.call_cancelled(event.call, event.time_us),
            }
        } else if self.kept.may_hold(event.call) {
            self.missed.post(event.call);
        }
    }

    /// Anything happens; returns the resident blocks of a call that starts.
    fn apply(
        &self,
        (id, learned): (WorkloadId, &Workload),
        kind: EventKind,
        event: &One<'_>,
        pool: Option<&mut KvCache>,
        guesses: &mut Guesses,
    ) -> usize {
        match kind {
            EventKind::CallStart => return self.start((id, learned), event, pool, guesses),
            EventKind::CallEnd => self.end((id, learned), event, pool),
            EventKind::Stored => {
                if let Some(pool) = pool {
                    pool.stored(learned, event.call, event.time_us, event.blocks, event.hints, false);
                }
            }
            EventKind::ToolStart => {
                if let Some(handle) = self.sessions.find(event.session) {
                    let tool = 1 + (event.agent.saturating_sub(1) % 11) as u8;
                    Workload::tool_started(&self.sessions, handle, tool);
                    if let Some(pool) = pool {
                        pool.session_changed(handle);
                    }
                }
            }
            EventKind::ToolEnd => {}
            EventKind::Removed => {
                if let Some(pool) = pool {
                    // A block goes only after those below it, in whatever order they are named. A few rounds do for any
                    // order that occurs; what is left is a leaf like others, and will be named as a victim.
                    for _ in 0..8 {
                        let blocks = event.blocks.iter().chain(event.blocks.iter().rev());
                        if blocks.map(|&key| pool.removed(key)).sum::<usize>() == 0 {
                            break;
                        }
                    }
                }
            }
            EventKind::SessionEnd => {
                if let Some(handle) = self.sessions.find(event.session) {
                    Workload::session_over(&self.sessions, handle);
                    self.sessions.retire(handle);
                    if let Some(pool) = pool {
                        pool.session_over(handle);
                    }
                }
            }
            EventKind::Reset => {
                if let Some(pool) = pool {
                    pool.clear();
                }
            }
            EventKind::CallQueued => {
                if let Some(pool) = pool {
                    if pool.may_queue(event.call) {
                        let (session, agent) = (event.session, event.agent);
                        let handle = learned.call_started(&self.sessions, session, agent, event.time_us, guesses);
                        pool.call_queued(id.0, handle, &Self::call_start(event));
                    }
                }
            }
        }
        0
    }

    fn call_start<'a>(event: &One<'a>) -> CallStart<'a> {
        CallStart {
            call: event.call,
            session: event.name,
            agent: event.agent,
            now_us: event.time_us,
            keys: event.blocks,
            hints: event.hints,
        }
    }

    /// One call has arrived and waits. As [`Runtime::observe`] with one event.
    pub fn call_queued(
        &self,
        workload: WorkloadId,
        session: u64,
        call: u64,
        agent: u16,
        time_us: u64,
        blocks: &[u64],
    ) -> Result<()> {
        let learned = self.learned(workload)?;
        let mut pool = self.writer()?;
        self.heard_at(time_us);
        let (name, salt) = (session, Salt::of(workload));
        let (session, call) = (salt.session(name), salt.call(call));
        let one = One { name, session, agent, call, time_us, blocks, hints: &[] };
        let mut guesses = Guesses::default();
        self.apply((workload, learned), EventKind::CallQueued, &one, Some(&mut pool), &mut guesses);
        learned.count_guesses(&mut guesses);
        pool.settle(&self.workloads, &self.sessions);
        Ok(())
    }

    /// One call starts, with hints for oracles. As [`Runtime::observe`] with one event.
    #[expect(clippy::too_many_arguments, reason = "one argument per field of an event")]
    pub fn call_started(
        &self,
        workload: WorkloadId,
        session: u64,
        call: u64,
        agent: u16,
        time_us: u64,
        blocks: &[u64],
        hints: &[Hint],
    ) -> Result<usize> {
        let learned = self.learned(workload)?;
        let mut pool = self.writer()?;
        self.heard_at(time_us);
        let (name, salt) = (session, Salt::of(workload));
        let (session, call) = (salt.session(name), salt.call(call));
        let one = One { name, session, agent, call, time_us, blocks, hints };
        let mut guesses = Guesses::default();
        let hit = self.apply((workload, learned), EventKind::CallStart, &one, Some(&mut pool), &mut guesses);
        learned.count_guesses(&mut guesses);
        pool.settle(&self.workloads, &self.sessions);
        Ok(hit)
    }

    /// Further blocks of a call have entered the pool.
    pub fn stored(&self, workload: WorkloadId, call: u64, time_us: u64, blocks: &[u64], hints: &[Hint]) -> Result<()> {
        let (learned, call) = (self.learned(workload)?, Salt::of(workload).call(call));
        self.writer()?.stored(learned, call, time_us, blocks, hints, false);
        Ok(())
    }

    /// A session is over: nothing is expected of it until it calls again.
    pub fn session_over(&self, workload: WorkloadId, session: u64, time_us: u64) -> Result<()> {
        let events = Events {
            kinds: &[EventKind::SessionEnd as u8],
            sessions: &[session],
            agents: &[0],
            calls: &[0],
            times_us: &[time_us],
            offsets: &[],
            blocks: &[],
        };
        self.observe(workload, &events).map(drop)
    }

    /// One call ends; `tool` (from 1, 0 for none) runs next.
    #[expect(clippy::too_many_arguments, reason = "one argument per field of an event")]
    pub fn call_ended(
        &self,
        workload: WorkloadId,
        session: u64,
        call: u64,
        tool: u16,
        time_us: u64,
        output: &[u64],
        hints: &[Hint],
    ) -> Result<()> {
        let learned = self.learned(workload)?;
        let mut pool = self.writer()?;
        self.heard_at(time_us);
        let (name, salt) = (session, Salt::of(workload));
        let (session, call) = (salt.session(name), salt.call(call));
        let one = One { name, session, agent: 0, call, time_us, blocks: output, hints };
        self.end((workload, learned), &one, Some(&mut pool));
        if tool > 0 {
            let one = One { agent: tool, blocks: &[], hints: &[], ..one };
            self.apply((workload, learned), EventKind::ToolStart, &one, Some(&mut pool), &mut Guesses::default());
        }
        pool.settle(&self.workloads, &self.sessions);
        Ok(())
    }

    /// Gives an oracle the starts of the session's next calls.
    pub fn foretell(&self, workload: WorkloadId, session: u64, starts: FutureStarts) -> Result<()> {
        let (handle, _) = self.sessions.enter(Self::key(workload, session));
        self.writer()?.foretell(handle, workload.0, session, starts);
        Ok(())
    }

    /// Scores blocks: hits per second that holding each promises, as last published; 0 for blocks that are not resident.
    ///
    /// A block is never worth less than what hangs below it. Scores are brought up to date by events, from the first
    /// [`Runtime::evict`] on.
    pub fn score_blocks(&self, keys: &[u64], out: &mut [f32]) {
        for (key, out) in keys.iter().zip(out) {
            *out = self.published.score(*key).unwrap_or(0.0);
        }
    }

    /// Whether the pool holds a block, as far as the index knows. Wait-free.
    pub fn is_resident(&self, key: u64) -> bool {
        self.published.score(key).is_some()
    }

    /// P(the session calls the agent within `horizon_s` seconds from `now_us`), for each agent.
    pub fn score_agents(
        &self,
        workload: WorkloadId,
        session: u64,
        now_us: u64,
        horizon_s: f32,
        agents: &[u16],
        out: &mut [f32],
    ) -> Result<()> {
        let learned = self.learned(workload)?;
        let Some(handle) = self.sessions.find(Self::key(workload, session)) else {
            out.fill(0.0);
            return Ok(());
        };
        let config = &self.options.config;
        kv::score_agents(learned, &self.sessions, handle, config, now_us, horizon_s, agents, out);
        Ok(())
    }

    /// The likeliest agents of the session's next `steps` calls (at most 6), by step, likeliest first; returns how many
    /// entries of `out` were filled. An unknown session gives none. Times are NaN: see [`Runtime::predict_times`].
    pub fn predict(&self, workload: WorkloadId, session: u64, steps: usize, out: &mut [Prediction]) -> Result<usize> {
        let learned = self.learned(workload)?;
        let Some(handle) = self.sessions.find(Self::key(workload, session)) else { return Ok(0) };
        Ok(kv::predict(learned, &self.sessions, handle, &self.options.config, steps, out))
    }

    /// Adds median times to what [`Runtime::predict`] gave.
    pub fn predict_times(
        &self,
        workload: WorkloadId,
        session: u64,
        now_us: u64,
        predictions: &mut [Prediction],
    ) -> Result<()> {
        let learned = self.learned(workload)?;
        if let Some(handle) = self.sessions.find(Self::key(workload, session)) {
            let config = &self.options.config;
            kv::time_predictions(learned, &self.sessions, handle, config, now_us, predictions);
        }
        Ok(())
    }

    /// Names the `n` least valuable blocks, lowest first, and takes them out of the index: the caller evicts them.
    ///
    /// Never names a block of a call in flight, nor one before all blocks below it. Returns how many there were.
    pub fn evict(&self, n: usize, now_us: u64, victim: impl FnMut(u64)) -> Result<usize> {
        let mut pool = self.writer()?;
        Ok(pool.evict(&self.workloads, &self.sessions, n, now_us, victim))
    }

    /// As [`Runtime::evict`], least recently used first.
    pub fn evict_oldest(&self, n: usize, now_us: u64, victim: impl FnMut(u64)) -> Result<usize> {
        let mut pool = self.writer()?;
        Ok(pool.evict_oldest(&self.workloads, &self.sessions, n, now_us, victim))
    }

    /// Takes at most `n` of `keys` out of the index, in this order, and tells of each: the caller evicts them.
    ///
    /// Left alone are blocks that are not resident, those of calls in flight, and those above a resident block.
    /// Returns how many were taken and how many were left alone.
    pub fn evict_blocks(
        &self,
        keys: &[u64],
        n: usize,
        now_us: u64,
        mut victim: impl FnMut(u64),
    ) -> Result<(usize, usize)> {
        let mut pool = self.writer()?;
        let (mut taken, mut refused) = (0, 0);
        for &key in keys {
            if taken == n {
                break;
            }
            if pool.evict_block(&self.workloads, &self.sessions, key, now_us) {
                victim(key);
                taken += 1;
            } else {
                refused += 1;
            }
        }
        Ok((taken, refused))
    }

    /// Fills `out` with those for whom blocks may be brought back from a lower tier. While calls wait: the next two in line,
    /// in order of arrival, as far as there is room for them. Else sessions that will call an agent next with at least the
    /// given probability, and for which blocks of the agent's last prompt are worth more than what would have to go, best
    /// first. Whether to do it says [`Runtime::worth_restoring`].
    pub fn expected(&self, now_us: u64, least_probability: f32, out: &mut [Expected]) -> Result<usize> {
        Ok(self.writer()?.expected(&self.workloads, &self.sessions, now_us, least_probability, out))
    }

    /// Whether to bring back what the pool lacks of `blocks`, a chain from the root, for an agent named by
    /// [`Runtime::expected`]. Also where the answer is no, it is watched what would have come of it: so ask for each.
    pub fn worth_restoring(&self, workload: WorkloadId, session: u64, agent: u16, blocks: &[u64]) -> Result<bool> {
        let Some(handle) = self.sessions.find(Self::key(workload, session)) else { return Ok(false) };
        Ok(self.writer()?.worth_restoring(handle, agent, blocks))
    }

    /// The pool holds all of `blocks` (a chain from the root) again: a lower tier gave back what was missing.
    pub fn restored(&self, workload: WorkloadId, session: u64, agent: u16, time_us: u64, blocks: &[u64]) -> Result<()> {
        let learned = self.learned(workload)?;
        if let Some(handle) = self.sessions.find(Self::key(workload, session)) {
            self.writer()?.restored(learned, handle, agent, time_us, blocks);
        }
        Ok(())
    }

    /// Calls that the session has started; 0 where it is not known. Saturates at 65,535.
    pub fn session_calls(&self, workload: WorkloadId, session: u64) -> usize {
        let handle = self.sessions.find(Self::key(workload, session));
        handle.and_then(|handle| self.sessions.position(handle)).map_or(0, |at| usize::from(at.steps))
    }

    /// Blocks resident, as far as the index knows.
    pub fn resident_blocks(&self) -> Result<usize> {
        Ok(self.writer()?.index.resident)
    }

    /// Sessions in the table.
    pub fn known_sessions(&self) -> usize {
        self.sessions.occupied()
    }

    /// Times that LRU has taken over because the learned order was losing against it; see `docs/cachesage.md`.
    pub fn takeovers(&self) -> Result<u64> {
        Ok(self.writer()?.guard.takeovers)
    }

    /// Repairs made so far.
    pub fn repairs(&self) -> Result<Repairs> {
        Ok(self.writer()?.repairs)
    }

    /// Checks the pool's index for consistency and lists what is resident; for tests, linear in the pool.
    ///
    /// # Panics
    /// Where something is inconsistent.
    #[doc(hidden)]
    pub fn audit(&self) -> Result<Vec<kv::audit::Resident>> {
        Ok(self.writer()?.audit())
    }

    /// As [`Runtime::new`], with room for `segments` segments instead of one for every thirteen blocks; for tests.
    #[doc(hidden)]
    pub fn with_segments(options: Options, segments: usize) -> Result<Self> {
        let runtime = Self::new(options)?;
        let pool = KvCache::with_segments(options.pool_blocks, runtime.sessions.capacity(), options.config, segments);
        let (published, kept) = (Arc::clone(&pool.index.published), pool.kept());
        Ok(Self { published, kept, pool: Mutex::new(pool), ..runtime })
    }

    /// What a workload has taught, for reports.
    pub fn what_was_learned(&self, workload: WorkloadId) -> Result<&Workload> {
        self.learned(workload)
    }

    /// P(a resident block is used within the pool's residence time), and that time in seconds; `None` where the block is
    /// not resident or nothing has been evicted yet. For the measurement of calibration.
    pub fn survival(&self, block: u64, now_us: u64) -> Result<Option<(f32, f32)>> {
        Ok(self.writer()?.survival(&self.workloads, &self.sessions, block, now_us))
    }

    /// Latest time seen, microseconds.
    pub fn now_us(&self) -> u64 {
        self.now_us.load(Relaxed)
    }

    /// Whether a session is in the table.
    pub fn knows(&self, workload: WorkloadId, session: u64) -> bool {
        self.sessions.find(Self::key(workload, session)).is_some()
    }
}

/// Sessions and calls of two workloads may have the same name: what tells them apart.
#[derive(Clone, Copy)]
struct Salt(u64);

impl Salt {
    #[inline]
    fn of(workload: WorkloadId) -> Self {
        Self(mix(u64::from(workload.0)))
    }

    #[inline]
    fn session(self, name: u64) -> SessionKey {
        SessionKey(name ^ self.0)
    }

    /// 0 is no call.
    #[inline]
    fn call(self, name: u64) -> u64 {
        (name ^ self.0).max(1)
    }
}

/// One event.
#[derive(Clone, Copy)]
struct One<'a> {
    /// The caller's name of the session.
    name: u64,
    session: SessionKey,
    agent: u16,
    call: u64,
    time_us: u64,
    blocks: &'a [u64],
    hints: &'a [Hint],
}

const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Runtime>();
    shared::<SessionHandle>();
};
