//! Arbitrary bytes as events on a small pool, checked after every event against a model made of maps.
//!
//! The model knows, per block, its parent and whether it is resident, and per call in flight which blocks it holds.
//! Where the index counted blocks as forgotten or untracked the model takes over what is left; otherwise the two
//! must agree block for block. Shared by the property tests (bounded) and the fuzz target `events`.

use runtime_core::ids::{mix, WorkloadId};
use runtime_core::kv::{Config, Prediction, Repairs};
use runtime_core::runtime::{EventKind, Events, Options};
use runtime_core::Runtime;
use std::collections::{HashMap, HashSet};

const NAMES: u64 = 24;

struct Call {
    id: u64,
    session: u64,
    /// Which stay of the session in the table this is.
    stay: u64,
    /// Keys of the prompt, then of the answer.
    path: Vec<u64>,
    prompt: usize,
    /// Leading blocks that are resident and must stay.
    held: usize,
    cut: bool,
}

struct World {
    runtime: Runtime,
    workloads: [WorkloadId; 2],
    parent_of: HashMap<u64, u64>,
    resident: HashSet<u64>,
    calls: Vec<Call>,
    /// Calls that wait: id, session, agent, prompt.
    queued: Vec<(u64, u64, u16, Vec<u64>)>,
    histories: HashMap<u64, Vec<u64>>,
    stays: HashMap<u64, u64>,
    next_call: u64,
    next_symbol: u64,
    now_us: u64,
    before: Repairs,
    scores: Vec<f32>,
    /// There are segments enough for every split.
    ample: bool,
}

/// Run `bytes` as events; the first three choose the sizes.
///
/// # Panics
/// If an invariant does not hold: that is the finding.
pub(crate) fn run(bytes: &[u8]) {
    let [blocks, segments, rest @ ..] = bytes else { return };
    let blocks = 1 + usize::from(*blocks % 120);
    let segments = if segments % 3 == 0 { 2 + usize::from(segments / 3) % 24 } else { 1024 };
    let mut world = World::new(blocks, segments);
    for event in rest.chunks_exact(4) {
        world.step(event[0], event[1], event[2], event[3]);
        world.check();
    }
}

fn child(parent: u64, symbol: u64) -> u64 {
    mix(parent ^ mix(symbol)).max(1)
}

impl World {
    fn new(blocks: usize, segments: usize) -> Self {
        let options = Options { pool_blocks: blocks, sessions: 8, config: Config::default() };
        let runtime = Runtime::with_segments(options, segments).unwrap();
        let workloads = ["one", "two"].map(|name| runtime.workload(name).unwrap());
        Self {
            runtime,
            workloads,
            parent_of: HashMap::new(),
            resident: HashSet::new(),
            calls: Vec::new(),
            queued: Vec::new(),
            histories: HashMap::new(),
            stays: HashMap::new(),
            next_call: 1,
            next_symbol: 0,
            now_us: 1,
            before: Repairs::default(),
            scores: Vec::new(),
            ample: segments > blocks,
        }
    }

    fn step(&mut self, action: u8, a: u8, b: u8, c: u8) {
        self.now_us += match c % 16 {
            0 => 0,
            15 => 60_000_000,
            n => u64::from(n) * 40_000,
        };
        match action % 32 {
            0..=8 => self.start(a, b, c, false),
            9 => self.start(a, b, c, true),
            10..=15 => self.store(a, 1 + b as usize % 12, c % 2 == 0),
            16..=22 => self.end(a, b as usize % 6, c % 4 != 0),
            23..=26 => self.evict(1 + a as usize % 40),
            27 => self.removed(&[a, b, c]),
            28 if b < 16 => self.reset(),
            28 => self.queue(a, b, c),
            29 if b < 128 => self.end_session(u64::from(a) % NAMES),
            29 => self.cancel(a),
            30 => self.unknown(a, b),
            31 if b < 128 => self.restore(u64::from(a) % NAMES, b as usize, c as usize),
            _ => self.tool(u64::from(a) % NAMES, u16::from(b)),
        }
        self.ask(u64::from(a) % NAMES);
    }

    fn workload(&self, session: u64) -> WorkloadId {
        self.workloads[usize::from(session % 5 == 4)]
    }

