//! The serving engine: one device, steps of continuous batching, and the questions that it asks its policies.
//!
//! Time advances in two ways: by a step, whose length the latency model gives for what it computes, or, where there is
//! nothing to compute, to the next event. A step takes, in this order and within its token budget: a token or a chunk
//! of every running call, oldest first; waiting calls in the order that the policies give, as far as they fit; and
//! prefills in idle capacity, if nothing waits. What arrives during a step is seen when it ends.
//!
//! A call needs pool blocks for all it has computed. It is admitted when the blocks of its whole prompt fit beside what
//! running calls use and still have to prefill; the blocks of its answer come as they fill. Where no block can be had
//! for a running call, the call admitted last loses its memory and waits again: what it had computed stays cached while
//! it can, the rest is computed again.
//!
//! The last, partly filled block of a call is not counted, as in the replay. A call larger than the pool runs without
//! the cache. Costs a few microseconds a step and call, and what the policies cost.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use replay::host::HostOptions;
use replay::latency::{Batch, LatencyModel};
use replay::policies;
use replay::policy::CallView;
use replay::schedule::{Event, EventKind, Order as ReplayOrder, Schedule, ScheduleOptions};
use replay::trace::Trace;
use replay::{Error, Result};
use runtime_core::policy::{KvCachePolicy, Policies, Policy};
use runtime_core::runtime::{EventKind as CoreEvent, Options};
use runtime_core::scheduling::{Decision, Gap, GapDecision, Happening, Load, Needs, Prefill, Retention, Waiting};
use runtime_core::Runtime;

use crate::memory::{self, Core, Doing, Memory, Order};
use crate::outcome::{CallRecord, Outcome};
use crate::service::{Service, OUTPUT_PRICE, PROMPT_PRICE};
use crate::workload::{Arrivals, Workload};

/// The engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Blocks of the pool.
    pub capacity_blocks: usize,
    /// Tokens that a step computes at most.
    pub token_budget: u32,
    /// Calls that run at once at most.
    pub max_running: usize,
    /// How long steps take.
    pub model: LatencyModel,
    /// The host tier; none without.
    pub host: Option<HostOptions>,
    /// The cache policy, by its name in the replay. Those that know the future order of calls cannot be had.
    pub cache: String,
    /// Keep [`Outcome::events`].
    pub record_events: bool,
}

impl EngineOptions {
    /// Llama-3.1-8B on one H100, 8,192 tokens a step, 256 calls at once, least recently used first.
    pub fn new(capacity_blocks: usize) -> Self {
        Self {
            capacity_blocks,
            token_budget: 8192,
            max_running: 256,
            model: LatencyModel::LLAMA_3_1_8B_H100,
            host: None,
            cache: "lru".into(),
            record_events: false,
        }
    }
}

/// What the engine can tell its policies.
const SUPPLIED: Needs = Needs::ALL;
/// Any of these makes the engine report to the core.
const CORE: Needs = Needs::CALLS
    .and(Needs::TOOLS)
    .and(Needs::SESSION_ENDS)
    .and(Needs::REMOVALS)
    .and(Needs::PREDICTIONS)
    .and(Needs::TIMES);
/// Prefills that are asked for at once.
const PREFILLS: usize = 8;

/// Serves the workload under the policies.
///
/// `progress` is called with the number of calls finished, every few hundred. An error where two tenants that both waited
/// were given more unequal shares than a policy promises ([`Policy::bounds_service`]): every run asserts it.
pub fn simulate(
    workload: &Workload,
    options: &EngineOptions,
    scheduling: Vec<Box<dyn Policy>>,
    progress: &mut dyn FnMut(u64),
) -> Result<Outcome> {
    let mut engine = Engine::new(workload, options, scheduling)?;
    engine.open();
    while engine.advance() {
        if engine.finished >= engine.reported + 256 {
            engine.reported = engine.finished;
            progress(engine.finished);
        }
    }
    progress(engine.finished);
    engine.close()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Todo {
    Arrive,
    BringBack,
    Wake,
}

/// A call that has arrived and does not run.
#[derive(Clone, Debug)]
struct Queued {
    call: u32,
    /// Prompt, and full blocks of the answer.
    chain: Vec<u32>,
    prompt_blocks: usize,
    /// Tokens generated before a preemption.
    generated: u32,
    /// Furthest token that has been computed before.
    reached: u32,
    /// Since when it waits.
    since_us: u64,
    held_since: Option<u64>,
    again: bool,
}

#[derive(Clone, Debug)]
struct Running {
    queued: Queued,
    /// Leading blocks of the chain that it uses.
    used: usize,
    /// Tokens whose KV is on the device.
    computed: u32,
    /// Prompt and generated tokens so far.
    known: u32,
    /// It loads from the host until then.
    ready_us: u64,
    /// Too large for the pool.
    bypass: bool,
    /// What this step computes of it.
    chunk: u32,
}

struct OpenGap {
    gap: Gap,
    chain: Vec<u32>,
    decision: GapDecision,
}

struct Engine<'a> {
    workload: &'a Workload,
    trace: &'a Trace,
    options: &'a EngineOptions,
    core: Core,
    needed: Needs,
    scheduled: bool,
    memory: Memory<'a>,
    now_us: u64,
    todo: BinaryHeap<Reverse<(u64, Todo, u32)>>,
    queue: VecDeque<Queued>,
    running: Vec<Running>,
    gaps: BTreeMap<u32, OpenGap>,
    /// Position of each call in its session.
    position: Vec<u32>,
    next_session: usize,
    /// Blocks that running calls have still to put into the pool for their prompts.
    promised: usize,
    prompt_blocks: u64,
    hit_blocks: u64,
    gaps_asked_us: Option<u64>,
    next_hold_us: Option<u64>,
    service: Service,
    /// Who promises that tenants that wait are served alike.
    promises_fairness: Option<String>,
    outcome: Outcome,
    finished: u64,
    reported: u64,
    waiting: Vec<Waiting>,
    decisions: Vec<Decision>,
    order: Vec<u32>,
    entered: Vec<u32>,
}

