//! One model per step, each followed by its negative controls.

use crate::protocol::{
    head_generation, lane, lanes_add_with, lanes_halve_with, lanes_put_with, ratio_add_with, session_begin, session_end, session_enter,
    session_enter_with, session_find, set_add_with, stamped_load, stamped_put_with, stamped_update,
    stamped_update_with, way_count, way_halve_with, way_key, way_of, PublishedEntry, Seqlock, SingleWriter,
};
use crate::table::Table;
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, AtomicU64, AtomicU8, Ordering::Relaxed};
use loom::sync::Arc;
use loom::thread;

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(5);
    builder.check(model);
}

/// A model with its fix must pass; each control must fail with the message of its assertion.
macro_rules! model {
    ($name:ident: $model:expr; $($control:ident: $broken:expr => $message:literal;)+) => {
        #[test]
        fn $name() {
            check($model);
        }
        $(
            #[test]
            #[should_panic(expected = $message)]
            fn $control() {
                check($broken);
            }
        )+
    };
}

fn zeros(count: usize) -> Vec<AtomicU64> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

fn values(words: &[AtomicU64]) -> Vec<u64> {
    words.iter().map(|word| word.load(Relaxed)).collect()
}

// --- successor sets ---------------------------------------------------------------------------

struct Set<const WAYS: usize> {
    ways: [AtomicU64; WAYS],
    misses: AtomicU8,
}

impl<const WAYS: usize> Set<WAYS> {
    fn new() -> Arc<Self> {
        Arc::new(Self { ways: std::array::from_fn(|_| AtomicU64::new(0)), misses: AtomicU8::new(0) })
    }

    fn add<const REEXAMINE: bool, const ONCE: bool>(&self, key: u64, limit: u64) -> bool {
        self.add_votes::<REEXAMINE, ONCE>(key, 1, limit)
    }

    /// One vote that stands for several: of as many misses, where the set is full.
    fn add_votes<const REEXAMINE: bool, const ONCE: bool>(&self, key: u64, votes: u32, limit: u64) -> bool {
        let (ways, misses) = (&self.ways, &self.misses);
        set_add_with::<REEXAMINE, ONCE, WAYS>(ways, misses, key, (u64::from(votes), votes), limit).counted
    }

    fn counts(&self) -> Vec<(u64, u64)> {
        let used = values(&self.ways).into_iter().filter(|word| *word != 0);
        used.map(|word| (way_key(word), way_count(word))).collect()
    }
}

fn two_threads_claim_one_key<const REEXAMINE: bool>() {
    let set = Set::<3>::new();
    let other = set.clone();
    let thread = thread::spawn(move || {
        other.add::<REEXAMINE, true>(7, 100);
        other.add::<REEXAMINE, true>(8, 100);
    });
    set.add::<REEXAMINE, true>(8, 100);
    set.add::<REEXAMINE, true>(7, 100);
    thread.join().unwrap();
    let mut counts = set.counts();
    counts.sort_unstable();
    assert_eq!(counts, [(7, 2), (8, 2)], "a key is split");
}

model! {
    concurrent_claims_of_a_key_share_one_way: two_threads_claim_one_key::<true>;
    without_a_second_look_a_key_is_split: two_threads_claim_one_key::<false> => "a key is split";
}

/// One thread counts every vote, the other one of four.
fn a_drawn_vote_beside_a_single_one<const REEXAMINE: bool>() {
    let set = Set::<3>::new();
    let other = set.clone();
    let thread = thread::spawn(move || {
        other.add_votes::<REEXAMINE, true>(7, 4, 100);
        other.add::<REEXAMINE, true>(8, 100);
    });
    set.add_votes::<REEXAMINE, true>(8, 4, 100);
    set.add::<REEXAMINE, true>(7, 100);
    thread.join().unwrap();
    let mut counts = set.counts();
    counts.sort_unstable();
    assert_eq!(counts, [(7, 5), (8, 5)], "a vote is split or lost");
}

