//! What agentrt sees in a workload, what it does with it, and what that costs: the figures of `agentrt explain`.
//!
//! agentrt, LRU and MIN run over the same schedule. While agentrt runs, [`Watch`] sits between it and the replay: it
//! keeps a ledger of every block (when last used, by whom, whether it was ever in the pool) and asks the core, at a few
//! blocks after every event, how likely they are to be used again ([`crate::calibration`]). Watching changes nothing:
//! the watched run hits what an unwatched one hits.

use rustc_hash::FxHashMap;
use serde::Serialize;

use crate::calibration::{self, Reliability, Sample};
use crate::error::Result;
use crate::latency::LatencyModel;
use crate::policies::{agentrt, AgentRt, Lru, Min};
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::schedule::{EventKind, Order, Schedule, ScheduleOptions};
use crate::sim::{self, Outcome};
use crate::sweep::Capacity;
use crate::trace::Trace;

/// Agents that get figures of their own, those with the most calls; all others are one.
pub const AGENTS: usize = 12;
/// Stretches of equally many calls in which hit rates are told.
pub const WINDOWS: usize = 50;
/// Blocks asked about after each event.
const SAMPLES_PER_EVENT: u64 = 4;
/// Observed transitions after which agentrt should foresee as well as it ever will.
const LEARNED_AFTER: usize = 50;
/// Transitions over which that is judged.
const JUDGED_OVER: usize = 200;

/// What to replay.
#[derive(Clone, Copy, Debug)]
pub struct ExplainOptions {
    /// How calls are ordered.
    pub order: Order,
    /// Concurrent sessions.
    pub sessions: usize,
    /// Seed of session order and drawn times.
    pub seed: u64,
    /// Pool size.
    pub capacity: Capacity,
    /// Durations of calls whose trace records none.
    pub model: LatencyModel,
}

/// One number for each of the three policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PerPolicy<T> {
    /// agentrt.
    pub agentrt: T,
    /// LRU.
    pub lru: T,
    /// The offline optimum.
    pub min: T,
}

/// A stretch of calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Window {
    /// Calls so far, at its end.
    pub calls: u64,
    /// Hit rates within it.
    pub hit_rate: PerPolicy<f64>,
}

/// One learned transition.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Edge {
    /// Agent that called.
    pub from: String,
    /// Agent that called next in the same session.
    pub to: String,
    /// P(`to` | `from`, there is a next call), as learned.
    pub learned: f64,
    /// The same in the whole trace.
    pub observed: f64,
}

/// Seconds and a probability.
pub type Point = (f64, f64);

/// How long sessions are silent after an agent's call.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Silence {
    /// Silences that ended with a next call.
    pub ended: u64,
    /// Silences of which only the beginning was seen: no further call until the replay ended.
    pub censored: u64,
    /// P(still silent), Kaplan-Meier over the replay.
    pub observed: Vec<Point>,
    /// P(still silent), as learned.
    pub learned: Vec<Point>,
    /// P(there is a next call at all), as learned.
    pub continues: f64,
}

/// How often blocks are used again, by how often they were passed over.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Tail {
    /// Calls of the owning agent, in the same session, since one that used the block; the last value: so many or more.
    pub misses: usize,
    /// Votes behind the figure; they fade.
    pub votes: f64,
    /// Share of the blocks that the agent's next call used.
    pub used_again: f64,
}

/// Where the prompt blocks of an agent's calls were found, and what its blocks cost meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AgentFigures {
    /// Its name, or how many others there are.
    pub agent: String,
    /// Calls that used the cache.
    pub calls: u64,
    /// Prompt blocks of these.
    pub prompt_blocks: u64,
    /// Of these, found in the pool.
    pub hit_blocks: PerPolicy<u64>,
    /// Prompt blocks that had never been in the pool: no policy can have them.
    pub never_seen_blocks: u64,
    /// Prompt blocks that had been in the pool and that agentrt evicted too early.
    pub evicted_too_early_blocks: u64,
    /// Block-seconds for which the pool held blocks that this agent used last.
    pub held_block_s: f64,
    /// Of these, after the last use before the block left: kept too long.
    pub kept_too_long_block_s: f64,
    /// Silence after its calls.
    pub silence: Silence,
    /// Blocks used again by misses.
    pub tails: Vec<Tail>,
}

