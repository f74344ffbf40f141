//! Events that no engine should send: the runtime stays as large as it was, consistent, and of use afterwards.

use runtime_core::ids::{mix, WorkloadId};
use runtime_core::kv::Expected;
use runtime_core::runtime::{EventKind, Events, Options};
use runtime_core::{Error, Runtime};

fn runtime(pool_blocks: usize, sessions: usize) -> (Runtime, WorkloadId) {
    let runtime = Runtime::new(Options { sessions, ..Options::for_pool(pool_blocks) }).unwrap();
    let workload = runtime.workload("hostile").unwrap();
    (runtime, workload)
}

struct One<'a> {
    kind: EventKind,
    session: u64,
    call: u64,
    at: u64,
    blocks: &'a [u64],
}

fn send(runtime: &Runtime, workload: WorkloadId, one: &One<'_>) -> u64 {
    let events = Events {
        kinds: &[one.kind as u8],
        sessions: &[one.session],
        agents: &[one.session as u16],
        calls: &[one.call],
        times_us: &[one.at],
        offsets: &[0, one.blocks.len() as u32],
        blocks: one.blocks,
    };
    runtime.observe(workload, &events).unwrap().hit_blocks
}

/// One call from start to end.
fn call(runtime: &Runtime, workload: WorkloadId, session: u64, call: u64, at: u64, blocks: &[u64]) -> u64 {
    let one = |kind, blocks| One { kind, session, call, at, blocks };
    let hit = send(runtime, workload, &one(EventKind::CallStart, blocks));
    send(runtime, workload, &one(EventKind::Stored, &blocks[hit as usize..]));
    send(runtime, workload, &one(EventKind::CallEnd, &[]));
    hit
}

/// A well-behaved call is served: its blocks are indexed, hit when it comes again, and can be evicted.
fn assert_of_use(runtime: &Runtime, workload: WorkloadId, at: u64) {
    runtime.audit().unwrap();
    runtime.evict(usize::MAX, at, |_| {}).unwrap();
    assert_eq!(runtime.resident_blocks().unwrap(), 0, "everything can go once no call is in flight");
    let n = runtime.options().pool_blocks.min(5) as u64;
    let blocks: Vec<u64> = (1..=n).map(|i| u64::MAX - i).collect();
    assert_eq!(call(runtime, workload, 1, u64::MAX, at, &blocks), 0);
    assert_eq!(call(runtime, workload, 1, u64::MAX, at, &blocks), n);
    let mut victims = Vec::new();
    assert_eq!(runtime.evict(usize::MAX, at, |key| victims.push(key)).unwrap(), n as usize);
    assert_eq!(victims, blocks.into_iter().rev().collect::<Vec<_>>());
    runtime.audit().unwrap();
}

#[cfg(target_os = "linux")]
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
}

/// `events` events in which every session, agent, call and block is new; a third of the calls never end.
fn flood(events: u64) {
    let (runtime, workload) = runtime(10_000, 1024);
    let before = runtime.memory().unwrap();
    #[cfg(target_os = "linux")]
    let mut at_first = 0;
    let mut sent = 0;
    while sent < events {
        let id = sent;
        let blocks: Vec<u64> = (0..6).map(|i| 1 + id * 8 + i).collect();
        let one = |kind, blocks| One { kind, session: id, call: id, at: id, blocks };
        send(&runtime, workload, &one(EventKind::CallStart, &blocks));
        send(&runtime, workload, &one(EventKind::Stored, &blocks));
        if id % 9 != 0 {
            send(&runtime, workload, &one(EventKind::CallEnd, &[]));
        }
        sent += 3;
        if runtime.resident_blocks().unwrap() + 6 > 10_000 {
            runtime.evict(64, id, |_| {}).unwrap();
        }
        #[cfg(target_os = "linux")]
        if sent == events / 30 * 3 {
            at_first = resident_kib();
        }
    }
    assert_eq!(runtime.memory().unwrap(), before, "sizes do not depend on what happens");
    assert!(runtime.known_sessions() <= 1024);
    #[cfg(target_os = "linux")]
    {
        let grown = resident_kib().saturating_sub(at_first);
        assert!(grown < 4096, "{grown} KiB more than after a tenth of the events");
    }
    send(&runtime, workload, &One { kind: EventKind::Reset, session: 0, call: 0, at: sent, blocks: &[] });
    assert_of_use(&runtime, workload, sent);
}

