//! `batch_shaping`: which sessions run together, and in which order.
//!
//! **Order.** First come, first served, until a window is set; then the session that began first goes first, so that sessions
//! end instead of all going on. Calls whose prompt is resident to four fifths and end in the same resident block follow
//! the first of them, so that a shared prefix is used while it is there.
//!
//! **Window.** While the pool thrashes, only the W sessions that began first may go on; calls of the others are held. The
//! sign of thrashing is that sessions have to compute again what they had. Over an epoch of W admissions (8 at least):
//!
//! ```text
//! loss  = sum of max(0, min(p, q) - r) / sum of min(p, q)
//! share = (tokens lost + tokens repeated after preemptions) / (prefill speed x length of the epoch)
//! p     prompt tokens of a call, r of them resident or in the host tier
//! q     prompt tokens of the same agent's last call in the same session
//! speed mean over steps that compute prompts: that of the contexts there are, as long ones are slower
//! ```
//!
//! It thrashes if the pool is full, calls that may go have to wait at most questions, loss is 0.2 above what is usual
//! without pressure, and share is above 0.3: less cannot pay for what fewer running calls cost. Then the window becomes
//! the number of sessions whose last prompts fit into the pool, but at least half and at most nine tenths of what it was
//! (multiplicative decrease), **on trial**: if two epochs later calls are not admitted 5 % faster, or more than two thirds of
//! the loss are left, the old window comes back and nothing is tried for 4, 8, ... 64 epochs. A window that has proved itself follows what fits, by nine tenths of it,
//! while loss and share stay high: contexts grow. While somebody is held, no calls wait and loss is low, it grows by an
//! eighth an epoch up to what fitted (or to 0.8 of where it thrashed last, if that is less), by 3 % beyond (additive
//! increase); when it binds nobody it is dropped.
//!
//! A session that is silent counts with P(it calls again | silent for so long), learned from gaps and ends. (Feedback on
//! cache signals at the level of agents: CONCUR, arXiv 2601.22705; pausing between calls: `ThunderAgent`, arXiv 2602.13692.)
//!
//! **Bounds.** A call is held until [`BatchShapingOptions::max_hold_us`] after it began to wait or, where that is longer, for
//! as long as 128 calls take from admission to end at present ([`BatchShapingOptions::max_hold_calls`]): where a call takes minutes, pauses of minutes only rotate
//! sessions through a pool that they do not fit into. From then on it waits in the order of sessions: no session that began
//! later passes it, but for those that share its turn, so nobody starves. When nothing runs, nobody is held.
//!
//! Costs one or two hash probes an event and, while there is a window, a visit per session in it a question; 110 bytes a
//! session that is remembered and 50 a call that waits or runs.

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
/// What a window becomes at least, and at most, of what it was.
const DECREASE: (f64, f64) = (0.5, 0.9);
/// Loss above the usual one that counts as thrashing.
const TOLERANCE: f64 = 0.2;
/// Share of the time spent on computing again from which on it does.
const COSTLY: f64 = 0.3;
/// How much faster calls have to be admitted for a smaller window to stay.
const BETTER: f64 = 1.05;
/// What may be left of the loss for that.
const CURED: f64 = 0.67;
/// Decreases of one trial.
const MOST_STEPS: u8 = 3;
/// Epochs without a trial after one that failed.
const PAUSE: (u32, u32) = (4, 64);
/// Of what fits, a window that has proved itself.
const FITS: f64 = 0.9;
/// Growth ends where contexts fit so many times.
const OVERFULL: f64 = 1.25;
/// Weight of the last call, or step, in a running mean.
const RECENT: f64 = 0.02;
/// Part of the pool that may be free while it counts as full.
const SLACK: f64 = 0.05;
/// Tokens of a step that tell how fast prompts are computed.
const TELLING_TOKENS: u64 = 1000;
/// A silent session that is less likely to call again is forgotten.
const FORGOTTEN: f64 = 0.02;

/// What may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShapingOptions {
    /// No call is held longer than this after it began to wait, microseconds, or,
    pub max_hold_us: u64,
    /// where that is longer, than so many calls take one after the other; 0: the time above alone.
    pub max_hold_calls: u32,
}

