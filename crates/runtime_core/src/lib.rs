//! Learned, lock-free state and policies of agentrt: observe, score, predict, act.
#![allow(dead_code)]

pub mod error;
pub mod histogram;
pub mod ids;
pub mod kv;
pub mod merge;
pub mod policy;
pub mod protocol;
pub mod runtime;
pub mod sessions;
pub mod successors;
mod sync;

pub use error::{Error, Result};
pub use runtime::Runtime;
