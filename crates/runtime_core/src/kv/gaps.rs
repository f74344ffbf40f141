//! Time: when does a session call again?
//!
//! A gap runs from the end of a call to the start of the session's next one. Half-octave buckets from 1 ms to 70
//! minutes; an observed gap is split between the two nearest. Hazard of bucket b with a parent context as prior:
//! h_b = (d_b + kappa h'_b) / (n_b + kappa), n_b the gaps that lasted at least until b, kappa 2.
//!
//! Chains of contexts compete: agent; the session's *pace* (moving mean of the log of its gaps); tool, then agent;
//! tool, then pace. The one with the best decayed log-likelihood (0.999 per gap) speaks. Whether the session calls
//! again at all is `ends.rs`'s question: gaps are conditional on a next call, so the two form a mixture cure model
//! (Boag 1949): P(alive | silent for t) = p S(t) / (p S(t) + 1 - p).

use crate::histogram::{Counters, Lanes, Often, UNIT};
use crate::sync::{AtomicU32, Ordering::Relaxed};

use super::content::PerAgent;
use super::Config;

/// Buckets of a gap histogram.
pub(crate) const BUCKETS: usize = 44;
/// Pace classes; 0: no gap yet.
pub(crate) const PACES: usize = 20;
/// Tools with counts of their own; 0: no tool.
pub(crate) const TOOLS: usize = 12;
const CHAINS: usize = 4;
const KAPPA: f32 = 2.0;
/// So many gaps are foreseen by every chain, then every `COMPARED`th; of many, every `COMPARED`th of those that are drawn.
const ALL_COMPARED: u32 = 512;
const COMPARED: u32 = 32;
/// Gaps learned until hazards are worked out anew.
const HELD: u32 = 16;
/// So many gaps are many.
const MANY: u32 = 8192;

pub(super) type Histogram = Counters<{ BUCKETS / 4 }>;

/// What is known of a session when it falls silent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Context {
    pub(crate) agent: u16,
    /// Index below [`TOOLS`]; 0 for none.
    pub(crate) tool: u8,
    /// Index below [`PACES`].
    pub(crate) pace: u8,
}

/// What the hazards of a gap depend on: a chain of contexts, and that part of the context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kind {
    chain: u8,
    context: Context,
}

impl Kind {
    /// Where it is kept among 64 places.
    pub(crate) fn place(self) -> usize {
        let Context { agent, tool, pace } = self.context;
        (usize::from(agent) * 5 + usize::from(tool) * 23 + usize::from(pace) * 3 + usize::from(self.chain)) % 64
    }
}

/// Log2 of a gap in milliseconds, at least 0.
pub(crate) fn log2_ms(seconds: f32) -> f32 {
    log2((seconds * 1000.0).max(1.0))
}

/// A number above 0 as m 2^e, m between sqrt(1/2) and sqrt(2): e, and t for which ln m = 2 artanh t,
/// t = (m - 1) / (m + 1), |t| < 0.172.
#[inline(always)]
pub(super) fn split(x: f32) -> (f32, f32) {
    const SQRT_HALF: u32 = 0x3F35_04F3;
    let above = x.to_bits().wrapping_sub(SQRT_HALF);
    let mantissa = f32::from_bits((above & 0x7F_FFFF) + SQRT_HALF);
    ((above as i32 >> 23) as f32, (mantissa - 1.0) / (mantissa + 1.0))
}

/// Log2 of a number from 1 on, to 1e-5: the exponent, and three terms of a series for the mantissa.
#[inline(always)]
pub(super) fn log2(x: f32) -> f32 {
    let (exponent, t) = split(x);
    let square = t * t;
    let ln = t * (2.0 + square * (2.0 / 3.0 + square * (2.0 / 5.0)));
    (exponent + ln * std::f32::consts::LOG2_E).max(0.0)
}

/// Position of a gap on the bucket axis, fractional.
pub(crate) fn position(seconds: f32) -> f32 {
    position_of(log2_ms(seconds))
}

fn position_of(log2_ms: f32) -> f32 {
    (2.0 * log2_ms).min((BUCKETS - 1) as f32)
}

/// Seconds at a bucket's lower edge.
pub(crate) fn edge_s(bucket: usize) -> f32 {
    0.001 * (bucket as f32 * 0.5).exp2()
}

