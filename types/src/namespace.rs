//! Logical identity of KV: two engines share blocks only under one namespace.

use std::fmt;
use std::str::FromStr;

use crate::key::{FieldHasher, NamespaceId};

/// The engine's prefix hash function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HashAlgorithm {
    /// SHA-256 over pickled values.
    Sha256,
    /// SHA-256 over canonical CBOR: recomputable from token ids, see [`crate::chain`].
    Sha256Cbor,
    /// XXH3-128 over pickled values.
    Xxhash,
    /// XXH3-128 over canonical CBOR.
    XxhashCbor,
}

impl HashAlgorithm {
    const ALL: [Self; 4] = [Self::Sha256, Self::Sha256Cbor, Self::Xxhash, Self::XxhashCbor];

    /// vLLM's name of it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha256Cbor => "sha256_cbor",
            Self::Xxhash => "xxhash",
            Self::XxhashCbor => "xxhash_cbor",
        }
    }

    /// Whether the engine seeds it randomly per process unless told a seed.
    #[must_use]
    pub const fn needs_seed(self) -> bool {
        matches!(self, Self::Xxhash | Self::XxhashCbor)
    }
}

impl fmt::Display for HashAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A hash algorithm this version does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown prefix hash algorithm {0:?}: expected sha256, sha256_cbor, xxhash or xxhash_cbor")]
pub struct UnknownHashAlgorithm(pub String);

impl FromStr for HashAlgorithm {
    type Err = UnknownHashAlgorithm;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|a| a.name() == s).ok_or_else(|| UnknownHashAlgorithm(s.to_owned()))
    }
}

/// Logical identity of a model's KV.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// The model's served name or path, for people; the digest below is what tells models apart.
    pub model: String,
    /// Digest of the weights that were loaded: hub commit, or sampled content; see the connector.
    pub weights_digest: String,
    /// Element type of KV, e.g. `bfloat16` or `fp8_e4m3`.
    pub kv_dtype: String,
    /// Quantization of the weights, empty for none.
    pub quantization: String,
    /// Digest of an adapter that is merged into the weights, empty for none. (Per-request adapters are in the hash.)
    pub adapter_digest: String,
    /// The engine's prefix hash.
    pub hash_algorithm: HashAlgorithm,
    /// The seed of the hash chain, as the string the engine feeds it.
    pub hash_seed: String,
    /// Tokens covered by one engine hash.
    pub hash_block_tokens: u32,
    /// Empty for what the weights digest fully describes; otherwise something no other engine has (after a weight
    /// update in place, a cache reset, or when the weights could not be digested).
    pub revision: String,
}

impl Namespace {
    /// The seed vLLM uses for the SHA-256 family when `PYTHONHASHSEED` is unset.
    pub const DEFAULT_SEED: &'static str = "vllm-none-hash";

    /// Digest of every field but the display name.
    #[must_use]
    pub fn id(&self) -> NamespaceId {
        let mut hasher = FieldHasher::new("kvtier namespace v1");
        hasher
            .text(&self.weights_digest)
            .text(&self.kv_dtype)
            .text(&self.quantization)
            .text(&self.adapter_digest)
            .text(self.hash_algorithm.name())
            .text(&self.hash_seed)
            .number(u64::from(self.hash_block_tokens))
            .text(&self.revision);
        NamespaceId::new(hasher.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Namespace {
        Namespace {
            model: "m".into(),
            weights_digest: "w".into(),
            kv_dtype: "bfloat16".into(),
            quantization: String::new(),
            adapter_digest: String::new(),
            hash_algorithm: HashAlgorithm::Sha256Cbor,
            hash_seed: "0".into(),
            hash_block_tokens: 16,
            revision: String::new(),
        }
    }

    #[test]
    fn the_display_name_does_not_matter_and_everything_else_does() {
        let id = base().id();
        assert_eq!(Namespace { model: "other path".into(), ..base() }.id(), id);
        let others = [
            Namespace { weights_digest: "x".into(), ..base() },
            Namespace { kv_dtype: "fp8".into(), ..base() },
            Namespace { quantization: "awq".into(), ..base() },
            Namespace { adapter_digest: "a".into(), ..base() },
            Namespace { hash_algorithm: HashAlgorithm::Sha256, ..base() },
            Namespace { hash_seed: "1".into(), ..base() },
            Namespace { hash_block_tokens: 32, ..base() },
            Namespace { revision: "r".into(), ..base() },
        ];
        assert!(others.iter().all(|o| o.id() != id));
    }

    #[test]
    fn algorithm_names_round_trip() {
        for algorithm in HashAlgorithm::ALL {
            assert_eq!(algorithm.name().parse(), Ok(algorithm));
        }
        assert!("md5".parse::<HashAlgorithm>().is_err());
    }
}
