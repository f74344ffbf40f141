//! Which call runs when.
//!
//! The order of calls is fixed *before* any policy runs and is the same for all of them: think and tool times are
//! recorded or drawn from the seed, and a call occupies its blocks for its recorded duration or for the modelled
//! duration without a cache. A policy that saves time therefore does not change what it is asked next, and the
//! offline optimum is well defined. What saved time is worth is computed afterwards, see [`crate::latency`] and
//! [`crate::sim::timeline`].
//!
//! A call starts when the distinct blocks of all running calls and its own fit into the pool, first come first
//! served. A call that could not even fit alone bypasses the cache.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, LogNormal};

use crate::error::{Error, Result};
use crate::latency::LatencyModel;
use crate::trace::{Clock, Trace};

/// How calls are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// N sessions at a time, each sending its next call after the previous answer plus think or tool time.
    Closed,
    /// Sessions and calls arrive at their recorded times; what an engine recorded of itself also starts and ends at them.
    Open,
    /// One call at a time in file order, nothing concurrent, nothing pinned meanwhile.
    File,
}

/// What fixes a schedule.
#[derive(Clone, Copy, Debug)]
pub struct ScheduleOptions {
    /// How calls are ordered.
    pub order: Order,
    /// Concurrent sessions of the closed loop.
    pub sessions: usize,
    /// Seed of session order and drawn times.
    pub seed: u64,
    /// Pool size in blocks.
    pub capacity_blocks: usize,
    /// Durations of calls whose trace records none.
    pub model: LatencyModel,
}

/// What happens at an [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The call has arrived and waits for room: what it will ask for is known from here on.
    Queued,
    /// The call starts, its blocks are pinned.
    Start,
    /// The call ends; its output enters the cache, its blocks are unpinned.
    Finish,
    /// The call needs a block more, for tokens that fill none yet.
    Grow,
    /// The call is larger than the pool and runs without the cache.
    Bypass,
}

/// One step of the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Microseconds since the start.
    pub time_us: u64,
    /// Index into `Trace::calls`.
    pub call: u32,
    /// What happens.
    pub kind: EventKind,
}

/// The order of events, the same for every policy.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Events in time order.
    pub events: Vec<Event>,
    /// Think and tool time before each call, seconds, by call index.
    pub gap_s: Vec<f64>,
    /// Sessions in the order in which they start.
    pub session_order: Vec<u32>,
    /// The options that made it.
    pub options: ScheduleOptions,
}

/// Recorded gaps are clipped to this range: shorter ones are clock noise, longer ones a person at lunch.
pub const GAP_RANGE_S: (f64, f64) = (0.05, 120.0);
/// Median of drawn think time, seconds.
pub const THINK_MEDIAN_S: f64 = 0.5;
/// Median of drawn tool time, seconds.
pub const TOOL_MEDIAN_S: f64 = 2.0;
/// Sigma of the log-normal of drawn times.
pub const DRAWN_SIGMA: f64 = 1.0;

impl Schedule {
    /// Orders the calls of `trace`.
    pub fn new(trace: &Trace, options: ScheduleOptions) -> Result<Self> {
        if options.sessions == 0 {
            return Err(bad(
                "--sessions",
                "must be at least 1",
                "pass the number of concurrent sessions, for example 16",
            ));
        }
        if options.capacity_blocks == 0 {
            return Err(bad("--capacity", "the pool has no block", "pass a larger percentage or a number of blocks"));
        }
        let mut rng = StdRng::seed_from_u64(options.seed);
        let mut session_order: Vec<u32> = (0..trace.sessions.len() as u32).collect();
        if options.order == Order::Closed {
            session_order.shuffle(&mut rng);
        }
        let gap_s = draw_gaps(trace, &mut rng);
        let schedule = Self { events: Vec::with_capacity(trace.calls.len() * 2), gap_s, session_order, options };
        Ok(match options.order {
            Order::File => schedule.file_order(trace),
            Order::Closed => schedule.run_sessions(trace, &[]),
            Order::Open if trace.is_recording() => schedule.follow_recording(trace),
            Order::Open => {
                let starts = session_starts(trace, &schedule, &mut rng);
                schedule.run_sessions(trace, &starts)
            }
        })
    }

