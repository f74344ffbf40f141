//! The hot path allocates nothing: a counting allocator around every operation.
//!
//! One test, because the count is the process's and tests of a file run on threads of one process.

#[path = "support/allocations.rs"]
mod allocations;

use allocations::allocations;
use runtime_core::histogram::{Counters, Often, Ratio};
use runtime_core::identity::{self, Identity, Options, PROMPT_MARKS};
use runtime_core::ids::{AgentId, SessionKey};
use runtime_core::protocol::{PublishedEntry, Seqlock, SingleWriter};
use runtime_core::sessions::{SessionTable, Word};
use runtime_core::successors::{context_of, context_of_two, SuccessorTable, NO_CONTEXT};
use std::hint::black_box;

#[test]
fn hot_operations_allocate_nothing() {
    assert_eq!(allocations(|| drop(black_box(Box::new(1)))), 1, "the count counts");

    let table = SuccessorTable::<8, 8, 64>::default();
    let mut row = [(0, 0); 8];
    let successors = allocations(|| {
        for step in 0..1000_u16 {
            let (last, next) = (AgentId(step % 50), AgentId(step % 47));
            table.add(NO_CONTEXT, next.0);
            table.add(context_of(last), next.0);
            table.add(context_of_two(next, last), step);
            black_box(table.row(context_of(last), &mut row));
            black_box((table.total(NO_CONTEXT), table.count(NO_CONTEXT, 3)));
        }
        table.for_each(|key, count| {
            black_box((key, count));
        });
    });
    assert_eq!(successors, 0);

    let (counters, ratio) = (Counters::<6, 64>::default(), Ratio::<8, 64>::default());
    let mut counts = [0; 24];
    let histograms = allocations(|| {
        for index in 0..1000 {
            counters.add(index % 24);
            counters.add_step(3, 16);
            counters.add_steps(index % 24, [9, 7], Often { small: 1, large: 4 * u32::from(index % 4 == 0) });
            ratio.vote(index % 8, 5, 2);
            black_box((counters.get(3), counters.total(), ratio.get(2)));
        }
        counters.halve();
        counters.snapshot(&mut counts);
    });
    assert_eq!(histograms, 0);

    let sessions = SessionTable::<8>::new(64).unwrap();
    let session_steps = allocations(|| {
        for id in 0..1000 {
            let (handle, _) = sessions.transition(SessionKey(id % 200), AgentId(1));
            sessions.begin(handle);
            sessions.store(handle, Word::LastStart, id);
            sessions.update(handle, Word::Extra(7), |before| before.unwrap_or(0) + 1);
            black_box((sessions.load(handle, Word::LastFinish), sessions.position(handle)));
            sessions.end(handle);
            black_box(sessions.find(SessionKey(id)));
        }
    });
    assert_eq!(session_steps, 0);

    let (entry, cell, writer) = (PublishedEntry::default(), Seqlock::<4>::default(), SingleWriter::default());
    let published = allocations(|| {
        for key in 1..1000 {
            let guard = writer.try_enter();
            assert!(guard.is_some() && writer.try_enter().is_none());
            entry.publish(key, 1);
            cell.write(&[key; 4]);
            black_box((entry.get(key), cell.try_read()));
        }
    });
    assert_eq!(published, 0);

    let mut identity = Identity::new(Options { blocks: 4096, sessions: 64, marks: 512 }).unwrap();
    let mut keys: Vec<u64> = (1..=300).collect();
    let mut marks = Vec::with_capacity(2 * PROMPT_MARKS);
    let infer = allocations(|| {
        for call in 0..1000 {
            keys[30..].iter_mut().for_each(|key| *key = key.wrapping_add(call % 3));
            let inferred = identity.started(black_box(&keys[..200]));
            identity.ended(inferred.call, &keys[200..]);
            identity::marks(keys.iter().map(|&key| (key ^ call) as u32), PROMPT_MARKS, &mut marks);
            black_box(identity.join(inferred.call, &marks));
            identity.answered(inferred.call, &marks);
        }
    });
    assert_eq!(infer, 0, "identity");
}
