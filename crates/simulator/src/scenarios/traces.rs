//! Traces made for scenarios.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replay::generate::{generate, GenerateOptions};
use replay::trace::{self, Call, Clock, Run, Session, Trace, TraceBuilder, NO_BLOCK};
use replay::Result;

/// Sessions of a built-in workload, drawn anew for each seed.
pub(crate) fn generated(name: &str, sessions: usize, seed: u64) -> Result<Trace> {
    generate(name, &GenerateOptions { sessions, seed, agents: None })
}

/// A recorded workload, cut to so many calls a session and so many sessions; read once.
#[derive(Clone)]
pub(crate) struct Recorded {
    pub(crate) name: &'static str,
    read: Arc<OnceLock<Result<Arc<Trace>>>>,
    path: std::path::PathBuf,
    sessions: usize,
    calls: usize,
}

impl Recorded {
    /// `None` where the folder has no such workload.
    pub(crate) fn find(folder: Option<&Path>, name: &'static str, sessions: usize, calls: usize) -> Option<Self> {
        let path = folder?.join(format!("{name}.jsonl.gz"));
        path.is_file().then(|| Self { name, read: Arc::default(), path, sessions, calls })
    }

    pub(crate) fn get(&self) -> Result<Arc<Trace>> {
        let read = || {
            let whole = trace::read(&self.path, &trace::ReadOptions::default())?;
            Ok(Arc::new(cut(whole, self.sessions, self.calls)))
        };
        match self.read.get_or_init(read) {
            Ok(trace) => Ok(Arc::clone(trace)),
            // The error is the same for whoever asks: make it anew.
            Err(_) => read(),
        }
    }
}

/// The first sessions of a trace and their first calls. Blocks keep their numbers.
fn cut(mut trace: Trace, sessions: usize, calls: usize) -> Trace {
    trace.sessions.truncate(sessions);
    let mut kept = Vec::new();
    for session in &mut trace.sessions {
        session.calls.truncate(calls);
        for call in &mut session.calls {
            kept.push(trace.calls[*call as usize].clone());
            *call = kept.len() as u32 - 1;
        }
    }
    trace.calls = kept;
    trace
}

/// Several traces with blocks of one size in one, and the number of the part that each session comes from.
pub(crate) fn join(parts: &[Trace]) -> (Trace, Vec<u16>) {
    let mut all = parts[0].clone();
    let mut part_of = vec![0; all.sessions.len()];
    for (number, part) in (1..).zip(&parts[1..]) {
        debug_assert_eq!(part.block_size, all.block_size);
        let (calls, sessions, blocks, runs) =
            (all.calls.len() as u32, all.sessions.len() as u32, all.n_blocks, all.runs.len() as u32);
        let (agents, tools) = (all.agents.len() as u16, all.tools.len() as u16);
        all.agents.extend(part.agents.iter().map(|name| format!("{name}-{number}")));
        all.tools.extend(part.tools.iter().map(|name| format!("{name}-{number}")));
        all.sessions.extend(part.sessions.iter().map(|session| Session {
            name: format!("{}-{number}", session.name),
            calls: session.calls.iter().map(|call| call + calls).collect(),
        }));
        all.runs.extend(part.runs.iter().map(|run| Run { first: run.first + blocks, ..*run }));
        all.parents.extend(part.parents.iter().map(|&p| if p == NO_BLOCK { p } else { p + blocks }));
        all.n_blocks += part.n_blocks;
        all.calls.extend(part.calls.iter().cloned().map(|mut call| {
            call.session += sessions;
            call.agent += agents;
            call.tool = call.tool.map(|tool| tool + tools);
            call.prompt.start += runs;
            call.output.start += runs;
            call
        }));
        part_of.resize(all.sessions.len(), number);
    }
    (all, part_of)
}

/// Sessions of one call each with a prompt of their own that nobody sends again.
pub(crate) fn unique_prompts(calls: usize, tokens: u32, output_tokens: u32) -> Trace {
    const BLOCK: u32 = 16;
    let mut builder = TraceBuilder::new("unique", BLOCK, Clock::None);
    let agent = builder.agent("flood").unwrap_or_default();
    for call in 0..calls as u64 {
        let session = builder.session(&format!("flood-{call}"));
        let prompt: Vec<u64> = (0..u64::from(tokens / BLOCK)).map(|block| call << 32 | block << 1 | 1).collect();
        let call = Call { session, agent, prompt_tokens: tokens, output_tokens, ..Call::default() };
        builder.push(call, &prompt, &[]).expect("every block is new");
    }
    builder.finish()
}

/// Agents of [`pipeline`].
const AGENTS: usize = 8;

