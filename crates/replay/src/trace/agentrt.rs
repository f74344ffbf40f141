//! One line of the agentrt format. The schema is documented in docs/traces.md.

use std::path::Path;

use rustc_hash::FxHashMap;

use super::builder::SharedPrefix;
use super::read::{Fields, LineParser, ReadOptions, MAX_ARRIVAL_S, MAX_CALL_BLOCKS, MAX_DURATION_S};
use super::{Call, Clock, Trace, TraceBuilder, SCHEMA_VERSION};
use crate::error::{Error, Result};

/// What later lines of a session are checked against.
#[derive(Default)]
struct SessionState {
    /// The `step` of each call so far, ascending.
    steps: Vec<u32>,
    arrival_s: f64,
}

pub(super) struct Parser {
    builder: Option<TraceBuilder>,
    sessions: FxHashMap<u32, SessionState>,
    share_system_prefix: bool,
    skip_bad: bool,
    prompt: Vec<u64>,
    output: Vec<u64>,
    quotes: Vec<u64>,
}

impl Parser {
    pub(super) fn new(options: &ReadOptions) -> Self {
        Self {
            builder: None,
            sessions: FxHashMap::default(),
            share_system_prefix: options.share_system_prefix,
            skip_bad: options.skip_bad,
            prompt: Vec::new(),
            output: Vec::new(),
            quotes: Vec::new(),
        }
    }
}

impl LineParser for Parser {
    fn line(&mut self, fields: &Fields<'_>) -> Result<()> {
        if let Some(version) = fields.opt_u32("schema_version")? {
            if version != SCHEMA_VERSION {
                return Err(Error::BadTrace {
                    path: fields.at.path.clone(),
                    problem: format!(
                        "line {} has schema_version {version}; this agentrt reads version {SCHEMA_VERSION}",
                        fields.at.line
                    ),
                    remedy: "read it with the agentrt that wrote it, or update agentrt".into(),
                });
            }
        }
        let workload = fields.str("workload")?;
        let block_size = fields.u32("block_size")?;
        if block_size == 0 {
            return Err(fields.bad("block_size", "is 0", "give the engine's tokens per KV block, for example 16"));
        }
        let clock = clock(fields)?;
        if let Some(builder) = &self.builder {
            same_file(fields, builder.trace(), workload, block_size, clock)?;
        }
        let session_name = fields.str("session_id")?;
        let agent_name = fields.str("agent")?;
        let tool_name = fields.opt_str("tool_name")?;
        let call = Call {
            prompt_tokens: fields.u32("prompt_tokens")?,
            output_tokens: fields.u32("output_tokens")?,
            arrival_s: fields.opt_time("t_arrival", MAX_ARRIVAL_S)?,
            queue_s: fields.opt_time("queue_s", MAX_DURATION_S)?,
            llm_latency_s: fields.opt_time("llm_latency_s", MAX_DURATION_S)?,
            tool_latency_s: fields.opt_time("tool_latency_s", MAX_DURATION_S)?,
            ..Call::default()
        };
        if clock == Clock::None && call.arrival_s.is_some() {
            return Err(fields.bad(
                "t_scope",
                "is `none` although t_arrival is set",
                "say `session` or `global`, or leave t_arrival null",
            ));
        }
        runs(fields, "blocks", &mut self.prompt, true)?;
        runs(fields, "out_blocks", &mut self.output, false)?;
        runs(fields, "quotes", &mut self.quotes, false)?;
        let size = u64::from(block_size);
        if self.prompt.len() as u64 * size > u64::from(call.prompt_tokens) {
            return Err(fields.bad(
                "blocks",
                format!(
                    "{} blocks of {block_size} tokens are more than the prompt's {} tokens",
                    self.prompt.len(),
                    call.prompt_tokens
                ),
                "list full blocks only",
            ));
        }
        // An answer can complete the prompt's last, partial block, so it may fill one more than its own tokens do.
        if self.output.len() as u64 * size > u64::from(call.output_tokens) + 2 * size {
            return Err(fields.bad(
                "out_blocks",
                format!(
                    "{} blocks of {block_size} tokens are more than the answer's {} tokens",
                    self.output.len(),
                    call.output_tokens
                ),
                "list the full blocks that the answer fills, behind those of the prompt",
            ));
        }
        let sys_key = fields.opt_str("sys_key")?;
        let sys_blocks = fields.opt_u32("sys_blocks")?.unwrap_or(0) as usize;
        let shared = sys_key.filter(|_| self.share_system_prefix).map(|name| SharedPrefix { name, blocks: sys_blocks });
        self.push(fields, call, session_name, agent_name, tool_name, shared, (workload, block_size, clock))
    }

