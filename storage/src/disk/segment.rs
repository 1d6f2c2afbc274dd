//! A log segment: one preallocated file that is filled once per life, then sealed.
//!
//! ```text
//! page 0        header: magic | version | epoch u64 | segment u32 | bytes u64                        | crc
//! page 1..      records, back to back
//! before last   footer: per live record (offset in pages u32 | RecordMeta), zero-padded to a whole page
//! last page     trailer: magic | version | epoch u64 | segment u32 | footer page u32 | footer bytes u64 |
//!               entries u32 | CRC-64/NVME of the footer u64                                          | crc
//! ```
//! Every life has a fresh random epoch, written and synced before the life's first record: trailers and records of a
//! former life are recognized by theirs.
//!
//! *Bounds*: the footer is at most what the segment's records leave free; the writer counts its bytes as it appends.

use rustix::rand::{GetRandomFlags, getrandom};

use crate::codec::{MAX_META_BYTES, Malformed, Reader, Writer, crc64};
use crate::disk::record::{FORMAT_VERSION, PAGE_BYTES, Page, PageError, close_page, open_page};
use crate::store::RecordMeta;

const HEADER_MAGIC: [u8; 8] = *b"KVTSEG\0\n";
const TRAILER_MAGIC: [u8; 8] = *b"KVTFTR\0\n";

/// Smallest segment: room for a header, a trailer, a footer page and some records.
pub const MIN_SEGMENT_BYTES: u64 = 16 * PAGE_BYTES as u64;
/// Largest segment: keeps a footer of small records, and what is lost when one segment is damaged, within reason.
pub const MAX_SEGMENT_BYTES: u64 = 4 << 30;

/// Upper bound of one footer entry's bytes.
pub(crate) const MAX_ENTRY_BYTES: usize = 4 + MAX_META_BYTES;

/// First page of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) epoch: u64,
    pub(crate) segment: u32,
    pub(crate) bytes: u64,
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> Box<Page> {
        let mut fields = Vec::with_capacity(64);
        let mut writer = Writer(&mut fields);
        writer.raw(&HEADER_MAGIC).u32(FORMAT_VERSION).u64(self.epoch).u32(self.segment).u64(self.bytes);
        close_page(&fields)
    }

    pub(crate) fn decode(page: &[u8]) -> Result<Self, PageError> {
        let mut reader = open_page(page, &HEADER_MAGIC)?;
        let header = Self { epoch: reader.u64()?, segment: reader.u32()?, bytes: reader.u64()? };
        reader.finish()?;
        Ok(header)
    }
}

/// Last page of a sealed segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub(crate) epoch: u64,
    pub(crate) segment: u32,
    /// First page of the footer.
    pub(crate) footer_page: u32,
    pub(crate) footer_bytes: u64,
    pub(crate) entries: u32,
    pub(crate) footer_crc: u64,
}

impl Trailer {
    pub(crate) fn encode(&self) -> Box<Page> {
        let mut fields = Vec::with_capacity(64);
        let mut writer = Writer(&mut fields);
        writer.raw(&TRAILER_MAGIC).u32(FORMAT_VERSION).u64(self.epoch).u32(self.segment);
        writer.u32(self.footer_page).u64(self.footer_bytes).u32(self.entries).u64(self.footer_crc);
        close_page(&fields)
    }

    pub(crate) fn decode(page: &[u8]) -> Result<Self, PageError> {
        let mut reader = open_page(page, &TRAILER_MAGIC)?;
        let trailer = Self {
            epoch: reader.u64()?,
            segment: reader.u32()?,
            footer_page: reader.u32()?,
            footer_bytes: reader.u64()?,
            entries: reader.u32()?,
            footer_crc: reader.u64()?,
        };
        reader.finish()?;
        Ok(trailer)
    }
}

/// A record in a footer: its header page's offset in pages, and its meta.
pub(crate) type Entry = (u32, RecordMeta);

/// Bytes of one footer entry.
pub(crate) fn entry_bytes(meta: &RecordMeta) -> usize {
    let mut bytes = Vec::with_capacity(MAX_ENTRY_BYTES);
    Writer(&mut bytes).u32(0).meta(meta);
    bytes.len()
}

/// Pages that footer entries of `footer_bytes` and the trailer take at the end of a segment.
pub(crate) const fn tail_pages(footer_bytes: u64) -> u64 {
    footer_bytes.div_ceil(PAGE_BYTES as u64) + 1
}

/// The footer and trailer of a segment, to be written together at its end: whole pages.
pub(crate) fn encode_tail(header: &SegmentHeader, entries: &[Entry]) -> Vec<u8> {
    let mut tail = Vec::with_capacity(entries.len() * 256 + PAGE_BYTES);
    for (offset, meta) in entries {
        Writer(&mut tail).u32(*offset).meta(meta);
    }
    let footer_bytes = tail.len() as u64;
    let footer_crc = crc64(&tail);
    tail.resize(tail.len().next_multiple_of(PAGE_BYTES), 0);
    let pages = header.bytes / PAGE_BYTES as u64;
    let trailer = Trailer {
        epoch: header.epoch,
        segment: header.segment,
        footer_page: page_number(pages - tail_pages(footer_bytes)),
        footer_bytes,
        entries: u32::try_from(entries.len()).expect("a segment has fewer than 2^32 pages, so fewer entries"),
        footer_crc,
    };
    tail.extend_from_slice(&*trailer.encode());
    tail
}

