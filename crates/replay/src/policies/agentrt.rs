//! agentrt's own policy, driven through the core's events exactly as an engine adapter drives it.

use runtime_core::ids::WorkloadId;
use runtime_core::kv::{Config, Expected, FutureStarts, Hint, Oracle, Prediction, Workload};
use runtime_core::runtime::Options;
use runtime_core::Runtime;
use rustc_hash::{FxHashMap, FxHashSet};

use super::both_tiers::BothTiers;
use crate::host::HostTier;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::schedule::{EventKind, Schedule};
use crate::trace::Trace;

/// The policy, its ablations and its oracles: name, one line, what differs from the default.
#[allow(clippy::type_complexity)]
const VARIANTS: &[(&str, &str, fn(&mut Config))] = &[
    ("agentrt", "learned content, time and sharing; hit density", |_| {}),
    ("agentrt-no-prediction", "ablation: every agent of a session is equally likely to be next", |c| {
        c.prediction = false;
    }),
    ("agentrt-order-1", "ablation: transitions of order 1 only", |c| c.order2 = false),
    ("agentrt-no-superseded", "ablation: misses of earlier calls are ignored", |c| c.superseded = false),
    ("agentrt-no-classes", "ablation: one content class", |c| c.content_classes = false),
    ("agentrt-no-content-odds", "ablation: content by the cell alone, not by habit, place and sessions", |c| {
        c.content_odds = false;
    }),
    ("agentrt-no-lost", "ablation: what was evicted does not vote on content", |c| c.lost = false),
    ("agentrt-no-session-end", "ablation: sessions never end", |c| c.session_end = false),
    ("agentrt-no-time-contexts", "ablation: gaps by agent only", |c| c.time_contexts = false),
    ("agentrt-no-density", "ablation: probability of reuse within the residence time", |c| c.density = false),
    ("agentrt-no-sharing-classes", "ablation: private or shared, no finer", |c| c.sharing_classes = false),
    ("agentrt-no-sharing-agents", "ablation: sharing regardless of agent and step", |c| c.sharing_agents = false),
    ("agentrt-no-followers", "ablation: no session follows another", |c| c.followers = false),
    ("agentrt-no-tool-order", "ablation: the next agent regardless of tools", |c| c.tool_order = false),
    ("agentrt-no-anchors", "ablation: anchors are forgotten with their eviction", |c| c.anchors = false),
    ("agentrt-no-queue", "ablation: calls that wait are not heard of before they start", |c| c.queue = false),
    (TOLD_ENDS, "agentrt where applications say when a session is over", |_| {}),
    (NO_QUOTES, "ablation, with --strip-identity: agents of a run are not linked by the answers they quote", |_| {}),
    ("agentrt-no-guard", "ablation: no shadow LRU that takes over", |c| c.guard = false),
    ("agentrt-sabotaged", "agentrt with all scores upside down: what the guard saves", |c| c.sabotage = true),
    ("agentrt-sabotaged-no-guard", "the same without the guard", |c| (c.sabotage, c.guard) = (true, false)),
    (HOST_LRU, "ablation: the host tier drops what was used least recently", |_| {}),
    (NO_PREFETCH, "ablation: nothing is brought back from the host tier ahead of its use", |_| {}),
    ("oracle-content", "agentrt that knows in how many calls of its session a block is used again", |c| {
        c.oracle.content = true;
    }),
    ("oracle-time", "agentrt that knows when a session calls next", |c| c.oracle.time = true),
    ("oracle-ends", "agentrt that knows whether a session calls again, but not when", |c| c.oracle.ends = true),
    ("oracle-sharing", "agentrt that knows when another session uses a block", |c| c.oracle.sharing = true),
    ("oracle-all", "agentrt that knows content, time and sharing", |c| {
        c.oracle = Oracle { content: true, time: true, sharing: true, ..Oracle::default() };
    }),
];

/// Names and one-line descriptions of the policy and its variants.
pub fn variants() -> impl Iterator<Item = (&'static str, &'static str)> {
    VARIANTS.iter().map(|v| (v.0, v.1))
}

/// The configuration of a variant.
pub fn config(name: &str) -> Option<Config> {
    let (_, _, change) = VARIANTS.iter().find(|v| v.0 == name)?;
    let mut config = Config::default();
    change(&mut config);
    Some(config)
}

/// What of the policy a host tier gets; everything unless an ablation is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostUse {
    /// The learned order in the host tier too; off: least recently used.
    pub order: bool,
    /// Blocks are brought back ahead of their use.
    pub prefetch: bool,
}

impl HostUse {
    /// What a variant does with a host tier.
    pub fn of(name: &str) -> Self {
        Self { order: name != HOST_LRU, prefetch: name != NO_PREFETCH }
    }
}

