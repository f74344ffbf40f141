//! Runs many replays in parallel: traces x concurrency x seeds x capacities x policies.
//!
//! A *setting* is one (trace, sessions, seed, capacity); its [`Schedule`] is made once and shared by every policy.
//! `lru` and `min` always run, asked for or not, because `gap_closed` is measured between them. Results come in the
//! order of the options, independent of which thread finished first.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::host::HostOptions;
use crate::latency::LatencyModel;
use crate::policies;
use crate::policy::CachePolicy;
use crate::schedule::{Order, Schedule, ScheduleOptions};
use crate::sim::{self, Outcome};
use crate::trace::Trace;

/// Pool size of a setting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Capacity {
    /// Fraction of the live working set: sessions x mean distinct blocks of a session.
    Fraction(f64),
    /// Number of blocks.
    Blocks(usize),
}

impl Capacity {
    /// Reads `5%` or `1500`.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |problem: &str| Error::BadOption {
            option: "--capacity".into(),
            problem: format!("`{text}` {problem}"),
            remedy: "write a percentage of the live working set such as 5%, or a number of blocks such as 1500".into(),
        };
        let trimmed = text.trim();
        if let Some(percent) = trimmed.strip_suffix('%') {
            let percent: f64 = percent.trim().parse().map_err(|_| bad("is not a number"))?;
            return if percent.is_finite() && percent > 0.0 {
                Ok(Self::Fraction(percent / 100.0))
            } else {
                Err(bad("is not a positive percentage"))
            };
        }
        match trimmed.parse::<u32>() {
            Ok(0) => Err(bad("leaves the pool without a block")),
            Ok(blocks) => Ok(Self::Blocks(blocks as usize)),
            Err(_) => Err(bad("is neither a percentage nor a number of blocks")),
        }
    }

    /// The pool size for `sessions` concurrent sessions of a trace, at least one block.
    pub fn blocks(self, mean_session_blocks: f64, sessions: usize) -> usize {
        match self {
            Self::Fraction(f) => ((f * sessions as f64 * mean_session_blocks).round() as usize).max(1),
            Self::Blocks(n) => n,
        }
    }
}

/// Host tier of a sweep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Host {
    /// How many blocks it holds.
    pub size: HostSize,
    /// Bytes per second between host and device; the latency model's where `None`.
    pub bytes_per_s: Option<f64>,
    /// Bytes per second that prefetching may use; half the bandwidth where `None`, 0 switches it off.
    pub prefetch_bytes_per_s: Option<f64>,
}

/// Size of a host tier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HostSize {
    /// A multiple of the pool.
    TimesPool(f64),
    /// Number of blocks.
    Blocks(usize),
}

impl HostSize {
    /// Reads `4x` or `20000`.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = || Error::BadOption {
            option: "--host".into(),
            problem: format!("`{text}` is not a size"),
            remedy: "write a multiple of the pool such as 4x, or a number of blocks such as 20000".into(),
        };
        match text.trim().strip_suffix('x') {
            Some(times) => match times.parse::<f64>() {
                Ok(times) if times.is_finite() && times > 0.0 => Ok(Self::TimesPool(times)),
                _ => Err(bad()),
            },
            None => match text.trim().parse::<u32>() {
                Ok(blocks) if blocks > 0 => Ok(Self::Blocks(blocks as usize)),
                _ => Err(bad()),
            },
        }
    }
}

impl Host {
    fn options(self, pool_blocks: usize, block_size: u32, model: &LatencyModel) -> HostOptions {
        let bytes_per_s = self.bytes_per_s.unwrap_or(model.host_bytes_per_s);
        HostOptions {
            blocks: match self.size {
                HostSize::TimesPool(times) => (times * pool_blocks as f64).round() as usize,
                HostSize::Blocks(blocks) => blocks,
            },
            bytes_per_s,
            prefetch_bytes_per_s: self.prefetch_bytes_per_s.unwrap_or(bytes_per_s / 2.0),
            block_bytes: model.kv_bytes_per_token * f64::from(block_size),
        }
    }
}

/// Makes a fresh policy of the caller's own for each replay.
pub type CustomPolicy = Arc<dyn Fn(&Trace) -> Result<Box<dyn CachePolicy>> + Send + Sync>;

/// A policy of the sweep.
#[derive(Clone)]
pub enum Contender {
    /// One of [`policies::names`].
    Named(String),
    /// The caller's own, under a name for reports.
    Custom(String, CustomPolicy),
}

