//! Gap closed per workload for variants of the policy; for development.
#![allow(clippy::pedantic, clippy::print_stdout, missing_docs)]
use rayon::prelude::*;
use replay::latency::LatencyModel;
use replay::policies;
use replay::policy::CachePolicy;
use replay::schedule::*;
use replay::sim;
use replay::trace;

fn main() {
    let mut sessions = 16;
    let mut seeds = vec![0u64];
    let mut caps = vec![0.05, 0.10, 0.25];
    let mut names: Vec<String> = vec!["agentrt".into()];
    let mut files = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(a) = args.next() {
        match a.as_str() {
            "-n" => sessions = args.next().unwrap().parse().unwrap(),
            "-s" => seeds = args.next().unwrap().split(',').map(|x| x.parse().unwrap()).collect(),
            "-c" => caps = args.next().unwrap().split(',').map(|x| x.parse().unwrap()).collect(),
            "-p" => names = args.next().unwrap().split(',').map(String::from).collect(),
            _ => files.push(a),
        }
    }
    let traces: Vec<_> = files.par_iter().map(|f| trace::read(f, &Default::default()).unwrap()).collect();
    let mut all = vec!["lru".to_string(), "min".to_string()];
    all.extend(names.iter().cloned());
    let mut jobs = Vec::new();
    for &seed in &seeds {
        for (t, tr) in traces.iter().enumerate() {
            let live = tr.mean_session_blocks() * sessions as f64;
            for (c, &f) in caps.iter().enumerate() {
                for (p, _) in all.iter().enumerate() {
                    jobs.push((seed, t, c, (live * f).round().max(1.0) as usize, p));
                }
            }
        }
    }
    let out: Vec<(f64, f64)> = jobs
        .par_iter()
        .map(|&(seed, t, _, cap, p)| {
            let tr = &traces[t];
            let o = ScheduleOptions { order: Order::Closed, sessions, seed, capacity_blocks: cap, model: LatencyModel::LLAMA_3_1_8B_H100 };
            let sch = Schedule::new(tr, o).unwrap();
            let mut pol: Box<dyn CachePolicy> = policies::build(&all[p], tr, &sch).unwrap();
            let t0 = std::time::Instant::now();
            let r = sim::run(tr, &sch, &mut *pol, &mut |_| {});
            if r.forced_evictions > 0 { println!("FORCED {} {}", all[p], r.forced_evictions); }
            (r.hit_rate() * 100.0, t0.elapsed().as_secs_f64())
        })
        .collect();
    let np = all.len();
    let cells = jobs.len() / np;
    let mut sums = vec![(0.0, 0, 0.0f64, 0.0, 0.0); np];
    for i in 0..cells {
        let (seed, t, c, cap, _) = jobs[i * np];
        let (lru, min) = (out[i * np].0, out[i * np + 1].0);
        print!("{:22} s{} {:>3.0}% {:>7} lru {:5.1} min {:5.1} |", traces[t].workload, seed, caps[c] * 100.0, cap, lru, min);
        for p in 2..np {
            let x = out[i * np + p].0;
            let gap = (x - lru) / (min - lru);
            print!(" {:+5.1}{}", x - lru, if min - lru >= 3.0 { format!(" {gap:.2}") } else { "     ".into() });
            let s = &mut sums[p];
            if min - lru >= 3.0 { s.0 += gap; s.1 += 1; }
            s.2 = s.2.min(x - lru);
            s.3 += x - lru;
            s.4 += out[i * np + p].1;
        }
        println!();
    }
    for p in 2..np {
        let s = sums[p];
        println!("{:16} mean gap closed {:.3} over {} cells, worst {:+.2}, mean lift {:+.2}, {:.1} s", all[p], s.0 / s.1 as f64, s.1, s.2, s.3 / cells as f64, s.4);
    }
}
