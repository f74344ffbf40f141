//! The engine's memory: the replay's block pool and host tier, and whose word decides what leaves.
//!
//! Room is made in this order:
//!
//! 1. blocks of sessions that a policy has released,
//! 2. what the scheduling policies propose and, with the learned cache policy, what the core names,
//! 3. what the cache policy of the replay names, or the least recently used block,
//! 4. blocks of sessions that a policy keeps: a pin gives way when nothing else is left,
//! 5. blocks of preempted calls that the core still counts as in flight.
//!
//! Blocks in use by running calls never go, so a pool that holds the largest call holds any sequence of calls.

use std::collections::BTreeSet;

use replay::host::{HostOptions, HostTier};
use replay::policy::{CachePolicy, CallView};
use replay::pool::Pool;
use replay::trace::Trace;
use runtime_core::ids::WorkloadId;
use runtime_core::policy::{Action, Event, Kind, Policies, Request};
use runtime_core::runtime::{EventKind, Events};
use runtime_core::Runtime;

/// What was decided about a block's session, in the order of eviction.
pub(crate) const RELEASED: u8 = 0;
pub(crate) const UNDECIDED: u8 = 1;
pub(crate) const KEPT: u8 = 2;

const NOBODY: u32 = u32::MAX;
const ONE_THREAD: &str = "one thread uses the runtime";

/// The core and the policies that live on it.
pub(crate) struct Core {
    pub(crate) runtime: Runtime,
    pub(crate) workload: WorkloadId,
    pub(crate) policies: Policies,
    /// Somebody needs the core's events.
    pub(crate) hears: bool,
    keys: Vec<u64>,
}

/// The core's name of a block; 0 is no block.
pub(crate) fn key(block: u32) -> u64 {
    u64::from(block) + 1
}

impl Core {
    pub(crate) fn new(runtime: Runtime, workload: WorkloadId, policies: Policies, hears: bool) -> Self {
        Self { runtime, workload, policies, hears, keys: Vec::new() }
    }

    fn name(&mut self, blocks: &[u32]) {
        self.keys.clear();
        self.keys.extend(blocks.iter().map(|&block| key(block)));
    }

    fn tell(&self, kind: EventKind, session: u32, agent: u16, call: u32, time_us: u64, hit: usize) {
        if self.policies.listens() {
            let (session, call) = (u64::from(session), u64::from(call));
            let event = Event { workload: self.workload, kind, session, agent, call, time_us, blocks: &self.keys, hit };
            self.policies.observe(&self.runtime, &event);
        }
    }

    /// Returns the hits that the core counts.
    pub(crate) fn call_started(&mut self, view: &CallView<'_>) -> usize {
        self.name(view.prompt);
        let (session, call, at) = (u64::from(view.session), u64::from(view.call), view.time_us);
        let hit = self.runtime.call_started(self.workload, session, call, view.agent, at, &self.keys, &[]);
        let hit = hit.expect(ONE_THREAD);
        self.tell(EventKind::CallStart, view.session, view.agent, view.call, at, hit);
        hit
    }

    /// Blocks in a row of a call's prompt have entered the pool.
    pub(crate) fn stored(&mut self, doing: Doing, blocks: &[u32]) {
        if self.hears && !blocks.is_empty() {
            self.name(blocks);
            let Doing { call, session, agent, now_us } = doing;
            self.runtime.stored(self.workload, u64::from(call), now_us, &self.keys, &[]).expect(ONE_THREAD);
            self.tell(EventKind::Stored, session, agent, call, now_us, 0);
        }
    }

    pub(crate) fn call_ended(&mut self, view: &CallView<'_>, output: &[u32]) {
        self.name(output);
        let tool = view.tool.map_or(0, |tool| tool + 1);
        let (session, call, at) = (u64::from(view.session), u64::from(view.call), view.time_us);
        self.runtime.call_ended(self.workload, session, call, tool, at, &self.keys, &[]).expect(ONE_THREAD);
        self.tell(EventKind::CallEnd, view.session, view.agent, view.call, at, 0);
        if tool > 0 {
            self.keys.clear();
            self.tell(EventKind::ToolStart, view.session, tool, view.call, at, 0);
        }
    }