    fn send(&self, kind: EventKind, session: u64, agent: u16, call: u64, blocks: &[u64]) -> u64 {
        let events = Events {
            kinds: &[kind as u8],
            sessions: &[session],
            agents: &[agent],
            calls: &[call],
            times_us: &[self.now_us],
            offsets: &[0, blocks.len() as u32],
            blocks,
        };
        let done = self.runtime.observe(self.workload(session), &events).unwrap();
        assert_eq!(done.events, 1);
        done.hit_blocks
    }

    /// The path `above` continued by `n` blocks that nobody has used.
    fn grow(&mut self, mut path: Vec<u64>, n: usize) -> Vec<u64> {
        for _ in 0..n {
            self.next_symbol += 1;
            path.push(child(path.last().copied().unwrap_or(0), self.next_symbol | 1 << 40));
        }
        path
    }

    fn anchor(agent: u8) -> Vec<u64> {
        let mut path = Vec::new();
        for symbol in 0..2 + u64::from(agent % 3) * 4 {
            path.push(child(path.last().copied().unwrap_or(u64::from(agent % 3)), symbol));
        }
        path
    }

    /// Session, agent and prompt of a call.
    fn invent(&mut self, a: u8, b: u8, c: u8) -> (u64, u16, Vec<u64>) {
        let session = u64::from(a) % NAMES;
        let agent = if b >= 250 { u16::from(b) * 200 } else { u16::from(b) % 5 };
        let known = self.histories.get(&session).cloned();
        let base = match (b / 16) % 4 {
            0 | 1 => known.unwrap_or_else(|| Self::anchor(a)),
            2 => {
                let mut path = known.unwrap_or_else(|| Self::anchor(a));
                path.truncate(path.len() * usize::from(c) / 256);
                path
            }
            _ => self.histories.get(&(u64::from(c) % NAMES)).cloned().unwrap_or_else(|| Self::anchor(b)),
        };
        let mut path = self.grow(base, c as usize % 9);
        path.truncate(160);
        for (i, &key) in path.iter().enumerate() {
            self.parent_of.insert(key, if i == 0 { 0 } else { path[i - 1] });
        }
        (session, agent, path)
    }

    fn queue(&mut self, a: u8, b: u8, c: u8) {
        let (session, agent, path) = self.invent(a, b, c);
        self.enters(session);
        let id = self.next_call;
        self.next_call += 1;
        self.send(EventKind::CallQueued, session, agent, id, &path);
        if c % 8 == 0 {
            let before = self.runtime.repairs().unwrap().duplicate_calls;
            self.send(EventKind::CallQueued, session, agent, id, &path);
            assert_eq!(self.runtime.repairs().unwrap().duplicate_calls, before + 1);
        }
        self.queued.push((id, session, agent, path));
    }

    fn cancel(&mut self, a: u8) {
        if !self.queued.is_empty() {
            let (id, session, ..) = self.queued.swap_remove(a as usize % self.queued.len());
            self.send(EventKind::CallEnd, session, 0, id, &[]);
        }
    }

    fn enters(&mut self, session: u64) {
        if !self.runtime.knows(self.workload(session), session) {
            *self.stays.entry(session).or_default() += 1;
        }
    }

    fn start(&mut self, a: u8, b: u8, c: u8, again: bool) {
        let (mut id, session, agent, path) = if c % 2 == 0 && !self.queued.is_empty() {
            // Mostly in order of arrival.
            self.queued.remove(if b < 200 { 0 } else { a as usize % self.queued.len() })
        } else {
            let (session, agent, path) = self.invent(a, b, c);
            self.next_call += 1;
            (self.next_call - 1, session, agent, path)
        };
        let hit = path.iter().take_while(|key| self.resident.contains(key)).count();
        let hit = hit.min(self.runtime.options().pool_blocks);
        if again && !self.calls.is_empty() {
            // An id that is in flight: the earlier call is over.
            let at = a as usize % self.calls.len();
            if self.workload(self.calls[at].session) == self.workload(session) {
                id = self.calls.swap_remove(at).id;
            }
        }
        self.histories.insert(session, path.clone());
        self.enters(session);
        let stay = self.stays[&session];
        let found = self.send(EventKind::CallStart, session, agent, id, &path);
        assert_eq!(found, hit as u64, "hits");
        let prompt = path.len();
        self.calls.push(Call { id, session, stay, path, prompt, held: hit, cut: false });
    }

    fn expect_stored(&mut self, at: usize, goal: usize) {
        let call = &self.calls[at];
        if !call.cut {
            self.resident.extend(&call.path[call.held..goal]);
        }
    }

