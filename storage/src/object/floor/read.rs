//! A record's way out of another writer's pack: one ranged GET, verified, copied into its frame.

use bytes::Bytes;
use kvtier_memory::IoBuf;
use kvtier_types::{RecordMeta, ShardKey};

use super::{Floor, FloorRead, FloorRecord, Shared};
use crate::codec::Malformed;
use crate::object::read::deliver;
use crate::object::{pack, permits, within};
use crate::store::StorageError;

impl Floor {
    /// Reads a record into the first `record.bytes` bytes of `into`, and returns what the record says of itself.
    ///
    /// # Errors
    /// In [`FloorRead::result`]. [`StorageError::NotFound`]: its pack is gone, and left the index.
    /// [`StorageError::Corrupt`]: what was found is not that record, which left the index. [`StorageError::Refused`]:
    /// `into` is too short. [`StorageError::Unavailable`]: the store did not answer in time.
    pub async fn read(&self, key: &ShardKey, record: &FloorRecord, into: IoBuf) -> FloorRead {
        let (result, into) = self.shared.load(key, record, into).await;
        match &result {
            Err(StorageError::Corrupt { what, .. }) => {
                tracing::warn!(%key, pack = %record.pack_at().shown(), %what, "a record of the floor is corrupt");
                self.shared.index.write().drop_record(key, record);
            }
            Err(StorageError::NotFound) => self.shared.index.write().drop_pack(&record.pack_at()),
            _ => {}
        }
        FloorRead { result, into }
    }
}

impl Shared {
    async fn load(
        &self,
        key: &ShardKey,
        record: &FloorRecord,
        into: IoBuf,
    ) -> (Result<RecordMeta, StorageError>, IoBuf) {
        if record.bytes > into.len() as u64 {
            let what = format!("{} bytes into a buffer of {}", record.bytes, into.len());
            return (Err(StorageError::Refused { what }), into);
        }
        let (meta, payload) = match self.fetch(key, record).await {
            Ok(fetched) => fetched,
            Err(error) => return (Err(error), into),
        };
        let Some((checksum, into)) = deliver(payload, into).await else {
            return (Err(StorageError::Closed), IoBuf::heap(0));
        };
        if checksum == record.checksum {
            return (Ok(meta), into);
        }
        (Err(corrupt(key, format!("payload checksum {checksum:016x}, expected {:016x}", record.checksum))), into)
    }

    /// What the record says, header verified, and its payload.
    async fn fetch(&self, key: &ShardKey, record: &FloorRecord) -> Result<(RecordMeta, Bytes), StorageError> {
        self.remote.reads.check()?;
        let header_bytes = record.header_bytes as usize;
        let len = u64::from(record.header_bytes) + record.bytes;
        let end = record.offset.checked_add(len).ok_or_else(|| corrupt(key, "an offset beyond any pack".to_owned()))?;
        let memory = self.reading.acquire_many(permits(len, self.reading_bytes));
        let memory = within(self.config.retry.read_deadline, "a turn to read", memory).await?;
        let _memory = memory.map_err(|_| StorageError::Closed)?;
        let bytes = self.remote.get(&record.pack_at().path(&self.root), record.offset..end).await?;
        if bytes.len() as u64 != len {
            return Err(corrupt(key, format!("the pack ends within the record: {} of {len} bytes", bytes.len())));
        }
        let meta = pack::check_record(&bytes[..header_bytes], key, record.expect())
            .map_err(|Malformed(what)| corrupt(key, what.to_owned()))?;
        Ok((meta, bytes.slice(header_bytes..)))
    }
}

fn corrupt(key: &ShardKey, what: String) -> StorageError {
    StorageError::Corrupt { key: Box::new(*key), at: None, what }
}
