//! Sessions and agents of calls that do not say whose they are, from the blocks of their prompts alone.
//!
//! A prompt's block keys are a path from the root of a tree; calls of one session walk on along the same path. Two rules:
//!
//! * **Session.** A call belongs to the session of the deepest block it shares with earlier calls, if only that session
//!   has started through this block, none of its calls is in flight, and it walks on: it shares a quarter of the session's
//!   last prompt, half of it where that is no more than the session started with, and it brings something new or is
//!   longer than what the session started with. A run of the same task starts with what an earlier one started with, and
//!   brings nothing new. Otherwise the call starts a session. Where prompts leave the path at the same block for the
//!   fifth time, that block ends a system prompt whose sessions came one after the other: it counts as started through by
//!   others from then on.
//! * **Agent.** The deepest block that 16 sessions, and half of those with the same first block, have started through is
//!   their anchor (the end of a system prompt): it names the agent of a session that starts. Without one the agent is 0.
//!
//! An agent with a system prompt of its own shares no block with the other agents of its run, so it becomes a session of
//! its own: what is inferred is the growing conversation, not the run. `docs/cachesage.md` says what that costs and why
//! linking such conversations by their times and lengths was left out.
//!
//! | part | bytes |
//! |---|---|
//! | block table: key, session, starts, age; sets of eight, the longest unused goes first | 16 a block |
//! | sessions: the least recently used is forgotten | 40 each |
//! | anchors | 16 each, [`ANCHORS`] |
//!
//! Of a prompt of n blocks, the first 16, every eighth and those after the last eighth are looked up and kept: n / 8 + 23
//! at most. Single writer, no clock, nothing allocated after [`Identity::new`]; the same calls give the same answers.
//!
//! | operation | allocates | worst case |
//! |---|---|---|
//! | [`Identity::new`] | everything, once | |
//! | [`Identity::started`] | no | 2 (n / 8 + 23) sets of eight, 16 anchors |
//! | [`Identity::ended`] | no | n / 8 + 23 sets of eight, n blocks of answer |

use crate::error::{Error, Result};
use crate::ids::mix;

/// Blocks of a set: two cache lines.
const WAYS: usize = 8;
/// Blocks up to this depth are all kept.
const DENSE: usize = 16;
/// Below, every so many.
const STRIDE: usize = 8;
/// Agents that can be told apart; sessions of further ones have agent 0.
pub const ANCHORS: usize = 4096;
/// What a session that starts through a block adds to its count.
const START: u16 = 4;
/// Prompts may leave the path of their session at one block this often, until it is taken for the end of an anchor.
const FORKS: u16 = 4;
/// A block is an anchor once so many sessions have started through it, and half of all that started with its root.
const ANCHOR_STARTS: u32 = 16;
/// Anchors are looked for in so many places of their table.
const PROBES: usize = 16;
/// Of a path, so many blocks may have been forgotten: the table is full, and its sets are not equally so.
const FORGOTTEN: usize = 2;

/// Sizes of an [`Identity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Blocks remembered, 64 to 2^28: an eighth of the blocks of live conversations will do.
    pub blocks: usize,
    /// Sessions remembered, 8 to 65,536.
    pub sessions: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { blocks: 1 << 16, sessions: 4096 }
    }
}

/// Whose call it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inferred {
    /// The session; the top bit is set, which keeps it apart from small numbers of the caller's own.
    pub session: u64,
    /// The agent: 0, or 1 to [`ANCHORS`] by its anchor, in order of appearance.
    pub agent: u16,
    /// Names the call to [`Identity::ended`].
    pub call: Started,
    /// Whether the call starts the session.
    pub is_new: bool,
}

/// A call that has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started(u32);

impl Started {
    /// As a number.
    pub const fn to_bits(self) -> u32 {
        self.0
    }

    /// From [`Started::to_bits`]; a number that never was one is a call of nobody's.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }
}

#[derive(Clone, Copy, Debug)]
struct Block {
    key: u64,
    /// Slot and generation of the last session that used it.
    session: u32,
    /// [`START`] for each session that started through it, 1 for each prompt that left its session's path below it.
    starts: u16,
    /// When it was used last, in sixteens of calls; wraps.
    age: u16,
}

const VACANT: Block = Block { key: 0, session: 0, starts: 0, age: 0 };

#[derive(Clone, Copy, Debug)]
struct Session {
    /// 0 while vacant.
    name: u64,
    newer: u32,
    older: u32,
    /// Blocks of the first prompt.
    start: u32,
    /// Blocks of the last prompt.
    prompt: u32,
    /// Blocks of the last prompt and its answer.
    reach: u32,
    in_flight: u16,
    generation: u16,
    agent: u16,
}

