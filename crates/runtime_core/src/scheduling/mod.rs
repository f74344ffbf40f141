//! What an engine asks about calls that wait, sessions whose tool runs, and idle capacity; and what it tells meanwhile.
//!
//! Scheduling policies are [`Policy`](crate::policy::Policy)s like the others: same trait, same list, chosen by name beside `kv_cache`. An engine
//! (the simulator, vLLM through Python) does three things:
//!
//! 1. Before the first call, [`Policies::wire`] with what it can supply. A policy that needs more is refused by name.
//!    [`Policies::prices`] says at any time what each policy has taken.
//! 2. It reports: the core's events ([`Policies::observe`]: calls, blocks, tools, session ends) and, through
//!    [`Policies::hear`], the [`Happening`]s of its scheduler.
//! 3. It asks, whenever it is about to admit calls: [`Policies::schedule`] fills one [`Decision`] per waiting call;
//!    [`Policies::gaps`] one [`Gap`] per session whose tool runs; [`Policies::idle`] names prefills for idle capacity.
//!
//! The engine admits by ascending rank, passes over calls that are held, and stops at the first that does not fit.
//! Before any policy is asked, the order is that of arrival and nothing is held: what policies leave alone stands.
//!
//! # Precedence
//!
//! safety > fairness > batch shaping > the rest. Weaker policies write first; stronger ones see their decisions, may change
//! all of them, and keep the order among what they are indifferent to. Fairness, for instance, decides whose turn it
//! is and leaves to batch shaping which of that tenant's calls it shall be.
//!
//! # Cost
//!
//! Slices belong to the caller; nothing is allocated per decision once as many calls have waited before. A policy guards
//! its state by one lock, held for one event or one answer; engines schedule from one thread, so nobody waits for it.

pub mod batch_shaping;
pub mod fairness;
pub mod speculation;
pub mod tool_gap;

use crate::error::{Error, Result};
use crate::ids::WorkloadId;
use crate::policy::Policies;
use crate::Runtime;

/// When a policy has the last word over another: the greater one decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Precedence {
    /// Everything else.
    #[default]
    Rest,
    /// Which calls and sessions run together.
    BatchShaping,
    /// Whose turn it is.
    Fairness,
    /// What must not happen.
    Safety,
}

/// Events, figures and predictions that a policy needs and an engine supplies, as a set.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Needs(u32);

impl Needs {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Core events of calls: start (admission), stored, end; with their blocks.
    pub const CALLS: Self = Self(1);
    /// Core events of tools: start and end.
    pub const TOOLS: Self = Self(1 << 1);
    /// Core event: the end of a session.
    pub const SESSION_ENDS: Self = Self(1 << 2);
    /// Core event: blocks that the engine has dropped by itself.
    pub const REMOVALS: Self = Self(1 << 3);
    /// [`Happening::Arrived`], and [`Happening::Withdrawn`] where calls can be withdrawn.
    pub const ARRIVALS: Self = Self(1 << 4);
    /// [`Happening::Admitted`].
    pub const ADMISSIONS: Self = Self(1 << 5);
    /// [`Happening::Served`].
    pub const SERVICE: Self = Self(1 << 6);
    /// [`Happening::Preempted`].
    pub const PREEMPTIONS: Self = Self(1 << 7);
    /// A tenant in [`Waiting`].
    pub const TENANTS: Self = Self(1 << 8);
    /// The counts of hits in [`Load`].
    pub const HITS: Self = Self(1 << 9);
    /// The counts of blocks in [`Load`].
    pub const POOL: Self = Self(1 << 10);
    /// What is resident of a waiting call's prompt, and its group.
    pub const PREFIXES: Self = Self(1 << 11);
    /// A host tier that sessions can be demoted to, and its link.
    pub const HOST_TIER: Self = Self(1 << 12);
    /// Prefills in idle capacity, see [`Policies::idle`].
    pub const IDLE_CAPACITY: Self = Self(1 << 13);
    /// Which agents a session calls next; the core predicts it from [`Needs::CALLS`].
    pub const PREDICTIONS: Self = Self(1 << 14);
    /// When a session calls again; the core predicts it from [`Needs::CALLS`] and, better, [`Needs::TOOLS`].
    pub const TIMES: Self = Self(1 << 15);
    /// All of the above.
    pub const ALL: Self = Self((1 << 16) - 1);

