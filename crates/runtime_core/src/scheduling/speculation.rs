//! `speculation`: prefills what the predicted next call will begin with, while the engine has capacity to spare.
//!
//! When a call of a session has ended, the core is asked who is next. Where it is rather one agent than not
//! (p >= 1/2), this policy wants in the cache, by kind:
//!
//! ```text
//! history  the prompt of the same agent's last call in the same session, if it was here before
//! anchor   else the blocks that the agent's last prompts of different sessions begin with
//! ```
//!
//! **Capacity.** It names at most [`BUSY_TOKENS`] missing tokens a step beside running calls: about what a step computes while it
//! reads the weights anyway (piggybacking of chunks: Sarathi-Serve, OSDI 2024). Beside none it is [`IDLE_TOKENS`], so that a call
//! that arrives waits for one short step. An engine does not ask while calls wait. Whoever is expected first goes first, and
//! the others as far as the pool holds what all before them need.
//!
//! **Ends** with the session's next call, whoever makes it; when as many blocks have been prefilled as were expected (some
//! twice, where the pool has lost them); or when the session has been silent for [`PATIENCE`] times the median predicted.
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
/// Sessions that are expected at a time; the one due first gives way.
const MOST_EXPECTED: usize = 256;
/// A less likely agent is not prefilled for, and a kind that is foreseen more rarely is off.
const LEAST: f32 = 0.5;
/// Part of what is prefilled that has to be used: capacity that nobody needs is cheap.
const LEAST_PAID: f64 = 1.0 / 3.0;
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
        Self::share(foreseen, expected) >= f64::from(LEAST) && Self::share(used, prefilled) >= LEAST_PAID
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
    /// Fewest that were resident when it was looked at, and those when it was last.
    from: Option<usize>,
    seen: usize,
    /// Blocks named when it was last.
    named: usize,
    prefilled: usize,
}

