//! One line of the Mooncake format, or of Dynamo's agentic variant of it.
//!
//! Mooncake names neither session nor agent. A request joins the session of the latest request whose hash list but
//! for the last entry, two hashes at least, begins its own; among several the longest. Dynamo's rows name
//! trajectories (`session_id`) and what they wait for; trajectories connected by `wait_for` or `branches` form one
//! session here.

use std::path::Path;

use rustc_hash::FxHashMap;

use super::read::{At, Fields, LineParser, ReadOptions, MAX_ARRIVAL_S, MAX_CALL_BLOCKS, MAX_DURATION_S};
use super::{Call, Clock, Session, Trace, TraceBuilder};
use crate::error::{Error, Result};

/// Mooncake's published traces hash blocks of 512 tokens.
const MOONCAKE_BLOCK: u32 = 512;
/// Shared full blocks that make two Mooncake requests one session: one block is a common system prompt.
const MIN_SHARED_BLOCKS: usize = 2;

pub(super) struct Parser {
    agentic: bool,
    skip_bad: bool,
    workload: String,
    block_size: Option<u32>,
    builder: Option<TraceBuilder>,
    /// Mooncake: last hash but one of a request to its session.
    by_last_block: FxHashMap<u64, u32>,
    /// Latest call and arrival of each session (Mooncake) or trajectory (Dynamo).
    latest: FxHashMap<String, (u32, f64)>,
    rows: FxHashMap<String, u32>,
    /// Dynamo: request ids that an earlier row announced as its branches, with that row.
    branches: FxHashMap<String, u32>,
    /// Dynamo: union-find over calls, roots are the smallest call of a session.
    group: Vec<u32>,
    /// Dynamo: trajectory of each call, and the call it waited for.
    trajectory: Vec<String>,
    waited_for: Vec<Option<u32>>,
    has_time: bool,
    /// Latest arrival in the file.
    latest_s: f64,
    /// The prompt's full blocks, and how many hashes the row has.
    keys: Vec<u64>,
    hashes: usize,
}

impl Parser {
    pub(super) fn new(agentic: bool, options: &ReadOptions, at: &At) -> Self {
        let name = at.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let stem = name.trim_end_matches(".gz").trim_end_matches(".jsonl").trim_end_matches(".json");
        Self {
            agentic,
            skip_bad: options.skip_bad,
            workload: if stem.is_empty() { "mooncake".into() } else { stem.into() },
            block_size: options.block_size.filter(|&size| size > 0),
            builder: None,
            by_last_block: FxHashMap::default(),
            latest: FxHashMap::default(),
            rows: FxHashMap::default(),
            branches: FxHashMap::default(),
            group: Vec::new(),
            trajectory: Vec::new(),
            waited_for: Vec::new(),
            has_time: false,
            latest_s: 0.0,
            keys: Vec::new(),
            hashes: 0,
        }
    }
}

impl LineParser for Parser {
    fn line(&mut self, fields: &Fields<'_>) -> Result<()> {
        let input = match fields.opt_u32("input_tokens")? {
            Some(tokens) => tokens,
            None => fields.u32("input_length")?,
        };
        let output = match fields.opt_u32("output_tokens")? {
            Some(tokens) => tokens,
            None => fields.u32("output_length")?,
        };
        let timestamp = either_time(fields, "timestamp", "created_time", MAX_ARRIVAL_S)?;
        let delay = either_time(fields, "delay", "delay_ms", MAX_DURATION_S)?;
        self.hash_ids(fields, input)?;
        let call = Call {
            prompt_tokens: input,
            output_tokens: output,
            arrival_s: timestamp.map(|ms| ms / 1e3),
            ..Call::default()
        };
        let delay_s = delay.map(|ms| ms / 1e3);
        if self.agentic {
            self.agentic_row(fields, call, delay_s)
        } else {
            self.mooncake_row(fields, call, delay_s)
        }
    }

