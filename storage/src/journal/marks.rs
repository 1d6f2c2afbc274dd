//! What verbs said blocks mean and are marked with.
//!
//! ```text
//! kind 5   block key 32 | up to sequence u64 | semantic u8 | expires u64, ms since 1970, 0 for never | taints
//! ```

use kvtier_types::{BlockKey, SemanticType, Taint};

use crate::codec::{Malformed, Reader, Writer};

/// Bytes of a mark without its taints.
const FIXED_BYTES: usize = 32 + 8 + 1 + 8;

/// What a block means and is marked with, from some moment on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkRecord {
    /// Its type.
    pub semantic: SemanticType,
    /// Its taints, at most [`Taint::MAX_PER_BLOCK`].
    pub taints: Vec<Taint>,
    /// When it is gone, in milliseconds since the Unix epoch.
    pub expires_ms: Option<u64>,
    /// Records of at most that sequence say something older.
    pub up_to_sequence: u64,
}

impl MarkRecord {
    /// Whether it can be written.
    pub(super) fn is_writable(&self) -> bool {
        let good = |t: &Taint| Taint::new(&t.key, &t.value, t.effect).is_ok();
        self.taints.len() <= Taint::MAX_PER_BLOCK && self.taints.iter().all(good)
    }

    pub(super) fn payload_bytes(&self) -> usize {
        let taints = self.taints.iter().map(|t| 1 + 8 + 2 + t.key.len() + 2 + t.value.len());
        FIXED_BYTES + 1 + taints.sum::<usize>()
    }

    pub(super) fn encode(&self, block: &BlockKey, writer: &mut Writer<'_>) {
        writer.raw(block.as_bytes()).u64(self.up_to_sequence).u8(self.semantic as u8);
        writer.u64(self.expires_ms.unwrap_or(0)).taints(&self.taints);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<(BlockKey, Self), Malformed> {
        let (block, up_to_sequence) = (BlockKey::new(reader.array()?), reader.u64()?);
        let semantic = SemanticType::from_number(reader.u8()?);
        let expires_ms = Some(reader.u64()?).filter(|at| *at > 0);
        Ok((block, Self { semantic, taints: reader.taints()?, expires_ms, up_to_sequence }))
    }
}
