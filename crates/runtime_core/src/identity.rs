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
//! An agent with a system prompt of its own shares no block with the other agents of its run, so by blocks alone it
//! becomes a session of its own: what is inferred is the growing conversation, not the run. Where words are known there
//! is a third rule:
//!
//! * **Run.** A conversation that starts with a prompt that quotes an answer given in another one joins its session
//!   ([`Identity::join`]): agents of one run read each other, runs do not. Answers are known again by [`marks`] of theirs.
//!   What was answered in two runs, a common phrase, speaks for neither. Within a run, a conversation that starts with
//!   the same block as an earlier one is of the same agent; others without an anchor are numbered.
//!
//! `docs/cachesage.md` says what each costs and is worth, and why linking conversations by times and lengths was left out.
//!
//! | part | bytes |
//! |---|---|
//! | block table: key, conversation, starts, age; sets of eight, the longest unused goes first | 16 a block |
//! | marks of answers, likewise | 16 a mark |
//! | conversations: the least recently used is forgotten | 56 each |
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
//! | [`Identity::join`] | no | a set of eight a mark; if it joins, the conversations once |
//! | [`Identity::answered`] | no | a set of eight a mark |
//! | [`marks`] | where `marks` has less room than twice the limit | the tokens once; sorts twice the limit for each that many marks |

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
/// Conversations of a run that have no anchor and are told apart; further ones share the last number.
pub const NUMBERED: u16 = 15;
/// Tokens that a mark is the hash of.
const MARK_TOKENS: usize = 12;
/// One in 2^so many places of a text has a mark.
const MARK_BITS: u32 = 3;
/// Marks of an answer that are of use.
pub const ANSWER_MARKS: usize = 32;
/// Marks of a prompt that are of use.
pub const PROMPT_MARKS: usize = 512;
/// A prompt quotes a run by at least so many marks, and twice as many as any other run.
const LEAST_QUOTED: u32 = 2;
/// What has been said in several runs.
const SEVERAL: u16 = u16::MAX;
/// Runs that one prompt may be found to quote.
const QUOTED_RUNS: usize = 8;

/// Sizes of an [`Identity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Blocks remembered, 64 to 2^28: an eighth of the blocks of live conversations will do.
    pub blocks: usize,
    /// Conversations remembered, 8 to 65,536.
    pub sessions: usize,
    /// Marks of answers remembered, 64 to 2^28: up to [`ANSWER_MARKS`] an answer.
    pub marks: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { blocks: 1 << 16, sessions: 4096, marks: 1 << 15 }
    }
}

/// Whose call it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inferred {
    /// The session; the top bit is set, which keeps it apart from small numbers of the caller's own.
    pub session: u64,
    /// The agent: 0, or 1 to [`ANCHORS`] by its anchor, in order of appearance; further numbers, up to [`NUMBERED`]
    /// more, are of conversations without an anchor that have joined a run.
    pub agent: u16,
    /// Names the call to [`Identity::ended`].
    pub call: Started,
    /// Whether the call starts the session: [`Identity::join`] may know better.
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
    /// Name of the session: its own number, or that of the run it has joined. 0 while vacant.
    name: u64,
    /// Key of its first block.
    root: u64,
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
    blocks: Table,
    /// Marks of answers, by the conversation in which they were given.
    said: Table,
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

/// A bounded map of keys; what has not been used for the longest goes first.
#[derive(Debug)]
struct Table(Box<[Block]>);

