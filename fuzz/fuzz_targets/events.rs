//! Arbitrary events on the core's tables; `cargo fuzz run events`.

#![no_main]

#[path = "../../crates/runtime_core/tests/support/events.rs"]
mod events;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| events::run(bytes));
