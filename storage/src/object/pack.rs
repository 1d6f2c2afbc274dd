//! The format of a pack: an immutable object that holds a run of records and describes itself.
//!
//! ```text
//! pack     = record* | footer | trailer 48                         nothing is aligned, every number little-endian
//! record   = header | payload
//! header   = magic u32 "KVTR" | header bytes u32 | meta | CRC-64 u64 of what precedes it
//! footer   = life 16 | ordinal u64 | count u32 | (offset u64 | header bytes u32 | meta)*
//! trailer  = magic 8 "KVTPACK\0" | version u32 | footer bytes u64 | pack bytes u64 | CRC-64 u64 of the footer |
//!            reserved u32 = 0 | CRC-64 u64 of what precedes it
//! name     = <prefix>/v2/<first 2 digits>/<BLAKE3 of the footer, 64 digits>.pack
//! ```
//! `meta` and the CRC (CRC-64/NVME) are those of [`crate::codec`]. `life` is drawn once per opening and `ordinal` counts
//! its packs, so two attempts to store the same records never share a name: deleting one cannot take the other away.
//!
//! *Invariants*: records are contiguous from byte 0 to the footer; a decoder accepts nothing else, and never panics
//! (`random_bytes_never_panic`, `any_flipped_byte_is_noticed`).

use kvtier_types::ShardKey;
use object_store::path::Path;

use crate::codec::{MAX_META_BYTES, Malformed, Reader, Writer, crc64};
use crate::store::{Expect, RecordMeta};

/// Length of a trailer.
pub(super) const TRAILER_LEN: usize = 48;
/// Length of a trailer.
pub(super) const TRAILER_BYTES: u64 = TRAILER_LEN as u64;
/// Length of a footer before its entries.
const FOOTER_FIXED_BYTES: u64 = 16 + 8 + 4;
/// Length of a footer's entry before its meta.
const ENTRY_FIXED_BYTES: u64 = 8 + 4;
/// What a pack weighs beyond its records and their entries.
pub(super) const PACK_FIXED_BYTES: u64 = FOOTER_FIXED_BYTES + TRAILER_BYTES;
/// Longest header that [`record_header`] makes.
const MAX_HEADER_BYTES: usize = 4 + 4 + MAX_META_BYTES + 8;
/// The version this code writes and reads; the `v2` of the names, so that packs of another version are not even listed.
const VERSION: u32 = 2;
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"KVTR");
const TRAILER_MAGIC: [u8; 8] = *b"KVTPACK\0";

/// A pack's name: BLAKE3 of its footer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PackName(pub(super) [u8; 32]);

impl PackName {
    /// The name of the pack with this footer.
    pub(super) fn of(footer: &[u8]) -> Self {
        Self(*blake3::hash(footer).as_bytes())
    }

    /// Where it lies below `root` (which ends in `v2`).
    pub(super) fn path(&self, root: &Path) -> Path {
        let digits = hex::encode(self.0);
        root.clone().join(&digits[..2]).join(format!("{digits}.pack"))
    }

    /// The name of the pack at `path`, `None` for what is not a pack's path below `root`.
    pub(super) fn parse(root: &Path, path: &Path) -> Option<Self> {
        let mut parts = path.prefix_match(root)?;
        let (shelf, file) = (parts.next()?, parts.next()?);
        let digits = file.as_ref().strip_suffix(".pack")?;
        let mut name = [0; 32];
        hex::decode_to_slice(digits, &mut name).ok()?;
        let ours = parts.next().is_none() && digits.starts_with(shelf.as_ref()) && shelf.as_ref().len() == 2;
        (ours && hex::encode(name) == digits).then_some(Self(name))
    }
}

/// One record of a pack, as its footer tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Byte offset of its header in the pack.
    pub(super) offset: u64,
    /// Length of its header.
    pub(super) header_bytes: u32,
    /// What it says of its payload.
    pub(super) meta: RecordMeta,
}

