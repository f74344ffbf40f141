//! The replay for Python: traces as opaque objects, sweeps that run in Rust threads while Python shows progress.
#![expect(clippy::needless_pass_by_value, reason = "PyO3 hands extracted arguments over by value")]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::replay::latency::LatencyModel;
use ::replay::policy::CachePolicy;
use ::replay::schedule::Order;
use ::replay::sweep::{self, Capacity, Contender, CustomPolicy, Host, HostSize, Progress, SweepOptions};
use ::replay::{generate, trace, Error};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::errors::from_replay;
use crate::python_policy::{PythonPolicy, Shared};

/// A workload in memory: calls of sessions over prefix-chained blocks.
#[pyclass(frozen, module = "agentrt._core")]
pub(crate) struct Trace {
    inner: Arc<trace::Trace>,
}

impl Trace {
    /// The trace itself.
    pub(crate) fn shared(&self) -> Arc<trace::Trace> {
        Arc::clone(&self.inner)
    }
}

#[pymethods]
impl Trace {
    /// Reads a trace file, gzip or plain, in the agentrt, Mooncake or Dynamo format.
    #[staticmethod]
    #[pyo3(signature = (path, *, skip_bad = false, share_system_prefix = true, block_size = None))]
    fn read(
        py: Python<'_>,
        path: PathBuf,
        skip_bad: bool,
        share_system_prefix: bool,
        block_size: Option<u32>,
    ) -> PyResult<Self> {
        let options = trace::ReadOptions { skip_bad, share_system_prefix, block_size, ..Default::default() };
        let read = py.detach(|| trace::read(&path, &options)).map_err(from_replay)?;
        Ok(Self { inner: Arc::new(read) })
    }

    /// Generates a built-in workload.
    #[staticmethod]
    #[pyo3(signature = (name, *, sessions = None, seed = 0, agents = None))]
    fn generate(
        py: Python<'_>,
        name: &str,
        sessions: Option<usize>,
        seed: u64,
        agents: Option<usize>,
    ) -> PyResult<Self> {
        let default = generate::WORKLOADS.iter().find(|w| w.name == name).map_or(1, |w| w.default_sessions);
        let options = generate::GenerateOptions { sessions: sessions.unwrap_or(default), seed, agents };
        let made = py.detach(|| generate::generate(name, &options)).map_err(from_replay)?;
        Ok(Self { inner: Arc::new(made) })
    }

    /// Writes the trace in the agentrt format, gzip where the name ends in .gz; the file appears when it is complete.
    fn write(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| trace::write(&self.inner, &path)).map_err(from_replay)
    }

    /// What the workload looks like, judged for so many concurrent sessions.
    #[pyo3(signature = (sessions = 16))]
    fn profile<'py>(&self, py: Python<'py>, sessions: usize) -> PyResult<Bound<'py, PyAny>> {
        let profile = py.detach(|| trace::profile::profile(&self.inner, sessions));
        py.import("json")?.call_method1("loads", (to_json(&profile)?,))
    }

    /// Name of the workload.
    #[getter]
    fn workload(&self) -> &str {
        &self.inner.workload
    }

    /// Tokens per block.
    #[getter]
    fn block_size(&self) -> u32 {
        self.inner.block_size
    }

    /// Agent roles.
    #[getter]
    fn agents(&self) -> Vec<String> {
        self.inner.agents.clone()
    }

    /// Number of calls.
    #[getter]
    fn calls(&self) -> usize {
        self.inner.calls.len()
    }

    /// Number of sessions.
    #[getter]
    fn sessions(&self) -> usize {
        self.inner.sessions.len()
    }

    /// Number of distinct blocks.
    #[getter]
    fn blocks(&self) -> u32 {
        self.inner.n_blocks
    }

    /// R = 1 - H(next agent | last agent) / H(next agent) within sessions; 0 with one agent.
    #[getter]
    fn predictability(&self, py: Python<'_>) -> f64 {
        py.detach(|| trace::profile::predictability(&self.inner).r)
    }

    /// Lines that `skip_bad` left out.
    #[getter]
    fn skipped_lines(&self) -> u64 {
        self.inner.skipped_lines
    }

    fn __repr__(&self) -> String {
        let t = &self.inner;
        format!(
            "Trace({:?}, sessions={}, calls={}, blocks={})",
            t.workload,
            t.sessions.len(),
            t.calls.len(),
            t.n_blocks
        )
    }
}

