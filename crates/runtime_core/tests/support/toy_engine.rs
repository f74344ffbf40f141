//! A serving engine of a hundred lines: one device, a pool of blocks with prefix reuse, continuous batching with a token
//! budget, sessions that call again after a gap. It asks policies as `runtime_core::scheduling` says, nothing more.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use runtime_core::ids::{mix, WorkloadId};
use runtime_core::policy::{Action, Event, Kind, Policies, Request};
use runtime_core::runtime::{EventKind, Options};
use runtime_core::scheduling::{Decision, Happening, Load, Needs, Prefill, Waiting};
use runtime_core::Runtime;

pub(crate) const BLOCK: u32 = 16;
const BUDGET: u32 = 2048;

/// One session: it calls `turns` times, each prompt being all that was said so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) start_us: u64,
    pub(crate) tenant: u16,
    pub(crate) agent: u16,
    pub(crate) turns: u32,
    /// Tokens of the prompt's shared beginning, of what each turn adds to it, and of each answer.
    pub(crate) shared: u32,
    pub(crate) added: u32,
    pub(crate) output: u32,
    pub(crate) gap_us: u64,
}

/// What happened to one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Served {
    pub(crate) tenant: u16,
    pub(crate) prompt_blocks: usize,
    pub(crate) hit_blocks: usize,
    /// The longest hold that a policy asked for, from arrival on.
    pub(crate) held_us: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) calls: Vec<Served>,
    /// Seconds from a session's start to its end, by plan.
    pub(crate) session_s: Vec<f64>,
    pub(crate) end_us: u64,
    /// (time, tenant, weighted tokens), for every charge; and (time, tenant, waits).
    pub(crate) service: Vec<(u64, u16, f64)>,
    pub(crate) backlog: Vec<(u64, u16, bool)>,
    /// Steps in which nothing ran although something waited.
    pub(crate) lazy_steps: u32,
    /// From admission to end, of any call.
    pub(crate) longest_stay_us: u64,
    /// Tokens prefilled in idle capacity.
    pub(crate) prefilled_ahead: u32,
}

struct Running {
    plan: usize,
    call: Waiting,
    admitted_us: u64,
    blocks: Vec<u64>,
    to_prefill: u32,
    to_decode: u32,
    kv_token_us: u64,
}

pub(crate) struct Engine<'a> {
    runtime: Runtime,
    workload: WorkloadId,
    policies: &'a Policies,
    capacity: usize,
    resident: HashSet<u64>,
    pins: HashMap<u64, u32>,
    now_us: u64,
    hits: (u64, u64),
    /// Prompts by call.
    prompts: HashMap<u64, Vec<u64>>,
}

fn key(plan: &Plan, session: usize, block: u32) -> u64 {
    // Only whole blocks of the shared beginning are shared.
    let owner = if (block + 1) * BLOCK <= plan.shared { u64::MAX } else { session as u64 };
    mix(owner ^ mix(u64::from(block))) | 1
}

fn step_us(computed: u32, decoding: u32) -> u64 {
    7_000 + 30 * u64::from(computed) + 20 * u64::from(decoding)
}

fn prompt_tokens(plan: &Plan, turn: u32) -> u32 {
    plan.shared + (turn + 1) * plan.added + turn * plan.output
}

impl<'a> Engine<'a> {
    pub(crate) fn new(capacity: usize, policies: &'a Policies) -> Self {
        policies.wire(Needs::ALL).expect("this engine supplies everything");
        let runtime = Runtime::new(Options::for_pool(capacity)).expect("a valid pool");
        let workload = runtime.workload("toy").expect("the first workload");
        let (resident, pins, prompts) = (HashSet::new(), HashMap::new(), HashMap::new());
        Self { runtime, workload, policies, capacity, resident, pins, now_us: 0, hits: (0, 0), prompts }
    }

    fn tell(&self, kind: EventKind, session: u64, call: &Waiting, blocks: &[u64], hit: usize) {
        let (workload, agent, name, time_us) = (self.workload, call.agent, call.call, self.now_us);
        let event = Event { workload, kind, session, agent, call: name, time_us, blocks, hit };
        self.policies.observe(&self.runtime, &event);
    }

    fn hear(&self, happening: Happening) {
        self.policies.hear(&self.runtime, self.now_us, &[happening]);
    }

    fn look(&self, waiting: &mut Waiting, blocks: &[u64]) -> usize {
        let hit = blocks.iter().take_while(|block| self.resident.contains(block)).count();
        waiting.resident_tokens = (hit as u32 * BLOCK).min(waiting.prompt_tokens);
        waiting.group = hit.checked_sub(1).map_or(0, |last| blocks[last]);
        hit
    }