impl Contender {
    /// Name in reports.
    pub fn name(&self) -> &str {
        match self {
            Self::Named(name) | Self::Custom(name, _) => name,
        }
    }
}

/// What to run.
#[derive(Clone)]
pub struct SweepOptions {
    /// How calls are ordered.
    pub order: Order,
    /// Concurrent sessions, one setting each.
    pub sessions: Vec<usize>,
    /// Seeds, one setting each.
    pub seeds: Vec<u64>,
    /// Pool sizes, one setting each.
    pub capacities: Vec<Capacity>,
    /// Policies, in the order of the results.
    pub policies: Vec<Contender>,
    /// The latency model.
    pub model: LatencyModel,
    /// The host tier; none without.
    pub host: Option<Host>,
    /// Hides the trace's sessions and agents from policies: they infer them from prompts.
    pub strip_identity: bool,
    /// Worker threads; 0 takes one per core.
    pub threads: usize,
}

/// How far a sweep is; shared with the thread that shows it. Setting `cancelled` stops it between two replays.
#[derive(Debug, Default)]
pub struct Progress {
    /// Work done, in calls replayed.
    pub done: AtomicU64,
    /// All the work; 0 until the sweep has started.
    pub total: AtomicU64,
    /// Asks the sweep to stop.
    pub cancelled: AtomicBool,
}

/// Time to first token over the calls of a replay, milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TtftMs {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
}

/// One line of the result file. Field names are the file's and stable; null marks what does not apply.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// Workload.
    pub workload: String,
    /// Policy.
    pub policy: String,
    /// Concurrent sessions.
    pub sessions: usize,
    /// Pool size as a fraction of the live working set; null where it was given in blocks.
    pub capacity_fraction: Option<f64>,
    /// Pool size in blocks.
    pub capacity_blocks: usize,
    /// Calls that used the cache; calls larger than the pool are not among them.
    pub calls: u64,
    /// Full prompt blocks of these calls.
    pub prompt_blocks: u64,
    /// Of these, found in the pool.
    pub hit_blocks: u64,
    /// `hit_blocks / prompt_blocks`.
    pub hit_rate: f64,
    /// Share of prompt blocks loaded from the host tier; null without one.
    pub host_hit_rate: Option<f64>,
    /// Modelled time to first token.
    pub ttft_ms: TtftMs,
    /// Modelled seconds from the first arrival to the last finish.
    pub makespan_s: f64,
    /// (hit rate - LRU) / (MIN - LRU); null where MIN is not above LRU.
    pub gap_closed: Option<f64>,
    /// Blocks evicted.
    pub evictions: u64,
    /// Blocks prefetched; null without a host tier.
    pub prefetched_blocks: Option<u64>,
    /// Of these, hit before they were evicted; null without a host tier.
    pub prefetch_used_blocks: Option<u64>,
}

/// A [`Cell`] with what reports need beside it and the result file does not hold.
#[derive(Clone, Debug, Serialize)]
pub struct SweepResult {
    /// The line of the result file.
    pub cell: Cell,
    /// Seed of the setting.
    pub seed: u64,
    /// Calls larger than the pool, which ran without the cache.
    pub bypassed_calls: u64,
    /// Victims that the replay chose because the policy named too few.
    pub forced_evictions: u64,
    /// Hit rate of `lru` in this setting.
    pub lru_hit_rate: f64,
    /// Hit rate of `min` in this setting.
    pub min_hit_rate: f64,
    /// Mean time to first token of `lru` in this setting, milliseconds.
    pub lru_ttft_mean_ms: f64,
    /// Mean time to first token where blocks that were brought back while a call waited for room are there no sooner than
    /// if their loading had begun when it arrived, milliseconds.
    pub strict_ttft_mean_ms: f64,
    /// Wall seconds of the replay, without its latency model.
    pub replay_s: f64,
}

struct Setting<'a> {
    trace: &'a Trace,
    workload: String,
    capacity: Capacity,
    options: ScheduleOptions,
    host: Option<HostOptions>,
    strip_identity: bool,
    schedule: OnceLock<Result<Schedule>>,
}

