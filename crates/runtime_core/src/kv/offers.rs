//! Does it pay to bring blocks back from a lower tier ahead of their use?
//!
//! An offer says that an agent of a session is likely to call next. Its *kind* is that probability, in steps of 1/20 from
//! 0.6. Whoever could bring blocks back on it says which, and every offer is a *trial*, whether it is taken or not: four
//! of the blocks are remembered, and the session's next call tells how far they came again. Nothing has to be moved to
//! know that. Whether they would have been there still is judged by what went meanwhile: if anything worth more did, they
//! would have gone too. A kind pays as long as its trials say so and the blocks that were indeed brought back on it do
//! not say otherwise,
//!
//! ```text
//! (kept + 0.5 V) / (missing + V) >= 0.6                 blocks of trials,             V = half a pool
//! (used + 0.65 W) / (used + wasted + W) >= 0.6          blocks that were brought back, W = two pools
//! ```
//!
//! V and W at least 64 blocks: nothing moves before trials have come true, so what never pays costs nothing; then trials
//! are believed, and soon only what was found. Trials are halved beyond 16 pools and blocks with them: what was learned
//! long ago fades, and where trials go on coming true another attempt is made. 23 kB; nothing here allocates.

/// Kinds of offers.
const KINDS: usize = 8;
/// Probability of the lowest kind, and kinds per unit of probability.
const LOWEST: f32 = 0.6;
const PER_UNIT: f32 = 20.0;
/// Share of blocks brought back that must be used.
const MIN_PRECISION: f64 = 0.6;
/// Of trials and of blocks brought back: what is assumed of them before there were any, and the pools of blocks that
/// this is worth.
const TRIALS_PRIOR: (f64, f64) = (0.5, 0.5);
const BLOCKS_PRIOR: (f64, f64) = (0.65, 2.0);
const LEAST_WEIGHT: f64 = 64.0;
/// Trials of a kind are halved beyond so many pools of blocks.
const FADE_POOLS: f64 = 16.0;
/// Sessions whose trials are remembered, direct-mapped.
const TRIALS: usize = 256;
/// Blocks by which it is told how much of an offer came again.
const MARKS: usize = 4;
/// Questions over which it is remembered what went.
const QUESTIONS: usize = 64;

/// Not brought back on an offer.
pub(crate) const NO_KIND: u8 = 0;

/// Whose blocks: slot and generation of the session, and the agent.
pub(crate) type Whose = (u32, u16, u16);

/// The latest offer of a session.
#[derive(Clone, Copy, Debug)]
struct Trial {
    whose: Whose,
    /// From 1; [`NO_KIND`] once it is judged.
    kind: u8,
    /// Blocks were named, and the session has not called since.
    open: bool,
    /// Blocks that were missing, and some of them: place in the chain and key, the deepest one last.
    missing: u32,
    marks: [(u32, u64); MARKS],
    /// What a block of it was worth when it was looked at last, and the question at which that was.
    score: f32,
    asked: u32,
}

const NO_TRIAL: Trial = Trial {
    whose: (u32::MAX, 0, 0),
    kind: NO_KIND,
    open: false,
    missing: 0,
    marks: [(0, 0); MARKS],
    score: 0.0,
    asked: 0,
};

/// Blocks that were used, and all.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    used: f64,
    all: f64,
}

impl Count {
    fn add(&mut self, used: f64, all: f64) {
        self.used += used;
        self.all += all;
    }

    fn halve(&mut self) {
        *self = Self { used: self.used / 2.0, all: self.all / 2.0 };
    }

    fn suffices(self, (prior, pools): (f64, f64), pool_blocks: f64) -> bool {
        let weight = (pools * pool_blocks).max(LEAST_WEIGHT);
        self.used + prior * weight >= MIN_PRECISION * (self.all + weight)
    }
}

