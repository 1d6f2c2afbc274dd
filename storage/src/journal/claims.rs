//! Claims in the journal.
//!
//! ```text
//! name     tenant str | owner str | id str
//! kind 3   part of a claim: flags u8 (1 first, 2 last) | name | revision u64 | kind u8 (0 pin, 1 retain) |
//!          tier or priority u8 | until, Unix milliseconds u64 | blocks: (block key 32 | bytes u64) to the entry's end
//! kind 4   claim ended: name
//! ```
//! A claim's parts follow each other; until its last one it does not count, so that a crash among its frames leaves the
//! claim as it was before. A later claim of the same name replaces the one before it.

use std::collections::BTreeMap;

use kvtier_types::{BlockKey, ClaimBlock, ClaimKind, ClaimName, TenantId, Tier};

use crate::codec::{Malformed, Reader, Writer};

/// Claims that are kept at most.
pub const MAX_CLAIMS: usize = 1 << 14;
/// Blocks of all claims together: 40 MB of journal.
pub const MAX_CLAIM_BLOCKS: usize = 1 << 20;
/// Blocks of one part: as many as an entry has room for.
const PART_BLOCKS: usize = (u16::MAX as usize - MAX_HEAD_BYTES) / BLOCK_BYTES;

const BLOCK_BYTES: usize = 32 + 8;
const MAX_NAME_BYTES: usize = 3 * 2 + TenantId::MAX_BYTES + 2 * ClaimName::MAX_PART_BYTES;
const MAX_HEAD_BYTES: usize = 1 + MAX_NAME_BYTES + 8 + 1 + 1 + 8;
const FIRST: u8 = 1;
const LAST: u8 = 2;
const PIN: u8 = 0;
const RETAIN: u8 = 1;

/// A claim as it was acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimRecord {
    /// Its name.
    pub name: ClaimName,
    /// Its revision.
    pub revision: u64,
    /// What it asks for.
    pub kind: ClaimKind,
    /// When it ends, in milliseconds of Unix time.
    pub until_unix_ms: u64,
    /// Its blocks, in prefix order.
    pub blocks: Vec<ClaimBlock>,
}

/// A piece of a claim that one entry has room for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimPart {
    /// The claim, with the blocks of this piece only.
    record: ClaimRecord,
    flags: u8,
}

impl ClaimRecord {
    /// The pieces to append, in order.
    #[must_use]
    pub fn parts(&self) -> Vec<ClaimPart> {
        let mut chunks: Vec<&[ClaimBlock]> = self.blocks.chunks(PART_BLOCKS).collect();
        if chunks.is_empty() {
            chunks.push(&[]);
        }
        let last = chunks.len() - 1;
        let part = |(at, blocks): (usize, &[ClaimBlock])| {
            let flags = if at == 0 { FIRST } else { 0 } | if at == last { LAST } else { 0 };
            let head = Self { name: self.name.clone(), blocks: blocks.to_vec(), ..*self };
            ClaimPart { record: head, flags }
        };
        chunks.into_iter().enumerate().map(part).collect()
    }
}

impl ClaimPart {
    pub(super) const fn name(&self) -> &ClaimName {
        &self.record.name
    }

    /// Bytes of its payload.
    pub(super) fn payload_bytes(&self) -> usize {
        1 + name_bytes(&self.record.name) + 8 + 2 + 8 + self.record.blocks.len() * BLOCK_BYTES
    }

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        let (kind, of) = match self.record.kind {
            ClaimKind::Pin(tier) => (PIN, u8::try_from(tier.index()).expect("there are four tiers")),
            ClaimKind::Retain(priority) => (RETAIN, priority),
        };
        writer.u8(self.flags);
        encode_name(&self.record.name, writer);
        writer.u64(self.record.revision).u8(kind).u8(of).u64(self.record.until_unix_ms);
        for block in &self.record.blocks {
            writer.raw(block.key.as_bytes()).u64(block.bytes);
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let flags = reader.u8()?;
        let name = decode_name(reader)?;
        let revision = reader.u64()?;
        let (kind, of) = (reader.u8()?, reader.u8()?);
        let kind = match kind {
            PIN => {
                let tier = Tier::ALL.get(usize::from(of)).ok_or(Malformed("a claim on an unknown tier"))?;
                ClaimKind::Pin(*tier)
            }
            RETAIN => ClaimKind::Retain(of),
            _ => return Err(Malformed("an unknown kind of claim")),
        };
        let until_unix_ms = reader.u64()?;
        let mut blocks = Vec::with_capacity(reader.0.len() / BLOCK_BYTES);
        while !reader.0.is_empty() {
            blocks.push(ClaimBlock { key: BlockKey::new(reader.array()?), bytes: reader.u64()? });
        }
        Ok(Self { record: ClaimRecord { name, revision, kind, until_unix_ms, blocks }, flags })
    }
}

