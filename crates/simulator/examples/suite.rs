//! `cargo run --profile quick -p simulator --example suite -- POLICY [SCENARIO [CACHE [RUNS]]]`: means by contender, without Python.
#![expect(clippy::print_stdout, reason = "a command line tool")]

use simulator::scenarios::{self, Progress, SuiteOptions};

fn main() -> Result<(), simulator::Error> {
    let mut arguments = std::env::args().skip(1);
    let options = SuiteOptions {
        policy: arguments.next().unwrap_or_else(|| "fcfs".into()),
        only: arguments.next().unwrap_or_default(),
        cache: arguments.next().unwrap_or_else(|| "lru".into()),
        seed: 0,
        runs: arguments.next().and_then(|runs| runs.parse().ok()).unwrap_or(5),
        traces: std::env::var_os("AGENTRT_TRACES").map(Into::into),
        threads: 0,
    };
    for row in scenarios::run(&options, &Progress::default())? {
        let (before, now) = (simulator::mean(&row.baseline), simulator::mean(&row.policy));
        println!(
            "{:28} {:45} {:17} {before:12.3} {now:12.3} {:+7.1} %",
            row.scenario,
            format!("{} ({})", row.metric.name, row.metric.unit),
            row.baseline_name,
            100.0 * (now / before - 1.0),
        );
    }
    Ok(())
}
