//! Identity from prefixes: what is told apart, and what hostile prompts cannot do.

use std::collections::HashSet;

use proptest::prelude::*;
use runtime_core::identity::{Identity, Inferred, Options, Started, ANCHORS};
use runtime_core::ids::mix;

/// Keys of a prompt made of pieces: (name, blocks). Equal beginnings have equal keys.
fn prompt(pieces: &[(u64, usize)]) -> Vec<u64> {
    let mut key = 0;
    let mut keys = Vec::new();
    for &(name, blocks) in pieces {
        for i in 0..blocks {
            key = mix(key ^ mix(name << 20 | i as u64));
            keys.push(key);
        }
    }
    keys
}

fn call(identity: &mut Identity, keys: &[u64]) -> Inferred {
    let inferred = identity.started(keys);
    identity.ended(inferred.call, &[]);
    inferred
}

fn identity() -> Identity {
    Identity::new(Options::default()).unwrap()
}

#[test]
fn a_prompt_that_walks_on_is_the_same_session_and_a_stranger_is_not() {
    let mut known = identity();
    let first = call(&mut known, &prompt(&[(1, 40)]));
    let second = call(&mut known, &prompt(&[(1, 40), (2, 3)]));
    let third = call(&mut known, &prompt(&[(1, 40), (2, 3), (3, 200)]));
    let rewritten = call(&mut known, &prompt(&[(1, 40), (2, 3), (3, 90), (4, 5)]));
    let stranger = call(&mut known, &prompt(&[(9, 40)]));
    assert!(first.is_new && stranger.is_new);
    assert_eq!([first.session; 3], [second.session, third.session, rewritten.session]);
    assert_ne!(first.session, stranger.session);
}

#[test]
fn an_answer_is_part_of_the_path() {
    let mut known = identity();
    // Many sessions start alike; only the answer tells this one from them.
    for i in 0..8 {
        call(&mut known, &prompt(&[(1, 24), (100 + i, 4)]));
    }
    let start = known.started(&prompt(&[(1, 24)]));
    let answered = prompt(&[(1, 24), (2, 6)]);
    known.ended(start.call, &answered[24..]);
    let next = call(&mut known, &prompt(&[(1, 24), (2, 6), (3, 2)]));
    assert_eq!(next.session, start.session);
}

#[test]
fn sessions_that_start_with_the_same_system_prompt_are_told_apart() {
    let mut known = identity();
    let sessions: Vec<u64> = (0..50).map(|i| call(&mut known, &prompt(&[(1, 30), (100 + i, 6)])).session).collect();
    // One after the other they look like one session that rewrites its end, until it has done so too often.
    let apart = sessions[5..].iter().collect::<HashSet<_>>();
    assert_eq!(apart.len(), 45);
    for (i, session) in (0..50).zip(&sessions).skip(5) {
        assert_eq!(call(&mut known, &prompt(&[(1, 30), (100 + i, 6), (7, 9)])).session, *session);
    }
}

#[test]
fn a_second_call_while_the_first_one_runs_is_another_session() {
    let mut known = identity();
    let running = known.started(&prompt(&[(1, 20)]));
    let beside = known.started(&prompt(&[(1, 20)]));
    assert_ne!(running.session, beside.session);
}

#[test]
fn a_prompt_that_keeps_little_of_the_last_one_is_another_session() {
    let mut known = identity();
    let long = call(&mut known, &prompt(&[(1, 10), (2, 90)]));
    assert_ne!(call(&mut known, &prompt(&[(1, 10), (3, 5)])).session, long.session);
}

#[test]
fn a_run_of_the_same_task_is_another_session_and_a_step_back_is_not() {
    let mut known = identity();
    let first = call(&mut known, &prompt(&[(1, 20)]));
    let later = call(&mut known, &prompt(&[(1, 20), (2, 30)]));
    let step_back = call(&mut known, &prompt(&[(1, 20), (2, 12)]));
    assert_eq!([later.session, step_back.session], [first.session; 2]);
    let same_task = call(&mut known, &prompt(&[(1, 20)]));
    assert!(same_task.is_new, "it brings nothing new and is as long as what the session started with");
    let went_on = call(&mut known, &prompt(&[(1, 20), (2, 30), (3, 4)]));
    assert_eq!(went_on.session, first.session);
}

