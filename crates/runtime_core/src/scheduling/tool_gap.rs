//! `tool_gap`: what becomes of a session's blocks while its tool runs, and its turn when the tool returns.
//!
//! **How long tools take** is learned per (agent, tool), as hazards over two buckets an octave from 1 ms to 4.6 hours:
//!
//! ```text
//! h(b) = (r(b) + 4 h'(b)) / (n(b) + 4)
//! r(b)   gaps that ended in bucket b
//! n(b)   gaps that reached it: those that ended in it or later, and those that are still open there, by half, or later
//! h'(b)  the same for the tool whoever calls it; then for any tool; then 1/8
//! ```
//!
//! A tool that still runs, or whose session was not heard of again, counts as *not returned by then* (the estimator of
//! Kaplan and Meier), so that tools which hang do not look fast because only the fast ones were seen to return.
//!
//! **What is kept.** Continuum (arXiv 2511.02230) keeps blocks for tau = argmax P(R <= tau) cost - memory tau. Both cost and memory
//! grow with the tokens, so whether any tau pays depends on one number, the rate at which keeping pays at best, R being
//! the rest of the gap given that it has lasted so long:
//!
//! ```text
//! rate = max over tau of P(R <= tau) / E[min(R, tau)]
//! ```
//!
//! No price and no time to live has to be chosen: sessions are kept in ascending order of turn / rate (turn: 1 for the
//! session that began first, 2 for the next, ...) while they fit into what running calls leave of the pool. The others are
//! released; where there is a host tier and fewer than one in ten comes back within a minute, demoted: then they are brought
//! back when one in ten has returned, if they and the older ones fit. (Ranking by how idle a session is: MORI.)
//!
//! **Turn.** What was kept pays when it is used soon. A call of a session that has used tools takes the turn of the
//! session's beginning; other calls that of their arrival. Nobody starves: who comes later passes nobody who is there.
//!
//! **What gives way, in this order**: what is released, what nobody decided about, what is kept. Nobody is ever held, and
//! keeping takes nothing from a call that needs it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use crate::ids::{mix, WorkloadId};
use crate::policy::{About, Event, Policy};
use crate::runtime::EventKind;
use crate::scheduling::{Decision, Gap, GapDecision, Happening, Load, Needs, Retention, Waiting};
use crate::Runtime;

/// Sessions remembered; the one that has been silent longest is forgotten first.
const MAX_SESSIONS: usize = 16_384;
/// Tools, and pairs of agent and tool, that are learned apart; further ones count as any tool.
const MAX_TOOLS: usize = 4_096;
/// Two to an octave.
const BUCKETS: usize = 48;
const FIRST_OCTAVE: u32 = 10;
/// How many gaps what is known of a wider class counts for.
const PRIOR: f64 = 4.0;
const PRIOR_HAZARD: f64 = 0.125;
/// After so many gaps the older ones count half.
const MEMORY: f32 = 512.0;
/// A gap is long if it is so improbable that it ends so soon.
const LONG: (f64, f64) = (0.1, 60e6);

/// How long tools of one class take.
#[derive(Clone, Debug)]
struct Latency {
    returned: [f32; BUCKETS],
    /// Those that run, or were not heard of again, where they were seen last.
    open: [f32; BUCKETS],
    begun: f32,
}

impl Default for Latency {
    fn default() -> Self {
        Self { returned: [0.0; BUCKETS], open: [0.0; BUCKETS], begun: 0.0 }
    }
}

impl Latency {
    fn begin(&mut self) {
        self.begun += 1.0;
        if self.begun > MEMORY {
            self.begun *= 0.5;
            self.returned.iter_mut().chain(&mut self.open).for_each(|n| *n *= 0.5);
        }
    }

    fn leave(&mut self, bucket: u8) {
        let open = &mut self.open[usize::from(bucket)];
        // It was counted before the older ones were halved.
        *open = (*open - 1.0).max(0.0);
    }
}

fn bucket(us: u64) -> u8 {
    let us = us.max(1 << FIRST_OCTAVE);
    let octave = us.ilog2();
    let second = us >> (octave - 1) & 1;
    (2 * u64::from(octave - FIRST_OCTAVE) + second).min(BUCKETS as u64 - 1) as u8
}

