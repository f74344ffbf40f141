//! Reading traces: what is understood, what is refused and with which words, and that writing inverts reading.

mod trace_support;

use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::write::GzEncoder;
use flate2::Compression;
use proptest::prelude::*;
use replay::trace::{read, read_from, write, Call, Clock, Format, ReadOptions, Trace, TraceBuilder, NO_BLOCK};
use replay::{Error, Result};
use serde_json::{json, Value};

fn parse(text: impl AsRef<[u8]>, options: &ReadOptions) -> Result<Trace> {
    read_from(text.as_ref(), Path::new("t.jsonl"), options)
}

fn line(session: &str, step: u32, blocks: &Value) -> Value {
    json!({
        "workload": "w", "session_id": session, "step": step, "agent": "a", "prompt_tokens": 200,
        "output_tokens": 20, "block_size": 16, "blocks": blocks,
    })
}

fn with(mut row: Value, field: &str, value: Value) -> Value {
    row[field] = value;
    row
}

fn text(rows: &[Value]) -> String {
    rows.iter()
        .flat_map(|row| {
            [
                row.to_string(),
                "
"
                .into(),
            ]
        })
        .collect()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn blocks_of(trace: &Trace, call: usize) -> Vec<u32> {
    trace.blocks(trace.calls[call].prompt).collect()
}

#[test]
fn all_recorded_workloads_read_and_survive_writing() {
    let folder = tempfile::tempdir().unwrap();
    for path in trace_support::recorded() {
        let trace = read(&path, &ReadOptions::default()).unwrap();
        assert_eq!(trace.skipped_lines, 0);
        let copy = folder.path().join("copy.jsonl.gz");
        write(&trace, &copy).unwrap();
        assert!(read(&copy, &ReadOptions::default()).unwrap() == trace, "{}", path.display());
    }
}

#[test]
fn block_ids_are_renumbered_densely_and_have_one_parent() {
    let rows = [line("s", 0, &json!([[900, 2], [7, 1]])), line("s", 1, &json!([[900, 1], [50, 2]]))];
    let trace = parse(text(&rows), &ReadOptions::default()).unwrap();
    assert_eq!((blocks_of(&trace, 0), blocks_of(&trace, 1)), (vec![0, 1, 2], vec![0, 3, 4]));
    assert_eq!(trace.parents, [NO_BLOCK, 0, 1, 0, 3]);
}

#[test]
fn sessions_with_one_system_key_share_its_blocks_unless_switched_off() {
    let keyed = |session: &str, first: u32| {
        let row = line(session, 0, &json!([[first, 4]]));
        with(with(row, "sys_key", json!("k")), "sys_blocks", json!(2))
    };
    let again = line("y", 1, &json!([[10, 3], [90, 1]]));
    let rows = text(&[keyed("x", 0), keyed("y", 10), again]);
    let shared = parse(&rows, &ReadOptions::default()).unwrap();
    assert_eq!(blocks_of(&shared, 1), [0, 1, 4, 5]);
    assert_eq!(blocks_of(&shared, 2), [0, 1, 4, 6]);
    assert_eq!(shared.parents, [NO_BLOCK, 0, 1, 2, 1, 4, 4]);
    let apart = parse(&rows, &ReadOptions { share_system_prefix: false, ..ReadOptions::default() }).unwrap();
    assert_eq!(blocks_of(&apart, 1), [4, 5, 6, 7]);
}

#[test]
fn a_session_that_changes_its_system_prefix_is_not_shared_with_itself() {
    let keyed = |step: u32, first: u32| {
        let row = line("x", step, &json!([[first, 3]]));
        with(with(row, "sys_key", json!("k")), "sys_blocks", json!(2))
    };
    let trace = parse(text(&[keyed(0, 0), keyed(1, 10)]), &ReadOptions::default()).unwrap();
    assert_eq!(blocks_of(&trace, 1), [3, 4, 5]);
}

#[test]
fn gzip_is_recognised_by_content_and_may_have_members() {
    let rows = [line("s", 0, &json!([[0, 2]])), line("s", 1, &json!([[0, 3]]))];
    let mut data = gzip(text(&rows[..1]).as_bytes());
    data.extend(gzip(text(&rows[1..]).as_bytes()));
    let trace = parse(&data, &ReadOptions::default()).unwrap();
    assert_eq!(trace.calls.len(), 2);
}

/// The error for a file, which must name the file, and the line and field where there are any.
fn refusal(data: impl AsRef<[u8]>) -> (Option<u64>, Option<String>, String) {
    let error = parse(data, &ReadOptions::default()).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("t.jsonl"), "{text}");
    match error {
        Error::BadLine { line, field, remedy, .. } => {
            assert!(!remedy.is_empty());
            (Some(line), Some(field), text)
        }
        Error::BadTrace { remedy, .. } => {
            assert!(!remedy.is_empty());
            (None, None, text)
        }
        other => panic!("{other}"),
    }
}