    /// The call holds what it stored, up to where the index had to give up.
    fn hold(&mut self, at: usize, goal: usize) {
        let missed = self.runtime.repairs().unwrap().untracked_blocks - self.before.untracked_blocks;
        let call = &mut self.calls[at];
        call.held = goal - missed as usize;
        call.cut |= missed > 0;
    }

    fn make_room(&mut self, n: usize) {
        let free = self.runtime.options().pool_blocks - self.runtime.resident_blocks().unwrap();
        if n > free {
            self.evict(n - free);
        }
    }

    fn store(&mut self, a: u8, n: usize, room: bool) {
        if self.calls.is_empty() {
            return;
        }
        let at = a as usize % self.calls.len();
        if room {
            self.make_room(n);
            self.check();
        }
        let call = &self.calls[at];
        let goal = (call.held + n).min(call.prompt);
        let (session, id, keys) = (call.session, call.id, call.path[call.held..goal].to_vec());
        self.expect_stored(at, goal);
        self.send(EventKind::Stored, session, 0, id, &keys);
        self.hold(at, goal);
    }

    fn end(&mut self, a: u8, output: usize, whole: bool) {
        if self.calls.is_empty() {
            return;
        }
        let at = a as usize % self.calls.len();
        if whole {
            self.store(a, 200, true);
            self.check();
        }
        let path = self.grow(self.calls[at].path.clone(), output);
        for i in self.calls[at].path.len()..path.len() {
            self.parent_of.insert(path[i], if i == 0 { 0 } else { path[i - 1] });
        }
        let call = &mut self.calls[at];
        call.path = path;
        let (session, id, keys) = (call.session, call.id, call.path[call.prompt..].to_vec());
        // The answer hangs below the prompt, or nowhere.
        if call.held == call.prompt {
            let goal = call.path.len();
            self.expect_stored(at, goal);
        }
        self.histories.insert(session, self.calls[at].path.clone());
        self.send(EventKind::CallEnd, session, 0, id, &keys);
        self.calls.swap_remove(at);
    }

    fn evict(&mut self, n: usize) {
        let held: HashSet<u64> = self.calls.iter().flat_map(|call| call.path[..call.held].iter().copied()).collect();
        let mut victims = Vec::new();
        let count = self.runtime.evict(n, self.now_us, |key| victims.push(key)).unwrap();
        assert_eq!(count, victims.len());
        assert!(count <= n, "{count} victims of {n}");
        for victim in &victims {
            assert!(self.resident.remove(victim), "{victim:#x} is not resident");
            assert!(!held.contains(victim), "{victim:#x} is held by a call in flight");
            let child = self.resident.iter().find(|key| self.parent_of[key] == *victim);
            assert!(child.is_none(), "{victim:#x} goes before its child");
        }
        if count < n {
            // Nothing more can go: all is held, or above something that is; a segment is held as a whole.
            let blocks = self.runtime.audit().unwrap();
            let parents: HashSet<u64> = blocks.iter().map(|block| block.parent).collect();
            for leaf in blocks.iter().filter(|block| !parents.contains(&block.key)) {
                assert!(leaf.pinned, "{:#x} could have gone", leaf.key);
                if self.ample {
                    assert!(held.contains(&leaf.key), "{:#x} is held by nobody", leaf.key);
                }
            }
        }
    }

    fn removed(&mut self, choices: &[u8]) {
        let mut all: Vec<u64> = self.resident.iter().copied().collect();
        all.sort_unstable();
        let mut keys = vec![12345];
        keys.extend(choices.iter().filter_map(|&c| all.get(c as usize % all.len().max(1))));
        self.send(EventKind::Removed, 0, 0, 0, &keys);
        let after: HashSet<u64> = self.runtime.audit().unwrap().iter().map(|block| block.key).collect();
        // A block that was named and has nothing below is gone, unless a call holds it; a block that is gone was
        // named, or hangs below one that was.
        for key in &keys {
            let child = after.iter().any(|below| self.parent_of[below] == *key);
            let pinned = self.runtime.audit().unwrap().iter().any(|block| block.key == *key && block.pinned);
            assert!(!after.contains(key) || child || pinned, "{key:#x} is still there");
        }
        for key in self.resident.difference(&after) {
            let mut above = *key;
            while above != 0 && !keys.contains(&above) {
                above = self.parent_of[&above];
            }
            assert!(above != 0, "{key:#x} was not named");
        }
        self.resident = after;
    }

