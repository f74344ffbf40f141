//! Runs one policy over one schedule.

use rustc_hash::{FxHashMap, FxHashSet};

use crate::host::{HostCounts, HostOptions, HostTier};
use crate::latency::LatencyModel;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::schedule::{Event, EventKind, Schedule};
use crate::trace::Trace;

/// What a policy achieved.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Calls that used the cache.
    pub calls: u64,
    /// Calls too large for the pool.
    pub bypassed_calls: u64,
    /// Full prompt blocks of the calls that used the cache.
    pub prompt_blocks: u64,
    /// Of these, found in the pool.
    pub hit_blocks: u64,
    /// Blocks evicted.
    pub evictions: u64,
    /// Evictions that the replay had to choose because the policy named too few victims.
    pub forced_evictions: u64,
    /// Hit blocks of each call, by call index; `u32::MAX` for a call that bypassed.
    pub call_hits: Vec<u32>,
    /// What the host tier did; `None` without one.
    pub host: Option<HostCounts>,
    /// Blocks that each call loaded from the host, prefetches still under way included; empty without a host tier.
    pub call_loads: Vec<u32>,
    /// Of each call's hits, those whose prefetch was still under way; empty without a host tier.
    pub call_waits: Vec<u32>,
    /// Of each call's hits, those that were prefetched while it waited for room; empty without a host tier.
    pub call_early: Vec<u32>,
}

impl Outcome {
    /// Hit blocks over prompt blocks.
    pub fn hit_rate(&self) -> f64 {
        self.hit_blocks as f64 / self.prompt_blocks.max(1) as f64
    }

    /// Where a call found the tokens of its prompt.
    pub fn cached_tokens(&self, call: u32, block_size: u32) -> Cached {
        let at = |of: &[u32]| of.get(call as usize).copied().unwrap_or(0);
        let tokens = |blocks: u32| f64::from(blocks) * f64::from(block_size);
        match self.call_hits[call as usize] {
            u32::MAX => Cached::default(),
            hits => Cached {
                device: tokens(hits - at(&self.call_waits)),
                loaded: tokens(at(&self.call_loads)),
                early: tokens(at(&self.call_early)),
            },
        }
    }
}

/// Where a call found tokens of its prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cached {
    /// On the device.
    pub device: f64,
    /// In the host tier, from which it loaded them.
    pub loaded: f64,
    /// Of those on the device, brought back from the host tier while it waited for room.
    pub early: f64,
}

/// Runs `policy` over `schedule` from an empty pool, without a host tier.
///
/// `progress` is called with the number of events done, every few hundred events.
pub fn run(trace: &Trace, schedule: &Schedule, policy: &mut dyn CachePolicy, progress: &mut dyn FnMut(u64)) -> Outcome {
    run_with_host(trace, schedule, policy, None, progress)
}

/// Runs `policy` over `schedule` from an empty pool and an empty host tier.
pub fn run_with_host(
    trace: &Trace,
    schedule: &Schedule,
    policy: &mut dyn CachePolicy,
    host: Option<HostOptions>,
    progress: &mut dyn FnMut(u64),
) -> Outcome {
    let mut run = Run {
        trace,
        policy,
        pool: Pool::new(trace, schedule.options.capacity_blocks),
        host: host.map(|options| HostTier::new(options, trace.n_blocks as usize)),
        outcome: Outcome { call_hits: vec![u32::MAX; trace.calls.len()], ..Outcome::default() },
        recorded: schedule.follows(trace),
        held: FxHashMap::default(),
        queued_us: FxHashMap::default(),
    };
    if let Some(options) = host {
        run.policy.host_tier(schedule.options.capacity_blocks, options.blocks);
        run.pool.keep_evicted();
        run.outcome.host = Some(HostCounts::default());
        run.outcome.call_loads = vec![0; trace.calls.len()];
        run.outcome.call_waits = vec![0; trace.calls.len()];
        run.outcome.call_early = vec![0; trace.calls.len()];
    }
    let mut buffers = Buffers::default();
    for (done, event) in schedule.events.iter().enumerate() {
        if done % 256 == 0 {
            progress(done as u64);
        }
        run.step(event, &mut buffers);
    }
    progress(schedule.events.len() as u64);
    run.outcome.evictions = run.pool.evictions();
    run.outcome
}

