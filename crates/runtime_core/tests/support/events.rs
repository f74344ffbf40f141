//! Arbitrary bytes as a sequence of events on small tables, checked after every event.
//!
//! Shared by the property tests (bounded) and the fuzz target `events` (as long as it may run).

use runtime_core::histogram::{Counters, Ratio};
use runtime_core::ids::{AgentId, SessionKey};
use runtime_core::merge::{Merged, Publication, Section, Shape};
use runtime_core::sessions::{SessionHandle, SessionTable, Word};
use runtime_core::successors::{context_of, context_of_two, SuccessorTable};

const SESSIONS: usize = 16;
const HALVE_AT: u32 = 32;

struct World {
    sessions: SessionTable<1>,
    successors: SuccessorTable<2, 4, HALVE_AT>,
    gaps: Counters<2, HALVE_AT>,
    hits: Ratio<4, 64>,
    /// Handles of any age, most of them stale.
    handles: Vec<(SessionHandle, u64)>,
}

/// Run `bytes` as events.
///
/// # Panics
/// If an invariant does not hold: that is the finding.
pub(crate) fn run(bytes: &[u8]) {
    // As they are, the bytes are a publication from somewhere: an error at most.
    let mut merged = Merged::new(vec![Shape::Dense(8), Shape::Keyed(8)], 2);
    let before = merged.clone();
    if merged.merge(bytes).is_err() {
        assert_eq!(merged, before, "an error applied something");
    }
    let mut world = World {
        sessions: SessionTable::new(SESSIONS).unwrap(),
        successors: SuccessorTable::default(),
        gaps: Counters::default(),
        hits: Ratio::default(),
        handles: Vec::new(),
    };
    for event in bytes.chunks_exact(4) {
        world.step(event[0], event[1], u16::from_le_bytes([event[2], event[3]]));
    }
    world.publish();
}

impl World {
    fn step(&mut self, action: u8, id: u8, number: u16) {
        let stale = self.handles.get(id as usize % self.handles.len().max(1)).copied();
        match action % 8 {
            0 | 1 => self.call(id as u64 % 40, AgentId(number)),
            2 => self.gaps.add_step(id as usize, number as u32),
            3 => self.hits.vote(id as usize, number as u32 % 7, number as u32 % 11),
            4 => self.hits.add(id as usize, number as u32, number as u32 >> (id % 16)),
            5 => self.call(number as u64 | 1 << 63, AgentId(id as u16)),
            _ => {
                if let Some((handle, key)) = stale {
                    self.use_old(handle, key, number);
                }
            }
        }
        for cell in 0..4 {
            let (expected, hits) = self.hits.get(cell);
            assert!(hits <= expected && expected < 64, "{hits} of {expected}");
        }
        assert!((0..8).all(|lane| u32::from(self.gaps.get(lane)) < HALVE_AT));
        assert!(self.sessions.occupied() <= SESSIONS);
    }

    fn call(&mut self, key: u64, agent: AgentId) {
        let (handle, previous) = self.sessions.transition(SessionKey(key), agent);
        let written = self.sessions.load(handle, Word::Extra(0));
        assert!(written.is_none_or(|word| word == key % 1000), "another session's word");
        self.sessions.store(handle, Word::Extra(0), key % 1000);
        assert_eq!(self.sessions.find(SessionKey(key)), Some(handle));
        assert_eq!(self.sessions.position(handle).unwrap().last, agent);
        for context in [context_of(previous.last), context_of_two(previous.prev, previous.last)] {
            self.successors.add(context, agent.0);
            let mut row = [(0, 0); 4];
            let length = self.successors.row(context, &mut row);
            let total: u32 = row[..length].iter().map(|(_, count)| count).sum();
            assert_eq!(total, self.successors.total(context));
            assert!(row[..length].iter().all(|(_, count)| (1..HALVE_AT).contains(count)));
        }
        self.handles.push((handle, key));
    }

    /// A handle may be stale: then it says so and changes nothing.
    fn use_old(&mut self, handle: SessionHandle, key: u64, number: u16) {
        let current = self.sessions.find(SessionKey(key)) == Some(handle);
        assert_eq!(self.sessions.is_current(handle), current);
        match number % 5 {
            0 => assert_eq!(self.sessions.begin(handle), current),
            1 => assert!(current || !self.sessions.end(handle)),
            2 => assert_eq!(self.sessions.retire(handle), current),
            3 => assert_eq!(self.sessions.position(handle).is_some(), current),
            _ => {
                let stepped = self.sessions.advance(handle, AgentId(number)).is_some();
                assert!(stepped || !current);
            }
        }
        if current {
            assert_eq!(self.sessions.load(handle, Word::Extra(0)), Some(key % 1000));
        }
    }

    /// What was learned survives publication.
    fn publish(&self) {
        let dense = (0..8).map(|lane| u32::from(self.gaps.get(lane))).collect();
        let mut keyed = Vec::new();
        self.successors.for_each(|key, count| keyed.push((key, count)));
        keyed.sort_unstable();
        let publication =
            Publication { replica: 1, version: 1, sections: vec![Section::Dense(dense), Section::Keyed(keyed)] };
        let mut merged = Merged::new(vec![Shape::Dense(8), Shape::Keyed(8)], 1);
        assert_eq!(merged.merge(&publication.encode()), Ok(true));
        assert_eq!(merged.publications().next(), Some(&publication));
    }
}
