//! Which calls and sessions run together.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use rustc_hash::FxHashMap;

use runtime_core::policy::{About, Event, Policy};
use runtime_core::runtime::EventKind;
use runtime_core::scheduling::{Decision, Happening, Load, Needs, Precedence, Waiting};
use runtime_core::Runtime;

use super::rank_by;

/// `lpm`: the call with the longest cached prefix first, `SGLang`'s default order (Zheng et al., "`SGLang`: Efficient
/// Execution of Structured Language Model Programs", `NeurIPS` 2024; `SchedulePolicy` of `SGLang` 0.4-0.5). As there, the
/// order is that of arrival while more than 128 calls wait. Left out: prefixes shared among waiting calls only.
///
/// Starves calls with short prefixes for as long as others come.
pub(super) struct LongestPrefix;

const FEW: usize = 128;

impl Policy for LongestPrefix {
    fn about(&self) -> About {
        About { name: "lpm".into(), observes: "resident prefixes", decides: "order", costs: "a sort" }
    }

    fn needs(&self) -> Needs {
        Needs::PREFIXES
    }

    fn precedence(&self) -> Precedence {
        Precedence::BatchShaping
    }

    fn schedule(&self, _: &Runtime, _: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        if waiting.len() <= FEW {
            rank_by(decisions, |at| Reverse(waiting[at].resident_tokens));
        }
    }
}

/// `priority`: calls of the session that began first go first, as with vLLM's priority order and a session's number as
/// priority.
#[derive(Default)]
pub(super) struct SessionPriority {
    began: Mutex<FxHashMap<u64, u64>>,
}

impl Policy for SessionPriority {
    fn about(&self) -> About {
        About { name: "priority".into(), observes: "arrivals", decides: "order", costs: "a sort" }
    }

    fn needs(&self) -> Needs {
        Needs::ARRIVALS
    }

    fn precedence(&self) -> Precedence {
        Precedence::BatchShaping
    }

    fn hear(&self, _: &Runtime, _: u64, happening: &Happening) {
        if let Happening::Arrived(call) = happening {
            let mut began = self.began.lock().unwrap_or_else(PoisonError::into_inner);
            let next = began.len() as u64;
            began.entry(call.session).or_insert(next);
        }
    }

    fn schedule(&self, _: &Runtime, _: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let began = self.began.lock().unwrap_or_else(PoisonError::into_inner);
        rank_by(decisions, |at| began.get(&waiting[at].session).copied());
    }
}

/// `cap-N`: at most N sessions that have begun and not ended; the others' first calls wait. It is told when sessions end.
pub(super) struct Cap {
    sessions: usize,
    open: Mutex<BTreeSet<u64>>,
}

impl Cap {
    pub(super) fn new(sessions: usize) -> Self {
        Self { sessions, open: Mutex::default() }
    }
}

impl Policy for Cap {
    fn about(&self) -> About {
        About { name: "cap-N".into(), observes: "sessions", decides: "holds", costs: "a look-up a call" }
    }

    fn needs(&self) -> Needs {
        Needs::SESSION_ENDS.and(Needs::CALLS)
    }

    fn precedence(&self) -> Precedence {
        Precedence::BatchShaping
    }

    fn observe(&self, _: &Runtime, event: &Event<'_>) {
        if event.kind == EventKind::SessionEnd {
            self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&event.session);
        }
    }

    fn schedule(&self, _: &Runtime, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let mut order: Vec<usize> = (0..waiting.len()).collect();
        order.sort_by_key(|&at| decisions[at].rank);
        for at in order {
            if open.len() < self.sessions {
                open.insert(waiting[at].session);
            } else if !open.contains(&waiting[at].session) {
                decisions[at].hold_until_us = load.now_us + 1_000_000;
            }
        }
    }
}
