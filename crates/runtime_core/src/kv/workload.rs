//! The learned state of one workload, and how identities teach it.
//!
//! | field | what | bytes |
//! |---|---|---|
//! | `transitions` | successors of (agent before last, last agent) and of (last agent), 77 sets of 8 | 5,005 |
//! | `drift` | share of right guesses of the next agent, quick and slow | 8 |
//! | `ranks` | rank of the next agent in the session's recency list | 16 |
//! | `content` | promises by agent, misses (called at once or later), class | 5,760 |
//! | `gaps` | gap histograms by agent, pace, tool; skill of four chains | 3,888 |
//! | `services` | histogram of durations of calls | 88 |
//! | `ends` | trials and successes by agent, step, size, tool | 256 |
//! | `sharing` | uses by other sessions by age; agent, step, degree and depth; remembered anchors | 2,464 |
//! | `warm` | agents whose votes are drawn | 4 |
//! | `followers` | uses by sessions that walk the owner's path, private or shared, by offset, lag and agent | 192 |
//! | `odds` | used and passed over, seen and due, by the lane's habit, place and sessions | 432 |
//! | | padding to a cache line | |
//! | victim queue | heads of 256 score classes (kept beside the index, counted here) | 1,056 |
//!
//! Everything is atomic and `Relaxed`: counts are facts of their own, a reader that sees one a moment early or late moves
//! a probability by one observation. Any number of threads may teach and ask at once.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::OnceLock;

use crate::histogram::{Counters, Lanes, Often};
use crate::ids::{spread, AgentId, SessionKey};
use crate::sessions::{self, Previous, SessionHandle, SessionTable, Word};
use crate::successors::{after_tool, context_of, context_of_two, SuccessorTable};

use super::content::{Content, ROWS};
use super::drift::{Drift, Guesses};
use super::ends::{Ends, Features};
use super::followers::Followers;
use super::gaps::{self, Context, Gaps, Services};
use super::index::QUEUE_BYTES;
use super::odds::Odds;
use super::sharing::Sharing;

/// Recent agents whose ranks are told apart.
pub(crate) const RANKS: usize = 7;
/// The rank of an agent that is not among them.
pub(crate) const NEW: usize = RANKS;

/// Sets of the transition table.
const SETS: usize = if cfg!(feature = "unbounded") { 4_096 } else { 77 };
/// Successors of a context that are counted.
pub(crate) const SUCCESSORS: usize = if cfg!(feature = "unbounded") { 64 } else { 8 };

/// Bytes of learned state that one workload may have.
pub const STATE_BUDGET_BYTES: usize = 20_000;

const _: () = assert!(size_of::<Workload>() + QUEUE_BYTES <= STATE_BUDGET_BYTES || cfg!(feature = "unbounded"));

/// What one workload has taught; fixed size, no pointers.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Workload {
    pub(crate) transitions: SuccessorTable<SETS, SUCCESSORS, 64>,
    pub(crate) drift: Drift,
    pub(crate) ranks: Counters<2>,
    pub(crate) content: Content,
    pub(crate) gaps: Gaps,
    pub(crate) services: Services,
    pub(crate) ends: Ends,
    pub(crate) sharing: Sharing,
    /// One bit for each agent whose small counts are drawn too; that of [`OTHERS`] for all without counts of their own.
    /// Read at every event and hardly ever written, so it lies apart from what is.
    warm: AtomicU32,
    pub(crate) followers: Followers,
    pub(crate) odds: Odds,
}

/// The bit of agents without counts of their own.
const OTHERS: u32 = if ROWS < 31 { ROWS as u32 } else { 31 };

impl Workload {
    /// Bytes of learned state, the victim queue's heads included.
    pub const STATE_BYTES: usize = size_of::<Self>() + QUEUE_BYTES;
}

/// Workloads that one runtime serves at most.
pub(crate) const MAX_WORKLOADS: usize = 64;

/// Name and learned state, set once.
type Slot = OnceLock<(String, Box<Workload>)>;

/// The registered workloads: appended to, never removed, read without a lock.
#[derive(Debug)]
pub(crate) struct Workloads {
    slots: Box<[Slot]>,
}

impl Workloads {
    pub(crate) fn new() -> Self {
        Self { slots: (0..MAX_WORKLOADS).map(|_| OnceLock::new()).collect() }
    }

    #[inline]
    pub(crate) fn get(&self, id: usize) -> Option<&Workload> {
        self.slots.get(id)?.get().map(|(_, workload)| &**workload)
    }

