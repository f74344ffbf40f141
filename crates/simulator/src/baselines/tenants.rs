//! Whose turn it is.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use rustc_hash::FxHashMap;

use runtime_core::policy::{About, Policy};
use runtime_core::scheduling::{Decision, Happening, Load, Needs, Precedence, Waiting};
use runtime_core::Runtime;

use crate::service::{OUTPUT_PRICE, PROMPT_PRICE};

fn at(tenant: u16) -> usize {
    usize::from(tenant)
}

/// A table by tenant that grows with them.
fn of<T: Default + Clone>(table: &mut Vec<T>, tenant: u16) -> &mut T {
    if table.len() <= at(tenant) {
        table.resize(at(tenant) + 1, T::default());
    }
    &mut table[at(tenant)]
}

/// `rate-limit-N`: a bucket of N virtual tokens a second for each tenant, ten seconds deep. A tenant that has used up
/// its bucket waits, whether or not anybody else wants the device.
pub(super) struct RateLimit {
    per_s: f64,
    state: Mutex<Buckets>,
}

#[derive(Default)]
struct Buckets {
    /// Tokens owed, and when that was true.
    owed: Vec<(f64, u64)>,
    tenant: FxHashMap<u64, u16>,
}

const DEPTH_S: f64 = 10.0;

impl RateLimit {
    pub(super) fn new(per_s: f64) -> Self {
        Self { per_s, state: Mutex::default() }
    }

    fn charge(&self, buckets: &mut Buckets, tenant: u16, now_us: u64, tokens: f64) -> f64 {
        let (owed, since_us) = of(&mut buckets.owed, tenant);
        let earned = now_us.saturating_sub(*since_us) as f64 / 1e6 * self.per_s;
        *owed = (*owed - earned).max(-DEPTH_S * self.per_s) + tokens;
        *since_us = now_us;
        *owed
    }
}

impl Policy for RateLimit {
    fn about(&self) -> About {
        About { name: "rate-limit-N".into(), observes: "tokens served", decides: "holds", costs: "a look-up an event" }
    }

    fn needs(&self) -> Needs {
        Needs::TENANTS.and(Needs::SERVICE).and(Needs::ADMISSIONS)
    }

    fn precedence(&self) -> Precedence {
        Precedence::Fairness
    }

    fn hear(&self, _: &Runtime, now_us: u64, happening: &Happening) {
        let buckets = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match happening {
            Happening::Admitted { call, again } => {
                buckets.tenant.insert(call.call, call.tenant);
                let prompt = if *again { 0 } else { call.missing_tokens() };
                self.charge(buckets, call.tenant, now_us, PROMPT_PRICE * f64::from(prompt));
            }
            Happening::Served { call, decoded_tokens, .. } => {
                if let Some(&tenant) = buckets.tenant.get(call) {
                    self.charge(buckets, tenant, now_us, OUTPUT_PRICE * f64::from(*decoded_tokens));
                }
            }
            Happening::Ended { call } => {
                buckets.tenant.remove(call);
            }
            _ => {}
        }
    }

    fn schedule(&self, _: &Runtime, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let buckets = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (call, decision) in waiting.iter().zip(decisions) {
            let owed = self.charge(buckets, call.tenant, load.now_us, 0.0);
            if owed > 0.0 {
                decision.hold_until_us = load.now_us + (owed / self.per_s * 1e6).ceil() as u64;
            }
        }
    }
}

/// `drr`: deficit round robin (Shreedhar and Varghese, "Efficient Fair Queuing Using Deficit Round Robin", SIGCOMM 1995).
/// Tenants take turns; a turn gives a quantum, a call costs its prompt tokens to be computed when it is admitted, and its
/// generated tokens when they are known: they are taken out of the next turns.
#[derive(Default)]
pub(super) struct DeficitRoundRobin {
    state: Mutex<Turns>,
}

#[derive(Default)]
struct Turns {
    deficit: Vec<f64>,
    next: usize,
    tenant: FxHashMap<u64, u16>,
}

const QUANTUM: f64 = 4096.0;

impl Policy for DeficitRoundRobin {
    fn about(&self) -> About {
        About { name: "drr".into(), observes: "tokens served", decides: "order", costs: "a visit a waiting call" }
    }

    fn needs(&self) -> Needs {
        Needs::TENANTS.and(Needs::SERVICE).and(Needs::ADMISSIONS)
    }

    fn precedence(&self) -> Precedence {
        Precedence::Fairness
    }