impl Table {
    fn new(entries: usize) -> Self {
        let sets = entries.div_ceil(WAYS).next_power_of_two();
        Self(vec![VACANT; sets * WAYS].into())
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.0)
    }

    #[inline]
    fn set(&self, key: u64) -> usize {
        (mix(key) as usize & (self.0.len() / WAYS - 1)) * WAYS
    }

    #[inline]
    fn find(&self, key: u64) -> Option<usize> {
        let at = self.set(key);
        self.0[at..at + WAYS].iter().position(|b| b.key == key && b.starts > 0).map(|way| at + way)
    }

    /// Finds a key or makes room for it; a new one has no starts.
    #[inline]
    fn entry(&mut self, key: u64, age: u16) -> &mut Block {
        let at = self.find(key).unwrap_or_else(|| {
            let at = self.set(key);
            let unused = |b: &Block| if b.starts == 0 { u16::MAX } else { age.wrapping_sub(b.age) };
            let oldest = (at..at + WAYS).max_by_key(|&i| unused(&self.0[i])).unwrap_or(at);
            self.0[oldest] = Block { key, ..VACANT };
            oldest
        });
        self.0[at].age = age;
        &mut self.0[at]
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
        within("marks", 64, 1 << 28, options.marks)?;
        let n = options.sessions as u32;
        let ring = |slot: u32| Session {
            name: 0,
            root: 0,
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
            blocks: Table::new(options.blocks),
            said: Table::new(options.marks),
            sessions: (0..=n).map(ring).collect(),
            anchors: vec![(0, 0); ANCHORS].into(),
            named_anchors: 0,
            calls: 0,
            names: 0,
        })
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.blocks.bytes() + self.said.bytes() + size_of_val(&*self.sessions) + size_of_val(&*self.anchors)
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

    #[inline]
    fn age(&self) -> u16 {
        (self.calls >> 4) as u16
    }

    /// Remembers that a conversation has used a block, and adds to what started through it.
    #[inline]
    fn keep(&mut self, key: u64, session: u32, starts: u16) {
        let age = self.age();
        let block = self.blocks.entry(key, age);
        block.session = session;
        block.starts = block.starts.saturating_add(if block.starts == 0 { START } else { starts });
    }

    fn look_up(&self, keys: &[u64]) -> Known {
        let n = keys.len();
        let mut known = Known { depth: 0, deepest: None, anchor: 0 };
        let (mut root, mut forgotten) = (0, 0);
        let mut depth = 1;
        while depth <= n {
            let step = if depth < DENSE { 1 } else { STRIDE };
            let Some(at) = self.blocks.find(keys[depth - 1]) else {
                forgotten += 1;
                if forgotten > FORGOTTEN {
                    break;
                }
                depth += step;
                continue;
            };
            let starts = u32::from(self.blocks.0[at].starts / START) + 1;
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
            let Some(at) = self.blocks.find(keys[depth - 1]) else { break };
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
            let block = &self.blocks.0[at];
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
            session.root = keys.first().copied().unwrap_or(0);
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

    /// A call's answer has these [`marks`].
    pub fn answered(&mut self, call: Started, marks: &[u64]) {
        let Some(slot) = self.slot(call.0) else { return };
        let (run, age) = (self.sessions[slot].name, self.age());
        for &mark in marks {
            let other = self.said.find(mark).and_then(|at| self.slot(self.said.0[at].session));
            let is_others = other.is_some_and(|other| self.sessions[other].name != run);
            let entry = self.said.entry(mark, age);
            entry.starts = if is_others || entry.starts == SEVERAL { SEVERAL } else { START };
            entry.session = call.0;
        }
    }

    /// Whose is a call that [starts a session](Inferred::is_new), if its prompt has these [`marks`]? None where it
    /// quotes nobody: it stays what it is.
    pub fn join(&mut self, call: Started, marks: &[u64]) -> Option<Inferred> {
        let slot = self.slot(call.0)?;
        let Session { name, root, mut agent, .. } = self.sessions[slot];
        let run = self.quoted_run(marks).filter(|&run| run != name)?;
        if agent == 0 {
            let (mut numbered, mut alike) = (0, None);
            for other in self.sessions.iter().filter(|other| other.name == run) {
                numbered = numbered.max(other.agent.saturating_sub(ANCHORS as u16));
                alike = alike.or((other.root == root).then_some(other.agent));
            }
            agent = alike.unwrap_or(ANCHORS as u16 + NUMBERED.min(numbered + 1));
        }
        let session = &mut self.sessions[slot];
        (session.name, session.agent) = (run, agent);
        Some(Inferred { session: run, agent, call, is_new: false })
    }

    /// The run whose answers have most of these marks.
    fn quoted_run(&self, marks: &[u64]) -> Option<u64> {
        let mut runs = [(0, 0); QUOTED_RUNS];
        for &mark in marks {
            let Some(entry) = self.said.find(mark).map(|at| &self.said.0[at]) else { continue };
            let Some(slot) = self.slot(entry.session).filter(|_| entry.starts != SEVERAL) else { continue };
            let run = self.sessions[slot].name;
            if let Some(found) = runs.iter_mut().find(|found| found.0 == run || found.1 == 0) {
                *found = (run, found.1 + 1);
            }
        }
        runs.sort_unstable_by_key(|found| std::cmp::Reverse(found.1));
        let [(run, most), (_, next), ..] = runs;
        (most >= LEAST_QUOTED.max(2 * next)).then_some(run)
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

/// Marks of a text, by which it is known again as a part of another: hashes of runs of twelve tokens, one in eight of
/// them, chosen by the hash itself; the `limit` smallest, ascending, without repetition. Replaces what `marks` holds.
///
/// Winnowing by value (Manber 1994, "Finding similar files"; bottom-k sketches, Cohen and Kaplan 2007): the smallest
/// marks of an answer are among the smallest of any prompt that is not much longer than the answer.
pub fn marks(tokens: impl IntoIterator<Item = u32>, limit: usize, marks: &mut Vec<u64>) {
    const BASE: u64 = 0x9E37_79B9_7F4A_7C15;
    const LEAVING: u64 = {
        let mut power = 1u64;
        let mut i = 0;
        while i < MARK_TOKENS {
            power = power.wrapping_mul(BASE);
            i += 1;
        }
        power
    };
    marks.clear();
    marks.reserve(2 * limit);
    let mut window = [0u64; MARK_TOKENS];
    let mut hash = 0u64;
    let mut most = u64::MAX >> MARK_BITS;
    for (i, token) in tokens.into_iter().enumerate() {
        let at = i % MARK_TOKENS;
        let token = u64::from(token) + 1;
        hash = hash.wrapping_mul(BASE).wrapping_add(token).wrapping_sub(window[at].wrapping_mul(LEAVING));
        window[at] = token;
        let mark = mix(hash);
        if i + 1 >= MARK_TOKENS && mark <= most {
            if marks.len() == 2 * limit {
                most = keep_smallest(marks, limit).unwrap_or(most);
            }
            marks.push(mark);
        }
    }
    keep_smallest(marks, limit);
}

/// Sorts, forgets repetitions and all but the smallest; returns the greatest left where some had to go.
fn keep_smallest(marks: &mut Vec<u64>, limit: usize) -> Option<u64> {
    marks.sort_unstable();
    marks.dedup();
    let are_too_many = marks.len() > limit;
    marks.truncate(limit);
    marks.last().copied().filter(|_| are_too_many)
}