model! {
    a_drawn_vote_counts_whole_beside_single_ones: a_drawn_vote_beside_a_single_one::<true>;
    without_a_second_look_a_drawn_vote_is_split: a_drawn_vote_beside_a_single_one::<false> => "a vote is split or lost";
}

fn halving_against_counting<const EXCHANGE: bool>() {
    let set = Set::<1>::new();
    for _ in 0..4 {
        set.add::<true, true>(7, 100);
    }
    let other = set.clone();
    let thread = thread::spawn(move || other.add::<true, true>(7, 100));
    way_halve_with::<EXCHANGE>(&set.ways[0]);
    assert!(thread.join().unwrap());
    // 4 / 2 + 1, or 5 / 2 rounded up.
    assert_eq!(set.counts(), [(7, 3)], "an observation is lost");
}

model! {
    halving_a_set_loses_no_observation: halving_against_counting::<true>;
    halving_by_a_store_loses_one: halving_against_counting::<false> => "an observation is lost";
}

fn two_threads_reach_the_limit<const ONCE: bool>() {
    let set = Set::<2>::new();
    for _ in 0..3 {
        set.add::<true, true>(7, 4);
    }
    set.ways[1].store(way_of(8, 2), Relaxed);
    let other = set.clone();
    let thread = thread::spawn(move || other.add::<true, ONCE>(7, 4));
    set.add::<true, ONCE>(7, 4);
    thread.join().unwrap();
    assert_eq!(set.counts(), [(7, 3), (8, 1)], "halved twice");
}

model! {
    a_limit_crossed_by_two_threads_halves_once: two_threads_reach_the_limit::<true>;
    without_a_check_both_halve: two_threads_reach_the_limit::<false> => "halved twice";
}

/// Two newcomers in a full set: each is counted, or halves the weakest; nothing is invented.
fn take_over_of_a_full_set() {
    let set = Set::<2>::new();
    set.ways[0].store(way_of(1, 9), Relaxed);
    set.ways[1].store(way_of(2, 1), Relaxed);
    let other = set.clone();
    let thread = thread::spawn(move || u64::from(other.add::<true, true>(3, 100)));
    let counted = u64::from(set.add::<true, true>(3, 100)) + thread.join().unwrap();
    let total: u64 = set.counts().iter().filter(|(key, _)| *key == 3).map(|(_, n)| n).sum();
    assert_eq!((counted, total), (2, 2));
    assert_eq!(set.counts()[0], (1, 9), "the strong way stands");
}

#[test]
fn concurrent_newcomers_of_a_full_set_are_counted_exactly() {
    check(take_over_of_a_full_set);
}

/// The same where one of them stands for four: it takes the weakest over at once.
fn take_over_by_a_drawn_vote() {
    let set = Set::<2>::new();
    set.ways[0].store(way_of(1, 40), Relaxed);
    set.ways[1].store(way_of(2, 9), Relaxed);
    let other = set.clone();
    let thread = thread::spawn(move || u64::from(other.add::<true, true>(3, 100)));
    let counted = 4 * u64::from(set.add_votes::<true, true>(3, 4, 100)) + thread.join().unwrap();
    let total: u64 = set.counts().iter().filter(|(key, _)| *key == 3).map(|(_, n)| n).sum();
    assert!((counted, total) == (4, 4) || (counted, total) == (5, 5), "{counted} {total}");
    assert_eq!(set.counts()[0], (1, 40), "the strong way stands");
}

#[test]
fn a_drawn_newcomer_of_a_full_set_is_counted_exactly() {
    check(take_over_by_a_drawn_vote);
}

// --- packed counters ----------------------------------------------------------------------------

fn lanes_halving_against_adding<const EXCHANGE: bool>() {
    let words = Arc::new(zeros(1));
    words[0].store(5 << 16, Relaxed);
    let other = words.clone();
    let thread = thread::spawn(move || lanes_add_with::<true>(&other, 0, 1 << 16, 100));
    lanes_halve_with::<EXCHANGE>(&words[0]);
    thread.join().unwrap();
    // 5 / 2 + 1, or 6 / 2.
    assert_eq!(values(&words), [3 << 16], "an addition is lost");
}

