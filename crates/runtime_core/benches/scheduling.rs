//! What the scheduling policies cost: a question about waiting calls, and the events of one call.
//!
//! 64 calls wait, of 48 sessions and 4 tenants, a third of them with a shared resident prefix; 1,000 sessions are known
//! and the window of `batch_shaping` is closed to half of them, so that every branch is taken.

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use runtime_core::ids::mix;
use runtime_core::policy::{built_in, Event, Policies};
use runtime_core::runtime::{EventKind, Options};
use runtime_core::scheduling::{Decision, Gap, GapDecision, Happening, Load, Prefill, Waiting};
use runtime_core::Runtime;
use std::hint::black_box;

const SETS: [&[&str]; 7] = [
    &["kv_cache"],
    &["batch_shaping", "kv_cache"],
    &["fairness", "kv_cache"],
    &["fairness", "batch_shaping", "kv_cache"],
    &["tool_gap", "kv_cache"],
    &["speculation", "kv_cache"],
    &["fairness", "batch_shaping", "tool_gap", "speculation", "kv_cache"],
];
const BLOCKS: usize = 64;

/// Calls come ever faster, so that every smaller window seems to pay and stays.
fn time_us(name: u64) -> u64 {
    ((name as f64 + 1.0).ln() * 1e8) as u64
}

fn call(runtime: &Runtime, name: u64, session: u64) -> Waiting {
    let random = mix(name);
    Waiting {
        call: name,
        workload: runtime.workload("bench").expect("a workload"),
        session,
        agent: (random % 6) as u16,
        tenant: (session % 4) as u16,
        arrived_us: time_us(name) - 1,
        prompt_tokens: 4_000,
        resident_tokens: if random % 3 == 0 { 3_000 } else { 1_000 },
        host_tokens: 0,
        group: if random % 3 == 0 { 1 + random % 5 } else { 0 },
    }
}

fn load(now_us: u64) -> Load {
    Load {
        now_us,
        running_calls: 40,
        pool_blocks: 50_000,
        block_tokens: 16,
        pinned_blocks: 20_000,
        free_blocks: 0,
        prompt_blocks: 1_000_000,
        hit_blocks: 300_000,
        budget_tokens: 8_192,
        host_bytes_per_s: 0,
    }
}

/// Policies that have seen 1,000 sessions thrash, and the calls that wait now.
fn overloaded(runtime: &Runtime, policies: &Policies, n: u64) -> Vec<Waiting> {
    let mut decisions = vec![Decision::default(); 64];
    let mut name = 0;
    let mut closed = false;
    for round in 0..4 {
        for session in 0..1_000u64 {
            name += 1;
            // What sessions lose is there again once the window is closed: it proves itself.
            let resident_tokens = if closed { 4_000 } else { 0 };
            let one = Waiting { resident_tokens, agent: 0, ..call(runtime, name, session) };
            policies.hear(runtime, time_us(name), &[Happening::Arrived(one)]);
            // Not admitted at once: the engine is saturated.
            (0..3).for_each(|_| policies.schedule(runtime, &load(time_us(name)), &[one], &mut decisions));
            closed |= decisions[0].is_held(time_us(name));
            let done = [Happening::Admitted { call: one, again: false }, Happening::Ended { call: name }];
            policies.hear(runtime, time_us(name), &done[..if round == 3 && session < 40 { 1 } else { 2 }]);
        }
    }
    let waiting: Vec<Waiting> = (0..n).map(|i| call(runtime, name + 1 + i, mix(i) % 48 * 20)).collect();
    for &one in &waiting {
        policies.hear(runtime, time_us(name), &[Happening::Arrived(one)]);
    }
    waiting
}

fn question(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("schedule");
    for names in SETS {
        for n in [8u64, 64, 512] {
            let runtime = Runtime::new(Options::for_pool(50_000)).expect("a runtime");
            let policies = Policies::new(names.iter().map(|name| built_in(name).expect("a policy")).collect());
            let waiting = overloaded(&runtime, &policies, n);
            let mut decisions = vec![Decision::default(); waiting.len()];
            let load = load(time_us(5_000));
            policies.schedule(&runtime, &load, &waiting, &mut decisions);
            let held = decisions.iter().filter(|decision| decision.is_held(load.now_us)).count();
            // Fairness lets go whoever's turn it is, so of a few calls none may stay held.
            assert!(held > 0 || n < 64 || !names.contains(&"batch_shaping"), "{held} of {n} are held");
            group.throughput(Throughput::Elements(n));
            group.bench_function(BenchmarkId::new(names.join("+"), n), |bench| {
                bench.iter(|| policies.schedule(&runtime, black_box(&load), black_box(&waiting), &mut decisions));
            });
        }
    }
    group.finish();
}