    /// An event that has a session, and no blocks but those named.
    pub(crate) fn observe(&mut self, kind: EventKind, session: u32, agent: u16, now_us: u64, blocks: &[u32]) {
        self.name(blocks);
        let events = Events {
            kinds: &[kind as u8],
            sessions: &[u64::from(session)],
            agents: &[agent],
            calls: &[0],
            times_us: &[now_us],
            offsets: &[0, self.keys.len() as u32],
            blocks: &self.keys,
        };
        self.runtime.observe(self.workload, &events).expect(ONE_THREAD);
        self.tell(kind, session, agent, 0, now_us, 0);
    }

    /// The chain from its root is in the pool again, whoever brought it.
    fn restored(&mut self, session: u32, agent: u16, now_us: u64, chain: &[u32]) {
        self.name(chain);
        let session = u64::from(session);
        self.runtime.restored(self.workload, session, agent, now_us, &self.keys).expect(ONE_THREAD);
    }
}

/// Who says what leaves.
pub(crate) enum Order {
    /// Least recently used first, as the replay's `lru`.
    Lru,
    /// The core: its `kv_cache` is the last of the policies.
    Core,
    /// A policy of the replay.
    Replay(Box<dyn CachePolicy>),
}

/// Evictable blocks by (what was decided about the session, last use); the deepest of a call are the least recent.
struct Recency {
    ordered: BTreeSet<(u8, u64, u32)>,
    class: Vec<u8>,
    /// 0: not in the order.
    stamp: Vec<u64>,
    clock: u64,
}

impl Recency {
    fn new(n_blocks: usize) -> Self {
        Self { ordered: BTreeSet::new(), class: vec![UNDECIDED; n_blocks], stamp: vec![0; n_blocks], clock: 0 }
    }

    fn offer(&mut self, block: u32) {
        self.take(block);
        self.clock += 1;
        self.stamp[block as usize] = self.clock;
        self.ordered.insert((self.class[block as usize], self.clock, block));
    }

    fn take(&mut self, block: u32) {
        let at = block as usize;
        let stamp = std::mem::take(&mut self.stamp[at]);
        if stamp > 0 {
            self.ordered.remove(&(self.class[at], stamp, block));
        }
    }

    fn classify(&mut self, block: u32, class: u8) {
        let at = block as usize;
        if self.stamp[at] > 0 && self.class[at] != class {
            self.ordered.remove(&(self.class[at], self.stamp[at], block));
            self.ordered.insert((class, self.stamp[at], block));
        }
        self.class[at] = class;
    }
}

/// Whose word a step of making room is about.
#[derive(Clone, Copy)]
pub(crate) struct Doing {
    pub(crate) call: u32,
    pub(crate) session: u32,
    pub(crate) agent: u16,
    pub(crate) now_us: u64,
}

/// Pool, host tier and order of eviction.
pub(crate) struct Memory<'a> {
    trace: &'a Trace,
    pub(crate) pool: Pool,
    pub(crate) host: Option<HostTier>,
    order: Order,
    recency: Recency,
    /// The session of the call that used each block last.
    last_session: Vec<u32>,
    /// The call that each session made last.
    pub(crate) last_call: Vec<u32>,
    link_free_us: u64,
    block_us: f64,
    pub(crate) drift: u64,
    pub(crate) peak: usize,
    victims: Vec<u32>,
}

impl<'a> Memory<'a> {
    pub(crate) fn new(trace: &'a Trace, capacity: usize, host: Option<HostOptions>, order: Order) -> Self {
        let mut pool = Pool::new(trace, capacity);
        if host.is_some() {
            pool.keep_evicted();
        }
        let n = trace.n_blocks as usize;
        Self {
            trace,
            pool,
            host: host.map(|options| HostTier::new(options, n)),
            order,
            recency: Recency::new(n),
            last_session: vec![NOBODY; n],
            last_call: vec![NOBODY; trace.sessions.len()],
            link_free_us: 0,
            block_us: host.map_or(0.0, |options| options.block_bytes / options.bytes_per_s * 1e6),
            drift: 0,
            peak: 0,
            victims: Vec::new(),
        }
    }

