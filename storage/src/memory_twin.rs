//! [`MemoryTwin`]: the in-memory twin of every [`BlockStore`], with faults to inject. For tests and simulations.
//!
//! A [`TwinMedium`] outlives the stores opened on it, as a disk outlives processes: what was not flushed can be lost, what
//! was written can be torn.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kvtier_memory::IoBuf;
use kvtier_memory::checksum::checksum;
use kvtier_types::ShardKey;
use parking_lot::Mutex;

use crate::codec::check_meta;
use crate::store::{BlockStore, Expect, Location, ReadBack, RecordMeta, StorageError, Usage, Written};

/// Records per segment: small, so that tests see several.
const SEGMENT_RECORDS: u32 = 16;

/// Faults that the next calls meet.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// Writes fail with an I/O error, and the store is poisoned, as a disk's is.
    pub fail_writes: bool,
    /// Reads fail with an I/O error.
    pub fail_reads: bool,
    /// Writes report success but keep only the first half of the payload.
    pub tear_writes: bool,
    /// Writes answer [`StorageError::Full`] whatever the usage.
    pub full: bool,
    /// How long every read and write takes.
    pub delay: Duration,
}

#[derive(Debug, Clone)]
struct Record {
    meta: RecordMeta,
    payload: Vec<u8>,
    durable: bool,
}

#[derive(Debug, Default)]
struct Content {
    records: BTreeMap<Location, Record>,
    written: u32,
    faults: Faults,
}

/// What a twin stores on. Clones are the same medium.
#[derive(Debug, Clone)]
pub struct TwinMedium {
    content: Arc<Mutex<Content>>,
    capacity_bytes: u64,
}

impl TwinMedium {
    /// An empty medium.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        Self { content: Arc::default(), capacity_bytes }
    }

    /// Opens a store on what the medium holds; records come oldest first.
    #[must_use]
    pub fn open(&self) -> (MemoryTwin, Vec<(RecordMeta, Location)>) {
        let content = self.content.lock();
        let mut records: Vec<_> = content.records.iter().map(|(at, r)| (r.meta.clone(), *at)).collect();
        records.sort_by_key(|(meta, _)| meta.sequence);
        (MemoryTwin { medium: self.clone(), state: Mutex::default() }, records)
    }

    /// Sets the faults that calls meet from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.content.lock().faults = faults;
    }

    /// A power failure: what was never flushed is gone.
    pub fn lose_unsynced(&self) {
        self.content.lock().records.retain(|_, record| record.durable);
    }

    /// Flips one bit of a record's payload, if it is there.
    pub fn flip(&self, at: Location) {
        if let Some(byte) = self.content.lock().records.get_mut(&at).and_then(|r| r.payload.first_mut()) {
            *byte ^= 1;
        }
    }

    fn delay(&self) -> Duration {
        self.content.lock().faults.delay
    }
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    poisoned: bool,
    pending_writes: u64,
}

/// A store in memory.
#[derive(Debug)]
pub struct MemoryTwin {
    medium: TwinMedium,
    state: Mutex<State>,
}

/// A write that has not returned.
struct Pending<'a>(&'a Mutex<State>);

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.0.lock().pending_writes -= 1;
    }
}

fn injected(action: &str) -> StorageError {
    StorageError::Io { action: action.into(), source: std::io::Error::other("injected fault") }
}

impl MemoryTwin {
    fn begin_write(&self) -> Result<Pending<'_>, StorageError> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(StorageError::Closed);
        }
        if state.poisoned {
            return Err(StorageError::Poisoned { reason: "injected fault".into() });
        }
        state.pending_writes += 1;
        Ok(Pending(&self.state))
    }

    fn store(&self, meta: RecordMeta, payload: &IoBuf) -> Result<Location, StorageError> {
        check_meta(&meta)?;
        let len = usize::try_from(meta.bytes).ok().filter(|len| *len <= payload.len());
        let Some(len) = len else {
            return Err(StorageError::Refused {
                what: format!("{} bytes of a buffer of {}", meta.bytes, payload.len()),
            });
        };
        let mut bytes = vec![0; len];
        if payload.copy_out(&mut bytes) != meta.checksum {
            let what = "the payload to write has another checksum".into();
            return Err(StorageError::Corrupt { key: Box::new(meta.key), at: None, what });
        }
        let mut content = self.medium.content.lock();
        let used: u64 = content.records.values().map(|r| r.meta.bytes).sum();
        if content.faults.full || used + meta.bytes > self.medium.capacity_bytes {
            return Err(StorageError::Full);
        }
        if content.faults.fail_writes {
            self.state.lock().poisoned = true;
            return Err(injected("write a record"));
        }
        if content.faults.tear_writes {
            bytes[len / 2..].fill(0);
        }
        let at = Location { segment: content.written / SEGMENT_RECORDS, offset: content.written % SEGMENT_RECORDS };
        content.written += 1;
        content.records.insert(at, Record { meta, payload: bytes, durable: false });
        Ok(at)
    }

    fn load(&self, key: &ShardKey, at: Location, expect: Expect, into: &mut IoBuf) -> Result<(), StorageError> {
        if self.state.lock().closed {
            return Err(StorageError::Closed);
        }
        if expect.bytes > into.len() as u64 {
            return Err(StorageError::Refused {
                what: format!("{} bytes into a buffer of {}", expect.bytes, into.len()),
            });
        }
        let content = self.medium.content.lock();
        if content.faults.fail_reads {
            return Err(injected("read a record"));
        }
        let record = content.records.get(&at).filter(|r| r.meta.key == *key).ok_or(StorageError::NotFound)?;
        if record.meta.expect() != expect || checksum(&record.payload) != expect.checksum {
            let what = "the record has another length or checksum".into();
            return Err(StorageError::Corrupt { key: Box::new(*key), at: Some(at), what });
        }
        into.copy_in(&record.payload);
        Ok(())
    }

    /// The segment with the fewest live bytes.
    #[must_use]
    pub fn reclaim_candidate(&self) -> Option<u32> {
        let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
        for (at, record) in &self.medium.content.lock().records {
            *bytes.entry(at.segment).or_default() += record.meta.bytes;
        }
        bytes.into_iter().min_by_key(|(_, bytes)| *bytes).map(|(segment, _)| segment)
    }

    /// The records of `segment`, with their payload lengths.
    #[must_use]
    pub fn live_records(&self, segment: u32) -> Vec<(ShardKey, Location, u64)> {
        let content = self.medium.content.lock();
        let of_segment = content.records.iter().filter(|(at, _)| at.segment == segment);
        of_segment.map(|(at, record)| (record.meta.key, *at, record.meta.bytes)).collect()
    }
}

