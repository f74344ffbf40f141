//! What holds in every run: no call is lost, memory stays within the pool, the device works whenever it can, and equal
//! seeds give equal runs.

mod support;

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use replay::host::HostOptions;
use replay::schedule::EventKind;
use replay::trace::{Call, Clock, TraceBuilder};
use runtime_core::policy::{About, Policy};
use runtime_core::scheduling::fairness::FairnessPolicy;
use runtime_core::scheduling::{Decision, Gap, GapDecision, Happening, Load, Needs, Prefill, Retention, Waiting};
use runtime_core::Runtime;
use simulator::{baselines, simulate, Arrivals, EngineOptions, Error, Outcome, Workload};

/// Contradicts itself: ranks, holds, keeps, demotes, releases and prefills as the time happens to be.
struct Fickle;

impl Policy for Fickle {
    fn about(&self) -> About {
        About { name: "fickle".into(), observes: "the time", decides: "everything", costs: "nothing" }
    }

    fn needs(&self) -> Needs {
        Needs::TOOLS.and(Needs::IDLE_CAPACITY).and(Needs::SERVICE)
    }

    fn schedule(&self, _: &Runtime, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let n = decisions.len() as u32;
        for (place, (call, decision)) in (0..n).zip(waiting.iter().zip(decisions)) {
            decision.rank = n - 1 - place;
            if (call.call + load.now_us / 50_000) % 3 == 0 {
                decision.hold_until_us = load.now_us + 40_000;
            }
        }
    }

    fn gaps(&self, _: &Runtime, load: &Load, gaps: &[Gap], decisions: &mut [GapDecision]) {
        for (gap, decision) in gaps.iter().zip(decisions) {
            decision.retention = match (gap.session + load.now_us / 300_000) % 4 {
                0 => Retention::Keep,
                1 => Retention::Release,
                2 if load.host_bytes_per_s > 0 => Retention::Demote,
                _ => Retention::Undecided,
            };
            decision.bring_back_us = gap.started_us + 400_000;
        }
    }

    fn idle(&self, _: &Runtime, load: &Load, prefills: &mut [Prefill]) -> usize {
        let like_call = load.now_us / 10_000 % 50;
        prefills[0] = Prefill { like_call, session: like_call % 7, blocks: 40, ..Prefill::default() };
        1
    }
}

fn run(workload: &Workload, options: &EngineOptions, policies: &str) -> Outcome {
    let list: Vec<Box<dyn Policy>> = match policies {
        "fickle" => vec![Box::new(Fickle)],
        _ => baselines::build_for(policies, &workload.trace, &options.model).unwrap(),
    };
    simulate(workload, options, list, &mut |_| {}).unwrap()
}

