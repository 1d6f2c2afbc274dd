//! Devices that fail, stall, are full or cannot be written to.

use std::sync::atomic::{AtomicI32, Ordering};

use super::*;
use crate::io::Finished;

/// An engine whose writes or reads fail with an error of the system's while it is set.
#[derive(Debug)]
struct Faulty {
    inner: Arc<dyn BlockIo>,
    fail_writes: AtomicI32,
    fail_reads: AtomicI32,
}

#[async_trait]
impl BlockIo for Faulty {
    async fn run(&self, transfer: Transfer) -> Finished {
        let fault = match transfer.direction {
            Direction::Read => &self.fail_reads,
            Direction::Write => &self.fail_writes,
        };
        match fault.load(Ordering::SeqCst) {
            0 => self.inner.run(transfer).await,
            code => Finished {
                result: Err(std::io::Error::from_raw_os_error(code)),
                parts: transfer.parts,
                keep: transfer.keep,
            },
        }
    }

    fn describe(&self) -> String {
        "faulty".into()
    }
}

fn open_faulty(config: &DiskConfig) -> (DiskStore, Arc<Faulty>) {
    let mut faulty = None;
    let (store, _) = DiskStore::open_over(config, |inner| {
        let io = Arc::new(Faulty { inner, fail_writes: AtomicI32::new(0), fail_reads: AtomicI32::new(0) });
        faulty = Some(Arc::clone(&io));
        io
    })
    .unwrap();
    (store, faulty.unwrap())
}

#[tokio::test]
async fn a_failed_write_turns_writes_off_and_reads_go_on() {
    for code in [libc::EIO, libc::EROFS] {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), 4);
        let (store, io) = open_faulty(&config);
        let (meta, at) = put(&store, 1, 5000).await.unwrap();
        io.fail_writes.store(code, Ordering::SeqCst);
        assert!(matches!(put(&store, 2, 5000).await, Err(StorageError::Io { .. })));
        io.fail_writes.store(0, Ordering::SeqCst);
        assert!(matches!(put(&store, 3, 5000).await, Err(StorageError::Poisoned { .. })));
        let poisoned = store.health().unwrap_err();
        assert!(matches!(poisoned, StorageError::Poisoned { .. }));
        let said = poisoned.to_string();
        assert!(said.contains("until kvtierd is restarted") && said.contains("check the disk"), "{said}");
        get(&store, 1, &meta, at).await.unwrap();
        assert!(matches!(store.close(Duration::from_secs(10)).await, Err(StorageError::Poisoned { .. })));
        drop(store);
        let (store, recovered) = DiskStore::open(&config).unwrap();
        assert_eq!(recovered.records.len(), 1);
        get(&store, 1, &meta, at).await.unwrap();
    }
}

#[tokio::test]
async fn no_space_is_full_and_passes() {
    let dir = tempfile::tempdir().unwrap();
    let (store, io) = open_faulty(&config(dir.path(), 4));
    for code in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG, libc::EMFILE, libc::ENFILE] {
        io.fail_writes.store(code, Ordering::SeqCst);
        assert!(matches!(put(&store, 2, 5000).await, Err(StorageError::Full)));
        io.fail_writes.store(0, Ordering::SeqCst);
        let (meta, at) = put(&store, 3, 5000).await.unwrap();
        get(&store, 3, &meta, at).await.unwrap();
    }
    assert_eq!(store.usage().pending_writes, 0);
}

#[tokio::test]
async fn a_failed_read_is_an_error_and_passes() {
    let dir = tempfile::tempdir().unwrap();
    let (store, io) = open_faulty(&config(dir.path(), 4));
    let (meta, at) = put(&store, 1, 5000).await.unwrap();
    io.fail_reads.store(libc::EIO, Ordering::SeqCst);
    assert!(matches!(get(&store, 1, &meta, at).await, Err(StorageError::Io { .. })));
    io.fail_reads.store(0, Ordering::SeqCst);
    get(&store, 1, &meta, at).await.unwrap();
}

#[tokio::test]
async fn a_failed_record_is_not_in_the_footer_and_its_neighbors_are() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 4);
    let (store, io) = open_faulty(&config);
    put(&store, 0, 5000).await.unwrap();
    io.fail_writes.store(libc::ENOSPC, Ordering::SeqCst);
    put(&store, 1, 5000).await.unwrap_err();
    io.fail_writes.store(0, Ordering::SeqCst);
    put(&store, 2, 5000).await.unwrap();
    store.close(Duration::from_secs(10)).await.unwrap();
    let (store, recovered) = DiskStore::open(&config).unwrap();
    let found: Vec<u64> = recovered.records.iter().map(|(meta, _)| meta.sequence).collect();
    assert_eq!(found, [0, 2]);
    assert_eq!(recovered.next_sequence, 3);
    for (meta, at) in recovered.records {
        get(&store, meta.sequence, &meta, at).await.unwrap();
    }
}

