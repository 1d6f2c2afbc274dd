//! Byte-level encoding shared by records, footers, packs and the journal: little-endian fields, length-prefixed strings,
//! CRC-64/NVME. Decoders take whatever a medium returns: they never panic and never allocate more than they were given.
//!
//! ```text
//! RecordMeta = block key 32 | layout 32 | shard u16 | namespace 32 | flags u8 | parent 32 if flag 1 | depth u32 |
//!              group u16 | semantic u8 | bytes u64 | checksum u64 | sequence u64 | expires u64, ms since 1970, 0 for never |
//!              tenant str | program str | model str | taints
//! taints     = count u8 | (effect u8 | span u64, ms | key str | value str) each
//! str        = length u16 | UTF-8
//! ```

use std::time::Duration;

use crc_fast::CrcAlgorithm;
use kvtier_types::{BlockHints, BlockKey, Effect, LayoutId, NamespaceId, SemanticType, ShardKey, Taint, TenantId};

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
    + 8 * 4
    + 2 * 3
    + TenantId::MAX_BYTES
    + BlockHints::MAX_PROGRAM_ID_BYTES
    + RecordMeta::MAX_MODEL_BYTES
    + MAX_TAINTS_BYTES;

/// Longest encoding of a block's taints.
pub(crate) const MAX_TAINTS_BYTES: usize = 1 + Taint::MAX_PER_BLOCK * (1 + 8 + 2 * (2 + Taint::MAX_PART_BYTES));

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
    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
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
        self.u64(meta.expires_ms.unwrap_or(0));
        self.text(meta.tenant.as_str()).text(&meta.hints.program_id).text(&meta.model).taints(&meta.hints.taints)
    }

    /// A block's taints, at most [`Taint::MAX_PER_BLOCK`].
    pub(crate) fn taints(&mut self, taints: &[Taint]) -> &mut Self {
        self.u8(u8::try_from(taints.len()).expect("check_meta bounds a block's taints"));
        for taint in taints {
            let span = if let Effect::Ephemeral(span) = taint.effect { span } else { Duration::ZERO };
            self.u8(u8::try_from(taint.effect.index()).expect("there are few effects"));
            self.u64(u64::try_from(span.as_millis()).unwrap_or(u64::MAX)).text(&taint.key).text(&taint.value);
        }
        self
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

    pub(crate) fn text(&mut self) -> Result<&'a str, Malformed> {
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
        let expires_ms = Some(self.u64()?).filter(|at| *at > 0);
        let tenant = TenantId::new(self.text()?).map_err(|_| Malformed("bad tenant id"))?;
        let program_id = self.text()?.to_owned();
        let model = self.text()?.to_owned();
        let hints = BlockHints { program_id, semantic: SemanticType::from_number(semantic), taints: self.taints()? };
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
            expires_ms,
        };
        check_meta(&meta).map_err(|_| Malformed("a field is longer than its bound"))?;
        Ok(meta)
    }

    /// A block's taints.
    pub(crate) fn taints(&mut self) -> Result<Vec<Taint>, Malformed> {
        let count = usize::from(self.u8()?);
        if count > Taint::MAX_PER_BLOCK {
            return Err(Malformed("more taints than a block may have"));
        }
        let mut taints = Vec::with_capacity(count);
        for _ in 0..count {
            let (index, span) = (usize::from(self.u8()?), Duration::from_millis(self.u64()?));
            let effect = Effect::from_index(index, span).ok_or(Malformed("unknown effect of a taint"))?;
            let (key, value) = (self.text()?, self.text()?);
            taints.push(Taint::new(key, value, effect).map_err(|_| Malformed("bad taint"))?);
        }
        Ok(taints)
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
    let (taints, max) = (&meta.hints.taints, Taint::MAX_PER_BLOCK);
    if taints.len() > max {
        return Err(StorageError::Refused { what: format!("{} taints, the most is {max}", taints.len()) });
    }
    if let Some(bad) = taints.iter().find(|t| Taint::new(&t.key, &t.value, t.effect).is_err()) {
        return Err(StorageError::Refused { what: format!("the taint {bad}") });
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
        let part = "k".repeat(Taint::MAX_PART_BYTES);
        let longest = Taint::new(&part, &part, Effect::Ephemeral(Duration::from_secs(9))).unwrap();
        for (parent, taints) in
            [(None, Vec::new()), (Some(BlockKey::new([9; 32])), vec![longest; Taint::MAX_PER_BLOCK])]
        {
            record.parent = parent;
            record.expires_ms = parent.map(|_| 1_700_000_000_000);
            record.hints.taints = taints;
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