    fn finish(self: Box<Self>, path: &Path) -> Result<Trace> {
        let parser = *self;
        let Some(mut builder) = parser.builder else {
            return Err(Error::BadTrace {
                path: path.into(),
                problem: "no line could be read".into(),
                remedy: "read it without --skip-bad to see the first problem".into(),
            });
        };
        if parser.agentic {
            form_sessions(builder.trace_mut(), parser.group, &parser.trajectory, &parser.waited_for);
        }
        let mut trace = builder.finish();
        trace.clock = if parser.has_time { Clock::Global } else { Clock::None };
        if parser.agentic {
            trace.agents.truncate(1 + usize::from(trace.calls.iter().any(|c| c.agent == 1)));
        }
        Ok(trace)
    }
}

impl Parser {
    /// Fills `self.keys` with the ids of the prompt's full blocks.
    fn hash_ids(&mut self, fields: &Fields<'_>, input: u32) -> Result<()> {
        let remedy = "list the hash of every block of the prompt, the partial last one included";
        let Some(list) = fields.opt_array("hash_ids")? else {
            return Err(fields.bad("hash_ids", "missing; expected an array of block hashes", remedy));
        };
        if list.len() as u64 > MAX_CALL_BLOCKS {
            return Err(fields.bad(
                "hash_ids",
                format!("more than {MAX_CALL_BLOCKS} blocks in one call"),
                "check the recorder",
            ));
        }
        let fits = |size: u32| {
            let (input, size, n) = (u64::from(input), u64::from(size), list.len() as u64);
            n == input.div_ceil(size) || n == input / size
        };
        let size = self.block_size.unwrap_or_else(|| {
            if fits(MOONCAKE_BLOCK) {
                return MOONCAKE_BLOCK;
            }
            (3..=12).rev().map(|power| 1 << power).find(|&size| fits(size)).unwrap_or(MOONCAKE_BLOCK)
        });
        if !fits(size) {
            return Err(fields.bad(
                "hash_ids",
                format!("{} hashes do not cover {input} tokens in blocks of {size}", list.len()),
                "state the trace's block size (--block-size), or list one hash for every block of the prompt",
            ));
        }
        self.keys.clear();
        for (position, value) in list.iter().enumerate() {
            match value.as_u64() {
                Some(key) => self.keys.push(key),
                None => {
                    return Err(fields.bad(
                        "hash_ids",
                        format!("entry {position} is not a whole number of at least 0"),
                        remedy,
                    ))
                }
            }
        }
        self.keys.truncate((input / size) as usize);
        self.hashes = list.len();
        self.block_size = Some(size);
        Ok(())
    }

    fn builder(&mut self) -> &mut TraceBuilder {
        let size = self.block_size.unwrap_or(MOONCAKE_BLOCK);
        self.builder.get_or_insert_with(|| TraceBuilder::new(&self.workload, size, Clock::Global))
    }

