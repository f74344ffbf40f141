//! Many threads on one structure: exact counts, and no value of somebody else.
//!
//! Every test starts its threads at a spin barrier and runs until each thread has seen the others
//! make progress in the middle of its own steps, so that a pass means they did overlap. Where the
//! machine runs one thread at a time that may never happen: after [`PATIENCE`] steps the test says so
//! and goes on with what it has. Only raw atomics synchronise, which keeps ThreadSanitizer's view complete
//! (`make safety` runs this file under it; the ignored test at the end is the race it must find).

#![expect(clippy::print_stderr, reason = "a test that proved less than it could says so")]

use runtime_core::histogram::{Counters, Ratio};
use runtime_core::ids::{AgentId, SessionKey};
use runtime_core::protocol::{PublishedEntry, Seqlock, SingleWriter};
use runtime_core::sessions::{SessionTable, Word};
use runtime_core::successors::SuccessorTable;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

const THREADS: usize = 4;
const STEPS: u64 = 20_000;
const OVERLAPS: u64 = 3;
/// Steps of a thread after which it waits for no more overlaps.
const PATIENCE: u64 = 1 << 19;

/// Lets the other threads go when its own panics: they would wait for it for ever.
struct LetGo<'a>(&'a AtomicUsize);

impl Drop for LetGo<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fetch_add(THREADS, SeqCst);
        }
    }
}

/// Run `step(thread, index)` on all threads at once, each at least [`STEPS`] times and until all
/// have overlapped; returns how often each thread ran it.
fn together(step: impl Fn(usize, u64) + Sync) -> [u64; THREADS] {
    let (arrived, satisfied) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (progress, apart) = (AtomicU64::new(0), AtomicUsize::new(0));
    let done = [(); THREADS].map(|()| AtomicU64::new(0));
    std::thread::scope(|scope| {
        let threads: [_; THREADS] = std::array::from_fn(|thread| {
            let (arrived, satisfied, progress, apart) = (&arrived, &satisfied, &progress, &apart);
            let (done, step) = (&done[thread], &step);
            scope.spawn(move || {
                let _let_go = LetGo(satisfied);
                arrived.fetch_add(1, SeqCst);
                while arrived.load(SeqCst) < THREADS {
                    std::thread::yield_now();
                }
                let (mut index, mut overlaps) = (0, 0);
                while satisfied.load(SeqCst) < THREADS {
                    let before = progress.load(SeqCst);
                    step(thread, index);
                    let others = progress.fetch_add(1, SeqCst) - before;
                    let was_satisfied = index >= STEPS && overlaps >= OVERLAPS;
                    index += 1;
                    if index % 64 == 0 {
                        // More threads than cores: let the others have their overlaps.
                        std::thread::yield_now();
                    }
                    if index == PATIENCE && overlaps < OVERLAPS {
                        apart.fetch_add(1, SeqCst);
                        overlaps = OVERLAPS;
                    }
                    overlaps += u64::from(others > 0);
                    if !was_satisfied && index >= STEPS && overlaps >= OVERLAPS {
                        satisfied.fetch_add(1, SeqCst);
                    }
                }
                done.store(index, SeqCst);
            })
        });
        // The end of a scope waits inside the standard library, unseen by ThreadSanitizer; it knows
        // what a join is.
        for thread in threads {
            thread.join().unwrap();
        }
    });
    // Here and not in the threads: how the harness captures what they print is unseen by ThreadSanitizer, too.
    let apart = apart.load(SeqCst);
    if apart > 0 {
        eprintln!("note: {apart} of {THREADS} threads did not overlap {OVERLAPS} times in {PATIENCE} steps");
    }
    done.map(|count| count.load(SeqCst))
}

#[test]
fn four_threads_lose_no_successor() {
    let contexts = 5;
    // Where the threads had to wait long for each other, counts came near the limit at which they fade: once more.
    let (table, steps) = (0..20)
        .find_map(|_| {
            let table = SuccessorTable::<64, 8, { 1 << 23 }>::default();
            let steps = together(|thread, index| {
                let successor = (thread as u64 + index) % 3;
                assert!(table.add(index % contexts, successor as u16));
            });
            (steps.iter().sum::<u64>() < 1 << 24).then_some((table, steps))
        })
        .expect("the threads to meet soon, once in twenty times");
    let mut row = [(0, 0); 8];
    let mut counted = 0;
    for context in 0..contexts {
        let length = table.row(context, &mut row);
        assert_eq!(length, 3);
        counted += row[..length].iter().map(|(_, count)| u64::from(*count)).sum::<u64>();
    }
    assert_eq!(counted, steps.iter().sum::<u64>());
    assert_eq!(table.occupied(), 15, "no pair is split over two ways");
}

#[test]
fn four_threads_in_a_full_set_keep_counts_below_the_limit() {
    let table = SuccessorTable::<1, 8, 256>::default();
    together(|thread, index| {
        table.add(index % 3, (index % 7) as u16 * THREADS as u16 + thread as u16);
        for context in 0..3 {
            assert!(table.total(context) <= 8 * (256 + THREADS as u32));
        }
    });
    assert_eq!(table.occupied(), 8);
}

#[test]
fn four_threads_lose_no_count() {
    let counters = Counters::<8192>::default();
    let steps = together(|thread, index| {
        counters.add((index as usize * THREADS + thread) % Counters::<8192>::LEN);
    });
    let counted = u64::from(counters.total());
    assert_eq!(counted, steps.iter().sum::<u64>());
}

