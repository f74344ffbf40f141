#!/usr/bin/env bash
# Everything that looks for a concurrency or memory error in the core. `make safety` runs this.
#
#   loom     every lock-free step under every interleaving, and each control must fail (10 s)
#   tsan     the thread tests under ThreadSanitizer, which must also find a seeded race (2 s)
#   property the property tests with many more cases, ten million hostile events (3 minutes)
#   fuzz     the event interface with arbitrary bytes, where cargo-fuzz is installed (300 s)
# Times are those of a 2-core x86-64 VM, builds apart.
#
# `scripts/safety.sh tsan` runs one of them; without arguments all run.
set -euo pipefail
cd "$(dirname "$0")/.."

# How long the open-ended parts run.
PROPERTY_CASES=${PROPERTY_CASES:-300000}
POOL_CASES=${POOL_CASES:-20000}
FUZZ_SECONDS=${FUZZ_SECONDS:-300}

run_loom() {
  (cd crates/runtime_core_loom && cargo test --release)
}

run_tsan() {
  local target suppressions status
  target=$(rustc -vV | sed -n 's/^host: //p')
  suppressions=$(mktemp)
  # The standard library is not instrumented, so the test harness's own hand-overs look like races.
  printf 'race:compiler_%s\n' copy move >"$suppressions"
  echo 'race:Arc*Drop' >>"$suppressions"
  # The sanitizer wants its shadow memory where address randomisation may already have put something.
  tsan() {
    RUSTC_BOOTSTRAP=1 \
      RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer" \
      TSAN_OPTIONS="suppressions=$suppressions exitcode=66" \
      CARGO_TARGET_DIR=target/tsan \
      setarch -R cargo test -p runtime_core --test threads --test runtime_threads --target "$target" -- "$@"
  }
  tsan
  status=0
  tsan --ignored seeded_race >"$suppressions.log" 2>&1 || status=$?
  if ! grep -q 'WARNING: ThreadSanitizer: data race' "$suppressions.log"; then
    cat "$suppressions.log"
    echo "error: ThreadSanitizer missed the seeded race (status $status), its silence proves nothing" >&2
    return 1
  fi
  echo "ThreadSanitizer is silent on the tests and found the seeded race"
  rm -f "$suppressions" "$suppressions.log"
}

run_property() {
  PROPTEST_CASES=$PROPERTY_CASES cargo test --release -p runtime_core --test 'properties*'
  PROPTEST_CASES=$POOL_CASES cargo test --release -p runtime_core --test pool_properties
  cargo test --release -p runtime_core --test hostile -- --include-ignored
}

run_fuzz() {
  if ! cargo fuzz --version >/dev/null 2>&1; then
    echo "skipped: fuzz needs cargo-fuzz, install it with: cargo install cargo-fuzz"
    return 0
  fi
  # cargo-fuzz wants a nightly compiler; the bootstrap switch lets a stable one do.
  RUSTC_BOOTSTRAP=1 cargo fuzz run events -- -max_total_time="$FUZZ_SECONDS"
}

for part in "${@:-loom tsan property fuzz}"; do
  for name in $part; do
    echo "== $name"
    SECONDS=0
    "run_$name"
    echo "== $name passed in ${SECONDS} s"
  done
done
