//! Calls that wait: what they will ask for is kept, in the order in which they will start.

use runtime_core::ids::WorkloadId;
use runtime_core::kv::Expected;
use runtime_core::runtime::Options;
use runtime_core::Runtime;

const SECOND: u64 = 1_000_000;

/// A runtime under pressure, and the histories of `sessions` sessions with ten blocks each, all idle since the same time.
fn idle_sessions(sessions: u64) -> (Runtime, WorkloadId) {
    let runtime = Runtime::new(Options::for_pool(10 * sessions as usize)).unwrap();
    let workload = runtime.workload("w").unwrap();
    for session in 0..sessions {
        call(&runtime, workload, session, session, session * SECOND);
    }
    (runtime, workload)
}

fn history(session: u64) -> Vec<u64> {
    (0..10).map(|i| 1000 * (session + 1) + i).collect()
}

fn call(runtime: &Runtime, workload: WorkloadId, session: u64, id: u64, at: u64) {
    let blocks = history(session);
    let hit = runtime.call_started(workload, session, id, 0, at, &blocks, &[]).unwrap();
    runtime.stored(workload, id, at, &blocks[hit..], &[]).unwrap();
    runtime.call_ended(workload, session, id, 0, at + SECOND / 2, &[], &[]).unwrap();
}

fn victims(runtime: &Runtime, n: usize, at: u64) -> Vec<u64> {
    let mut sessions = Vec::new();
    runtime.evict(n, at, |key| sessions.push(key / 1000 - 1)).unwrap();
    sessions.dedup();
    sessions
}

#[test]
fn blocks_that_waiting_calls_need_go_last_and_those_of_the_first_in_line_very_last() {
    let (runtime, workload) = idle_sessions(6);
    let now = 7 * SECOND;
    for (id, session) in [(100, 4), (101, 1), (102, 3)] {
        runtime.call_queued(workload, session, id, 0, now, &history(session)).unwrap();
    }
    let order = victims(&runtime, 60, now + 1);
    let place = |session| order.iter().position(|&s| s == session).unwrap();
    for idle in [0, 2, 5] {
        assert!(place(idle) < place(3), "{order:?}");
    }
    assert!(place(3) < place(1) && place(1) < place(4), "{order:?}");
}

#[test]
fn a_cancelled_call_protects_nothing_any_more() {
    let (runtime, workload) = idle_sessions(4);
    let now = 30 * SECOND;
    runtime.call_queued(workload, 2, 100, 0, now, &history(2)).unwrap();
    runtime.call_queued(workload, 0, 101, 0, now, &history(0)).unwrap();
    runtime.call_ended(workload, 2, 100, 0, now + 1, &[], &[]).unwrap();
    assert_eq!(runtime.repairs().unwrap().unknown_calls, 0);
    assert_eq!(victims(&runtime, 40, now + 2).last(), Some(&0));
}

#[test]
fn only_the_prefix_that_is_asked_for_is_kept() {
    let (runtime, workload) = idle_sessions(3);
    let now = 10 * SECOND;
    runtime.call_queued(workload, 1, 100, 0, now, &history(1)[..4]).unwrap();
    let mut keys = Vec::new();
    runtime.evict(26, now + 1, |key| keys.push(key)).unwrap();
    let left: Vec<u64> = runtime.audit().unwrap().iter().map(|block| block.key).collect();
    assert_eq!(left.len(), 4);
    assert!(left.iter().all(|key| history(1)[..4].contains(key)), "{left:?}");
}

