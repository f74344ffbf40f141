//! Copies scattered blocks between host buffers: the `memcpy` backend of `agentrt.transfer`.
//!
//! Owns the one place where the workspace dereferences addresses that came from Python. A [`Batch`] is checked as a whole
//! before a byte moves: every source and destination lies inside a [`Region`] the caller vouched for, no destination
//! overlaps another destination or any source. After that check the copies are independent, so they may run in any order
//! and on several threads, and running a batch cannot fail half-way.
//!
//! | operation | allocations | cost |
//! |---|---|---|
//! | [`Batch::new`] | three vectors of `n` words | `O(n log n)`, near `O(n)` when blocks arrive in address order |
//! | [`Batch::run`] | one thread per extra worker, none below 4 MiB a worker | memory bandwidth |

use thiserror::Error;

/// Why a batch was refused. Nothing has been copied when one of these is returned.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CopyError {
    /// The three descriptor arrays differ in length.
    #[error("descriptor arrays differ in length: {sources} sources, {destinations} destinations, {sizes} sizes")]
    LengthMismatch {
        /// Number of source addresses.
        sources: usize,
        /// Number of destination addresses.
        destinations: usize,
        /// Number of sizes.
        sizes: usize,
    },
    /// A range is not inside any region.
    #[error("descriptor {index}: {role} range {address:#x}+{bytes} lies outside the pool's memory")]
    OutsideRegion {
        /// Position of the descriptor.
        index: usize,
        /// `source` or `destination`.
        role: &'static str,
        /// First byte of the range.
        address: usize,
        /// Length of the range.
        bytes: usize,
    },
    /// A destination overlaps another destination, or a source.
    #[error("destination range {address:#x} overlaps another range of the batch")]
    Overlap {
        /// First byte of the destination range.
        address: usize,
    },
}

/// A span of host memory that the caller vouches for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Region {
    start: usize,
    end: usize,
}

impl Region {
    /// Vouches for `bytes` bytes at `start`.
    ///
    /// # Safety
    /// * The memory is mapped, readable and writable, and stays so until every [`Batch`] made from this region is dropped.
    /// * While a batch runs, nobody else writes its ranges and nobody else reads its destinations. No Rust reference to
    ///   those bytes is alive.
    pub unsafe fn new(start: *mut u8, bytes: usize) -> Self {
        // Saturating, so that a nonsensical length gives a region that contains nothing beyond the address space.
        Self { start: start as usize, end: (start as usize).saturating_add(bytes) }
    }
}

/// Descriptors that have passed every check.
#[derive(Debug)]
pub struct Batch {
    descriptors: Vec<(usize, usize, usize)>,
    bytes: usize,
}

/// Sorted regions, those that meet or touch joined: a run may cross from one buffer into the next.
fn joined(regions: &[Region]) -> Vec<Region> {
    let mut sorted = regions.to_vec();
    sorted.sort_unstable();
    let mut joined: Vec<Region> = Vec::with_capacity(sorted.len());
    for region in sorted {
        match joined.last_mut() {
            Some(last) if region.start <= last.end => last.end = last.end.max(region.end),
            _ => joined.push(region),
        }
    }
    joined
}

/// Index of the first range that lies in none of the joined regions.
fn first_outside(regions: &[Region], starts: &[usize], sizes: &[usize]) -> Option<usize> {
    starts.iter().zip(sizes).position(|(&start, &bytes)| {
        let after = regions.partition_point(|region| region.start <= start);
        let end = start.checked_add(bytes);
        after == 0 || end.is_none_or(|end| end > regions[after - 1].end)
    })
}

