//! Rules on tool calls: one declarative file, checked with line numbers, decided in microseconds.
//!
//! A policy (TOML, [`Policy::parse`]) declares tools and an ordered list of rules; the first rule that matches a
//! call decides ([`RuleSet::decide`]). Matching is linear in the length of the arguments: the `regex` crate has no
//! backtracking, and look-around and back-references do not exist in its language.
//!
//! Two principles run through the matching.
//! * **Deny is generous, allow is strict.** An argument has several readings: as it stands, NFKC-normalised,
//!   percent-decoded, unescaped, parsed as JSON, decoded from base64 or hex, look-alike letters replaced
//!   ([`views`]). A condition of a `deny` or `ask` rule holds if *any* reading matches, ignoring case; one of an
//!   `allow` rule only if there is a value and *every* reading matches, as a whole.
//! * **Names are compared as they look.** Tool names are NFKC-normalised and lower-cased; a name that is no declared
//!   one but has the same UTS #39 skeleton as one is denied ([`names`]). What is not declared is denied.
//!
//! | operation | cost | allocates |
//! |---|---|---|
//! | [`Policy::parse`], [`RuleSet::new`] | milliseconds at 1,000 rules | yes |
//! | [`RuleSet::decide`] | 1-5 us at 1,000 rules (`benches/py/test_tools_bench.py`) | leaves of the arguments |
//!
//! No Python, no I/O, no clock; everything is immutable after construction and shared freely between threads.

pub mod names;
pub mod policy;
pub mod rules;
pub mod shadow;
pub mod views;

pub use policy::{Effect, Finding, Policy, Severity};
pub use rules::{Decision, Reason, RuleSet};
pub use views::Value;
