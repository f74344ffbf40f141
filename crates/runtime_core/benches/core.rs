//! What the four calls cost. Groups name the operation; ids name its size, and threads where there are several.
//!
//! State is warmed up to what a server in its steady state has: full pool, learned transitions, sessions that go on
//! calling. `act` times the eviction alone, each one preceded by one call's events; `call` times a whole call's events
//! with the evictions it needs, per block. Threads start at a barrier; their overlap is printed. So is the least time of a
//! window of a millisecond or so, on one thread: what an event costs where nothing else runs on the core meanwhile.

#![expect(clippy::print_stderr, reason = "a benchmark reports")]

#[path = "../tests/support/steady.rs"]
mod steady;

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use runtime_core::ids::{mix, WorkloadId};
use runtime_core::merge::{Merged, Publication, Section, Shape};
use runtime_core::runtime::{EventKind, Events, Options};
use runtime_core::Runtime;
use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};
use steady::Steady;

const AGENTS: [u64; 4] = [6, 64, 1_000, 10_000];
const POOLS: [usize; 3] = [5_000, 50_000, 1_000_000];
/// Events of one batch.
const BATCH: usize = 256;

/// The name of a session: a hash, as those that Python makes of strings.
fn name(thread: u64, session: u64) -> u64 {
    mix(thread << 32 | session)
}

/// Batches of starts and ends by name alone: `sessions` sessions that call their agents mostly in turn.
struct Batches {
    kinds: Vec<u8>,
    sessions: Vec<u64>,
    agents: Vec<u16>,
    calls: Vec<u64>,
    times_us: Vec<u64>,
}

impl Batches {
    fn new(agents: u64, thread: u64, batches: usize) -> Self {
        let sessions = agents.clamp(16, 512);
        let n = batches * BATCH;
        let mut b = Self {
            kinds: Vec::with_capacity(n),
            sessions: Vec::with_capacity(n),
            agents: Vec::with_capacity(n),
            calls: Vec::with_capacity(n),
            times_us: Vec::with_capacity(n),
        };
        let mut at = vec![0u64; sessions as usize];
        for call in 0..n as u64 / 2 {
            let random = mix(thread << 40 | call);
            let session = random % sessions;
            let agent = &mut at[session as usize];
            *agent = if (random >> 32) % 8 == 0 { random >> 40 } else { *agent + 1 + session } % agents;
            for kind in [EventKind::CallStart, EventKind::CallEnd] {
                b.kinds.push(kind as u8);
                b.sessions.push(name(thread, session));
                b.agents.push(*agent as u16);
                b.calls.push(thread << 40 | call);
                b.times_us.push(1_000_000 + call * 2_000 + if kind == EventKind::CallEnd { 1_000 } else { 0 });
            }
        }
        b
    }

    fn observe(&self, runtime: &Runtime, workload: WorkloadId, batch: usize) {
        let from = batch * BATCH % self.kinds.len();
        let to = from + BATCH;
        let events = Events {
            kinds: &self.kinds[from..to],
            sessions: &self.sessions[from..to],
            agents: &self.agents[from..to],
            calls: &self.calls[from..to],
            times_us: &self.times_us[from..to],
            offsets: &[],
            blocks: &[],
        };
        black_box(runtime.observe(workload, black_box(&events))).expect("events without blocks are never refused");
    }
}

/// Batches of one window.
const WINDOW: usize = 64;

