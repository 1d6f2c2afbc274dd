//! Where bytes can lie.

use std::fmt;
use std::str::FromStr;

/// A place that holds KV blocks, from fastest to slowest (G1 to G4 in prose).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// GPU memory owned by the daemon's pool.
    Device,
    /// The daemon's arena in host memory.
    Host,
    /// Log segments on a local disk.
    Disk,
    /// Packs in an object store.
    Object,
}

impl Tier {
    /// Every tier, fastest first.
    pub const ALL: [Self; 4] = [Self::Device, Self::Host, Self::Disk, Self::Object];

    /// The name used in metrics, CLI and config.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
            Self::Object => "object",
        }
    }

    /// Position in [`Tier::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a reader's bytes came from: a tier of the node, or a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// A tier of the node itself. The object store counts as one, whoever wrote there.
    Tier(Tier),
    /// Another node's memory or disk.
    Peer,
}

impl Origin {
    /// Every origin.
    pub const ALL: [Self; 5] = [
        Self::Tier(Tier::Device),
        Self::Tier(Tier::Host),
        Self::Tier(Tier::Disk),
        Self::Tier(Tier::Object),
        Self::Peer,
    ];

    /// The name used in metrics, CLI and the ledger.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tier(tier) => tier.name(),
            Self::Peer => "peer",
        }
    }

    /// Position in [`Origin::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Tier(tier) => tier.index(),
            Self::Peer => Tier::ALL.len(),
        }
    }
}

impl From<Tier> for Origin {
    fn from(tier: Tier) -> Self {
        Self::Tier(tier)
    }
}

/// A tier name that is none of `device`, `host`, `disk`, `object`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown tier {0:?}: expected device, host, disk or object")]
pub struct UnknownTier(pub String);

impl FromStr for Tier {
    type Err = UnknownTier;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|t| t.name() == s).ok_or_else(|| UnknownTier(s.to_owned()))
    }
}
