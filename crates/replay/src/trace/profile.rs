//! What a workload looks like: sizes, predictability of the next agent, where reuse comes from, how far apart it is.
//!
//! All figures are exact. One pass over the calls costs O(log n) per block reference, n being the distinct blocks.
//!
//! Definitions
//! * **Next agent.** Transitions inside a session, in file order; the end of a session is not predicted. The
//!   predictors learn online over all sessions and guess before they learn. Order 2 falls back to order 1, and a
//!   predictor that has seen nothing guesses "the same agent again". Ties go to the agent that appeared first.
//! * **Hits** are the leading blocks of a prompt that an infinite cache holds; prompt and decoded blocks enter it. A
//!   hit block belongs to the closest source: used before by the same agent in the same session, by another agent of
//!   the session, or by other sessions only. Shares are in tokens of all prompts.
//! * **Anchor**: a block that calls of two sessions or more use. **Tail**: a block of one session only.
//! * **Reuse distance**: distinct blocks touched between two references to a block, each call touching its prompt and
//!   then its output from the end to the root, as an LRU cache that evicts leaves first would see them.

use rustc_hash::{FxHashMap, FxHashSet};
use serde::Serialize;

use super::Trace;

/// Quantiles of token counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// 10th percentile.
    pub p10: u64,
    /// Median.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// Largest.
    pub max: u64,
}

/// How well the next agent of a session can be told.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Predictability {
    /// Transitions counted.
    pub transitions: u64,
    /// Entropy of the agent of a call, bits.
    pub entropy_bits: f64,
    /// Entropy of the next agent, bits.
    pub next_entropy_bits: f64,
    /// Entropy of the next agent given the current one, bits.
    pub conditional_entropy_bits: f64,
    /// R = 1 - H(A'|A) / H(A'), 0 where there is one agent only.
    pub r: f64,
    /// Share of transitions guessed by "always the commonest agent so far".
    pub most_frequent: f64,
    /// Share guessed by "the same agent again".
    pub stay: f64,
    /// Share guessed by the current agent's commonest successor.
    pub order_1: f64,
    /// Share guessed by the commonest successor of the last two agents.
    pub order_2: f64,
    /// Of the transitions to another agent, how often the commonest other successor was right.
    pub order_1_on_switches: f64,
}

/// Shares of all prompt tokens that an infinite cache would serve.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Reuse {
    /// Everything below together.
    pub total: f64,
    /// With a cache that forgets everything between sessions.
    pub own_session: f64,
    /// Last used by the same agent in the same session.
    pub same_agent: f64,
    /// Used in the session, by other agents only.
    pub other_agent: f64,
    /// Used by other sessions only.
    pub other_sessions: f64,
    /// Share of prompt blocks, counted per reference, that are anchors.
    pub anchor_references: f64,
    /// Share of prompt blocks, counted per reference, that are tails.
    pub tail_references: f64,
    /// Share of distinct blocks that are anchors.
    pub anchor_blocks: f64,
}

/// What a workload looks like.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Profile {
    /// Name of the workload.
    pub workload: String,
    /// Tokens per block.
    pub block_size: u32,
    /// Calls.
    pub calls: u64,
    /// Sessions.
    pub sessions: u64,
    /// Agents.
    pub agents: u64,
    /// Agents that a session uses, mean.
    pub agents_per_session: f64,
    /// Calls of a session, mean.
    pub calls_per_session: f64,
    /// Calls of the longest session.
    pub calls_per_session_max: u64,
    /// Tokens of a prompt.
    pub prompt_tokens: Quantiles,
    /// Tokens of all prompts.
    pub prompt_tokens_total: u64,
    /// Tokens of an answer.
    pub output_tokens: Quantiles,
    /// Share of calls that a tool follows.
    pub tool_calls: f64,
    /// Distinct blocks, prompts and answers.
    pub distinct_blocks: u64,
    /// Distinct blocks of a session, mean.
    pub session_blocks: f64,
    /// Distinct blocks of the largest session.
    pub session_blocks_max: u64,
    /// Concurrent sessions of the live working set.
    pub concurrent_sessions: u64,
    /// Blocks that so many sessions need at a time: concurrent sessions x mean blocks of a session.
    pub live_blocks: f64,
    /// The next agent.
    pub next_agent: Predictability,
    /// Where hits come from.
    pub reuse: Reuse,
    /// Distinct blocks between two references to a block.
    pub reuse_distance: Quantiles,
    /// Lines that were skipped when reading.
    pub skipped_lines: u64,
}

