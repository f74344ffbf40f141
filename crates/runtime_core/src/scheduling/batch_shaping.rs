//! `batch_shaping`: which sessions run together, and in which order.
//!
//! **Order.** The session that began first is served first, so that sessions end instead of all going on; calls whose
//! prompt is at least half resident and end in the same resident block follow the first of them, so that a shared prefix
//! is used while it is there.
//!
//! **Window.** While the pool thrashes, only the W sessions that began first may go on; calls of the others are held. The
//! sign of thrashing is that sessions have to compute again what they had: over the calls of an epoch,
//!
//! ```text
//! loss = sum of max(0, min(p, q) - r) / sum of min(p, q)
//! p    prompt tokens of a call, r of them resident or in the host tier
//! q    prompt tokens of the same agent's last call in the same session
//! ```
//!
//! Additive increase, multiplicative decrease, once an epoch of W admissions (8 at least): with the pool full and loss more
//! than 0.2 above what is usual without pressure, or after a preemption, W becomes 0.7 W, at first 0.7 of the sessions
//! there are; otherwise, if somebody was held, it grows by one or an eighth. It is dropped when it binds nobody. A session silent for
//! eight times the usual gap gives its place to the next. (Feedback on cache signals at the level of agents: CONCUR, arXiv
//! 2601.22705; pausing between calls, youngest first: `ThunderAgent`, arXiv 2602.13692.)
//!
//! **Bounds.** A call is held until [`BatchShapingOptions::max_hold_us`] after it began to wait, never longer; from then on it goes before
//! all that are not overdue, in order of arrival: nobody starves. When nothing runs, nothing is held.
//!
//! Costs one or two hash probes an event; 80 bytes a session that is remembered.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use crate::ids::{mix, WorkloadId};
use crate::policy::{About, Event, Policy};
use crate::runtime::EventKind;
use crate::scheduling::{Decision, Happening, Load, Needs, Precedence, Waiting};
use crate::Runtime;

/// Sessions remembered; the one that has been silent longest is forgotten first.
const MAX_SESSIONS: usize = 16_384;
/// Agents of a session whose last prompt is remembered.
const LANES: usize = 4;
const LEAST_EPOCH: u32 = 8;
const DECREASE: f64 = 0.7;
/// Loss above the usual one that counts as thrashing.
const TOLERANCE: f64 = 0.2;
/// Part of the pool that may be free while it counts as full.
const SLACK: f64 = 0.05;
/// Gaps after which a silent session gives its place away.
const PATIENCE: f64 = 8.0;
/// Gaps after which it is forgotten, for engines that do not tell of ends.
const MEMORY: f64 = 64.0;

/// What may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShapingOptions {
    /// No call is held longer than this after it began to wait, microseconds.
    pub max_hold_us: u64,
}

impl Default for BatchShapingOptions {
    fn default() -> Self {
        Self { max_hold_us: 300_000_000 }
    }
}

/// Lets sessions finish, and keeps as many at a time as the pool can.
#[derive(Debug)]
pub struct BatchShapingPolicy {
    options: BatchShapingOptions,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Lane {
    agent: u16,
    tokens: u32,
}

#[derive(Debug)]
struct Session {
    /// Place in the order of beginning.
    number: u64,
    last_us: u64,
    /// Calls that wait or run.
    calls: u32,
    lanes: [Lane; LANES],
    next_lane: u8,
}

#[derive(Debug, Default)]
struct State {
    sessions: FxHashMap<u64, Session>,
    /// The sessions by number: ascending.
    line: Vec<(u64, u64)>,
    hand: usize,
    begun: u64,
    calls: FxHashMap<u64, u64>,
    /// Sessions that may go on; none: all.
    window: Option<f64>,
    usual_loss: f64,
    gap_us: f64,
    full: bool,
    // Of the present epoch:
    admitted: u32,
    had_tokens: f64,
    lost_tokens: f64,
    /// Questions, and those at which calls that might go were waiting for the second time.
    asked: u32,
    busy: u32,
    last_ask_us: u64,
    preempted: bool,
    held: bool,
    order: Vec<Place>,
}

/// Sort key of a waiting call: overdue ones by arrival, then those that may go, then those that are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    class: u8,
    /// Number of the session whose turn it is: its own, or that of the first one in its group.
    turn: u64,
    group: u64,
    number: u64,
    arrived_us: u64,
    index: u32,
}

impl Default for BatchShapingPolicy {
    fn default() -> Self {
        Self::new(BatchShapingOptions::default())
    }
}

