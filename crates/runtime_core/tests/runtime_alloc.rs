//! The four calls allocate nothing after construction: a counting allocator around every one of them.
//!
//! One test, because the count is the process's and tests of a file run on threads of one process.

#[path = "support/steady.rs"]
mod steady;

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promises are the system allocator's conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations while `work` runs: the least of three runs, as the test harness may allocate too.
fn allocations(mut work: impl FnMut()) -> u64 {
    let mut run = || {
        let before = ALLOCATIONS.load(Relaxed);
        work();
        ALLOCATIONS.load(Relaxed) - before
    };
    let (first, second, third) = (run(), run(), run());
    first.min(second).min(third)
}

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
