//! Debaters on one growing thread, a moderator between rounds.

use super::prompt::Text;
use super::stage::{Size, Stage};

const ROLES: [&str; 5] = ["moderator", "optimist", "sceptic", "analyst", "realist"];
const SYSTEM: [u32; 5] = [900, 1150, 1250, 1300, 1100];
const QUESTION: Size = Size(180, 520);
const ANSWER: Size = Size(180, 420);
/// The moderator asks for another round with this probability, six at most.
const AGAIN: f64 = 0.68;
/// After a statement the next debater in turn is passed over for the one after.
const OUT_OF_TURN: f64 = 0.11;
/// The moderator is called before the round is complete.
const CUT_SHORT: f64 = 0.08;
/// From the third round on a debater sees only the last two rounds and the moderator's summary.
const VISIBLE_ROUNDS: usize = 2;

pub(super) fn play(stage: &mut Stage, agents: usize) {
    let question = stage.fresh(QUESTION);
    let mut rounds: Vec<Vec<Text>> = Vec::new();
    for number in 0..6 {
        // The moderator reads everything so far and opens the round.
        let opening = speak(stage, 0, question, rounds.iter().flatten());
        rounds.push(vec![opening]);
        let mut turn = 1;
        while turn < agents {
            if turn > 1 && stage.chance(CUT_SHORT) {
                break;
            }
            if turn + 1 < agents && stage.chance(OUT_OF_TURN) {
                turn += 1;
            }
            let visible = rounds.len().saturating_sub(VISIBLE_ROUNDS + usize::from(number == 0));
            let statement = speak(stage, turn, question, rounds[visible..].iter().flatten());
            rounds[number].push(statement);
            turn += 1;
        }
        if !stage.chance(AGAIN) {
            break;
        }
    }
    speak(stage, 0, question, rounds.iter().flatten());
}

fn speak<'t>(stage: &mut Stage, index: usize, question: Text, thread: impl Iterator<Item = &'t Text>) -> Text {
    let system = stage.common(2, index, SYSTEM[index % SYSTEM.len()]);
    let mut prompt = stage.prompt();
    prompt.add(system).add(question).add_all(thread);
    let answer = stage.fresh(ANSWER);
    let role = stage.role(&ROLES, index);
    stage.call(&role, &prompt, answer, None, None);
    answer
}