/// Profiles `trace` for `sessions` concurrent sessions.
pub fn profile(trace: &Trace, sessions: usize) -> Profile {
    let per_session = trace.sessions.iter().map(|s| s.calls.len() as u64);
    let agents_seen: usize = trace
        .sessions
        .iter()
        .map(|s| s.calls.iter().map(|&c| trace.calls[c as usize].agent).collect::<FxHashSet<_>>().len())
        .sum();
    let n_sessions = trace.sessions.len().max(1) as f64;
    let blocks = session_blocks(trace);
    let mean_blocks = blocks.iter().sum::<u64>() as f64 / n_sessions;
    let mut prompts: Vec<u64> = trace.calls.iter().map(|c| u64::from(c.prompt_tokens)).collect();
    let mut outputs: Vec<u64> = trace.calls.iter().map(|c| u64::from(c.output_tokens)).collect();
    let prompt_tokens_total = prompts.iter().sum();
    Profile {
        workload: trace.workload.clone(),
        block_size: trace.block_size,
        calls: trace.calls.len() as u64,
        sessions: trace.sessions.len() as u64,
        agents: trace.agents.len() as u64,
        agents_per_session: agents_seen as f64 / n_sessions,
        calls_per_session: trace.calls.len() as f64 / n_sessions,
        calls_per_session_max: per_session.max().unwrap_or(0),
        prompt_tokens: quantiles(&mut prompts),
        prompt_tokens_total,
        output_tokens: quantiles(&mut outputs),
        tool_calls: trace.calls.iter().filter(|c| c.tool.is_some()).count() as f64 / trace.calls.len().max(1) as f64,
        distinct_blocks: u64::from(trace.n_blocks),
        session_blocks: mean_blocks,
        session_blocks_max: blocks.iter().copied().max().unwrap_or(0),
        concurrent_sessions: sessions as u64,
        live_blocks: mean_blocks * sessions as f64,
        next_agent: predictability(trace),
        reuse: reuse(trace, prompt_tokens_total),
        reuse_distance: reuse_distance(trace),
        skipped_lines: trace.skipped_lines,
    }
}

fn quantiles(values: &mut [u64]) -> Quantiles {
    values.sort_unstable();
    let at = |p: usize| values.get(values.len() * p / 100).copied().unwrap_or(0);
    Quantiles { p10: at(10), p50: at(50), p90: at(90), max: values.last().copied().unwrap_or(0) }
}

/// Distinct blocks of each session.
fn session_blocks(trace: &Trace) -> Vec<u64> {
    let mut seen = vec![u32::MAX; trace.n_blocks as usize];
    let mut counts = vec![0; trace.sessions.len()];
    for (number, session) in trace.sessions.iter().enumerate() {
        for &index in &session.calls {
            let call = &trace.calls[index as usize];
            for block in trace.blocks(call.prompt).chain(trace.blocks(call.output)) {
                if seen[block as usize] != number as u32 {
                    seen[block as usize] = number as u32;
                    counts[number] += 1;
                }
            }
        }
    }
    counts
}

/// Counts of what followed, and the commonest of them.
#[derive(Default)]
struct Counts {
    /// Count and rank of first appearance.
    seen: FxHashMap<u16, (u64, usize)>,
    best: Option<Leader>,
    /// Commonest successor other than the context's own agent.
    best_other: Option<Leader>,
}

#[derive(Clone, Copy)]
struct Leader {
    agent: u16,
    count: u64,
    rank: usize,
}

impl Counts {
    fn add(&mut self, agent: u16, own: Option<u16>) {
        let rank = self.seen.len();
        let entry = self.seen.entry(agent).or_insert((0, rank));
        entry.0 += 1;
        let new = Leader { agent, count: entry.0, rank: entry.1 };
        let leads = |old: Option<Leader>| old.is_none_or(|old| (new.count, old.rank) > (old.count, new.rank));
        if leads(self.best) {
            self.best = Some(new);
        }
        if own != Some(agent) && leads(self.best_other) {
            self.best_other = Some(new);
        }
    }

    fn guess(&self) -> Option<u16> {
        self.best.map(|leader| leader.agent)
    }

    fn entropy_bits(&self) -> f64 {
        entropy_bits(self.seen.values().map(|&(count, _)| count))
    }

    fn total(&self) -> u64 {
        self.seen.values().map(|&(count, _)| count).sum()
    }
}

fn entropy_bits(counts: impl Iterator<Item = u64> + Clone) -> f64 {
    let total: u64 = counts.clone().sum();
    counts
        .filter(|&n| n > 0)
        .map(|n| {
            let p = n as f64 / total as f64;
            p * (1.0 / p).log2()
        })
        .sum()
}