/// What a cache policy of the replay may know of a call.
fn view<'v>(trace: &Trace, queued: &'v Queued, hit: u32, time_us: u64) -> CallView<'v> {
    let call = &trace.calls[queued.call as usize];
    CallView {
        call: queued.call,
        session: call.session,
        agent: call.agent,
        step: call.step,
        time_us,
        prompt: &queued.chain[..queued.prompt_blocks],
        hit: hit as usize,
        prompt_tokens: call.prompt_tokens,
        tool: None,
    }
}

fn refused(error: &runtime_core::Error) -> Error {
    Error::BadOption {
        option: "policies".into(),
        problem: error.to_string(),
        remedy: "change the policies, or the engine".into(),
    }
}

/// The cache policy's part in the engine; the learned one is added to the core's policies.
fn cache(workload: &Workload, options: &EngineOptions, list: &mut Vec<Box<dyn Policy>>) -> Result<(Order, Options)> {
    let mut core = Options::for_pool(options.capacity_blocks);
    // Nobody is forgotten in the middle of a run.
    core.sessions = workload.trace.sessions.len().next_power_of_two().clamp(4096, 1 << 20);
    if options.cache == "lru" {
        return Ok((Order::Lru, core));
    }
    if let Some(config) = policies::agentrt::config(&options.cache) {
        if options.cache.starts_with("agentrt") {
            core.config = config;
            list.push(Box::new(KvCachePolicy));
            return Ok((Order::Core, core));
        }
    }
    if options.cache.starts_with("min") || options.cache.starts_with("oracle") {
        return Err(Error::BadOption {
            option: "cache".into(),
            problem: format!("`{}` knows the order of calls before it is decided", options.cache),
            remedy: "choose one that learns, for example agentrt or lru".into(),
        });
    }
    let schedule = Schedule {
        events: Vec::new(),
        gap_s: workload.gap_us.iter().map(|&us| us as f64 / 1e6).collect(),
        session_order: Vec::new(),
        options: ScheduleOptions {
            order: ReplayOrder::Closed,
            sessions: 1,
            seed: 0,
            capacity_blocks: options.capacity_blocks,
            model: options.model,
        },
    };
    Ok((Order::Replay(policies::build(&options.cache, &workload.trace, &schedule)?), core))
}

impl<'a> Engine<'a> {
    fn new(workload: &'a Workload, options: &'a EngineOptions, mut list: Vec<Box<dyn Policy>>) -> Result<Self> {
        let trace: &Trace = &workload.trace;
        let scheduled = !list.is_empty();
        let fair = list.iter().find(|policy| policy.bounds_service());
        let promises_fairness = fair.map(|policy| policy.about().name.into_owned());
        let (order, core_options) = cache(workload, options, &mut list)?;
        let policies = Policies::new(list);
        let supplied = if options.host.is_some() { SUPPLIED } else { SUPPLIED.without(Needs::HOST_TIER) };
        let mut needed = policies.wire(supplied).map_err(|error| refused(&error))?;
        if options.cache == replay::policies::agentrt::TOLD_ENDS {
            needed = needed.and(Needs::SESSION_ENDS);
        }
        let runtime = Runtime::new(core_options).map_err(|error| refused(&error))?;
        let id = runtime.workload(&trace.workload).map_err(|error| refused(&error))?;
        let hears = matches!(order, Order::Core) || CORE.without(needed) != CORE;
        let mut position = vec![0; trace.calls.len()];
        for session in &trace.sessions {
            for (at, &call) in session.calls.iter().enumerate() {
                position[call as usize] = at as u32;
            }
        }
        let longest = trace.calls.iter().map(|call| call.prompt_tokens).max().unwrap_or(0);
        let pool_tokens = options.capacity_blocks as f64 * f64::from(trace.block_size);
        let bound = 2.0 * (PROMPT_PRICE * f64::from(longest)).max(OUTPUT_PRICE * pool_tokens);
        Ok(Self {
            workload,
            trace,
            options,
            core: Core::new(runtime, id, policies, hears),
            needed,
            scheduled,
            memory: Memory::new(trace, options.capacity_blocks, options.host, order),
            now_us: 0,
            todo: BinaryHeap::new(),
            queue: VecDeque::new(),
            running: Vec::new(),
            gaps: BTreeMap::new(),
            position,
            next_session: 0,
            promised: 0,
            prompt_blocks: 0,
            hit_blocks: 0,
            gaps_asked_us: None,
            next_hold_us: None,
            service: Service::new(workload.tenants()),
            promises_fairness,
            outcome: Outcome {
                calls: vec![CallRecord::default(); trace.calls.len()],
                service_bound: bound,
                ..Outcome::default()
            },
            finished: 0,
            reported: 0,
            waiting: Vec::new(),
            decisions: Vec::new(),
            order: Vec::new(),
            entered: Vec::new(),
        })
    }

