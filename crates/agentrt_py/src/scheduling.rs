//! `Scheduler` for Python: an engine tells what its scheduler does and asks in which order to admit the calls that wait,
//! what to prefill in idle capacity, and what becomes of the blocks of sessions whose tool runs.
//!
//! Calls that wait are kept here, so that a question names them by number alone. The table is bounded by what the engine
//! has in flight; a call leaves it when it is admitted, ends or is withdrawn.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use runtime_core::scheduling as core;
use runtime_core::scheduling::{Decision, Gap, GapDecision, Happening, Load, Needs, Retention, Waiting};

use crate::convert::{array, integer, kind_of, microseconds, type_error, value_error, Keys};
use crate::errors::{from_core, BadOptionError, OutOfRangeError};
use crate::runtime::{Runtime, Session, Shared};

/// Calls in flight at most.
const MAX_CALLS: usize = 1 << 20;
/// Prefills of one answer at most.
const MAX_PREFILLS: u64 = 4_096;

/// A prefill wanted in idle capacity.
#[pyclass(frozen, get_all, module = "agentrt._core")]
pub(crate) struct Prefill {
    /// Name of the workload.
    workload: String,
    /// Key of the session that is expected to call.
    session: u64,
    /// Name of the agent that it is expected to call.
    agent: String,
    /// Its number.
    agent_id: u16,
    /// The earlier call whose prompt begins with what is wanted.
    like_call: u64,
    /// How many leading blocks of that prompt.
    blocks: u32,
    /// P(the call comes and begins with them).
    probability: f32,
}

#[pymethods]
impl Prefill {
    fn __repr__(&self) -> String {
        let Self { workload, session, agent, agent_id, like_call, blocks, probability } = self;
        format!(
            "Prefill(workload={workload:?}, session={session}, agent={agent:?}, agent_id={agent_id}, \
             like_call={like_call}, blocks={blocks}, probability={probability:.3})"
        )
    }
}

#[derive(Default)]
struct State {
    calls: HashMap<u64, Waiting>,
    waiting: Vec<Waiting>,
    decisions: Vec<Decision>,
}

/// Orders and holds the calls that wait, by the policies of a runtime.
#[pyclass(frozen, module = "agentrt._core")]
pub(crate) struct Scheduler {
    shared: Arc<Shared>,
    needs: Needs,
    block_tokens: u32,
    state: Mutex<State>,
}

/// A list or an array of small counts, one per call.
fn counts(name: &str, object: Option<&Bound<'_, PyAny>>, n: usize) -> PyResult<Vec<u32>> {
    let Some(object) = object else { return Ok(vec![0; n]) };
    let counts: Vec<u32> = match array::<u32>(name, object) {
        Ok(array) => array.as_slice()?.to_vec(),
        Err(error) => match Keys::new(name, object).map_err(|_| error)? {
            keys @ Keys::List(_) => keys
                .as_slice()
                .iter()
                .map(|&count| {
                    let problem = format!("has {count}, which does not fit uint32");
                    u32::try_from(count).map_err(|_| type_error(name, problem, "pass counts below 2^32".into()))
                })
                .collect::<PyResult<_>>()?,
            Keys::Array(_) => {
                let remedy = format!("pass {name}.astype(numpy.uint32)");
                return Err(type_error(name, "has dtype uint64, expected uint32".into(), remedy));
            }
        },
    };
    if counts.len() == n {
        return Ok(counts);
    }
    let problem = format!("has {} items, expected {n}", counts.len());
    Err(value_error(name, problem, "pass one item per call".into()))
}

fn count(what: &str, object: &Bound<'_, PyAny>) -> PyResult<u32> {
    Ok(integer(what, 0, u64::from(u32::MAX), object)? as u32)
}

/// A list or an array of numbers of agents or tools, one per session.
fn numbers(name: &str, object: &Bound<'_, PyAny>, n: usize) -> PyResult<Vec<u16>> {
    counts(name, Some(object), n)?
        .into_iter()
        .map(|number| {
            let problem = || format!("has {number}, which is no number of Workload.agent or Workload.tool");
            u16::try_from(number).map_err(|_| value_error(name, problem(), "pass what they return".into()))
        })
        .collect()
}