impl Default for BatchShapingOptions {
    fn default() -> Self {
        Self { max_hold_us: 300_000_000, max_hold_calls: 128 }
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
    /// Length of its last prompt.
    tokens: u32,
}

/// A smaller window, to be judged.
#[derive(Clone, Copy, Debug)]
struct Trial {
    before: Option<f64>,
    /// Admissions a microsecond, and loss, before.
    rate: f64,
    loss: f64,
    /// What was let in before has gone through.
    settled: bool,
    steps: u8,
}

/// P(a silent session calls again), from the gaps and ends there were.
#[derive(Debug)]
struct Alive {
    /// Gaps by octave of microseconds.
    gaps: [f64; 64],
    /// Sessions that ended or were forgotten.
    ended: f64,
    /// As of the last update: gaps longer than each octave's beginning, and ends.
    longer: [f64; 65],
    over: f64,
}

impl Default for Alive {
    fn default() -> Self {
        Self { gaps: [0.0; 64], ended: 1.0, longer: [1.0; 65], over: 1.0 }
    }
}

impl Alive {
    fn gap(&mut self, gap_us: u64) {
        self.gaps[gap_us.max(1).ilog2() as usize] += 1.0;
    }

    fn update(&mut self) {
        // Too few to tell: whoever is silent is taken to come back as likely as not.
        if self.gaps.iter().sum::<f64>() < 8.0 {
            return;
        }
        let mut longer = 0.02;
        for octave in (0..64).rev() {
            longer += self.gaps[octave];
            self.longer[octave] = longer;
        }
        (self.longer[64], self.over) = (0.02, self.ended);
        if longer > 8192.0 {
            self.gaps.iter_mut().for_each(|gaps| *gaps *= 0.5);
            self.ended *= 0.5;
        }
    }

    /// By Bayes: of those who were silent for so long, some called again, and the ended are silent for ever.
    fn weight(&self, session: &Session, now_us: u64) -> f64 {
        if session.calls > 0 {
            return 1.0;
        }
        let silent_us = now_us.saturating_sub(session.last_us).max(1);
        let octave = silent_us.ilog2() as usize;
        let within = silent_us as f64 / (1u64 << octave) as f64 - 1.0;
        let longer = self.longer[octave] + within * (self.longer[octave + 1] - self.longer[octave]);
        longer / (longer + self.over)
    }
}

#[derive(Debug, Default)]
struct State {
    sessions: FxHashMap<u64, Session>,
    /// The sessions by number: ascending.
    line: Vec<(u64, u64)>,
    hand: usize,
    begun: u64,
    /// Session and first admission of calls that wait or run; 0: not admitted.
    calls: FxHashMap<u64, (u64, u64)>,
    /// What calls take from admission to end, microseconds.
    stay_us: f64,
    /// Sessions that may go on; none: all.
    window: Option<f64>,
    /// Where it thrashed last.
    ceiling: f64,
    trial: Option<Trial>,
    backoff: u32,
    pause: u32,
    usual_loss: f64,
    alive: Alive,
    /// Sessions there are, each by how likely it calls again.
    live: f64,
    full: bool,
    pool_tokens: f64,
    /// Prompt tokens a microsecond, and those of the step that has not been seen to end.
    speed: f64,
    computed: u64,
    last_ask_us: u64,
    // Of the present epoch:
    epoch_us: u64,
    admitted: u32,
    had_tokens: f64,
    lost_tokens: f64,
    /// Questions, and those at which calls that might go were waiting for the second time.
    asked: u32,
    busy: u32,
    held: bool,
    order: Vec<Place>,
}

/// Sort key of a waiting call: those that may go, then those that are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    held: bool,
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

/// A running mean, and what it becomes by one more.
fn recent(mean: f64, one: f64) -> f64 {
    if mean > 0.0 {
        mean + RECENT * (one - mean)
    } else {
        one
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
            // Two are looked at for one that comes: few of the line have been silent for long.
            for _ in 0..2 {
                self.hand = if self.hand + 1 < self.line.len() { self.hand + 1 } else { 0 };
                let Some(&(_, key)) = self.line.get(self.hand) else { break };
                let session = &self.sessions[&key];
                if self.alive.weight(session, now_us) < FORGOTTEN {
                    self.forget(key);
                }
            }
            let number = self.begun;
            self.begun += 1;
            let lanes = [Lane::default(); LANES];
            self.sessions.insert(
                key,
                Session { number, last_us: now_us, calls: 0, lanes, next_lane: 0, tokens: call.prompt_tokens },
            );
            self.line.push((number, key));
        }
        self.calls.insert(call.call, (key, 0));
        if let Some(session) = self.sessions.get_mut(&key) {
            if session.calls == 0 && session.next_lane > 0 {
                let gap_us = now_us.saturating_sub(session.last_us);
                self.alive.gap(gap_us);
            }
            session.calls += 1;
            session.last_us = now_us;
        }
    }

