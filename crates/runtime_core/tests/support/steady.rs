//! A runtime in its steady state: a full pool and sessions that go on calling, for benchmarks and tests.
//!
//! Every session walks its agents mostly in turn; prompts are the agent's anchor, the session's history and something
//! new, as in recorded workloads. Nothing allocates after the first calls of each session.

use runtime_core::ids::{mix, WorkloadId};
use runtime_core::kv::Prediction;
use runtime_core::runtime::{EventKind, Events, Options};
use runtime_core::Runtime;

/// Blocks of an agent's anchor, of one call's new text, of one answer, and a history's longest.
const ANCHOR: usize = 32;
const NEW: usize = 12;
const OUTPUT: usize = 4;

struct Session {
    name: u64,
    agent: u64,
    step: u64,
    /// Everything that was said, as keys below each agent's anchor: key of position i is a hash of (agent, session, i).
    said: usize,
}

/// See the module's page.
pub(crate) struct Steady {
    /// The runtime.
    pub(crate) runtime: Runtime,
    /// Its one workload.
    pub(crate) workload: WorkloadId,
    sessions: Vec<Session>,
    agents: u64,
    longest: usize,
    now_us: u64,
    random: u64,
    next_name: u64,
    next_call: u64,
    blocks: Vec<u64>,
    victims: u64,
    predictions: [Prediction; 64],
    scores: Vec<f32>,
    resident: usize,
}

impl Steady {
    /// `pool` blocks, `agents` agents and as many sessions as fill the pool one and a half times.
    pub(crate) fn new(pool: usize, sessions: usize, agents: u64) -> Self {
        let runtime = Runtime::new(Options::for_pool(pool)).expect("sizes are in range");
        let workload = runtime.workload("steady").expect("the first workload has room");
        let longest = (pool * 3 / 2 / sessions).clamp(64, 4096);
        let session = |i: usize| Session { name: i as u64, agent: 0, step: 0, said: 0 };
        let none = Prediction { agent: 0, step: 0, probability: 0.0, median_s: 0.0 };
        Self {
            runtime,
            workload,
            sessions: (0..sessions).map(session).collect(),
            agents,
            longest,
            now_us: 1_000_000,
            random: 1,
            next_name: sessions as u64,
            next_call: 1,
            blocks: Vec::with_capacity(ANCHOR + longest + NEW + OUTPUT),
            victims: 0,
            predictions: [none; 64],
            scores: vec![0.0; 4096],
            resident: 0,
        }
    }

    fn draw(&mut self) -> u64 {
        self.random = mix(self.random);
        self.random
    }

    fn send(&self, kind: EventKind, session: u64, agent: u64, call: u64, blocks: &[u64]) -> u64 {
        let events = Events {
            kinds: &[kind as u8],
            sessions: &[session],
            agents: &[agent as u16],
            calls: &[call],
            times_us: &[self.now_us],
            offsets: &[0, blocks.len() as u32],
            blocks,
        };
        self.runtime.observe(self.workload, &events).map_or(0, |done| done.hit_blocks)
    }

    /// Starts the next session's next call; returns (session, agent, call, prompt's blocks, resident ones).
    pub(crate) fn begin(&mut self) -> (u64, u64, u64, usize, usize) {
        let at = (self.draw() % self.sessions.len() as u64) as usize;
        self.now_us += 50_000 + self.random % 100_000;
        let other = self.draw();
        let longest = self.longest;
        let next_name = self.next_name;
        let x = &mut self.sessions[at];
        if x.said + NEW > longest {
            (x.name, x.step, x.said) = (next_name, 0, 0);
            self.next_name += 1;
        }
        // Mostly in turn, sometimes anyone.
        x.agent = if other % 8 == 0 { other >> 8 } else { x.agent + 1 } % self.agents;
        x.step += 1;
        x.said += NEW;
        let (name, agent, said) = (x.name, x.agent, x.said);
        self.blocks.clear();
        self.blocks.extend((0..ANCHOR as u64).map(|i| mix(agent << 32 | i)));
        self.blocks.extend((0..said as u64).map(|i| mix(mix(name << 20 | agent) ^ i)));
        let call = self.next_call;
        self.next_call += 1;
        let hit = self.send(EventKind::CallStart, name, agent, call, &self.blocks) as usize;
        (name, agent, call, self.blocks.len(), hit)
    }

    /// Blocks that must go before `n` more fit.
    pub(crate) fn lacking(&self, n: usize) -> usize {
        (self.resident + n).saturating_sub(self.runtime.options().pool_blocks)
    }

    /// Evicts `n` blocks; returns how many went.
    pub(crate) fn evict(&mut self, n: usize) -> usize {
        let mut sum = 0u64;
        let done = self.runtime.evict(n, self.now_us, |key| sum = sum.wrapping_add(key)).unwrap_or(0);
        self.victims = self.victims.wrapping_add(sum);
        self.resident -= done;
        done
    }

    /// Stores what is missing of the prompt and an answer, and ends the call.
    pub(crate) fn finish(&mut self, (name, agent, call, prompt, hit): (u64, u64, u64, usize, usize)) {
        self.now_us += 400_000;
        self.send(EventKind::Stored, name, agent, call, &self.blocks[hit..prompt]);
        let said = self.blocks.len() as u64;
        self.blocks.extend((0..OUTPUT as u64).map(|i| mix(mix(name << 20 | agent) ^ (said - ANCHOR as u64 + i))));
        self.send(EventKind::CallEnd, name, agent, call, &self.blocks[prompt..]);
        self.resident = self.runtime.resident_blocks().unwrap_or(0);
    }

    /// One whole call; returns its blocks.
    pub(crate) fn call(&mut self) -> usize {
        let call = self.begin();
        let lacking = self.lacking(call.3 - call.4 + OUTPUT);
        if lacking > 0 {
            self.evict(lacking);
        }
        self.finish(call);
        call.3 + OUTPUT
    }

    /// One call reported by name alone: two events.
    pub(crate) fn identity(&mut self) {
        let at = (self.draw() % self.sessions.len() as u64) as usize;
        self.now_us += 1_000;
        let x = &mut self.sessions[at];
        x.agent = (x.agent + 1) % self.agents;
        let (name, agent, call) = (x.name, x.agent, self.next_call);
        self.next_call += 1;
        self.send(EventKind::CallStart, name, agent, call, &[]);
        self.now_us += 1_000;
        self.send(EventKind::CallEnd, name, agent, call, &[]);
    }

    /// Predicts `steps` steps of some session; returns how many guesses there are.
    pub(crate) fn predict(&mut self, steps: usize) -> usize {
        let at = (self.draw() % self.sessions.len() as u64) as usize;
        let name = self.sessions[at].name;
        self.runtime.predict(self.workload, name, steps, &mut self.predictions).unwrap_or(0)
    }

    /// Scores `n` blocks of the last call, repeated.
    pub(crate) fn score(&mut self, n: usize) -> f32 {
        let n = n.min(self.scores.len());
        for (keys, out) in std::iter::repeat(&self.blocks[..]).zip(self.scores[..n].chunks_mut(self.blocks.len())) {
            self.runtime.score_blocks(&keys[..out.len()], out);
        }
        self.scores[0]
    }
}