/// How well the next agent of a session is foreseen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct NextAgent {
    /// Transitions in the replay.
    pub transitions: u64,
    /// 1 - H(next | last) / H(next).
    pub r: f64,
    /// Share foreseen by agentrt while it learned.
    pub agentrt: f64,
    /// Share foreseen by a model of order 2 that was trained on the whole trace, the transitions in question included.
    pub offline: f64,
    /// Share foreseen by guessing the same agent again.
    pub stay: f64,
    /// The first transitions after the fiftieth.
    pub early: Early,
}

/// How well the next agent is foreseen soon after the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Early {
    /// Transitions judged.
    pub transitions: u64,
    /// Share of them foreseen by agentrt.
    pub agentrt: f64,
    /// Share of them foreseen by the offline model.
    pub offline: f64,
}

/// Everything about one workload.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// Workload.
    pub workload: String,
    /// Concurrent sessions.
    pub sessions: usize,
    /// Seed.
    pub seed: u64,
    /// Pool size as a fraction of the live working set; null where it was given in blocks.
    pub capacity_fraction: Option<f64>,
    /// Pool size in blocks.
    pub capacity_blocks: usize,
    /// Calls that used the cache.
    pub calls: u64,
    /// Calls larger than the pool.
    pub bypassed_calls: u64,
    /// Hit rates.
    pub hit_rate: PerPolicy<f64>,
    /// Hit rates over time.
    pub windows: Vec<Window>,
    /// Learned transitions among the agents that have figures of their own.
    pub transitions: Vec<Edge>,
    /// Agents, most calls first.
    pub agents: Vec<AgentFigures>,
    /// The blocks of the whole pool, by misses.
    pub tails: Vec<Tail>,
    /// The next agent.
    pub next_agent: NextAgent,
    /// Median of the residence times for which survival was predicted, seconds.
    pub residence_s: f64,
    /// Predicted survival against what happened.
    pub calibration: Reliability,
}

/// Replays `trace` under agentrt, LRU and MIN, and tells what there is to see.
pub fn explain(trace: &Trace, options: &ExplainOptions) -> Result<Explanation> {
    let capacity_blocks = options.capacity.blocks(trace.mean_session_blocks(), options.sessions);
    let schedule = Schedule::new(
        trace,
        ScheduleOptions {
            order: options.order,
            sessions: options.sessions,
            seed: options.seed,
            capacity_blocks,
            model: options.model,
        },
    )?;
    let mut watch = Watch::new(own_policy(trace, &schedule), trace, &schedule);
    let own = sim::run(trace, &schedule, &mut watch, &mut |_| {});
    let lru = sim::run(trace, &schedule, &mut Lru::new(trace), &mut |_| {});
    let min = sim::run(trace, &schedule, &mut Min::new(trace, &schedule), &mut |_| {});
    let outcomes = PerPolicy { agentrt: &own, lru: &lru, min: &min };
    watch.finish(&schedule);

    let groups = Groups::new(trace);
    let known = calibration::outcomes(trace, &schedule, &watch.samples);
    let judged = watch.samples.iter().zip(&known).filter_map(|(s, came_true)| Some((s.probability, (*came_true)?)));
    let mut horizons: Vec<u64> = watch.samples.iter().map(|s| s.horizon_us).collect();
    horizons.sort_unstable();
    Ok(Explanation {
        workload: trace.workload.clone(),
        sessions: options.sessions,
        seed: options.seed,
        capacity_fraction: match options.capacity {
            Capacity::Fraction(fraction) => Some(fraction),
            Capacity::Blocks(_) => None,
        },
        capacity_blocks,
        calls: own.calls,
        bypassed_calls: own.bypassed_calls,
        hit_rate: PerPolicy { agentrt: own.hit_rate(), lru: lru.hit_rate(), min: min.hit_rate() },
        windows: windows(trace, &schedule, outcomes),
        transitions: transitions(trace, &watch.inner, &groups),
        tails: tails(&watch.inner, None),
        agents: agents(trace, &schedule, outcomes, &watch, &groups),
        next_agent: next_agent(trace, &watch.guesses),
        residence_s: horizons.get(horizons.len() / 2).map_or(0.0, |&us| us as f64 / 1e6),
        calibration: Reliability::of(judged),
    })
}

/// Which figures an agent's go into.
struct Groups {
    /// By agent.
    of: Vec<usize>,
    names: Vec<String>,
    /// The agents with figures of their own.
    own: Vec<u16>,
}

