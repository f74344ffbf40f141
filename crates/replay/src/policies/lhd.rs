//! `lhd`: Beckmann, Chen and Cidon, "LHD: Improving Cache Hit Rate by Maximizing Hit Density", NSDI 2018.
//!
//! A block is worth its expected hits divided by the expected time it occupies the cache until then, given its age
//! (accesses since its last use) and class (how soon its last two uses came). Hits and evictions are counted by class
//! and age; every 65,536 accesses the counts become a table of densities and decay by 0.9. The victim is the
//! least dense of 32 sampled blocks, as published.
//!
//! Deviations: samples are drawn from the blocks that can go (not in use, no resident child); no application classes,
//! no explorers, a smaller table (2,000 ages of a twentieth of the pool's size in accesses, 16 classes) that is
//! rebuilt more often, because a trace is shorter than a day of a web cache.
//!
//! Does badly where age and the last two uses say little about the next and the pool turns over before densities have
//! been learned (`whowhen_ag2` at 25 %: 1.3 points below `lru`).

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::leaves::LeafSet;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::schedule::Schedule;
use crate::trace::Trace;

const AGES: usize = 2_000;
const CLASSES: usize = 16;
const SAMPLES: usize = 32;
const ACCESSES_PER_UPDATE: u64 = 1 << 16;
const DECAY: f64 = 0.9;

#[derive(Clone, Copy)]
struct Use {
    at: u64,
    /// Ages at the last two hits.
    last_age: u32,
    earlier_age: u32,
}

#[derive(Clone)]
struct Class {
    hits: Vec<f64>,
    evictions: Vec<f64>,
    density: Vec<f64>,
}

/// What was learned, and what each block's age and class follow from.
struct Table {
    uses: Vec<Use>,
    classes: Vec<Class>,
    accesses: u64,
    accesses_per_age: u64,
}

/// Least hit density first.
pub struct Lhd {
    table: Table,
    leaves: LeafSet,
    rng: StdRng,
}

impl Lhd {
    /// A policy for the blocks of `trace` in the pool of `schedule`.
    pub fn new(trace: &Trace, schedule: &Schedule) -> Self {
        let class = |c: usize| Class {
            hits: vec![0.0; AGES],
            evictions: vec![0.0; AGES],
            density: (0..AGES).map(|age| (c + 1) as f64 / (age + 1) as f64).collect(),
        };
        let table = Table {
            uses: vec![Use { at: 0, last_age: 0, earlier_age: 0 }; trace.n_blocks as usize],
            classes: (0..CLASSES).map(class).collect(),
            accesses: 0,
            accesses_per_age: (schedule.options.capacity_blocks as u64 / 20).max(1),
        };
        let leaves = LeafSet::new(trace.n_blocks as usize);
        Self { table, leaves, rng: StdRng::seed_from_u64(schedule.options.seed) }
    }
}

impl Table {
    fn age(&self, block: u32) -> usize {
        let age = (self.accesses - self.uses[block as usize].at) / self.accesses_per_age;
        (age as usize).min(AGES - 1)
    }

    /// The sooner the last two uses came, the higher the class.
    fn class(&self, block: u32) -> usize {
        let Use { last_age, earlier_age, .. } = self.uses[block as usize];
        let mut age = (last_age + earlier_age) as usize;
        if age == 0 {
            return CLASSES - 1;
        }
        let mut class = 0;
        while age < AGES && class < CLASSES - 1 {
            age <<= 1;
            class += 1;
        }
        class
    }

    fn density(&self, block: u32) -> f64 {
        self.classes[self.class(block)].density[self.age(block)]
    }

    fn count_hit(&mut self, block: u32) {
        let (age, class) = (self.age(block), self.class(block));
        self.classes[class].hits[age] += 1.0;
        let earlier_age = self.uses[block as usize].last_age;
        self.count_access(block, age as u32, earlier_age);
    }

    fn count_eviction(&mut self, block: u32) {
        let (age, class) = (self.age(block), self.class(block));
        self.classes[class].evictions[age] += 1.0;
    }

    fn count_access(&mut self, block: u32, last_age: u32, earlier_age: u32) {
        self.accesses += 1;
        self.uses[block as usize] = Use { at: self.accesses, last_age, earlier_age };
        if self.accesses % ACCESSES_PER_UPDATE == 0 {
            self.classes.iter_mut().for_each(Class::update);
        }
    }
}

impl Class {
    /// Density at an age: hits from there on, divided by the time spent from there on, over all lives that got there.
    fn update(&mut self) {
        let (mut hits, mut lives, mut time) = (0.0, 0.0, 0.0);
        for age in (0..AGES).rev() {
            hits += self.hits[age];
            lives += self.hits[age] + self.evictions[age];
            time += lives;
            self.density[age] = if lives > 1e-5 { hits / time } else { 0.0 };
            self.hits[age] *= DECAY;
            self.evictions[age] *= DECAY;
        }
    }
}

impl CachePolicy for Lhd {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        for &block in call.prompt[..call.hit].iter().rev() {
            self.table.count_hit(block);
        }
    }

    fn evict(&mut self, n: usize, _now_us: u64, pool: &mut Pool) {
        let Self { table, leaves, rng } = self;
        for _ in 0..n {
            let pick = |len: usize| rng.random_range(0..len);
            let Some(victim) = leaves.evict_sampled(SAMPLES, pool, pick, |b| table.density(b)) else { return };
            table.count_eviction(victim);
        }
    }

    fn inserted(&mut self, _call: &CallView<'_>, blocks: &[u32], _pool: &Pool) {
        for &block in blocks.iter().rev() {
            self.table.count_access(block, 0, AGES as u32);
        }
    }

    fn call_finish(&mut self, _call: &CallView<'_>, _output: &[u32], released: &[u32], pool: &Pool) {
        self.leaves.offer(released, pool);
    }
}