/// Offers made, kept and broken.
#[derive(Debug)]
pub(crate) struct Offers {
    pool_blocks: f64,
    /// Questions so far.
    asked: u32,
    /// Blocks of trials, and blocks brought back, by kind.
    trials: [Count; KINDS],
    blocks: [Count; KINDS],
    /// By session.
    recent: Box<[Trial]>,
    /// The most that a block was worth which went after each of the latest questions.
    gone: [f32; QUESTIONS],
}

impl Offers {
    pub(crate) fn new(pool_blocks: usize) -> Self {
        Self {
            pool_blocks: pool_blocks as f64,
            asked: 0,
            trials: [Count::default(); KINDS],
            blocks: [Count::default(); KINDS],
            recent: vec![NO_TRIAL; TRIALS].into(),
            gone: [0.0; QUESTIONS],
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.recent)
    }

    fn trial(&mut self, slot: u32) -> &mut Trial {
        &mut self.recent[slot as usize % TRIALS]
    }

    /// Another question for offers begins.
    pub(crate) fn ask(&mut self) {
        self.asked = self.asked.wrapping_add(1).max(1);
        self.gone[self.asked as usize % QUESTIONS] = 0.0;
    }

    /// A session's agent comes next with this probability, and holding one of its blocks is worth so much.
    pub(crate) fn found(&mut self, whose: Whose, probability: f32, score: f32) {
        let asked = self.asked;
        let trial = self.trial(whose.0);
        if trial.whose == whose {
            trial.score = score;
        } else if !trial.open {
            *trial = Trial { whose, kind: kind_of(probability) as u8 + 1, score, asked, ..NO_TRIAL };
        }
    }

    /// Whether to bring back what is missing of `chain` behind `resident` blocks. Either way that is a trial.
    pub(crate) fn offered(&mut self, whose: Whose, chain: &[u64], resident: usize) -> bool {
        let asked = self.asked;
        let trial = self.trial(whose.0);
        let missing = chain.len() - resident;
        let Some(kind) = usize::from(trial.kind).checked_sub(1).filter(|_| trial.whose == whose && missing > 0) else {
            return false;
        };
        if !trial.open {
            trial.marks = std::array::from_fn(|i| {
                let at = resident + (missing * (i + 1)).div_ceil(MARKS) - 1;
                (at as u32, chain[at])
            });
            (trial.open, trial.missing, trial.asked) = (true, missing as u32, asked);
        }
        self.trials[kind].suffices(TRIALS_PRIOR, self.pool_blocks)
            && self.blocks[kind].suffices(BLOCKS_PRIOR, self.pool_blocks)
    }

    /// A block went that was worth so much.
    #[inline]
    pub(crate) fn went(&mut self, score: f32) {
        if self.asked > 0 {
            let gone = &mut self.gone[self.asked as usize % QUESTIONS];
            *gone = gone.max(score);
        }
    }

    /// A session calls an agent with this prompt: its trial is over.
    #[inline]
    pub(crate) fn called(&mut self, whose: Whose, prompt: &[u64]) {
        // Who never asks for offers pays nothing.
        if self.asked > 0 {
            self.judge(whose, prompt);
        }
    }

    fn judge(&mut self, whose: Whose, prompt: &[u64]) {
        let trial = *self.trial(whose.0);
        if trial.whose.0 != whose.0 {
            return;
        }
        if trial.open {
            let same = |mark: &&(u32, u64)| prompt.get(mark.0 as usize) == Some(&mark.1);
            let kept = trial.whose == whose && !self.lost(&trial);
            let marks = if kept { trial.marks.iter().take_while(same).count() } else { 0 };
            self.judged(&trial, f64::from(trial.missing) * marks as f64 / MARKS as f64);
        }
        *self.trial(whose.0) = NO_TRIAL;
    }

