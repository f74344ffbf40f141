//! Has the order of agents changed? Two moving shares of right guesses, a quick one and a slow one.
//!
//! Counts of transitions fade with their own number, so a change of the order of agents would be outvoted by the past for
//! as long as the past lasted. Where the quick share falls below the slow one by more than chance explains, the past
//! is discounted at once. A false alarm costs confidence, not knowledge: counts shrink alike, their ratios stay.

use crate::sync::{AtomicU64, Ordering::Relaxed};

/// Guesses over which the quick share is taken.
const QUICK: f32 = 48.0;
/// Guesses over which the slow share is taken.
const SLOW: f32 = 512.0;
/// So much may chance take from the quick share: its standard deviation is at most 0.05.
const CHANCE: f32 = 0.18;

/// The two shares (16 bits each) and the guesses so far (up to `SLOW`), in one word.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Drift(AtomicU64);

impl Drift {
    /// Counts a guess; true where the past should be discounted. Of two guesses at once one may be lost.
    pub(crate) fn guessed(&self, right: bool) -> bool {
        const ONE: f32 = 65_535.0;
        let word = self.0.load(Relaxed);
        let (quick, slow) = (f32::from(word as u16), f32::from((word >> 16) as u16));
        // Plain means at first, or the start would weigh on the slow share for long.
        let n = f32::from((word >> 32) as u16) + 1.0;
        let outcome = if right { ONE } else { 0.0 };
        let quick = quick + (outcome - quick) / n.min(QUICK);
        let mut slow = slow + (outcome - slow) / n.min(SLOW);
        let changed = slow - quick > CHANCE * ONE;
        if changed {
            slow = quick;
        }
        let next = (n.min(SLOW) as u64) << 32 | (slow.round() as u64) << 16 | quick.round() as u64;
        // Whoever stores the alarm raises it: one discount for one change.
        self.0.compare_exchange(word, next, Relaxed, Relaxed).is_ok() && changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drop_of_the_share_raises_one_alarm_and_chance_none() {
        let drift = Drift::default();
        let mut alarms = 0;
        let mut draw = |i: u64, share: f64| {
            let right = (crate::ids::mix(i) as f64) < share * u64::MAX as f64;
            alarms += usize::from(drift.guessed(right));
            alarms
        };
        for i in 0..20_000 {
            assert_eq!(draw(i, 0.7), 0, "false alarm at {i}");
        }
        (20_000..20_060).for_each(|i| {
            draw(i, 0.1);
        });
        assert_eq!(draw(20_060, 0.7), 1);
    }
}
