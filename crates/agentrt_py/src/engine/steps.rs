//! What a step of vLLM tells the core, and the thread that works it off while the model runs.
//!
//! The hooks of a step only write down what has happened and take victims that are named already. When the step has been
//! scheduled, what was written goes to a thread of its own: it tells the core, scores what has changed, and names the
//! victims of the steps to come. The next step's first hook that needs an answer waits for it, so results do not depend
//! on how fast the thread was. It never needs the interpreter.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::PyErr;
use runtime_core::beside::{Beside, Fetched};
use runtime_core::ids::WorkloadId;
use runtime_core::runtime::{EventKind, Events, Scoring};

use super::blocks::{Blocks, KeyHash};
use crate::errors::from_core;
use crate::runtime::Shared;

/// How many victims a step has taken at most is forgotten by half in some 350 steps.
const PEAK_FADES: f32 = 0.998;

/// Events that the core has not been told yet, one vector a field.
#[derive(Default)]
pub(super) struct Told {
    pub(super) kinds: Vec<u8>,
    pub(super) sessions: Vec<u64>,
    pub(super) agents: Vec<u16>,
    pub(super) calls: Vec<u64>,
    pub(super) times_us: Vec<u64>,
    pub(super) offsets: Vec<u32>,
    pub(super) blocks: Vec<u64>,
    /// The blocks that carry keys from now on, one for each key of the [`CARRIED`].
    ids: Vec<u32>,
}

/// Beside the kinds of events: blocks carry other keys from now on.
const CARRIED: u8 = u8::MAX;

impl Told {
    pub(super) fn push(
        &mut self,
        kind: EventKind,
        (session, agent): (u64, u16),
        call: u64,
        time_us: u64,
        keys: &[u64],
    ) {
        if self.offsets.is_empty() {
            self.offsets.push(0);
        }
        self.kinds.push(kind as u8);
        self.sessions.push(session);
        self.agents.push(agent);
        self.calls.push(call);
        self.times_us.push(time_us);
        self.blocks.extend_from_slice(keys);
        self.offsets.push(self.blocks.len() as u32);
    }

    /// `ids` carry `keys` from now on, ids beyond the keys none.
    pub(super) fn push_carried(&mut self, keys: &[u64], ids: &[u32], time_us: u64) {
        self.push(EventKind::Removed, (0, 0), 0, time_us, &keys[..keys.len().min(ids.len())]);
        self.blocks.resize(self.blocks.len() + ids.len().saturating_sub(keys.len()), 0);
        self.ids.extend_from_slice(ids);
        if let (Some(kind), Some(end)) = (self.kinds.last_mut(), self.offsets.last_mut()) {
            (*kind, *end) = (CARRIED, self.blocks.len() as u32);
        }
    }

    pub(super) fn events(&self) -> Events<'_> {
        Events {
            kinds: &self.kinds,
            sessions: &self.sessions,
            agents: &self.agents,
            calls: &self.calls,
            times_us: &self.times_us,
            offsets: &self.offsets,
            blocks: &self.blocks,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.kinds.clear();
        self.sessions.clear();
        self.agents.clear();
        self.calls.clear();
        self.times_us.clear();
        self.offsets.clear();
        self.blocks.clear();
        self.ids.clear();
    }

    fn keys(&self, at: usize) -> &[u64] {
        match self.offsets.get(at..at + 2) {
            Some(&[from, to]) => self.blocks.get(from as usize..to as usize).unwrap_or(&[]),
            _ => &[],
        }
    }
}

/// A call that has started in a step.
struct Start {
    call: u64,
    /// Its place among the events.
    at: usize,
    hit: usize,
}

/// What a step asks of the core, and the answers.
#[derive(Default)]
pub(super) struct Step {
    /// A [`EventKind::Stored`] without blocks stores what its call, which has started in this step, did not hit.
    pub(super) told: Told,
    /// Victims to be named.
    pub(super) wanted: usize,
    pub(super) now_us: u64,
    starts: Vec<Start>,
    /// Victims and the keys that they carry, first to go first.
    pub(super) victims: Vec<(u32, u64)>,
    /// Such as are no block's any more.
    pub(super) stale: u64,
    keys: Vec<u64>,
    failed: Option<PyErr>,
}

