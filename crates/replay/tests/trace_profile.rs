//! Profiles of the recorded workloads equal an independent measurement of them, and generated ones their targets.
//!
//! The expected figures were computed by a separate Python program with the definitions of `profile.rs`; a prompt's
//! blocks are compared as the files give them, so system prefixes are not shared across sessions.

mod trace_support;

use replay::generate::{self, GenerateOptions};
use replay::trace::profile::{profile, Profile};
use replay::trace::{read, ReadOptions};

/// workload, agents, agents per session, calls per session (mean, max)
type Size = (&'static str, u64, f64, f64, u64);
#[rustfmt::skip]
const SIZES: [Size; 9] = [
    ("autokaggle", 7, 6.8, 126.5, 141),
    ("claude_code_main", 1, 1.0, 57.5, 150),
    ("claude_code_sub", 4, 2.2, 211.1, 400),
    ("hyperagent", 3, 1.2, 69.1, 422),
    ("marble_research", 9, 5.1, 17.3, 83),
    ("mooncake_conversation", 1, 1.0, 1.5, 43),
    ("taubench_airline", 2, 2.0, 19.7, 60),
    ("whowhen_ag2", 176, 2.5, 5.3, 9),
    ("whowhen_magentic", 4, 2.5, 30.4, 77),
];

/// workload, then H(A), H(A'|A) in bits, then stay, most frequent, order 1, order 2, order 1 on switches in per cent
#[rustfmt::skip]
const NEXT_AGENT: [(&str, [f64; 7]); 7] = [
    ("autokaggle", [2.55, 0.81, 79.4, 27.6, 79.4, 80.3, 74.8]),
    ("whowhen_magentic", [1.18, 0.86, 26.0, 62.3, 69.5, 83.9, 93.8]),
    ("whowhen_ag2", [6.09, 1.63, 38.4, 19.3, 37.1, 36.2, 9.6]),
    ("marble_research", [2.87, 2.12, 29.7, 19.6, 40.3, 60.6, 44.6]),
    ("hyperagent", [1.08, 0.26, 96.0, 73.4, 96.0, 96.0, 57.1]),
    ("taubench_airline", [0.96, 0.64, 29.7, 65.5, 70.2, 71.8, 99.9]),
    ("claude_code_sub", [0.80, 0.36, 93.5, 81.8, 93.3, 94.4, 85.3]),
];

/// workload, hit % (all sessions, own session), distinct blocks, blocks per session (mean, max),
/// prompt tokens (p10, p50, p90, max), all prompts in Mtok
type Reuse = (&'static str, [f64; 2], u64, f64, u64, [u64; 4], f64);
#[rustfmt::skip]
const REUSE: [Reuse; 9] = [
    ("autokaggle", [66.4, 66.2], 83880, 14041.0, 18306, [576, 3243, 7133, 10863], 2.78),
    ("whowhen_magentic", [74.7, 74.3], 165829, 2892.0, 12612, [274, 2923, 8573, 41604], 6.99),
    ("whowhen_ag2", [58.2, 52.1], 51536, 456.0, 4563, [667, 1743, 3896, 44383], 1.53),
    ("marble_research", [55.2, 28.8], 244616, 1876.0, 6932, [849, 2213, 3952, 6619], 8.10),
    ("hyperagent", [78.1, 77.8], 59489, 4637.0, 22525, [1160, 2292, 7025, 50228], 3.67),
    ("taubench_airline", [97.1, 91.1], 39030, 483.0, 848, [387, 4634, 7373, 12867], 15.59),
    ("claude_code_sub", [95.2, 95.2], 249269, 14663.0, 32420, [38032, 96879, 142122, 190374], 334.22),
    ("claude_code_main", [96.2, 96.2], 633860, 4226.0, 18365, [40361, 98224, 261024, 894371], 1083.70),
    ("mooncake_conversation", [37.3, 32.2], 170899, 23.0, 246, [964, 6909, 27367, 126195], 144.79),
];

/// workload, hits in per cent of prompt tokens: same agent, other agent of the session, other sessions
#[rustfmt::skip]
const SOURCES: [(&str, [f64; 3]); 6] = [
    ("autokaggle", [66.2, 0.0, 0.2]),
    ("whowhen_magentic", [74.3, 0.0, 0.4]),
    ("whowhen_ag2", [52.1, 0.0, 6.1]),
    ("hyperagent", [77.8, 0.0, 0.3]),
    ("taubench_airline", [91.1, 0.0, 5.9]),
    ("marble_research", [28.8, 0.0, 26.3]),
];

fn assert_near(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance, "{what}: found {found}, expected {expected}");
}

#[test]
fn profiles_of_recorded_workloads_equal_the_independent_measurement() {
    let options = ReadOptions { share_system_prefix: false, ..ReadOptions::default() };
    let profiles: Vec<Profile> =
        trace_support::recorded().iter().map(|path| profile(&read(path, &options).unwrap(), 16)).collect();
    for p in &profiles {
        let name = p.workload.as_str();
        let find = |n: &str| n == name;
        if let Some(&(_, agents, per_session, calls, longest)) = SIZES.iter().find(|row| find(row.0)) {
            assert_eq!((p.agents, p.calls_per_session_max), (agents, longest), "{name}");
            assert_near(name, p.agents_per_session, per_session, 0.051);
            assert_near(name, p.calls_per_session, calls, 0.051);
        }
        if let Some((_, row)) = NEXT_AGENT.iter().find(|row| find(row.0)) {
            let n = &p.next_agent;
            assert_near(name, n.entropy_bits, row[0], 0.0051);
            assert_near(name, n.conditional_entropy_bits, row[1], 0.0051);
            let shares = [n.stay, n.most_frequent, n.order_1, n.order_2, n.order_1_on_switches];
            for (position, (found, expected)) in shares.iter().zip(&row[2..]).enumerate() {
                assert_near(&format!("{name} predictor {position}"), 100.0 * found, *expected, 0.051);
            }
        }
        if let Some((_, hits, blocks, mean, largest, prompt, total)) = REUSE.iter().find(|row| find(row.0)) {
            let q = &p.prompt_tokens;
            assert_eq!([q.p10, q.p50, q.p90, q.max], *prompt, "{name}");
            assert_eq!((p.distinct_blocks, p.session_blocks_max), (*blocks, *largest), "{name}");
            assert_near(name, p.session_blocks, *mean, 0.51);
            assert_near(name, p.prompt_tokens_total as f64 / 1e6, *total, 0.0051);
            assert_near(name, 100.0 * p.reuse.total, hits[0], 0.051);
            assert_near(name, 100.0 * p.reuse.own_session, hits[1], 0.051);
        }
        if let Some((_, [same, other, sessions])) = SOURCES.iter().find(|row| find(row.0)) {
            assert_near(name, 100.0 * p.reuse.same_agent, *same, 0.051);
            assert_near(name, 100.0 * p.reuse.other_agent, *other, 0.051);
            assert_near(name, 100.0 * p.reuse.other_sessions, *sessions, 0.051);
        }
    }
}

/// The fitted figures of docs/workloads.md: R, and the share of prompt blocks that are anchors.
#[test]
fn generated_workloads_meet_the_figures_they_were_fitted_to() {
    let targets = [
        ("pipeline", (0.999, 1.001), (0.34, 0.52)),
        ("debate", (0.74, 0.82), (0.34, 0.52)),
        ("selector_chat", (0.53, 0.61), (0.34, 0.52)),
        ("research_tree", (0.55, 0.75), (0.05, 0.25)),
        ("coding_team", (0.50, 0.80), (0.10, 0.30)),
    ];
    for (name, r, anchors) in targets {
        for seed in 0..3 {
            let sessions = generate::workload(name).unwrap().default_sessions;
            let trace = generate::generate(name, &GenerateOptions { sessions, seed, agents: None }).unwrap();
            let p = profile(&trace, 16);
            let (found_r, found_anchors) = (p.next_agent.r, p.reuse.anchor_references);
            assert!(r.0 <= found_r && found_r <= r.1, "{name} seed {seed}: R {found_r}");
            assert!(
                anchors.0 <= found_anchors && found_anchors <= anchors.1,
                "{name} seed {seed}: anchors {found_anchors}"
            );
            assert!(p.reuse.other_agent < 0.001, "{name}: agents of a session share {}", p.reuse.other_agent);
        }
    }
}

#[test]
fn a_profile_is_plain_data() {
    let trace = generate::generate("pipeline", &GenerateOptions { sessions: 2, seed: 0, agents: None }).unwrap();
    let json = serde_json::to_value(profile(&trace, 16)).unwrap();
    assert_eq!(json["workload"], "pipeline");
    assert_eq!(json["next_agent"]["r"], 1.0);
}