    fn mooncake_row(&mut self, fields: &Fields<'_>, mut call: Call, delay_s: Option<f64>) -> Result<()> {
        let session_name = if let Some(name) = fields.opt_str("session_id")? {
            name.to_owned()
        } else {
            let mut own = self.keys.iter().skip(MIN_SHARED_BLOCKS - 1).rev();
            let extended = own.find_map(|key| self.by_last_block.get(key));
            let sessions = self.builder.as_ref().map_or(&[][..], |b| &b.trace().sessions);
            match extended {
                Some(&session) => sessions[session as usize].name.clone(),
                None => format!("s{}", sessions.len()),
            }
        };
        let before = self.latest.get(&session_name).copied();
        if let (Some(now), Some((_, then))) = (call.arrival_s, before) {
            if now < then {
                let earlier = format!("the request before it in session `{session_name}`");
                return Err(too_early(fields, now, then, &earlier));
            }
        }
        let keys = std::mem::take(&mut self.keys);
        let builder = self.builder();
        call.agent = builder.agent("chat").unwrap_or_default();
        call.session = builder.known_session(&session_name).unwrap_or(builder.trace().sessions.len() as u32);
        if let Some((index, _)) = before {
            let index = index as usize;
            call.step = builder.trace().calls[index].step + 1;
            call.parent_step = Some(call.step - 1);
        }
        let (session, arrival_s) = (call.session, call.arrival_s);
        let pushed = builder.push(call, &keys, &[]);
        self.keys = keys;
        let index = pushed.map_err(|fault| fields.blocks_fault("hash_ids", fault))?;
        let builder = self.builder();
        builder.session(&session_name);
        if let (Some((previous, _)), Some(delay_s)) = (before, delay_s) {
            builder.trace_mut().calls[previous as usize].tool_latency_s = Some(delay_s);
        }
        self.has_time |= arrival_s.is_some();
        self.latest.insert(session_name, (index, arrival_s.or(before.map(|b| b.1)).unwrap_or(0.0)));
        // The last hash may be of a partial block, so it is not what a longer prompt repeats.
        let stem = &self.keys[..self.keys.len().min(self.hashes.saturating_sub(1))];
        if stem.len() >= MIN_SHARED_BLOCKS {
            self.by_last_block.extend(stem.last().map(|&key| (key, session)));
        }
        Ok(())
    }

    fn agentic_row(&mut self, fields: &Fields<'_>, mut call: Call, delay_s: Option<f64>) -> Result<()> {
        let request = fields.str("request_id")?;
        if self.rows.contains_key(request) {
            return Err(fields.bad(
                "request_id",
                format!("`{request}` was used before"),
                "give every request its own id",
            ));
        }
        let trajectory = fields.opt_str("session_id")?.unwrap_or(request).to_owned();
        let tool_wait_s = fields.opt_time("tool_wait_ms", MAX_DURATION_S * 1e3)?.map(|ms| ms / 1e3);
        let tool = match fields.opt_array("tool_events")?.and_then(|events| events.last()) {
            Some(event) => event.get("tool_class").and_then(serde_json::Value::as_str).map(str::to_owned),
            None => None,
        };
        let mut waits = Vec::new();
        for value in fields.opt_array("wait_for")?.into_iter().flatten() {
            let Some(name) = value.as_str() else {
                return Err(fields.bad(
                    "wait_for",
                    "holds something else than request ids",
                    "list request ids as text",
                ));
            };
            match self.rows.get(name) {
                Some(&row) => waits.push(row),
                None if self.skip_bad => {}
                None => {
                    return Err(fields.bad(
                        "wait_for",
                        format!("no earlier row has the request_id `{name}`"),
                        "write rows after the rows they wait for",
                    ));
                }
            }
        }
        let mut announced = Vec::new();
        for value in fields.opt_array("branches")?.into_iter().flatten() {
            match value.as_str() {
                Some(name) => announced.push(name.to_owned()),
                None => {
                    return Err(fields.bad(
                        "branches",
                        "holds something else than request ids",
                        "list request ids as text",
                    ))
                }
            }
        }
        let before = self.latest.get(&trajectory).copied();
        // Sessions join trajectories, so the order of time must hold across all of them.
        if let Some(now) = call.arrival_s.filter(|&now| now < self.latest_s) {
            return Err(too_early(fields, now, self.latest_s, "the rows before it"));
        }
        // Sessions are formed at the end; until then every call is its own.
        call.session = 0;
        let arrival_s = call.arrival_s;
        let keys = std::mem::take(&mut self.keys);
        let pushed = self.builder().push(call, &keys, &[]);
        self.keys = keys;
        let index = pushed.map_err(|fault| fields.blocks_fault("hash_ids", fault))?;

        self.group.push(index);
        let mut linked = waits.clone();
        linked.extend(before.map(|(previous, _)| previous));
        linked.extend(self.branches.remove(request));
        for other in linked {
            join(&mut self.group, index, other);
        }
        for name in announced {
            match self.rows.get(&name) {
                Some(&row) => join(&mut self.group, index, row),
                None => drop(self.branches.insert(name, index)),
            }
        }
        let waited_for = waits.iter().copied().max().or(before.map(|(previous, _)| previous));
        let gap_s = match (delay_s, tool_wait_s) {
            (None, None) => None,
            (delay, wait) => Some((delay.unwrap_or(0.0) + wait.unwrap_or(0.0)).min(MAX_DURATION_S)),
        };
        if let Some(previous) = waited_for {
            let builder = self.builder();
            if builder.trace().calls[previous as usize].tool_latency_s.is_none() {
                let tool = tool.and_then(|name| builder.tool(&name));
                let previous = &mut builder.trace_mut().calls[previous as usize];
                previous.tool_latency_s = gap_s;
                previous.tool = tool;
            }
        }
        self.waited_for.push(waited_for);
        self.latest_s = arrival_s.unwrap_or(self.latest_s);
        self.has_time |= arrival_s.is_some();
        self.latest.insert(trajectory.clone(), (index, arrival_s.or(before.map(|b| b.1)).unwrap_or(0.0)));
        self.trajectory.push(trajectory);
        self.rows.insert(request.to_owned(), index);
        Ok(())
    }
}