/// Checks a run against its workload.
fn check(workload: &Workload, options: &EngineOptions, outcome: &Outcome) {
    let trace = &workload.trace;
    let mut finishes = vec![0; trace.calls.len()];
    for event in outcome.events.iter().filter(|event| event.kind != EventKind::Start) {
        finishes[event.call as usize] += 1;
    }
    assert!(finishes.iter().all(|&n| n == 1), "a call was lost or answered twice");
    assert!(outcome.peak_blocks <= options.capacity_blocks);
    let computed = outcome.prefill_tokens + outcome.decoded_tokens;
    let output: u64 = trace.calls.iter().map(|call| u64::from(call.output_tokens)).sum();
    assert_eq!(outcome.decoded_tokens, output, "every token is generated once");
    assert!(computed > output);
    for (call, record) in trace.calls.iter().zip(&outcome.calls) {
        assert!(record.arrived_us <= record.admitted_us);
        assert!(record.admitted_us < record.first_token_us);
        assert!(record.first_token_us <= record.finished_us);
        assert!(record.waited_us >= record.admitted_us - record.arrived_us);
        assert!(record.hit_blocks + record.loaded_blocks <= trace.blocks_in(call.prompt) as u32);
    }
    for session in &trace.sessions {
        for pair in session.calls.windows(2) {
            let (before, after) = (&outcome.calls[pair[0] as usize], &outcome.calls[pair[1] as usize]);
            assert_eq!(after.arrived_us, before.finished_us + workload.gap_us[pair[1] as usize]);
        }
    }
    assert_eq!(outcome.calls.iter().map(|call| call.finished_us).max(), Some(outcome.end_us));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, rng_seed: RngSeed::Fixed(8), ..ProptestConfig::default() })]

    #[test]
    fn every_call_is_answered_once_within_the_pool_whatever_policies_say(
        seed in 0u64..1000,
        workload in prop::sample::select(vec!["selector_chat", "pipeline", "research_tree"]),
        cache in prop::sample::select(vec!["lru", "agentrt"]),
        policies in prop::sample::select(vec![
            "fcfs", "lpm", "priority", "cap-2", "drr", "vtc", "rate-limit-20000", "ttl-1", "keep", "continuum", "fickle",
            "oracle-remaining", "oracle-remaining-2", "learned-remaining",
            "batch_shaping", "fairness", "tool_gap", "speculation", "batch_shaping+fairness+keep",
            "batch_shaping+fairness+tool_gap", "speculation+batch_shaping+fairness+tool_gap",
        ]),
        pool in 0.3f64..3.0,
        token_budget in 64u32..4096,
        max_running in 1usize..12,
        host in any::<bool>(),
    ) {
        let trace = support::generated(workload, 8, seed);
        let capacity_blocks = (trace.mean_session_blocks() * pool) as usize;
        let mut options = EngineOptions {
            token_budget, max_running, cache: cache.into(), record_events: true, ..EngineOptions::new(capacity_blocks)
        };
        options.host = host.then_some(HostOptions {
            blocks: capacity_blocks,
            bytes_per_s: 1e9,
            prefetch_bytes_per_s: 5e8,
            block_bytes: 2e6,
        });
        let mut workload = Workload::closed(trace, 5, seed).unwrap();
        workload.tenant.iter_mut().enumerate().for_each(|(session, tenant)| *tenant = session as u16 % 3);
        let outcome = run(&workload, &options, policies);
        check(&workload, &options, &outcome);
        prop_assert_eq!(&run(&workload, &options, policies), &outcome);
    }
}

#[test]
fn the_device_never_rests_while_a_call_could_run() {
    // All at once: without holds, there is work until the end but for the gaps of the last sessions.
    let trace = support::generated("pipeline", 30, 4);
    let mut workload = Workload::closed(Arc::clone(&trace), 1, 0).unwrap();
    workload.gap_us.fill(0);
    workload.arrivals = Arrivals::Open(vec![0; trace.sessions.len()]);
    for policies in ["fcfs", "lpm", "priority", "drr", "vtc", "fairness"] {
        let options = EngineOptions::new((trace.mean_session_blocks() * 4.0) as usize);
        let outcome = run(&workload, &options, policies);
        assert_eq!(outcome.busy_us, outcome.end_us, "{policies}");
    }
}

#[test]
fn calls_that_grow_beyond_a_small_pool_are_preempted_and_still_answered() {
    let trace = support::generated("pipeline", 12, 2);
    let blocks = |call: &replay::trace::Call| trace.blocks_in(call.prompt) + trace.blocks_in(call.output);
    let largest = trace.calls.iter().map(blocks).max().unwrap();
    let mut workload = Workload::closed(Arc::clone(&trace), 1, 1).unwrap();
    workload.arrivals = Arrivals::Open(vec![0; trace.sessions.len()]);
    for (policies, cache) in [("fcfs", "lru"), ("keep", "lru"), ("keep", "agentrt"), ("fcfs", "arc")] {
        let options = EngineOptions { record_events: true, cache: cache.into(), ..EngineOptions::new(largest * 3 / 2) };
        let outcome = run(&workload, &options, policies);
        check(&workload, &options, &outcome);
        assert!(outcome.preemptions > 0 && outcome.repeated_tokens > 0, "{policies}, {cache}");
        let preempted: u32 = outcome.calls.iter().map(|call| call.preemptions).sum();
        assert_eq!(u64::from(preempted), outcome.preemptions);
    }
}

