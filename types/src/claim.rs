//! Claims: what somebody asked to be kept, and for how long.

use std::fmt;

use crate::key::BlockKey;
use crate::tenant::TenantId;
use crate::tier::Tier;

/// Names a claim: the same name again means the same claim.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimName {
    /// Whose.
    pub tenant: TenantId,
    /// Who asked, within the tenant: budgets are per owner.
    pub owner: String,
    /// Among those of its owner.
    pub id: String,
}

impl ClaimName {
    /// Longest owner or id, in bytes.
    pub const MAX_PART_BYTES: usize = 128;
}

impl fmt::Display for ClaimName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.tenant, self.owner, self.id)
    }
}

/// What a claim asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClaimKind {
    /// Hard: the copy in that tier, and the slower ones that survive a restart, do not go to make room.
    Pin(Tier),
    /// Soft: a priority from 0 (first to go) to 100 that ranking reads.
    Retain(u8),
}

/// One block of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimBlock {
    /// The block.
    pub key: BlockKey,
    /// What budgets are charged for it: the room that its shards take, all together.
    pub bytes: u64,
}