/// Pace class of a mean log2 of gaps in milliseconds.
pub(crate) fn pace_class(mean_log2_ms: f32) -> u8 {
    1 + mean_log2_ms.max(0.0).min((PACES - 2) as f32) as u8
}

/// Gap histograms by context.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Gaps {
    all: Histogram,
    agents: PerAgent<Histogram>,
    paces: [Histogram; PACES],
    tools: [Histogram; TOOLS],
    /// Decayed log-likelihood of each chain, `f32` bits.
    skill: [AtomicU32; CHAINS],
    /// Gaps learned so far.
    seen: AtomicU32,
}

impl Gaps {
    pub(super) fn rows(&self) -> impl Iterator<Item = &Histogram> {
        std::iter::once(&self.all).chain(self.agents.iter()).chain(&self.paces).chain(&self.tools)
    }

    fn chain(&self, which: usize, context: Context) -> [Option<&Histogram>; 2] {
        let agent = self.agents.get(context.agent as usize);
        let pace = self.paces.get(context.pace as usize);
        let tool = self.tools.get(context.tool as usize);
        match which {
            0 => [agent, None],
            1 => [pace, None],
            2 => [tool, agent],
            _ => [tool, pace],
        }
    }

    fn chain_hazards(&self, which: usize, context: Context) -> [f32; BUCKETS] {
        let mut hazards = [0.0; BUCKETS];
        let mut counts = [0u16; BUCKETS];
        self.all.snapshot(&mut counts);
        refine(&mut hazards, &counts, 1.0, 0.05);
        for histogram in self.chain(which, context).into_iter().flatten() {
            histogram.snapshot(&mut counts);
            refine(&mut hazards, &counts, KAPPA, 0.0);
        }
        hazards
    }

    /// Hazard per bucket after a call of an agent, whatever else is known.
    pub(crate) fn agent_hazards(&self, agent: u16) -> [f32; BUCKETS] {
        self.chain_hazards(0, Context { agent, ..Context::default() })
    }

    /// The chain that has predicted best, and what it depends on.
    pub(crate) fn kind(&self, context: Context, config: &Config) -> Kind {
        let skill = |which: usize| f32::from_bits(self.skill[which].load(Relaxed));
        let best = if config.time_contexts {
            (1..CHAINS).fold(0, |best, which| if skill(which) > skill(best) { which } else { best })
        } else {
            0
        };
        // As `chain` has it.
        let Context { agent, tool, pace } = context;
        let (agent, pace) = if best % 2 == 0 { (agent, 0) } else { (0, pace) };
        let tool = if best < 2 { 0 } else { tool };
        Kind { chain: best as u8, context: Context { agent, tool, pace } }
    }

    /// Hazard per bucket.
    pub(crate) fn hazards(&self, Kind { chain, context }: Kind) -> [f32; BUCKETS] {
        self.chain_hazards(usize::from(chain), context)
    }

    /// Grows by one with every [`HELD`] gaps that are learned; None while so few are known that each matters.
    pub(crate) fn age(&self) -> Option<u32> {
        let seen = self.seen.load(Relaxed);
        (seen >= ALL_COMPARED).then_some(seen / HELD)
    }

    /// Whether many gaps have been learned.
    #[inline]
    pub(crate) fn are_many(&self) -> bool {
        self.seen.load(Relaxed) >= MANY
    }

    /// Counts a gap of so many [`log2_ms`], and how well each chain foresaw it. Of many gaps only those need to be told
    /// that count somewhere.
    pub(crate) fn learn(&self, context: Context, log2_ms: f32, often: Often) {
        let position = position_of(log2_ms);
        let at = (position - 0.5).max(0.0);
        let (bucket, reached) = ((at as u8 as usize).min(BUCKETS - 2), position as u8 as usize);
        let seen = self.seen.load(Relaxed);
        let (step, each) = match often.large {
            _ if seen < MANY => (1, COMPARED),
            0 => (0, 0),
            large => (large, COMPARED * large),
        };
        if step > 0 {
            let now = seen.wrapping_add(step);
            self.seen.store(now, Relaxed);
            if now < ALL_COMPARED || now / each != seen / each {
                let fade = if now < ALL_COMPARED { 0.999 } else { 0.999f32.powi(COMPARED as i32) };
                self.compare(context, reached, fade);
            }
        }
        self.count(context, bucket, at - bucket as f32, often);
    }

