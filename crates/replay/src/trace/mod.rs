//! The in-memory trace: calls of sessions over dense, prefix-chained block ids.
//!
//! Equal block ids mean equal *full prefixes* up to the end of that block, so every block has one parent.
//! Ids are dense (`0..n_blocks`); readers renumber. Block lists stay run-length encoded: a recorded workload
//! of 13 million block references fits in a few megabytes.
//!
//! | file | what it owns |
//! |---|---|
//! | `builder.rs` | [`TraceBuilder`]: interns names, numbers blocks densely, keeps one parent per block |
//! | `read.rs` | [`read()`]: lines of bounded length out of plain or gzip files, format detection, field access |
//! | `agentrt.rs` | one line of the agentrt format |
//! | `mooncake.rs` | one line of the Mooncake format and of Dynamo's agentic variant |
//! | `write.rs` | [`write()`]: the agentrt format, written to a temporary file and renamed |
//! | `profile.rs` | [`profile::profile()`]: what a workload looks like |

mod agentrt;
mod builder;
mod mooncake;
pub mod profile;
mod read;
mod write;

pub use builder::{BlockFault, TraceBuilder};
pub use read::{read, read_from, Format, ReadOptions, MAX_CALL_BLOCKS};
pub use write::{write, write_to, SCHEMA_VERSION};

/// Marks "no block" in parent tables.
pub const NO_BLOCK: u32 = u32::MAX;

/// `len` consecutive block ids from `first`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First id.
    pub first: u32,
    /// Number of ids.
    pub len: u32,
}

/// A slice of [`Trace::runs`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// First run.
    pub start: u32,
    /// Number of runs.
    pub len: u32,
}

/// The clock on which [`Call::arrival_s`] is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// One clock shared by all sessions.
    Global,
    /// Seconds from the session's start.
    Session,
    /// No times recorded.
    None,
}

/// One LLM request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Call {
    /// Index into [`Trace::sessions`].
    pub session: u32,
    /// Index into [`Trace::agents`].
    pub agent: u16,
    /// Position in the session, from 0.
    pub step: u32,
    /// Step of the call that caused this one.
    pub parent_step: Option<u32>,
    /// Full blocks of the prompt, root first.
    pub prompt: Span,
    /// Full blocks that the decoded answer fills, following the prompt's.
    pub output: Span,
    /// Prompt length in tokens, partial block included.
    pub prompt_tokens: u32,
    /// Decoded tokens.
    pub output_tokens: u32,
    /// Arrival in seconds on [`Trace::clock`].
    pub arrival_s: Option<f64>,
    /// Seconds between its arrival and its start, where an engine recorded them.
    pub queue_s: Option<f64>,
    /// Duration of the call from its start in seconds, where recorded.
    pub llm_latency_s: Option<f64>,
    /// Tool that runs after this call: index into [`Trace::tools`].
    pub tool: Option<u16>,
    /// Duration of that tool in seconds, where recorded.
    pub tool_latency_s: Option<f64>,
    /// Earlier steps of the session whose answers the prompt contains word for word, where recorded.
    pub quotes: Span,
}

/// One workflow run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// Name in the source.
    pub name: String,
    /// Its calls, in order: indices into [`Trace::calls`].
    pub calls: Vec<u32>,
}

/// A recorded or generated workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Name of the workload.
    pub workload: String,
    /// Tokens per block.
    pub block_size: u32,
    /// What [`Call::arrival_s`] counts from.
    pub clock: Clock,
    /// Agent roles.
    pub agents: Vec<String>,
    /// Tool names.
    pub tools: Vec<String>,
    /// Sessions in order of their first call.
    pub sessions: Vec<Session>,
    /// Calls in file order.
    pub calls: Vec<Call>,
    /// Arena of block runs.
    pub runs: Vec<Run>,
    /// Number of distinct blocks; ids are `0..n_blocks`.
    pub n_blocks: u32,
    /// Parent of each block, [`NO_BLOCK`] for the first block of a prompt.
    pub parents: Vec<u32>,
    /// Lines that `--skip-bad` left out.
    pub skipped_lines: u64,
}

impl Trace {
    /// The runs of a span.
    pub fn runs_of(&self, span: Span) -> &[Run] {
        &self.runs[span.start as usize..(span.start + span.len) as usize]
    }

    /// Number of blocks in a span.
    pub fn blocks_in(&self, span: Span) -> usize {
        self.runs_of(span).iter().map(|r| r.len as usize).sum()
    }

    /// The block ids of a span, root first.
    pub fn blocks(&self, span: Span) -> impl Iterator<Item = u32> + '_ {
        self.runs_of(span).iter().flat_map(|r| r.first..r.first + r.len)
    }

    /// Appends the block ids of a span to `out`.
    pub fn expand(&self, span: Span, out: &mut Vec<u32>) {
        for r in self.runs_of(span) {
            out.extend(r.first..r.first + r.len);
        }
    }

    /// Does every call say when it arrived, started and ended, as in what an engine recorded of itself?
    pub fn is_recording(&self) -> bool {
        let timed = |c: &Call| c.arrival_s.is_some() && c.queue_s.is_some() && c.llm_latency_s.is_some();
        self.clock == Clock::Global && self.calls.iter().all(timed)
    }

    /// Blocks that a call occupies in an engine, partial ones included: when it starts, and when it ends.
    ///
    /// The last token of an answer is never fed back, so it takes no place.
    pub fn occupied(&self, call: u32) -> (usize, usize) {
        let c = &self.calls[call as usize];
        let blocks = |tokens: u32| tokens.div_ceil(self.block_size.max(1)) as usize;
        let full = self.blocks_in(c.prompt);
        let start = blocks(c.prompt_tokens).max(full);
        let end = blocks(c.prompt_tokens.saturating_add(c.output_tokens.saturating_sub(1)));
        (start, end.max(start).max(full + self.blocks_in(c.output)))
    }

    /// Mean number of distinct blocks (prompt and output) that a session references.
    pub fn mean_session_blocks(&self) -> f64 {
        let mut seen = vec![u32::MAX; self.n_blocks as usize];
        let mut total = 0u64;
        for (s, session) in self.sessions.iter().enumerate() {
            for &c in &session.calls {
                let call = &self.calls[c as usize];
                for b in self.blocks(call.prompt).chain(self.blocks(call.output)) {
                    if seen[b as usize] != s as u32 {
                        seen[b as usize] = s as u32;
                        total += 1;
                    }
                }
            }
        }
        total as f64 / self.sessions.len().max(1) as f64
    }
}