/// Wall time of `batches` batches in all, on `threads` threads from a barrier on; the share of it in which all ran; and
/// the least time of a thread's window.
fn on_threads(
    runtime: &Runtime,
    workload: WorkloadId,
    inputs: &[Batches],
    batches: usize,
) -> (Duration, f64, Duration) {
    let barrier = Barrier::new(inputs.len());
    let spans: Vec<(Instant, Instant, Duration)> = std::thread::scope(|scope| {
        let run = |input: &Batches| {
            barrier.wait();
            let from = Instant::now();
            let (mut last, mut least) = (from, Duration::MAX);
            for batch in 0..batches / inputs.len() {
                input.observe(runtime, workload, batch);
                if batch % WINDOW == WINDOW - 1 {
                    let now = Instant::now();
                    (least, last) = (least.min(now - last), now);
                }
            }
            (from, Instant::now(), least)
        };
        let threads: Vec<_> = inputs.iter().map(|input| scope.spawn(move || run(input))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
    });
    let (first, last) = (spans.iter().map(|s| s.0).min(), spans.iter().map(|s| s.1).max());
    let (late, early) = (spans.iter().map(|s| s.0).max(), spans.iter().map(|s| s.1).min());
    let (Some(first), Some(last), Some(late), Some(early)) = (first, last, late, early) else { unreachable!() };
    let whole = last - first;
    let least = spans.iter().map(|s| s.2).min().unwrap_or_default();
    (whole, early.saturating_duration_since(late).as_secs_f64() / whole.as_secs_f64(), least)
}

fn observe(c: &mut Criterion) {
    let mut group = c.benchmark_group("observe");
    group.throughput(Throughput::Elements(BATCH as u64)).measurement_time(Duration::from_secs(3)).sample_size(20);
    for agents in AGENTS {
        for threads in [1, 2, 4] {
            let runtime = Runtime::new(Options::for_pool(50_000)).expect("sizes are in range");
            let workload = runtime.workload("bench").expect("the first has room");
            let inputs: Vec<_> = (0..threads).map(|thread| Batches::new(agents, thread, 256)).collect();
            let (mut overlap, mut least) = (1.0f64, Duration::MAX);
            group.bench_function(BenchmarkId::new(format!("agents={agents}"), format!("threads={threads}")), |b| {
                b.iter_custom(|iterations| {
                    // At least 100 ms of them, whatever was asked for.
                    let n = (iterations as usize).max(8192).next_multiple_of(threads as usize);
                    let (time, share, window) = on_threads(&runtime, workload, &inputs, n);
                    (overlap, least) = (overlap.min(share), least.min(window));
                    time.mul_f64(iterations as f64 / n as f64)
                });
            });
            if threads > 1 {
                eprintln!("    all {threads} threads ran in {:.0} % of the time or more", overlap * 100.0);
            } else if least < Duration::MAX {
                let events = (WINDOW * BATCH) as f64;
                eprintln!("    least of all windows: {:.1} ns an event", least.as_nanos() as f64 / events);
            }
        }
    }
    group.finish();
}

fn warm(pool: usize, agents: u64) -> Steady {
    let sessions = (pool / 400).clamp(16, 1000);
    let mut steady = Steady::new(pool, sessions, agents);
    let mut blocks = 0;
    while blocks < 4 * pool || blocks < 200_000 {
        blocks += steady.call();
    }
    steady
}

/// Two events by name alone, and a prediction, beside a full pool.
fn mixed(c: &mut Criterion) {
    let mut group = c.benchmark_group("mixed");
    group.throughput(Throughput::Elements(3));
    let mut steady = None;
    group.bench_function(BenchmarkId::new("start+end+predict", "pool=5000"), |b| {
        let steady = steady.get_or_insert_with(|| warm(5_000, 6));
        b.iter(|| {
            steady.identity();
            black_box(steady.predict(4))
        });
    });
    group.finish();
}

fn predict(c: &mut Criterion) {
    let mut group = c.benchmark_group("predict");
    group.throughput(Throughput::Elements(1));
    for agents in AGENTS {
        let runtime = Runtime::new(Options::for_pool(5_000)).expect("sizes are in range");
        let workload = runtime.workload("bench").expect("the first has room");
        let input = Batches::new(agents, 0, 256);
        (0..256).for_each(|batch| input.observe(&runtime, workload, batch));
        let none = runtime_core::kv::Prediction { agent: 0, step: 0, probability: 0.0, median_s: 0.0 };
        let mut out = [none; 32];
        let sessions = agents.clamp(16, 512);
        let mut session = 0;
        let mut foreseen = |session| runtime.predict(workload, name(0, session), 4, &mut out).unwrap_or(0) > 0;
        let known = (0..sessions).filter(|&session| foreseen(session)).count();
        assert!(known > 0, "the sessions have other names");
        group.bench_function(BenchmarkId::new(format!("agents={agents}"), "steps=4"), |b| {
            b.iter(|| {
                session = (session + 1) % sessions;
                black_box(runtime.predict(workload, black_box(name(0, session)), 4, &mut out))
            });
        });
    }
    group.finish();
}

fn score(c: &mut Criterion) {
    let mut group = c.benchmark_group("score");
    for pool in POOLS {
        // Only where the filter lets something run.
        let mut steady = None;
        for n in [64, 4096] {
            group.throughput(Throughput::Elements(n as u64));
            let id = BenchmarkId::new(format!("blocks={n}"), format!("pool={pool}"));
            group.bench_function(id, |b| {
                let steady = steady.get_or_insert_with(|| warm(pool, 6));
                b.iter(|| black_box(steady.score(black_box(n))));
            });
        }
    }
    group.finish();
}

fn act(c: &mut Criterion) {
    for pool in POOLS {
        // Only where the filter lets something run.
        let mut steady = None;
        let mut group = c.benchmark_group("act");
        group.sample_size(20).measurement_time(Duration::from_secs(3));
        for n in [1, 64, 512] {
            group.throughput(Throughput::Elements(n as u64));
            group.bench_function(BenchmarkId::new(format!("victims={n}"), format!("pool={pool}")), |b| {
                let steady = steady.get_or_insert_with(|| warm(pool, 6));
                b.iter_custom(|iterations| {
                    let mut time = Duration::ZERO;
                    for _ in 0..iterations {
                        // A call has started; what it lacks beyond `n` goes untimed, and the pool fills up again.
                        let call = steady.begin();
                        let from = Instant::now();
                        let done = black_box(steady.evict(black_box(n)));
                        time += from.elapsed();
                        assert_eq!(done, n);
                        let lacking = steady.lacking(call.3 - call.4 + 4);
                        steady.evict(lacking);
                        steady.finish(call);
                        while steady.lacking(2 * n) == 0 {
                            steady.call();
                        }
                    }
                    time
                });
            });
        }
        group.finish();
        let mut group = c.benchmark_group("call");
        group.sample_size(20).measurement_time(Duration::from_secs(3)).throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("per_block", format!("pool={pool}")), |b| {
            let steady = steady.get_or_insert_with(|| warm(pool, 6));
            b.iter_custom(|iterations| {
                let (mut blocks, from) = (0, Instant::now());
                for _ in 0..iterations.max(100) {
                    blocks += steady.call();
                }
                from.elapsed().mul_f64(iterations as f64 / blocks as f64)
            });
        });
        group.finish();
    }
}

fn merge(c: &mut Criterion) {
    let mut group = c.benchmark_group("merge");
    for pairs in [64u64, 640] {
        let shapes = vec![Shape::Dense(1024), Shape::Keyed(1024)];
        let publications: Vec<Vec<u8>> = (0..8)
            .map(|replica| {
                let dense = (0..1024).map(|i| i * replica as u32).collect();
                let mut keyed: Vec<(u64, u32)> = (0..pairs).map(|i| (mix(i) >> 24, replica as u32 + 1)).collect();
                keyed.sort_unstable();
                let sections = vec![Section::Dense(dense), Section::Keyed(keyed)];
                Publication { replica, version: 1, sections }.encode()
            })
            .collect();
        group.throughput(Throughput::Elements(8));
        group.bench_function(BenchmarkId::new("replicas=8", format!("pairs={pairs}")), |b| {
            b.iter(|| {
                let mut merged = Merged::new(shapes.clone(), 8);
                for bytes in &publications {
                    merged.merge(black_box(bytes)).expect("publications are well formed");
                }
                black_box(merged.sums(None))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, observe, mixed, predict, score, act, merge);
criterion_main!(benches);
