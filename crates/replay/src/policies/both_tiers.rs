//! The host tier's order under agentrt's policy: what pool and host hold together is one pool to a second core.
//!
//! The second core sees the same calls as the first and never a miss that the host can serve. When the host is full, it
//! names what is worth least in either tier. A victim in the host is dropped; a victim that is just leaving the pool is
//! not copied; a victim in the pool is remembered, and not copied when it leaves. Copies of what the pool holds go before
//! all victims: they are not missed.

use runtime_core::ids::WorkloadId;
use runtime_core::kv::{Config, FutureStarts, Hint};
use runtime_core::runtime::Options;
use runtime_core::Runtime;
use rustc_hash::{FxHashMap, FxHashSet};

use super::agentrt::ONE_THREAD;
use crate::host::HostTier;
use crate::policy::CallView;
use crate::pool::Pool;

pub(super) struct BothTiers {
    runtime: Runtime,
    workload: WorkloadId,
    keys: Vec<u64>,
    victims: Vec<u32>,
    /// Of each call that has started and whose prompt is not stored yet, the blocks that either tier held.
    held: FxHashMap<u32, usize>,
    /// In the pool, and not worth a copy when they leave it.
    dead: FxHashSet<u32>,
}

impl BothTiers {
    pub(super) fn new(blocks: usize, config: Config, workload: &str) -> Self {
        let options = Options { config, ..Options::for_pool(blocks) };
        let runtime = Runtime::new(options).expect("a pool has at least one block");
        let workload = runtime.workload(workload).expect("the first workload has room");
        Self {
            runtime,
            workload,
            keys: Vec::new(),
            victims: Vec::new(),
            held: FxHashMap::default(),
            dead: FxHashSet::default(),
        }
    }

    fn keep_keys(&mut self, blocks: &[u32]) {
        self.keys.clear();
        self.keys.extend(blocks.iter().map(|&b| u64::from(b) + 1));
    }

    pub(super) fn foretell(&self, session: u32, starts: FutureStarts) {
        self.runtime.foretell(self.workload, u64::from(session), starts).expect(ONE_THREAD);
    }

    /// A call waits for room in the pool.
    pub(super) fn queued(&mut self, call: &CallView<'_>) {
        self.keep_keys(call.prompt);
        let (session, id) = (u64::from(call.session), u64::from(call.call));
        self.runtime.call_queued(self.workload, session, id, call.agent, call.time_us, &self.keys).expect(ONE_THREAD);
    }

    /// A call starts with this prompt; an empty one where it bypasses the cache.
    pub(super) fn started(&mut self, call: &CallView<'_>, prompt: &[u32], hints: &[Hint]) {
        self.keep_keys(prompt);
        let (session, id) = (u64::from(call.session), u64::from(call.call));
        let held = self
            .runtime
            .call_started(self.workload, session, id, call.agent, call.time_us, &self.keys, hints)
            .expect(ONE_THREAD);
        if held < prompt.len() {
            self.held.insert(call.call, held);
        }
        for block in prompt {
            self.dead.remove(block);
        }
    }

    /// The pool holds the call's whole prompt. Does nothing the second time.
    pub(super) fn stored(&mut self, call: &CallView<'_>, hints: &[Hint]) {
        let Some(held) = self.held.remove(&call.call) else { return };
        self.keep_keys(&call.prompt[held..]);
        let hints = hints.get(held..).unwrap_or(&[]);
        self.runtime.stored(self.workload, u64::from(call.call), call.time_us, &self.keys, hints).expect(ONE_THREAD);
    }

    pub(super) fn ended(&mut self, call: &CallView<'_>, output: &[u32], tool: u16, hints: &[Hint]) {
        self.keep_keys(output);
        let (session, id) = (u64::from(call.session), u64::from(call.call));
        self.runtime.call_ended(self.workload, session, id, tool, call.time_us, &self.keys, hints).expect(ONE_THREAD);
    }

    pub(super) fn session_over(&self, session: u32, now_us: u64) {
        self.runtime.session_over(self.workload, u64::from(session), now_us).expect(ONE_THREAD);
    }

    /// Makes room in the host for `entering`; returns those of them that shall not be copied.
    pub(super) fn room(&mut self, entering: &[u32], now_us: u64, pool: &Pool, host: &mut HostTier) -> Vec<u32> {
        let mut refused: Vec<u32> = entering.iter().copied().filter(|b| self.dead.remove(b)).collect();
        let mut need = (entering.len() - refused.len()).saturating_sub(host.free());
        need -= host.drop_doubles(pool, need);
        if need == 0 {
            return refused;
        }
        let leaving: FxHashSet<u32> = entering.iter().copied().collect();
        while need > 0 {
            self.victims.clear();
            let victims = &mut self.victims;
            if self.runtime.evict(need, now_us, |key| victims.push(key as u32 - 1)).expect(ONE_THREAD) == 0 {
                break;
            }
            for &block in &self.victims {
                if host.drop_copy(block) {
                    need -= 1;
                } else if leaving.contains(&block) {
                    refused.push(block);
                    need -= 1;
                } else if pool.is_resident(block) {
                    self.dead.insert(block);
                }
            }
        }
        refused
    }
}
