//! Learned counts of many replicas, added up without counting anything twice.
//!
//! A replica publishes *all* it has counted, under a version that grows with each publication; it
//! never publishes differences. [`Merged`] keeps the newest publication of each replica, and what
//! the replicas know together is the sum over those. Hence merging is commutative, associative and
//! idempotent: messages may be lost, repeated, reordered and relayed.
//!
//! A publication is a list of sections, plain integers with no meaning here: dense (position says
//! what is counted) or keyed (a 64-bit key does; what tables such as
//! [`crate::successors::SuccessorTable::for_each`] give). Replica ids name an incarnation: a process
//! that starts again counting from zero takes a new id.
//!
//! Off the hot path: publishing and merging allocate. One owner at a time (`&mut self`).
//!
//! # Encoding
//!
//! Little-endian: magic `u32`, format `u32`, body length `u64`, checksum of the body `u64`; body:
//! replica `u64`, version `u64`, number of sections `u64`; per section kind `u64` (0 dense, 1 keyed),
//! length `u64`, then `u32` counts or `(u64 key, u32 count)` pairs in ascending order of keys.
//! Anything else is a precise [`Error`], and nothing is applied.

use crate::error::{Error, Result};
use crate::ids::mix;
use std::collections::BTreeMap;

const MAGIC: u32 = u32::from_le_bytes(*b"agrt");
/// Counts of another format mean something else. 2: followers by calls of an agent instead of steps of a session;
/// 3: with odds of content.
const FORMAT: u32 = 3;
const HEADER_BYTES: usize = 24;

/// Counts of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Section<Count> {
    /// Position says what is counted.
    Dense(Vec<Count>),
    /// Pairs of key and count, in ascending order of keys, each key once.
    Keyed(Vec<(u64, Count)>),
}

/// What a section must look like to be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// This many counts.
    Dense(usize),
    /// At most this many keys.
    Keyed(usize),
}

/// Everything one replica has counted, as of a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publication {
    /// The counting process; one id per incarnation.
    pub replica: u64,
    /// Grows with every publication of the replica.
    pub version: u64,
    /// The counts.
    pub sections: Vec<Section<u32>>,
}

/// Reads little-endian integers off the front of a slice.
struct Reader<'a> {
    rest: &'a [u8],
    length: u64,
}

impl Reader<'_> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let Some((front, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(self.too_short(N as u64));
        };
        self.rest = rest;
        Ok(*front)
    }

    fn u32(&mut self) -> Result<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// A length whose items of `item_bytes` are there: checked before anything is allocated.
    fn length(&mut self, item_bytes: u64) -> Result<usize> {
        let items = self.u64()?;
        let bytes = items.saturating_mul(item_bytes);
        if bytes > self.rest.len() as u64 {
            return Err(self.too_short(bytes));
        }
        Ok(items as usize)
    }

    fn too_short(&self, wanted: u64) -> Error {
        let read = self.length - self.rest.len() as u64;
        Error::Truncated { needed: read.saturating_add(wanted), length: self.length }
    }
}

/// Any flipped, added or missing bit changes it with all but probability 2^-64 (one bit: always).
fn checksum(body: &[u8]) -> u64 {
    body.chunks(8).fold(body.len() as u64, |hash, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        mix(hash ^ u64::from_le_bytes(word))
    })
}