#[test]
fn a_flood_of_new_ids_leaves_memory_bounded() {
    flood(300_000);
}

#[test]
#[ignore = "ten million events take a minute or two; `make safety` runs it"]
fn ten_million_events_with_new_ids_leave_memory_bounded() {
    flood(10_000_000);
}

#[test]
fn calls_that_never_end_do_not_stop_those_that_do() {
    let (runtime, workload) = runtime(2_000, 8);
    for id in 0..10_000 {
        let blocks = [id * 4 + 1, id * 4 + 2];
        let one = |kind| One { kind, session: id, call: id, at: id, blocks: &blocks };
        send(&runtime, workload, &one(EventKind::CallStart));
        send(&runtime, workload, &one(EventKind::Stored));
        if runtime.resident_blocks().unwrap() >= 1_990 {
            runtime.evict(20, id, |_| {}).unwrap();
        }
    }
    let repairs = runtime.repairs().unwrap();
    assert_eq!(repairs.untracked_calls, 10_000 - 4096, "the oldest were let go");
    // Blocks of 4,096 calls in flight fill the pool for good; a reset lets them all go.
    send(&runtime, workload, &One { kind: EventKind::Reset, session: 0, call: 0, at: 10_000, blocks: &[] });
    assert_of_use(&runtime, workload, 10_001);
}

#[test]
fn one_call_id_for_everybody_holds_one_call() {
    let (runtime, workload) = runtime(100, 8);
    for i in 0..1_000 {
        let blocks = [i * 4 + 1, i * 4 + 2, i * 4 + 3];
        send(&runtime, workload, &One { kind: EventKind::CallStart, session: i % 5, call: 7, at: i, blocks: &blocks });
        send(&runtime, workload, &One { kind: EventKind::Stored, session: i % 5, call: 7, at: i, blocks: &blocks });
        runtime.evict(3, i, |_| {}).unwrap();
    }
    send(&runtime, workload, &One { kind: EventKind::CallEnd, session: 4, call: 7, at: 1_000, blocks: &[] });
    assert_of_use(&runtime, workload, 1_001);
}

#[test]
fn an_end_that_comes_while_the_pool_is_busy_lets_the_blocks_go() {
    let (runtime, workload) = runtime(100, 8);
    call(&runtime, workload, 1, 1, 1, &[10, 11, 12]);
    let start = One { kind: EventKind::CallStart, session: 1, call: 2, at: 2, blocks: &[10, 11] };
    assert_eq!(send(&runtime, workload, &start), 2);
    let mut victims = Vec::new();
    let count = runtime.evict(10, 3, |key| {
        victims.push(key);
        // The pool is entered: an event without blocks is taken all the same, one with blocks is refused whole.
        send(&runtime, workload, &One { kind: EventKind::CallEnd, session: 1, call: 2, at: 3, blocks: &[] });
        let one = [EventKind::Removed as u8];
        let events = Events {
            kinds: &one,
            sessions: &[1],
            agents: &[0],
            calls: &[0],
            times_us: &[3],
            offsets: &[0, 1],
            blocks: &[10],
        };
        assert!(matches!(runtime.observe(workload, &events), Err(Error::Busy { .. })));
    });
    assert_eq!((count.unwrap(), victims), (1, vec![12]));
    assert_eq!(runtime.evict(10, 4, |_| {}).unwrap(), 2);
    assert_of_use(&runtime, workload, 5);
}