    pub(crate) fn name(&self, id: usize) -> Option<&str> {
        self.slots.get(id)?.get().map(|(name, _)| name.as_str())
    }

    /// The id of `name`, registered if it is new; `None` where all are taken.
    pub(crate) fn register(&self, name: &str) -> Option<usize> {
        for (id, slot) in self.slots.iter().enumerate() {
            let (known, _) = slot.get_or_init(|| (name.to_owned(), Box::default()));
            if known == name {
                return Some(id);
            }
        }
        None
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.iter().take_while(|slot| slot.get().is_some()).count()
    }
}

/// The words of a session that the policy keeps.
pub(crate) type Sessions = SessionTable<EXTRA>;
type SessionSlot<'a> = sessions::Slot<'a, EXTRA>;
const EXTRA: usize = 3;

/// Most recent four agents, then the next three, 16 bits each: unknown ones are `u16::MAX`.
const RECENT: Word = Word::Extra(0);
const RECENT_MORE: Word = Word::Extra(1);
/// Pace (fixed point, 8 fraction bits, 0 for none) 16 | tool 8 | size 8 | doubted 1 | over 1.
const STATUS: Word = Word::Extra(2);

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Status {
    /// Moving mean of log2 of the gaps in milliseconds, plus one, in 1/256; 0 before the first gap.
    pace: u16,
    tool: u8,
    size: u8,
    /// Silent for so long that it counts as ended.
    doubted: bool,
    /// Its caller has said that it is over.
    over: bool,
}

impl Status {
    fn unpack(word: Option<u64>) -> Self {
        let word = word.unwrap_or(0);
        Self {
            pace: word as u16,
            tool: (word >> 16) as u8,
            size: (word >> 24) as u8,
            doubted: word >> 32 & 1 == 1,
            over: word >> 33 & 1 == 1,
        }
    }

    fn pack(self) -> u64 {
        let flags = u64::from(self.doubted) | u64::from(self.over) << 1;
        u64::from(self.pace) | u64::from(self.tool) << 16 | u64::from(self.size) << 24 | flags << 32
    }

    fn pace_class(self) -> u8 {
        if self.pace == 0 {
            0
        } else {
            gaps::pace_class(f32::from(self.pace - 1) / 256.0)
        }
    }

    fn with_gap(mut self, log: f32) -> Self {
        let mean = if self.pace == 0 { log } else { 0.7 * f32::from(self.pace - 1) / 256.0 + 0.3 * log };
        self.pace = 1 + (mean * 256.0).min(60_000.0) as u16;
        self
    }
}

/// The agents that a session called last, most recent first: 16 bits each from the lowest, three in each of two words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Recent([u64; 2]);

/// Agents in one word of [`Recent`], and that word without any.
const IN_WORD: usize = 3;
const NOBODY: u64 = (1 << (16 * IN_WORD)) - 1;

impl Recent {
    #[inline]
    pub(crate) fn load(sessions: &Sessions, handle: SessionHandle) -> Self {
        Self::load_from(sessions.slot(handle))
    }

    #[inline]
    fn load_from(slot: SessionSlot<'_>) -> Self {
        Self([RECENT, RECENT_MORE].map(|word| slot.load(word).unwrap_or(NOBODY)))
    }

    #[inline]
    fn store(self, before: Self, slot: SessionSlot<'_>) {
        for (at, word) in [RECENT, RECENT_MORE].into_iter().enumerate() {
            if self.0[at] != before.0[at] {
                slot.store(word, self.0[at]);
            }
        }
    }

    /// The agents, most recent first.
    pub(crate) fn agents(self) -> [u16; RANKS] {
        let mut agents = [AgentId::UNKNOWN.0; RANKS];
        for (i, agent) in agents[..2 * IN_WORD].iter_mut().enumerate() {
            *agent = (self.0[i / IN_WORD] >> (16 * (i % IN_WORD))) as u16;
        }
        agents
    }

    /// Position of `agent` among the agents, [`NEW`] if it is none of them.
    #[inline]
    fn rank(self, agent: u16) -> usize {
        const LOW: u64 = 0x0001_0001_0001;
        // The highest bit of each lane that is zero; above the first such lane there may be more.
        let [low, high] = self.0.map(|word| {
            let other = word ^ (LOW * u64::from(agent));
            other.wrapping_sub(LOW) & !other & LOW << 15
        });
        // A word without the agent has 64 trailing zeros, four lanes; so after the second one comes `NEW`.
        const { assert!(IN_WORD + 4 == NEW) };
        let [first, second] = [low, high].map(|lanes| lanes.trailing_zeros() as usize / 16);
        if first < 4 {
            first
        } else {
            IN_WORD + second
        }
    }