    /// Blocks of a session's history come back from a lower tier.
    fn restore(&mut self, session: u64, agent: usize, n: usize) {
        let Some(history) = self.histories.get(&session) else { return };
        let path = history[..history.len().min(n)].to_vec();
        self.make_room(path.len());
        self.check();
        if self.runtime.knows(self.workload(session), session) {
            self.resident.extend(&path);
        }
        let agent = agent as u16 % 5;
        self.runtime.restored(self.workload(session), session, agent, self.now_us, &path).unwrap();
    }

    fn reset(&mut self) {
        self.send(EventKind::Reset, 0, 0, 0, &[]);
        self.resident.clear();
        self.calls.clear();
        assert_eq!(self.runtime.resident_blocks().unwrap(), 0);
    }

    fn end_session(&mut self, session: u64) {
        if self.runtime.knows(self.workload(session), session) {
            let stay = self.stays[&session];
            self.calls.retain(|call| (call.session, call.stay) != (session, stay));
        }
        self.histories.remove(&session);
        self.send(EventKind::SessionEnd, session, 0, 0, &[]);
    }

    fn unknown(&mut self, a: u8, b: u8) {
        let id = u64::MAX - u64::from(a);
        self.send(EventKind::Stored, u64::from(a), 0, id, &[u64::from(b)]);
        self.send(EventKind::CallEnd, 1000 + u64::from(a), 0, id, &[u64::from(b)]);
        // Block 0 is that of hash 1; neither is anybody's here.
        self.send(EventKind::Removed, 0, 0, 0, &[0]);
    }

    fn tool(&mut self, session: u64, tool: u16) {
        self.send(EventKind::ToolStart, session, tool, 0, &[]);
        self.send(EventKind::ToolEnd, session, tool, 0, &[]);
    }

    fn ask(&mut self, session: u64) {
        let none = Prediction { agent: 0, step: 0, probability: 0.0, median_s: 0.0 };
        let mut predictions = [none; 16];
        let workload = self.workload(session);
        let n = self.runtime.predict(workload, session, 4, &mut predictions).unwrap();
        self.runtime.predict_times(workload, session, self.now_us, &mut predictions[..n]).unwrap();
        let mut sums = [0.0; 7];
        for p in &predictions[..n] {
            assert!((0.0..=1.0).contains(&p.probability) && p.median_s >= 0.0, "{p:?}");
            sums[p.step as usize] += p.probability;
        }
        assert!(sums.iter().all(|&sum| sum <= 1.001), "{sums:?}");
        let mut scores = [f32::NAN; 6];
        let agents = [0, 1, 2, 3, 4, u16::MAX];
        self.runtime.score_agents(workload, session, self.now_us, 5.0, &agents, &mut scores).unwrap();
        assert!(scores.iter().all(|score| (0.0..=1.0).contains(score)), "{scores:?}");
    }

    /// The index is consistent and agrees with the model.
    fn check(&mut self) {
        let blocks = self.runtime.audit().unwrap();
        let repairs = self.runtime.repairs().unwrap();
        let lost = |now: &Repairs| now.forgotten_blocks + now.untracked_blocks;
        let missed = lost(&repairs) - lost(&self.before);
        let actual: HashSet<u64> = blocks.iter().map(|block| block.key).collect();
        assert_eq!(self.runtime.resident_blocks().unwrap(), actual.len());
        assert!(actual.is_subset(&self.resident), "blocks that nobody stored");
        let missing = (self.resident.len() - actual.len()) as u64;
        assert!(missing <= missed, "{missing} blocks are missing, {missed} were counted");
        self.resident = actual;
        self.before = repairs;
        for block in &blocks {
            assert_eq!(block.parent, self.parent_of[&block.key], "parent of {:#x}", block.key);
            assert!(block.score.is_finite() && block.score >= 0.0, "{block:?}");
        }
        for call in &self.calls {
            let gone = call.path[..call.held].iter().find(|key| !self.resident.contains(key));
            assert_eq!(gone, None, "call {} lost a block it holds", call.id);
        }
        let keys: Vec<u64> = blocks.iter().map(|block| block.key).chain([12345]).collect();
        self.scores.resize(keys.len(), f32::NAN);
        self.runtime.score_blocks(&keys, &mut self.scores);
        for (block, score) in blocks.iter().zip(&self.scores) {
            assert_eq!(block.score, *score, "{:#x}", block.key);
        }
        assert_eq!(self.scores[blocks.len()], 0.0);
        self.scores.clear();
    }
}
