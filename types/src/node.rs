//! Nodes of a cluster.

use std::fmt;
use std::sync::Arc;

/// A node's name from its configuration: 1 to 253 letters, digits, `-`, `_` and `.`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(Arc<str>);

/// A node id that is empty, too long, or has characters that a host name, a path or a metric label cannot carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("bad node id {0:?}: 1 to 253 letters, digits, '-', '_' and '.'")]
pub struct BadNodeId(pub String);

impl NodeId {
    /// Longest id, in bytes.
    pub const MAX_BYTES: usize = 253;

    /// Checks and wraps an id.
    ///
    /// # Errors
    /// [`BadNodeId`].
    pub fn new(id: &str) -> Result<Self, BadNodeId> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        // A name of dots alone is a path to somewhere else.
        let dots = id.bytes().all(|b| b == b'.');
        if dots || id.len() > Self::MAX_BYTES || !id.bytes().all(plain) {
            return Err(BadNodeId(id.to_owned()));
        }
        Ok(Self(Arc::from(id)))
    }

    /// The id's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The number that stands for it in the directory.
    #[must_use]
    pub fn number(&self) -> NodeNumber {
        let digest = crate::FieldHasher::new("kvtier node v1").text(&self.0).finish();
        NodeNumber(u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes")))
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// 64-bit digest of a [`NodeId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeNumber(u64);

impl NodeNumber {
    /// Wraps the number.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for NodeNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What a node publishes under: the number of its start in the high bits, counted up in the low ones whenever it
/// publishes anew from scratch. Entries of any other edition than a node's current one do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Edition(u64);

impl Edition {
    /// Leaves 44 bits to the start: milliseconds since 1970 fit until the year 2527.
    const LOW_BITS: u32 = 20;

    /// The first edition of a start.
    #[must_use]
    pub const fn first(incarnation: u64) -> Self {
        Self(incarnation << Self::LOW_BITS)
    }

    /// Wraps the number as it was stored.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The next edition.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The start it belongs to.
    #[must_use]
    pub const fn incarnation(self) -> u64 {
        self.0 >> Self::LOW_BITS
    }
}

impl fmt::Display for Edition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.incarnation(), self.0 & ((1 << Self::LOW_BITS) - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::{Edition, NodeId};

    #[test]
    fn ids_that_are_paths_or_too_long_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "ä", &"x".repeat(254)] {
            assert!(NodeId::new(bad).is_err(), "{bad:?}");
        }
        assert_ne!(NodeId::new("a").unwrap().number(), NodeId::new("b").unwrap().number());
    }

    #[test]
    fn a_later_start_is_a_later_edition() {
        assert!(Edition::first(2) > Edition::first(1).next().next());
        assert_eq!(Edition::first(7).next().incarnation(), 7);
    }
}