/// Infers sessions and agents; see the module's page.
#[derive(Debug)]
pub struct Identity {
    blocks: Box<[Block]>,
    /// The last one is the head of the ring in order of use.
    sessions: Box<[Session]>,
    /// Key and number of each.
    anchors: Box<[(u64, u16)]>,
    named_anchors: u16,
    calls: u64,
    names: u64,
}

/// Whether the block at `depth` (from 1) of a prompt of `n` is kept.
#[inline]
fn is_kept(depth: usize, n: usize) -> bool {
    depth <= DENSE || depth % STRIDE == 0 || depth > n / STRIDE * STRIDE
}

impl Session {
    /// Whether a prompt of `n` blocks goes on with this one, whose last block it shares is at `depth`.
    fn walks_on(&self, depth: usize, n: usize) -> bool {
        let [start, prompt, reach] = [self.start, self.prompt, self.reach].map(|blocks| blocks as usize);
        // What another run of the same task shares, too, is worth half.
        let least = if depth > start { prompt / 4 } else { prompt / 2 };
        // Where the answer filled no block, the next prompt may fill none either.
        let brings_something = depth < n || n > start.min(reach.saturating_sub(1));
        depth >= least && brings_something
    }
}

/// What the table knows of a prompt.
struct Known {
    /// Blocks shared with earlier calls.
    depth: usize,
    /// Entry of the deepest of them.
    deepest: Option<usize>,
    /// Depth of the anchor, 0 without.
    anchor: usize,
}

