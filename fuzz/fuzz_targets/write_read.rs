//! What can be read can be written, and reads back as the same trace.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use replay::trace::{read_from, write_to, ReadOptions};

fuzz_target!(|data: &[u8]| {
    let options = ReadOptions { skip_bad: true, max_line_bytes: 1 << 16, ..ReadOptions::default() };
    let Ok(mut trace) = read_from(data, Path::new("fuzz"), &options) else { return };
    trace.skipped_lines = 0;
    let mut text = Vec::new();
    write_to(&trace, &mut text).expect("memory takes every byte");
    let again = read_from(text.as_slice(), Path::new("fuzz"), &ReadOptions::default()).expect("it was valid");
    assert_eq!(again, trace);
});
