//! `min` against exhaustive search, and against every other policy.

mod policy_support;

use std::collections::HashMap;

use policy_support::{random_trace, schedule, Shape};
use replay::policies;
use replay::schedule::{EventKind, Order, Schedule};
use replay::sim;
use replay::trace::{Trace, NO_BLOCK};

/// Most hit blocks that any prefix-closed sequence of forced evictions can reach, by trying all of them.
struct Exhaustive<'a> {
    trace: &'a Trace,
    schedule: &'a Schedule,
    best: HashMap<(usize, u64), u64>,
}

impl Exhaustive<'_> {
    /// Most hits from event `position` on, with the blocks of bit mask `resident` in the pool and one call at a time.
    fn hits(&mut self, position: usize, resident: u64) -> u64 {
        let Some(event) = self.schedule.events.get(position) else { return 0 };
        if let Some(&known) = self.best.get(&(position, resident)) {
            return known;
        }
        let call = &self.trace.calls[event.call as usize];
        let mask = |span| self.trace.blocks(span).fold(0u64, |m, b| m | 1 << b);
        let (prompt, output) = (mask(call.prompt), mask(call.output));
        let (needed, in_use, gain) = match event.kind {
            EventKind::Queued | EventKind::Grow | EventKind::Bypass => (0, 0, 0),
            EventKind::Start => (prompt, prompt, (prompt & resident).count_ones()),
            EventKind::Finish => (output, prompt | output, 0),
        };
        let union = resident | needed;
        let excess = (union.count_ones() as usize).saturating_sub(self.schedule.options.capacity_blocks);
        let mut best = 0;
        for next in self.reductions(union, in_use, excess) {
            best = best.max(self.hits(position + 1, next));
        }
        self.best.insert((position, resident), best + u64::from(gain));
        best + u64::from(gain)
    }

    /// Every set reached by evicting `n` leaves not in use, one after the other.
    fn reductions(&self, resident: u64, in_use: u64, n: usize) -> Vec<u64> {
        let mut sets = vec![resident];
        for _ in 0..n {
            let mut smaller: Vec<u64> = sets
                .iter()
                .flat_map(|&set| {
                    let parents = (0..64).filter(|b| set >> b & 1 == 1).fold(0u64, |m, b| {
                        let parent = self.trace.parents[b as usize];
                        if parent == NO_BLOCK {
                            m
                        } else {
                            m | 1 << parent
                        }
                    });
                    (0..64).filter(move |b| (set & !in_use & !parents) >> b & 1 == 1).map(move |b| set & !(1 << b))
                })
                .collect();
            smaller.sort_unstable();
            smaller.dedup();
            sets = smaller;
        }
        sets
    }
}

fn hit_blocks(name: &str, trace: &Trace, schedule: &Schedule) -> u64 {
    let mut policy = policies::build(name, trace, schedule).unwrap();
    sim::run(trace, schedule, policy.as_mut(), &mut |_| {}).hit_blocks
}

#[test]
fn min_equals_exhaustive_search_one_call_at_a_time() {
    let (mut compared, mut beats_lru) = (0, 0);
    for seed in 0..400u64 {
        let shape = Shape {
            sessions: 3,
            calls: 9,
            agents: 2,
            labels: 1 + seed as u32 % 3,
            longest: 5,
            answer: seed as usize % 3,
        };
        let trace = random_trace(seed, shape);
        if trace.n_blocks > 24 {
            continue;
        }
        for capacity in 3..=8 {
            let schedule = schedule(&trace, Order::File, 1, capacity, seed);
            let best = Exhaustive { trace: &trace, schedule: &schedule, best: HashMap::new() }.hits(0, 0);
            assert_eq!(hit_blocks("min", &trace, &schedule), best, "seed {seed}, capacity {capacity}");
            compared += 1;
            beats_lru += usize::from(best > hit_blocks("lru", &trace, &schedule));
        }
    }
    // The cases must be hard enough to tell an optimum from a heuristic.
    assert!(compared > 500 && beats_lru > compared / 10, "{compared} cases, {beats_lru} where LRU is not optimal");
}

#[test]
fn no_policy_beats_min_one_call_at_a_time() {
    for seed in 0..10 {
        let shape = Shape { sessions: 8, calls: 200, agents: 4, labels: 3, longest: 16, answer: seed as usize % 4 };
        let trace = random_trace(seed, shape);
        let schedule = schedule(&trace, Order::File, 1, 20 + 12 * seed as usize, seed);
        let best = hit_blocks("min", &trace, &schedule);
        for name in policies::names() {
            let hits = hit_blocks(name, &trace, &schedule);
            assert!(hits <= best, "seed {seed}: {name} hits {hits}, min {best}");
        }
    }
}

/// With calls in flight, blocks in use cannot be victims and the farthest next use is no longer provably optimal.
/// On these seeds it is not beaten all the same.
#[test]
fn no_policy_beats_min_in_the_closed_loop_on_these_seeds() {
    for seed in 0..10 {
        let shape = Shape { sessions: 12, calls: 300, agents: 4, labels: 3, longest: 16, answer: seed as usize % 4 };
        let trace = random_trace(seed, shape);
        let schedule = schedule(&trace, Order::Closed, 4, 70 + 12 * seed as usize, seed);
        let best = hit_blocks("min", &trace, &schedule);
        for name in policies::names() {
            let hits = hit_blocks(name, &trace, &schedule);
            assert!(hits <= best, "seed {seed}: {name} hits {hits}, min {best}");
        }
    }
}