impl Expected {
    /// Takes note of what is resident; what has come since it was named was prefilled.
    fn look(&mut self, resident: usize) {
        self.from = Some(self.from.map_or(resident, |from| from.min(resident)));
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
        let (kind, blocks) = if let Some(prompt) = history {
            (Prefilled::History, prompt.keys.len())
        } else {
            let known = self.references.get(&(event.workload.0, agent));
            (Prefilled::Anchor, known.map_or(0, |known| known.anchor))
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
        // What is due earlier has to fit beside it, or each would drive the other out.
        let mut space = load.pool_blocks.saturating_sub(load.pinned_blocks) as usize;
        let mut filled = 0;
        let Self { sessions, references, line, accounts, .. } = self;
        line.retain(|&(_, key)| {
            let Some(session) = sessions.get_mut(&key) else { return false };
            let Some(mut expected) = session.expected else { return false };
            if load.now_us > expected.until_us {
                return false;
            }
            let fits = expected.blocks <= space;
            space = space.saturating_sub(expected.blocks);
            if !fits || room == 0 || filled == prefills.len() || !accounts[expected.kind as usize].is_on() {
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
            costs: "a call: a prediction and a copy of its keys; a question: a binary search for each expected session",
        }
    }

    fn needs(&self) -> Needs {
        Needs::CALLS.and(Needs::POOL).and(Needs::IDLE_CAPACITY).and(Needs::PREDICTIONS).and(Needs::TIMES)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Policies;
    use crate::runtime::Options;

    const BLOCKS: u64 = 64;

    /// A runtime and the policy, told of calls by agents whose prompts are an anchor of half their blocks and a part of
    /// their session's.
    struct Bench {
        runtime: Runtime,
        workload: WorkloadId,
        policy: SpeculationPolicy,
        calls: u64,
        now_us: u64,
    }

    impl Bench {
        fn new() -> Self {
            let runtime = Runtime::new(Options::for_pool(100_000)).unwrap();
            let workload = runtime.workload("test").unwrap();
            Self { runtime, workload, policy: SpeculationPolicy::default(), calls: 0, now_us: 0 }
        }

        fn prompt(session: u64, agent: u16) -> Vec<u64> {
            let owner = |block| if block < BLOCKS / 2 { u64::MAX } else { session };
            (0..BLOCKS).map(|block| mix(owner(block) ^ mix(u64::from(agent) << 32 | block)) | 1).collect()
        }

        fn tell(&mut self, kind: EventKind, session: u64, agent: u16, blocks: &[u64], hit: usize) {
            let (workload, call, time_us) = (self.workload, self.calls, self.now_us);
            let event = Event { workload, kind, session, agent, call, time_us, blocks, hit };
            self.policy.observe(&self.runtime, &event);
        }

        fn start(&mut self, session: u64, agent: u16, prompt: &[u64]) {
            self.calls += 1;
            self.now_us += 1_000_000;
            let (workload, call, at) = (self.workload, self.calls, self.now_us);
            let hit = self.runtime.call_started(workload, session, call, agent, at, prompt, &[]).unwrap();
            self.tell(EventKind::CallStart, session, agent, prompt, hit);
            self.runtime.stored(workload, call, at, &prompt[hit..], &[]).unwrap();
        }

        fn end(&mut self, session: u64, agent: u16) {
            self.now_us += 1_000_000;
            self.runtime.call_ended(self.workload, session, self.calls, 0, self.now_us, &[], &[]).unwrap();
            self.tell(EventKind::CallEnd, session, agent, &[], 0);
        }

        fn call(&mut self, session: u64, agent: u16) {
            self.start(session, agent, &Self::prompt(session, agent));
            self.end(session, agent);
        }

        /// Agents 0, 1, 2 in turn.
        fn rounds(&mut self, session: u64, rounds: u64) {
            (0..3 * rounds).for_each(|step| self.call(session, (step % 3) as u16));
        }

        /// The pool loses everything.
        fn clear(&mut self) {
            self.runtime.evict_oldest(usize::MAX >> 1, self.now_us, |_| {}).unwrap();
        }

        fn ask(&self, running_calls: u32) -> Vec<Prefill> {
            let load = Load {
                now_us: self.now_us,
                running_calls,
                pool_blocks: 100_000,
                block_tokens: 16,
                budget_tokens: 8_192,
                ..Load::default()
            };
            let mut prefills = [Prefill::default(); 8];
            let n = self.policy.idle(&self.runtime, &load, &mut prefills);
            prefills[..n].to_vec()
        }

        /// Prefills all that is wanted of a session and agent, and says how many blocks there were.
        fn prefill_all(&mut self, session: u64, agent: u16) -> u64 {
            let prompt = Self::prompt(session, agent);
            let mut blocks = 0;
            while let Some(first) = self.ask(0).first().copied() {
                assert_eq!((first.session, first.agent), (session, agent));
                let until = first.blocks as usize;
                assert!(until as u64 > blocks, "it goes on where it was");
                blocks = until as u64;
                self.runtime.restored(self.workload, session, agent, self.now_us, &prompt[..until]).unwrap();
            }
            blocks
        }
    }

    #[test]
    fn the_lost_history_of_the_next_agent_is_wanted_until_it_is_there() {
        let mut bench = Bench::new();
        bench.rounds(1, 20);
        assert_eq!(bench.ask(0), [], "all of it is resident");
        bench.clear();
        let wanted = bench.ask(0);
        assert_eq!((wanted.len(), wanted[0].session, wanted[0].agent), (1, 1, 0));
        assert_eq!(wanted[0].like_call, 58, "the agent's last call");
        assert_eq!(bench.prefill_all(1, 0), BLOCKS);
        bench.call(1, 0);
        let account = bench.policy.account(Prefilled::History);
        assert_eq!((account.prefilled, account.used), (BLOCKS, BLOCKS));
        assert!(account.is_on());
    }

    #[test]
    fn a_session_that_has_not_met_the_agent_gets_what_its_prompts_have_in_common() {
        let mut bench = Bench::new();
        for session in 1..20 {
            bench.rounds(session, 4);
            bench.tell(EventKind::SessionEnd, session, 0, &[], 0);
        }
        bench.clear();
        bench.call(99, 0);
        bench.clear();
        let wanted = bench.ask(0);
        assert_eq!((wanted.len(), wanted[0].session, wanted[0].agent), (1, 99, 1));
        assert_eq!(bench.prefill_all(99, 1), BLOCKS / 2);
        bench.call(99, 1);
        assert_eq!(bench.policy.account(Prefilled::Anchor).used, BLOCKS / 2);
    }

    #[test]
    fn a_step_gets_few_tokens_beside_running_calls_and_none_beyond_its_budget() {
        let mut bench = Bench::new();
        (1..6).for_each(|session| bench.rounds(session, 12));
        bench.clear();
        for (running, tokens) in [(3, BUSY_TOKENS), (0, IDLE_TOKENS)] {
            let wanted = bench.ask(running);
            let blocks: u32 = wanted.iter().map(|prefill| prefill.blocks).sum();
            assert_eq!(blocks, tokens / 16, "nothing of these is resident, so all that is named is missing");
        }
        let load =
            Load { now_us: bench.now_us, pool_blocks: 100_000, block_tokens: 16, budget_tokens: 15, ..Load::default() };
        assert_eq!(bench.policy.idle(&bench.runtime, &load, &mut [Prefill::default(); 8]), 0);
    }

    #[test]
    fn it_ends_with_the_next_call_whoever_makes_it_and_when_the_session_stays_silent() {
        let mut bench = Bench::new();
        bench.rounds(1, 20);
        bench.clear();
        assert_eq!(bench.ask(0).len(), 1);
        bench.start(1, 2, &Bench::prompt(1, 2));
        assert_eq!(bench.ask(0), [], "another agent has called");
        bench.end(1, 2);
        bench.clear();
        assert_eq!(bench.ask(0).len(), 1);
        let before_us = bench.now_us;
        bench.now_us += 3_600_000_000;
        assert_eq!(bench.ask(0), [], "silent for an hour");
        bench.now_us = before_us;
        bench.rounds(1, 2);
        bench.clear();
        assert_eq!(bench.ask(0).len(), 1);
        bench.tell(EventKind::SessionEnd, 1, 0, &[], 0);
        assert_eq!(bench.ask(0), [], "the session has ended");
    }

    #[test]
    fn agents_in_no_order_are_left_alone() {
        let mut bench = Bench::new();
        let (mut named, calls) = (0, 600);
        for step in 0..calls {
            bench.call(step % 5, (mix(step) % 8) as u16);
            bench.clear();
            named += bench.ask(0).len();
        }
        assert!(named * 20 < calls as usize, "{named} of {calls}");
    }

    #[test]
    fn a_kind_that_does_not_pay_is_off_and_tried_again_later() {
        let mut bench = Bench::new();
        bench.rounds(1, 20);
        let account = |bench: &Bench| bench.policy.account(Prefilled::History);
        // Whatever is prefilled is lost again before the call comes.
        let mut tried = 0;
        while account(&bench).is_on() {
            bench.clear();
            bench.prefill_all(1, (tried % 3) as u16);
            bench.clear();
            bench.call(1, (tried % 3) as u16);
            tried += 1;
            assert!(tried < 100, "{:?}", account(&bench));
        }
        bench.clear();
        assert_eq!(bench.ask(0), []);
        let spent = account(&bench).prefilled;
        assert!(account(&bench).foreseen * 10 > account(&bench).expected * 9, "the agents were right");
        while !account(&bench).is_on() {
            bench.call(1, (tried % 3) as u16);
            tried += 1;
            assert!(tried < 2_000, "{:?}", account(&bench));
        }
        assert_eq!(account(&bench).prefilled, spent, "nothing was spent while it was off");
    }

    #[test]
    fn a_kind_whose_prompts_turn_out_otherwise_is_off() {
        let mut bench = Bench::new();
        for step in 0..200 {
            let agent = (step % 3) as u16;
            bench.start(1, agent, &Bench::prompt(1_000 + step, agent)[(BLOCKS / 2) as usize..]);
            bench.end(1, agent);
            bench.clear();
        }
        assert!(!bench.policy.account(Prefilled::History).is_on());
        assert_eq!(bench.ask(0), []);
    }

    #[test]
    fn the_keys_it_remembers_are_bounded() {
        let mut bench = Bench::new();
        let prompt: Vec<u64> = (1..=40_000).collect();
        for session in 0..40 {
            bench.now_us += 1;
            bench.calls += 1;
            bench.tell(EventKind::CallStart, session, 0, &prompt, 0);
            assert!(bench.policy.remembered_keys() <= MOST_KEYS);
        }
        assert!(bench.policy.remembered_keys() > MOST_KEYS / 2, "no more was forgotten than had to");
    }

    #[test]
    fn an_engine_without_idle_capacity_is_refused() {
        let policies = Policies::new(vec![Box::new(SpeculationPolicy::default())]);
        let error = policies.wire(Needs::ALL.without(Needs::IDLE_CAPACITY)).unwrap_err();
        assert!(error.to_string().contains("speculation") && error.to_string().contains("prefills in idle capacity"));
    }
}
