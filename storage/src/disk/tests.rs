//! The conformance suite over every engine, and what the disk alone promises.

use std::path::Path;

use super::*;
use crate::conformance::{Fixture, Opened, get, put, suite};
use crate::io::IoEngine;

mod crash;
mod faults;
mod speed;

/// A tier of 1 MiB segments.
pub(super) fn config(dir: &Path, segments: u64) -> DiskConfig {
    DiskConfig { segment_bytes: 1 << 20, ..DiskConfig::new(dir.join("disk"), segments << 20) }
}

struct Disk {
    dir: tempfile::TempDir,
    config: DiskConfig,
}

impl Disk {
    fn new(io: IoEngine, direct: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = DiskConfig { io, direct, ..config(dir.path(), 8) };
        Self { dir, config }
    }
}

#[async_trait]
impl Fixture for Disk {
    async fn open(&self) -> Opened {
        assert!(self.dir.path().exists());
        let (store, recovered) = DiskStore::open(&self.config).unwrap();
        Opened { store: Arc::new(store), records: recovered.records }
    }
}

fn uring_is_available() -> bool {
    let available = crate::io::start(IoEngine::Uring, 1);
    if let Err(error) = &available {
        println!("SKIPPED: io_uring is not available here: {error}");
    }
    available.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn uring_conforms() {
    if uring_is_available() {
        suite(|| Disk::new(IoEngine::Uring, true)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn threads_conform() {
    suite(|| Disk::new(IoEngine::Threads, true)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn buffered_conforms() {
    suite(|| Disk::new(IoEngine::Auto, false)).await;
    suite(|| Disk::new(IoEngine::Threads, false)).await;
}

#[tokio::test]
async fn a_second_daemon_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = DiskStore::open(&config(dir.path(), 2)).unwrap();
    let second = DiskStore::open(&config(dir.path(), 2));
    let Err(StorageError::Open { reason, .. }) = second else { panic!("{second:?}") };
    assert!(reason.contains("lock"), "{reason}");
    drop(store);
    DiskStore::open(&config(dir.path(), 2)).unwrap();
}

#[test]
fn configurations_out_of_bounds_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(dir.path(), 2);
    for bad in [
        DiskConfig { capacity_bytes: 1 << 20, ..good.clone() },
        DiskConfig { segment_bytes: 5000, ..good.clone() },
        DiskConfig { segment_bytes: 4096, ..good.clone() },
        DiskConfig { segment_bytes: 8 << 30, capacity_bytes: 1 << 40, ..good },
    ] {
        assert!(matches!(DiskStore::open(&bad), Err(StorageError::Open { .. })), "{bad:?}");
    }
}

#[tokio::test]
async fn the_directory_is_private_and_never_larger_than_its_capacity() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 4);
    let (store, _) = DiskStore::open(&config).unwrap();
    assert_eq!(std::fs::metadata(&config.dir).unwrap().permissions().mode() & 0o777, 0o700);
    let mut n = 0;
    while put(&store, n, 100_000).await.is_ok() {
        n += 1;
    }
    assert!(n >= 4 * 8, "{n} records of 100 kB in 4 MiB");
    let files = std::fs::read_dir(&config.dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
    let bytes: u64 = files.map(|metadata| metadata.blocks() * 512).sum();
    assert!(bytes <= (4 << 20) + 64 * 1024, "{bytes}");
    assert!(store.describe().contains("segments"), "{}", store.describe());
}

#[tokio::test]
async fn a_reclaimed_segment_is_reused_only_after_its_reads_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = DiskStore::open(&config(dir.path(), 2)).unwrap();
    let (mut records, mut n) = (Vec::new(), 0);
    loop {
        match put(&store, n, 200_000).await {
            Ok(record) => records.push(record),
            Err(StorageError::Full) => break,
            Err(other) => panic!("{other}"),
        }
        n += 1;
    }
    let (first, first_at) = records[0].clone();
    let pin = store.index.pin(&first.key, first_at).unwrap();
    // The last segment may still be on its way to its footer; the first is sealed for long.
    let segment = first_at.segment;
    assert!(store.reclaim_candidate().is_some());
    for (_, at, bytes) in store.live_records(segment) {
        store.forget(at, bytes);
    }
    assert!(matches!(put(&store, 100, 200_000).await, Err(StorageError::Full)), "a read is in flight");
    drop(pin);
    let (meta, at) = put(&store, 100, 200_000).await.unwrap();
    assert_eq!(at.segment, segment);
    get(&store, 100, &meta, at).await.unwrap();
    assert!(matches!(get(&store, 0, &first, first_at).await, Err(StorageError::NotFound)));
    assert!(store.usage().used_bytes <= 2 << 20);
}

#[tokio::test]
async fn a_smaller_capacity_or_another_segment_size_drops_files() {
    let dir = tempfile::tempdir().unwrap();
    let four = config(dir.path(), 4);
    let (store, _) = DiskStore::open(&four).unwrap();
    let mut n = 0;
    while put(&store, n, 200_000).await.is_ok() {
        n += 1;
    }
    store.close(Duration::from_secs(10)).await.unwrap();
    let (store, recovered) = DiskStore::open(&config(dir.path(), 2)).unwrap();
    assert_eq!(recovered.cut.iter().filter(|note| note.contains("beyond")).count(), 2, "{:?}", recovered.cut);
    assert_eq!(recovered.records.len() as u64, n / 2);
    for (meta, at) in recovered.records {
        get(&store, meta.sequence, &meta, at).await.unwrap();
    }
    store.close(Duration::from_secs(10)).await.unwrap();
    let other = DiskConfig { segment_bytes: 2 << 20, ..four };
    let (_store, recovered) = DiskStore::open(&other).unwrap();
    assert!(recovered.records.is_empty());
    assert_eq!(recovered.cut.len(), 2, "{:?}", recovered.cut);
}
