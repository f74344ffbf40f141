//! The engine's waiting queue: calls whose prompts are known and that start as soon as there is room.
//!
//! What such a call will ask for is certain, and when is nearly so: engines admit in order of arrival, so a call that
//! `n` others are ahead of starts after about `n + 1` of the recent intervals between admissions. Calls are named by
//! *tickets*, 16-bit numbers in order of arrival; a segment carries the tickets of the first and the last call that wait
//! for it. A ticket that is no longer in the queue means nothing, so nothing has to be cleared when a call is cancelled.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::Arc;

use crate::sessions::SessionHandle;

/// Waiting calls that are tracked; further ones are heard of when they start.
pub(crate) const MAX_WAITING: usize = 1024;

/// A call that waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    pub(crate) call: u64,
    pub(crate) handle: SessionHandle,
    pub(crate) agent: u16,
    pub(crate) ticket: u16,
    /// Blocks of its prompt, and how many of them were not resident when they were last heard of.
    pub(crate) blocks: u32,
    pub(crate) missing: u32,
    /// Somebody was told to bring them back.
    pub(crate) offered: bool,
}

/// Waiting calls in order of arrival.
#[derive(Debug)]
pub(crate) struct Queue {
    calls: VecDeque<Waiting>,
    /// How many they are, for other threads.
    waiting: Arc<AtomicU32>,
    next_ticket: u16,
    /// Moving mean of the time between two admissions while calls waited, seconds.
    interval_s: f32,
    admitted_us: u64,
}

impl Queue {
    pub(crate) fn new() -> Self {
        Self {
            calls: VecDeque::with_capacity(MAX_WAITING),
            waiting: Arc::default(),
            next_ticket: 1,
            interval_s: 0.5,
            admitted_us: 0,
        }
    }

    /// The number of waiting calls, to be read by any thread.
    pub(crate) fn waiting(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.waiting)
    }

    fn publish(&self) {
        self.waiting.store(self.calls.len() as u32, Relaxed);
    }

    pub(crate) fn bytes(&self) -> usize {
        self.calls.capacity() * size_of::<Waiting>()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.calls.len() == MAX_WAITING
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    pub(crate) fn holds(&self, call: u64) -> bool {
        self.calls.iter().any(|waiting| waiting.call == call)
    }

    /// A call joins at the end; its ticket. There must be room.
    pub(crate) fn push(&mut self, call: u64, handle: SessionHandle, agent: u16, now_us: u64) -> u16 {
        let ticket = self.next_ticket;
        // 0 is no ticket. At most `MAX_WAITING` are out at a time, so numbers do not meet.
        self.next_ticket = self.next_ticket.checked_add(1).unwrap_or(1);
        if self.calls.is_empty() {
            self.admitted_us = now_us;
        }
        self.calls.push_back(Waiting { call, handle, agent, ticket, blocks: 0, missing: 0, offered: false });
        self.publish();
        ticket
    }

    /// A call leaves, wherever it stands.
    pub(crate) fn remove(&mut self, call: u64) -> Option<Waiting> {
        let at = self.calls.iter().position(|waiting| waiting.call == call)?;
        let waiting = self.calls.remove(at);
        self.publish();
        waiting
    }

    /// A call leaves because it starts.
    pub(crate) fn admit(&mut self, call: u64, now_us: u64) -> Option<Waiting> {
        let waiting = self.remove(call)?;
        let interval_s = now_us.saturating_sub(self.admitted_us) as f32 / 1e6;
        self.interval_s += 0.1 * (interval_s - self.interval_s);
        self.admitted_us = now_us;
        Some(waiting)
    }

    /// Calls of a session leave without having started.
    pub(crate) fn remove_session(&mut self, handle: SessionHandle) {
        self.calls.retain(|waiting| waiting.handle != handle);
        self.publish();
    }

    /// The first waiting call of a session.
    pub(crate) fn first_of(&self, handle: SessionHandle) -> Option<&Waiting> {
        self.calls.iter().find(|waiting| waiting.handle == handle)
    }

    /// The call that joined last has a prompt of so many blocks, of which so many are resident.
    pub(crate) fn asks_for(&mut self, blocks: usize, resident: usize) {
        if let Some(waiting) = self.calls.back_mut() {
            (waiting.blocks, waiting.missing) = (blocks as u32, (blocks - resident) as u32);
        }
    }

    /// The call at a place in line, from 0.
    pub(crate) fn at(&self, place: usize) -> Option<&Waiting> {
        self.calls.get(place)
    }

    /// Somebody is told to bring back the blocks of the call at this place.
    pub(crate) fn offer(&mut self, place: usize) {
        if let Some(waiting) = self.calls.get_mut(place) {
            waiting.offered = true;
        }
    }

    /// The first waiting call of a session's agent whose blocks somebody was told to bring back.
    pub(crate) fn offered(&mut self, handle: SessionHandle, agent: u16) -> Option<&mut Waiting> {
        self.calls.iter_mut().find(|waiting| waiting.offered && (waiting.handle, waiting.agent) == (handle, agent))
    }

    /// How many calls are ahead of a ticket; `None` where it does not wait any more.
    fn ahead(&self, ticket: u16) -> Option<usize> {
        let first = self.calls.front()?.ticket;
        // Numbers skip 0 when they wrap, which moves a distance by one and their order not at all.
        let distance = |ticket: u16| ticket.wrapping_sub(first);
        let at = self.calls.partition_point(|waiting| distance(waiting.ticket) < distance(ticket));
        self.calls.get(at).is_some_and(|waiting| waiting.ticket == ticket).then_some(at)
    }

    /// Seconds until the call with this ticket probably starts; `None` where it does not wait.
    pub(crate) fn wait_s(&self, ticket: u16) -> Option<f32> {
        if ticket == 0 {
            return None;
        }
        self.ahead(ticket).map(|ahead| self.interval_s.max(0.001) * (ahead + 1) as f32)
    }

    /// Seconds that a call that arrived now would wait.
    pub(crate) fn length_s(&self) -> f32 {
        self.interval_s * self.calls.len() as f32
    }

    /// Calls whose wait has become much shorter by the last admission: those at places 1, 2, 4, 8 and so on.
    pub(crate) fn moved(&self) -> impl Iterator<Item = SessionHandle> + '_ {
        (0..11).map_while(|octave| self.calls.get((1usize << octave) - 1)).map(|waiting| waiting.handle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SessionKey;
    use crate::kv::workload::Sessions;

    #[test]
    fn waits_follow_the_place_in_line_across_the_end_of_the_numbers() {
        let sessions = Sessions::new(8).unwrap();
        let (handle, _) = sessions.enter(SessionKey(1));
        let mut queue = Queue::new();
        for call in 0..200_000u64 {
            let tickets: Vec<u16> = (0..3).map(|i| queue.push(3 * call + i, handle, 0, call)).collect();
            let waits: Vec<f32> = tickets.iter().map(|&ticket| queue.wait_s(ticket).unwrap()).collect();
            assert!(waits[0] < waits[1] && waits[1] < waits[2], "{waits:?}");
            assert!(queue.wait_s(tickets[2].wrapping_add(1)).is_none());
            queue.remove(3 * call + 1).unwrap();
            assert!(queue.wait_s(tickets[1]).is_none());
            assert_eq!(queue.ahead(tickets[2]), Some(1));
            assert!(queue.admit(3 * call, call).is_some() && queue.admit(3 * call + 2, call).is_some());
        }
        assert!(queue.is_empty());
    }
}
