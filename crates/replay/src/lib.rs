//! Traces, generators and the cache replay of agentrt, with baselines and the offline optimum.
//!
//! | module | what it owns |
//! |---|---|
//! | [`trace`] | the in-memory trace, readers, the writer, workload profiles |
//! | [`generate`] | the built-in synthetic workloads |
//! | [`schedule`] | which call runs when: one order per (trace, sessions, capacity, seed), the same for every policy |
//! | [`host`] | the host tier: blocks that left the pool |
//! | [`pool`] | the simulated KV pool: residency, pins, prefix closure |
//! | [`policy`] | the trait that every cache policy of the replay implements |
//! | [`policies`] | baselines, the optimum, the oracles and the adapter to agentrt's own policy |
//! | [`sim`] | runs one policy over one schedule and counts hits |
//! | [`latency`] | turns hits into time to first token and makespan |
//! | [`explain`] | what agentrt sees in a workload, and what it does with it |
//! | [`calibration`] | predicted survival against what happened |
//! | [`sweep`] | runs many replays in parallel and collects the result file |

pub mod calibration;
pub mod error;
pub mod explain;
pub mod generate;
pub mod host;
pub mod latency;
pub mod policies;
pub mod policy;
pub mod pool;
pub mod schedule;
pub mod sim;
pub mod sweep;
pub mod trace;

pub use error::{Error, Result};
