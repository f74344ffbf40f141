//! Waiting times against closed forms: one call at a time, Poisson arrivals, first come first served.

mod support;

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Exp1, LogNormal};
use replay::trace::{Call, Clock, TraceBuilder};
use simulator::{mean, simulate, Arrivals, EngineOptions, Workload};

/// Prompt tokens that last one second: fine enough that rounding times to tokens does not show.
const TOKENS_PER_S: f64 = 1e6;

/// Mean wait in seconds of `n` calls with service times drawn by `service_s`, arriving at rate `load`, over runs with
/// several seeds.
fn mean_wait_s(n: usize, load: f64, service_s: impl Fn(&mut StdRng) -> f64) -> f64 {
    let run = |seed: u64| {
        let mut rng = StdRng::seed_from_u64(seed);
        // No prompt fills a block.
        let mut builder = TraceBuilder::new("queue", u32::MAX, Clock::None);
        let agent = builder.agent("customer").unwrap();
        let mut starts = Vec::with_capacity(n);
        let mut at_s = 0.0;
        for call in 0..n {
            let session = builder.session(&call.to_string());
            let prompt_tokens = (service_s(&mut rng) * TOKENS_PER_S).round().max(1.0) as u32;
            let call = Call { session, agent, prompt_tokens, output_tokens: 1, ..Call::default() };
            builder.push(call, &[], &[]).unwrap();
            at_s += -(1.0 - rng.random::<f64>()).ln() / load;
            starts.push((at_s * 1e6) as u64);
        }
        let gaps = vec![0.0; n];
        let workload = Workload::new(Arc::new(builder.finish()), &gaps, Arrivals::Open(starts));
        let options = EngineOptions {
            token_budget: u32::MAX,
            max_running: 1,
            model: support::per_token(1.0 / TOKENS_PER_S),
            ..EngineOptions::new(1)
        };
        let outcome = simulate(&workload, &options, Vec::new(), &mut |_| {}).unwrap();
        let waits: Vec<f64> =
            outcome.calls.iter().map(|call| (call.admitted_us - call.arrived_us) as f64 / 1e6).collect();
        mean(&waits)
    };
    mean(&(0..4).map(run).collect::<Vec<_>>())
}

fn assert_within_2_percent(found: f64, expected: f64) {
    let error = found / expected - 1.0;
    assert!(error.abs() < 0.02, "waited {found:.4} s, closed form {expected:.4} s, {:+.2} %", 100.0 * error);
}

#[test]
fn exponential_service_waits_as_long_as_m_m_1_says() {
    for load in [0.3, 0.6] {
        let found = mean_wait_s(200_000, load, |rng| Exp1.sample(rng));
        assert_within_2_percent(found, load / (1.0 - load));
    }
}

#[test]
fn general_service_waits_as_long_as_pollaczek_and_khinchine_say() {
    // Log-normal with mean 1: the second moment is exp(sigma^2).
    let sigma: f64 = 0.8;
    let service = LogNormal::new(-sigma * sigma / 2.0, sigma).unwrap();
    for load in [0.3, 0.6] {
        let found = mean_wait_s(200_000, load, |rng| service.sample(rng));
        assert_within_2_percent(found, load * (sigma * sigma).exp() / (2.0 * (1.0 - load)));
    }
    // Constant service waits half as long as exponential.
    let found = mean_wait_s(100_000, 0.6, |_| 1.0);
    assert_within_2_percent(found, 0.6 / (2.0 * 0.4));
}
