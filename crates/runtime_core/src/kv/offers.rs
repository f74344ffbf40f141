//! Does it pay to bring blocks back from a lower tier ahead of their use?
//!
//! An offer says that an agent of a session is likely to call next. Its *kind* is that probability, in steps of 1/20 from
//! 0.6. Of the blocks brought back on offers of a kind it is counted how many a call then used and how many left the pool
//! without. A kind pays as long as
//!
//! ```text
//! (used + 0.65 W) / (used + wasted + W) >= 0.6,     W = two pools, at least 64 blocks
//! ```
//!
//! that is: at first it is trusted, and soon only what was learned counts. Both counts are halved now and then, so what
//! was learned long ago fades. A kind that does not pay is offered at every 256th question only, so that a workload that
//! has changed is noticed. 600 bytes; nothing here allocates.

/// Kinds of offers.
const KINDS: usize = 8;
/// Probability of the lowest kind, and kinds per unit of probability.
const LOWEST: f32 = 0.6;
const PER_UNIT: f32 = 20.0;
/// Share of blocks brought back that must be used.
const MIN_PRECISION: f32 = 0.6;
/// What is assumed of a kind that was never tried.
const PRIOR_PRECISION: f32 = 0.65;
/// Every so many questions, what does not pay is tried.
const RETRY: u32 = 256;
/// Counts of a kind are halved beyond so many pools.
const FADE_POOLS: u64 = 16;
/// Offers that are remembered until their blocks are back.
const RECENT: usize = 64;

/// Not brought back on an offer.
pub(crate) const NO_KIND: u8 = 0;

/// Offers made, kept and broken.
#[derive(Debug)]
pub(crate) struct Offers {
    pool_blocks: u64,
    asked: u32,
    /// Blocks by kind: used, left unused.
    counts: [[u64; 2]; KINDS],
    /// Session slot, agent and kind of recent offers, a ring.
    recent: [(u32, u16, u8); RECENT],
    next: usize,
}

impl Offers {
    pub(crate) fn new(pool_blocks: usize) -> Self {
        Self {
            pool_blocks: pool_blocks as u64,
            asked: 0,
            counts: [[0; 2]; KINDS],
            recent: [(u32::MAX, 0, NO_KIND); RECENT],
            next: 0,
        }
    }

    /// Another question for offers begins.
    pub(crate) fn ask(&mut self) {
        self.asked = self.asked.wrapping_add(1);
    }

    /// Whether to offer now what comes with this probability.
    pub(crate) fn pays(&self, probability: f32) -> bool {
        let [used, wasted] = self.counts[kind_of(probability)].map(|n| n as f32);
        let weight = (self.pool_blocks * 2).max(64) as f32;
        let kept = used + PRIOR_PRECISION * weight;
        kept >= MIN_PRECISION * (used + wasted + weight) || self.asked % RETRY == 0
    }

    /// Remembers an offer.
    pub(crate) fn made(&mut self, slot: u32, agent: u16, probability: f32) {
        self.recent[self.next] = (slot, agent, kind_of(probability) as u8 + 1);
        self.next = (self.next + 1) % RECENT;
    }

    /// The kind of the latest offer of this agent, [`NO_KIND`] where none is remembered.
    pub(crate) fn kind(&self, slot: u32, agent: u16) -> u8 {
        let latest = (1..=RECENT).map(|back| self.recent[(self.next + RECENT - back) % RECENT]);
        latest.into_iter().find(|offer| (offer.0, offer.1) == (slot, agent)).map_or(NO_KIND, |offer| offer.2)
    }

    /// Blocks brought back on an offer of this kind were used, or left the pool without.
    pub(crate) fn resolved(&mut self, kind: u8, blocks: usize, used: bool) {
        let Some(counts) = usize::from(kind).checked_sub(1).and_then(|kind| self.counts.get_mut(kind)) else { return };
        counts[usize::from(!used)] += blocks as u64;
        if counts[0] + counts[1] > FADE_POOLS * self.pool_blocks {
            *counts = counts.map(|n| n / 2);
        }
    }
}

fn kind_of(probability: f32) -> usize {
    ((probability - LOWEST) * PER_UNIT).clamp(0.0, (KINDS - 1) as f32) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_that_is_wasted_stops_and_the_others_go_on() {
        let mut offers = Offers::new(1000);
        offers.ask();
        assert!(offers.pays(0.7) && offers.pays(0.99), "trusted before it was tried");
        offers.made(3, 1, 0.7);
        offers.resolved(offers.kind(3, 1), 500, false);
        assert!(!offers.pays(0.7) && offers.pays(0.99));
    }

    #[test]
    fn what_does_not_pay_is_tried_now_and_then_and_comes_back() {
        let mut offers = Offers::new(1000);
        offers.made(3, 1, 0.7);
        let kind = offers.kind(3, 1);
        offers.resolved(kind, 500, false);
        let tries = (0..10 * RETRY)
            .filter(|_| {
                offers.ask();
                offers.pays(0.7)
            })
            .count();
        assert_eq!(tries, 10);
        offers.resolved(kind, 2000, true);
        offers.ask();
        assert!(offers.pays(0.7));
    }

    #[test]
    fn the_latest_offer_counts_and_what_was_never_offered_teaches_nothing() {
        let mut offers = Offers::new(1000);
        offers.made(3, 1, 0.7);
        offers.made(3, 1, 0.9);
        assert_eq!(usize::from(offers.kind(3, 1)), kind_of(0.9) + 1);
        assert_eq!(offers.kind(3, 2), NO_KIND);
        offers.resolved(NO_KIND, 1_000_000, false);
        offers.ask();
        assert!((0..=100).all(|percent| offers.pays(percent as f32 / 100.0)));
    }

    #[test]
    fn counts_fade() {
        let mut offers = Offers::new(1000);
        (0..1_000_000).for_each(|_| offers.resolved(1, 100, true));
        assert!(offers.counts[0][0] <= FADE_POOLS * 1000);
        (0..100).for_each(|_| offers.resolved(1, 100, false));
        offers.ask();
        assert!(!offers.pays(LOWEST), "that many pools wasted outweigh the whole past");
    }
}
