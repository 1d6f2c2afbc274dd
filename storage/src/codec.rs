//! Byte-level encoding shared by records, footers, packs and the journal: little-endian fields, length-prefixed strings,
//! CRC-64/NVME. Decoders take whatever a medium returns: they never panic and never allocate more than they were given.
//!
//! ```text
//! RecordMeta = block key 32 | layout 32 | shard u16 | namespace 32 | flags u8 | parent 32 if flag 1 | depth u32 |
//!              group u16 | semantic u8 | bytes u64 | checksum u64 | sequence u64 | tenant str | program str | model str
//! str        = length u16 | UTF-8
//! ```

use crc_fast::CrcAlgorithm;
use kvtier_types::{BlockHints, BlockKey, LayoutId, NamespaceId, SemanticType, ShardKey, TenantId};

use crate::store::{RecordMeta, StorageError};

const FLAG_PARENT: u8 = 1;
const FLAG_NEEDS_ANCESTORS: u8 = 2;

/// Longest encoding of a [`RecordMeta`] that [`check_meta`] lets pass.
pub(crate) const MAX_META_BYTES: usize = 32 * 4
    + 2
    + 1
    + 4
    + 2
    + 1
    + 8 * 3
    + 2 * 3
    + TenantId::MAX_BYTES
    + BlockHints::MAX_PROGRAM_ID_BYTES
    + RecordMeta::MAX_MODEL_BYTES;

/// Bytes that are not what the format says, and where it first showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Malformed(pub(crate) &'static str);

/// CRC-64/NVME of `bytes`.
pub(crate) fn crc64(bytes: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// Appends fields to a byte vector.
#[derive(Debug)]
pub(crate) struct Writer<'a>(pub(crate) &'a mut Vec<u8>);

impl Writer<'_> {
    pub(crate) fn u8(&mut self, n: u8) -> &mut Self {
        self.0.push(n);
        self
    }

    pub(crate) fn u16(&mut self, n: u16) -> &mut Self {
        self.raw(&n.to_le_bytes())
    }

    pub(crate) fn u32(&mut self, n: u32) -> &mut Self {
        self.raw(&n.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, n: u64) -> &mut Self {
        self.raw(&n.to_le_bytes())
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Strings are checked against their bounds by [`check_meta`] before they get here.
    fn text(&mut self, text: &str) -> &mut Self {
        let len = u16::try_from(text.len()).expect("check_meta bounds every string below 64 KiB");
        self.u16(len).raw(text.as_bytes())
    }

    /// A shard key: 66 bytes.
    pub(crate) fn key(&mut self, key: &ShardKey) -> &mut Self {
        self.raw(key.block.as_bytes()).raw(key.layout.as_bytes()).u16(key.shard)
    }

    /// A record's meta, which has passed [`check_meta`].
    pub(crate) fn meta(&mut self, meta: &RecordMeta) -> &mut Self {
        let parent = if meta.parent.is_some() { FLAG_PARENT } else { 0 };
        let needs = if meta.needs_ancestors { FLAG_NEEDS_ANCESTORS } else { 0 };
        self.key(&meta.key).raw(meta.namespace.as_bytes()).u8(parent | needs);
        if let Some(parent) = &meta.parent {
            self.raw(parent.as_bytes());
        }
        self.u32(meta.depth_blocks).u16(meta.group).u8(meta.hints.semantic as u8);
        self.u64(meta.bytes).u64(meta.checksum).u64(meta.sequence);
        self.text(meta.tenant.as_str()).text(&meta.hints.program_id).text(&meta.model)
    }
}

/// Takes fields off a byte slice.
#[derive(Debug)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn raw(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(Malformed("ends within a field"))?;
        self.0 = tail;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, tail) = self.0.split_first_chunk().ok_or(Malformed("ends within a field"))?;
        self.0 = tail;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        self.array::<1>().map(|[b]| b)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<&'a str, Malformed> {
        let len = usize::from(self.u16()?);
        std::str::from_utf8(self.raw(len)?).map_err(|_| Malformed("a string is not UTF-8"))
    }

    pub(crate) fn key(&mut self) -> Result<ShardKey, Malformed> {
        Ok(ShardKey { block: BlockKey::new(self.array()?), layout: LayoutId::new(self.array()?), shard: self.u16()? })
    }

    pub(crate) fn meta(&mut self) -> Result<RecordMeta, Malformed> {
        let key = self.key()?;
        let namespace = NamespaceId::new(self.array()?);
        let flags = self.u8()?;
        if flags & !(FLAG_PARENT | FLAG_NEEDS_ANCESTORS) != 0 {
            return Err(Malformed("unknown record flags"));
        }
        let parent = if flags & FLAG_PARENT != 0 { Some(BlockKey::new(self.array()?)) } else { None };
        let (depth_blocks, group, semantic) = (self.u32()?, self.u16()?, self.u8()?);
        let (bytes, checksum, sequence) = (self.u64()?, self.u64()?, self.u64()?);
        let tenant = TenantId::new(self.text()?).map_err(|_| Malformed("bad tenant id"))?;
        let hints = BlockHints { program_id: self.text()?.to_owned(), semantic: SemanticType::from_number(semantic) };
        let model = self.text()?.to_owned();
        let needs_ancestors = flags & FLAG_NEEDS_ANCESTORS != 0;
        let meta = RecordMeta {
            key,
            namespace,
            tenant,
            hints,
            parent,
            depth_blocks,
            group,
            needs_ancestors,
            model,
            bytes,
            checksum,
            sequence,
        };
        check_meta(&meta).map_err(|_| Malformed("a field is longer than its bound"))?;
        Ok(meta)
    }

    /// That nothing but zeros is left: padding is part of the format.
    pub(crate) fn finish(&self) -> Result<(), Malformed> {
        if self.0.iter().all(|&b| b == 0) { Ok(()) } else { Err(Malformed("bytes after the last field")) }
    }
}

