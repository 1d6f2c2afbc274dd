//! Where the rules are.

use std::path::PathBuf;

use serde::Deserialize;

/// Rules: what becomes of blocks by their types, taints, models and tenants.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rules {
    /// The file they are in; the shipped rules when none is named.
    pub file: Option<PathBuf>,
}
