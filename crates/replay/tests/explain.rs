//! What `agentrt explain` tells is true: watching changes nothing, figures add up, learning is quick.

use std::collections::HashMap;

use replay::calibration::{outcomes, Reliability, Sample};
use replay::explain::{explain, guesses, ExplainOptions};
use replay::generate::{generate, GenerateOptions};
use replay::latency::LatencyModel;
use replay::schedule::{EventKind, Order, Schedule, ScheduleOptions};
use replay::sweep::Capacity;
use replay::trace::Trace;
use replay::{policies, sim};

fn made(name: &str, sessions: usize, seed: u64, agents: Option<usize>) -> Trace {
    generate(name, &GenerateOptions { sessions, seed, agents }).unwrap()
}

fn options() -> ExplainOptions {
    ExplainOptions {
        order: Order::Closed,
        sessions: 8,
        seed: 0,
        capacity: Capacity::Fraction(0.15),
        model: LatencyModel::LLAMA_3_1_8B_H100,
    }
}

fn schedule(trace: &Trace, order: Order, sessions: usize, fraction: f64) -> Schedule {
    let capacity_blocks = Capacity::Fraction(fraction).blocks(trace.mean_session_blocks(), sessions);
    let model = LatencyModel::LLAMA_3_1_8B_H100;
    Schedule::new(trace, ScheduleOptions { order, sessions, seed: 0, capacity_blocks, model }).unwrap()
}

fn hits(trace: &Trace, schedule: &Schedule, policy: &str) -> Vec<u32> {
    sim::run(trace, schedule, policies::build(policy, trace, schedule).unwrap().as_mut(), &mut |_| {}).call_hits
}

#[test]
fn a_watched_run_hits_what_an_unwatched_one_hits() {
    for name in ["selector_chat", "research_tree"] {
        let trace = made(name, 25, 1, None);
        let told = explain(&trace, &options()).unwrap();
        let schedule = schedule(&trace, Order::Closed, 8, 0.15);
        for (policy, rate) in
            [("agentrt", told.hit_rate.agentrt), ("lru", told.hit_rate.lru), ("min", told.hit_rate.min)]
        {
            let mut unwatched = policies::build(policy, &trace, &schedule).unwrap();
            assert_eq!(
                sim::run(&trace, &schedule, unwatched.as_mut(), &mut |_| {}).hit_rate(),
                rate,
                "{name} {policy}"
            );
        }
    }
}

#[test]
fn every_prompt_block_was_found_or_never_there_or_evicted() {
    let trace = made("selector_chat", 25, 1, None);
    let told = explain(&trace, &options()).unwrap();
    let (mut evicted, mut prompts) = (0, 0);
    for of in &told.agents {
        let accounted = of.hit_blocks.agentrt + of.never_seen_blocks + of.evicted_too_early_blocks;
        assert_eq!(accounted, of.prompt_blocks, "{}", of.agent);
        assert!(of.kept_too_long_block_s <= of.held_block_s && of.held_block_s > 0.0, "{}", of.agent);
        // What nobody had seen, nobody can have.
        assert!(of.hit_blocks.min + of.never_seen_blocks <= of.prompt_blocks, "{}", of.agent);
        evicted += of.evicted_too_early_blocks;
        prompts += of.prompt_blocks;
    }
    assert!(evicted > 0, "a pool under pressure evicts something too early");
    let windows = &told.windows;
    assert_eq!(windows.last().unwrap().calls, told.calls);
    let of_all = told.agents.iter().map(|of| of.hit_blocks.agentrt).sum::<u64>() as f64 / prompts as f64;
    assert!((of_all - told.hit_rate.agentrt).abs() < 1e-12);
}

#[test]
fn learned_curves_lie_near_the_observed_ones() {
    let trace = made("selector_chat", 60, 1, None);
    let told = explain(&trace, &options()).unwrap();
    for of in &told.agents {
        let silence = &of.silence;
        assert!(silence.ended > 20 && silence.censored < silence.ended, "{}", of.agent);
        assert!(silence.observed.windows(2).all(|w| w[0].1 >= w[1].1));
        let at = |curve: &[(f64, f64)]| curve.iter().find(|point| point.0 > 2.0).unwrap().1;
        let (learned, observed) = (at(&silence.learned), at(&silence.observed));
        assert!((learned - observed).abs() < 0.15, "{}: {learned} {observed}", of.agent);
    }
    for edge in told.transitions.iter().filter(|edge| edge.observed > 0.5) {
        assert!((edge.learned - edge.observed).abs() < 0.2, "{edge:?}");
    }
    for from in &trace.agents {
        let sum: f64 = told.transitions.iter().filter(|edge| edge.from == *from).map(|edge| edge.learned).sum();
        assert!((sum - 1.0).abs() < 0.02, "{from}: {sum}");
    }
}

#[test]
fn a_superseded_tail_is_told_apart_from_a_live_one() {
    // On a further round its roles start afresh three times in ten.
    let trace = made("pipeline", 40, 1, None);
    let told = explain(&trace, &ExplainOptions { capacity: Capacity::Fraction(0.8), ..options() }).unwrap();
    assert!(told.tails[1].used_again < 0.7 * told.tails[0].used_again, "{:?}", told.tails);
}