/// How busy the engine says it is.
struct Busy<'a, 'py> {
    running_calls: &'a Bound<'py, PyAny>,
    pinned_blocks: &'a Bound<'py, PyAny>,
    free_blocks: &'a Bound<'py, PyAny>,
    budget_tokens: Option<&'a Bound<'py, PyAny>>,
    host_bytes_per_s: Option<u64>,
    time: Option<f64>,
}

impl Scheduler {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, time: Option<f64>, happenings: &[Happening]) -> PyResult<()> {
        let now_us = self.shared.time_us(time)?;
        self.shared.policies.hear(&self.shared.core, now_us, happenings);
        Ok(())
    }

    fn load(&self, busy: &Busy<'_, '_>) -> PyResult<Load> {
        Ok(Load {
            now_us: self.shared.time_us(busy.time)?,
            running_calls: count("running_calls", busy.running_calls)?,
            pool_blocks: self.shared.core.options().pool_blocks as u32,
            block_tokens: self.block_tokens,
            pinned_blocks: count("pinned_blocks", busy.pinned_blocks)?,
            free_blocks: count("free_blocks", busy.free_blocks)?,
            prompt_blocks: 0,
            hit_blocks: 0,
            budget_tokens: busy.budget_tokens.map_or(Ok(0), |tokens| count("budget_tokens", tokens))?,
            host_bytes_per_s: busy.host_bytes_per_s.unwrap_or(0),
        })
    }
}

