//! Which lane of a session calls when: first-passage probabilities over the next calls.
//!
//! A *lane* is one agent in one session. Rows of the chain are over the session's lanes and "another agent". A row backs
//! off from the successors of (agent before last, last agent) over those of the last agent to the rank of the agent in
//! the session's own recency list - not to the unigram: among many agents the next speaker is usually a recent one.
//! P(b) = (n_b + kappa P'(b)) / (N + kappa), kappa 4 for order 1 and 3 for order 2.

use crate::ids::AgentId;
use crate::successors::{after_tool, context_of, context_of_two};

use super::workload::{Workload, NEW, RANKS};
use super::Config;

/// Calls looked ahead.
pub(crate) const STEPS: usize = 6;
/// Lanes told apart, most recent first; others are "another agent".
pub(crate) const LANES: usize = 7;
/// Further calls of a lane that count.
pub(crate) const FURTHER: usize = 3;
const WIDTH: usize = LANES + 1;
/// Paths less likely than this are dropped.
const NEGLIGIBLE: f32 = 0.004;

type Row = [f32; WIDTH];
type States = [f32; WIDTH * WIDTH];

/// P(the lane's m-th further call is the session's i-th next call), by lane.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weights(pub(crate) [[f32; STEPS]; FURTHER]);

/// The transition rows of one session.
pub(crate) struct Chain<'a> {
    workload: &'a Workload,
    config: &'a Config,
    agents: &'a [u16],
    /// The first so many have lanes; the others may be called for the first time.
    own: usize,
    /// Whether a tool ran after the last call, where that is known.
    tool: Option<bool>,
    rows: [Row; WIDTH * WIDTH],
    known: [bool; WIDTH * WIDTH],
    /// The row after the session's last call, and its state.
    first: Option<(usize, Row)>,
    /// Successors of each last agent, once looked up.
    order1: [Option<(Row, f32)>; WIDTH],
    rank_share: [f32; RANKS],
}

impl<'a> Chain<'a> {
    /// `agents` of the session's lanes, most recent first, at most [`LANES`].
    pub(crate) fn new(workload: &'a Workload, config: &'a Config, agents: &'a [u16], tool: Option<bool>) -> Self {
        let mut counts = [0u16; RANKS + 1];
        workload.ranks.snapshot(&mut counts);
        let total: f32 = counts.iter().map(|&c| f32::from(c)).sum::<f32>() + 4.0;
        let rank_share = std::array::from_fn(|rank| (f32::from(counts[rank]) + 1.0 / (1.0 + rank as f32)) / total);
        debug_assert_eq!(NEW, RANKS);
        Self {
            workload,
            config,
            agents,
            own: agents.len(),
            tool: tool.filter(|_| config.tool_order),
            rows: [[0.0; WIDTH]; WIDTH * WIDTH],
            known: [false; WIDTH * WIDTH],
            first: None,
            order1: [None; WIDTH],
            rank_share,
        }
    }

    /// The agents after the first `own` have not been called by the session yet.
    pub(crate) fn of_lanes(mut self, own: usize) -> Self {
        self.own = own;
        self
    }

    /// Position of an agent among the lanes; their number stands for any other.
    fn position(&self, agent: u16) -> usize {
        self.agents.iter().position(|&a| a == agent).unwrap_or(self.agents.len())
    }

    /// Probabilities of the next lane after `prev` and `last` (positions); the last entry is "another agent".
    fn row(&mut self, prev: usize, last: usize) -> Row {
        let state = prev * WIDTH + last;
        if !self.known[state] {
            self.known[state] = true;
            self.rows[state] = self.make_row(prev, last, None);
        }
        self.rows[state]
    }

    /// The row of the next call.
    fn first_row(&mut self, prev: usize, last: usize) -> Row {
        if self.tool.is_none() {
            return self.row(prev, last);
        }
        match self.first {
            Some((state, row)) if state == prev * WIDTH + last => row,
            _ => {
                let row = self.make_row(prev, last, self.tool);
                self.first = Some((prev * WIDTH + last, row));
                row
            }
        }
    }

