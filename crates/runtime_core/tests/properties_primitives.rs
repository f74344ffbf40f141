//! Random operation sequences against naive twins.

use proptest::collection::vec;
use proptest::prelude::*;
use runtime_core::error::Error;
use runtime_core::histogram::{Counters, Ratio};
use runtime_core::ids::{AgentId, SessionKey};
use runtime_core::merge::{Merged, Publication, Section, Shape};
use runtime_core::sessions::{Previous, SessionTable, Word};
use runtime_core::successors::SuccessorTable;
use std::collections::HashMap;

#[path = "support/events.rs"]
mod events;

proptest! {
    #[test]
    fn an_unfilled_table_counts_exactly(
        observations in vec((0_u64..40, 0_u16..3), 0..600),
    ) {
        // 40 contexts of 3 successors over 64 sets of 32 ways: no set can fill.
        let table = SuccessorTable::<64, 120, { 1 << 20 }>::default();
        let mut oracle = HashMap::<(u64, u16), u32>::new();
        for (context, successor) in observations {
            prop_assert!(table.add(context, successor));
            *oracle.entry((context, successor)).or_default() += 1;
        }
        for context in 0..40 {
            let mut row = [(0, 0); 8];
            let length = table.row(context, &mut row);
            let row: HashMap<u16, u32> = row[..length].iter().copied().collect();
            let of_context = oracle.iter().filter(|((known, _), _)| *known == context);
            let expected: HashMap<u16, u32> = of_context.map(|((_, id), n)| (*id, *n)).collect();
            prop_assert_eq!(table.total(context), expected.values().sum::<u32>());
            prop_assert_eq!(row, expected);
        }
        let mut visited = 0;
        table.for_each(|_, count| visited += count);
        prop_assert_eq!(visited, oracle.values().sum::<u32>());
    }

    #[test]
    fn a_full_table_never_counts_more_than_was_observed(
        observations in vec((0_u64..10, 0_u16..10), 0..2000),
        limit_is_low in any::<bool>(),
    ) {
        let low = SuccessorTable::<2, 4, 16>::default();
        let high = SuccessorTable::<2, 4, 4096>::default();
        let mut oracle = HashMap::<(u64, u16), u32>::new();
        for (context, successor) in observations {
            if limit_is_low { low.add(context, successor) } else { high.add(context, successor) };
            *oracle.entry((context, successor)).or_default() += 1;
        }
        for ((context, successor), observed) in oracle {
            if limit_is_low {
                prop_assert!(low.count(context, successor) <= observed.min(15));
            } else {
                prop_assert!(high.count(context, successor) <= observed);
            }
        }
    }

    #[test]
    fn a_halving_row_keeps_the_shares_of_an_exponential_window(
        shares in vec(1_u32..20, 3..6),
    ) {
        let table = SuccessorTable::<1, 8, 512>::default();
        let cycle: Vec<u16> = (0_u16..).zip(&shares).flat_map(|(id, n)| vec![id; *n as usize]).collect();
        for step in 0..20_000 {
            table.add(0, cycle[step * 7919 % cycle.len()]);
        }
        let total = f64::from(table.total(0));
        for (id, share) in (0_u16..).zip(&shares) {
            // `step * 7919` visits every place of the cycle equally often unless they share a factor.
            let expected = f64::from(*share) / cycle.len() as f64;
            let got = f64::from(table.count(0, id)) / total;
            prop_assert!((got - expected).abs() < 0.02, "{} instead of {}", got, expected);
        }
    }

    #[test]
    fn counters_agree_with_a_slow_twin_that_halves_at_the_limit(
        steps in vec((0_usize..10, 1_u32..300), 0..800),
    ) {
        let counters = Counters::<2, 1024>::default();
        let mut oracle = [0_u32; 8];
        for (index, step) in steps {
            counters.add_step(index, step);
            let index = index.min(7);
            oracle[index] += step.min(256);
            if oracle[index] >= 1024 {
                oracle = oracle.map(|count| count / 2);
            }
            let mut counts = [0; 8];
            counters.snapshot(&mut counts);
            prop_assert_eq!(counts.map(u32::from), oracle);
        }
        prop_assert_eq!(counters.total(), oracle.iter().sum::<u32>());
    }

    #[test]
    fn a_ratio_follows_the_share_of_hits(
        votes in vec((1_u32..50, 0_u32..60), 50..600),
    ) {
        let ratio = Ratio::<1, 0x4000>::default();
        let (mut expected, mut hits) = (0.0, 0.0);
        for (blocks, hit) in &votes {
            ratio.vote(0, *blocks, *hit);
            expected += 1.0;
            hits += f64::from(*hit.min(blocks)) / f64::from(*blocks);
        }
        let (counted, hit) = ratio.get(0);
        prop_assert!((f64::from(counted) - 16.0 * expected).abs() < 0.5);
        // Each vote is rounded to a sixteenth.
        prop_assert!((f64::from(hit) / 16.0 - hits).abs() <= 0.5 / 16.0 * expected + 1e-9);
    }

    #[test]
    fn sessions_within_capacity_agree_with_a_map(
        steps in vec((0_u64..8, 0_u16..5, 0_u64..1 << 50), 0..400),
    ) {
        // Eight sessions in one set of eight: nothing is ever recycled.
        let table = SessionTable::<2>::new(8).unwrap();
        let mut oracle = HashMap::<u64, (Previous, u64)>::new();
        for (key, agent, value) in steps {
            let (handle, previous) = table.transition(SessionKey(key), AgentId(agent));
            let entry = oracle.entry(key).or_insert((Previous::NONE, 0));
            prop_assert_eq!(previous, entry.0);
            entry.0 = Previous {
                prev: previous.last,
                last: AgentId(agent),
                steps: previous.steps + 1,
            };
            entry.1 = value.min((1 << 48) - 1);
            prop_assert!(table.store(handle, Word::Extra(1), value));
        }
        for (key, (position, value)) in oracle {
            let handle = table.find(SessionKey(key)).unwrap();
            prop_assert_eq!(table.position(handle), Some(position));
            prop_assert_eq!(table.load(handle, Word::Extra(1)), Some(value));
        }
    }

    #[test]
    fn recycled_sessions_start_afresh_and_live_ones_never_mix(
        steps in vec((0_u64..40, any::<u8>()), 0..600),
    ) {
        let table = SessionTable::<1>::new(16).unwrap();
        let mut handles = HashMap::new();
        for (key, action) in steps {
            let (handle, fresh) = table.enter(SessionKey(key));
            if fresh {
                prop_assert_eq!(table.load(handle, Word::Extra(0)), None);
                prop_assert_eq!(table.position(handle), Some(Previous::NONE));
            } else {
                prop_assert_eq!(handles.get(&key), Some(&handle));
                prop_assert_eq!(table.load(handle, Word::Extra(0)), Some(key));
            }
            handles.insert(key, handle);
            prop_assert!(table.store(handle, Word::Extra(0), key));
            match action % 4 {
                0 => prop_assert!(table.begin(handle)),
                1 => {
                    let before = table.in_flight(handle);
                    prop_assert_eq!(table.end(handle), before > 0);
                    prop_assert_eq!(table.in_flight(handle), before.saturating_sub(1));
                }
                2 => prop_assert!(table.retire(handle)),
                _ => {}
            }
            prop_assert!(table.occupied() <= 16);
        }
    }
}