    pub(crate) fn replay_policy(&mut self) -> Option<(&mut dyn CachePolicy, &Pool)> {
        match &mut self.order {
            Order::Replay(policy) => Some((policy.as_mut(), &self.pool)),
            _ => None,
        }
    }

    /// Leading blocks of `chain` that are resident.
    pub(crate) fn resident(&self, chain: &[u32]) -> usize {
        // A resident block's ancestors are resident.
        chain.partition_point(|&block| self.pool.is_resident(block))
    }

    /// Blocks of `chain` from `from` on that are in the host tier, without a gap.
    pub(crate) fn on_host(&self, chain: &[u32], from: usize) -> usize {
        self.host.as_ref().map_or(0, |host| chain[from..].iter().take_while(|&&block| host.holds(block)).count())
    }

    /// Blocks that no running call uses.
    pub(crate) fn unused(&self) -> usize {
        self.pool.capacity() - self.pool.pinned()
    }

    pub(crate) fn pin(&mut self, block: u32, session: u32) {
        self.pool.pin(block);
        self.recency.take(block);
        self.recency.class[block as usize] = UNDECIDED;
        self.last_session[block as usize] = session;
    }

    /// Returns whether nobody uses the block any more.
    pub(crate) fn unpin(&mut self, block: u32) -> bool {
        self.pool.unpin(block)
    }

    /// Blocks that nobody uses any more, root first, become evictable.
    pub(crate) fn offer(&mut self, released: &[u32]) {
        for &block in released.iter().rev() {
            self.recency.offer(block);
        }
    }

    /// Decides about blocks that a session used last, whether or not they are in use now.
    pub(crate) fn classify(&mut self, session: u32, chain: &[u32], class: u8) {
        for &block in chain {
            if self.last_session[block as usize] == session && self.pool.is_resident(block) {
                self.recency.classify(block, class);
            }
        }
    }

    /// When copies of `blocks` blocks asked for now are on the device, behind those asked for before.
    pub(crate) fn copied_us(&mut self, blocks: usize, now_us: u64) -> u64 {
        let took = (blocks as f64 * self.block_us).ceil() as u64;
        self.link_free_us = self.link_free_us.max(now_us) + took;
        self.link_free_us
    }

    /// Puts the next block of a call's chain into the pool, pinned; false where there is no room.
    pub(crate) fn insert(&mut self, core: &mut Core, doing: Doing, block: u32) -> bool {
        if self.pool.is_resident(block) {
            self.pin(block, doing.session);
            return true;
        }
        if !self.make_room(core, 1, doing.now_us) {
            return false;
        }
        self.pool.insert(block);
        self.peak = self.peak.max(self.pool.resident());
        self.pin(block, doing.session);
        true
    }

    /// Makes room for `n` blocks.
    pub(crate) fn make_room(&mut self, core: &mut Core, n: usize, now_us: u64) -> bool {
        if self.pool.free() >= n {
            return true;
        }
        self.evict_class(core, RELEASED, n, now_us);
        if core.hears && self.pool.free() < n {
            self.ask_policies(core, n, now_us);
        }
        match &mut self.order {
            _ if self.pool.free() >= n => {}
            Order::Lru => {
                self.evict_class(core, UNDECIDED, n, now_us);
                self.evict_class(core, KEPT, n, now_us);
            }
            Order::Core => {
                // The core counts calls that were preempted as in flight.
                self.evict_class(core, UNDECIDED, n, now_us);
                self.evict_class(core, KEPT, n, now_us);
            }
            Order::Replay(policy) => {
                let short = n - self.pool.free();
                policy.evict(short, now_us, &mut self.pool);
                self.evict_class(core, UNDECIDED, n, now_us);
            }
        }
        self.write_back();
        self.pool.free() >= n
    }

