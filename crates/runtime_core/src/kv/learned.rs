//! Estimators (experimental form).
#![allow(missing_docs)]

/// Number of misses distinguished.
pub(crate) const K: usize = 8;
/// Content classes.
pub(crate) const C: usize = 16;
pub(crate) const CLASS_OUTPUT: u8 = 1;
pub(crate) const CLASS_SECOND: u8 = 3;
pub(crate) const CLASS_THIRD: u8 = 4;
pub(crate) const CLASS_FIFTH: u8 = 5;
pub(crate) const CLASS_FIRST: u8 = 8;

#[derive(Clone, Copy, Default)]
pub(crate) struct Cell {
    pub(crate) e: f32,
    pub(crate) h: f32,
}
impl Cell {
    fn add(&mut self, e: f32, h: f32) {
        self.e += e;
        self.h += h;
        if self.e > 4000.0 {
            self.e *= 0.5;
            self.h *= 0.5;
        }
    }
}

/// Content: will the next call of the lane use the segment?
pub(crate) struct Content {
    pooled: [[Cell; C]; K],
    rows: Vec<[[Cell; C]; K]>,
}
impl Content {
    pub(crate) fn new(agents: usize) -> Self {
        Self {
            pooled: Default::default(),
            rows: vec![Default::default(); agents],
        }
    }
    pub(crate) fn vote(&mut self, agent: usize, k: usize, class: usize, hit: f32) {
        self.pooled[k][class].add(1.0, hit);
        if let Some(r) = self.rows.get_mut(agent) {
            r[k][class].add(1.0, hit);
        }
    }
    pub(crate) fn rate(&self, agent: usize, k: usize, class: usize, cfg: &super::Config) -> f32 {
        let k = if cfg.superseded { k.min(K - 1) } else { 0 };
        let class = if cfg.classes { class } else { 0 };
        let (mut e, mut h) = (0.0, 0.0);
        for c in &self.pooled[k] {
            e += c.e;
            h += c.h;
        }
        let r0 = (h + 0.25) / (e + 0.5);
        let p = self.pooled[k][class];
        let r1 = (p.h + 2.0 * r0) / (p.e + 2.0);
        let Some(row) = self.rows.get(agent) else {
            return r1;
        };
        let cell = row[k][class];
        let prior = if cell.e < 0.5 {
            let (mut e, mut h) = (0.0, 0.0);
            for c in &row[k] {
                e += c.e;
                h += c.h;
            }
            0.5 * (r1 + (h + 2.0 * r0) / (e + 2.0))
        } else {
            r1
        };
        (cell.h + 2.0 * prior) / (cell.e + 2.0)
    }
}

/// Half-octave buckets of gaps from 1 ms.
pub(crate) const G: usize = 44;
pub(crate) fn gap_bucket(us: u64) -> usize {
    let x = (us.max(1) as f32 / 1000.0).max(1.0);
    ((x.log2() * 2.0) as usize).min(G - 1)
}
/// Lower edge of a bucket, seconds.
pub(crate) fn gap_edge_s(b: f32) -> f32 {
    0.001 * (b * 0.5).exp2()
}

#[derive(Clone)]
pub(crate) struct Hist {
    pub(crate) d: [f32; G],
    pub(crate) n: f32,
}
impl Default for Hist {
    fn default() -> Self {
        Self {
            d: [0.0; G],
            n: 0.0,
        }
    }
}
impl Hist {
    pub(crate) fn add(&mut self, us: u64) {
        let x = ((us.max(1) as f32 / 1000.0).max(1.0).log2() * 2.0 - 0.5).max(0.0);
        let b = (x as usize).min(G - 2);
        let f = (x - b as f32).min(1.0);
        self.d[b] += 1.0 - f;
        self.d[b + 1] += f;
        self.n += 1.0;
        if self.n > 2000.0 {
            self.n *= 0.5;
            self.d.iter_mut().for_each(|d| *d *= 0.5);
        }
    }
}

