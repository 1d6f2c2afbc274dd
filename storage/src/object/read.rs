//! A record's way out: found in the index, fetched by one ranged GET, verified, copied into its frame.

use bytes::Bytes;
use kvtier_memory::IoBuf;
use kvtier_types::ShardKey;
use tokio::task::spawn_blocking;

use super::index::Found;
use super::{ObjectStoreTier, Shared, pack, permits, within};
use crate::codec::Malformed;
use crate::store::{Expect, Location, StorageError};

impl ObjectStoreTier {
    /// Reads a record into the caller's buffer and gives that back.
    pub(super) async fn load(&self, want: &Wanted<'_>, into: IoBuf) -> (Result<(), StorageError>, IoBuf) {
        let expect = want.expect;
        if expect.bytes > into.len() as u64 {
            let what = format!("{} bytes into a buffer of {}", expect.bytes, into.len());
            return (Err(StorageError::Refused { what }), into);
        }
        let (bytes, header_bytes) = match self.fetch(want).await {
            Ok(fetched) => fetched,
            Err(error) => return (Err(error), into),
        };
        let Some((checksum, into)) = deliver(bytes.slice(header_bytes..), into).await else {
            return (Err(StorageError::Closed), IoBuf::heap(0));
        };
        let differs = || want.corrupt(format!("payload checksum {checksum:016x}, expected {:016x}", expect.checksum));
        (if checksum == expect.checksum { Ok(()) } else { Err(differs()) }, into)
    }

    /// The record's bytes, header verified, and the header's length.
    async fn fetch(&self, want: &Wanted<'_>) -> Result<(Bytes, usize), StorageError> {
        self.check_open()?;
        self.shared.remote.reads.check()?;
        let reading = Reading::begin(&self.shared, want)?;
        let found = &reading.found;
        let corrupt = |what: String| want.corrupt(what);
        if found.payload_bytes != want.expect.bytes {
            return Err(corrupt(format!("{} bytes where {} are expected", found.payload_bytes, want.expect.bytes)));
        }
        let len = found.range.end - found.range.start;
        let memory = self.reading.acquire_many(permits(len, self.staging_bytes));
        let deadline = self.shared.config.retry.read_deadline;
        let _memory = within(deadline, "a turn to read", memory).await?.map_err(|_| StorageError::Closed)?;
        let bytes = self.shared.remote.get(&found.pack.path(&self.shared.root), found.range.clone()).await?;
        if bytes.len() as u64 != len {
            return Err(corrupt(format!("the pack ends within the record: {} of {len} bytes", bytes.len())));
        }
        pack::check_record(&bytes[..found.header_bytes], want.key, want.expect)
            .map_err(|Malformed(what)| corrupt(what.to_owned()))?;
        Ok((bytes, found.header_bytes))
    }
}

/// Copies a payload into the caller's buffer, off the runtime's threads, and returns the checksum of what arrived there.
/// `None` when the runtime is shutting down.
pub(super) async fn deliver(payload: Bytes, mut into: IoBuf) -> Option<(u64, IoBuf)> {
    spawn_blocking(move || (into.copy_in(&payload), into)).await.ok()
}

/// What a read asks for.
pub(super) struct Wanted<'a> {
    pub(super) key: &'a ShardKey,
    pub(super) at: Location,
    pub(super) expect: Expect,
}

impl Wanted<'_> {
    fn corrupt(&self, what: String) -> StorageError {
        StorageError::Corrupt { key: Box::new(*self.key), at: Some(self.at), what }
    }
}

/// A read: keeps its pack from being deleted.
struct Reading<'a> {
    shared: &'a Shared,
    segment: u32,
    found: Found,
}

impl<'a> Reading<'a> {
    fn begin(shared: &'a Shared, want: &Wanted<'_>) -> Result<Self, StorageError> {
        let found = shared.index.lock().begin_read(want.key, want.at)?;
        Ok(Self { shared, segment: want.at.segment, found })
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if self.shared.index.lock().end_read(self.segment) {
            self.shared.wake.notify_one();
        }
    }
}