#[test]
fn halving_under_four_threads_carries_into_no_neighbour() {
    let counters = Counters::<2, 64>::default();
    let ratio = Ratio::<1, 512>::default();
    together(|_, index| {
        counters.add_step(1 + 4 * (index as usize % 2), 16);
        ratio.add(0, 16, index as u32 % 17);
        let (expected, hits) = ratio.get(0);
        assert!(hits <= expected && u64::from(expected) < 512 + 16 * THREADS as u64);
    });
    let mut counts = [0; 8];
    counters.snapshot(&mut counts);
    assert!(counts[1] < 64 && counts[5] < 64, "{counts:?}");
    assert_eq!([0, 2, 3, 4, 6, 7].map(|index| counts[index]), [0; 6]);
}

#[test]
fn steps_of_a_session_by_four_threads_form_one_chain() {
    let table = SessionTable::<8>::new(4096).unwrap();
    let keys = 1024;
    let seen = [(); THREADS + 1].map(|()| AtomicU64::new(0));
    let steps = together(|thread, index| {
        let key = SessionKey(index % keys);
        let (_, previous) = table.transition(key, AgentId(thread as u16));
        let last = if previous.last.is_known() { previous.last.0 as usize } else { THREADS };
        seen[last].fetch_add(1, SeqCst);
    });
    let mut expected = [0; THREADS + 1];
    expected[..THREADS].copy_from_slice(&steps);
    let mut counted = 0;
    for key in 0..keys {
        let position = table.position(table.find(SessionKey(key)).unwrap()).unwrap();
        // The step that was made last is the only one no other step saw.
        expected[position.last.0 as usize] -= 1;
        expected[THREADS] += 1;
        counted += u64::from(position.steps);
    }
    assert_eq!(seen.map(|count| count.load(SeqCst)), expected);
    if steps.iter().sum::<u64>() / keys < u64::from(u16::MAX) {
        assert_eq!(counted, steps.iter().sum::<u64>());
    }
}

#[test]
fn recycling_under_four_threads_mixes_no_sessions_and_splits_none() {
    let table = SessionTable::<1>::new(8).unwrap();
    let keys = 13;
    together(|thread, index| {
        let key = (index * 5 + thread as u64 * 3) % keys;
        let (handle, _) = table.enter(SessionKey(key));
        let begun = thread == 0 && table.begin(handle);
        table.store(handle, Word::Extra(0), key + 1);
        if let Some(word) = table.load(handle, Word::Extra(0)) {
            assert_eq!(word, key + 1, "a word of another session");
        }
        if begun {
            assert!(table.is_current(handle), "recycled with a call in flight");
            assert!(table.end(handle));
        }
    });
    // A key's slot, found by the words in it: once each.
    let words = (0..8).filter_map(|slot| table.load(table.at(slot)?, Word::Extra(0)));
    let mut words: Vec<u64> = words.collect();
    let found = words.len();
    words.sort_unstable();
    words.dedup();
    assert_eq!(words.len(), found, "a session has two slots");
}

#[test]
fn readers_of_a_published_entry_get_their_keys_values() {
    let entry = PublishedEntry::default();
    together(|thread, index| {
        if thread == 0 {
            let key = index + 1;
            entry.publish(key, key as u32);
            entry.set_value(key as u32 | 1 << 31);
            if index % 16 == 0 {
                entry.retract();
            }
        } else {
            let key = entry.key();
            if let Some(value) = entry.get(key).filter(|_| key != 0) {
                assert_eq!(u64::from(value & !(1 << 31)), key);
            }
        }
    });
}

#[test]
fn readers_of_a_seqlock_get_one_write() {
    let cell = Seqlock::<8>::default();
    together(|thread, index| {
        if thread == 0 {
            cell.write(&std::array::from_fn(|word| index + word as u64));
        } else if let Some(words) = cell.try_read().filter(|words| words[7] != 0) {
            assert_eq!(words, std::array::from_fn(|word| words[0] + word as u64));
        }
    });
}

/// Memory only the holder of a guard touches.
struct Plain(UnsafeCell<u64>);

// SAFETY: every access is either under `SingleWriter`'s guard, or the seeded race's.
unsafe impl Sync for Plain {}

impl Plain {
    /// # Safety
    /// Nobody else may have access, except in the seeded race, whose point is that somebody has.
    unsafe fn increment(&self) {
        // SAFETY: the caller's promise.
        unsafe { *self.0.get() += 1 };
    }
}

#[test]
fn single_writers_exclude_each_other() {
    let (writer, plain) = (SingleWriter::default(), Plain(UnsafeCell::new(0)));
    let entered = AtomicU64::new(0);
    together(|_, _| {
        if let Some(_guard) = writer.try_enter() {
            // SAFETY: the guard.
            unsafe { plain.increment() };
            entered.fetch_add(1, SeqCst);
        }
    });
    assert_eq!(plain.0.into_inner(), entered.load(SeqCst));
    assert!(entered.load(SeqCst) > 0);
}

#[test]
#[ignore = "a data race on purpose: ThreadSanitizer must report it, or its silence proves nothing"]
fn seeded_race() {
    let plain = Plain(UnsafeCell::new(0));
    // SAFETY: there is none; that is the point.
    together(|_, _| unsafe { plain.increment() });
}