#[test]
fn bad_fields_are_named_with_line_and_remedy() {
    let good = || line("s", 0, &json!([[0, 2]]));
    let next = || line("s", 1, &json!([[0, 3]]));
    let cases: Vec<(&str, Value, &str)> = vec![
        ("prompt_tokens", with(next(), "prompt_tokens", json!("many")), "\"many\""),
        ("prompt_tokens", with(next(), "prompt_tokens", json!(48.5)), "48.5"),
        ("prompt_tokens", with(next(), "prompt_tokens", json!(-1)), "-1"),
        ("prompt_tokens", with(next(), "prompt_tokens", Value::Null), "missing"),
        ("agent", with(next(), "agent", Value::Null), "missing"),
        ("session_id", with(next(), "session_id", json!(3)), "found 3"),
        ("workload", with(next(), "workload", json!([])), "an array"),
        ("block_size", with(next(), "block_size", json!(32)), "32"),
        ("blocks", with(next(), "blocks", Value::Null), "missing"),
        ("blocks", with(next(), "blocks", json!([[0, 0]])), "empty"),
        ("blocks", with(next(), "blocks", json!([[0]])), "pair"),
        ("blocks", with(next(), "blocks", json!([[4294967290_u32, 7]])), "32 bits"),
        ("blocks", with(next(), "blocks", json!([[u64::MAX, 2]])), "32 bits"),
        ("blocks", with(next(), "blocks", json!([[0, 4000000000_u32]])), "in one call"),
        ("blocks", with(next(), "blocks", json!([[0, 13]])), "more than the prompt"),
        ("blocks", with(next(), "blocks", json!([[1, 1]])), "follows another block"),
        ("blocks", with(next(), "blocks", json!([[5, 2], [1, 1]])), "follows another block"),
        ("blocks", with(next(), "blocks", json!([[0, 2], [0, 1]])), "twice"),
        ("blocks", with(next(), "blocks", json!([[5, 2], [5, 1]])), "twice"),
        ("out_blocks", with(next(), "out_blocks", json!([[60, 9]])), "more than the answer"),
        ("step", with(next(), "step", json!(0)), "after step 0"),
        ("parent", with(next(), "parent", json!(1)), "not an earlier step"),
        ("quotes", with(next(), "quotes", json!([[0, 2]])), "step 1 is not an earlier step"),
        ("quotes", with(next(), "quotes", json!([0])), "pair"),
        ("t_scope", with(next(), "t_arrival", json!(1.0)), "missing"),
        ("t_scope", with(next(), "t_scope", json!("day")), "`day`"),
        ("t_scope", with(next(), "t_scope", json!("global")), "differs"),
        ("tool_latency_s", with(next(), "tool_latency_s", json!(-0.5)), "-0.5"),
        ("line", json!([1, 2]), "object"),
    ];
    for (field, row, problem) in cases {
        let (at, found, message) = refusal(text(&[good(), row]));
        assert_eq!((at, found.as_deref()), (Some(2), Some(field)), "{message}");
        assert!(message.contains(problem), "{message}");
    }
}

#[test]
fn times_that_run_backwards_are_refused() {
    let timed = |step, s| {
        let row = line("s", step, &json!([[0, 2]]));
        with(with(row, "t_scope", json!("session")), "t_arrival", json!(s))
    };
    let (at, field, message) = refusal(text(&[timed(0, 5.0), timed(1, 4.5)]));
    assert_eq!((at, field.as_deref()), (Some(2), Some("t_arrival")), "{message}");
}