/// How predictable the next agent of a session is.
pub fn predictability(trace: &Trace) -> Predictability {
    let mut unigram = Counts::default();
    let mut order_1: FxHashMap<u16, Counts> = FxHashMap::default();
    let mut order_2: FxHashMap<(u16, u16), Counts> = FxHashMap::default();
    let mut agents = vec![0u64; trace.agents.len()];
    let (mut transitions, mut switches) = (0u64, 0u64);
    let (mut right_0, mut right_stay, mut right_1, mut right_2, mut right_switch) = (0u64, 0u64, 0u64, 0u64, 0u64);
    for session in &trace.sessions {
        // What came before a session's first call is a context of its own.
        let mut before = u16::MAX;
        let mut current: Option<u16> = None;
        for &index in &session.calls {
            let next = trace.calls[index as usize].agent;
            agents[next as usize] += 1;
            if let Some(agent) = current {
                transitions += 1;
                let guess_0 = unigram.guess().unwrap_or(agent);
                let row = order_1.entry(agent).or_default();
                let guess_1 = row.guess().unwrap_or(agent);
                let pair = order_2.entry((before, agent)).or_default();
                let guess_2 = pair.guess().unwrap_or(guess_1);
                right_0 += u64::from(guess_0 == next);
                right_stay += u64::from(agent == next);
                right_1 += u64::from(guess_1 == next);
                right_2 += u64::from(guess_2 == next);
                if next != agent {
                    switches += 1;
                    right_switch += u64::from(row.best_other.map(|leader| leader.agent) == Some(next));
                }
                unigram.add(next, None);
                row.add(next, Some(agent));
                pair.add(next, None);
                before = agent;
            }
            current = Some(next);
        }
    }
    let share = |right: u64| right as f64 / transitions.max(1) as f64;
    let next_entropy = unigram.entropy_bits();
    let conditional: f64 =
        order_1.values().map(|row| row.entropy_bits() * row.total() as f64 / transitions.max(1) as f64).sum();
    Predictability {
        transitions,
        entropy_bits: entropy_bits(agents.iter().copied()),
        next_entropy_bits: next_entropy,
        conditional_entropy_bits: conditional,
        r: if next_entropy > 0.0 { 1.0 - conditional / next_entropy } else { 0.0 },
        most_frequent: share(right_0),
        stay: share(right_stay),
        order_1: share(right_1),
        order_2: share(right_2),
        order_1_on_switches: right_switch as f64 / switches.max(1) as f64,
    }
}

fn reuse(trace: &Trace, prompt_tokens: u64) -> Reuse {
    let n = trace.n_blocks as usize;
    let mut sessions_using = SessionsUsing { last: vec![u32::MAX; n], several: vec![false; n] };
    let (mut same, mut other_agent, mut other_sessions, mut own_session) = (0u64, 0u64, 0u64, 0u64);
    // A session's own references, walked session by session; whether other sessions used a block earlier is told by
    // its first reference in file order.
    let mut first_call = vec![u32::MAX; n];
    for (index, call) in trace.calls.iter().enumerate() {
        for block in trace.blocks(call.prompt).chain(trace.blocks(call.output)) {
            sessions_using.touch(block, call.session);
            let first = &mut first_call[block as usize];
            *first = (*first).min(index as u32);
        }
    }
    let mut own_stamp = vec![u32::MAX; n];
    // Agents that used a block in the current session.
    let mut by_agent: FxHashSet<(u32, u16)> = FxHashSet::default();
    for (number, session) in trace.sessions.iter().enumerate() {
        by_agent.clear();
        for &index in &session.calls {
            let call = &trace.calls[index as usize];
            let (mut cached, mut own_cached) = (true, true);
            for block in trace.blocks(call.prompt) {
                let own = own_stamp[block as usize] == number as u32;
                own_cached &= own;
                cached &= own || first_call[block as usize] < index;
                if !cached {
                    break;
                }
                own_session += u64::from(own_cached);
                if own && by_agent.contains(&(block, call.agent)) {
                    same += 1;
                } else if own {
                    other_agent += 1;
                } else {
                    other_sessions += 1;
                }
            }
            for block in trace.blocks(call.prompt).chain(trace.blocks(call.output)) {
                own_stamp[block as usize] = number as u32;
                by_agent.insert((block, call.agent));
            }
        }
    }
    let (mut anchors, mut references) = (0u64, 0u64);
    for call in &trace.calls {
        for block in trace.blocks(call.prompt) {
            references += 1;
            anchors += u64::from(sessions_using.several[block as usize]);
        }
    }
    let share = |blocks: u64| (blocks * u64::from(trace.block_size)) as f64 / prompt_tokens.max(1) as f64;
    let anchor_references = anchors as f64 / references.max(1) as f64;
    Reuse {
        total: share(same + other_agent + other_sessions),
        own_session: share(own_session),
        same_agent: share(same),
        other_agent: share(other_agent),
        other_sessions: share(other_sessions),
        anchor_references,
        tail_references: if references == 0 { 0.0 } else { 1.0 - anchor_references },
        anchor_blocks: sessions_using.several.iter().filter(|&&s| s).count() as f64 / n.max(1) as f64,
    }
}