#[pymethods]
impl Scheduler {
    #[new]
    #[pyo3(
        signature = (runtime, block_tokens = None, without = None),
        text_signature = "(runtime, block_tokens=16, without=())"
    )]
    fn new(
        runtime: &Bound<'_, Runtime>,
        block_tokens: Option<&Bound<'_, PyAny>>,
        without: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let block_tokens = block_tokens.map_or(Ok(16), |tokens| integer("block_tokens", 1, 1 << 20, tokens))? as u32;
        let mut supplied = Needs::ALL;
        if let Some(without) = without {
            let bad = |problem: String| {
                let known = Needs::ALL.keys().collect::<Vec<_>>().join(", ");
                BadOptionError::new_err(("without".to_owned(), problem, format!("choose from {known}")))
            };
            let list: Vec<String> =
                without.extract().map_err(|_| bad(format!("is a {}, expected a list of names", kind_of(without))))?;
            for key in list {
                let missing = Needs::from_key(&key).ok_or_else(|| bad(format!("has the unknown name `{key}`")))?;
                supplied = supplied.without(missing);
            }
        }
        let shared = Arc::clone(&runtime.get().shared);
        let needs = shared.policies.wire(supplied).map_err(from_core)?;
        Ok(Self { shared, needs, block_tokens, state: Mutex::default() })
    }

    /// What the policies need the engine to report.
    #[getter]
    fn needs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.needs.keys().collect::<Vec<_>>())
    }

    /// What each policy has cost so far.
    fn prices<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let prices = PyDict::new(py);
        for price in self.shared.policies.prices() {
            let mean_us = |ns: u64, n: u64| ns as f64 / 1e3 / n.max(1) as f64;
            let one = PyDict::new(py);
            one.set_item("questions", price.questions)?;
            one.set_item("question_us", mean_us(price.question_ns, price.questions))?;
            one.set_item("event_us", mean_us(price.event_ns, price.events))?;
            prices.set_item(price.name, one)?;
        }
        Ok(prices)
    }

    /// A call begins to wait.
    #[pyo3(signature = (session, agent, call, prompt_tokens, tenant = None, time = None))]
    fn arrived(
        &self,
        session: &Bound<'_, Session>,
        agent: &Bound<'_, PyAny>,
        call: &Bound<'_, PyAny>,
        prompt_tokens: &Bound<'_, PyAny>,
        tenant: Option<&Bound<'_, PyAny>>,
        time: Option<f64>,
    ) -> PyResult<()> {
        let session = session.get();
        let arrived_us = self.shared.time_us(time)?;
        let waiting = Waiting {
            call: integer("call", 0, u64::MAX, call)?,
            workload: session.workload,
            session: session.key,
            agent: session.agent_id(agent)?,
            tenant: tenant.map_or(Ok(0), |tenant| integer("tenant", 0, u64::from(u16::MAX), tenant))? as u16,
            arrived_us,
            prompt_tokens: count("prompt_tokens", prompt_tokens)?,
            resident_tokens: 0,
            host_tokens: 0,
            group: 0,
        };
        {
            let calls = &mut self.lock().calls;
            if calls.len() == MAX_CALLS {
                return Err(OutOfRangeError::new_err(("number of calls in flight", 0, MAX_CALLS, MAX_CALLS + 1)));
            }
            calls.insert(waiting.call, waiting);
        }
        self.hear(time, &[Happening::Arrived(waiting)])
    }

    /// A call that waited runs from now on.
    #[pyo3(signature = (call, resident_tokens = None, host_tokens = None, again = false, time = None))]
    fn admitted(
        &self,
        call: u64,
        resident_tokens: Option<&Bound<'_, PyAny>>,
        host_tokens: Option<&Bound<'_, PyAny>>,
        again: bool,
        time: Option<f64>,
    ) -> PyResult<()> {
        let resident_tokens = resident_tokens.map_or(Ok(0), |tokens| count("resident_tokens", tokens))?;
        let host_tokens = host_tokens.map_or(Ok(0), |tokens| count("host_tokens", tokens))?;
        let Some(known) = self.lock().calls.get(&call).copied() else { return Ok(()) };
        self.hear(time, &[Happening::Admitted { call: Waiting { resident_tokens, host_tokens, ..known }, again }])
    }

    /// What running calls got since they were last told of.
    #[pyo3(signature = (calls, prefill_tokens, decoded_tokens, kv_token_us = None, repeated_tokens = None, time = None))]
    fn served(
        &self,
        calls: &Bound<'_, PyAny>,
        prefill_tokens: &Bound<'_, PyAny>,
        decoded_tokens: &Bound<'_, PyAny>,
        kv_token_us: Option<&Bound<'_, PyAny>>,
        repeated_tokens: Option<&Bound<'_, PyAny>>,
        time: Option<f64>,
    ) -> PyResult<()> {
        let calls = Keys::new("calls", calls)?;
        let calls = calls.as_slice();
        let prefill = counts("prefill_tokens", Some(prefill_tokens), calls.len())?;
        let decoded = counts("decoded_tokens", Some(decoded_tokens), calls.len())?;
        let repeated = counts("repeated_tokens", repeated_tokens, calls.len())?;
        let held = kv_token_us.map(|held| Keys::new("kv_token_us", held)).transpose()?;
        let held = held.as_ref().map_or(&[][..], Keys::as_slice);
        if !held.is_empty() && held.len() != calls.len() {
            let problem = format!("has {} items, expected {}", held.len(), calls.len());
            return Err(value_error("kv_token_us", problem, "pass one item per call".into()));
        }
        let served: Vec<Happening> = (0..calls.len())
            .map(|i| Happening::Served {
                call: calls[i],
                prefill_tokens: prefill[i],
                repeated_tokens: repeated[i],
                decoded_tokens: decoded[i],
                kv_token_us: held.get(i).copied().unwrap_or(0),
            })
            .collect();
        self.hear(time, &served)
    }

    /// A running call has lost its memory and waits again.
    #[pyo3(signature = (call, time = None))]
    fn preempted(&self, call: u64, time: Option<f64>) -> PyResult<()> {
        self.hear(time, &[Happening::Preempted { call }])
    }

    /// A waiting call never runs.
    #[pyo3(signature = (call, time = None))]
    fn withdrawn(&self, call: u64, time: Option<f64>) -> PyResult<()> {
        self.lock().calls.remove(&call);
        self.hear(time, &[Happening::Withdrawn { call }])
    }

    /// A call has ended and holds nothing any more.
    #[pyo3(signature = (call, time = None))]
    fn ended(&self, call: u64, time: Option<f64>) -> PyResult<()> {
        self.lock().calls.remove(&call);
        self.hear(time, &[Happening::Ended { call }])
    }

    /// Positions in `calls` in the order in which to admit them, and until when each is passed over.
    #[pyo3(signature = (
        calls, resident_tokens = None, groups = None, *, host_tokens = None, running_calls, pinned_blocks, free_blocks,
        budget_tokens = None, prompt_blocks = None, hit_blocks = None, host_bytes_per_s = None, time = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "one argument per field of a load")]
    #[expect(clippy::type_complexity, reason = "a pair of arrays")]
    fn order<'py>(
        &self,
        py: Python<'py>,
        calls: &Bound<'py, PyAny>,
        resident_tokens: Option<&Bound<'py, PyAny>>,
        groups: Option<&Bound<'py, PyAny>>,
        host_tokens: Option<&Bound<'py, PyAny>>,
        running_calls: &Bound<'py, PyAny>,
        pinned_blocks: &Bound<'py, PyAny>,
        free_blocks: &Bound<'py, PyAny>,
        budget_tokens: Option<&Bound<'py, PyAny>>,
        prompt_blocks: Option<u64>,
        hit_blocks: Option<u64>,
        host_bytes_per_s: Option<u64>,
        time: Option<f64>,
    ) -> PyResult<(Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<f64>>)> {
        let calls = Keys::new("calls", calls)?;
        let calls = calls.as_slice();
        let resident = counts("resident_tokens", resident_tokens, calls.len())?;
        let host = counts("host_tokens", host_tokens, calls.len())?;
        let groups = groups.map(|groups| Keys::new("groups", groups)).transpose()?;
        let groups = groups.as_ref().map_or(&[][..], Keys::as_slice);
        if !groups.is_empty() && groups.len() != calls.len() {
            let problem = format!("has {} items, expected {}", groups.len(), calls.len());
            return Err(value_error("groups", problem, "pass one item per call".into()));
        }
        let busy = Busy { running_calls, pinned_blocks, free_blocks, budget_tokens, host_bytes_per_s, time };
        let prompt_blocks = prompt_blocks.unwrap_or(0);
        let load = Load { prompt_blocks, hit_blocks: hit_blocks.unwrap_or(0), ..self.load(&busy)? };
        // Scheduling policies are the core's own: no Python runs while the table is locked.
        let state = &mut *self.lock();
        state.waiting.clear();
        for (i, call) in calls.iter().enumerate() {
            let Some(&known) = state.calls.get(call) else {
                let problem = format!("has the call {call}, which has not arrived");
                return Err(value_error("calls", problem, "tell of every call with Scheduler.arrived() first".into()));
            };
            let (resident_tokens, host_tokens) = (resident[i], host[i]);
            let group = groups.get(i).copied().unwrap_or(0);
            state.waiting.push(Waiting { resident_tokens, host_tokens, group, ..known });
        }
        state.decisions.clear();
        state.decisions.resize(calls.len(), Decision::default());
        self.shared.policies.schedule(&self.shared.core, &load, &state.waiting, &mut state.decisions);
        let (mut order, mut held) = (vec![0; calls.len()], vec![0.0; calls.len()]);
        for (i, decision) in state.decisions.iter().enumerate() {
            order[decision.rank as usize] = i as u32;
            held[i] = if decision.is_held(load.now_us) { decision.hold_until_us as f64 / 1e6 } else { 0.0 };
        }
        Ok((PyArray1::from_vec(py, order), PyArray1::from_vec(py, held)))
    }

    /// What to prefill in capacity that is idle now, most wanted first.
    #[pyo3(signature = (
        n = None, /, *, running_calls, pinned_blocks, free_blocks, budget_tokens, time = None
    ), text_signature = "(self, n=8, /, *, running_calls, pinned_blocks, free_blocks, budget_tokens, time=None)")]
    fn idle(
        &self,
        n: Option<&Bound<'_, PyAny>>,
        running_calls: &Bound<'_, PyAny>,
        pinned_blocks: &Bound<'_, PyAny>,
        free_blocks: &Bound<'_, PyAny>,
        budget_tokens: &Bound<'_, PyAny>,
        time: Option<f64>,
    ) -> PyResult<Vec<Prefill>> {
        let n = n.map_or(Ok(8), |n| integer("n", 0, MAX_PREFILLS, n))? as usize;
        let budget_tokens = Some(budget_tokens);
        let load = self.load(&Busy {
            running_calls,
            pinned_blocks,
            free_blocks,
            budget_tokens,
            host_bytes_per_s: None,
            time,
        })?;
        let shared = &*self.shared;
        let mut prefills = vec![core::Prefill::default(); n];
        let filled = shared.policies.idle(&shared.core, &load, &mut prefills);
        let named = |one: &core::Prefill| Prefill {
            workload: shared.core.workload_name(one.workload).unwrap_or_default().to_owned(),
            session: one.session,
            agent: shared.names.agent(one.workload, one.agent),
            agent_id: one.agent,
            like_call: one.like_call,
            blocks: one.blocks,
            probability: f32::from(one.probability) / 65_535.0,
        };
        Ok(prefills[..filled.min(n)].iter().map(named).collect())
    }

    /// What becomes of the blocks of sessions whose tool runs, and when to begin to bring them back.
    #[pyo3(signature = (
        sessions, agents, tools, started, resident_tokens, host_tokens = None, *, running_calls, pinned_blocks, free_blocks,
        host_bytes_per_s = None, time = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "one argument per field of a gap and of a load")]
    fn gaps<'py>(
        &self,
        py: Python<'py>,
        sessions: Vec<PyRef<'py, Session>>,
        agents: &Bound<'py, PyAny>,
        tools: &Bound<'py, PyAny>,
        started: Vec<f64>,
        resident_tokens: &Bound<'py, PyAny>,
        host_tokens: Option<&Bound<'py, PyAny>>,
        running_calls: &Bound<'py, PyAny>,
        pinned_blocks: &Bound<'py, PyAny>,
        free_blocks: &Bound<'py, PyAny>,
        host_bytes_per_s: Option<u64>,
        time: Option<f64>,
    ) -> PyResult<(Vec<&'static str>, Bound<'py, PyArray1<f64>>)> {
        let n = sessions.len();
        let busy = Busy { running_calls, pinned_blocks, free_blocks, budget_tokens: None, host_bytes_per_s, time };
        let load = self.load(&busy)?;
        if started.len() != n {
            let problem = format!("has {} items, expected {n}", started.len());
            return Err(value_error("started", problem, "pass one item per session".into()));
        }
        let (agents, tools) = (numbers("agents", agents, n)?, numbers("tools", tools, n)?);
        let resident = counts("resident_tokens", Some(resident_tokens), n)?;
        let host = counts("host_tokens", host_tokens, n)?;
        let mut gaps = Vec::with_capacity(n);
        for (i, (session, since)) in sessions.into_iter().zip(started).enumerate() {
            gaps.push(Gap {
                workload: session.workload,
                session: session.key,
                agent: agents[i],
                tool: tools[i],
                started_us: microseconds(since)?,
                resident_tokens: resident[i],
                host_tokens: host[i],
            });
        }
        let mut decisions = vec![GapDecision::default(); n];
        self.shared.policies.gaps(&self.shared.core, &load, &gaps, &mut decisions);
        let retentions = decisions.iter().map(|decision| match decision.retention {
            Retention::Undecided => "undecided",
            Retention::Keep => "keep",
            Retention::Demote => "demote",
            Retention::Release => "release",
        });
        let back = decisions.iter().map(|decision| decision.bring_back_us as f64 / 1e6).collect();
        Ok((retentions.collect(), PyArray1::from_vec(py, back)))
    }

    fn __repr__(&self) -> String {
        format!("Scheduler(needs={:?})", self.needs)
    }
}