#[test]
fn files_as_a_whole_are_refused_with_a_remedy_and_never_skipped() {
    let skip = ReadOptions { skip_bad: true, ..ReadOptions::default() };
    let first = line("s", 0, &json!([[0, 2]]));
    let other = with(line("s", 1, &json!([[0, 2]])), "workload", json!("v"));
    let newer = with(first.clone(), "schema_version", json!(2));
    let cases = [
        (String::new(), "empty"),
        ("\n\n".into(), "empty"),
        (text(&[first, other]), "mixes workloads"),
        (text(&[newer]), "schema_version 2"),
    ];
    for (data, problem) in cases {
        assert!(refusal(&data).2.contains(problem), "{problem}");
        assert!(matches!(parse(&data, &skip), Err(Error::BadTrace { .. })));
    }
    assert!(refusal("{\"schema\": \"x\"}\n").2.contains("header"));
    assert!(refusal("{\"a\": 1}\n").2.contains("no known format"));
}

#[test]
fn truncated_and_damaged_gzip_is_told_apart_from_bad_json() {
    let rows: Vec<Value> = (0..2000).map(|i| line(&format!("s{}", i * i % 997), i, &json!([[i * 3, 2]]))).collect();
    let whole = gzip(text(&rows).as_bytes());
    let (at, field, message) = refusal(&whole[..whole.len() / 2]);
    assert!(at > Some(1) && field.as_deref() == Some("line") && message.contains("gzip"), "{message}");
    let skip = ReadOptions { skip_bad: true, ..ReadOptions::default() };
    let kept = parse(&whole[..whole.len() / 2], &skip).unwrap();
    assert!(kept.calls.len() > 100 && kept.calls.len() < 2000 && kept.skipped_lines == 1);
    let mut damaged = whole.clone();
    damaged[5000] ^= 0x55;
    assert!(parse(&damaged, &ReadOptions::default()).is_err());
    let (at, _, message) = refusal(&text(&rows)[..text(&rows).len() - 20]);
    assert!(at == Some(2000) && message.contains("not JSON"), "{message}");
}

#[test]
fn a_line_of_a_hundred_megabytes_is_an_error_and_is_never_held() {
    struct Endless(u64);
    impl std::io::Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let n = buffer.len().min(self.0 as usize);
            buffer[..n].fill(b'7');
            self.0 -= n as u64;
            Ok(n)
        }
    }
    let first = format!("{}\n", line("s", 0, &json!([[0, 2]])));
    let last = format!("\n{}\n", line("s", 1, &json!([[0, 3]])));
    let input = || std::io::Read::chain(std::io::Read::chain(first.as_bytes(), Endless(100 << 20)), last.as_bytes());
    let reader = || std::io::BufReader::new(input());
    let error = read_from(reader(), Path::new("t"), &ReadOptions::default()).unwrap_err().to_string();
    assert!(error.starts_with("t:2:") && error.contains("longer than"), "{error}");
    let skip = ReadOptions { skip_bad: true, ..ReadOptions::default() };
    let trace = read_from(reader(), Path::new("t"), &skip).unwrap();
    assert_eq!((trace.calls.len(), trace.skipped_lines), (2, 1));
}

#[test]
fn skipped_lines_are_counted_and_leave_no_trace() {
    let good = [line("s", 0, &json!([[0, 2]])), line("s", 3, &json!([[0, 2], [9, 1]]))];
    let bad = with(with(line("z", 1, &json!([[5, 1], [1, 1]])), "agent", json!("zz")), "tool_name", json!("t"));
    let rows = format!("{}{{\n{}{}", text(&good[..1]), text(&[bad]), text(&good[1..]));
    let skip = ReadOptions { skip_bad: true, ..ReadOptions::default() };
    let mut trace = parse(rows, &skip).unwrap();
    assert_eq!(std::mem::take(&mut trace.skipped_lines), 2);
    assert_eq!(trace, parse(text(&good), &ReadOptions::default()).unwrap());
}

