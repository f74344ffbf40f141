//! Sessions in the order of what they have left: how much an order could gain if lengths were known, and how much of that
//! can be learned from sessions that have ended.
//!
//! Shortest remaining work first is what lowers the mean most where one thing is done at a time (Schrage, "A Proof of the
//! Optimality of the Shortest Remaining Processing Time Discipline", Operations Research 16, 1968). Here many calls run at
//! a time, so it is no bound in the mathematical sense. Long sessions wait for as long as shorter ones come.

use std::sync::{Mutex, PoisonError};

use replay::latency::LatencyModel;
use replay::trace::Trace;
use runtime_core::policy::{About, Event, Policy};
use runtime_core::runtime::EventKind;
use runtime_core::scheduling::{Decision, Happening, Load, Needs, Precedence, Waiting};
use runtime_core::Runtime;
use rustc_hash::FxHashMap;

use super::order::Cap;
use super::rank_by;

/// Calls among which the fixed costs of a step that decodes are taken to be shared.
const BATCH: f64 = 32.0;

/// `oracle-remaining`: the call whose session has the least left to compute goes first, as the trace says: no engine could
/// know. `oracle-remaining-N` moreover has at most N sessions open; when one ends, the shortest of the others begins.
///
/// Work is seconds of the device: prompt blocks that the session has not had before are computed, answers decoded among
/// [`BATCH`] calls.
pub(super) struct OracleRemaining {
    /// By call: work of it and of the session's later calls, nanoseconds. Empty where the trace is not known.
    left_ns: Vec<u64>,
    open: Cap,
}

impl OracleRemaining {
    pub(super) fn new(future: Option<(&Trace, &LatencyModel)>, sessions: usize) -> Self {
        let left_ns = future.map_or_else(Vec::new, |(trace, model)| Self::left_ns(trace, model));
        Self { left_ns, open: Cap::new(sessions) }
    }

    fn left_ns(trace: &Trace, model: &LatencyModel) -> Vec<u64> {
        let mut left_ns = vec![0; trace.calls.len()];
        // The session that had a block last.
        let mut had = vec![u32::MAX; trace.n_blocks as usize];
        for (number, session) in (0..).zip(&trace.sessions) {
            for &index in &session.calls {
                let call = &trace.calls[index as usize];
                let cached = trace.blocks(call.prompt).filter(|&block| had[block as usize] == number).count();
                let prompt = f64::from(call.prompt_tokens);
                let cached = (cached as f64 * f64::from(trace.block_size)).min(prompt);
                for block in trace.blocks(call.prompt).chain(trace.blocks(call.output)) {
                    had[block as usize] = number;
                }
                let output = f64::from(call.output_tokens);
                let prefill_s = model.prefill_s(prompt - cached, cached) - model.prefill_base_s;
                let token_s = (model.step_base_s + model.weights_s) / BATCH
                    + model.prefill_s_per_token
                    + model.step_s_per_sequence
                    + model.step_s_per_kv_token * (prompt + output / 2.0);
                left_ns[index as usize] = ((prefill_s + output * token_s) * 1e9) as u64;
            }
            let mut left = 0;
            for &index in session.calls.iter().rev() {
                left += left_ns[index as usize];
                left_ns[index as usize] = left;
            }
        }
        left_ns
    }
}

impl Policy for OracleRemaining {
    fn about(&self) -> About {
        About { name: "oracle-remaining".into(), observes: "the future", decides: "order, holds", costs: "a sort" }
    }

    fn needs(&self) -> Needs {
        self.open.needs()
    }

    fn precedence(&self) -> Precedence {
        Precedence::BatchShaping
    }

    fn observe(&self, runtime: &Runtime, event: &Event<'_>) {
        self.open.observe(runtime, event);
    }

    fn schedule(&self, runtime: &Runtime, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        rank_by(decisions, |at| self.left_ns.get(waiting[at].call as usize).copied());
        self.open.schedule(runtime, load, waiting, decisions);
    }
}

/// Positions of a session that are told apart.
const POSITIONS: usize = 200;
/// Sessions that the mean over everything counts as.
const PRIOR: f64 = 4.0;

/// `learned-remaining`: the same order by what sessions that have ended had left in the mean after as many calls, the
/// last of the same agent. It is told when sessions end, and forgets nothing.
#[derive(Default)]
pub(super) struct LearnedRemaining {
    state: Mutex<Learned>,
}

#[derive(Default)]
struct Learned {
    open: FxHashMap<u64, Open>,
    session_of: FxHashMap<u64, u64>,
    /// By agent and position: work left, and sessions that were there.
    left: FxHashMap<(u16, usize), (f64, f64)>,
    all: (f64, f64),
}

#[derive(Default)]
struct Open {
    /// Agent and position of each call, and what had been done when it came.
    calls: Vec<((u16, usize), f64)>,
    done: f64,
}

impl Policy for LearnedRemaining {
    fn about(&self) -> About {
        About { name: "learned-remaining".into(), observes: "service, ends", decides: "order", costs: "a sort" }
    }

    fn needs(&self) -> Needs {
        [Needs::SESSION_ENDS, Needs::ARRIVALS, Needs::SERVICE].into_iter().fold(Needs::CALLS, Needs::and)
    }

    fn precedence(&self) -> Precedence {
        Precedence::BatchShaping
    }

    fn observe(&self, _: &Runtime, event: &Event<'_>) {
        if event.kind != EventKind::SessionEnd {
            return;
        }
        let state = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(ended) = state.open.remove(&event.session) else { return };
        for (place, done) in ended.calls {
            for (left, sessions) in [state.left.entry(place).or_default(), &mut state.all] {
                *left += ended.done - done;
                *sessions += 1.0;
            }
        }
    }

    fn hear(&self, _: &Runtime, _: u64, happening: &Happening) {
        let state = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match *happening {
            Happening::Arrived(ref call) => {
                let open = state.open.entry(call.session).or_default();
                open.calls.push(((call.agent, open.calls.len().min(POSITIONS)), open.done));
                state.session_of.insert(call.call, call.session);
            }
            Happening::Served { call, prefill_tokens, decoded_tokens, .. } => {
                // A token that is decoded takes the device about ten times as long as one that is computed in a chunk.
                let work = f64::from(prefill_tokens) + 10.0 * f64::from(decoded_tokens);
                if let Some(open) = state.session_of.get(&call).and_then(|session| state.open.get_mut(session)) {
                    open.done += work;
                }
            }
            Happening::Ended { call } => drop(state.session_of.remove(&call)),
            _ => {}
        }
    }

    fn schedule(&self, _: &Runtime, _: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let state = &*self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let usual = state.all.0 / state.all.1.max(1.0);
        rank_by(decisions, |at| {
            let place = state.open.get(&waiting[at].session).and_then(|open| open.calls.last());
            let (left, sessions) = place.and_then(|(place, _)| state.left.get(place)).copied().unwrap_or_default();
            ((left + PRIOR * usual) / (sessions + PRIOR)) as u64
        });
    }
}