/// Runs the sweep. Returns an empty list where it was cancelled.
pub fn run(traces: &[Arc<Trace>], options: &SweepOptions, progress: &Progress) -> Result<Vec<SweepResult>> {
    check(traces, options)?;
    let settings = settings(traces, options);
    let mut contenders = options.policies.clone();
    for needed in ["lru", "min"] {
        if !contenders.iter().any(|c| c.name() == needed) {
            contenders.push(Contender::Named(needed.into()));
        }
    }
    let total: u64 = settings.iter().map(|s| s.trace.calls.len() as u64).sum();
    progress.total.store(total * contenders.len() as u64, Ordering::Relaxed);

    let jobs: Vec<(&Setting<'_>, &Contender)> =
        settings.iter().flat_map(|s| contenders.iter().map(move |c| (s, c))).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build().map_err(|e| Error::BadOption {
        option: "threads".into(),
        problem: e.to_string(),
        remedy: "ask for fewer threads".into(),
    })?;
    // One job at a time per thread: jobs differ a hundredfold in length.
    let outcomes: Vec<Option<SweepResult>> = pool.install(|| {
        jobs.par_iter()
            .with_max_len(1)
            .map(|(setting, contender)| replay(setting, contender, progress))
            .collect::<Result<_>>()
    })?;
    if progress.cancelled.load(Ordering::Relaxed) {
        return Ok(Vec::new());
    }

    let mut results: Vec<SweepResult> = outcomes.into_iter().flatten().collect();
    let asked = options.policies.len();
    for row in results.chunks_mut(contenders.len()) {
        let find = |name: &str| {
            let cell = row.iter().map(|r| &r.cell).find(|c| c.policy == name).expect("always among the contenders");
            (cell.hit_blocks as f64, cell.hit_rate, cell.ttft_ms.mean)
        };
        let ((lru, lru_hit_rate, lru_ttft_mean_ms), (min, min_hit_rate, _)) = (find("lru"), find("min"));
        for result in row {
            result.lru_hit_rate = lru_hit_rate;
            result.min_hit_rate = min_hit_rate;
            result.lru_ttft_mean_ms = lru_ttft_mean_ms;
            result.cell.gap_closed = (min > lru).then(|| (result.cell.hit_blocks as f64 - lru) / (min - lru));
        }
    }
    let mut index = 0..;
    results.retain(|_| index.next().is_some_and(|i: usize| i % contenders.len() < asked));
    Ok(results)
}

fn check(traces: &[Arc<Trace>], options: &SweepOptions) -> Result<()> {
    let lists = [
        ("TRACE", traces.is_empty()),
        ("--sessions", options.sessions.is_empty()),
        ("--seed", options.seeds.is_empty()),
        ("--capacity", options.capacities.is_empty()),
        ("--policy", options.policies.is_empty()),
    ];
    if let Some((option, _)) = lists.iter().find(|(_, empty)| *empty) {
        return Err(Error::BadOption {
            option: (*option).into(),
            problem: "nothing to run".into(),
            remedy: "name at least one".into(),
        });
    }
    for (i, contender) in options.policies.iter().enumerate() {
        // Known names are checked before anything runs; a name may fail an hour into the sweep otherwise.
        if let Contender::Named(name) = contender {
            if !policies::names().contains(&name.as_str()) {
                return Err(Error::UnknownPolicy { name: name.clone(), known: policies::names().join(", ") });
            }
        }
        if options.strip_identity && policies::needs_identity(contender.name()) {
            return Err(Error::BadOption {
                option: "--policy".into(),
                problem: format!("`{}` needs the sessions and agents that --strip-identity hides", contender.name()),
                remedy: "leave one of the two out".into(),
            });
        }
        if options.policies[..i].iter().any(|c| c.name() == contender.name()) {
            return Err(Error::BadOption {
                option: "--policy".into(),
                problem: format!("`{}` is named twice", contender.name()),
                remedy: "name each policy once".into(),
            });
        }
    }
    Ok(())
}

fn settings<'a>(traces: &'a [Arc<Trace>], options: &SweepOptions) -> Vec<Setting<'a>> {
    let mut settings = Vec::new();
    for (t, trace) in traces.iter().enumerate() {
        let same_name = traces[..t].iter().filter(|other| other.workload == trace.workload).count();
        let workload = match same_name {
            0 => trace.workload.clone(),
            n => format!("{}#{}", trace.workload, n + 1),
        };
        let mean_session_blocks = trace.mean_session_blocks();
        for &sessions in &options.sessions {
            for &seed in &options.seeds {
                for &capacity in &options.capacities {
                    let capacity_blocks = capacity.blocks(mean_session_blocks, sessions);
                    settings.push(Setting {
                        trace,
                        workload: workload.clone(),
                        capacity,
                        options: ScheduleOptions {
                            order: options.order,
                            sessions,
                            seed,
                            capacity_blocks,
                            model: options.model,
                        },
                        host: options.host.map(|host| host.options(capacity_blocks, trace.block_size, &options.model)),
                        strip_identity: options.strip_identity,
                        schedule: OnceLock::new(),
                    });
                }
            }
        }
    }
    settings
}

