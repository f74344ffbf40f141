//! What the scheduling policies promise, alone and together, served by a toy engine.

#[path = "support/toy_engine.rs"]
mod toy_engine;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use runtime_core::policy::{built_in, About, Action, Event, Policies, Policy, Request, BUILT_IN};
use runtime_core::scheduling::batch_shaping::{BatchShapingOptions, BatchShapingPolicy};
use runtime_core::scheduling::fairness::{FairnessPolicy, Per, OUTPUT_PRICE, PROMPT_PRICE};
use runtime_core::scheduling::{Decision, Happening, Load, Needs, Precedence, Waiting};
use runtime_core::{Result, Runtime};
use toy_engine::{mean, widest_gap, Engine, Plan, Report, BLOCK};

/// Names of the scheduling policies, each of which may be on or off.
const SCHEDULING: [&str; 5] = ["fairness", "agent_fairness", "batch_shaping", "speculation", "tool_gap"];

/// Fairness that checks its own invariant at every question: the counters of accounts that wait differ by at most
/// max(w_p L, w'_q M), from which the published bound on service, twice as much, follows.
#[derive(Clone)]
struct Checked(Arc<Inner>);

struct Inner {
    fairness: FairnessPolicy,
    pool_tokens: f64,
    weights: HashMap<u16, f64>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// Memory charged so far and tokens held at most, by call.
    calls: HashMap<u64, (f64, f64)>,
    longest_prompt: f64,
    output_price: f64,
    widest: f64,
    bound: f64,
}

impl Checked {
    fn new(per: Per, capacity: usize, weights: &[(u16, f64)]) -> Self {
        let fairness = FairnessPolicy::new(per);
        for &(tenant, weight) in weights {
            fairness.set_weight(tenant, weight);
        }
        let (pool_tokens, weights) = (capacity as f64 * f64::from(BLOCK), weights.iter().copied().collect());
        Self(Arc::new(Inner { fairness, pool_tokens, weights, seen: Mutex::default() }))
    }

    fn policies(&self, others: &[&str]) -> Policies {
        let mut list: Vec<Box<dyn Policy>> = vec![Box::new(self.clone())];
        list.extend(others.iter().map(|name| built_in(name).expect(name)));
        Policies::new(list)
    }

    /// The widest difference of counters while waiting, and the bound, in virtual tokens.
    fn widest(&self) -> (f64, f64) {
        let seen = self.0.seen.lock().unwrap();
        (seen.widest, seen.bound)
    }
}

impl Policy for Checked {
    fn about(&self) -> About {
        self.0.fairness.about()
    }

    fn needs(&self) -> Needs {
        self.0.fairness.needs()
    }

    fn precedence(&self) -> Precedence {
        self.0.fairness.precedence()
    }

    fn observe(&self, runtime: &Runtime, event: &Event<'_>) {
        self.0.fairness.observe(runtime, event);
    }

    fn evicted(&self, key: u64) {
        self.0.fairness.evicted(key);
    }

    fn act(&self, runtime: &Runtime, request: &Request, decide: &mut dyn FnMut(Action)) -> Result<bool> {
        self.0.fairness.act(runtime, request, decide)
    }

    fn hear(&self, runtime: &Runtime, now_us: u64, happening: &Happening) {
        let seen = &mut *self.0.seen.lock().unwrap();
        match *happening {
            Happening::Arrived(call) => seen.longest_prompt = seen.longest_prompt.max(f64::from(call.prompt_tokens)),
            Happening::Admitted { call, .. } => {
                seen.calls.insert(call.call, (0.0, f64::from(call.prompt_tokens)));
            }
            Happening::Served { call, kv_token_us, decoded_tokens, .. } => {
                let entry = seen.calls.entry(call).or_default();
                entry.0 += self.0.fairness.memory_price() / 1e6 * kv_token_us as f64;
                entry.1 += f64::from(decoded_tokens);
                seen.output_price = seen.output_price.max(OUTPUT_PRICE + entry.0 / entry.1);
            }
            _ => {}
        }
        self.0.fairness.hear(runtime, now_us, happening);
    }

    fn schedule(&self, runtime: &Runtime, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let accounts = self.0.fairness.accounts();
        let weight = |tenant: u16| self.0.weights.get(&tenant).copied().unwrap_or(1.0);
        let counters = || {
            let waits = |tenant: u16| waiting.iter().any(|call| call.tenant == tenant);
            accounts.iter().filter(move |account| waits(account.tenant)).map(|account| account.counter)
        };
        let (low, high) = (counters().fold(f64::INFINITY, f64::min), counters().fold(0.0, f64::max));
        let seen = &mut *self.0.seen.lock().unwrap();
        let least_weight = waiting.iter().map(|call| weight(call.tenant)).fold(1.0, f64::min);
        let most = (PROMPT_PRICE * seen.longest_prompt).max(seen.output_price * self.0.pool_tokens);
        seen.bound = seen.bound.max(most / least_weight);
        seen.widest = seen.widest.max(high - low);
        assert!(
            self.0.fairness.about().name != "fairness" || high - low <= seen.bound,
            "counters {low} to {high}, bound {}",
            seen.bound
        );
        self.0.fairness.schedule(runtime, load, waiting, decisions);
    }
}

