//! Popularity test: one engine serves many applications. A session is a short conversation with one of them, under the
//! system prompt that all its sessions have; applications are popular as 1 / rank.

use super::prompt::Text;
use super::stage::{Size, Stage};

/// System prompts of 8 to 60 blocks of 16 tokens, whatever the rank.
const SHORTEST: usize = 8;
const LONGEST: usize = 60;
const MESSAGE: Size = Size(120, 250);
const ANSWER: Size = Size(40, 90);
/// Another turn follows with this probability, two at most.
const AGAIN: f64 = 0.45;

pub(super) fn play(stage: &mut Stage, applications: usize) {
    let application = stage.popular(applications);
    let system_blocks = SHORTEST + application * 31 % (LONGEST - SHORTEST + 1);
    let system = stage.common(8, application, system_blocks as u32 * 16);
    let mut thread: Vec<Text> = Vec::new();
    for turn in 0.. {
        thread.push(stage.fresh(MESSAGE));
        let mut prompt = stage.prompt();
        prompt.add(system).add_all(&thread);
        let answer = stage.fresh(ANSWER);
        stage.call("assistant", &prompt, answer, None, None);
        thread.push(answer);
        if turn == 2 || !stage.chance(AGAIN) {
            return;
        }
    }
}
