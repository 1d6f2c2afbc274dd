//! How a node evicts.

use kvtier_policy::EvictionConfig;
use kvtier_policy::evict::Contender;
use kvtier_types::Tier;
use serde::Deserialize;

use super::{Config, ConfigError};

/// How a node evicts.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Eviction {
    /// Who decides what goes: `survival`, `lru`, `s3fifo` or `arc`.
    pub policy: String,
    /// Whether survival ranking yields to another that does better on this node's calls.
    pub guard: bool,
}

impl Default for Eviction {
    fn default() -> Self {
        Self { policy: Contender::Survival.name().to_owned(), guard: true }
    }
}

impl Config {
    /// The core's part.
    pub(super) fn eviction_config(&self) -> Result<EvictionConfig, ConfigError> {
        let named = Contender::ALL.into_iter().find(|policy| policy.name() == self.eviction.policy);
        let Some(policy) = named else {
            let reason = format!("{:?} is not survival, lru, s3fifo or arc", self.eviction.policy);
            return Err(ConfigError::Field { field: "eviction.policy", reason });
        };
        let mut capacity_bytes = [0; Tier::ALL.len()];
        capacity_bytes[Tier::Host.index()] = self.host.capacity.0;
        capacity_bytes[Tier::Disk.index()] = self.disk.capacity.0;
        capacity_bytes[Tier::Object.index()] = self.object.capacity.0;
        Ok(EvictionConfig { policy, guard: self.eviction.guard, capacity_bytes })
    }
}
