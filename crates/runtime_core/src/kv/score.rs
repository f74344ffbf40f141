//! What a leaf is worth: what is expected of its owner, of the owner's kin and of all others, brought together by
//! `density.rs`; and its place in the victim queue by that.

use super::chain::{LANES, STEPS};
use super::density::{self, Foreign};
use super::followers::KIN;
use super::index::{Segment, NONE};
use super::lanes::Lane;
use super::workload::{Sessions, Workload, Workloads};
use super::{odds, KvCache};

impl KvCache {
    /// Scores a leaf whose session's view is loaded, or that is nobody's, and queues it accordingly.
    pub(super) fn score_leaf(&mut self, segment: u32, workload: &Workload) {
        self.refresh_curves(self.index.seg(segment).lane, workload);
        let score = self.score(segment, self.index.seg(segment), workload, self.horizon_s());
        self.queue_scored(segment, score);
    }

    pub(super) fn score_exposed(&mut self, workloads: &Workloads, sessions: &Sessions, segment: u32) {
        let x = self.index.seg(segment);
        let (lane, own_score) = (x.lane, x.own_score());
        if let Some(score) = own_score.filter(|_| !self.is_nobodys(lane)) {
            self.mark(self.lanes[lane as usize].session);
            return self.queue_scored(segment, score);
        }
        self.queue_unscored(segment);
        if let Some(workload) = workloads.get(self.workload_of(lane) as usize) {
            if !self.is_nobodys(lane) {
                self.look(workload, sessions, self.lanes[lane as usize].session);
            }
            self.score_leaf(segment, workload);
        }
    }

    /// The horizon of decisions; none with hit density.
    pub(super) fn horizon_s(&self) -> Option<f32> {
        (!self.config.density).then_some(self.residence_s())
    }

    /// Queues a leaf by its score.
    fn queue_scored(&mut self, segment: u32, score: f32) {
        let bucket = density::bucket(score);
        if self.index.seg(segment).bucket != bucket {
            self.index.dequeue(segment);
            self.index.enqueue(segment, bucket);
        }
        // What keeps a leaf keeps everything above it.
        self.index.publish_score(segment, score);
        let mut above = self.index.parent_segment(segment);
        while above != NONE && self.index.published_score(above) < score {
            self.index.publish_score(above, score);
            above = self.index.parent_segment(above);
        }
    }

    /// Hits per second of holding the segment; with a horizon, P(use within it).
    pub(super) fn score(&self, segment: u32, x: &Segment, workload: &Workload, horizon_s: Option<f32>) -> f32 {
        let lane = &self.lanes[x.lane as usize];
        let mut first_use = [0.0; STEPS];
        let weights = match self.view.lanes[..self.view.n].iter().position(|&l| l == x.lane) {
            Some(i) => Some(&self.view.weights[i]),
            None if self.view.n == LANES && lane.session == self.view.slot && lane.session != NONE => {
                Some(&self.view.others)
            }
            None => None,
        };
        if let Some(weights) = weights {
            // A call of the lane that waits will pass over what it does not await.
            let passed = u32::from(self.view.waiting == Some(lane.agent));
            let misses = lane.calls.wrapping_sub(x.touch_call) + passed;
            let rates = workload.content.rates(lane.agent, misses, x.class, &self.config);
            let [first, second, third] = weights.0;
            // Where the lane calls last, it may be called again at once; else others will have been called since.
            let calls_last = match self.view.waiting {
                Some(agent) => agent == lane.agent,
                None => self.tenants[lane.session as usize].calls == lane.at,
            };
            let at_once = if calls_last { first[0] } else { 0.0 };
            let calls = first.iter().sum::<f32>().max(1e-6);
            let odds = |misses| workload.odds.of_block(misses, x.depth, lane.prompt_len, x.degree, &self.config);
            let now = odds(misses);
            let then = if misses == 0 { odds(1) } else { now };
            let since = self.tenants[lane.session as usize].calls.wrapping_sub(lane.at);
            let mut used = 0.0;
            for (i, use_then) in (0u16..).zip(&mut first_use) {
                let habit = match misses {
                    0 => workload.odds.of_habit(lane.habit, since.saturating_add(i), &self.config),
                    _ => 1.0,
                };
                let rate = |rate| odds::adjusted(rate, now * habit);
                let once = if i == 0 { at_once } else { 0.0 };
                *use_then = rate(rates.later) * (first[usize::from(i)] - once) + rate(rates.at_once) * once;
                used += *use_then;
            }
            let missed = 1.0 - used / calls;
            let second_rate = odds::adjusted(rates.second, then);
            let (b, c) = (missed * second_rate, missed * (1.0 - second_rate) * odds::adjusted(rates.third, then));
            for i in 0..STEPS {
                first_use[i] += b * second[i] + c * third[i];
            }
        }
        let owner = self.owner(x);
        let mut foreign = Foreign::Learned {
            curve: self.curves(x.lane).of(owner.group()),
            risk: workload.sharing.risk(owner, &self.config),
            age_s: x.had_s(self.now_us),
        };
        if self.config.oracle.any() {
            self.foretold(segment, lane, &mut first_use, &mut foreign);
        }
        let mut used = [[0.0; STEPS]; KIN];
        // Nobody's leaves are scored beside whatever session's view is loaded.
        let kin = if lane.session == self.view.slot { &self.view.kin[..] } else { &[] };
        for (kin, used) in kin.iter().zip(&mut used) {
            if let Some(i) = kin.agents[..kin.n].iter().position(|&agent| agent == lane.agent) {
                let (calls, weights) = (kin.calls[i], &kin.weights[i]);
                *used = workload.followers.first_use(x.degree > 1, x.ordinal, lane.agent, calls, kin.since, weights);
            }
        }
        let followed = kin.iter().map(|kin| &kin.times).zip(&used);
        let score = density::score(&self.view.times, &first_use, &foreign, followed, horizon_s);
        let score = if self.config.sabotage { (1e3 * score).recip() } else { score };
        // What is awaited is worth one hit after that time, whatever else may happen.
        let awaited = |wait_s: f32| match horizon_s {
            None => wait_s.recip(),
            Some(horizon_s) => density::waited(horizon_s / wait_s),
        };
        self.queue.wait_s(x.awaited.0).map_or(score, |wait_s| score.max(awaited(wait_s)))
    }

    fn foretold(&self, segment: u32, lane: &Lane, first_use: &mut [f32; STEPS], foreign: &mut Foreign<'_>) {
        let hint = self.hints[segment as usize];
        if self.config.oracle.content {
            *first_use = [0.0; STEPS];
            // All lanes of the session together have made as many calls as the session.
            let mut steps = 0;
            let mut other = if lane.session == NONE { NONE } else { self.tenants[lane.session as usize].lanes };
            while other != NONE {
                steps += self.lanes[other as usize].calls;
                other = self.lanes[other as usize].next;
            }
            if hint.next_step != u32::MAX && hint.next_step >= steps {
                first_use[((hint.next_step - steps) as usize).min(STEPS - 1)] = 1.0;
            }
        }
        if self.config.oracle.sharing {
            *foreign = Foreign::At(if hint.shared_us == u64::MAX {
                f32::INFINITY
            } else {
                hint.shared_us.saturating_sub(self.now_us) as f32 / 1e6
            });
        }
    }
}
