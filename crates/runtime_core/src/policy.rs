//! Policies as plug-ins: what they hear, what they may decide, and who decides where several are active.
//!
//! A policy is one type that implements [`Policy`]. [`Policies`] holds those that are active, in order: every one hears
//! every event, and the first that answers a [`Request`] decides. Where it names fewer victims than were asked for, the
//! next is asked for the rest.
//!
//! Policies *propose*: an [`Action::Evict`] is checked against the index before anything goes. Only the index's own
//! orders ([`KvCachePolicy`], [`LruPolicy`]) answer with [`Action::Evicted`], which nobody else can make.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use crate::error::Result;
use crate::ids::WorkloadId;
use crate::kv::Expected;
use crate::runtime::{EventKind, Runtime};
use crate::scheduling::batch_shaping::BatchShapingPolicy;
use crate::scheduling::fairness::{FairnessPolicy, Per};
use crate::scheduling::speculation::SpeculationPolicy;
use crate::scheduling::tool_gap::ToolGapPolicy;
use crate::scheduling::{Decision, Gap, GapDecision, Happening, Load, Needs, Precedence, Prefill, Waiting};

/// One event, after the core has applied it.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    /// The workload.
    pub workload: WorkloadId,
    /// What happened.
    pub kind: EventKind,
    /// Session, as the caller names it.
    pub session: u64,
    /// Agent; for tool events the tool's number.
    pub agent: u16,
    /// Call.
    pub call: u64,
    /// Microseconds.
    pub time_us: u64,
    /// Blocks, root first, as in [`crate::runtime::Events`].
    pub blocks: &'a [u64],
    /// Of a starting call's blocks, leading ones that were resident.
    pub hit: usize,
}

/// What a policy is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Blocks to evict.
    Evict,
    /// Sessions whose blocks to bring back from a lower tier.
    Prefetch,
}

/// A question to the policies.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// What is wanted.
    pub kind: Kind,
    /// How many at most.
    pub n: usize,
    /// Now, microseconds.
    pub now_us: u64,
}

/// A block that the index has let go. Only this crate makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim(u64);

impl Victim {
    /// The block's key.
    pub const fn key(self) -> u64 {
        self.0
    }
}

/// What a policy decides.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Action {
    /// A proposal: evict this block if nothing needs it.
    Evict(u64),
    /// Done: this block has left the index.
    Evicted(Victim),
    /// Bring the blocks of the agent of a session back.
    Prefetch(Expected),
}

/// What a policy says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Name in configurations.
    pub name: Cow<'static, str>,
    /// What it observes.
    pub observes: &'static str,
    /// What it may decide.
    pub decides: &'static str,
    /// What an event and a decision cost.
    pub costs: &'static str,
}

/// A policy. Any thread may call any method at any time.
pub trait Policy: Send + Sync {
    /// What it is.
    fn about(&self) -> About;

    /// Hears of an event. The core has learned from it already.
    fn observe(&self, _runtime: &Runtime, _event: &Event<'_>) {}

    /// Whether [`Policy::observe`] does anything; batches are not walked for policies that only read the core.
    fn listens(&self) -> bool {
        true
    }

    /// Decides, or returns false: the next policy is asked then.
    fn act(&self, _runtime: &Runtime, _request: &Request, _decide: &mut dyn FnMut(Action)) -> Result<bool> {
        Ok(false)
    }

    /// A block has been evicted, whoever named it. Must not ask the runtime anything: it is busy.
    fn evicted(&self, _key: u64) {}

    /// What it needs of an engine; see [`Policies::wire`].
    fn needs(&self) -> Needs {
        Needs::NONE
    }

    /// Whether it promises that what two tenants are given while both wait differs by at most 2 max(w_p L, w_q M), see
    /// [`fairness`](crate::scheduling::fairness). Engines that measure it may stop where that does not hold.
    fn bounds_service(&self) -> bool {
        false
    }

    /// Over whom it has the last word.
    fn precedence(&self) -> Precedence {
        Precedence::Rest
    }

    /// Hears what the engine's scheduler did.
    fn hear(&self, _runtime: &Runtime, _now_us: u64, _happening: &Happening) {}

    /// Changes the order and the holds that weaker policies gave, see [`Policies::schedule`]. Both slices have one entry
    /// per call; ranks are 0, 1, 2, ... before and after.
    fn schedule(&self, _runtime: &Runtime, _load: &Load, _waiting: &[Waiting], _decisions: &mut [Decision]) {}

    /// Decides about sessions whose tool runs, see [`Policies::gaps`].
    fn gaps(&self, _runtime: &Runtime, _load: &Load, _gaps: &[Gap], _decisions: &mut [GapDecision]) {}

    /// Fills in prefills for idle capacity, see [`Policies::idle`]; returns how many.
    fn idle(&self, _runtime: &Runtime, _load: &Load, _prefills: &mut [Prefill]) -> usize {
        0
    }
}

/// The learned policy: lowest hit density goes first, blocks of expected calls come back.
#[derive(Clone, Copy, Debug, Default)]
pub struct KvCachePolicy;

impl Policy for KvCachePolicy {
    fn about(&self) -> About {
        About {
            name: "kv_cache".into(),
            observes: "calls, blocks, tools, session ends",
            decides: "evict, prefetch",
            costs: "an event: some tens of nanoseconds and one hash probe a block; 64 victims: some microseconds",
        }
    }