#[derive(Default)]
struct Buffers {
    prompt: Vec<u32>,
    output: Vec<u32>,
    released: Vec<u32>,
}

struct Run<'a> {
    trace: &'a Trace,
    policy: &'a mut dyn CachePolicy,
    pool: Pool,
    host: Option<HostTier>,
    outcome: Outcome,
    /// Whether the calls' times were recorded by an engine: then what an engine cannot hit does not count.
    recorded: bool,
    /// Blocks without content that calls use, by call.
    held: FxHashMap<u32, usize>,
    /// When the calls that wait for room arrived; kept only where there is a host tier.
    queued_us: FxHashMap<u32, u64>,
}

impl Run<'_> {
    fn step(&mut self, event: &Event, Buffers { prompt, output, released }: &mut Buffers) {
        let call = &self.trace.calls[event.call as usize];
        prompt.clear();
        self.trace.expand(call.prompt, prompt);
        let mut view = CallView {
            call: event.call,
            session: call.session,
            agent: call.agent,
            step: call.step,
            time_us: event.time_us,
            prompt,
            hit: 0,
            prompt_tokens: call.prompt_tokens,
            tool: None,
        };
        match event.kind {
            EventKind::Queued => {
                if self.host.is_some() {
                    self.queued_us.insert(event.call, event.time_us);
                }
                self.policy.call_queued(&view, &self.pool);
                return self.prefetch(event.time_us);
            }
            EventKind::Grow => {
                make_room(1, event.time_us, &mut self.pool, self.policy, &mut self.outcome);
                self.pool.reserve(1);
                *self.held.entry(event.call).or_default() += 1;
                return self.write_back(event.time_us);
            }
            EventKind::Bypass => {
                self.outcome.bypassed_calls += 1;
                self.policy.call_bypassed(&view);
            }
            EventKind::Start => {
                view.hit = prompt.iter().take_while(|&&b| self.pool.is_resident(b)).count();
                self.outcome.calls += 1;
                self.outcome.prompt_blocks += prompt.len() as u64;
                self.outcome.hit_blocks += view.hit as u64;
                // An engine computes at least the last token of a prompt.
                let all = view.hit as u64 * u64::from(self.trace.block_size) >= u64::from(call.prompt_tokens);
                self.outcome.hit_blocks -= u64::from(self.recorded && all && view.hit > 0);
                self.outcome.call_hits[event.call as usize] = view.hit as u32;
                prompt[..view.hit].iter().for_each(|&b| self.pool.pin(b));
                self.load(event, &prompt[..view.hit], &prompt[view.hit..]);
                self.policy.call_start(&view, &self.pool);
                self.insert_pinned(&prompt[view.hit..], event.time_us);
                self.policy.inserted(&view, &prompt[view.hit..], &self.pool);
            }
            EventKind::Finish => {
                view.hit = self.outcome.call_hits[event.call as usize] as usize;
                view.tool = call.tool;
                output.clear();
                self.trace.expand(call.output, output);
                self.pool.release(self.held.remove(&event.call).unwrap_or(0));
                // An answer that found no room to grow is kept as far as it got.
                let room = self.pool.capacity() - self.pool.pinned();
                let in_use = output.iter().take_while(|&&b| self.pool.is_pinned(b)).count();
                let kept = &output[..output.len().min(in_use + room)];
                let known = kept.iter().take_while(|&&b| self.pool.is_resident(b)).count();
                kept[..known].iter().for_each(|&b| self.pool.pin(b));
                self.insert_pinned(&kept[known..], event.time_us);
                self.policy.inserted(&view, &kept[known..], &self.pool);
                released.clear();
                released.extend(prompt.iter().chain(kept).copied().filter(|&b| self.pool.unpin(b)));
                self.policy.call_finish(&view, output, released, &self.pool);
            }
        }
        let last = || self.trace.sessions[call.session as usize].calls.last() == Some(&event.call);
        if event.kind != EventKind::Start && last() {
            self.policy.session_end(call.session, event.time_us);
        }
        self.prefetch(event.time_us);
    }

    fn insert_pinned(&mut self, blocks: &[u32], now_us: u64) {
        make_room(blocks.len(), now_us, &mut self.pool, self.policy, &mut self.outcome);
        for &b in blocks {
            self.pool.insert(b);
            self.pool.pin(b);
        }
        self.write_back(now_us);
    }

    /// What left the pool enters the host tier.
    fn write_back(&mut self, now_us: u64) {
        if let (Some(host), Some(counts)) = (&mut self.host, &mut self.outcome.host) {
            let left = self.pool.take_evicted();
            let entering: Vec<u32> = left.iter().copied().filter(|&b| !host.holds(b)).collect();
            let mut refused = FxHashSet::default();
            if entering.len() > host.free() {
                refused.extend(self.policy.host_room(&entering, now_us, &self.pool, host));
            }
            for &b in &left {
                let wasted = if refused.contains(&b) { host.refused(b) } else { host.evicted(b) };
                counts.prefetch_wasted_blocks += u64::from(wasted);
            }
        }
    }

    /// A call loads what follows its hits from the host; prefetched hits whose copy is under way count as loaded too.
    fn load(&mut self, event: &Event, hits: &[u32], missing: &[u32]) {
        let (Some(host), Some(counts)) = (&mut self.host, &mut self.outcome.host) else { return };
        let arrived_us = self.queued_us.remove(&event.call).unwrap_or(event.time_us);
        let (mut waiting, mut early) = (0, 0);
        for ready_us in hits.iter().filter_map(|&b| host.used(b)) {
            counts.prefetch_used_blocks += 1;
            waiting += u32::from(ready_us > event.time_us);
            early += u32::from((arrived_us + 1..=event.time_us).contains(&ready_us));
        }
        let loaded = missing.iter().take_while(|&&b| host.holds(b)).count();
        missing[..loaded].iter().for_each(|&b| host.loaded(b));
        counts.loaded_blocks += loaded as u64;
        self.outcome.call_loads[event.call as usize] = waiting + loaded as u32;
        self.outcome.call_waits[event.call as usize] = waiting;
        self.outcome.call_early[event.call as usize] = early;
    }

    fn prefetch(&mut self, now_us: u64) {
        let Some(host) = &mut self.host else { return };
        let mut budget = host.budget_blocks(now_us);
        if budget == 0 {
            return;
        }
        let chains = self.policy.prefetch(now_us, budget, &self.pool, host);
        for (number, chain) in chains.iter().enumerate() {
            let Some(host) = &self.host else { return };
            let resident = chain.iter().take_while(|&&b| self.pool.is_resident(b)).count();
            let wanted = chain[resident..].iter().take_while(|&&b| host.holds(b)).count().min(budget);
            let evictable = self.pool.capacity() - self.pool.pinned();
            let wanted = &chain[resident..resident + wanted.min(evictable.saturating_sub(resident))];
            if wanted.is_empty() {
                continue;
            }
            // First, because what goes to make room may push these copies out of the host tier: they have been read by then.
            if let (Some(host), Some(counts)) = (&mut self.host, &mut self.outcome.host) {
                for &b in wanted {
                    host.prefetched(b, now_us);
                }
                counts.prefetched_blocks += wanted.len() as u64;
            }
            chain[..resident].iter().for_each(|&b| self.pool.pin(b));
            self.insert_pinned(wanted, now_us);
            for &b in &chain[..resident + wanted.len()] {
                self.pool.unpin(b);
            }
            budget -= wanted.len();
            self.policy.prefetched(number, wanted, now_us, &self.pool);
        }
    }
}

