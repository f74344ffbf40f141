//! The atomics that [`crate::protocol`] is written against.
//!
//! Production uses the standard library's; the model workspace `runtime_core_loom` includes
//! `protocol.rs` by path next to a `sync` module of loom's types.

pub(crate) use std::sync::atomic::{fence, AtomicU32, AtomicU64, AtomicU8, Ordering};