    fn listens(&self) -> bool {
        false
    }

    fn act(&self, runtime: &Runtime, request: &Request, decide: &mut dyn FnMut(Action)) -> Result<bool> {
        match request.kind {
            Kind::Evict => {
                runtime.evict(request.n, request.now_us, |key| decide(Action::Evicted(Victim(key))))?;
            }
            Kind::Prefetch => {
                const LEAST_PROBABILITY: f32 = 0.6;
                let mut expected = [Expected::NOBODY; 64];
                let n = request.n.min(expected.len());
                let n = runtime.expected(request.now_us, LEAST_PROBABILITY, &mut expected[..n])?;
                expected[..n].iter().for_each(|&one| decide(Action::Prefetch(one)));
            }
        }
        Ok(true)
    }
}

/// Least recently used first, leaf by leaf: what engines do without agentrt.
#[derive(Clone, Copy, Debug, Default)]
pub struct LruPolicy;

impl Policy for LruPolicy {
    fn about(&self) -> About {
        About {
            name: "lru".into(),
            observes: "calls and blocks",
            decides: "evict",
            costs: "as kv_cache, without scoring",
        }
    }

    fn listens(&self) -> bool {
        false
    }

    fn act(&self, runtime: &Runtime, request: &Request, decide: &mut dyn FnMut(Action)) -> Result<bool> {
        if request.kind != Kind::Evict {
            return Ok(false);
        }
        runtime.evict_oldest(request.n, request.now_us, |key| decide(Action::Evicted(Victim(key))))?;
        Ok(true)
    }
}

/// Names of the built-in policies.
pub const BUILT_IN: [&str; 7] =
    ["kv_cache", "lru", "fairness", "agent_fairness", "batch_shaping", "speculation", "tool_gap"];

/// A built-in policy by name.
pub fn built_in(name: &str) -> Option<Box<dyn Policy>> {
    match name {
        "kv_cache" => Some(Box::new(KvCachePolicy)),
        "lru" => Some(Box::new(LruPolicy)),
        "batch_shaping" => Some(Box::new(BatchShapingPolicy::default())),
        "fairness" => Some(Box::new(FairnessPolicy::new(Per::Tenant))),
        "speculation" => Some(Box::new(SpeculationPolicy::default())),
        "tool_gap" => Some(Box::new(ToolGapPolicy::default())),
        "agent_fairness" => Some(Box::new(FairnessPolicy::new(Per::Agent))),
        _ => None,
    }
}

/// The active policies, in the order in which they are asked.
#[derive(Default)]
pub struct Policies {
    list: Vec<Box<dyn Policy>>,
    listens: bool,
    refused: AtomicU64,
    meters: Vec<Meter>,
    heard: AtomicU64,
}

/// One report in so many is timed: reading a clock costs as much as hearing of one event.
const TIMED: u64 = 16;

/// What a scheduling policy has taken; whoever asks and reports counts on his own thread, so relaxed counters do.
#[derive(Default)]
struct Meter {
    questions: AtomicU64,
    question_ns: AtomicU64,
    events: AtomicU64,
    event_ns: AtomicU64,
}

/// What a scheduling policy has cost so far: [`Policies::prices`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Price {
    /// Its name.
    pub name: Cow<'static, str>,
    /// Questions that it was asked ([`Policies::schedule`], [`Policies::gaps`], [`Policies::idle`]), and
    pub questions: u64,
    /// what they took together, nanoseconds.
    pub question_ns: u64,
    /// Of the events that it heard ([`Policies::hear`]) those that were timed, about one in sixteen, and
    pub events: u64,
    /// what these took together, nanoseconds.
    pub event_ns: u64,
}

impl std::fmt::Debug for Policies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.list.iter().map(|policy| policy.about().name)).finish()
    }
}