    fn finish(self: Box<Self>, path: &Path) -> Result<Trace> {
        let builder = self.builder.ok_or_else(|| Error::BadTrace {
            path: path.into(),
            problem: "no line could be read".into(),
            remedy: "read it without --skip-bad to see the first problem".into(),
        })?;
        Ok(builder.finish())
    }
}

impl Parser {
    /// Checks the call against its session and appends it. Nothing changes when a check fails.
    #[expect(clippy::too_many_arguments, reason = "the fields of one line")]
    fn push(
        &mut self,
        fields: &Fields<'_>,
        mut call: Call,
        session_name: &str,
        agent_name: &str,
        tool_name: Option<&str>,
        shared: Option<SharedPrefix<'_>>,
        file: (&str, u32, Clock),
    ) -> Result<()> {
        let builder = self.builder.get_or_insert_with(|| TraceBuilder::new(file.0, file.1, file.2));
        let known = builder.known_session(session_name);
        let state = known.and_then(|s| self.sessions.get(&s));
        let recorded_step = match (fields.opt_u32("step")?, state.and_then(|s| s.steps.last())) {
            (Some(step), Some(&last)) if step <= last => {
                return Err(fields.bad(
                    "step",
                    format!("is {step} after step {last} of session `{session_name}`"),
                    "write the calls of a session in order, or give runs of one workflow different session_ids",
                ));
            }
            (Some(step), _) => step,
            (None, last) => last.map_or(0, |&last| last.saturating_add(1)),
        };
        call.step = state.map_or(0, |s| s.steps.len() as u32);
        if let Some(parent) = fields.opt_u32("parent")? {
            call.parent_step = state.and_then(|s| s.steps.binary_search(&parent).ok()).map(|position| position as u32);
            if call.parent_step.is_none() && !self.skip_bad {
                return Err(fields.bad(
                    "parent",
                    format!("step {parent} is not an earlier step of session `{session_name}`"),
                    "name the step of the call that caused this one, or leave it null",
                ));
            }
        }
        let mut quotes = Vec::with_capacity(self.quotes.len());
        for &quoted in &self.quotes {
            let position = state.and_then(|s| s.steps.binary_search(&(quoted as u32)).ok());
            match position {
                Some(position) => quotes.push(position as u32),
                None if self.skip_bad => {}
                None => {
                    return Err(fields.bad(
                        "quotes",
                        format!("step {quoted} is not an earlier step of session `{session_name}`"),
                        "name the steps of the same session whose answers the prompt contains, or leave it out",
                    ));
                }
            }
        }
        if let (Some(arrival), Some(state)) = (call.arrival_s, state) {
            if arrival < state.arrival_s {
                return Err(fields.bad(
                    "t_arrival",
                    format!(
                        "{arrival} s is earlier than {} s, the call before it in session `{session_name}`",
                        state.arrival_s
                    ),
                    "write the calls of a session in order of time",
                ));
            }
        }
        if !builder.has_room_for(agent_name, tool_name) {
            return Err(fields.bad(
                "agent",
                "the trace has more than 65535 agent or tool names",
                "name roles, not instances",
            ));
        }
        // A session's number is its rank by first call. Names are registered only once the call is accepted.
        call.session = known.unwrap_or(builder.trace().sessions.len() as u32);
        let (session, arrival_s) = (call.session, call.arrival_s);
        let index = builder
            .push_shared(call, &self.prompt, &self.output, shared)
            .map_err(|fault| fields.blocks_fault("blocks", fault))?;
        builder.session(session_name);
        let agent = builder.agent(agent_name).unwrap_or_default();
        let tool = tool_name.and_then(|name| builder.tool(name));
        builder.quotes(index, &quotes);
        let call = &mut builder.trace_mut().calls[index as usize];
        (call.agent, call.tool) = (agent, tool);
        let state = self.sessions.entry(session).or_default();
        state.steps.push(recorded_step);
        state.arrival_s = arrival_s.unwrap_or(state.arrival_s);
        Ok(())
    }
}

