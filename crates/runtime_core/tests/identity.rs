//! Identity from prefixes: what is told apart, and what hostile prompts cannot do.

use std::collections::HashSet;

use proptest::prelude::*;
use runtime_core::identity::{
    marks, Identity, Inferred, Options, Started, ANCHORS, ANSWER_MARKS, NUMBERED, PROMPT_MARKS,
};
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
        let mut known = Identity::new(Options { blocks: 64, sessions: 8, marks: 64 }).unwrap();
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

/// Tokens of a text that nobody else has.
fn text(name: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| (mix(u64::from(name) << 32 | u64::from(i)) % 50_000) as u32).collect()
}

/// A call of an agent with a system prompt of its own that reads `texts` and answers `answer`.
fn reads(known: &mut Identity, system: u64, task: u64, texts: &[&[u32]], answer: &[u32]) -> Inferred {
    let started = known.started(&prompt(&[(system, 10), (task, 5)]));
    let mut found = Vec::new();
    let mut inferred = started;
    if started.is_new {
        let tokens = [text(system as u32, 160), texts.concat(), text(9_999, 3)].concat();
        marks(tokens, PROMPT_MARKS, &mut found);
        inferred = known.join(started.call, &found).unwrap_or(started);
    }
    known.ended(inferred.call, &[]);
    marks(answer.iter().copied(), ANSWER_MARKS, &mut found);
    known.answered(inferred.call, &found);
    inferred
}

#[test]
fn a_text_is_known_again_inside_another_by_its_marks() {
    let (mut of_answer, mut of_prompt) = (Vec::new(), Vec::new());
    for name in 0..200 {
        let answer = text(name, 300);
        marks(answer.iter().copied(), ANSWER_MARKS, &mut of_answer);
        assert!(of_answer.len() >= 8 && of_answer.is_sorted(), "a place in eight has one");
        marks([text(1_000 + name, 777), answer, text(2_000 + name, 555)].concat(), PROMPT_MARKS, &mut of_prompt);
        assert!(of_answer.iter().all(|mark| of_prompt.binary_search(mark).is_ok()));
        marks(text(1_000 + name, 2_000), PROMPT_MARKS, &mut of_prompt);
        assert!(of_answer.iter().all(|mark| of_prompt.binary_search(mark).is_err()));
    }
}

#[test]
fn marks_are_the_smallest_and_no_more_than_asked_for() {
    let (mut few, mut many) = (Vec::new(), Vec::new());
    marks(text(1, 40_000), 10_000, &mut many);
    marks(text(1, 40_000), 32, &mut few);
    assert!((4_500..5_500).contains(&many.len()));
    assert_eq!(few, many[..32]);
    marks(vec![7; 10_000], 32, &mut few);
    assert!(few.len() <= 1, "one piece, again and again");
    marks(text(1, 11), 32, &mut few);
    assert!(few.is_empty(), "too short for a mark");
}

#[test]
fn agents_with_prompts_of_their_own_join_the_run_whose_answer_they_quote() {
    let mut known = identity();
    let (plan, other_plan, code) = (text(1, 200), text(2, 200), text(3, 200));
    let planner = reads(&mut known, 10, 1, &[], &plan);
    let other_planner = reads(&mut known, 11, 2, &[], &other_plan);
    let coder = reads(&mut known, 20, 1, &[&plan], &code);
    let tester = reads(&mut known, 30, 1, &[&plan[50..120], &code], &[]);
    assert!(planner.is_new && other_planner.is_new && !coder.is_new && !tester.is_new);
    assert_eq!([coder.session, tester.session], [planner.session; 2]);
    assert_ne!(other_planner.session, planner.session);
    let numbers = [planner, coder, tester].map(|call| call.agent);
    assert_eq!(numbers, [0, ANCHORS as u16 + 1, ANCHORS as u16 + 2]);
    // A conversation goes on by its blocks; one that starts anew behind the same system prompt is the same agent's.
    assert_eq!(known.started(&prompt(&[(20, 10), (1, 5), (6, 2)])).session, planner.session);
    let anew = reads(&mut known, 20, 77, &[&code], &[]);
    assert_eq!((anew.session, anew.agent), (planner.session, coder.agent));
}

