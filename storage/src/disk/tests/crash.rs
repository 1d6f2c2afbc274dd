//! Crash images: an unsealed or sealed segment file, cut, torn or flipped at every page, then opened again.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::{Strategy, any, prop_assert, proptest};
use proptest::test_runner::Config;

use super::*;
use crate::conformance::{meta, payload};
use crate::disk::record::FORMAT_VERSION;
use crate::disk::segment::{SegmentHeader, file_name};

/// A small segment, so that every page can be torn.
const SEGMENT_BYTES: u64 = 64 * PAGE_BYTES as u64;

pub(super) struct Image {
    pub(super) _dir: tempfile::TempDir,
    pub(super) config: DiskConfig,
    pub(super) path: PathBuf,
    pub(super) bytes: Vec<u8>,
    /// Metas in the order of writing.
    pub(super) metas: Vec<RecordMeta>,
}

impl Image {
    /// One segment with records; sealed by a close, or left as a crash leaves it.
    async fn new(lens: &[usize], sealed: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = DiskConfig { segment_bytes: SEGMENT_BYTES, io: IoEngine::Threads, ..config(dir.path(), 1) };
        let config = DiskConfig { capacity_bytes: 2 * SEGMENT_BYTES, ..config };
        let (store, _) = DiskStore::open(&config).unwrap();
        let mut metas = Vec::new();
        for (n, len) in lens.iter().enumerate() {
            let (meta, at) = put(&store, n as u64, *len).await.unwrap();
            assert_eq!(at.segment, 0, "the image is one segment");
            metas.push(meta);
        }
        if sealed {
            store.close(Duration::from_secs(10)).await.unwrap();
        }
        drop(store);
        let path = config.dir.join(file_name(0));
        let bytes = fs::read(&path).unwrap();
        Self { _dir: dir, config, path, bytes, metas }
    }