#[test]
fn the_oracle_lets_the_session_with_least_left_go_first() {
    const BLOCK: u32 = 16;
    let mut builder = TraceBuilder::new("lengths", BLOCK, Clock::None);
    let agent = builder.agent("agent").unwrap();
    // Calls of each session. Its prompts grow, so that what it has left is not what its next call computes.
    let lengths = [3u64, 1, 4, 2];
    for (number, &calls) in (0..).zip(&lengths) {
        let session = builder.session(&format!("session {number}"));
        for step in 1..=calls {
            let prompt: Vec<u64> = (1..=10 * step).map(|block| number << 32 | block << 1 | 1).collect();
            let call = Call {
                session,
                agent,
                prompt_tokens: prompt.len() as u32 * BLOCK,
                output_tokens: 1,
                ..Call::default()
            };
            builder.push(call, &prompt, &[]).unwrap();
        }
    }
    let trace = Arc::new(builder.finish());
    let workload = Workload::new(Arc::clone(&trace), &vec![0.0; trace.calls.len()], Arrivals::Open(vec![0; 4]));
    let options = EngineOptions { max_running: 1, record_events: true, ..EngineOptions::new(1000) };
    let order = |policies: &str| {
        let outcome = run(&workload, &options, policies);
        check(&workload, &options, &outcome);
        let ends = |session: usize| outcome.calls[*trace.sessions[session].calls.last().unwrap() as usize].finished_us;
        let mut sessions = [0, 1, 2, 3];
        sessions.sort_by_key(|&session| ends(session));
        sessions
    };
    assert_eq!(order("oracle-remaining"), [1, 3, 0, 2]);
    assert_eq!(order("oracle-remaining-1"), [1, 3, 0, 2]);
    assert_eq!(order("cap-1"), [0, 1, 2, 3]);
}

/// A session of two calls with a tool between them, and calls of others in between that need the pool twice over.
fn gap_under_pressure(other_blocks: u64) -> Workload {
    const BLOCK: u32 = 16;
    let mut builder = TraceBuilder::new("gap", BLOCK, Clock::None);
    let (agent, tool) = (builder.agent("agent").unwrap(), builder.tool("tool"));
    let mut starts = vec![0];
    let session = builder.session("with a tool");
    let prompt: Vec<u64> = (1..=100).collect();
    for _ in 0..2 {
        let call = Call { session, agent, prompt_tokens: 100 * BLOCK, output_tokens: 1, tool, ..Call::default() };
        builder.push(call, &prompt, &[]).unwrap();
    }
    for number in 1..=10 {
        let session = builder.session(&format!("other {number}"));
        let prompt: Vec<u64> = (1..=other_blocks).map(|block| number << 32 | block).collect();
        let prompt_tokens = other_blocks as u32 * BLOCK;
        builder
            .push(Call { session, agent, prompt_tokens, output_tokens: 1, ..Call::default() }, &prompt, &[])
            .unwrap();
        starts.push(number * 1_000_000);
    }
    let trace = Arc::new(builder.finish());
    let gaps: Vec<f64> = (0..trace.calls.len()).map(|call| if call == 1 { 20.0 } else { 0.0 }).collect();
    Workload::new(trace, &gaps, Arrivals::Open(starts))
}

#[test]
fn what_a_policy_keeps_is_there_when_the_tool_returns_unless_nothing_else_is_left() {
    for cache in ["lru", "agentrt"] {
        let options = EngineOptions { cache: cache.into(), ..EngineOptions::new(150) };
        let hits =
            |other_blocks, policies| run(&gap_under_pressure(other_blocks), &options, policies).calls[1].hit_blocks;
        assert_eq!(hits(40, "keep"), 100, "{cache}");
        assert_eq!(hits(40, "ttl-30"), 100, "{cache}");
        assert!(hits(40, "ttl-2") < 100, "{cache}");
        assert!(hits(40, "fcfs") < 100, "{cache}");
        // A call of the others that needs what is kept gets it.
        assert!(hits(120, "keep") < 100, "{cache}");
    }
}

#[test]
fn every_pair_of_policies_serves_all_calls_with_tools_tenants_and_a_host_tier() {
    let trace = support::generated("coding_team", 6, 5);
    let capacity_blocks = (trace.mean_session_blocks() * 2.0) as usize;
    let mut workload = Workload::closed(Arc::clone(&trace), 5, 5).unwrap();
    workload.tenant.iter_mut().enumerate().for_each(|(session, tenant)| *tenant = session as u16 % 2);
    let host = HostOptions { blocks: capacity_blocks, bytes_per_s: 1e9, prefetch_bytes_per_s: 5e8, block_bytes: 2e6 };
    let names = ["batch_shaping", "fairness", "agent_fairness", "tool_gap", "speculation"];
    for (at, one) in names.iter().enumerate() {
        for other in &names[at + 1..] {
            let options = EngineOptions {
                host: Some(host),
                record_events: true,
                cache: "agentrt".into(),
                ..EngineOptions::new(capacity_blocks)
            };
            let outcome = run(&workload, &options, &format!("{one}+{other}"));
            check(&workload, &options, &outcome);
            let without = |name| ![*one, *other].contains(&name);
            assert!(outcome.longest_hold_s() == 0.0 || !without("batch_shaping"), "{one}+{other}: only it holds");
            assert!(outcome.speculative_us == 0 || !without("speculation"), "{one}+{other}: only it prefills ahead");
        }
    }
}

