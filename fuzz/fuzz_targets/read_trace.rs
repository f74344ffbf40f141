//! Any bytes, under any format: a trace or a precise error, never a panic, never more memory than the input warrants.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use replay::trace::{read_from, Format, ReadOptions};
use replay::Error;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, text)) = data.split_first() else { return };
    let options = ReadOptions {
        format: [Format::Auto, Format::Agentrt, Format::Mooncake, Format::DynamoAgentic][usize::from(choice & 3)],
        skip_bad: choice & 4 != 0,
        share_system_prefix: choice & 8 != 0,
        max_line_bytes: 1 << 16,
        block_size: None,
    };
    match read_from(text, Path::new("fuzz"), &options) {
        Ok(trace) => {
            assert!(!trace.calls.is_empty());
            assert_eq!(trace.parents.len(), trace.n_blocks as usize);
        }
        Err(Error::BadLine { line, field, problem, remedy, .. }) => {
            assert!(line > 0 && !field.is_empty() && !problem.is_empty() && !remedy.is_empty());
        }
        Err(Error::BadTrace { problem, remedy, .. }) => assert!(!problem.is_empty() && !remedy.is_empty()),
        Err(other) => panic!("{other}"),
    }
});
