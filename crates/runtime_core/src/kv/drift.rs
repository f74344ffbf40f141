//! Has the order of agents changed? Two moving shares of right guesses, a quick one and a slow one.
//!
//! Counts of transitions fade with their own number, so a change of the order of agents would be outvoted by the past for
//! as long as the past lasted. Where the quick share falls below the slow one by more than chance explains, the past
//! is discounted at once. A false alarm costs confidence, not knowledge: counts shrink alike, their ratios stay.

use crate::sync::{AtomicU64, Ordering::Relaxed};

/// Guesses over which the quick share is taken.
const QUICK: i32 = 48;
/// Guesses over which the slow share is taken.
const SLOW: i32 = 512;
/// So much may chance take from the quick share: 0.18, when its standard deviation is at most 0.05.
const CHANCE: i32 = 18 * 65_535 / 100;

/// The two shares (16 bits each) and the guesses so far (up to `SLOW`), in one word.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Drift(AtomicU64);

impl Drift {
    /// Counts a guess; true where the past should be discounted. Of two guesses at once one may be lost,
    /// and with it that an alarm has been raised: then it is raised again.
    #[inline]
    pub(crate) fn guessed(&self, right: bool) -> bool {
        const ONE: i32 = 65_535;
        let word = self.0.load(Relaxed);
        let (quick, slow) = (i32::from(word as u16), i32::from((word >> 16) as u16));
        // Plain means at first, or the start would weigh on the slow share for long.
        let n = i32::from((word >> 32) as u16) + 1;
        let outcome = if right { ONE } else { 0 };
        let (quick, slow) = if n >= SLOW {
            (quick + nearest(outcome - quick, QUICK), slow + nearest(outcome - slow, SLOW))
        } else {
            (quick + nearest(outcome - quick, n.min(QUICK)), slow + nearest(outcome - slow, n))
        };
        let next = |slow: i32| (n.min(SLOW) as u64) << 32 | (slow as u64) << 16 | quick as u64;
        if slow - quick <= CHANCE {
            self.0.store(next(slow), Relaxed);
            return false;
        }
        // Whoever stores the alarm raises it: one discount for one change.
        self.0.compare_exchange(word, next(quick), Relaxed, Relaxed).is_ok()
    }
}

/// The quotient's nearest integer.
#[inline(always)]
const fn nearest(dividend: i32, divisor: i32) -> i32 {
    (2 * dividend + if dividend < 0 { -divisor } else { divisor }) / (2 * divisor)
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