impl Groups {
    fn new(trace: &Trace) -> Self {
        let mut calls = vec![0u64; trace.agents.len()];
        trace.calls.iter().for_each(|call| calls[call.agent as usize] += 1);
        let mut agents: Vec<u16> = (0..trace.agents.len() as u16).collect();
        agents.sort_by_key(|&agent| (std::cmp::Reverse(calls[agent as usize]), agent));
        let own: Vec<u16> = agents[..agents.len().min(AGENTS)].to_vec();
        let mut of = vec![own.len(); trace.agents.len()];
        own.iter().enumerate().for_each(|(group, &agent)| of[agent as usize] = group);
        let mut names: Vec<String> = own.iter().map(|&agent| trace.agents[agent as usize].clone()).collect();
        if agents.len() > own.len() {
            names.push(format!("{} others", agents.len() - own.len()));
        }
        Self { of, names, own }
    }
}

/// The policy and a ledger of what happens to its blocks.
struct Watch {
    inner: AgentRt,
    /// Resident blocks, and where each is among them.
    resident: Vec<u32>,
    place: Vec<u32>,
    seen: Vec<bool>,
    last_use_us: Vec<u64>,
    holder: Vec<u16>,
    /// The pool tells what leaves it.
    watching: bool,
    /// Between the first and the last word of the replay on a call that starts.
    starting: bool,
    events: u32,
    never_seen: Vec<u64>,
    evicted_too_early: Vec<u64>,
    held_us: Vec<u64>,
    kept_too_long_us: Vec<u64>,
    samples: Vec<Sample>,
    guesses: Vec<Guess>,
    /// By call.
    arrived: Vec<bool>,
}

/// Who was expected to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guess {
    /// The call, never a session's first.
    pub call: u32,
    /// The agent that agentrt thought likeliest just before.
    pub foreseen: Option<u16>,
}

/// Whom agentrt expects before each call, in the order of `schedule`.
pub fn guesses(trace: &Trace, schedule: &Schedule) -> Vec<Guess> {
    let mut watch = Watch::new(own_policy(trace, schedule), trace, schedule);
    sim::run(trace, schedule, &mut watch, &mut |_| {});
    watch.guesses
}

fn own_policy(trace: &Trace, schedule: &Schedule) -> AgentRt {
    let config = agentrt::config("agentrt").expect("the policy itself is among its variants");
    AgentRt::new(schedule.options.capacity_blocks, config, agentrt::HostUse::of("agentrt"), trace, schedule)
}

impl Watch {
    fn new(inner: AgentRt, trace: &Trace, schedule: &Schedule) -> Self {
        let (blocks, agents) = (trace.n_blocks as usize, trace.agents.len());
        Self {
            inner,
            resident: Vec::with_capacity(schedule.options.capacity_blocks),
            place: vec![u32::MAX; blocks],
            seen: vec![false; blocks],
            last_use_us: vec![0; blocks],
            holder: vec![0; blocks],
            watching: false,
            starting: false,
            events: 0,
            never_seen: vec![0; agents],
            evicted_too_early: vec![0; agents],
            held_us: vec![0; agents],
            kept_too_long_us: vec![0; agents],
            samples: Vec::new(),
            guesses: Vec::new(),
            arrived: vec![false; trace.calls.len()],
        }
    }

    fn used(&mut self, block: u32, agent: u16, now_us: u64) {
        let b = block as usize;
        self.held_us[self.holder[b] as usize] += now_us - self.last_use_us[b];
        (self.last_use_us[b], self.holder[b]) = (now_us, agent);
    }

    fn left(&mut self, block: u32, now_us: u64) {
        let b = block as usize;
        let place = std::mem::replace(&mut self.place[b], u32::MAX);
        if place == u32::MAX {
            return;
        }
        self.resident.swap_remove(place as usize);
        if let Some(&moved) = self.resident.get(place as usize) {
            self.place[moved as usize] = place;
        }
        let (agent, idle_us) = (self.holder[b] as usize, now_us - self.last_use_us[b]);
        self.held_us[agent] += idle_us;
        self.kept_too_long_us[agent] += idle_us;
    }

    /// What is still there when the replay ends is held too, but nobody knows for how long.
    fn finish(&mut self, schedule: &Schedule) {
        let end_us = schedule.events.last().map_or(0, |event| event.time_us);
        for &block in &self.resident {
            let b = block as usize;
            self.held_us[self.holder[b] as usize] += end_us - self.last_use_us[b];
        }
    }

