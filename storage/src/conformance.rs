//! What every [`BlockStore`] promises, as one suite to run over each implementation. Panics where a promise is broken.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kvtier_memory::{AlignedBuf, IoBuf, checksum};
use kvtier_types::{BlockHints, BlockKey, LayoutId, NamespaceId, SemanticType, ShardKey, TenantId};

use crate::store::{BlockStore, Expect, Location, RecordMeta, StorageError};

/// Far more than any step of the suite takes.
const DEADLINE: Duration = Duration::from_secs(60);

/// A medium on which a store can be opened again and again.
#[async_trait]
pub trait Fixture: Send + Sync {
    /// Opens the store over what the medium holds. The former store of this fixture was closed.
    async fn open(&self) -> Opened;

    /// Whether the store has a capacity, of at most 64 MiB, that the suite should fill.
    fn bounded(&self) -> bool {
        true
    }
}

/// A store and what it found on its medium.
#[derive(Debug)]
pub struct Opened {
    /// The store.
    pub store: Arc<dyn BlockStore>,
    /// Its records, oldest first.
    pub records: Vec<(RecordMeta, Location)>,
}

/// Payload number `n` of `len` bytes: every one differs from every other at every page.
#[must_use]
pub fn payload(n: u64, len: usize) -> Vec<u8> {
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The meta of record number `n` with that payload.
#[must_use]
pub fn meta(n: u64, payload: &[u8]) -> RecordMeta {
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&n.to_le_bytes());
    RecordMeta {
        key: ShardKey { block: BlockKey::new(digest), layout: LayoutId::new([2; 32]), shard: 1 },
        namespace: NamespaceId::new([3; 32]),
        tenant: TenantId::shared(),
        hints: BlockHints {
            program_id: format!("program-{n}"),
            semantic: SemanticType::ToolResult,
            ..Default::default()
        },
        parent: (n > 0).then(|| BlockKey::new([4; 32])),
        depth_blocks: u32::try_from(n % 1000).unwrap_or(0),
        group: 1,
        needs_ancestors: n.is_multiple_of(2),
        model: "example/model".into(),
        bytes: payload.len() as u64,
        checksum: checksum::checksum(payload),
        sequence: n,
        expires_ms: None,
    }
}

/// The bytes as an owned buffer.
#[must_use]
pub fn buffer(bytes: &[u8]) -> IoBuf {
    IoBuf::Heap(AlignedBuf::from_slice(bytes))
}

/// Writes record number `n`.
///
/// # Errors
/// The store's.
pub async fn put(store: &dyn BlockStore, n: u64, len: usize) -> Result<(RecordMeta, Location), StorageError> {
    let bytes = payload(n, len);
    let meta = meta(n, &bytes);
    let written = store.write(meta.clone(), buffer(&bytes)).await;
    assert_eq!(written.payload.len(), len, "the buffer comes back");
    written.result.map(|at| (meta, at))
}

/// Reads a record and compares it with what [`put`] wrote under that number.
///
/// # Errors
/// The store's. Wrong bytes are a panic.
pub async fn get(store: &dyn BlockStore, n: u64, meta: &RecordMeta, at: Location) -> Result<(), StorageError> {
    let len = usize::try_from(meta.bytes).expect("test payloads are small");
    let back = store.read(&meta.key, at, meta.expect(), IoBuf::heap(len)).await;
    back.result?;
    let mut bytes = vec![0; len];
    back.into.copy_out(&mut bytes);
    assert!(bytes == payload(n, len), "wrong bytes for record {n}");
    Ok(())
}

/// Runs every case, each on a fresh fixture.
pub async fn suite<F: Fixture>(fresh: impl Fn() -> F) {
    reads_what_was_written(&fresh()).await;
    tells_wrong_from_right(&fresh()).await;
    refuses_what_cannot_be_stored(&fresh()).await;
    forgets(&fresh()).await;
    serves_many_at_once(&fresh()).await;
    survives_a_restart(&fresh()).await;
    closes(&fresh()).await;
    outlives_dropped_futures(&fresh()).await;
    let bounded = fresh();
    if bounded.bounded() {
        stays_within_capacity(&bounded).await;
    }
}