#[test]
fn ends_that_come_while_the_pool_is_busy_are_kept_for_it_only_if_it_has_heard_of_the_call() {
    let (runtime, workload) = runtime(100, 8);
    call(&runtime, workload, 1, 1, 1, &[10, 11, 12]);
    send(&runtime, workload, &One { kind: EventKind::CallStart, session: 1, call: 2, at: 2, blocks: &[10, 11] });
    let before = runtime.repairs().unwrap().unknown_calls;
    let end = |call| One { kind: EventKind::CallEnd, session: 2, call, at: 4, blocks: &[] };
    runtime
        .evict(1, 3, |_| {
            // Far more calls that start and end without the pool than are kept for it: what matters is not lost.
            for call in 100..1_100 {
                let start = One { kind: EventKind::CallStart, session: 2, call, at: 3, blocks: &[] };
                send(&runtime, workload, &start);
                send(&runtime, workload, &end(call));
            }
            send(&runtime, workload, &end(2));
        })
        .unwrap();
    assert_eq!(runtime.evict(10, 5, |_| {}).unwrap(), 2, "the call's blocks were let go");
    let unknown = runtime.repairs().unwrap().unknown_calls - before;
    assert!(unknown < 20, "{unknown} ends were kept for nothing");
    // A call that waits is known, too.
    send(&runtime, workload, &One { kind: EventKind::CallQueued, session: 1, call: 3, at: 6, blocks: &[10] });
    call(&runtime, workload, 1, 4, 6, &[20]);
    runtime.evict(1, 7, |_| _ = send(&runtime, workload, &end(3))).unwrap();
    let before = runtime.repairs().unwrap().unknown_calls;
    send(&runtime, workload, &end(3));
    assert_eq!(runtime.repairs().unwrap().unknown_calls, before + 1, "it was cancelled while the pool was busy");
    assert_of_use(&runtime, workload, 8);
}

#[test]
fn equal_keys_and_key_zero_are_one_block() {
    let (runtime, workload) = runtime(50, 8);
    call(&runtime, workload, 1, 1, 1, &[5; 40]);
    assert_eq!(runtime.resident_blocks().unwrap(), 1);
    call(&runtime, workload, 2, 2, 2, &[0; 40]);
    call(&runtime, workload, 3, 3, 3, &[1, 0, 1, 0]);
    assert_eq!(runtime.resident_blocks().unwrap(), 2);
    assert_of_use(&runtime, workload, 4);
}

#[test]
fn time_may_stand_still_run_backwards_or_be_at_its_end() {
    for times in [[7, 7, 7, 7], [u64::MAX, 3, u64::MAX, 0], [0, u64::MAX, u64::MAX, u64::MAX], [9, 8, 7, 6]] {
        let (runtime, workload) = runtime(60, 8);
        for i in 0..200 {
            let at = times[i as usize % 4];
            let blocks: Vec<u64> = (0..8).map(|b| 1 + (i % 20) * 100 + b).collect();
            call(&runtime, workload, i % 9, i, at, &blocks);
            runtime.evict(5, at, |_| {}).unwrap();
            let mut scores = [f32::NAN; 8];
            runtime.score_blocks(&blocks, &mut scores);
            assert!(scores.iter().all(|score| score.is_finite() && *score >= 0.0), "{scores:?}");
            runtime.score_agents(workload, i % 9, at, f32::NAN, &[0, 1], &mut scores[..2]).unwrap();
        }
        assert_of_use(&runtime, workload, times[3]);
    }
}

#[test]
fn a_pool_of_one_block_and_prompts_longer_than_the_pool_are_served() {
    let (runtime, workload) = runtime(1, 8);
    let long: Vec<u64> = (1..=100_000).collect();
    for i in 0..20 {
        call(&runtime, workload, i, i, i, &long);
        assert_eq!(runtime.resident_blocks().unwrap(), 1);
    }
    assert_of_use(&runtime, workload, 30);
}

#[test]
fn one_session_with_more_agents_than_there_are_lanes_is_served() {
    let (runtime, workload) = runtime(3_000, 8);
    for agent in 0..10_000u64 {
        let blocks = [agent * 2 + 1, agent * 2 + 2];
        let events = Events {
            kinds: &[EventKind::CallStart as u8, EventKind::Stored as u8, EventKind::CallEnd as u8],
            sessions: &[1; 3],
            agents: &[agent as u16; 3],
            calls: &[agent; 3],
            times_us: &[agent; 3],
            offsets: &[0, 2, 4, 4],
            blocks: &[blocks, blocks].concat(),
        };
        runtime.observe(workload, &events).unwrap();
        if runtime.resident_blocks().unwrap() > 2_990 {
            assert_eq!(runtime.evict(10, agent, |_| {}).unwrap(), 10);
        }
    }
    assert_eq!(runtime.repairs().unwrap().untracked_blocks, 0);
    assert_of_use(&runtime, workload, 10_001);
}