    /// The agents after `agent`, which was at `rank`, has spoken.
    #[inline]
    fn front(self, agent: u16, rank: usize) -> Self {
        // The lanes below the rank move up by one and leave the lowest to the agent.
        let moved = |word: u64, lanes: usize, lowest: u64| {
            let kept = if lanes < IN_WORD { !0 << (16 * lanes) << 16 } else { 0 };
            (word & kept | (word << 16 | lowest) & !kept) & NOBODY
        };
        let [low, high] = self.0;
        let last = low >> (16 * (IN_WORD - 1));
        // By selection: which word the agent was in is anybody's guess.
        let stays = u64::from(rank < IN_WORD).wrapping_neg();
        let second = moved(high, rank.saturating_sub(IN_WORD), last);
        Self([moved(low, rank, u64::from(agent)), high & stays | second & !stays])
    }
}

/// Where a session stands, for predictions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    pub(crate) prev: u16,
    pub(crate) last: u16,
    pub(crate) context: Context,
    pub(crate) features: Features,
    pub(crate) in_flight: bool,
    pub(crate) last_start_us: u64,
    pub(crate) last_finish_us: u64,
    pub(crate) doubted: bool,
    /// Its caller has said that it is over, and it has not called since.
    pub(crate) over: bool,
}

impl Standing {
    /// Whether a tool runs after the session's last call; not known before that has ended.
    pub(crate) fn tool_runs(&self) -> Option<bool> {
        (!self.in_flight).then_some(self.features.tool != 0)
    }
}

/// As [`standing`]; `None` too if its caller has said that it is over.
pub(crate) fn standing_of_live(sessions: &Sessions, handle: SessionHandle) -> Option<Standing> {
    standing(sessions, handle).filter(|at| !at.over || at.in_flight)
}

/// Reads where a session stands; `None` if it is gone or has made no call.
pub(crate) fn standing(sessions: &Sessions, handle: SessionHandle) -> Option<Standing> {
    let at = sessions.position(handle)?;
    if !at.last.is_known() {
        return None;
    }
    let status = Status::unpack(sessions.load(handle, STATUS));
    Some(Standing {
        prev: at.prev.0,
        last: at.last.0,
        context: Context { agent: at.last.0, tool: status.tool, pace: status.pace_class() },
        features: Features { agent: at.last.0, steps: at.steps, size: status.size, tool: status.tool },
        in_flight: sessions.in_flight(handle) > 0,
        last_start_us: sessions.load(handle, Word::LastStart).unwrap_or(0),
        last_finish_us: sessions.load(handle, Word::LastFinish).unwrap_or(0),
        doubted: status.doubted,
        over: status.over,
    })
}

/// Whether one of four steps of sessions counts, fourfold. Drawn from its time, so that a replay repeats itself.
#[inline(always)]
fn is_drawn(handle: SessionHandle, time_us: u64) -> bool {
    // Twice: times at equal intervals would be drawn at intervals, too, and of some none at all.
    spread(spread(time_us ^ (handle.slot() as u64) << 40)) >> 62 == 0
}

impl Workload {
    /// How often a step of a session counts: four times in one case of four where counts are large, else once; and once
    /// many gaps have been learned, four times in one case of four everywhere.
    #[inline]
    pub(crate) fn often(&self, handle: SessionHandle, time_us: u64) -> Often {
        self.often_of(OTHERS, handle, time_us)
    }

    /// As [`Self::often`]; votes of an agent that is new all count where counts are small.
    #[inline(always)]
    fn often_of(&self, agent: u32, handle: SessionHandle, time_us: u64) -> Often {
        let large = if is_drawn(handle, time_us) { 4 } else { 0 };
        let is_warm = self.warm.load(Relaxed) >> agent.min(OTHERS) & 1 == 1;
        Often { small: if is_warm { large } else { 1 }, large }
    }

