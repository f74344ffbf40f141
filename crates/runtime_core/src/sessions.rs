//! Who is where: a bounded table of sessions that any thread may advance.
//!
//! A slot holds a session's last two agents, its step count, two times and `EXTRA` words for the
//! policy. Capacity is fixed at construction; a new session takes a vacant slot or recycles the one
//! that was not used for longest, so any number of ids leaves memory where it was.
//!
//! | part of a slot | bytes |
//! |---|---|
//! | head: tag, generation, lap of the hand, used, calls in flight | 8 |
//! | identity (with the tag and the set: the full 64-bit key) | 8 |
//! | transition: previous agent, last agent, steps | 8 |
//! | last start, last finish | 16 |
//! | `EXTRA` words | 8 each |
//!
//! With the default `EXTRA = 8`: 104 bytes a session.
//!
//! **Handles.** [`SessionTable::enter`] gives a [`SessionHandle`]: slot and generation. It is a plain
//! value, holds nothing, and goes stale when the slot is recycled: reads then give `None`, writes do
//! nothing and say so. Every word carries the generation that wrote it (48 bits of payload, 16 of
//! generation), so a new tenant never sees an old one's words, with nothing cleared in between.
//! A handle is mistaken for a later one only if its slot is recycled 65,535 times meanwhile.
//!
//! **Recycling.** Slots form sets of eight; a hand goes round each set (CLOCK). A session used since
//! the hand's last visit, or with calls in flight, gets another round. Sets whose every slot is
//! busy recycle a busy one, so calls that never finish cannot fill the table.
//!
//! | operation | progress | allocates | worst case |
//! |---|---|---|---|
//! | `new` | | the whole table, once | |
//! | `enter`, `transition` | lock-free | no | 8 heads (one cache line); a claim moves the hand at most 25 times |
//! | `find`, reads | wait-free | no | 8 heads |
//! | `advance`, `begin`, `end`, `update` | lock-free | no | one exchange, per retry |
//! | `store` | wait-free | no | a load and a store: not exact under two writers |
//!
//! Everything is `Relaxed`: each word is a fact of its own (see [`crate::protocol`]). Reading two
//! words of a session may pair a new one with an old one of the same session.

use crate::error::{Error, Result};
use crate::ids::{spread, AgentId, SessionKey};
use crate::protocol::{
    head_busy, head_generation, session_begin, session_end, session_enter, session_find, session_retire, stamped_load,
    stamped_put, stamped_update, Tenancy,
};
use crate::sync::{AtomicU64, Ordering::Relaxed};

/// Slots of a set: the heads of one set fill one cache line.
const SET: usize = 8;
/// Largest payload of a word: times in microseconds last nine years.
pub const PAYLOAD_MAX: u64 = (1 << 48) - 1;

/// A session's place in the table, good until the slot is recycled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionHandle {
    slot: u32,
    generation: u16,
}

impl SessionHandle {
    /// Index of the slot, below the table's capacity: for side arrays.
    #[inline]
    pub const fn slot(self) -> usize {
        self.slot as usize
    }

    /// Which tenancy of the slot this is.
    #[inline]
    pub const fn generation(self) -> u16 {
        self.generation
    }
}

/// Where a session stood before a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Previous {
    /// The agent before last, or [`AgentId::UNKNOWN`].
    pub prev: AgentId,
    /// The last agent, or [`AgentId::UNKNOWN`].
    pub last: AgentId,
    /// Steps before this one, saturating.
    pub steps: u16,
}

impl Previous {
    /// Before the first call.
    pub const NONE: Self = Self { prev: AgentId::UNKNOWN, last: AgentId::UNKNOWN, steps: 0 };

    fn unpack(payload: Option<u64>) -> Self {
        payload.map_or(Self::NONE, |word| Self {
            prev: AgentId((word >> 32) as u16),
            last: AgentId((word >> 16) as u16),
            steps: word as u16,
        })
    }

    const fn pack(self) -> u64 {
        (self.prev.0 as u64) << 32 | (self.last.0 as u64) << 16 | self.steps as u64
    }

    const fn then(self, agent: AgentId) -> Self {
        Self { prev: self.last, last: agent, steps: self.steps.saturating_add(1) }
    }
}

/// A word of a session besides its transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// When its last call started, microseconds.
    LastStart,
    /// When its last call finished, microseconds.
    LastFinish,
    /// A word of the policy's, numbered below `EXTRA`.
    Extra(usize),
}

#[derive(Debug)]
#[repr(C)]
struct Body<const EXTRA: usize> {
    transition: AtomicU64,
    last_start: AtomicU64,
    last_finish: AtomicU64,
    extra: [AtomicU64; EXTRA],
}