const HOST_LRU: &str = "agentrt-host-lru";
const NO_PREFETCH: &str = "agentrt-no-prefetch";
/// Not by default, as few applications say so.
pub const TOLD_ENDS: &str = "agentrt-told-ends";
/// With inferred identities: by blocks alone.
pub const NO_QUOTES: &str = "agentrt-no-quotes";

/// Blocks are brought back for calls at least this likely.
const PREFETCH_PROBABILITY: f32 = 0.6;

pub(super) const ONE_THREAD: &str = "one thread uses the runtime";

/// Adapter from the replay's events to the core.
pub struct AgentRt {
    runtime: Runtime,
    workload: WorkloadId,
    keys: Vec<u64>,
    victims: Vec<u32>,
    future: Option<Future>,
    host: HostUse,
    /// Whether the core is told when sessions end.
    pub told_ends: bool,
    config: Config,
    name: String,
    /// Where there is a host tier.
    both: Option<BothTiers>,
    /// The last prompt and answer of each (session, agent), for prefetching.
    last: FxHashMap<(u32, u16), Last>,
    /// Prompts of the calls that wait, in order of arrival.
    waiting: Vec<Waiting>,
    expected: Vec<Wanted>,
    /// Sessions and agents whose blocks were brought back since the session's last call: once is enough.
    served: FxHashSet<(u32, u16)>,
}

/// A call that waits.
struct Waiting {
    call: u32,
    lane: (u32, u16),
    prompt: Vec<u32>,
}

/// What was named to be brought back.
struct Wanted {
    lane: (u32, u16),
    chain: Vec<u32>,
}

/// What a lane sent last, and how much of what it had sent before came again.
#[derive(Default)]
struct Last {
    chain: Vec<u32>,
    dropped: usize,
}

impl Last {
    /// What will come again if the next prompt drops as much of this one as this one dropped of the one before.
    fn stable(&self) -> &[u32] {
        &self.chain[..self.chain.len().saturating_sub(self.dropped)]
    }
}

/// What the oracles know: of every use of a block its next use by the same and by another session, of every session
/// when it calls.
struct Future {
    hints: Vec<Hint>,
    prompt_at: Vec<usize>,
    output_at: Vec<usize>,
    starts: Vec<Vec<u64>>,
}

impl Future {
    fn new(trace: &Trace, schedule: &Schedule) -> Self {
        let n = trace.calls.len();
        let (mut prompt_at, mut output_at) = (vec![0; n], vec![0; n]);
        let mut total = 0;
        for (i, call) in trace.calls.iter().enumerate() {
            prompt_at[i] = total;
            total += trace.blocks_in(call.prompt);
            output_at[i] = total;
            total += trace.blocks_in(call.output);
        }
        let none = Hint { next_step: u32::MAX, shared_us: u64::MAX };
        let mut hints = vec![none; total];
        let mut start_of = vec![0u64; n];
        // Next use by each session: (session, step); and the next two distinct sessions with times.
        let mut own: FxHashMap<(u32, u32), u32> = FxHashMap::default();
        let mut soon: Vec<[(u32, u64); 2]> = vec![[(u32::MAX, u64::MAX); 2]; trace.n_blocks as usize];
        let uses = |kind| !matches!(kind, EventKind::Queued | EventKind::Grow);
        for event in schedule.events.iter().rev().filter(|event| uses(event.kind)) {
            let i = event.call as usize;
            let call = &trace.calls[i];
            let (span, at) = match event.kind {
                EventKind::Finish => (call.output, output_at[i]),
                _ => (call.prompt, prompt_at[i]),
            };
            if event.kind != EventKind::Finish {
                start_of[i] = event.time_us;
            }
            if event.kind == EventKind::Bypass {
                continue;
            }
            for (b, hint) in trace.blocks(span).zip(&mut hints[at..]) {
                let next = &mut soon[b as usize];
                hint.next_step = own.get(&(call.session, b)).copied().unwrap_or(u32::MAX);
                hint.shared_us = if next[0].0 == call.session { next[1].1 } else { next[0].1 };
                if event.kind == EventKind::Start {
                    own.insert((call.session, b), call.step);
                    if next[0].0 != call.session {
                        next[1] = next[0];
                    }
                    next[0] = (call.session, event.time_us);
                }
            }
        }
        let starts = trace.sessions.iter().map(|s| s.calls.iter().map(|&c| start_of[c as usize]).collect()).collect();
        Self { hints, prompt_at, output_at, starts }
    }

    fn of_prompt(&self, call: &CallView<'_>) -> &[Hint] {
        &self.hints[self.prompt_at[call.call as usize]..][..call.prompt.len()]
    }
}