pub(crate) fn to_json(value: &impl serde::Serialize) -> PyResult<String> {
    serde_json::to_string(value).map_err(|e| pyo3::exceptions::PyRuntimeError::new_err(e.to_string()))
}

pub(crate) fn order(name: &str) -> PyResult<Order> {
    Ok(match name {
        "closed" => Order::Closed,
        "open" => Order::Open,
        "file" => Order::File,
        _ => {
            return Err(from_replay(Error::BadOption {
                option: "--order".into(),
                problem: format!("`{name}` is not an order"),
                remedy: "choose closed, open or file".into(),
            }))
        }
    })
}

pub(crate) fn model(name: &str) -> PyResult<LatencyModel> {
    LatencyModel::ALL.into_iter().find(|m| m.name == name).ok_or_else(|| {
        let known: Vec<&str> = LatencyModel::ALL.iter().map(|m| m.name).collect();
        from_replay(Error::BadOption {
            option: "--model".into(),
            problem: format!("`{name}` is not a latency model"),
            remedy: format!("choose {}", known.join(" or ")),
        })
    })
}

/// The host tier of `--host`, with bandwidths in bytes per second.
fn host(size: Option<&str>, bandwidth: Option<f64>, prefetch: Option<f64>) -> PyResult<Option<Host>> {
    let bad = |option: &str, problem: &str, remedy: &str| {
        let (option, problem, remedy) = (option.to_owned(), problem.to_owned(), remedy.to_owned());
        from_replay(Error::BadOption { option, problem, remedy })
    };
    let Some(size) = size else {
        if bandwidth.is_some() || prefetch.is_some() {
            return Err(bad("--host", "a bandwidth is given, but no host tier", "add its size, for example --host 4x"));
        }
        return Ok(None);
    };
    if bandwidth.is_some_and(|b| !b.is_finite() || b <= 0.0) {
        return Err(bad("--host-bandwidth", "is not above zero", "pass gigabytes per second, for example 25"));
    }
    if prefetch.is_some_and(|b| !b.is_finite() || b < 0.0) {
        return Err(bad(
            "--prefetch-bandwidth",
            "is negative",
            "pass gigabytes per second; 0 switches prefetching off",
        ));
    }
    let size = HostSize::parse(size).map_err(from_replay)?;
    Ok(Some(Host { size, bytes_per_s: bandwidth, prefetch_bytes_per_s: prefetch }))
}

/// A built-in by name, or `(name, factory)` for a policy in Python.
#[derive(FromPyObject)]
pub(crate) enum PolicyArgument {
    Name(String),
    Factory(String, Py<PyAny>),
}

/// Works in a thread of its own while Python shows progress some ten times a second; an exception there stops it.
pub(crate) fn watched<T: Send + 'static>(
    py: Python<'_>,
    shared: &Arc<Progress>,
    progress: Option<&Py<PyAny>>,
    work: impl FnOnce(&Progress) -> T + Send + 'static,
) -> PyResult<T> {
    let (send, receive) = mpsc::channel();
    let worker_progress = Arc::clone(shared);
    std::thread::spawn(move || {
        // The receiver is gone after Ctrl-C: nobody wants the answer then.
        let _ = send.send(work(&worker_progress));
    });
    let receive = Mutex::new(receive);
    loop {
        let answer = py.detach(|| {
            let receive = receive.lock().unwrap_or_else(PoisonError::into_inner);
            receive.recv_timeout(Duration::from_millis(80))
        });
        let shown = py.check_signals().and_then(|()| {
            let (done, total) = (shared.done.load(Ordering::Relaxed), shared.total.load(Ordering::Relaxed));
            progress.map_or(Ok(()), |p| p.call1(py, (done, total)).map(drop))
        });
        if let Err(stop) = shown {
            shared.cancelled.store(true, Ordering::Relaxed);
            return Err(stop);
        }
        match answer {
            Ok(results) => return Ok(results),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(pyo3::exceptions::PyRuntimeError::new_err(
                    "the thread that did the work panicked; please report this",
                ));
            }
        }
    }
}

