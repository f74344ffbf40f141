//! Reads trace files: plain or gzip, one JSON object per line, never more than one line in memory.
//!
//! Formats are told apart by the fields of the first line. A bad line is an [`Error::BadLine`] that names file, line,
//! field and remedy, or, with [`ReadOptions::skip_bad`], counted in [`Trace::skipped_lines`]. What concerns the file as
//! a whole (mixed workloads, another schema version, no call at all) is an [`Error::BadTrace`] and never skipped.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value};

use super::{agentrt, mooncake, BlockFault, Trace};
use crate::error::{Error, Result};

/// Blocks one call may have: more than any model's context.
pub const MAX_CALL_BLOCKS: u64 = 1 << 22;

/// Longest duration accepted: 115 days, in seconds.
pub(super) const MAX_DURATION_S: f64 = 1e7;
/// Latest arrival accepted, in seconds: far beyond any epoch.
pub(super) const MAX_ARRIVAL_S: f64 = 1e11;

/// The formats that [`read`] understands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Decide by the fields of the first line.
    #[default]
    Auto,
    /// agentrt JSONL.
    Agentrt,
    /// Mooncake JSONL: `timestamp`, `input_length`, `output_length`, `hash_ids`, perhaps `session_id`.
    Mooncake,
    /// Dynamo's agentic variant of it: `request_id`, `wait_for`, `tool_wait_ms`, ...
    DynamoAgentic,
}

/// How to read a trace.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// The file's format.
    pub format: Format,
    /// Count bad lines instead of failing.
    pub skip_bad: bool,
    /// Sessions whose calls carry the same `sys_key` share their first `sys_blocks` blocks.
    pub share_system_prefix: bool,
    /// Longest line accepted.
    pub max_line_bytes: usize,
    /// Tokens per block of a Mooncake file; inferred from its first line where absent.
    pub block_size: Option<u32>,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            format: Format::Auto,
            skip_bad: false,
            share_system_prefix: true,
            max_line_bytes: 16 << 20,
            block_size: None,
        }
    }
}

/// Reads the trace at `path`.
pub fn read(path: impl AsRef<Path>, options: &ReadOptions) -> Result<Trace> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|source| Error::Io { path: path.into(), source })?;
    read_from(BufReader::with_capacity(1 << 16, file), path, options)
}

/// Reads a trace from `input`, plain or gzip; `path` appears in errors.
pub fn read_from(mut input: impl BufRead, path: &Path, options: &ReadOptions) -> Result<Trace> {
    let head = input.fill_buf().map_err(|source| Error::Io { path: path.into(), source })?;
    // One byte of the magic number is enough to tell: JSON never starts with 0x1f.
    if head.first() == Some(&0x1f) {
        let input = BufReader::with_capacity(1 << 16, MultiGzDecoder::new(input));
        read_lines(input, path, options)
    } else {
        read_lines(input, path, options)
    }
}

