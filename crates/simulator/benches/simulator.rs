//! Ten thousand calls under each policy, in overload: `cargo bench -p simulator`.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use replay::generate::{generate, GenerateOptions};
use simulator::{baselines, simulate, EngineOptions, Workload};

fn ten_thousand_calls(criterion: &mut Criterion) {
    let mut trace = generate("selector_chat", &GenerateOptions { sessions: 800, seed: 0, agents: None }).unwrap();
    let sessions = trace.sessions.iter().scan(0, |calls, session| {
        *calls += session.calls.len();
        Some(*calls)
    });
    let enough = 1 + sessions.take_while(|&calls| calls < 10_000).count();
    trace.sessions.truncate(enough);
    let kept: usize = trace.sessions.iter().map(|session| session.calls.len()).sum();
    let pool = (trace.mean_session_blocks() * 16.0) as usize;
    let workload = Workload::closed(Arc::new(trace), 64, 0).unwrap();
    let mut group = criterion.benchmark_group("simulate");
    group.sample_size(10).throughput(Throughput::Elements(kept as u64));
    let contenders = [
        ("fcfs", "lru"),
        ("fcfs", "agentrt"),
        ("lpm", "lru"),
        ("vtc", "lru"),
        ("keep", "lru"),
        ("batch_shaping", "lru"),
        ("fairness", "lru"),
        ("tool_gap", "lru"),
        ("speculation", "lru"),
        ("batch_shaping+fairness", "agentrt"),
        ("batch_shaping+fairness+tool_gap+speculation", "agentrt"),
    ];
    for (policies, cache) in contenders {
        group.bench_function(format!("policies={policies}/cache={cache}"), |bencher| {
            let options = EngineOptions { cache: cache.into(), ..EngineOptions::new(pool) };
            bencher.iter(|| {
                let list = baselines::build(policies).unwrap();
                black_box(simulate(&workload, &options, list, &mut |_| {}).unwrap())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, ten_thousand_calls);
criterion_main!(benches);
