//! Bytes of a file of tombstones.
//!
//! ```text
//! file     magic 8 "KVTDEAD\0" | version u32 | count of sections u32 | when the last was said u64, ms since 1970 |
//!          section* | CRC-64/NVME of what precedes it u64
//! section  writer str | count u32 | (first 8 bytes of BLAKE3 of the block key u64 | up to sequence u64)*
//! name     <root>/<node that wrote it>/evicted/<BLAKE3 of the file, 64 digits>.v1
//! ```
//! Numbers are little-endian; `str` is that of [`crate::codec`]. A file never changes.

use kvtier_types::NodeId;

use super::name::MAX_WRITERS;
use super::tombstones::{Sections, Tomb, Words};
use crate::codec::{Malformed, Reader, Writer, crc64};

const MAGIC: [u8; 8] = *b"KVTDEAD\0";
const VERSION: u32 = 1;
const TOMB_BYTES: usize = 16;
/// Most tombstones in a file.
pub(super) const MAX_IN_FILE: usize = 65_536;
/// Longest file: each tombstone may be of another writer.
pub(super) const MAX_FILE_BYTES: u64 = 24 + 8 + (MAX_IN_FILE * (TOMB_BYTES + 2 + NodeId::MAX_BYTES + 4)) as u64;

/// The file, and its digest.
pub(super) fn encode(words: &Words) -> ([u8; 32], Vec<u8>) {
    let mut out = Vec::new();
    let count = u32::try_from(words.sections.len()).expect("a file has at most MAX_IN_FILE sections");
    Writer(&mut out).raw(&MAGIC).u32(VERSION).u32(count).u64(words.said_ms);
    for (writer, tombs) in &words.sections {
        let count = u32::try_from(tombs.len()).expect("a file has at most MAX_IN_FILE tombstones");
        Writer(&mut out).text(writer.as_str()).u32(count);
        for tomb in tombs {
            Writer(&mut out).u64(tomb.block).u64(tomb.up_to_sequence);
        }
    }
    let crc = crc64(&out);
    Writer(&mut out).u64(crc);
    (*blake3::hash(&out).as_bytes(), out)
}

/// What a file says that has this digest in its name.
pub(super) fn decode(name: &[u8; 32], bytes: &[u8]) -> Result<Words, Malformed> {
    if blake3::hash(bytes) != *name {
        return Err(Malformed("not what its name says"));
    }
    let (body, crc) = bytes.split_last_chunk::<8>().ok_or(Malformed("shorter than a checksum"))?;
    if u64::from_le_bytes(*crc) != crc64(body) {
        return Err(Malformed("wrong checksum"));
    }
    let mut reader = Reader(body);
    if reader.array()? != MAGIC || reader.u32()? != VERSION {
        return Err(Malformed("not a file of tombstones that this build knows"));
    }
    let count = reader.u32()? as usize;
    if count > MAX_WRITERS {
        return Err(Malformed("more sections than there may be writers"));
    }
    let said_ms = reader.u64()?;
    let mut sections = Sections::new();
    for _ in 0..count {
        let writer = NodeId::new(reader.text()?).map_err(|_| Malformed("bad node id"))?;
        let count = reader.u32()? as usize;
        let mut tombs = Reader(reader.raw(count.saturating_mul(TOMB_BYTES))?);
        let of_writer = sections.entry(writer).or_default();
        while !tombs.0.is_empty() {
            of_writer.push(Tomb { block: tombs.u64()?, up_to_sequence: tombs.u64()? });
        }
    }
    if reader.0.is_empty() { Ok(Words { said_ms, sections }) } else { Err(Malformed("more bytes than sections")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Words {
        let tomb = |n: u64| Tomb { block: n, up_to_sequence: u64::MAX - n };
        let section = |name: &str, tombs: Vec<Tomb>| (NodeId::new(name).unwrap(), tombs);
        let sections = [section("a", vec![tomb(1), tomb(2)]), section("node-b.rack_1", vec![tomb(1)])];
        Words { said_ms: 1_700_000_000_000, sections: sections.into() }
    }

    #[test]
    fn files_round_trip() {
        for words in [Words::default(), sample()] {
            let (name, bytes) = encode(&words);
            assert_eq!(decode(&name, &bytes).unwrap(), words);
        }
    }

    #[test]
    fn any_flipped_or_missing_byte_is_noticed() {
        let (name, bytes) = encode(&sample());
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            // Under the name of the right file, and under its own.
            assert!(decode(&name, &flipped).is_err(), "byte {at}");
            assert!(decode(blake3::hash(&flipped).as_bytes(), &flipped).is_err(), "byte {at}");
            assert!(decode(blake3::hash(&bytes[..at]).as_bytes(), &bytes[..at]).is_err(), "{at} bytes");
        }
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let lie = |change: fn(&mut Vec<u8>)| {
            let (_, mut bytes) = encode(&sample());
            bytes.truncate(bytes.len() - 8);
            change(&mut bytes);
            let crc = crc64(&bytes);
            Writer(&mut bytes).u64(crc);
            decode(blake3::hash(&bytes).as_bytes(), &bytes)
        };
        assert!(lie(|_| {}).is_ok());
        assert!(lie(|bytes| bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes())).is_err(), "sections");
        assert!(lie(|bytes| bytes[27..31].copy_from_slice(&u32::MAX.to_le_bytes())).is_err(), "tombstones");
        assert!(lie(|bytes| bytes.push(0)).is_err(), "a byte more");
        assert!(lie(|bytes| bytes[8] = 2).is_err(), "another version");
    }
}