#[test]
fn a_malformed_batch_is_refused_as_a_whole_with_numbers() {
    let (runtime, workload) = runtime(10, 8);
    let good = Events {
        kinds: &[0, 0],
        sessions: &[1, 2],
        agents: &[0, 0],
        calls: &[1, 2],
        times_us: &[1, 2],
        offsets: &[],
        blocks: &[],
    };
    for bad in [
        Events { kinds: &[0, 9], ..good },
        Events { sessions: &[1], ..good },
        Events { agents: &[], ..good },
        Events { calls: &[1, 2, 3], ..good },
        Events { times_us: &[1], ..good },
        Events { offsets: &[0, 0], ..good },
        Events { offsets: &[0, 1, 0], blocks: &[9], ..good },
        Events { offsets: &[0, 0, 2], blocks: &[9], ..good },
    ] {
        assert!(matches!(runtime.observe(workload, &bad), Err(Error::OutOfRange { .. })), "{bad:?}");
    }
    assert!(matches!(runtime.observe(WorkloadId(1), &good), Err(Error::OutOfRange { requested: 1, .. })));
    assert!(!runtime.knows(workload, 1) && runtime.now_us() == 0, "nothing was applied");
    assert_eq!(runtime.observe(workload, &good).unwrap().events, 2);
}

/// Whoever brings blocks back brings others, too many, none, twice, or without having been asked.
#[test]
fn offers_that_are_answered_at_random_leave_the_pool_consistent() {
    let (runtime, workload) = runtime(120, 8);
    let (mut offered, mut waited) = (0, 0);
    for i in 0..40_000u64 {
        let random = mix(i);
        let (session, agent, id) = (random % 11, (random >> 8) as u16 % 3, (random >> 16) % 40);
        // Chains of one root share a prefix; some are longer than the pool, some empty, some repeat a key.
        let (root, length) = ((random >> 24) % 12, (random >> 32) % 40 * (1 + u64::from(i % 97 == 0) * 9));
        let mut chain: Vec<u64> = (0..length).map(|block| 1 + root * 1_000 + block).collect();
        if i % 53 == 0 && length > 2 {
            chain[2] = chain[0];
        }
        let at = i * 50_000;
        match (random >> 40) % 8 {
            0 => runtime.call_queued(workload, session, id, agent, at, &chain).unwrap(),
            1 => _ = runtime.call_started(workload, session, id, agent, at, &chain, &[]).unwrap(),
            2 => runtime.stored(workload, id, at, &chain, &[]).unwrap(),
            3 => runtime.call_ended(workload, session, id, 0, at, &[], &[]).unwrap(),
            4 => _ = runtime.evict((random >> 48) as usize % 30, at, |_| {}).unwrap(),
            5 => _ = call(&runtime, workload, session, 1_000 + id, at, &chain),
            6 => _ = runtime.worth_restoring(workload, session, agent, &chain).unwrap(),
            _ => runtime.restored(workload, session, agent, at, &chain).unwrap(),
        }
        let mut expected = [Expected::NOBODY; 4];
        let n = runtime.expected(at, 0.1, &mut expected).unwrap();
        for one in &expected[..n] {
            offered += u32::from(runtime.worth_restoring(workload, one.session, one.agent, &chain).unwrap());
            waited += u32::from(one.waits);
            assert!(one.room <= 120 && one.score >= 0.0 && (0.0..=1.0).contains(&one.probability), "{one:?}");
        }
        if i % 256 == 0 {
            runtime.audit().unwrap();
        }
    }
    assert!(offered > 0 && waited > 0);
    for id in 0..2_000 {
        runtime.call_ended(workload, 0, id, 0, 40_000 * 50_000, &[], &[]).unwrap();
    }
    assert_of_use(&runtime, workload, 40_000 * 50_000);
}