#[test]
fn in_a_pool_of_one_session_pins_give_way_and_all_calls_are_answered() {
    let trace = support::generated("coding_team", 8, 3);
    let blocks = |call: &replay::trace::Call| trace.blocks_in(call.prompt) + trace.blocks_in(call.output);
    let capacity_blocks = trace.calls.iter().map(blocks).max().unwrap();
    let workload = Workload::closed(Arc::clone(&trace), 6, 3).unwrap();
    for policies in ["tool_gap", "tool_gap+batch_shaping+fairness"] {
        for cache in ["lru", "agentrt"] {
            for with_host in [false, true] {
                let host = HostOptions {
                    blocks: capacity_blocks,
                    bytes_per_s: 1e9,
                    prefetch_bytes_per_s: 5e8,
                    block_bytes: 2e6,
                };
                let options = EngineOptions {
                    host: with_host.then_some(host),
                    record_events: true,
                    cache: cache.into(),
                    ..EngineOptions::new(capacity_blocks)
                };
                check(&workload, &options, &run(&workload, &options, policies));
            }
        }
    }
}

/// Serves in order of arrival, or as `fairness` does with a counter that does not hear of the second tenant, and claims
/// that tenants are served alike.
struct Claims(Option<FairnessPolicy>);

impl Policy for Claims {
    fn about(&self) -> About {
        About { name: "claims".into(), observes: "half of it", decides: "order", costs: "nothing" }
    }

    fn needs(&self) -> Needs {
        Needs::TENANTS.and(Needs::SERVICE).and(Needs::ARRIVALS).and(Needs::ADMISSIONS)
    }

    fn bounds_service(&self) -> bool {
        true
    }

    fn hear(&self, runtime: &Runtime, now_us: u64, happening: &Happening) {
        let deaf = matches!(happening, Happening::Admitted { call, .. } if call.tenant == 1);
        if let Some(fairness) = self.0.as_ref().filter(|_| !deaf) {
            // It charges calls that it has not seen admitted for nothing.
            fairness.hear(runtime, now_us, happening);
        }
    }

    fn schedule(&self, runtime: &Runtime, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        if let Some(fairness) = &self.0 {
            fairness.schedule(runtime, load, waiting, decisions);
        }
    }
}

#[test]
fn a_run_fails_where_a_policy_breaks_the_bound_on_service_that_it_claims() {
    // Two tenants with calls enough to wait all the time, the second with ten times as many.
    let trace = support::generated("selector_chat", 44, 6);
    let mut workload = Workload::closed(Arc::clone(&trace), 1, 0).unwrap();
    workload.gap_us.fill(1_000);
    workload.tenant = (0..44).map(|session| u16::from(session % 11 != 0)).collect();
    workload.arrivals = Arrivals::Open(vec![0; 44]);
    let largest = trace.calls.iter().map(|call| trace.blocks_in(call.prompt) + trace.blocks_in(call.output)).max();
    let options = EngineOptions { max_running: 2, ..EngineOptions::new(largest.unwrap()) };
    let run = |policy: Box<dyn Policy>| simulate(&workload, &options, vec![policy], &mut |_| {});
    for name in ["fairness", "vtc"] {
        let outcome = run(baselines::build(name).unwrap().remove(0)).unwrap();
        assert!(outcome.service_gap > 0.0 && outcome.service_gap <= outcome.service_bound, "{name}");
    }
    for broken in [None, Some(FairnessPolicy::default())] {
        let error = run(Box::new(Claims(broken))).expect_err("the bound does not hold");
        assert!(matches!(error, Error::BrokenPromise { .. }), "{error}");
    }
}