    /// Makes room for `n` blocks.
    fn make_room(&mut self, n: usize) {
        let short = (self.resident.len() + n).saturating_sub(self.capacity);
        if short == 0 {
            return;
        }
        let (resident, request) = (&mut self.resident, Request { kind: Kind::Evict, n: short, now_us: self.now_us });
        let gone = self.policies.act(&self.runtime, &request, &mut |action| match action {
            Action::Evicted(victim) => assert!(resident.remove(&victim.key()), "a victim was resident"),
            other => panic!("{other:?}"),
        });
        assert_eq!(gone.expect("one thread"), short, "the last policy names all that are wanted");
    }

    fn load(&self, running_calls: u32, budget_tokens: u32) -> Load {
        Load {
            now_us: self.now_us,
            running_calls,
            pool_blocks: self.capacity as u32,
            block_tokens: BLOCK,
            pinned_blocks: self.pins.len() as u32,
            free_blocks: (self.capacity - self.resident.len()) as u32,
            prompt_blocks: self.hits.0,
            hit_blocks: self.hits.1,
            budget_tokens,
            host_bytes_per_s: 0,
        }
    }

    /// Computes what the policies want in idle capacity; returns how many tokens.
    fn prefill_ahead(&mut self, load: Load) -> u32 {
        let mut prefills = [Prefill::default(); 4];
        let named = self.policies.idle(&self.runtime, &load, &mut prefills);
        let mut tokens = 0;
        for prefill in &prefills[..named] {
            let like = self.prompts.get(&prefill.like_call).expect("a call that there was");
            let chain = like.get(..prefill.blocks as usize).expect("no more than it had").to_vec();
            let missing = |resident: &HashSet<u64>| chain.iter().filter(|block| !resident.contains(block)).count();
            let wanted = missing(&self.resident);
            if self.pins.len() + chain.len() > self.capacity {
                continue;
            }
            self.make_room(wanted);
            // Some of the chain may have gone for it: what still fits is brought, root first.
            let mut brought = 0;
            let fits = chain.iter().take_while(|block| {
                let there = self.resident.contains(block);
                brought += usize::from(!there);
                there || self.resident.len() + brought <= self.capacity
            });
            let until = fits.count();
            let new = chain[..until].iter().filter(|&&block| self.resident.insert(block)).count();
            let (workload, now_us) = (self.workload, self.now_us);
            self.runtime
                .restored(workload, prefill.session, prefill.agent, now_us, &chain[..until])
                .expect("one thread");
            tokens += new as u32 * BLOCK;
        }
        assert!(tokens <= load.budget_tokens, "{tokens} of {}", load.budget_tokens);
        tokens
    }