impl Batch {
    /// Checks all descriptors against the regions and against each other. Empty descriptors are dropped.
    pub fn new(
        regions: &[Region],
        sources: &[usize],
        destinations: &[usize],
        sizes: &[usize],
    ) -> Result<Self, CopyError> {
        if sources.len() != sizes.len() || destinations.len() != sizes.len() {
            return Err(CopyError::LengthMismatch {
                sources: sources.len(),
                destinations: destinations.len(),
                sizes: sizes.len(),
            });
        }
        let regions = joined(regions);
        for (role, starts) in [("source", sources), ("destination", destinations)] {
            if let Some(index) = first_outside(&regions, starts, sizes) {
                return Err(CopyError::OutsideRegion { index, role, address: starts[index], bytes: sizes[index] });
            }
        }
        let ranges = |starts: &[usize]| {
            let mut ranges: Vec<(usize, usize)> =
                starts.iter().zip(sizes).filter(|(_, &n)| n > 0).map(|(&s, &n)| (s, s + n)).collect();
            ranges.sort_unstable();
            ranges
        };
        let (from, to) = (ranges(sources), ranges(destinations));
        if let Some(pair) = to.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            return Err(CopyError::Overlap { address: pair[1].0 });
        }
        // Destinations are disjoint and sorted here, so one sweep finds every source that touches one. Sources may repeat:
        // their ends are not monotone, hence the search per source instead of a merge.
        for &(start, end) in &from {
            let next = to.partition_point(|range| range.1 <= start);
            if to.get(next).is_some_and(|range| range.0 < end) {
                return Err(CopyError::Overlap { address: to[next].0 });
            }
        }
        let descriptors: Vec<_> =
            (0..sizes.len()).filter(|&i| sizes[i] > 0).map(|i| (sources[i], destinations[i], sizes[i])).collect();
        Ok(Self { descriptors, bytes: sizes.iter().sum() })
    }

    /// Bytes the batch moves.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Runs the copies on up to `max_threads` threads (this one included), fewer when the batch is small.
    pub fn run(&self, max_threads: usize) {
        /// Below this a second thread costs more than it brings (a spawn is tens of microseconds).
        const BYTES_PER_THREAD: usize = 4 << 20;
        let workers = max_threads.min(self.bytes / BYTES_PER_THREAD).min(self.descriptors.len()).max(1);
        if workers == 1 {
            return copy_all(&self.descriptors);
        }
        let share = self.descriptors.len().div_ceil(workers);
        std::thread::scope(|scope| {
            let mut shares = self.descriptors.chunks(share);
            let own = shares.next();
            for part in shares {
                scope.spawn(move || copy_all(part));
            }
            copy_all(own.unwrap_or_default());
        });
    }
}

