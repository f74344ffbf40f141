//! `lru` against an independent model of vLLM's block pool, and what the session-end hint does.

mod policy_support;

use policy_support::{random_trace, schedule, Shape, TraceBuilder};
use replay::policies;
use replay::schedule::{EventKind, Order, Schedule};
use replay::sim;
use replay::trace::Trace;

/// vLLM's block pool as plain lists: reference counts, a free list, eviction from its head.
fn hits_of_vllm(trace: &Trace, schedule: &Schedule) -> Vec<u32> {
    let mut uses = vec![0u32; trace.n_blocks as usize];
    let mut cached = vec![false; trace.n_blocks as usize];
    let mut free: Vec<u32> = Vec::new();
    let mut hits = vec![u32::MAX; trace.calls.len()];
    for event in &schedule.events {
        let call = &trace.calls[event.call as usize];
        let prompt: Vec<u32> = trace.blocks(call.prompt).collect();
        let output: Vec<u32> = trace.blocks(call.output).collect();
        let mut allocate = |blocks: &[u32], free: &mut Vec<u32>| {
            let found = blocks.iter().take_while(|&&b| cached[b as usize]).count();
            // A hit is touched before new blocks are taken, so that it cannot be taken itself.
            for &b in &blocks[..found] {
                uses[b as usize] += 1;
                free.retain(|&f| f != b);
            }
            for &b in &blocks[found..] {
                if cached.iter().filter(|&&c| c).count() == schedule.options.capacity_blocks {
                    cached[free.remove(0) as usize] = false;
                }
                cached[b as usize] = true;
                uses[b as usize] += 1;
            }
            found as u32
        };
        match event.kind {
            EventKind::Queued | EventKind::Grow | EventKind::Bypass => {}
            EventKind::Start => hits[event.call as usize] = allocate(&prompt, &mut free),
            EventKind::Finish => {
                allocate(&output, &mut free);
                for &b in prompt.iter().chain(&output).rev() {
                    uses[b as usize] -= 1;
                    if uses[b as usize] == 0 {
                        free.push(b);
                    }
                }
            }
        }
    }
    hits
}

#[test]
fn lru_equals_a_list_model_of_vllms_block_pool() {
    for seed in 0..60 {
        let shape = Shape {
            sessions: 6,
            calls: 120,
            agents: 3,
            labels: 1 + seed as u32 % 4,
            longest: 14,
            answer: seed as usize % 5,
        };
        let trace = random_trace(seed, shape);
        for order in [Order::Closed, Order::Open, Order::File] {
            let schedule = schedule(&trace, order, 1 + seed as usize % 5, 12 + seed as usize, seed);
            let mut lru = policies::build("lru", &trace, &schedule).unwrap();
            let outcome = sim::run(&trace, &schedule, lru.as_mut(), &mut |_| {});
            assert_eq!(outcome.call_hits, hits_of_vllm(&trace, &schedule), "seed {seed}, {order:?}");
        }
    }
}

#[test]
fn a_finished_session_goes_first_and_its_shared_prefix_stays() {
    // Session 1 ends with the most recent blocks; session 0 returns. Both start with block [9].
    let mut builder = TraceBuilder::new(3, 1);
    builder.call(0, 0, &[9, 1, 2], &[]);
    builder.call(1, 0, &[9, 3, 4], &[]);
    builder.call(2, 0, &[5, 6], &[]);
    builder.call(0, 0, &[9, 1, 2], &[]);
    let trace = builder.build();
    let schedule = schedule(&trace, Order::File, 1, 5, 0);
    let hits = |name| {
        let mut policy = policies::build(name, &trace, &schedule).unwrap();
        sim::run(&trace, &schedule, policy.as_mut(), &mut |_| {}).call_hits
    };
    assert_eq!(hits("lru"), [0, 1, 0, 1]);
    assert_eq!(hits("lru-session-end"), [0, 1, 0, 3]);
}