#[test]
fn what_was_said_in_two_runs_or_hardly_at_all_links_nobody() {
    let mut known = identity();
    let (phrase, plan) = (text(5, 60), text(1, 200));
    reads(&mut known, 10, 1, &[], &[&phrase[..], &plan].concat());
    reads(&mut known, 11, 2, &[], &phrase);
    assert!(reads(&mut known, 20, 3, &[&phrase], &[]).is_new, "a common phrase");
    assert!(reads(&mut known, 21, 4, &[&plan[..11]], &[]).is_new, "a few words");
    assert!(reads(&mut known, 22, 5, &[&text(8, 500)], &[]).is_new, "nobody's words");
    let of_both = text(6, 200);
    let first = reads(&mut known, 12, 6, &[], &of_both);
    let second = reads(&mut known, 13, 7, &[], &text(7, 200));
    let reader = reads(&mut known, 23, 8, &[&of_both, &text(7, 200)], &[]);
    assert!(reader.is_new, "as much of one as of the other");
    assert_ne!(first.session, second.session);
}

#[test]
fn agents_of_a_run_beyond_those_that_are_numbered_share_a_number() {
    let mut known = identity();
    let plan = text(1, 200);
    let planner = reads(&mut known, 10, 1, &[], &plan);
    let agents: Vec<u16> = (0..40).map(|i| reads(&mut known, 100 + i, 1, &[&plan], &[]).agent).collect();
    assert_eq!(agents[..3], [1, 2, 3].map(|i| ANCHORS as u16 + i));
    assert!(agents.iter().all(|&agent| agent <= ANCHORS as u16 + NUMBERED));
    assert_eq!(planner.agent, 0);
}

#[test]
fn a_session_forgotten_for_want_of_room_starts_anew() {
    let mut known = Identity::new(Options { sessions: 8, ..Options::default() }).unwrap();
    let first = call(&mut known, &prompt(&[(1, 20)]));
    for i in 0..8 {
        call(&mut known, &prompt(&[(100 + i, 20)]));
    }
    let again = call(&mut known, &prompt(&[(1, 20), (2, 2)]));
    assert!(again.is_new && again.session != first.session);
}

#[test]
fn sizes_out_of_range_are_refused_and_handles_of_nobody_are_passed_over() {
    for (blocks, sessions, marks) in
        [(0, 64, 64), (1 << 30, 64, 64), (1024, 0, 64), (1024, 1 << 17, 64), (1024, 64, 0), (1024, 64, 1 << 30)]
    {
        assert!(Identity::new(Options { blocks, sessions, marks }).is_err());
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
        said in prop::collection::vec(prop::collection::vec(0u64..9, 0..6), 200),
    ) {
        let mut twins = [0, 1].map(|_| Identity::new(Options { blocks: 64, sessions: 8, marks: 64 }).unwrap());
        let bytes = twins[0].bytes();
        let mut names = HashSet::new();
        for ((keys, ends, stray), said) in calls.iter().zip(&said) {
            let [one, two] = twins.each_mut().map(|twin| {
                let started = twin.started(keys);
                let inferred = twin.join(started.call, said).unwrap_or(started);
                if *ends {
                    twin.ended(inferred.call, keys);
                    twin.answered(inferred.call, said);
                } else {
                    twin.answered(Started::from_bits(*stray), said);
                    twin.ended(Started::from_bits(*stray), keys);
                }
                inferred
            });
            prop_assert_eq!(one, two);
            prop_assert!(one.session >> 63 == 1 && usize::from(one.agent) <= ANCHORS + usize::from(NUMBERED));
            prop_assert_eq!(one.is_new, names.insert(one.session), "a new session has a new name");
        }
        prop_assert_eq!(twins[0].bytes(), bytes);
    }
}