/// That `meta` can be encoded: every variable field within its bound.
///
/// # Errors
/// [`StorageError::Refused`], naming the field.
pub(crate) fn check_meta(meta: &RecordMeta) -> Result<(), StorageError> {
    let bounds = [
        ("program id", meta.hints.program_id.len(), BlockHints::MAX_PROGRAM_ID_BYTES),
        ("model name", meta.model.len(), RecordMeta::MAX_MODEL_BYTES),
    ];
    for (what, len, max) in bounds {
        if len > max {
            return Err(StorageError::Refused { what: format!("{what} of {len} bytes, the most is {max}") });
        }
    }
    if meta.bytes == 0 {
        return Err(StorageError::Refused { what: "an empty payload".into() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::*;
    use crate::conformance::meta;

    #[test]
    fn meta_round_trips() {
        let mut record = meta(3, b"x");
        for parent in [None, Some(BlockKey::new([9; 32]))] {
            record.parent = parent;
            record.model = "m".repeat(RecordMeta::MAX_MODEL_BYTES);
            let mut bytes = Vec::new();
            Writer(&mut bytes).meta(&record);
            assert!(bytes.len() <= MAX_META_BYTES);
            let mut reader = Reader(&bytes);
            assert_eq!(reader.meta().unwrap(), record);
            reader.finish().unwrap();
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut record = meta(3, b"x");
        record.model = "m".repeat(RecordMeta::MAX_MODEL_BYTES + 1);
        assert!(matches!(check_meta(&record), Err(StorageError::Refused { .. })));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _meta = Reader(&bytes).meta();
        }

        #[test]
        fn a_flipped_byte_never_panics(at in 0usize..300, with in 1u8..) {
            let mut bytes = Vec::new();
            Writer(&mut bytes).meta(&meta(1, b"payload"));
            let at = at % bytes.len();
            bytes[at] ^= with;
            let _meta = Reader(&bytes).meta();
        }
    }
}
