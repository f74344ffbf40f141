//! Runs one policy over one schedule.

use crate::latency::LatencyModel;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::schedule::{EventKind, Schedule};
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
}

impl Outcome {
    /// Hit blocks over prompt blocks.
    pub fn hit_rate(&self) -> f64 {
        self.hit_blocks as f64 / self.prompt_blocks.max(1) as f64
    }
}

/// Runs `policy` over `schedule` from an empty pool.
///
/// `progress` is called with the number of events done, every few hundred events.
pub fn run(trace: &Trace, schedule: &Schedule, policy: &mut dyn CachePolicy, progress: &mut dyn FnMut(u64)) -> Outcome {
    let mut pool = Pool::new(trace, schedule.options.capacity_blocks);
    let mut outcome = Outcome { call_hits: vec![u32::MAX; trace.calls.len()], ..Outcome::default() };
    let (mut prompt, mut output, mut released) = (Vec::new(), Vec::new(), Vec::new());
    for (done, event) in schedule.events.iter().enumerate() {
        if done % 256 == 0 {
            progress(done as u64);
        }
        let call = &trace.calls[event.call as usize];
        prompt.clear();
        trace.expand(call.prompt, &mut prompt);
        let mut view = CallView {
            call: event.call,
            session: call.session,
            agent: call.agent,
            step: call.step,
            time_us: event.time_us,
            prompt: &prompt,
            hit: 0,
            prompt_tokens: call.prompt_tokens,
            tool: None,
        };
        let last = trace.sessions[call.session as usize].calls.last() == Some(&event.call);
        match event.kind {
            EventKind::Bypass => {
                outcome.bypassed_calls += 1;
                policy.call_bypassed(&view);
            }
            EventKind::Start => {
                view.hit = prompt.iter().take_while(|&&b| pool.is_resident(b)).count();
                outcome.calls += 1;
                outcome.prompt_blocks += prompt.len() as u64;
                outcome.hit_blocks += view.hit as u64;
                outcome.call_hits[event.call as usize] = view.hit as u32;
                prompt[..view.hit].iter().for_each(|&b| pool.pin(b));
                policy.call_start(&view, &pool);
                let missing = &prompt[view.hit..];
                make_room(missing.len(), event.time_us, &mut pool, policy, &mut outcome);
                for &b in missing {
                    pool.insert(b);
                    pool.pin(b);
                }
                policy.inserted(&view, missing, &pool);
            }
            EventKind::Finish => {
                view.hit = outcome.call_hits[event.call as usize] as usize;
                view.tool = call.tool;
                output.clear();
                trace.expand(call.output, &mut output);
                let known = output.iter().take_while(|&&b| pool.is_resident(b)).count();
                output[..known].iter().for_each(|&b| pool.pin(b));
                make_room(output.len() - known, event.time_us, &mut pool, policy, &mut outcome);
                for &b in &output[known..] {
                    pool.insert(b);
                    pool.pin(b);
                }
                policy.inserted(&view, &output[known..], &pool);
                released.clear();
                released.extend(prompt.iter().chain(&output).copied().filter(|&b| pool.unpin(b)));
                policy.call_finish(&view, &output, &released, &pool);
            }
        }
        if last && event.kind != EventKind::Start {
            policy.session_end(call.session, event.time_us);
        }
    }
    progress(schedule.events.len() as u64);
    outcome.evictions = pool.evictions();
    outcome
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
/// `hit_tokens(call)` gives (tokens cached on the device, tokens loaded from the host).
pub fn timeline(
    trace: &Trace,
    schedule: &Schedule,
    model: &LatencyModel,
    hit_tokens: &dyn Fn(u32) -> (f64, f64),
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
        for event in schedule.events.iter().filter(|e| e.kind != EventKind::Finish) {
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
        let (cached, loaded) = hit_tokens(index);
        let uncached = (f64::from(call.prompt_tokens) - cached - loaded).max(1.0);
        let busy_s = model.load_s(loaded) + model.prefill_s(uncached, cached + loaded);
        let begin_us = arrival_us.max(device_free_us);
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
