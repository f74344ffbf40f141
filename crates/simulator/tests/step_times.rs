//! Step times against a published table: Llama-2-70B on two H100 with vLLM.
//!
//! Medians of five repetitions each in `data/perf_model.csv` of <https://github.com/Mutinifni/splitwise-sim>, which belongs
//! to Patel et al., "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA 2024. Its rows with 64
//! sequences are left out: they did not fit into memory, and their first step is not one step.

use replay::latency::{Batch, LatencyModel};

const MODEL: LatencyModel = LatencyModel::LLAMA_2_70B_2XH100;

/// Prompts, tokens each, milliseconds to prefill all of them in one step.
const PREFILL: [(u32, u32, f64); 12] = [
    (1, 128, 48.3),
    (1, 256, 51.8),
    (1, 512, 83.8),
    (1, 1024, 158.0),
    (1, 2048, 310.3),
    (1, 4096, 642.7),
    (1, 8192, 1339.8),
    (2, 512, 155.8),
    (4, 512, 299.8),
    (8, 512, 605.4),
    (16, 512, 1191.0),
    (32, 512, 2397.8),
];

/// Sequences, tokens before the ones that they decode (the middle of 128 decoded), milliseconds of a step.
const DECODE: [(u32, u32, f64); 11] = [
    (1, 192, 37.2),
    (1, 320, 37.8),
    (1, 576, 37.0),
    (1, 2112, 37.4),
    (1, 4160, 37.5),
    (1, 8256, 37.8),
    (2, 576, 37.4),
    (4, 576, 40.0),
    (8, 576, 40.4),
    (16, 576, 42.0),
    (32, 576, 52.3),
];

fn error(found_s: f64, measured_ms: f64) -> f64 {
    100.0 * (1e3 * found_s / measured_ms - 1.0)
}

#[test]
fn steps_take_within_a_tenth_of_what_was_measured() {
    let mut errors = Vec::new();
    for (prompts, tokens, ms) in PREFILL {
        let mut batch = Batch::default();
        (0..prompts).for_each(|_| batch.prefill(f64::from(tokens), 0.0));
        errors.push((format!("prefill {prompts} x {tokens}"), error(MODEL.step_s(&batch), ms)));
    }
    for (sequences, context, ms) in DECODE {
        let mut batch = Batch::default();
        (0..sequences).for_each(|_| batch.decode(f64::from(context)));
        errors.push((format!("decode {sequences} at {context}"), error(MODEL.step_s(&batch), ms)));
    }
    #[expect(clippy::print_stderr, reason = "the table of docs/simulator.md")]
    for (what, error) in &errors {
        eprintln!("{what:20} {error:+.1} %");
    }
    // The one exception: a prefill of 128 tokens took a third longer than a step that decodes one.
    assert!((-26.0..-20.0).contains(&errors[0].1), "{:?}", errors[0]);
    assert!(errors[1..].iter().all(|(_, error)| error.abs() < 10.0), "{errors:?}");
}

#[test]
fn a_mixed_step_costs_no_less_than_its_parts_and_no_more_than_both() {
    let (mut prefill, mut decode) = (Batch::default(), Batch::default());
    prefill.prefill(1024.0, 512.0);
    (0..16).for_each(|_| decode.decode(2048.0));
    let mut both = prefill;
    (0..16).for_each(|_| both.decode(2048.0));
    let (prefill_s, decode_s, both_s) = (MODEL.step_s(&prefill), MODEL.step_s(&decode), MODEL.step_s(&both));
    assert!(prefill_s.max(decode_s) < both_s && both_s < prefill_s + decode_s);
    assert_eq!(MODEL.step_s(&Batch::default()), 0.0);
}