fn section(dense: bool) -> impl Strategy<Value = Section<u32>> {
    let counts = vec(any::<u32>(), 4).prop_map(Section::Dense);
    let keyed = proptest::collection::btree_map(any::<u64>(), any::<u32>(), 0..6)
        .prop_map(|pairs| Section::Keyed(pairs.into_iter().collect()));
    if dense {
        counts.boxed()
    } else {
        keyed.boxed()
    }
}

/// Few replicas and versions, so that repeats and conflicting versions are common.
fn publication() -> impl Strategy<Value = Publication> {
    (0_u64..4, 0_u64..4, section(true), section(false)).prop_map(|(replica, version, dense, keyed)| Publication {
        replica,
        version,
        sections: vec![dense, keyed],
    })
}

fn merged(publications: &[Publication]) -> Merged {
    let mut state = Merged::new(vec![Shape::Dense(4), Shape::Keyed(6)], 4);
    for publication in publications {
        state.merge(&publication.encode()).unwrap();
    }
    state
}

fn join(mut left: Merged, right: &Merged) -> Merged {
    for publication in right.publications() {
        left.merge_publication(publication.clone()).unwrap();
    }
    left
}

proptest! {
    #[test]
    fn merging_is_commutative_associative_and_idempotent(
        a in vec(publication(), 0..6),
        b in vec(publication(), 0..6),
        c in vec(publication(), 0..6),
    ) {
        let [a, b, c] = [a, b, c].map(|publications| merged(&publications));
        prop_assert_eq!(join(a.clone(), &b), join(b.clone(), &a));
        let left = join(join(a.clone(), &b), &c);
        prop_assert_eq!(&left, &join(a.clone(), &join(b, &c)));
        prop_assert_eq!(&join(left.clone(), &a), &left);
        prop_assert_eq!(join(left.clone(), &left), left);
    }

    #[test]
    fn sums_do_not_depend_on_the_order_of_arrival(
        publications in vec(publication(), 0..8).prop_shuffle(),
    ) {
        let mut backwards = publications.clone();
        backwards.reverse();
        prop_assert_eq!(merged(&publications).sums(None), merged(&backwards).sums(None));
    }

    #[test]
    fn a_publication_survives_encoding(publication in publication()) {
        prop_assert_eq!(Publication::decode(&publication.encode()), Ok(publication));
    }

    #[test]
    fn a_flipped_bit_is_an_error_and_changes_nothing(
        known in publication(),
        publication in publication(),
        at in any::<prop::sample::Index>(),
    ) {
        let mut state = merged(&[known]);
        let before = state.clone();
        let mut bytes = publication.encode();
        let bit = at.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(state.merge(&bytes).is_err());
        prop_assert_eq!(state, before);
    }

    #[test]
    fn a_cut_publication_says_how_much_is_missing(
        publication in publication(),
        at in any::<prop::sample::Index>(),
    ) {
        let bytes = publication.encode();
        let cut = &bytes[..at.index(bytes.len())];
        let error = Publication::decode(cut).unwrap_err();
        let length = cut.len() as u64;
        prop_assert!(
            matches!(error, Error::Truncated { needed, length: l } if l == length && needed > l),
            "{}", error
        );
    }

    #[test]
    fn arbitrary_bytes_are_an_error(bytes in vec(any::<u8>(), 0..200)) {
        prop_assert!(Publication::decode(&bytes).is_err());
    }
}

proptest! {
    #[test]
    fn arbitrary_events_keep_every_invariant(bytes in vec(any::<u8>(), 0..4000)) {
        events::run(&bytes);
    }
}
