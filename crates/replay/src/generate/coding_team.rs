//! A coding agent with a long context and tools that spawns sub-agents; their contexts die when they report back.

use super::prompt::Text;
use super::stage::{Size, Stage};

const SUB_ROLES: [&str; 3] = ["explorer", "engineer", "planner"];
const SUB_WEIGHTS: [f64; 3] = [0.75, 0.15, 0.10];
const TOOLS: [&str; 5] = ["read_file", "search", "edit_file", "run_command", "fetch"];
const TOOL_WEIGHTS: [f64; 5] = [0.35, 0.2, 0.2, 0.2, 0.05];

const LEAD_SYSTEM: u32 = 7000;
const SUB_SYSTEM: u32 = 3800;
const TASK: Size = Size(400, 2500);
const ANSWER: Size = Size(250, 850);
const RESULT: Size = Size(450, 2600);
const SUB_RESULT: Size = Size(900, 5000);
const LEAD_CALLS: Size = Size(36, 110);
const SUB_CALLS: Size = Size(8, 18);
/// A lead call that uses no tool: the user speaks next.
const NO_TOOL: f64 = 0.06;
const SPAWN: f64 = 0.04;
/// The history is replaced by a summary beyond this length, or by itself now and then.
const WINDOW_TOKENS: u32 = 60_000;
const COMPACT: f64 = 0.01;

pub(super) fn play(stage: &mut Stage, agents: usize) {
    let system = stage.common(5, 0, LEAD_SYSTEM);
    let task = stage.fresh(TASK);
    let mut prompt = stage.prompt();
    prompt.add(system).add(task);
    let calls = stage.draw(LEAD_CALLS).clamp(6, 300);
    for _ in 0..calls {
        if prompt.tokens() > WINDOW_TOKENS || stage.chance(COMPACT) {
            let summary = stage.fresh(Size(1200, 2500));
            prompt = stage.prompt();
            prompt.add(system).add(task).add(summary);
        }
        let answer = stage.fresh(ANSWER);
        let spawns = stage.chance(SPAWN);
        let tool = if spawns { Some("spawn_agent") } else { pick_tool(stage, NO_TOOL) };
        let step = stage.call("lead", &prompt, answer, tool, None);
        let result = if spawns { sub_agent(stage, agents - 1, step) } else { stage.fresh(RESULT) };
        prompt.add(answer).add(result);
    }
}

/// Plays one sub-agent; returns its report.
fn sub_agent(stage: &mut Stage, kinds: usize, spawned_by: u32) -> Text {
    let weights: Vec<f64> = (0..kinds).map(|k| SUB_WEIGHTS.get(k).copied().unwrap_or(0.1)).collect();
    let kind = stage.choose(&weights);
    let role = stage.role(&SUB_ROLES, kind);
    let system = stage.common(6, kind, SUB_SYSTEM);
    let task = stage.fresh(Size(200, 600));
    stage.is_part_of(task, spawned_by);
    let mut prompt = stage.prompt();
    prompt.add(system).add(task);
    let calls = stage.draw(SUB_CALLS).clamp(1, 40);
    let mut parent = spawned_by;
    let mut report = task;
    for number in 0..calls {
        let last = number + 1 == calls;
        report = stage.fresh(ANSWER);
        let tool = if last { None } else { pick_tool(stage, 0.0) };
        parent = stage.call(&role, &prompt, report, tool, Some(parent));
        let result = stage.fresh(SUB_RESULT);
        prompt.add(report).add(result);
    }
    report
}

fn pick_tool(stage: &mut Stage, none: f64) -> Option<&'static str> {
    let silent = stage.chance(none);
    let tool = TOOLS[stage.choose(&TOOL_WEIGHTS)];
    (!silent).then_some(tool)
}