async fn close(store: &dyn BlockStore) {
    store.close(DEADLINE).await.expect("closes in time");
}

async fn reads_what_was_written(fixture: &dyn Fixture) {
    let store = fixture.open().await.store;
    for (n, len) in [1, 511, 4095, 4096, 4097, 12_288, 100_001].into_iter().enumerate() {
        let n = n as u64;
        let (meta, at) = put(&*store, n, len).await.expect("written");
        get(&*store, n, &meta, at).await.expect("read at once");
        let long = store.read(&meta.key, at, meta.expect(), IoBuf::heap(len + 5000)).await;
        long.result.expect("a longer buffer will do");
    }
    // The same key again is another record.
    let (first, first_at) = put(&*store, 99, 5000).await.expect("written");
    let (second, second_at) = put(&*store, 99, 5000).await.expect("written again");
    assert_ne!(first_at, second_at);
    get(&*store, 99, &first, first_at).await.expect("the first is there");
    get(&*store, 99, &second, second_at).await.expect("and the second");
    assert!(store.usage().live_bytes >= 10_000);
    close(&*store).await;
}

async fn tells_wrong_from_right(fixture: &dyn Fixture) {
    let store = fixture.open().await.store;
    let (meta, at) = put(&*store, 1, 9000).await.expect("written");
    let (other, other_at) = put(&*store, 2, 9000).await.expect("written");
    let not_there = Location { segment: at.segment + 1000, offset: 77 };
    let expect = meta.expect();
    let cases = [
        ("key", other.key, at, expect),
        ("place", meta.key, other_at, expect),
        ("no place", meta.key, not_there, expect),
        ("checksum", meta.key, at, Expect { checksum: expect.checksum ^ 1, ..expect }),
        ("length", meta.key, at, Expect { bytes: 8999, ..expect }),
    ];
    for (what, key, at, expect) in cases {
        let result = store.read(&key, at, expect, IoBuf::heap(9000)).await.result;
        let right = matches!(result, Err(StorageError::NotFound | StorageError::Corrupt { .. }));
        assert!(right, "wrong {what}: {result:?}");
    }
    let short = store.read(&meta.key, at, expect, IoBuf::heap(8999)).await.result;
    assert!(matches!(short, Err(StorageError::Refused { .. })), "{short:?}");
    get(&*store, 1, &meta, at).await.expect("still there");
    close(&*store).await;
}

async fn refuses_what_cannot_be_stored(fixture: &dyn Fixture) {
    let store = fixture.open().await.store;
    let bytes = payload(1, 5000);
    let good = meta(1, &bytes);
    let wrong = RecordMeta { checksum: good.checksum ^ 1, ..good.clone() };
    let result = store.write(wrong, buffer(&bytes)).await.result;
    assert!(matches!(result, Err(StorageError::Corrupt { at: None, .. })), "{result:?}");
    let refused = [
        RecordMeta { bytes: 5001, ..good.clone() },
        RecordMeta { bytes: 0, checksum: 0, ..good.clone() },
        RecordMeta { bytes: u64::MAX, ..good.clone() },
        RecordMeta { model: "m".repeat(RecordMeta::MAX_MODEL_BYTES + 1), ..good },
    ];
    for meta in refused {
        let result = store.write(meta, buffer(&bytes)).await.result;
        assert!(matches!(result, Err(StorageError::Refused { .. })), "{result:?}");
    }
    assert_eq!(store.usage().live_bytes, 0);
    close(&*store).await;
}

async fn forgets(fixture: &dyn Fixture) {
    let store = fixture.open().await.store;
    let (gone, gone_at) = put(&*store, 1, 5000).await.expect("written");
    let (kept, kept_at) = put(&*store, 2, 5000).await.expect("written");
    let before = store.usage().live_bytes;
    store.forget(gone_at, gone.bytes);
    store.forget(gone_at, gone.bytes);
    store.forget(Location { segment: u32::MAX, offset: u32::MAX }, 1);
    assert!(store.usage().live_bytes < before);
    let result = get(&*store, 1, &gone, gone_at).await;
    assert!(matches!(result, Err(StorageError::NotFound)), "{result:?}");
    get(&*store, 2, &kept, kept_at).await.expect("the other stays");
    close(&*store).await;
}

