//! Physical identity of KV: bytes may be exchanged only between engines of one layout.

use crate::group::GroupSpec;
use crate::key::{FieldHasher, LayoutId};

/// What makes the bytes of two engines interchangeable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Attention backend that packs the blocks, e.g. `CPU_ATTN` or `FLASH_ATTN`.
    pub attention_backend: String,
    /// Instruction set the packing depends on (`amx`, `vec16`, `sm_90`); empty when it depends on none.
    pub isa: String,
    /// The engine's name of the tensor layout, e.g. `LBHNC`.
    pub layout: String,
    /// Tensor-parallel ranks.
    pub tensor_parallel: u16,
    /// Pipeline-parallel ranks.
    pub pipeline_parallel: u16,
    /// Prefill context-parallel ranks.
    pub prefill_context_parallel: u16,
    /// Decode context-parallel ranks.
    pub decode_context_parallel: u16,
    /// Distinct shards of a block: ranks that hold identical KV count once.
    pub shards: u16,
    /// The groups, in the engine's order.
    pub groups: Vec<GroupSpec>,
    /// Bytes of one shard of a block, for each group.
    pub block_bytes: Vec<u64>,
}

/// A layout that describes nothing that could be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadLayout {
    /// The group count is out of range.
    #[error("a layout has 1 to {max} groups with one block size each, got {groups} groups and {sizes} sizes", max = Layout::MAX_GROUPS)]
    Groups {
        /// Groups given.
        groups: usize,
        /// Block sizes given.
        sizes: usize,
    },
    /// A block is empty or larger than an extent can hold.
    #[error("a block shard has 1 to {max} bytes, group {group} has {bytes}", max = Layout::MAX_BLOCK_BYTES)]
    BlockBytes {
        /// Index of the group.
        group: usize,
        /// Its block size.
        bytes: u64,
    },
    /// Blocks of a group do not end where hashes end.
    #[error(
        "blocks of group {group} have {block_tokens} tokens, which is not a positive multiple of the hash's {hash_block_tokens}"
    )]
    BlockTokens {
        /// Index of the group.
        group: usize,
        /// Tokens of its blocks.
        block_tokens: u32,
        /// Tokens under one engine hash.
        hash_block_tokens: u32,
    },
    /// The shard count is out of range.
    #[error("a layout has 1 to {max} shards, got {shards}", max = Layout::MAX_SHARDS)]
    Shards {
        /// Shards given.
        shards: u16,
    },
}

impl Layout {
    /// Most groups of a layout; vLLM's hybrids have fewer than ten.
    pub const MAX_GROUPS: usize = 64;
    /// Largest block shard; an extent holds at least four.
    pub const MAX_BLOCK_BYTES: u64 = 256 << 20;
    /// Most shards of a block.
    pub const MAX_SHARDS: u16 = 512;

    /// Checks the ranges that the rest of the code relies on.
    ///
    /// # Errors
    /// [`BadLayout`] names the first field that is out of range.
    pub fn validate(&self, hash_block_tokens: u32) -> Result<(), BadLayout> {
        let (groups, sizes) = (self.groups.len(), self.block_bytes.len());
        if groups == 0 || groups > Self::MAX_GROUPS || groups != sizes {
            return Err(BadLayout::Groups { groups, sizes });
        }
        if self.shards == 0 || self.shards > Self::MAX_SHARDS {
            return Err(BadLayout::Shards { shards: self.shards });
        }
        for (group, (spec, &bytes)) in self.groups.iter().zip(&self.block_bytes).enumerate() {
            if bytes == 0 || bytes > Self::MAX_BLOCK_BYTES {
                return Err(BadLayout::BlockBytes { group, bytes });
            }
            let block_tokens = spec.block_tokens;
            if block_tokens == 0 || hash_block_tokens == 0 || block_tokens % hash_block_tokens != 0 {
                return Err(BadLayout::BlockTokens { group, block_tokens, hash_block_tokens });
            }
        }
        Ok(())
    }

    /// Digest of every field.
    #[must_use]
    pub fn id(&self) -> LayoutId {
        let mut hasher = FieldHasher::new("kvtier layout v1");
        for (_, value) in self.fields() {
            hasher.text(&value);
        }
        LayoutId::new(hasher.finish())
    }

    /// Names and values of the fields that differ from `known`, as `field: known -> this`.
    #[must_use]
    pub fn differences(&self, known: &Self) -> Vec<String> {
        let pairs = known.fields().into_iter().zip(self.fields());
        pairs.filter(|(old, new)| old != new).map(|((name, old), (_, new))| format!("{name}: {old} -> {new}")).collect()
    }

    fn fields(&self) -> [(&'static str, String); 10] {
        let digests: Vec<String> = self.groups.iter().map(|g| g.digest().to_string()).collect();
        [
            ("attention_backend", self.attention_backend.clone()),
            ("isa", self.isa.clone()),
            ("layout", self.layout.clone()),
            ("tensor_parallel", self.tensor_parallel.to_string()),
            ("pipeline_parallel", self.pipeline_parallel.to_string()),
            ("prefill_context_parallel", self.prefill_context_parallel.to_string()),
            ("decode_context_parallel", self.decode_context_parallel.to_string()),
            ("shards", self.shards.to_string()),
            ("groups", digests.join(",")),
            ("block_bytes", format!("{:?}", self.block_bytes)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::GroupKind;

    fn base() -> Layout {
        Layout {
            attention_backend: "CPU_ATTN".into(),
            isa: "vec16".into(),
            layout: "LBHNC".into(),
            tensor_parallel: 1,
            pipeline_parallel: 1,
            prefill_context_parallel: 1,
            decode_context_parallel: 1,
            shards: 1,
            groups: vec![GroupSpec { kind: GroupKind::Full, block_tokens: 128, layers: vec!["a".into()] }],
            block_bytes: vec![65_536],
        }
    }

    #[test]
    fn a_difference_is_named_and_changes_the_id() {
        let other = Layout { isa: "amx".into(), shards: 2, ..base() };
        assert_ne!(other.id(), base().id());
        assert_eq!(other.differences(&base()), ["isa: vec16 -> amx", "shards: 1 -> 2"]);
        assert!(base().differences(&base()).is_empty());
    }

    #[test]
    fn out_of_range_layouts_are_refused() {
        assert_eq!(base().validate(16), Ok(()));
        assert!(base().validate(48).is_err());
        assert!(base().validate(0).is_err());
        assert!(Layout { shards: 0, ..base() }.validate(16).is_err());
        assert!(Layout { block_bytes: vec![0], ..base() }.validate(16).is_err());
        assert!(Layout { block_bytes: vec![1, 2], ..base() }.validate(16).is_err());
        assert!(Layout { block_bytes: vec![1 << 40], ..base() }.validate(16).is_err());
    }
}
