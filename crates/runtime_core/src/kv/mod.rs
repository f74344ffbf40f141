//! `kv_cache` (CacheSage): which blocks to keep.
//!
//! What calls do to the pool:
//!
//! | file | what it owns |
//! |---|---|
//! | `mod.rs` | the pool: what it is made of |
//! | `config.rs` | which mechanisms are on |
//! | `events.rs` | calls arrive, start, store and end |
//! | `touch.rs` | a call uses what is there: promises kept and broken |
//! | `segments.rs` | segments found, pinned, cut, extended and taken apart |
//! | `lanes.rs` | sessions and their lanes: whose a segment is |
//! | `kin.rs` | which sessions do the same task? |
//! | `index.rs` | residency index, segments, victim queue |
//! | `calls.rs`, `table.rs` | calls in flight; finding them, and lanes, by hash |
//! | `tagged.rs` | blocks by hash, for the index and for the guard's shadow |
//! | `queue.rs` | calls that wait: whose prompts are known already |
//! | `audit.rs` | is the pool consistent? for tests |
//!
//! What they teach:
//!
//! | file | what it owns |
//! |---|---|
//! | `workload.rs` | learned state of one workload, and how identities teach it |
//! | `content.rs` | will the owner's next call use a segment again? |
//! | `odds.rs` | how much likelier than others of its kind? |
//! | `lost.rs` | would it have used what was evicted? |
//! | `chain.rs` | which agent of a session calls when? |
//! | `drift.rs` | has the order of agents changed? |
//! | `gaps.rs`, `ends.rs` | when does a session call again, if at all? |
//! | `sharing.rs` | when does another session use a segment? |
//! | `followers.rs`, `trails.rs` | when does a session that walks the owner's path? |
//! | `state.rs` | learned state between processes |
//! | `explain.rs` | what has been learned, for reports |
//!
//! What is decided:
//!
//! | file | what it owns |
//! |---|---|
//! | `plan.rs` | what is expected of a session: who calls when |
//! | `density.rs` | the decision: hit density |
//! | `score.rs` | what a leaf is worth |
//! | `settle.rs` | which leaves are scored again, and when |
//! | `evict.rs` | what goes |
//! | `guard.rs`, `shadow.rs` | a shadow LRU that takes over when the learned order loses |
//! | `restore.rs` | what comes back from a lower tier |
//! | `offers.rs` | does it pay to bring blocks back? |
//! | `predict.rs` | who calls next, for those who have no pool |
//!
//! The pool has one writer at a time. An event marks its session; at its end the leaves of marked sessions, and of some
//! whose silence has grown by a fifth, are scored. Until the first eviction nothing is scored. An engine that goes by
//! steps has that done once a step, and before an eviction what that needs.

#[doc(hidden)]
pub mod audit;
mod calls;
mod chain;
mod config;
mod content;
mod density;
mod drift;
mod ends;
mod events;
mod evict;
mod explain;
mod followers;
mod gaps;
mod guard;
pub(crate) mod index;
mod kin;
mod lanes;
mod lost;
mod odds;
mod offers;
mod plan;
mod predict;
mod queue;
mod restore;
mod score;
mod segments;
mod settle;
mod shadow;
mod sharing;
mod state;
mod table;
mod tagged;
mod touch;
mod trails;
#[cfg(test)]
mod twins;
pub(crate) mod workload;

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::Arc;

use crate::ids::spread;

use calls::Calls;
use chain::STEPS;
use density::{Cycle, Services};
use followers::KIN;
use guard::Guard;
use index::{Index, NONE};
use lanes::{free_lanes, Lane, Tenant};
use lost::Lost;
use offers::Offers;
use plan::{Followed, KnownCycle, Plan, View, CYCLES, PLANS};
use queue::Queue;
use segments::MAX_PATH;
use sharing::Curves;
use table::Table;
use trails::Trails;
use workload::MAX_WORKLOADS;

pub use config::{Config, FutureStarts, Hint, Oracle};
pub(crate) use drift::Guesses;
pub(crate) use events::CallStart;
pub use explain::{Promise, SilenceCurve};
pub use predict::Prediction;
pub(crate) use predict::{predict, score_agents, time_predictions};
pub use restore::Expected;
pub(crate) use workload::Workloads;
pub use workload::{Workload, STATE_BUDGET_BYTES};

/// Workloads whose curves of sharing are remembered, direct-mapped.
const CURVES: usize = 4;

/// Repairs that were necessary, by kind; each leaves the pool consistent and sane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repairs {
    /// Times that ran backwards and were taken as "now".
    pub backward_clock: u64,
    /// Calls let go before they ended: too many were in flight, or another one started under the same id.
    pub untracked_calls: u64,
    /// Blocks that were stored but not indexed: the index or its segments were full.
    pub untracked_blocks: u64,
    /// Blocks dropped from the index to free a segment.
    pub forgotten_blocks: u64,
    /// Events for calls that are not in flight.
    pub unknown_calls: u64,
    /// Calls that started again while in flight; their first start was ended.
    pub duplicate_calls: u64,
}

/// What threads that are not in the pool know of the calls that it keeps.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    in_flight: table::Homes,
    waiting: Arc<AtomicU32>,
}

impl Kept {
    /// False where the pool has not heard of the call, or has let it go: its end is no news there. Wait-free.
    ///
    /// Who has been told that the call has started or waits is not told false, because that happened before.
    #[inline]
    pub(crate) fn may_hold(&self, call: u64) -> bool {
        self.in_flight.may_hold(spread(call)) || self.waiting.load(Relaxed) > 0
    }
}

