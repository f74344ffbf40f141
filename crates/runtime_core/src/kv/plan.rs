//! What is expected of a session: which of its lanes calls when, and the same of its kin.
//!
//! A *plan* is what is expected as of the session's last call; plans, and the cycles of calls that they are worked out
//! from, are remembered, since they cost microseconds. A *view* is one session's plan beside those of its kin at one
//! moment: what its leaves are scored with. There is one view, of the session that is being scored.

use super::chain::{Chain, Weights, LANES, STEPS};
use super::density::{CallTimes, Cycle, Services, Silence, GRID};
use super::followers::KIN;
use super::index::NONE;
use super::workload::{standing_of_live, Sessions, Standing, Workload};
use super::{density, gaps, Config, FutureStarts, KvCache};

/// Sessions whose plans are remembered, direct-mapped.
pub(super) const PLANS: usize = 1024;
/// Kinds of gaps whose cycles are remembered, direct-mapped.
pub(super) const CYCLES: usize = 64;

/// What is known of one session at one moment.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) slot: u32,
    now_us: u64,
    pub(super) times: CallTimes,
    pub(super) n: usize,
    pub(super) lanes: [u32; LANES],
    pub(super) weights: [Weights; LANES],
    /// Those of each of its other lanes.
    pub(super) others: Weights,
    /// The agent of the session's call that waits, if one does.
    pub(super) waiting: Option<u16>,
    /// What is expected of its kin.
    pub(super) kin: Vec<Followed>,
}

impl View {
    pub(super) fn new() -> Self {
        Self {
            slot: NONE,
            now_us: 0,
            times: [[0.0; GRID]; STEPS],
            n: 0,
            lanes: [NONE; LANES],
            weights: [Weights::default(); LANES],
            others: Weights::default(),
            waiting: None,
            kin: Vec::with_capacity(KIN),
        }
    }
}

/// What is expected of a session that walks the same path as another.
#[derive(Clone, Debug)]
pub(super) struct Followed {
    /// Its calls since one used anything of the other's.
    pub(super) since: u16,
    pub(super) n: usize,
    pub(super) agents: [u16; LANES],
    pub(super) calls: [u32; LANES],
    pub(super) weights: [Weights; LANES],
    pub(super) times: CallTimes,
}

/// Which lane of a session calls when, as of its last call.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Slot, generation and step of the session.
    pub(super) identity: (u32, u16, u16, Option<bool>),
    n: usize,
    lanes: [u32; LANES],
    /// Agents and calls of these lanes, then agents of its kin that it has not called yet.
    n_agents: usize,
    agents: [u16; LANES],
    calls: [u32; LANES],
    weights: [Weights; LANES],
    others: Weights,
    /// Whether a call was in flight, and when the last one started and ended, when `times` were computed.
    phase: (bool, u64, u64),
    times_us: u64,
    times: CallTimes,
}

impl Plan {
    pub(super) fn vacant() -> Self {
        Self {
            identity: (NONE, 0, 0, None),
            n: 0,
            lanes: [NONE; LANES],
            n_agents: 0,
            agents: [0; LANES],
            calls: [0; LANES],
            weights: [Weights::default(); LANES],
            others: Weights::default(),
            phase: (false, 0, 0),
            times_us: 0,
            times: [[0.0; GRID]; STEPS],
        }
    }
}

/// A cycle of calls, as of some gaps ago: it changes slowly and costs a microsecond.
#[derive(Clone, Debug)]
pub(super) struct KnownCycle {
    /// Workload, kind of gap, seconds that calls wait, and when it was worked out.
    pub(super) identity: Option<(u16, gaps::Kind, f32, u32)>,
    pub(super) cycle: Cycle,
}

impl KvCache {
    /// Looks at a session: loads its view.
    pub(super) fn look(&mut self, workload: &Workload, sessions: &Sessions, slot: u32) {
        if self.view.slot == slot && self.view.now_us == self.now_us {
            return;
        }
        self.view.slot = slot;
        self.view.now_us = self.now_us;
        self.view.kin.clear();
        for kin in self.tenants[slot as usize].kin {
            let Some(x) = self.tenants.get(kin.slot as usize).filter(|x| x.generation == kin.generation) else {
                continue;
            };
            let Some(back) = x.kin.iter().find(|kin| kin.slot == slot) else { continue };
            let since = x.calls.saturating_sub(back.matched);
            let handle = sessions.at(kin.slot as usize).filter(|handle| handle.generation() == kin.generation);
            if handle.and_then(|handle| standing_of_live(sessions, handle)).is_none_or(|at| at.doubted && !at.in_flight)
            {
                // It has ended, as far as one can tell.
                continue;
            }
            if let Some((at, _)) = self.plan(workload, sessions, kin.slot) {
                let Plan { n_agents: n, agents, calls, weights, times, .. } = self.plans[at];
                self.view.kin.push(Followed { since, n, agents, calls, weights, times });
            }
        }
        let Some((at, waiting)) = self.plan(workload, sessions, slot) else {
            (self.view.n, self.view.others, self.view.waiting) = (0, Weights::default(), None);
            self.view.times = [[0.0; GRID]; STEPS];
            return;
        };
        let (view, plan) = (&mut self.view, &self.plans[at]);
        view.weights[..plan.n].copy_from_slice(&plan.weights[..plan.n]);
        (view.n, view.lanes, view.others, view.times) = (plan.n, plan.lanes, plan.others, plan.times);
        view.waiting = waiting;
    }