    fn hear(&self, _: &Runtime, _: u64, happening: &Happening) {
        let turns = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match happening {
            Happening::Admitted { call, again } => {
                turns.tenant.insert(call.call, call.tenant);
                // Whoever is admitted has the turn; it stays until its deficit is used up.
                turns.next = at(call.tenant);
                let cost = if *again { 0.0 } else { PROMPT_PRICE * f64::from(call.missing_tokens()) };
                *of(&mut turns.deficit, call.tenant) -= cost;
            }
            Happening::Served { call, decoded_tokens, .. } => {
                if let Some(&tenant) = turns.tenant.get(call) {
                    *of(&mut turns.deficit, tenant) -= OUTPUT_PRICE * f64::from(*decoded_tokens);
                }
            }
            Happening::Ended { call } => {
                turns.tenant.remove(call);
            }
            _ => {}
        }
    }

    fn schedule(&self, _: &Runtime, _: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let turns = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for call in waiting {
            of(&mut turns.deficit, call.tenant);
        }
        let n = turns.deficit.len();
        let mut queues: Vec<Vec<usize>> = vec![Vec::new(); n];
        let mut order: Vec<usize> = (0..waiting.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(decisions[i].rank));
        for i in order {
            queues[at(waiting[i].tenant)].push(i);
        }
        // Who has nothing to send keeps no credit.
        for (tenant, queue) in queues.iter().enumerate() {
            if queue.is_empty() {
                turns.deficit[tenant] = turns.deficit[tenant].min(0.0);
            }
        }
        // Rounds until somebody may send; the rest is ranked by playing the rounds on.
        let behind = queues.iter().zip(&turns.deficit).filter(|(queue, _)| !queue.is_empty());
        let best = behind.map(|(_, deficit)| *deficit).fold(f64::NEG_INFINITY, f64::max);
        if best.is_finite() && best <= 0.0 {
            let rounds = (-best / QUANTUM).floor() + 1.0;
            for (queue, deficit) in queues.iter().zip(&mut turns.deficit) {
                if !queue.is_empty() {
                    *deficit += rounds * QUANTUM;
                }
            }
        }
        let mut played = turns.deficit.clone();
        let (mut tenant, mut rank) = (turns.next % n.max(1), 0);
        while (rank as usize) < waiting.len() {
            while played[tenant] > 0.0 {
                let Some(i) = queues[tenant].pop() else { break };
                decisions[i].rank = rank;
                rank += 1;
                played[tenant] -= PROMPT_PRICE * f64::from(waiting[i].missing_tokens()).max(1.0);
            }
            tenant = (tenant + 1) % n;
            if !queues[tenant].is_empty() && played[tenant] <= 0.0 {
                played[tenant] += QUANTUM;
            }
        }
    }
}

/// `vtc`: the virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): the tenant
/// that has been given least goes first; one that comes to wait is lifted to the least of those that wait.
///
/// Prompt tokens found in the cache are free, as in its variant for prefix caches.
#[derive(Default)]
pub(super) struct VirtualTokenCounter {
    state: Mutex<Counters>,
}

#[derive(Default)]
struct Counters {
    given: Vec<f64>,
    waiting: Vec<u32>,
    last: f64,
    tenant: FxHashMap<u64, u16>,
}

impl Counters {
    fn wait(&mut self, tenant: u16) {
        of(&mut self.given, tenant);
        if *of(&mut self.waiting, tenant) == 0 {
            let waiting = self.given.iter().zip(&self.waiting).filter(|(_, waiting)| **waiting > 0);
            let least = waiting.map(|(given, _)| *given).fold(f64::INFINITY, f64::min);
            let floor = if least.is_finite() { least } else { self.last };
            let own = &mut self.given[at(tenant)];
            *own = own.max(floor);
        }
        self.waiting[at(tenant)] += 1;
    }
}

impl Policy for VirtualTokenCounter {
    fn about(&self) -> About {
        About { name: "vtc".into(), observes: "tokens served", decides: "order", costs: "a visit a waiting call" }
    }

    fn needs(&self) -> Needs {
        Needs::TENANTS.and(Needs::SERVICE).and(Needs::ARRIVALS).and(Needs::ADMISSIONS).and(Needs::PREEMPTIONS)
    }

    fn bounds_service(&self) -> bool {
        true
    }

    fn precedence(&self) -> Precedence {
        Precedence::Fairness
    }

    fn hear(&self, _: &Runtime, _: u64, happening: &Happening) {
        let counters = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match happening {
            Happening::Arrived(call) => {
                counters.tenant.insert(call.call, call.tenant);
                counters.wait(call.tenant);
            }
            Happening::Preempted { call } => {
                if let Some(&tenant) = counters.tenant.get(call) {
                    counters.wait(tenant);
                }
            }
            Happening::Admitted { call, again } => {
                let waiting = of(&mut counters.waiting, call.tenant);
                *waiting -= 1;
                let leaves = *waiting == 0;
                let given = of(&mut counters.given, call.tenant);
                *given += if *again { 0.0 } else { PROMPT_PRICE * f64::from(call.missing_tokens()) };
                if leaves {
                    counters.last = *given;
                }
            }
            Happening::Served { call, decoded_tokens, .. } => {
                if let Some(&tenant) = counters.tenant.get(call) {
                    *of(&mut counters.given, tenant) += OUTPUT_PRICE * f64::from(*decoded_tokens);
                }
            }
            Happening::Ended { call } => {
                counters.tenant.remove(call);
            }
            _ => {}
        }
    }