/// Where a bucket begins, microseconds.
fn begins_us(bucket: usize) -> f64 {
    let octave = (1u64 << (FIRST_OCTAVE as usize + bucket / 2)) as f64;
    match bucket {
        0 => 0.0,
        _ if bucket % 2 == 0 => octave,
        _ => 1.5 * octave,
    }
}

/// What is expected of a gap that has lasted for some time.
#[derive(Clone, Copy, Debug)]
struct Outlook {
    /// At which keeping pays at best, per microsecond.
    rate: f64,
    long: bool,
    /// When one in ten has returned, from the start of the tool, microseconds.
    first_us: u64,
}

/// A gap that is learned from.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// Its classes, narrowest first.
    classes: [u64; 3],
    started_us: u64,
    seen: u8,
    /// When it was to be brought back; 0: not demoted so far.
    back_us: u64,
}

#[derive(Debug)]
struct Session {
    began_us: u64,
    last_us: u64,
    /// It has used a tool.
    tools: bool,
    open: Option<Open>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    began_us: u64,
    outlook: Outlook,
    score: f64,
    /// Tokens of the gaps of sessions that are as old or older.
    up_to_here: u64,
    index: u32,
}

#[derive(Debug, Default)]
struct State {
    sessions: FxHashMap<u64, Session>,
    latencies: FxHashMap<u64, Latency>,
    candidates: Vec<Candidate>,
    /// Turn, rank so far, index.
    order: Vec<(u64, u32, u32)>,
}

/// Keeps what comes back soon, and gives sessions that come back from a tool their turn.
#[derive(Debug, Default)]
pub struct ToolGapPolicy {
    state: Mutex<State>,
}

fn key(workload: WorkloadId, session: u64) -> u64 {
    session ^ mix(u64::from(workload.0))
}

fn classes(gap: &Gap) -> [u64; 3] {
    let any = mix(!u64::from(gap.workload.0));
    let tool = mix(any ^ u64::from(gap.tool));
    [mix(tool ^ u64::from(gap.agent)), tool, any]
}

impl ToolGapPolicy {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves a table that is at worst one event behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn session(&mut self, key: u64, now_us: u64) -> &mut Session {
        if self.sessions.len() >= MAX_SESSIONS && !self.sessions.contains_key(&key) {
            let oldest = self.sessions.iter().min_by_key(|(_, session)| session.last_us);
            if let Some(oldest) = oldest.map(|(&key, _)| key) {
                self.sessions.remove(&oldest);
            }
        }
        let new = Session { began_us: now_us, last_us: now_us, tools: false, open: None };
        let session = self.sessions.entry(key).or_insert(new);
        session.last_us = now_us;
        session
    }

    fn arrived(&mut self, now_us: u64, call: &Waiting) {
        let Some(open) = self.session(key(call.workload, call.session), now_us).open.take() else { return };
        let at = bucket(now_us.saturating_sub(open.started_us));
        for class in open.classes {
            if let Some(latency) = self.latencies.get_mut(&class) {
                latency.leave(open.seen);
                latency.returned[usize::from(at)] += 1.0;
            }
        }
    }

    /// Learns that the gap has lasted until now; returns when its session began.
    fn seen(&mut self, now_us: u64, gap: &Gap) -> u64 {
        let at = bucket(now_us.saturating_sub(gap.started_us));
        let session = self.session(key(gap.workload, gap.session), now_us);
        let before = session.open.filter(|open| open.started_us == gap.started_us);
        let began_us = session.began_us;
        session.tools = true;
        if before.is_some_and(|before| before.seen == at) {
            return began_us;
        }
        let classes = classes(gap);
        session.open = Some(Open {
            classes,
            started_us: gap.started_us,
            seen: at,
            back_us: before.map_or(0, |open| open.back_us),
        });
        for class in classes {
            if self.latencies.len() >= MAX_TOOLS && !self.latencies.contains_key(&class) && class != classes[2] {
                continue;
            }
            let latency = self.latencies.entry(class).or_default();
            match before {
                Some(before) => latency.leave(before.seen),
                None => latency.begin(),
            }
            latency.open[usize::from(at)] += 1.0;
        }
        began_us
    }

    fn hazards(&self, classes: [u64; 3]) -> [f64; BUCKETS] {
        let mut hazards = [PRIOR_HAZARD; BUCKETS];
        for latency in classes.iter().rev().filter_map(|class| self.latencies.get(class)) {
            let mut later = 0.0;
            for (at, hazard) in hazards.iter_mut().enumerate().rev() {
                let (returned, open) = (f64::from(latency.returned[at]), f64::from(latency.open[at]));
                *hazard = (returned + PRIOR * *hazard) / (later + returned + 0.5 * open + PRIOR);
                later += returned + open;
            }
        }
        hazards
    }