    fn evict_class(&mut self, core: &mut Core, class: u8, n: usize, now_us: u64) {
        self.victims.clear();
        let mut free = self.pool.free();
        for &(_, _, block) in self.recency.ordered.range((class, 0, 0)..(class + 1, 0, 0)) {
            if free >= n {
                break;
            }
            // Refused: above a block that is in use or kept.
            if self.pool.evict(block) {
                free += 1;
                self.victims.push(block);
            }
        }
        for at in 0..self.victims.len() {
            self.recency.take(self.victims[at]);
        }
        if core.hears && !self.victims.is_empty() {
            let victims = std::mem::take(&mut self.victims);
            core.observe(EventKind::Removed, 0, 0, now_us, &victims);
            self.victims = victims;
        }
    }

    fn ask_policies(&mut self, core: &mut Core, n: usize, now_us: u64) {
        // What is kept, and what is above it, waits for what else there is.
        let mut aside: Vec<u32> = Vec::new();
        while self.pool.free() < n {
            self.victims.clear();
            let victims = &mut self.victims;
            let request = Request { kind: Kind::Evict, n: n - self.pool.free(), now_us };
            let found = core.policies.act(&core.runtime, &request, &mut |action| {
                if let Action::Evicted(victim) = action {
                    victims.push(victim.key() as u32 - 1);
                }
            });
            if found.expect(ONE_THREAD) == 0 {
                break;
            }
            for &block in &self.victims {
                if self.recency.class[block as usize] != KEPT && self.pool.evict(block) {
                    self.recency.take(block);
                } else {
                    aside.push(block);
                }
            }
        }
        let mut back: BTreeSet<u32> = BTreeSet::new();
        for block in aside {
            if self.pool.free() < n && self.pool.evict(block) {
                self.recency.take(block);
            } else if self.recency.class[block as usize] == KEPT || self.pool.is_resident(block) {
                back.insert(self.last_session[block as usize]);
            }
        }
        for session in back {
            self.restore(core, session, now_us);
        }
    }

    /// The core hears again of all resident blocks of a session's last call.
    fn restore(&mut self, core: &mut Core, session: u32, now_us: u64) {
        let Some(last) = self.last_call.get(session as usize).and_then(|&call| self.trace.calls.get(call as usize))
        else {
            self.drift += 1;
            return;
        };
        let chain: Vec<u32> = self.trace.blocks(last.prompt).chain(self.trace.blocks(last.output)).collect();
        let resident = self.resident(&chain);
        core.restored(session, last.agent, now_us, &chain[..resident]);
    }

    /// What left the pool enters the host tier.
    fn write_back(&mut self) {
        if let Some(host) = &mut self.host {
            for block in self.pool.take_evicted() {
                host.evicted(block);
            }
        }
    }

    /// Moves what a session used last of `chain` to the host tier.
    pub(crate) fn demote(&mut self, core: &mut Core, session: u32, chain: &[u32], now_us: u64) {
        let mut gone = Vec::new();
        for &block in chain.iter().rev() {
            if self.last_session[block as usize] == session && self.pool.evict(block) {
                self.recency.take(block);
                gone.push(block);
            }
        }
        if core.hears && !gone.is_empty() {
            core.observe(EventKind::Removed, session, 0, now_us, &gone);
        }
        self.write_back();
    }

    /// Puts `blocks` (a chain behind resident ones) into the pool without a call: from the host tier, or computed in idle
    /// capacity. Nothing that is kept goes for them. Returns how many found room.
    pub(crate) fn bring(&mut self, core: &mut Core, doing: Doing, chain: &[u32], from: usize, n: usize) -> usize {
        let evictable = self.unused().saturating_sub(from);
        let wanted = n.min(chain.len() - from).min(evictable);
        chain[..from].iter().for_each(|&block| self.pool.pin(block));
        let mut brought = 0;
        for &block in &chain[from..from + wanted] {
            if !self.make_room(core, 1, doing.now_us) {
                break;
            }
            self.pool.insert(block);
            self.pool.pin(block);
            self.last_session[block as usize] = doing.session;
            self.recency.class[block as usize] = UNDECIDED;
            brought += 1;
        }
        self.peak = self.peak.max(self.pool.resident());
        for &block in chain[..from + brought].iter().rev() {
            if self.pool.unpin(block) {
                self.recency.offer(block);
            }
        }
        if core.hears && brought > 0 {
            core.restored(doing.session, doing.agent, doing.now_us, &chain[..from + brought]);
        }
        brought
    }
}