    fn gone(&mut self, now_us: u64, call: u64) {
        let Some((key, admitted_us)) = self.calls.remove(&call) else { return };
        if admitted_us > 0 {
            let stay_us = now_us.saturating_sub(admitted_us) as f64;
            self.stay_us = recent(self.stay_us, stay_us);
        }
        if let Some(session) = self.sessions.get_mut(&key) {
            session.calls = session.calls.saturating_sub(1);
            session.last_us = now_us;
        }
    }

    fn forget(&mut self, key: u64) {
        if let Some(session) = self.sessions.remove(&key) {
            self.alive.ended += 1.0;
            if let Ok(at) = self.line.binary_search_by_key(&session.number, |place| place.0) {
                self.line.remove(at);
            }
        }
    }

    fn admitted(&mut self, now_us: u64, call: &Waiting) {
        if let Some((_, admitted_us)) = self.calls.get_mut(&call.call) {
            *admitted_us = now_us;
        }
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
        session.tokens = call.prompt_tokens;
        self.admitted += 1;
        let window = self.window.unwrap_or(self.live.max(f64::from(LEAST_EPOCH)));
        if f64::from(self.admitted) >= window.max(f64::from(LEAST_EPOCH)) {
            self.end_epoch(now_us, window);
        }
    }

    fn end_epoch(&mut self, now_us: u64, window: f64) {
        let elapsed_us = now_us.saturating_sub(self.epoch_us).max(1) as f64;
        let rate = f64::from(self.admitted) / elapsed_us;
        let loss = if self.had_tokens > 0.0 { self.lost_tokens / self.had_tokens } else { self.usual_loss };
        let share = self.lost_tokens / (self.speed * elapsed_us).max(1.0);
        let saturated = 2 * self.busy > self.asked;
        let loses = self.full && loss > self.usual_loss + TOLERANCE && share > COSTLY;
        let thrashes = loses && saturated;
        match self.trial.take() {
            Some(trial) if !trial.settled => self.trial = Some(Trial { settled: true, ..trial }),
            Some(trial) if thrashes && trial.steps < MOST_STEPS => {
                self.trial = Some(Trial { settled: false, steps: trial.steps + 1, ..trial });
                self.decrease(now_us, window);
            }
            Some(trial)
                if rate < BETTER * trial.rate || loss - self.usual_loss > CURED * (trial.loss - self.usual_loss) =>
            {
                self.window = trial.before;
                self.backoff = (2 * self.backoff).clamp(PAUSE.0, PAUSE.1);
                self.pause = self.backoff;
            }
            _ if thrashes && self.pause == 0 => {
                self.trial = Some(Trial { before: self.window, rate, loss, settled: false, steps: 1 });
                self.ceiling = window.min(OVERFULL * self.fitting(now_us));
                self.decrease(now_us, window);
                // A loss that a smaller window does not cure is not due to the pool: get used to it.
                self.usual_loss += 0.02 * (loss - self.usual_loss);
            }
            _ => {
                self.pause = self.pause.saturating_sub(1);
                // What is lost although it would fit is not due to the window.
                let fits = FITS * self.fitting(now_us);
                let blameless = !self.full || window <= fits;
                self.usual_loss += 0.2 * (loss - self.usual_loss).min(if blameless { 1.0 } else { 0.0 });
                // Sessions change: where it thrashed last is forgotten slowly.
                self.ceiling *= 1.02;
                if self.window.is_some() && loses && !blameless {
                    self.window = Some(fits.max(DECREASE.0 * window).max(1.0));
                } else if self.held && !saturated && (blameless || loss < self.usual_loss + 0.5 * TOLERANCE) {
                    self.window = Some(window * if window < 0.8 * self.ceiling { 1.125 } else { 1.03 });
                } else if !self.held && window > self.live {
                    self.window = None;
                }
            }
        }
        (self.admitted, self.had_tokens, self.lost_tokens, self.epoch_us) = (0, 0.0, 0.0, now_us);
        (self.asked, self.busy, self.held) = (0, 0, false);
        self.alive.update();
        self.live = self.line.iter().map(|(_, key)| self.alive.weight(&self.sessions[key], now_us)).sum();
    }