    /// Does this schedule follow the times at which an engine started and ended the calls of `trace`?
    pub fn follows(&self, trace: &Trace) -> bool {
        self.options.order == Order::Open && trace.is_recording()
    }

    /// Every call arrives, starts and ends when it did, whatever others of its session do, and occupies what it did:
    /// its partial last block at once, the blocks of its answer as it grows, evenly over its time.
    ///
    /// In a pool smaller than the recorded one a call may have to wait for room; it then takes as long as it did.
    fn follow_recording(mut self, trace: &Trace) -> Self {
        #[derive(PartialEq, Eq, PartialOrd, Ord)]
        enum Todo {
            Finish,
            Grow,
            Arrive,
            Start,
        }
        let capacity = self.options.capacity_blocks;
        let mut heap: BinaryHeap<Reverse<(u64, Todo, u32)>> = BinaryHeap::new();
        for (call, c) in (0..).zip(&trace.calls) {
            let arrived_s = c.arrival_s.unwrap_or_default();
            let started_s = arrived_s + c.queue_s.unwrap_or_default();
            heap.push(Reverse((us(started_s), Todo::Start, call)));
            if us(started_s) > us(arrived_s) && trace.occupied(call).1 <= capacity {
                heap.push(Reverse((us(arrived_s), Todo::Arrive, call)));
            }
        }
        let mut queue: VecDeque<u32> = VecDeque::new();
        let mut pins = vec![0u16; trace.n_blocks as usize];
        let mut held = vec![0usize; trace.calls.len()];
        // Pinned blocks, and those held beside them.
        let mut used = 0;
        while let Some(Reverse((now, todo, call))) = heap.pop() {
            let c = &trace.calls[call as usize];
            match todo {
                Todo::Arrive => self.events.push(Event { time_us: now, call, kind: EventKind::Queued }),
                Todo::Start => queue.push_back(call),
                Todo::Grow if used < capacity => {
                    self.events.push(Event { time_us: now, call, kind: EventKind::Grow });
                    held[call as usize] += 1;
                    used += 1;
                }
                // The engine would take another call's blocks away.
                Todo::Grow => {}
                Todo::Finish => {
                    self.events.push(Event { time_us: now, call, kind: EventKind::Finish });
                    used -= held[call as usize];
                    for b in trace.blocks(c.prompt) {
                        pins[b as usize] -= 1;
                        used -= usize::from(pins[b as usize] == 0);
                    }
                }
            }
            while let Some(&call) = queue.front() {
                let c = &trace.calls[call as usize];
                let latency_us = us(c.llm_latency_s.unwrap_or_default()).max(1);
                let (start, end) = trace.occupied(call);
                if end > capacity {
                    self.events.push(Event { time_us: now, call, kind: EventKind::Bypass });
                    queue.pop_front();
                    continue;
                }
                let tail = start - trace.blocks_in(c.prompt);
                let new = trace.blocks(c.prompt).filter(|&b| pins[b as usize] == 0).count();
                if used + new + tail > capacity {
                    break;
                }
                queue.pop_front();
                for b in trace.blocks(c.prompt) {
                    pins[b as usize] += 1;
                }
                used += new;
                self.events.push(Event { time_us: now, call, kind: EventKind::Start });
                for _ in 0..tail {
                    self.events.push(Event { time_us: now, call, kind: EventKind::Grow });
                }
                held[call as usize] = tail;
                used += tail;
                let size = trace.block_size as usize;
                for block in start..end {
                    let token = (block * size + 1).saturating_sub(c.prompt_tokens as usize);
                    let share = token as f64 / f64::from(c.output_tokens.max(1));
                    let at = now + (latency_us as f64 * share.min(1.0)) as u64;
                    heap.push(Reverse((at.min(now + latency_us - 1), Todo::Grow, call)));
                }
                heap.push(Reverse((now + latency_us, Todo::Finish, call)));
            }
            let waits = todo == Todo::Start && queue.back() == Some(&call);
            if waits && c.queue_s.is_none_or(|queue_s| us(queue_s) == 0) {
                self.events.push(Event { time_us: now, call, kind: EventKind::Queued });
            }
        }
        self
    }

    /// Seconds that a call occupies its blocks in the schedule.
    pub fn service_s(&self, trace: &Trace, call: u32) -> f64 {
        nominal_service_s(trace, call, &self.options.model)
    }