/// A session's slot, found once for several steps: each is what [`SessionTable`] does by handle.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot<'a, const EXTRA: usize> {
    head: &'a AtomicU64,
    body: &'a Body<EXTRA>,
    generation: u16,
}

impl<const EXTRA: usize> Slot<'_, EXTRA> {
    #[inline(always)]
    pub(crate) fn load(self, word: Word) -> Option<u64> {
        stamped_load(self.body.word(word), self.generation)
    }

    #[inline(always)]
    pub(crate) fn store(self, word: Word, value: u64) {
        stamped_put(self.body.word(word), self.generation, value.min(PAYLOAD_MAX));
    }

    #[inline(always)]
    pub(crate) fn in_flight(self) -> u16 {
        let head = self.head.load(Relaxed);
        if head_generation(head) == self.generation {
            head_busy(head) as u16
        } else {
            0
        }
    }

    #[inline(always)]
    pub(crate) fn begin(self) {
        session_begin(self.head, self.generation);
    }
}

impl<const EXTRA: usize> Body<EXTRA> {
    #[inline(always)]
    fn word(&self, word: Word) -> &AtomicU64 {
        match word {
            Word::LastStart => &self.last_start,
            Word::LastFinish => &self.last_finish,
            Word::Extra(index) => &self.extra[index],
        }
    }
}

/// Bounded table of sessions; see the module's page.
#[derive(Debug)]
pub struct SessionTable<const EXTRA: usize = 8> {
    heads: Box<[AtomicU64]>,
    identities: Box<[AtomicU64]>,
    bodies: Box<[Body<EXTRA>]>,
}

impl<const EXTRA: usize> SessionTable<EXTRA> {
    /// Bytes of one slot.
    pub const SLOT_BYTES: usize = 16 + size_of::<Body<EXTRA>>();

    /// A table for at least `sessions` (8 to 2^24) sessions; rounded up to whole sets of eight.
    pub fn new(sessions: usize) -> Result<Self> {
        if !(SET..=1 << 24).contains(&sessions) {
            return Err(Error::OutOfRange {
                what: "sessions",
                min: SET as u64,
                max: 1 << 24,
                requested: sessions as u64,
            });
        }
        let slots = sessions.next_multiple_of(SET);
        let zeros = |_| AtomicU64::new(0);
        Ok(Self {
            heads: (0..slots).map(zeros).collect(),
            identities: (0..slots).map(zeros).collect(),
            bodies: (0..slots)
                .map(|_| Body {
                    transition: AtomicU64::new(0),
                    last_start: AtomicU64::new(0),
                    last_finish: AtomicU64::new(0),
                    extra: std::array::from_fn(zeros),
                })
                .collect(),
        })
    }

    /// Slots there are.
    pub fn capacity(&self) -> usize {
        self.heads.len()
    }

    /// Bytes of all slots.
    pub fn bytes(&self) -> usize {
        self.capacity() * Self::SLOT_BYTES
    }

    /// Slots that hold a session.
    pub fn occupied(&self) -> usize {
        self.heads.iter().filter(|head| head_generation(head.load(Relaxed)) != 0).count()
    }

    /// First slot of the key's set, and the 24 + 48 bits that tell it from others in there.
    #[inline]
    fn locate(&self, key: SessionKey) -> (usize, u64, u64) {
        let hash = spread(key.0);
        let sets = (self.heads.len() / SET) as u64;
        let set = ((hash >> 32) * sets) >> 32;
        (set as usize * SET, hash & 0xFF_FFFF, hash >> 16)
    }

    #[inline]
    fn handle(base: usize, tenancy: Tenancy) -> SessionHandle {
        SessionHandle { slot: (base + tenancy.way) as u32, generation: tenancy.generation }
    }

    /// The session's handle, claiming a slot if it has none. `true` beside it: newly claimed.
    #[inline(always)]
    pub fn enter(&self, key: SessionKey) -> (SessionHandle, bool) {
        let (base, tag, rest) = self.locate(key);
        let heads = &self.heads[base..base + SET];
        let identities = &self.identities[base..base + SET];
        let tenancy = session_enter(heads, identities, tag, rest);
        (Self::handle(base, tenancy), tenancy.fresh)
    }

    /// The session's handle, if it is in the table. Does not count as use.
    #[inline]
    pub fn find(&self, key: SessionKey) -> Option<SessionHandle> {
        let (base, tag, rest) = self.locate(key);
        let heads = &self.heads[base..base + SET];
        let identities = &self.identities[base..base + SET];
        session_find(heads, identities, tag, rest).map(|tenancy| Self::handle(base, tenancy))
    }

