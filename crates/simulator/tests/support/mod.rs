//! Workloads and devices that tests share.

#![allow(dead_code, reason = "each test file uses a part")]

use std::sync::Arc;

use replay::generate::{generate, GenerateOptions};
use replay::latency::LatencyModel;
use replay::trace::Trace;

/// A device on which only prompt tokens cost time.
pub(crate) fn per_token(seconds: f64) -> LatencyModel {
    LatencyModel { prefill_s_per_token: seconds, ..instant() }
}

/// A device on which nothing takes time.
pub(crate) fn instant() -> LatencyModel {
    LatencyModel {
        name: "instant",
        prefill_base_s: 0.0,
        prefill_s_per_token: 0.0,
        prefill_s_per_token_pair: 0.0,
        step_base_s: 0.0,
        weights_s: 0.0,
        step_s_per_sequence: 0.0,
        step_s_per_kv_token: 0.0,
        ..LatencyModel::LLAMA_3_1_8B_H100
    }
}

/// A built-in workload.
pub(crate) fn generated(name: &str, sessions: usize, seed: u64) -> Arc<Trace> {
    Arc::new(generate(name, &GenerateOptions { sessions, seed, agents: None }).unwrap())
}