impl Entry {
    /// Length of header and payload.
    pub(super) fn record_bytes(&self) -> u64 {
        u64::from(self.header_bytes).saturating_add(self.meta.bytes)
    }
}

/// What the footer's entry of a record weighs whose header has `header_bytes` bytes.
pub(super) fn entry_bytes(header_bytes: u64) -> u64 {
    ENTRY_FIXED_BYTES + header_bytes.saturating_sub(4 + 4 + 8)
}

/// Which pack of which opening: makes a pack's name unique.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PackId {
    /// Drawn once per opening.
    pub(super) life: [u8; 16],
    /// Counts the packs of that opening.
    pub(super) ordinal: u64,
}

/// The header of a record; `meta` has passed [`crate::codec::check_meta`].
pub(super) fn record_header(meta: &RecordMeta) -> Vec<u8> {
    let mut header = Vec::with_capacity(MAX_HEADER_BYTES);
    Writer(&mut header).u32(RECORD_MAGIC).u32(0).meta(meta);
    let bytes = u32::try_from(header.len() + 8).expect("a header has less than MAX_HEADER_BYTES");
    header[4..8].copy_from_slice(&bytes.to_le_bytes());
    let crc = crc64(&header);
    Writer(&mut header).u64(crc);
    header
}

/// Checks the header of a record, which is the whole of `bytes`.
pub(super) fn check_header(bytes: &[u8]) -> Result<RecordMeta, Malformed> {
    let (body, crc) = bytes.split_last_chunk::<8>().ok_or(Malformed("ends within the record header"))?;
    let mut reader = Reader(body);
    if reader.u32()? != RECORD_MAGIC {
        return Err(Malformed("not a record header"));
    }
    if u64::from(reader.u32()?) != bytes.len() as u64 {
        return Err(Malformed("record header of another length"));
    }
    if crc64(body) != u64::from_le_bytes(*crc) {
        return Err(Malformed("record header fails its checksum"));
    }
    let meta = reader.meta()?;
    if reader.0.is_empty() { Ok(meta) } else { Err(Malformed("bytes after the record header's last field")) }
}

/// The footer of a pack.
pub(super) fn encode_footer(id: PackId, entries: &[Entry]) -> Vec<u8> {
    let count = u32::try_from(entries.len()).expect("a pack is sealed long before it has 2^32 records");
    let mut footer = Vec::new();
    Writer(&mut footer).raw(&id.life).u64(id.ordinal).u32(count);
    for entry in entries {
        Writer(&mut footer).u64(entry.offset).u32(entry.header_bytes).meta(&entry.meta);
    }
    footer
}

/// The trailer of a pack whose records take `records_bytes`.
pub(super) fn encode_trailer(footer: &[u8], records_bytes: u64) -> Vec<u8> {
    let footer_bytes = footer.len() as u64;
    let mut trailer = Vec::new();
    Writer(&mut trailer)
        .raw(&TRAILER_MAGIC)
        .u32(VERSION)
        .u64(footer_bytes)
        .u64(records_bytes + footer_bytes + TRAILER_BYTES)
        .u64(crc64(footer))
        .u32(0);
    let crc = crc64(&trailer);
    Writer(&mut trailer).u64(crc);
    trailer
}

/// A checked trailer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trailer {
    /// Length of the footer before it.
    pub(super) footer_bytes: u64,
    footer_crc: u64,
}

