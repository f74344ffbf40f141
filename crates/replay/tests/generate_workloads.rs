//! What the generators promise: seeded, of the size asked for, valid chains.

use proptest::prelude::*;
use replay::generate::{self, GenerateOptions};
use replay::trace::{ReadOptions, Trace, NO_BLOCK};

fn make(name: &str, sessions: usize, seed: u64) -> Trace {
    let options = GenerateOptions { sessions, seed, agents: None };
    generate::generate(name, &options).unwrap()
}

/// Every call's blocks are a chain from a root, ids count up, steps and parents are in order.
fn assert_consistent(trace: &Trace) {
    let mut highest = 0;
    for (index, call) in trace.calls.iter().enumerate() {
        let mut previous = NO_BLOCK;
        for block in trace.blocks(call.prompt).chain(trace.blocks(call.output)) {
            assert_eq!(trace.parents[block as usize], previous, "call {index}");
            assert!(block <= highest, "block {block} is not numbered by first appearance");
            highest = highest.max(block + 1);
            previous = block;
        }
        assert_eq!(trace.blocks_in(call.prompt) as u32, call.prompt_tokens / trace.block_size);
        assert!(call.parent_step.is_none_or(|parent| parent < call.step));
        assert_eq!(call.tool.is_some(), call.tool_latency_s.is_some());
        assert!(trace.blocks(call.quotes).all(|step| step < call.step), "call {index} quotes what is not said yet");
    }
    assert_eq!(highest, trace.n_blocks);
    for (number, session) in trace.sessions.iter().enumerate() {
        for (step, &call) in session.calls.iter().enumerate() {
            assert_eq!(trace.calls[call as usize].step as usize, step);
            assert_eq!(trace.calls[call as usize].session as usize, number);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn generated_traces_are_consistent_deterministic_and_of_the_size_asked(
        which in 0..generate::WORKLOADS.len(),
        sessions in 1usize..12,
        seed: u64,
        extra in 0usize..12,
    ) {
        let name = generate::names()[which];
        let options = GenerateOptions { sessions, seed, agents: Some(4 + extra) };
        let trace = generate::generate(name, &options).unwrap();
        assert_consistent(&trace);
        prop_assert_eq!(trace.sessions.len(), sessions);
        prop_assert!(trace.agents.len() <= 4 + extra);
        prop_assert!(trace.sessions.iter().all(|s| !s.calls.is_empty()));
        prop_assert_eq!(&trace.workload, name);
        prop_assert_eq!(generate::generate(name, &options).unwrap(), trace);
    }
}

#[test]
fn prompts_say_which_answers_they_quote_and_that_is_written_and_read() {
    let trace = make("debate", 3, 0);
    let session: Vec<_> = trace.sessions[0].calls.iter().map(|&call| &trace.calls[call as usize]).collect();
    let quoted = |step: usize| trace.blocks(session[step].quotes).collect::<Vec<_>>();
    // The moderator opens, each debater reads all who spoke before in the round.
    assert!(quoted(0).is_empty());
    assert_eq!((quoted(1), quoted(2)), (vec![0], vec![0, 1]));
    let all_steps: Vec<u32> = (0..session.len() as u32 - 1).collect();
    assert_eq!(quoted(session.len() - 1), all_steps, "the moderator reads everything in the end");
    let mut text = Vec::new();
    replay::trace::write_to(&trace, &mut text).unwrap();
    let again = replay::trace::read_from(text.as_slice(), "debate".as_ref(), &ReadOptions::default()).unwrap();
    assert_eq!(again, trace);
}

#[test]
fn another_seed_is_another_trace() {
    for name in generate::names() {
        assert_ne!(make(name, 3, 1), make(name, 3, 2), "{name}");
    }
}

#[test]
fn a_larger_workload_starts_with_the_smaller_one() {
    for name in generate::names() {
        let (small, large) = (make(name, 4, 9), make(name, 8, 9));
        assert_eq!(small.calls[..], large.calls[..small.calls.len()], "{name}");
    }
}

#[test]
fn unknown_names_and_impossible_sizes_name_the_remedy() {
    let options = GenerateOptions { sessions: 1, seed: 0, agents: None };
    let text = generate::generate("pipelin", &options).unwrap_err().to_string();
    assert!(text.contains("pipelin") && text.contains("research_tree"), "{text}");
    let none = GenerateOptions { sessions: 0, ..options };
    let text = generate::generate("pipeline", &none).unwrap_err().to_string();
    assert!(text.contains("--sessions"), "{text}");
    let alone = GenerateOptions { agents: Some(1), ..options };
    let text = generate::generate("debate", &alone).unwrap_err().to_string();
    assert!(text.contains("--agents"), "{text}");
}

#[test]
fn tool_times_follow_the_stated_distribution_and_know_nothing_of_sizes() {
    let trace = make("coding_team", 60, 3);
    let mut logs: Vec<(f64, f64)> = trace
        .calls
        .iter()
        .filter_map(|c| c.tool_latency_s.map(|s| (s.max(1e-3).ln(), f64::from(c.output_tokens).ln())))
        .collect();
    let n = logs.len() as f64;
    let (mx, my) = (logs.iter().map(|l| l.0).sum::<f64>() / n, logs.iter().map(|l| l.1).sum::<f64>() / n);
    let (vx, vy) = (
        logs.iter().map(|l| (l.0 - mx).powi(2)).sum::<f64>() / n,
        logs.iter().map(|l| (l.1 - my).powi(2)).sum::<f64>() / n,
    );
    let correlation = logs.iter().map(|l| (l.0 - mx) * (l.1 - my)).sum::<f64>() / n / (vx * vy).sqrt();
    assert!(correlation.abs() < 3.5 / n.sqrt(), "correlation {correlation} over {n} calls");
    assert!((vx.sqrt() - 1.0).abs() < 0.08, "sigma {}", vx.sqrt());
    logs.sort_by(|a, b| a.0.total_cmp(&b.0));
    let median = logs[logs.len() / 2].0.exp();
    assert!((median / 2.0 - 1.0).abs() < 0.12, "median {median}");
}