    /// Where it stands what is expected of a session, and the agent of its waiting call.
    fn plan(&mut self, workload: &Workload, sessions: &Sessions, slot: u32) -> Option<(usize, Option<u16>)> {
        let tenant = self.tenants[slot as usize];
        let handle = sessions.at(slot as usize).filter(|h| h.generation() == tenant.generation)?;
        let at = standing_of_live(sessions, handle)?;
        // Who speaks next changes with the session's calls only, when it speaks with every moment.
        let place = slot as usize % PLANS;
        let plan = &mut self.plans[place];
        let identity = (slot, handle.generation(), at.features.steps, at.tool_runs());
        if plan.identity != identity {
            plan.identity = identity;
            plan.phase = (false, u64::MAX, u64::MAX);
            plan.n = 0;
            plan.calls = [0; LANES];
            let mut lane = tenant.lanes;
            while lane != NONE && plan.n < LANES {
                let x = &self.lanes[lane as usize];
                (plan.lanes[plan.n], plan.agents[plan.n], plan.calls[plan.n]) = (lane, x.agent, x.calls);
                plan.n += 1;
                lane = x.next;
            }
            plan.n_agents = plan.n;
            for kin in tenant.kin {
                let Some(x) = self.tenants.get(kin.slot as usize).filter(|x| x.generation == kin.generation) else {
                    continue;
                };
                let mut lane = if usize::from(tenant.n_lanes) == plan.n { x.lanes } else { NONE };
                while lane != NONE && plan.n_agents < LANES {
                    let agent = self.lanes[lane as usize].agent;
                    if !plan.agents[..plan.n_agents].contains(&agent) {
                        plan.agents[plan.n_agents] = agent;
                        plan.n_agents += 1;
                    }
                    lane = self.lanes[lane as usize].next;
                }
            }
            let agents = &plan.agents[..plan.n_agents];
            let mut chain = Chain::new(workload, &self.config, agents, at.tool_runs()).of_lanes(plan.n);
            plan.weights = chain.weights(at.prev, at.last);
            plan.others = match usize::from(tenant.n_lanes) - plan.n {
                0 => Weights::default(),
                others => chain.weights_of_others(at.prev, at.last, others),
            };
        }
        let waiting = if at.in_flight && !self.queue.is_empty() { self.queue.first_of(handle) } else { None };
        let wait_s = waiting.and_then(|waiting| self.queue.wait_s(waiting.ticket));
        let queue_s = self.queue.length_s();
        let now_us = self.now_us;
        let waiting = waiting.map(|waiting| waiting.agent);
        if self.config.oracle.time {
            plan.times = density::known_call_times(self.starts[slot as usize].map(|start| match start {
                u64::MAX => f32::INFINITY,
                start => start.saturating_sub(now_us) as f32 / 1e6,
            }));
            return Some((place, waiting));
        }
        // Times hold for as long as the silence has hardly grown.
        let phase = (at.in_flight, at.last_start_us, at.last_finish_us);
        let since_us = now_us.saturating_sub(if at.in_flight { at.last_start_us } else { at.last_finish_us });
        if plan.phase != phase || now_us.saturating_sub(plan.times_us) > since_us / 16 {
            (plan.phase, plan.times_us) = (phase, now_us);
            let kind = workload.gaps.kind(at.context, &self.config);
            let identity = workload.gaps.age().map(|age| (tenant.workload, kind, queue_s, age));
            let known = &mut self.cycles[kind.place() % CYCLES];
            if identity.is_none() || known.identity != identity {
                let services = self.services.renew(&workload.services.hazards());
                known.identity = identity;
                known.cycle = Cycle::new(&workload.gaps.hazards(kind), services, queue_s);
            }
            let runs = wait_s.is_some() || at.in_flight;
            let services = if runs { self.services.renew(&workload.services.hazards()) } else { &self.services };
            let ends = if self.config.oracle.ends {
                known_ends(&self.starts[slot as usize])
            } else {
                expected_ends(workload, &at, &self.config)
            };
            plan.times = call_times(&at, now_us, wait_s, &known.cycle, services, ends);
        }
        Some((place, waiting))
    }
}

/// P(next call) of a session, and after each of its next calls.
type Ends = (f32, [f32; STEPS - 1]);

pub(super) fn expected_ends(workload: &Workload, at: &Standing, config: &Config) -> Ends {
    (workload.ends.continues(at.features, config), workload.ends.later(at.features.steps, config))
}

/// As an oracle knows them.
fn known_ends(starts: &FutureStarts) -> Ends {
    let chance = |start: u64| if start == u64::MAX { 0.0001 } else { 0.9999 };
    (chance(starts[0]), std::array::from_fn(|i| chance(starts[i + 1])))
}

/// `queued_s`: a call of the session waits and will start after so many seconds.
pub(super) fn call_times(
    at: &Standing,
    now_us: u64,
    queued_s: Option<f32>,
    cycle: &Cycle,
    services: &Services,
    (continues, continues_later): Ends,
) -> CallTimes {
    let since_s = |from_us: u64| now_us.saturating_sub(from_us) as f32 / 1e6;
    let (age_s, running_s) = if queued_s.is_some() {
        (0.0, Some(0.0))
    } else if at.in_flight {
        (0.0, Some(since_s(at.last_start_us)))
    } else {
        (since_s(at.last_finish_us), None)
    };
    density::call_times(&Silence {
        cycle,
        age_s,
        running: running_s.map(|since_s| (since_s, services)),
        queued_s: queued_s.unwrap_or(0.0),
        continues,
        continues_later,
    })
}
