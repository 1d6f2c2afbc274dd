//! Identities of blocks: digests, engine hashes, block keys and shard keys.
//!
//! ```text
//! BlockKey = BLAKE3("kvtier block" | namespace | engine hash | group-spec digest)      no rank in it
//! ShardKey = (BlockKey, LayoutId, shard index)                                         what tiers store
//! ```

use std::fmt;

/// Length of every digest of this crate, in bytes.
pub const DIGEST_BYTES: usize = 32;

macro_rules! digest_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; DIGEST_BYTES]);

        impl $name {
            /// Wraps the digest's bytes.
            #[must_use]
            pub const fn new(bytes: [u8; DIGEST_BYTES]) -> Self {
                Self(bytes)
            }

            /// The digest's bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; DIGEST_BYTES] {
                &self.0
            }

            /// Reads it from a slice.
            ///
            /// # Errors
            /// [`BadDigest`] when the slice does not have exactly 32 bytes.
            pub fn from_slice(bytes: &[u8]) -> Result<Self, BadDigest> {
                bytes.try_into().map(Self).map_err(|_| BadDigest { len: bytes.len() })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}(", stringify!($name))?;
                write_hex(&self.0[..8], f)?;
                f.write_str("..)")
            }
        }

        impl std::str::FromStr for $name {
            type Err = BadDigest;

            fn from_str(s: &str) -> Result<Self, Self::Err> {
                parse_hex(s).map(Self)
            }
        }
    };
}

digest_newtype!(
    /// Logical identity of a model's KV: see [`crate::Namespace`].
    NamespaceId
);
digest_newtype!(
    /// What makes bytes interchangeable: see [`crate::Layout`].
    LayoutId
);
digest_newtype!(
    /// Digest of one [`crate::GroupSpec`].
    GroupDigest
);
digest_newtype!(
    /// Identity of a block of tokens under a namespace, without rank.
    BlockKey
);

/// A digest that is not 32 bytes, or not 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a digest has {DIGEST_BYTES} bytes ({} hexadecimal digits), got {len}", DIGEST_BYTES * 2)]
pub struct BadDigest {
    /// The length found.
    pub len: usize,
}

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

fn parse_hex(s: &str) -> Result<[u8; DIGEST_BYTES], BadDigest> {
    let bad = || BadDigest { len: s.len() };
    if s.len() != DIGEST_BYTES * 2 || !s.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(bad());
    }
    let mut out = [0; DIGEST_BYTES];
    for (byte, pair) in out.iter_mut().zip(s.as_bytes().chunks_exact(2)) {
        let digits = std::str::from_utf8(pair).map_err(|_| bad())?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| bad())?;
    }
    Ok(out)
}

/// A chained block hash as the engine computed it: 16 bytes (xxhash) to 32 bytes (SHA-256).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct EngineHash {
    bytes: [u8; DIGEST_BYTES],
    len: u8,
}

/// An engine hash of a length no supported algorithm produces.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an engine block hash has {} to {} bytes, got {len}", EngineHash::MIN_BYTES, EngineHash::MAX_BYTES)]
pub struct BadEngineHash {
    /// The length found.
    pub len: usize,
}

impl EngineHash {
    /// Shortest hash accepted: xxh3-128. Anything shorter collides too soon to name bytes by it.
    pub const MIN_BYTES: usize = 16;
    /// Longest hash accepted: SHA-256.
    pub const MAX_BYTES: usize = DIGEST_BYTES;

    /// Wraps an engine's hash.
    ///
    /// # Errors
    /// [`BadEngineHash`] when the length is outside [`Self::MIN_BYTES`] to [`Self::MAX_BYTES`].
    pub fn new(hash: &[u8]) -> Result<Self, BadEngineHash> {
        let bad = BadEngineHash { len: hash.len() };
        if !(Self::MIN_BYTES..=Self::MAX_BYTES).contains(&hash.len()) {
            return Err(bad);
        }
        let mut bytes = [0; DIGEST_BYTES];
        bytes[..hash.len()].copy_from_slice(hash);
        let len = u8::try_from(hash.len()).map_err(|_| bad)?;
        Ok(Self { bytes, len })
    }

