//! Baselines, the optimum, the oracles and the adapter to agentrt's own policy.
//!
//! | file | policies |
//! |---|---|
//! | `lru` | `lru`: vLLM's order |
//! | `lru_session_end` | `lru-session-end`: LRU that is told when a session ends |
//! | `lfu` | `lfu` |
//! | `s3fifo`, `sieve`, `arc` | policies of flat caches |
//! | `lhd` | `lhd`: least hit density |
//! | `depth` | `depth`: deepest block first |
//! | `kvflow` | `kvflow`: steps to execution on the declared agent graph |
//! | `continuum` | `continuum`: learned time to live by tool |
//! | `cachesage`, `cachescout` | `cachesage`, `cachescout`, `cachescout-fixed`: learned agent transitions |
//! | `min` | `min`: the offline optimum; `min-prefetch`: with a host tier, everything is brought back in time |
//! | `both_tiers` | agentrt's order in the host tier |
//! | `inferred` | wraps a policy that is to infer whose calls it sees |
//! | `agents` | shared by the agent policies: last uses, transition counts |
//! | `flat` | replays a stream of single keys, for comparison with other libraries |
//! | `queue`, `leaves` | shared structures: a linked queue, evictable blocks by rank |
//!
//! Sources, parameters and deviations of each are in `docs/baselines.md`.

pub mod agentrt;
mod agents;
mod arc;
mod both_tiers;
mod cachesage;
mod cachescout;
mod continuum;
mod depth;
mod flat;
mod inferred;
mod kvflow;
mod leaves;
mod lfu;
mod lhd;
mod lru;
mod lru_session_end;
mod min;
pub(crate) mod queue;
mod s3fifo;
mod sieve;

pub use agentrt::AgentRt;
pub use arc::Arc;
pub use cachesage::CacheSage;
pub use cachescout::CacheScout;
pub use continuum::Continuum;
pub use depth::Depth;
pub use flat::replay_flat;
pub use inferred::Inferred;
pub use kvflow::KvFlow;
pub use lfu::Lfu;
pub use lhd::Lhd;
pub use lru::Lru;
pub use lru_session_end::LruSessionEnd;
pub use min::Min;
pub use s3fifo::S3Fifo;
pub use sieve::Sieve;

use std::sync::LazyLock;

use crate::error::{Error, Result};
use crate::policy::CachePolicy;
use crate::schedule::Schedule;
use crate::trace::Trace;

const BASELINES: &[&str] = &[
    "lru",
    "lru-session-end",
    "lfu",
    "s3fifo",
    "sieve",
    "arc",
    "lhd",
    "depth",
    "kvflow",
    "continuum",
    "cachesage",
    "cachescout",
    "cachescout-fixed",
    "min",
    "min-prefetch",
];

/// The names that [`build`] knows, in the order of reports.
pub fn names() -> &'static [&'static str] {
    static ALL: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
        let mut names = BASELINES.to_vec();
        names.extend(agentrt::variants().map(|v| v.0));
        names
    });
    &ALL
}

/// Whether a policy is nothing without the trace's own sessions, agents or future of them. All others either look at
/// blocks alone or can do with inferred identities.
pub fn needs_identity(name: &str) -> bool {
    let oracle = agentrt::config(name).is_some_and(|config| config.oracle != runtime_core::kv::Oracle::default());
    oracle
        || matches!(
            name,
            agentrt::TOLD_ENDS
                | "lru-session-end"
                | "kvflow"
                | "continuum"
                | "cachesage"
                | "cachescout"
                | "cachescout-fixed"
        )
}

/// Makes the policy called `name` for one run of `trace` in the order of `schedule`.
pub fn build(name: &str, trace: &Trace, schedule: &Schedule) -> Result<Box<dyn CachePolicy>> {
    Ok(match name {
        "lru" => Box::new(Lru::new(trace)),
        "lru-session-end" => Box::new(LruSessionEnd::new(trace)),
        "lfu" => Box::new(Lfu::new(trace)),
        "s3fifo" => Box::new(S3Fifo::new(trace, schedule.options.capacity_blocks)),
        "sieve" => Box::new(Sieve::new(trace)),
        "arc" => Box::new(Arc::new(trace, schedule.options.capacity_blocks)),
        "lhd" => Box::new(Lhd::new(trace, schedule)),
        "depth" => Box::new(Depth::new(trace)),
        "kvflow" => Box::new(KvFlow::new(trace)),
        "continuum" => Box::new(Continuum::new(trace, schedule)),
        "cachesage" => Box::new(CacheSage::new(trace)),
        "cachescout" => Box::new(CacheScout::published(trace)),
        "cachescout-fixed" => Box::new(CacheScout::repaired(trace)),
        "min" => Box::new(Min::new(trace, schedule)),
        "min-prefetch" => Box::new(Min::with_prefetch(trace, schedule)),
        // agentrt's own policy, its ablations, and the oracles that know one respect of the future.
        name if agentrt::config(name).is_some() => {
            let config = agentrt::config(name).expect("just found");
            let host = agentrt::HostUse::of(name);
            let mut policy = AgentRt::new(schedule.options.capacity_blocks, config, host, trace, schedule);
            policy.told_ends = name == agentrt::TOLD_ENDS;
            Box::new(policy)
        }
        _ => return Err(Error::UnknownPolicy { name: name.into(), known: names().join(", ") }),
    })
}
