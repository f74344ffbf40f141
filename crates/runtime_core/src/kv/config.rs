//! Which mechanisms are on, and what an oracle is told: for ablations and offline studies. An engine has all of them on
//! and no oracle.

use super::chain::STEPS;

/// Switches of the policy's mechanisms; all on by default. For ablations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Predict the next agent; off: every agent of the session is equally likely.
    pub prediction: bool,
    /// Transitions of order 2 over order 1.
    pub order2: bool,
    /// Transitions by whether a tool runs.
    pub tool_order: bool,
    /// Content by misses since the last use (superseded tails).
    pub superseded: bool,
    /// Content by class.
    pub content_classes: bool,
    /// Content by what the lane did at its last call, and by place and sessions of the block.
    pub content_odds: bool,
    /// What was evicted votes on content too.
    pub lost: bool,
    /// Learn when sessions end.
    pub session_end: bool,
    /// Gaps by pace and tool beside the agent.
    pub time_contexts: bool,
    /// Hit density; off: P(reuse within the residence horizon).
    pub density: bool,
    /// Sharing by degree and depth; off: private or shared.
    pub sharing_classes: bool,
    /// Sessions that walk another's path.
    pub followers: bool,
    /// Sharing by the agent and step of the last user.
    pub sharing_agents: bool,
    /// Remember anchors beyond their eviction.
    pub anchors: bool,
    /// Believe the engine's waiting queue.
    pub queue: bool,
    /// Let LRU take over while the learned order loses against it.
    pub guard: bool,
    /// Turn all scores upside down; to try the guard.
    pub sabotage: bool,
    /// Respects in which hints are believed; for offline studies.
    pub oracle: Oracle,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            prediction: true,
            order2: true,
            tool_order: true,
            superseded: true,
            content_classes: true,
            content_odds: true,
            lost: true,
            session_end: true,
            time_contexts: true,
            density: true,
            sharing_classes: true,
            sharing_agents: true,
            followers: true,
            anchors: true,
            queue: true,
            guard: true,
            sabotage: false,
            oracle: Oracle::default(),
        }
    }
}

/// Which [`Hint`]s and foretold starts are believed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Oracle {
    /// In how many calls of its session a block is used again.
    pub content: bool,
    /// When a session calls next.
    pub time: bool,
    /// Whether a session calls again, and how often, but not when.
    pub ends: bool,
    /// When another session uses a block.
    pub sharing: bool,
}

impl Oracle {
    pub(super) fn any(self) -> bool {
        self.content || self.time || self.ends || self.sharing
    }
}

/// The future of one block at the moment of its use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// Number (from 0) of the session's call that uses it next, `u32::MAX` for none.
    pub next_step: u32,
    /// Time at which another session uses it, microseconds, `u64::MAX` for never.
    pub shared_us: u64,
}

impl Hint {
    pub(super) const NONE: Self = Self { next_step: u32::MAX, shared_us: u64::MAX };
}

/// Starts of a session's next calls in microseconds, `u64::MAX` for none.
pub type FutureStarts = [u64; STEPS];
