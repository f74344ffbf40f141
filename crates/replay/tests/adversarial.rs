//! Workloads made to mislead and engines that lie: agentrt stays near LRU, and a sabotaged agentrt within the guard's bound.

mod policy_support;

use policy_support::TraceBuilder;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replay::generate::{generate, GenerateOptions};
use replay::host::HostTier;
use replay::latency::LatencyModel;
use replay::policies;
use replay::policy::{CachePolicy, CallView};
use replay::pool::Pool;
use replay::schedule::{Order, Schedule, ScheduleOptions};
use replay::sim;
use replay::sweep::Capacity;
use replay::trace::Trace;

/// What a policy is lied to about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    Nothing,
    /// Every call is a session of its own.
    Sessions,
    /// Agents are drawn at random.
    Agents,
    /// Every session is said to be over after every call.
    Ends,
    /// It is always the same time.
    Clock,
    /// All of it but ends.
    Everything,
}

struct LiedTo(Box<dyn CachePolicy>, Lie);

impl LiedTo {
    fn told<'a>(&self, call: &CallView<'a>) -> CallView<'a> {
        let mut told = *call;
        let lie = |one| self.1 == one || self.1 == Lie::Everything;
        if lie(Lie::Sessions) {
            (told.session, told.step) = (call.call, 0);
        }
        if lie(Lie::Agents) {
            told.agent = (call.call.wrapping_mul(2_654_435_761) >> 24) as u16;
        }
        told.time_us = self.now(call.time_us);
        told
    }

    fn now(&self, now_us: u64) -> u64 {
        if matches!(self.1, Lie::Clock | Lie::Everything) {
            1
        } else {
            now_us
        }
    }
}

impl CachePolicy for LiedTo {
    fn call_queued(&mut self, call: &CallView<'_>, pool: &Pool) {
        self.0.call_queued(&self.told(call), pool);
    }

    fn call_start(&mut self, call: &CallView<'_>, pool: &Pool) {
        self.0.call_start(&self.told(call), pool);
    }

    fn evict(&mut self, n: usize, now_us: u64, pool: &mut Pool) {
        self.0.evict(n, self.now(now_us), pool);
    }

    fn inserted(&mut self, call: &CallView<'_>, blocks: &[u32], pool: &Pool) {
        self.0.inserted(&self.told(call), blocks, pool);
    }

    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], released: &[u32], pool: &Pool) {
        self.0.call_finish(&self.told(call), output, released, pool);
        if self.1 == Lie::Ends {
            self.0.session_end(call.session, call.time_us);
        }
    }

    fn call_bypassed(&mut self, call: &CallView<'_>) {
        self.0.call_bypassed(&self.told(call));
    }

    fn prefetch(&mut self, now_us: u64, budget: usize, pool: &Pool, host: &HostTier) -> Vec<Vec<u32>> {
        self.0.prefetch(self.now(now_us), budget, pool, host)
    }
}

/// Percent of prompt blocks found under a policy, and under LRU, in one schedule.
fn rates(policy: &str, trace: &Trace, capacity_blocks: usize, lie: Lie, seed: u64) -> (f64, f64) {
    let model = LatencyModel::LLAMA_3_1_8B_H100;
    let options = ScheduleOptions { order: Order::Closed, sessions: 16, seed, capacity_blocks, model };
    let schedule = Schedule::new(trace, options).unwrap();
    let rate = |policy: &mut dyn CachePolicy| 100.0 * sim::run(trace, &schedule, policy, &mut |_| {}).hit_rate();
    let mut told = LiedTo(policies::build(policy, trace, &schedule).unwrap(), lie);
    (rate(&mut told), rate(policies::build("lru", trace, &schedule).unwrap().as_mut()))
}

/// Every session sends one prompt, its own, over and over, in turn: LRU hits nothing below the whole working set.
fn cyclic_scan(sessions: usize, rounds: usize) -> Trace {
    let mut builder = TraceBuilder::new(sessions, 1);
    for _ in 0..rounds {
        for session in 0..sessions {
            let prompt: Vec<u32> = (0..20).map(|i| session as u32 * 100 + i).collect();
            builder.call(session, 0, &prompt, &[]);
        }
    }
    builder.build()
}