fn clock(fields: &Fields<'_>) -> Result<Clock> {
    match fields.opt_str("t_scope")? {
        Some("global") => Ok(Clock::Global),
        Some("session") => Ok(Clock::Session),
        Some("none") => Ok(Clock::None),
        None if fields.get("t_arrival").is_none() => Ok(Clock::None),
        None => Err(fields.bad(
            "t_scope",
            "missing although t_arrival is set",
            "say `global` (one clock) or `session` (from each session's start)",
        )),
        Some(other) => {
            Err(fields.bad("t_scope", format!("unknown scope `{other}`"), "use `global`, `session` or `none`"))
        }
    }
}

fn same_file(fields: &Fields<'_>, trace: &Trace, workload: &str, block_size: u32, clock: Clock) -> Result<()> {
    if workload != trace.workload {
        return Err(Error::BadTrace {
            path: fields.at.path.clone(),
            problem: format!("it mixes workloads: line {} is of `{workload}`, the lines before of `{}`", fields.at.line, trace.workload),
            remedy: format!(
                "split it into one file per workload, for example `zgrep '\"workload\": *\"{workload}\"' FILE > {workload}.jsonl`"
            ),
        });
    }
    if block_size != trace.block_size {
        return Err(fields.bad(
            "block_size",
            format!("is {block_size}, the lines before have {}", trace.block_size),
            "record a trace with one block size",
        ));
    }
    if clock != trace.clock {
        return Err(fields.bad(
            "t_scope",
            "differs from the lines before",
            "keep one clock per trace: `global`, `session` or `none`",
        ));
    }
    Ok(())
}

/// Expands `[[first, count], ...]` into `out`.
fn runs(fields: &Fields<'_>, name: &str, out: &mut Vec<u64>, required: bool) -> Result<()> {
    out.clear();
    let Some(list) = fields.opt_array(name)? else {
        return if required {
            Err(fields.bad(name, "missing; expected [[first, count], ...]", "list the full blocks of the prompt"))
        } else {
            Ok(())
        };
    };
    let remedy = "write runs of consecutive block ids as [[first, count], ...]";
    for (position, run) in list.iter().enumerate() {
        let pair = match run.as_array().map(Vec::as_slice) {
            Some([first, count]) => first.as_u64().zip(count.as_u64()),
            _ => None,
        };
        let Some((first, count)) = pair else {
            return Err(fields.bad(name, format!("run {position} is not a pair of whole numbers"), remedy));
        };
        if count == 0 {
            return Err(fields.bad(name, format!("run {position} is empty"), remedy));
        }
        if first.checked_add(count - 1).is_none_or(|last| last > u64::from(u32::MAX)) {
            return Err(fields.bad(
                name,
                format!("run {position} holds block ids beyond 32 bits ({first} + {count})"),
                "number the blocks densely from 0 in order of first appearance",
            ));
        }
        if out.len() as u64 + count > MAX_CALL_BLOCKS {
            return Err(fields.bad(
                name,
                format!("more than {MAX_CALL_BLOCKS} blocks in one call"),
                "check the counts of the runs",
            ));
        }
        out.extend(first..first + count);
    }
    Ok(())
}
