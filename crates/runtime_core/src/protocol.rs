//! The lock-free steps everything shared is built from, each small enough to be model-checked.
//!
//! Atomics come through `super::sync`, so the workspace `runtime_core_loom` compiles this very file
//! against loom and explores its interleavings. Where an ordering, a re-check or a read-modify-write
//! is what makes a step correct, it is a `const bool` parameter (`.._with::<true>`) behind a plain
//! wrapper; the models run every step with it and without it, and *without* must fail.
//!
//! Two ideas carry most of the weight:
//!
//! * **One word, one fact.** A fact that must change as a whole (a key with its count, two lanes of a
//!   ratio, three fields of a session) lives in one word and changes by one read-modify-write. Such
//!   words need no ordering among each other, so they are `Relaxed`; a reader of several words sees
//!   each as of some recent moment.
//! * **Words say whose they are.** A word that outlives its owner carries the owner's generation.
//!   Nothing is initialised before publication, because a word with an old generation reads as unset.
//!
//! Steps over several words that must agree are [`Seqlock`] and [`PublishedEntry`]; they alone need
//! `Acquire`/`Release`, and their comments name the partner.

use super::sync::{fence, AtomicU32, AtomicU64, AtomicU8, Ordering};
use Ordering::{Acquire, Relaxed, Release};

// ---------------------------------------------------------------------------------------------
// Successor sets: a few ways of `context (24 bits) | count (24 bits) | successor (16 bits)`; 0 is vacant.
// ---------------------------------------------------------------------------------------------

/// The low bits of a way, and of a key, that name the successor. The context lies above it in a key; in a way, above the
/// count: of two ways of a context the larger one has the larger count.
pub(crate) const SUCCESSOR_BITS: u32 = 16;
/// Bits of a way's count.
pub(crate) const COUNT_BITS: u32 = 24;
/// Bits of a way that are not the context's.
const BELOW_CONTEXT: u32 = COUNT_BITS + SUCCESSOR_BITS;
/// Mask of a way's count.
const COUNT_MASK: u64 = ((1 << COUNT_BITS) - 1) << SUCCESSOR_BITS;

/// A way of `key` (its low 16 bits a successor, the 24 above them a context) with a count.
#[inline(always)]
pub(crate) const fn way_of(key: u64, count: u64) -> u64 {
    const SUCCESSOR: u64 = (1 << SUCCESSOR_BITS) - 1;
    (key & !SUCCESSOR) << COUNT_BITS | count << SUCCESSOR_BITS | key & SUCCESSOR
}

/// The count of a way.
#[inline(always)]
pub(crate) const fn way_count(word: u64) -> u64 {
    (word & COUNT_MASK) >> SUCCESSOR_BITS
}

/// The key of a way.
#[inline(always)]
pub(crate) const fn way_key(word: u64) -> u64 {
    word >> BELOW_CONTEXT << SUCCESSOR_BITS | word & ((1 << SUCCESSOR_BITS) - 1)
}

/// Whether two ways are of one key.
#[inline(always)]
const fn is_same_key(one: u64, other: u64) -> bool {
    (one ^ other) & !COUNT_MASK == 0
}

/// Misses of a full set between two halvings of it. Divides 256, so a wrapping `u8` counts them.
const MISSES_PER_HALVING: u8 = 32;

/// What [`set_add`] did and saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Added {
    /// False where the set was full of stronger keys.
    pub(crate) counted: bool,
    /// The strongest way of the key's context before, as `count | successor` (24 + 16 bits); 0 if there was none.
    pub(crate) strongest: u64,
}

/// Count `key` (below 2^40, its low 16 bits a successor and the others a context) `step` times in `ways`; where the set is
/// full without it, this is as many misses as `missed` says (none, or a power of two).
///
/// Ways fill from the first to the last and never become vacant again, so two threads that claim
/// for the same key aim at the same way: one wins, the other scans again and counts there. In a
/// full set the weakest way's count is halved by a miss and taken over at 1 (equally weak ways in
/// turn), and every 32nd miss halves the whole set, so that keys which stopped coming give way.
/// A count that reaches `limit` halves the whole set; a count never exceeds `limit` plus one step per
/// thread inside this call. Misses are counted by load and store: of two at once one may go uncounted.
#[inline(always)]
pub(crate) fn set_add<const WAYS: usize>(
    ways: &[AtomicU64; WAYS],
    misses: &AtomicU8,
    key: u64,
    (step, missed): (u64, u32),
    limit: u64,
) -> Added {
    set_add_with::<true, true, WAYS>(ways, misses, key, (step, missed), limit)
}