/// Agents that speak once; some share a system prompt.
fn one_shot_agents(calls: usize) -> Trace {
    let mut rng = StdRng::seed_from_u64(5);
    let mut builder = TraceBuilder::new(calls, calls.min(60_000));
    for call in 0..calls {
        let system = rng.random_range(0..20u32);
        let mut prompt: Vec<u32> = (0..8).map(|i| system * 10 + i).collect();
        prompt.extend((0..rng.random_range(2..12)).map(|i| 1000 + call as u32 * 20 + i));
        builder.call(call, call as u16, &prompt, &[5, 6]);
    }
    builder.build()
}

/// Who speaks next, and how much of the history is kept, is drawn anew each time.
fn random_routing(sessions: usize, calls: usize) -> Trace {
    let mut rng = StdRng::seed_from_u64(6);
    let mut builder = TraceBuilder::new(sessions, 8);
    let mut histories = vec![vec![Vec::new(); 8]; sessions];
    for call in 0..calls {
        let (session, agent) = (rng.random_range(0..sessions), rng.random_range(0..8usize));
        let history: &mut Vec<u32> = &mut histories[session][agent];
        if rng.random_bool(0.3) {
            history.truncate(rng.random_range(0..=history.len()));
        }
        history.extend((0..rng.random_range(1..6)).map(|i| 1000 + call as u32 * 8 + i));
        history.truncate(60);
        builder.call(session, agent as u16, history, &[]);
    }
    builder.build()
}

#[test]
fn misleading_workloads_cost_half_a_point_against_lru_and_lies_one_and_a_half() {
    let chat = generate("selector_chat", &GenerateOptions { sessions: 60, seed: 3, agents: None }).unwrap();
    let team = generate("coding_team", &GenerateOptions { sessions: 30, seed: 3, agents: None }).unwrap();
    let workloads = [
        ("cyclic scan", cyclic_scan(16, 150)),
        ("one-shot agents", one_shot_agents(2_000)),
        ("random routing", random_routing(40, 4_000)),
        ("selector_chat", chat),
        ("coding_team", team),
    ];
    for (name, trace) in &workloads {
        for fraction in [0.05, 0.10, 0.25, 0.5] {
            let capacity = Capacity::Fraction(fraction).blocks(trace.mean_session_blocks(), 16).max(40);
            for lie in [Lie::Nothing, Lie::Sessions, Lie::Agents, Lie::Ends, Lie::Clock, Lie::Everything] {
                let lost = [0, 1, 2].map(|seed| {
                    let policy = if lie == Lie::Ends { "agentrt-told-ends" } else { "agentrt" };
                    let (ours, lru) = rates(policy, trace, capacity, lie, seed);
                    lru - ours
                });
                let mean = lost.iter().sum::<f64>() / 3.0;
                // A lie costs what the guard loses before it has seen enough: some ten prompts, of the 800 that there are.
                let (most, on_average) = if lie == Lie::Nothing { (0.5, 0.5) } else { (2.0, 1.5) };
                let within = lost.iter().all(|&lost| lost <= most) && mean <= on_average;
                assert!(within, "{name}, {capacity} blocks, {lie:?}: {lost:.2?} points below LRU in three schedules");
            }
        }
    }
}

#[test]
fn the_guard_bounds_what_a_policy_turned_upside_down_loses() {
    let trace = generate("selector_chat", &GenerateOptions { sessions: 400, seed: 1, agents: None }).unwrap();
    let capacity = Capacity::Fraction(0.25).blocks(trace.mean_session_blocks(), 16);
    let (guarded, lru) = rates("agentrt-sabotaged", &trace, capacity, Lie::Nothing, 0);
    let (unguarded, _) = rates("agentrt-sabotaged-no-guard", &trace, capacity, Lie::Nothing, 0);
    let calls = trace.calls.len() as f64;
    // Phases of trust times 13 prompts each, as a share of all prompts, and twice that for prompts longer than the mean.
    let bound = 2.0 * 13.0 * ((1.0 + calls / 1024.0).log2() + 1.0) / calls * 100.0;
    assert!(lru - unguarded > 2.0 * bound, "the sabotage does no harm: {unguarded:.1} against {lru:.1}");
    assert!(lru - guarded < bound, "{guarded:.1} against {lru:.1}, at most {bound:.1} points were to be lost");
}
