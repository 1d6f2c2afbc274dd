//! Checked conversions between wire messages and vocabulary types. What a peer, an engine or a tool sends is validated
//! here once; nothing behind this module sees an unchecked value.

use kvtier_types::{
    BadDigest, BadLayout, BadNodeId, BadTaint, BadTenantId, BlockKey, DIGEST_BYTES, GroupKind, GroupSpec,
    HashAlgorithm, Layout, LayoutId, Namespace, NodeId, Origin, Outcome, ShardKey, Tier, UnknownHashAlgorithm,
};

use crate::v1;

mod hints;
mod shards;

pub use hints::{MAX_PRIORITY, hints, semantic, taints, toleration};
pub use shards::{record_meta, shard_meta};

/// A message that cannot be what a well-behaved sender meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// A required submessage is absent.
    #[error("field {0} is missing")]
    Missing(&'static str),
    /// A digest has the wrong length.
    #[error("{field}: {source}")]
    Digest {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        source: BadDigest,
    },
    /// Packed keys are not a whole number of keys.
    #[error("packed keys have {0} bytes, which is not a multiple of {DIGEST_BYTES}")]
    PackedKeys(usize),
    /// A number is outside its range.
    #[error("{field} is {value}, which is out of range")]
    Range {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// An enum number this version does not know.
    #[error("{field} has unknown value {value}")]
    Enum {
        /// The field.
        field: &'static str,
        /// Its number.
        value: i32,
    },
    /// A field says one thing in two ways.
    #[error("{0} names blocks and tokens: name one of them")]
    TwoWays(&'static str),
    /// A text is longer than its bound.
    #[error("{field} has {len} bytes, at most {max} are allowed")]
    TooLong {
        /// The field.
        field: &'static str,
        /// Its length.
        len: usize,
        /// The bound.
        max: usize,
    },
    /// The hash algorithm is unknown.
    #[error(transparent)]
    HashAlgorithm(#[from] UnknownHashAlgorithm),
    /// The layout describes nothing that could be stored.
    #[error(transparent)]
    Layout(#[from] BadLayout),
    /// A node's name is none.
    #[error(transparent)]
    Node(#[from] BadNodeId),
    /// A taint is none.
    #[error(transparent)]
    Taint(#[from] BadTaint),
    /// A tenant's name is none.
    #[error(transparent)]
    Tenant(#[from] BadTenantId),
}

/// Longest free text accepted in an identity field.
pub const MAX_TEXT_BYTES: usize = 1024;
/// Most layer names of a group.
pub const MAX_LAYERS: usize = 4096;

fn text(field: &'static str, value: &str, max: usize) -> Result<String, WireError> {
    if value.len() > max {
        return Err(WireError::TooLong { field, len: value.len(), max });
    }
    Ok(value.to_owned())
}

/// Checks a field of at most `max` bytes and returns it.
///
/// # Errors
/// [`WireError::TooLong`].
pub fn bounded<'a>(field: &'static str, value: &'a str, max: usize) -> Result<&'a str, WireError> {
    if value.len() > max {
        return Err(WireError::TooLong { field, len: value.len(), max });
    }
    Ok(value)
}

fn small(field: &'static str, value: u32) -> Result<u16, WireError> {
    u16::try_from(value).map_err(|_| WireError::Range { field, value: u64::from(value) })
}

/// Unpacks keys of 32 bytes each.
///
/// # Errors
/// [`WireError::PackedKeys`] when the length is not a multiple of 32.
pub fn unpack_keys(packed: &[u8]) -> Result<Vec<BlockKey>, WireError> {
    let (keys, rest) = packed.as_chunks::<DIGEST_BYTES>();
    if !rest.is_empty() {
        return Err(WireError::PackedKeys(packed.len()));
    }
    Ok(keys.iter().map(|k| BlockKey::new(*k)).collect())
}

/// Packs keys for the wire.
#[must_use]
pub fn pack_keys<'a>(keys: impl IntoIterator<Item = &'a BlockKey>) -> bytes::Bytes {
    keys.into_iter().flat_map(|k| *k.as_bytes()).collect()
}

/// A target of block keys.
#[must_use]
pub fn block_targets<'a>(keys: impl IntoIterator<Item = &'a BlockKey>) -> v1::Target {
    let blocks = v1::target::Target::Blocks(v1::BlockKeys { keys: pack_keys(keys) });
    v1::Target { target: Some(blocks), ..v1::Target::default() }
}

/// Reads one key.
///
/// # Errors
/// [`WireError::Digest`] when it has not 32 bytes.
pub fn key(field: &'static str, bytes: &[u8]) -> Result<BlockKey, WireError> {
    BlockKey::from_slice(bytes).map_err(|source| WireError::Digest { field, source })
}

impl From<Tier> for v1::Tier {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Device => Self::Device,
            Tier::Host => Self::Host,
            Tier::Disk => Self::Disk,
            Tier::Object => Self::Object,
        }
    }
}

/// Reads a tier; unspecified is `None`.
///
/// # Errors
/// [`WireError::Enum`] for an unknown number.
pub fn tier(field: &'static str, value: i32) -> Result<Option<Tier>, WireError> {
    let wire = v1::Tier::try_from(value).map_err(|_| WireError::Enum { field, value })?;
    Ok(match wire {
        v1::Tier::Unspecified => None,
        v1::Tier::Device => Some(Tier::Device),
        v1::Tier::Host => Some(Tier::Host),
        v1::Tier::Disk => Some(Tier::Disk),
        v1::Tier::Object => Some(Tier::Object),
    })
}

impl From<Origin> for v1::Origin {
    fn from(origin: Origin) -> Self {
        match origin {
            Origin::Tier(Tier::Device) => Self::Device,
            Origin::Tier(Tier::Host) => Self::Host,
            Origin::Tier(Tier::Disk) => Self::Disk,
            Origin::Tier(Tier::Object) => Self::Object,
            Origin::Peer => Self::Peer,
        }
    }
}

/// Reads an origin; unspecified is the host's memory, where every load comes from in the end.
///
/// # Errors
/// [`WireError::Enum`] for an unknown number.
pub fn origin(field: &'static str, value: i32) -> Result<Origin, WireError> {
    let wire = v1::Origin::try_from(value).map_err(|_| WireError::Enum { field, value })?;
    Ok(match wire {
        v1::Origin::Unspecified | v1::Origin::Host => Origin::Tier(Tier::Host),
        v1::Origin::Device => Origin::Tier(Tier::Device),
        v1::Origin::Disk => Origin::Tier(Tier::Disk),
        v1::Origin::Object => Origin::Tier(Tier::Object),
        v1::Origin::Peer => Origin::Peer,
    })
}

impl From<&ShardKey> for v1::ShardKey {
    fn from(key: &ShardKey) -> Self {
        Self {
            key: key.block.as_bytes().to_vec().into(),
            layout_id: key.layout.as_bytes().to_vec().into(),
            shard: key.shard.into(),
        }
    }
}

impl TryFrom<&v1::ShardKey> for ShardKey {
    type Error = WireError;

    fn try_from(w: &v1::ShardKey) -> Result<Self, WireError> {
        let layout = LayoutId::from_slice(&w.layout_id);
        Ok(Self {
            block: key("shard.key", &w.key)?,
            layout: layout.map_err(|source| WireError::Digest { field: "shard.layout_id", source })?,
            shard: small("shard.shard", w.shard)?,
        })
    }
}

/// Reads a node's name.
///
/// # Errors
/// [`WireError::Node`].
pub fn node(id: &str) -> Result<NodeId, WireError> {
    Ok(NodeId::new(id)?)
}

impl From<Outcome> for v1::Outcome {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Applied => Self::Applied,
            Outcome::Accepted => Self::Accepted,
            Outcome::Clipped => Self::Clipped,
            Outcome::Deferred => Self::Deferred,
            Outcome::Duplicate => Self::Duplicate,
            Outcome::Rejected => Self::Rejected,
            Outcome::Missing => Self::Missing,
            Outcome::Unsupported => Self::Unsupported,
        }
    }
}

/// What a message says became of a target; `Unsupported` where it says nothing this build knows.
#[must_use]
pub const fn outcome(wire: v1::Outcome) -> Outcome {
    match wire {
        v1::Outcome::Applied => Outcome::Applied,
        v1::Outcome::Accepted => Outcome::Accepted,
        v1::Outcome::Clipped => Outcome::Clipped,
        v1::Outcome::Deferred => Outcome::Deferred,
        v1::Outcome::Duplicate => Outcome::Duplicate,
        v1::Outcome::Rejected => Outcome::Rejected,
        v1::Outcome::Missing => Outcome::Missing,
        v1::Outcome::Unsupported | v1::Outcome::Unspecified => Outcome::Unsupported,
    }
}

impl From<&Namespace> for v1::Namespace {
    fn from(n: &Namespace) -> Self {
        Self {
            model: n.model.clone(),
            weights_digest: n.weights_digest.clone(),
            kv_dtype: n.kv_dtype.clone(),
            quantization: n.quantization.clone(),
            adapter_digest: n.adapter_digest.clone(),
            hash_algorithm: n.hash_algorithm.name().to_owned(),
            hash_seed: n.hash_seed.clone(),
            hash_block_tokens: n.hash_block_tokens,
            revision: n.revision.clone(),
        }
    }
}

impl TryFrom<&v1::Namespace> for Namespace {
    type Error = WireError;

    fn try_from(w: &v1::Namespace) -> Result<Self, WireError> {
        if w.hash_block_tokens == 0 {
            return Err(WireError::Range { field: "namespace.hash_block_tokens", value: 0 });
        }
        Ok(Self {
            model: text("namespace.model", &w.model, MAX_TEXT_BYTES)?,
            weights_digest: text("namespace.weights_digest", &w.weights_digest, MAX_TEXT_BYTES)?,
            kv_dtype: text("namespace.kv_dtype", &w.kv_dtype, MAX_TEXT_BYTES)?,
            quantization: text("namespace.quantization", &w.quantization, MAX_TEXT_BYTES)?,
            adapter_digest: text("namespace.adapter_digest", &w.adapter_digest, MAX_TEXT_BYTES)?,
            hash_algorithm: w.hash_algorithm.parse::<HashAlgorithm>()?,
            hash_seed: text("namespace.hash_seed", &w.hash_seed, MAX_TEXT_BYTES)?,
            hash_block_tokens: w.hash_block_tokens,
            revision: text("namespace.revision", &w.revision, MAX_TEXT_BYTES)?,
        })
    }
}

impl From<&GroupSpec> for v1::GroupSpec {
    fn from(g: &GroupSpec) -> Self {
        let kind = match g.kind {
            GroupKind::Full => v1::GroupKind::Full,
            GroupKind::SlidingWindow { .. } => v1::GroupKind::SlidingWindow,
            GroupKind::Mla => v1::GroupKind::Mla,
            GroupKind::State => v1::GroupKind::State,
        };
        Self {
            kind: kind.into(),
            window_tokens: g.kind.window_tokens(),
            block_tokens: g.block_tokens,
            layers: g.layers.clone(),
        }
    }
}

impl TryFrom<&v1::GroupSpec> for GroupSpec {
    type Error = WireError;

    fn try_from(w: &v1::GroupSpec) -> Result<Self, WireError> {
        let kind = match v1::GroupKind::try_from(w.kind) {
            Ok(v1::GroupKind::Full) => GroupKind::Full,
            Ok(v1::GroupKind::SlidingWindow) if w.window_tokens > 0 => {
                GroupKind::SlidingWindow { window_tokens: w.window_tokens }
            }
            Ok(v1::GroupKind::SlidingWindow) => {
                return Err(WireError::Range { field: "group.window_tokens", value: 0 });
            }
            Ok(v1::GroupKind::Mla) => GroupKind::Mla,
            Ok(v1::GroupKind::State) => GroupKind::State,
            Ok(v1::GroupKind::Unspecified) | Err(_) => {
                return Err(WireError::Enum { field: "group.kind", value: w.kind });
            }
        };
        if w.layers.len() > MAX_LAYERS {
            return Err(WireError::Range { field: "group.layers", value: w.layers.len() as u64 });
        }
        let layers = w.layers.iter().map(|l| text("group.layers", l, MAX_TEXT_BYTES)).collect::<Result<_, _>>()?;
        Ok(Self { kind, block_tokens: w.block_tokens, layers })
    }
}

impl From<&Layout> for v1::Layout {
    fn from(l: &Layout) -> Self {
        Self {
            attention_backend: l.attention_backend.clone(),
            isa: l.isa.clone(),
            layout: l.layout.clone(),
            tensor_parallel: l.tensor_parallel.into(),
            pipeline_parallel: l.pipeline_parallel.into(),
            prefill_context_parallel: l.prefill_context_parallel.into(),
            decode_context_parallel: l.decode_context_parallel.into(),
            shards: l.shards.into(),
            groups: l.groups.iter().map(Into::into).collect(),
            block_bytes: l.block_bytes.clone(),
        }
    }
}

/// Reads a layout and checks it against the tokens under one engine hash.
///
/// # Errors
/// [`WireError`] naming the field.
pub fn layout(w: &v1::Layout, hash_block_tokens: u32) -> Result<Layout, WireError> {
    let layout = Layout {
        attention_backend: text("layout.attention_backend", &w.attention_backend, MAX_TEXT_BYTES)?,
        isa: text("layout.isa", &w.isa, MAX_TEXT_BYTES)?,
        layout: text("layout.layout", &w.layout, MAX_TEXT_BYTES)?,
        tensor_parallel: small("layout.tensor_parallel", w.tensor_parallel)?,
        pipeline_parallel: small("layout.pipeline_parallel", w.pipeline_parallel)?,
        prefill_context_parallel: small("layout.prefill_context_parallel", w.prefill_context_parallel)?,
        decode_context_parallel: small("layout.decode_context_parallel", w.decode_context_parallel)?,
        shards: small("layout.shards", w.shards)?,
        groups: w.groups.iter().map(GroupSpec::try_from).collect::<Result<_, _>>()?,
        block_bytes: w.block_bytes.clone(),
    };
    layout.validate(hash_block_tokens)?;
    Ok(layout)
}

#[cfg(test)]
mod tests;
