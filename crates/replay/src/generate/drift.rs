//! Drift test: the selector chat, but every sixty sessions the team is turned round and everybody hands over to somebody
//! else. Replay it with `--order open`: the closed order shuffles sessions, and with them the change.

use super::selector_chat::{chat, weight};
use super::stage::Stage;

/// Sessions between two changes.
const LASTS: usize = 60;

pub(super) fn play(stage: &mut Stage, agents: usize) {
    if stage.session_number() / LASTS % 2 == 0 {
        chat(stage, agents, weight);
    } else {
        // Role i plays the part of the i-th from the end.
        chat(stage, agents, |speaker, next| weight(agents - 1 - speaker, agents - 1 - next));
    }
}
