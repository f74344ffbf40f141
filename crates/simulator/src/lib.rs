//! A discrete-event serving engine that measures agentrt's scheduling policies.
//!
//! It stands on the replay (workloads, block pool, host tier, latency model, cache policies) and asks its policies
//! through the interface that engines use ([`runtime_core::scheduling`]), so that a policy runs unchanged in both.
//! What is modelled and what is not: docs/simulator.md.
//!
//! | file | what it owns |
//! |---|---|
//! | `workload.rs` | [`Workload`]: calls, times between them, tenants, starts of sessions |
//! | `engine.rs` | [`simulate`]: steps, admission, preemption, tools, idle capacity |
//! | `memory.rs` | pool and host tier, and in which order blocks leave |
//! | `service.rs` | how evenly tenants are served |
//! | `baselines/` | what engines and papers do |
//! | `scenarios/` | what policies are judged by |
//! | `outcome.rs` | [`Outcome`]: what happened, and figures of it |

pub mod baselines;
mod engine;
mod memory;
mod outcome;
pub mod scenarios;
mod service;
mod workload;

pub use engine::{simulate, EngineOptions};
pub use outcome::{mean, percentile, CallRecord, Outcome};
pub use replay::{Error, Result};
pub use workload::{Arrivals, Workload};