impl AgentRt {
    /// A fresh core for a pool of `capacity` blocks.
    pub fn new(capacity: usize, config: Config, host: HostUse, trace: &Trace, schedule: &Schedule) -> Self {
        let future = (config.oracle != Oracle::default()).then(|| Future::new(trace, schedule));
        let options = Options { config, ..Options::for_pool(capacity) };
        let runtime = Runtime::new(options).expect("a schedule has a capacity of at least one block");
        let workload = runtime.workload(&trace.workload).expect("the first workload has room");
        Self {
            runtime,
            workload,
            keys: Vec::new(),
            victims: Vec::new(),
            future,
            host,
            told_ends: false,
            config,
            name: trace.workload.clone(),
            both: None,
            last: FxHashMap::default(),
            waiting: Vec::new(),
            expected: Vec::new(),
            served: FxHashSet::default(),
        }
    }

    fn foretell(&mut self, call: &CallView<'_>) {
        if let Some(future) = &self.future {
            let starts = &future.starts[call.session as usize];
            let mut next: FutureStarts = [u64::MAX; 6];
            for (to, from) in next.iter_mut().zip(starts.iter().skip(call.step as usize + 1)) {
                *to = *from;
            }
            self.runtime.foretell(self.workload, u64::from(call.session), next).expect(ONE_THREAD);
            if let Some(both) = &self.both {
                both.foretell(call.session, next);
            }
        }
    }

    fn stored(&mut self, call: u32, time_us: u64, blocks: &[u32], skip: usize) {
        self.keys.clear();
        self.keys.extend(blocks.iter().map(|&b| u64::from(b) + 1));
        let hints = self.future.as_ref().map_or(&[][..], |f| {
            let at = f.prompt_at[call as usize] + skip;
            &f.hints[at..at + blocks.len()]
        });
        self.runtime.stored(self.workload, u64::from(call), time_us, &self.keys, hints).expect(ONE_THREAD);
    }
}

impl CachePolicy for AgentRt {
    fn session_end(&mut self, session: u32, now_us: u64) {
        if self.told_ends {
            self.runtime.session_over(self.workload, u64::from(session), now_us).expect(ONE_THREAD);
            if let Some(both) = &self.both {
                both.session_over(session, now_us);
            }
        }
    }

    fn host_tier(&mut self, pool_blocks: usize, host_blocks: usize) {
        self.both = self.host.order.then(|| BothTiers::new(pool_blocks + host_blocks, self.config, &self.name));
    }

    fn host_room(&mut self, entering: &[u32], now_us: u64, pool: &Pool, host: &mut HostTier) -> Vec<u32> {
        self.both.as_mut().map_or(Vec::new(), |both| both.room(entering, now_us, pool, host))
    }

