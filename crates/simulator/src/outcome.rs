//! What an engine did, and the figures that scenarios are judged by.

use replay::schedule::Event;
use replay::trace::Trace;

use crate::workload::Workload;

/// What became of one call. Times are microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallRecord {
    /// When it was sent.
    pub arrived_us: u64,
    /// When it was first admitted.
    pub admitted_us: u64,
    /// When its first token was there.
    pub first_token_us: u64,
    /// When its last token was there.
    pub finished_us: u64,
    /// Prompt blocks found on the device when it was first admitted.
    pub hit_blocks: u32,
    /// Prompt blocks loaded from the host tier then.
    pub loaded_blocks: u32,
    /// Full prompt blocks; 0 for a call larger than the pool, which runs without the cache.
    pub prompt_blocks: u32,
    /// How often it lost its memory.
    pub preemptions: u32,
    /// Longest time for which policies held it, without a break.
    pub held_us: u64,
    /// How long it waited to be admitted, again after preemptions.
    pub waited_us: u64,
}

impl CallRecord {
    /// Seconds from arrival to the first token.
    pub fn ttft_s(&self) -> f64 {
        (self.first_token_us - self.arrived_us) as f64 / 1e6
    }
}

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// By call of the trace.
    pub calls: Vec<CallRecord>,
    /// Time of the last finish.
    pub end_us: u64,
    /// Time in steps.
    pub busy_us: u64,
    /// Of it, what prefills in idle capacity cost.
    pub speculative_us: u64,
    /// Steps.
    pub steps: u64,
    /// Prompt tokens computed for the first time.
    pub prefill_tokens: u64,
    /// Tokens computed again after preemptions.
    pub repeated_tokens: u64,
    /// Tokens generated.
    pub decoded_tokens: u64,
    /// Tokens prefilled in idle capacity.
    pub speculative_tokens: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Blocks evicted.
    pub evictions: u64,
    /// Most blocks that were resident at once.
    pub peak_blocks: usize,
    /// Victims that the policies named and the pool refused, and calls whose hits the core counted otherwise.
    pub index_drift: u64,
    /// Over all pairs of tenants and all times in which calls of both waited: the largest difference of what the two
    /// were given, in virtual tokens (1 for a prompt token computed, 2 for a token generated).
    pub service_gap: f64,
    /// The bound that a fair order keeps it under: 2 max(longest prompt, 2 x tokens that the pool holds).
    pub service_bound: f64,
    /// Starts and finishes in the order in which they happened, as the replay takes them.
    pub events: Vec<Event>,
}

impl Outcome {
    /// Hit blocks over prompt blocks of calls for which `chosen` holds.
    pub fn hit_rate(&self, chosen: impl Fn(usize) -> bool) -> f64 {
        let (mut hits, mut blocks) = (0u64, 0u64);
        for (call, record) in self.calls.iter().enumerate().filter(|(call, _)| chosen(*call)) {
            debug_assert!(record.hit_blocks <= record.prompt_blocks, "{call}");
            hits += u64::from(record.hit_blocks);
            blocks += u64::from(record.prompt_blocks);
        }
        hits as f64 / blocks.max(1) as f64
    }

    /// Seconds from the arrival of a session's first call to the finish of its last, by session.
    pub fn session_s(&self, trace: &Trace) -> Vec<f64> {
        let of = |calls: &[u32]| {
            let (first, last) = (calls.first()?, calls.last()?);
            let us = self.calls[*last as usize].finished_us - self.calls[*first as usize].arrived_us;
            Some(us as f64 / 1e6)
        };
        trace.sessions.iter().filter_map(|session| of(&session.calls)).collect()
    }

    /// Seconds to first token of the calls for which `chosen` holds.
    pub fn ttft_s(&self, chosen: impl Fn(usize) -> bool) -> Vec<f64> {
        self.calls.iter().enumerate().filter(|(call, _)| chosen(*call)).map(|(_, record)| record.ttft_s()).collect()
    }

    /// Tokens computed for calls, a second of the whole run.
    pub fn tokens_per_s(&self, workload: &Workload) -> f64 {
        let tokens = |call: &replay::trace::Call| u64::from(call.prompt_tokens) + u64::from(call.output_tokens);
        let all: u64 = workload.trace.calls.iter().map(tokens).sum();
        all as f64 / (self.end_us.max(1) as f64 / 1e6)
    }

    /// Seconds for which calls waited to be admitted, held or not, in all.
    pub fn waited_s(&self) -> f64 {
        self.calls.iter().map(|record| record.waited_us).sum::<u64>() as f64 / 1e6
    }

    /// The longest time for which any call was held, seconds.
    pub fn longest_hold_s(&self) -> f64 {
        self.calls.iter().map(|record| record.held_us).max().unwrap_or(0) as f64 / 1e6
    }
}

/// Mean of `values`; 0 of none.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The value that a share of `at` of the values lie at or below (nearest rank); 0 of none.
pub fn percentile(values: &[f64], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (at * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(0.0)
}