fn policies(names: &[&str]) -> Policies {
    Policies::new(names.iter().map(|name| built_in(name).expect(name)).collect())
}

fn run(names: &[&str], capacity: usize, plans: &[Plan]) -> Report {
    Engine::new(capacity, &policies(names)).run(plans)
}

/// Agents with long contexts that call often: what a pool cannot keep is expensive to compute again.
fn agents(n: u64, tenants: u16) -> Vec<Plan> {
    let plan = |i: u64| Plan {
        start_us: i * 10_000,
        tenant: (i % u64::from(tenants)) as u16,
        agent: (i % 3) as u16,
        turns: 8,
        shared: 1024,
        added: 1000,
        output: 48,
        gap_us: 300_000,
    };
    (0..n).map(plan).collect()
}

fn percentile_99(report: &Report) -> f64 {
    let mut seconds = report.session_s.clone();
    seconds.sort_by(f64::total_cmp);
    seconds[(seconds.len() * 99 / 100).min(seconds.len() - 1)]
}

fn mean_session_s(report: &Report) -> f64 {
    mean(report.session_s.iter().copied())
}

fn hit_rate(report: &Report, tenant: u16) -> f64 {
    let calls = || report.calls.iter().filter(|call| call.tenant == tenant);
    calls().map(|call| call.hit_blocks).sum::<usize>() as f64
        / calls().map(|call| call.prompt_blocks).sum::<usize>() as f64
}

/// More sessions than the pool holds, for as long as they live.
fn overload() -> Vec<Plan> {
    agents(40, 1).into_iter().map(|plan| Plan { turns: 24, added: 400, ..plan }).collect()
}

fn hold_bound_us(options: BatchShapingOptions, report: &Report) -> u64 {
    options.max_hold_us.max(u64::from(options.max_hold_calls) * report.longest_stay_us)
}

fn longest_hold_us(report: &Report) -> u64 {
    report.calls.iter().map(|call| call.held_us).max().unwrap_or(0)
}

#[test]
fn under_overload_shaping_ends_sessions_earlier_and_none_much_later() {
    let plans = overload();
    let (before, after) = (run(&["lru"], 4_000, &plans), run(&["batch_shaping", "lru"], 4_000, &plans));
    let gain = mean_session_s(&before) / mean_session_s(&after);
    assert!(gain >= 1.5, "mean session time {gain:.2} times shorter");
    assert!(percentile_99(&after) <= percentile_99(&before));
    assert!(longest_hold_us(&after) > 0, "the pool thrashes, so somebody was held");
}