    const NAMES: [&'static str; 16] = [
        "starts and ends of calls",
        "starts and ends of tools",
        "ends of sessions",
        "blocks dropped by the engine",
        "arrivals of calls",
        "admissions of calls",
        "tokens served",
        "preemptions",
        "the tenant of a call",
        "counts of hit and prompt blocks",
        "counts of pool blocks",
        "resident prefixes of waiting calls",
        "a host tier",
        "prefills in idle capacity",
        "predictions of agents",
        "predictions of times",
    ];

    const KEYS: [&'static str; 16] = [
        "calls",
        "tools",
        "session_ends",
        "removals",
        "arrivals",
        "admissions",
        "service",
        "preemptions",
        "tenants",
        "hits",
        "pool",
        "prefixes",
        "host_tier",
        "idle_capacity",
        "predictions",
        "times",
    ];

    /// The one with this key, `service` for instance.
    pub fn from_key(key: &str) -> Option<Self> {
        Self::KEYS.iter().position(|&known| known == key).map(|bit| Self(1 << bit))
    }

    /// Keys of what is in the set.
    pub fn keys(self) -> impl Iterator<Item = &'static str> {
        Self::KEYS.iter().enumerate().filter(move |(bit, _)| self.0 & (1 << bit) != 0).map(|(_, &key)| key)
    }

    /// Both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in this set and not in the other.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether this holds all of the other.
    pub const fn contains(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// What is in the set, in words.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.iter().enumerate().filter(move |(bit, _)| self.0 & (1 << bit) != 0).map(|(_, &name)| name)
    }
}

impl std::fmt::Debug for Needs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

/// How busy the engine is, at the moment of a question.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Now, microseconds of the same clock as the events.
    pub now_us: u64,
    /// Calls that hold memory: prefilling or decoding.
    pub running_calls: u32,
    /// Blocks of the pool.
    pub pool_blocks: u32,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Blocks that running calls use.
    pub pinned_blocks: u32,
    /// Blocks that hold nothing; the remaining ones are cached and can be evicted.
    pub free_blocks: u32,
    /// Full prompt blocks of the calls admitted so far, and
    pub prompt_blocks: u64,
    /// of these, blocks that were resident. Both only ever grow; policies take differences.
    pub hit_blocks: u64,
    /// Tokens that this step can still compute.
    pub budget_tokens: u32,
    /// Bytes per second of the link to the host tier; 0 without one.
    pub host_bytes_per_s: u64,
}

/// A call that waits to be admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The call, as in the core's events.
    pub call: u64,
    /// Its workload.
    pub workload: WorkloadId,
    /// Its session.
    pub session: u64,
    /// Its agent.
    pub agent: u16,
    /// Whom it is served for, numbered by the engine; 0 where there is one tenant.
    pub tenant: u16,
    /// Since when it waits, microseconds. Stays the same when it waits again after a preemption.
    pub arrived_us: u64,
    /// Length of its prompt.
    pub prompt_tokens: u32,
    /// Of these, leading ones whose KV is on the device.
    pub resident_tokens: u32,
    /// The ones after those whose KV is in the host tier.
    pub host_tokens: u32,
    /// Key of the deepest block of its prompt that is resident, 0 if there is none: calls with the same one share it.
    pub group: u64,
}

impl Waiting {
    /// Prompt tokens that have to be computed.
    pub fn missing_tokens(&self) -> u32 {
        self.prompt_tokens.saturating_sub(self.resident_tokens).saturating_sub(self.host_tokens)
    }
}

/// What is to become of a waiting call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Lowest first; no two calls of one question have the same.
    pub rank: u32,
    /// The call is passed over until this time; 0, or any time that has come: not held.
    pub hold_until_us: u64,
}

impl Decision {
    /// Whether the call is to be passed over now.
    pub fn is_held(&self, now_us: u64) -> bool {
        self.hold_until_us > now_us
    }
}