impl Policies {
    /// Policies that are asked in this order; those that have the last word over others come first in any case.
    pub fn new(mut list: Vec<Box<dyn Policy>>) -> Self {
        list.sort_by_key(|policy| std::cmp::Reverse(policy.precedence()));
        let meters = list.iter().map(|_| Meter::default()).collect();
        Self { listens: list.iter().any(|policy| policy.listens()), list, meters, ..Self::default() }
    }

    /// What each has cost so far, in the order in which they are asked.
    pub fn prices(&self) -> impl Iterator<Item = Price> + '_ {
        self.list.iter().zip(&self.meters).map(|(policy, meter)| Price {
            name: policy.about().name,
            questions: meter.questions.load(Relaxed),
            question_ns: meter.question_ns.load(Relaxed),
            events: meter.events.load(Relaxed),
            event_ns: meter.event_ns.load(Relaxed),
        })
    }

    /// Asks each policy, the first one first, and counts what it takes. One look at the clock a policy, some 25 ns.
    pub(crate) fn ask<'a>(&'a self, policies: impl Iterator<Item = usize>, mut ask: impl FnMut(&'a dyn Policy)) {
        let mut before = Instant::now();
        for at in policies {
            ask(self.list[at].as_ref());
            let after = Instant::now();
            let meter = &self.meters[at];
            meter.questions.fetch_add(1, Relaxed);
            meter.question_ns.fetch_add((after - before).as_nanos() as u64, Relaxed);
            before = after;
        }
    }

    /// Tells each policy of so many events, and counts now and then what it takes.
    pub(crate) fn tell<'a>(&'a self, events: u64, mut tell: impl FnMut(&'a dyn Policy)) {
        if self.heard.fetch_add(1, Relaxed) % TIMED != 0 {
            return self.list.iter().for_each(|policy| tell(policy.as_ref()));
        }
        let mut before = Instant::now();
        for (policy, meter) in self.list.iter().zip(&self.meters) {
            tell(policy.as_ref());
            let after = Instant::now();
            meter.events.fetch_add(events, Relaxed);
            meter.event_ns.fetch_add((after - before).as_nanos() as u64, Relaxed);
            before = after;
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// What each says of itself.
    pub fn about(&self) -> impl Iterator<Item = About> + '_ {
        self.list.iter().map(|policy| policy.about())
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &dyn Policy> {
        self.list.iter().map(Box::as_ref)
    }

    /// Whether any policy wants to hear of events.
    pub fn listens(&self) -> bool {
        self.listens
    }

    /// Proposed victims that could not go: absent, in use, or above a resident block.
    pub fn refused_victims(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    /// Tells every policy of an event that the core has applied.
    pub fn observe(&self, runtime: &Runtime, event: &Event<'_>) {
        for policy in self.list.iter().filter(|policy| policy.listens()) {
            policy.observe(runtime, event);
        }
    }

    /// Asks the policies; `decide` hears what is decided, victims as [`Action::Evicted`] only. Returns how many.
    pub fn act(&self, runtime: &Runtime, request: &Request, decide: &mut dyn FnMut(Action)) -> Result<usize> {
        let mut done = 0;
        let mut proposed = Vec::new();
        let decide = &mut |action| {
            if let Action::Evicted(victim) = action {
                self.list.iter().filter(|policy| policy.listens()).for_each(|policy| policy.evicted(victim.key()));
            }
            decide(action);
        };
        for policy in &self.list {
            let rest = Request { n: request.n - done, ..*request };
            let answered = policy.act(runtime, &rest, &mut |action| match action {
                Action::Evict(key) => proposed.push(key),
                action => {
                    done += 1;
                    decide(action);
                }
            });
            let answered = match answered {
                Ok(answered) => answered,
                // What has been decided stands: its blocks have left the index already.
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            };
            if !proposed.is_empty() {
                let wanted = request.n.saturating_sub(done);
                let evicted = |key| decide(Action::Evicted(Victim(key)));
                let (taken, refused) = match runtime.evict_blocks(&proposed, wanted, request.now_us, evicted) {
                    Ok(counts) => counts,
                    Err(_) if done > 0 => break,
                    Err(error) => return Err(error),
                };
                done += taken;
                self.refused.fetch_add(refused as u64, Relaxed);
                proposed.clear();
            }
            if done >= request.n || (answered && request.kind != Kind::Evict) {
                break;
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{Events, Options};

    /// A runtime that holds two finished calls of two blocks each, the second one younger.
    fn two_prompts() -> Runtime {
        let runtime = Runtime::new(Options::for_pool(16)).unwrap();
        let workload = runtime.workload("test").unwrap();
        for call in 0..2u64 {
            let blocks = [call * 10 + 1, call * 10 + 2];
            let at = call * 1_000;
            assert_eq!(runtime.call_started(workload, call, call, 0, at, &blocks, &[]).unwrap(), 0);
            runtime.stored(workload, call, at, &blocks, &[]).unwrap();
            runtime.call_ended(workload, call, call, 0, at + 10, &[], &[]).unwrap();
        }
        runtime
    }

    struct Proposes(Vec<u64>);

    impl Policy for Proposes {
        fn about(&self) -> About {
            About { name: "proposes".into(), observes: "nothing", decides: "evict", costs: "nothing" }
        }

        fn act(&self, _: &Runtime, _: &Request, decide: &mut dyn FnMut(Action)) -> Result<bool> {
            self.0.iter().for_each(|&key| decide(Action::Evict(key)));
            Ok(!self.0.is_empty())
        }
    }

    fn evict(policies: &Policies, runtime: &Runtime, n: usize) -> Vec<u64> {
        let mut victims = Vec::new();
        let request = Request { kind: Kind::Evict, n, now_us: 5_000 };
        let done = policies.act(runtime, &request, &mut |action| match action {
            Action::Evicted(victim) => victims.push(victim.key()),
            other => panic!("{other:?}"),
        });
        assert_eq!(done.unwrap(), victims.len());
        victims
    }

    #[test]
    fn lru_names_the_deepest_block_of_the_oldest_prompt_first() {
        let runtime = two_prompts();
        let policies = Policies::new(vec![built_in("lru").unwrap()]);
        assert_eq!(evict(&policies, &runtime, 3), [2, 1, 12]);
        assert_eq!(runtime.resident_blocks().unwrap(), 1);
        assert_eq!(evict(&policies, &runtime, 9), [11]);
    }

    #[test]
    fn a_proposed_victim_goes_only_if_nothing_needs_it() {
        let runtime = two_prompts();
        let workload = runtime.workload("test").unwrap();
        assert_eq!(runtime.call_started(workload, 7, 7, 0, 4_000, &[11, 12], &[]).unwrap(), 2);
        // Absent, in use, above a resident block, fine, gone already.
        let policies = Policies::new(vec![Box::new(Proposes(vec![99, 12, 1, 2, 2]))]);
        assert_eq!(evict(&policies, &runtime, 8), [2]);
        assert_eq!(policies.refused_victims(), 4);
    }

    #[test]
    fn the_next_policy_is_asked_for_the_rest() {
        let runtime = two_prompts();
        let policies = Policies::new(vec![Box::new(Proposes(vec![12])), built_in("lru").unwrap()]);
        assert_eq!(evict(&policies, &runtime, 2), [12, 2]);
    }

    struct Fails;

    impl Policy for Fails {
        fn about(&self) -> About {
            About { name: "fails".into(), observes: "nothing", decides: "nothing", costs: "nothing" }
        }

        fn act(&self, _: &Runtime, _: &Request, _: &mut dyn FnMut(Action)) -> Result<bool> {
            Err(crate::Error::Busy { what: "the test" })
        }
    }

    #[test]
    fn victims_named_before_an_error_are_not_lost() {
        let runtime = two_prompts();
        let policies = Policies::new(vec![Box::new(Proposes(vec![12])), Box::new(Fails)]);
        assert_eq!(evict(&policies, &runtime, 2), [12]);
        let request = Request { kind: Kind::Evict, n: 2, now_us: 5_000 };
        let failed = Policies::new(vec![Box::new(Fails)]).act(&runtime, &request, &mut |_| {});
        assert_eq!(failed, Err(crate::Error::Busy { what: "the test" }));
    }

    #[test]
    fn no_more_victims_go_than_were_asked_for() {
        let runtime = two_prompts();
        let policies = Policies::new(vec![Box::new(Proposes(vec![12, 11, 2])), built_in("lru").unwrap()]);
        assert_eq!(evict(&policies, &runtime, 1), [12]);
        assert_eq!(runtime.resident_blocks().unwrap(), 3);
    }

    #[test]
    fn a_call_that_starts_twice_is_ended_once_and_leaves_nothing_pinned() {
        let runtime = two_prompts();
        let workload = runtime.workload("test").unwrap();
        let (blocks, offsets) = ([1, 2, 1, 2], [0, 2, 4, 4]);
        let events = Events {
            kinds: &[0, 0, 2],
            sessions: &[5, 5, 5],
            agents: &[1, 1, 1],
            calls: &[77, 77, 77],
            times_us: &[4_000, 4_001, 4_002],
            offsets: &offsets,
            blocks: &blocks,
        };
        runtime.observe(workload, &events).unwrap();
        assert_eq!(runtime.repairs().unwrap().duplicate_calls, 1);
        let policies = Policies::new(vec![built_in("kv_cache").unwrap()]);
        assert_eq!(evict(&policies, &runtime, 9).len(), 4);
    }
}
