//! Flat streams of single keys, on which policies can be compared with libraries that cache independent objects.

use std::collections::HashMap;

use super::build;
use crate::error::Result;
use crate::latency::LatencyModel;
use crate::schedule::{Order, Schedule, ScheduleOptions};
use crate::sim;
use crate::trace::{Call, Clock, Run, Session, Span, Trace, NO_BLOCK};

/// Replays `keys`, each a prompt of one block, one at a time; true where the key was in the cache.
pub fn replay_flat(policy: &str, keys: &[u32], capacity: usize) -> Result<Vec<bool>> {
    let trace = flat_trace(keys);
    let model = LatencyModel::LLAMA_3_1_8B_H100;
    let options = ScheduleOptions { order: Order::File, sessions: 1, seed: 0, capacity_blocks: capacity, model };
    let schedule = Schedule::new(&trace, options)?;
    let mut policy = build(policy, &trace, &schedule)?;
    let outcome = sim::run(&trace, &schedule, policy.as_mut(), &mut |_| {});
    Ok(outcome.call_hits.iter().map(|&hits| hits == 1).collect())
}

fn flat_trace(keys: &[u32]) -> Trace {
    let mut ids = HashMap::new();
    let mut runs = Vec::with_capacity(keys.len());
    for &key in keys {
        let next = ids.len() as u32;
        runs.push(Run { first: *ids.entry(key).or_insert(next), len: 1 });
    }
    let call = |index: u32| Call {
        session: 0,
        agent: 0,
        step: index,
        parent_step: None,
        prompt: Span { start: index, len: 1 },
        output: Span::default(),
        prompt_tokens: 1,
        output_tokens: 1,
        arrival_s: None,
        queue_s: None,
        llm_latency_s: None,
        tool: None,
        tool_latency_s: None,
        quotes: Span::default(),
    };
    let n_calls = keys.len() as u32;
    Trace {
        workload: "flat".into(),
        block_size: 1,
        clock: Clock::None,
        agents: vec!["agent".into()],
        tools: Vec::new(),
        sessions: vec![Session { name: "session".into(), calls: (0..n_calls).collect() }],
        calls: (0..n_calls).map(call).collect(),
        runs,
        n_blocks: ids.len() as u32,
        parents: vec![NO_BLOCK; ids.len()],
        skipped_lines: 0,
    }
}
