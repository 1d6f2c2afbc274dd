//! The cluster's directory as the core sees it: which node says it holds which shard. Soft state only: losing it loses
//! nothing, and whoever believes it checks with the node named.
//!
//! ```text
//! node:   NodeId -> NodeRecord            written by heartbeats, gone when they stop
//! bucket: first byte of the key           each with a Digest per node: what the node has in it, and its last sequence
//! entry:  (DirectoryKey, NodeNumber) -> (Edition, Tiers)
//! ```
//!
//! *Invariants*, the same for every implementation (pinned by its conformance suite)
//! - A [`Batch`] takes effect as a whole. One whose edition is older than the bucket's, or whose sequence is not above
//!   the bucket's in that edition, changes nothing: late and repeated batches do no harm.
//! - A batch of a newer edition restarts the bucket's digest from zero: entries of older editions no longer count.
//! - The answer to a batch, and [`Digest`]s asked for, describe exactly the entries of that node and edition the bucket
//!   holds.

mod table;

use std::time::Duration;

use kvtier_types::{Edition, FieldHasher, NodeId, NodeNumber, ShardKey, Tier};

pub use table::Table;

/// Buckets of the key space: the unit of batches and digests.
pub const BUCKETS: usize = 256;
/// Changes in one batch.
pub const MAX_CHANGES_PER_BATCH: usize = 512;
/// Pack names a heartbeat carries.
pub const MAX_PACK_NEWS: usize = 64;

/// 128-bit digest of a [`ShardKey`]: what the directory knows a shard by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirectoryKey([u8; 16]);

impl DirectoryKey {
    /// The key of a shard.
    #[must_use]
    pub fn of(key: &ShardKey) -> Self {
        let shard = key.shard.to_le_bytes();
        let mut hasher = FieldHasher::new("kvtier directory v1");
        let digest = hasher.bytes(key.block.as_bytes()).bytes(key.layout.as_bytes()).bytes(&shard).finish();
        Self(digest[..16].try_into().expect("a digest has 32 bytes"))
    }

    /// Wraps a key's bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The bucket it lies in, below [`BUCKETS`].
    #[must_use]
    pub const fn bucket(&self) -> u8 {
        self.0[0]
    }

    /// What an entry of it adds to its bucket's digest: 40 bits of the key, times the tiers' bits plus one. Below 2^45,
    /// so that scripting languages whose numbers are doubles count it exactly.
    #[must_use]
    pub fn weight(&self, tiers: Tiers) -> u64 {
        let [_, a, b, c, d, e, ..] = self.0;
        let key = u64::from_le_bytes([a, b, c, d, e, 0, 0, 0]);
        key * (u64::from(tiers.bits()) + 1)
    }
}

/// A set of tiers, one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tiers(u8);

impl Tiers {
    /// No tier.
    pub const NONE: Self = Self(0);

    /// Takes the low four bits: bit [`Tier::index`] for each tier.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits & 0xf)
    }

    /// Its bits.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// With another tier.
    #[must_use]
    pub const fn with(self, tier: Tier) -> Self {
        Self(self.0 | 1 << tier.index())
    }

    /// Whether a tier is in it.
    #[must_use]
    pub const fn has(self, tier: Tier) -> bool {
        self.0 & (1 << tier.index()) != 0
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The tiers, fastest first.
    pub fn iter(self) -> impl Iterator<Item = Tier> {
        Tier::ALL.into_iter().filter(move |t| self.has(*t))
    }
}

/// A change of one entry: the tiers that hold the shard now. None removes the entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// The shard.
    pub key: DirectoryKey,
    /// Where the node holds it.
    pub tiers: Tiers,
}

/// Changes of one node in one bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The bucket all its keys lie in.
    pub bucket: u8,
    /// Rises by batch within an edition and a bucket.
    pub sequence: u64,
    /// At most [`MAX_CHANGES_PER_BATCH`]; of one key the last counts.
    pub changes: Vec<Change>,
}

/// What a bucket holds of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digest {
    /// The sequence of the last batch that took effect.
    pub sequence: u64,
    /// Entries.
    pub count: u64,
    /// Sum of their [`DirectoryKey::weight`]s modulo 2^48.
    pub sum: u64,
}

impl Digest {
    /// The modulus of the sum.
    pub const MODULUS: u64 = 1 << 48;

    /// Takes an entry's change from `old` to `new` tiers into account.
    pub fn count(&mut self, key: &DirectoryKey, old: Tiers, new: Tiers) {
        if !old.is_empty() {
            self.count -= 1;
            self.sum = (self.sum + Self::MODULUS - key.weight(old)) % Self::MODULUS;
        }
        if !new.is_empty() {
            self.count += 1;
            self.sum = (self.sum + key.weight(new)) % Self::MODULUS;
        }
    }
}

/// An entry: one node's word that it holds a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Replica {
    /// The node.
    pub node: NodeNumber,
    /// The edition it was published under: void unless it is the node's current one.
    pub edition: Edition,
    /// Where the node holds it.
    pub tiers: Tiers,
}

/// What a node is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeState {
    /// It serves, and takes copies of others' blocks.
    Ready,
    /// It serves, but is on its way out: it takes no copies.
    Draining,
}

/// A node's word about itself, renewed by every heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// Its name.
    pub id: NodeId,
    /// The edition its entries count under.
    pub edition: Edition,
    /// What it is doing.
    pub state: NodeState,
    /// It joined a moment ago, and what many calls share is still copied to it: steps are better placed on others. Never of
    /// one that drains.
    pub warming: bool,
    /// Where its Peer service listens: `host:port`.
    pub peer: String,
    /// Bytes of host memory it could fill without dropping anything.
    pub free_host_bytes: u64,
    /// Names of the packs it wrote last, newest last, at most [`MAX_PACK_NEWS`].
    pub packs: Vec<String>,
}

/// How long a node's record outlives its last heartbeat, as a multiple of the heartbeats' interval.
pub const RECORD_HEARTBEATS: u32 = 5;

/// The life of a record for an interval of heartbeats.
#[must_use]
pub fn record_ttl(interval: Duration) -> Duration {
    interval * RECORD_HEARTBEATS
}
