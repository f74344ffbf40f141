//! What lanes have lost: blocks that were evicted since the lane's last call.
//!
//! Whether a lane's next call uses a block is learned at that call, from the lane's blocks. Those that were evicted
//! meanwhile are not there to be asked, and as the least likely go first, the others alone promise too much. So of each
//! piece that goes the keys of its first and its last block are kept until the lane calls: where the prompt has both, it asked
//! for the piece, and where it has the first alone, for half of it. A few pieces of some hundred lanes; what does not fit is not asked.

/// Lanes of which pieces are kept, direct-mapped, and pieces of each.
const LANES: usize = 512;
const PIECES: usize = 8;
/// Blocks that go one by one are taken together up to so many.
const TOGETHER: u32 = 16;
const NOBODY: u32 = u32::MAX;

/// A run of blocks that was evicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Piece {
    /// Keys of its first and its last block, and the first one's place in the prompt.
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) depth: u32,
    pub(super) len: u32,
    /// The lane's call that used it last, and what it was then.
    pub(super) touch_call: u32,
    pub(super) class: u8,
}

impl Piece {
    /// How many of its blocks a prompt asks for, half of them where it ends or leaves the path within the piece.
    pub(super) fn used(&self, prompt: &[u64]) -> u32 {
        let has = |at: u32, key: u64| prompt.get(at as usize) == Some(&key);
        match (has(self.depth, self.first), has(self.depth + self.len - 1, self.last)) {
            (true, true) => self.len,
            (true, false) => self.len.div_ceil(2),
            (false, _) => 0,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Losses {
    lane: u32,
    /// Pieces so far; the last [`PIECES`] are there.
    n: u32,
    pieces: [Piece; PIECES],
}

/// See the module's page.
#[derive(Debug)]
pub(super) struct Lost(Box<[Losses]>);

impl Lost {
    pub(super) fn new() -> Self {
        Self(vec![Losses { lane: NOBODY, n: 0, pieces: [Piece::default(); PIECES] }; LANES].into())
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.0)
    }

    /// A lane has lost a piece.
    pub(super) fn add(&mut self, lane: u32, piece: Piece) {
        let losses = &mut self.0[lane as usize % LANES];
        if losses.lane != lane {
            (losses.lane, losses.n) = (lane, 0);
        }
        if losses.n > 0 {
            let last = &mut losses.pieces[(losses.n - 1) as usize % PIECES];
            let follows = piece.depth + piece.len == last.depth
                && (piece.touch_call, piece.class) == (last.touch_call, last.class)
                && piece.len + last.len <= TOGETHER;
            if follows {
                *last = Piece { len: piece.len + last.len, last: last.last, ..piece };
                return;
            }
        }
        losses.pieces[losses.n as usize % PIECES] = piece;
        losses.n = losses.n.saturating_add(1);
    }

    /// Whether pieces of a lane are kept.
    #[inline]
    pub(super) fn any(&self, lane: u32) -> bool {
        let losses = &self.0[lane as usize % LANES];
        losses.lane == lane && losses.n > 0
    }

    /// The pieces of a lane.
    pub(super) fn of(&self, lane: u32) -> &[Piece] {
        let losses = &self.0[lane as usize % LANES];
        if losses.lane == lane {
            &losses.pieces[..(losses.n as usize).min(PIECES)]
        } else {
            &[]
        }
    }

    /// Forgets the pieces of a lane.
    pub(super) fn forget(&mut self, lane: u32) {
        let losses = &mut self.0[lane as usize % LANES];
        if losses.lane == lane {
            losses.n = 0;
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.0.iter_mut().for_each(|losses| losses.n = 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(depth: u32, len: u32) -> Piece {
        Piece { first: u64::from(depth) + 1, last: u64::from(depth + len), depth, len, touch_call: 1, class: 0 }
    }

    #[test]
    fn a_prompt_asks_for_all_of_a_piece_or_half_or_none() {
        let prompt = [1, 2, 3, 4, 5, 6];
        assert_eq!([piece(2, 4), piece(2, 5), piece(5, 1), piece(6, 1)].map(|piece| piece.used(&prompt)), [4, 3, 1, 0]);
        assert_eq!(Piece { first: 9, ..piece(2, 4) }.used(&prompt), 0);
    }

    #[test]
    fn blocks_that_go_one_by_one_are_one_piece_named_by_its_ends() {
        let mut lost = Lost::new();
        (0..20).rev().for_each(|depth| lost.add(3, piece(depth, 1)));
        assert_eq!(lost.of(3), [piece(4, 16), piece(0, 4)]);
        lost.add(3, piece(50, 30));
        assert_eq!(lost.of(3).len(), 3);
    }

    #[test]
    fn a_lane_keeps_its_latest_pieces_until_it_calls_or_gives_way() {
        let mut lost = Lost::new();
        (0..PIECES as u32 + 2).for_each(|i| lost.add(3, piece(100 * i, 1)));
        assert_eq!(lost.of(3).len(), PIECES);
        assert!(lost.any(3) && lost.of(3).contains(&piece(900, 1)) && !lost.of(3).contains(&piece(0, 1)));
        assert!(!lost.any(3 + LANES as u32) && lost.of(3 + LANES as u32).is_empty());
        lost.add(3 + LANES as u32, piece(0, 1));
        assert!(lost.of(3).is_empty());
        lost.forget(3 + LANES as u32);
        assert!(!lost.any(3 + LANES as u32));
    }
}
