//! A record: one page that says everything about the payload that follows it.
//!
//! ```text
//! page 0   magic 8 | version u32 | epoch u64 | offset in pages u32 | RecordMeta | zeros | CRC-64/NVME of the rest u64
//! page 1.. payload, zero-padded to a whole page
//! ```
//! The epoch is the segment's present life; the offset catches a write that landed elsewhere.

use crate::codec::{MAX_META_BYTES, Malformed, Reader, Writer, crc64};
use crate::store::RecordMeta;

/// Unit of every offset and length on disk: the alignment that direct I/O needs on every device.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Version of segment headers, records and footers together. A segment of another version is wiped.
pub(crate) const FORMAT_VERSION: u32 = 2;

const MAGIC: [u8; 8] = *b"KVTREC\0\n";
const CRC_AT: usize = PAGE_BYTES - 8;

const _: () = assert!(8 + 4 + 8 + 4 + MAX_META_BYTES <= CRC_AT, "the longest meta fits a header page");

/// A page with a checksum at its end: the form of every header on disk.
pub(crate) type Page = [u8; PAGE_BYTES];

/// What a header page says besides the meta.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) epoch: u64,
    /// Offset of the header page in its segment, in pages.
    pub(crate) offset: u32,
    pub(crate) meta: RecordMeta,
}

/// Pages that a payload of `bytes` fills.
pub(crate) const fn payload_pages(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_BYTES as u64)
}

/// Pages that a record with a payload of `bytes` fills, its header included.
pub(crate) const fn record_pages(bytes: u64) -> u64 {
    payload_pages(bytes) + 1
}

/// Puts `fields` into a page closed by its checksum. The caller has bounded the fields.
pub(crate) fn close_page(fields: &[u8]) -> Box<Page> {
    let mut page = Box::new([0; PAGE_BYTES]);
    page[..fields.len()].copy_from_slice(fields);
    let crc = crc64(&page[..CRC_AT]);
    page[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    page
}

/// The fields of a page, after magic, checksum and version were found right.
pub(crate) fn open_page<'a>(page: &'a [u8], magic: &[u8; 8]) -> Result<Reader<'a>, PageError> {
    let (fields, crc) = page.split_at_checked(CRC_AT).ok_or(Malformed("shorter than a page"))?;
    let mut reader = Reader(fields);
    if reader.raw(8)? != magic {
        return Err(Malformed("no magic number").into());
    }
    if Reader(crc).u64()? != crc64(fields) {
        return Err(Malformed("header checksum differs").into());
    }
    let version = reader.u32()?;
    if version != FORMAT_VERSION {
        return Err(PageError::Version(version));
    }
    Ok(reader)
}

/// Why a page is not what was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PageError {
    /// Not such a page, or damaged.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// An intact page of another version of the format.
    #[error("format version {0}, this build has {FORMAT_VERSION}")]
    Version(u32),
}

impl RecordHeader {
    /// The header page; `meta` has passed [`crate::codec::check_meta`].
    pub(crate) fn encode(&self) -> Box<Page> {
        let mut fields = Vec::with_capacity(512);
        let mut writer = Writer(&mut fields);
        writer.raw(&MAGIC).u32(FORMAT_VERSION).u64(self.epoch).u32(self.offset).meta(&self.meta);
        close_page(&fields)
    }

    pub(crate) fn decode(page: &[u8]) -> Result<Self, PageError> {
        let mut reader = open_page(page, &MAGIC)?;
        let (epoch, offset, meta) = (reader.u64()?, reader.u32()?, reader.meta()?);
        reader.finish()?;
        Ok(Self { epoch, offset, meta })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::*;
    use crate::conformance::meta;

    fn header() -> RecordHeader {
        RecordHeader { epoch: 7, offset: 9, meta: meta(1, b"payload") }
    }

    #[test]
    fn round_trips() {
        assert_eq!(RecordHeader::decode(&*header().encode()).unwrap(), header());
    }

    #[test]
    fn a_flip_of_any_byte_is_detected() {
        let good = header().encode();
        for at in 0..PAGE_BYTES {
            for with in [1, 0x80, 0xff] {
                let mut page = good.clone();
                page[at] ^= with;
                assert!(RecordHeader::decode(&*page).is_err(), "byte {at} ^ {with:#x}");
            }
        }
    }

    #[test]
    fn another_version_is_told_from_damage() {
        let mut fields = Vec::new();
        Writer(&mut fields).raw(&MAGIC).u32(FORMAT_VERSION + 1);
        assert_eq!(RecordHeader::decode(&*close_page(&fields)), Err(PageError::Version(FORMAT_VERSION + 1)));
    }

    proptest! {
        #[test]
        fn random_pages_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), valid in any::<bool>()) {
            if valid {
                // A right frame around random fields gets past the checksum.
                bytes.splice(0..0, MAGIC.into_iter().chain(FORMAT_VERSION.to_le_bytes()));
                assert!(RecordHeader::decode(&*close_page(&bytes)).is_err());
            }
            let _header = RecordHeader::decode(&bytes);
        }
    }
}