    fn outlook(&self, now_us: u64, gap: &Gap) -> Outlook {
        let hazards = self.hazards(classes(gap));
        let lasted_us = now_us.saturating_sub(gap.started_us);
        let (mut from, mut open, mut spent) = (lasted_us as f64, 1.0f64, 0.0f64);
        let (mut rate, mut soon, mut first_us) = (0.0f64, 0.0, 0.0);
        for at in usize::from(bucket(lasted_us))..BUCKETS {
            let (begins, ends) = (begins_us(at), begins_us(at + 1));
            let length = (ends - from).max(1.0);
            // Of the bucket that it is in, only the rest is left.
            let hazard = if from > begins { hazards[at] * (length / (ends - begins)).min(1.0) } else { hazards[at] };
            let returns = open * hazard;
            spent += length * (open - 0.5 * returns);
            open -= returns;
            rate = rate.max((1.0 - open) / spent);
            if ends - lasted_us as f64 <= LONG.1 {
                soon = 1.0 - open;
            }
            if first_us == 0.0 && open <= 1.0 - LONG.0 {
                first_us = from.max(begins);
            }
            from = ends;
        }
        Outlook { rate, long: soon < LONG.0, first_us: first_us as u64 }
    }

    fn decide(&mut self, load: &Load, gaps: &[Gap], decisions: &mut [GapDecision]) {
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        for (index, gap) in gaps.iter().enumerate() {
            let began_us = self.seen(load.now_us, gap);
            let outlook = self.outlook(load.now_us, gap);
            candidates.push(Candidate { began_us, outlook, score: 0.0, up_to_here: 0, index: index as u32 });
        }
        candidates.sort_unstable_by_key(|one| (one.began_us, gaps[one.index as usize].session));
        let mut up_to_here = 0;
        for (turn, one) in candidates.iter_mut().enumerate() {
            let gap = &gaps[one.index as usize];
            up_to_here += u64::from(gap.resident_tokens) + u64::from(gap.host_tokens);
            one.up_to_here = up_to_here;
            one.score = (turn + 1) as f64 / one.outlook.rate;
        }
        candidates.sort_unstable_by(|a, b| a.score.total_cmp(&b.score).then(a.index.cmp(&b.index)));
        let tokens = |blocks: u32| u64::from(blocks) * u64::from(load.block_tokens);
        let unused = tokens(load.pool_blocks.saturating_sub(load.pinned_blocks));
        let mut room = unused;
        for one in &candidates {
            let (gap, decision) = (&gaps[one.index as usize], &mut decisions[one.index as usize]);
            let open = self.sessions.get_mut(&key(gap.workload, gap.session)).and_then(|session| session.open.as_mut());
            let back_us = open.as_ref().map_or(0, |open| open.back_us);
            let resident = u64::from(gap.resident_tokens);
            if back_us > load.now_us {
                // It is in the host tier and stays there until its time.
                *decision = GapDecision { retention: Retention::Demote, bring_back_us: back_us };
            } else if resident <= room {
                room -= resident;
                *decision = GapDecision { retention: Retention::Keep, bring_back_us: 0 };
            } else if load.host_bytes_per_s > 0 && back_us == 0 && one.outlook.long && one.up_to_here <= unused {
                let back_us = (gap.started_us + one.outlook.first_us).max(load.now_us + 1);
                *decision = GapDecision { retention: Retention::Demote, bring_back_us: back_us };
                if let Some(open) = open {
                    open.back_us = back_us;
                }
            } else {
                *decision = GapDecision { retention: Retention::Release, bring_back_us: 0 };
            }
        }
        self.candidates = candidates;
    }

    fn rank(&mut self, waiting: &[Waiting], decisions: &mut [Decision]) {
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        for (index, (call, decision)) in waiting.iter().zip(&*decisions).enumerate() {
            let session = self.sessions.get(&key(call.workload, call.session)).filter(|session| session.tools);
            let turn = session.map_or(call.arrived_us, |session| session.began_us);
            order.push((turn, decision.rank, index as u32));
        }
        order.sort_unstable();
        for (rank, &(.., index)) in order.iter().enumerate() {
            decisions[index as usize].rank = rank as u32;
        }
        self.order = order;
    }
}