/// The entries of a footer, all checked to lie before it.
pub(crate) fn decode_footer(trailer: &Trailer, footer: &[u8]) -> Result<Vec<Entry>, Malformed> {
    if crc64(footer) != trailer.footer_crc {
        return Err(Malformed("footer checksum differs"));
    }
    let mut reader = Reader(footer);
    let mut entries = Vec::new();
    for _ in 0..trailer.entries {
        let offset = reader.u32()?;
        let meta = reader.meta()?;
        let end = u64::from(offset).checked_add(crate::disk::record::record_pages(meta.bytes));
        if offset == 0 || end.is_none_or(|end| end > u64::from(trailer.footer_page)) {
            return Err(Malformed("a footer entry lies outside the records"));
        }
        entries.push((offset, meta));
    }
    reader.finish()?;
    Ok(entries)
}

/// A page count or offset within a segment, which [`MAX_SEGMENT_BYTES`] keeps in 32 bits.
pub(crate) fn page_number(pages: u64) -> u32 {
    u32::try_from(pages).expect("segments have fewer than 2^32 pages")
}

/// Name of a segment's file.
pub(crate) fn file_name(segment: u32) -> String {
    format!("segment-{segment:05}.kvt")
}

/// The segment that a file name says, if it is one of ours.
pub(crate) fn parse_file_name(name: &str) -> Option<u32> {
    let number: u32 = name.strip_prefix("segment-")?.strip_suffix(".kvt")?.parse().ok()?;
    (file_name(number) == name).then_some(number)
}

/// A random non-zero number for a new life of a segment. Opens no file: a free segment is used again though the process has
/// no descriptors left.
///
/// # Errors
/// The system's error when its random source cannot be read.
pub(crate) fn fresh_epoch() -> std::io::Result<u64> {
    let mut bytes = [0u8; 8];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())?;
    }
    Ok(u64::from_le_bytes(bytes).max(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::*;
    use crate::conformance::meta;

    const HEADER: SegmentHeader = SegmentHeader { epoch: 5, segment: 3, bytes: 1 << 20 };

    fn split(tail: &[u8]) -> (Trailer, &[u8]) {
        let trailer = Trailer::decode(&tail[tail.len() - PAGE_BYTES..]).unwrap();
        (trailer, &tail[..usize::try_from(trailer.footer_bytes).unwrap()])
    }

    fn entries() -> Vec<Entry> {
        (0..40u32).map(|n| (1 + n * 3, meta(u64::from(n), b"payload"))).collect()
    }

    #[test]
    fn pages_round_trip_and_flips_are_detected() {
        let header = HEADER.encode();
        assert_eq!(SegmentHeader::decode(&*header), Ok(HEADER));
        let tail = encode_tail(&HEADER, &entries());
        let trailer = &tail[tail.len() - PAGE_BYTES..];
        for at in 0..PAGE_BYTES {
            let mut page = header.clone();
            page[at] ^= 0x10;
            assert!(SegmentHeader::decode(&*page).is_err());
            page.copy_from_slice(trailer);
            page[at] ^= 0x10;
            assert!(Trailer::decode(&*page).is_err());
        }
    }

    #[test]
    fn footers_round_trip_and_flips_are_detected() {
        let tail = encode_tail(&HEADER, &entries());
        let (trailer, footer) = split(&tail);
        assert_eq!(u64::from(trailer.footer_page) * PAGE_BYTES as u64 + tail.len() as u64, HEADER.bytes);
        assert_eq!(decode_footer(&trailer, footer).unwrap(), entries());
        for at in 0..footer.len() {
            let mut flipped = footer.to_vec();
            flipped[at] ^= 1;
            assert!(decode_footer(&trailer, &flipped).is_err(), "byte {at}");
        }
    }

    #[test]
    fn entry_sizes_are_exact() {
        let total: usize = entries().iter().map(|(_, meta)| entry_bytes(meta)).sum();
        let tail = encode_tail(&HEADER, &entries());
        assert_eq!(split(&tail).0.footer_bytes, total as u64);
        assert_eq!(tail.len(), usize::try_from(tail_pages(total as u64)).unwrap() * PAGE_BYTES);
    }

    #[test]
    fn file_names() {
        assert_eq!(parse_file_name(&file_name(12)), Some(12));
        assert_eq!(parse_file_name(&file_name(1_234_567)), Some(1_234_567));
        for other in ["segment-1.kvt", "segment-00001", "lock", "segment--0001.kvt"] {
            assert_eq!(parse_file_name(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn random_footers_never_panic(footer in proptest::collection::vec(any::<u8>(), 0..600), count in any::<u32>()) {
            let trailer = Trailer {
                epoch: 1,
                segment: 0,
                footer_page: 100,
                footer_bytes: footer.len() as u64,
                entries: count,
                footer_crc: crc64(&footer),
            };
            let _entries = decode_footer(&trailer, &footer);
        }
    }
}
