//! What can go wrong, with the numbers that say how far off it was.
//!
//! Hot-path calls do not fail: unknown ids are data. Errors are for construction, for misuse of
//! the single-writer contract, and for bytes that came from somewhere else.

/// Every error of this crate. Whatever returns one has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A size was asked for that the structure cannot have.
    #[error("{what} must be between {min} and {max}: {requested}")]
    OutOfRange {
        /// What was being sized.
        what: &'static str,
        /// Smallest allowed value.
        min: u64,
        /// Largest allowed value.
        max: u64,
        /// The value asked for.
        requested: u64,
    },
    /// A second caller entered an operation that has one writer at a time.
    #[error("{what} is in use by another thread, call it from one thread at a time")]
    Busy {
        /// The operation or structure.
        what: &'static str,
    },
    /// An engine cannot supply what a policy needs.
    #[error("policy {policy} needs what this engine does not report: {what}; leave the policy out or report it")]
    Unsupplied {
        /// The policy.
        policy: &'static str,
        /// What is missing.
        what: &'static str,
    },
    /// Encoded bytes end before the value they announce.
    #[error("encoded state ends after {length} bytes, {needed} were announced")]
    Truncated {
        /// Bytes the encoding needs.
        needed: u64,
        /// Bytes there are.
        length: u64,
    },
    /// Encoded bytes are not of the format this version reads.
    #[error("encoded state has {what} {found:#x}, expected {expected:#x}")]
    Format {
        /// The field that differs.
        what: &'static str,
        /// What this version reads.
        expected: u64,
        /// What the bytes hold.
        found: u64,
    },
    /// Encoded bytes were altered on their way.
    #[error("encoded state has checksum {found:#018x}, its content gives {computed:#018x}")]
    Checksum {
        /// Checksum stored in the bytes.
        found: u64,
        /// Checksum of the bytes.
        computed: u64,
    },
    /// Two states do not count the same things.
    #[error("section {section} has {found} counters, this state has {expected}")]
    Shape {
        /// Index of the first section that differs.
        section: u32,
        /// Counters in this state's section.
        expected: u64,
        /// Counters in the other's.
        found: u64,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