    /// Whether the handle's session still has its slot.
    #[inline]
    pub fn is_current(&self, handle: SessionHandle) -> bool {
        self.at(handle.slot()) == Some(handle)
    }

    /// The session in `slot`, if any: to walk all sessions.
    #[inline]
    pub fn at(&self, slot: usize) -> Option<SessionHandle> {
        let generation = head_generation(self.heads.get(slot)?.load(Relaxed));
        (generation != 0).then_some(SessionHandle { slot: slot as u32, generation })
    }

    /// Enter the session and advance it to `agent`, whatever recycling goes on: the step is
    /// counted exactly once, and two concurrent steps of a session see each other in some order.
    #[inline(always)]
    pub fn transition(&self, key: SessionKey, agent: AgentId) -> (SessionHandle, Previous) {
        loop {
            let (handle, _) = self.enter(key);
            if let Some(previous) = self.advance(handle, agent) {
                return (handle, previous);
            }
        }
    }

    /// Advance a session to `agent`: returns where it stood. `None` if its slot was recycled and
    /// used by another session since; then nothing happened.
    #[inline]
    pub fn advance(&self, handle: SessionHandle, agent: AgentId) -> Option<Previous> {
        let next = |before| Previous::unpack(before).then(agent).pack();
        let word = &self.bodies[handle.slot()].transition;
        stamped_update(word, handle.generation, next).ok().map(Previous::unpack)
    }

    /// Where a session stands: its `last` is the agent of its latest call. `None` if recycled.
    #[inline]
    pub fn position(&self, handle: SessionHandle) -> Option<Previous> {
        let word = &self.bodies[handle.slot()].transition;
        let payload = stamped_load(word, handle.generation);
        self.is_current(handle).then(|| Previous::unpack(payload))
    }

    /// Count a call in flight: protects the slot from recycling. `false` if recycled already.
    #[inline]
    pub fn begin(&self, handle: SessionHandle) -> bool {
        session_begin(&self.heads[handle.slot()], handle.generation)
    }

    /// Uncount a call in flight. `false` if recycled, or none was counted.
    #[inline]
    pub fn end(&self, handle: SessionHandle) -> bool {
        session_end(&self.heads[handle.slot()], handle.generation)
    }

    /// Calls in flight, 0 if recycled.
    #[inline]
    pub fn in_flight(&self, handle: SessionHandle) -> u16 {
        self.slot(handle).in_flight()
    }

    /// The handle's slot, for several steps in turn.
    #[inline]
    pub(crate) fn slot(&self, handle: SessionHandle) -> Slot<'_, EXTRA> {
        let (head, body) = (&self.heads[handle.slot()], &self.bodies[handle.slot()]);
        Slot { head, body, generation: handle.generation }
    }

    /// The session ended: its slot goes to the next newcomer. `false` if recycled already.
    pub fn retire(&self, handle: SessionHandle) -> bool {
        session_retire(&self.heads[handle.slot()], handle.generation)
    }

    #[inline]
    fn word(&self, handle: SessionHandle, word: Word) -> &AtomicU64 {
        self.bodies[handle.slot()].word(word)
    }

    /// A word the session wrote; `None` if it has not, or its slot was recycled and written.
    ///
    /// # Panics
    /// If an extra word's number is not below `EXTRA`; so do [`Self::store`] and [`Self::update`].
    #[inline]
    pub fn load(&self, handle: SessionHandle, word: Word) -> Option<u64> {
        stamped_load(self.word(handle, word), handle.generation)
    }

    /// Write a word (48 bits; larger values are stored as [`PAYLOAD_MAX`]). `false` if recycled.
    ///
    /// Of two writes at once one may be lost, and one that comes while its slot is recycled may leave the next session's
    /// word unset: use [`Self::update`] for what must be exact.
    #[inline]
    pub fn store(&self, handle: SessionHandle, word: Word, value: u64) -> bool {
        stamped_put(self.word(handle, word), handle.generation, value.min(PAYLOAD_MAX))
    }

    /// Replace a word by a function of itself (`None`: unset) in one step; the function may run
    /// several times. Returns the word before, or `None` if recycled.
    #[inline]
    pub fn update(
        &self,
        handle: SessionHandle,
        word: Word,
        mut next: impl FnMut(Option<u64>) -> u64,
    ) -> Option<Option<u64>> {
        let next = |before| next(before).min(PAYLOAD_MAX);
        stamped_update(self.word(handle, word), handle.generation, next).ok()
    }
}

const _: () = assert!(SessionTable::<8>::SLOT_BYTES <= 128);