    /// Serves all sessions to their end.
    pub(crate) fn run(mut self, plans: &[Plan]) -> Report {
        let mut report = Report { session_s: vec![0.0; plans.len()], ..Report::default() };
        let mut todo: BTreeMap<(u64, usize), u32> =
            plans.iter().enumerate().map(|(i, plan)| ((plan.start_us, i), 0)).collect();
        let mut waiting: Vec<(usize, Waiting)> = Vec::new();
        let mut held: HashMap<u64, u64> = HashMap::new();
        let mut running: VecDeque<Running> = VecDeque::new();
        let mut calls = 0;
        let mut decisions = Vec::new();
        while !(todo.is_empty() && waiting.is_empty() && running.is_empty()) {
            if running.is_empty() && waiting.is_empty() {
                let next_us = todo.first_key_value().expect("something is to come").0 .0;
                while self.now_us < next_us {
                    let ahead = self.prefill_ahead(self.load(0, BUDGET));
                    if ahead == 0 {
                        self.now_us = next_us;
                    }
                    report.prefilled_ahead += ahead;
                    self.now_us += if ahead > 0 { step_us(ahead, 0) } else { 0 };
                }
            }
            while let Some(entry) = todo.first_entry().filter(|entry| entry.key().0 <= self.now_us) {
                let ((arrived_us, plan), turn) = entry.remove_entry();
                let Plan { tenant, agent, .. } = plans[plan];
                calls += 1;
                let prompt_tokens = prompt_tokens(&plans[plan], turn);
                let (call, workload, session) = (calls, self.workload, plan as u64);
                let (resident_tokens, host_tokens, group) = (0, 0, 0);
                let call = Waiting {
                    call,
                    workload,
                    session,
                    agent,
                    tenant,
                    arrived_us,
                    prompt_tokens,
                    resident_tokens,
                    host_tokens,
                    group,
                };
                report.backlog.push((self.now_us, tenant, true));
                self.hear(Happening::Arrived(call));
                waiting.push((plan, call));
            }
            let mut budget = BUDGET.saturating_sub(running.len() as u32);
            let mut asked = Vec::new();
            for (plan, call) in &mut waiting {
                let blocks: Vec<u64> = (0..call.prompt_tokens / BLOCK).map(|b| key(&plans[*plan], *plan, b)).collect();
                self.look(call, &blocks);
                asked.push(*call);
            }
            decisions.resize(asked.len(), Decision::default());
            let load = self.load(running.len() as u32, budget);
            self.policies.schedule(&self.runtime, &load, &asked, &mut decisions);
            let mut ranks: Vec<u32> = decisions.iter().map(|decision| decision.rank).collect();
            ranks.sort_unstable();
            assert!(ranks.iter().enumerate().all(|(i, &rank)| rank == i as u32), "ranks are 0, 1, 2, ...: {ranks:?}");
            for (call, decision) in asked.iter().zip(&decisions) {
                let so_far = held.entry(call.call).or_default();
                *so_far = (*so_far).max(decision.hold_until_us.saturating_sub(call.arrived_us));
            }
            let mut order: Vec<usize> = (0..asked.len()).collect();
            order.sort_by_key(|&i| decisions[i].rank);
            let mut admitted = HashSet::new();
            for i in order {
                if decisions[i].is_held(self.now_us) {
                    continue;
                }
                let (plan, mut call) = waiting[i];
                let held_us = held[&call.call];
                if budget == 0 || !self.admit(&plans[plan], &mut call, held_us, &mut running, &mut report) {
                    break;
                }
                budget = budget.saturating_sub(call.missing_tokens().max(1));
                admitted.insert(call.call);
            }
            waiting.retain(|(_, call)| !admitted.contains(&call.call));
            report.lazy_steps += u32::from(running.is_empty() && !waiting.is_empty());
            let ahead = if waiting.is_empty() {
                self.prefill_ahead(Load { budget_tokens: budget, pinned_blocks: self.pins.len() as u32, ..load })
            } else {
                0
            };
            report.prefilled_ahead += ahead;
            self.step(plans, &mut running, ahead, &mut todo, &mut report);
        }
        report.end_us = self.now_us;
        report
    }

    fn admit(
        &mut self,
        plan: &Plan,
        call: &mut Waiting,
        held_us: u64,
        running: &mut VecDeque<Running>,
        report: &mut Report,
    ) -> bool {
        let session = call.session as usize;
        let total = (call.prompt_tokens + plan.output) / BLOCK;
        let blocks: Vec<u64> = (0..total).map(|b| key(plan, session, b)).collect();
        let prompt = (call.prompt_tokens / BLOCK) as usize;
        let hit = self.look(call, &blocks[..prompt]);
        // The hits are pinned before room is made, so that they are not what goes.
        for &block in &blocks[..hit] {
            *self.pins.entry(block).or_default() += 1;
        }
        let new = blocks[hit..].iter().filter(|block| !self.resident.contains(block)).count();
        if self.pins.len() + new > self.capacity {
            blocks[..hit].iter().for_each(|&block| self.unpin(block));
            return false;
        }
        let (name, at) = (call.call, self.now_us);
        let known =
            self.runtime.call_started(self.workload, call.session, name, call.agent, at, &blocks[..prompt], &[]);
        assert_eq!(known.expect("one thread"), hit, "the core and the engine agree on what is resident");
        self.make_room(new);
        self.tell(EventKind::CallStart, call.session, call, &blocks[..prompt], hit);
        for &block in &blocks[hit..] {
            self.resident.insert(block);
            *self.pins.entry(block).or_default() += 1;
        }
        self.runtime.stored(self.workload, name, at, &blocks[hit..prompt], &[]).expect("one thread");
        self.tell(EventKind::Stored, call.session, call, &blocks[hit..prompt], 0);
        self.hear(Happening::Admitted { call: *call, again: false });
        self.prompts.insert(name, blocks[..prompt].to_vec());
        self.hits = (self.hits.0 + prompt as u64, self.hits.1 + hit as u64);
        report.backlog.push((self.now_us, plan.tenant, false));
        report.service.push((self.now_us, plan.tenant, f64::from(call.missing_tokens())));
        report.calls.push(Served { tenant: plan.tenant, prompt_blocks: prompt, hit_blocks: hit, held_us });
        let (to_prefill, to_decode) = (call.missing_tokens(), plan.output);
        let admitted_us = self.now_us;
        running.push_back(Running {
            plan: session,
            call: *call,
            admitted_us,
            blocks,
            to_prefill,
            to_decode,
            kv_token_us: 0,
        });
        true
    }

