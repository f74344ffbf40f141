//! `kv_cache`: which blocks to keep.
#![allow(missing_docs, clippy::pedantic)]

mod chain;
mod density;
pub(crate) mod index;
pub(crate) mod learned;

use chain::Lanes;
use density::{SessionView, GRID};
use index::{Index, NONE, NOT_QUEUED};
use learned::*;

/// Switches of the mechanisms, for ablations.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub prediction: bool,
    pub order2: bool,
    pub superseded: bool,
    pub classes: bool,
    pub session_end: bool,
    pub time_contexts: bool,
    pub density: bool,
    pub sharing_classes: bool,
    pub followers: bool,
    pub robust: bool,
    /// Respects in which the future is known; offline studies only.
    pub oracle: Oracle,
}

/// Which of the given [`Hint`]s are believed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Oracle {
    pub content: bool,
    pub time: bool,
    pub sharing: bool,
}

/// The future of one block at the moment of its use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// Number of the session's call that uses it next, `u32::MAX` for none.
    pub next_step: u32,
    /// When another session uses it, `u64::MAX` for never.
    pub shared_us: u64,
}

/// The starts of the session's next calls, `u64::MAX` for none.
pub type FutureStarts = [u64; chain::STEPS];
impl Default for Config {
    fn default() -> Self {
        Self {
            prediction: true,
            order2: true,
            superseded: true,
            classes: true,
            session_end: true,
            time_contexts: true,
            density: true,
            sharing_classes: true,
            followers: true,
            robust: true,
            oracle: Oracle::default(),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Lane {
    pub(crate) session: u32,
    pub(crate) agent: u16,
    pub(crate) calls: u32,
    pub(crate) head: u32,
    /// Next lane of the session, most recent first; next free lane.
    pub(crate) next: u32,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Session {
    pub(crate) key: u64,
    pub(crate) lanes: u32,
    pub(crate) prev: u16,
    pub(crate) last: u16,
    pub(crate) steps: u32,
    pub(crate) running: u32,
    pub(crate) last_start_us: u64,
    pub(crate) last_finish_us: u64,
    pub(crate) gap: GapContext,
    pub(crate) pace: f32,
    pub(crate) size: u8,
    pub(crate) ended: bool,
    pub(crate) next_refresh_us: u64,
    pub(crate) silent_prev: u32,
    pub(crate) silent_next: u32,
    pub(crate) in_silent: bool,
}

#[derive(Clone, Copy)]
struct Running {
    call: u64,
    lane: u32,
    session: u32,
    tail: u32,
    len: u32,
    prompt_len: u32,
    start_us: u64,
}

pub const NO_AGENT: u16 = u16::MAX;

pub struct KvCache {
    pub cfg: Config,
    pub(crate) index: Index,
    pub(crate) lanes: Vec<Lane>,
    free_lane: u32,
    pub(crate) sessions: Vec<Session>,
    session_of: std::collections::HashMap<u64, u32>,
    free_sessions: Vec<u32>,
    silent_head: u32,
    silent_tail: u32,
    running: Vec<Running>,
    path: Vec<u32>,
    pub(crate) transitions: Transitions,
    pub(crate) content: Content,
    pub(crate) gaps: Gaps,
    pub(crate) ends: Ends,
    pub(crate) sharing: Sharing,
    service_s: f32,
    end_after_us: u64,
    learned_gaps: u32,
    cursor: u32,
    view: SessionView,
    now_us: u64,
    lut: density::Lut,
    evict_interval_us: f32,
    last_evict_us: u64,
    pool_blocks: usize,
    hints: Vec<Hint>,
    starts: Vec<FutureStarts>,
}

impl KvCache {
    pub fn new(pool_blocks: usize, cfg: Config) -> Self {
        let n_sessions = 8192;
        let n_lanes = n_sessions * 4;
        Self {
            cfg,
            index: Index::new(pool_blocks),
            lanes: (0..n_lanes as u32)
                .map(|i| Lane {
                    session: NONE,
                    agent: 0,
                    calls: 0,
                    head: NONE,
                    next: if i + 1 == n_lanes as u32 { NONE } else { i + 1 },
                })
                .collect(),
            free_lane: 0,
            sessions: Vec::new(),
            session_of: Default::default(),
            free_sessions: Vec::new(),
            silent_head: NONE,
            silent_tail: NONE,
            running: Vec::with_capacity(1024),
            path: Vec::with_capacity(pool_blocks),
            transitions: Transitions::default(),
            content: Content::new(16),
            gaps: Gaps::new(16),
            ends: Ends::new(16),
            sharing: Sharing::new(),
            service_s: 1.0,
            end_after_us: 600_000_000,
            learned_gaps: 0,
            cursor: 0,
            view: SessionView::default(),
            now_us: 0,
            lut: density::Lut::new(),
            evict_interval_us: 1e4,
            last_evict_us: 0,
            pool_blocks,
            hints: Vec::new(),
            starts: Vec::new(),
        }
        .with_hints()
    }

    fn with_hints(mut self) -> Self {
        if self.cfg.oracle != Oracle::default() {
            self.index = Index::with_segments(self.pool_blocks, self.pool_blocks.max(1024));
            self.hints = vec![
                Hint {
                    next_step: u32::MAX,
                    shared_us: u64::MAX
                };
                self.pool_blocks.max(1024)
            ];
        }
        self
    }

    /// Gives an oracle the starts of the session's next calls.
    pub fn foretell(&mut self, session: u64, starts: FutureStarts) {
        let s = self.session_slot(session) as usize;
        if self.starts.len() <= s {
            self.starts.resize(s + 1, [u64::MAX; chain::STEPS]);
        }
        self.starts[s] = starts;
    }

    fn silent_remove(&mut self, s: u32) {
        let Session {
            silent_prev,
            silent_next,
            in_silent,
            ..
        } = self.sessions[s as usize];
        if !in_silent {
            return;
        }
        if silent_prev == NONE {
            self.silent_head = silent_next
        } else {
            self.sessions[silent_prev as usize].silent_next = silent_next
        }
        if silent_next == NONE {
            self.silent_tail = silent_prev
        } else {
            self.sessions[silent_next as usize].silent_prev = silent_prev
        }
        self.sessions[s as usize].in_silent = false;
    }
    fn silent_push(&mut self, s: u32) {
        let tail = self.silent_tail;
        let x = &mut self.sessions[s as usize];
        x.silent_prev = tail;
        x.silent_next = NONE;
        x.in_silent = true;
        if tail == NONE {
            self.silent_head = s
        } else {
            self.sessions[tail as usize].silent_next = s
        }
        self.silent_tail = s;
    }
    fn label_silent(&mut self) {
        while self.silent_head != NONE {
            let s = self.silent_head;
            let x = self.sessions[s as usize];
            if self.now_us < x.last_finish_us + self.end_after_us {
                break;
            }
            self.silent_remove(s);
            self.ends
                .learn(x.last as usize, end_step(x.steps), x.size as usize, 0.0);
            self.sessions[s as usize].ended = true;
            self.refresh(s);
        }
    }

    fn session_slot(&mut self, key: u64) -> u32 {
        if let Some(&s) = self.session_of.get(&key) {
            return s;
        }
        let fresh = Session {
            key,
            lanes: NONE,
            prev: NO_AGENT,
            last: NO_AGENT,
            steps: 0,
            running: 0,
            last_start_us: 0,
            last_finish_us: 0,
            gap: GapContext::default(),
            pace: -1.0,
            size: 0,
            ended: false,
            next_refresh_us: u64::MAX,
            silent_prev: NONE,
            silent_next: NONE,
            in_silent: false,
        };
        let s = self.free_sessions.pop().unwrap_or_else(|| {
            self.sessions.push(fresh);
            self.sessions.len() as u32 - 1
        });
        self.sessions[s as usize] = fresh;
        self.session_of.insert(key, s);
        s
    }

    /// The lane of `agent`, moved to the front; and its former rank.
    fn lane_slot(&mut self, s: u32, agent: u16) -> (u32, usize) {
        let (mut before, mut lane, mut rank) = (NONE, self.sessions[s as usize].lanes, 0);
        while lane != NONE && self.lanes[lane as usize].agent != agent {
            before = lane;
            lane = self.lanes[lane as usize].next;
            rank += 1;
        }
        if lane == NONE {
            lane = self.free_lane;
            assert!(lane != NONE, "lanes exhausted");
            self.free_lane = self.lanes[lane as usize].next;
            self.lanes[lane as usize] = Lane {
                session: s,
                agent,
                calls: 0,
                head: NONE,
                next: self.sessions[s as usize].lanes,
            };
            self.sessions[s as usize].lanes = lane;
            return (lane, 9);
        }
        if before != NONE {
            self.lanes[before as usize].next = self.lanes[lane as usize].next;
            self.lanes[lane as usize].next = self.sessions[s as usize].lanes;
            self.sessions[s as usize].lanes = lane;
        }
        (lane, rank)
    }

    fn lane_link(&mut self, seg: u32, lane: u32) {
        let head = self.lanes[lane as usize].head;
        {
            let x = self.index.seg_mut(seg);
            x.lane = lane;
            x.lane_prev = NONE;
            x.lane_next = head;
        }
        if head != NONE {
            self.index.seg_mut(head).lane_prev = seg;
        }
        self.lanes[lane as usize].head = seg;
    }
    fn lane_unlink(&mut self, seg: u32) {
        let index::Segment {
            lane,
            lane_prev,
            lane_next,
            ..
        } = *self.index.seg(seg);
        if lane_prev == NONE {
            self.lanes[lane as usize].head = lane_next;
        } else {
            self.index.seg_mut(lane_prev).lane_next = lane_next;
        }
        if lane_next != NONE {
            self.index.seg_mut(lane_next).lane_prev = lane_prev;
        }
    }

    /// A call starts. Returns the number of leading resident blocks.
    pub fn call_started(
        &mut self,
        call: u64,
        session: u64,
        agent: u16,
        now_us: u64,
        keys: &[u64],
        hints: &[Hint],
    ) -> usize {
        self.now_us = self.now_us.max(now_us);
        let now = self.now_us;
        self.label_silent();
        let s = self.session_slot(session);
        self.silent_remove(s);
        let was = self.sessions[s as usize];
        if was.last != NO_AGENT {
            self.ends.learn(
                was.last as usize,
                end_step(was.steps),
                was.size as usize,
                1.0,
            );
            if was.running == 0 {
                let gap = now - was.last_finish_us;
                self.gaps.learn(was.gap, gap);
                self.learned_gaps += 1;
                if self.learned_gaps % 32 == 0 {
                    self.update_end_after();
                }
                let x = &mut self.sessions[s as usize];
                let octave = (gap_bucket(gap) / 2).min(14) as u8 + 1;
                let old = x.gap.prev;
                x.gap.pair = (octave / 2) * 8 + (old / 2).min(7);
                x.gap.prev = octave;
                let lg = (gap.max(1000) as f32 / 1000.0).log2();
                x.pace = if x.pace < 0.0 {
                    lg
                } else {
                    0.7 * x.pace + 0.3 * lg
                };
                x.gap.pace = 1 + (x.pace * 1.5) as u8;
            }
        }
        let (lane, rank) = self.lane_slot(s, agent);
        if was.last != NO_AGENT {
            self.transitions.learn(was.prev, was.last, agent, rank);
        }
        {
            let x = &mut self.sessions[s as usize];
            x.prev = was.last;
            x.last = agent;
            x.steps += 1;
            x.running += 1;
            x.last_start_us = now;
            x.ended = false;
            x.gap.agent = agent;
            x.gap.tool = 0;
        }
        // Walk the resident prefix.
        self.path.clear();
        let (mut hint, mut parent) = (NONE, NONE);
        for &key in keys {
            let slot = self.index.find_after(hint, key);
            if slot == NONE || self.index.blocks[slot as usize].parent != parent {
                break;
            }
            self.path.push(slot);
            hint = slot;
            parent = slot;
        }
        let hit = self.path.len();
        self.touch(lane, s, now, keys.len(), hints);
        self.lanes[lane as usize].calls += 1;
        let tail = self.path.last().copied().unwrap_or(NONE);
        if tail != NONE {
            self.pin(tail);
        }
        self.running.push(Running {
            call,
            lane,
            session: s,
            tail,
            len: hit as u32,
            prompt_len: keys.len() as u32,
            start_us: now,
        });
        self.refresh(s);
        hit
    }

    fn pin(&mut self, tail: u32) {
        let seg = self.index.blocks[tail as usize].segment;
        self.index.dequeue(seg);
        self.index.seg_mut(seg).pins += 1;
    }
    fn unpin(&mut self, tail: u32) {
        let seg = self.index.blocks[tail as usize].segment;
        self.index.seg_mut(seg).pins -= 1;
        self.queue_if_leaf(seg);
    }

    fn touch(&mut self, lane: u32, s: u32, now: u64, prompt_len: usize, hints: &[Hint]) {
        let lane_agent = self.lanes[lane as usize].agent as usize;
        let calls = self.lanes[lane as usize].calls;
        // Content votes: every segment of the lane, used or not.
        let mut n = [[0u32; C]; K];
        let mut m = [[0u32; C]; K];
        let mut seg = self.lanes[lane as usize].head;
        while seg != NONE {
            let x = self.index.seg(seg);
            let k = ((calls - x.touch_call) as usize).min(K - 1);
            n[k][x.class as usize] += x.len;
            seg = x.lane_next;
        }
        let mut at = 0usize;
        let mut pieces: [u32; 1] = [0];
        let _ = &mut pieces;
        let mut previous = NONE;
        while at < self.path.len() {
            let seg = self.index.blocks[self.path[at] as usize].segment;
            let old = *self.index.seg(seg);
            let mut used = (self.path.len() - at).min(old.len as usize);
            if !hints.is_empty() {
                used = hints[at..at + used]
                    .iter()
                    .take_while(|&h| *h == hints[at])
                    .count();
                self.hints[seg as usize] = hints[at];
            }
            let own = old.lane == lane;
            let same_session = self.lanes[old.lane as usize].session == s;
            if own {
                let k = ((calls - old.touch_call) as usize).min(K - 1);
                m[k][old.class as usize] += used as u32;
            }
            self.sharing.learn(
                share_class(old.degree, old.depth, &self.cfg),
                now.saturating_sub(old.last_use_us),
                !same_session,
            );
            if used < old.len as usize {
                let tail = self.path[at + used - 1];
                let lower = self.index.split(seg, tail, used as u32);
                assert!(lower != NONE, "segments exhausted");
                self.lane_link(lower, old.lane);
                if !hints.is_empty() {
                    self.hints[lower as usize] = hints.get(at + used).copied().unwrap_or(Hint {
                        next_step: u32::MAX,
                        shared_us: u64::MAX,
                    });
                }
            }
            if !own {
                self.lane_unlink(seg);
                self.lane_link(seg, lane);
            }
            {
                let x = self.index.seg_mut(seg);
                x.touch_call = calls + 1;
                x.last_use_us = now;
                if same_session {
                    x.touches = x.touches.saturating_add(1);
                    x.class = match x.touches {
                        0..=2 => CLASS_SECOND,
                        3..=4 => CLASS_THIRD,
                        _ => CLASS_FIFTH,
                    };
                } else {
                    x.touches = 1;
                    x.degree = x.degree.saturating_add(1);
                    let end = prompt_len - (at + used);
                    x.class = first_class(end as u32);
                }
            }
            at += used;
            // Join with the piece above where nothing tells them apart any more.
            if previous != NONE {
                let (up, low) = (*self.index.seg(previous), *self.index.seg(seg));
                let same = (hints.is_empty()
                    || self.hints[previous as usize] == self.hints[seg as usize])
                    && up.children == 1
                    && up.pins == 0
                    && up.class == low.class
                    && up.touches.min(5) == low.touches.min(5)
                    && up.degree == low.degree
                    && low.bucket == NOT_QUEUED | low.bucket
                    && share_class(up.degree, up.depth, &self.cfg)
                        == share_class(low.degree, low.depth, &self.cfg);
                if same {
                    self.lane_unlink(seg);
                    self.index.join(previous, seg);
                    self.queue_if_leaf(previous);
                    continue;
                }
            }
            previous = seg;
        }
        for k in 0..K {
            for c in 0..C {
                if n[k][c] > 0 {
                    self.content
                        .vote(lane_agent, k, c, m[k][c] as f32 / n[k][c] as f32);
                }
            }
        }
    }

    /// Blocks that follow what the call has so far entered the pool.
    pub fn stored(&mut self, call: u64, keys: &[u64], hints: &[Hint], output: bool) {
        let Some(r) = self.running.iter().position(|r| r.call == call) else {
            return;
        };
        let run = self.running[r];
        let mut tail = run.tail;
        let mut len = run.len;
        let (mut keys, mut hints) = (keys, hints);
        // Blocks that another call stored meanwhile.
        while let Some((&key, rest)) = keys.split_first() {
            let slot = self.index.find_after(tail, key);
            if slot == NONE {
                break;
            }
            tail = slot;
            len += 1;
            keys = rest;
            hints = hints.get(1..).unwrap_or(&[]);
        }
        if tail != run.tail && tail != NONE {
            // Children hang below the last block of a segment only.
            let seg = self.index.blocks[tail as usize].segment;
            if self.index.seg(seg).tail != tail {
                let upper_len = len - self.index.seg(seg).depth;
                let lower = self.index.split(seg, tail, upper_len);
                assert!(lower != NONE);
                let lane = self.index.seg(seg).lane;
                self.lane_link(lower, lane);
            }
        }
        if tail != NONE {
            self.pin(tail);
        }
        if run.tail != NONE {
            self.unpin(run.tail);
        }
        let mut segment = NONE;
        let (first_tail, mut class_now) = (tail, 255u8);
        for (i, &key) in keys.iter().enumerate() {
            let class = if output {
                CLASS_OUTPUT
            } else {
                first_class(run.prompt_len.saturating_sub(len + 1))
            };
            if segment == NONE
                || class != class_now
                || (!hints.is_empty() && hints[i] != hints[i - 1])
            {
                let fresh = self.index.new_segment();
                assert!(fresh != NONE, "segments exhausted");
                let calls = self.lanes[run.lane as usize].calls;
                {
                    let x = self.index.seg_mut(fresh);
                    x.class = class;
                    x.touches = 1;
                    x.degree = 1;
                    x.depth = len;
                    x.touch_call = calls;
                    x.last_use_us = self.now_us;
                }
                if !hints.is_empty() {
                    self.hints[fresh as usize] = hints[i];
                }
                self.lane_link(fresh, run.lane);
                self.index.recency_push(fresh);
                if tail != NONE {
                    let above = self.index.blocks[tail as usize].segment;
                    self.index.dequeue(above);
                    self.index.seg_mut(above).children += 1;
                }
                segment = fresh;
                class_now = class;
            }
            let slot = self.index.add_block(key, tail, segment);
            assert!(slot != NONE, "index full");
            let x = self.index.seg_mut(segment);
            if x.len == 0 {
                x.top = slot;
            }
            x.tail = slot;
            x.len += 1;
            tail = slot;
            len += 1;
        }
        if tail != first_tail {
            self.pin(tail);
            if first_tail != NONE {
                self.unpin(first_tail);
            }
        }
        let r = &mut self.running[r];
        r.tail = tail;
        r.len = len;
    }

    pub fn call_finished(&mut self, call: u64, now_us: u64, tool: u16, output_len: u32) {
        self.now_us = self.now_us.max(now_us);
        let now = self.now_us;
        let Some(r) = self.running.iter().position(|r| r.call == call) else {
            return;
        };
        let run = self.running.swap_remove(r);
        let took = (now - run.start_us) as f32 / 1e6;
        self.service_s += 0.05 * (took - self.service_s);
        let s = run.session;
        if run.tail != NONE {
            let mut seg = self.index.blocks[run.tail as usize].segment;
            while seg != NONE {
                self.index.seg_mut(seg).last_use_us = now;
                self.index.recency_remove(seg);
                self.index.recency_push(seg);
                seg = self.index.parent_segment(seg);
            }
            self.unpin(run.tail);
        }
        {
            let x = &mut self.sessions[s as usize];
            x.running -= 1;
            x.last_finish_us = now;
            x.gap.tool = tool;
            x.size = (32 - output_len.leading_zeros()).min(15) as u8;
        }
        self.silent_remove(s);
        self.silent_push(s);
        self.label_silent();
        self.refresh(s);
    }

    fn update_end_after(&mut self) {
        // Silence beyond four times the 99.5 % quantile of all gaps counts as an end.
        let h = &self.gaps.root;
        let mut left = h.n * 0.005;
        let mut b = G - 1;
        while b > 0 && left >= h.d[b] {
            left -= h.d[b];
            b -= 1;
        }
        self.end_after_us = (gap_edge_s(b as f32 + 1.0) * 4.0 * 1e6) as u64;
    }

    fn queue_if_leaf(&mut self, seg: u32) {
        let x = self.index.seg(seg);
        if x.children == 0 && x.pins == 0 {
            let bucket = self.score_bucket(seg);
            self.index.dequeue(seg);
            self.index.enqueue(seg, bucket);
        }
    }

    fn load_view(&mut self, s: u32) {
        if self.view.session == s && self.view.now_us == self.now_us {
            return;
        }
        let x = self.sessions[s as usize];
        let lanes = Lanes::of(&self.lanes, &x);
        let lanes = lanes.weights(&self.transitions, &x, &self.cfg);
        let alive = self.ends.continues(
            x.last as usize,
            end_step(x.steps),
            x.size as usize,
            &self.cfg,
        );
        let later = (self.ends.all.h + 9.0) / (self.ends.all.e + 10.0);
        let mut hazards = [0.0; G];
        self.gaps.best(x.gap, &self.cfg, &mut hazards);
        let (age_us, wait_s) = if x.running > 0 {
            let elapsed = (self.now_us - x.last_start_us) as f32 / 1e6;
            (0, (self.service_s - elapsed).max(0.2 * self.service_s))
        } else {
            (self.now_us - x.last_finish_us, 0.0)
        };
        self.view.fill(
            s,
            self.now_us,
            &hazards,
            age_us,
            wait_s,
            if x.ended { 0.0 } else { alive },
            later,
            self.service_s,
            &self.lut,
        );
        self.view.lanes = lanes;
        if self.cfg.oracle.time {
            self.view.foretell(&self.starts[s as usize]);
        }
    }

    fn score_bucket(&mut self, seg: u32) -> u16 {
        let x = *self.index.seg(seg);
        let s = self.lanes[x.lane as usize].session;
        self.load_view(s);
        let lane = self.lanes[x.lane as usize];
        let k = lane.calls - x.touch_call;
        let mut r = [0.0f32; 3];
        for (j, r) in r.iter_mut().enumerate() {
            *r = self.content.rate(
                lane.agent as usize,
                ((k as usize) + j).min(K - 1),
                x.class as usize,
                &self.cfg,
            );
        }
        let mut c = self.view.reuse(x.lane, r);
        let mut shared_at = None;
        if self.cfg.oracle.content {
            c = [0.0; chain::STEPS];
            let steps = self.sessions[s as usize].steps;
            let next = self.hints[seg as usize].next_step;
            if next != u32::MAX && next + 1 > steps {
                c[((next - (steps - 1)) as usize - 1).min(chain::STEPS - 1)] = 1.0;
            }
        }
        if self.cfg.oracle.sharing {
            let at = self.hints[seg as usize].shared_us;
            shared_at = Some(if at == u64::MAX {
                f32::INFINITY
            } else {
                at.saturating_sub(self.now_us) as f32 / 1e6
            });
        }
        let mut shared = [0.0; A];
        self.sharing.hazards(
            share_class(x.degree, x.depth, &self.cfg),
            &self.cfg,
            &mut shared,
        );
        let age = self.now_us.saturating_sub(x.last_use_us);
        let horizon = if self.cfg.density {
            None
        } else {
            Some(self.evict_interval_us * self.pool_blocks as f32 / 1e6)
        };
        let score = self.view.score(&c, &shared, age, horizon, shared_at);
        density::bucket(score)
    }

    fn refresh(&mut self, s: u32) {
        let mut lane = self.sessions[s as usize].lanes;
        self.view.session = NONE;
        while lane != NONE {
            let mut seg = self.lanes[lane as usize].head;
            while seg != NONE {
                let bucket = self.index.seg(seg).bucket;
                let next = self.index.seg(seg).lane_next;
                if bucket != NOT_QUEUED {
                    let new = self.score_bucket(seg);
                    if new != bucket {
                        self.index.dequeue(seg);
                        self.index.enqueue(seg, new);
                    }
                }
                seg = next;
            }
            lane = self.lanes[lane as usize].next;
        }
        let x = &mut self.sessions[s as usize];
        let age = (self.now_us
            - if x.running > 0 {
                x.last_start_us
            } else {
                x.last_finish_us
            })
        .max(4000);
        x.next_refresh_us = self.now_us + age / 5;
    }

    /// Takes the `n` least valuable blocks out of the index, in order.
    pub fn evict(&mut self, n: usize, now_us: u64, mut victim: impl FnMut(u64)) -> usize {
        self.now_us = self.now_us.max(now_us);
        self.label_silent();
        let mut refreshed = 0;
        for _ in 0..self.sessions.len().min(256) {
            self.cursor = (self.cursor + 1) % self.sessions.len() as u32;
            if self.sessions[self.cursor as usize].next_refresh_us <= self.now_us {
                self.refresh(self.cursor);
                refreshed += 1;
                if refreshed >= 32 {
                    break;
                }
            }
        }
        let mut done = 0;
        while done < n {
            let seg = self.index.lowest();
            if seg == NONE {
                break;
            }
            let x = *self.index.seg(seg);
            if done == 0 || x.len > 0 {
                self.sharing.learn(
                    share_class(x.degree, x.depth, &self.cfg),
                    self.now_us.saturating_sub(x.last_use_us),
                    false,
                );
            }
            let take = (n - done).min(x.len as usize);
            let mut block = x.tail;
            for _ in 0..take {
                let b = self.index.blocks[block as usize];
                victim(b.key);
                self.index.remove_block(block);
                block = b.parent;
            }
            done += take;
            if take == x.len as usize {
                self.index.dequeue(seg);
                self.lane_unlink(seg);
                self.index.recency_remove(seg);
                self.index.free_segment(seg);
                if block != NONE {
                    let above = self.index.blocks[block as usize].segment;
                    self.index.seg_mut(above).children -= 1;
                    self.queue_if_leaf(above);
                }
            } else {
                let y = self.index.seg_mut(seg);
                y.tail = block;
                y.len -= take as u32;
            }
        }
        if done > 0 {
            let dt = (self.now_us - self.last_evict_us) as f32 / done as f32;
            self.evict_interval_us += 0.02 * (dt - self.evict_interval_us);
            self.last_evict_us = self.now_us;
        }
        done
    }

    pub fn resident(&self) -> usize {
        self.index.resident
    }
}

/// Exact up to eight calls, then half octaves.
fn end_step(steps: u32) -> usize {
    if steps <= 8 {
        steps as usize
    } else {
        (((steps as f32).log2() - 3.0) * 2.0) as usize + 9
    }
}

fn first_class(distance: u32) -> u8 {
    CLASS_FIRST + (31 - (distance + 1).leading_zeros()).min(7) as u8
}

const _: usize = GRID;
