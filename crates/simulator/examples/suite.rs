//! `cargo run --profile quick -p simulator --example suite -- POLICY [SCENARIO [CACHE [RUNS]]]`: means by contender and
//! the change with the 95 % interval of the paired difference, without Python.
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
        let changes: Vec<f64> = row.baseline.iter().zip(&row.policy).map(|(before, now)| now - before).collect();
        println!(
            "{:28} {:45} {:17} {before:12.3} {now:12.3} {:+7.1} % +- {:.1} %",
            row.scenario,
            format!("{} ({})", row.metric.name, row.metric.unit),
            row.baseline_name,
            100.0 * (now / before - 1.0),
            100.0 * half_width(&changes) / before,
        );
    }
    Ok(())
}

/// Half the width of the 95 % interval of the mean: Student's t, the normal distribution's beyond ten runs.
fn half_width(values: &[f64]) -> f64 {
    const STUDENT: [f64; 11] = [f64::NAN, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];
    let freedom = values.len() - 1;
    let mean = simulator::mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let deviation = (squares / freedom as f64).sqrt();
    STUDENT.get(freedom).copied().unwrap_or(1.96) * deviation / (values.len() as f64).sqrt()
}