    /// Counts how well each chain (see [`Self::chain`]) foresaw a gap that ended in bucket `reached`.
    #[cold]
    fn compare(&self, context: Context, reached: usize, fade: f32) {
        let mut all = AtRisk::new(Some(&self.all));
        let mut agent = AtRisk::new(self.agents.get(context.agent as usize));
        let mut pace = AtRisk::new(self.paces.get(context.pace as usize));
        let mut tool = AtRisk::new(self.tools.get(context.tool as usize));
        let mut hazards = [0.0f32; CHAINS];
        // The product is at least 0.02^44: f64 holds it.
        let mut survived = [1.0f64; CHAINS];
        for b in 0..=reached {
            survived.iter_mut().zip(hazards).for_each(|(survived, hazard)| *survived *= 1.0 - f64::from(hazard));
            let prior = all.hazard(b, 0.0, 1.0, 0.05);
            let prior_of_tool = tool.hazard(b, prior, KAPPA, 0.0);
            hazards = [
                agent.hazard(b, prior, KAPPA, 0.0),
                pace.hazard(b, prior, KAPPA, 0.0),
                agent.hazard(b, prior_of_tool, KAPPA, 0.0),
                pace.hazard(b, prior_of_tool, KAPPA, 0.0),
            ];
            for histogram in [&mut all, &mut agent, &mut pace, &mut tool] {
                histogram.pass(b);
            }
        }
        for ((hazard, survived), skill) in hazards.iter().zip(survived).zip(&self.skill) {
            let gained = hazard.max(1e-6).ln() + survived.ln() as f32;
            // Two gaps learned at once may lose one of the two gains: the ranking of chains does not hang on one.
            let old = f32::from_bits(skill.load(Relaxed));
            skill.store((fade * old + gained).to_bits(), Relaxed);
        }
    }

    fn count(&self, context: Context, bucket: usize, above: f32, often: Often) {
        let high = u32::from((above.clamp(0.0, 1.0) * UNIT as f32) as u8);
        if let Some(weight) = often.drawn() {
            let lanes = Lanes::new(bucket, [UNIT - high, high], weight);
            self.all.put(lanes);
            let put = |histogram: Option<&Histogram>| {
                if let Some(histogram) = histogram {
                    histogram.put(lanes);
                }
            };
            put(self.agents.get(context.agent as usize));
            put(self.paces.get(context.pace as usize));
            return put(self.tools.get(context.tool as usize));
        }
        let add = |histogram: Option<&Histogram>| {
            if let Some(histogram) = histogram {
                histogram.add_steps(bucket, [UNIT - high, high], often);
            }
        };
        // One by one: a loop over an array would build it first.
        add(Some(&self.all));
        add(self.agents.get(context.agent as usize));
        add(self.paces.get(context.pace as usize));
        add(self.tools.get(context.tool as usize));
    }

    /// Seconds of silence that only 2 % of all gaps exceed; infinite before 32 gaps.
    pub(crate) fn long_silence_s(&self) -> f32 {
        let mut counts = [0u16; BUCKETS];
        self.all.snapshot(&mut counts);
        let total: f32 = counts.iter().map(|&c| f32::from(c)).sum();
        if total < 32.0 * UNIT as f32 {
            return f32::INFINITY;
        }
        let mut left = 0.02 * total;
        let mut bucket = BUCKETS - 1;
        while bucket > 0 && left >= f32::from(counts[bucket]) {
            left -= f32::from(counts[bucket]);
            bucket -= 1;
        }
        edge_s(bucket + 1)
    }
}

/// How long calls take: the same estimator over durations of calls. By agent it was worth nothing.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Services(Histogram);

impl Services {
    pub(super) fn row(&self) -> &Histogram {
        &self.0
    }

    /// A call took so long.
    pub(crate) fn learn(&self, seconds: f32, often: Often) {
        let at = (position(seconds) - 0.5).max(0.0);
        let bucket = (at as u8 as usize).min(BUCKETS - 2);
        let high = u32::from(((at - bucket as f32).clamp(0.0, 1.0) * UNIT as f32) as u8);
        match often.drawn() {
            Some(weight) => self.0.put(Lanes::new(bucket, [UNIT - high, high], weight)),
            None => self.0.add_steps(bucket, [UNIT - high, high], often),
        }
    }