#[cfg(test)]
mod tests {
    use super::*;

    fn table(sessions: usize) -> SessionTable {
        SessionTable::new(sessions).unwrap()
    }

    #[test]
    fn a_session_remembers_its_last_two_agents() {
        let table = table(64);
        let key = SessionKey(7);
        assert_eq!(table.transition(key, AgentId(1)).1, Previous::NONE);
        table.transition(key, AgentId(2));
        let (handle, previous) = table.transition(key, AgentId(3));
        let expected = Previous { prev: AgentId(1), last: AgentId(2), steps: 2 };
        assert_eq!(previous, expected);
        assert_eq!(table.position(handle).unwrap().last, AgentId(3));
        assert_eq!(table.find(key), Some(handle));
        assert_eq!(table.find(SessionKey(8)), None);
    }

    #[test]
    fn ten_million_new_ids_leave_the_table_as_large_as_it_was() {
        let table = table(1024);
        for id in 0..10_000_000 {
            table.transition(SessionKey(id), AgentId(1));
        }
        assert_eq!((table.capacity(), table.occupied()), (1024, 1024));
        assert_eq!(table.bytes(), 1024 * 104);
    }

    #[test]
    fn a_new_tenant_sees_nothing_of_the_old_one_and_the_old_handle_is_dead() {
        let table = table(8);
        let (old, fresh) = table.enter(SessionKey(0));
        assert!(fresh);
        table.advance(old, AgentId(9)).unwrap();
        for word in [Word::LastStart, Word::LastFinish, Word::Extra(7)] {
            assert!(table.store(old, word, 99));
        }
        for id in 1..=8 {
            table.enter(SessionKey(id));
        }
        assert!(!table.is_current(old));
        assert_eq!(table.position(old), None);
        let new = table.at(old.slot()).unwrap();
        assert_eq!(table.load(new, Word::LastStart), None);
        assert_eq!(table.position(new), Some(Previous::NONE));
        assert_eq!(table.advance(new, AgentId(4)), Some(Previous::NONE));
        assert_eq!(table.advance(old, AgentId(5)), None, "the slot has moved on");
        assert_eq!(table.position(new).unwrap().last, AgentId(4));
        assert!(!table.begin(old) && !table.end(old) && !table.retire(old));
    }

    #[test]
    fn sessions_in_use_outlive_a_flood_of_new_ones() {
        let table = table(8);
        let (busy, _) = table.enter(SessionKey(0));
        table.begin(busy);
        for id in 1..10_000 {
            table.enter(SessionKey(id));
            table.enter(SessionKey(u64::MAX));
        }
        assert!(table.is_current(busy), "calls in flight protect");
        assert!(table.find(SessionKey(u64::MAX)).is_some(), "use protects");
        table.end(busy);
        for id in 10_000..10_020 {
            table.enter(SessionKey(id));
        }
        assert!(!table.is_current(busy));
    }

    #[test]
    fn calls_that_never_finish_do_not_fill_the_table() {
        let table = table(8);
        for id in 0..1000 {
            let (handle, fresh) = table.enter(SessionKey(id));
            assert!(fresh && table.begin(handle));
        }
        assert_eq!(table.occupied(), 8);
    }

    #[test]
    fn a_retired_session_is_recycled_before_used_ones() {
        let table = table(8);
        let handles: Vec<_> = (0..8).map(|id| table.enter(SessionKey(id)).0).collect();
        for id in 0..8 {
            table.enter(SessionKey(id));
        }
        table.retire(handles[5]);
        table.enter(SessionKey(100));
        assert_eq!(table.find(SessionKey(5)), None);
        assert_eq!((0..8).filter(|id| table.find(SessionKey(*id)).is_some()).count(), 7);
    }

    #[test]
    fn payloads_saturate_instead_of_touching_the_generation() {
        let table = table(8);
        let (handle, _) = table.enter(SessionKey(1));
        assert!(table.store(handle, Word::LastFinish, u64::MAX));
        assert_eq!(table.load(handle, Word::LastFinish), Some(PAYLOAD_MAX));
        assert_eq!(table.update(handle, Word::Extra(0), |before| before.unwrap_or(5) + 1), Some(None));
        assert_eq!(table.load(handle, Word::Extra(0)), Some(6));
    }

    #[test]
    fn a_table_too_small_or_too_large_is_an_error_with_numbers() {
        for requested in [0, 7, (1 << 24) + 1] {
            let error = SessionTable::<8>::new(requested).unwrap_err();
            let expected = Error::OutOfRange { what: "sessions", min: 8, max: 1 << 24, requested: requested as u64 };
            assert_eq!(error, expected);
        }
    }
}
