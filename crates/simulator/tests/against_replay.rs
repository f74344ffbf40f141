//! The engine against the replay: the same calls in the same order find the same blocks.

mod support;

use std::sync::Arc;

use replay::policies;
use replay::schedule::{Order, Schedule, ScheduleOptions};
use replay::sim;
use simulator::{simulate, EngineOptions, Outcome, Workload};

/// Runs a workload and replays what happened, in the order in which it happened.
fn both(workload: &Workload, options: &EngineOptions) -> (Outcome, Vec<u32>) {
    let options = EngineOptions { record_events: true, ..options.clone() };
    let outcome = simulate(workload, &options, Vec::new(), &mut |_| {}).unwrap();
    let schedule = Schedule {
        events: outcome.events.clone(),
        gap_s: workload.gap_us.iter().map(|&us| us as f64 / 1e6).collect(),
        session_order: Vec::new(),
        options: ScheduleOptions {
            order: Order::Closed,
            sessions: 1,
            seed: 0,
            capacity_blocks: options.capacity_blocks,
            model: options.model,
        },
    };
    let mut policy = policies::build(&options.cache, &workload.trace, &schedule).unwrap();
    let replayed = sim::run(&workload.trace, &schedule, policy.as_mut(), &mut |_| {});
    (outcome, replayed.call_hits)
}

fn hits(outcome: &Outcome) -> Vec<u32> {
    outcome.calls.iter().map(|call| if call.prompt_blocks == 0 { u32::MAX } else { call.hit_blocks }).collect()
}

/// Policies that learn online; the others know the order of calls beforehand.
fn online() -> impl Iterator<Item = &'static str> {
    policies::names().iter().copied().filter(|name| *name != "min" && !name.starts_with("oracle"))
}

/// One call at a time on a device on which nothing takes time.
fn idle(capacity: usize, cache: &str) -> EngineOptions {
    EngineOptions {
        token_budget: u32::MAX,
        max_running: 1,
        model: support::instant(),
        cache: cache.into(),
        ..EngineOptions::new(capacity)
    }
}

#[test]
fn an_idle_device_finds_what_the_replay_finds_block_for_block_under_every_cache_policy() {
    for workload in ["selector_chat", "coding_team"] {
        let mut trace = replay::trace::Trace::clone(&support::generated(workload, 8, 3));
        // In the replay an answer's blocks enter the pool together, when the call ends; here so does a short answer's.
        trace.calls.iter_mut().for_each(|call| call.output_tokens = 1);
        let capacity = (trace.mean_session_blocks() * 1.5) as usize;
        let workload = Workload::closed(Arc::new(trace), 4, 5).unwrap();
        for name in online() {
            let (outcome, replayed) = both(&workload, &idle(capacity, name));
            assert!(outcome.evictions > 0 && outcome.hit_rate(|_| true) > 0.1, "{name}");
            assert_eq!(outcome.index_drift, 0, "{name}");
            assert_eq!(hits(&outcome), replayed, "{name}");
        }
    }
}

#[test]
fn it_does_not_matter_to_orders_by_use_that_answers_enter_the_pool_block_by_block() {
    let trace = support::generated("selector_chat", 12, 3);
    let capacity = (trace.mean_session_blocks() * 1.5) as usize;
    let workload = Workload::closed(trace, 4, 5).unwrap();
    for name in ["lru", "lfu", "depth", "s3fifo", "cachescout"] {
        let (outcome, replayed) = both(&workload, &idle(capacity, name));
        assert_eq!(hits(&outcome), replayed, "{name}");
    }
}

#[test]
fn a_busy_device_finds_what_the_replay_finds_where_prompts_fit_into_one_step() {
    let trace = support::generated("pipeline", 40, 1);
    let capacity = (trace.mean_session_blocks() * 12.0) as usize;
    let workload = Workload::closed(Arc::clone(&trace), 16, 2).unwrap();
    let options = EngineOptions { token_budget: 1 << 20, ..EngineOptions::new(capacity) };
    let (outcome, replayed) = both(&workload, &options);
    assert_eq!(outcome.preemptions, 0);
    let found = hits(&outcome);
    // Answers enter the pool as they are decoded, in the replay when they end: an eviction may come earlier here.
    let (here, there): (u64, u64) =
        found.iter().zip(&replayed).fold((0, 0), |(a, b), (&x, &y)| (a + u64::from(x), b + u64::from(y)));
    assert!((here as f64 / there as f64 - 1.0).abs() < 0.01, "{here} hits, the replay finds {there}");
}