fn copy_all(descriptors: &[(usize, usize, usize)]) {
    for &(source, destination, bytes) in descriptors {
        // SAFETY: `Batch::new` placed both ranges inside regions whose memory the caller of `Region::new` keeps mapped and
        // unshared while the batch lives, and proved that this destination overlaps no source and no other destination.
        unsafe { std::ptr::copy_nonoverlapping(source as *const u8, destination as *mut u8, bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(buffer: &mut [u8]) -> Region {
        // SAFETY: the tests keep the buffer alive and untouched while a batch made from the region exists.
        unsafe { Region::new(buffer.as_mut_ptr(), buffer.len()) }
    }

    #[test]
    fn blocks_arrive_unchanged_on_one_and_on_many_threads() {
        for threads in [1, 4] {
            let mut from: Vec<u8> = (0..16usize << 20).map(|i| ((i * 31) >> 3) as u8).collect();
            let mut to = vec![0u8; from.len()];
            let block = 1 << 16;
            let n = from.len() / block;
            let regions = [region(&mut from), region(&mut to)];
            let sources: Vec<_> = (0..n).map(|i| regions[0].start + i * block).collect();
            let targets: Vec<_> = (0..n).map(|i| regions[1].start + (n - 1 - i) * block).collect();
            let batch = Batch::new(&regions, &sources, &targets, &vec![block; n]).unwrap();
            assert_eq!(batch.bytes(), from.len());
            batch.run(threads);
            for i in 0..n {
                assert_eq!(from[i * block..][..block], to[(n - 1 - i) * block..][..block]);
            }
        }
    }

    #[test]
    fn a_range_that_leaves_its_region_is_refused() {
        let (mut from, mut to) = (vec![1u8; 64], vec![0u8; 64]);
        let regions = [region(&mut from), region(&mut to)];
        let error = Batch::new(&regions, &[regions[0].start + 60], &[regions[1].start], &[8]).unwrap_err();
        assert!(matches!(error, CopyError::OutsideRegion { index: 0, role: "source", .. }), "{error}");
        let error = Batch::new(&regions, &[regions[0].start], &[usize::MAX - 3], &[8]).unwrap_err();
        assert!(matches!(error, CopyError::OutsideRegion { role: "destination", .. }), "{error}");
    }

    #[test]
    fn overlapping_destinations_and_a_destination_over_a_source_are_refused() {
        let (mut from, mut to) = (vec![1u8; 64], vec![0u8; 64]);
        let regions = [region(&mut from), region(&mut to)];
        let (a, b) = (regions[0].start, regions[1].start);
        assert!(matches!(Batch::new(&regions, &[a, a], &[b, b + 4], &[8, 8]), Err(CopyError::Overlap { .. })));
        assert!(matches!(Batch::new(&regions, &[a, a + 8], &[a + 12, b], &[8, 8]), Err(CopyError::Overlap { .. })));
        // A source may repeat.
        assert!(Batch::new(&regions, &[a, a], &[b, b + 8], &[8, 8]).is_ok());
    }

    #[test]
    fn arrays_of_different_length_are_refused() {
        assert!(matches!(Batch::new(&[], &[1], &[], &[]), Err(CopyError::LengthMismatch { .. })));
    }

    #[test]
    fn a_run_may_cross_between_regions_that_touch() {
        let (mut from, mut to) = (vec![7u8; 64], vec![0u8; 64]);
        let (low, high) = from.split_at_mut(24);
        let regions = [region(high), region(low), region(&mut to)];
        let batch = Batch::new(&regions, &[regions[1].start + 8], &[regions[2].start], &[32]).unwrap();
        batch.run(1);
        assert_eq!(to[..32], [7; 32]);
    }

    proptest! {
        /// A batch is accepted exactly when a byte-by-byte marking finds no clash, and then moves what the naive loop moves.
        #[test]
        fn random_batches_agree_with_a_naive_copy(
            descriptors in prop::collection::vec((0usize..96, 0usize..96, 0usize..12), 0..12)
        ) {
            let mut memory: Vec<u8> = (0..96u8).collect();
            let mut expected = memory.clone();
            let mut role = vec![(false, 0u32); 128];
            for &(s, d, n) in &descriptors {
                for i in 0..n {
                    role[s + i].0 = true;
                    role[d + i].1 += 1;
                }
            }
            let fits = descriptors.iter().all(|&(s, d, n)| s + n <= 96 && d + n <= 96);
            let clash = role.iter().any(|&(read, writes)| writes > 1 || (read && writes > 0));
            let regions = [region(&mut memory)];
            let base = regions[0].start;
            let column = |pick: fn(&(usize, usize, usize)) -> usize| descriptors.iter().map(pick).collect::<Vec<_>>();
            let shift = |v: Vec<usize>| v.into_iter().map(|x| x + base).collect::<Vec<_>>();
            let batch = Batch::new(&regions, &shift(column(|d| d.0)), &shift(column(|d| d.1)), &column(|d| d.2));
            prop_assert_eq!(batch.is_ok(), fits && !clash);
            if let Ok(batch) = batch {
                batch.run(2);
                for &(s, d, n) in &descriptors {
                    let block = expected[s..s + n].to_vec();
                    expected[d..d + n].copy_from_slice(&block);
                }
                prop_assert_eq!(memory, expected);
            }
        }
    }
}
