//! `speculation`: prefills what the predicted next call will begin with, while the engine has capacity to spare.
//!
//! When a call of a session has ended, the core is asked who is next. Where it is rather one agent than not
//! (p >= 1/2), this policy wants in the cache, by kind:
//!
//! ```text
//! history  the prompt of this agent's last call in this session, if it was here before
//! anchor   else the blocks that the agent's last prompts of different sessions begin with
//! ```
//!
//! **Capacity.** It names at most [`BUSY_TOKENS`] missing tokens a step beside running calls: about what a step computes while it
//! reads the weights anyway (piggybacking of chunks: Sarathi-Serve, OSDI 2024). Beside none it is [`IDLE_TOKENS`], so that a call
//! that arrives waits for one short step. An engine does not ask while calls wait. Whoever is expected first goes first.
//!
//! **Ends** with the session's next call, whoever makes it; when the pool has lost what was prefilled as often as it was
//! prefilled once; or when the session has been silent for [`PATIENCE`] times the median predicted.
//!
//! **Account.** A kind is on while both of these are at least 1/2, each over the last hundreds of predictions:
//!
//! ```text
//! foreseen = blocks that the next call did begin with / blocks that were expected, also while it is off
//! paid     = blocks prefilled and then hit by that call / blocks prefilled
//! ```
//!
//! So a prefill is wanted where it is rather used than not. Being off, `paid` fades and is tried again in the end; `foreseen`
//! costs nothing and goes on. A block that a later call hits counts as wasted.
//!
//! (Prefill for the next turn: NVIDIA Dynamo's `speculative_prefill`, there for a caller who says who is next.)
//!
//! Costs a prediction and one copy of the prompt's keys a call; a binary search of the index for each expected session a
//! question. 8 bytes a block of remembered prompts, at most [`MOST_KEYS`].

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use crate::ids::{mix, WorkloadId};
use crate::kv::Prediction;
use crate::policy::{About, Event, Policy};
use crate::runtime::EventKind;
use crate::scheduling::{Happening, Load, Needs, Prefill};
use crate::Runtime;

/// Tokens that a step prefills beside running calls.
pub const BUSY_TOKENS: u32 = 256;
/// Tokens that a step prefills beside none.
pub const IDLE_TOKENS: u32 = 512;
/// How much longer than the median of the prediction a session may be silent.
pub const PATIENCE: f64 = 4.0;
/// Keys of prompts that are remembered.
pub const MOST_KEYS: usize = 1 << 20;
/// Agents of a session whose last prompt is remembered.
const LANES: usize = 16;
/// Sessions that are expected at a time; the one expected longest gives way.
const MOST_EXPECTED: usize = 256;
/// A less likely agent is not prefilled for, and a kind that does worse is off.
const LEAST: f32 = 0.5;
/// Predictions over which the account fades to 1/e.
const ACCOUNT: f64 = 256.0;
/// Blocks with which an account starts, and of these right ones.
const PRIOR: (f64, f64) = (256.0, 192.0);
/// Predictions are made for calls that are expected within so many seconds.
const HORIZON_S: f32 = 60.0;

/// What is prefilled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefilled {
    /// The session's own earlier prompt.
    History,
    /// What prompts of the agent have in common.
    Anchor,
}

/// How a kind of prefill does, for reports and tests.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Account {
    /// Blocks expected so far.
    pub expected: u64,
    /// Of these, blocks that the next call did begin with.
    pub foreseen: u64,
    /// Blocks prefilled so far, of all calls that have been decided.
    pub prefilled: u64,
    /// Of these, blocks that the call hit.
    pub used: u64,
    fading: [f64; 4],
}

impl Account {
    fn share(of: f64, all: f64) -> f64 {
        (of + PRIOR.1) / (all + PRIOR.0)
    }

    /// Whether it is worth its capacity at present.
    pub fn is_on(&self) -> bool {
        let [expected, foreseen, prefilled, used] = self.fading;
        Self::share(foreseen, expected) >= f64::from(LEAST) && Self::share(used, prefilled) >= f64::from(LEAST)
    }