model! {
    halving_lanes_loses_no_addition: lanes_halving_against_adding::<true>;
    halving_lanes_by_a_store_loses_one: lanes_halving_against_adding::<false> => "an addition is lost";
}

fn lanes_reach_the_limit<const ONCE: bool>() {
    let words = Arc::new(zeros(2));
    words[0].store(7, Relaxed);
    words[1].store(6 << 48, Relaxed);
    let other = words.clone();
    let thread = thread::spawn(move || lanes_add_with::<ONCE>(&other, 0, 1, 8));
    lanes_add_with::<ONCE>(&words, 0, 1, 8);
    thread.join().unwrap();
    let (hot, cold) = (words[0].load(Relaxed), lane(words[1].load(Relaxed), 48));
    // 8 / 2 + 1, or 9 / 2.
    assert!((4..=5).contains(&hot) && cold == 3, "halved twice");
}

model! {
    lanes_at_the_limit_halve_once_and_together: lanes_reach_the_limit::<true>;
    without_a_check_lanes_halve_twice: lanes_reach_the_limit::<false> => "halved twice";
}

fn a_put_beside_an_addition<const SETTLE: bool>() {
    let words = Arc::new(zeros(1));
    words[0].store(4 << 16 | 7, Relaxed);
    let other = words.clone();
    let thread = thread::spawn(move || lanes_put_with::<SETTLE>(&other, 0, 1, 8));
    lanes_add_with::<true>(&words, 0, 1, 8);
    thread.join().unwrap();
    let word = words[0].load(Relaxed);
    assert!(lane(word, 0) < 8, "a lane stays at its limit");
    // One of the two at least was counted, and the neighbour has been halved with it.
    assert!(lane(word, 0) >= 4 && [1, 2].contains(&lane(word, 16)), "{word:x}");
}

model! {
    a_put_leaves_lanes_below_the_limit: a_put_beside_an_addition::<true>;
    without_a_check_a_put_leaves_one_there: a_put_beside_an_addition::<false> => "a lane stays at its limit";
}

fn a_reader_of_a_ratio<const TOGETHER: bool>() {
    let cell = Arc::new(AtomicU32::new(6 << 16 | 6));
    let other = cell.clone();
    let thread = thread::spawn(move || {
        ratio_add_with::<TOGETHER>(&other, 2, 2, 8);
        ratio_add_with::<TOGETHER>(&other, 1, 0, 8);
    });
    ratio_add_with::<TOGETHER>(&cell, 1, 1, 8);
    let seen = cell.load(Relaxed);
    assert!(seen & 0xFFFF <= seen >> 16, "a ratio above one");
    thread.join().unwrap();
    let end = cell.load(Relaxed);
    assert!(end >> 16 < 8 && end & 0xFFFF <= end >> 16, "a ratio above one");
}

model! {
    readers_see_ratios_of_at_most_one: a_reader_of_a_ratio::<true>;
    hits_added_apart_exceed_expected: a_reader_of_a_ratio::<false> => "a ratio above one";
}

// --- sessions -----------------------------------------------------------------------------------

struct Slots {
    heads: Vec<AtomicU64>,
    identities: Vec<AtomicU64>,
    word: Vec<AtomicU64>,
}

impl Slots {
    fn new(slots: usize) -> Arc<Self> {
        Arc::new(Self { heads: zeros(slots), identities: zeros(slots), word: zeros(slots) })
    }

    fn enter(&self, tag: u64, rest: u64) -> (usize, u16) {
        let held = session_enter(&self.heads, &self.identities, tag, rest);
        (held.way, held.generation)
    }

    fn current(&self, slot: (usize, u16)) -> bool {
        head_generation(self.heads[slot.0].load(Relaxed)) == slot.1
    }
}

