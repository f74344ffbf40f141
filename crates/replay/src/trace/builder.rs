//! Builds a [`Trace`] call by call: interns names and turns a source's block keys into dense ids.
//!
//! A key is whatever the source calls a block (a file's id, a hash). The builder upholds the model's two rules: ids
//! count up in order of first appearance, and every block has exactly one parent. [`TraceBuilder::push`] changes
//! nothing when it refuses a call.

use rustc_hash::{FxHashMap, FxHashSet};

use super::{Call, Clock, Run, Session, Span, Trace, NO_BLOCK};

/// Distinct blocks a trace may have: 2^28, 4 GB of tables at worst.
const MAX_BLOCKS: usize = 1 << 28;

/// Agents, or tools, that a trace may name.
const MAX_NAMES: usize = 65_535;

/// Why a call's blocks are not a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFault {
    /// The block with this key followed another block before.
    TwoParents(u64),
    /// The block with this key appears twice in one call.
    Repeated(u64),
    /// More distinct blocks than a trace may have.
    TooMany,
}

/// Which blocks a call shares with other sessions by declaration, see [`TraceBuilder::push`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct SharedPrefix<'a> {
    /// Prompts with equal names start with the same blocks.
    pub(crate) name: &'a str,
    /// Number of these blocks.
    pub(crate) blocks: usize,
}

/// Collects calls into a [`Trace`].
pub struct TraceBuilder {
    trace: Trace,
    agents: FxHashMap<String, u16>,
    tools: FxHashMap<String, u16>,
    sessions: FxHashMap<String, u32>,
    ids: FxHashMap<u64, u32>,
    /// The key each id was created for: runs of consecutive ids are recognised without hashing.
    origin: Vec<u64>,
    shared: FxHashMap<String, Vec<u32>>,
    shared_seen: FxHashSet<(u32, String)>,
    keys: Vec<u64>,
    resolved: Vec<u32>,
    sorted: Vec<u64>,
}

impl TraceBuilder {
    /// An empty trace of `workload` with blocks of `block_size` tokens.
    pub fn new(workload: &str, block_size: u32, clock: Clock) -> Self {
        let trace = Trace {
            workload: workload.into(),
            block_size,
            clock,
            agents: Vec::new(),
            tools: Vec::new(),
            sessions: Vec::new(),
            calls: Vec::new(),
            runs: Vec::new(),
            n_blocks: 0,
            parents: Vec::new(),
            skipped_lines: 0,
        };
        Self {
            trace,
            agents: FxHashMap::default(),
            tools: FxHashMap::default(),
            sessions: FxHashMap::default(),
            ids: FxHashMap::default(),
            origin: Vec::new(),
            shared: FxHashMap::default(),
            shared_seen: FxHashSet::default(),
            keys: Vec::new(),
            resolved: Vec::new(),
            sorted: Vec::new(),
        }
    }

    /// The trace so far; its sessions list their calls only after [`finish`](Self::finish).
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    pub(crate) fn trace_mut(&mut self) -> &mut Trace {
        &mut self.trace
    }

    /// The id of an agent, `None` when 65,535 names are taken.
    pub fn agent(&mut self, name: &str) -> Option<u16> {
        intern(&mut self.agents, &mut self.trace.agents, name)
    }

    /// The id of a tool, `None` when 65,535 names are taken.
    pub fn tool(&mut self, name: &str) -> Option<u16> {
        intern(&mut self.tools, &mut self.trace.tools, name)
    }

    /// Can these names still be numbered?
    pub(crate) fn has_room_for(&self, agent: &str, tool: Option<&str>) -> bool {
        let room = |table: &FxHashMap<String, u16>, name: &str| table.len() < MAX_NAMES || table.contains_key(name);
        room(&self.agents, agent) && tool.is_none_or(|tool| room(&self.tools, tool))
    }

    /// The id of a session if it has a call already.
    pub(crate) fn known_session(&self, name: &str) -> Option<u32> {
        self.sessions.get(name).copied()
    }

    /// The id of a session.
    pub fn session(&mut self, name: &str) -> u32 {
        if let Some(&id) = self.sessions.get(name) {
            return id;
        }
        let id = self.trace.sessions.len() as u32;
        self.sessions.insert(name.into(), id);
        self.trace.sessions.push(Session { name: name.into(), calls: Vec::new() });
        id
    }

    /// Appends a call whose full blocks have the keys `prompt` and, behind them, `output`.
    ///
    /// The spans of `call` are filled in. Returns the call's index.
    pub fn push(&mut self, call: Call, prompt: &[u64], output: &[u64]) -> Result<u32, BlockFault> {
        self.push_shared(call, prompt, output, None)
    }

