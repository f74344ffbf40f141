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

/// Guesses that a thread has not counted yet: what one batch of events teaches is counted a few at a time, so that threads
/// do not take a word that all share from each other at every event.
#[derive(Debug, Default)]
pub(crate) struct Guesses {
    right: u32,
    n: u32,
}

impl Guesses {
    /// Of so many, none waits longer.
    const MOST: u32 = 8;

    /// Adds one; true where it is time to count.
    #[inline(always)]
    pub(crate) fn push(&mut self, right: bool) -> bool {
        self.right += u32::from(right);
        self.n += 1;
        self.n == Self::MOST
    }

    #[inline(always)]
    pub(crate) fn is_empty(&self) -> bool {
        self.n == 0
    }
}

/// The two shares (16 bits each) and the guesses so far (up to `SLOW`), in one word.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Drift(AtomicU64);

impl Drift {
    /// Counts guesses, none of which are left; true where the past should be discounted. Of what two threads count at once
    /// one part may be lost, and with it that an alarm has been raised: then it is raised again.
    pub(crate) fn count(&self, guesses: &mut Guesses) -> bool {
        const ONE: i32 = 65_535;
        let Guesses { right, n } = std::mem::take(guesses);
        let (right, n) = (right as i32 * ONE, n as i32);
        let word = self.0.load(Relaxed);
        let (quick, slow) = (i32::from(word as u16), i32::from((word >> 16) as u16));
        // Plain means at first, or the start would weigh on the slow share for long.
        let seen = (i32::from((word >> 32) as u16) + n).min(SLOW);
        let quick = quick + nearest(right - n * quick, seen.min(QUICK));
        let slow = slow + nearest(right - n * slow, seen);
        if slow - quick > CHANCE {
            // Whoever stores the alarm raises it: one discount for one change.
            let next = (seen as u64) << 32 | (quick as u64) << 16 | quick as u64;
            return self.0.compare_exchange(word, next, Relaxed, Relaxed).is_ok();
        }
        let next = (seen as u64) << 32 | (slow as u64) << 16 | quick as u64;
        self.0.store(next, Relaxed);
        false
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
        let (mut alarms, mut guesses) = (0, Guesses::default());
        let mut draw = |i: u64, share: f64| {
            let right = (crate::ids::mix(i) as f64) < share * u64::MAX as f64;
            if guesses.push(right) {
                alarms += usize::from(drift.count(&mut guesses));
                assert!(guesses.is_empty());
            }
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