fn make_room(n: usize, now_us: u64, pool: &mut Pool, policy: &mut dyn CachePolicy, outcome: &mut Outcome) {
    let need = n.saturating_sub(pool.free());
    if need == 0 {
        return;
    }
    policy.evict(need, now_us, pool);
    let mut short = n.saturating_sub(pool.free());
    outcome.forced_evictions += short as u64;
    while short > 0 {
        // Deepest ids of a chain are the highest, so walking down meets leaves before their parents.
        for b in (0..pool.n_blocks() as u32).rev() {
            if short > 0 && pool.evict(b) {
                short -= 1;
            }
        }
    }
}

/// Time to first token and makespan of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timeline {
    /// Milliseconds from arrival to first token, by order of calls served.
    pub ttft_ms: Vec<f64>,
    /// Seconds from the first arrival to the last finish.
    pub makespan_s: f64,
}

/// Plays the closed loop again on one device with the hits of a run, first come first served: a call waits for the
/// device, loads host hits, prefills what was not cached, and decodes beside the others.
///
/// `cached(call)` says what it found. The wait for room in the pool, the same for all policies, is no part of it; what was
/// brought back meanwhile is there when the call arrives. `strict` grants that no more than the link needs: it is there
/// no sooner than if its loading had begun when the call arrived.
pub fn timeline(
    trace: &Trace,
    schedule: &Schedule,
    model: &LatencyModel,
    cached: &dyn Fn(u32) -> Cached,
    strict: bool,
) -> Timeline {
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;
    let mut result = Timeline::default();
    let key = |seconds: f64| (seconds * 1e6) as u64;
    let mut next_call = vec![0usize; trace.sessions.len()];
    let mut arrivals: BinaryHeap<Reverse<(u64, u32)>> = BinaryHeap::new();
    // Sessions take the slots in the schedule's order; with one call at a time all sessions share one slot.
    let open = schedule.options.order != crate::schedule::Order::Closed;
    let mut sessions = schedule.session_order.iter().copied().filter(|&s| !trace.sessions[s as usize].calls.is_empty());
    if open {
        for event in schedule.events.iter().filter(|e| matches!(e.kind, EventKind::Start | EventKind::Bypass)) {
            arrivals.push(Reverse((event.time_us, event.call)));
        }
    } else {
        for session in sessions.by_ref().take(schedule.options.sessions) {
            let call = trace.sessions[session as usize].calls[0];
            arrivals.push(Reverse((key(schedule.gap_s[call as usize]), call)));
        }
    }
    let mut device_free_us = 0u64;
    let mut end_us = 0u64;
    while let Some(Reverse((arrival_us, index))) = arrivals.pop() {
        let call = &trace.calls[index as usize];
        let Cached { device, loaded, early } = cached(index);
        let uncached = (f64::from(call.prompt_tokens) - device - loaded).max(1.0);
        let busy_s = model.load_s(loaded) + model.prefill_s(uncached, device + loaded);
        let ready_us = arrival_us + if strict { key(model.load_s(early)) } else { 0 };
        let begin_us = ready_us.max(device_free_us);
        device_free_us = begin_us + key(busy_s);
        result.ttft_ms.push((device_free_us - arrival_us) as f64 / 1e3);
        let finish_us = device_free_us + key(model.decode_s(f64::from(call.output_tokens)));
        end_us = end_us.max(finish_us);
        if open {
            continue;
        }
        let own = &mut next_call[call.session as usize];
        *own += 1;
        let next = match trace.sessions[call.session as usize].calls.get(*own) {
            Some(&next) => Some(next),
            None => sessions.next().map(|s| trace.sessions[s as usize].calls[0]),
        };
        if let Some(next) = next {
            arrivals.push(Reverse((finish_us + key(schedule.gap_s[next as usize]), next)));
        }
    }
    result.makespan_s = end_us as f64 / 1e6;
    result
}