#[test]
fn what_another_run_may_share_must_be_half_of_the_last_prompt() {
    let mut known = identity();
    let first = call(&mut known, &prompt(&[(1, 20)]));
    call(&mut known, &prompt(&[(1, 20), (2, 40)]));
    let third_of_it = call(&mut known, &prompt(&[(1, 20), (3, 6)]));
    let beyond_the_start = call(&mut known, &prompt(&[(1, 20), (2, 4), (4, 6)]));
    assert!(third_of_it.is_new);
    assert_eq!(beyond_the_start.session, first.session);
}

#[test]
fn blocks_forgotten_in_the_middle_of_a_path_do_not_end_it() {
    // Tables of 64 blocks: some sets overflow while others have room.
    let mut kept = 0;
    for name in 0..100 {
        let mut known = Identity::new(Options { blocks: 64, sessions: 8 }).unwrap();
        let first = call(&mut known, &prompt(&[(name, 16)]));
        for other in 0..2 {
            call(&mut known, &prompt(&[(1_000 + 10 * name + other, 16)]));
        }
        kept += usize::from(call(&mut known, &prompt(&[(name, 16), (2_000, 2)])).session == first.session);
    }
    assert!(kept >= 90, "{kept} of 100 sessions found again");
}

#[test]
fn agents_are_named_by_the_system_prompt_that_many_sessions_start_with() {
    let mut known = identity();
    for i in 0..40 {
        call(&mut known, &prompt(&[(1, 4), (2, 20), (100 + i, 9)]));
        call(&mut known, &prompt(&[(5, 33), (300 + i, 9)]));
    }
    let mut agents = |pieces: [(u64, usize); 2]| -> HashSet<u16> {
        (0..8).map(|i| call(&mut known, &prompt(&[pieces[0], pieces[1], (1000 + i, 9)])).agent).collect()
    };
    let (planner, coder) = (agents([(1, 4), (2, 20)]), agents([(5, 33), (6, 0)]));
    let each = [HashSet::from([1]), HashSet::from([2])];
    assert_eq!([planner, coder], each, "one number each, in order of appearance");
    assert_eq!(call(&mut known, &prompt(&[(77, 12)])).agent, 0, "nobody's system prompt");
}

#[test]
fn a_session_forgotten_for_want_of_room_starts_anew() {
    let mut known = Identity::new(Options { blocks: 1 << 16, sessions: 8 }).unwrap();
    let first = call(&mut known, &prompt(&[(1, 20)]));
    for i in 0..8 {
        call(&mut known, &prompt(&[(100 + i, 20)]));
    }
    let again = call(&mut known, &prompt(&[(1, 20), (2, 2)]));
    assert!(again.is_new && again.session != first.session);
}

#[test]
fn sizes_out_of_range_are_refused_and_handles_of_nobody_are_passed_over() {
    for (blocks, sessions) in [(0, 64), (1 << 30, 64), (1024, 0), (1024, 1 << 17)] {
        assert!(Identity::new(Options { blocks, sessions }).is_err());
    }
    let mut known = identity();
    for bits in [0, 1, 4095, 4096, u32::MAX] {
        known.ended(Started::from_bits(bits), &[1, 2, 3]);
    }
    assert!(known.started(&[]).is_new);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Prompts over few keys share, fork, repeat and contradict each other in every way, in tables far too small.
    #[test]
    fn hostile_prompts_leave_memory_bounded_and_answers_deterministic(
        calls in prop::collection::vec((prop::collection::vec(0u64..6, 0..60), any::<bool>(), any::<u32>()), 1..200),
    ) {
        let mut twins = [0, 1].map(|_| Identity::new(Options { blocks: 64, sessions: 8 }).unwrap());
        let bytes = twins[0].bytes();
        let mut names = HashSet::new();
        for (keys, ends, stray) in &calls {
            let [one, two] = twins.each_mut().map(|twin| {
                let inferred = twin.started(keys);
                if *ends {
                    twin.ended(inferred.call, keys);
                } else {
                    twin.ended(Started::from_bits(*stray), keys);
                }
                inferred
            });
            prop_assert_eq!(one, two);
            prop_assert!(one.session >> 63 == 1 && usize::from(one.agent) <= ANCHORS);
            prop_assert_eq!(one.is_new, names.insert(one.session), "a new session has a new name");
        }
        prop_assert_eq!(twins[0].bytes(), bytes);
    }
}
