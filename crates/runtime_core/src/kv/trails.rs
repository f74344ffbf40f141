//! Trails: which session has asked for a block last, also after the block was evicted.
//!
//! Of a prompt with which a session calls an agent for the first time, the last block and a few beyond its first third,
//! chosen by their keys so that equal prompts choose the same, are kept with the session. Who walks there later is kin, see
//! `followers.rs`. A direct-mapped table; the latest stays.

use super::followers::{COMMON, KIN};
use super::NONE;
use crate::ids::spread;

/// Blocks kept in all.
const TRAILS: usize = 4096;
/// Blocks kept of a prompt.
const MARKED: usize = 8;
/// Of the others, blocks that are kept: one in so many, a power of two.
const SPARSE: u64 = 16;

#[derive(Clone, Copy, Debug)]
struct Trail {
    key: u64,
    slot: u32,
    generation: u16,
    /// How often another session than the one before has walked here, saturating.
    walkers: u8,
}

/// See the module's page.
#[derive(Debug)]
pub(super) struct Trails(Box<[Trail]>);

impl Trails {
    pub(super) fn new() -> Self {
        Self(vec![Trail { key: 0, slot: NONE, generation: 0, walkers: 0 }; TRAILS].into())
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.0)
    }

    pub(super) fn clear(&mut self) {
        self.0.iter_mut().for_each(|trail| trail.slot = NONE);
    }

    /// The session in `slot` walks along `keys`: who has before, deepest first, [`NONE`] for nobody more.
    pub(super) fn walk(&mut self, keys: &[u64], slot: u32, generation: u16) -> [(u32, u16); KIN] {
        let (mut before, mut n, mut marked) = ([(NONE, 0); KIN], 0, 0);
        for (i, &key) in keys.iter().enumerate().skip(keys.len() / 3).rev() {
            let hash = spread(key);
            if i + 1 < keys.len() && hash >> 32 & (SPARSE - 1) != 0 {
                continue;
            }
            let trail = &mut self.0[hash as usize & (TRAILS - 1)];
            let last = (trail.slot, trail.generation);
            let known = trail.key == key && last.0 != NONE;
            let other = known && last != (slot, generation);
            if other && trail.walkers < COMMON && n < KIN && !before[..n].contains(&last) {
                before[n] = last;
                n += 1;
            }
            let walkers = if known { trail.walkers.saturating_add(other.into()) } else { 1 };
            *trail = Trail { key, slot, generation, walkers };
            marked += 1;
            if marked == MARKED {
                break;
            }
        }
        before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(seed: u64) -> Vec<u64> {
        (0..200).map(|i| crate::ids::mix(seed << 32 | i)).collect()
    }

    #[test]
    fn who_walks_where_another_session_has_walked_learns_which() {
        let mut trails = Trails::new();
        assert_eq!(trails.walk(&prompt(1), 7, 3), [(NONE, 0); KIN]);
        assert_eq!(trails.walk(&prompt(2), 8, 1), [(NONE, 0); KIN]);
        assert_eq!(trails.walk(&prompt(1), 9, 2)[..2], [(7, 3), (NONE, 0)]);
        // The latest stays, and nobody follows itself.
        assert_eq!(trails.walk(&prompt(1), 9, 2), [(NONE, 0); KIN]);
        trails.clear();
        assert_eq!(trails.walk(&prompt(2), 9, 2), [(NONE, 0); KIN]);
    }

    #[test]
    fn what_many_sessions_have_walked_along_makes_nobody_kin() {
        let mut trails = Trails::new();
        let found: Vec<bool> = (0..40).map(|slot| trails.walk(&prompt(1), slot, 0)[0].0 != NONE).collect();
        assert!(!found[0] && found[1..16].iter().all(|&found| found) && !found[16..].contains(&true), "{found:?}");
    }

    #[test]
    fn a_prompt_that_goes_on_elsewhere_is_known_by_what_it_shares() {
        let mut trails = Trails::new();
        trails.walk(&prompt(1), 7, 3);
        let mut other = prompt(1);
        other.splice(190.., prompt(2).into_iter().take(10));
        assert_eq!(trails.walk(&other, 9, 2)[0], (7, 3));
        // A system prompt alone, the first third, says nothing.
        let mut other = prompt(1);
        other.splice(60.., prompt(3).into_iter().take(140));
        assert_eq!(trails.walk(&other, 10, 2), [(NONE, 0); KIN]);
    }
}