/// A new session is reported by two threads while a call in flight on the first slot ends.
fn two_threads_enter_a_new_session<const IN_ORDER: bool>() {
    let slots = Slots::new(2);
    let busy = slots.enter(1, 1);
    assert!(session_begin(&slots.heads[busy.0], busy.1));
    slots.enter(2, 2);
    // Clear the marks of use, as a round of the hand would.
    slots.heads[busy.0].fetch_and(!(1 << 11), Relaxed);
    let threads = [(); 2].map(|()| {
        let slots = slots.clone();
        thread::spawn(move || {
            session_enter_with::<IN_ORDER, true>(&slots.heads, &slots.identities, 3, 3);
        })
    });
    session_end(&slots.heads[busy.0], busy.1);
    for thread in threads {
        thread.join().unwrap();
    }
    let holds = |head: &&AtomicU64| head.load(Relaxed) >> 40 == 3;
    assert_eq!(slots.heads.iter().filter(holds).count(), 1, "a session has two slots");
}

model! {
    a_new_session_gets_one_slot: two_threads_enter_a_new_session::<true>;
    skipping_busy_slots_gives_it_two: two_threads_enter_a_new_session::<false> => "a session has two slots";
}

fn two_sessions_of_one_tag<const NAMED: bool>() {
    let slots = Slots::new(2);
    let other = slots.clone();
    let enter = |slots: &Slots, rest| {
        let held = session_enter_with::<true, NAMED>(&slots.heads, &slots.identities, 5, rest);
        (held.way, held.generation)
    };
    let thread = thread::spawn(move || enter(&other, 1));
    let mine = enter(&slots, 2);
    let theirs = thread.join().unwrap();
    assert_ne!(mine, theirs, "two sessions share a slot");
    let found = session_find(&slots.heads, &slots.identities, 5, 2).unwrap();
    assert_eq!((found.way, found.generation), mine);
}

model! {
    sessions_of_one_tag_get_slots_of_their_own: two_sessions_of_one_tag::<true>;
    naming_by_a_store_merges_them: two_sessions_of_one_tag::<false> => "two sessions share a slot";
}

fn an_ended_tenancy_writes<const OWNED: bool>() {
    let slots = Slots::new(1);
    let old = slots.enter(1, 1);
    let other = slots.clone();
    let thread = thread::spawn(move || {
        // The first lookup spends the old tenant's second chance, if it has one.
        let new = other.enter(2, 2);
        let before = stamped_update(&other.word[0], new.1, |_| 20).unwrap();
        assert_eq!(before, None, "a tenant sees its predecessor's word");
        new
    });
    let _ = stamped_update_with::<true, OWNED>(&slots.word[0], old.1, |_| 10);
    let new = thread.join().unwrap();
    assert!(slots.current(new) && !slots.current(old));
    assert_eq!(stamped_load(&slots.word[0], new.1), Some(20), "a tenant's word is lost");
    assert_eq!(stamped_load(&slots.word[0], old.1), None);
}

model! {
    recycling_keeps_tenants_apart: an_ended_tenancy_writes::<true>;
    without_the_generation_check_words_are_lost: an_ended_tenancy_writes::<false> => "a tenant's word is lost";
}

/// A tenancy that ends puts a word that need not be exact while its successor puts its own.
fn an_ended_tenancy_puts<const OWNED: bool>() {
    let slots = Slots::new(1);
    let old = slots.enter(1, 1);
    let other = slots.clone();
    let thread = thread::spawn(move || {
        let new = other.enter(2, 2);
        assert!(stamped_put_with::<OWNED>(&other.word[0], new.1, 20));
        new
    });
    let put = stamped_put_with::<OWNED>(&slots.word[0], old.1, 10);
    let new = thread.join().unwrap();
    // Its own, or none where both wrote at once and the predecessor came last.
    let seen = stamped_load(&slots.word[0], new.1);
    assert!(seen == Some(20) || (seen.is_none() && put), "a tenant takes a word that is not its own");
    // With the successor's word in place the predecessor's is refused.
    assert!(stamped_put_with::<OWNED>(&slots.word[0], new.1, 30));
    stamped_put_with::<OWNED>(&slots.word[0], old.1, 10);
    assert_eq!(stamped_load(&slots.word[0], new.1), Some(30), "an ended tenancy wipes out a word");
}