/// What happens in an engine's scheduler, beyond the core's events.
///
/// A call's name is that of the core's events, and unique among all calls that the engine has, whatever their workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Happening {
    /// A call has begun to wait.
    Arrived(Waiting),
    /// A call that waited is withdrawn; it never runs.
    Withdrawn {
        /// The call.
        call: u64,
    },
    /// A waiting call runs from now on. Told after the core's `CallStart`.
    Admitted {
        /// The call, with what was resident when it was admitted.
        call: Waiting,
        /// It has run before and was preempted.
        again: bool,
    },
    /// What a running call got since it was last told; at the latest when it ends.
    Served {
        /// The call.
        call: u64,
        /// Prompt tokens computed for the first time.
        prefill_tokens: u32,
        /// Tokens computed again after a preemption.
        repeated_tokens: u32,
        /// Tokens generated.
        decoded_tokens: u32,
        /// Tokens held in the pool, integrated over time: token-microseconds.
        kv_token_us: u64,
    },
    /// A running call has lost its memory and waits again.
    Preempted {
        /// The call.
        call: u64,
    },
    /// A call has ended and holds nothing any more. Told after the core's `CallEnd`.
    Ended {
        /// The call.
        call: u64,
    },
}

/// A session whose tool runs: none of its calls waits or runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Its workload.
    pub workload: WorkloadId,
    /// The session.
    pub session: u64,
    /// The agent that called the tool.
    pub agent: u16,
    /// The tool's number, as in the core's events.
    pub tool: u16,
    /// Since when it runs, microseconds.
    pub started_us: u64,
    /// Tokens of the session's last call that are on the device.
    pub resident_tokens: u32,
    /// Those that are in the host tier.
    pub host_tokens: u32,
}

/// What is to become of a session's blocks while its tool runs. Evictions take released blocks first, then those nobody
/// decided about, and kept ones only when nothing else is left: keeping can never deadlock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Retention {
    /// As the cache policy sees fit.
    #[default]
    Undecided,
    /// They stay on the device.
    Keep,
    /// They go to the host tier and come back at the given time.
    Demote,
    /// They may go.
    Release,
}

/// Answer about one [`Gap`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GapDecision {
    /// What becomes of the blocks.
    pub retention: Retention,
    /// When to begin to bring demoted blocks back, microseconds; 0: when the session calls.
    pub bring_back_us: u64,
}

/// A prefill wanted in idle capacity: the first blocks of an earlier call's prompt, for a call that is expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefill {
    /// Workload of both calls.
    pub workload: WorkloadId,
    /// The session that is expected to call
    pub session: u64,
    /// this agent.
    pub agent: u16,
    /// The earlier call. An engine that no longer has its prompt leaves the prefill out.
    pub like_call: u64,
    /// How many leading blocks of its prompt.
    pub blocks: u32,
    /// P(the call comes and begins with them), in 1/65536.
    pub probability: u16,
}

impl Policies {
    /// Checks that an engine supplies what the policies need; returns what they need together, so that the engine can
    /// leave the rest out.
    pub fn wire(&self, supplied: Needs) -> Result<Needs> {
        let mut needed = Needs::NONE;
        for policy in self.iter() {
            let needs = policy.needs();
            if let Some(what) = needs.without(supplied).names().next() {
                let policy = match policy.about().name {
                    std::borrow::Cow::Borrowed(name) => name,
                    std::borrow::Cow::Owned(_) => "of your own",
                };
                return Err(Error::Unsupplied { policy, what });
            }
            needed = needed.and(needs);
        }
        Ok(needed)
    }

    /// Tells every policy what the engine's scheduler did.
    pub fn hear(&self, runtime: &Runtime, now_us: u64, happenings: &[Happening]) {
        self.tell(happenings.len() as u64, |policy| {
            for happening in happenings {
                policy.hear(runtime, now_us, happening);
            }
        });
    }

    /// Orders and holds waiting calls: fills `decisions`, one for each of `waiting`.
    ///
    /// Ranks are 0, 1, 2, ... in the order in which to admit. Everything beyond the shorter of the slices is left alone.
    pub fn schedule(&self, runtime: &Runtime, load: &Load, waiting: &[Waiting], decisions: &mut [Decision]) {
        let n = waiting.len().min(decisions.len());
        let (waiting, decisions) = (&waiting[..n], &mut decisions[..n]);
        first_come_first_served(waiting, decisions);
        self.ask((0..self.len()).rev(), |policy| policy.schedule(runtime, load, waiting, decisions));
    }