/// [`set_add`]; without `REEXAMINE` a lost claim goes on to the next way and splits a key in two,
/// without `ONCE` every thread that saw the limit halves, not the first.
#[inline(always)]
pub(crate) fn set_add_with<const REEXAMINE: bool, const ONCE: bool, const WAYS: usize>(
    ways: &[AtomicU64; WAYS],
    misses: &AtomicU8,
    key: u64,
    (step, missed): (u64, u32),
    limit: u64,
) -> Added {
    const OTHER: u64 = 1 << BELOW_CONTEXT;
    let own = way_of(key, 0);
    // Makes a way of the context less than all others, and the least that with the largest count.
    let flip = own | (OTHER - 1);
    let mut from = 0;
    loop {
        let (mut at, mut strongest) = (usize::MAX, OTHER);
        // Whole, backwards and by selection alone: where a key lies is anybody's guess, a branch's above all.
        for (index, way) in ways.iter().enumerate().skip(from).rev() {
            let word = way.load(Relaxed);
            at = if is_same_key(word, own) { index } else { at };
            strongest = strongest.min(word ^ flip);
        }
        let strongest = if strongest < OTHER { strongest ^ (OTHER - 1) } else { 0 };
        if at == usize::MAX {
            if missed == 0 && ways[WAYS - 1].load(Relaxed) != 0 {
                return Added { counted: false, strongest };
            }
            match set_claim(ways, misses, key, (step, missed), from) {
                Claim::Vacant(index) => at = index,
                Claim::Done(counted) => return Added { counted, strongest },
                Claim::Lost => continue,
            }
        }
        let seen = ways[at].load(Relaxed);
        let to = if seen == 0 { own } else { seen } + (step << SUCCESSOR_BITS);
        // Somebody else's by now, or will be.
        if !is_same_key(to, own) || ways[at].compare_exchange(seen, to, Relaxed, Relaxed).is_err() {
            from = if REEXAMINE { 0 } else { at + 1 };
            continue;
        }
        if way_count(to) >= limit {
            set_settle::<ONCE>(ways, at, limit);
        }
        return Added { counted: true, strongest };
    }
}

/// What there is for a key that no way holds.
enum Claim {
    /// The first vacant way.
    Vacant(usize),
    /// The weakest way was halved, or taken over and counted in.
    Done(bool),
    /// The set has changed meanwhile: perhaps it holds the key.
    Lost,
}

/// Looks for a vacant way from the way `from` on; in a full set weakens the weakest way, or takes it over.
#[inline(never)]
fn set_claim<const WAYS: usize>(
    ways: &[AtomicU64; WAYS],
    misses: &AtomicU8,
    key: u64,
    (step, missed): (u64, u32),
    from: usize,
) -> Claim {
    if ways[WAYS - 1].load(Relaxed) == 0 {
        // Looks at every way before the vacant one once more: whoever claimed one of them meanwhile may have done it for
        // this very key.
        for (index, way) in ways.iter().enumerate().skip(from) {
            match way.load(Relaxed) {
                0 => return Claim::Vacant(index),
                seen if way_key(seen) == key => return Claim::Lost,
                _ => {}
            }
        }
        return Claim::Lost;
    }
    let before = misses.load(Relaxed);
    // Equally weak ways take turns, or the first would change hands for ever beside dead ones.
    let turn = before as usize % WAYS;
    let mut least = u64::MAX;
    for order in 0..WAYS {
        let count = ways[(turn + order) % WAYS].load(Relaxed) & COUNT_MASK;
        least = least.min(count | order as u64);
    }
    const { assert!(WAYS <= 1 << SUCCESSOR_BITS) };
    let weakest = &ways[(turn + usize::from(least as u16)) % WAYS];
    let seen = weakest.load(Relaxed);
    let kept = way_count(seen) >> missed;
    let (to, counted) =
        if kept == 0 { (way_of(key, step), true) } else { (seen & !COUNT_MASK | kept << SUCCESSOR_BITS, false) };
    if seen & COUNT_MASK != least & COUNT_MASK
        || way_key(seen) == key
        || weakest.compare_exchange(seen, to, Relaxed, Relaxed).is_err()
    {
        return Claim::Lost;
    }
    let after = before.wrapping_add(missed as u8);
    misses.store(after, Relaxed);
    if after % MISSES_PER_HALVING < missed as u8 {
        for way in ways {
            way_halve(way);
        }
    }
    Claim::Done(counted)
}