    fn make_row(&mut self, prev: usize, last: usize, tool: Option<bool>) -> Row {
        let n = self.agents.len();
        let mut row = [0.0; WIDTH];
        if !self.config.prediction {
            let each = 1.0 / (n as f32 + 0.5);
            row[..n].fill(each);
            row[n] = 0.5 * each;
            return row;
        }
        // Recency after `prev` and `last` have spoken: last, prev, then the others as they stand.
        let mut rank = 0;
        let order = [last, prev].into_iter().chain(0..self.own);
        for lane in order {
            if lane < n && row[lane] == 0.0 {
                row[lane] = self.rank_share[rank.min(RANKS - 1)];
                rank += 1;
            }
        }
        row[n] = (1.0 - row[..n].iter().sum::<f32>()).max(0.01);
        // An agent without a lane has an even share of what is left for those.
        let strangers = row[self.own..n].iter().filter(|&&p| p == 0.0).count();
        if strangers > 0 {
            let share = row[n] / (strangers as f32 + 1.0);
            row[self.own..n].iter_mut().filter(|p| **p == 0.0).for_each(|p| *p = share);
            row[n] = share;
        }
        if last < n {
            let last_agent = AgentId(self.agents[last]);
            let first = match self.order1[last].filter(|_| tool.is_none()) {
                Some(counts) => counts,
                None => self.counts(context_of(last_agent), tool),
            };
            if tool.is_none() {
                self.order1[last] = Some(first);
            }
            refine(&mut row, n, first, 4.0);
            if self.config.order2 {
                let prev_agent = self.agents.get(prev).map_or(AgentId::UNKNOWN, |&a| AgentId(a));
                let second = self.counts(context_of_two(prev_agent, last_agent), tool);
                refine(&mut row, n, second, 3.0);
            }
        }
        row
    }

    /// Successors of a context by lane, and their sum; with and without a tool where that is not known.
    fn counts(&self, context: u64, tool: Option<bool>) -> (Row, f32) {
        let mut counts = [0.0; WIDTH];
        let mut total = 0.0;
        for (context, ran) in [(context, false), (after_tool(context), true)] {
            if tool.is_some_and(|tool| tool != ran) {
                continue;
            }
            self.workload.transitions.visit(context, |agent, count| {
                counts[self.position(agent)] += count as f32;
                total += count as f32;
            });
        }
        (counts, total)
    }

    /// P(`target` is reached for the first time at the i-th next call), starting after (`prev`, `last`), at which the session
    /// stands now or may stand later.
    fn passage(&mut self, prev: usize, last: usize, target: usize, stands: bool) -> [f32; STEPS] {
        let n = self.agents.len();
        let mut passage = [0.0; STEPS];
        let mut now: States = [0.0; WIDTH * WIDTH];
        now[prev * WIDTH + last] = 1.0;
        for (step, reached) in passage.iter_mut().enumerate() {
            let mut next: States = [0.0; WIDTH * WIDTH];
            for before in 0..=n {
                for at in 0..=n {
                    let mass = now[before * WIDTH + at];
                    if mass < NEGLIGIBLE {
                        continue;
                    }
                    let row = if stands && step == 0 { self.first_row(before, at) } else { self.row(before, at) };
                    for (to, p) in next[at * WIDTH..][..WIDTH].iter_mut().zip(&row) {
                        *to += mass * p;
                    }
                }
            }
            for at in 0..=n {
                *reached += std::mem::take(&mut next[at * WIDTH + target]);
            }
            now = next;
        }
        passage
    }

    /// The weights of every lane of a session that stands after (`prev`, `last`).
    pub(crate) fn weights(&mut self, prev: u16, last: u16) -> [Weights; LANES] {
        let (prev, last) = (self.position(prev), self.position(last));
        let mut weights = [Weights::default(); LANES];
        for lane in 0..self.agents.len() {
            let first = self.passage(prev, last, lane, true);
            let again = if lane == last && self.tool.is_none() { first } else { self.passage(last, lane, lane, false) };
            let second = convolve(&first, &again);
            weights[lane] = Weights([first, second, convolve(&second, &again)]);
        }
        weights
    }

    /// The weights of each of `n` lanes that are not among the session's [`LANES`]: as much of "another agent" as of any
    /// other of them, or as an agent that is new has.
    pub(crate) fn weights_of_others(&mut self, prev: u16, last: u16, n: usize) -> Weights {
        let mut marginals = [[0.0; WIDTH]; STEPS];
        self.marginals(prev, last, &mut marginals);
        let (share, mut left) = (1.0 / (n as f32 + 1.0), 1.0);
        let first = marginals.map(|row| {
            let reached = left * share * row[self.agents.len()];
            left -= reached;
            reached
        });
        let second = convolve(&first, &first);
        Weights([first, second, convolve(&second, &first)])
    }

    /// P(the i-th next call is the lane's), by lane and "another agent", for i = 1..=`out.len()`.
    pub(crate) fn marginals(&mut self, prev: u16, last: u16, out: &mut [Row]) {
        let n = self.agents.len();
        let mut now: States = [0.0; WIDTH * WIDTH];
        now[self.position(prev) * WIDTH + self.position(last)] = 1.0;
        for (i, step) in out.iter_mut().enumerate() {
            let mut next: States = [0.0; WIDTH * WIDTH];
            for before in 0..=n {
                for at in 0..=n {
                    let mass = now[before * WIDTH + at];
                    if mass < 4.0 * NEGLIGIBLE {
                        continue;
                    }
                    let row = if i == 0 { self.first_row(before, at) } else { self.row(before, at) };
                    for (to, p) in next[at * WIDTH..][..WIDTH].iter_mut().zip(&row) {
                        *to += mass * p;
                    }
                }
            }
            *step = [0.0; WIDTH];
            for from in next.chunks_exact(WIDTH) {
                for (sum, p) in step.iter_mut().zip(from) {
                    *sum += p;
                }
            }
            now = next;
        }
    }
}