    /// A session is looked at: the trial that its slot had may be over without a call.
    pub(crate) fn look(&mut self, slot: u32, generation: u16) {
        let trial = *self.trial(slot);
        if !trial.open || trial.whose.0 != slot {
            return;
        }
        let over = trial.whose.1 != generation || self.lost(&trial);
        if over {
            self.judged(&trial, 0.0);
        }
        let asked = self.asked;
        let trial = self.trial(slot);
        trial.asked = asked;
        if over {
            // Not again before the session has called.
            (trial.open, trial.kind) = (false, NO_KIND);
        }
    }

    /// Has anything worth more gone since the trial was looked at?
    fn lost(&self, trial: &Trial) -> bool {
        let since = (self.asked.wrapping_sub(trial.asked) as usize).min(QUESTIONS - 1);
        (0..=since).any(|back| self.gone[(self.asked as usize).wrapping_sub(back) % QUESTIONS] > trial.score)
    }

    fn judged(&mut self, trial: &Trial, used: f64) {
        let kind = usize::from(trial.kind) - 1;
        self.trials[kind].add(used, f64::from(trial.missing));
        if self.trials[kind].all > FADE_POOLS * self.pool_blocks {
            self.trials[kind].halve();
            self.blocks[kind].halve();
        }
    }

    /// The kind of the latest offer of this agent, [`NO_KIND`] where none is remembered.
    pub(crate) fn kind(&self, whose: Whose) -> u8 {
        let trial = &self.recent[whose.0 as usize % TRIALS];
        if trial.whose == whose {
            trial.kind
        } else {
            NO_KIND
        }
    }

    /// Blocks brought back on an offer of this kind were used, or left the pool without.
    #[inline]
    pub(crate) fn resolved(&mut self, kind: u8, blocks: usize, used: bool) {
        if let Some(counts) = usize::from(kind).checked_sub(1).and_then(|kind| self.blocks.get_mut(kind)) {
            counts.add(if used { blocks as f64 } else { 0.0 }, blocks as f64);
        }
    }
}