    fn call_queued(&mut self, call: &CallView<'_>, _pool: &Pool) {
        self.foretell(call);
        let (lane, prompt) = ((call.session, call.agent), call.prompt.to_vec());
        self.waiting.push(Waiting { call: call.call, lane, prompt });
        self.keys.clear();
        self.keys.extend(call.prompt.iter().map(|&b| u64::from(b) + 1));
        if let Some(both) = &mut self.both {
            both.queued(call);
        }
        let (session, id) = (u64::from(call.session), u64::from(call.call));
        self.runtime.call_queued(self.workload, session, id, call.agent, call.time_us, &self.keys).expect(ONE_THREAD);
    }

    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        self.served.retain(|lane| lane.0 != call.session);
        self.waiting.retain(|waiting| waiting.call != call.call);
        self.foretell(call);
        self.keys.clear();
        self.keys.extend(call.prompt.iter().map(|&b| u64::from(b) + 1));
        let hints = self.future.as_ref().map_or(&[][..], |f| f.of_prompt(call));
        if let Some(both) = &mut self.both {
            both.started(call, call.prompt, hints);
        }
        let hit = self
            .runtime
            .call_started(
                self.workload,
                u64::from(call.session),
                u64::from(call.call),
                call.agent,
                call.time_us,
                &self.keys,
                hints,
            )
            .expect(ONE_THREAD);
        debug_assert_eq!(hit, call.hit, "{:?}", self.runtime.repairs());
    }

    fn evict(&mut self, n: usize, now_us: u64, pool: &mut Pool) {
        let mut left = n;
        while left > 0 {
            self.victims.clear();
            let victims = &mut self.victims;
            if self.runtime.evict(left, now_us, |key| victims.push(key as u32 - 1)).expect(ONE_THREAD) == 0 {
                return;
            }
            // Refused only where the answer that is being stored extends over blocks that were free; the finish
            // tells the core of those again.
            left -= self.victims.iter().filter(|&&b| pool.evict(b)).count();
        }
    }

    fn inserted(&mut self, call: &CallView<'_>, blocks: &[u32], _pool: &Pool) {
        if let Some(both) = &mut self.both {
            both.stored(call, self.future.as_ref().map_or(&[][..], |f| f.of_prompt(call)));
        }
        if call.hit < call.prompt.len() && blocks.first() == Some(&call.prompt[call.hit]) {
            self.stored(call.call, call.time_us, blocks, call.hit);
        }
    }

    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], _released: &[u32], _pool: &Pool) {
        let last = self.last.entry((call.session, call.agent)).or_default();
        let kept = last.chain.iter().zip(call.prompt).take_while(|(before, now)| before == now).count();
        last.dropped = last.chain.len() - kept;
        last.chain.clear();
        last.chain.extend(call.prompt.iter().chain(output));
        self.foretell(call);
        let tool = call.tool.map_or(0, |t| t + 1);
        self.ended(call, output, tool);
    }

    fn prefetch(&mut self, now_us: u64, budget_blocks: usize, pool: &Pool, host: &HostTier) -> Vec<Vec<u32>> {
        if !self.host.prefetch {
            return Vec::new();
        }
        let mut expected = [Expected::NOBODY; 8];
        let found = self.runtime.expected(now_us, PREFETCH_PROBABILITY, &mut expected).expect(ONE_THREAD);
        self.expected.clear();
        let mut chains = Vec::new();
        let mut wanted = 0;
        for e in &expected[..found] {
            let lane = (e.session as u32, e.agent);
            let chain: &[u32] = if e.waits {
                self.waiting.iter().find(|waiting| waiting.lane == lane).map_or(&[], |waiting| &waiting.prompt)
            } else {
                self.last.get(&lane).map_or(&[], Last::stable)
            };
            let known = chain.iter().take_while(|&&b| pool.is_resident(b)).count();
            let there = chain[known..].iter().take_while(|&&b| host.holds(b)).count();
            let chain = &chain[..known + there.min(e.room as usize)];
            if there == 0 || wanted >= budget_blocks || !(e.waits || self.served.insert(lane)) {
                continue;
            }
            self.keys.clear();
            self.keys.extend(chain.iter().map(|&b| u64::from(b) + 1));
            if self.runtime.worth_restoring(self.workload, e.session, e.agent, &self.keys).expect(ONE_THREAD) {
                wanted += chain.len() - known;
                self.expected.push(Wanted { lane, chain: chain.to_vec() });
                chains.push(chain.to_vec());
            }
        }
        chains
    }

    fn prefetched(&mut self, chain: usize, blocks: &[u32], now_us: u64, pool: &Pool) {
        let Some(last) = blocks.last() else { return };
        let Wanted { lane, chain } = &self.expected[chain];
        self.keys.clear();
        self.keys.extend(chain.iter().take_while(|&&b| pool.is_resident(b)).map(|&b| u64::from(b) + 1));
        debug_assert!(self.keys.contains(&(u64::from(*last) + 1)));
        self.runtime.restored(self.workload, u64::from(lane.0), lane.1, now_us, &self.keys).expect(ONE_THREAD);
    }

    fn call_bypassed(&mut self, call: &CallView<'_>) {
        self.foretell(call);
        if let Some(both) = &mut self.both {
            both.started(call, &[], &[]);
        }
        let (session, id) = (u64::from(call.session), u64::from(call.call));
        self.runtime.call_started(self.workload, session, id, call.agent, call.time_us, &[], &[]).expect(ONE_THREAD);
        self.ended(call, &[], 0);
    }
}

impl AgentRt {
    fn ended(&mut self, call: &CallView<'_>, output: &[u32], tool: u16) {
        self.keys.clear();
        self.keys.extend(output.iter().map(|&b| u64::from(b) + 1));
        let hints = self.future.as_ref().map_or(&[][..], |f| {
            let at = f.output_at[call.call as usize];
            &f.hints[at..at + output.len()]
        });
        if let Some(both) = &mut self.both {
            both.ended(call, output, tool, hints);
        }
        let (session, id) = (u64::from(call.session), u64::from(call.call));
        self.runtime.call_ended(self.workload, session, id, tool, call.time_us, &self.keys, hints).expect(ONE_THREAD);
    }

    /// What the workload has taught so far.
    pub(crate) fn learned(&self) -> &Workload {
        self.runtime.what_was_learned(self.workload).expect("registered when the policy was made")
    }

    /// P(a resident block is used within the residence time), and that time in seconds.
    pub(crate) fn survival(&self, block: u32, now_us: u64) -> Option<(f32, f32)> {
        self.runtime.survival(u64::from(block) + 1, now_us).expect(ONE_THREAD)
    }

    /// The agent that a session is likeliest to call next.
    pub(crate) fn foreseen(&self, session: u32) -> Option<u16> {
        let mut out = [Prediction { agent: 0, step: 0, probability: 0.0, median_s: 0.0 }; 8];
        let found = self.runtime.predict(self.workload, u64::from(session), 1, &mut out);
        (found.expect("registered when the policy was made") > 0).then_some(out[0].agent)
    }

    /// The core behind the policy, for reports.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }
}
