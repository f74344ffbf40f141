//! What engines and papers do, behind the same interface as agentrt's own policies.
//!
//! | file | baselines |
//! |---|---|
//! | `order.rs` | `lpm`, `priority`, `cap-N`: which calls and sessions run together |
//! | `remaining.rs` | `oracle-remaining`, `oracle-remaining-N`, `learned-remaining`: sessions by what they have left |
//! | `tenants.rs` | `rate-limit-N`, `drr`, `vtc`: whose turn it is |
//! | `gaps.rs` | `ttl-S`, `continuum`, `keep`: what is kept while a tool runs |
//!
//! `fcfs`, first come first served, is the engine without a policy. Where a published system has more parts than one
//! decision, only that decision is here; each file says what is left out.

mod gaps;
mod order;
mod remaining;
mod tenants;

use replay::latency::LatencyModel;
use replay::trace::Trace;
use replay::{Error, Result};
use runtime_core::policy::{built_in, Policy, BUILT_IN};
use runtime_core::scheduling::Decision;

use gaps::{Continuum, Keep};
use order::{Cap, LongestPrefix, SessionPriority};
use remaining::{LearnedRemaining, OracleRemaining};
use tenants::{DeficitRoundRobin, RateLimit, VirtualTokenCounter};

/// Names that [`build`] knows beside agentrt's own policies; N and S stand for numbers.
pub const NAMES: [&str; 13] = [
    "fcfs",
    "lpm",
    "priority",
    "cap-N",
    "oracle-remaining",
    "oracle-remaining-N",
    "learned-remaining",
    "rate-limit-N",
    "drr",
    "vtc",
    "ttl-S",
    "continuum",
    "keep",
];

/// The policies named, joined by `+`: baselines or agentrt's own. Oracles know nothing.
pub fn build(names: &str) -> Result<Vec<Box<dyn Policy>>> {
    all(names, None)
}

/// [`build`], where oracles know what will be asked for and what it costs.
pub fn build_for(names: &str, trace: &Trace, model: &LatencyModel) -> Result<Vec<Box<dyn Policy>>> {
    all(names, Some((trace, model)))
}

type Future<'a> = Option<(&'a Trace, &'a LatencyModel)>;

fn all(names: &str, future: Future<'_>) -> Result<Vec<Box<dyn Policy>>> {
    names.split('+').map(str::trim).filter(|name| *name != "fcfs").map(|name| one(name, future)).collect()
}

fn one(name: &str, future: Future<'_>) -> Result<Box<dyn Policy>> {
    let number = |prefix: &str| name.strip_prefix(prefix).and_then(|n| n.parse::<f64>().ok()).filter(|n| *n > 0.0);
    Ok(match name {
        "lpm" => Box::new(LongestPrefix),
        "priority" => Box::new(SessionPriority::default()),
        "learned-remaining" => Box::new(LearnedRemaining::default()),
        "oracle-remaining" => Box::new(OracleRemaining::new(future, usize::MAX)),
        "drr" => Box::new(DeficitRoundRobin::default()),
        "vtc" => Box::new(VirtualTokenCounter::default()),
        "continuum" => Box::new(Continuum::default()),
        "keep" => Box::new(Keep { for_us: u64::MAX }),
        _ => {
            if let Some(sessions) = number("cap-") {
                return Ok(Box::new(Cap::new(sessions as usize)));
            }
            if let Some(sessions) = number("oracle-remaining-") {
                return Ok(Box::new(OracleRemaining::new(future, sessions as usize)));
            }
            if let Some(rate) = number("rate-limit-") {
                return Ok(Box::new(RateLimit::new(rate)));
            }
            if let Some(seconds) = number("ttl-") {
                return Ok(Box::new(Keep { for_us: (seconds * 1e6) as u64 }));
            }
            // The cache policy is the engine's option, not one of these.
            let own = Some(name).filter(|name| !["kv_cache", "lru"].contains(name)).and_then(built_in);
            return own.ok_or_else(|| Error::UnknownPolicy {
                name: name.into(),
                known: NAMES.iter().chain(&BUILT_IN[2..]).copied().collect::<Vec<_>>().join(", "),
            });
        }
    })
}

/// Sorts by `key`; what is equal stays in the order that it had.
fn rank_by<K: Ord>(decisions: &mut [Decision], key: impl Fn(usize) -> K) {
    let mut order: Vec<usize> = (0..decisions.len()).collect();
    order.sort_by_key(|&at| (key(at), decisions[at].rank));
    for (rank, at) in order.into_iter().enumerate() {
        decisions[at].rank = rank as u32;
    }
}