impl Policy for ToolGapPolicy {
    fn about(&self) -> About {
        About {
            name: "tool_gap".into(),
            observes: "tools, arrivals, the pool; ends of sessions where they are told",
            decides: "what is kept, demoted or released while a tool runs; order of waiting calls",
            costs: "a gap: about a microsecond; 64 waiting calls: some microseconds",
        }
    }

    fn needs(&self) -> Needs {
        Needs::TOOLS.and(Needs::ARRIVALS).and(Needs::POOL)
    }

    fn hear(&self, _: &Runtime, now_us: u64, happening: &Happening) {
        if let Happening::Arrived(call) = happening {
            self.lock().arrived(now_us, call);
        }
    }

    fn observe(&self, _: &Runtime, event: &Event<'_>) {
        if event.kind == EventKind::SessionEnd {
            // A gap that was open stays where it was seen last: not returned by then.
            self.lock().sessions.remove(&key(event.workload, event.session));
        }
    }

    fn schedule(&self, _: &Runtime, _: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        self.lock().rank(waiting, decisions);
    }

    fn gaps(&self, _: &Runtime, load: &Load, gaps: &[Gap], decisions: &mut [GapDecision]) {
        self.lock().decide(load, gaps, decisions);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Policies;
    use crate::runtime::Options;

    const S: u64 = 1_000_000;
    const BLOCK: u32 = 16;

    fn gap(session: u64, agent: u16, tool: u16, started_us: u64) -> Gap {
        let (workload, resident_tokens) = (WorkloadId(0), 100 * BLOCK);
        Gap { workload, session, agent, tool, started_us, resident_tokens, host_tokens: 0 }
    }

    fn call(session: u64, arrived_us: u64) -> Waiting {
        Waiting {
            call: session,
            workload: WorkloadId(0),
            session,
            agent: 0,
            tenant: 0,
            arrived_us,
            prompt_tokens: 200 * BLOCK,
            resident_tokens: 0,
            host_tokens: 0,
            group: 0,
        }
    }

    fn load(now_us: u64, pool_blocks: u32, host_bytes_per_s: u64) -> Load {
        Load { now_us, pool_blocks, block_tokens: BLOCK, host_bytes_per_s, ..Load::default() }
    }

    /// A tool's gaps, one after the other, each of another session, that return after these times.
    fn learn(state: &mut State, agent: u16, tool: u16, seconds: &[f64]) {
        for (i, s) in seconds.iter().enumerate() {
            let session = 1_000_000 + state.sessions.len() as u64 + i as u64;
            state.seen(0, &gap(session, agent, tool, 0));
            state.arrived((s * 1e6) as u64, &call(session, 0));
        }
    }

    #[test]
    fn buckets_are_ascending_halves_of_octaves() {
        for at in 1..BUCKETS {
            assert!(begins_us(at) > begins_us(at - 1));
            assert_eq!(usize::from(bucket(begins_us(at) as u64)), at);
            assert_eq!(usize::from(bucket(begins_us(at) as u64 - 1)), at - 1);
        }
        assert_eq!((bucket(0), usize::from(bucket(u64::MAX))), (0, BUCKETS - 1));
    }

    #[test]
    fn a_tool_is_known_by_its_agent_then_by_itself_then_by_all_tools() {
        let mut state = State::default();
        learn(&mut state, 1, 1, &[0.1; 60]);
        learn(&mut state, 2, 1, &[20.0; 60]);
        learn(&mut state, 1, 2, &[200.0; 60]);
        let rate = |agent, tool| state.outlook(0, &gap(1, agent, tool, 0)).rate;
        assert!(rate(1, 1) > 20.0 * rate(2, 1), "agents differ");
        assert!(rate(3, 1) < rate(1, 1) && rate(3, 1) > rate(2, 1), "an unknown agent: between those that are known");
        assert!(rate(3, 9) < rate(3, 1) && rate(3, 9) > rate(1, 2), "an unknown tool: between those that are known");
    }

    #[test]
    fn tools_that_still_run_count_as_not_returned() {
        let (mut only_returned, mut with_running) = (State::default(), State::default());
        for state in [&mut only_returned, &mut with_running] {
            learn(state, 0, 1, &[1.0; 20]);
        }
        for session in 0..60 {
            with_running.seen(0, &gap(session, 0, 1, 0));
            with_running.seen(600 * S, &gap(session, 0, 1, 0));
        }
        let rate = |state: &State| state.outlook(600 * S, &gap(999, 0, 1, 600 * S)).rate;
        assert!(rate(&with_running) < 0.5 * rate(&only_returned));
        // Seen twice, they count once; and when they return they count as returned.
        let any = classes(&gap(0, 0, 1, 0))[2];
        assert_eq!(with_running.latencies[&any].open.iter().sum::<f32>(), 60.0);
        (0..60).for_each(|session| with_running.arrived(600 * S, &call(session, 600 * S)));
        assert_eq!(with_running.latencies[&any].open.iter().sum::<f32>(), 0.0);
        assert_eq!(with_running.latencies[&any].returned.iter().sum::<f32>(), 80.0);
    }

    #[test]
    fn of_a_bimodal_tool_what_is_not_back_at_once_gives_way_and_comes_back_in_time() {
        let mut state = State::default();
        let latencies: Vec<f64> = (0..100).map(|i| if i % 2 == 0 { 0.2 } else { 300.0 }).collect();
        learn(&mut state, 0, 1, &latencies);
        let decide = |state: &mut State, now_us, host| {
            // The first began earlier but has been out for longer.
            let gaps = [gap(1, 0, 1, 100 * S), gap(2, 0, 1, now_us)];
            let mut decisions = [GapDecision::default(); 2];
            state.decide(&load(now_us, 150, host), &gaps, &mut decisions);
            decisions
        };
        state.arrived(99 * S, &call(1, 0));
        state.arrived(99 * S + 1, &call(2, 0));
        let young = decide(&mut state, 100 * S, 0).map(|decision| decision.retention);
        assert_eq!(young, [Retention::Keep, Retention::Release], "the older session first");
        let without_host = decide(&mut state, 103 * S, 0).map(|decision| decision.retention);
        assert_eq!(without_host, [Retention::Release, Retention::Keep]);
        let [demoted, kept] = decide(&mut state, 103 * S + 1, 1 << 30);
        assert_eq!((demoted.retention, kept.retention), (Retention::Demote, Retention::Keep));
        assert!((200 * S..=400 * S).contains(&demoted.bring_back_us), "{}", demoted.bring_back_us);
        // Asked again it says the same, and once it is back it is not sent away a second time.
        assert_eq!(decide(&mut state, 150 * S, 1 << 30)[0], demoted);
        assert_ne!(decide(&mut state, demoted.bring_back_us, 1 << 30)[0].retention, Retention::Demote);
    }

    #[test]
    fn a_session_back_from_its_tool_takes_its_old_turn() {
        let policies = Policies::new(vec![Box::new(ToolGapPolicy::default())]);
        let runtime = Runtime::new(Options::for_pool(16)).unwrap();
        let arrive = |session, at| policies.hear(&runtime, at, &[Happening::Arrived(call(session, at))]);
        (1..=3).for_each(|session| arrive(session, session * S));
        let mut decisions = [GapDecision::default(); 1];
        policies.gaps(&runtime, &load(4 * S, 1_000, 0), &[gap(1, 0, 1, 4 * S)], &mut decisions);
        assert_eq!(decisions[0].retention, Retention::Keep);
        let ranks = |now_us, calls: &[Waiting]| {
            let mut decisions = vec![Decision::default(); calls.len()];
            policies.schedule(&runtime, &load(now_us, 1_000, 0), calls, &mut decisions);
            decisions.iter().map(|decision| (decision.rank, decision.hold_until_us)).collect::<Vec<_>>()
        };
        // Session 1 has used a tool; 3 calls for the second time without one and queues as it comes.
        for (session, at) in [(1, 9), (3, 8)] {
            arrive(session, at * S);
        }
        let calls = [call(2, 2 * S), call(3, 8 * S), call(1, 9 * S)];
        assert_eq!(ranks(9 * S, &calls), [(1, 0), (2, 0), (0, 0)]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut state = State::default();
        for i in 0..MAX_SESSIONS as u64 + 100 {
            state.seen(i, &gap(i, (i % 300) as u16, (i / 16) as u16, i));
        }
        assert_eq!(state.sessions.len(), MAX_SESSIONS);
        assert!(state.latencies.len() <= MAX_TOOLS + 1);
        assert!(state.outlook(0, &gap(1, 999, 999, 0)).rate > 0.0);
    }
}
