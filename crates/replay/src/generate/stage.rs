//! What all workloads write to: draws sizes and tool times, names texts, records calls.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, LogNormal};
use rustc_hash::FxHashMap;

use super::prompt::{mix, Prompt, Text};
use crate::schedule::{DRAWN_SIGMA, TOOL_MEDIAN_S};
use crate::trace::{Call, Clock, Trace, TraceBuilder};

/// z-score of the 90th percentile.
const Z90: f64 = 1.2816;

/// Median and 90th percentile of a log-normal number of tokens or calls.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size(pub(super) u32, pub(super) u32);

pub(super) struct Stage {
    builder: TraceBuilder,
    rng: StdRng,
    tool_s: LogNormal<f64>,
    block_size: u32,
    next_text: u64,
    session: u32,
    step: u32,
    agent_names: Vec<String>,
    /// Steps of the session by the texts they answered.
    answers: FxHashMap<u64, u32>,
}

impl Stage {
    pub(super) fn new(workload: &str, block_size: u32, seed: u64) -> Self {
        Self {
            builder: TraceBuilder::new(workload, block_size, Clock::None),
            rng: StdRng::seed_from_u64(seed ^ mix(workload.len() as u64)),
            tool_s: LogNormal::new(TOOL_MEDIAN_S.ln(), DRAWN_SIGMA).expect("sigma is positive"),
            block_size,
            next_text: 0,
            session: 0,
            step: 0,
            agent_names: Vec::new(),
            answers: FxHashMap::default(),
        }
    }

    pub(super) fn start_session(&mut self, number: usize) {
        self.session = self.builder.session(&format!("session-{number}"));
        self.step = 0;
        self.answers.clear();
    }

    /// How many sessions have started.
    pub(super) fn session_number(&self) -> usize {
        self.session as usize
    }

    pub(super) fn prompt(&self) -> Prompt {
        Prompt::new(self.block_size)
    }

    /// A text that nobody else has.
    pub(super) fn fresh(&mut self, size: Size) -> Text {
        let tokens = self.draw(size);
        self.fresh_of(tokens)
    }

    pub(super) fn fresh_of(&mut self, tokens: u32) -> Text {
        self.next_text += 1;
        Text { id: self.next_text << 1, tokens }
    }

    /// A text that every session has in common, for example a system prompt.
    #[expect(clippy::unused_self, reason = "belongs to the same vocabulary as `fresh`")]
    pub(super) fn common(&self, kind: u64, number: usize, tokens: u32) -> Text {
        Text { id: mix(kind << 32 | number as u64) | 1, tokens }
    }

    /// A log-normal number, at least 1 and at most eight times its 90th percentile.
    pub(super) fn draw(&mut self, size: Size) -> u32 {
        let sigma = (f64::from(size.1) / f64::from(size.0)).ln().max(0.0) / Z90;
        let draw = LogNormal::new(f64::from(size.0).ln(), sigma).map_or(f64::from(size.0), |d| d.sample(&mut self.rng));
        (draw.round() as u32).clamp(1, size.1.saturating_mul(8))
    }

    pub(super) fn between(&mut self, low: usize, high: usize) -> usize {
        self.rng.random_range(low..=high)
    }

    pub(super) fn chance(&mut self, probability: f64) -> bool {
        self.rng.random_bool(probability)
    }

    /// An index drawn in proportion to `weights`.
    pub(super) fn choose(&mut self, weights: &[f64]) -> usize {
        let total: f64 = weights.iter().sum();
        let mut at = self.rng.random::<f64>() * total;
        for (index, weight) in weights.iter().enumerate() {
            at -= weight;
            if at < 0.0 {
                return index;
            }
        }
        weights.len() - 1
    }

    /// A uniform number in 0..1.
    pub(super) fn uniform(&mut self) -> f64 {
        self.rng.random()
    }

    /// One of `n`, drawn with popularity 1 / rank.
    pub(super) fn popular(&mut self, n: usize) -> usize {
        // Inverse transform of the density 1 / x between 1 and n + 1.
        let rank = ((n as f64 + 1.0).ln() * self.uniform()).exp();
        (rank as usize - 1).min(n - 1)
    }

    /// Records that `agent` sent `prompt` and received `answer`, then ran `tool`. Returns the step.
    pub(super) fn call(
        &mut self,
        agent: &str,
        prompt: &Prompt,
        answer: Text,
        tool: Option<&str>,
        parent: Option<u32>,
    ) -> u32 {
        let mut decoded = prompt.clone();
        decoded.add(answer);
        // Drawn for every call, so that whether a tool runs changes nothing else.
        let tool_s = (self.tool_s.sample(&mut self.rng) * 1e3).round() / 1e3;
        let call = Call {
            session: self.session,
            agent: self.builder.agent(agent).unwrap_or_default(),
            step: self.step,
            parent_step: parent.or(self.step.checked_sub(1)),
            prompt_tokens: prompt.tokens(),
            output_tokens: answer.tokens,
            tool: tool.and_then(|name| self.builder.tool(name)),
            tool_latency_s: tool.map(|_| tool_s),
            ..Call::default()
        };
        let output = &decoded.keys()[prompt.keys().len()..];
        let index = self.builder.push(call, prompt.keys(), output).expect("digests of prefixes form chains");
        let mut quotes: Vec<u32> = prompt.texts().iter().filter_map(|text| self.answers.get(text).copied()).collect();
        quotes.sort_unstable();
        quotes.dedup();
        self.builder.quotes(index, &quotes);
        self.answers.insert(answer.id, self.step);
        self.step += 1;
        self.step - 1
    }

    /// A text is a part of what was answered at a step: the argument of a call of a tool.
    pub(super) fn is_part_of(&mut self, text: Text, step: u32) {
        self.answers.insert(text.id, step);
    }

    /// The name of team member `index`: from `roles`, then numbered.
    pub(super) fn role(&mut self, roles: &[&str], index: usize) -> String {
        while self.agent_names.len() <= index {
            let n = self.agent_names.len();
            self.agent_names.push(roles.get(n).map_or_else(|| format!("agent_{n}"), |&r| r.to_owned()));
        }
        self.agent_names[index].clone()
    }

    pub(super) fn finish(self) -> Trace {
        self.builder.finish()
    }
}