    /// Puts the first calls of the sessions that start by themselves on the list.
    fn open(&mut self) {
        match &self.workload.arrivals {
            Arrivals::Open(starts) => {
                for (session, &start_us) in self.trace.sessions.iter().zip(starts) {
                    if let Some(&call) = session.calls.first() {
                        self.todo.push(Reverse((start_us, Todo::Arrive, call)));
                    }
                }
            }
            Arrivals::Closed { sessions, .. } => {
                for _ in 0..*sessions {
                    self.start_next_session();
                }
            }
        }
    }

    fn start_next_session(&mut self) {
        let Arrivals::Closed { order, .. } = &self.workload.arrivals else { return };
        while let Some(&session) = order.get(self.next_session) {
            self.next_session += 1;
            if let Some(&call) = self.trace.sessions[session as usize].calls.first() {
                self.todo.push(Reverse((self.now_us + self.workload.gap_us[call as usize], Todo::Arrive, call)));
                return;
            }
        }
    }

    fn close(mut self) -> Result<Outcome> {
        self.outcome.evictions = self.memory.pool.evictions();
        self.outcome.peak_blocks = self.memory.peak;
        self.outcome.index_drift += self.memory.drift + self.core.policies.refused_victims();
        self.outcome.service_gap = self.service.largest_gap();
        if let Some(policy) = self.promises_fairness.filter(|_| self.outcome.service_gap > self.outcome.service_bound) {
            let (gap, bound) = (self.outcome.service_gap, self.outcome.service_bound);
            let problem =
                format!("two waiting tenants were given {gap:.0} virtual tokens apart, the bound is {bound:.0}");
            return Err(Error::BrokenPromise { policy, problem });
        }
        Ok(self.outcome)
    }

    /// One step, or a jump to the next event; false when all is done.
    fn advance(&mut self) -> bool {
        while let Some(&Reverse((at, what, which))) = self.todo.peek() {
            if at > self.now_us {
                break;
            }
            self.todo.pop();
            match what {
                Todo::Arrive => self.arrive(which, at),
                Todo::BringBack => self.bring_back(which),
                Todo::Wake => {}
            }
        }
        let mut budget = self.options.token_budget;
        let mut batch = Batch::default();
        self.continue_running(&mut budget, &mut batch);
        self.admit(&mut budget, &mut batch);
        self.service.compare();
        let rest = self.finished < self.trace.calls.len() as u64;
        let speculated = if rest && self.queue.is_empty() && budget > 0 && self.needed.contains(Needs::IDLE_CAPACITY) {
            self.speculate(budget, &batch)
        } else {
            None
        };
        if batch.tokens == 0.0 && speculated.is_none() {
            let held = self.next_hold_us.take().filter(|&until_us| until_us > self.now_us);
            let next = self.todo.peek().map(|Reverse((at, ..))| *at);
            let Some(next) = next.into_iter().chain(held).min() else {
                assert!(
                    self.queue.is_empty() && self.running.is_empty(),
                    "a call can neither run nor wait for anything"
                );
                return false;
            };
            self.now_us = self.now_us.max(next);
            return true;
        }
        let own_s = self.options.model.step_s(&batch);
        let took = (speculated.map_or(own_s, |with| self.options.model.step_s(&with)) * 1e6).round() as u64;
        self.outcome.speculative_us += took.saturating_sub((own_s * 1e6).round() as u64);
        self.now_us += took;
        self.outcome.busy_us += took;
        self.outcome.steps += 1;
        self.step_done(took);
        true
    }

    fn doing(&self, call: u32) -> Doing {
        let of = &self.trace.calls[call as usize];
        Doing { call, session: of.session, agent: of.agent, now_us: self.now_us }
    }

    fn tenant(&self, call: u32) -> u16 {
        self.workload.tenant[self.trace.calls[call as usize].session as usize]
    }

    fn hear(&self, happening: Happening) {
        self.core.policies.hear(&self.core.runtime, self.now_us, &[happening]);
    }