/// One step of the back-off: `row` is the prior and becomes the posterior.
fn refine(row: &mut Row, n: usize, (counts, total): (Row, f32), kappa: f32) {
    for lane in 0..=n {
        row[lane] = (counts[lane] + kappa * row[lane]) / (total + kappa);
    }
}

fn convolve(a: &[f32; STEPS], b: &[f32; STEPS]) -> [f32; STEPS] {
    let mut out = [0.0; STEPS];
    for i in 1..STEPS {
        out[i] = (0..i).map(|j| a[j] * b[i - j - 1]).sum();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycle(workload: &Workload, agents: &[u16], rounds: usize) {
        let mut previous = AgentId::UNKNOWN;
        let mut last = AgentId(agents[agents.len() - 1]);
        for &agent in agents.iter().cycle().take(agents.len() * rounds) {
            workload.transitions.add(context_of_two(previous, last), agent);
            workload.transitions.add(context_of(last), agent);
            previous = last;
            last = AgentId(agent);
        }
    }

    #[test]
    fn a_cycle_is_walked_in_order() {
        let workload = Workload::default();
        cycle(&workload, &[0, 1, 2], 100);
        let config = Config::default();
        let agents = [2, 1, 0];
        let mut chain = Chain::new(&workload, &config, &agents, None);
        let weights = chain.weights(1, 2);
        // After 2 comes 0 (position 2), then 1 (position 1), then 2 itself.
        assert!(weights[2].0[0][0] > 0.9, "{:?}", weights[2]);
        assert!(weights[1].0[0][1] > 0.85, "{:?}", weights[1]);
        assert!(weights[0].0[0][2] > 0.8, "{:?}", weights[0]);
        // And again three calls later.
        assert!(weights[2].0[1][3] > 0.6, "{:?}", weights[2]);
    }

    #[test]
    fn agents_that_spoke_long_ago_share_what_is_left() {
        let workload = Workload::default();
        cycle(&workload, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 50);
        let config = Config::default();
        // 9 has spoken last; 0, 1 and 2, which come next, are not among the seven most recent.
        let mut chain = Chain::new(&workload, &config, &[9, 8, 7, 6, 5, 4, 3], None);
        let others = chain.weights_of_others(8, 9, 3).0[0];
        assert!((0.2..0.3).contains(&others[0]), "{others:?}");
        assert!((0.35..0.75).contains(&others[..3].iter().sum::<f32>()), "{others:?}");
    }

    #[test]
    fn an_agent_that_has_not_been_called_yet_is_expected_in_its_turn() {
        let workload = Workload::default();
        cycle(&workload, &[0, 1, 2, 3], 100);
        let config = Config::default();
        // 0 and 1 have been called; of 2 and 3 a session on the same task is known to have called them.
        let mut chain = Chain::new(&workload, &config, &[1, 0, 2, 3], None).of_lanes(2);
        let weights = chain.weights(0, 1);
        assert!(weights[2].0[0][0] > 0.9 && weights[3].0[0][1] > 0.85, "{weights:?}");
        // Where nothing is known of who follows, both share what new agents have.
        let nobody = Workload::default();
        let mut chain = Chain::new(&nobody, &config, &[1, 0, 2, 3], None).of_lanes(2);
        let row = chain.row(1, 0);
        assert!(row[2] == row[3] && row[3] == row[4] && row[2] < row[0], "{row:?}");
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 0.01, "{row:?}");
    }

    #[test]
    fn whether_a_tool_runs_tells_who_speaks_next() {
        let workload = Workload::default();
        // After 0 comes 0 where it has called a tool, else 1.
        for _ in 0..50 {
            for (context, next) in [(after_tool(context_of(AgentId(0))), 0), (context_of(AgentId(0)), 1)] {
                workload.transitions.add(context, next);
            }
        }
        let config = Config::default();
        let next = |config, tool| Chain::new(&workload, config, &[0, 1], tool).weights(1, 0)[0].0[0][0];
        assert!(next(&config, Some(true)) > 0.9 && next(&config, Some(false)) < 0.1);
        let unknown = next(&config, None);
        assert!((0.4..0.6).contains(&unknown), "{unknown}");
        let off = Config { tool_order: false, ..config };
        assert!((next(&off, Some(true)) - unknown).abs() < 1e-6);
    }

    #[test]
    fn rows_are_distributions() {
        let workload = Workload::default();
        cycle(&workload, &[0, 1, 0, 2, 5], 20);
        let config = Config::default();
        let agents = [5, 0, 1];
        let mut chain = Chain::new(&workload, &config, &agents, None);
        for prev in 0..=3 {
            for last in 0..=3 {
                let sum: f32 = chain.row(prev, last).iter().sum();
                assert!((sum - 1.0).abs() < 0.1, "{prev} {last} {sum}");
            }
        }
    }
}
