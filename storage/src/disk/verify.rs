//! The check between a read and its caller: nothing passes that is not the record asked for, whole.

use kvtier_memory::IoBuf;
use kvtier_types::ShardKey;

use crate::disk::index::Pin;
use crate::disk::record::{PAGE_BYTES, RecordHeader};
use crate::io::Part;
use crate::store::{Expect, Location, StorageError};

/// Checks what was read: the header against what the index and the caller know, the payload against its checksum.
pub(crate) fn verify(
    key: &ShardKey,
    at: Location,
    expect: Expect,
    parts: &[Part],
    pin: &Pin,
) -> Result<(), StorageError> {
    let corrupt = |what: String| StorageError::Corrupt { key: Box::new(*key), at: Some(at), what };
    let [Part { buf: page @ IoBuf::Heap(_), .. }, payload] = parts else {
        return Err(corrupt("the buffers did not come back".into()));
    };
    let mut bytes = [0; PAGE_BYTES];
    page.copy_out(&mut bytes);
    let header = RecordHeader::decode(&bytes).map_err(|why| corrupt(why.to_string()))?;
    let meta = &header.meta;
    let checks = [
        ("epoch", header.epoch, pin.epoch),
        ("offset", u64::from(header.offset), u64::from(at.offset)),
        ("sequence", meta.sequence, pin.sequence),
        ("length", meta.bytes, expect.bytes),
        ("recorded checksum", meta.checksum, expect.checksum),
    ];
    if meta.key != *key {
        return Err(corrupt(format!("the record is of {}", meta.key)));
    }
    for (what, found, expected) in checks {
        if found != expected {
            return Err(corrupt(format!("{what} {found:#x}, expected {expected:#x}")));
        }
    }
    let len = usize::try_from(expect.bytes).map_err(|e| corrupt(e.to_string()))?;
    let found = payload.buf.checksum_at(0, len);
    if found != expect.checksum {
        return Err(corrupt(format!("payload checksum {found:#018x}, expected {:#018x}", expect.checksum)));
    }
    Ok(())
}