    fn load(&self, budget: u32) -> Load {
        Load {
            now_us: self.now_us,
            running_calls: self.running.len() as u32,
            pool_blocks: self.memory.pool.capacity() as u32,
            block_tokens: self.trace.block_size,
            pinned_blocks: self.memory.pool.pinned() as u32,
            free_blocks: self.memory.pool.free() as u32,
            prompt_blocks: self.prompt_blocks,
            hit_blocks: self.hit_blocks,
            budget_tokens: budget,
            host_bytes_per_s: self.options.host.map_or(0, |host| host.bytes_per_s as u64),
        }
    }

    fn describe(&self, queued: &Queued) -> Waiting {
        let call = &self.trace.calls[queued.call as usize];
        let prompt = &queued.chain[..queued.prompt_blocks];
        let resident = self.memory.resident(prompt);
        let on_host = if self.needed.contains(Needs::HOST_TIER) { self.memory.on_host(prompt, resident) } else { 0 };
        let tokens = |blocks: usize| (blocks as u32 * self.trace.block_size).min(call.prompt_tokens);
        Waiting {
            call: u64::from(queued.call),
            workload: self.core.workload,
            session: u64::from(call.session),
            agent: call.agent,
            tenant: self.workload.tenant[call.session as usize],
            arrived_us: self.outcome.calls[queued.call as usize].arrived_us,
            prompt_tokens: call.prompt_tokens,
            resident_tokens: tokens(resident),
            host_tokens: tokens(resident + on_host) - tokens(resident),
            group: resident.checked_sub(1).map_or(0, |last| memory::key(prompt[last])),
        }
    }

    fn arrive(&mut self, index: u32, arrived_us: u64) {
        let call = &self.trace.calls[index as usize];
        self.outcome.calls[index as usize].arrived_us = arrived_us;
        let gap = self.gaps.remove(&call.session);
        let mut chain = Vec::with_capacity(self.trace.blocks_in(call.prompt) + self.trace.blocks_in(call.output));
        self.trace.expand(call.prompt, &mut chain);
        let prompt_blocks = chain.len();
        self.trace.expand(call.output, &mut chain);
        if let Some(open) = gap {
            if self.core.hears {
                self.core.observe(CoreEvent::ToolEnd, call.session, open.gap.tool, self.now_us, &[]);
            }
            // What the call will use stays kept until it is admitted.
            let shared = chain.iter().zip(&open.chain).take_while(|(now, before)| now == before).count();
            let kept = if open.decision.retention == Retention::Keep { shared } else { 0 };
            self.memory.classify(call.session, &open.chain[kept..], memory::UNDECIDED);
        }
        let queued = Queued {
            call: index,
            chain,
            prompt_blocks,
            generated: 0,
            reached: 0,
            since_us: arrived_us,
            held_since: None,
            again: false,
        };
        self.service.waits(self.tenant(index));
        if self.scheduled {
            self.hear(Happening::Arrived(self.describe(&queued)));
        }
        self.queue.push_back(queued);
    }

    // ---- running calls

    fn continue_running(&mut self, budget: &mut u32, batch: &mut Batch) {
        let mut at = 0;
        while at < self.running.len() {
            self.running[at].chunk = 0;
            if *budget > 0 && self.running[at].ready_us <= self.now_us {
                if !self.grow(at, *budget) {
                    // It lost its own memory; those behind it had lost theirs before.
                    break;
                }
                self.count(at, budget, batch);
            }
            at += 1;
        }
    }

    fn count(&mut self, at: usize, budget: &mut u32, batch: &mut Batch) {
        let run = &self.running[at];
        let (tokens, context) = (f64::from(run.chunk), f64::from(run.computed));
        if run.queued.generated > 0 && run.chunk == 1 {
            batch.decode(context);
        } else if run.chunk > 0 {
            batch.prefill(tokens, context);
        }
        *budget -= run.chunk;
    }

    /// Full blocks of a call's chain when so many tokens are computed.
    fn blocks_for(&self, run: &Running, tokens: u32) -> usize {
        if run.bypass {
            return 0;
        }
        let full = (tokens / self.trace.block_size) as usize;
        if tokens >= self.trace.calls[run.queued.call as usize].prompt_tokens {
            full.clamp(run.queued.prompt_blocks, run.queued.chain.len())
        } else {
            full.min(run.queued.prompt_blocks)
        }
    }

