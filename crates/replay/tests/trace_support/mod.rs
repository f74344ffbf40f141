//! Shared by the tests that read recorded workloads.

use std::path::PathBuf;

/// The recorded traces, none where they are missing.
///
/// They lie in `../shared/traces` relative to the repository; `AGENTRT_TRACES` names another folder.
pub(crate) fn recorded() -> Vec<PathBuf> {
    let folder = std::env::var_os("AGENTRT_TRACES")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/traces"), PathBuf::from);
    let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().ends_with(".jsonl.gz")).collect();
    paths.sort();
    if paths.is_empty() {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("skipped: no recorded traces in {}", folder.display());
        }
    }
    paths
}
