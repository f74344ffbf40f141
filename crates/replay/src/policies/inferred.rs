//! A policy that is not told whose calls it sees: the core's [`Identity`] infers it from their blocks, and from the
//! answers that their prompts quote where the trace says so.
//!
//! Sessions and agents get numbers of their own, in order of appearance and by anchor; they have nothing to do with the
//! trace's. The end of a session, which only a declared session can have, is not passed on.

use runtime_core::identity::{self, Identity, Options, Started, ANSWER_MARKS, PROMPT_MARKS};
use runtime_core::ids::mix;
use rustc_hash::FxHashMap;

use crate::host::HostTier;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::{self, Trace};

/// Tokens of an answer for each of its marks.
const TOKENS_A_MARK: u32 = 8;

/// Wraps a policy.
pub struct Inferred {
    inner: Box<dyn CachePolicy>,
    identity: Identity,
    running: FxHashMap<u32, Call>,
    steps: FxHashMap<u32, u32>,
    keys: Vec<u64>,
    quotes: Option<Quotes>,
    marks: Vec<u64>,
}

/// Which answers each prompt quotes.
struct Quotes {
    /// By call: the last of its entries in `quoted`, and how many marks its answer has.
    calls: Vec<(usize, u32)>,
    quoted: Vec<u32>,
}

impl Quotes {
    fn new(trace: &Trace) -> Option<Self> {
        let mut quoted = Vec::new();
        let marks = |call: &trace::Call| (call.output_tokens / TOKENS_A_MARK).min(ANSWER_MARKS as u32);
        let calls = trace.calls.iter().map(|call| {
            let steps = &trace.sessions[call.session as usize].calls;
            quoted.extend(trace.blocks(call.quotes).map(|step| steps[step as usize]));
            (quoted.len(), marks(call))
        });
        let calls = calls.collect();
        (!quoted.is_empty()).then_some(Self { calls, quoted })
    }

    /// Appends the marks of a call's answer.
    fn answer(&self, call: u32, marks: &mut Vec<u64>) {
        // Smallest first, as the marks of a text are.
        let spaced = |i| u64::from(i) << 32 | mix(u64::from(call) << 32 | u64::from(i)) >> 32;
        marks.extend((0..self.calls[call as usize].1).map(spaced));
    }

    /// The marks of the answers that a call's prompt quotes.
    fn prompt(&self, call: u32, marks: &mut Vec<u64>) {
        let start = (call as usize).checked_sub(1).map_or(0, |before| self.calls[before].0);
        marks.clear();
        for &quoted in &self.quoted[start..self.calls[call as usize].0] {
            self.answer(quoted, marks);
        }
        marks.sort_unstable();
        marks.truncate(PROMPT_MARKS);
    }
}

#[derive(Clone, Copy)]
struct Call {
    session: u32,
    agent: u16,
    step: u32,
    started: Started,
}

impl Inferred {
    /// `inner` with inferred identities. `quotes`: what the trace says of quoted answers is used.
    pub fn new(inner: Box<dyn CachePolicy>, trace: &Trace, quotes: bool) -> Self {
        let identity = Identity::new(Options::default()).expect("the default is in range");
        Self {
            inner,
            identity,
            running: FxHashMap::default(),
            steps: FxHashMap::default(),
            keys: Vec::new(),
            quotes: if quotes { Quotes::new(trace) } else { None },
            marks: Vec::new(),
        }
    }

    /// `trace` as a policy may know it: without the names of its agents, with one for each inferred number.
    pub fn anonymous(trace: &Trace) -> Trace {
        let agents = (0..=identity::ANCHORS + identity::NUMBERED as usize).map(|n| format!("agent-{n}")).collect();
        Trace { agents, ..trace.clone() }
    }

    /// Infers once, when the call is first heard of: while it waits, or when it starts.
    fn start<'a>(&mut self, call: &CallView<'a>) -> CallView<'a> {
        if let Some(known) = self.running.get(&call.call) {
            return view(call, known);
        }
        self.keys.clear();
        self.keys.extend(call.prompt.iter().map(|&b| u64::from(b) + 1));
        let mut inferred = self.identity.started(&self.keys);
        if let Some(quotes) = self.quotes.as_ref().filter(|_| inferred.is_new) {
            quotes.prompt(call.call, &mut self.marks);
            inferred = self.identity.join(inferred.call, &self.marks).unwrap_or(inferred);
        }
        // Names count from 1 below the top bit, and a trace has fewer than 2^32 calls.
        let session = inferred.session as u32;
        let step = self.steps.entry(session).or_default();
        let known = Call { session, agent: inferred.agent, step: *step, started: inferred.call };
        *step += 1;
        self.running.insert(call.call, known);
        view(call, &known)
    }

    fn end<'a>(&mut self, call: &CallView<'a>, output: &[u32]) -> CallView<'a> {
        let known = self.running.remove(&call.call).expect("calls start before they end");
        self.keys.clear();
        self.keys.extend(output.iter().map(|&b| u64::from(b) + 1));
        self.identity.ended(known.started, &self.keys);
        if let Some(quotes) = &self.quotes {
            self.marks.clear();
            quotes.answer(call.call, &mut self.marks);
            self.identity.answered(known.started, &self.marks);
        }
        view(call, &known)
    }
}

fn view<'a>(call: &CallView<'a>, known: &Call) -> CallView<'a> {
    CallView { session: known.session, agent: known.agent, step: known.step, ..*call }
}

impl CachePolicy for Inferred {
    fn call_queued(&mut self, call: &CallView<'_>, pool: &Pool) {
        let call = self.start(call);
        self.inner.call_queued(&call, pool);
    }

    fn call_start(&mut self, call: &CallView<'_>, pool: &Pool) {
        let call = self.start(call);
        self.inner.call_start(&call, pool);
    }

    fn evict(&mut self, n: usize, now_us: u64, pool: &mut Pool) {
        self.inner.evict(n, now_us, pool);
    }

    fn inserted(&mut self, call: &CallView<'_>, blocks: &[u32], pool: &Pool) {
        let call = view(call, &self.running[&call.call]);
        self.inner.inserted(&call, blocks, pool);
    }

    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], released: &[u32], pool: &Pool) {
        let call = self.end(call, output);
        self.inner.call_finish(&call, output, released, pool);
    }

    fn call_bypassed(&mut self, call: &CallView<'_>) {
        self.start(call);
        let call = self.end(call, &[]);
        self.inner.call_bypassed(&call);
    }

    fn host_tier(&mut self, pool_blocks: usize, host_blocks: usize) {
        self.inner.host_tier(pool_blocks, host_blocks);
    }

    fn host_room(&mut self, entering: &[u32], now_us: u64, pool: &Pool, host: &mut HostTier) -> Vec<u32> {
        self.inner.host_room(entering, now_us, pool, host)
    }

    fn prefetch(&mut self, now_us: u64, budget_blocks: usize, pool: &Pool, host: &HostTier) -> Vec<Vec<u32>> {
        self.inner.prefetch(now_us, budget_blocks, pool, host)
    }

    fn prefetched(&mut self, chain: usize, blocks: &[u32], now_us: u64, pool: &Pool) {
        self.inner.prefetched(chain, blocks, now_us, pool);
    }
}
