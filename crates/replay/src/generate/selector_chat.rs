//! Six roles on one thread; a selector model names the next speaker.

use super::prompt::Text;
use super::stage::{Size, Stage};

const ROLES: [&str; 6] = ["planner", "architect", "coder", "tester", "reviewer", "documenter"];
const SYSTEM: [u32; 6] = [1450, 1600, 1700, 1400, 1350, 1200];
const TASK: Size = Size(220, 600);
const ANSWER: Size = Size(180, 480);
/// Rows: who spoke; columns: who speaks next.
const NEXT: [[f64; 6]; 6] = [
    [0.00, 0.81, 0.15, 0.02, 0.01, 0.01],
    [0.60, 0.00, 0.37, 0.01, 0.01, 0.01],
    [0.02, 0.02, 0.00, 0.22, 0.71, 0.03],
    [0.01, 0.01, 0.86, 0.00, 0.10, 0.02],
    [0.05, 0.02, 0.15, 0.03, 0.00, 0.75],
    [0.82, 0.02, 0.04, 0.02, 0.10, 0.00],
];
/// The chat ends after a turn with this probability, once four turns are over.
const END: f64 = 0.1;
/// Tester and documenter keep a buffered context: the task and the last messages only.
const BUFFERED: [bool; 6] = [false, false, false, true, false, true];
const BUFFER_MESSAGES: usize = 6;

pub(super) fn play(stage: &mut Stage, agents: usize) {
    chat(stage, agents, weight);
}

/// A chat in which `weight(speaker, next)` says who speaks next.
pub(super) fn chat(stage: &mut Stage, agents: usize, weight: impl Fn(usize, usize) -> f64) {
    let task = stage.fresh(TASK);
    let mut thread: Vec<Text> = Vec::new();
    let mut speaker = 0;
    for turn in 0..60 {
        let kind = speaker % ROLES.len();
        let system = stage.common(3, speaker, SYSTEM[kind]);
        let hidden = if BUFFERED[kind] { thread.len().saturating_sub(BUFFER_MESSAGES) } else { 0 };
        let mut prompt = stage.prompt();
        prompt.add(system).add(task).add_all(&thread[hidden..]);
        let answer = stage.fresh(ANSWER);
        let role = stage.role(&ROLES, speaker);
        let tool = (kind == 3).then_some("run_code");
        stage.call(&role, &prompt, answer, tool, None);
        thread.push(answer);
        if turn >= 3 && stage.chance(END) {
            return;
        }
        let weights: Vec<f64> = (0..agents).map(|next| weight(speaker, next)).collect();
        speaker = stage.choose(&weights);
    }
}

/// Larger teams repeat the table in groups of six and rarely leave their group.
pub(super) fn weight(speaker: usize, next: usize) -> f64 {
    let group = ROLES.len();
    let base = NEXT[speaker % group][next % group] + f64::from(u8::from(speaker != next)) * 1e-3;
    if speaker / group == next / group {
        base
    } else {
        base * 0.02
    }
}
