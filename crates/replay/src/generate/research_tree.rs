//! Map-reduce: a planner fans out to researchers, each searches and reads, a reducer merges, a writer concludes.

use super::prompt::Text;
use super::stage::{Size, Stage};

/// Roles before the researchers.
const HEADS: [&str; 3] = ["planner", "reducer", "writer"];
const SYSTEM: [u32; 3] = [620, 520, 700];
const RESEARCHER_SYSTEM: u32 = 560;
const TASK: Size = Size(300, 900);
const PLAN: Size = Size(260, 430);
const QUERY: Size = Size(75, 180);
const FINDING: Size = Size(250, 600);
const REPORT: Size = Size(850, 1500);
const PAGE: Size = Size(800, 1700);
/// Tool calls of a researcher per assignment.
const SEARCHES: Size = Size(3, 6);
/// Another round of assignments, three rounds at most.
const AGAIN: f64 = 0.55;
/// A researcher goes on from its earlier context instead of starting afresh.
const CONTINUES: f64 = 0.35;

pub(super) fn play(stage: &mut Stage, agents: usize) {
    let researchers = agents - HEADS.len();
    let task = stage.fresh(TASK);
    let mut contexts: Vec<Option<Vec<Text>>> = vec![None; researchers];
    let mut merged: Vec<Text> = Vec::new();
    for _ in 0..3 {
        // The planner's prompt is written anew each round: task and merged findings, no history.
        let plan = stage.fresh(PLAN);
        let planned = head(stage, 0, &[task], &merged, plan);
        let width = stage.between(2.min(researchers), researchers.min(5));
        let mut findings = Vec::new();
        let mut pick: Vec<usize> = (0..researchers).collect();
        while pick.len() > width {
            let leaves = stage.between(0, pick.len() - 1);
            pick.remove(leaves);
        }
        for worker in pick {
            let context = match contexts[worker].take() {
                Some(context) if stage.chance(CONTINUES) => context,
                _ => Vec::new(),
            };
            let (finding, context) = research(stage, worker, task, plan, context, planned);
            contexts[worker] = Some(context);
            findings.push(finding);
        }
        let report = stage.fresh(FINDING);
        head(stage, 1, &[task, plan], &findings, report);
        merged.push(report);
        if !stage.chance(AGAIN) {
            break;
        }
    }
    let report = stage.fresh(REPORT);
    head(stage, 2, &[task], &merged, report);
}

fn head(stage: &mut Stage, index: usize, first: &[Text], then: &[Text], answer: Text) -> u32 {
    let mut prompt = stage.prompt();
    prompt.add(stage.common(4, index, SYSTEM[index])).add_all(first).add_all(then);
    let role = stage.role(&HEADS, index);
    stage.call(&role, &prompt, answer, None, None)
}

/// One assignment: searches, each followed by a page in the context, then a finding.
fn research(
    stage: &mut Stage,
    worker: usize,
    task: Text,
    plan: Text,
    mut context: Vec<Text>,
    planned: u32,
) -> (Text, Vec<Text>) {
    let role = stage.role(&HEADS, HEADS.len() + worker).replace("agent_", "researcher_");
    let system = stage.common(4, HEADS.len() + worker, RESEARCHER_SYSTEM);
    if context.is_empty() {
        context.push(task);
    }
    context.push(plan);
    let searches = stage.draw(SEARCHES).min(12);
    let mut parent = planned;
    for number in 0..=searches {
        let mut prompt = stage.prompt();
        prompt.add(system).add_all(&context);
        let last = number == searches;
        let answer = stage.fresh(if last { FINDING } else { QUERY });
        let tool = if stage.chance(0.6) { "search" } else { "open_page" };
        parent = stage.call(&role, &prompt, answer, (!last).then_some(tool), Some(parent));
        context.push(answer);
        if last {
            return (answer, context);
        }
        let page = stage.fresh(PAGE);
        context.push(page);
    }
    unreachable!("the last search returns")
}
