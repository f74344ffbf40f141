//! Writes the agentrt format.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use flate2::write::GzEncoder;
use flate2::Compression;
use serde::Serialize;

use super::{Clock, Span, Trace};
use crate::error::{Error, Result};

/// Version of the agentrt format that this crate writes and reads.
pub const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize)]
struct Row<'a> {
    schema_version: u32,
    workload: &'a str,
    session_id: &'a str,
    step: u32,
    agent: &'a str,
    parent: Option<u32>,
    t_arrival: Option<f64>,
    t_scope: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_s: Option<f64>,
    llm_latency_s: Option<f64>,
    tool_name: Option<&'a str>,
    tool_latency_s: Option<f64>,
    prompt_tokens: u32,
    output_tokens: u32,
    block_size: u32,
    blocks: Vec<(u32, u32)>,
    out_blocks: Vec<(u32, u32)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    quotes: Vec<(u32, u32)>,
}

/// Writes `trace` to `path`, compressed where the name ends in `.gz`.
///
/// The lines go to a temporary file beside it that is renamed at the end: a failure leaves no half-written trace and
/// what `path` held before stays.
pub fn write(trace: &Trace, path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let fail = |source: io::Error| Error::Io { path: path.into(), source };
    let temporary = temporary_beside(path);
    let result = write_file(trace, path, &temporary).and_then(|()| fs::rename(&temporary, path));
    if result.is_err() {
        // The error that matters is the first one.
        let _ = fs::remove_file(&temporary);
    }
    result.map_err(fail)
}

fn temporary_beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

fn write_file(trace: &Trace, path: &Path, temporary: &Path) -> io::Result<()> {
    let file = BufWriter::new(File::create(temporary)?);
    let file = if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gz")) {
        // A header without name and time: equal traces give equal files.
        let mut encoder = GzEncoder::new(file, Compression::default());
        write_to(trace, &mut encoder)?;
        encoder.finish()?
    } else {
        let mut file = file;
        write_to(trace, &mut file)?;
        file
    };
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// Writes the lines of `trace` to `out`.
pub fn write_to(trace: &Trace, out: &mut impl Write) -> io::Result<()> {
    let runs = |span: Span| trace.runs_of(span).iter().map(|r| (r.first, r.len)).collect();
    for call in &trace.calls {
        let row = Row {
            schema_version: SCHEMA_VERSION,
            workload: &trace.workload,
            session_id: &trace.sessions[call.session as usize].name,
            step: call.step,
            agent: &trace.agents[call.agent as usize],
            parent: call.parent_step,
            t_arrival: call.arrival_s,
            t_scope: match trace.clock {
                Clock::Global => "global",
                Clock::Session => "session",
                Clock::None => "none",
            },
            queue_s: call.queue_s,
            llm_latency_s: call.llm_latency_s,
            tool_name: call.tool.map(|t| trace.tools[t as usize].as_str()),
            tool_latency_s: call.tool_latency_s,
            prompt_tokens: call.prompt_tokens,
            output_tokens: call.output_tokens,
            block_size: trace.block_size,
            blocks: runs(call.prompt),
            out_blocks: runs(call.output),
            quotes: runs(call.quotes),
        };
        serde_json::to_writer(&mut *out, &row)?;
        out.write_all(b"\n")?;
    }
    Ok(())
}
