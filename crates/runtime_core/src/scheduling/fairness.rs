//! `fairness`: whose turn it is, and whose blocks go.
//!
//! **Turns.** Every account (a tenant, or with [`Per::Agent`] each agent of a tenant) has a counter of virtual tokens. It
//! grows by what the account is given, divided by its weight:
//!
//! ```text
//! admission   w_p x prompt tokens to be computed          w_p = 1
//! generation  w_q x tokens generated                      w_q = 2
//! memory      m x KV-token-seconds held                   m learned, see below
//! ```
//!
//! The account with the lowest counter is next. Inside one answer, counters grow in thought as calls are ranked, so that
//! the order equals that of a server that asks before every admission. An account that begins to wait is lifted to the
//! lowest counter among those that wait, or to that of the last one that stopped: idling earns nothing. Nothing is ever
//! held, so the server works whenever it could; where a weaker policy holds all calls of the account whose turn it is, and
//! not all calls of the others, its first call is let go.
//!
//! The difference of what two accounts get while both wait is at most 2 x max(w_p L, w'_q M): L the longest prompt, M the
//! tokens that the pool holds, w'_q the highest price of a generated token including its memory (Sheng et al., "Fairness in
//! Serving Large Language Models", OSDI 2024, theorem 4.4 with w'_q for w_q).
//!
//! **Price of memory.** m = (virtual tokens computed / KV-token-seconds held, both fading) x (share of the pool in use by
//! running calls): with a full pool, holding all of it costs as much as all computing; with an empty one it is free.
//!
//! **Cache debt.** A block belongs to the account whose call used it, to nobody once several accounts have. When blocks
//! must go, an account that holds more than its share of the pool (by weight, among accounts that hold any) gives its least
//! recently used ones first, down to its share. So nobody who keeps to its share loses a block to others.
//!
//! Costs one hash probe an event, two a block and call; about 50 bytes a cached block and 100 an account.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use crate::error::Result;
use crate::policy::{About, Action, Event, Kind, Policy, Request};
use crate::runtime::EventKind;
use crate::scheduling::{Decision, Happening, Load, Needs, Precedence, Waiting};
use crate::Runtime;

/// Price of a prompt token.
pub const PROMPT_PRICE: f64 = 1.0;
/// Price of a generated token.
pub const OUTPUT_PRICE: f64 = 2.0;
/// Calls in flight that are followed.
const MAX_CALLS: usize = 16_384;
/// Accounts; those beyond share the last one.
const MAX_ACCOUNTS: usize = 65_536;
/// Virtual tokens over which the price of memory is averaged.
const PRICE_MEMORY: f64 = 1e6;
const NONE: u32 = u32::MAX;

/// Whom a counter belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Per {
    /// Tenants, whatever their agents do.
    #[default]
    Tenant,
    /// Each agent of each tenant.
    Agent,
}

/// Serves accounts in turn and keeps their blocks apart.
#[derive(Debug, Default)]
pub struct FairnessPolicy {
    per: Per,
    state: Mutex<State>,
}

#[derive(Debug)]
struct Account {
    tenant: u16,
    weight: f64,
    /// Virtual tokens over weight.
    counter: f64,
    /// Calls that wait.
    waiting: u32,
    blocks: u32,
    /// Its blocks, least recently used first.
    oldest: u32,
    newest: u32,
}

#[derive(Debug)]
struct Call {
    account: u32,
    waits: bool,
    blocks: Vec<u64>,
}

/// A cached block in its owner's list, or in the list of free entries.
#[derive(Clone, Copy, Debug)]
struct Block {
    key: u64,
    /// `NONE`: several accounts use it.
    account: u32,
    older: u32,
    newer: u32,
}

/// Calls of one account in an answer, those that are held last: at `next..end` of the order are those not ranked yet.
#[derive(Debug)]
struct Queue {
    account: u32,
    counter: f64,
    weight: f64,
    next: usize,
    end: usize,
}

#[derive(Debug, Default)]
struct State {
    accounts: Vec<Account>,
    of: FxHashMap<u64, u32>,
    weights: FxHashMap<u16, f64>,
    calls: FxHashMap<u64, Call>,
    /// Counter of the account that waited last.
    last_counter: f64,
    computed: f64,
    held_token_us: f64,
    /// Share of the pool in use by running calls.
    occupied: f64,
    blocks: Vec<Block>,
    places: FxHashMap<u64, u32>,
    free: Vec<u32>,
    spare: Vec<Vec<u64>>,
    /// Account, whether it is held, rank so far, and place among the waiting calls.
    order: Vec<(u32, bool, u32, u32)>,
    queues: Vec<Queue>,
    victims: Vec<u64>,
}