    fn file_order(mut self, trace: &Trace) -> Self {
        let mut now_s = 0.0;
        for call in 0..trace.calls.len() as u32 {
            now_s += self.gap_s[call as usize];
            let fits = distinct_blocks(trace, call) <= self.options.capacity_blocks;
            let kind = if fits { EventKind::Start } else { EventKind::Bypass };
            self.events.push(Event { time_us: us(now_s), call, kind });
            now_s += self.service_s(trace, call);
            if fits {
                self.events.push(Event { time_us: us(now_s), call, kind: EventKind::Finish });
            }
        }
        self
    }

    /// The closed loop (`starts` empty) or sessions that start at `starts` seconds.
    fn run_sessions(mut self, trace: &Trace, starts: &[f64]) -> Self {
        #[derive(PartialEq, Eq, PartialOrd, Ord)]
        enum Todo {
            // Finishes sort before arrivals at the same instant: room is made before it is asked for.
            Finish,
            Arrive,
        }
        let mut heap: BinaryHeap<Reverse<(u64, Todo, u32)>> = BinaryHeap::new();
        let mut waiting_sessions: VecDeque<u32> = VecDeque::new();
        if starts.is_empty() {
            waiting_sessions = self.session_order.iter().copied().collect();
            for _ in 0..self.options.sessions {
                if let Some(call) = next_session(&mut waiting_sessions, trace) {
                    heap.push(Reverse((us(self.gap_s[call as usize]), Todo::Arrive, call)));
                }
            }
        } else {
            for &session in &self.session_order {
                if let Some(&call) = trace.sessions[session as usize].calls.first() {
                    heap.push(Reverse((us(starts[session as usize]), Todo::Arrive, call)));
                }
            }
        }
        let mut queue: VecDeque<u32> = VecDeque::new();
        let mut pins = vec![0u16; trace.n_blocks as usize];
        let mut pinned = 0usize;
        while let Some(Reverse((now, todo, call))) = heap.pop() {
            let arrived = todo == Todo::Arrive;
            match todo {
                Todo::Arrive => queue.push_back(call),
                Todo::Finish => {
                    let c = &trace.calls[call as usize];
                    if self.fits_alone(trace, call) {
                        self.events.push(Event { time_us: now, call, kind: EventKind::Finish });
                        for b in trace.blocks(c.prompt).chain(trace.blocks(c.output)) {
                            pins[b as usize] -= 1;
                            pinned -= usize::from(pins[b as usize] == 0);
                        }
                    }
                    let calls = &trace.sessions[c.session as usize].calls;
                    let position = calls.partition_point(|&x| x <= call);
                    if let Some(&next) = calls.get(position) {
                        let mut at = now + us(self.gap_s[next as usize]);
                        if !starts.is_empty() {
                            if let Some(arrival) = recorded_arrival(trace, next, starts) {
                                at = us(arrival).max(now);
                            }
                        }
                        heap.push(Reverse((at, Todo::Arrive, next)));
                    } else if let Some(next) = next_session(&mut waiting_sessions, trace) {
                        heap.push(Reverse((now + us(self.gap_s[next as usize]), Todo::Arrive, next)));
                    }
                }
            }
            while let Some(&call) = queue.front() {
                let c = &trace.calls[call as usize];
                let end = now + us(self.service_s(trace, call)).max(1);
                if self.fits_alone(trace, call) {
                    let new =
                        trace.blocks(c.prompt).chain(trace.blocks(c.output)).filter(|&b| pins[b as usize] == 0).count();
                    if pinned + new > self.options.capacity_blocks {
                        break;
                    }
                    for b in trace.blocks(c.prompt).chain(trace.blocks(c.output)) {
                        pins[b as usize] += 1;
                    }
                    pinned += new;
                    self.events.push(Event { time_us: now, call, kind: EventKind::Start });
                } else {
                    self.events.push(Event { time_us: now, call, kind: EventKind::Bypass });
                }
                queue.pop_front();
                heap.push(Reverse((end, Todo::Finish, call)));
            }
            if arrived && queue.back() == Some(&call) && self.fits_alone(trace, call) {
                self.events.push(Event { time_us: now, call, kind: EventKind::Queued });
            }
        }
        self
    }

    fn fits_alone(&self, trace: &Trace, call: u32) -> bool {
        distinct_blocks(trace, call) <= self.options.capacity_blocks
    }
}