    fn unpin(&mut self, block: u64) {
        if let Some(pins) = self.pins.get_mut(&block) {
            *pins -= 1;
            if *pins == 0 {
                self.pins.remove(&block);
            }
        }
    }

    /// One step of the device: every decoding call gets a token, the rest of the budget goes to prompts in turn.
    fn step(
        &mut self,
        plans: &[Plan],
        running: &mut VecDeque<Running>,
        ahead: u32,
        todo: &mut BTreeMap<(u64, usize), u32>,
        report: &mut Report,
    ) {
        let decoding = running.iter().filter(|one| one.to_prefill == 0).count() as u32;
        let mut budget = BUDGET.saturating_sub(decoding + ahead);
        let mut computed = ahead;
        let mut served = Vec::new();
        for one in running.iter_mut() {
            if one.to_prefill == 0 {
                one.to_decode -= 1;
                served.push((0, 1));
            } else {
                let chunk = one.to_prefill.min(budget);
                (one.to_prefill, budget, computed) = (one.to_prefill - chunk, budget - chunk, computed + chunk);
                served.push((chunk, 0));
            }
        }
        let step_us = step_us(computed, decoding);
        self.now_us += step_us;
        for (one, &(prefill_tokens, decoded_tokens)) in running.iter_mut().zip(&served) {
            one.kv_token_us += one.blocks.len() as u64 * u64::from(BLOCK) * step_us;
            let kv_token_us = std::mem::take(&mut one.kv_token_us);
            let (call, repeated_tokens) = (one.call.call, 0);
            report.service.push((self.now_us, one.call.tenant, 2.0 * f64::from(decoded_tokens)));
            let got = Happening::Served { call, prefill_tokens, repeated_tokens, decoded_tokens, kv_token_us };
            self.policies.hear(&self.runtime, self.now_us, &[got]);
        }
        let (done, left): (VecDeque<Running>, _) = running.drain(..).partition(|one| one.to_decode == 0);
        *running = left;
        for one in done {
            let (plan, call, prompt) = (&plans[one.plan], &one.call, (one.call.prompt_tokens / BLOCK) as usize);
            let output = &one.blocks[prompt..];
            self.runtime
                .call_ended(self.workload, call.session, call.call, 0, self.now_us, output, &[])
                .expect("one thread");
            one.blocks.iter().for_each(|&block| self.unpin(block));
            self.tell(EventKind::CallEnd, call.session, call, output, 0);
            self.hear(Happening::Ended { call: call.call });
            report.longest_stay_us = report.longest_stay_us.max(self.now_us - one.admitted_us);
            let turn = (call.prompt_tokens - plan.shared - plan.added) / (plan.added + plan.output) + 1;
            if turn < plan.turns {
                todo.insert((self.now_us + plan.gap_us, one.plan), turn);
            } else {
                report.session_s[one.plan] = (self.now_us - plan.start_us) as f64 / 1e6;
                self.tell(EventKind::SessionEnd, call.session, call, &[], 0);
            }
        }
    }
}

/// Mean of some values.
pub(crate) fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, n) = values.into_iter().fold((0.0, 0.0), |(sum, n), value| (sum + value, n + 1.0));
    sum / f64::max(n, 1.0)
}

/// The largest difference of what two tenants got over any time in which both had calls waiting.
pub(crate) fn widest_gap(report: &Report, a: u16, b: u16) -> f64 {
    let mut events: Vec<(u64, u8, u16, f64)> = Vec::new();
    events.extend(
        report
            .backlog
            .iter()
            .map(|&(at, tenant, waits)| (at, u8::from(!waits), tenant, if waits { 1.0 } else { -1.0 })),
    );
    events.extend(report.service.iter().map(|&(at, tenant, tokens)| (at, 2, tenant, tokens)));
    events.sort_by_key(|event| (event.0, event.1));
    let (mut waits, mut difference) = ([0.0f64; 2], 0.0f64);
    let (mut lowest, mut highest, mut widest) = (0.0f64, 0.0f64, 0.0f64);
    for (_, kind, tenant, value) in events {
        let Some(side) = [a, b].iter().position(|&t| t == tenant) else { continue };
        if kind < 2 {
            waits[side] += value;
        } else {
            difference += if side == 0 { value } else { -value };
        }
        if waits[0] > 0.0 && waits[1] > 0.0 {
            (lowest, highest) = (lowest.min(difference), highest.max(difference));
            widest = widest.max(highest - lowest);
        } else {
            (lowest, highest) = (difference, difference);
        }
    }
    widest
}
