//! Identities: plain integers with a type each, so that a signature says what it takes.
//!
//! They are handles, not maps: names are interned once at registration, the hot path sees numbers.
//! Any bit pattern is valid; an id nobody registered is data (it gets the prior), never an error.

/// A registered workload: one application on one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadId(pub u32);

/// An agent (a role) inside one workload, numbered densely from 0 as names are interned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AgentId(pub u16);

impl AgentId {
    /// No agent: the state before a session's first call, and any name beyond the id space.
    pub const UNKNOWN: Self = Self(u16::MAX);

    /// Whether this names an agent at all.
    pub const fn is_known(self) -> bool {
        self.0 != Self::UNKNOWN.0
    }
}

/// A session (one workflow run): a hash of whatever the caller names it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionKey(pub u64);

/// A block's identity: the hash of its whole prefix, so that equal keys mean equal content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey(pub u64);

/// Spreads an id over 64 bits: the finaliser of `SplitMix64`, a bijection, so no two ids collide.
#[inline]
pub const fn mix(id: u64) -> u64 {
    let mut z = id.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Spreads an id more cheaply than [`mix`], by one multiplication: a bijection, too. All bits of the id reach the upper
/// half of the result, and its neighbours lie far apart there; the lower half is of less quality, as it knows the id's
/// lower half best.
#[inline(always)]
pub(crate) const fn spread(id: u64) -> u64 {
    let product = id.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    product ^ product >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_is_no_agent_and_agent_zero_is_one() {
        assert!(!AgentId::UNKNOWN.is_known());
        assert!(AgentId(0).is_known());
    }

    #[test]
    fn mixing_spreads_neighbouring_ids_over_high_and_low_bits() {
        let low: std::collections::HashSet<u64> = (0..256).map(|id| mix(id) & 0xFFF).collect();
        let high: std::collections::HashSet<u64> = (0..256).map(|id| mix(id) >> 52).collect();
        assert!(low.len() > 230 && high.len() > 230, "{} {}", low.len(), high.len());
    }
}
