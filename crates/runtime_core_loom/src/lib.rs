//! Model checks of `runtime_core`'s lock-free steps.
//!
//! `protocol.rs` and `table.rs` are the production files, included by path and compiled against loom's atomics. Loom
//! runs each model under every interleaving of up to five preemptions and every value a `Relaxed`
//! load may return. Each model also runs with one fix switched off and must then fail with the
//! message of its assertion: a model that cannot see the bug proves nothing.
//!
//! Limits of the method: loom does not reorder a load after a later store, and treats `SeqCst`
//! accesses as `AcqRel` (none are used here). A pass is strong evidence for small cases, not a proof
//! for all; the stress tests and ThreadSanitizer cover the large ones.
//!
//! `cargo test --release` in this directory runs them all.

#[allow(dead_code, reason = "models use the steps one by one, some of them not at all")]
#[path = "../../runtime_core/src/protocol.rs"]
mod protocol;

#[allow(dead_code, reason = "as above")]
#[path = "../../runtime_core/src/kv/table.rs"]
mod table;

mod sync {
    pub(crate) use loom::sync::atomic::{fence, AtomicU32, AtomicU64, AtomicU8, Ordering};
}

#[cfg(test)]
mod models;