async fn serves_many_at_once(fixture: &dyn Fixture) {
    let store = fixture.open().await.store;
    let tasks: Vec<_> = (0..64u64)
        .map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let len = usize::try_from(n * 997 % 20_000 + 1).expect("small");
                let (meta, at) = put(&*store, n, len).await.expect("written");
                get(&*store, n, &meta, at).await.expect("read");
                (n, meta, at)
            })
        })
        .collect();
    let mut places = HashMap::new();
    for task in tasks {
        let (n, meta, at) = task.await.expect("no panic");
        get(&*store, n, &meta, at).await.expect("read after all");
        assert!(places.insert(at, n).is_none(), "two records at {at:?}");
    }
    assert_eq!(store.usage().pending_writes, 0);
    close(&*store).await;
}

async fn survives_a_restart(fixture: &dyn Fixture) {
    let Opened { store, records } = fixture.open().await;
    assert!(records.is_empty());
    let mut written = Vec::new();
    for n in 0..20u64 {
        written.push(put(&*store, n, 3000 + usize::try_from(n).expect("small") * 700).await.expect("written"));
    }
    store.flush().await.expect("flushes");
    close(&*store).await;
    drop(store);
    for _ in 0..2 {
        let Opened { store, records } = fixture.open().await;
        let found: Vec<_> = records.iter().map(|(meta, _)| meta.clone()).collect();
        let expected: Vec<_> = written.iter().map(|(meta, _)| meta.clone()).collect();
        assert_eq!(found, expected, "every record, whole, in order");
        for (meta, at) in &records {
            get(&*store, meta.sequence, meta, *at).await.expect("read after a restart");
        }
        close(&*store).await;
    }
}

async fn closes(fixture: &dyn Fixture) {
    let store = fixture.open().await.store;
    let (meta, at) = put(&*store, 1, 5000).await.expect("written");
    close(&*store).await;
    close(&*store).await;
    assert!(matches!(put(&*store, 2, 5000).await, Err(StorageError::Closed)));
    assert!(matches!(get(&*store, 1, &meta, at).await, Err(StorageError::Closed)));
    assert!(matches!(store.flush().await, Err(StorageError::Closed)));
}

async fn outlives_dropped_futures(fixture: &dyn Fixture) {
    let store = fixture.open().await.store;
    let (meta, at) = put(&*store, 1, 50_000).await.expect("written");
    for n in 2..40 {
        let bytes = payload(n, 50_000);
        let write = store.write(self::meta(n, &bytes), buffer(&bytes));
        let read = store.read(&meta.key, at, meta.expect(), IoBuf::heap(50_000));
        // Polls each once, as a rule, then drops them mid-way.
        tokio::select! {
            biased;
            _ = write => {}
            _ = read => {}
            () = std::future::ready(()) => {}
        }
    }
    let (after, after_at) = put(&*store, 100, 50_000).await.expect("still works");
    get(&*store, 100, &after, after_at).await.expect("read");
    get(&*store, 1, &meta, at).await.expect("read");
    close(&*store).await;
}

async fn stays_within_capacity(fixture: &dyn Fixture) {
    let store = fixture.open().await.store;
    let capacity = store.usage().capacity_bytes;
    let mut live = Vec::new();
    for round in 0..3u64 {
        for n in 0.. {
            assert!(n < 10_000, "a bounded store fills up");
            let n = round * 10_000 + n;
            match put(&*store, n, 60_000).await {
                Ok((meta, at)) => live.push((n, meta, at)),
                Err(StorageError::Full) => break,
                Err(other) => panic!("{other}"),
            }
            let usage = store.usage();
            assert!(usage.used_bytes <= capacity && usage.live_bytes <= usage.used_bytes, "{usage:?}");
        }
        assert!(!live.is_empty());
        for (n, meta, at) in live.drain(..) {
            get(&*store, n, &meta, at).await.expect("all that was taken can be read");
            store.forget(at, meta.bytes);
        }
        assert_eq!(store.usage().live_bytes, 0);
    }
    close(&*store).await;
}
