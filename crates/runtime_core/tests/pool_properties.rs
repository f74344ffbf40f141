//! The pool against a model made of maps, over random events on pools and tables small enough to run full.

#[path = "support/pool.rs"]
mod pool;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_pool_agrees_with_a_model_of_maps_whatever_happens(
        bytes in proptest::collection::vec(any::<u8>(), 0..800)
    ) {
        pool::run(&bytes);
    }
}

/// Scores never rise from a block to what hangs below it, once an eviction has brought them up to date.
#[test]
fn a_block_is_worth_at_least_what_hangs_below_it() {
    use runtime_core::runtime::Options;
    use runtime_core::Runtime;
    use std::collections::HashMap;

    let runtime = Runtime::new(Options::for_pool(400)).unwrap();
    let workload = runtime.workload("one session").unwrap();
    let (mut history, mut checked) = (Vec::new(), 0);
    for call in 0..200u64 {
        // Three agents answer in turn on one history; now and then it is cut and goes on elsewhere.
        if call % 17 == 16 {
            history.truncate(history.len() / 2);
        }
        history.extend((0..3 + call % 5).map(|i| 1 + call * 100 + i));
        let at = call * 700_000;
        let hit = runtime.call_started(workload, 1, call, (call % 3) as u16, at, &history, &[]).unwrap();
        let lacking = (runtime.resident_blocks().unwrap() + history.len() - hit).saturating_sub(400);
        runtime.evict(lacking, at, |_| {}).unwrap();
        runtime.stored(workload, call, at + 100_000, &history[hit..], &[]).unwrap();
        runtime.call_ended(workload, 1, call, 0, at + 500_000, &[], &[]).unwrap();
        runtime.evict(1, at + 600_000, |_| {}).unwrap();
        let blocks = runtime.audit().unwrap();
        let score: HashMap<u64, f32> = blocks.iter().map(|block| (block.key, block.score)).collect();
        for block in blocks.iter().filter(|block| block.parent != 0) {
            let above = score[&block.parent];
            assert!(above >= block.score, "{} is worth {}, its parent {above}", block.key, block.score);
            checked += usize::from(block.score > 0.0);
        }
    }
    assert!(checked > 1_000, "scores of {checked} blocks were compared");
}

/// Calls in flight hold what would be oldest: it is passed over, and goes first once they give it up unused.
#[test]
fn the_oldest_leaves_go_in_order_of_last_use_whatever_calls_in_flight_hold() {
    use runtime_core::runtime::Options;
    use runtime_core::Runtime;

    let runtime = Runtime::new(Options::for_pool(1_000)).unwrap();
    let workload = runtime.workload("many sessions").unwrap();
    let block = |call: u64, i: u64| 1 + call * 10 + i;
    let start = |call: u64| {
        let prompt: Vec<u64> = (0..3).map(|i| block(call, i)).collect();
        assert_eq!(runtime.call_started(workload, call, call, 0, call, &prompt, &[]).unwrap(), 0);
        runtime.stored(workload, call, call, &prompt, &[]).unwrap();
    };
    let end = |call: u64, at: u64| runtime.call_ended(workload, call, call, 0, at, &[], &[]).unwrap();
    let evict = |n: usize| {
        let mut victims = Vec::new();
        runtime.evict_oldest(n, 2_000, |key| victims.push(key)).unwrap();
        runtime.audit().unwrap();
        victims
    };
    (0..200).for_each(start);
    // Every second one ends, the last one first.
    (0..200).rev().filter(|call| call % 2 == 1).for_each(|call| end(call, 1_000 + 200 - call));
    for call in [199, 197] {
        assert_eq!(evict(2), [block(call, 2), block(call, 1)]);
        assert_eq!(evict(1), [block(call, 0)]);
    }
    // One that is still in flight ends, and is the most recent; one more is let go with its session.
    end(100, 1_900);
    let over = runtime_core::runtime::Events {
        kinds: &[runtime_core::runtime::EventKind::SessionEnd as u8],
        sessions: &[40],
        agents: &[0],
        calls: &[0],
        times_us: &[1_950],
        offsets: &[],
        blocks: &[],
    };
    runtime.observe(workload, &over).unwrap();
    assert_eq!(evict(3), [block(40, 2), block(40, 1), block(40, 0)]);
    let rest = evict(1_000);
    assert_eq!(rest[..3], [block(195, 2), block(195, 1), block(195, 0)]);
    assert_eq!(rest[rest.len() - 3..], [block(100, 2), block(100, 1), block(100, 0)]);
    assert_eq!(rest.len(), (98 + 1) * 3, "the other calls in flight keep theirs");
}

/// Scores that are left to the end of a step are there after it, and before an eviction within it.
#[test]
fn scores_by_step_are_there_when_they_are_asked_for() {
    use runtime_core::runtime::{EventKind, Events, Options, Scoring};
    use runtime_core::Runtime;

    let runtime = Runtime::new(Options::for_pool(400)).unwrap();
    let workload = runtime.workload("steps").unwrap();
    let block = |session: u64, i: u64| session * 10 + i;
    let call = |session: u64, now_us: u64| {
        let prompt: Vec<u64> = (0..4).map(|i| block(session, i)).collect();
        let blocks = [prompt.clone(), prompt].concat();
        let events = Events {
            kinds: &[EventKind::CallStart as u8, EventKind::Stored as u8, EventKind::CallEnd as u8],
            sessions: &[session; 3],
            agents: &[0; 3],
            calls: &[session; 3],
            times_us: &[now_us, now_us, now_us + 1_000],
            offsets: &[0, 4, 8, 8],
            blocks: &blocks,
        };
        runtime.observe_scoring(workload, &events, Scoring::ByStep, |_, _| {}).unwrap();
    };
    let score = |session: u64| {
        let mut scores = [0.0];
        runtime.score_blocks(&[block(session, 0)], &mut scores);
        scores[0]
    };
    // Nothing is scored before a pool has filled by half.
    call(1, 10_000);
    runtime.settle_step(12_000).unwrap();
    assert!(score(1) == 0.0);
    (2..=90).for_each(|session| call(session, 20_000 + session * 1_000));
    assert!((1..=90).all(|session| score(session) == 0.0));
    // A step scores the latest 64: a leaf without a score goes last, so few would be too few. Then the others have
    // their turn.
    runtime.settle_step(112_000).unwrap();
    assert!((27..=90).all(|session| score(session) > 0.0) && score(1) == 0.0);
    runtime.settle_step(140_000).unwrap();
    assert!((1..=90).all(|session| score(session) > 0.0));
    // An eviction does not wait for the end of the step.
    call(91, 150_000);
    assert!(score(91) == 0.0);
    assert_eq!(runtime.evict(1, 152_000, |_| {}).unwrap(), 1);
    assert!(score(91) > 0.0);
    runtime.audit().unwrap();
}
