//! What an engine recorded of itself is replayed at its own times.

use replay::latency::LatencyModel;
use replay::policies;
use replay::schedule::{EventKind, Order, Schedule, ScheduleOptions};
use replay::sim;
use replay::trace::{read_from, ReadOptions, Trace};
use serde_json::json;

/// (session, `t_arrival`, `queue_s`, `llm_latency_s`, prompt and answer in tokens, first block of prompt and of answer)
type Row = (u32, f64, f64, f64, (u32, u32), (u32, u32));

fn trace(rows: &[Row]) -> Trace {
    let line = |&(session, arrival, queue, latency, (prompt, output), (first, answer)): &Row| {
        let runs = |first: u32, n: u32| if n == 0 { json!([]) } else { json!([[first, n]]) };
        let blocks = prompt / 16;
        let row = json!({
            "workload": "w", "session_id": format!("s{session}"), "agent": "a", "t_arrival": arrival, "t_scope": "global",
            "queue_s": queue, "llm_latency_s": latency, "prompt_tokens": prompt, "output_tokens": output,
            "block_size": 16, "blocks": runs(first, blocks),
            "out_blocks": runs(answer, (prompt + output - 1) / 16 - blocks),
        });
        row.to_string()
    };
    let text = rows.iter().map(line).collect::<Vec<_>>().join("\n");
    read_from(text.as_bytes(), "recorded.jsonl".as_ref(), &ReadOptions::default()).unwrap()
}

fn schedule(trace: &Trace, capacity_blocks: usize) -> Schedule {
    let model = LatencyModel::ALL[0];
    Schedule::new(trace, ScheduleOptions { order: Order::Open, sessions: 1, seed: 0, capacity_blocks, model }).unwrap()
}

fn events(schedule: &Schedule) -> Vec<(u64, u32, EventKind)> {
    schedule.events.iter().map(|event| (event.time_us, event.call, event.kind)).collect()
}

#[test]
fn calls_arrive_start_grow_and_end_when_they_did() {
    use EventKind::{Finish, Grow, Queued, Start};
    // Two calls of one session overlap; the second waited. The first has a partial block, and its answer takes one more.
    let trace = trace(&[(0, 1.0, 0.0, 2.0, (40, 20), (0, 100)), (0, 1.5, 0.25, 4.0, (32, 1), (0, 100))]);
    assert!(trace.is_recording());
    let expected = [
        (1_000_000, 0, Start),
        (1_000_000, 0, Grow),
        (1_500_000, 1, Queued),
        (1_750_000, 1, Start),
        // With the ninth of twenty tokens.
        (1_900_000, 0, Grow),
        (3_000_000, 0, Finish),
        (5_750_000, 1, Finish),
    ];
    assert_eq!(events(&schedule(&trace, 8)), expected);
}

#[test]
fn in_a_smaller_pool_a_call_waits_for_room_and_one_that_never_fits_bypasses() {
    use EventKind::{Bypass, Finish, Queued, Start};
    let trace = trace(&[
        (0, 0.0, 0.0, 2.0, (64, 1), (0, 0)),
        (1, 1.0, 0.0, 2.0, (64, 1), (10, 0)),
        (2, 1.5, 0.5, 2.0, (160, 1), (20, 0)),
    ]);
    let found = events(&schedule(&trace, 6));
    let expected = [
        (0, 0, Start),
        (1_000_000, 1, Queued),
        (2_000_000, 0, Finish),
        (2_000_000, 1, Start),
        (2_000_000, 2, Bypass),
        (4_000_000, 1, Finish),
    ];
    assert_eq!(found, expected);
}

#[test]
fn partial_blocks_take_room_and_the_last_token_is_never_a_hit() {
    let hits = |first: u32, second: u32| {
        let again = (0, 4.0, 0.0, 1.0, (first, 1), (0, 0));
        let trace = trace(&[(0, 0.0, 0.0, 1.0, (first, 1), (0, 0)), (1, 2.0, 0.0, 1.0, (second, 1), (10, 0)), again]);
        let schedule = schedule(&trace, 6);
        let mut lru = policies::build("lru", &trace, &schedule).unwrap();
        sim::run(&trace, &schedule, &mut *lru, &mut |_| {}).hit_blocks
    };
    // Four full blocks and two fit into six, but not two and a partial one.
    assert_eq!(hits(65, 32), 4);
    assert_eq!(hits(65, 33), 3);
    // The prompt's last block holds its last token.
    assert_eq!(hits(64, 32), 3);
}

#[test]
fn every_policy_runs_a_recording_and_none_hits_more_than_the_optimum() {
    // Answers that find no room to grow included: calls overlap in a pool that hardly holds them.
    let rows: Vec<Row> = (0..60)
        .map(|i| {
            let (session, turn) = (i % 4, i / 4);
            let at = f64::from(i) * 0.5;
            (
                session,
                at,
                f64::from(i % 3) * 0.125,
                1.75,
                (16 * (2 + turn % 5) + i % 7, 1 + 8 * (i % 5)),
                (1000 * session, 100_000 + 100 * i),
            )
        })
        .collect();
    let trace = trace(&rows);
    for capacity in [8, 14, 40] {
        let schedule = schedule(&trace, capacity);
        let run = |name: &str| {
            let mut policy = policies::build(name, &trace, &schedule).unwrap();
            sim::run(&trace, &schedule, &mut *policy, &mut |_| {})
        };
        let best = run("min");
        for name in policies::names() {
            let outcome = run(name);
            assert_eq!((outcome.calls, outcome.prompt_blocks), (best.calls, best.prompt_blocks), "{name}");
            assert!(outcome.hit_blocks <= best.hit_blocks, "{name} at {capacity}");
        }
    }
}
