//! `batch_shaping`: which calls and sessions run together.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use replay::trace::Trace;
use replay::Result;

use super::traces::{generated, Recorded};
use super::{higher, lower, Metric, Scenario, Setting};
use crate::engine::EngineOptions;
use crate::outcome::{mean, percentile};
use crate::workload::Workload;

const METRICS: &[Metric] = &[
    lower("mean session completion", "s"),
    lower("p99 session completion", "s"),
    higher("hit rate", "%"),
    higher("throughput", "tokens/s"),
    lower("longest hold", "s"),
    lower("session time spent waiting", "%"),
];
const BASELINES: &[&str] = &["fcfs", "lpm", "priority", "cap-8", "cap-16", "cap-32"];
/// And what an order by the work left could gain, with and without a window.
const WITH_ORACLES: &[&str] = &[
    "fcfs",
    "lpm",
    "priority",
    "cap-8",
    "cap-16",
    "cap-32",
    "oracle-remaining",
    "oracle-remaining-8",
    "oracle-remaining-16",
    "oracle-remaining-32",
    "learned-remaining",
];
/// Of these, the ones that tell something after thousands of calls.
const SUSTAINED: &[&str] =
    &["fcfs", "priority", "cap-32", "oracle-remaining", "oracle-remaining-32", "learned-remaining"];

/// Sessions that the pool holds.
const POOL_SESSIONS: f64 = 8.0;
/// Arrivals over what the engine would complete if its pool held everything: what it completes while the pool thrashes may
/// be many times less, and arrivals at twice that rate would be no overload.
const OVERLOAD: f64 = 2.0;
/// Arrivals over what it completes first come first served when all come at once, thrashing included.
const LIGHT: f64 = 0.25;
/// Sessions of a sustained overload, in those of the others: what an order can gain grows with the queue.
const LONGER: usize = 4;
/// All sessions within a few seconds.
const BURST: f64 = 100.0;

#[derive(Clone)]
enum Source {
    Generated(&'static str, usize),
    Recorded(Recorded),
}

impl Source {
    fn name(&self) -> &'static str {
        match self {
            Self::Generated(name, _) => name,
            Self::Recorded(recorded) => recorded.name,
        }
    }

    /// With so many times the sessions, where they are drawn.
    fn times(&self, times: usize) -> Option<Self> {
        match self {
            Self::Generated(name, sessions) => Some(Self::Generated(name, sessions * times)),
            Self::Recorded(_) => None,
        }
    }

    fn trace(&self, seed: u64) -> Result<Arc<Trace>> {
        match self {
            Self::Generated(name, sessions) => Ok(Arc::new(generated(name, *sessions, seed)?)),
            Self::Recorded(recorded) => recorded.get(),
        }
    }
}

fn engine(trace: &Trace) -> EngineOptions {
    let largest = trace.calls.iter().map(|call| trace.blocks_in(call.prompt) + trace.blocks_in(call.output)).max();
    let pool = (trace.mean_session_blocks() * POOL_SESSIONS) as usize;
    EngineOptions::new(pool.max(2 * largest.unwrap_or(0)))
}

/// Sessions a second that the engine completes first come first served when all come at once: the rate of work, without
/// the times in which it waits for the last ones' tools. First in its pool, then in one that holds everything.
fn capacity_per_s(source: &Source) -> Result<[f64; 2]> {
    let trace = source.trace(0)?;
    let workload = Workload::poisson(Arc::clone(&trace), 1e6, 0)?;
    let rate = |options: &EngineOptions| -> Result<f64> {
        let outcome = Setting { cache: "lru".into() }.run(&workload, options, "fcfs")?;
        Ok(trace.sessions.len() as f64 / (outcome.busy_us as f64 / 1e6))
    };
    let own = engine(&trace);
    let ample = EngineOptions { capacity_blocks: own.capacity_blocks.max(trace.n_blocks as usize), ..own.clone() };
    Ok([rate(&own)?, rate(&ample)?])
}

pub(super) fn scenarios(folder: Option<&Path>) -> Vec<Scenario> {
    let recorded = [
        ("claude_code_main", 100, 50),
        ("claude_code_sub", 17, 80),
        ("whowhen_magentic", 58, 80),
        ("whowhen_ag2", 126, 80),
        ("taubench_airline", 200, 60),
        ("marble_research", 200, 80),
        ("mooncake_conversation", 300, 20),
        ("hyperagent", 13, 80),
        ("autokaggle", 6, 80),
    ];
    let recorded = recorded
        .into_iter()
        .filter_map(|(name, sessions, calls)| Recorded::find(folder, name, sessions, calls).map(Source::Recorded));
    let generated = [("selector_chat", 300), ("pipeline", 300), ("research_tree", 120), ("coding_team", 96)];
    let sources = generated.into_iter().map(|(name, sessions)| Source::Generated(name, sessions)).chain(recorded);
    let mut all = Vec::new();
    for source in sources {
        let per_s: Arc<OnceLock<Result<[f64; 2]>>> = Arc::default();
        let loads = [
            ("burst", BURST, 0, WITH_ORACLES, "all sessions arrive at once"),
            (
                "overload",
                OVERLOAD,
                1,
                WITH_ORACLES,
                "sessions arrive twice as fast as they could be served with memory to spare",
            ),
            ("sustained", OVERLOAD, 1, SUSTAINED, "the same overload for four times as long"),
            ("light", LIGHT, 0, BASELINES, "sessions arrive at a quarter of what can be served"),
        ];
        for (load, times, of, baselines, about) in loads {
            let served = if load == "sustained" { source.times(LONGER) } else { Some(source.clone()) };
            let Some(served) = served else { continue };
            let (source, per_s) = (source.clone(), Arc::clone(&per_s));
            all.push(Scenario {
                name: format!("{load}/{}", source.name()),
                about,
                metrics: METRICS,
                baselines,
                measure: Box::new(move |setting, seed, policies| {
                    let per_s = match per_s.get_or_init(|| capacity_per_s(&source)) {
                        Ok(per_s) => *per_s,
                        Err(_) => capacity_per_s(&source)?,
                    }[of];
                    let trace = served.trace(seed)?;
                    let options = engine(&trace);
                    let workload = Workload::poisson(trace, per_s * times, seed)?;
                    let outcome = setting.run(&workload, &options, policies)?;
                    let sessions = outcome.session_s(&workload.trace);
                    Ok(vec![
                        mean(&sessions),
                        percentile(&sessions, 0.99),
                        100.0 * outcome.hit_rate(|_| true),
                        outcome.tokens_per_s(&workload),
                        outcome.longest_hold_s(),
                        100.0 * outcome.waited_s() / sessions.iter().sum::<f64>(),
                    ])
                }),
            });
        }
    }
    all
}
