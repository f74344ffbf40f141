//! Six roles in fixed order; a review may send the work round again.

use super::prompt::Text;
use super::stage::{Size, Stage};

const ROLES: [&str; 6] = ["planner", "architect", "coder", "tester", "reviewer", "documenter"];
const SYSTEM: [u32; 6] = [1100, 1300, 1500, 1200, 1000, 900];
const TASK: Size = Size(260, 700);
const ANSWER: Size = Size(360, 1100);
/// Another round follows with this probability, four rounds at most.
const AGAIN: f64 = 0.45;
/// On a further round a role starts afresh from a summary instead of extending its own history.
const REWRITE: f64 = 0.3;

pub(super) fn play(stage: &mut Stage, agents: usize) {
    let task = stage.fresh(TASK);
    let mut history: Vec<Vec<Text>> = vec![Vec::new(); agents];
    let mut handed: Option<Text> = None;
    let mut round = 0;
    loop {
        for (index, own) in history.iter_mut().enumerate() {
            if round > 0 && stage.chance(REWRITE) {
                *own = vec![stage.fresh(Size(150, 300))];
            }
            own.extend(handed);
            let system = stage.common(1, index, SYSTEM[index % SYSTEM.len()]);
            let mut prompt = stage.prompt();
            prompt.add(system).add(task).add_all(own.iter());
            let answer = stage.fresh(ANSWER);
            let role = stage.role(&ROLES, index);
            let tool = (role == "tester").then_some("run_tests");
            stage.call(&role, &prompt, answer, tool, None);
            own.push(answer);
            handed = Some(answer);
        }
        round += 1;
        if round == 4 || !stage.chance(AGAIN) {
            return;
        }
    }
}
