//! vLLM's scheduler side in Rust: one call from Python a hook.
//!
//! | file | question |
//! |---|---|
//! | `hooks.rs` | which hooks are there, and what if one fails? |
//! | `calls.rs` | what does a hook of vLLM mean for the requests that it holds? |
//! | `calls/arrival.rs` | whose is a request, and is it its session's last? |
//! | `calls/telling.rs` | what is the core told, and when? |
//! | `calls/victims.rs` | what has to stand at the head of the free queue? |
//! | `call.rs`, `names.rs` | what is kept of a request, and who does it say it is of? |
//! | `steps.rs` | what does a step tell the core while the model runs? |
//! | `blocks.rs`, `queue.rs` | which block carries which key, and how do victims get to the head of the queue? |

mod blocks;
mod call;
mod calls;
mod hooks;
mod names;
mod queue;
mod steps;

pub(crate) use blocks::block_keys;
pub(crate) use call::{EngineCall, EngineCounts};
pub(crate) use calls::EngineCalls;
pub(crate) use hooks::EngineHooks;
pub(crate) use queue::FreeQueue;