    /// [`push`](Self::push), where the prompt starts with blocks that other sessions know under other keys.
    ///
    /// Only a session's first call under a name decides: keys that are new in it stand for the first blocks that
    /// any session pushed under that name.
    pub(crate) fn push_shared(
        &mut self,
        mut call: Call,
        prompt: &[u64],
        output: &[u64],
        shared: Option<SharedPrefix<'_>>,
    ) -> Result<u32, BlockFault> {
        let mut keys = std::mem::take(&mut self.keys);
        keys.clear();
        keys.extend_from_slice(prompt);
        keys.extend_from_slice(output);
        let alias = shared.filter(|s| !self.shared_seen.contains(&(call.session, s.name.to_owned())));
        let known = self.check(&keys, alias);
        if let Ok(known) = known {
            self.commit(&keys, known);
            if let Some(shared) = alias {
                let own = &self.resolved[..shared.blocks.min(prompt.len())];
                let entry = self.shared.entry(shared.name.into()).or_default();
                // The longest agreed chain speaks for the name.
                if own.starts_with(entry) {
                    *entry = own.to_vec();
                }
                self.shared_seen.insert((call.session, shared.name.into()));
            }
            call.prompt = push_runs(&mut self.trace.runs, &self.resolved[..prompt.len()]);
            call.output = push_runs(&mut self.trace.runs, &self.resolved[prompt.len()..]);
            self.trace.calls.push(call);
        }
        self.keys = keys;
        known.map(|_| self.trace.calls.len() as u32 - 1)
    }

    /// Says of a call that has been pushed whose answers its prompt quotes: steps of its session, ascending.
    pub fn quotes(&mut self, call: u32, steps: &[u32]) {
        self.trace.calls[call as usize].quotes = push_runs(&mut self.trace.runs, steps);
    }

    /// Resolves the leading known blocks of a chain into `self.resolved`; the rest must be new.
    fn check(&mut self, keys: &[u64], shared: Option<SharedPrefix<'_>>) -> Result<usize, BlockFault> {
        let alias: &[u32] =
            shared.and_then(|s| self.shared.get(s.name).map(|ids| &ids[..ids.len().min(s.blocks)])).unwrap_or_default();
        self.resolved.clear();
        let mut previous = NO_BLOCK;
        let mut known = keys.len();
        for (position, &key) in keys.iter().enumerate() {
            let next = previous.wrapping_add(1) as usize;
            let id = if self.origin.get(next) == Some(&key) { Some(next as u32) } else { self.ids.get(&key).copied() };
            let on_alias = position == 0 || alias.get(position - 1) == Some(&previous);
            match id.or_else(|| alias.get(position).copied().filter(|_| on_alias)) {
                Some(id) if self.trace.parents[id as usize] == previous => {
                    self.resolved.push(id);
                    previous = id;
                }
                Some(_) => return Err(self.misplaced(key, &keys[..position])),
                None => {
                    known = position;
                    break;
                }
            }
        }
        let new = &keys[known..];
        if let Some(position) = new.iter().position(|key| self.ids.contains_key(key)) {
            return Err(self.misplaced(new[position], &keys[..known + position]));
        }
        self.sorted.clear();
        self.sorted.extend_from_slice(new);
        self.sorted.sort_unstable();
        if let Some(pair) = self.sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(BlockFault::Repeated(pair[0]));
        }
        if self.trace.parents.len() + new.len() > MAX_BLOCKS {
            return Err(BlockFault::TooMany);
        }
        Ok(known)
    }

    #[expect(clippy::unused_self, reason = "reads as a question to the table")]
    fn misplaced(&self, key: u64, before: &[u64]) -> BlockFault {
        if before.contains(&key) {
            BlockFault::Repeated(key)
        } else {
            BlockFault::TwoParents(key)
        }
    }

    fn commit(&mut self, keys: &[u64], known: usize) {
        for (&key, &id) in keys[..known].iter().zip(&self.resolved) {
            // Aliased keys are learnt here; all others are known already.
            if self.origin[id as usize] != key {
                self.ids.insert(key, id);
            }
        }
        let mut previous = self.resolved.last().copied().unwrap_or(NO_BLOCK);
        for &key in &keys[known..] {
            let id = self.trace.parents.len() as u32;
            self.trace.parents.push(previous);
            self.origin.push(key);
            self.ids.insert(key, id);
            self.resolved.push(id);
            previous = id;
        }
    }

    /// The finished trace.
    pub fn finish(mut self) -> Trace {
        for session in &mut self.trace.sessions {
            session.calls.clear();
        }
        for (index, call) in self.trace.calls.iter().enumerate() {
            self.trace.sessions[call.session as usize].calls.push(index as u32);
        }
        self.trace.n_blocks = self.trace.parents.len() as u32;
        self.trace
    }
}

fn intern(table: &mut FxHashMap<String, u16>, names: &mut Vec<String>, name: &str) -> Option<u16> {
    if let Some(&id) = table.get(name) {
        return Some(id);
    }
    if names.len() >= MAX_NAMES {
        return None;
    }
    let id = names.len() as u16;
    table.insert(name.into(), id);
    names.push(name.into());
    Some(id)
}

/// Appends `ids` to the arena as maximal runs.
fn push_runs(runs: &mut Vec<Run>, ids: &[u32]) -> Span {
    if ids.is_empty() {
        return Span::default();
    }
    let start = runs.len();
    for &id in ids {
        match runs[start..].last_mut() {
            Some(run) if run.first + run.len == id => run.len += 1,
            _ => runs.push(Run { first: id, len: 1 }),
        }
    }
    Span { start: start as u32, len: (runs.len() - start) as u32 }
}