impl Step {
    pub(super) fn clear(&mut self) {
        self.told.clear();
        self.starts.clear();
        self.victims.clear();
        (self.wanted, self.stale, self.failed) = (0, 0, None);
    }

    /// Resident blocks of the calls that have started, in order.
    pub(super) fn hits(&self) -> impl Iterator<Item = usize> + '_ {
        self.starts.iter().map(|start| start.hit)
    }

    /// The first thing that went wrong.
    pub(super) fn failed(&mut self) -> Option<PyErr> {
        self.failed.take()
    }

    /// Tells the core, one event after another: what a call stores depends on what it has hit.
    pub(super) fn tell(&mut self, beside: &Core) {
        let mut ids = 0;
        for at in 0..self.told.kinds.len() {
            let told = &self.told;
            let (kind, call) = (told.kinds[at], told.calls[at]);
            let mut blocks = told.keys(at);
            if kind == CARRIED {
                self.keys.clear();
                let to = ids + blocks.len();
                let carried = told.ids.get(ids..to).unwrap_or(&[]);
                ids = to;
                if let Err(error) = beside.tables().carry_all(blocks, carried, &mut self.keys) {
                    self.failed.get_or_insert(error);
                }
                blocks = &self.keys;
            } else if kind == EventKind::Stored as u8 && blocks.is_empty() {
                let start = self.starts.iter().rev().find(|start| start.call == call);
                blocks = start.map_or(&[], |start| told.keys(start.at).get(start.hit..).unwrap_or(&[]));
            }
            if blocks.is_empty() && (kind == CARRIED || kind == EventKind::Stored as u8) {
                continue;
            }
            let removed = [EventKind::Removed as u8];
            let event = Events {
                kinds: if kind == CARRIED { &removed } else { &told.kinds[at..=at] },
                sessions: &told.sessions[at..=at],
                agents: &told.agents[at..=at],
                calls: &told.calls[at..=at],
                times_us: &told.times_us[at..=at],
                offsets: &[0, blocks.len() as u32],
                blocks,
            };
            let hit = match beside.shared.core.observe_scoring(beside.workload, &event, Scoring::ByStep, |_, _| {}) {
                Ok(observed) => {
                    beside.shared.count(&event, &observed);
                    observed.hit_blocks as usize
                }
                Err(error) => {
                    self.failed.get_or_insert_with(|| from_core(error));
                    0
                }
            };
            if kind == EventKind::CallStart as u8 {
                self.starts.push(Start { call, at, hit });
            }
        }
    }

    /// Names `n` victims.
    pub(super) fn name(&mut self, n: usize, now_us: u64, beside: &Core) {
        self.keys.clear();
        if let Err(error) = beside.shared.name_victims(n, now_us, &mut self.keys) {
            self.failed.get_or_insert_with(|| from_core(error));
        }
        let mut tables = beside.tables();
        tables.look_for(&self.keys);
        for &key in &self.keys {
            match tables.take(key) {
                Some(id) => self.victims.push((id, key)),
                None => self.stale += 1,
            }
        }
    }

    /// All of a step: tells, scores what has changed, names the next victims.
    pub(super) fn work_off(&mut self, beside: &Core) {
        self.tell(beside);
        match beside.shared.core.settle_step(self.now_us) {
            Ok(()) if self.wanted > 0 => self.name(self.wanted, self.now_us, beside),
            Ok(()) => {}
            Err(error) => drop(self.failed.get_or_insert_with(|| from_core(error))),
        }
    }
}

/// Whom a step tells, and where blocks are.
#[derive(Clone)]
pub(super) struct Core {
    pub(super) shared: Arc<Shared>,
    pub(super) workload: WorkloadId,
    pub(super) blocks: Arc<Mutex<Blocks>>,
}