/// One format's parser; sees every line once.
pub(super) trait LineParser {
    fn line(&mut self, fields: &Fields<'_>) -> Result<()>;
    fn finish(self: Box<Self>, path: &Path) -> Result<Trace>;
}

fn read_lines(mut input: impl BufRead, path: &Path, options: &ReadOptions) -> Result<Trace> {
    let mut parser: Option<Box<dyn LineParser>> = None;
    let mut skipped = 0u64;
    let mut buffer = Vec::new();
    let mut at = At { path: path.into(), line: 0 };
    loop {
        at.line += 1;
        let outcome = match next_line(&mut input, &mut buffer, options.max_line_bytes) {
            Ok(Line::End) => break,
            Ok(Line::Text) if buffer.trim_ascii().is_empty() => continue,
            Ok(Line::Text) => parse_line(&buffer, &at, &mut parser, options),
            Ok(Line::TooLong) => Err(at.bad(
                "line",
                format!("longer than {} bytes", options.max_line_bytes),
                "write one LLM call per line, with blocks as [first, count] runs",
            )),
            Err(source) if is_gzip_fault(&source) => {
                let remedy = "copy or compress the file again, or use --skip-bad to keep the lines before";
                let fault = at.bad("line", format!("the gzip data is truncated or damaged here ({source})"), remedy);
                if !options.skip_bad {
                    return Err(fault);
                }
                skipped += 1;
                break;
            }
            Err(source) => return Err(Error::Io { path: path.into(), source }),
        };
        match outcome {
            Err(Error::BadLine { .. }) if options.skip_bad => skipped += 1,
            other => other?,
        }
    }
    let Some(parser) = parser else {
        let (problem, remedy) = if skipped == 0 {
            ("the file is empty", "record at least one LLM call per session")
        } else {
            ("no line could be read", "read it without --skip-bad to see the first problem")
        };
        return Err(Error::BadTrace { path: path.into(), problem: problem.into(), remedy: remedy.into() });
    };
    let mut trace = parser.finish(path)?;
    trace.skipped_lines = skipped;
    if trace.calls.is_empty() {
        return Err(Error::BadTrace {
            path: path.into(),
            problem: format!("no call is left after skipping {skipped} lines"),
            remedy: "read it without --skip-bad to see the first problem".into(),
        });
    }
    Ok(trace)
}

fn parse_line(text: &[u8], at: &At, parser: &mut Option<Box<dyn LineParser>>, options: &ReadOptions) -> Result<()> {
    let value: Value = serde_json::from_slice(text)
        .map_err(|e| at.bad("line", format!("not JSON ({e})"), "write one JSON object per line"))?;
    let Value::Object(map) = value else {
        return Err(at.bad(
            "line",
            format!("expected a JSON object, found {}", kind(&value)),
            "write one JSON object per line",
        ));
    };
    let fields = Fields { at, map: &map };
    if parser.is_none() {
        let format = match options.format {
            Format::Auto => fields.detect()?,
            chosen => chosen,
        };
        *parser = Some(match format {
            Format::Mooncake => Box::new(mooncake::Parser::new(false, options, at)),
            Format::DynamoAgentic => Box::new(mooncake::Parser::new(true, options, at)),
            Format::Agentrt | Format::Auto => Box::new(agentrt::Parser::new(options)),
        });
    }
    parser.as_mut().map_or(Ok(()), |parser| parser.line(&fields))
}

enum Line {
    End,
    Text,
    TooLong,
}

/// Reads one line without its line feed; of a longer one keeps nothing.
fn next_line(input: &mut impl BufRead, buffer: &mut Vec<u8>, max: usize) -> io::Result<Line> {
    buffer.clear();
    let read = input.by_ref().take(max as u64 + 1).read_until(b'\n', buffer)?;
    if read == 0 {
        return Ok(Line::End);
    }
    if buffer.last() == Some(&b'\n') {
        buffer.pop();
    } else if read > max {
        buffer.clear();
        input.skip_until(b'\n')?;
        return Ok(Line::TooLong);
    }
    Ok(Line::Text)
}

fn is_gzip_fault(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput)
}

/// A place in a file.
pub(super) struct At {
    pub(super) path: PathBuf,
    pub(super) line: u64,
}

impl At {
    pub(super) fn bad(&self, field: &str, problem: impl Into<String>, remedy: impl Into<String>) -> Error {
        Error::BadLine {
            path: self.path.clone(),
            line: self.line,
            field: field.into(),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => format!("the text \"{}\"", s.chars().take(40).collect::<String>()),
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
    }
}

/// Typed access to the fields of one line, with errors that name them.
pub(super) struct Fields<'a> {
    pub(super) at: &'a At,
    map: &'a Map<String, Value>,
}

const FIELD_REMEDY: &str = "see docs/traces.md for the schema";

