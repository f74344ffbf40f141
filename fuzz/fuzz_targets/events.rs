//! Arbitrary events on the core's tables and on a whole runtime; `cargo fuzz run events`.

#![no_main]

#[path = "../../crates/runtime_core/tests/support/events.rs"]
mod events;
#[path = "../../crates/runtime_core/tests/support/pool.rs"]
mod pool;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| match bytes.split_first() {
    Some((0, rest)) => events::run(rest),
    Some((_, rest)) => pool::run(rest),
    None => {}
});