/// Time: gap contexts in competing chains.
pub(crate) struct Gaps {
    pub(crate) root: Hist,
    pub(crate) agent: Vec<Hist>,
    pub(crate) tool: Vec<Hist>,
    pub(crate) prev: Vec<Hist>,
    pub(crate) pair: Vec<Hist>,
    pub(crate) pace: Vec<Hist>,
    /// Decayed log-likelihood of each chain.
    pub(crate) skill: [f32; 5],
}
pub(crate) const N_PREV: usize = 16;
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GapContext {
    pub(crate) agent: u16,
    pub(crate) tool: u16,
    /// Octave of the previous gap plus one, zero for none.
    pub(crate) prev: u8,
    pub(crate) pair: u8,
    pub(crate) pace: u8,
}
impl Gaps {
    pub(crate) fn new(agents: usize) -> Self {
        Self {
            root: Hist::default(),
            agent: vec![Hist::default(); agents],
            tool: vec![Hist::default(); 33],
            prev: vec![Hist::default(); N_PREV],
            pair: vec![Hist::default(); 64],
            pace: vec![Hist::default(); N_PREV * 2],
            skill: [0.0; 5],
        }
    }
    fn chain(&self, which: usize, c: GapContext) -> [Option<&Hist>; 3] {
        let agent = self.agent.get(c.agent as usize);
        let tool = self.tool.get(c.tool as usize);
        match which {
            0 => [agent, None, None],
            1 => [agent, self.prev.get(c.prev as usize), None],
            2 => [
                self.prev.get(c.prev as usize),
                self.pair.get(c.pair as usize),
                None,
            ],
            3 => [self.pace.get(c.pace as usize), None, None],
            _ => [tool, agent, None],
        }
    }
    fn hazards(&self, which: usize, c: GapContext, out: &mut [f32; G]) {
        let mut at_risk = self.root.n;
        for b in 0..G {
            out[b] = (self.root.d[b] + 0.05) / (at_risk + 1.0);
            at_risk = (at_risk - self.root.d[b]).max(0.0);
        }
        for h in self.chain(which, c).into_iter().flatten() {
            let mut at_risk = h.n;
            for b in 0..G {
                out[b] = ((h.d[b] + 2.0 * out[b]) / (at_risk + 2.0)).min(0.98);
                at_risk = (at_risk - h.d[b]).max(0.0);
            }
        }
    }
    /// Hazards of the chain that predicts best.
    pub(crate) fn best(&self, c: GapContext, cfg: &super::Config, out: &mut [f32; G]) {
        let mut which = 0;
        if cfg.time_contexts {
            for i in 1..5 {
                if self.skill[i] > self.skill[which] {
                    which = i;
                }
            }
        }
        self.hazards(which, c, out);
    }
    pub(crate) fn learn(&mut self, c: GapContext, us: u64) {
        let b = gap_bucket(us);
        let mut h = [0.0; G];
        for i in 0..5 {
            self.hazards(i, c, &mut h);
            let mut log = h[b].max(1e-6).ln();
            for x in &h[..b] {
                log += (1.0 - x).ln();
            }
            self.skill[i] = self.skill[i] * 0.999 + log;
        }
        self.root.add(us);
        if let Some(x) = self.agent.get_mut(c.agent as usize) {
            x.add(us);
        }
        if let Some(x) = self.tool.get_mut(c.tool as usize) {
            x.add(us);
        }
        if let Some(x) = self.prev.get_mut(c.prev as usize) {
            x.add(us);
        }
        if let Some(x) = self.pair.get_mut(c.pair as usize) {
            x.add(us);
        }
        if let Some(x) = self.pace.get_mut(c.pace as usize) {
            x.add(us);
        }
    }
}

/// End of session: is there a next call?
pub(crate) struct Ends {
    pub(crate) all: Cell,
    pub(crate) agent: Vec<Cell>,
    pub(crate) step: [Cell; 24],
    pub(crate) size: [Cell; 16],
}
impl Ends {
    pub(crate) fn new(agents: usize) -> Self {
        Self {
            all: Cell::default(),
            agent: vec![Cell::default(); agents],
            step: Default::default(),
            size: Default::default(),
        }
    }
    pub(crate) fn learn(&mut self, agent: usize, step: usize, size: usize, next: f32) {
        self.all.add(1.0, next);
        if let Some(a) = self.agent.get_mut(agent) {
            a.add(1.0, next);
        }
        self.step[step.min(23)].add(1.0, next);
        self.size[size.min(15)].add(1.0, next);
    }
    pub(crate) fn continues(
        &self,
        agent: usize,
        step: usize,
        size: usize,
        cfg: &super::Config,
    ) -> f32 {
        let base = (self.all.h + 9.0) / (self.all.e + 10.0);
        if !cfg.session_end {
            return 0.999;
        }
        let lo = |p: f32| (p / (1.0 - p)).ln();
        let b = lo(base.clamp(0.001, 0.9995));
        let mut sum = b;
        let mut part = |c: &Cell| {
            let p = ((c.h + 4.0 * base) / (c.e + 4.0)).clamp(0.001, 0.9995);
            sum += lo(p) - b;
        };
        if let Some(a) = self.agent.get(agent) {
            part(a);
        }
        part(&self.step[step.min(23)]);
        part(&self.size[size.min(15)]);
        (1.0 / (1.0 + (-sum).exp())).clamp(0.001, 0.9995)
    }
}