fn events(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hear");
    for names in SETS {
        let runtime = Runtime::new(Options::for_pool(50_000)).expect("a runtime");
        let policies = Policies::new(names.iter().map(|name| built_in(name).expect("a policy")).collect());
        let workload = runtime.workload("bench").expect("a workload");
        let mut name = 1_000_000u64;
        // One call: four happenings and the core's two events, with 64 blocks.
        group.bench_function(BenchmarkId::new(names.join("+"), "call"), |bench| {
            bench.iter(|| {
                name += 1;
                let one = call(&runtime, name, name % 100);
                let blocks: [u64; BLOCKS] = std::array::from_fn(|i| mix(name % 500 * BLOCKS as u64 + i as u64));
                let (session, agent, hit) = (one.session, one.agent, 32);
                let tell = |kind, blocks: &[u64]| {
                    let event = Event { workload, kind, session, agent, call: name, time_us: name, blocks, hit };
                    policies.observe(&runtime, &event);
                };
                let served = Happening::Served {
                    call: name,
                    prefill_tokens: 500,
                    repeated_tokens: 0,
                    decoded_tokens: 100,
                    kv_token_us: 1_000_000,
                };
                policies.hear(&runtime, name, &[Happening::Arrived(one)]);
                tell(EventKind::CallStart, &blocks);
                policies.hear(&runtime, name, &[Happening::Admitted { call: one, again: false }, served]);
                tell(EventKind::CallEnd, &[]);
                policies.hear(&runtime, name, &[Happening::Ended { call: name }]);
            });
        });
    }
    group.finish();
}

/// Sessions whose tool runs, of 16 tools and 6 agents, and a pool that holds half of them.
fn gaps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gaps");
    for n in [8u64, 64] {
        let runtime = Runtime::new(Options::for_pool(50_000)).expect("a runtime");
        let policies = Policies::new(vec![built_in("tool_gap").expect("a policy")]);
        let workload = runtime.workload("bench").expect("a workload");
        let gap = |session: u64, started_us| Gap {
            workload,
            session,
            agent: (session % 6) as u16,
            tool: 1 + (mix(session) % 16) as u16,
            started_us,
            resident_tokens: 1_600_000 / n as u32,
            host_tokens: 0,
        };
        let mut decisions = vec![GapDecision::default(); n as usize];
        // Each has seen some tools return.
        for round in 0..64 {
            let open: Vec<Gap> = (0..n).map(|session| gap(session, time_us(round))).collect();
            policies.gaps(&runtime, &load(time_us(round)), &open, &mut decisions);
            for session in 0..n {
                let back = Happening::Arrived(call(&runtime, round * n + session, session));
                policies.hear(&runtime, time_us(round) + mix(session ^ round) % 3_000_000, &[back]);
            }
        }
        let open: Vec<Gap> = (0..n).map(|session| gap(session, time_us(64))).collect();
        group.throughput(Throughput::Elements(n));
        group.bench_function(BenchmarkId::new("tool_gap", n), |bench| {
            bench.iter(|| policies.gaps(&runtime, &load(time_us(64) + 1), black_box(&open), &mut decisions));
        });
    }
    group.finish();
}

/// 64 sessions are expected and the pool has lost what they will begin with.
fn idle(criterion: &mut Criterion) {
    let runtime = Runtime::new(Options::for_pool(50_000)).expect("a runtime");
    let policies = Policies::new(vec![built_in("speculation").expect("a policy")]);
    let workload = runtime.workload("bench").expect("a workload");
    let mut name = 0;
    for turn in 0..12u64 {
        for session in 0..64u64 {
            name += 1;
            let at = turn * 2_000_000 + session;
            let blocks: Vec<u64> = (0..BLOCKS as u64).map(|i| mix(session << 32 | i) | 1).collect();
            let hit = runtime.call_started(workload, session, name, 0, at, &blocks, &[]).expect("one thread");
            let tell = |kind, blocks: &[u64]| {
                let event = Event { workload, kind, session, agent: 0, call: name, time_us: at, blocks, hit };
                policies.observe(&runtime, &event);
            };
            tell(EventKind::CallStart, &blocks);
            runtime.stored(workload, name, at, &blocks[hit..], &[]).expect("one thread");
            runtime.call_ended(workload, session, name, 0, at + 10, &[], &[]).expect("one thread");
            tell(EventKind::CallEnd, &[]);
        }
    }
    runtime.evict(64 * BLOCKS, 24_000_000, |_| {}).expect("one thread");
    let load = Load { free_blocks: 20_000, pinned_blocks: 0, running_calls: 0, ..load(24_500_000) };
    let mut prefills = [Prefill::default(); 8];
    let named = policies.idle(&runtime, &load, &mut prefills);
    assert!(named > 0, "something is wanted");
    let mut group = criterion.benchmark_group("idle");
    group.throughput(Throughput::Elements(64));
    group.bench_function(BenchmarkId::new("speculation", 64), |bench| {
        bench.iter(|| policies.idle(&runtime, black_box(&load), &mut prefills));
    });
    group.finish();
}

criterion_group!(benches, question, events, gaps, idle);
criterion_main!(benches);
