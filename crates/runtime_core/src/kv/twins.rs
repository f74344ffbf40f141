//! Each estimator beside a slow twin in f64 that counts in maps and follows the formula of the module's page.
//!
//! Tolerances: 1e-3 where only rounding differs; 0.03 for first passages, which drop paths below 0.004; 5 % for the
//! score, which integrates over 24 points.

use std::collections::HashMap;

use proptest::prelude::*;

use super::chain::{Chain, LANES, STEPS};
use super::content::Content;
use super::density::{self, Foreign, GRID};
use super::ends::{Ends, Features};
use super::gaps::{self, Context, Gaps, BUCKETS};
use super::sharing::{self, Curve, Curves, Owner, Sharing, AGES};
use super::{Config, Workload};
use crate::histogram::Often;
use crate::ids::AgentId;
use crate::successors::{context_of, context_of_two};

/// The back-off step over f64 counts; what ended otherwise in a bucket was at risk in half of it.
fn refine(prior: &[f64], events: &[f64], others: &[f64], (kappa, floor, most): (f64, f64, f64)) -> Vec<f64> {
    let at_risk = |b: usize| events[b..].iter().chain(&others[b..]).sum::<f64>() - others[b] / 2.0;
    (0..events.len()).map(|b| ((events[b] + floor + kappa * prior[b]) / (at_risk(b) + kappa)).min(most)).collect()
}