    fn decrease(&mut self, now_us: u64, window: f64) {
        let fitting = self.fitting(now_us);
        self.window = Some(fitting.clamp(DECREASE.0 * window, DECREASE.1 * window).max(1.0));
    }

    /// How many sessions, from the one that began first, the pool can keep.
    fn fitting(&self, now_us: u64) -> f64 {
        let (mut room, mut inside) = (self.pool_tokens, 0.0);
        for (_, key) in &self.line {
            let session = &self.sessions[key];
            let weight = self.alive.weight(session, now_us);
            room -= weight * f64::from(session.tokens);
            if room < 0.0 {
                break;
            }
            inside += weight;
        }
        inside
    }

    /// The number from which on sessions are outside.
    fn first_outside(&self, now_us: u64) -> u64 {
        let Some(window) = self.window else { return u64::MAX };
        let mut inside = 0.0;
        for &(number, key) in &self.line {
            inside += self.alive.weight(&self.sessions[&key], now_us);
            if inside > window {
                return number;
            }
        }
        u64::MAX
    }

    fn rank(&mut self, options: BatchShapingOptions, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let mut order = std::mem::take(&mut self.order);
        self.pool_tokens = f64::from(load.pool_blocks) * f64::from(load.block_tokens);
        self.full = f64::from(load.free_blocks) < SLACK * f64::from(load.pool_blocks);
        let first_outside = self.first_outside(load.now_us);
        let bound_us = options.max_hold_us.max((f64::from(options.max_hold_calls) * self.stay_us) as u64);
        order.clear();
        for (index, call) in waiting.iter().enumerate() {
            // A call that nobody told of is of a session that has just begun.
            let session = self.sessions.get(&key(call.workload, call.session));
            let number = session.map_or(u64::MAX - 1, |session| session.number);
            let shares = call.group != 0 && 5 * u64::from(call.resident_tokens) >= 4 * u64::from(call.prompt_tokens);
            let held = number >= first_outside && call.arrived_us.saturating_add(bound_us) > load.now_us;
            order.push(Place {
                held,
                turn: if self.window.is_none() { call.arrived_us } else { number },
                group: if shares && !held { call.group } else { 0 },
                number,
                arrived_us: call.arrived_us,
                index: index as u32,
            });
        }
        // Whoever shares a prefix with one that is served earlier takes its turn.
        order.sort_unstable_by_key(|place| (place.group, place.turn));
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
            if place.held && (rank > 0 || load.running_calls > 0) {
                decision.hold_until_us = place.arrived_us.saturating_add(bound_us);
                self.held = true;
            }
        }
        let left_over = |place: &Place| !place.held && place.arrived_us < self.last_ask_us;
        let since_us = load.now_us.saturating_sub(self.last_ask_us);
        if since_us > 0 {
            if self.computed >= TELLING_TOKENS {
                self.speed = recent(self.speed, self.computed as f64 / since_us as f64);
            }
            self.computed = 0;
        }
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
            observes: "arrivals, admissions, tokens served, the pool; ends of sessions where they are told",
            decides: "order of waiting calls, and which are held",
            costs: "an event: some tens of nanoseconds; 64 waiting calls: some microseconds",
        }
    }

    fn needs(&self) -> Needs {
        [Needs::ARRIVALS, Needs::ADMISSIONS, Needs::SERVICE, Needs::POOL, Needs::PREFIXES]
            .into_iter()
            .fold(Needs::NONE, Needs::and)
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
                    state.admitted(now_us, call);
                }
            }
            Happening::Preempted { .. } => {}
            Happening::Withdrawn { call } | Happening::Ended { call } => state.gone(now_us, call),
            Happening::Served { prefill_tokens, repeated_tokens, .. } => {
                state.computed += u64::from(prefill_tokens) + u64::from(repeated_tokens);
                state.lost_tokens += f64::from(repeated_tokens);
            }
        }
    }

    fn observe(&self, _: &Runtime, event: &Event<'_>) {
        if event.kind == EventKind::SessionEnd {
            self.lock().forget(key(event.workload, event.session));
        }
    }

    fn schedule(&self, _: &Runtime, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        self.lock().rank(self.options, load, waiting, decisions);
    }
}