impl Identity {
    /// Makes an empty one. Allocates everything it will ever use.
    pub fn new(options: Options) -> Result<Self> {
        let within = |what: &'static str, min: usize, max: usize, requested: usize| {
            if (min..=max).contains(&requested) {
                Ok(())
            } else {
                Err(Error::OutOfRange { what, min: min as u64, max: max as u64, requested: requested as u64 })
            }
        };
        within("blocks", 64, 1 << 28, options.blocks)?;
        within("sessions", 8, 1 << 16, options.sessions)?;
        let sets = options.blocks.div_ceil(WAYS).next_power_of_two();
        let n = options.sessions as u32;
        let ring = |slot: u32| Session {
            name: 0,
            newer: (slot + 1) % (n + 1),
            older: (slot + n) % (n + 1),
            start: 0,
            prompt: 0,
            reach: 0,
            in_flight: 0,
            generation: 0,
            agent: 0,
        };
        Ok(Self {
            blocks: vec![VACANT; sets * WAYS].into(),
            sessions: (0..=n).map(ring).collect(),
            anchors: vec![(0, 0); ANCHORS].into(),
            named_anchors: 0,
            calls: 0,
            names: 0,
        })
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.blocks) + size_of_val(&*self.sessions) + size_of_val(&*self.anchors)
    }

    #[inline]
    fn set(&self, key: u64) -> usize {
        (mix(key) as usize & (self.blocks.len() / WAYS - 1)) * WAYS
    }

    #[inline]
    fn find(&self, key: u64) -> Option<usize> {
        let at = self.set(key);
        self.blocks[at..at + WAYS].iter().position(|b| b.key == key && b.starts > 0).map(|way| at + way)
    }

    #[inline]
    fn slot(&self, reference: u32) -> Option<usize> {
        let slot = (reference & 0xFFFF) as usize;
        let session = self.sessions[..self.sessions.len() - 1].get(slot)?;
        (session.name != 0 && session.generation == (reference >> 16) as u16).then_some(slot)
    }

    #[inline]
    fn reference(&self, slot: usize) -> u32 {
        u32::from(self.sessions[slot].generation) << 16 | slot as u32
    }

    /// Remembers that a session has used a block, and adds to what started through it.
    #[inline]
    fn keep(&mut self, key: u64, session: u32, starts: u16) {
        let age = (self.calls >> 4) as u16;
        let at = self.find(key).unwrap_or_else(|| {
            let at = self.set(key);
            let unused = |b: &Block| if b.starts == 0 { u16::MAX } else { age.wrapping_sub(b.age) };
            let oldest = (at..at + WAYS).max_by_key(|&i| unused(&self.blocks[i])).unwrap_or(at);
            self.blocks[oldest] = Block { key, ..VACANT };
            oldest
        });
        let block = &mut self.blocks[at];
        block.session = session;
        block.age = age;
        block.starts = block.starts.saturating_add(if block.starts == 0 { START } else { starts });
    }

    fn look_up(&self, keys: &[u64]) -> Known {
        let n = keys.len();
        let mut known = Known { depth: 0, deepest: None, anchor: 0 };
        let (mut root, mut forgotten) = (0, 0);
        let mut depth = 1;
        while depth <= n {
            let step = if depth < DENSE { 1 } else { STRIDE };
            let Some(at) = self.find(keys[depth - 1]) else {
                forgotten += 1;
                if forgotten > FORGOTTEN {
                    break;
                }
                depth += step;
                continue;
            };
            let starts = u32::from(self.blocks[at].starts / START) + 1;
            if depth == 1 {
                root = starts;
            }
            if starts >= ANCHOR_STARTS.max(root / 2) {
                known.anchor = depth;
            }
            (known.depth, known.deepest) = (depth, Some(at));
            depth += step;
        }
        // The last blocks of an earlier prompt lie between two of every eighth.
        for depth in known.depth + 1..=n.min(known.depth + STRIDE - 1) {
            let Some(at) = self.find(keys[depth - 1]) else { break };
            (known.depth, known.deepest) = (depth, Some(at));
        }
        known
    }

    /// A call with these blocks (root first) starts: whose is it?
    pub fn started(&mut self, keys: &[u64]) -> Inferred {
        self.calls += 1;
        let n = keys.len();
        let known = self.look_up(keys);
        let continued = known.deepest.and_then(|at| {
            let block = &self.blocks[at];
            let slot = self.slot(block.session)?;
            let session = &self.sessions[slot];
            let is_free = block.starts < START + FORKS && session.in_flight == 0;
            (is_free && session.walks_on(known.depth, n)).then_some(slot)
        });
        let slot = continued.unwrap_or_else(|| {
            let agent = if known.anchor > 0 { self.agent(keys[known.anchor - 1]) } else { 0 };
            self.start_session(agent)
        });
        let reference = self.reference(slot);
        // A prompt that leaves the path before the end of the last one may be a stranger's: after a few, it is.
        let starts = match continued {
            None => START,
            Some(slot) => u16::from(known.depth < self.sessions[slot].prompt as usize),
        };
        for depth in (1..=n).filter(|&depth| is_kept(depth, n)) {
            self.keep(keys[depth - 1], reference, starts);
        }
        self.touch(slot);
        let session = &mut self.sessions[slot];
        if continued.is_none() {
            session.start = n as u32;
        }
        (session.prompt, session.reach) = (n as u32, n as u32);
        session.in_flight = session.in_flight.saturating_add(1);
        Inferred { session: session.name, agent: session.agent, call: Started(reference), is_new: continued.is_none() }
    }

    /// A call has ended; its answer filled these blocks, which follow the prompt's.
    pub fn ended(&mut self, call: Started, output: &[u64]) {
        let Some(slot) = self.slot(call.0) else { return };
        let session = &mut self.sessions[slot];
        session.in_flight = session.in_flight.saturating_sub(1);
        let prompt = session.prompt as usize;
        let n = prompt + output.len();
        session.reach = n as u32;
        for (i, &key) in output.iter().enumerate() {
            if is_kept(prompt + i + 1, n) {
                self.keep(key, call.0, 0);
            }
        }
    }

    /// The number of an anchor.
    fn agent(&mut self, anchor: u64) -> u16 {
        let anchor = anchor.max(1);
        let home = mix(anchor) as usize;
        for probe in 0..PROBES {
            let at = (home + probe) % ANCHORS;
            // Numbers in order of appearance: low ones are those that a workload keeps statistics of their own for.
            if self.anchors[at].0 == 0 {
                self.named_anchors += 1;
                self.anchors[at] = (anchor, self.named_anchors);
            }
            if self.anchors[at].0 == anchor {
                return self.anchors[at].1;
            }
        }
        0
    }

    fn start_session(&mut self, agent: u16) -> usize {
        let head = self.sessions.len() - 1;
        let slot = self.sessions[head].newer as usize;
        self.names += 1;
        let session = &mut self.sessions[slot];
        session.name = 1 << 63 | self.names;
        session.generation = session.generation.wrapping_add(1);
        session.in_flight = 0;
        session.prompt = 0;
        session.agent = agent;
        slot
    }

    /// Moves a session to the end of the order of use.
    fn touch(&mut self, slot: usize) {
        let (newer, older) = (self.sessions[slot].newer, self.sessions[slot].older);
        self.sessions[older as usize].newer = newer;
        self.sessions[newer as usize].older = older;
        let head = self.sessions.len() - 1;
        let last = self.sessions[head].older;
        self.sessions[last as usize].newer = slot as u32;
        self.sessions[slot].older = last;
        self.sessions[slot].newer = head as u32;
        self.sessions[head].older = slot as u32;
    }
}