fn near(ours: &[f32], twin: &[f64], tolerance: f64) {
    for (i, (a, b)) in ours.iter().zip(twin).enumerate() {
        assert!((f64::from(*a) - b).abs() <= tolerance, "at {i}: {a}, the twin has {b}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn gap_hazards_equal_their_twin(gaps_s in proptest::collection::vec((0u16..3, 0.0005f32..5000.0), 1..300)) {
        let gaps = Gaps::default();
        let mut counts: HashMap<Option<u16>, Vec<f64>> = HashMap::new();
        for &(agent, seconds) in &gaps_s {
            gaps.learn(Context { agent, tool: 0, pace: 0 }, gaps::log2_ms(seconds), Often::ALWAYS);
            // Half-octave buckets from 1 ms; split between the two nearest middles, in sixteenths.
            let at = (2.0 * (f64::from(seconds) * 1000.0).max(1.0).log2()).min(BUCKETS as f64 - 1.0) - 0.5;
            let (bucket, above) = ((at.max(0.0) as usize).min(BUCKETS - 2), at.max(0.0));
            let above = ((above - bucket as f64).clamp(0.0, 1.0) * 16.0).floor() / 16.0;
            for key in [None, Some(agent)] {
                let row = counts.entry(key).or_insert_with(|| vec![0.0; BUCKETS]);
                row[bucket] += 1.0 - above;
                row[bucket + 1] += above;
            }
        }
        let config = Config { time_contexts: false, ..Config::default() };
        for agent in 0..4 {
            let none = vec![0.0; BUCKETS];
            let all = refine(&none, &counts[&None], &none, (1.0, 0.05, 0.98));
            let own = counts.get(&Some(agent)).unwrap_or(&none);
            let twin = refine(&all, own, &none, (2.0, 0.0, 0.98));
            // A gap on the edge between two sixteenths may round either way: one sixteenth among the fewest at risk.
            near(&gaps.hazards(gaps.kind(Context { agent, tool: 200, pace: 200 }, &config)), &twin, 0.03);
        }
        prop_assert!(gaps.long_silence_s() > 0.0);
    }

    #[test]
    fn ends_equal_their_twin(seen in proptest::collection::vec((0u16..4, 1u16..9, 0u8..6, any::<bool>()), 0..300)) {
        let ends = Ends::default();
        let mut counts: HashMap<(u8, u16), (f64, f64)> = HashMap::new();
        let cells = |x: Features| [(0, 0), (1, x.agent), (2, x.steps), (3, u16::from(x.size)), (4, u16::from(x.tool))];
        for &(agent, steps, size, went_on) in &seen {
            let features = Features { agent, steps, size, tool: size % 3 };
            if went_on { ends.went_on(features, false, Often::ALWAYS) } else { ends.ended(features, Often::ALWAYS) }
            for cell in cells(features) {
                let (trials, successes) = counts.entry(cell).or_default();
                *trials += 1.0;
                *successes += f64::from(u8::from(went_on));
            }
        }
        let rate = |cell: (u8, u16), prior: f64, weight: f64| {
            let (trials, successes) = counts.get(&cell).copied().unwrap_or_default();
            ((successes + weight * prior) / (trials + weight)).clamp(0.001, 0.9995)
        };
        let logit = |p: f64| (p / (1.0 - p)).ln();
        for (agent, steps, size) in [(0, 1, 0), (1, 8, 5), (3, 4, 2), (2, 2, 1)] {
            let features = Features { agent, steps, size, tool: size % 3 };
            let base = rate((0, 0), 0.9, 10.0);
            let [_, rest @ ..] = cells(features);
            let parts = rest.into_iter().map(|cell| logit(rate(cell, base, 4.0)) - logit(base));
            let sum = logit(base) + parts.sum::<f64>();
            let twin = (1.0 / (1.0 + (-sum).exp())).clamp(0.001, 0.9995);
            near(&[ends.continues(features, &Config::default())], &[twin], 1e-3);
        }
    }

    #[test]
    fn sharing_hazards_equal_their_twin(
        seen in proptest::collection::vec((0u8..20, 0u32..300, 0.0f32..4000.0, any::<bool>()), 0..400)
    ) {
        let sharing = Sharing::default();
        let mut counts = [[[0.0; AGES]; 2]; 2];
        for &(degree, depth, age_s, shared) in &seen {
            sharing.learn(&Curves::new(), Owner { degree, depth, agent: 0, born: 0 }, age_s, 1, shared);
            let bucket = sharing::position(age_s) as usize;
            counts[usize::from(degree > 1)][usize::from(!shared)][bucket] += 1.0;
        }
        for (group, [events, ends]) in counts.iter().enumerate() {
            let twin = refine(&[0.0; AGES], events, ends, (1.0, 0.001, 0.95));
            near(&sharing.hazards(group), &twin, 1e-3);
        }
    }

    #[test]
    fn content_rates_equal_their_twin(
        votes in proptest::collection::vec(
            (0u16..3, any::<bool>(), 0usize..8, 0usize..12, 1u32..60, 0.0f64..1.0), 0..300
        )
    ) {
        let content = Content::default();
        type Cell = (Option<u16>, bool, usize, usize);
        let mut counts: HashMap<Cell, (f64, f64)> = HashMap::new();
        // From the third miss on it makes no difference when the call came.
        let told = |later: bool, misses: usize| later || misses > 1;
        for &(agent, later, misses, class, blocks, share) in &votes {
            let hits = (f64::from(blocks) * share) as u32;
            content.vote(agent, later, misses, class, blocks, hits);
            for key in [None, Some(agent)] {
                let (expected, hit) = counts.entry((key, told(later, misses), misses, class)).or_default();
                *expected += 1.0;
                *hit += (16.0 * f64::from(hits) / f64::from(blocks) + 0.5).floor() / 16.0;
            }
        }
        let cell = |key, later, misses, class| {
            counts.get(&(key, told(later, misses), misses, class)).copied().unwrap_or_default()
        };
        let sums = |key, later, misses| (0..12).fold((0.0, 0.0), |(e, h): (f64, f64), class| {
            let (expected, hit) = cell(key, later, misses, class);
            (e + expected, h + hit)
        });
        let rate = |agent, later, k: usize, class| {
            let k = k.min(7);
            let (expected, hit) = sums(None, later, k);
            let r0 = (hit + 0.25) / (expected + 0.5);
            let (expected, hit) = cell(None, later, k, class);
            let r1 = (hit + 2.0 * r0) / (expected + 2.0);
            let (own_expected, own_hit) = cell(Some(agent), later, k, class);
            let (expected, hit) = sums(Some(agent), later, k);
            let mean = f64::midpoint(r1, (hit + 2.0 * r0) / (expected + 2.0));
            (own_hit + 2.0 * if own_expected == 0.0 { mean } else { r1 }) / (own_expected + 2.0)
        };
        for (agent, misses, class) in [(0u16, 0u32, 1), (1, 2, 4), (2, 7, 11), (2, 5, 0)] {
            let k = misses as usize;
            let twin = [
                rate(agent, false, k, class),
                rate(agent, true, k, class),
                rate(agent, true, k + 1, class),
                rate(agent, true, k + 2, class),
            ];
            let rates = content.rates(agent, misses, class as u8, &Config::default());
            near(&[rates.at_once, rates.later, rates.second, rates.third], &twin, 2e-3);
        }
    }

    #[test]
    fn first_passages_equal_an_enumeration_of_all_paths(
        walk in proptest::collection::vec(0u16..4, 2..200), n in 1usize..4
    ) {
        let workload = Workload::default();
        let (mut previous, mut last) = (AgentId::UNKNOWN, AgentId(0));
        for &agent in &walk {
            workload.transitions.add(context_of_two(previous, last), agent);
            workload.transitions.add(context_of(last), agent);
            (previous, last) = (last, AgentId(agent));
        }
        let agents: Vec<u16> = (0..n as u16).collect();
        let config = Config::default();
        let mut chain = Chain::new(&workload, &config, &agents, None);
        // The last position stands for any other agent.
        let name = |at: usize| agents.get(at).copied().unwrap_or(9_999);
        let mut rows = vec![vec![vec![0.0; n + 1]; n + 1]; n + 1];
        for (prev, rows) in rows.iter_mut().enumerate() {
            for (at, row) in rows.iter_mut().enumerate() {
                let mut out = [[0.0; LANES + 1]; 1];
                chain.marginals(name(prev), name(at), &mut out);
                row.iter_mut().zip(&out[0]).for_each(|(to, from)| *to = f64::from(*from));
            }
        }
        let weights = chain.weights(name(0), name(n - 1));
        for target in 0..n {
            let mut twin = [0.0; STEPS];
            let mut paths = vec![(0, n - 1, 1.0)];
            for reached in &mut twin {
                let mut next = Vec::new();
                for &(prev, at, p) in &paths {
                    for to in 0..=n {
                        let p: f64 = p * rows[prev][at][to];
                        if to == target { *reached += p } else { next.push((at, to, p)) }
                    }
                }
                paths = next;
            }
            near(&weights[target].0[0], &twin, 0.03);
        }
    }

    #[test]
    fn scores_are_near_a_fine_integration_and_never_nan(
        p in 0.0f32..1.0, mean_s in 0.3f64..60.0, hazard in 0.0f32..0.3, risk in 0.1f32..5.0, age_s in 0.0f32..100.0
    ) {
        // The session's next call is exponential, another session comes with one hazard per bucket of age.
        let t = |j: usize| 0.03 * (j as f64 * 0.75).exp2();
        let mut times = [[0.0; GRID]; STEPS];
        times[0] = std::array::from_fn(|j| (1.0 - (-t(j) / mean_s).exp()) as f32);
        let mut first_use = [0.0; STEPS];
        first_use[0] = p;
        let curve = Curve::new(&[hazard; AGES]);
        let ours = density::score(&times, &first_use, &Foreign::Learned { curve: &curve, risk, age_s }, std::iter::empty(), None);
        let position = |x: f64| if x <= 1.0 { x.max(0.0) * 0.999 } else { (x.log2() + 1.0).min(AGES as f64 - 0.001) };
        let cumulative = |age: f64| -f64::from(risk) * position(16.0 * age) * (1.0 - f64::from(hazard)).ln();
        let reuse = |x: f64| {
            let own = f64::from(p) * (1.0 - (-x / mean_s).exp());
            1.0 - (1.0 - own) * (cumulative(f64::from(age_s)) - cumulative(f64::from(age_s) + x)).exp()
        };
        let (mut held, mut best, mut x) = (0.0, 0.0f64, 0.0);
        while x < t(GRID - 1) {
            let step = (x * 0.002).max(1e-4);
            held += step * (1.0 - reuse(x + step / 2.0));
            x += step;
            if x >= t(0) {
                best = best.max(reuse(x) / held);
            }
        }
        prop_assert!(ours.is_finite());
        let error = (f64::from(ours) - best).abs();
        prop_assert!(error <= 0.05 * best + 1e-4, "{ours}, the twin has {best}");
    }

    #[test]
    fn classes_never_fall_as_scores_and_places_rise(a in 0.0f32..1e4, b in 0.0f32..1e4) {
        let (low, high) = (a.min(b), a.max(b));
        prop_assert!(density::bucket(low) <= density::bucket(high));
        prop_assert!(gaps::position(low) <= gaps::position(high));
        prop_assert!(sharing::position(low) <= sharing::position(high));
        prop_assert!(density::bucket(f32::NAN) == density::bucket(0.0), "no number is worth nothing");
    }
}