    /// Decides about sessions whose tool runs; asked when a tool starts, when memory runs short, and when a time to
    /// bring back has passed. The strongest policy that decides about a session has the last word.
    pub fn gaps(&self, runtime: &Runtime, load: &Load, gaps: &[Gap], decisions: &mut [GapDecision]) {
        let n = gaps.len().min(decisions.len());
        decisions[..n].fill(GapDecision::default());
        self.ask((0..self.len()).rev(), |policy| policy.gaps(runtime, load, &gaps[..n], &mut decisions[..n]));
    }

    /// Names prefills for capacity that is idle now, most wanted first; returns how many of `prefills` were filled.
    ///
    /// An answer replaces the one before: what is under way and no longer named is cancelled. Engines ask at every step
    /// that has budget left, and take an idle engine's silence (no question) as an empty answer.
    pub fn idle(&self, runtime: &Runtime, load: &Load, prefills: &mut [Prefill]) -> usize {
        let mut filled = 0;
        self.ask(0..self.len(), |policy| filled += policy.idle(runtime, load, &mut prefills[filled..]));
        filled
    }
}

/// Ranks in order of arrival.
fn first_come_first_served(waiting: &[Waiting], decisions: &mut [Decision]) {
    for (i, decision) in decisions.iter_mut().enumerate() {
        *decision = Decision { rank: i as u32, hold_until_us: 0 };
    }
    // Engines keep their queue in order of arrival, but for calls that were preempted.
    if waiting.is_sorted_by_key(|call| call.arrived_us) {
        return;
    }
    decisions.sort_unstable_by_key(|at| (waiting[at.rank as usize].arrived_us, at.rank));
    // Position -> call becomes call -> position, cycle by cycle; what is done carries a mark.
    const DONE: u32 = 1 << 31;
    for start in 0..decisions.len() {
        let (mut position, mut call) = (start, decisions[start].rank);
        while call & DONE == 0 {
            let next = decisions[call as usize].rank;
            decisions[call as usize].rank = position as u32 | DONE;
            (position, call) = (call as usize, next);
        }
    }
    for decision in decisions {
        decision.rank &= !DONE;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::policy::{About, Policy};
    use crate::runtime::Options;

    struct Says(&'static str, Precedence, Needs);

    impl Policy for Says {
        fn about(&self) -> About {
            About { name: self.0.into(), observes: "", decides: "", costs: "" }
        }

        fn needs(&self) -> Needs {
            self.2
        }

        fn precedence(&self) -> Precedence {
            self.1
        }

        /// Weaker policies have written already: adds its own letter's place to what is there.
        fn schedule(&self, _: &Runtime, _: &Load, _: &[Waiting], decisions: &mut [Decision]) {
            for decision in decisions {
                decision.hold_until_us = decision.hold_until_us * 10 + self.1 as u64 + 1;
            }
        }
    }

    fn waiting(call: u64, arrived_us: u64) -> Waiting {
        Waiting {
            call,
            workload: WorkloadId(0),
            session: call,
            agent: 0,
            tenant: 0,
            arrived_us,
            prompt_tokens: 100,
            resident_tokens: 0,
            host_tokens: 0,
            group: 0,
        }
    }

    fn ranks(arrivals: &[u64]) -> Vec<u32> {
        let runtime = Runtime::new(Options::for_pool(16)).unwrap();
        let calls: Vec<Waiting> = arrivals.iter().enumerate().map(|(i, &at)| waiting(i as u64, at)).collect();
        let mut decisions = vec![Decision { rank: 77, hold_until_us: 77 }; calls.len()];
        Policies::new(Vec::new()).schedule(&runtime, &Load::default(), &calls, &mut decisions);
        assert!(decisions.iter().all(|decision| !decision.is_held(0)));
        decisions.iter().map(|decision| decision.rank).collect()
    }

    #[test]
    fn without_policies_calls_are_ranked_by_arrival_and_equals_by_place() {
        assert_eq!(ranks(&[1, 2, 3]), [0, 1, 2]);
        assert_eq!(ranks(&[9, 4, 7, 4, 1]), [4, 1, 3, 2, 0]);
        let arrivals: Vec<u64> = (0..500u64).map(|i| crate::ids::mix(i) % 100).collect();
        let found = ranks(&arrivals);
        let mut order: Vec<usize> = (0..arrivals.len()).collect();
        order.sort_by_key(|&i| arrivals[i]);
        assert!(order.iter().enumerate().all(|(rank, &i)| found[i] == rank as u32));
    }

    #[test]
    fn the_stronger_policy_writes_last_in_whatever_order_they_are_named() {
        let runtime = Runtime::new(Options::for_pool(16)).unwrap();
        let one = |precedence| -> Box<dyn Policy> { Box::new(Says("one", precedence, Needs::NONE)) };
        let policies = Policies::new(vec![one(Precedence::Rest), one(Precedence::Safety), one(Precedence::Fairness)]);
        let mut decisions = [Decision::default()];
        policies.schedule(&runtime, &Load::default(), &[waiting(1, 0)], &mut decisions);
        assert_eq!(decisions[0].hold_until_us, 134);
    }

    #[test]
    fn an_engine_that_lacks_an_event_is_refused_with_the_policy_and_the_event() {
        let policies = Policies::new(vec![
            Box::new(Says("calm", Precedence::Rest, Needs::CALLS)),
            Box::new(Says("keen", Precedence::Rest, Needs::CALLS.and(Needs::SERVICE))),
        ]);
        assert_eq!(policies.wire(Needs::ALL), Ok(Needs::CALLS.and(Needs::SERVICE)));
        let error = policies.wire(Needs::ALL.without(Needs::SERVICE)).unwrap_err();
        assert_eq!(error, Error::Unsupplied { policy: "keen", what: "tokens served" });
        assert!(error.to_string().contains("keen") && error.to_string().contains("tokens served"));
    }

    /// Takes 20 ms to hear of anything, 30 to order and none for the rest: more than a busy machine takes from the other one.
    struct Slow;

    impl Policy for Slow {
        fn about(&self) -> About {
            About { name: "slow".into(), observes: "", decides: "", costs: "" }
        }

        fn hear(&self, _: &Runtime, _: u64, _: &Happening) {
            std::thread::sleep(Duration::from_millis(20));
        }

        fn schedule(&self, _: &Runtime, _: &Load, _: &[Waiting], _: &mut [Decision]) {
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    #[test]
    fn every_policy_is_priced_by_what_it_takes() {
        let runtime = Runtime::new(Options::for_pool(16)).unwrap();
        let quick = Says("quick", Precedence::Fairness, Needs::NONE);
        let policies = Policies::new(vec![Box::new(Slow), Box::new(quick)]);
        let (load, mut decisions) = (Load::default(), [Decision::default()]);
        for _ in 0..3 {
            policies.schedule(&runtime, &load, &[waiting(1, 0)], &mut decisions);
        }
        policies.idle(&runtime, &load, &mut []);
        policies.hear(&runtime, 0, &[Happening::Ended { call: 1 }, Happening::Ended { call: 2 }]);
        let prices: Vec<_> = policies.prices().collect();
        assert_eq!([prices[0].name.as_ref(), prices[1].name.as_ref()], ["quick", "slow"]);
        for price in &prices {
            assert_eq!((price.questions, price.events), (4, 2), "the first report is timed");
        }
        let (quick, slow) = (&prices[0], &prices[1]);
        assert!(slow.question_ns >= 90_000_000 && slow.event_ns >= 40_000_000, "{slow:?}");
        assert!(quick.question_ns < slow.question_ns && quick.event_ns < slow.event_ns, "{prices:?}");
        // One report in sixteen is timed.
        for _ in 0..15 {
            policies.hear(&runtime, 0, &[]);
        }
        assert_eq!(policies.prices().next().unwrap().events, 2);
        policies.hear(&runtime, 0, &[Happening::Ended { call: 3 }]);
        assert_eq!(policies.prices().next().unwrap().events, 3);
    }

    #[test]
    fn every_need_has_a_name_and_a_key() {
        assert_eq!(Needs::ALL.names().count(), 16);
        assert!(Needs::ALL.keys().all(|key| Needs::from_key(key).unwrap().keys().eq([key])));
        assert_eq!(Needs::from_key("weather"), None);
        assert_eq!(Needs::HOST_TIER.names().collect::<Vec<_>>(), ["a host tier"]);
    }
}
