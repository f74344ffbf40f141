//! The four calls allocate nothing after construction: a counting allocator around every one of them.
//!
//! One test, because the count is the process's and tests of a file run on threads of one process.

#[path = "support/allocations.rs"]
mod allocations;
#[path = "support/steady.rs"]
mod steady;

use allocations::allocations;
use std::hint::black_box;

fn repeat(work: impl FnMut()) {
    std::iter::repeat_with(work).take(500).for_each(drop);
}

#[test]
fn observe_evict_score_and_predict_allocate_nothing() {
    assert_eq!(allocations(|| drop(black_box(Box::new(1)))), 1, "the count counts");
    let mut steady = steady::Steady::new(4_000, 60, 7);
    for _ in 0..3_000 {
        steady.call();
    }
    assert_eq!(allocations(|| repeat(|| _ = black_box(steady.call()))), 0, "observe and evict");
    assert_eq!(allocations(|| repeat(|| steady.identity())), 0, "observe, identities");
    assert_eq!(allocations(|| repeat(|| _ = black_box(steady.predict(4)))), 0, "predict");
    assert_eq!(allocations(|| repeat(|| _ = black_box(steady.score(256)))), 0, "score");
}