#[test]
fn the_gap_ends_when_the_call_arrives_and_its_transition_counts_once() {
    let (waited, started) = (idle_sessions(2), idle_sessions(2));
    for session in 0..2 {
        for round in 1..60 {
            let arrival = (round * 40 + session) * SECOND;
            let id = 1000 * round + session;
            // One learns of the call when it arrives; the other when it starts, which is half a minute later or at once.
            waited.0.call_queued(waited.1, session, id, 0, arrival, &history(session)).unwrap();
            call(&waited.0, waited.1, session, id, arrival + 30 * SECOND);
            call(&started.0, started.1, session, id, arrival + 30 * SECOND);
        }
    }
    let steps = |(runtime, workload): &(Runtime, WorkloadId)| [0, 1].map(|s| runtime.session_calls(*workload, s));
    assert_eq!((steps(&waited), steps(&started)), ([60, 60], [60, 60]));
    let soon = |(runtime, workload): &(Runtime, WorkloadId)| {
        let mut score = [0.0];
        runtime.score_agents(*workload, 0, 60 * 40 * SECOND, 15.0, &[0], &mut score).unwrap();
        score[0]
    };
    assert!(soon(&waited) > soon(&started) + 0.2, "{} {}", soon(&waited), soon(&started));
}

#[test]
fn a_queue_without_end_is_bounded_and_counted() {
    let (runtime, workload) = idle_sessions(2);
    let before = runtime.memory().unwrap();
    for id in 0..5_000 {
        runtime.call_queued(workload, id, 10_000 + id, 0, 10 * SECOND + id, &[]).unwrap();
    }
    assert_eq!(runtime.memory().unwrap(), before);
    assert_eq!(runtime.repairs().unwrap().untracked_calls, 5_000 - 1_024);
    runtime.audit().unwrap();
}

/// The sessions named, and for how many blocks there is room.
fn expected(runtime: &Runtime, at: u64) -> Vec<(u64, u32)> {
    let mut out = [Expected::NOBODY; 8];
    let n = runtime.expected(at, 0.6, &mut out).unwrap();
    assert!(out[..n].iter().all(|one| one.waits && one.probability == 1.0));
    out[..n].iter().map(|one| (one.session, one.room)).collect()
}

#[test]
fn blocks_come_back_for_the_two_calls_next_in_line_as_far_as_there_is_room_beside_what_is_worth_more() {
    let (runtime, workload) = idle_sessions(6);
    let now = 7 * SECOND;
    // Of sessions 0 to 2 nothing is left: the pool has room for 30 blocks.
    let mut gone = 0;
    for session in 0..3 {
        let keys: Vec<u64> = history(session).into_iter().rev().collect();
        runtime.evict_blocks(&keys, 10, now, |_| gone += 1).unwrap();
    }
    assert_eq!(gone, 30);
    for (id, session) in [(100, 0), (101, 1), (102, 2)] {
        runtime.call_queued(workload, session, id, 0, now, &history(session)).unwrap();
    }
    let named = expected(&runtime, now);
    assert_eq!(named.iter().map(|one| one.0).collect::<Vec<_>>(), [0, 1], "the third has time");
    assert!(named[0].1 >= 30 && named[1].1 == named[0].1 - 10, "the first will need its ten: {named:?}");

    assert!(runtime.worth_restoring(workload, 0, 0, &history(0)).unwrap());
    runtime.restored(workload, 0, 0, now, &history(0)).unwrap();
    runtime.call_started(workload, 5, 200, 0, now, &history(5), &[]).unwrap();
    // What came back for the first in line outlives whatever nobody waits for, and its call finds it.
    let order = victims(&runtime, 30, now + 1);
    assert_eq!(order.last(), Some(&0), "{order:?}");
}

#[test]
fn what_came_back_for_a_call_that_waits_is_there_when_it_starts() {
    let (runtime, workload) = idle_sessions(6);
    let now = 7 * SECOND;
    let keys: Vec<u64> = history(0).into_iter().rev().collect();
    runtime.evict_blocks(&keys, 10, now, |_| {}).unwrap();
    runtime.call_queued(workload, 0, 100, 0, now, &history(0)).unwrap();
    assert_eq!(expected(&runtime, now)[0].0, 0);
    runtime.restored(workload, 0, 0, now, &history(0)).unwrap();
    assert_eq!(victims(&runtime, 40, now + 1).iter().filter(|&&session| session == 0).count(), 0);
    assert_eq!(runtime.call_started(workload, 0, 100, 0, now + 2, &history(0), &[]).unwrap(), 10);
}