fn key(workload: WorkloadId, session: u64) -> u64 {
    session ^ mix(u64::from(workload.0))
}

impl BatchShapingPolicy {
    /// With options.
    pub fn new(options: BatchShapingOptions) -> Self {
        Self { options, state: Mutex::default() }
    }

    /// Sessions that may go on at present; none: all of them.
    pub fn window(&self) -> Option<f64> {
        self.lock().window
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves a table that is at worst one event behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn arrived(&mut self, now_us: u64, call: &Waiting) {
        let key = key(call.workload, call.session);
        if self.calls.contains_key(&call.call) {
            return;
        }
        if !self.sessions.contains_key(&key) {
            if self.sessions.len() == MAX_SESSIONS {
                let oldest = self.sessions.iter().min_by_key(|(_, session)| (session.calls, session.last_us));
                if let Some(oldest) = oldest.map(|(&key, _)| key) {
                    self.forget(oldest);
                }
            }
            let number = self.begun;
            self.begun += 1;
            let lanes = [Lane::default(); LANES];
            self.sessions.insert(key, Session { number, last_us: now_us, calls: 0, lanes, next_lane: 0 });
            self.line.push((number, key));
            // Two are looked at for one that comes: few of the line have been silent for long.
            for _ in 0..2 {
                self.hand = if self.hand + 1 < self.line.len() { self.hand + 1 } else { 0 };
                let (_, key) = self.line[self.hand];
                let session = &self.sessions[&key];
                if session.calls == 0 && now_us.saturating_sub(session.last_us) as f64 > MEMORY * self.gap_us.max(1e6) {
                    self.forget(key);
                }
            }
        }
        self.calls.insert(call.call, key);
        if let Some(session) = self.sessions.get_mut(&key) {
            if session.calls == 0 && session.next_lane > 0 {
                let gap_us = now_us.saturating_sub(session.last_us) as f64;
                self.gap_us += (gap_us - self.gap_us) * if self.gap_us == 0.0 { 1.0 } else { 0.05 };
            }
            session.calls += 1;
            session.last_us = now_us;
        }
    }

    fn gone(&mut self, now_us: u64, call: u64) {
        if let Some(session) = self.calls.remove(&call).and_then(|key| self.sessions.get_mut(&key)) {
            session.calls = session.calls.saturating_sub(1);
            session.last_us = now_us;
        }
    }

    fn forget(&mut self, key: u64) {
        if let Some(session) = self.sessions.remove(&key) {
            if let Ok(at) = self.line.binary_search_by_key(&session.number, |place| place.0) {
                self.line.remove(at);
            }
        }
    }

    fn admitted(&mut self, call: &Waiting) {
        let Some(session) = self.sessions.get_mut(&key(call.workload, call.session)) else { return };
        let known = usize::from(session.next_lane).min(LANES);
        let lane = session.lanes[..known].iter_mut().find(|lane| lane.agent == call.agent);
        if let Some(lane) = lane {
            let had = f64::from(lane.tokens.min(call.prompt_tokens));
            self.had_tokens += had;
            self.lost_tokens += (had - f64::from(call.resident_tokens) - f64::from(call.host_tokens)).max(0.0);
            lane.tokens = call.prompt_tokens;
        } else {
            session.lanes[usize::from(session.next_lane) % LANES] =
                Lane { agent: call.agent, tokens: call.prompt_tokens };
            session.next_lane =
                if session.next_lane as usize == 2 * LANES - 1 { LANES as u8 } else { session.next_lane + 1 };
        }
        self.admitted += 1;
        let window = self.window.unwrap_or(self.line.len() as f64);
        if f64::from(self.admitted) >= window.max(f64::from(LEAST_EPOCH)) {
            self.end_epoch(window);
        }
    }

    fn end_epoch(&mut self, window: f64) {
        let loss = if self.had_tokens > 0.0 { self.lost_tokens / self.had_tokens } else { self.usual_loss };
        let saturated = 2 * self.busy > self.asked;
        let thrashes = self.preempted || saturated && self.full && loss > self.usual_loss + TOLERANCE;
        if thrashes {
            self.window = Some((DECREASE * window).max(1.0));
            // A loss that a smaller window does not cure is not due to the pool: get used to it.
            self.usual_loss += 0.1 * (loss - self.usual_loss);
        } else {
            if !self.full {
                self.usual_loss += 0.2 * (loss - self.usual_loss);
            }
            if self.held {
                self.window = Some(window + (window / 8.0).max(1.0));
            } else if window > self.line.len() as f64 {
                self.window = None;
            }
        }
        (self.admitted, self.had_tokens, self.lost_tokens) = (0, 0.0, 0.0);
        (self.asked, self.busy, self.preempted, self.held) = (0, 0, false, false);
    }

    /// The number from which on sessions are outside.
    fn first_outside(&self, now_us: u64) -> u64 {
        let Some(window) = self.window else { return u64::MAX };
        let patience_us = (PATIENCE * self.gap_us) as u64;
        let mut inside = 0.0;
        for &(number, key) in &self.line {
            let session = &self.sessions[&key];
            if session.calls > 0 || now_us.saturating_sub(session.last_us) <= patience_us {
                inside += 1.0;
                if inside > window {
                    return number;
                }
            }
        }
        u64::MAX
    }

    fn rank(&mut self, max_hold_us: u64, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let mut order = std::mem::take(&mut self.order);
        self.full = f64::from(load.free_blocks) < SLACK * f64::from(load.pool_blocks);
        let first_outside = self.first_outside(load.now_us);
        order.clear();
        for (index, call) in waiting.iter().enumerate() {
            // A call that nobody told of is of a session that has just begun.
            let session = self.sessions.get(&key(call.workload, call.session));
            let number = session.map_or(u64::MAX - 1, |session| session.number);
            let shares = call.group != 0 && 2 * call.resident_tokens >= call.prompt_tokens;
            let class = if call.arrived_us.saturating_add(max_hold_us) <= load.now_us {
                0
            } else {
                1 + u8::from(number >= first_outside)
            };
            order.push(Place {
                class,
                turn: if class == 0 { call.arrived_us } else { number },
                group: if shares && class == 1 { call.group } else { 0 },
                number,
                arrived_us: call.arrived_us,
                index: index as u32,
            });
        }
        // Whoever shares a prefix with a session that began earlier takes its turn.
        order.sort_unstable_by_key(|place| (place.group, place.number));
        let mut first = (0, 0);
        for place in order.iter_mut().filter(|place| place.group != 0) {
            if place.group == first.0 {
                place.turn = first.1;
            }
            first = (place.group, place.turn);
        }
        order.sort_unstable();
        for (rank, place) in order.iter().enumerate() {
            let decision = &mut decisions[place.index as usize];
            decision.rank = rank as u32;
            // Where nothing runs, whoever is first goes on.
            if place.class == 2 && (rank > 0 || load.running_calls > 0) {
                decision.hold_until_us = place.arrived_us.saturating_add(max_hold_us);
                self.held = true;
            }
        }
        let left_over = |place: &Place| place.class < 2 && place.arrived_us < self.last_ask_us;
        self.asked += 1;
        self.busy += u32::from(order.iter().any(left_over));
        self.last_ask_us = load.now_us;
        self.order = order;
    }
}

impl Policy for BatchShapingPolicy {
    fn about(&self) -> About {
        About {
            name: "batch_shaping".into(),
            observes: "arrivals, admissions, the pool; preemptions and ends of sessions where they are told",
            decides: "order of waiting calls, and which are held",
            costs: "an event: some tens of nanoseconds; 64 waiting calls: some microseconds",
        }
    }

    fn needs(&self) -> Needs {
        [Needs::ARRIVALS, Needs::ADMISSIONS, Needs::POOL, Needs::PREFIXES].into_iter().fold(Needs::NONE, Needs::and)
    }

    fn precedence(&self) -> Precedence {
        Precedence::BatchShaping
    }

    fn hear(&self, _: &Runtime, now_us: u64, happening: &Happening) {
        let state = &mut *self.lock();
        match *happening {
            Happening::Arrived(ref call) => state.arrived(now_us, call),
            Happening::Admitted { ref call, again } => {
                state.arrived(now_us, call);
                if !again {
                    state.admitted(call);
                }
            }
            Happening::Preempted { .. } => state.preempted = true,
            Happening::Withdrawn { call } | Happening::Ended { call } => state.gone(now_us, call),
            Happening::Served { .. } => {}
        }
    }

    fn observe(&self, _: &Runtime, event: &Event<'_>) {
        if event.kind == EventKind::SessionEnd {
            self.lock().forget(key(event.workload, event.session));
        }
    }

    fn schedule(&self, _: &Runtime, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        self.lock().rank(self.options.max_hold_us, load, waiting, decisions);
    }
}