#[test]
fn a_missing_file_names_its_path_and_writing_leaves_no_half_file() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("no/such/trace.jsonl");
    assert!(read(&nowhere, &ReadOptions::default()).unwrap_err().to_string().contains("trace.jsonl"));
    let trace = parse(text(&[line("s", 0, &json!([[0, 2]]))]), &ReadOptions::default()).unwrap();
    assert!(write(&trace, &nowhere).is_err());
    // A folder in the way: the rename fails, the folder stays, the temporary file goes.
    let taken: PathBuf = folder.path().join("taken.jsonl");
    std::fs::create_dir(&taken).unwrap();
    assert!(write(&trace, &taken).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

fn mooncake(timestamp: u32, input: u32, ids: &[u64]) -> Value {
    json!({"timestamp": timestamp, "input_length": input, "output_length": 10, "hash_ids": ids})
}

#[test]
fn mooncake_requests_join_the_session_whose_prompt_they_extend() {
    let rows = [
        mooncake(0, 1500, &[0, 1, 2]),
        mooncake(10, 1400, &[0, 7, 8]),
        mooncake(20, 2048, &[0, 1, 20, 21]),
        mooncake(30, 3000, &[0, 7, 9, 10, 11, 12]),
        mooncake(3500, 600, &[0, 40]),
    ];
    let trace = parse(text(&rows), &ReadOptions::default()).unwrap();
    let sessions: Vec<u32> = trace.calls.iter().map(|c| c.session).collect();
    assert_eq!(sessions, [0, 1, 0, 1, 2]);
    assert_eq!((trace.block_size, trace.clock), (512, Clock::Global));
    assert_eq!(trace.calls[4].arrival_s, Some(3.5));
    assert_eq!(blocks_of(&trace, 0).len(), 2, "the partial last block does not count");
    assert_eq!(trace.workload, "t");
}

#[test]
fn mooncake_sessions_of_the_recorded_trace_are_found_again() {
    for path in trace_support::recorded() {
        if !path.ends_with("mooncake_conversation.jsonl.gz") {
            continue;
        }
        let recorded = read(&path, &ReadOptions::default()).unwrap();
        let mut partial = u64::from(u32::MAX);
        let rows: Vec<Value> = recorded
            .calls
            .iter()
            .map(|call| {
                let mut ids: Vec<u64> = recorded.blocks(call.prompt).map(u64::from).collect();
                if call.prompt_tokens % 512 > 0 {
                    partial += 1;
                    ids.push(partial);
                }
                let ms = call.arrival_s.unwrap() * 1e3;
                json!({"timestamp": ms, "input_length": call.prompt_tokens, "output_length": call.output_tokens, "hash_ids": ids})
            })
            .collect();
        let trace = parse(text(&rows), &ReadOptions::default()).unwrap();
        let same = trace.calls.iter().zip(&recorded.calls).filter(|(a, b)| a.session == b.session).count();
        assert_eq!((trace.sessions.len(), same), (recorded.sessions.len(), recorded.calls.len()));
        assert_eq!(trace.parents, recorded.parents);
    }
}

#[test]
fn mooncake_block_sizes_are_inferred_stated_or_refused() {
    let row = mooncake(0, 100, &[0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(parse(text(std::slice::from_ref(&row)), &ReadOptions::default()).unwrap().block_size, 16);
    let stated = ReadOptions { block_size: Some(15), ..ReadOptions::default() };
    assert_eq!(parse(text(&[row]), &stated).unwrap().block_size, 15);
    let (_, field, message) = refusal(text(&[mooncake(0, 100, &[0, 1, 2, 3, 4])]));
    assert_eq!(field.as_deref(), Some("hash_ids"), "{message}");
}

#[test]
fn dynamo_trajectories_connected_by_dependencies_form_one_session() {
    let row = |id: &str, trajectory: &str, ids: &[u64], extra: Value| {
        let mut row = json!({"request_id": id, "session_id": trajectory, "input_length": ids.len() * 64,
                             "output_length": 9, "hash_ids": ids});
        row.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        row
    };
    let huge = u64::MAX - 5;
    let rows = [
        row("r1", "A", &[huge, 2], json!({"timestamp": 100.0, "branches": ["r3"]})),
        row("r2", "Z", &[50, 51], json!({"timestamp": 120.0})),
        row("r3", "B", &[8, 9], json!({"wait_for": ["r1"], "delay": 250.0})),
        row(
            "r4",
            "A",
            &[huge, 2, 3],
            json!({"wait_for": ["r3"], "tool_wait_ms": 1500.0, "delay": 500.0, "prefix_reset": false,
            "tool_events": [{"tool_call_id": "c", "tool_class": "bash", "started_at_unix_ms": 1, "ended_at_unix_ms": 2,
                             "duration_ms": 1.0, "status": "ok"}]}),
        ),
    ];
    let options = ReadOptions { block_size: Some(64), ..ReadOptions::default() };
    let trace = parse(text(&rows), &options).unwrap();
    assert_eq!(trace.sessions.len(), 2);
    assert_eq!(trace.sessions[0].calls, [0, 2, 3]);
    let agents: Vec<&str> = trace.calls.iter().map(|c| trace.agents[c.agent as usize].as_str()).collect();
    assert_eq!(agents, ["main", "main", "sub", "main"]);
    assert_eq!(trace.calls[3].parent_step, Some(1));
    assert_eq!((trace.calls[0].tool_latency_s, trace.calls[2].tool_latency_s), (Some(0.25), Some(2.0)));
    assert_eq!(trace.tools, ["bash"]);
    assert_eq!(trace.clock, Clock::Global);
    let unknown = row("r5", "A", &[huge], json!({"wait_for": ["r9"]}));
    let (_, field, message) = refusal(text(&[unknown]));
    assert_eq!(field.as_deref(), Some("wait_for"), "{message}");
}

#[test]
fn a_stated_format_is_obeyed() {
    let row = text(&[mooncake(0, 1500, &[0, 1, 2])]);
    let options = ReadOptions { format: Format::Agentrt, ..ReadOptions::default() };
    assert!(matches!(parse(row, &options), Err(Error::BadLine { field, .. }) if field == "workload"));
}

/// A random call: session, agent, depth kept of the last prompt, new prompt blocks, output blocks, times.
type Draw = (u8, u8, usize, u8, u8, Option<u32>, Option<u8>);

fn build(clock: Clock, draws: &[Draw]) -> Trace {
    let mut builder = TraceBuilder::new("w", 16, clock);
    let mut next = 0u64;
    let mut last: std::collections::HashMap<u8, (Vec<u64>, u32, f64)> = std::collections::HashMap::new();
    for &(session, agent, keep, grow, answer, time, tool) in draws {
        let (chain, step, arrival) = last.entry(session).or_default();
        chain.truncate(keep);
        let mut fresh = |n: u8| -> Vec<u64> {
            next += u64::from(n);
            (next - u64::from(n)..next).map(|key| key * 7 % 1_000_003).collect()
        };
        chain.extend(fresh(grow));
        let output = fresh(answer);
        *arrival += f64::from(time.unwrap_or(0)) / 7.0;
        let call = Call {
            session: builder.session(&format!("session \"{session}\" \u{e9}")),
            agent: builder.agent(&format!("agent {agent}")).unwrap(),
            step: *step,
            parent_step: step.checked_sub(u32::from(agent % 3)).filter(|parent| parent < step),
            prompt_tokens: chain.len() as u32 * 16 + u32::from(keep as u8 % 16),
            output_tokens: u32::from(answer) * 16,
            arrival_s: if clock == Clock::None { None } else { time.map(|_| *arrival) },
            queue_s: time.filter(|t| t % 2 == 0).map(|t| f64::from(t) / 7.0),
            llm_latency_s: time.map(|t| f64::from(t) / 3.0),
            tool: tool.map(|t| builder.tool(&format!("tool {}", t % 4)).unwrap()),
            tool_latency_s: tool.map(|t| f64::from(t) * 0.1),
            ..Call::default()
        };
        builder.push(call, chain, &output).unwrap();
        chain.extend(output);
        *step += 1;
    }
    builder.finish()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn reading_what_was_written_gives_the_same_trace(
        clock in prop_oneof![Just(Clock::None), Just(Clock::Session), Just(Clock::Global)],
        draws in prop::collection::vec(
            (0u8..5, 0u8..6, 0usize..40, 0u8..9, 0u8..5, prop::option::of(0u32..1000), prop::option::of(any::<u8>())),
            1..60,
        ),
        gz: bool,
    ) {
        let trace = build(clock, &draws);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(if gz { "t.jsonl.gz" } else { "t.jsonl" });
        write(&trace, &path).unwrap();
        prop_assert_eq!(read(&path, &ReadOptions::default()).unwrap(), trace);
        prop_assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
