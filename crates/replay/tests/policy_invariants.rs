//! What every policy promises, checked around each of its evictions.

mod policy_support;

use policy_support::{random_trace, schedule, Shape};
use proptest::prelude::*;
use replay::policies;
use replay::policy::{CachePolicy, CallView};
use replay::pool::Pool;
use replay::schedule::Order;
use replay::sim;

/// Forwards to a policy and checks the pool around each eviction.
struct Checked(Box<dyn CachePolicy>);

impl CachePolicy for Checked {
    fn call_start(&mut self, call: &CallView<'_>, pool: &Pool) {
        self.0.call_start(call, pool);
    }

    fn evict(&mut self, n: usize, now_us: u64, pool: &mut Pool) {
        let blocks = 0..pool.n_blocks() as u32;
        let in_use: Vec<u32> = blocks.clone().filter(|&b| pool.is_resident(b) && pool.is_pinned(b)).collect();
        let resident = pool.resident();
        self.0.evict(n, now_us, pool);
        assert!(pool.is_prefix_closed(), "a block lost its parent");
        assert!(in_use.iter().all(|&b| pool.is_resident(b)), "a block in use was evicted");
        let evicted = resident - pool.resident();
        assert!(evicted <= n, "more evicted than asked for");
        assert!(evicted == n || !blocks.clone().any(|b| pool.is_evictable(b)), "evicted {evicted} of {n}");
    }

    fn inserted(&mut self, call: &CallView<'_>, blocks: &[u32], pool: &Pool) {
        assert!(pool.resident() <= pool.capacity());
        self.0.inserted(call, blocks, pool);
    }

    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], released: &[u32], pool: &Pool) {
        self.0.call_finish(call, output, released, pool);
    }

    fn call_bypassed(&mut self, call: &CallView<'_>) {
        self.0.call_bypassed(call);
    }

    fn session_end(&mut self, session: u32, now_us: u64) {
        self.0.session_end(session, now_us);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn evictions_are_prefix_closed_complete_and_spare_blocks_in_use(
        seed in any::<u64>(),
        sessions in 1usize..8,
        labels in 1u32..5,
        longest in 2usize..12,
        answer in 0usize..5,
        concurrent in 1usize..6,
        spare in 0usize..40,
        order in prop_oneof![Just(Order::Closed), Just(Order::Open), Just(Order::File)],
    ) {
        let trace = random_trace(seed, Shape { sessions, calls: 80, agents: 4, labels, longest, answer });
        // Sometimes smaller than the largest call, which then bypasses the cache.
        let schedule = schedule(&trace, order, concurrent, longest / 2 + 1 + spare, seed);
        for name in policies::names() {
            let mut policy = Checked(policies::build(name, &trace, &schedule).unwrap());
            let outcome = sim::run(&trace, &schedule, &mut policy, &mut |_| {});
            prop_assert_eq!(outcome.forced_evictions, 0, "{} named too few victims", name);
        }
    }
}

#[test]
fn runs_repeat_exactly() {
    let shape = Shape { sessions: 12, calls: 400, agents: 5, labels: 3, longest: 20, answer: 4 };
    let trace = random_trace(7, shape);
    let schedule = schedule(&trace, Order::Closed, 4, 120, 7);
    for name in policies::names() {
        let run = || {
            let mut policy = policies::build(name, &trace, &schedule).unwrap();
            sim::run(&trace, &schedule, policy.as_mut(), &mut |_| {})
        };
        let outcome = run();
        assert_eq!(outcome, run(), "{name}");
        assert!(outcome.evictions > 1000 && outcome.hit_blocks > 0, "{name}: {outcome:?}");
    }
}

#[test]
fn an_unknown_name_is_refused_with_the_known_ones() {
    let trace = random_trace(1, Shape { sessions: 1, calls: 1, agents: 1, labels: 1, longest: 1, answer: 0 });
    let schedule = schedule(&trace, Order::File, 1, 1, 0);
    let Err(error) = policies::build("belady", &trace, &schedule) else { panic!("accepted") };
    let message = error.to_string();
    assert!(message.contains("belady") && policies::names().iter().all(|n| message.contains(n)), "{message}");
}