impl Trailer {
    /// Checks the last [`TRAILER_BYTES`] bytes of a pack that is `pack_bytes` long.
    pub(super) fn decode(bytes: &[u8], pack_bytes: u64) -> Result<Self, Malformed> {
        let (body, crc) = bytes.split_last_chunk::<8>().ok_or(Malformed("ends within the trailer"))?;
        let mut reader = Reader(body);
        if reader.array::<8>()? != TRAILER_MAGIC {
            return Err(Malformed("no trailer: truncated, or not a pack"));
        }
        if crc64(body) != u64::from_le_bytes(*crc) {
            return Err(Malformed("the trailer fails its checksum"));
        }
        if reader.u32()? != VERSION {
            return Err(Malformed("a pack of another version"));
        }
        let (footer_bytes, total, footer_crc) = (reader.u64()?, reader.u64()?, reader.u64()?);
        if total != pack_bytes || footer_bytes > pack_bytes.saturating_sub(TRAILER_BYTES) {
            return Err(Malformed("the trailer tells other lengths"));
        }
        Ok(Self { footer_bytes, footer_crc })
    }

    /// Checks the footer of the pack `name`, and returns its records.
    pub(super) fn decode_footer(
        &self,
        name: &PackName,
        footer: &[u8],
        records_bytes: u64,
    ) -> Result<Vec<Entry>, Malformed> {
        if footer.len() as u64 != self.footer_bytes || crc64(footer) != self.footer_crc {
            return Err(Malformed("the footer fails its checksum"));
        }
        if PackName::of(footer) != *name {
            return Err(Malformed("the footer is not the one its name tells"));
        }
        decode_entries(footer, records_bytes)
    }
}

fn decode_entries(footer: &[u8], records_bytes: u64) -> Result<Vec<Entry>, Malformed> {
    let mut reader = Reader(footer);
    let (_life, _ordinal) = (reader.array::<16>()?, reader.u64()?);
    let count = reader.u32()?;
    let mut entries = Vec::new();
    let mut end = 0u64;
    for _ in 0..count {
        let (offset, header_bytes) = (reader.u64()?, reader.u32()?);
        let entry = Entry { offset, header_bytes, meta: reader.meta()? };
        if offset != end || header_bytes as usize > MAX_HEADER_BYTES {
            return Err(Malformed("records are not contiguous"));
        }
        end = offset.saturating_add(entry.record_bytes());
        entries.push(entry);
    }
    if end != records_bytes || !reader.0.is_empty() {
        return Err(Malformed("the footer does not account for every byte"));
    }
    Ok(entries)
}