#[test]
fn under_light_load_shaping_changes_nothing() {
    let plans: Vec<Plan> =
        agents(12, 1).into_iter().map(|plan| Plan { start_us: 150 * plan.start_us, ..plan }).collect();
    let (before, after) = (run(&["kv_cache"], 20_000, &plans), run(&["batch_shaping", "kv_cache"], 20_000, &plans));
    let ratio = mean_session_s(&after) / mean_session_s(&before);
    assert!((ratio - 1.0).abs() < 0.01, "{ratio}");
    assert_eq!(longest_hold_us(&after), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn no_hold_is_longer_than_its_bound_and_every_session_ends(
        seed in 0..u64::MAX,
        sessions in 1..40u64,
        capacity in 400..4_000usize,
        max_hold_ms in 0..20_000u64,
        max_hold_calls in prop_oneof![Just(0), 1..20u32],
        with_fairness: bool,
    ) {
        let at = |i: u64, salt: u64| runtime_core::ids::mix(seed ^ i << 8 ^ salt);
        let plans: Vec<Plan> = (0..sessions)
            .map(|i| Plan {
                start_us: at(i, 1) % 5_000_000,
                tenant: (at(i, 2) % 3) as u16,
                agent: (at(i, 3) % 4) as u16,
                turns: 1 + (at(i, 4) % 5) as u32,
                shared: 512,
                added: 16 + (at(i, 5) % 700) as u32,
                output: 1 + (at(i, 6) % 60) as u32,
                gap_us: at(i, 7) % 2_000_000,
            })
            .collect();
        let options = BatchShapingOptions { max_hold_us: max_hold_ms * 1_000, max_hold_calls };
        let mut list: Vec<Box<dyn Policy>> =
            vec![Box::new(BatchShapingPolicy::new(options)), built_in("kv_cache").unwrap()];
        if with_fairness {
            list.push(Box::new(Checked::new(Per::Tenant, capacity, &[])));
        }
        let report = Engine::new(capacity, &Policies::new(list)).run(&plans);
        prop_assert_eq!(report.calls.len() as u32, plans.iter().map(|plan| plan.turns).sum::<u32>());
        prop_assert!(longest_hold_us(&report) <= hold_bound_us(options, &report));
        prop_assert_eq!(report.lazy_steps, 0);
    }
}

#[test]
fn a_bound_shorter_than_the_wait_ends_holds_in_time_and_a_longer_one_lets_sessions_finish_first() {
    let plans = overload();
    let held = |max_hold_us, max_hold_calls| {
        let options = BatchShapingOptions { max_hold_us, max_hold_calls };
        let list: Vec<Box<dyn Policy>> =
            vec![Box::new(BatchShapingPolicy::new(options)), built_in("lru").expect("built in")];
        let report = Engine::new(4_000, &Policies::new(list)).run(&plans);
        assert_eq!(report.calls.len(), 40 * 24);
        let (longest, bound) = (longest_hold_us(&report), hold_bound_us(options, &report));
        assert!((1..=bound).contains(&longest), "{longest} of {bound}");
        longest
    };
    assert_eq!(held(1_500_000, 0), 1_500_000, "the bound is reached");
    assert!(held(1_500_000, 64) > 1_500_000);
}

/// A tenant with many sessions beside one with few, both of which always have calls waiting.
fn two_backlogged_tenants() -> Vec<Plan> {
    let plan = |i: u64| Plan {
        start_us: 0,
        tenant: u16::from(i % 6 == 0),
        agent: 0,
        turns: 5,
        shared: 0,
        added: if i % 6 == 0 { 700 } else { 300 },
        output: 30,
        gap_us: 1_000,
    };
    (0..90).map(plan).collect()
}

#[test]
fn two_backlogged_tenants_get_the_same_within_the_published_bound() {
    let (capacity, plans) = (400, two_backlogged_tenants());
    let checked = Checked::new(Per::Tenant, capacity, &[]);
    let fair = Engine::new(capacity, &checked.policies(&["lru"])).run(&plans);
    let (spread, half) = checked.widest();
    assert!(spread > 0.0 && spread <= half, "{spread} of {half}");
    let (fair_gap, fcfs_gap) = (widest_gap(&fair, 0, 1), widest_gap(&run(&["lru"], capacity, &plans), 0, 1));
    assert!(fair_gap <= 2.0 * half, "{fair_gap} of {}", 2.0 * half);
    assert!(fcfs_gap > 2.0 * half, "the test would notice: {fcfs_gap} of {}", 2.0 * half);
}

#[test]
fn a_tenant_of_twice_the_weight_gets_twice_as_much() {
    let (capacity, plans) = (400, two_backlogged_tenants());
    let checked = Checked::new(Per::Tenant, capacity, &[(1, 2.0)]);
    let report = Engine::new(capacity, &checked.policies(&["lru"])).run(&plans);
    // Until the smaller tenant has nothing left that waits.
    let end = report.backlog.iter().filter(|one| one.1 == 1).map(|one| one.0).max().unwrap();
    let got = |tenant| report.service.iter().filter(|one| one.0 < end && one.1 == tenant).map(|one| one.2).sum::<f64>();
    let ratio = got(1) / got(0);
    assert!((1.6..2.4).contains(&ratio), "{ratio}");
}

#[test]
fn turns_cost_little_throughput() {
    let plans = two_backlogged_tenants();
    let (fcfs, fair) = (run(&["lru"], 400, &plans), run(&["fairness", "lru"], 400, &plans));
    let loss = fair.end_us as f64 / fcfs.end_us as f64 - 1.0;
    assert!(loss <= 0.05, "{loss}");
}

#[test]
fn a_newcomer_gets_no_more_than_those_who_were_there() {
    let mut plans = two_backlogged_tenants();
    for plan in &mut plans {
        plan.start_us = if plan.tenant == 1 { 4_000_000 } else { 0 };
    }
    // It was there once, long before.
    plans.push(Plan { start_us: 0, tenant: 1, turns: 1, ..plans[0] });
    let report = run(&["fairness", "lru"], 400, &plans);
    let during = |one: &&(u64, u16, f64)| (4_000_000..6_000_000).contains(&one.0);
    let got = |tenant| report.service.iter().filter(during).filter(|one| one.1 == tenant).map(|one| one.2).sum::<f64>();
    let share = got(0) / (got(0) + got(1));
    assert!((0.4..0.6).contains(&share), "the old tenant's share after the newcomer: {share}");
}

#[test]
fn a_tenant_that_floods_the_cache_costs_another_at_most_a_point() {
    let calm = |i: u64| Plan {
        start_us: i * 100_000,
        tenant: 0,
        agent: 0,
        turns: 12,
        shared: 512,
        added: 160,
        output: 16,
        gap_us: 1_500_000,
    };
    let flood = |i: u64| Plan { start_us: i * 80_000, tenant: 1, turns: 1, shared: 0, added: 1500, ..calm(0) };
    let alone: Vec<Plan> = (0..4).map(calm).collect();
    let both: Vec<Plan> = (0..4).map(calm).chain((0..250).map(flood)).collect();
    let capacity = 1_600;
    let undisturbed = hit_rate(&run(&["lru"], capacity, &alone), 0);
    let lost_with_lru = undisturbed - hit_rate(&run(&["lru"], capacity, &both), 0);
    let lost_with_fairness = undisturbed - hit_rate(&run(&["fairness", "lru"], capacity, &both), 0);
    assert!(lost_with_fairness <= 0.01, "{lost_with_fairness}");
    assert!(lost_with_lru >= 0.10, "the test would notice: {lost_with_lru}");
}

/// Sessions that come back after a gap to a pool that has lost their prompts meanwhile.
fn gaps() -> Vec<Plan> {
    let plan = |i: u64| Plan { start_us: i * 700_000, turns: 20, added: 300, gap_us: 4_000_000, ..agents(1, 1)[0] };
    (0..6).map(plan).collect()
}

#[test]
fn capacity_that_is_idle_prefills_what_sessions_come_back_to() {
    let (before, after) = (run(&["lru"], 1_200, &gaps()), run(&["speculation", "lru"], 1_200, &gaps()));
    assert!(after.prefilled_ahead > 0);
    let (without, with) = (hit_rate(&before, 0), hit_rate(&after, 0));
    assert!(with > without + 0.05, "{without} -> {with}");
    assert!(mean_session_s(&after) < mean_session_s(&before));
}

#[test]
fn an_engine_that_has_lost_nothing_or_is_never_idle_prefills_nothing() {
    let ample = run(&["speculation", "lru"], 20_000, &gaps());
    assert_eq!(ample.prefilled_ahead, 0);
    let without = run(&["lru"], 20_000, &gaps());
    assert_eq!(ample.end_us, without.end_us);
    // Calls wait at every step but the first and the last ones.
    let busy: Vec<Plan> = two_backlogged_tenants();
    let report = run(&["speculation", "lru"], 400, &busy);
    let computed: f64 = report.service.iter().map(|one| one.2).sum();
    assert!(f64::from(report.prefilled_ahead) < 0.01 * computed, "{} of {computed}", report.prefilled_ahead);
}

#[test]
fn each_policy_is_refused_by_name_where_any_event_that_it_declares_is_missing() {
    for name in BUILT_IN {
        let policies = policies(&[name]);
        let needed = policies.wire(Needs::ALL).unwrap();
        for key in needed.keys() {
            let missing = Needs::from_key(key).unwrap();
            let error = policies.wire(Needs::ALL.without(missing)).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(missing.names().next().unwrap()), "{error}");
        }
        assert_eq!(policies.wire(needed), Ok(needed), "{name} needs nothing that it does not declare");
        assert_eq!(needed == Needs::NONE, ["kv_cache", "lru"].contains(&name), "{name}");
    }
}