    /// Opens with `bytes` as the segment: every record found is whole and was written. How many there are.
    async fn open(&self, bytes: &[u8]) -> Vec<u64> {
        fs::write(&self.path, bytes).unwrap();
        let (store, recovered) = DiskStore::open(&self.config).unwrap();
        let mut found = Vec::new();
        for (meta, at) in &recovered.records {
            let n = usize::try_from(meta.sequence).unwrap();
            assert_eq!(self.metas.get(n), Some(meta), "a record nobody wrote");
            // Payloads under a footer are found out by the read.
            match get(&store, meta.sequence, meta, *at).await {
                Ok(()) => found.push(meta.sequence),
                Err(StorageError::Corrupt { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
        assert!(recovered.next_sequence <= self.metas.len() as u64);
        found
    }
}

const LENS: [usize; 7] = [5000, 4096, 1, 20_000, 8192, 12_289, 9000];

#[tokio::test]
async fn a_whole_image_is_found_sealed_or_not() {
    for sealed in [false, true] {
        let image = Image::new(&LENS, sealed).await;
        assert_eq!(image.open(&image.bytes).await.len(), LENS.len());
    }
}

#[tokio::test]
async fn an_unsealed_segment_torn_at_any_page_leaves_a_prefix() {
    let image = Image::new(&LENS, false).await;
    let mut seen = std::collections::BTreeSet::new();
    for page in 0..image.bytes.len() / PAGE_BYTES {
        // What comes after the tear was never written, or something else lies there; or the tear is inside the page.
        for (from, with) in [(0, 0u8), (0, 0xa5), (512, 0), (4088, 0xff)] {
            let mut bytes = image.bytes.clone();
            bytes[page * PAGE_BYTES + from..].fill(with);
            let found = image.open(&bytes).await;
            let prefix: Vec<u64> = (0..found.len() as u64).collect();
            assert_eq!(found, prefix, "torn at page {page} + {from} with {with:#x}");
            seen.insert(found.len());
        }
    }
    assert_eq!(seen.len(), LENS.len() + 1, "every prefix came up");
}

#[tokio::test]
async fn a_segment_cut_short_is_dropped() {
    let image = Image::new(&LENS, true).await;
    for pages in [0, 1, 5, 63] {
        assert!(image.open(&image.bytes[..pages * PAGE_BYTES]).await.is_empty(), "{pages} pages");
    }
}

#[tokio::test]
async fn a_page_lost_in_the_middle_costs_no_wrong_bytes() {
    for sealed in [false, true] {
        let image = Image::new(&LENS, sealed).await;
        for page in 1..image.bytes.len() / PAGE_BYTES {
            let mut bytes = image.bytes.clone();
            bytes[page * PAGE_BYTES..(page + 1) * PAGE_BYTES].fill(0);
            let found = image.open(&bytes).await;
            assert!(!sealed || found.len() + 1 >= LENS.len(), "a sealed segment loses one record at most: page {page}");
        }
    }
}

#[tokio::test]
async fn records_of_a_former_life_are_never_accepted() {
    let former = Image::new(&LENS, true).await;
    let present = Image::new(&LENS[..2], false).await;
    // The present life's first records over a former life's file: its later records and its footer are still there.
    let written = (1 + 3 + 2) * PAGE_BYTES;
    let mut bytes = former.bytes.clone();
    bytes[..written].copy_from_slice(&present.bytes[..written]);
    assert_eq!(present.open(&bytes).await, [0, 1]);
    // A new life that wrote nothing yet.
    let mut bytes = former.bytes.clone();
    bytes[..PAGE_BYTES].copy_from_slice(&present.bytes[..PAGE_BYTES]);
    assert!(present.open(&bytes).await.is_empty());
}

#[tokio::test]
async fn a_segment_of_another_version_or_place_is_wiped() {
    let image = Image::new(&LENS, true).await;
    let header = SegmentHeader::decode(&image.bytes[..PAGE_BYTES]).unwrap();
    let elsewhere = SegmentHeader { segment: 1, ..header }.encode();
    let mut newer = header.encode();
    newer[8..12].copy_from_slice(&(FORMAT_VERSION + 1).to_le_bytes());
    let crc = crate::codec::crc64(&newer[..PAGE_BYTES - 8]);
    newer[PAGE_BYTES - 8..].copy_from_slice(&crc.to_le_bytes());
    for (page, word) in [(newer, "version"), (elsewhere, "written as segment 1")] {
        let mut bytes = image.bytes.clone();
        bytes[..PAGE_BYTES].copy_from_slice(&*page);
        fs::write(&image.path, &bytes).unwrap();
        let (_store, recovered) = DiskStore::open(&image.config).unwrap();
        assert!(recovered.records.is_empty());
        assert!(recovered.cut[0].contains(word), "{:?}", recovered.cut);
        assert!(!image.path.exists());
    }
}

#[tokio::test]
async fn what_changes_on_disk_under_an_open_store_is_found_out() {
    let image = Image::new(&LENS, true).await;
    let (store, recovered) = DiskStore::open(&image.config).unwrap();
    for (meta, at) in &recovered.records {
        let start = usize::try_from(at.offset).unwrap() * PAGE_BYTES;
        let payload_end = start + PAGE_BYTES + usize::try_from(meta.bytes).unwrap();
        for byte in [start, start + 30, start + PAGE_BYTES - 1, start + PAGE_BYTES, payload_end - 1] {
            let mut bytes = image.bytes.clone();
            bytes[byte] ^= 4;
            fs::write(&image.path, &bytes).unwrap();
            let result = get(&store, meta.sequence, meta, *at).await;
            assert!(matches!(result, Err(StorageError::Corrupt { .. })), "byte {byte}: {result:?}");
        }
        fs::write(&image.path, &image.bytes).unwrap();
        get(&store, meta.sequence, meta, *at).await.unwrap();
    }
}

#[tokio::test]
async fn a_former_record_of_the_same_key_in_the_same_place_is_not_taken_for_the_present_one() {
    // Two lives wrote the same records: only the epoch tells them apart.
    let (one, two) = (Image::new(&LENS, true).await, Image::new(&LENS, true).await);
    let mut mixed = two.bytes.clone();
    mixed[PAGE_BYTES..4 * PAGE_BYTES].copy_from_slice(&one.bytes[PAGE_BYTES..4 * PAGE_BYTES]);
    assert_eq!(two.open(&mixed).await, [1, 2, 3, 4, 5, 6]);
}

/// Damage to an image: (page, offset in it, length, value to xor with).
fn damage() -> impl Strategy<Value = Vec<(usize, usize, usize, u8)>> {
    proptest::collection::vec((0usize..64, 0usize..PAGE_BYTES, 1usize..9000, 1u8..), 1..4)
}

proptest! {
    #![proptest_config(Config { cases: 64, ..Config::default() })]

    #[test]
    fn any_damage_leaves_only_right_bytes(
        lens in proptest::collection::vec(1usize..20_000, 1..8),
        sealed in any::<bool>(),
        damage in damage(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let image = Image::new(&lens, sealed).await;
            let mut bytes = image.bytes.clone();
            for (page, at, len, with) in damage {
                let start = page * PAGE_BYTES + at;
                let end = (start + len).min(bytes.len());
                bytes[start..end].iter_mut().for_each(|b| *b ^= with);
            }
            // `open` checks every byte that is found.
            let found = image.open(&bytes).await;
            prop_assert!(found.len() <= lens.len());
            Ok(())
        })?;
    }
}

#[test]
fn payloads_of_tests_differ() {
    assert_ne!(payload(1, 100), payload(2, 100));
    assert_ne!(meta(1, b"x").key, meta(2, b"x").key);
}
