//! vLLM's `sha256_cbor` block hash chain, recomputed from token ids.
//!
//! ```text
//! seed hash = SHA-256(CBOR(seed string))
//! h_i       = SHA-256(CBOR([h_(i-1) or seed hash, [token ids of block i], null or [extra keys]]))
//! ```
//! CBOR is RFC 8949's canonical form (shortest heads, definite lengths). Vectors in the tests were printed by vLLM
//! 0.32's own functions.

use sha2::{Digest, Sha256};

use crate::key::EngineHash;

/// Something besides tokens that a block's KV depends on, in the order in which vLLM lists them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExtraKey {
    /// Adapter of the request: every block.
    Lora {
        /// Name of the adapter.
        name: String,
        /// Its path, which vLLM makes part of the key.
        path: String,
    },
    /// A multimodal item that the block touches.
    Multimodal {
        /// Identifier of the item (its content hash, as a rule).
        identifier: String,
        /// Offset of the item's first token from the block's first: negative when it began earlier.
        offset: i64,
    },
    /// Salt of the request: first block only.
    CacheSalt(String),
    /// Prompt given as embeddings: digest of the block's part.
    PromptEmbeds(Vec<u8>),
}

/// Computes the chain for blocks of a fixed number of tokens.
#[derive(Debug, Clone)]
pub struct HashChain {
    parent: [u8; 32],
}

impl HashChain {
    /// A chain that starts from `seed`: `PYTHONHASHSEED`'s text, or [`crate::Namespace::DEFAULT_SEED`].
    #[must_use]
    pub fn new(seed: &str) -> Self {
        let mut cbor = Cbor::default();
        cbor.text(seed);
        Self { parent: cbor.sha256() }
    }

    /// Adds a full block and returns its hash.
    pub fn push(&mut self, tokens: &[u32], extra: &[ExtraKey]) -> EngineHash {
        let mut cbor = Cbor::default();
        cbor.array(3).bytes(&self.parent).array(tokens.len());
        for &token in tokens {
            cbor.unsigned(u64::from(token));
        }
        if extra.is_empty() {
            cbor.null();
        } else {
            cbor.array(extra.len());
            for key in extra {
                cbor.extra(key);
            }
        }
        self.parent = cbor.sha256();
        EngineHash::new(&self.parent).expect("a SHA-256 digest has the longest accepted length")
    }
}

#[derive(Default)]
struct Cbor(Vec<u8>);

impl Cbor {
    fn head(&mut self, major: u8, n: u64) -> &mut Self {
        let major = major << 5;
        let be = n.to_be_bytes();
        match n {
            0..24 => self.0.push(major | be[7]),
            24..0x100 => self.0.extend([major | 24, be[7]]),
            0x100..0x1_0000 => {
                self.0.push(major | 25);
                self.0.extend(&be[6..]);
            }
            0x1_0000..0x1_0000_0000 => {
                self.0.push(major | 26);
                self.0.extend(&be[4..]);
            }
            _ => {
                self.0.push(major | 27);
                self.0.extend(&be);
            }
        }
        self
    }

    fn unsigned(&mut self, n: u64) -> &mut Self {
        self.head(0, n)
    }

    fn signed(&mut self, n: i64) -> &mut Self {
        if n < 0 { self.head(1, n.unsigned_abs() - 1) } else { self.head(0, n.unsigned_abs()) }
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.head(2, bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.head(3, text.len() as u64);
        self.0.extend(text.as_bytes());
        self
    }

    fn array(&mut self, len: usize) -> &mut Self {
        self.head(4, len as u64)
    }

    fn null(&mut self) -> &mut Self {
        self.0.push(0xf6);
        self
    }

    fn extra(&mut self, key: &ExtraKey) -> &mut Self {
        match key {
            ExtraKey::Lora { name, path } => self.array(3).text("lora").text(name).text(path),
            ExtraKey::Multimodal { identifier, offset } => self.array(3).text("mm").text(identifier).signed(*offset),
            ExtraKey::CacheSalt(salt) => self.array(2).text("cache_salt").text(salt),
            ExtraKey::PromptEmbeds(digest) => self.array(2).text("prompt_embeds").bytes(digest),
        }
    }

    fn sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.0).into()
    }
}

#[cfg(test)]
mod tests;