/// The pool's index and the decisions about it. One writer.
#[derive(Debug)]
pub(crate) struct KvCache {
    config: Config,
    pub(crate) index: Index,
    /// Lanes of sessions, then one for each workload that owns what no session owns any more.
    lanes: Vec<Lane>,
    /// Lanes by session and agent.
    lane_table: Table,
    free_lane: u32,
    lane_hand: u32,
    tenants: Vec<Tenant>,
    dirty: Vec<u32>,
    active: Vec<u32>,
    running: Calls,
    queue: Queue,
    pub(crate) guard: Guard,
    /// Ticket of the call that is starting, 0 for none.
    ticket: u16,
    path: Vec<u32>,
    /// Something has been evicted.
    pressed: bool,
    /// Events have been observed whose scores are left to the next eviction or the end of the step.
    postponed: bool,
    view: View,
    plans: Vec<Plan>,
    services: Services,
    cycles: Vec<KnownCycle>,
    hand: usize,
    expected_hand: usize,
    now_us: u64,
    /// Moving mean of the time between evictions of one block.
    eviction_interval_s: f32,
    last_eviction_us: u64,
    pool_blocks: usize,
    offers: Offers,
    lost: Lost,
    trails: Trails,
    /// Curves of sharing by workload, direct-mapped.
    curves: [Curves; CURVES],
    pub(crate) repairs: Repairs,
    hints: Vec<Hint>,
    starts: Vec<FutureStarts>,
}

impl KvCache {
    pub(crate) fn new(pool_blocks: usize, sessions: usize, config: Config) -> Self {
        let segments = if config.oracle.any() { pool_blocks.max(1024) } else { Index::segments_for(pool_blocks) };
        Self::with_segments(pool_blocks, sessions, config, segments)
    }

    pub(crate) fn with_segments(pool_blocks: usize, sessions: usize, config: Config, segments: usize) -> Self {
        density::prepare();
        let oracle = config.oracle.any();
        let services = Services::new(&[0.0; gaps::BUCKETS]);
        let cycle = Cycle::new(&[0.0; gaps::BUCKETS], &services, 0.0);
        let index = Index::with_segments(pool_blocks, segments);
        Self {
            config,
            lanes: free_lanes(sessions * 3).collect(),
            lane_table: Table::new(sessions * 3),
            free_lane: 0,
            lane_hand: 0,
            tenants: vec![Tenant::VACANT; sessions],
            dirty: Vec::with_capacity(sessions),
            active: Vec::with_capacity(sessions),
            running: Calls::new(),
            queue: Queue::new(),
            guard: Guard::new(pool_blocks),
            ticket: 0,
            path: Vec::with_capacity(pool_blocks.min(MAX_PATH)),
            view: View::new(),
            pressed: false,
            postponed: false,
            services,
            cycles: vec![KnownCycle { identity: None, cycle }; CYCLES],
            plans: vec![Plan::vacant(); PLANS],
            hand: 0,
            expected_hand: 0,
            now_us: 0,
            eviction_interval_s: 0.01,
            last_eviction_us: 0,
            pool_blocks,
            offers: Offers::new(pool_blocks),
            lost: Lost::new(),
            trails: Trails::new(),
            curves: std::array::from_fn(|_| Curves::new()),
            repairs: Repairs::default(),
            hints: if oracle { vec![Hint::NONE; index.n_segments()] } else { Vec::new() },
            starts: if oracle { vec![[u64::MAX; STEPS]; sessions] } else { Vec::new() },
            index,
        }
    }

    /// What other threads may ask of its calls.
    pub(crate) fn kept(&self) -> Kept {
        Kept { in_flight: self.running.homes(), waiting: self.queue.waiting() }
    }

    /// Bytes of the index; of everything kept per session.
    pub(crate) fn bytes(&self) -> (usize, usize) {
        let beside = self.tenants.len() * (size_of::<Tenant>() + 8)
            + self.lanes.len() * size_of::<Lane>()
            + self.lane_table.bytes()
            + self.running.bytes()
            + self.queue.bytes()
            + self.guard.bytes()
            + self.path.capacity() * 4
            + self.offers.bytes()
            + self.lost.bytes()
            + self.trails.bytes()
            + KIN * size_of::<Followed>()
            + size_of_val(&*self.plans)
            + size_of_val(&*self.cycles)
            + self.hints.len() * size_of::<Hint>()
            + self.starts.len() * size_of::<FutureStarts>();
        (self.index.bytes(), beside)
    }

    #[inline]
    fn clock(&mut self, now_us: u64) -> u64 {
        if now_us < self.now_us {
            self.repairs.backward_clock += 1;
        } else {
            self.now_us = now_us;
        }
        self.now_us
    }

    /// Forgets all blocks (the engine has reset its cache); what was learned stays.
    pub(crate) fn clear(&mut self) {
        self.index.clear();
        self.lost.clear();
        self.guard.clear();
        let n = self.lanes.len() - MAX_WORKLOADS;
        for (lane, free) in self.lanes.iter_mut().zip(free_lanes(n)) {
            *lane = free;
        }
        (self.free_lane, self.lane_hand) = (0, 0);
        for tenant in &mut self.tenants {
            (tenant.lanes, tenant.last_lane, tenant.n_lanes, tenant.generation) = (NONE, NONE, 0, 0);
            (tenant.dirty, tenant.active) = (false, false);
        }
        self.dirty.clear();
        self.active.clear();
        self.running.clear();
        self.lane_table.clear();
        self.trails.clear();
        self.view.slot = NONE;
        for plan in &mut self.plans {
            plan.identity = (NONE, 0, 0, None);
        }
        for known in &mut self.cycles {
            known.identity = None;
        }
    }
}
