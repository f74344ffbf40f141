//! Never worse than LRU for long: a shadow LRU beside the pool, and the rule by which it takes over.
//!
//! The shadow holds keys only; of larger pools a quarter of them, by hash, and it serves a sample of the sessions, with as
//! much of the capacity as that is of all blocks (Waldspurger 2015). Few sessions are served all: where half of 16 sessions
//! are sampled, what these lose by chance is taken for a loss. For each sampled call the guard compares what the pool really held with what the shadow
//! would have.
//!
//! # Rule and bound
//!
//! D sums the pool's hits minus the shadow's, in prompts, and is cut off above at +[`CREDIT`] (a CUSUM, Page 1954).
//! A prompt is as long as that of which a block is part on average, sum of squares over sum of lengths: where few prompts
//! hold most blocks, one of these is no evidence. Below -M the pool evicts least recently used first for T sampled calls; then
//! the learned order gets another chance, with D = 0. T starts at [`PENALTY`] and doubles with every relapse. M is
//! [`MARGIN`], less what all phases of trust together have lost, but at least [`LEAST_MARGIN`]: who has lost is believed
//! less. T and that record are forgotten once a phase of trust has lasted eight times as long.
//!
//! Hence a phase of trust loses at most `MARGIN + CREDIT` prompts (plus one) of what it may have won, whatever the learned
//! order does; and what all phases lose to the shadow is at most `MARGIN`, and `LEAST_MARGIN` for each phase that starts in
//! debt, plus one prompt each. Among n sampled calls there are at most log2(1 + n / PENALTY) + 1 phases: O(log n)
//! prompts in all. A loss that goes on is always found, however small it is per call, since D does not fade.

use super::index::NONE;
use super::shadow::Shadow;
use crate::ids::mix;

/// Prompts lost before LRU takes over; and where nearly as many have been lost before.
const MARGIN: f32 = 7.5;
const LEAST_MARGIN: f32 = 2.0;
/// Prompts won that count against later losses.
const CREDIT: f32 = 4.0;
/// Sampled calls that LRU serves the first time.
const PENALTY: u32 = 1024;
/// Blocks that the shadow holds at most.
const MOST_BLOCKS: usize = 1 << 14;
/// In pools with more blocks than that it holds one block of 2^2, by hash: hits are compared in these, of the same calls.
const SPARSE: u32 = 2;
/// Where the shadow holds a call of which it holds no block yet.
const ROOT: u32 = NONE - 2;

/// The shadow, and who is in charge.
#[derive(Debug)]
pub(crate) struct Guard {
    shadow: Shadow,
    /// Sessions whose hash is at most this are sampled; which share of all blocks the shadow's are.
    sampled: u64,
    share: f64,
    /// Blocks of which one is sampled.
    stride: f32,
    /// Blocks that the pool holds when it is full, as far as the index knows of them.
    full: f64,
    /// Mean blocks of a prompt and of their square, over the last of these, at most 64.
    prompts: u32,
    prompt: f32,
    square: f32,
    /// D; and prompts won by all earlier phases of trust together.
    won: f32,
    record: f32,
    /// Prompts won in this phase, not cut off.
    phase: f32,
    /// Sampled calls left under LRU, 0 while the learned order is trusted.
    left: u32,
    penalty: u32,
    /// Sampled calls of this phase of trust.
    trusted: u32,
    /// Times that LRU has taken over.
    pub(crate) takeovers: u64,
}

