//! The one error type of the crate.

use std::path::PathBuf;

/// Result alias of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a trace file and a result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be opened, read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A line of a trace is not usable.
    #[error("{path}:{line}: field `{field}`: {problem}; {remedy}")]
    BadLine {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// The JSON field, or `line` for the line as a whole.
        field: String,
        /// What is wrong.
        problem: String,
        /// What the user can do.
        remedy: String,
    },
    /// A trace as a whole is not usable (empty, unknown schema).
    #[error("{path}: {problem}; {remedy}")]
    BadTrace {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What the user can do.
        remedy: String,
    },
    /// A policy name that does not exist.
    #[error("unknown policy `{name}`; known policies: {known}")]
    UnknownPolicy {
        /// The name as given.
        name: String,
        /// Comma-separated known names.
        known: String,
    },
    /// A generator name that does not exist.
    #[error("unknown workload `{name}`; known workloads: {known}")]
    UnknownWorkload {
        /// The name as given.
        name: String,
        /// Comma-separated known names.
        known: String,
    },
    /// An option outside its range.
    #[error("{option}: {problem}; {remedy}")]
    BadOption {
        /// The option.
        option: String,
        /// What is wrong.
        problem: String,
        /// What the user can do.
        remedy: String,
    },
    /// A policy did not do what it promises.
    #[error("policy `{policy}`: {problem}")]
    BrokenPromise {
        /// The policy.
        policy: String,
        /// What it did.
        problem: String,
    },
}