#[async_trait]
impl BlockStore for MemoryTwin {
    async fn write(&self, meta: RecordMeta, payload: IoBuf) -> Written {
        let _pending = match self.begin_write() {
            Ok(pending) => pending,
            Err(error) => return Written { result: Err(error), payload },
        };
        tokio::time::sleep(self.medium.delay()).await;
        Written { result: self.store(meta, &payload), payload }
    }

    async fn read(&self, key: &ShardKey, at: Location, expect: Expect, mut into: IoBuf) -> ReadBack {
        tokio::time::sleep(self.medium.delay()).await;
        ReadBack { result: self.load(key, at, expect, &mut into), into }
    }

    fn forget(&self, at: Location, _bytes: u64) {
        self.medium.content.lock().records.remove(&at);
    }

    fn usage(&self) -> Usage {
        let live_bytes = self.medium.content.lock().records.values().map(|r| r.meta.bytes).sum();
        Usage {
            capacity_bytes: self.medium.capacity_bytes,
            used_bytes: live_bytes,
            live_bytes,
            pending_writes: self.state.lock().pending_writes,
        }
    }

    async fn flush(&self) -> Result<(), StorageError> {
        drop(self.begin_write()?);
        for record in self.medium.content.lock().records.values_mut() {
            record.durable = true;
        }
        Ok(())
    }

    async fn close(&self, _deadline: Duration) -> Result<(), StorageError> {
        self.state.lock().closed = true;
        for record in self.medium.content.lock().records.values_mut() {
            record.durable = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{Fixture, Opened, get, put, suite};

    struct Twin(TwinMedium);

    #[async_trait]
    impl Fixture for Twin {
        async fn open(&self) -> Opened {
            let (store, records) = self.0.open();
            Opened { store: Arc::new(store), records }
        }
    }

    #[tokio::test]
    async fn conforms() {
        suite(|| Twin(TwinMedium::new(8 << 20))).await;
    }

    #[tokio::test]
    async fn faults_are_what_they_say() {
        let medium = TwinMedium::new(1 << 20);
        let (store, _) = medium.open();
        let (kept, kept_at) = put(&store, 1, 1000).await.unwrap();
        store.flush().await.unwrap();
        let (lost, lost_at) = put(&store, 2, 1000).await.unwrap();
        medium.lose_unsynced();
        assert!(matches!(get(&store, 2, &lost, lost_at).await, Err(StorageError::NotFound)));
        get(&store, 1, &kept, kept_at).await.unwrap();

        medium.set_faults(Faults { tear_writes: true, ..Faults::default() });
        let (torn, torn_at) = put(&store, 3, 1000).await.unwrap();
        assert!(matches!(get(&store, 3, &torn, torn_at).await, Err(StorageError::Corrupt { .. })));
        medium.set_faults(Faults { full: true, ..Faults::default() });
        assert!(matches!(put(&store, 4, 10).await, Err(StorageError::Full)));
        medium.set_faults(Faults { fail_reads: true, ..Faults::default() });
        assert!(matches!(get(&store, 1, &kept, kept_at).await, Err(StorageError::Io { .. })));
        medium.set_faults(Faults { fail_writes: true, ..Faults::default() });
        assert!(matches!(put(&store, 5, 10).await, Err(StorageError::Io { .. })));
        medium.set_faults(Faults::default());
        assert!(matches!(put(&store, 6, 10).await, Err(StorageError::Poisoned { .. })));
        medium.flip(kept_at);
        assert!(matches!(get(&store, 1, &kept, kept_at).await, Err(StorageError::Corrupt { .. })));
    }
}