    fn count(&mut self, counts: [usize; 4]) {
        for (fading, count) in self.fading.iter_mut().zip(counts) {
            *fading += count as f64 - *fading / ACCOUNT;
        }
        let [expected, foreseen, prefilled, used] = counts.map(|count| count as u64);
        self.expected += expected;
        self.foreseen += foreseen;
        self.prefilled += prefilled;
        self.used += used;
    }
}

/// Prefills for calls that are expected.
#[derive(Debug, Default)]
pub struct SpeculationPolicy {
    state: Mutex<State>,
}

/// The last prompt of an agent.
#[derive(Debug, Default)]
struct Prompt {
    agent: u16,
    call: u64,
    keys: Vec<u64>,
}

impl Prompt {
    fn replace(&mut self, call: u64, keys: &[u64]) {
        self.call = call;
        self.keys.clear();
        self.keys.extend_from_slice(keys);
    }

    /// Leading blocks that another prompt shares: a key names the whole prefix up to its block.
    fn common(&self, keys: &[u64]) -> usize {
        let n = self.keys.len().min(keys.len());
        let (mut low, mut high) = (0, n);
        while low < high {
            let middle = usize::midpoint(low, high);
            if self.keys[middle] == keys[middle] {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

/// The prompt of an agent in whatever session it spoke last.
#[derive(Debug, Default)]
struct Reference {
    prompt: Prompt,
    session: u64,
    /// Blocks that prompts of different sessions begin with.
    anchor: usize,
}

/// A call that is expected.
#[derive(Clone, Copy, Debug)]
struct Expected {
    agent: u16,
    kind: Prefilled,
    probability: f32,
    blocks: usize,
    /// When it is not expected any more.
    until_us: u64,
    /// Resident when it was first looked at, and when it was last.
    from: Option<usize>,
    seen: usize,
    /// Blocks named when it was last.
    named: usize,
    prefilled: usize,
}

impl Expected {
    /// Takes note of what is resident; what has come since it was named was prefilled.
    fn look(&mut self, resident: usize) {
        self.from.get_or_insert(resident);
        self.prefilled += resident.min(self.named).saturating_sub(self.seen);
        self.seen = resident;
    }
}

#[derive(Debug)]
struct Session {
    workload: WorkloadId,
    name: u64,
    last_us: u64,
    running: u32,
    prompts: Vec<Prompt>,
    next: usize,
    expected: Option<Expected>,
}

#[derive(Debug, Default)]
struct State {
    sessions: FxHashMap<u64, Session>,
    references: FxHashMap<(u32, u16), Reference>,
    /// Sessions that are expected, by when.
    line: Vec<(u64, u64)>,
    accounts: [Account; 2],
    keys: usize,
}

fn key(workload: WorkloadId, session: u64) -> u64 {
    session ^ mix(u64::from(workload.0))
}

impl SpeculationPolicy {
    /// How a kind does.
    pub fn account(&self, kind: Prefilled) -> Account {
        self.lock().accounts[kind as usize]
    }

    /// Keys of prompts that are remembered at present.
    pub fn remembered_keys(&self) -> usize {
        self.lock().keys
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves a table that is at worst one event behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn started(&mut self, event: &Event<'_>) {
        let key = key(event.workload, event.session);
        let blocks = event.blocks;
        let session = self.sessions.entry(key).or_insert_with(|| Session {
            workload: event.workload,
            name: event.session,
            last_us: 0,
            running: 0,
            prompts: Vec::new(),
            next: 0,
            expected: None,
        });
        session.last_us = event.time_us;
        session.running += 1;
        let expected = session.expected.take();
        self.line.retain(|&(_, expected)| expected != key);
        if let Some(expected) = expected {
            let known = Self::prompt(&self.references, session, &expected);
            let right = known.filter(|_| expected.agent == event.agent).map_or(0, |prompt| prompt.common(blocks));
            self.decided(expected, right, event.hit);
        }
        let Some(session) = self.sessions.get_mut(&key) else { return };
        let at = session.prompts.iter().position(|prompt| prompt.agent == event.agent).unwrap_or_else(|| {
            if session.prompts.len() < LANES {
                session.prompts.push(Prompt::default());
                return session.prompts.len() - 1;
            }
            session.next = (session.next + 1) % LANES;
            session.next
        });
        let prompt = &mut session.prompts[at];
        self.keys = self.keys + blocks.len() - prompt.keys.len();
        prompt.agent = event.agent;
        prompt.replace(event.call, blocks);
        let reference = self.references.entry((event.workload.0, event.agent)).or_default();
        if reference.session != key && !reference.prompt.keys.is_empty() {
            reference.anchor = reference.prompt.common(blocks);
        }
        reference.session = key;
        self.keys = self.keys + blocks.len() - reference.prompt.keys.len();
        reference.prompt.replace(event.call, blocks);
        if self.keys > MOST_KEYS {
            self.forget_some(key);
        }
    }

    /// The sessions silent longest go, until an eighth of the room is free; then what agents have in common.
    fn forget_some(&mut self, but: u64) {
        let mut silent: Vec<(u64, u64)> =
            self.sessions.iter().filter(|(&key, _)| key != but).map(|(&key, one)| (one.last_us, key)).collect();
        silent.sort_unstable();
        for (_, key) in silent {
            if self.keys <= MOST_KEYS / 8 * 7 {
                return;
            }
            self.forget(key);
        }
        self.references.clear();
        self.keys = self.sessions.values().flat_map(|session| &session.prompts).map(|prompt| prompt.keys.len()).sum();
    }

    fn forget(&mut self, key: u64) {
        if let Some(session) = self.sessions.remove(&key) {
            self.keys -= session.prompts.iter().map(|prompt| prompt.keys.len()).sum::<usize>();
            self.line.retain(|&(_, expected)| expected != key);
            if let Some(expected) = session.expected {
                self.decided(expected, 0, 0);
            }
        }
    }

    /// The call has come, or will not: `right` of the expected blocks were its own, `hit` of its blocks were resident.
    fn decided(&mut self, expected: Expected, right: usize, hit: usize) {
        let right = right.min(expected.blocks);
        let mut expected = expected;
        if right > 0 {
            expected.look(hit.min(right));
        }
        let used = expected.from.map_or(0, |from| hit.min(right).saturating_sub(from)).min(expected.prefilled);
        self.accounts[expected.kind as usize].count([expected.blocks, right, expected.prefilled, used]);
    }

    fn prompt<'a>(
        references: &'a FxHashMap<(u32, u16), Reference>,
        session: &'a Session,
        expected: &Expected,
    ) -> Option<&'a Prompt> {
        match expected.kind {
            Prefilled::History => session.prompts.iter().find(|prompt| prompt.agent == expected.agent),
            Prefilled::Anchor => references.get(&(session.workload.0, expected.agent)).map(|known| &known.prompt),
        }
    }

    fn ended(&mut self, runtime: &Runtime, event: &Event<'_>) {
        let key = key(event.workload, event.session);
        let Some(session) = self.sessions.get_mut(&key) else { return };
        session.running = session.running.saturating_sub(1);
        session.last_us = event.time_us;
        if session.running > 0 || session.expected.is_some() {
            return;
        }
        let none = Prediction { agent: 0, step: 0, probability: 0.0, median_s: f32::NAN };
        let mut predictions = [none; 8];
        let first = match runtime.predict(event.workload, event.session, 1, &mut predictions) {
            Ok(n) if n > 0 && predictions[0].probability >= LEAST => &mut predictions[..1],
            _ => return,
        };
        if runtime.predict_times(event.workload, event.session, event.time_us, first).is_err() {
            return;
        }
        let Prediction { agent, probability, median_s, .. } = first[0];
        if median_s > HORIZON_S {
            return;
        }
        let history = session.prompts.iter().find(|prompt| prompt.agent == agent);
        let (kind, blocks) = match history {
            Some(prompt) => (Prefilled::History, prompt.keys.len()),
            None => {
                let known = self.references.get(&(event.workload.0, agent));
                (Prefilled::Anchor, known.map_or(0, |known| known.anchor))
            }
        };
        if blocks == 0 {
            return;
        }
        let median_us = if median_s.is_finite() { f64::from(median_s) * 1e6 } else { f64::from(HORIZON_S) * 1e6 };
        let due_us = event.time_us + median_us as u64;
        let until_us = event.time_us + 1_000_000 + (PATIENCE * median_us) as u64;
        session.expected =
            Some(Expected { agent, kind, probability, blocks, until_us, from: None, seen: 0, named: 0, prefilled: 0 });
        if self.line.len() == MOST_EXPECTED {
            self.line.remove(0);
        }
        let at = self.line.partition_point(|&(other_us, _)| other_us <= due_us);
        self.line.insert(at, (due_us, key));
    }

    fn fill(&mut self, runtime: &Runtime, load: &Load, prefills: &mut [Prefill]) -> usize {
        let tokens = if load.running_calls > 0 { BUSY_TOKENS } else { IDLE_TOKENS };
        let mut room = (tokens.min(load.budget_tokens) / load.block_tokens.max(1)) as usize;
        let mut filled = 0;
        let Self { sessions, references, line, accounts, .. } = self;
        line.retain(|&(_, key)| {
            let Some(session) = sessions.get_mut(&key) else { return false };
            let Some(mut expected) = session.expected else { return false };
            if load.now_us > expected.until_us {
                return false;
            }
            if room == 0 || filled == prefills.len() || !accounts[expected.kind as usize].is_on() {
                return true;
            }
            let Some(prompt) = Self::prompt(references, session, &expected) else { return false };
            let keys = &prompt.keys[..expected.blocks.min(prompt.keys.len())];
            // A resident block's ancestors are resident.
            let resident = keys.partition_point(|&key| runtime.is_resident(key));
            expected.look(resident);
            let missing = keys.len() - resident;
            let goes_on = expected.prefilled < expected.blocks;
            if missing > 0 && goes_on {
                let take = missing.min(room);
                room -= take;
                expected.named = resident + take;
                prefills[filled] = Prefill {
                    workload: session.workload,
                    session: session.name,
                    agent: expected.agent,
                    like_call: prompt.call,
                    blocks: expected.named as u32,
                    probability: (expected.probability * 65_535.0) as u16,
                };
                filled += 1;
            }
            session.expected = Some(expected);
            goes_on
        });
        filled
    }
}

impl Policy for SpeculationPolicy {
    fn about(&self) -> About {
        About {
            name: "speculation".into(),
            observes: "calls and their blocks, ends of sessions where they are told",
            decides: "prefills in idle capacity",
            costs: "a call: about a microsecond; a question: some hundred nanoseconds a session that is expected",
        }
    }

    fn needs(&self) -> Needs {
        Needs::CALLS.and(Needs::IDLE_CAPACITY).and(Needs::PREDICTIONS).and(Needs::TIMES)
    }

    fn hear(&self, _: &Runtime, _: u64, happening: &Happening) {
        // Whatever was missing then, it is computed for the call itself from now on.
        if let Happening::Arrived(call) = happening {
            let key = key(call.workload, call.session);
            self.lock().line.retain(|&(_, expected)| expected != key);
        }
    }

    fn observe(&self, runtime: &Runtime, event: &Event<'_>) {
        match event.kind {
            EventKind::CallStart => self.lock().started(event),
            EventKind::CallEnd => self.lock().ended(runtime, event),
            EventKind::SessionEnd => self.lock().forget(key(event.workload, event.session)),
            _ => {}
        }
    }

    fn idle(&self, runtime: &Runtime, load: &Load, prefills: &mut [Prefill]) -> usize {
        self.lock().fill(runtime, load, prefills)
    }
}
