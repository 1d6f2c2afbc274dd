//! What the daemon does for programs on its own account.

use serde::Deserialize;

use super::{Config, ConfigError};

/// What the daemon does for programs on its own account.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Programs {
    /// Whether the state of a program that waits for a tool is brought up before it returns.
    pub prefetch: bool,
    /// Share of host memory in percent that may be brought up and not be used yet.
    pub prefetch_share_percent: u8,
    /// Whether prefixes that many calls share are copied to other nodes, and to nodes that join.
    pub replicate: bool,
}

impl Default for Programs {
    fn default() -> Self {
        Self { prefetch: true, prefetch_share_percent: 10, replicate: true }
    }
}

impl Config {
    pub(super) fn check_programs(&self) -> Result<(), ConfigError> {
        if self.programs.prefetch_share_percent > 50 {
            let reason = "at most 50: what is brought ahead must leave room for what is used now".to_owned();
            return Err(ConfigError::Field { field: "programs.prefetch_share_percent", reason });
        }
        Ok(())
    }

    /// Bytes that may be brought up ahead and not be used yet.
    pub(crate) fn prefetch_budget(&self) -> u64 {
        self.host.capacity.0 / 100 * u64::from(self.programs.prefetch_share_percent)
    }
}