#[test]
fn a_place_that_cannot_be_written_to_is_told() {
    // The process file system takes no directories, from root either.
    let config = DiskConfig::new("/proc/kvtier/disk".into(), 1 << 30);
    let error = DiskStore::open(&config).unwrap_err();
    assert!(matches!(&error, StorageError::Io { action, .. } if action.contains("/proc/kvtier/disk")), "{error}");
    let file = tempfile::NamedTempFile::new().unwrap();
    let config = DiskConfig::new(file.path().to_owned(), 1 << 30);
    assert!(matches!(DiskStore::open(&config), Err(StorageError::Io { .. })));
}

#[test]
fn a_read_only_directory_is_told() {
    use std::os::unix::fs::PermissionsExt;
    if rustix::process::geteuid().is_root() {
        println!("SKIPPED: permissions do not bind root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o500)).unwrap();
    let error = DiskStore::open(&config(dir.path(), 2)).unwrap_err();
    assert!(matches!(error, StorageError::Io { .. }), "{error}");
}

/// Runs itself again as a child whose files may not grow beyond a segment and a half: a full disk that needs no rights.
#[test]
fn a_file_system_without_room_for_a_segment_is_full() {
    const CHILD: &str = "KVTIER_TEST_FILE_LIMIT";
    if std::env::var_os(CHILD).is_none() {
        let name = "disk::tests::faults::a_file_system_without_room_for_a_segment_is_full";
        let mut child = std::process::Command::new("sh");
        // Blocks of 512 or 1024 bytes, by shell: less than a segment of 4 MiB either way. XFSZ would kill the process.
        child.args(["-c", "trap '' XFSZ; ulimit -f 2048; exec \"$0\" --exact \"$1\" --nocapture"]);
        let status = child.arg(std::env::current_exe().unwrap()).arg(name).env(CHILD, "1").status().unwrap();
        assert!(status.success());
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let config = DiskConfig { segment_bytes: 4 << 20, ..config(dir.path(), 16) };
        let (store, _) = DiskStore::open(&config).unwrap();
        assert!(matches!(put(&store, 1, 5000).await, Err(StorageError::Full)));
        assert!(matches!(put(&store, 2, 5000).await, Err(StorageError::Full)));
        store.health().unwrap();
        assert_eq!(store.usage().used_bytes, 0);
        drop(store);
        // Smaller segments fit.
        let (store, _) = DiskStore::open(&self::config(dir.path(), 16)).unwrap();
        let (meta, at) = put(&store, 1, 5000).await.unwrap();
        get(&store, 1, &meta, at).await.unwrap();
    });
}

/// An engine that never answers.
#[derive(Debug)]
struct Stalled(Mutex<Vec<Transfer>>);

#[async_trait]
impl BlockIo for Stalled {
    async fn run(&self, transfer: Transfer) -> Finished {
        self.0.lock().push(transfer);
        std::future::pending().await
    }

    fn describe(&self) -> String {
        "stalled".into()
    }
}

#[tokio::test]
async fn a_stalled_device_bounds_what_is_in_flight_and_close_keeps_its_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let stalled = Arc::new(Stalled(Mutex::new(Vec::new())));
    let io = Arc::clone(&stalled);
    let config = DiskConfig { segment_bytes: 64 << 20, ..config(dir.path(), 256) };
    let (store, _) = DiskStore::open_over(&config, |_| io).unwrap();
    let store = Arc::new(store);
    let tasks: Vec<_> = (0..40)
        .map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { put(&*store, n, 1 << 20).await.map(drop) })
        })
        .collect();
    while store.write_budget.available_permits() > 257 {
        tokio::task::yield_now().await;
    }
    // Every record has a header page, so one fewer than the budget's MiB.
    while stalled.0.lock().len() < 31 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(stalled.0.lock().len(), 31);
    let closed = store.close(Duration::from_millis(20)).await;
    assert!(matches!(closed, Err(StorageError::Unavailable { .. })), "{closed:?}");
    for task in tasks {
        task.abort();
    }
}