impl Guard {
    pub(crate) fn new(pool_blocks: usize) -> Self {
        let sparse = if pool_blocks > MOST_BLOCKS { SPARSE } else { 0 };
        let blocks = pool_blocks.div_ceil(1 << sparse).min(MOST_BLOCKS);
        let sessions = ((blocks << sparse) as f64 / pool_blocks as f64).min(1.0);
        Self {
            shadow: Shadow::new(blocks, sparse),
            sampled: (sessions * u64::MAX as f64) as u64,
            share: sessions / (1 << sparse) as f64,
            stride: (1 << sparse) as f32,
            full: 0.0,
            prompts: 0,
            prompt: 0.0,
            square: 0.0,
            won: 0.0,
            record: 0.0,
            phase: 0.0,
            left: 0,
            penalty: PENALTY,
            trusted: 0,
            takeovers: 0,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.shadow.bytes()
    }

    /// The pool needs room while it holds `resident` blocks: an engine that keeps some for itself, or evicts before it is
    /// full, leaves an LRU no more than that either.
    pub(crate) fn pressed(&mut self, resident: usize) {
        self.full = (resident as f64).max(0.99 * self.full);
        self.shadow.limit((self.full * self.share).ceil() as usize);
    }

    /// Whether the learned order is in charge.
    pub(crate) fn trusts(&self) -> bool {
        self.left == 0
    }

    /// Forgets the blocks, not the verdict.
    pub(crate) fn clear(&mut self) {
        self.shadow.clear();
    }

    fn samples(&self, session: u64) -> bool {
        mix(session ^ 0x5A3D) <= self.sampled
    }

    /// A call starts of which the pool held `hit` leading blocks. Returns where the shadow holds it until
    /// [`Guard::ended`].
    pub(crate) fn started(&mut self, session: u64, keys: &[u64], hit: usize) -> u32 {
        let mut tail = NONE;
        if !keys.is_empty() && self.samples(session) {
            let found = self.shadow.hold(keys, &mut tail);
            let hit = self.shadow.sampled(&keys[..hit]);
            self.prompts = (self.prompts + 1).min(64);
            let (len, share) = (keys.len() as f32, 1.0 / self.prompts as f32);
            self.prompt += (len - self.prompt) * share;
            self.square += (len * len - self.square) * share;
            self.judge((hit as f32 - found as f32) * self.stride * self.prompt / self.square);
            if tail == NONE {
                tail = ROOT;
            }
        }
        tail
    }

    /// The answer of a call.
    pub(crate) fn answered(&mut self, keys: &[u64], tail: &mut u32) {
        let mut from = if *tail == ROOT { NONE } else { *tail };
        if *tail != NONE {
            self.shadow.hold(keys, &mut from);
        }
        if from != NONE {
            *tail = from;
        }
    }

    /// A call has ended.
    pub(crate) fn ended(&mut self, tail: u32) {
        if tail != ROOT {
            self.shadow.release(tail);
        }
    }

    fn judge(&mut self, won: f32) {
        if self.left > 0 {
            self.left -= 1;
            return;
        }
        self.trusted = self.trusted.saturating_add(1);
        if self.trusted >= self.penalty.saturating_mul(8) {
            (self.penalty, self.record) = (PENALTY, 0.0);
        }
        self.won = (self.won + won).min(CREDIT);
        self.phase += won;
        if self.won < -(MARGIN + self.record).clamp(LEAST_MARGIN, MARGIN) {
            self.takeovers += 1;
            self.record += self.phase;
            (self.left, self.won, self.phase, self.trusted) = (self.penalty, 0.0, 0.0, 0);
            self.penalty = self.penalty.saturating_mul(2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(prompt: u64) -> Vec<u64> {
        (0..10).map(|i| 1 + prompt * 10 + i).collect()
    }

    fn call(guard: &mut Guard, prompt: u64, hit: usize) {
        let tail = guard.started(prompt, &keys(prompt), hit);
        guard.ended(tail);
    }

    #[test]
    fn the_shadow_is_an_lru() {
        let mut guard = Guard::new(1000);
        // Eighty prompts of ten blocks fit; a hundred and thirty do not.
        for (prompts, expected) in [(80, 0.95..1.01), (130, -0.01..0.05)] {
            guard.clear();
            let mut won = 0.0;
            for round in 0..4 {
                for prompt in 0..prompts {
                    guard.won = 0.0;
                    call(&mut guard, prompt, 0);
                    won += if round > 0 { -guard.won } else { 0.0 };
                    (guard.left, guard.penalty) = (0, PENALTY);
                }
            }
            let rate = won / (3 * prompts) as f32;
            assert!(expected.contains(&rate), "{prompts} prompts: {rate}");
        }
    }

    #[test]
    fn a_quarter_of_the_blocks_of_a_larger_pool_tells_the_same() {
        let mut guard = Guard::new(20_000);
        let call = |guard: &mut Guard, prompt: u64, hit: usize| {
            let keys: Vec<u64> = (0..100).map(|i| 1 + prompt * 100 + i).collect();
            let mut shadow = guard.started(prompt, &keys[..80], hit);
            guard.answered(&keys[80..], &mut shadow);
            guard.ended(shadow);
        };
        // A hundred and eighty prompts of a hundred blocks fit; two hundred and twenty do not.
        for (prompts, expected) in [(180, 0.98..1.02), (220, -0.02..0.02)] {
            guard.clear();
            let mut lost = 0.0;
            for round in 0..4 {
                for prompt in 0..prompts {
                    guard.won = 0.0;
                    call(&mut guard, prompt, 0);
                    lost += if round > 0 { -guard.won } else { 0.0 };
                    (guard.left, guard.penalty) = (0, PENALTY);
                    // What the pool has is seen as well.
                    guard.won = 0.0;
                    call(&mut guard, prompt, 80);
                    assert!(guard.won.abs() < 1e-6);
                }
            }
            let rate = lost / (3 * prompts) as f32;
            assert!(expected.contains(&rate), "{prompts} prompts: {rate}");
        }
    }

    #[test]
    fn a_pool_that_never_hits_is_overruled_soon_and_tried_again_ever_more_rarely() {
        let mut guard = Guard::new(1000);
        let mut trusted = 0;
        for number in 0..100_000u64 {
            trusted += u64::from(guard.trusts());
            call(&mut guard, number % 20, 0);
        }
        // log2(1 + 100,000 / 1024) + 1 phases, each of at most 13 prompts lost, and the first round.
        assert!((20..=130).contains(&trusted), "{trusted} calls were entrusted to a policy that loses them all");
        assert!((5..=8).contains(&guard.takeovers), "{} takeovers", guard.takeovers);
    }

    #[test]
    fn a_small_loss_that_goes_on_is_found_and_a_winner_is_left_alone() {
        let (mut loser, mut winner) = (Guard::new(1000), Guard::new(1000));
        for number in 0..10_000u64 {
            // One block of a prompt in ten calls less, or more, than the shadow.
            let differs = usize::from(number % 10 == 0);
            call(&mut loser, number % 20, 10 - differs);
            call(&mut winner, number % 200, differs);
        }
        assert!(loser.takeovers >= 1);
        assert_eq!(winner.takeovers, 0);
    }

    #[test]
    fn who_has_lost_before_is_overruled_sooner_and_who_has_won_is_not() {
        let mut guard = Guard::new(1000);
        // Calls entrusted to a policy that loses one prompt each, until LRU takes over.
        let lose = |guard: &mut Guard| {
            (guard.left, guard.trusted) = (0, 0);
            (0..100)
                .take_while(|_| {
                    guard.judge(-1.0);
                    guard.trusts()
                })
                .count()
        };
        assert_eq!([lose(&mut guard), lose(&mut guard), lose(&mut guard)], [7, 2, 2]);
        guard.left = 0;
        (0..40).for_each(|_| guard.judge(1.0));
        // What was won before the end of this phase, but for the credit, counts for the next one.
        assert_eq!([lose(&mut guard), lose(&mut guard)], [6, 7]);
    }

    #[test]
    fn few_prompts_that_hold_most_blocks_are_no_evidence() {
        let mut guard = Guard::new(100_000);
        let long: Vec<u64> = (1..=10_000).collect();
        // Nine prompts of ten blocks, then one of ten thousand that LRU has and the pool has not.
        for round in 0..5 {
            (0..9).for_each(|prompt| call(&mut guard, 10_000 + prompt, 10));
            let tail = guard.started(1, &long, 0);
            guard.ended(tail);
            assert!(guard.trusts(), "after {round} of the long prompts were lost");
        }
    }

    #[test]
    fn a_pool_that_cannot_be_filled_leaves_the_shadow_no_more() {
        let mut guard = Guard::new(1000);
        for number in 0..20_000u64 {
            guard.pressed(100);
            // Eleven prompts of ten blocks in turn: an LRU of a hundred blocks hits none of them, one of a thousand all.
            call(&mut guard, number % 11, 0);
        }
        assert_eq!(guard.takeovers, 0);
    }

    #[test]
    fn a_large_pool_is_sampled() {
        let mut guard = Guard::new(1 << 20);
        assert!(guard.bytes() <= 33 * 16 * 1024);
        let sampled = (0..10_000).filter(|&session| guard.samples(session)).count();
        assert!((500..750).contains(&sampled), "{sampled}");
        for number in 0..200_000u64 {
            call(&mut guard, number % 2_000, 10);
        }
        assert!(guard.trusts());
    }
}
