//! Learned, lock-free state and policies of agentrt: observe, score, predict, act.

pub mod error;
pub mod histogram;
pub mod ids;
pub mod protocol;
pub mod sessions;
pub mod successors;
mod sync;