/// What an account was given, for reports and tests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AccountReport {
    /// The tenant.
    pub tenant: u16,
    /// Virtual tokens over weight, lifts included.
    pub counter: f64,
    /// Blocks of the cache that are its own.
    pub blocks: u32,
}

impl FairnessPolicy {
    /// Counters per tenant or per agent.
    pub fn new(per: Per) -> Self {
        Self { per, state: Mutex::default() }
    }

    /// A tenant with weight 2 gets twice as much as one with weight 1, the default. Weights are above zero.
    pub fn set_weight(&self, tenant: u16, weight: f64) {
        let weight = if weight.is_finite() { weight.clamp(1e-3, 1e3) } else { 1.0 };
        let state = &mut *self.lock();
        state.weights.insert(tenant, weight);
        for account in state.accounts.iter_mut().filter(|account| account.tenant == tenant) {
            account.weight = weight;
        }
    }

    /// The accounts, in order of appearance.
    pub fn accounts(&self) -> Vec<AccountReport> {
        let state = self.lock();
        let of = |a: &Account| AccountReport { tenant: a.tenant, counter: a.counter, blocks: a.blocks };
        state.accounts.iter().map(of).collect()
    }

    /// Virtual tokens for a token held for one second, at present.
    pub fn memory_price(&self) -> f64 {
        self.lock().memory_price() * 1e6
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves counters that are at worst one event behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn account(&mut self, per: Per, call: &Waiting) -> u32 {
        let agent = match per {
            Per::Tenant => 0,
            Per::Agent => u64::from(call.agent) << 32 | u64::from(call.workload.0),
        };
        let key = u64::from(call.tenant) << 48 | agent;
        if let Some(&account) = self.of.get(&key) {
            return account;
        }
        if self.accounts.len() == MAX_ACCOUNTS {
            return MAX_ACCOUNTS as u32 - 1;
        }
        let (tenant, weight) = (call.tenant, self.weights.get(&call.tenant).copied().unwrap_or(1.0));
        let account = Account { tenant, weight, counter: 0.0, waiting: 0, blocks: 0, oldest: NONE, newest: NONE };
        self.accounts.push(account);
        self.of.insert(key, self.accounts.len() as u32 - 1);
        self.accounts.len() as u32 - 1
    }

    fn begins_to_wait(&mut self, account: u32) {
        if self.accounts[account as usize].waiting == 0 {
            let waiting = self.accounts.iter().filter(|account| account.waiting > 0);
            let lowest = waiting.map(|account| account.counter).fold(f64::INFINITY, f64::min);
            let floor = if lowest.is_finite() { lowest } else { self.last_counter };
            let own = &mut self.accounts[account as usize].counter;
            *own = own.max(floor);
        }
        self.accounts[account as usize].waiting += 1;
    }

    fn stops_waiting(&mut self, account: u32) {
        let account = &mut self.accounts[account as usize];
        account.waiting = account.waiting.saturating_sub(1);
        if account.waiting == 0 {
            self.last_counter = account.counter;
        }
    }

    fn arrived(&mut self, per: Per, call: &Waiting) {
        let account = self.account(per, call);
        if !self.calls.contains_key(&call.call) {
            if self.calls.len() == MAX_CALLS {
                // Some call whose end was never told.
                if let Some(any) = self.calls.keys().next().copied() {
                    self.gone(any);
                }
            }
            let blocks = self.spare.pop().unwrap_or_default();
            self.calls.insert(call.call, Call { account, waits: true, blocks });
            self.begins_to_wait(account);
        }
    }

    fn gone(&mut self, call: u64) {
        let Some(mut call) = self.calls.remove(&call) else { return };
        if call.waits {
            self.stops_waiting(call.account);
        }
        call.blocks.clear();
        self.spare.push(call.blocks);
    }

    /// Virtual tokens for a token-microsecond.
    fn memory_price(&self) -> f64 {
        if self.held_token_us > 0.0 {
            self.occupied * self.computed / self.held_token_us
        } else {
            0.0
        }
    }

    fn charge(&mut self, account: u32, tokens: f64) {
        let account = &mut self.accounts[account as usize];
        account.counter += tokens / account.weight;
        self.computed += tokens;
        if self.computed > 2.0 * PRICE_MEMORY {
            self.computed *= 0.5;
            self.held_token_us *= 0.5;
        }
    }

    fn unlink(&mut self, at: u32) {
        let Block { account, older, newer, .. } = self.blocks[at as usize];
        if account == NONE {
            return;
        }
        let account = &mut self.accounts[account as usize];
        account.blocks -= 1;
        match older {
            NONE => account.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => account.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
    }

    fn link_newest(&mut self, at: u32) {
        let account = self.blocks[at as usize].account;
        if account == NONE {
            return;
        }
        let owner = &mut self.accounts[account as usize];
        owner.blocks += 1;
        let older = std::mem::replace(&mut owner.newest, at);
        match older {
            NONE => owner.oldest = at,
            older => self.blocks[older as usize].newer = at,
        }
        self.blocks[at as usize].older = older;
        self.blocks[at as usize].newer = NONE;
    }

    fn used(&mut self, account: u32, key: u64) {
        let at = if let Some(&at) = self.places.get(&key) {
            self.unlink(at);
            let owner = &mut self.blocks[at as usize].account;
            if *owner != account {
                *owner = NONE;
            }
            at
        } else {
            let block = Block { key, account, older: NONE, newer: NONE };
            let at = if let Some(at) = self.free.pop() {
                self.blocks[at as usize] = block;
                at
            } else {
                self.blocks.push(block);
                self.blocks.len() as u32 - 1
            };
            self.places.insert(key, at);
            at
        };
        self.link_newest(at);
    }

    fn removed(&mut self, key: u64) {
        if let Some(at) = self.places.remove(&key) {
            self.unlink(at);
            self.free.push(at);
        }
    }

    /// A call that ends leaves its blocks in the cache: the root is the most recently used, as children go first.
    fn leaves(&mut self, name: u64, output: &[u64]) {
        let Some(call) = self.calls.get_mut(&name) else { return };
        let account = call.account;
        let mut blocks = std::mem::take(&mut call.blocks);
        for &key in output.iter().rev().chain(blocks.iter().rev()) {
            self.used(account, key);
        }
        blocks.clear();
        self.spare.push(blocks);
    }

    /// Names at most `n` blocks of whoever holds more than its share.
    fn owed(&mut self, n: usize, pool_blocks: usize) {
        self.victims.clear();
        let total: f64 = self.accounts.iter().filter(|account| account.blocks > 0).map(|account| account.weight).sum();
        if total <= 0.0 {
            return;
        }
        let excess = |account: &Account| f64::from(account.blocks) - pool_blocks as f64 * account.weight / total;
        let debtor = self.accounts.iter().enumerate().max_by(|a, b| excess(a.1).total_cmp(&excess(b.1)));
        let Some((debtor, owed)) = debtor.map(|(at, account)| (at, excess(account))) else { return };
        for _ in 0..(owed.max(0.0) as usize).min(n) {
            let at = self.accounts[debtor].oldest;
            let key = self.blocks[at as usize].key;
            // What the core refuses is in use: it has become the newest.
            self.unlink(at);
            self.link_newest(at);
            self.victims.push(key);
        }
    }

    fn rank(&mut self, per: Per, waiting: &[Waiting], now_us: u64, decisions: &mut [Decision]) {
        let (mut order, mut queues) = (std::mem::take(&mut self.order), std::mem::take(&mut self.queues));
        order.clear();
        for (i, (call, decision)) in waiting.iter().zip(&*decisions).enumerate() {
            order.push((self.account(per, call), decision.is_held(now_us), decision.rank, i as u32));
        }
        order.sort_unstable();
        queues.clear();
        let mut free = 0;
        for (place, &(account, held, ..)) in order.iter().enumerate() {
            if queues.last().is_none_or(|queue: &Queue| queue.account != account) {
                let Account { counter, weight, .. } = self.accounts[account as usize];
                queues.push(Queue { account, counter, weight, next: place, end: place });
            }
            if let Some(queue) = queues.last_mut() {
                queue.end = place + 1;
            }
            free += usize::from(!held);
        }
        for rank in 0..order.len() as u32 {
            let lowest = queues
                .iter_mut()
                .min_by(|a, b| a.counter.total_cmp(&b.counter).then_with(|| order[a.next].2.cmp(&order[b.next].2)));
            let Some(queue) = lowest else { break };
            let (_, held, _, i) = order[queue.next];
            let (call, decision) = (&waiting[i as usize], &mut decisions[i as usize]);
            decision.rank = rank;
            if !held {
                free -= 1;
            } else if free > 0 {
                decision.hold_until_us = 0;
            }
            queue.next += 1;
            queue.counter += PROMPT_PRICE * f64::from(call.missing_tokens()) / queue.weight;
            if queue.next == queue.end {
                let done = queue.account;
                queues.retain(|queue| queue.account != done);
            }
        }
        (self.order, self.queues) = (order, queues);
    }
}

impl Policy for FairnessPolicy {
    fn about(&self) -> About {
        About {
            name: match self.per {
                Per::Tenant => "fairness".into(),
                Per::Agent => "agent_fairness".into(),
            },
            observes: "arrivals, admissions, tokens served, calls and their blocks",
            decides: "order of waiting calls; evicts blocks of who holds more than its share",
            costs:
                "an event: some tens of nanoseconds and two hash probes a block; 64 waiting calls: some microseconds",
        }
    }

    fn needs(&self) -> Needs {
        [Needs::CALLS, Needs::ARRIVALS, Needs::ADMISSIONS, Needs::SERVICE, Needs::TENANTS, Needs::POOL]
            .into_iter()
            .fold(Needs::NONE, Needs::and)
    }

    fn bounds_service(&self) -> bool {
        self.per == Per::Tenant && self.lock().weights.is_empty()
    }

    fn precedence(&self) -> Precedence {
        Precedence::Fairness
    }

    fn hear(&self, _: &Runtime, _: u64, happening: &Happening) {
        let state = &mut *self.lock();
        match *happening {
            Happening::Arrived(ref call) => state.arrived(self.per, call),
            Happening::Withdrawn { call } | Happening::Ended { call } => state.gone(call),
            Happening::Admitted { ref call, again } => {
                // An engine that reports arrivals late has not been heard of the call before.
                state.arrived(self.per, call);
                if let Some(known) = state.calls.get_mut(&call.call) {
                    let (account, waited) = (known.account, std::mem::replace(&mut known.waits, false));
                    if waited {
                        state.stops_waiting(account);
                    }
                    if !again {
                        state.charge(account, PROMPT_PRICE * f64::from(call.missing_tokens()));
                    }
                }
            }
            Happening::Served { call, decoded_tokens, kv_token_us, .. } => {
                let Some(account) = state.calls.get(&call).map(|call| call.account) else { return };
                let memory = state.memory_price() * kv_token_us as f64;
                state.held_token_us += kv_token_us as f64;
                state.charge(account, OUTPUT_PRICE * f64::from(decoded_tokens));
                let account = &mut state.accounts[account as usize];
                account.counter += memory / account.weight;
            }
            Happening::Preempted { call } => {
                let Some(known) = state.calls.get_mut(&call) else { return };
                let (account, waited) = (known.account, std::mem::replace(&mut known.waits, true));
                if !waited {
                    // What it was charged stays: it was served.
                    state.begins_to_wait(account);
                }
            }
        }
    }

    fn observe(&self, _: &Runtime, event: &Event<'_>) {
        let state = &mut *self.lock();
        match event.kind {
            EventKind::CallStart => {
                if let Some(call) = state.calls.get_mut(&event.call) {
                    call.blocks.clear();
                    call.blocks.extend_from_slice(event.blocks);
                }
            }
            // What running calls fill counts against their share as well.
            EventKind::Stored => {
                if let Some(account) = state.calls.get(&event.call).map(|call| call.account) {
                    event.blocks.iter().rev().for_each(|&key| state.used(account, key));
                }
            }
            EventKind::CallEnd => state.leaves(event.call, event.blocks),
            EventKind::Removed => event.blocks.iter().for_each(|&key| state.removed(key)),
            EventKind::Reset => {
                for account in &mut state.accounts {
                    (account.blocks, account.oldest, account.newest) = (0, NONE, NONE);
                }
                state.blocks.clear();
                state.places.clear();
                state.free.clear();
            }
            EventKind::CallQueued | EventKind::ToolStart | EventKind::ToolEnd | EventKind::SessionEnd => {}
        }
    }

    fn evicted(&self, key: u64) {
        self.lock().removed(key);
    }

    fn act(&self, runtime: &Runtime, request: &Request, decide: &mut dyn FnMut(Action)) -> Result<bool> {
        if request.kind != Kind::Evict {
            return Ok(false);
        }
        let victims = {
            let state = &mut *self.lock();
            state.owed(request.n, runtime.options().pool_blocks);
            std::mem::take(&mut state.victims)
        };
        for &key in &victims {
            decide(Action::Evict(key));
        }
        let answered = !victims.is_empty();
        self.lock().victims = victims;
        Ok(answered)
    }

    fn schedule(&self, _: &Runtime, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let state = &mut *self.lock();
        state.occupied = f64::from(load.pinned_blocks) / f64::from(load.pool_blocks.max(1));
        state.rank(self.per, waiting, load.now_us, decisions);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Options;

    #[test]
    fn accounts_without_blocks_owe_none() {
        let runtime = Runtime::new(Options::for_pool(64)).unwrap();
        let policy = FairnessPolicy::default();
        let workload = runtime.workload("test").unwrap();
        let call = Waiting {
            call: 1,
            workload,
            session: 1,
            agent: 0,
            tenant: 0,
            arrived_us: 0,
            prompt_tokens: 100,
            resident_tokens: 0,
            host_tokens: 0,
            group: 0,
        };
        policy.hear(&runtime, 0, &Happening::Arrived(call));
        let request = Request { kind: Kind::Evict, n: 4, now_us: 1 };
        let answered = policy.act(&runtime, &request, &mut |action| panic!("{action:?}"));
        assert_eq!(answered, Ok(false));
    }
}