impl Core {
    pub(super) fn tables(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Victims that are named ahead, and the thread that does it.
pub(super) struct Planned {
    beside: Beside<Box<Step>>,
    core: Core,
    most: usize,
    /// As many are wanted as a step has lately taken at most.
    peak: f32,
    taken: usize,
    /// First to go first.
    victims: VecDeque<(u32, u64)>,
    keys: HashSet<u64, KeyHash>,
    stale: u64,
    blank: Box<Step>,
}

impl Planned {
    /// At most `most` victims are named ahead.
    pub(super) fn start(core: Core, most: usize) -> std::io::Result<Self> {
        let theirs = core.clone();
        Ok(Self {
            beside: Beside::start("agentrt-steps", move |step: &mut Box<Step>| step.work_off(&theirs))?,
            core,
            most,
            peak: 0.0,
            taken: 0,
            victims: VecDeque::new(),
            keys: HashSet::default(),
            stale: 0,
            blank: Box::default(),
        })
    }

    pub(super) fn core(&self) -> &Core {
        &self.core
    }

    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// Keys that were named and are no block's any more, since the last call.
    pub(super) fn take_stale(&mut self) -> u64 {
        std::mem::take(&mut self.stale)
    }

    /// A step to be filled.
    pub(super) fn blank(&mut self) -> Box<Step> {
        let mut step = std::mem::take(&mut self.blank);
        step.clear();
        step
    }

    /// What a step has answered.
    pub(super) fn answered(&mut self, step: Box<Step>) {
        self.keys.extend(step.victims.iter().map(|&(_, key)| key));
        self.victims.extend(&step.victims);
        self.stale += step.stale;
        self.blank = step;
    }

    /// Up to `n` victims.
    pub(super) fn take(&mut self, n: usize, victims: &mut Vec<(u32, u64)>) -> usize {
        self.taken += n;
        let n = n.min(self.victims.len());
        for (id, key) in self.victims.drain(..n) {
            self.keys.remove(&key);
            victims.push((id, key));
        }
        n
    }

    /// These blocks are to stay.
    pub(super) fn keep(&mut self, keys: &[u64]) {
        if self.keys.is_empty() {
            return;
        }
        let before = self.keys.len();
        for key in keys {
            self.keys.remove(key);
        }
        if self.keys.len() < before {
            self.give_back();
        }
    }

    /// Lets go of victims that are not among the keys.
    fn give_back(&mut self) {
        if self.victims.is_empty() {
            return;
        }
        let (left, mut blocks) = (&self.keys, self.core.tables());
        self.victims.retain(|&(id, key)| {
            let goes = left.contains(&key);
            if !goes {
                blocks.give_back(id, key);
            }
            goes
        });
    }

    /// The prefix cache has been reset.
    pub(super) fn forget_all(&mut self) {
        self.victims.clear();
        self.keys.clear();
    }

    /// Hands a step over to the thread; where victims are taken, it names the next ones.
    pub(super) fn post(&mut self, mut step: Box<Step>, names: bool, now_us: u64) {
        self.peak = (self.peak * PEAK_FADES).max(self.taken as f32).min(self.most as f32);
        self.taken = 0;
        step.wanted = if names { (self.peak as usize).saturating_sub(self.victims.len()) } else { 0 };
        step.now_us = now_us;
        self.beside.post(step);
    }

    /// Whether a step has been handed over and not been fetched.
    pub(super) fn is_busy(&self) -> bool {
        self.beside.is_busy()
    }

    /// The step that was handed over, worked off; None where the thread is lost.
    pub(super) fn fetch(&mut self) -> Option<Box<Step>> {
        match self.beside.fetch() {
            Fetched::Done(step) => Some(step),
            Fetched::Undone(mut step) => {
                step.work_off(&self.core);
                Some(step)
            }
            Fetched::Lost => None,
        }
    }

    /// As if the thread had panicked.
    pub(super) fn lose_thread(&mut self) {
        self.beside.close();
    }
}

impl Drop for Planned {
    fn drop(&mut self) {
        // Whoever names victims from now on may name these.
        if !self.beside.is_busy() {
            self.keys.clear();
            self.give_back();
        }
    }
}
