//! What claims may take.

use std::time::Duration;

use kvtier_policy::{ClaimsConfig, TierBudget};
use kvtier_types::Tier;
use serde::Deserialize;

use super::{Config, ConfigError};
use crate::units::Span;

/// Most of a tier that hard claims may take, whatever is configured: the rest is everybody else's.
const MOST_PERCENT: u8 = 90;
/// Most claims that may be configured: as many as the journal takes.
const MOST_CLAIMS: usize = kvtier_storage::journal::MAX_CLAIMS / 2;
/// Most blocks of claims that may be configured: a claim that is replaced is in the journal twice for a moment.
const MOST_BLOCKS: usize = kvtier_storage::journal::MAX_CLAIM_BLOCKS / 2;

/// Budgets of claims.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Claims {
    /// Share of a tier in percent that all hard claims together may take.
    pub node_share_percent: u8,
    /// Share of a tier in percent that those of one owner may take.
    pub owner_share_percent: u8,
    /// Longest time of a claim.
    pub max_ttl: Span,
    /// Claims at once.
    pub max_claims: usize,
    /// Blocks of all claims together.
    pub max_blocks: usize,
}

impl Default for Claims {
    fn default() -> Self {
        Self {
            node_share_percent: 50,
            owner_share_percent: 20,
            max_ttl: Span(Duration::from_secs(24 * 3600)),
            max_claims: 4096,
            max_blocks: 1 << 18,
        }
    }
}

impl Config {
    pub(super) fn check_claims(&self) -> Result<(), ConfigError> {
        let field = |field, reason: String| Err(ConfigError::Field { field, reason });
        let claims = &self.claims;
        if claims.node_share_percent > MOST_PERCENT {
            let reason = format!("at most {MOST_PERCENT}: what is claimed must leave room for the rest");
            return field("claims.node_share_percent", reason);
        }
        if claims.owner_share_percent > claims.node_share_percent {
            return field("claims.owner_share_percent", "must not be more than claims.node_share_percent".into());
        }
        if claims.max_ttl.0.is_zero() {
            return field("claims.max_ttl", "must not be zero".into());
        }
        if claims.max_claims > MOST_CLAIMS {
            return field("claims.max_claims", format!("at most {MOST_CLAIMS}"));
        }
        if claims.max_blocks > MOST_BLOCKS {
            return field("claims.max_blocks", format!("at most {MOST_BLOCKS}"));
        }
        Ok(())
    }

    /// The core's part.
    pub(super) fn claims_config(&self) -> ClaimsConfig {
        let share = |bytes: u64, percent: u8| bytes / 100 * u64::from(percent);
        let budget = |bytes: u64| TierBudget {
            node_bytes: share(bytes, self.claims.node_share_percent),
            owner_bytes: share(bytes, self.claims.owner_share_percent),
        };
        let mut budgets = [TierBudget::default(); Tier::ALL.len()];
        budgets[Tier::Device.index()] = budget(self.device.memory.0);
        budgets[Tier::Host.index()] = budget(self.host.capacity.0);
        if self.disk.enabled {
            budgets[Tier::Disk.index()] = budget(self.disk.capacity.0);
        }
        ClaimsConfig {
            budgets,
            max_ttl: self.claims.max_ttl.0,
            max_claims: self.claims.max_claims,
            max_blocks: self.claims.max_blocks,
        }
    }
}