fn either_time(fields: &Fields<'_>, name: &str, alias: &str, max_s: f64) -> Result<Option<f64>> {
    let max_ms = max_s * 1e3;
    Ok(fields.opt_time(name, max_ms)?.or(fields.opt_time(alias, max_ms)?))
}

fn too_early(fields: &Fields<'_>, now_s: f64, then_s: f64, before: &str) -> Error {
    let problem = format!("{} ms is earlier than {} ms, {before}", now_s * 1e3, then_s * 1e3);
    fields.bad("timestamp", problem, "sort the file by timestamp")
}

fn root(group: &mut [u32], of: u32) -> u32 {
    let mut at = of;
    while group[at as usize] != at {
        let up = group[group[at as usize] as usize];
        group[at as usize] = up;
        at = up;
    }
    at
}

fn join(group: &mut [u32], a: u32, b: u32) {
    let (a, b) = (root(group, a), root(group, b));
    group[a.max(b) as usize] = a.min(b);
}

/// Turns connected trajectories into sessions; the first trajectory of a session is its `main` agent, others `sub`.
fn form_sessions(trace: &mut Trace, mut group: Vec<u32>, trajectory: &[String], waited_for: &[Option<u32>]) {
    let mut session_of_root: FxHashMap<u32, u32> = FxHashMap::default();
    let mut length: Vec<u32> = Vec::new();
    trace.sessions.clear();
    trace.agents = vec!["main".into(), "sub".into()];
    for index in 0..trace.calls.len() as u32 {
        let first = root(&mut group, index);
        let sessions = &mut trace.sessions;
        let session = *session_of_root.entry(first).or_insert_with(|| {
            sessions.push(Session { name: trajectory[first as usize].clone(), calls: Vec::new() });
            length.push(0);
            sessions.len() as u32 - 1
        });
        let parent_step = waited_for[index as usize].map(|w| trace.calls[w as usize].step);
        let call = &mut trace.calls[index as usize];
        call.session = session;
        call.step = length[session as usize];
        call.parent_step = parent_step;
        call.agent = u16::from(trajectory[index as usize] != trace.sessions[session as usize].name);
        length[session as usize] += 1;
    }
    number_tools(trace);
}

/// A tool is learnt from the row after it, so names arrive out of the order of the calls.
fn number_tools(trace: &mut Trace) {
    let mut renumbered: FxHashMap<u16, u16> = FxHashMap::default();
    let mut names = Vec::new();
    for call in &mut trace.calls {
        if let Some(tool) = call.tool {
            call.tool = Some(*renumbered.entry(tool).or_insert_with(|| {
                names.push(trace.tools[tool as usize].clone());
                names.len() as u16 - 1
            }));
        }
    }
    trace.tools = names;
}
