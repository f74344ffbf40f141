//! The scheduling policies against a toy engine: what each promises, alone and together.

#[path = "support/toy_engine.rs"]
mod toy_engine;

use runtime_core::policy::{built_in, Policies};
use toy_engine::{mean, widest_gap, Engine, Plan, Report};

fn policies(names: &[&str]) -> Policies {
    Policies::new(names.iter().map(|name| built_in(name).expect(name)).collect())
}

fn run(names: &[&str], capacity: usize, plans: &[Plan]) -> Report {
    Engine::new(capacity, &policies(names)).run(plans)
}

fn plan(i: u64) -> Plan {
    Plan { start_us: i * 10_000, tenant: 0, agent: 0, turns: 10, shared: 1024, added: 1000, output: 48, gap_us: 300_000 }
}

fn p99(report: &Report) -> f64 {
    let mut s = report.session_s.clone();
    s.sort_by(f64::total_cmp);
    s[(s.len() * 99 / 100).min(s.len() - 1)]
}

fn hit(r: &Report) -> f64 {
    r.calls.iter().map(|c| c.hit_blocks).sum::<usize>() as f64
        / r.calls.iter().map(|c| c.prompt_blocks).sum::<usize>() as f64
}

#[test]
#[ignore]
fn explore() {
    for n in [4u64, 16, 64] {
        let plans: Vec<Plan> = (0..n).map(plan).collect();
        for cap in [2000usize, 6000] {
            for names in [
                &["lru"][..],
                &["kv_cache"],
                &["batch_shaping", "lru"],
                &["batch_shaping", "kv_cache"],
                &["fairness", "kv_cache"],
                &["fairness", "batch_shaping", "kv_cache"],
            ] {
                let r = run(names, cap, &plans);
                println!(
                    "{n:4} {cap:5} {:40} mean {:7.2} p99 {:7.2} end {:7.2} hit {:.3} lazy {} held {:.1}",
                    format!("{names:?}"),
                    mean(r.session_s.iter().copied()),
                    p99(&r),
                    r.end_us as f64 / 1e6,
                    hit(&r),
                    r.lazy_steps,
                    r.calls.iter().map(|c| c.held_us).max().unwrap() as f64 / 1e6
                );
            }
        }
    }
}