    /// Notes whether votes of an agent are drawn from now on.
    fn warm_up(&self, agent: u16) {
        let (all, own) = (1 << OTHERS, 1 << u32::from(agent).min(OTHERS));
        let now = match (self.gaps.are_many(), self.ends.are_many(agent)) {
            (false, _) => 0,
            (true, false) => all,
            (true, true) => all | own,
        };
        // Written only where something has changed; of two changes at once the second one may have to be noted again.
        let seen = self.warm.load(Relaxed);
        if seen & (all | own) != now {
            self.warm.store(seen & !(all | own) | now, Relaxed);
        }
    }

    /// A session calls `agent`. Lock-free, from any thread; every transition is counted exactly once, but for the half of
    /// it that [`Self::learn_transition`] draws. Guesses that are left in `guesses` must be counted by
    /// [`Self::count_guesses`].
    #[inline(always)]
    pub(crate) fn call_started(
        &self,
        sessions: &Sessions,
        key: SessionKey,
        agent: u16,
        now_us: u64,
        guesses: &mut Guesses,
    ) -> SessionHandle {
        let (handle, before) = sessions.transition(key, AgentId(agent));
        let slot = sessions.slot(handle);
        let recent = Recent::load_from(slot);
        let rank = recent.rank(agent);
        if before.last.is_known() {
            let finish_us = slot.load(Word::LastFinish);
            let often = self.often_of(u32::from(before.last.0), handle, finish_us.unwrap_or(now_us));
            let status = Status::unpack(slot.load(STATUS));
            let mut after = Status { tool: 0, doubted: false, over: false, ..status };
            let mut gap = None;
            if let Some(finish_us) = finish_us.filter(|_| slot.in_flight() == 0) {
                let log = gaps::log2_ms(now_us.saturating_sub(finish_us) as f32 / 1e6);
                after = after.with_gap(log);
                gap = Some(log);
            }
            slot.store(STATUS, after.pack());
            if !often.is_never() {
                self.vote(before, status, gap, rank, often);
            }
            if let Some(expected) = self.learn_transition(before, status.tool != 0, agent, often) {
                if guesses.push(expected == agent) {
                    self.count_guesses(guesses);
                }
            }
        }
        recent.front(agent, rank).store(recent, slot);
        slot.store(Word::LastStart, now_us);
        slot.begin();
        handle
    }

    /// Counts that a session has gone on, after which gap, and how recent the agent was that it called.
    #[inline(never)]
    fn vote(&self, before: Previous, status: Status, gap: Option<f32>, rank: usize, often: Often) {
        let agent = before.last.0;
        let features = Features { agent, steps: before.steps, size: status.size, tool: status.tool };
        self.ends.went_on(features, status.doubted, often);
        if let Some(log2_ms) = gap {
            let context = Context { agent, tool: status.tool, pace: status.pace_class() };
            self.gaps.learn(context, log2_ms, often);
        }
        match often.drawn() {
            Some(weight) => self.ranks.put(Lanes::new(rank, [1, 0], weight)),
            None => self.ranks.add_steps(rank, [1, 0], often),
        }
        self.warm_up(agent);
    }

    /// Counts who follows the last two agents, exactly, and who follows the last one: exactly where nothing was known of the
    /// two, else as often as small counts are. Returns who was expected.
    #[inline(always)]
    fn learn_transition(&self, before: Previous, ran_tool: bool, agent: u16, often: Often) -> Option<u16> {
        let (mut pair, mut one) = (context_of_two(before.prev, before.last), context_of(before.last));
        if ran_tool {
            (pair, one) = (after_tool(pair), after_tool(one));
        }
        let Some(expected) = self.transitions.learn(pair, agent, often.small) else {
            return self.transitions.learn(one, agent, often.small);
        };
        if often.small > 0 {
            self.transitions.add_votes(one, agent, often.small);
        }
        Some(expected)
    }

    /// Counts what a batch of events has left; where the order of agents has changed, discounts the past.
    #[inline(never)]
    pub(crate) fn count_guesses(&self, guesses: &mut Guesses) {
        if !guesses.is_empty() && self.drift.count(guesses) {
            self.transitions.discount();
        }
    }

    /// A call that waited starts: the gap and the transition were learned when it arrived.
    pub(crate) fn call_admitted(sessions: &Sessions, handle: SessionHandle, now_us: u64) {
        sessions.store(handle, Word::LastStart, now_us);
    }