struct SessionsUsing {
    last: Vec<u32>,
    several: Vec<bool>,
}

impl SessionsUsing {
    fn touch(&mut self, block: u32, session: u32) {
        let last = &mut self.last[block as usize];
        if *last != session {
            self.several[block as usize] |= *last != u32::MAX;
            *last = session;
        }
    }
}

/// Distances by a Fenwick tree over reference times: one mark at each block's latest reference.
fn reuse_distance(trace: &Trace) -> Quantiles {
    // Times are compacted when the tree is full, so it stays as large as twice the distinct blocks.
    let n = trace.n_blocks as usize;
    let mut tree = Fenwick::new((2 * n).max(1 << 10));
    let mut latest = vec![0u32; n];
    let mut now = 0u32;
    let mut histogram: Vec<u64> = vec![0; n + 1];
    let mut blocks = Vec::new();
    for call in &trace.calls {
        blocks.clear();
        trace.expand(call.prompt, &mut blocks);
        trace.expand(call.output, &mut blocks);
        for &block in blocks.iter().rev() {
            if now as usize == tree.len() {
                now = compact(&mut tree, &mut latest);
            }
            now += 1;
            let before = latest[block as usize];
            if before > 0 {
                histogram[tree.marks_after(before)] += 1;
                tree.add(before, -1);
            }
            latest[block as usize] = now;
            tree.add(now, 1);
        }
    }
    let total: u64 = histogram.iter().sum();
    let at = |p: u64| {
        let mut left = total * p / 100;
        histogram.iter().position(|&count| {
            let found = left < count;
            left = left.saturating_sub(count);
            found
        })
    };
    let max = histogram.iter().rposition(|&count| count > 0).unwrap_or(0) as u64;
    Quantiles { p10: at(10).unwrap_or(0) as u64, p50: at(50).unwrap_or(0) as u64, p90: at(90).unwrap_or(0) as u64, max }
}

/// Renumbers the latest references 1, 2, ... in order and returns the last number.
fn compact(tree: &mut Fenwick, latest: &mut [u32]) -> u32 {
    let mut order: Vec<u32> = (0..latest.len() as u32).filter(|&b| latest[b as usize] > 0).collect();
    order.sort_unstable_by_key(|&b| latest[b as usize]);
    tree.clear();
    for (rank, &block) in order.iter().enumerate() {
        latest[block as usize] = rank as u32 + 1;
        tree.add(rank as u32 + 1, 1);
    }
    order.len() as u32
}

struct Fenwick {
    sums: Vec<i32>,
    marks: i32,
}

impl Fenwick {
    fn new(len: usize) -> Self {
        Self { sums: vec![0; len + 1], marks: 0 }
    }

    fn len(&self) -> usize {
        self.sums.len() - 1
    }

    fn clear(&mut self) {
        self.sums.fill(0);
        self.marks = 0;
    }

    fn add(&mut self, at: u32, change: i32) {
        self.marks += change;
        let mut at = at as usize;
        while at < self.sums.len() {
            self.sums[at] += change;
            at += at & at.wrapping_neg();
        }
    }

    /// Marks strictly after `at`.
    fn marks_after(&self, at: u32) -> usize {
        let mut sum = 0;
        let mut at = at as usize;
        while at > 0 {
            sum += self.sums[at];
            at &= at - 1;
        }
        (self.marks - sum) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{Call, Clock, TraceBuilder};

    #[test]
    fn reuse_distances_equal_a_naive_stack() {
        let mut builder = TraceBuilder::new("w", 16, Clock::None);
        builder.session("s");
        builder.agent("a");
        // Chains of different depth over shared prefixes, more references than the tree's first size.
        let mut naive: Vec<u64> = Vec::new();
        let mut stack: Vec<u64> = Vec::new();
        let mut state = 7u64;
        for _ in 0..900 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (branch, depth) = ((state >> 33) % 5, 1 + (state >> 40) % 6);
            let keys: Vec<u64> = (0..depth).map(|d| if d < 2 { d } else { branch * 10 + d }).collect();
            for &key in keys.iter().rev() {
                if let Some(position) = stack.iter().position(|&k| k == key) {
                    naive.push(position as u64);
                    stack.remove(position);
                }
                stack.insert(0, key);
            }
            builder.push(Call { prompt_tokens: 1000, ..Call::default() }, &keys, &[]).unwrap();
        }
        assert_eq!(reuse_distance(&builder.finish()), quantiles(&mut naive));
    }
}