/// P(the next agent is the usual successor) for which the predictability R = 1 - H(next | current) / H(next) is `r`,
/// where all others are equally likely.
fn usual(r: f64) -> f64 {
    let predictability = |p: f64| {
        let other = (1.0 - p) / (AGENTS - 1) as f64;
        let term = |p: f64| if p > 0.0 { -p * p.log2() } else { 0.0 };
        1.0 - (term(p) + (AGENTS - 1) as f64 * term(other)) / (AGENTS as f64).log2()
    };
    let (mut low, mut high) = (1.0 / AGENTS as f64, 1.0);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if predictability(middle) < r {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

/// Sequential sessions of eight agents with system prompts of their own and a history each, in an order of
/// predictability `r`.
pub(crate) fn pipeline(sessions: usize, calls: usize, r: f64, seed: u64) -> Trace {
    const BLOCK: u32 = 16;
    const SYSTEM: u32 = 2048;
    const HANDED: u32 = 256;
    const ANSWER: u32 = 128;
    let usual = usual(r);
    let mut rng = StdRng::seed_from_u64(seed ^ 0x5EC0_17D0);
    let mut builder = TraceBuilder::new("sequential", BLOCK, Clock::None);
    let names: Vec<u16> = (0..AGENTS).map(|a| builder.agent(&format!("agent-{a}")).unwrap_or_default()).collect();
    let tool = builder.tool("step");
    for number in 0..sessions as u64 {
        let session = builder.session(&format!("session-{number}"));
        // Blocks of each agent's prompt so far: a chain is its agent, its session, and how far it goes.
        let mut lengths = [0u32; AGENTS];
        let mut agent = rng.random_range(0..AGENTS);
        for step in 0..calls {
            lengths[agent] += HANDED;
            let prompt_tokens = SYSTEM + lengths[agent];
            let block = |at: u32| {
                let owner = if at < SYSTEM / BLOCK { 0 } else { number + 1 };
                owner << 40 | (agent as u64) << 32 | u64::from(at) << 1 | 1
            };
            let prompt: Vec<u64> = (0..prompt_tokens / BLOCK).map(block).collect();
            lengths[agent] += ANSWER;
            let output: Vec<u64> = (prompt_tokens / BLOCK..(SYSTEM + lengths[agent]) / BLOCK).map(block).collect();
            let call = Call {
                session,
                agent: names[agent],
                step: step as u32,
                prompt_tokens,
                output_tokens: ANSWER,
                tool,
                ..Call::default()
            };
            builder.push(call, &prompt, &output).expect("blocks of one agent and session form one chain");
            let next = (agent + 1) % AGENTS;
            agent = if rng.random_bool(usual) {
                next
            } else {
                // One of the others.
                let other = rng.random_range(0..AGENTS - 1);
                (next + 1 + other) % AGENTS
            };
        }
    }
    builder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// R of the agents of consecutive calls, counted.
    fn predictability(trace: &Trace) -> f64 {
        let mut counts = vec![vec![0.0f64; AGENTS]; AGENTS];
        for session in &trace.sessions {
            for pair in session.calls.windows(2) {
                let agent = |call: u32| usize::from(trace.calls[call as usize].agent);
                counts[agent(pair[0])][agent(pair[1])] += 1.0;
            }
        }
        let entropy = |row: &[f64]| {
            let total: f64 = row.iter().sum();
            row.iter().filter(|n| **n > 0.0).map(|n| -n / total * (n / total).log2()).sum::<f64>()
        };
        let total: f64 = counts.iter().flatten().sum();
        let next: Vec<f64> = (0..AGENTS).map(|to| counts.iter().map(|row| row[to]).sum()).collect();
        let given: f64 = counts.iter().map(|row| row.iter().sum::<f64>() / total * entropy(row)).sum();
        1.0 - given / entropy(&next)
    }

    #[test]
    fn pipelines_are_as_predictable_as_asked_for() {
        for r in [0.1, 0.5, 0.9, 1.0] {
            let trace = pipeline(400, 50, r, 1);
            assert!((predictability(&trace) - r).abs() < 0.02, "{r}: {}", predictability(&trace));
        }
    }

    #[test]
    fn a_joined_trace_keeps_blocks_of_its_parts_apart() {
        let part = generated("pipeline", 3, 0).unwrap();
        let (all, part_of) = join(&[part.clone(), part.clone()]);
        assert_eq!(part_of, [0, 0, 0, 1, 1, 1]);
        let n = part.calls.len();
        assert_eq!(all.calls.len(), 2 * n);
        for (first, second) in all.calls[..n].iter().zip(&all.calls[n..]) {
            let shifted: Vec<u32> = all.blocks(first.prompt).map(|block| block + part.n_blocks).collect();
            assert_eq!(all.blocks(second.prompt).collect::<Vec<_>>(), shifted);
            assert_eq!(second.session, first.session + 3);
        }
    }
}