fn bad(option: &str, problem: &str, remedy: &str) -> Error {
    Error::BadOption { option: option.into(), problem: problem.into(), remedy: remedy.into() }
}

fn us(seconds: f64) -> u64 {
    (seconds * 1e6).round() as u64
}

/// Prompt and output of one call form a chain, so their blocks are distinct.
fn distinct_blocks(trace: &Trace, call: u32) -> usize {
    let c = &trace.calls[call as usize];
    trace.blocks_in(c.prompt) + trace.blocks_in(c.output)
}

fn nominal_service_s(trace: &Trace, call: u32, model: &LatencyModel) -> f64 {
    let c = &trace.calls[call as usize];
    c.llm_latency_s.unwrap_or_else(|| {
        model.prefill_s(f64::from(c.prompt_tokens), 0.0) + model.decode_s(f64::from(c.output_tokens))
    })
}

fn next_session(waiting: &mut VecDeque<u32>, trace: &Trace) -> Option<u32> {
    while let Some(session) = waiting.pop_front() {
        if let Some(&call) = trace.sessions[session as usize].calls.first() {
            return Some(call);
        }
    }
    None
}

/// Think or tool time before every call: recorded where the trace has times, drawn where it has none.
fn draw_gaps(trace: &Trace, rng: &mut StdRng) -> Vec<f64> {
    let think = LogNormal::new(THINK_MEDIAN_S.ln(), DRAWN_SIGMA).expect("sigma is positive");
    let tool = LogNormal::new(TOOL_MEDIAN_S.ln(), DRAWN_SIGMA).expect("sigma is positive");
    let mut gaps = vec![0.0; trace.calls.len()];
    for session in &trace.sessions {
        let mut previous: Option<u32> = None;
        for &index in &session.calls {
            // Both are drawn for every call, so that one trace with and one without times stay in step.
            let (drawn_think, drawn_tool) = (think.sample(rng), tool.sample(rng));
            let call = &trace.calls[index as usize];
            gaps[index as usize] = match previous.map(|p| &trace.calls[p as usize]) {
                None => drawn_think,
                Some(before) => match (trace.clock, before.arrival_s, call.arrival_s) {
                    (Clock::Session | Clock::Global, Some(from), Some(to)) => {
                        let busy_s = before.queue_s.unwrap_or(0.0) + before.llm_latency_s.unwrap_or(0.0);
                        (to - from - busy_s).clamp(GAP_RANGE_S.0, GAP_RANGE_S.1)
                    }
                    _ => match (before.tool, before.tool_latency_s) {
                        (_, Some(latency)) => latency.clamp(GAP_RANGE_S.0, GAP_RANGE_S.1),
                        (Some(_), None) => drawn_tool,
                        (None, None) => drawn_think,
                    },
                },
            };
            previous = Some(index);
        }
    }
    gaps
}

/// When sessions start in the open loop: recorded on a global clock, else a Poisson process that keeps
/// `options.sessions` sessions running on average.
fn session_starts(trace: &Trace, schedule: &Schedule, rng: &mut StdRng) -> Vec<f64> {
    let mut starts = vec![0.0; trace.sessions.len()];
    if trace.clock == Clock::Global {
        for (start, session) in starts.iter_mut().zip(&trace.sessions) {
            let first = session.calls.first().and_then(|&c| trace.calls[c as usize].arrival_s);
            *start = first.unwrap_or(0.0);
        }
        return starts;
    }
    let total_s: f64 = (0..trace.calls.len() as u32)
        .map(|c| schedule.gap_s[c as usize] + nominal_service_s(trace, c, &schedule.options.model))
        .sum();
    let spacing_s = total_s / trace.sessions.len().max(1) as f64 / schedule.options.sessions as f64;
    let mut at = 0.0;
    for start in &mut starts {
        *start = at;
        let u: f64 = rng.random();
        at += -(1.0 - u).ln() * spacing_s;
    }
    starts
}

fn recorded_arrival(trace: &Trace, call: u32, starts: &[f64]) -> Option<f64> {
    let c = &trace.calls[call as usize];
    match trace.clock {
        Clock::Global => c.arrival_s,
        Clock::Session => c.arrival_s.map(|a| a + starts[c.session as usize]),
        Clock::None => None,
    }
}
