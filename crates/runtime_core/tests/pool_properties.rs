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
