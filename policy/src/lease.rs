//! Leases: the guard of one request over the blocks it is about to load.

use kvtier_types::{Instant, Origin, Toleration};
use rustc_hash::FxHashMap;

use crate::attachment::AttachmentId;
use crate::catalog::BlockId;
use crate::ledger::{Fate, MissReason};

/// Number of a lease, never reused within a run of the core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub(crate) u64);

impl LeaseId {
    /// Wraps a number that came back over the wire; one that names no lease is as good as ended.
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

/// One leased shard and where it stands in the request's prefix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Leased {
    pub(crate) id: BlockId,
    pub(crate) group: u16,
    pub(crate) shard: u16,
    pub(crate) block: u32,
    /// Where it lay when it was leased.
    pub(crate) source: Origin,
}

/// A run of tokens with one fate, in prefix order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    pub(crate) fate: Fate,
    pub(crate) tokens: u32,
}

/// One lease.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) attachment: AttachmentId,
    pub(crate) request_id: String,
    pub(crate) blocks: Vec<Leased>,
    /// Shards still on their way up.
    pub(crate) waiting: usize,
    pub(crate) local_tokens: u32,
    /// Ranges asked for: group, first block, blocks.
    pub(crate) asked: Vec<(u16, u32, u32)>,
    /// Why each block of the reference group is missing, should it not be offered; as many as were asked.
    pub(crate) reasons: Vec<MissReason>,
    /// Fates of the looked-up tokens, known once collected.
    pub(crate) runs: Vec<Run>,
    pub(crate) expires: Instant,
    /// Since when shards of it were on their way up, if any were.
    pub(crate) waits_since: Option<Instant>,
    /// Whether its request named a program.
    pub(crate) of_program: bool,
    /// A shard of it was reported corrupt.
    pub(crate) corrupt: bool,
    /// Taints that the request bears with.
    pub(crate) tolerations: Vec<Toleration>,
    /// What is fetched for a lookup that is still being located; its own lease takes the place of this one.
    pub(crate) begun: Option<Begun>,
}

/// Shards that are fetched before their lookup, and where from.
pub(crate) type Begun = FxHashMap<BlockId, Origin>;
