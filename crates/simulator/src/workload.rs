//! Who calls what, when: a trace, the times between its calls, whose sessions they are, and when these start.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use replay::latency::LatencyModel;
use replay::schedule::{Order, Schedule, ScheduleOptions};
use replay::trace::Trace;
use replay::Result;

/// When sessions start. Inside a session a call comes its gap after the previous one's answer.
#[derive(Clone, Debug)]
pub enum Arrivals {
    /// So many sessions at a time, in this order; the next one starts when one has ended.
    Closed {
        /// Concurrent sessions.
        sessions: usize,
        /// All sessions.
        order: Vec<u32>,
    },
    /// At these times in microseconds, one for each session.
    Open(Vec<u64>),
}

/// What an engine is asked to serve.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Calls, sessions and blocks.
    pub trace: Arc<Trace>,
    /// Microseconds of tool or think time before each call, by call.
    pub gap_us: Vec<u64>,
    /// Tenant of each session.
    pub tenant: Vec<u16>,
    /// When sessions start.
    pub arrivals: Arrivals,
}

impl Workload {
    /// The replay's closed loop: sessions in the order, and after the times, that its schedule draws from `seed`.
    pub fn closed(trace: Arc<Trace>, sessions: usize, seed: u64) -> Result<Self> {
        let schedule = times(&trace, sessions, seed)?;
        let arrivals = Arrivals::Closed { sessions, order: schedule.session_order };
        Ok(Self::new(trace, &schedule.gap_s, arrivals))
    }

    /// Sessions that start as a Poisson process, `per_s` in the mean, in an order drawn from `seed`; gaps as in
    /// [`Workload::closed`].
    pub fn poisson(trace: Arc<Trace>, per_s: f64, seed: u64) -> Result<Self> {
        let schedule = times(&trace, 1, seed)?;
        let mut rng = StdRng::seed_from_u64(seed ^ 0x5A55_10A5);
        let mut order = schedule.session_order;
        order.shuffle(&mut rng);
        let mut starts = vec![0; order.len()];
        let mut at_s = 0.0;
        for session in order {
            at_s += -(1.0 - rng.random::<f64>()).ln() / per_s;
            starts[session as usize] = (at_s * 1e6) as u64;
        }
        Ok(Self::new(trace, &schedule.gap_s, Arrivals::Open(starts)))
    }

    /// One tenant, gaps in seconds.
    pub fn new(trace: Arc<Trace>, gap_s: &[f64], arrivals: Arrivals) -> Self {
        let gap_us = gap_s.iter().map(|gap_s| (gap_s * 1e6).round() as u64).collect();
        let tenant = vec![0; trace.sessions.len()];
        Self { trace, gap_us, tenant, arrivals }
    }

    /// Number of tenants: one more than the highest.
    pub fn tenants(&self) -> usize {
        self.tenant.iter().max().map_or(1, |&highest| usize::from(highest) + 1)
    }
}

fn times(trace: &Trace, sessions: usize, seed: u64) -> Result<Schedule> {
    // The order of events is the engine's own; only what the schedule draws is taken from it.
    let options =
        ScheduleOptions { order: Order::Closed, sessions, seed, capacity_blocks: 1, model: LatencyModel::ALL[0] };
    Schedule::new(trace, options)
}
