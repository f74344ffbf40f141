//! A question about waiting calls allocates nothing once as many have waited before: a counting allocator around it.
//!
//! One test, because the count is the process's and tests of a file run on threads of one process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use runtime_core::ids::mix;
use runtime_core::policy::{built_in, Policies};
use runtime_core::runtime::Options;
use runtime_core::scheduling::{Decision, Happening, Load, Waiting};
use runtime_core::Runtime;

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
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn ranking_calls_allocates_nothing() {
    let runtime = Runtime::new(Options::for_pool(1_000)).unwrap();
    let workload = runtime.workload("test").unwrap();
    let names = ["fairness", "batch_shaping", "kv_cache"];
    let policies = Policies::new(names.iter().map(|name| built_in(name).unwrap()).collect());
    let waiting: Vec<Waiting> = (0..200u64)
        .map(|i| Waiting {
            call: i,
            workload,
            session: i % 70,
            agent: (i % 5) as u16,
            tenant: (i % 3) as u16,
            arrived_us: mix(i) % 1_000,
            prompt_tokens: 1_000,
            resident_tokens: 600,
            host_tokens: 0,
            group: i % 4,
        })
        .collect();
    for &call in &waiting {
        policies.hear(&runtime, 1_000, &[Happening::Arrived(call)]);
    }
    let mut decisions = vec![Decision::default(); waiting.len()];
    let load = Load { now_us: 2_000, running_calls: 3, pool_blocks: 1_000, ..Load::default() };
    policies.schedule(&runtime, &load, &waiting, &mut decisions);
    // The least of three runs, as the test harness may allocate too.
    let mut run = || {
        let before = ALLOCATIONS.load(Relaxed);
        (0..50).for_each(|_| policies.schedule(&runtime, &load, &waiting, &mut decisions));
        ALLOCATIONS.load(Relaxed) - before
    };
    let (first, second, third) = (run(), run(), run());
    assert_eq!(first.min(second).min(third), 0);
}