impl Publication {
    /// The publication as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let mut put = |value: u64| body.extend_from_slice(&value.to_le_bytes());
        put(self.replica);
        put(self.version);
        put(self.sections.len() as u64);
        for section in &self.sections {
            let (kind, length) = match section {
                Section::Dense(counts) => (0_u64, counts.len()),
                Section::Keyed(counts) => (1, counts.len()),
            };
            body.extend_from_slice(&kind.to_le_bytes());
            body.extend_from_slice(&(length as u64).to_le_bytes());
            match section {
                Section::Dense(counts) => {
                    body.extend(counts.iter().flat_map(|count| count.to_le_bytes()));
                }
                Section::Keyed(counts) => {
                    for (key, count) in counts {
                        body.extend_from_slice(&key.to_le_bytes());
                        body.extend_from_slice(&count.to_le_bytes());
                    }
                }
            }
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(&MAGIC.to_le_bytes());
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&checksum(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Read what [`Publication::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let expect = |what, expected, found| {
            let wrong = Error::Format { what, expected, found };
            if expected == found {
                Ok(())
            } else {
                Err(wrong)
            }
        };
        let mut reader = Reader { rest: bytes, length: bytes.len() as u64 };
        expect("magic", MAGIC as u64, reader.u32()? as u64)?;
        expect("format", FORMAT as u64, reader.u32()? as u64)?;
        let length = reader.u64()?;
        let found = reader.u64()?;
        let present = reader.rest.len() as u64;
        if length > present {
            return Err(reader.too_short(length));
        }
        expect("body length", length, present)?;
        let computed = checksum(reader.rest);
        if found != computed {
            return Err(Error::Checksum { found, computed });
        }
        let (replica, version, count) = (reader.u64()?, reader.u64()?, reader.length(16)?);
        let mut sections = Vec::with_capacity(count);
        for _ in 0..count {
            let kind = reader.u64()?;
            if kind == 0 {
                let length = reader.length(4)?;
                let counts = (0..length).map(|_| reader.u32());
                sections.push(Section::Dense(counts.collect::<Result<_>>()?));
                continue;
            }
            expect("section kind", 1, kind)?;
            let length = reader.length(12)?;
            let mut counts: Vec<(u64, u32)> = Vec::with_capacity(length);
            for _ in 0..length {
                let key = reader.u64()?;
                if let Some((previous, _)) = counts.last().filter(|(previous, _)| *previous >= key) {
                    return Err(Error::Format { what: "key order", expected: previous.saturating_add(1), found: key });
                }
                counts.push((key, reader.u32()?));
            }
            sections.push(Section::Keyed(counts));
        }
        expect("bytes left over", 0, reader.rest.len() as u64)?;
        Ok(Self { replica, version, sections })
    }

    /// Which of two publications of a replica stands. Versions decide; should a replica publish two
    /// things under one version, the content does, so that every reader picks the same.
    fn supersedes(&self, other: &Self) -> bool {
        let content = |publication: &Self| checksum(&publication.encode());
        let by_version = self.version.cmp(&other.version);
        by_version.then_with(|| content(self).cmp(&content(other))).is_gt()
    }
}

/// The newest publication of each replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    shapes: Vec<Shape>,
    max_replicas: usize,
    replicas: BTreeMap<u64, Publication>,
}

impl Merged {
    /// Nothing known yet; takes publications of these shapes from at most `max_replicas` replicas.
    pub fn new(shapes: Vec<Shape>, max_replicas: usize) -> Self {
        Self { shapes, max_replicas, replicas: BTreeMap::new() }
    }

    /// Take in encoded bytes; `true` if they hold something newer than what was known.
    ///
    /// # Errors
    /// Bytes that are not a publication of this shape, or one replica too many; nothing is applied.
    pub fn merge(&mut self, bytes: &[u8]) -> Result<bool> {
        self.merge_publication(Publication::decode(bytes)?)
    }

    /// Take in a publication; `true` if it is newer than what was known of its replica.
    ///
    /// # Errors
    /// A publication of another shape, or one replica too many; nothing is applied.
    pub fn merge_publication(&mut self, publication: Publication) -> Result<bool> {
        self.check(&publication)?;
        let known = self.replicas.get(&publication.replica);
        if known.is_none() && self.replicas.len() >= self.max_replicas {
            return Err(Error::OutOfRange {
                what: "replicas",
                min: 0,
                max: self.max_replicas as u64,
                requested: self.replicas.len() as u64 + 1,
            });
        }
        let newer = known.is_none_or(|known| publication.supersedes(known));
        if newer {
            self.replicas.insert(publication.replica, publication);
        }
        Ok(newer)
    }

    fn check(&self, publication: &Publication) -> Result<()> {
        let wrong = |section: usize, expected: usize, found: usize| {
            Err(Error::Shape { section: section as u32, expected: expected as u64, found: found as u64 })
        };
        let (shapes, sections) = (&self.shapes, &publication.sections);
        for (index, (shape, section)) in shapes.iter().zip(sections).enumerate() {
            match (shape, section) {
                (Shape::Dense(expected), Section::Dense(counts)) if counts.len() == *expected => {}
                (Shape::Keyed(limit), Section::Keyed(counts)) if counts.len() <= *limit => {}
                (Shape::Dense(expected) | Shape::Keyed(expected), Section::Dense(counts)) => {
                    return wrong(index, *expected, counts.len());
                }
                (Shape::Dense(expected) | Shape::Keyed(expected), Section::Keyed(counts)) => {
                    return wrong(index, *expected, counts.len());
                }
            }
        }
        if shapes.len() != sections.len() {
            // The first section one side has and the other has not.
            let first = shapes.len().min(sections.len());
            return wrong(first, usize::from(first < shapes.len()), usize::from(first < sections.len()));
        }
        Ok(())
    }

    /// Forget a replica, for instance one that has left for good.
    pub fn forget(&mut self, replica: u64) -> bool {
        self.replicas.remove(&replica).is_some()
    }

    /// The publications that stand, in order of replica ids: to relay or to store.
    pub fn publications(&self) -> impl Iterator<Item = &Publication> {
        self.replicas.values()
    }

    /// Counts of all replicas but `except` (the one that asks, which has its own at hand), added up.
    pub fn sums(&self, except: Option<u64>) -> Vec<Section<u64>> {
        let counted = |replica: &&Publication| Some(replica.replica) != except;
        let sum = |(index, shape): (usize, &Shape)| match shape {
            Shape::Dense(length) => {
                let mut sums = vec![0_u64; *length];
                for publication in self.publications().filter(counted) {
                    if let Section::Dense(counts) = &publication.sections[index] {
                        for (sum, count) in sums.iter_mut().zip(counts) {
                            *sum += *count as u64;
                        }
                    }
                }
                Section::Dense(sums)
            }
            Shape::Keyed(_) => {
                let mut sums = BTreeMap::<u64, u64>::new();
                for publication in self.publications().filter(counted) {
                    if let Section::Keyed(counts) = &publication.sections[index] {
                        for (key, count) in counts {
                            *sums.entry(*key).or_default() += *count as u64;
                        }
                    }
                }
                Section::Keyed(sums.into_iter().collect())
            }
        };
        self.shapes.iter().enumerate().map(sum).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publication(replica: u64, version: u64, dense: [u32; 2], keyed: &[(u64, u32)]) -> Publication {
        let sections = vec![Section::Dense(dense.to_vec()), Section::Keyed(keyed.to_vec())];
        Publication { replica, version, sections }
    }

    fn merged() -> Merged {
        Merged::new(vec![Shape::Dense(2), Shape::Keyed(3)], 2)
    }

    #[test]
    fn the_newest_of_each_replica_counts_once() {
        let mut state = merged();
        let newer = publication(1, 2, [5, 6], &[(10, 1), (20, 2)]).encode();
        assert_eq!(state.merge(&newer), Ok(true));
        assert_eq!(state.merge(&newer), Ok(false), "a repeated message");
        let older = publication(1, 1, [1, 1], &[]).encode();
        assert_eq!(state.merge(&older), Ok(false), "a late message");
        let other = publication(2, 1, [1, 2], &[(20, 3), (30, 4)]).encode();
        assert_eq!(state.merge(&other), Ok(true));
        let keyed = vec![(10, 1), (20, 5), (30, 4)];
        assert_eq!(state.sums(None), [Section::Dense(vec![6, 8]), Section::Keyed(keyed)]);
        let others = [Section::Dense(vec![1, 2]), Section::Keyed(vec![(20, 3), (30, 4)])];
        assert_eq!(state.sums(Some(1)), others);
        assert!(state.forget(2) && !state.forget(2));
    }

    #[test]
    fn another_shape_and_one_replica_too_many_are_refused_with_numbers() {
        let mut state = merged();
        let mut wrong = publication(1, 1, [1, 1], &[]);
        wrong.sections[0] = Section::Dense(vec![1; 5]);
        let error = Error::Shape { section: 0, expected: 2, found: 5 };
        assert_eq!(state.merge_publication(wrong), Err(error));
        let mut wrong = publication(1, 1, [1, 1], &[]);
        wrong.sections.pop();
        let error = Error::Shape { section: 1, expected: 1, found: 0 };
        assert_eq!(state.merge_publication(wrong), Err(error));
        for replica in [1, 2] {
            state.merge_publication(publication(replica, 1, [1, 1], &[])).unwrap();
        }
        let error = state.merge_publication(publication(3, 1, [1, 1], &[])).unwrap_err();
        assert!(matches!(error, Error::OutOfRange { max: 2, requested: 3, .. }));
        assert_eq!(state.publications().count(), 2);
    }

    #[test]
    fn an_announced_length_is_checked_before_it_is_allocated() {
        let mut body = Vec::new();
        for value in [1, 1, 1, 0, u64::MAX / 2] {
            body.extend_from_slice(&u64::to_le_bytes(value));
        }
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&MAGIC.to_le_bytes());
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&checksum(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        assert!(matches!(Publication::decode(&bytes), Err(Error::Truncated { length: 64, .. })));
    }
}
