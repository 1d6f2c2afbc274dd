//! How nodes, entries and digests lie in the server. What comes back is not trusted: decoders answer `None`.
//!
//! ```text
//! PREFIX:nodes  hash  ""            -> FORMAT
//!                     node id       -> until u64 | record: edition u64, state u8, free u64, peer, packs
//!                                      (state: 0 ready, 1 draining, 2 ready and warming; what knows no 2 leaves it out)
//! PREFIX:bXX    hash  node u64      -> digest: edition u64, sequence u64, count u64, sum u64, 40 zeros
//!                     key (16)      -> entries, in no order: node u64, edition u64, tiers u8
//! ```
//!
//! Numbers are big-endian. One hash holds all that a bucket knows, so that eviction or deletion takes entries and their
//! digests together, a bucket lies in one slot, and walking it needs no look at other programs' keys. The zeros make the
//! digest longer than what servers keep in the packed form of small hashes, in which every look-up is a scan.

use kvtier_policy::directory::{Batch, Digest, DirectoryKey, MAX_PACK_NEWS, NodeRecord, NodeState, Replica, Tiers};
use kvtier_types::{Edition, NodeId, NodeNumber};

/// What the data is called; another number for another layout.
pub(super) const FORMAT: &str = "kvtier directory 1";
/// Bytes of one entry.
const ENTRY: usize = 17;
/// Zeros after a digest.
const DIGEST_ZEROS: usize = 40;
/// Longest text within a record.
const MAX_TEXT: usize = 1024;

pub(super) fn node_field(node: NodeNumber) -> [u8; 8] {
    node.get().to_be_bytes()
}

pub(super) fn changes(batch: &Batch) -> Vec<u8> {
    let mut out = Vec::with_capacity(batch.changes.len() * ENTRY);
    for change in &batch.changes {
        out.extend_from_slice(change.key.as_bytes());
        out.push(change.tiers.bits());
    }
    out
}

pub(super) fn put_entry(out: &mut Vec<u8>, replica: &Replica) {
    out.extend_from_slice(&replica.node.get().to_be_bytes());
    out.extend_from_slice(&replica.edition.get().to_be_bytes());
    out.push(replica.tiers.bits());
}

/// The entries of a key, in the order of their nodes.
pub(super) fn entries(mut bytes: &[u8]) -> Option<Vec<Replica>> {
    let mut replicas = Vec::with_capacity(bytes.len() / ENTRY);
    while !bytes.is_empty() {
        let node = NodeNumber::new(take_u64(&mut bytes)?);
        let edition = Edition::new(take_u64(&mut bytes)?);
        let tiers = Tiers::from_bits(take(&mut bytes, 1)?[0]);
        replicas.push(Replica { node, edition, tiers });
    }
    replicas.sort_unstable_by_key(|r| r.node);
    Some(replicas)
}

pub(super) fn digest(mut bytes: &[u8]) -> Option<(Edition, Digest)> {
    let edition = Edition::new(take_u64(&mut bytes)?);
    let (sequence, count, sum) = (take_u64(&mut bytes)?, take_u64(&mut bytes)?, take_u64(&mut bytes)?);
    (bytes.len() == DIGEST_ZEROS).then_some((edition, Digest { sequence, count, sum }))
}

/// A field and value of a bucket: an entry's, or `None` for a digest or what is neither.
pub(super) fn entry_field(field: &[u8], value: &[u8]) -> Option<(DirectoryKey, Vec<Replica>)> {
    let key = <[u8; 16]>::try_from(field).ok()?;
    Some((DirectoryKey::new(key), entries(value)?))
}

/// A node's record, or why it cannot be written.
pub(super) fn record(record: &NodeRecord) -> Result<Vec<u8>, &'static str> {
    if record.packs.len() > MAX_PACK_NEWS {
        return Err("too many packs in the record");
    }
    let mut out = Vec::with_capacity(64 + record.packs.len() * 72);
    out.extend_from_slice(&record.edition.get().to_be_bytes());
    out.push(match (record.state, record.warming) {
        (NodeState::Ready, false) => 0,
        (NodeState::Draining, _) => 1,
        (NodeState::Ready, true) => 2,
    });
    out.extend_from_slice(&record.free_host_bytes.to_be_bytes());
    for text in [record.id.as_str(), &record.peer].into_iter().chain(record.packs.iter().map(String::as_str)) {
        let len = u16::try_from(text.len()).ok().filter(|l| usize::from(*l) <= MAX_TEXT);
        out.extend_from_slice(&len.ok_or("too long a text in the record")?.to_be_bytes());
        out.extend_from_slice(text.as_bytes());
    }
    Ok(out)
}

pub(super) fn read_record(mut bytes: &[u8]) -> Option<NodeRecord> {
    let bytes = &mut bytes;
    let edition = Edition::new(take_u64(bytes)?);
    let (state, warming) = match take(bytes, 1)?[0] {
        0 => (NodeState::Ready, false),
        1 => (NodeState::Draining, false),
        2 => (NodeState::Ready, true),
        _ => return None,
    };
    let free_host_bytes = take_u64(bytes)?;
    let id = NodeId::new(&take_text(bytes)?).ok()?;
    let peer = take_text(bytes)?;
    let mut packs = Vec::new();
    while !bytes.is_empty() && packs.len() < MAX_PACK_NEWS {
        packs.push(take_text(bytes)?);
    }
    bytes.is_empty().then_some(NodeRecord { id, edition, state, warming, peer, free_host_bytes, packs })
}

fn take<'a>(bytes: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(taken)
}

fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    take(bytes, 8)?.try_into().ok().map(u64::from_be_bytes)
}

fn take_text(bytes: &mut &[u8]) -> Option<String> {
    let len = u16::from_be_bytes(take(bytes, 2)?.try_into().ok()?);
    let text = take(bytes, usize::from(len).min(MAX_TEXT + 1))?;
    (text.len() <= MAX_TEXT).then(|| std::str::from_utf8(text).ok().map(str::to_owned)).flatten()
}

#[cfg(test)]
mod tests {
    use kvtier_policy::directory::{NodeRecord, NodeState};
    use kvtier_types::{Edition, NodeId};

    use super::{digest, entries, read_record, record};

    #[test]
    fn a_record_reads_as_it_was_written_and_no_cut_of_it_panics() {
        let written = NodeRecord {
            id: NodeId::new("a-1").unwrap(),
            edition: Edition::first(9).next(),
            state: NodeState::Draining,
            warming: false,
            peer: "host:1".into(),
            free_host_bytes: u64::MAX,
            packs: vec!["p".into(), String::new()],
        };
        for warming in [false, true] {
            let ready = NodeRecord { state: NodeState::Ready, warming, ..written.clone() };
            assert_eq!(read_record(&record(&ready).unwrap()), Some(ready));
        }
        let bytes = record(&written).unwrap();
        assert_eq!(read_record(&bytes), Some(written));
        for cut in 0..bytes.len() {
            assert_ne!(read_record(&bytes[..cut]).map(|r| r.packs.len()), Some(2), "{cut}");
        }
        for len in 0..80 {
            let noise = vec![0xff; len];
            assert_eq!(entries(&noise).is_some(), len % 17 == 0);
            assert_eq!(digest(&noise).is_some(), len == 72);
            assert_eq!(read_record(&noise), None);
        }
    }
}