    /// The hash as the engine gave it.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl fmt::Debug for EngineHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EngineHash(")?;
        write_hex(&self.as_bytes()[..8], f)?;
        f.write_str("..)")
    }
}

impl BlockKey {
    /// The key of the block that `hash` names in `namespace`, for the group with digest `group`.
    #[must_use]
    pub fn derive(namespace: &NamespaceId, hash: &EngineHash, group: &GroupDigest) -> Self {
        let mut hasher = FieldHasher::new("kvtier block v1");
        hasher.bytes(namespace.as_bytes()).bytes(hash.as_bytes()).bytes(group.as_bytes());
        Self(hasher.finish())
    }
}

/// One rank's part of a block in one layout: what every tier stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardKey {
    /// The block.
    pub block: BlockKey,
    /// The layout its bytes are in.
    pub layout: LayoutId,
    /// Which part; ranks that hold identical KV share one index.
    pub shard: u16,
}

impl fmt::Display for ShardKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.block, self.shard)
    }
}

/// BLAKE3 over length-prefixed fields under a domain string, so that no two field lists collide.
#[derive(Debug)]
pub struct FieldHasher(blake3::Hasher);

impl FieldHasher {
    /// A hasher for one kind of digest; `domain` names the kind and its version.
    #[must_use]
    pub fn new(domain: &str) -> Self {
        let mut this = Self(blake3::Hasher::new());
        this.bytes(domain.as_bytes());
        this
    }

    /// Adds a byte field.
    pub fn bytes(&mut self, field: &[u8]) -> &mut Self {
        self.0.update(&(field.len() as u64).to_le_bytes());
        self.0.update(field);
        self
    }

    /// Adds a string field.
    pub fn text(&mut self, field: &str) -> &mut Self {
        self.bytes(field.as_bytes())
    }

    /// Adds a number field.
    pub fn number(&mut self, field: u64) -> &mut Self {
        self.bytes(&field.to_le_bytes())
    }

    /// The digest of the fields so far.
    #[must_use]
    pub fn finish(&self) -> [u8; DIGEST_BYTES] {
        *self.0.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> [u8; DIGEST_BYTES] {
        [n; DIGEST_BYTES]
    }

    #[test]
    fn hex_round_trips_and_bad_hex_is_refused() {
        let key = BlockKey::new(digest(0xab));
        assert_eq!(key.to_string().parse::<BlockKey>().unwrap(), key);
        assert!("zz".repeat(32).parse::<BlockKey>().is_err());
        assert!("ab".parse::<BlockKey>().is_err());
        assert!("+1".repeat(32).parse::<BlockKey>().is_err(), "from_str_radix takes a sign; a digest does not");
    }

    #[test]
    fn every_part_of_a_block_key_matters() {
        let hash = EngineHash::new(&digest(1)).unwrap();
        let base = BlockKey::derive(&NamespaceId::new(digest(2)), &hash, &GroupDigest::new(digest(3)));
        let other_hash = EngineHash::new(&digest(9)).unwrap();
        for other in [
            BlockKey::derive(&NamespaceId::new(digest(9)), &hash, &GroupDigest::new(digest(3))),
            BlockKey::derive(&NamespaceId::new(digest(2)), &other_hash, &GroupDigest::new(digest(3))),
            BlockKey::derive(&NamespaceId::new(digest(2)), &hash, &GroupDigest::new(digest(9))),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn engine_hashes_of_odd_lengths_are_refused() {
        assert!(EngineHash::new(&[0; 8]).is_err());
        assert!(EngineHash::new(&[0; 33]).is_err());
        assert_eq!(EngineHash::new(&[7; 16]).unwrap().as_bytes(), &[7; 16]);
    }

    #[test]
    fn fields_do_not_run_into_each_other() {
        let ab_c = FieldHasher::new("t").text("ab").text("c").finish();
        let a_bc = FieldHasher::new("t").text("a").text("bc").finish();
        assert_ne!(ab_c, a_bc);
    }
}