fn replay(setting: &Setting<'_>, contender: &Contender, progress: &Progress) -> Result<Option<SweepResult>> {
    if progress.cancelled.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let Ok(schedule) = setting.schedule.get_or_init(|| Schedule::new(setting.trace, setting.options)) else {
        // The error is the same for every policy of the setting: make it anew for whoever reports it.
        return Schedule::new(setting.trace, setting.options).map(|_| None);
    };
    let mut policy = match contender {
        Contender::Named(name) => {
            let policy = policies::build(name, setting.trace, schedule)?;
            // The others look at blocks alone.
            let asks = setting.strip_identity && policies::agentrt::config(name).is_some();
            if asks {
                let quotes = name != policies::agentrt::NO_QUOTES;
                Box::new(policies::Inferred::new(policy, setting.trace, quotes))
            } else {
                policy
            }
        }
        Contender::Custom(_, build) if setting.strip_identity => {
            let policy = build(&policies::Inferred::anonymous(setting.trace))?;
            Box::new(policies::Inferred::new(policy, setting.trace, true))
        }
        Contender::Custom(_, build) => build(setting.trace)?,
    };
    let calls = setting.trace.calls.len() as u64;
    let events = schedule.events.len().max(1) as u64;
    let mut reported = 0;
    let begin = Instant::now();
    let outcome = sim::run_with_host(setting.trace, schedule, policy.as_mut(), setting.host, &mut |done| {
        let now = done * calls / events;
        progress.done.fetch_add(now - reported, Ordering::Relaxed);
        reported = now;
    });
    let replay_s = begin.elapsed().as_secs_f64();
    Ok(Some(summarise(setting, contender, schedule, &outcome, replay_s)))
}

fn summarise(
    setting: &Setting<'_>,
    contender: &Contender,
    schedule: &Schedule,
    outcome: &Outcome,
    replay_s: f64,
) -> SweepResult {
    let trace = setting.trace;
    let cached = |call: u32| outcome.cached_tokens(call, trace.block_size);
    let mut model = setting.options.model;
    if let Some(host) = setting.host {
        model.host_bytes_per_s = host.bytes_per_s;
    }
    let timeline = sim::timeline(trace, schedule, &model, &cached, false);
    let ttft_ms = ttft(timeline.ttft_ms);
    let strict_ttft_mean_ms = match setting.host {
        Some(_) => ttft(sim::timeline(trace, schedule, &model, &cached, true).ttft_ms).mean,
        None => ttft_ms.mean,
    };
    SweepResult {
        cell: Cell {
            workload: setting.workload.clone(),
            policy: contender.name().to_owned(),
            sessions: setting.options.sessions,
            capacity_fraction: match setting.capacity {
                Capacity::Fraction(fraction) => Some(fraction),
                Capacity::Blocks(_) => None,
            },
            capacity_blocks: setting.options.capacity_blocks,
            calls: outcome.calls,
            prompt_blocks: outcome.prompt_blocks,
            hit_blocks: outcome.hit_blocks,
            hit_rate: outcome.hit_rate(),
            host_hit_rate: outcome.host.map(|h| h.loaded_blocks as f64 / outcome.prompt_blocks.max(1) as f64),
            ttft_ms,
            makespan_s: timeline.makespan_s,
            gap_closed: None,
            evictions: outcome.evictions,
            prefetched_blocks: outcome.host.map(|h| h.prefetched_blocks),
            prefetch_used_blocks: outcome.host.map(|h| h.prefetch_used_blocks),
        },
        seed: setting.options.seed,
        bypassed_calls: outcome.bypassed_calls,
        forced_evictions: outcome.forced_evictions,
        lru_hit_rate: 0.0,
        min_hit_rate: 0.0,
        lru_ttft_mean_ms: 0.0,
        strict_ttft_mean_ms,
        replay_s,
    }
}

/// Mean and nearest-rank percentiles.
fn ttft(mut ms: Vec<f64>) -> TtftMs {
    if ms.is_empty() {
        return TtftMs { mean: 0.0, p50: 0.0, p99: 0.0 };
    }
    let mean = ms.iter().sum::<f64>() / ms.len() as f64;
    ms.sort_by(f64::total_cmp);
    let rank = |q: f64| ms[((q * ms.len() as f64).ceil() as usize).clamp(1, ms.len()) - 1];
    TtftMs { mean, p50: rank(0.50), p99: rank(0.99) }
}
