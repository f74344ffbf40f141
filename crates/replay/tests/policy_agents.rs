//! One scene for each agent policy that shows what it knows.

mod policy_support;

use policy_support::{schedule, TraceBuilder};
use replay::generate::{generate, GenerateOptions};
use replay::policies;
use replay::schedule::Order;
use replay::sim;
use replay::sweep::Capacity;
use replay::trace::Trace;

fn hits(policy: &str, trace: &Trace, capacity: usize) -> Vec<u32> {
    let schedule = schedule(trace, Order::File, 1, capacity, 0);
    let mut policy = policies::build(policy, trace, &schedule).unwrap();
    sim::run(trace, &schedule, policy.as_mut(), &mut |_| {}).call_hits
}

/// Agents 0 -> 1 -> 2 -> 0 in turn, each with a prompt of its own, and no room for all three.
fn cycle(rounds: usize) -> Trace {
    let mut builder = TraceBuilder::new(1, 3);
    for call in 0..3 * rounds {
        let agent = call as u32 % 3;
        builder.call(0, agent as u16, &[10 * agent + 1, 10 * agent + 2], &[]);
    }
    builder.build()
}

#[test]
fn lru_never_hits_in_a_cycle_and_policies_that_know_the_order_do() {
    let trace = cycle(20);
    let total = |policy| hits(policy, &trace, 4).iter().sum::<u32>();
    assert_eq!(total("lru"), 0);
    // The agent that ran last is the farthest from running again.
    for policy in ["kvflow", "min"] {
        assert!(total(policy) >= 50, "{policy}: {}", total(policy));
    }
}

#[test]
fn the_published_scores_protect_the_agent_that_ran_last_which_a_cycle_needs_last() {
    let trace = cycle(20);
    let total = |policy| hits(policy, &trace, 4).iter().sum::<u32>();
    for policy in ["cachesage", "cachescout"] {
        assert!(total(policy) < total("kvflow"), "{policy}: {}, kvflow: {}", total(policy), total("kvflow"));
    }
}

#[test]
fn anchors_shared_by_two_sessions_outlive_later_session_tails_once_repaired() {
    // Both sessions start with [1, 2]; tails follow that are more recent and never return.
    let mut builder = TraceBuilder::new(6, 2);
    builder.call(0, 0, &[1, 2], &[]);
    builder.call(1, 0, &[1, 2], &[]);
    for session in 2..5 {
        builder.call(session, 1, &[100 * session as u32, 100 * session as u32 + 1], &[]);
        builder.call(session, 0, &[100 * session as u32, 100 * session as u32 + 1], &[]);
    }
    builder.call(5, 0, &[1, 2], &[]);
    let trace = builder.build();
    assert_eq!(hits("lru", &trace, 4).last(), Some(&0));
    assert_eq!(hits("cachescout-fixed", &trace, 4).last(), Some(&2));
}

#[test]
fn who_knows_which_session_is_over_keeps_the_other() {
    // Room for two of three sessions; the first or the second one calls again, the others never.
    let kept = |policy, again: u32| {
        let mut builder = TraceBuilder::new(3, 1);
        for session in [0, 1, 2, again] {
            builder.call(session as usize, 0, &[10 * session + 1, 10 * session + 2], &[]);
        }
        hits(policy, &builder.build(), 4)[3]
    };
    for policy in ["oracle-ends", "agentrt-told-ends"] {
        assert_eq!([0, 1].map(|again| kept(policy, again)), [2, 2], "{policy}");
    }
    // Nobody else can tell them apart.
    assert_ne!([0, 1].map(|again| kept("agentrt", again)), [2, 2]);
}

#[test]
fn continuum_keeps_a_session_that_returns_soon_and_is_costly_to_recompute() {
    let mut builder = TraceBuilder::new(61, 2);
    for round in 0..30 {
        builder.call(0, 1, &[1, 2, 3], &[]);
        for session in [1 + 2 * round, 2 + 2 * round] {
            builder.call(session, 0, &[100 + session as u32, 1, 2, 3], &[]);
        }
    }
    let mut trace = builder.build();
    for call in &mut trace.calls {
        call.llm_latency_s = Some(0.01);
        // Seconds of prefill against a pool share of 3/7 for about as long.
        call.prompt_tokens = if call.session == 0 { 100_000 } else { 64 };
    }
    assert_eq!(hits("lru", &trace, 7).iter().sum::<u32>(), 0);
    // Until a few returns were seen, no time to live is known.
    assert!(hits("continuum", &trace, 7).iter().sum::<u32>() > 3 * 20);
}

/// Each task is done by eight sessions: five agents in turn, each asked with the task's prompt, and what one session alone says in
/// between, two to five calls of it.
fn repeated_tasks() -> Trace {
    let (tasks, sessions) = (30, 240);
    let mut builder = TraceBuilder::new(sessions as usize, 6);
    for session in 0..sessions {
        let task = session % tasks;
        for agent in 0..5 {
            let mut prompt = vec![10 + agent, 20 + agent];
            prompt.extend((0..24).map(|i| 1_000 + task * 500 + agent * 50 + i));
            builder.call(session as usize, agent as u16, &prompt, &[100_000 + session]);
            for chat in 0..2 + (session * 7 + agent * 3) % 4 {
                let said: Vec<u32> = (0..24).map(|i| 200_000 + session * 600 + agent * 120 + chat * 24 + i).collect();
                builder.call(session as usize, 5, &said, &[]);
            }
        }
    }
    builder.build()
}

#[test]
fn what_a_session_on_the_same_task_is_going_to_ask_for_is_kept() {
    let trace = repeated_tasks();
    let more = [0, 1, 2].map(|seed| {
        let schedule = schedule(&trace, Order::Closed, 32, 1_600, seed);
        let hits = |policy: &str| {
            let mut policy = policies::build(policy, &trace, &schedule).unwrap();
            100.0 * sim::run(&trace, &schedule, policy.as_mut(), &mut |_| {}).hit_rate()
        };
        hits("agentrt") - hits("agentrt-no-followers")
    });
    assert!(more.iter().sum::<f64>() > 3.0 * 0.6, "{more:.2?} points more in three schedules");
}

#[test]
fn how_many_sessions_have_used_a_prompt_tells_popular_applications_from_others() {
    let gain = |policy: &str| -> f64 {
        let of = |policy: &str, seed| {
            let trace = generate("applications", &GenerateOptions { sessions: 1_500, seed, agents: None }).unwrap();
            let capacity = Capacity::Fraction(0.05).blocks(trace.mean_session_blocks(), 64);
            let schedule = schedule(&trace, Order::Closed, 64, capacity, seed);
            let mut policy = policies::build(policy, &trace, &schedule).unwrap();
            sim::run(&trace, &schedule, policy.as_mut(), &mut |_| {}).hit_rate()
        };
        (0..3).map(|seed| 100.0 * (of(policy, seed) - of("lru", seed))).sum::<f64>() / 3.0
    };
    let (with, without) = (gain("agentrt"), gain("agentrt-no-sharing-classes"));
    assert!(with > without + 0.4, "{with:.2} and {without:.2} points above LRU");
}
