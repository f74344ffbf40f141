//! Block accesses per second of a replay, by policy: one closed-loop run over a generated workload.

use std::hint::black_box;

use criterion::{criterion_group, criterion_main, BatchSize, Criterion, Throughput};
use replay::generate::{generate, GenerateOptions};
use replay::latency::LatencyModel;
use replay::policies;
use replay::schedule::{Order, Schedule, ScheduleOptions};
use replay::sim;

const SESSIONS: usize = 16;

fn replay(criterion: &mut Criterion) {
    let options = GenerateOptions { sessions: 60, seed: 7, agents: None };
    let trace = generate("selector_chat", &options).expect("a built-in workload");
    let capacity_blocks = (0.1 * SESSIONS as f64 * trace.mean_session_blocks()) as usize;
    let model = LatencyModel::LLAMA_3_1_8B_H100;
    let options = ScheduleOptions { order: Order::Closed, sessions: SESSIONS, seed: 7, capacity_blocks, model };
    let schedule = Schedule::new(&trace, options).expect("valid options");
    let accesses: usize = trace.calls.iter().map(|c| trace.blocks_in(c.prompt)).sum();

    let mut group = criterion.benchmark_group("replay");
    group.throughput(Throughput::Elements(accesses as u64)).sample_size(10);
    for name in policies::names() {
        let build = || policies::build(name, &trace, &schedule).expect("a known policy");
        group.bench_function(format!("policy={name}"), |bencher| {
            bencher.iter_batched(
                build,
                |mut policy| black_box(sim::run(&trace, black_box(&schedule), policy.as_mut(), &mut |_| {})),
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, replay);
criterion_main!(benches);