/// Halve a set whose way `index` reached `limit`: whoever brings that way below halves the rest.
/// Everyone who saw the limit helps, so a preempted thread lets no count run away.
#[cold]
fn set_settle<const ONCE: bool>(ways: &[AtomicU64], index: usize, limit: u64) {
    let mut seen = ways[index].load(Relaxed);
    while !ONCE || way_count(seen) >= limit {
        match ways[index].compare_exchange(seen, way_halved(seen), Relaxed, Relaxed) {
            Ok(_) => {
                for (other, way) in ways.iter().enumerate() {
                    if other != index {
                        way_halve(way);
                    }
                }
                return;
            }
            Err(now) => seen = now,
        }
    }
}

/// Half the count, rounded up: a claimed way keeps at least 1, so vacancy never returns.
const fn way_halved(word: u64) -> u64 {
    let count = way_count(word);
    word & !COUNT_MASK | (count - count / 2) << SUCCESSOR_BITS
}

/// Halve one way without losing an increment that arrives meanwhile.
pub(crate) fn way_halve(way: &AtomicU64) {
    way_halve_with::<true>(way);
}

/// [`way_halve`]; without `EXCHANGE` it stores over increments.
pub(crate) fn way_halve_with<const EXCHANGE: bool>(way: &AtomicU64) {
    let mut seen = way.load(Relaxed);
    loop {
        if !EXCHANGE {
            return way.store(way_halved(seen), Relaxed);
        }
        match way.compare_exchange(seen, way_halved(seen), Relaxed, Relaxed) {
            Ok(_) => return,
            Err(now) => seen = now,
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Packed counters: four 16-bit lanes a word.
// ---------------------------------------------------------------------------------------------

/// Lanes of one word.
pub(crate) const LANES: usize = 4;

/// The 16-bit lane of `word` that starts at bit `shift`.
#[inline]
pub(crate) const fn lane(word: u64, shift: u32) -> u64 {
    word >> shift & 0xFFFF
}

/// Add `addend` (one step in each lane that counts) to a word; a lane that reaches `limit` halves all `words`.
///
/// Whoever sees the limit brings the word's lanes below it before returning, so a lane is at most `limit`
/// plus one step per thread inside this call: no carry into the neighbour as long as
/// `limit + threads * step <= 0xFFFF`.
#[inline]
pub(crate) fn lanes_add(words: &[AtomicU64], word: usize, addend: u64, limit: u64) {
    lanes_add_with::<true>(words, word, addend, limit);
}

/// [`lanes_add`]; without `ONCE` every thread that saw the limit halves, not the first.
#[inline]
pub(crate) fn lanes_add_with<const ONCE: bool>(words: &[AtomicU64], word: usize, addend: u64, limit: u64) {
    let after = words[word].fetch_add(addend, Relaxed) + addend;
    if lanes_reach(after, limit) {
        lanes_settle::<ONCE>(words, word, limit);
    }
}

/// [`lanes_add`] by a load and a store: of what others add or halve meanwhile something may be lost.
///
/// What is stored is a value that the word had, below the limit, plus one step; so lanes stay as small as with `lanes_add`.
#[inline]
pub(crate) fn lanes_put(words: &[AtomicU64], word: usize, addend: u64, limit: u64) {
    lanes_put_with::<true>(words, word, addend, limit);
}

/// [`lanes_put`]; without `SETTLE` lanes grow beyond the limit.
#[inline]
pub(crate) fn lanes_put_with<const SETTLE: bool>(words: &[AtomicU64], word: usize, addend: u64, limit: u64) {
    let after = words[word].load(Relaxed) + addend;
    words[word].store(after, Relaxed);
    if SETTLE && lanes_reach(after, limit) {
        lanes_settle::<true>(words, word, limit);
    }
}

/// Whether some lane of `word` is at `limit` (at most 0x4000) or above.
#[inline]
const fn lanes_reach(word: u64, limit: u64) -> bool {
    const LOW: u64 = 0x7FFF_7FFF_7FFF_7FFF;
    // Each lane's low 15 bits plus what `limit` lacks to 0x8000: the top bit tells, and nothing carries.
    let lacking = (0x8000 - limit) * 0x0001_0001_0001_0001;
    (((word & LOW) + lacking) | word) & !LOW != 0
}

#[cold]
fn lanes_settle<const ONCE: bool>(words: &[AtomicU64], word: usize, limit: u64) {
    let mut seen = words[word].load(Relaxed);
    while !ONCE || lanes_reach(seen, limit) {
        match words[word].compare_exchange(seen, lanes_halved(seen), Relaxed, Relaxed) {
            Ok(_) => {
                for (other, word_) in words.iter().enumerate() {
                    if other != word {
                        lanes_halve(word_);
                    }
                }
                if !ONCE {
                    return;
                }
                // A step can be larger than the limit: once more, then.
                seen = lanes_halved(seen);
            }
            Err(now) => seen = now,
        }
    }
}

/// All four lanes halved (rounded down) by one shift.
const fn lanes_halved(word: u64) -> u64 {
    word >> 1 & 0x7FFF_7FFF_7FFF_7FFF
}

/// Halve the four lanes of one word without losing an addition that arrives meanwhile.
pub(crate) fn lanes_halve(word: &AtomicU64) {
    lanes_halve_with::<true>(word);
}

/// [`lanes_halve`]; without `EXCHANGE` it stores over additions.
pub(crate) fn lanes_halve_with<const EXCHANGE: bool>(word: &AtomicU64) {
    let mut seen = word.load(Relaxed);
    loop {
        if !EXCHANGE {
            return word.store(lanes_halved(seen), Relaxed);
        }
        match word.compare_exchange(seen, lanes_halved(seen), Relaxed, Relaxed) {
            Ok(_) => return,
            Err(now) => seen = now,
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Ratios: `expected (16 bits) | hits (16 bits)` in one word.
// ---------------------------------------------------------------------------------------------

/// Record `hits` out of `expected`; both halve when `expected` reaches `limit`.
///
/// One read-modify-write carries both, so every reader sees `hits <= expected`.
#[inline]
pub(crate) fn ratio_add(cell: &AtomicU32, expected: u32, hits: u32, limit: u32) {
    ratio_add_with::<true>(cell, expected, hits, limit);
}

/// [`ratio_add`]; without `TOGETHER` the hits are added first and a reader sees a ratio above one.
#[inline]
pub(crate) fn ratio_add_with<const TOGETHER: bool>(cell: &AtomicU32, expected: u32, hits: u32, limit: u32) {
    if !TOGETHER {
        cell.fetch_add(hits, Relaxed);
        cell.fetch_add(expected << 16, Relaxed);
        return;
    }
    let mut seen = cell.fetch_add(expected << 16 | hits, Relaxed) + (expected << 16 | hits);
    while seen >> 16 >= limit {
        match cell.compare_exchange(seen, ratio_halved(seen), Relaxed, Relaxed) {
            Ok(_) => seen = ratio_halved(seen),
            Err(now) => seen = now,
        }
    }
}

/// Both lanes halved, rounded down: keeps `hits <= expected`.
const fn ratio_halved(word: u32) -> u32 {
    word >> 1 & 0x7FFF_7FFF
}

// ---------------------------------------------------------------------------------------------
// Sessions: a set of heads `tag (24) | generation (16) | lap (12) | used (1) | busy (11)`, and words
// `payload (48) | generation (16)`.
// ---------------------------------------------------------------------------------------------

const TAG_SHIFT: u32 = 40;
const GENERATION_SHIFT: u32 = 24;
const LAP_SHIFT: u32 = 12;
const LAP_MASK: u64 = 0xFFF;
/// Set by a lookup, cleared when the hand passes: a second chance.
const USED: u64 = 1 << 11;
const BUSY_MASK: u64 = USED - 1;

/// The generation in a head; 0 means vacant.
#[inline]
pub(crate) const fn head_generation(head: u64) -> u16 {
    (head >> GENERATION_SHIFT) as u16
}

/// Calls in flight, as counted in a head.
pub(crate) const fn head_busy(head: u64) -> u64 {
    head & BUSY_MASK
}

const fn head_lap(head: u64) -> u64 {
    head >> LAP_SHIFT & LAP_MASK
}

const fn next_generation(generation: u16) -> u16 {
    if generation == u16::MAX {
        1
    } else {
        generation + 1
    }
}

/// Whether `stamp` was written after tenancy `generation` ended (modulo 2^15 recyclings of a slot).
const fn is_newer(stamp: u16, generation: u16) -> bool {
    (stamp.wrapping_sub(generation) as i16) > 0 && stamp != 0
}

/// A slot of a set held by a key: the way, its generation, and whether this call claimed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tenancy {
    pub(crate) way: usize,
    pub(crate) generation: u16,
    pub(crate) fresh: bool,
}

/// What a word that names its owner says to someone who believes to be the owner.
enum Naming {
    Mine,
    Other,
    Gone,
}

/// Whether tenancy `generation` of a slot belongs to `rest`, naming it so if nobody has yet.
/// Without `EXCHANGE` a key with the same tag can name it too.
fn name_slot<const EXCHANGE: bool>(identity: &AtomicU64, generation: u16, rest: u64) -> Naming {
    let mut seen = identity.load(Relaxed);
    loop {
        let stamp = seen as u16;
        if stamp == generation {
            return if seen >> 16 == rest { Naming::Mine } else { Naming::Other };
        }
        if is_newer(stamp, generation) {
            return Naming::Gone;
        }
        let mine = rest << 16 | generation as u64;
        if !EXCHANGE {
            identity.store(mine, Relaxed);
            return Naming::Mine;
        }
        match identity.compare_exchange(seen, mine, Relaxed, Relaxed) {
            Ok(_) => return Naming::Mine,
            Err(now) => seen = now,
        }
    }
}

/// Find the key `(tag, rest)` (24 + 48 bits) in a set without claiming.
#[inline]
pub(crate) fn session_find(heads: &[AtomicU64], identities: &[AtomicU64], tag: u64, rest: u64) -> Option<Tenancy> {
    match session_first(heads, identities, tag, rest) {
        Some((way, generation)) => Some(Tenancy { way, generation, fresh: false }),
        None => session_find_all(heads, identities, tag, rest),
    }
}

/// Way and generation of the key, if it is in the first way that has its tag: it nearly always is.
#[inline(always)]
fn session_first(heads: &[AtomicU64], identities: &[AtomicU64], tag: u64, rest: u64) -> Option<(usize, u16)> {
    // By selection alone, as in `set_add_with`: of ways with the same tag (one key in two million has such a neighbour)
    // the first is looked at here, the others below.
    let (wanted, mut first) = (tag << TAG_SHIFT, heads.len());
    for (way, head) in heads.iter().enumerate().rev() {
        first = if head.load(Relaxed) ^ wanted < 1 << TAG_SHIFT { way } else { first };
    }
    let head = heads.get(first)?;
    // Vacant ways have tag 0 and generation 0.
    let generation = head_generation(head.load(Relaxed));
    let is_it = generation != 0 && identities[first].load(Relaxed) == rest << 16 | generation as u64;
    is_it.then_some((first, generation))
}

/// [`session_find`] in all ways.
#[cold]
fn session_find_all(heads: &[AtomicU64], identities: &[AtomicU64], tag: u64, rest: u64) -> Option<Tenancy> {
    for (way, head) in heads.iter().enumerate() {
        let seen = head.load(Relaxed);
        if seen >> TAG_SHIFT == tag {
            let generation = head_generation(seen);
            let identity = identities[way].load(Relaxed);
            if generation != 0 && identity == rest << 16 | generation as u64 {
                return Some(Tenancy { way, generation, fresh: false });
            }
        }
    }
    None
}

/// Find the key `(tag, rest)` in a set or claim a slot for it. Never fails, and at most one slot of
/// the set belongs to a key at any moment.
///
/// A hand goes round the set. The slot under it is the one of the lowest lap, the first of those,
/// and every claim or second chance moves exactly that slot one lap on. So a thread that read the
/// set and finds the slot under the hand unchanged knows that no other slot was claimed since: the
/// exchange on that one word orders all claims of a set, and two threads cannot both miss a key and
/// claim different slots for it. (Skipping a protected slot instead of moving it on would break
/// this.) A slot that is used or busy gets its second chance; after two rounds only busy slots
/// do, and after a third, in which every slot was busy, the next is taken all the same: calls that
/// never finish cannot fill the table.
#[inline(always)]
pub(crate) fn session_enter(heads: &[AtomicU64], identities: &[AtomicU64], tag: u64, rest: u64) -> Tenancy {
    // Most are there: only who is not needs the hand.
    let Some((way, generation)) = session_first(heads, identities, tag, rest) else {
        return session_claim(heads, identities, tag, rest);
    };
    if heads[way].load(Relaxed) & USED == 0 {
        heads[way].fetch_or(USED, Relaxed);
    }
    Tenancy { way, generation, fresh: false }
}

#[cold]
#[inline(never)]
fn session_claim(heads: &[AtomicU64], identities: &[AtomicU64], tag: u64, rest: u64) -> Tenancy {
    session_enter_with::<true, true>(heads, identities, tag, rest)
}

/// [`session_enter`]; without `IN_ORDER` busy slots are skipped, and a key can get two slots;
/// without `NAMED` two keys can get one.
#[inline]
pub(crate) fn session_enter_with<const IN_ORDER: bool, const NAMED: bool>(
    heads: &[AtomicU64],
    identities: &[AtomicU64],
    tag: u64,
    rest: u64,
) -> Tenancy {
    let rounds = heads.len();
    let mut chances = 3 * rounds;
    'scan: loop {
        let mut hand: Option<(usize, u64)> = None;
        for (way, head) in heads.iter().enumerate() {
            let seen = head.load(Relaxed);
            let generation = head_generation(seen);
            if generation != 0 && seen >> TAG_SHIFT == tag {
                match name_slot::<NAMED>(&identities[way], generation, rest) {
                    Naming::Mine => {
                        if seen & USED == 0 {
                            head.fetch_or(USED, Relaxed);
                        }
                        return Tenancy { way, generation, fresh: false };
                    }
                    Naming::Gone => continue 'scan,
                    Naming::Other => {}
                }
            }
            if !IN_ORDER && head_busy(seen) > 0 {
                continue;
            }
            // Laps of a set differ by at most one, but wrap: compare their distance.
            let lower = |best: u64| head_lap(seen).wrapping_sub(head_lap(best)) & LAP_MASK > LAP_MASK / 2;
            if hand.is_none_or(|(_, best)| lower(best)) {
                hand = Some((way, seen));
            }
        }
        let Some((way, seen)) = hand else {
            continue 'scan;
        };
        let lap = ((head_lap(seen) + 1) & LAP_MASK) << LAP_SHIFT;
        let used = seen & USED != 0 && chances > rounds;
        let busy = head_busy(seen) > 0 && chances > 0;
        if used || busy {
            let spared = seen & !(LAP_MASK << LAP_SHIFT | USED) | lap;
            if heads[way].compare_exchange(seen, spared, Relaxed, Relaxed).is_ok() {
                chances -= 1;
            }
            continue 'scan;
        }
        let generation = next_generation(head_generation(seen));
        let claimed = tag << TAG_SHIFT | (generation as u64) << GENERATION_SHIFT | lap;
        if heads[way].compare_exchange(seen, claimed, Relaxed, Relaxed).is_ok() {
            // A different key with the same tag may have named the slot first: then it has it.
            if matches!(name_slot::<NAMED>(&identities[way], generation, rest), Naming::Mine) {
                return Tenancy { way, generation, fresh: true };
            }
        }
    }
}

/// Count a call in flight (up to 2,047); `false` if the tenancy has ended.
#[inline]
pub(crate) fn session_begin(head: &AtomicU64, generation: u16) -> bool {
    let mut seen = head.load(Relaxed);
    loop {
        if head_generation(seen) != generation {
            return false;
        }
        let next = if head_busy(seen) == BUSY_MASK { seen } else { seen + 1 } | USED;
        match head.compare_exchange(seen, next, Relaxed, Relaxed) {
            Ok(_) => return true,
            Err(now) => seen = now,
        }
    }
}

/// Uncount a call in flight; `false` if the tenancy has ended or none was counted.
pub(crate) fn session_end(head: &AtomicU64, generation: u16) -> bool {
    let mut seen = head.load(Relaxed);
    loop {
        if head_generation(seen) != generation || head_busy(seen) == 0 {
            return false;
        }
        match head.compare_exchange(seen, seen - 1, Relaxed, Relaxed) {
            Ok(_) => return true,
            Err(now) => seen = now,
        }
    }
}

/// Withdraw a slot's protection, so that the hand takes it when it comes by.
pub(crate) fn session_retire(head: &AtomicU64, generation: u16) -> bool {
    let mut seen = head.load(Relaxed);
    loop {
        if head_generation(seen) != generation {
            return false;
        }
        match head.compare_exchange(seen, seen & !(USED | BUSY_MASK), Relaxed, Relaxed) {
            Ok(_) => return true,
            Err(now) => seen = now,
        }
    }
}

/// Payload of a stamped word, if tenancy `generation` wrote it.
#[inline]
pub(crate) fn stamped_load(word: &AtomicU64, generation: u16) -> Option<u64> {
    let seen = word.load(Relaxed);
    (seen as u16 == generation).then_some(seen >> 16)
}

/// Replace the payload (48 bits) of a stamped word by a function of what tenancy `generation` last
/// wrote, in one read-modify-write. Returns that previous payload (`None`: nothing yet).
///
/// # Errors
/// A later tenancy has written the word: nothing is changed.
#[inline]
pub(crate) fn stamped_update(
    word: &AtomicU64,
    generation: u16,
    next: impl FnMut(Option<u64>) -> u64,
) -> Result<Option<u64>, Recycled> {
    stamped_update_with::<true, true>(word, generation, next)
}

/// Write the payload of a stamped word that need not be exact; `false` if a later tenancy has written it.
///
/// A load and a store, no read-modify-write: of two writes at once one is lost, and a tenancy that ends meanwhile can
/// wipe out its successor's word. Who reads sees words of their own or none, because the stamp is in the word.
#[inline]
pub(crate) fn stamped_put(word: &AtomicU64, generation: u16, payload: u64) -> bool {
    stamped_put_with::<true>(word, generation, payload)
}

/// [`stamped_put`]; without `OWNED` an ended tenancy writes whenever it likes.
#[inline]
pub(crate) fn stamped_put_with<const OWNED: bool>(word: &AtomicU64, generation: u16, payload: u64) -> bool {
    if OWNED {
        let stamp = word.load(Relaxed) as u16;
        // In this order: most words are the tenancy's own already.
        if stamp != generation && is_newer(stamp, generation) {
            return false;
        }
    }
    word.store(payload << 16 | generation as u64, Relaxed);
    true
}

/// The slot belongs to a later tenancy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Recycled;

/// [`stamped_update`]; without `EXCHANGE` two updates can start from the same value, without `OWNED`
/// an ended tenancy writes over its successor.
#[inline]
pub(crate) fn stamped_update_with<const EXCHANGE: bool, const OWNED: bool>(
    word: &AtomicU64,
    generation: u16,
    mut next: impl FnMut(Option<u64>) -> u64,
) -> Result<Option<u64>, Recycled> {
    let mut seen = word.load(Relaxed);
    loop {
        let stamp = seen as u16;
        if OWNED && stamp != generation && is_newer(stamp, generation) {
            return Err(Recycled);
        }
        let previous = (stamp == generation).then_some(seen >> 16);
        let to = next(previous) << 16 | generation as u64;
        if !EXCHANGE {
            word.store(to, Relaxed);
            return Ok(previous);
        }
        match word.compare_exchange(seen, to, Relaxed, Relaxed) {
            Ok(_) => return Ok(previous),
            Err(now) => seen = now,
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Several words that must agree.
// ---------------------------------------------------------------------------------------------

/// Words that are read together or not at all: one writer at a time, any number of readers.
///
/// Readers never write, so they do not slow the writer down; a reader that overlaps a write tries
/// again. Use it only where a mixture of two states would be wrong.
#[derive(Debug)]
pub struct Seqlock<const WORDS: usize> {
    /// Odd while a write is under way.
    version: AtomicU64,
    payload: [AtomicU64; WORDS],
}

impl<const WORDS: usize> Default for Seqlock<WORDS> {
    fn default() -> Self {
        Self { version: AtomicU64::new(0), payload: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

impl<const WORDS: usize> Seqlock<WORDS> {
    /// Replace all words. One writer at a time ([`SingleWriter`] enforces it); wait-free.
    pub fn write(&self, words: &[u64; WORDS]) {
        self.write_with::<true>(words);
    }

    /// [`Seqlock::write`]; without `FENCE` a word can become visible before the odd version.
    pub(crate) fn write_with<const FENCE: bool>(&self, words: &[u64; WORDS]) {
        let version = self.version.load(Relaxed);
        self.version.store(version.wrapping_add(1), Relaxed);
        if FENCE {
            // Pairs with the Acquire fence in `try_read`: who saw a word also sees the odd version.
            fence(Release);
        }
        for (cell, word) in self.payload.iter().zip(words) {
            cell.store(*word, Relaxed);
        }
        // Pairs with the Acquire load in `try_read`: who saw this version sees the words.
        self.version.store(version.wrapping_add(2), Release);
    }

    /// All words as one write left them, or `None` if a write was under way. Wait-free.
    pub fn try_read(&self) -> Option<[u64; WORDS]> {
        self.try_read_with::<true>()
    }

    /// [`Seqlock::try_read`]; without `VALIDATE` a write that came in between goes unnoticed.
    pub(crate) fn try_read_with<const VALIDATE: bool>(&self) -> Option<[u64; WORDS]> {
        // Pairs with the Release store in `write`.
        let version = self.version.load(Acquire);
        if version & 1 == 1 {
            return None;
        }
        let words = std::array::from_fn(|index| self.payload[index].load(Relaxed));
        if VALIDATE {
            // Pairs with the Release fence in `write`.
            fence(Acquire);
            if self.version.load(Relaxed) != version {
                return None;
            }
        }
        Some(words)
    }
}

/// A `(key, value)` pair one writer replaces while any number of readers look it up.
///
/// A reader that asks for a key gets a value that was published for it, or nothing; never the value
/// of the key before or after. Wait-free for both sides. The one exception, to be caught by the
/// caller if it matters (by checking what the value points to): between a reader's loads the writer
/// replaces the key by another *and puts it back*.
#[derive(Debug)]
pub struct PublishedEntry {
    /// 0 while vacant or being replaced.
    key: AtomicU64,
    value: AtomicU32,
}

impl Default for PublishedEntry {
    fn default() -> Self {
        Self { key: AtomicU64::new(0), value: AtomicU32::new(0) }
    }
}

impl PublishedEntry {
    /// The key as of now, 0 if vacant: for the writer's own search, and for a reader's probe.
    #[inline]
    pub fn key(&self) -> u64 {
        self.key.load(Relaxed)
    }

    /// The value as of now. Only the writer knows whose it is.
    #[inline]
    pub fn value(&self) -> u32 {
        self.value.load(Relaxed)
    }

    /// The value published for `key` (not 0), if it is here. Any thread; wait-free.
    #[inline]
    pub fn get(&self, key: u64) -> Option<u32> {
        self.get_with::<true>(key)
    }

    /// [`PublishedEntry::get`]; without `VALIDATE` a replacement in between goes unnoticed.
    #[inline]
    pub(crate) fn get_with<const VALIDATE: bool>(&self, key: u64) -> Option<u32> {
        // Pairs with the Release store of the key in `publish`.
        if self.key.load(Acquire) != key {
            return None;
        }
        let value = self.value.load(Relaxed);
        if VALIDATE {
            // Pairs with the Release fence in `publish`: who saw a later value sees the key gone.
            fence(Acquire);
            if self.key.load(Relaxed) != key {
                return None;
            }
        }
        Some(value)
    }

    /// Replace whatever is here by `key` (not 0) and `value`. One writer at a time; wait-free.
    #[inline]
    pub fn publish(&self, key: u64, value: u32) {
        self.publish_with::<true, true>(key, value);
    }

    /// [`PublishedEntry::publish`]; without `RETRACT` the old key still stands beside the new value,
    /// without `FENCE` it may seem to.
    #[inline]
    pub(crate) fn publish_with<const RETRACT: bool, const FENCE: bool>(&self, key: u64, value: u32) {
        if RETRACT {
            self.key.store(0, Relaxed);
        }
        if FENCE {
            // Pairs with the Acquire fence in `get`.
            fence(Release);
        }
        self.value.store(value, Relaxed);
        // Pairs with the Acquire load in `get`.
        self.key.store(key, Release);
    }

    /// Replace the value of the key that is here. One writer at a time; wait-free.
    #[inline]
    pub fn set_value(&self, value: u32) {
        self.value.store(value, Relaxed);
    }

    /// Make vacant. One writer at a time; wait-free.
    #[inline]
    pub fn retract(&self) {
        self.key.store(0, Relaxed);
        // As in `publish`: a value written here later is only seen together with this.
        fence(Release);
    }
}

/// Admits one caller at a time and tells a second one so, without waiting.
///
/// What the guard's holder wrote before dropping it, the next holder sees.
#[derive(Debug)]
pub struct SingleWriter {
    taken: AtomicU32,
}

impl Default for SingleWriter {
    fn default() -> Self {
        Self { taken: AtomicU32::new(0) }
    }
}

impl SingleWriter {
    /// Become the writer until the guard is dropped; `None` while somebody else is. Wait-free.
    #[inline]
    pub fn try_enter(&self) -> Option<WriterGuard<'_>> {
        self.try_enter_with::<true>()
    }

    /// [`SingleWriter::try_enter`]; without `ACQUIRE` the predecessor's writes may be missing.
    #[inline]
    pub(crate) fn try_enter_with<const ACQUIRE: bool>(&self) -> Option<WriterGuard<'_>> {
        // Pairs with the Release store in the guard's drop.
        let order = if ACQUIRE { Acquire } else { Relaxed };
        let entered = self.taken.compare_exchange(0, 1, order, Relaxed);
        // Made only on success: dropping a guard that was refused would let a third writer in.
        entered.is_ok().then(|| WriterGuard { owner: self })
    }
}

/// Held by the one writer; leaving is dropping it.
#[derive(Debug)]
#[must_use = "dropping the guard lets the next writer in"]
pub struct WriterGuard<'a> {
    owner: &'a SingleWriter,
}

impl Drop for WriterGuard<'_> {
    fn drop(&mut self) {
        // Pairs with the Acquire exchange in `try_enter`.
        self.owner.taken.store(0, Release);
    }
}