    /// Chooses what the step computes of a running call and finds blocks for it; false if the call was preempted.
    fn grow(&mut self, at: usize, budget: u32) -> bool {
        let run = &self.running[at];
        let chunk = (run.known - run.computed).min(budget);
        let until = self.blocks_for(run, run.computed + chunk);
        let (call, from) = (run.queued.call, run.used);
        let doing = self.doing(call);
        if until > from {
            self.room_for(at, until, budget);
        }
        let mut entered = std::mem::take(&mut self.entered);
        entered.clear();
        let mut survives = true;
        'blocks: for position in from..until {
            let block = self.running[at].queued.chain[position];
            while !self.memory.insert(&mut self.core, doing, block) {
                if !self.preempt_last(at) {
                    survives = false;
                    break 'blocks;
                }
            }
            let run = &mut self.running[at];
            run.used += 1;
            entered.push(block);
            self.promised -= usize::from(position < run.queued.prompt_blocks);
        }
        let of_prompt = self.trace.blocks_in(self.trace.calls[call as usize].prompt).saturating_sub(from);
        self.core.stored(doing, &entered[..of_prompt.min(entered.len())]);
        if survives {
            self.tell_inserted(at, &entered);
            self.running[at].chunk = chunk;
        }
        self.entered = entered;
        survives
    }

    /// Makes room at once for what a running call needs up to a position of its chain, as far as there is any.
    fn room_for(&mut self, at: usize, until: usize, budget: u32) {
        let run = &self.running[at];
        let missing = until - self.memory.resident(&run.queued.chain[..until]).max(run.used).min(until);
        if missing > self.memory.pool.free() {
            self.ask_gaps(budget);
            self.memory.make_room(&mut self.core, missing, self.now_us);
        }
    }

    /// Tells a cache policy of the replay what has entered the pool for a running call.
    fn tell_inserted(&mut self, at: usize, blocks: &[u32]) {
        let queued = &self.running[at].queued;
        if blocks.is_empty() {
            return;
        }
        let view = view(self.trace, queued, self.outcome.calls[queued.call as usize].hit_blocks, self.now_us);
        if let Some((policy, pool)) = self.memory.replay_policy() {
            policy.inserted(&view, blocks, pool);
        }
    }

    /// Takes the memory of the call admitted last; false if that was the call at `at`.
    fn preempt_last(&mut self, at: usize) -> bool {
        let last = self.running.len() - 1;
        self.preempt(last);
        last != at
    }

    fn preempt(&mut self, at: usize) {
        let run = self.running.remove(at);
        self.release(&run, false);
        let tenant = self.tenant(run.queued.call);
        let mut queued = run.queued;
        queued.reached = queued.reached.max(run.computed);
        queued.again = true;
        queued.since_us = self.now_us;
        self.outcome.preemptions += 1;
        self.outcome.calls[queued.call as usize].preemptions += 1;
        self.service.waits(tenant);
        if self.scheduled {
            self.hear(Happening::Preempted { call: u64::from(queued.call) });
        }
        self.queue.push_front(queued);
    }

    /// A call gives its blocks back, because it has finished or was preempted.
    fn release(&mut self, run: &Running, finished: bool) {
        self.promised -= run.queued.prompt_blocks.saturating_sub(run.used) * usize::from(!run.bypass);
        let chain = &run.queued.chain;
        let mut released = Vec::with_capacity(run.used);
        for &block in &chain[..run.used] {
            if self.memory.unpin(block) {
                released.push(block);
            }
        }
        self.memory.offer(&released);
        let hit = self.outcome.calls[run.queued.call as usize].hit_blocks;
        let mut view = view(self.trace, &run.queued, hit, self.now_us);
        view.tool = self.trace.calls[run.queued.call as usize].tool.filter(|_| finished);
        let output = &chain[run.queued.prompt_blocks.min(run.used)..run.used];
        if let Some((policy, pool)) = self.memory.replay_policy() {
            if run.bypass {
                policy.call_bypassed(&view);
            } else {
                policy.call_finish(&view, output, &released, pool);
            }
        }
        if finished && self.core.hears {
            self.core.call_ended(&view, output);
        }
    }

    // ---- waiting calls

    fn admit(&mut self, budget: &mut u32, batch: &mut Batch) {
        if self.queue.is_empty() || *budget == 0 || self.running.len() >= self.options.max_running {
            return;
        }
        self.next_hold_us = None;
        self.rank(*budget);
        let mut admitted: Vec<u32> = Vec::new();
        let order = std::mem::take(&mut self.order);
        for &at in &order {
            if *budget == 0 || self.running.len() >= self.options.max_running {
                break;
            }
            if self.scheduled && self.decisions[at as usize].is_held(self.now_us) {
                let until_us = self.decisions[at as usize].hold_until_us;
                self.next_hold_us = Some(self.next_hold_us.map_or(until_us, |other| other.min(until_us)));
                self.hold(at as usize, true);
                continue;
            }
            self.hold(at as usize, false);
            if !self.try_admit(at as usize, *budget) {
                break;
            }
            admitted.push(at);
            let last = self.running.len() - 1;
            if self.running[last].ready_us <= self.now_us {
                if !self.grow(last, *budget) {
                    break;
                }
                self.count(last, budget, batch);
            }
        }
        self.order = order;
        // Preemptions have put calls in front of those that were ranked.
        let moved = self.queue.len() - self.order.len();
        admitted.sort_unstable();
        for &at in admitted.iter().rev() {
            self.queue.remove(at as usize + moved);
        }
    }

    fn hold(&mut self, at: usize, held: bool) {
        let queued = &mut self.queue[at];
        if held {
            queued.held_since.get_or_insert(self.now_us);
        } else if let Some(since_us) = queued.held_since.take() {
            let longest = &mut self.outcome.calls[queued.call as usize].held_us;
            *longest = (*longest).max(self.now_us - since_us);
        }
    }

    /// Fills `order` with places in the queue, first to admit first, and `decisions` by place.
    fn rank(&mut self, budget: u32) {
        self.order.clear();
        self.order.extend(0..self.queue.len() as u32);
        if !self.scheduled {
            return;
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.clear();
        waiting.extend(self.queue.iter().map(|queued| self.describe(queued)));
        self.decisions.clear();
        self.decisions.resize(waiting.len(), Decision::default());
        let load = self.load(budget);
        self.core.policies.schedule(&self.core.runtime, &load, &waiting, &mut self.decisions);
        self.waiting = waiting;
        let decisions = &self.decisions;
        self.order.sort_by_key(|&at| decisions[at as usize].rank);
    }

    /// Admits the call at a place in the queue if it fits. Its entry stays there, empty.
    fn try_admit(&mut self, at: usize, budget: u32) -> bool {
        let index = self.queue[at].call;
        let call = &self.trace.calls[index as usize];
        let capacity = self.memory.pool.capacity();
        let queued = &self.queue[at];
        let prompt_blocks = queued.prompt_blocks;
        let bypass = queued.chain.len() > capacity;
        let known = call.prompt_tokens + queued.generated;
        // What it had generated before a preemption may be cached as well.
        let reusable = (known / self.trace.block_size) as usize;
        let reusable =
            if queued.generated > 0 { reusable.clamp(prompt_blocks, queued.chain.len()) } else { prompt_blocks };
        let chain = &queued.chain[..if bypass { 0 } else { reusable }];
        let hit = self.memory.resident(chain);
        let on_host = self.memory.on_host(chain, hit);
        let unpinned = chain[..hit].iter().filter(|&&block| !self.memory.pool.is_pinned(block)).count();
        if !bypass && unpinned + (chain.len() - hit) + self.promised > self.memory.unused() {
            return false;
        }
        let description = self.scheduled.then(|| self.describe(&self.queue[at]));
        let place = &mut self.queue[at];
        let queued = Queued { chain: std::mem::take(&mut place.chain), held_since: None, ..*place };
        let doing = self.doing(index);
        let hit_of_prompt = hit.min(prompt_blocks);
        let record = &mut self.outcome.calls[index as usize];
        record.waited_us += self.now_us - queued.since_us;
        if !queued.again {
            record.admitted_us = self.now_us;
            record.hit_blocks = hit_of_prompt as u32;
            record.loaded_blocks = on_host.min(prompt_blocks - hit_of_prompt) as u32;
            record.prompt_blocks = if bypass { 0 } else { prompt_blocks as u32 };
            self.prompt_blocks += u64::from(record.prompt_blocks);
            self.hit_blocks += u64::from(record.hit_blocks);
            self.record(index, if bypass { EventKind::Bypass } else { EventKind::Start });
        }
        for &block in &queued.chain[..hit] {
            self.memory.pin(block, doing.session);
        }
        let mut view = view(self.trace, &queued, hit_of_prompt as u32, self.now_us);
        if bypass {
            view.prompt = &[];
        }
        if self.core.hears && !queued.again {
            let counted = self.core.call_started(&view);
            self.outcome.index_drift += u64::from(counted != hit_of_prompt);
        }
        if let Some((policy, pool)) = self.memory.replay_policy() {
            if !bypass {
                policy.call_start(&view, pool);
            }
        }
        let mut run = Running { used: hit, computed: 0, known, ready_us: 0, bypass, chunk: 0, queued };
        if !bypass {
            self.promised += prompt_blocks - hit_of_prompt;
        }
        let loaded = self.load_from_host(&mut run, hit, on_host);
        let cached = (loaded as u32).saturating_mul(self.trace.block_size);
        // The last token is computed in any case: its logits are the answer's beginning.
        run.computed = cached.min(known - 1);
        let (tenant, again) = (self.tenant(index), run.queued.again);
        self.service.no_longer_waits(tenant);
        let missing = known - run.computed;
        if !again {
            self.service.give(tenant, PROMPT_PRICE * f64::from(missing));
        }
        if let Some(call) = description {
            self.hear(Happening::Admitted { call, again });
        }
        debug_assert!(budget > 0);
        self.running.push(run);
        true
    }

    /// Copies what follows the hits from the host tier, and waits for prefetched blocks that are under way. Returns
    /// the leading blocks that need not be computed.
    fn load_from_host(&mut self, run: &mut Running, hit: usize, on_host: usize) -> usize {
        let Some(host) = &mut self.memory.host else { return hit };
        let mut under_way = false;
        for &block in &run.queued.chain[..hit] {
            under_way |= host.used(block).is_some_and(|ready_us| ready_us > self.now_us);
        }
        let doing = self.doing(run.queued.call);
        let mut loaded = 0;
        for &block in &run.queued.chain[hit..hit + on_host] {
            if !self.memory.insert(&mut self.core, doing, block) {
                break;
            }
            if let Some(host) = self.memory.host.as_mut().filter(|host| host.holds(block)) {
                host.loaded(block);
            }
            loaded += 1;
            if run.used < run.queued.prompt_blocks {
                self.promised -= 1;
            }
            run.used += 1;
        }
        let prompt_until = (hit + loaded).min(run.queued.prompt_blocks);
        if prompt_until > hit {
            self.core.stored(doing, &run.queued.chain[hit..prompt_until]);
        }
        if loaded > 0 || under_way {
            run.ready_us = self.memory.copied_us(loaded, self.now_us);
            self.todo.push(Reverse((run.ready_us, Todo::Wake, 0)));
        }
        hit + loaded
    }

    fn record(&mut self, call: u32, kind: EventKind) {
        if self.options.record_events {
            self.outcome.events.push(Event { time_us: self.now_us, call, kind });
        }
    }

    // ---- the end of a step

    fn step_done(&mut self, took_us: u64) {
        let tells = self.needed.contains(Needs::SERVICE);
        let mut done = Vec::new();
        for at in 0..self.running.len() {
            let run = &mut self.running[at];
            let chunk = std::mem::take(&mut run.chunk);
            let held_tokens = run.computed;
            let call = run.queued.call;
            let mut served = (0, 0, 0);
            if chunk > 0 {
                let of = &self.trace.calls[call as usize];
                let decode = run.queued.generated > 0 && chunk == 1 && run.computed + 1 == run.known;
                let before = run.computed;
                run.computed += chunk;
                if !decode {
                    let again = run.queued.reached.clamp(before, run.computed) - before;
                    served = (chunk - again, again, 0);
                }
                if run.computed == run.known {
                    if run.queued.generated < of.output_tokens {
                        run.queued.generated += 1;
                        run.known += 1;
                        served.2 = 1;
                    }
                    if run.queued.generated <= 1 {
                        self.outcome.calls[call as usize].first_token_us = self.now_us;
                    }
                    if run.queued.generated >= of.output_tokens {
                        done.push(at);
                    }
                }
            }
            self.outcome.prefill_tokens += u64::from(served.0);
            self.outcome.repeated_tokens += u64::from(served.1);
            self.outcome.decoded_tokens += u64::from(served.2);
            self.service.give(self.tenant(call), OUTPUT_PRICE * f64::from(served.2));
            if tells {
                self.hear(Happening::Served {
                    call: u64::from(call),
                    prefill_tokens: served.0,
                    repeated_tokens: served.1,
                    decoded_tokens: served.2,
                    kv_token_us: u64::from(held_tokens) * took_us,
                });
            }
        }
        for (finished_before, at) in done.into_iter().enumerate() {
            self.finish(at - finished_before);
        }
    }

    fn finish(&mut self, at: usize) {
        let run = &self.running[at];
        let until = if run.bypass { 0 } else { run.queued.chain.len() };
        let doing = self.doing(run.queued.call);
        let from = run.used;
        if until > from {
            self.room_for(at, until, self.options.token_budget);
        }
        let mut entered = std::mem::take(&mut self.entered);
        entered.clear();
        for position in from..until {
            let block = self.running[at].queued.chain[position];
            // The answer's last block is cached if there is room for it; nobody loses memory over it.
            if !self.memory.insert(&mut self.core, doing, block) {
                break;
            }
            entered.push(block);
            self.running[at].used += 1;
        }
        self.tell_inserted(at, &entered);
        self.entered = entered;
        let run = self.running.remove(at);
        self.release(&run, true);
        if self.scheduled {
            self.hear(Happening::Ended { call: u64::from(run.queued.call) });
        }
        if !run.bypass {
            self.record(run.queued.call, EventKind::Finish);
        }
        self.finished(run.queued);
    }

    fn finished(&mut self, queued: Queued) {
        let call = &self.trace.calls[queued.call as usize];
        let record = &mut self.outcome.calls[queued.call as usize];
        record.finished_us = self.now_us;
        self.outcome.end_us = self.now_us;
        self.finished += 1;
        self.memory.last_call[call.session as usize] = queued.call;
        let calls = &self.trace.sessions[call.session as usize].calls;
        let Some(&next) = calls.get(self.position[queued.call as usize] as usize + 1) else {
            // Engines do not know: only who needs it hears of it.
            if self.needed.contains(Needs::SESSION_ENDS) {
                self.core.observe(CoreEvent::SessionEnd, call.session, 0, self.now_us, &[]);
            }
            if let Some((policy, _)) = self.memory.replay_policy() {
                policy.session_end(call.session, self.now_us);
            }
            self.start_next_session();
            return;
        };
        self.todo.push(Reverse((self.now_us + self.workload.gap_us[next as usize], Todo::Arrive, next)));
        if let (Some(tool), true) = (call.tool, self.needed.contains(Needs::TOOLS)) {
            let gap = Gap {
                workload: self.core.workload,
                session: u64::from(call.session),
                agent: call.agent,
                tool: tool + 1,
                started_us: self.now_us,
                resident_tokens: 0,
                host_tokens: 0,
            };
            let open = OpenGap { gap, chain: queued.chain, decision: GapDecision::default() };
            self.gaps.insert(call.session, open);
            self.gaps_asked_us = None;
            self.ask_gaps(self.options.token_budget);
        }
    }

    // ---- sessions whose tool runs

    /// Asks what becomes of the blocks of sessions whose tool runs, at most once at a time.
    fn ask_gaps(&mut self, budget: u32) {
        if self.gaps.is_empty() || self.gaps_asked_us == Some(self.now_us) {
            return;
        }
        self.gaps_asked_us = Some(self.now_us);
        let tokens = |blocks: usize| blocks as u32 * self.trace.block_size;
        for open in self.gaps.values_mut() {
            let resident = self.memory.resident(&open.chain);
            open.gap.resident_tokens = tokens(resident);
            open.gap.host_tokens = tokens(self.memory.on_host(&open.chain, resident));
        }
        let gaps: Vec<Gap> = self.gaps.values().map(|open| open.gap).collect();
        let mut decisions = vec![GapDecision::default(); gaps.len()];
        let load = self.load(budget);
        self.core.policies.gaps(&self.core.runtime, &load, &gaps, &mut decisions);
        let now_us = self.now_us;
        for ((&session, open), mut decision) in self.gaps.iter_mut().zip(decisions) {
            // Whose time to come back has passed is not sent away.
            if decision.retention == Retention::Demote && (1..=now_us).contains(&decision.bring_back_us) {
                decision = GapDecision { retention: Retention::Keep, bring_back_us: 0 };
            }
            if decision == open.decision {
                continue;
            }
            let class = match decision.retention {
                Retention::Keep => memory::KEPT,
                Retention::Release => memory::RELEASED,
                Retention::Undecided | Retention::Demote => memory::UNDECIDED,
            };
            self.memory.classify(session, &open.chain, class);
            if decision.retention == Retention::Demote {
                if open.decision.retention != Retention::Demote {
                    self.memory.demote(&mut self.core, session, &open.chain, now_us);
                }
                if decision.bring_back_us > 0 {
                    self.todo.push(Reverse((decision.bring_back_us, Todo::BringBack, session)));
                }
            }
            open.decision = decision;
        }
    }

    /// A demoted session's time to come back has passed.
    fn bring_back(&mut self, session: u32) {
        let due =
            |open: &OpenGap| open.decision.retention == Retention::Demote && open.decision.bring_back_us <= self.now_us;
        if !self.gaps.get(&session).is_some_and(due) {
            return;
        }
        let Some(mut open) = self.gaps.remove(&session) else { return };
        let resident = self.memory.resident(&open.chain);
        let allowed = self.memory.host.as_mut().map_or(0, |host| host.budget_blocks(self.now_us));
        let on_host = self.memory.on_host(&open.chain, resident).min(allowed);
        let doing = Doing { call: 0, session, agent: open.gap.agent, now_us: self.now_us };
        let brought = self.memory.bring(&mut self.core, doing, &open.chain, resident, on_host);
        if let Some(host) = &mut self.memory.host {
            for &block in &open.chain[resident..resident + brought] {
                if host.holds(block) {
                    host.prefetched(block, self.now_us);
                }
            }
        }
        self.memory.copied_us(brought, self.now_us);
        self.memory.classify(session, &open.chain, memory::KEPT);
        open.decision = GapDecision { retention: Retention::Keep, bring_back_us: 0 };
        self.gaps.insert(session, open);
        self.gaps_asked_us = None;
        self.ask_gaps(self.options.token_budget);
    }

    // ---- idle capacity

    /// Adds prefills that the policies name to a step; `None` if there is nothing to compute for them.
    fn speculate(&mut self, mut budget: u32, batch: &Batch) -> Option<Batch> {
        let mut prefills = [Prefill::default(); PREFILLS];
        let load = self.load(budget);
        let named = self.core.policies.idle(&self.core.runtime, &load, &mut prefills);
        let mut batch = *batch;
        let mut any = false;
        for prefill in &prefills[..named.min(PREFILLS)] {
            let Some(like) = self.trace.calls.get(prefill.like_call as usize) else { continue };
            let mut chain = Vec::new();
            self.trace.expand(like.prompt, &mut chain);
            chain.truncate(prefill.blocks as usize);
            let resident = self.memory.resident(&chain);
            let room = (budget / self.trace.block_size) as usize;
            let doing = Doing { call: 0, session: prefill.session as u32, agent: prefill.agent, now_us: self.now_us };
            let brought = self.memory.bring(&mut self.core, doing, &chain, resident, room);
            if brought > 0 {
                let tokens = brought as u32 * self.trace.block_size;
                batch.prefill(f64::from(tokens), f64::from(resident as u32 * self.trace.block_size));
                budget -= tokens;
                self.outcome.speculative_tokens += u64::from(tokens);
                any = true;
            }
        }
        any.then_some(batch)
    }
}
