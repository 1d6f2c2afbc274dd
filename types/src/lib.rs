//! Vocabulary of kvtier: ids, keys, digests, layouts, tiers, semantic types and virtual time. No I/O.
#![forbid(unsafe_code)]

pub mod chain;
mod claim;
mod device;
mod group;
pub mod hints;
mod key;
mod layout;
mod namespace;
mod node;
mod outcome;
mod record;
pub mod rules;
mod semantic;
mod taint;
mod tenant;
mod tier;
mod time;

pub use claim::{ClaimBlock, ClaimKind, ClaimName};
pub use device::{DeviceId, DeviceNumber, MAX_DEVICE_EXTENTS};
pub use group::{GroupKind, GroupSpec, prefix_step, usable_prefix};
pub use key::{
    BadDigest, BadEngineHash, BlockKey, DIGEST_BYTES, EngineHash, FieldHasher, GroupDigest, LayoutId, NamespaceId,
    ShardKey,
};
pub use layout::{BadLayout, Layout};
pub use namespace::{HashAlgorithm, Namespace, UnknownHashAlgorithm};
pub use node::{BadNodeId, Edition, NodeId, NodeNumber};
pub use outcome::Outcome;
pub use record::{Expect, Location, RecordMeta};
pub use semantic::{BlockHints, RequestHints, SemanticType, UnknownSemanticType};
pub use taint::{BadTaint, Effect, Taint, Toleration, parse_span};
pub use tenant::{BadTenantId, TenantId};
pub use tier::{Origin, Tier, UnknownTier};
pub use time::Instant;
