//! Capacity test: thousands of agents; each session is a team of up to eight drawn from them.

use super::prompt::Text;
use super::stage::{Size, Stage};

/// Of a team, so many walk through all agents in turn: the teams of 2,000 sessions hold all 10,000.
const WALKING: usize = 5;
/// So many are drawn with popularity 1 / rank.
const POPULAR: usize = 3;
const TASK: Size = Size(120, 300);
const ANSWER: Size = Size(90, 240);
/// The next speaker is the next in the team's order, else anyone of the team.
const IN_ORDER: f64 = 0.7;

pub(super) fn play(stage: &mut Stage, agents: usize) {
    let first = stage.session_number() * WALKING;
    let mut team: Vec<usize> = (0..WALKING).map(|i| (first + i) % agents).collect();
    for _ in 0..POPULAR {
        team.push(stage.popular(agents));
    }
    team.sort_unstable();
    team.dedup();
    let task = stage.fresh(TASK);
    let mut thread: Vec<Text> = Vec::new();
    let turns = stage.between(team.len(), 3 * team.len());
    let mut at = 0;
    for _ in 0..turns {
        let agent = team[at];
        let mut prompt = stage.prompt();
        prompt.add(stage.common(7, agent, 200 + (agent % 25) as u32 * 16)).add(task).add_all(&thread);
        let answer = stage.fresh(ANSWER);
        stage.call(&format!("agent_{agent}"), &prompt, answer, None, None);
        thread.push(answer);
        let in_order = stage.chance(IN_ORDER);
        let anyone = stage.between(0, team.len() - 1);
        at = if in_order { (at + 1) % team.len() } else { anyone };
    }
}