    /// A call of the session has ended, whose answer filled `output_blocks`; [`SessionTable::end`] has been told.
    #[inline(always)]
    pub(crate) fn call_ended(sessions: &Sessions, handle: SessionHandle, now_us: u64, output_blocks: u32) {
        let slot = sessions.slot(handle);
        slot.store(Word::LastFinish, now_us);
        let size = (32 - output_blocks.leading_zeros()) as u8;
        let status = Status::unpack(slot.load(STATUS));
        slot.store(STATUS, Status { tool: 0, size, ..status }.pack());
    }

    /// A tool of the session has started: what follows is its gap.
    pub(crate) fn tool_started(sessions: &Sessions, handle: SessionHandle, tool: u8) {
        sessions.update(handle, STATUS, |word| Status { tool, ..Status::unpack(word) }.pack());
    }

    /// The session's caller says that it is over. Not counted as an end: what is learned is whether those call again that have
    /// not said so, and who says so at once leaves no doubt about the others.
    pub(crate) fn session_over(sessions: &Sessions, handle: SessionHandle) {
        sessions.update(handle, STATUS, |word| Status { over: true, ..Status::unpack(word) }.pack());
    }

    /// The session has been silent for too long.
    pub(crate) fn session_ended(&self, sessions: &Sessions, handle: SessionHandle, standing: &Standing) {
        let mut was_doubted = false;
        sessions.update(handle, STATUS, |word| {
            let status = Status::unpack(word);
            was_doubted = status.doubted;
            Status { doubted: true, ..status }.pack()
        });
        if !was_doubted {
            self.ends.ended(standing.features, self.often(handle, standing.last_finish_us));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histogram::UNIT;
    use crate::ids::mix;

    #[test]
    fn a_session_that_is_over_is_not_expected_until_it_calls_again() {
        let (workload, sessions) = (Workload::default(), Sessions::new(64).unwrap());
        let call = |at_us: u64| {
            let handle = workload.call_started(&sessions, SessionKey(1), 3, at_us, &mut Guesses::default());
            assert!(standing_of_live(&sessions, handle).is_some(), "while it runs");
            sessions.end(handle);
            Workload::call_ended(&sessions, handle, at_us + 1_000, 0);
            handle
        };
        let handle = call(1_000_000);
        let trials = workload.ends.row().total();
        Workload::session_over(&sessions, handle);
        assert!(standing_of_live(&sessions, handle).is_none() && standing(&sessions, handle).is_some());
        // Who says so leaves no doubt about the others: it is no evidence that sessions end in silence.
        assert_eq!(workload.ends.row().total(), trials);
        let again = call(2_000_000);
        assert!(standing_of_live(&sessions, again).is_some());
        let one = u32::from(workload.ends.row().get(0));
        assert_eq!((one, u32::from(workload.ends.row().get(1))), (UNIT, UNIT), "it has gone on, once");
    }

    #[test]
    fn after_many_gaps_votes_are_sampled_but_those_of_a_new_agent_all_count() {
        let (workload, sessions) = (Workload::default(), Sessions::new(64).unwrap());
        let mut now_us = 1_000_000;
        let mut call = |key: u64, agent: u16| {
            now_us += 1_000 + mix(now_us) % 1_000;
            let handle = workload.call_started(&sessions, SessionKey(key), agent, now_us, &mut Guesses::default());
            now_us += 1_000;
            sessions.end(handle);
            Workload::call_ended(&sessions, handle, now_us, 0);
        };
        // So many that counts are not halved among the calls below.
        for step in 0..20_800 {
            call(step % 16, 0);
        }
        let handle = sessions.enter(SessionKey(1)).0;
        let drawn = (0..4_000).filter(|&at| !workload.often(handle, at).is_never()).count();
        assert!((900..1_100).contains(&drawn), "{drawn} of 4,000 votes count");
        // At equal intervals, too.
        for interval in (1..2_000).chain([20_000, 33_333, 50_000, 1_000_000, 60_000_000]) {
            let is_counted = |&step: &u64| !workload.often(handle, 5_000_000 + step * interval).is_never();
            let drawn = (0..4_000).filter(is_counted).count();
            assert!((800..1_200).contains(&drawn), "{drawn} of 4,000 votes, one every {interval} us");
        }
        for key in 0..20 {
            // Two calls of an agent that nobody called before: one gap of its own each.
            call(100 + key, 7);
            call(100 + key, 7);
        }
        let successes = (0..2 * 8).map(|cell| workload.ends.row().get(2 * cell + 1)).collect::<Vec<_>>();
        assert_eq!(u32::from(successes[1 + 7]), 20 * UNIT, "{successes:?}");
    }
}