    /// Hazard per bucket of the end of a call.
    pub(crate) fn hazards(&self) -> [f32; BUCKETS] {
        let (mut hazards, mut counts) = ([0.0; BUCKETS], [0u16; BUCKETS]);
        self.0.snapshot(&mut counts);
        refine(&mut hazards, &counts, 1.0, 0.05);
        hazards
    }
}

/// A histogram that is walked through bucket by bucket, and how much of it is left; `None` changes no prior.
struct AtRisk {
    counts: Option<[u16; BUCKETS]>,
    left: f32,
}

impl AtRisk {
    fn new(histogram: Option<&Histogram>) -> Self {
        let counts = histogram.map(|histogram| {
            let mut counts = [0u16; BUCKETS];
            histogram.snapshot(&mut counts);
            counts
        });
        let total: u32 = counts.iter().flatten().map(|&count| u32::from(count)).sum();
        Self { counts, left: total as f32 / UNIT as f32 }
    }

    /// The hazard of bucket `b`, the next one, as [`refine`] has it.
    #[inline(always)]
    fn hazard(&self, b: usize, prior: f32, kappa: f32, floor: f32) -> f32 {
        let Some(counts) = &self.counts else { return prior };
        let events = f32::from(counts[b]) / UNIT as f32;
        ((events + floor + kappa * prior) / (self.left + kappa)).min(0.98)
    }

    #[inline(always)]
    fn pass(&mut self, b: usize) {
        let events = self.counts.as_ref().map_or(0.0, |counts| f32::from(counts[b]) / UNIT as f32);
        self.left = (self.left - events).max(0.0);
    }
}

/// One step of the back-off: `hazards` is the prior and becomes the posterior.
fn refine(hazards: &mut [f32; BUCKETS], counts: &[u16; BUCKETS], kappa: f32, floor: f32) {
    let total: u32 = counts.iter().map(|&count| u32::from(count)).sum();
    let (mut at_risk, mut left) = ([0.0; BUCKETS], total as f32 / UNIT as f32);
    for (at_risk, &count) in at_risk.iter_mut().zip(counts) {
        *at_risk = left;
        left = (left - f32::from(count) / UNIT as f32).max(0.0);
    }
    // Apart from the above, so that divisions go through vector registers.
    for ((hazard, &count), at_risk) in hazards.iter_mut().zip(counts).zip(at_risk) {
        let events = f32::from(count) / UNIT as f32;
        *hazard = ((events + floor + kappa * *hazard) / (at_risk + kappa)).min(0.98);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazards_give_back_the_distribution_they_learned() {
        let gaps = Gaps::default();
        let context = Context { agent: 1, tool: 0, pace: 5 };
        for i in 0..400 {
            gaps.learn(context, log2_ms(if i % 4 == 0 { 8.0 } else { 0.5 }), Often::ALWAYS);
        }
        let hazards = gaps.hazards(gaps.kind(context, &Config::default()));
        let surviving: f32 = (0..position(2.0) as usize).map(|b| 1.0 - hazards[b]).product();
        assert!((surviving - 0.25).abs() < 0.05, "{surviving}");
        assert!((gaps.long_silence_s() - 8.0).abs() < 6.0, "{}", gaps.long_silence_s());
    }

    #[test]
    fn a_chain_that_foresees_gaps_takes_over() {
        let gaps = Gaps::default();
        for i in 0..600u32 {
            // The pace tells, the agent does not.
            let pace = (i % 2) as u8 * 8 + 1;
            let context = Context { agent: 0, tool: 0, pace };
            gaps.learn(context, log2_ms(if pace == 1 { 0.1 } else { 30.0 }), Often::ALWAYS);
        }
        let quick = gaps.hazards(gaps.kind(Context { agent: 0, tool: 0, pace: 1 }, &Config::default()));
        let surviving: f32 = (0..position(5.0) as usize).map(|b| 1.0 - quick[b]).product();
        assert!(surviving < 0.05, "{surviving}");
    }
}
