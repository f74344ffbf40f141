//! Sweeps: every setting once, in order, with the gap measured between LRU and the optimum.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use replay::generate::{generate, GenerateOptions};
use replay::latency::LatencyModel;
use replay::schedule::Order;
use replay::sweep::{run, Capacity, Contender, Progress, SweepOptions, SweepResult};
use replay::trace::Trace;
use replay::Error;

fn trace() -> Arc<Trace> {
    Arc::new(generate("debate", &GenerateOptions { sessions: 12, seed: 1, agents: None }).unwrap())
}

fn options(policies: &[&str]) -> SweepOptions {
    SweepOptions {
        order: Order::Closed,
        sessions: vec![4],
        seeds: vec![0],
        capacities: vec![Capacity::Fraction(0.1), Capacity::Fraction(0.3)],
        policies: policies.iter().map(|p| Contender::Named((*p).into())).collect(),
        model: LatencyModel::LLAMA_3_1_8B_H100,
        host: None,
        strip_identity: false,
        threads: 2,
    }
}

fn sweep(options: &SweepOptions) -> Vec<SweepResult> {
    run(&[trace()], options, &Progress::default()).unwrap()
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let cells = |threads: usize| -> Vec<_> {
        let all = SweepOptions { threads, seeds: vec![0, 1], ..options(&["lru", "lfu", "min"]) };
        sweep(&all).into_iter().map(|r| (r.seed, r.cell)).collect()
    };
    assert_eq!(cells(1), cells(3));
}

#[test]
fn the_gap_is_measured_between_lru_and_min_even_where_neither_is_asked_for() {
    let alone = sweep(&options(&["lfu"]));
    let beside = sweep(&options(&["lru", "lfu", "min"]));
    assert_eq!(alone.len(), 2);
    for (i, result) in alone.iter().enumerate() {
        let row = &beside[3 * i..3 * i + 3];
        assert_eq!(result.cell, row[1].cell);
        assert_eq!(row[0].cell.gap_closed, Some(0.0));
        assert_eq!(row[2].cell.gap_closed, Some(1.0));
        assert_eq!((result.lru_hit_rate, result.min_hit_rate), (row[0].cell.hit_rate, row[2].cell.hit_rate));
        assert_eq!(result.lru_ttft_mean_ms, row[0].cell.ttft_ms.mean);
    }
}

#[test]
fn progress_ends_at_the_total_and_a_cancelled_sweep_is_empty() {
    let progress = Progress::default();
    run(&[trace()], &options(&["lru"]), &progress).unwrap();
    let total = progress.total.load(Ordering::Relaxed);
    // lru and min, two capacities.
    assert_eq!(total, 4 * trace().calls.len() as u64);
    assert_eq!(progress.done.load(Ordering::Relaxed), total);

    let cancelled = Progress::default();
    cancelled.cancelled.store(true, Ordering::Relaxed);
    assert!(run(&[trace()], &options(&["lru"]), &cancelled).unwrap().is_empty());
}

#[test]
fn capacities_are_percentages_or_blocks() {
    assert_eq!(Capacity::parse("5%").unwrap(), Capacity::Fraction(0.05));
    assert_eq!(Capacity::parse(" 12.5 % ").unwrap(), Capacity::Fraction(0.125));
    assert_eq!(Capacity::parse("1500").unwrap(), Capacity::Blocks(1500));
    for text in ["", "%", "0", "0%", "-5%", "-5", "nan%", "inf%", "1e3", "5 blocks", "99999999999999999999"] {
        assert!(matches!(Capacity::parse(text), Err(Error::BadOption { .. })), "{text}");
    }
    assert_eq!(Capacity::Fraction(0.1).blocks(55.0, 16), 88);
    assert_eq!(Capacity::Fraction(0.0001).blocks(1.0, 1), 1);
}

#[test]
fn an_empty_or_doubled_list_is_an_error_that_names_the_option() {
    let named = |options: &SweepOptions, traces: &[Arc<Trace>]| match run(traces, options, &Progress::default()) {
        Err(Error::BadOption { option, .. }) => option,
        other => panic!("{other:?}"),
    };
    assert_eq!(named(&options(&["lru"]), &[]), "TRACE");
    assert_eq!(named(&options(&[]), &[trace()]), "--policy");
    assert_eq!(named(&options(&["lru", "lru"]), &[trace()]), "--policy");
    assert_eq!(named(&SweepOptions { seeds: vec![], ..options(&["lru"]) }, &[trace()]), "--seed");
    assert_eq!(named(&SweepOptions { sessions: vec![0], ..options(&["lru"]) }, &[trace()]), "--sessions");
}

#[test]
fn an_unknown_policy_is_an_error_and_no_result() {
    let result = run(&[trace()], &options(&["lru", "nosuch"]), &Progress::default());
    assert!(matches!(result, Err(Error::UnknownPolicy { name, .. }) if name == "nosuch"));
}

#[test]
fn stripped_of_identity_the_policy_infers_it_and_gains_still() {
    let stripped = SweepOptions { strip_identity: true, ..options(&["lru", "agentrt", "min"]) };
    let results = sweep(&stripped);
    for (one, two) in results.iter().zip(sweep(&stripped)) {
        assert_eq!(one.cell, two.cell, "the same again");
    }
    for (inferred, given) in results.chunks(3).zip(sweep(&options(&["lru", "agentrt", "min"])).chunks(3)) {
        assert_eq!(inferred[0].cell, given[0].cell, "lru looks at blocks alone");
        assert_eq!(inferred[2].cell, given[2].cell, "so does the optimum");
        assert!(inferred[1].cell.hit_blocks != given[1].cell.hit_blocks, "something was hidden");
        assert!(inferred[1].cell.hit_rate > inferred[0].cell.hit_rate, "{:?}", inferred[1].cell);
    }
}

#[test]
fn answers_that_prompts_quote_tell_which_agents_are_of_one_run() {
    let stripped = SweepOptions { strip_identity: true, ..options(&["lru", "agentrt", "agentrt-no-quotes", "min"]) };
    let traces = ["selector_chat", "debate"].map(|name| {
        let made = GenerateOptions { sessions: 40, seed: 0, agents: None };
        Arc::new(generate(name, &made).unwrap())
    });
    let results = run(&traces, &stripped, &Progress::default()).unwrap();
    let hits =
        |policy: &str| -> u64 { results.iter().filter(|r| r.cell.policy == policy).map(|r| r.cell.hit_blocks).sum() };
    let [lru, quotes, blocks] = ["lru", "agentrt", "agentrt-no-quotes"].map(hits);
    assert!(lru < blocks && quotes - lru > (blocks - lru) * 5 / 4, "{lru} {blocks} {quotes}");
}

#[test]
fn policies_that_need_identity_are_refused_without_it() {
    for name in ["kvflow", "continuum", "cachescout", "lru-session-end", "oracle-time"] {
        let stripped = SweepOptions { strip_identity: true, ..options(&[name]) };
        let error = run(&[trace()], &stripped, &Progress::default()).unwrap_err();
        assert!(matches!(&error, Error::BadOption { problem, .. } if problem.contains(name)), "{error}");
    }
}
