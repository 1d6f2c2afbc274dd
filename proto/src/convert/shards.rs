//! What nodes tell each other of a shard beside its bytes.

use kvtier_types::{BlockHints, NamespaceId, RecordMeta, Taint, TenantId};

use super::hints::{at_most, semantic, taints};
use super::{WireError, key, small, text};
use crate::v1;

/// What a node tells another of a shard at `now_ms` (milliseconds since the Unix epoch, by its own clock).
#[must_use]
pub fn shard_meta(meta: &RecordMeta, now_ms: u64) -> v1::ShardMeta {
    v1::ShardMeta {
        key: Some((&meta.key).into()),
        namespace_id: meta.namespace.as_bytes().to_vec().into(),
        tenant: meta.tenant.as_str().to_owned(),
        program_id: meta.hints.program_id.clone(),
        semantic: v1::SemanticType::from(meta.hints.semantic).into(),
        parent: meta.parent.map(|p| p.as_bytes().to_vec()).unwrap_or_default().into(),
        depth_blocks: meta.depth_blocks,
        group: meta.group.into(),
        needs_ancestors: meta.needs_ancestors,
        model: meta.model.clone(),
        bytes: meta.bytes,
        checksum: meta.checksum,
        taints: meta.hints.taints.iter().map(Into::into).collect(),
        // What is over by now has a moment left: zero would be forever.
        remaining_ms: meta.expires_ms.map_or(0, |at| at.saturating_sub(now_ms).max(1)),
    }
}

/// Reads what another node tells of a shard at `now_ms` (milliseconds since the Unix epoch, by this node's clock).
///
/// # Errors
/// [`WireError`] for a missing or bad field.
pub fn record_meta(w: &v1::ShardMeta, now_ms: u64) -> Result<RecordMeta, WireError> {
    at_most("taints", w.taints.len(), Taint::MAX_PER_BLOCK)?;
    let namespace = NamespaceId::from_slice(&w.namespace_id);
    let program_id = text("program_id", &w.program_id, BlockHints::MAX_PROGRAM_ID_BYTES)?;
    Ok(RecordMeta {
        key: w.key.as_ref().ok_or(WireError::Missing("key"))?.try_into()?,
        namespace: namespace.map_err(|source| WireError::Digest { field: "namespace_id", source })?,
        tenant: TenantId::new(&w.tenant)?,
        hints: BlockHints { program_id, semantic: semantic(w.semantic), taints: taints(&w.taints)? },
        parent: if w.parent.is_empty() { None } else { Some(key("parent", &w.parent)?) },
        depth_blocks: w.depth_blocks,
        group: small("group", w.group)?,
        needs_ancestors: w.needs_ancestors,
        model: text("model", &w.model, RecordMeta::MAX_MODEL_BYTES)?,
        bytes: w.bytes,
        checksum: w.checksum,
        sequence: 0,
        expires_ms: (w.remaining_ms > 0).then(|| now_ms.saturating_add(w.remaining_ms)),
    })
}
