//! What a core is told when it starts.

use std::time::Duration;

use super::FetchConfig;
use crate::claims::ClaimsConfig;
use crate::evict::EvictionConfig;

/// What the core needs to know of its node.
#[derive(Debug, Clone)]
pub struct CoreConfig {
    /// Whether there is a disk tier.
    pub disk: bool,
    /// Whether there is an object tier.
    pub object: bool,
    /// Copy downwards as soon as a block is sealed, instead of when host memory passes the high watermark.
    pub eager_offload: bool,
    /// Share of host memory, in percent, from which blocks without a lower copy are offloaded.
    pub high_watermark_percent: u8,
    /// Offloads under way at once.
    pub max_offloads: usize,
    /// Onboards under way at once.
    pub max_onboards: usize,
    /// Copies to devices under way at once.
    pub max_device_copies: usize,
    /// How long a lease lives without a heartbeat.
    pub lease_ttl: Duration,
    /// How long a reservation may stay unsealed.
    pub reserve_ttl: Duration,
    /// Silence after which an attachment is dead.
    pub attachment_ttl: Duration,
    /// Which blocks are written to the object store.
    pub write_behind: WriteBehind,
    /// Bounds of fetching from elsewhere.
    pub fetch: FetchConfig,
    /// What claims may take.
    pub claims: ClaimsConfig,
    /// How it evicts.
    pub eviction: EvictionConfig,
    /// Bytes a second that may be written to the disk; none for as many as come.
    pub disk_write_rate: Option<u64>,
}

/// Which blocks are written to the object store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WriteBehind {
    /// Those that were read at least once: what nobody ever reads again is not worth the writing.
    #[default]
    Read,
    /// All.
    All,
    /// None but those a drain puts there.
    Nothing,
}

impl Default for CoreConfig {
    fn default() -> Self {
        Self {
            disk: false,
            object: false,
            eager_offload: true,
            high_watermark_percent: 80,
            max_offloads: 16,
            max_onboards: 32,
            max_device_copies: 16,
            lease_ttl: Duration::from_secs(30),
            reserve_ttl: Duration::from_secs(60),
            attachment_ttl: Duration::from_secs(15),
            write_behind: WriteBehind::default(),
            fetch: FetchConfig::default(),
            claims: ClaimsConfig::default(),
            eviction: EvictionConfig::default(),
            disk_write_rate: None,
        }
    }
}