fn kind_of(probability: f32) -> usize {
    ((probability - LOWEST) * PER_UNIT).clamp(0.0, (KINDS - 1) as f32) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: usize = 1000;
    const WHOSE: Whose = (3, 1, 7);

    fn chain(blocks: u64) -> Vec<u64> {
        (0..blocks).collect()
    }

    /// Offers 100 missing blocks behind 50; the answer.
    fn offer(offers: &mut Offers, whose: Whose, probability: f32) -> bool {
        offers.ask();
        offers.look(whose.0, whose.1);
        offers.found(whose, probability, 1.0);
        offers.offered(whose, &chain(150), 50)
    }

    /// Trials that come true.
    fn prove(offers: &mut Offers, probability: f32, trials: usize) {
        for _ in 0..trials {
            offer(offers, WHOSE, probability);
            offers.called(WHOSE, &chain(200));
        }
    }

    fn trials(offers: &Offers, probability: f32) -> (f64, f64) {
        let count = offers.trials[kind_of(probability)];
        (count.used, count.all)
    }

    #[test]
    fn nothing_is_brought_back_before_trials_of_its_kind_have_come_true() {
        let mut offers = Offers::new(POOL);
        assert!(!offer(&mut offers, WHOSE, 0.9));
        prove(&mut offers, 0.9, 3);
        assert!(offer(&mut offers, WHOSE, 0.9));
        offers.called(WHOSE, &[]);
        assert!(!offer(&mut offers, WHOSE, 0.7), "the others still have to");
    }

    #[test]
    fn what_never_comes_true_is_never_brought_back() {
        let mut offers = Offers::new(POOL);
        for call in 0..10_000 {
            assert!(!offer(&mut offers, WHOSE, 0.9));
            match call % 3 {
                // Another agent, another prompt, and blocks that would have been evicted.
                0 => offers.called((WHOSE.0, WHOSE.1, 8), &chain(200)),
                1 => offers.called(WHOSE, &chain(60)),
                _ => {
                    offers.went(2.0);
                    offers.called(WHOSE, &chain(200));
                }
            }
        }
        let (used, all) = trials(&offers, 0.9);
        assert!(used == 0.0 && all > 1000.0);
    }

    #[test]
    fn a_prompt_that_comes_again_in_part_counts_in_part() {
        let mut offers = Offers::new(POOL);
        offer(&mut offers, WHOSE, 0.9);
        let mut prompt = chain(150);
        prompt[110..].iter_mut().for_each(|key| *key += 1000);
        offers.called(WHOSE, &prompt);
        assert_eq!(trials(&offers, 0.9), (50.0, 100.0));
    }

    #[test]
    fn what_is_worth_more_may_stay_or_go_before_the_offer_but_not_after() {
        for (before, after, kept) in [(9.0, 0.5, 100.0), (0.5, 0.5, 100.0), (0.5, 9.0, 0.0)] {
            let mut offers = Offers::new(POOL);
            offers.ask();
            offers.went(before);
            offer(&mut offers, WHOSE, 0.9);
            // Asked so often that what went first would be forgotten, were it not looked at.
            for _ in 0..2 * QUESTIONS {
                offers.went(after);
                offer(&mut offers, WHOSE, 0.9);
            }
            offers.called(WHOSE, &chain(200));
            assert_eq!(trials(&offers, 0.9), (kept, 100.0), "{before} before, {after} after");
        }
    }

    #[test]
    fn a_session_that_never_calls_again_has_broken_its_promise_when_its_slot_is_reused() {
        let mut offers = Offers::new(POOL);
        offer(&mut offers, WHOSE, 0.9);
        let next = (WHOSE.0, WHOSE.1 + 1, WHOSE.2);
        offer(&mut offers, next, 0.9);
        assert_eq!(trials(&offers, 0.9), (0.0, 100.0));
    }

    #[test]
    fn blocks_brought_back_in_vain_outweigh_trials_until_both_fade() {
        let mut offers = Offers::new(POOL);
        prove(&mut offers, 0.9, 10);
        assert!(offer(&mut offers, WHOSE, 0.9));
        let kind = offers.kind(WHOSE);
        offers.resolved(kind, 200, false);
        offers.called(WHOSE, &chain(200));
        assert!(!offer(&mut offers, WHOSE, 0.9));
        offers.called(WHOSE, &chain(200));
        prove(&mut offers, 0.9, 20 * POOL / 100);
        assert!(offer(&mut offers, WHOSE, 0.9), "another attempt");
    }

    #[test]
    fn of_what_is_wasted_each_time_less_than_a_pool_is_tried() {
        let mut offers = Offers::new(POOL);
        let (mut moved, mut offered) = (0, 0);
        for _ in 0..10_000 {
            offered += 100;
            if offer(&mut offers, WHOSE, 0.9) {
                moved += 100;
                let kind = offers.kind(WHOSE);
                offers.resolved(kind, 100, false);
            }
            offers.called(WHOSE, &chain(200));
        }
        assert!(moved * 50 < offered, "{moved} of {offered} blocks moved although none was used");
    }

    #[test]
    fn what_was_never_offered_teaches_nothing() {
        let mut offers = Offers::new(POOL);
        assert!(!offers.offered(WHOSE, &chain(150), 50), "nobody was found");
        offers.called(WHOSE, &chain(150));
        offers.resolved(NO_KIND, 1_000_000, false);
        assert_eq!(offers.kind(WHOSE), NO_KIND);
        prove(&mut offers, 0.9, 3);
        assert!(offer(&mut offers, WHOSE, 0.9));
    }

    #[test]
    fn counts_fade() {
        let mut offers = Offers::new(POOL);
        prove(&mut offers, 0.9, 10_000);
        assert!(trials(&offers, 0.9).1 <= FADE_POOLS * POOL as f64);
        let mut wrong = 0;
        while offer(&mut offers, WHOSE, 0.9) {
            offers.called(WHOSE, &[]);
            wrong += 1;
        }
        assert!(wrong < 16 * POOL / 100, "that many pools in vain outweigh the whole past: {wrong}");
    }
}