fn name_bytes(name: &ClaimName) -> usize {
    3 * 2 + name.tenant.as_str().len() + name.owner.len() + name.id.len()
}

/// Bytes of the payload that says that a claim ended.
pub(super) fn ended_bytes(name: &ClaimName) -> usize {
    name_bytes(name)
}

pub(super) fn encode_name(name: &ClaimName, writer: &mut Writer<'_>) {
    writer.text(name.tenant.as_str()).text(&name.owner).text(&name.id);
}

pub(super) fn decode_name(reader: &mut Reader<'_>) -> Result<ClaimName, Malformed> {
    let tenant = TenantId::new(reader.text()?).map_err(|_| Malformed("bad tenant id"))?;
    let mut part = || {
        let text = reader.text()?;
        if text.len() > ClaimName::MAX_PART_BYTES {
            return Err(Malformed("a part of a claim's name is longer than its bound"));
        }
        Ok(text.to_owned())
    };
    Ok(ClaimName { tenant, owner: part()?, id: part()? })
}

/// Whether a name can be written.
pub(super) fn is_writable(name: &ClaimName) -> bool {
    name.owner.len().max(name.id.len()) <= ClaimName::MAX_PART_BYTES
}

/// What the entries so far amount to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ClaimFacts {
    pub(super) live: BTreeMap<ClaimName, ClaimRecord>,
    /// Claims whose last part did not come yet.
    unfinished: BTreeMap<ClaimName, ClaimRecord>,
}

impl ClaimFacts {
    pub(super) fn part(&mut self, part: &ClaimPart) {
        let ClaimPart { record, flags } = part;
        if flags & FIRST != 0 {
            self.unfinished.insert(record.name.clone(), record.clone());
        } else if let Some(claim) = self.unfinished.get_mut(&record.name) {
            claim.blocks.extend_from_slice(&record.blocks);
        }
        if flags & LAST != 0
            && let Some(claim) = self.unfinished.remove(&record.name)
        {
            self.live.insert(record.name.clone(), claim);
        }
    }

    pub(super) fn ended(&mut self, name: &ClaimName) {
        self.live.remove(name);
        self.unfinished.remove(name);
    }

    /// Whether there is room for what a batch adds.
    pub(super) fn has_room<'a>(&self, parts: impl Iterator<Item = &'a ClaimPart>) -> bool {
        let known = self.live.values().chain(self.unfinished.values());
        let (mut claims, mut blocks) = known.fold((0, 0), |(n, b), c| (n + 1, b + c.blocks.len()));
        for part in parts {
            claims += usize::from(part.flags & FIRST != 0);
            blocks += part.record.blocks.len();
        }
        claims <= MAX_CLAIMS && blocks <= MAX_CLAIM_BLOCKS
    }

    /// The parts of a snapshot: those of unfinished claims lack the last.
    pub(super) fn parts(&self) -> impl Iterator<Item = ClaimPart> + '_ {
        let open = |part: ClaimPart| ClaimPart { flags: part.flags & !LAST, ..part };
        let unfinished = self.unfinished.values().flat_map(ClaimRecord::parts).map(open);
        self.live.values().flat_map(ClaimRecord::parts).chain(unfinished)
    }

    /// Bytes of a snapshot's entries.
    pub(super) fn snapshot_bytes(&self) -> usize {
        let of = |c: &ClaimRecord| MAX_HEAD_BYTES + c.blocks.len() * BLOCK_BYTES;
        self.live.values().chain(self.unfinished.values()).map(of).sum()
    }
}