/// Replays traces under policies and returns the results as JSON; see `agentrt.replay.run`.
///
/// `progress(done, total)` is called some ten times a second. An exception in it, Ctrl-C included, stops the sweep.
#[pyfunction]
#[pyo3(signature = (traces, policies, *, order, sessions, seeds, capacities, model, host = None, host_bandwidth = None, prefetch_bandwidth = None, strip_identity = false, threads = 0, progress = None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
pub(crate) fn replay(
    py: Python<'_>,
    traces: Vec<PyRef<'_, Trace>>,
    policies: Vec<PolicyArgument>,
    order: &str,
    sessions: Vec<usize>,
    seeds: Vec<u64>,
    capacities: Vec<String>,
    model: &str,
    host: Option<&str>,
    host_bandwidth: Option<f64>,
    prefetch_bandwidth: Option<f64>,
    strip_identity: bool,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let shared_progress = Arc::new(Progress::default());
    let mut custom = Vec::new();
    let mut contenders = Vec::new();
    for argument in policies {
        contenders.push(match argument {
            PolicyArgument::Name(name) => Contender::Named(name),
            PolicyArgument::Factory(name, factory) => {
                if !factory.bind(py).is_callable() {
                    return Err(PyTypeError::new_err(format!(
                        "policy `{name}`: pass a class or a function that makes one"
                    )));
                }
                let shared = Arc::new(Shared {
                    name: name.clone(),
                    factory,
                    invalid_victims: AtomicU64::new(0),
                    failure: Mutex::new(None),
                    progress: Arc::clone(&shared_progress),
                });
                custom.push(Arc::clone(&shared));
                let build: CustomPolicy =
                    Arc::new(move |trace| Ok(Box::new(PythonPolicy::new(&shared, trace)) as Box<dyn CachePolicy>));
                Contender::Custom(name, build)
            }
        });
    }
    let options = SweepOptions {
        order: self::order(order)?,
        sessions,
        seeds,
        capacities: capacities.iter().map(|c| Capacity::parse(c)).collect::<Result<_, _>>().map_err(from_replay)?,
        policies: contenders,
        model: self::model(model)?,
        host: self::host(host, host_bandwidth, prefetch_bandwidth)?,
        strip_identity,
        threads,
    };
    let traces: Vec<Arc<trace::Trace>> = traces.iter().map(|t| Arc::clone(&t.inner)).collect();

    let results =
        watched(py, &shared_progress, progress.as_ref(), move |progress| sweep::run(&traces, &options, progress))?;
    for shared in &custom {
        if let Some(error) = shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
    }
    let invalid: std::collections::BTreeMap<&str, u64> =
        custom.iter().map(|s| (s.name.as_str(), s.invalid_victims.load(Ordering::Relaxed))).collect();
    to_json(&(results.map_err(from_replay)?, invalid))
}

/// Built-in policies: (name, one line on what it does, empty for published baselines).
#[pyfunction]
pub(crate) fn policies() -> Vec<(&'static str, &'static str)> {
    let about = |name: &str| ::replay::policies::agentrt::variants().find(|v| v.0 == name).map_or("", |v| v.1);
    ::replay::policies::names().iter().map(|name| (*name, about(name))).collect()
}

/// Built-in workloads: (name, one line on what it is, default number of sessions). The first five are the demo.
#[pyfunction]
pub(crate) fn workloads() -> Vec<(&'static str, &'static str, usize)> {
    generate::WORKLOADS.iter().map(|w| (w.name, w.about, w.default_sessions)).collect()
}

/// Latency models: (name, KV bytes per token).
#[pyfunction]
pub(crate) fn models() -> Vec<(&'static str, f64)> {
    LatencyModel::ALL.iter().map(|m| (m.name, m.kv_bytes_per_token)).collect()
}