model! {
    a_word_that_was_put_is_the_tenants_own_or_unset: an_ended_tenancy_puts::<true>;
    without_the_generation_check_an_ended_tenancy_wipes_it_out: an_ended_tenancy_puts::<false> => "an ended tenancy wipes out a word";
}

/// Steps of one session by two threads form a chain: each sees the agent of the one before.
fn two_threads_advance<const EXCHANGE: bool>() {
    let word = Arc::new(zeros(1));
    let step = |word: &AtomicU64, agent: u64| {
        let next = |before: Option<u64>| agent << 16 | ((before.unwrap_or(0) & 0xFFFF) + 1);
        stamped_update_with::<EXCHANGE, true>(word, 1, next).unwrap().map_or(0, |at| at >> 16)
    };
    let other = word.clone();
    let thread = thread::spawn(move || step(&other[0], 8));
    let before_mine = step(&word[0], 9);
    let before_theirs = thread.join().unwrap();
    let end = stamped_load(&word[0], 1).unwrap();
    let mine_first = (before_mine, before_theirs, end >> 16) == (0, 9, 8);
    let theirs_first = (before_theirs, before_mine, end >> 16) == (0, 8, 9);
    assert!((mine_first || theirs_first) && end & 0xFFFF == 2, "a step is lost");
}

model! {
    concurrent_steps_of_a_session_form_a_chain: two_threads_advance::<true>;
    a_step_by_load_and_store_is_lost: two_threads_advance::<false> => "a step is lost";
}

/// A call in flight keeps its slot against a newcomer, whichever comes first.
fn begin_against_recycling() {
    let slots = Slots::new(2);
    let old = slots.enter(1, 1);
    slots.enter(2, 2);
    let other = slots.clone();
    let thread = thread::spawn(move || other.enter(3, 3));
    let began = session_begin(&slots.heads[old.0], old.1);
    let new = thread.join().unwrap();
    assert_eq!(began, slots.current(old), "begun and recycled");
    assert!(slots.current(new));
}

#[test]
fn a_call_in_flight_is_protected_or_told() {
    check(begin_against_recycling);
}

// --- the table of calls in flight ----------------------------------------------------------------

/// Two calls with one home; the one that lies there ends while another thread looks for the second one.
fn a_look_at_home<const FILLED: bool>() {
    let mut table = Table::new(2);
    table.insert(0, 10);
    table.insert(0, 11);
    let homes = table.homes();
    let thread = thread::spawn(move || {
        table.close::<FILLED>(0, |_| 0);
        table
    });
    assert!(homes.may_hold(0), "a call in flight is not seen");
    let mut table = thread.join().unwrap();
    assert!(homes.may_hold(0));
    table.remove(0, 11, |_| 0);
    assert!(!homes.may_hold(0));
}

model! {
    a_call_in_flight_is_seen_at_home: a_look_at_home::<true>;
    without_filling_the_hole_first_it_is_overlooked: a_look_at_home::<false> => "a call in flight is not seen";
}

// --- several words that must agree --------------------------------------------------------------

fn seqlock<const FENCE: bool, const VALIDATE: bool>() {
    let cell = Arc::new(Seqlock::<2>::default());
    let other = cell.clone();
    let thread = thread::spawn(move || {
        other.write_with::<FENCE>(&[1, 1]);
        other.write_with::<FENCE>(&[2, 2]);
    });
    if let Some([x, y]) = cell.try_read_with::<VALIDATE>() {
        assert_eq!(x, y, "a torn read");
    }
    thread.join().unwrap();
    assert_eq!(cell.try_read(), Some([2, 2]));
}