    fn foresee(&mut self, call: &CallView<'_>) {
        // A call that waits has been foreseen, or not, when it arrived.
        if call.step > 0 && !std::mem::replace(&mut self.arrived[call.call as usize], true) {
            self.guesses.push(Guess { call: call.call, foreseen: self.inner.foreseen(call.session) });
        }
    }

    fn event_is_over(&mut self, now_us: u64, pool: &Pool) {
        self.sample(now_us, pool);
        self.events += 1;
    }

    /// Asks about a few resident blocks that no call uses, drawn by a hash of the event's number.
    fn sample(&mut self, now_us: u64, pool: &Pool) {
        for i in 0..SAMPLES_PER_EVENT {
            let draw = runtime_core::ids::mix(u64::from(self.events) * SAMPLES_PER_EVENT + i);
            let Some(&block) = self.resident.get((draw % self.resident.len().max(1) as u64) as usize) else { return };
            if pool.is_pinned(block) {
                continue;
            }
            if let Some((probability, horizon_s)) = self.inner.survival(block, now_us) {
                self.samples.push(Sample {
                    event: self.events,
                    block,
                    horizon_us: (f64::from(horizon_s) * 1e6) as u64,
                    probability,
                });
            }
        }
    }
}

impl CachePolicy for Watch {
    fn call_queued(&mut self, call: &CallView<'_>, pool: &Pool) {
        self.foresee(call);
        self.inner.call_queued(call, pool);
        self.events += 1;
    }

    fn call_start(&mut self, call: &CallView<'_>, pool: &Pool) {
        self.starting = true;
        self.foresee(call);
        for &block in &call.prompt[..call.hit] {
            self.used(block, call.agent, call.time_us);
        }
        for &block in &call.prompt[call.hit..] {
            let counts = if self.seen[block as usize] { &mut self.evicted_too_early } else { &mut self.never_seen };
            counts[call.agent as usize] += 1;
        }
        self.inner.call_start(call, pool);
    }

    fn evict(&mut self, n: usize, now_us: u64, pool: &mut Pool) {
        if !std::mem::replace(&mut self.watching, true) {
            pool.keep_evicted();
        }
        self.inner.evict(n, now_us, pool);
        for block in pool.take_evicted() {
            self.left(block, now_us);
        }
    }

    fn inserted(&mut self, call: &CallView<'_>, blocks: &[u32], pool: &Pool) {
        for &block in blocks {
            let b = block as usize;
            if self.place[b] == u32::MAX {
                self.place[b] = self.resident.len() as u32;
                self.resident.push(block);
            }
            (self.seen[b], self.last_use_us[b], self.holder[b]) = (true, call.time_us, call.agent);
        }
        self.inner.inserted(call, blocks, pool);
        if std::mem::take(&mut self.starting) {
            self.event_is_over(call.time_us, pool);
        }
    }

    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], released: &[u32], pool: &Pool) {
        for &block in call.prompt.iter().chain(output) {
            self.used(block, call.agent, call.time_us);
        }
        self.inner.call_finish(call, output, released, pool);
        self.event_is_over(call.time_us, pool);
    }

    fn call_bypassed(&mut self, call: &CallView<'_>) {
        self.foresee(call);
        self.inner.call_bypassed(call);
        self.events += 1;
    }

    fn session_end(&mut self, session: u32, now_us: u64) {
        self.inner.session_end(session, now_us);
    }
}

/// (calls, prompt blocks, hits of each policy) of a call that used the cache.
fn of_call(trace: &Trace, call: u32, outcomes: PerPolicy<&Outcome>) -> Option<(u64, PerPolicy<u64>)> {
    let hits = |outcome: &Outcome| u64::from(outcome.call_hits[call as usize]);
    if outcomes.agentrt.call_hits[call as usize] == u32::MAX {
        return None;
    }
    let blocks = trace.blocks_in(trace.calls[call as usize].prompt) as u64;
    Some((blocks, PerPolicy { agentrt: hits(outcomes.agentrt), lru: hits(outcomes.lru), min: hits(outcomes.min) }))
}

