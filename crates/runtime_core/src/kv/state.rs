//! Learned state between processes: publications of one replica, sums over several.
//!
//! A replica publishes its counts with a growing version; [`Merged`] keeps the newest version of each replica and adds
//! them up, so merging is commutative and idempotent (see [`crate::merge`]). A fresh replica absorbs the sums of the
//! others and starts where they are. Off the hot path: everything here allocates.

use crate::histogram::{Counters, Ratio, MAX_STEP};
use crate::merge::{Merged, Publication, Section, Shape};

use super::workload::Workload;

/// A row of counts that are normalised together.
trait Row {
    fn counts(&self) -> Vec<u32>;
    /// Adds counts, all scaled down alike where they would not fit.
    fn absorb(&self, counts: &[u64]);
}

/// The largest count that a row takes up at once.
const MOST: u64 = 0x1000;

fn scaled(counts: &[u64]) -> impl Iterator<Item = (usize, u32)> + '_ {
    let largest = counts.iter().copied().max().unwrap_or(0).max(MOST);
    counts
        .iter()
        .enumerate()
        .map(move |(i, &count)| (i, (u128::from(count) * u128::from(MOST) / u128::from(largest)) as u32))
}

impl<const WORDS: usize, const HALVE_AT: u32> Row for Counters<WORDS, HALVE_AT> {
    fn counts(&self) -> Vec<u32> {
        (0..Self::LEN).map(|i| u32::from(self.get(i))).collect()
    }

    fn absorb(&self, counts: &[u64]) {
        for (i, mut count) in scaled(counts) {
            while count > 0 {
                self.add_step(i, count.min(MAX_STEP));
                count -= count.min(MAX_STEP);
            }
        }
    }
}

impl<const N: usize, const HALVE_AT: u32> Row for Ratio<N, HALVE_AT> {
    fn counts(&self) -> Vec<u32> {
        (0..N).flat_map(|i| [u32::from(self.get(i).0), u32::from(self.get(i).1)]).collect()
    }

    fn absorb(&self, counts: &[u64]) {
        let scaled: Vec<u32> = scaled(counts).map(|(_, count)| count).collect();
        for (i, cell) in scaled.chunks_exact(2).enumerate() {
            let (mut expected, mut hits) = (cell[0], cell[1].min(cell[0]));
            while expected > 0 {
                let (step, hit) = (expected.min(MAX_STEP), hits.min(expected.min(MAX_STEP)));
                self.add(i, step, hit);
                expected -= step;
                hits -= hit;
            }
        }
    }
}

impl Workload {
    fn rows(&self) -> Vec<&dyn Row> {
        let mut rows: Vec<&dyn Row> = vec![&self.ranks];
        self.content.rows().for_each(|row| rows.push(row));
        self.gaps.rows().for_each(|row| rows.push(row));
        rows.push(self.services.row());
        rows.push(self.ends.row());
        self.sharing.rows().for_each(|row| rows.push(row));
        self.sharing.ratios().for_each(|row| rows.push(row));
        let (cells, agents) = self.followers.rows();
        rows.push(cells);
        rows.push(agents);
        self.odds.rows().for_each(|row| rows.push(row));
        rows
    }

    /// What this replica has counted, as of `version`.
    pub fn publication(&self, replica: u64, version: u64) -> Publication {
        let mut pairs = Vec::new();
        self.transitions.for_each(|key, count| pairs.push((key, count)));
        pairs.sort_unstable();
        pairs.dedup_by(|later, earlier| {
            let same = later.0 == earlier.0;
            earlier.1 += if same { later.1 } else { 0 };
            same
        });
        let mut sections = vec![Section::Keyed(pairs)];
        sections.extend(self.rows().iter().map(|row| Section::Dense(row.counts())));
        Publication { replica, version, sections }
    }

    /// An empty sum of publications of up to `replicas` replicas.
    pub fn merged(&self, replicas: usize) -> Merged {
        let mut shapes = vec![Shape::Keyed(self.transitions.capacity())];
        shapes.extend(self.rows().iter().map(|row| Shape::Dense(row.counts().len())));
        Merged::new(shapes, replicas)
    }

    /// Adds what other replicas have counted.
    pub fn absorb(&self, sums: &[Section<u64>]) {
        let mut sections = sums.iter();
        if let Some(Section::Keyed(pairs)) = sections.next() {
            for &(key, count) in pairs {
                self.transitions.absorb(key, count.min(u64::from(u32::MAX)) as u32);
            }
        }
        for (row, section) in self.rows().iter().zip(sections) {
            if let Section::Dense(counts) = section {
                row.absorb(counts);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{AgentId, SessionKey};
    use crate::kv::drift::Guesses;
    use crate::kv::workload::Sessions;
    use crate::successors::context_of;

    fn taught(sessions: u64) -> Workload {
        let workload = Workload::default();
        let table = Sessions::new(64).unwrap();
        for session in 0..sessions {
            for step in 0..6u64 {
                let at = session * 10_000_000 + step * 1_000_000;
                let (key, agent) = (SessionKey(session + 1), (step % 3) as u16);
                let handle = workload.call_started(&table, key, agent, at, &mut Guesses::default());
                table.end(handle);
                Workload::call_ended(&table, handle, at + 200_000, 3);
            }
        }
        workload
    }

    #[test]
    fn a_fresh_replica_starts_where_the_others_are() {
        let (a, b) = (taught(5), taught(9));
        let mut merged = a.merged(4);
        assert!(merged.merge(&a.publication(1, 1).encode()).unwrap());
        assert!(merged.merge(&b.publication(2, 1).encode()).unwrap());
        // The same again, and in the other order, changes nothing.
        let once = merged.sums(None);
        assert!(!merged.merge(&a.publication(1, 1).encode()).unwrap());
        let mut other = a.merged(4);
        other.merge(&b.publication(2, 1).encode()).unwrap();
        other.merge(&a.publication(1, 1).encode()).unwrap();
        assert_eq!(once, merged.sums(None));
        assert_eq!(once, other.sums(None));
        let fresh = Workload::default();
        fresh.absorb(&once);
        for agent in 0..3u16 {
            let next = (agent + 1) % 3;
            let count = |w: &Workload| w.transitions.count(context_of(AgentId(agent)), next);
            assert_eq!(count(&fresh), count(&a) + count(&b));
        }
        let twice: Vec<u32> = a
            .gaps
            .rows()
            .zip(b.gaps.rows())
            .flat_map(|(a, b)| a.counts().into_iter().zip(b.counts()).map(|(a, b)| a + b).collect::<Vec<_>>())
            .collect();
        let absorbed: Vec<u32> = fresh.gaps.rows().flat_map(Row::counts).collect();
        assert_eq!(absorbed, twice);
    }
}
