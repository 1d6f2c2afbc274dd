//! Who owns a block.

use std::fmt;
use std::sync::Arc;

/// A tenant's id from the configuration. Blocks without a salt belong to [`TenantId::shared`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(Arc<str>);

/// A tenant id that is empty, too long, or has characters that a metric label or a file cannot carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("bad tenant id {0:?}: 1 to 64 characters of a-z, A-Z, 0-9, '-', '_' and '.'")]
pub struct BadTenantId(pub String);

impl TenantId {
    /// Longest id, in bytes.
    pub const MAX_BYTES: usize = 64;

    /// The tenant of unsalted blocks: readable by all, controllable by operators.
    #[must_use]
    pub fn shared() -> Self {
        Self(Arc::from("shared"))
    }

    /// Checks and wraps an id.
    ///
    /// # Errors
    /// [`BadTenantId`] when it is empty, longer than [`Self::MAX_BYTES`] or has other characters than letters, digits,
    /// `-`, `_` and `.`.
    pub fn new(id: &str) -> Result<Self, BadTenantId> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if id.is_empty() || id.len() > Self::MAX_BYTES || !id.bytes().all(plain) {
            return Err(BadTenantId(id.to_owned()));
        }
        Ok(Self(Arc::from(id)))
    }

    /// The id's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
