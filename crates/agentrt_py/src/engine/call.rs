//! What is kept of a request that vLLM holds, how many blocks those that decode will take, and what has been counted.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use numpy::PyArray1;
use pyo3::prelude::*;

/// A request that vLLM holds.
#[pyclass(module = "agentrt._core")]
pub(crate) struct EngineCall {
    #[pyo3(get)]
    pub(super) number: u64,
    #[pyo3(get)]
    pub(super) session: u64,
    #[pyo3(get)]
    pub(super) agent: u16,
    #[pyo3(get)]
    pub(super) session_ends: bool,
    #[pyo3(get)]
    pub(super) session_inferred: bool,
    #[pyo3(get)]
    pub(super) agent_inferred: bool,
    /// Other sessions that are over since, as the request says; not those that still have a call here.
    #[pyo3(get)]
    pub(super) ended_sessions: Vec<u64>,
    /// What `Identity.ended` needs; None where nothing was inferred.
    pub(super) inferred: Option<u32>,
    pub(super) keys: Vec<u64>,
    pub(super) output: Vec<u64>,
    /// When it was told to the core as waiting, or started.
    #[pyo3(get)]
    pub(super) arrived_us: u64,
    #[pyo3(get)]
    pub(super) started_us: u64,
    /// Whether the core knows of it; whether it is still to be told as waiting, unless it starts first.
    pub(super) told: bool,
    pub(super) untold: bool,
    /// Whether the core has been told that it starts, and leading blocks that the core held to be resident then, once known.
    pub(super) started: bool,
    pub(super) core_hit: Option<usize>,
    /// Leading blocks that vLLM has found.
    #[pyo3(get)]
    pub(super) hit: usize,
    /// Blocks from here on may be new since the core was asked.
    pub(super) low: usize,
    #[pyo3(get)]
    pub(super) allocated: bool,
    /// Tokens that it is admitted with, and how many of them it has slots for.
    pub(super) tokens: usize,
    pub(super) computed: usize,
    /// Where it stands among [`Decoding`], once its prompt is computed.
    pub(super) decodes: Option<usize>,
    pub(super) request_id: Py<PyAny>,
}

#[pymethods]
impl EngineCall {
    /// Keys of the prompt's full blocks.
    #[getter]
    fn keys<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        PyArray1::from_slice(py, &self.keys)
    }

    /// Keys of the answer's full blocks, once it is over.
    #[getter]
    fn output<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        PyArray1::from_slice(py, &self.output)
    }

    /// Key of the deepest block that vLLM has found; 0 without one.
    #[getter]
    fn group(&self) -> u64 {
        self.hit.checked_sub(1).and_then(|at| self.keys.get(at)).copied().unwrap_or(0)
    }
}

impl EngineCall {
    /// Blocks that its prompt will still take.
    pub(super) fn left(&self, block_size: usize) -> usize {
        self.tokens.div_ceil(block_size).saturating_sub(self.computed.div_ceil(block_size))
    }

    pub(super) fn before(&self, to: usize) -> &[u64] {
        &self.keys[..to.min(self.keys.len())]
    }

    pub(super) fn after(&self, from: usize) -> &[u64] {
        self.keys.get(from..).unwrap_or(&[])
    }
}

macro_rules! counts {
    ($($name:ident: $about:literal),* $(,)?) => {
        /// What has been seen, for logs, metrics and tests.
        #[pyclass(frozen, module = "agentrt._core")]
        #[derive(Default)]
        pub(crate) struct EngineCounts {
            $(pub(super) $name: AtomicU64),*
        }

        #[pymethods]
        impl EngineCounts {
            $(#[doc = $about]
            #[getter]
            fn $name(&self) -> u64 {
                self.$name.load(Relaxed)
            })*
        }
    };
}
counts! {
    requests: "Requests queued.",
    finished: "Requests that are over.",
    prompt_tokens: "Tokens of admitted prompts.",
    hit_tokens: "Of these, found in the pool.",
    resets: "Resets of the prefix cache.",
    sessions_inferred: "Requests that named no session.",
    agents_inferred: "Requests that named no agent.",
    sessions_ended: "Times that a request said of a session that it is over.",
    steps: "Steps scheduled.",
    running: "Requests in the last step.",
}

pub(super) fn add(count: &AtomicU64, n: u64) {
    count.fetch_add(n, Relaxed);
}

/// How many calls that decode will take a block in which step: each takes one every `block_size` steps, since it computes
/// a token a step. Of those that compute several only the average is known.
pub(super) struct Decoding {
    /// By step, modulo the size of a block.
    takers: Vec<usize>,
    /// The step that is scheduled next.
    next: usize,
}

impl Decoding {
    pub(super) fn new(block_size: usize) -> Self {
        Self { takers: vec![0; block_size.max(1)], next: 0 }
    }

    /// A step has been scheduled.
    pub(super) fn step(&mut self) {
        self.next = (self.next + 1) % self.takers.len();
    }

    /// Calls that take a block in the next step.
    pub(super) fn next_takers(&self) -> usize {
        self.takers[self.next]
    }

    /// No call decodes.
    pub(super) fn clear(&mut self) {
        self.takers.fill(0);
    }

    /// From the next step on a call decodes that has slots for so many tokens.
    pub(super) fn join(&mut self, computed: usize) -> usize {
        let size = self.takers.len();
        let at = (self.next + (size - computed % size)) % size;
        self.takers[at] += 1;
        at
    }

    pub(super) fn leave(&mut self, at: Option<usize>) {
        if let Some(takers) = at.and_then(|at| self.takers.get_mut(at)) {
            *takers = takers.saturating_sub(1);
        }
    }
}
