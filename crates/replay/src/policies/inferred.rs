//! A policy that is not told whose calls it sees: the core's [`Identity`] infers it from their blocks.
//!
//! Sessions and agents get numbers of their own, in order of appearance and by anchor; they have nothing to do with the
//! trace's. The end of a session, which only a declared session can have, is not passed on.

use runtime_core::identity::{Identity, Options, Started};
use rustc_hash::FxHashMap;

use crate::host::HostTier;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::Trace;

/// Wraps a policy.
pub struct Inferred {
    inner: Box<dyn CachePolicy>,
    identity: Identity,
    running: FxHashMap<u32, Call>,
    steps: FxHashMap<u32, u32>,
    keys: Vec<u64>,
}

#[derive(Clone, Copy)]
struct Call {
    session: u32,
    agent: u16,
    step: u32,
    started: Started,
}

impl Inferred {
    /// `inner` with inferred identities.
    pub fn new(inner: Box<dyn CachePolicy>) -> Self {
        let identity = Identity::new(Options::default()).expect("the default is in range");
        Self { inner, identity, running: FxHashMap::default(), steps: FxHashMap::default(), keys: Vec::new() }
    }

    /// `trace` as a policy may know it: without the names of its agents, with one for each inferred number.
    pub fn anonymous(trace: &Trace) -> Trace {
        let agents = (0..=runtime_core::identity::ANCHORS).map(|n| format!("agent-{n}")).collect();
        Trace { agents, ..trace.clone() }
    }

    /// Infers once, when the call is first heard of: while it waits, or when it starts.
    fn start<'a>(&mut self, call: &CallView<'a>) -> CallView<'a> {
        if let Some(known) = self.running.get(&call.call) {
            return view(call, known);
        }
        self.keys.clear();
        self.keys.extend(call.prompt.iter().map(|&b| u64::from(b) + 1));
        let inferred = self.identity.started(&self.keys);
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
