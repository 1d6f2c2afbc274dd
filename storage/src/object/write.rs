//! A record's way in: checked, given room and memory, copied out of its frame, handed to [`super::packer`].

use std::sync::Arc;

use bytes::Bytes;
use kvtier_memory::IoBuf;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::task::spawn_blocking;

use super::packer::{self, Command, Reservation, Staged, Waiter};
use super::{ObjectStoreTier, Shared, pack, permits, within};
use crate::codec::check_meta;
use crate::store::{Location, RecordMeta, StorageError};

/// Longest record: what one PUT may carry everywhere is 5 GiB, what a permit count and a length can say is less.
const MAX_RECORD_BYTES: u64 = 1 << 30;

impl ObjectStoreTier {
    /// Checks that a record can be taken now, and sets room and memory aside for it.
    async fn admit(
        &self,
        meta: &RecordMeta,
        payload: &IoBuf,
    ) -> Result<(Reservation, OwnedSemaphorePermit), StorageError> {
        self.check_open()?;
        check_meta(meta)?;
        if meta.bytes > payload.len() as u64 || meta.bytes > MAX_RECORD_BYTES {
            let what = format!("a record of {} bytes from a buffer of {}", meta.bytes, payload.len());
            return Err(StorageError::Refused { what });
        }
        if !self.is_recovered() {
            let reason = "what the object store holds is not known yet".to_owned();
            return Err(StorageError::Unavailable { reason, source: None });
        }
        self.shared.remote.writes.check()?;
        let header_bytes = pack::record_header(meta).len() as u64;
        let room = Reservation::new(&self.shared, packer::charge(header_bytes + meta.bytes, header_bytes));
        let room = within(self.shared.config.retry.write_deadline, "deleting dead packs", room).await??;
        let permits = permits(header_bytes + meta.bytes, self.staging_bytes);
        let memory = Arc::clone(&self.staging).acquire_many_owned(permits);
        let memory = within(self.settle_deadline(), "room in flight", memory).await?;
        // It may have stopped answering while this record waited its turn.
        self.shared.remote.writes.check()?;
        Ok((room, memory.map_err(|_| StorageError::Closed)?))
    }

    /// Stores a record and gives its buffer back.
    pub(super) async fn store(&self, meta: RecordMeta, payload: IoBuf) -> (Result<Location, StorageError>, IoBuf) {
        let _pending = PendingWrite::new(&self.shared);
        let (room, memory) = match self.admit(&meta, &payload).await {
            Ok(admitted) => admitted,
            Err(error) => return (Err(error), payload),
        };
        let copied = spawn_blocking(move || {
            let copied = copy_record(&meta, &payload);
            (copied, meta, payload)
        });
        let (copied, meta, payload) = match copied.await {
            Ok(done) => done,
            Err(_) => return (Err(StorageError::Closed), IoBuf::heap(0)),
        };
        let (record, header_bytes) = match copied {
            Ok(copied) => copied,
            Err(error) => return (Err(error), payload),
        };
        let (reply, answer) = oneshot::channel();
        let waiter = Waiter { reply, room, _memory: memory };
        let staged = Command::Stage(Box::new(Staged { meta, header_bytes, record, waiter }));
        (self.settled(staged, answer).await, payload)
    }
}

/// Counts a write that has not returned.
struct PendingWrite<'a>(&'a Shared);

impl<'a> PendingWrite<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.index.lock().pending_writes += 1;
        Self(shared)
    }
}

impl Drop for PendingWrite<'_> {
    fn drop(&mut self) {
        self.0.index.lock().pending_writes -= 1;
    }
}

/// The record's header and payload in memory of its own, and the header's length; the payload is verified on the way.
fn copy_record(meta: &RecordMeta, payload: &IoBuf) -> Result<(Bytes, u32), StorageError> {
    let mut record = pack::record_header(meta);
    let header = record.len();
    let bytes = usize::try_from(meta.bytes).expect("admit bounds a record by its buffer");
    record.resize(header + bytes, 0);
    let checksum = payload.copy_out(&mut record[header..]);
    if checksum != meta.checksum {
        let what = format!("checksum {checksum:016x} of the bytes to write, expected {:016x}", meta.checksum);
        return Err(StorageError::Corrupt { key: Box::new(meta.key), at: None, what });
    }
    Ok((Bytes::from(record), u32::try_from(header).expect("a header is about a kilobyte")))
}