#[test]
fn many_agents_are_told_as_twelve_and_the_rest() {
    let trace = made("many_agents", 12, 0, Some(200));
    let told = explain(&trace, &options()).unwrap();
    assert_eq!(told.agents.len(), 13);
    assert_eq!(told.agents[12].agent, format!("{} others", trace.agents.len() - 12));
    assert_eq!(told.agents.iter().map(|of| of.calls).sum::<u64>(), told.calls);
}

#[test]
fn the_same_replay_tells_the_same() {
    let trace = made("debate", 12, 3, None);
    let told = || serde_json::to_string(&explain(&trace, &options()).unwrap()).unwrap();
    assert_eq!(told(), told());
}

#[test]
fn reliability_of_known_predictions() {
    let true_ones = Reliability::of((0..1000).map(|i| (0.25, i % 4 == 0)));
    assert!(true_ones.ece < 1e-9 && (true_ones.brier - 0.1875).abs() < 1e-9, "{true_ones:?}");
    let boastful = Reliability::of((0..1000).map(|i| (0.95, i % 4 == 0)));
    assert!((boastful.ece - 0.7).abs() < 1e-6, "{boastful:?}");
    assert_eq!((boastful.bins[9].n, boastful.bins[2].n), (1000, 0));
    let nothing = Reliability::of([]);
    assert_eq!((nothing.n, nothing.ece, nothing.brier), (0, 0.0, 0.0));
}

#[test]
fn outcomes_are_what_a_search_forward_finds() {
    let trace = made("debate", 6, 2, None);
    let schedule = schedule(&trace, Order::Closed, 3, 0.5);
    let samples: Vec<Sample> = (0..schedule.events.len() as u32)
        .map(|event| Sample {
            event,
            block: (event * 7919) % trace.n_blocks,
            horizon_us: u64::from(event % 13) * 1_500_000,
            probability: 0.5,
        })
        .collect();
    let end_us = schedule.events.last().unwrap().time_us;
    for (sample, known) in samples.iter().zip(outcomes(&trace, &schedule, &samples)) {
        let until_us = schedule.events[sample.event as usize].time_us + sample.horizon_us;
        let used = schedule.events[sample.event as usize + 1..].iter().any(|event| {
            event.kind == EventKind::Start
                && event.time_us <= until_us
                && trace.blocks(trace.calls[event.call as usize].prompt).any(|block| block == sample.block)
        });
        assert_eq!(known, (until_us <= end_us).then_some(used), "{sample:?}");
    }
}