fn windows(trace: &Trace, schedule: &Schedule, outcomes: PerPolicy<&Outcome>) -> Vec<Window> {
    let starts = schedule.events.iter().filter(|event| event.kind == EventKind::Start);
    let calls: Vec<_> = starts.filter_map(|event| of_call(trace, event.call, outcomes)).collect();
    let width = calls.len().div_ceil(WINDOWS).max(1);
    let mut done = 0;
    calls
        .chunks(width)
        .map(|chunk| {
            done += chunk.len() as u64;
            let blocks = chunk.iter().map(|call| call.0).sum::<u64>().max(1) as f64;
            let rate = |hits: fn(&PerPolicy<u64>) -> u64| chunk.iter().map(|c| hits(&c.1)).sum::<u64>() as f64 / blocks;
            let hit_rate = PerPolicy { agentrt: rate(|h| h.agentrt), lru: rate(|h| h.lru), min: rate(|h| h.min) };
            Window { calls: done, hit_rate }
        })
        .collect()
}

fn transitions(trace: &Trace, learned: &AgentRt, groups: &Groups) -> Vec<Edge> {
    let mut counts: FxHashMap<(u16, u16), u64> = FxHashMap::default();
    let mut totals = vec![0u64; trace.agents.len()];
    for (_, last, next) in steps(trace) {
        *counts.entry((last, next)).or_default() += 1;
        totals[last as usize] += 1;
    }
    let mut edges = Vec::new();
    for &from in &groups.own {
        let row = learned.learned().successors(from);
        let total: u32 = row.iter().map(|&(_, count)| count).sum();
        let share = |to: u16| row.iter().find(|r| r.0 == to).map_or(0.0, |r| f64::from(r.1) / f64::from(total.max(1)));
        for &to in &groups.own {
            let seen = counts.get(&(from, to)).copied().unwrap_or(0);
            let edge = Edge {
                from: trace.agents[from as usize].clone(),
                to: trace.agents[to as usize].clone(),
                learned: share(to),
                observed: seen as f64 / totals[from as usize].max(1) as f64,
            };
            if edge.learned > 0.0 || seen > 0 {
                edges.push(edge);
            }
        }
    }
    edges
}

/// Of every call but a session's first: the agent before last (if any), the last agent, this one; in file order.
fn steps(trace: &Trace) -> impl Iterator<Item = (Option<u16>, u16, u16)> + '_ {
    let agent = |call: u32| trace.calls[call as usize].agent;
    trace.sessions.iter().flat_map(move |session| {
        let calls = &session.calls;
        (1..calls.len())
            .map(move |i| (i.checked_sub(2).map(|before| agent(calls[before])), agent(calls[i - 1]), agent(calls[i])))
    })
}

fn tails(learned: &AgentRt, agent: Option<u16>) -> Vec<Tail> {
    let promises = learned.learned().promises(agent);
    let told = promises.iter().enumerate().filter(|(_, p)| p.expected > 0.0);
    told.map(|(misses, p)| Tail { misses, votes: f64::from(p.expected), used_again: f64::from(p.kept / p.expected) })
        .collect()
}

fn agents(
    trace: &Trace,
    schedule: &Schedule,
    outcomes: PerPolicy<&Outcome>,
    watch: &Watch,
    groups: &Groups,
) -> Vec<AgentFigures> {
    let mut figures: Vec<AgentFigures> =
        groups.names.iter().map(|name| AgentFigures { agent: name.clone(), ..AgentFigures::default() }).collect();
    for (index, call) in trace.calls.iter().enumerate() {
        if let Some((blocks, hits)) = of_call(trace, index as u32, outcomes) {
            let of = &mut figures[groups.of[call.agent as usize]];
            of.calls += 1;
            of.prompt_blocks += blocks;
            of.hit_blocks.agentrt += hits.agentrt;
            of.hit_blocks.lru += hits.lru;
            of.hit_blocks.min += hits.min;
        }
    }
    for (agent, &group) in groups.of.iter().enumerate() {
        let of = &mut figures[group];
        of.never_seen_blocks += watch.never_seen[agent];
        of.evicted_too_early_blocks += watch.evicted_too_early[agent];
        of.held_block_s += watch.held_us[agent] as f64 / 1e6;
        of.kept_too_long_block_s += watch.kept_too_long_us[agent] as f64 / 1e6;
    }
    let mut silences = observed_silences(trace, schedule, groups);
    for (group, of) in figures.iter_mut().enumerate() {
        of.silence = std::mem::take(&mut silences[group]);
        let Some(&agent) = groups.own.get(group) else { continue };
        let learned = watch.inner.learned().silence(agent);
        of.silence.continues = f64::from(learned.continues);
        of.silence.learned = learned.curve.iter().map(|&(s, p)| (f64::from(s), f64::from(p))).collect();
        of.tails =
            if watch.inner.learned().knows_promises_of(agent) { tails(&watch.inner, Some(agent)) } else { Vec::new() };
    }
    figures
}

