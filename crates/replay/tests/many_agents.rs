//! What the bound on learned state costs when there are far more agents than rows: the policy against its twin whose
//! tables hold every agent.

extern crate runtime_core_unbounded as runtime_core;

use replay::{host, policy, pool, schedule, trace};

use replay::generate::{generate, GenerateOptions};
use replay::latency::LatencyModel;
use replay::policies::{self, AgentRt};
use replay::policy::CachePolicy;
use replay::schedule::{Order, Schedule, ScheduleOptions};
use replay::sim;
use replay::sweep::Capacity;

/// The adapter once more, around the unbounded core.
#[allow(dead_code, unreachable_pub, reason = "the tests use a part of the adapter")]
#[path = "../src/policies/agentrt.rs"]
mod agentrt;
#[allow(dead_code, unreachable_pub, reason = "no host tier here")]
#[path = "../src/policies/both_tiers.rs"]
mod both_tiers;

use agentrt as unbounded;

/// Points of hit rate above LRU: bounded, unbounded.
fn gains(name: &str, agents: usize, sessions: usize, concurrent: usize, fraction: f64) -> (f64, f64) {
    let trace = generate(name, &GenerateOptions { sessions, seed: 0, agents: Some(agents) }).unwrap();
    let capacity_blocks = Capacity::Fraction(fraction).blocks(trace.mean_session_blocks(), concurrent);
    let model = LatencyModel::LLAMA_3_1_8B_H100;
    let options = ScheduleOptions { order: Order::Closed, sessions: concurrent, seed: 0, capacity_blocks, model };
    let schedule = Schedule::new(&trace, options).unwrap();
    let rate = |policy: &mut dyn CachePolicy| sim::run(&trace, &schedule, policy, &mut |_| {}).hit_rate() * 100.0;
    let lru = rate(policies::build("lru", &trace, &schedule).unwrap().as_mut());
    let bounded = policies::agentrt::config("agentrt").unwrap();
    let bounded =
        rate(&mut AgentRt::new(capacity_blocks, bounded, policies::agentrt::HostUse::of("agentrt"), &trace, &schedule));
    let unbounded = unbounded::config("agentrt").unwrap();
    let unbounded = rate(&mut unbounded::AgentRt::new(
        capacity_blocks,
        unbounded,
        unbounded::HostUse::of("agentrt"),
        &trace,
        &schedule,
    ));
    (bounded - lru, unbounded - lru)
}

/// The twin's tables take megabytes, and are made on the stack where nothing is optimised.
fn with_room<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::Builder::new().stack_size(256 << 20).spawn(run).unwrap().join().unwrap()
}

/// Not the same to the block: in the small table of transitions contexts share sets, and counts of a set fade together.
#[test]
fn where_everything_fits_the_twins_gain_the_same() {
    let (mut bounded, mut unbounded) = (0.0, 0.0);
    for (name, agents) in [("pipeline", 6), ("debate", 5), ("selector_chat", 6)] {
        for fraction in [0.1, 0.2] {
            let (one, two) = with_room(move || gains(name, agents, 30, 8, fraction));
            (bounded, unbounded) = (bounded + one, unbounded + two);
        }
    }
    assert!((bounded / unbounded - 1.0).abs() < 0.02, "{bounded} and {unbounded} points in all");
}

#[test]
fn twenty_thousand_bytes_keep_nine_tenths_of_the_gain_with_many_agents() {
    let (bounded, unbounded) = with_room(|| gains("many_agents", 1_000, 200, 16, 0.25));
    assert!(unbounded > 1.0, "nothing to keep: {unbounded}");
    assert!(bounded >= 0.9 * unbounded, "{bounded} of {unbounded} points");
}

/// `cargo test -p replay --release --test many_agents -- --ignored --nocapture` prints the table of docs/cachesage.md.
#[test]
#[ignore = "a figure, minutes"]
#[expect(clippy::print_stdout, reason = "prints a table")]
fn the_figure_at_ten_thousand_agents() {
    for fraction in [0.05, 0.10, 0.25] {
        let (bounded, unbounded) = with_room(move || gains("many_agents", 10_000, 2_000, 16, fraction));
        println!("pool {:2.0} %: {bounded:+.2} of {unbounded:+.2} points", fraction * 100.0);
    }
}
