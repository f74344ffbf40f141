//! Small random workloads for the tests of policies.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::HashMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replay::latency::LatencyModel;
use replay::schedule::{Order, Schedule, ScheduleOptions};
use replay::trace::{Call, Clock, Run, Session, Span, Trace, NO_BLOCK};

/// Builds a trace from prompts and answers given as sequences of labels: equal prefixes share blocks.
pub(crate) struct TraceBuilder {
    trace: Trace,
    ids: HashMap<(u32, u32), u32>,
}

impl TraceBuilder {
    pub(crate) fn new(sessions: usize, agents: usize) -> Self {
        let name = |kind: &str, i: usize| format!("{kind}{i}");
        Self {
            trace: Trace {
                workload: "test".into(),
                block_size: 16,
                clock: Clock::None,
                agents: (0..agents).map(|i| name("agent", i)).collect(),
                tools: vec!["tool".into()],
                sessions: (0..sessions).map(|i| Session { name: name("session", i), calls: Vec::new() }).collect(),
                calls: Vec::new(),
                runs: Vec::new(),
                n_blocks: 0,
                parents: Vec::new(),
                skipped_lines: 0,
            },
            ids: HashMap::new(),
        }
    }

    pub(crate) fn call(&mut self, session: usize, agent: u16, prompt: &[u32], output: &[u32]) {
        let mut parent = NO_BLOCK;
        let prompt_span = self.span(prompt, &mut parent);
        let output_span = self.span(output, &mut parent);
        let calls = &mut self.trace.sessions[session].calls;
        let step = calls.len() as u32;
        calls.push(self.trace.calls.len() as u32);
        self.trace.calls.push(Call {
            session: session as u32,
            agent,
            step,
            parent_step: None,
            prompt: prompt_span,
            output: output_span,
            prompt_tokens: prompt.len() as u32 * 16 + 3,
            output_tokens: output.len() as u32 * 16 + 3,
            arrival_s: None,
            queue_s: None,
            llm_latency_s: None,
            tool: (agent == 1).then_some(0),
            tool_latency_s: None,
            quotes: Span::default(),
        });
    }

    pub(crate) fn build(self) -> Trace {
        self.trace
    }

    fn span(&mut self, labels: &[u32], parent: &mut u32) -> Span {
        let start = self.trace.runs.len() as u32;
        for &label in labels {
            let next = self.trace.n_blocks;
            let id = *self.ids.entry((*parent, label)).or_insert(next);
            if id == next {
                self.trace.n_blocks += 1;
                self.trace.parents.push(*parent);
            }
            self.trace.runs.push(Run { first: id, len: 1 });
            *parent = id;
        }
        Span { start, len: self.trace.runs.len() as u32 - start }
    }
}

/// What a random trace looks like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) sessions: usize,
    pub(crate) calls: usize,
    pub(crate) agents: u16,
    /// Distinct labels; few of them make sessions share blocks.
    pub(crate) labels: u32,
    /// Longest prompt in blocks.
    pub(crate) longest: usize,
    /// Longest answer in blocks.
    pub(crate) answer: usize,
}

/// Sessions that extend, cut back and restart their histories.
pub(crate) fn random_trace(seed: u64, shape: Shape) -> Trace {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut builder = TraceBuilder::new(shape.sessions, shape.agents as usize);
    let mut histories: Vec<Vec<u32>> = vec![Vec::new(); shape.sessions];
    for _ in 0..shape.calls {
        let session = rng.random_range(0..shape.sessions);
        let history = &mut histories[session];
        if rng.random_bool(0.3) {
            history.truncate(rng.random_range(0..=history.len()));
        }
        for _ in 0..rng.random_range(0..=shape.longest / 2) {
            history.push(rng.random_range(0..shape.labels));
        }
        if history.len() > shape.longest {
            history.truncate(rng.random_range(0..=shape.longest));
        }
        let answer: Vec<u32> =
            (0..rng.random_range(0..=shape.answer)).map(|_| rng.random_range(0..shape.labels)).collect();
        builder.call(session, rng.random_range(0..shape.agents), history, &answer);
        if rng.random_bool(0.7) {
            history.extend(answer);
        }
    }
    builder.build()
}

pub(crate) fn schedule(trace: &Trace, order: Order, sessions: usize, capacity_blocks: usize, seed: u64) -> Schedule {
    let model = LatencyModel::LLAMA_3_1_8B_H100;
    Schedule::new(trace, ScheduleOptions { order, sessions, seed, capacity_blocks, model }).expect("valid options")
}
