//! What the core counts.

use kvtier_types::{Origin, Tier};

/// Counts that only grow, for metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Shards sealed.
    pub sealed: u64,
    /// Reservations answered with a frame, `Present`, `Busy`.
    pub reserved: [u64; 3],
    /// Copies dropped to make room, by tier.
    pub evicted: [u64; Tier::ALL.len()],
    /// Movements that ended well, by target tier.
    pub moved: [u64; Tier::ALL.len()],
    /// Movements that failed, by target tier.
    pub move_failures: [u64; Tier::ALL.len()],
    /// Blocks loaded by engines, by where they came from.
    pub loaded: [u64; Origin::ALL.len()],
    /// Copies whose bytes did not match their checksum.
    pub corrupt: u64,
    /// Loads that failed for another reason than their bytes.
    pub lost: u64,
    /// Attachments reaped because they fell silent or their stream closed.
    pub reaped: u64,
    /// Reservations reaped.
    pub reaped_reservations: u64,
    /// Leases that expired.
    pub expired_leases: u64,
    /// Shards handed to peers.
    pub exported: u64,
    /// Export leases that ran out instead of being released.
    pub expired_exports: u64,
    /// Fetches given up because they took too long.
    pub fetches_given_up: u64,
    /// Blocks whose time ran out.
    pub expired_blocks: u64,
    /// Times a copy that shall stay in its tier found the tier's share for such copies full.
    pub clipped_keeps: u64,
}