    fn schedule(&self, _: &Runtime, _: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let counters = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut order: Vec<usize> = (0..waiting.len()).collect();
        order.sort_by_key(|&i| decisions[i].rank);
        let mut given = counters.given.clone();
        let mut queues: Vec<VecDeque<usize>> = vec![VecDeque::new(); given.len()];
        for i in order {
            queues[at(waiting[i].tenant)].push_back(i);
        }
        // As a server that asks before each admission: whoever is chosen pays for its prompt at once.
        for rank in 0..waiting.len() as u32 {
            let least =
                (0..given.len()).filter(|&t| !queues[t].is_empty()).min_by(|&a, &b| given[a].total_cmp(&given[b]));
            let Some(i) = least.and_then(|tenant| queues[tenant].pop_front()) else { return };
            decisions[i].rank = rank;
            given[at(waiting[i].tenant)] += PROMPT_PRICE * f64::from(waiting[i].missing_tokens());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime_core::runtime::Options;

    fn waiting(tenants: &[u16], tokens: u32) -> Vec<Waiting> {
        let one = |(i, &tenant): (usize, &u16)| Waiting {
            call: i as u64,
            workload: runtime_core::ids::WorkloadId(0),
            session: i as u64,
            agent: 0,
            tenant,
            arrived_us: i as u64,
            prompt_tokens: tokens,
            resident_tokens: 0,
            host_tokens: 0,
            group: 0,
        };
        tenants.iter().enumerate().map(one).collect()
    }

    fn tenants_in_turn(policy: &dyn Policy, tenants: &[u16], tokens: u32) -> Vec<u16> {
        let runtime = Runtime::new(Options::for_pool(16)).unwrap();
        let calls = waiting(tenants, tokens);
        for &call in &calls {
            policy.hear(&runtime, 0, &Happening::Arrived(call));
        }
        let mut decisions: Vec<Decision> =
            (0..calls.len()).map(|rank| Decision { rank: rank as u32, hold_until_us: 0 }).collect();
        policy.schedule(&runtime, &Load::default(), &calls, &mut decisions);
        let mut order: Vec<usize> = (0..calls.len()).collect();
        order.sort_by_key(|&i| decisions[i].rank);
        order.into_iter().map(|i| calls[i].tenant).collect()
    }

    #[test]
    fn equal_calls_of_two_tenants_take_turns() {
        let flood = [0, 0, 0, 0, 1, 1];
        assert_eq!(tenants_in_turn(&VirtualTokenCounter::default(), &flood, 5000), [0, 1, 0, 1, 0, 0]);
        assert_eq!(tenants_in_turn(&DeficitRoundRobin::default(), &flood, 5000), [0, 1, 0, 1, 0, 0]);
    }

    #[test]
    fn whoever_has_been_given_more_waits() {
        let runtime = Runtime::new(Options::for_pool(16)).unwrap();
        let policy = VirtualTokenCounter::default();
        let before = waiting(&[0], 10_000)[0];
        policy.hear(&runtime, 0, &Happening::Arrived(Waiting { call: 77, ..before }));
        policy.hear(&runtime, 0, &Happening::Arrived(Waiting { call: 78, tenant: 1, ..before }));
        policy.hear(&runtime, 0, &Happening::Admitted { call: Waiting { call: 77, ..before }, again: false });
        assert_eq!(tenants_in_turn(&policy, &[0, 0, 1, 1], 4000), [1, 1, 0, 0]);
    }

    #[test]
    fn a_used_up_bucket_holds_its_tenant_until_it_is_full_again() {
        let runtime = Runtime::new(Options::for_pool(16)).unwrap();
        let policy = RateLimit::new(1000.0);
        let call = waiting(&[0], 15_000)[0];
        let hold = |now_us| {
            let mut decisions = [Decision::default()];
            policy.schedule(&runtime, &Load { now_us, ..Load::default() }, &[call], &mut decisions);
            decisions[0].hold_until_us
        };
        assert_eq!(hold(20_000_000), 0);
        policy.hear(&runtime, 20_000_000, &Happening::Admitted { call, again: false });
        // Ten seconds' worth were saved up, fifteen are used.
        assert_eq!(hold(20_000_000), 25_000_000);
        assert_eq!(hold(25_000_000), 0);
    }
}
