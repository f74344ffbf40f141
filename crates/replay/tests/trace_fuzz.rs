//! A bounded fuzz run of the readers: mutated valid files, random JSON, cut and flipped gzip.
//!
//! Whatever comes in, a reader answers with a consistent trace or with an error that names line, field and remedy.
//! The open-ended run is in `fuzz/`.

use std::io::Write;
use std::path::Path;

use flate2::write::GzEncoder;
use flate2::Compression;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replay::trace::{read_from, write_to, Format, ReadOptions, NO_BLOCK};
use replay::Error;
use serde_json::{json, Value};

const FORMATS: [Format; 4] = [Format::Auto, Format::Agentrt, Format::Mooncake, Format::DynamoAgentic];

/// Reads `data` every way there is and checks the answer.
fn answers_precisely(data: &[u8]) {
    for format in FORMATS {
        for skip_bad in [false, true] {
            let options = ReadOptions { format, skip_bad, max_line_bytes: 4096, ..ReadOptions::default() };
            match read_from(data, Path::new("fuzz"), &options) {
                Ok(mut trace) => {
                    assert!(!trace.calls.is_empty());
                    for call in &trace.calls {
                        let mut previous = NO_BLOCK;
                        for block in trace.blocks(call.prompt).chain(trace.blocks(call.output)) {
                            assert_eq!(trace.parents[block as usize], previous);
                            previous = block;
                        }
                    }
                    assert!(skip_bad || trace.skipped_lines == 0);
                    // What was read is valid: it can be written and read again.
                    trace.skipped_lines = 0;
                    let mut text = Vec::new();
                    write_to(&trace, &mut text).unwrap();
                    let plain = ReadOptions::default();
                    assert_eq!(read_from(text.as_slice(), Path::new("again"), &plain).unwrap(), trace);
                }
                Err(Error::BadLine { line, field, problem, remedy, .. }) => {
                    assert!(line > 0 && !field.is_empty() && !problem.is_empty() && !remedy.is_empty());
                    assert!(!skip_bad, "skipping leaves only errors of the whole file");
                }
                Err(Error::BadTrace { problem, remedy, .. }) => {
                    assert!(!problem.is_empty() && !remedy.is_empty());
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
}

/// One small valid file per format.
fn seeds() -> Vec<Vec<u8>> {
    let agentrt = (0..6).map(|i| {
        json!({
            "schema_version": 1, "workload": "w", "session_id": format!("s{}", i % 2), "step": i / 2,
            "agent": format!("a{}", i % 3), "parent": if i < 2 { Value::Null } else { json!(i / 2 - 1) },
            "t_arrival": f64::from(i) * 0.5, "t_scope": "session", "llm_latency_s": 1.25, "tool_name": "t",
            "tool_latency_s": 0.5, "prompt_tokens": 170 + i, "output_tokens": 40, "block_size": 16,
            "blocks": [[i % 2 * 100, 4], [i % 2 * 100 + 10 + i * 8, 3]], "out_blocks": [[1000 + i * 4, 2]],
            "sys_key": "k", "sys_blocks": 3,
        })
    });
    let mooncake = (0..5).map(|i| {
        json!({"timestamp": i * 100, "input_length": 2000, "output_length": 9, "hash_ids": [0, 1, 2 + i / 2, 90 + i]})
    });
    let dynamo = (0..5usize).map(|i| {
        json!({
            "request_id": format!("r{i}"), "session_id": format!("t{}", i % 2), "input_length": 1030,
            "output_length": 3, "hash_ids": [i % 2, 10 + i % 2, 50 + i], "timestamp": i as f64,
            "wait_for": if i == 0 { json!([]) } else { json!([format!("r{}", [0, 0, 1, 0, 3][i])]) }, "branches": ["r4"],
            "tool_wait_ms": 12.5, "tool_events": [{"tool_class": format!("x{}", i % 3)}], "delay": 3,
        })
    });
    let text = |rows: &mut dyn Iterator<Item = Value>| {
        rows.flat_map(|r| [r.to_string(), "\n".into()]).collect::<String>().into_bytes()
    };
    vec![text(&mut { agentrt }), text(&mut { mooncake }), text(&mut { dynamo })]
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn mutate(data: &mut Vec<u8>, rng: &mut StdRng) {
    const PIECES: [&[u8]; 16] = [
        b"null",
        b"-1",
        b"1e308",
        b"4294967296",
        b"18446744073709551615",
        b"[[0,4294967295]]",
        b"[]",
        b"{}",
        b"\"\"",
        b"\n",
        b"\\u0000",
        b"0.5",
        b"[[1,1],[0,2]]",
        b"\xff\xfe",
        b"true",
        b"99999999999999999999999",
    ];
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..data.len().max(1)).min(data.len());
        match rng.random_range(0..6) {
            0 if at < data.len() => data[at] ^= 1 << rng.random_range(0..8),
            1 if at < data.len() => drop(data.remove(at)),
            2 => {
                // A whole value gives way, so that types and ranges are wrong more often than the syntax.
                let from = data[..at].iter().rposition(|&b| b == b':').map_or(at, |p| p + 1);
                let until = data[from..].iter().position(|&b| b == b',').map_or(at.max(from), |p| p + from);
                let piece = PIECES[rng.random_range(0..PIECES.len())];
                data.splice(from..until, piece.iter().copied());
            }
            3 => data.truncate(at),
            4 => {
                let end = rng.random_range(at..=data.len());
                let copy = data[at..end].to_vec();
                data.splice(at..at, copy);
            }
            _ => {
                let piece = PIECES[rng.random_range(0..PIECES.len())];
                data.splice(at..at, piece.iter().copied());
            }
        }
    }
}

#[test]
fn the_seeds_are_valid() {
    for seed in seeds() {
        read_from(seed.as_slice(), Path::new("seed"), &ReadOptions::default()).unwrap();
    }
}

#[test]
fn mutated_files_are_answered_precisely() {
    let mut rng = StdRng::seed_from_u64(0xA6E2);
    for seed in seeds() {
        for _ in 0..1500 {
            let mut data = seed.clone();
            mutate(&mut data, &mut rng);
            answers_precisely(&data);
        }
    }
}

#[test]
fn cut_and_flipped_gzip_is_answered_precisely() {
    let mut rng = StdRng::seed_from_u64(0x6219);
    for seed in seeds() {
        let whole = gzip(&seed);
        for length in (1..whole.len()).step_by(3) {
            answers_precisely(&whole[..length]);
        }
        for _ in 0..300 {
            let mut data = whole.clone();
            let at = rng.random_range(0..data.len());
            data[at] ^= 1 << rng.random_range(0..8);
            answers_precisely(&data);
        }
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z\"\\\\]{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 5, |inner| prop::collection::vec(inner, 0..5).prop_map(Value::from))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn lines_with_random_fields_are_answered_precisely(
        which in 0usize..3,
        changes in prop::collection::vec((any::<u8>(), any::<u8>(), any_value()), 0..4),
    ) {
        let text = String::from_utf8(seeds().swap_remove(which)).unwrap();
        let mut rows: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        for (row, field, value) in changes {
            let row = usize::from(row) % rows.len();
            let keys: Vec<String> = rows[row].as_object().unwrap().keys().cloned().collect();
            rows[row][&keys[usize::from(field) % keys.len()]] = value;
        }
        answers_precisely(rows.iter().flat_map(|r| [r.to_string(), "\n".into()]).collect::<String>().as_bytes());
    }
}