#[test]
fn every_combination_keeps_every_contract() {
    let capacity = 1_500;
    let plans: Vec<Plan> = agents(18, 3).into_iter().map(|plan| Plan { turns: 4, ..plan }).collect();
    for bits in 0..1u32 << SCHEDULING.len() {
        for cache in ["kv_cache", "lru"] {
            let mut names: Vec<&str> =
                (0..SCHEDULING.len()).filter(|i| bits & 1 << i != 0).map(|i| SCHEDULING[i]).collect();
            names.push(cache);
            // In whatever order they are named.
            if bits % 2 == 1 {
                names.reverse();
            }
            let mut list: Vec<Box<dyn Policy>> = Vec::new();
            for name in &names {
                list.push(match *name {
                    "fairness" => Box::new(Checked::new(Per::Tenant, capacity, &[])),
                    name => built_in(name).unwrap(),
                });
            }
            let report = Engine::new(capacity, &Policies::new(list)).run(&plans);
            assert_eq!(report.calls.len(), 18 * 4, "{names:?}: no call is lost");
            assert_eq!(report.lazy_steps, 0, "{names:?}: something runs while something waits");
            assert!(longest_hold_us(&report) <= hold_bound_us(BatchShapingOptions::default(), &report), "{names:?}");
            if !names.contains(&"batch_shaping") {
                assert_eq!(longest_hold_us(&report), 0, "{names:?}: only batch_shaping holds");
            }
            if !names.contains(&"speculation") {
                assert_eq!(report.prefilled_ahead, 0, "{names:?}: only speculation prefills");
            }
        }
    }
}