/// Kaplan-Meier over the silences of a replay, at the edges of the core's gap buckets.
fn observed_silences(trace: &Trace, schedule: &Schedule, groups: &Groups) -> Vec<Silence> {
    let end_us = schedule.events.last().map_or(0, |event| event.time_us);
    let mut silent: Vec<Option<(usize, u64)>> = vec![None; trace.sessions.len()];
    // By group: (seconds, ended by a call).
    let mut seen: Vec<Vec<(f64, bool)>> = vec![Vec::new(); groups.names.len()];
    for event in &schedule.events {
        let call = &trace.calls[event.call as usize];
        let since = &mut silent[call.session as usize];
        if event.kind == EventKind::Finish {
            *since = Some((groups.of[call.agent as usize], event.time_us));
        } else if let Some((group, from_us)) = since.take() {
            seen[group].push(((event.time_us - from_us) as f64 / 1e6, true));
        }
    }
    for (group, from_us) in silent.into_iter().flatten() {
        seen[group].push(((end_us - from_us) as f64 / 1e6, false));
    }
    seen.into_iter()
        .map(|mut seen| {
            seen.sort_by(|a, b| a.0.total_cmp(&b.0));
            let ended = seen.iter().filter(|s| s.1).count() as u64;
            let (mut at, mut surviving, mut observed) = (0, 1.0, Vec::new());
            for bucket in 1..=44 {
                let edge_s = 0.001 * (f64::from(bucket) * 0.5).exp2();
                while let Some(&(_, by_call)) = seen.get(at).filter(|s| s.0 < edge_s) {
                    if by_call {
                        surviving *= 1.0 - 1.0 / (seen.len() - at) as f64;
                    }
                    at += 1;
                }
                observed.push((edge_s, surviving));
            }
            Silence { ended, censored: seen.len() as u64 - ended, observed, ..Silence::default() }
        })
        .collect()
}

/// Counts of what followed each context; guesses what followed most often.
#[derive(Default)]
struct Offline {
    counts: FxHashMap<(Option<u16>, u16), FxHashMap<u16, u64>>,
}

impl Offline {
    fn guess(&self, before: Option<u16>, last: u16) -> Option<u16> {
        let row = self.counts.get(&(before, last))?;
        row.iter().max_by_key(|&(&agent, &count)| (count, std::cmp::Reverse(agent))).map(|(&agent, _)| agent)
    }
}

fn next_agent(trace: &Trace, guesses: &[Guess]) -> NextAgent {
    let mut offline = Offline::default();
    for (before, last, next) in steps(trace) {
        *offline.counts.entry((before, last)).or_default().entry(next).or_default() += 1;
    }
    // (agentrt, offline, the same again) were right.
    let right: Vec<[bool; 3]> = guesses
        .iter()
        .map(|guess| {
            let call = &trace.calls[guess.call as usize];
            let calls = &trace.sessions[call.session as usize].calls;
            let back = |n: u32| call.step.checked_sub(n).map(|s| trace.calls[calls[s as usize] as usize].agent);
            let last = back(1).expect("guesses are made from the second call on");
            let next = Some(call.agent);
            [guess.foreseen == next, offline.guess(back(2), last) == next, Some(last) == next]
        })
        .collect();
    let share = |part: &[[bool; 3]], which: usize| {
        part.iter().filter(|right| right[which]).count() as f64 / part.len().max(1) as f64
    };
    let early = &right[right.len().min(LEARNED_AFTER)..right.len().min(LEARNED_AFTER + JUDGED_OVER)];
    NextAgent {
        transitions: right.len() as u64,
        r: crate::trace::profile::predictability(trace).r,
        agentrt: share(&right, 0),
        offline: share(&right, 1),
        stay: share(&right, 2),
        early: Early { transitions: early.len() as u64, agentrt: share(early, 0), offline: share(early, 1) },
    }
}
