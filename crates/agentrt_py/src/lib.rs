//! `agentrt._core`: converts arguments, maps errors, delegates to `runtime_core` and `replay`.
//!
//! One file per room: each registers its classes and functions in the module below.
#![deny(unsafe_code)]

mod clock;
mod convert;
mod engine;
mod errors;
mod explain;
mod flat;
mod identity;
mod live_policy;
mod python_policy;
mod replay;
mod runtime;
mod safety;
mod scheduling;
mod simulate;
mod transfer;

use pyo3::prelude::*;

/// Version, build profile and compiler options of the extension, for benchmarks and bug reports.
#[pyfunction]
fn build_info() -> String {
    format!("agentrt {} ({})", env!("CARGO_PKG_VERSION"), env!("AGENTRT_PROFILE"))
}

/// True in a build without optimisation.
#[pyfunction]
fn is_debug_build() -> bool {
    cfg!(debug_assertions)
}

/// The extension module.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::{build_info, is_debug_build};
    #[pymodule_export]
    use crate::clock::monotonic_us;
    #[pymodule_export]
    use crate::engine::{block_keys, EngineCall, EngineCalls, EngineCounts, EngineHooks, FreeQueue};
    #[pymodule_export]
    use crate::explain::explain;
    #[pymodule_export]
    use crate::flat::replay_flat;
    #[pymodule_export]
    use crate::identity::Identity;
    #[pymodule_export]
    use crate::python_policy::ReplayCall;
    #[pymodule_export]
    use crate::replay::{models, policies, replay, workloads, Trace};
    #[pymodule_export]
    use crate::runtime::{block_key, Prediction, Prefetch, Runtime, Session, Workload};
    #[pymodule_export]
    use crate::safety::{check_policy, ToolRules};
    #[pymodule_export]
    use crate::scheduling::{Prefill, Scheduler};
    #[pymodule_export]
    use crate::simulate::{scenarios, simulate};
    #[pymodule_export]
    use crate::transfer::copy_host_blocks;
}