model! {
    a_seqlock_read_is_one_write: seqlock::<true, true>;
    a_seqlock_without_fence_tears: seqlock::<false, true> => "a torn read";
    a_seqlock_without_validation_tears: seqlock::<true, false> => "a torn read";
}

/// Key 1 always has an odd value, key 2 an even one; the entry changes hands once.
fn published_entry<const RETRACT: bool, const FENCE: bool, const VALIDATE: bool>() {
    let entry = Arc::new(PublishedEntry::default());
    entry.publish(1, 11);
    let other = entry.clone();
    let thread = thread::spawn(move || {
        other.set_value(13);
        other.publish_with::<RETRACT, FENCE>(2, 22);
    });
    for key in [1, 2] {
        if let Some(value) = entry.get_with::<VALIDATE>(key) {
            assert_eq!(u64::from(value) % 2, key % 2, "a value of another key");
        }
    }
    thread.join().unwrap();
    assert_eq!((entry.get(1), entry.get(2)), (None, Some(22)));
}

model! {
    a_published_value_belongs_to_its_key: published_entry::<true, true, true>;
    without_retraction_a_key_gets_its_successors_value:
        published_entry::<false, true, true> => "a value of another key";
    without_the_fence_a_key_gets_its_successors_value:
        published_entry::<true, false, true> => "a value of another key";
    without_validation_a_key_gets_its_successors_value:
        published_entry::<true, true, false> => "a value of another key";
}

/// The documented exception: a key that is replaced and put back between a reader's loads.
#[test]
#[should_panic(expected = "a value of another key")]
fn a_key_put_back_can_get_the_value_in_between() {
    check(|| {
        let entry = Arc::new(PublishedEntry::default());
        entry.publish(1, 11);
        let other = entry.clone();
        let thread = thread::spawn(move || {
            other.publish(2, 22);
            other.publish(1, 13);
        });
        if let Some(value) = entry.get(1) {
            assert_eq!(value % 2, 1, "a value of another key");
        }
        thread.join().unwrap();
    });
}

fn retract_and_republish() {
    let entry = Arc::new(PublishedEntry::default());
    entry.publish(1, 11);
    let other = entry.clone();
    let thread = thread::spawn(move || {
        other.retract();
        other.publish(2, 22);
    });
    assert!(matches!(entry.get(1), None | Some(11)));
    assert!(matches!(entry.get(2), None | Some(22)));
    thread.join().unwrap();
}

#[test]
fn a_retracted_key_is_gone_or_has_its_own_value() {
    check(retract_and_republish);
}

struct Guarded {
    writer: SingleWriter,
    plain: UnsafeCell<u32>,
}

// SAFETY: `plain` is only touched between `try_enter` and the guard's drop; that this excludes and
// orders is what the model checks (loom's cell reports a violation).
unsafe impl Sync for Guarded {}

fn hand_over<const ACQUIRE: bool>() {
    let guarded = Arc::new(Guarded { writer: SingleWriter::default(), plain: UnsafeCell::new(0) });
    let write = |guarded: &Guarded| {
        let guard = guarded.writer.try_enter_with::<ACQUIRE>();
        if guard.is_some() {
            // SAFETY: this thread holds the guard, nobody else has access.
            guarded.plain.with_mut(|plain| unsafe { *plain += 1 });
        }
        u32::from(guard.is_some())
    };
    // Two attempts: a refused one must not open the door for the next.
    let other = guarded.clone();
    let thread = thread::spawn(move || write(&other) + write(&other));
    let mine = write(&guarded);
    let written = mine + thread.join().unwrap();
    // SAFETY: the other thread has ended.
    assert_eq!(guarded.plain.with(|plain| unsafe { *plain }), written);
}

model! {
    writers_exclude_and_see_each_other: hand_over::<true>;
    without_acquire_a_writer_misses_its_predecessor: hand_over::<false> => "Causality violation";
}