impl Fields<'_> {
    fn detect(&self) -> Result<Format> {
        let has = |name: &str| self.map.contains_key(name);
        if has("blocks") || has("prompt_tokens") || has("schema_version") {
            Ok(Format::Agentrt)
        } else if has("wait_for")
            || has("branches")
            || has("tool_wait_ms")
            || has("tool_events")
            || has("prefix_reset")
            || (has("request_id") && has("hash_ids"))
        {
            Ok(Format::DynamoAgentic)
        } else if has("hash_ids") {
            Ok(Format::Mooncake)
        } else if has("schema") {
            Err(Error::BadTrace {
                path: self.at.path.clone(),
                problem: "it starts with a schema header, which no supported format has".into(),
                remedy: "of Dynamo's agentic traces, export the form without a header (dynamo-data-gen 1.3 to 1.5)"
                    .into(),
            })
        } else {
            Err(self.at.bad(
                "line",
                "has the fields of no known format",
                "agentrt lines have `blocks`, Mooncake and Dynamo lines have `hash_ids`; see docs/traces.md",
            ))
        }
    }

    pub(super) fn bad(&self, field: &str, problem: impl Into<String>, remedy: impl Into<String>) -> Error {
        self.at.bad(field, problem, remedy)
    }

    /// The value of a field; null counts as absent.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    fn wrong(&self, name: &str, expected: &str) -> Error {
        match self.get(name) {
            Some(value) => self.bad(name, format!("expected {expected}, found {}", kind(value)), FIELD_REMEDY),
            None => self.bad(name, format!("missing; expected {expected}"), FIELD_REMEDY),
        }
    }

    pub(super) fn opt_str(&self, name: &str) -> Result<Option<&str>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.wrong(name, "text")),
        }
    }

    pub(super) fn str(&self, name: &str) -> Result<&str> {
        self.opt_str(name)?.ok_or_else(|| self.wrong(name, "text"))
    }

    pub(super) fn opt_u32(&self, name: &str) -> Result<Option<u32>> {
        let expected = "a whole number from 0 to 4294967295";
        match self.get(name) {
            None => Ok(None),
            Some(value) => {
                let number = value.as_u64().and_then(|n| u32::try_from(n).ok());
                number.map(Some).ok_or_else(|| self.wrong(name, expected))
            }
        }
    }

    pub(super) fn u32(&self, name: &str) -> Result<u32> {
        self.opt_u32(name)?.ok_or_else(|| self.wrong(name, "a whole number from 0 to 4294967295"))
    }

    /// A time in the field's own unit, at most `max`: so bounded, sums of times stay meaningful.
    pub(super) fn opt_time(&self, name: &str, max: f64) -> Result<Option<f64>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => {
                let number = value.as_f64().filter(|n| (0.0..=max).contains(n));
                let expected = format!("a number from 0 to {max}");
                number.map(Some).ok_or_else(|| self.wrong(name, &expected))
            }
        }
    }

    pub(super) fn opt_array(&self, name: &str) -> Result<Option<&Vec<Value>>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value.as_array().map(Some).ok_or_else(|| self.wrong(name, "an array")),
        }
    }

    /// The error for blocks that [`super::TraceBuilder::push`] refused.
    pub(super) fn blocks_fault(&self, field: &str, fault: BlockFault) -> Error {
        match fault {
            BlockFault::TwoParents(key) => self.bad(
                field,
                format!("block {key} follows another block than it did before, so it cannot mean one full prefix"),
                "name blocks by the hash of their whole prefix, not of their own tokens",
            ),
            BlockFault::Repeated(key) => self.bad(
                field,
                format!("block {key} appears twice in one call"),
                "name blocks by the hash of their whole prefix, not of their own tokens",
            ),
            BlockFault::TooMany => self.bad(
                field,
                "the trace has more than 2^28 distinct blocks",
                "split the trace by session, or record larger blocks",
            ),
        }
    }
}