/// Checks that `header` is that of `key`'s record with the given payload, and returns what it says.
pub(super) fn check_record(header: &[u8], key: &ShardKey, expect: Expect) -> Result<RecordMeta, Malformed> {
    let meta = check_header(header)?;
    if meta.key != *key {
        return Err(Malformed("the record of another key"));
    }
    if meta.expect() != expect {
        return Err(Malformed("the record of another payload"));
    }
    Ok(meta)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::*;
    use crate::conformance::meta;

    const ID: PackId = PackId { life: [7; 16], ordinal: 3 };

    /// A whole pack of two records, and where its footer begins.
    fn sample() -> (Vec<u8>, usize, PackName) {
        let mut pack = Vec::new();
        let mut entries = Vec::new();
        for (n, payload) in [(1, b"first".as_slice()), (2, b"the second")] {
            let meta = meta(n, payload);
            let header = record_header(&meta);
            let header_bytes = u32::try_from(header.len()).unwrap();
            entries.push(Entry { offset: pack.len() as u64, header_bytes, meta });
            pack.extend_from_slice(&header);
            pack.extend_from_slice(payload);
        }
        let footer = encode_footer(ID, &entries);
        let expected: u64 =
            entries.iter().map(|e| entry_bytes(u64::from(e.header_bytes))).sum::<u64>() + FOOTER_FIXED_BYTES;
        assert_eq!(footer.len() as u64, expected, "what is charged is what is written");
        let at = pack.len();
        let trailer = encode_trailer(&footer, at as u64);
        assert_eq!(trailer.len() as u64, TRAILER_BYTES);
        pack.extend_from_slice(&footer);
        pack.extend_from_slice(&trailer);
        (pack, at, PackName::of(&footer))
    }

    fn decode(pack: &[u8], name: &PackName) -> Result<Vec<Entry>, Malformed> {
        let split = pack.len().checked_sub(TRAILER_LEN).ok_or(Malformed("short"))?;
        let trailer = Trailer::decode(&pack[split..], pack.len() as u64)?;
        let footer_at = split - usize::try_from(trailer.footer_bytes).unwrap();
        trailer.decode_footer(name, &pack[footer_at..split], footer_at as u64)
    }

    #[test]
    fn packs_round_trip() {
        let (pack, _, name) = sample();
        let entries = decode(&pack, &name).unwrap();
        assert_eq!(entries.len(), 2);
        for entry in &entries {
            let at = usize::try_from(entry.offset).unwrap();
            let header = &pack[at..at + entry.header_bytes as usize];
            assert_eq!(check_header(header).unwrap(), entry.meta);
        }
    }

    #[test]
    fn names_round_trip_and_foreign_paths_are_not_ours() {
        let root = Path::from("a/b/v1");
        let name = PackName([0xab; 32]);
        assert_eq!(PackName::parse(&root, &name.path(&root)), Some(name));
        let digits = "ab".repeat(32);
        for foreign in [
            format!("a/b/v2/{digits}.pack"),
            format!("a/b/v2/cd/{digits}.pack"),
            format!("a/b/v2/ab/{digits}"),
            format!("a/b/v2/ab/{}.pack", digits.to_uppercase()),
            format!("a/b/v2/ab/x/{digits}.pack"),
            format!("a/v2/ab/{digits}.pack"),
            "a/b/v2/probe".to_owned(),
        ] {
            assert_eq!(PackName::parse(&root, &Path::from(foreign.as_str())), None, "{foreign}");
        }
    }

    #[test]
    fn another_version_is_told_from_garbage() {
        let (mut pack, _, name) = sample();
        let at = pack.len() - TRAILER_LEN;
        pack[at + 8] = 1;
        let crc_at = pack.len() - 8;
        let crc = crc64(&pack[at..crc_at]);
        pack[crc_at..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(decode(&pack, &name), Err(Malformed("a pack of another version")));
    }

    #[test]
    fn any_flipped_byte_is_noticed() {
        let (pack, footer_at, name) = sample();
        for at in footer_at..pack.len() {
            let mut bad = pack.clone();
            bad[at] ^= 0x10;
            assert!(decode(&bad, &name).is_err(), "byte {at} of footer or trailer");
        }
        let header_bytes = decode(&pack, &name).unwrap()[0].header_bytes as usize;
        for at in 0..header_bytes {
            let mut bad = pack.clone();
            bad[at] ^= 0x10;
            assert!(check_header(&bad[..header_bytes]).is_err(), "byte {at} of a record header");
        }
    }

    #[test]
    fn every_truncation_is_noticed() {
        let (pack, _, name) = sample();
        for len in 0..pack.len() {
            assert!(decode(&pack[..len], &name).is_err(), "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), total in any::<u64>()) {
            let _header = check_header(&bytes);
            let _trailer = Trailer::decode(&bytes, total);
            let _entries = decode_entries(&bytes, total);
        }

        #[test]
        fn a_footer_that_lies_never_panics(at in 0usize..4096, with in 1u8.., records in any::<u64>()) {
            let (pack, footer_at, _) = sample();
            let mut footer = pack[footer_at..pack.len() - TRAILER_LEN].to_vec();
            let at = at % footer.len();
            footer[at] ^= with;
            // Checksums made to fit: what is left are the structure's own checks.
            let trailer = encode_trailer(&footer, footer_at as u64);
            let trailer = Trailer::decode(&trailer, pack.len() as u64).unwrap();
            let name = PackName::of(&footer);
            let _entries = trailer.decode_footer(&name, &footer, footer_at as u64);
            let _entries = trailer.decode_footer(&name, &footer, records);
        }
    }
}
