//! Built-in multi-agent workloads, seeded and of any size.
//!
//! Each generator plays sessions of a team: it renders every prompt from texts (system prompt, task, messages, tool
//! results), so blocks are shared, extended, superseded and re-rendered exactly as an engine with prefix caching
//! would see them. Figures and their sources: docs/workloads.md.
//!
//! | file | what it owns |
//! |---|---|
//! | `prompt.rs` | a prompt as a growing chain of texts, and its block keys |
//! | `stage.rs` | the recorder all workloads write to: names, sizes, tool times, calls |
//! | the others | one workload each |
//!
//! No times are recorded except tool times, which are drawn independently of everything else: gaps carry no
//! information about sizes, agents or the future.

mod applications;
mod coding_team;
mod debate;
mod drift;
mod many_agents;
mod pipeline;
mod prompt;
mod research_tree;
mod selector_chat;
mod stage;

use crate::error::{Error, Result};
use crate::trace::Trace;
use stage::Stage;

/// Size and seed of a generated workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerateOptions {
    /// Number of sessions.
    pub sessions: usize,
    /// Equal seeds give equal traces.
    pub seed: u64,
    /// Size of the team; the workload's own where absent.
    pub agents: Option<usize>,
}

/// A built-in workload.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Name on the command line.
    pub name: &'static str,
    /// One line for `--help`.
    pub about: &'static str,
    /// Sessions that give steady figures in seconds.
    pub default_sessions: usize,
    /// Size of the team.
    pub default_agents: usize,
    block_size: u32,
    fewest_agents: usize,
    play: fn(&mut Stage, usize),
}

/// The built-in workloads: five multi-agent applications, then tests of capacity, drift and popularity.
pub const WORKLOADS: [Workload; 8] = [
    Workload {
        name: "pipeline",
        about: "six roles in fixed order, each reading what the one before wrote",
        default_sessions: 120,
        default_agents: 6,
        block_size: 16,
        fewest_agents: 2,
        play: pipeline::play,
    },
    Workload {
        name: "debate",
        about: "debaters on one growing thread, a moderator between rounds",
        default_sessions: 100,
        default_agents: 5,
        block_size: 16,
        fewest_agents: 2,
        play: debate::play,
    },
    Workload {
        name: "selector_chat",
        about: "six roles on one thread, the next speaker chosen by a model",
        default_sessions: 100,
        default_agents: 6,
        block_size: 16,
        fewest_agents: 2,
        play: selector_chat::play,
    },
    Workload {
        name: "research_tree",
        about: "map-reduce: a planner fans out to researchers with tools, a reducer and a writer follow",
        default_sessions: 80,
        default_agents: 8,
        block_size: 16,
        fewest_agents: 4,
        play: research_tree::play,
    },
    Workload {
        name: "coding_team",
        about: "a coding agent with long context and tools that spawns sub-agents",
        default_sessions: 40,
        default_agents: 4,
        block_size: 64,
        fewest_agents: 2,
        play: coding_team::play,
    },
    Workload {
        name: "many_agents",
        about: "capacity test: thousands of agents, small teams drawn from them (not among the five)",
        default_sessions: 2000,
        default_agents: 10_000,
        block_size: 16,
        fewest_agents: 2,
        play: many_agents::play,
    },
    Workload {
        name: "drift",
        about: "drift test: selector_chat whose order of speakers changes every 60 sessions; for --order open (not among the five)",
        default_sessions: 120,
        default_agents: 6,
        block_size: 16,
        fewest_agents: 2,
        play: drift::play,
    },
    Workload {
        name: "applications",
        about: "popularity test: short conversations with one of forty applications each, popular as 1 / rank (not among the five)",
        default_sessions: 1500,
        default_agents: 40,
        block_size: 16,
        fewest_agents: 2,
        play: applications::play,
    },
];

/// The five multi-agent workloads that demonstrations and benchmarks run.
pub fn five() -> impl Iterator<Item = &'static Workload> {
    WORKLOADS.iter().take(5)
}

/// The names that [`generate`] knows.
pub fn names() -> Vec<&'static str> {
    WORKLOADS.iter().map(|w| w.name).collect()
}

/// The built-in workload of this name.
pub fn workload(name: &str) -> Result<&'static Workload> {
    WORKLOADS
        .iter()
        .find(|w| w.name == name)
        .ok_or_else(|| Error::UnknownWorkload { name: name.into(), known: names().join(", ") })
}

/// Generates the workload `name`.
pub fn generate(name: &str, options: &GenerateOptions) -> Result<Trace> {
    let workload = workload(name)?;
    let bad = |option: &str, problem: String, remedy: &str| Error::BadOption {
        option: option.into(),
        problem,
        remedy: remedy.into(),
    };
    if options.sessions == 0 {
        return Err(bad("--sessions", "must be at least 1".into(), "pass the number of sessions to generate"));
    }
    let agents = options.agents.unwrap_or(workload.default_agents);
    if agents < workload.fewest_agents || agents > 60_000 {
        let problem = format!("{agents} is outside {} to 60000 for {name}", workload.fewest_agents);
        return Err(bad("--agents", problem, "pass a number in that range, or leave it out"));
    }
    let mut stage = Stage::new(workload.name, workload.block_size, options.seed);
    for session in 0..options.sessions {
        stage.start_session(session);
        (workload.play)(&mut stage, agents);
    }
    Ok(stage.finish())
}
