//! Many threads on one runtime: identities are counted exactly while others score, predict and evict.
//!
//! Threads wait for each other with atomics alone, so that ThreadSanitizer (`make safety`) sees everything.

#![expect(clippy::print_stderr, reason = "a test that proved less than it could says so")]

use runtime_core::ids::WorkloadId;
use runtime_core::kv::Prediction;
use runtime_core::runtime::{EventKind, Events, Options};
use runtime_core::{Error, Runtime};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};

const THREADS: usize = 4;
/// Calls per thread and round: few enough that no count is halved.
const CALLS: u64 = 1_000;
/// At least so many rounds, and at most so many more until two threads have met in the pool.
const ROUNDS: usize = 8;
const MOST_ROUNDS: usize = 60;
const AGENTS: u64 = 4;

/// Counts its thread as done, also when that panics: others wait for it.
struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, SeqCst);
    }
}

fn identity(runtime: &Runtime, workload: WorkloadId, kind: EventKind, session: u64, agent: u16, call: u64, at: u64) {
    let events = Events {
        kinds: &[kind as u8],
        sessions: &[session],
        agents: &[agent],
        calls: &[call],
        times_us: &[at],
        offsets: &[],
        blocks: &[],
    };
    // Events without blocks are never refused.
    assert_eq!(runtime.observe(workload, &events).unwrap().events, 1);
}

/// A call with a prompt and an answer; `Busy` is the only way it can fail, and then nothing has happened.
fn whole_call(runtime: &Runtime, workload: WorkloadId, session: u64, call: u64, at: u64) -> Result<(), Error> {
    let prompt: Vec<u64> = (0..20).map(|i| 1 + session * 1000 + i).collect();
    let output = [1 + session * 1000 + 20];
    let kinds = [EventKind::CallStart as u8, EventKind::Stored as u8, EventKind::CallEnd as u8];
    let blocks: Vec<u64> = prompt.iter().chain(&prompt).chain(&output).copied().collect();
    let events = Events {
        kinds: &kinds,
        sessions: &[session; 3],
        agents: &[0; 3],
        calls: &[call; 3],
        times_us: &[at; 3],
        offsets: &[0, 20, 40, 41],
        blocks: &blocks,
    };
    // What is resident already is skipped: `Stored` names the whole prompt, as an engine's first report does.
    runtime.observe(workload, &events).map(|_| ())
}

/// Sessions of each thread's own, and one that all share.
fn session_of(thread: u64, i: u64) -> u64 {
    if i % 5 == 0 {
        7
    } else {
        100 * (thread + 1) + i % 20
    }
}

#[test]
fn four_threads_lose_no_transition_while_others_score_predict_and_evict() {
    let runtime = Runtime::new(Options::for_pool(500)).unwrap();
    let busy = AtomicU64::new(0);
    let blocks = runtime.workload("blocks").unwrap();
    for round in 0..MOST_ROUNDS {
        if round >= ROUNDS && busy.load(SeqCst) > 0 {
            break;
        }
        let workload = runtime.workload(&format!("round {round}")).unwrap();
        let (arrived, done, stop) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
        let overlaps = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for thread in 0..THREADS as u64 {
                let (runtime, arrived, done) = (&runtime, &arrived, &done);
                threads.push(scope.spawn(move || {
                    let _done = Done(done);
                    arrived.fetch_add(1, SeqCst);
                    while arrived.load(SeqCst) < THREADS + 2 {
                        std::thread::yield_now();
                    }
                    for i in 0..CALLS {
                        let session = session_of(thread, i);
                        let agent = (i / 20 + i) % AGENTS;
                        let call = thread << 32 | i;
                        identity(runtime, workload, EventKind::CallStart, session, agent as u16, call, i);
                        identity(runtime, workload, EventKind::CallEnd, session, 0, call, i);
                        if i % 256 == 0 {
                            std::thread::yield_now();
                        }
                    }
                }));
            }
            {
                let (runtime, arrived, stop, overlaps) = (&runtime, &arrived, &stop, &overlaps);
                threads.push(scope.spawn(move || {
                    let _asked = Done(overlaps);
                    arrived.fetch_add(1, SeqCst);
                    let none = Prediction { agent: 0, step: 0, probability: 0.0, median_s: 0.0 };
                    let (mut out, mut scores) = ([none; 16], [0.0; 64]);
                    let keys: Vec<u64> = (0..64).map(|i| 1 + 5_000_000 + i).collect();
                    while !stop.load(SeqCst) {
                        let n = runtime.predict(workload, 7, 4, &mut out).unwrap();
                        assert!(out[..n].iter().all(|p| (0.0..=1.0).contains(&p.probability)));
                        runtime.score_blocks(&keys, &mut scores);
                        assert!(scores.iter().all(|score| score.is_finite() && *score >= 0.0));
                        runtime.score_agents(workload, 7, 10, 1.0, &[0, 1, 2], &mut scores[..3]).unwrap();
                        assert!(scores[..3].iter().all(|score| (0.0..=1.0).contains(score)));
                        overlaps.fetch_add(1, SeqCst);
                    }
                }));
            }
            arrived.fetch_add(1, SeqCst);
            let mut turn = 0;
            while done.load(SeqCst) < THREADS || overlaps.load(SeqCst) == 0 {
                turn += 1;
                match whole_call(&runtime, blocks, 5000 + turn % 100, turn << 48, turn) {
                    Ok(()) => {}
                    Err(Error::Busy { .. }) => {
                        busy.fetch_add(1, SeqCst);
                    }
                    Err(other) => panic!("{other}"),
                }
                match runtime.evict(21, turn, |_| {}) {
                    Ok(n) => assert!(n <= 21),
                    Err(error) => assert!(matches!(error, Error::Busy { .. }), "{error}"),
                }
                std::thread::yield_now();
            }
            stop.store(true, SeqCst);
            for thread in threads {
                thread.join().unwrap();
            }
        });
        runtime.audit().unwrap();
        let each = (0..THREADS as u64).flat_map(|thread| (0..CALLS).map(move |i| session_of(thread, i)));
        let sessions: std::collections::HashSet<u64> = each.collect();
        // Counts of transitions fade; that none of them is lost is tested in `threads.rs`. Steps of sessions do not fade.
        let counted: u64 = sessions.iter().map(|&session| runtime.session_calls(workload, session) as u64).sum();
        assert_eq!(counted, THREADS as u64 * CALLS, "every call is one step of its session");
    }
    if busy.load(SeqCst) == 0 {
        // Where the machine runs one thread at a time.
        eprintln!("note: nobody ever met in the pool in {MOST_ROUNDS} rounds: the threads did not overlap");
    }
}