/// Share of right guesses per stretch of 50.
fn by_fifty(trace: &Trace, from: usize, schedule: &Schedule) -> Vec<f64> {
    let right: Vec<bool> = guesses(trace, schedule)
        .iter()
        .filter(|guess| trace.calls[guess.call as usize].session as usize >= from)
        .map(|guess| guess.foreseen == Some(trace.calls[guess.call as usize].agent))
        .collect();
    right.chunks_exact(50).map(|chunk| chunk.iter().filter(|&&r| r).count() as f64 / 50.0).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn fifty_transitions_teach_what_a_whole_trace_teaches_to_five_points() {
    for name in ["pipeline", "debate", "selector_chat", "research_tree", "coding_team"] {
        let (mut own, mut offline, mut judged) = (0.0, 0.0, 0.0);
        for seed in 0..6 {
            let trace = made(name, 40, seed, None);
            let told = explain(&trace, &options()).unwrap().next_agent.early;
            own += told.agentrt * told.transitions as f64;
            offline += told.offline * told.transitions as f64;
            judged += told.transitions as f64;
        }
        assert!(own / judged > offline / judged - 0.05, "{name}: {} {}", own / judged, offline / judged);
    }
}

/// With `--nocapture` it prints what docs/cachesage.md quotes.
#[test]
#[expect(clippy::print_stdout, reason = "prints the figures that it asserts")]
fn a_new_order_of_agents_is_learned_within_200_calls_and_never_costs_more_than_lru() {
    let mut after: HashMap<&str, Vec<f64>> = HashMap::new();
    for seed in 0..8 {
        let trace = made("drift", 120, seed, None);
        // One session at a time: the change comes at once.
        let alone = schedule(&trace, Order::Open, 1, 0.5);
        let shares = by_fifty(&trace, 60, &alone);
        after.entry("at first").or_default().push(shares[0]);
        after.entry("learned").or_default().push(mean(&shares[3..5]));
        after.entry("in the end").or_default().push(mean(&shares[8..]));
        let first: Vec<u32> = shares[..8].iter().map(|share| (share * 100.0) as u32).collect();
        println!("seed {seed}: % foreseen, 50 calls at a time after the change: {first:?}");
        // Many at a time: hits while it learns.
        let busy = schedule(&trace, Order::Open, 8, 0.1);
        let (own, lru) = (hits(&trace, &busy, "agentrt"), hits(&trace, &busy, "lru"));
        let (mut blocks, mut ahead, mut calls) = (0.0, 0.0, 0);
        for event in busy.events.iter().filter(|event| event.kind == EventKind::Start) {
            let call = &trace.calls[event.call as usize];
            if call.session >= 60 && calls < 200 {
                calls += 1;
                blocks += trace.blocks_in(call.prompt) as f64;
                ahead += f64::from(own[event.call as usize]) - f64::from(lru[event.call as usize]);
            }
        }
        println!("seed {seed}: {:+.1} points against LRU in the 200 calls after it", ahead / blocks * 100.0);
        assert!(ahead / blocks > -0.005, "seed {seed}: {} against LRU", ahead / blocks);
    }
    let share = |when: &str| mean(&after[when]);
    let shares = ["at first", "learned", "in the end"].map(|when| format!("{when} {:.1} %", share(when) * 100.0));
    println!("{}", shares.join(", "));
    assert!(share("at first") < 0.6 * share("in the end"), "nothing has changed: {after:?}");
    assert!(share("learned") >= 0.9 * share("in the end"), "{after:?}");
}

/// Who spoke most often after the last two speakers, and after the last one, in some sessions of a trace.
#[derive(Default)]
struct Order2(HashMap<(Option<u16>, u16), HashMap<u16, u32>>);

impl Order2 {
    fn of(trace: &Trace, sessions: std::ops::Range<usize>) -> Self {
        let mut model = Self::default();
        for session in &trace.sessions[sessions] {
            let agents: Vec<u16> = session.calls.iter().map(|&call| trace.calls[call as usize].agent).collect();
            for at in 1..agents.len() {
                for before in [at.checked_sub(2).map(|at| agents[at]), None] {
                    *model.0.entry((before, agents[at - 1])).or_default().entry(agents[at]).or_default() += 1;
                }
            }
        }
        model
    }

    fn guess(&self, before: Option<u16>, last: u16) -> Option<u16> {
        let row = self.0.get(&(before, last)).or_else(|| self.0.get(&(None, last)))?;
        row.iter().max_by_key(|&(&agent, &count)| (count, std::cmp::Reverse(agent))).map(|(&agent, _)| agent)
    }
}

/// How soon can a new order be known where sessions that began in the old one go on in it? With `--nocapture` it prints
/// what docs/cachesage.md quotes.
#[test]
#[ignore = "prints figures; what it asserts is a property of the workload"]
#[expect(clippy::print_stdout, reason = "prints the figures that it asserts")]
fn a_new_order_comes_to_interleaved_sessions_little_by_little() {
    const STRETCH: usize = 50;
    for sessions in [1, 4, 16] {
        // agentrt; a model that switches for all sessions with the first new one; one that knows of each session which order it
        // goes by; agentrt in new sessions alone; the share of calls in new sessions.
        let mut sums = vec![[0.0; 5]; 16];
        let mut new_calls = vec![(0.0, 0.0); 16];
        for seed in 0..20 {
            let trace = made("drift", 120, seed, None);
            let (old, new) = (Order2::of(&trace, 0..60), Order2::of(&trace, 60..120));
            let guesses = guesses(&trace, &schedule(&trace, Order::Open, sessions, 0.5));
            let of = |call: u32| &trace.calls[call as usize];
            let from = guesses.iter().position(|guess| of(guess.call).session >= 60).unwrap();
            let mut seen = 0;
            for (at, guess) in guesses[from..].iter().enumerate() {
                let call = of(guess.call);
                let calls = &trace.sessions[call.session as usize].calls;
                let back = |n: u32| call.step.checked_sub(n).map(|step| of(calls[step as usize]).agent);
                let (before, last, is_new) = (back(2), back(1).unwrap(), call.session >= 60);
                let right = |guessed: Option<u16>| f64::from(u8::from(guessed == Some(call.agent)));
                let switched = right(new.guess(before, last));
                let knows = if is_new { switched } else { right(old.guess(before, last)) };
                if let Some(sum) = sums.get_mut(at / STRETCH) {
                    let told = [right(guess.foreseen), switched, knows, f64::from(u8::from(is_new)), 1.0];
                    sum.iter_mut().zip(told).for_each(|(sum, told)| *sum += told);
                }
                if is_new {
                    if let Some(sum) = new_calls.get_mut(seen / STRETCH) {
                        (sum.0, sum.1) = (sum.0 + right(guess.foreseen), sum.1 + 1.0);
                    }
                    seen += 1;
                }
            }
        }
        println!("{sessions} sessions, % of 50 calls each after the first call of a new session:");
        let percent =
            |values: &mut dyn Iterator<Item = f64>| values.map(|v| (v * 100.0).round() as u32).collect::<Vec<_>>();
        for (which, name) in
            ["agentrt", "switches at once", "knows each session", "calls of new sessions"].iter().enumerate()
        {
            println!("  {name}: {:?}", percent(&mut sums.iter().map(|sum| sum[which] / sum[4])));
        }
        println!(
            "  agentrt, calls of new sessions alone: {:?}",
            percent(&mut new_calls.iter().map(|sum| sum.0 / sum.1))
        );
    }
}