/// Sharing: age buckets are octaves from 1/16 s.
pub(crate) const A: usize = 18;
pub(crate) const S: usize = 28;
#[derive(Clone)]
pub(crate) struct Sharing {
    pub(crate) events: [[f32; A]; S],
    pub(crate) ends: [[f32; A]; S],
}
pub(crate) fn age_bucket(us: u64) -> usize {
    let x = us as f32 / 62_500.0;
    if x <= 1.0 {
        0
    } else {
        (x.log2() as usize + 1).min(A - 1)
    }
}
pub(crate) fn share_class(degree: u8, depth: u32, cfg: &super::Config) -> usize {
    if !cfg.sharing_classes {
        return usize::from(degree > 1);
    }
    let d = match degree {
        0 | 1 => 0,
        2 => 1,
        3..=4 => 2,
        5..=8 => 3,
        9..=16 => 4,
        17..=64 => 5,
        _ => 6,
    };
    let p = match depth {
        0..=15 => 0,
        16..=63 => 1,
        64..=255 => 2,
        _ => 3,
    };
    d * 4 + p
}
impl Sharing {
    pub(crate) fn new() -> Self {
        Self {
            events: [[0.0; A]; S],
            ends: [[0.0; A]; S],
        }
    }
    pub(crate) fn learn(&mut self, class: usize, age_us: u64, shared: bool) {
        let b = age_bucket(age_us);
        if shared {
            self.events[class][b] += 1.0;
        } else {
            self.ends[class][b] += 1.0;
        }
        let n: f32 = self.events[class].iter().chain(&self.ends[class]).sum();
        if n > 3000.0 {
            self.events[class].iter_mut().for_each(|x| *x *= 0.5);
            self.ends[class].iter_mut().for_each(|x| *x *= 0.5);
        }
    }
    /// Hazard per age bucket: pooled over private or shared segments, then the class.
    pub(crate) fn hazards(&self, class: usize, cfg: &super::Config, out: &mut [f32; A]) {
        let group = if !cfg.sharing_classes {
            class..class + 1
        } else if class < 4 {
            0..4
        } else {
            4..S
        };
        let (mut d, mut n) = ([0.0f32; A], [0.0f32; A]);
        let mut risk = 0.0;
        for b in (0..A).rev() {
            for c in group.clone() {
                d[b] += self.events[c][b];
                risk += self.events[c][b] + self.ends[c][b];
            }
            n[b] = risk;
        }
        for b in 0..A {
            out[b] = (d[b] + 0.001) / (n[b] + 1.0);
        }
        if cfg.sharing_classes {
            let mut risk = 0.0;
            for b in (0..A).rev() {
                risk += self.events[class][b] + self.ends[class][b];
                out[b] = (self.events[class][b] + 4.0 * out[b]) / (risk + 4.0);
            }
        }
        for x in out {
            *x = x.min(0.95);
        }
    }
}

/// Transitions: order 2, order 1, rank in the session's recency list.
#[derive(Default)]
pub(crate) struct Transitions {
    pub(crate) order2: std::collections::HashMap<(u16, u16), Vec<(u16, f32)>>,
    pub(crate) order1: std::collections::HashMap<u16, Vec<(u16, f32)>>,
    pub(crate) rank: [f32; 10],
}
fn bump(row: &mut Vec<(u16, f32)>, a: u16) {
    if let Some(x) = row.iter_mut().find(|x| x.0 == a) {
        x.1 += 1.0;
    } else {
        row.push((a, 1.0));
    }
    if row.iter().map(|x| x.1).sum::<f32>() > 1000.0 {
        row.iter_mut().for_each(|x| x.1 *= 0.5);
    }
}
impl Transitions {
    /// `rank`: position of the next agent in the recency list, 9 for new.
    pub(crate) fn learn(&mut self, prev: u16, last: u16, next: u16, rank: usize) {
        bump(self.order2.entry((prev, last)).or_default(), next);
        bump(self.order1.entry(last).or_default(), next);
        self.rank[rank.min(9)] += 1.0;
    }
}
