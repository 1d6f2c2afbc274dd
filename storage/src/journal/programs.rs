//! Programs in the journal: who holds what, and whose blocks do not come back.
//!
//! ```text
//! name     kind u8 (0 program, 1 session) | tenant str | id str
//! kind 6   program: name | flags u8 (1 ended, 2 it has a parent) | parent's id str, of one that has |
//!          tips u16 | shard key 66 each | ends of its latest call: shard key 66 each, to the entry's end
//! kind 7   program ended: name | flags u8 (1 abandoned) | up to sequence u64
//! ```
//! A later word on a program replaces the one before it. One that ended without being abandoned is forgotten; of an abandoned
//! one, what it wrote up to that sequence comes back only where somebody else holds it.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use kvtier_types::{ShardKey, TenantId};

use crate::codec::{Malformed, Reader, Writer};

/// Programs and sessions that are kept at most.
pub const MAX_PROGRAMS: usize = 1 << 16;
/// Abandoned programs that are kept at most; of the tenant that has most of them the earliest makes room.
pub const MAX_ABANDONED: usize = 1 << 16;
/// Tips of one program that are kept: those of the latest calls, and as many as an entry has room for.
pub const MAX_PROGRAM_TIPS: usize = 256;

const KEY_BYTES: usize = 66;
const MAX_ID_BYTES: usize = 128;
const ENDED: u8 = 1;
const HAS_PARENT: u8 = 2;
const ABANDONED: u8 = 1;

/// Names a program or session.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProgramName {
    /// Whether it is a session.
    pub session: bool,
    /// Whose it is.
    pub tenant: TenantId,
    /// The name its client gave it, at most 128 bytes.
    pub id: String,
}

/// What a program or session held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramRecord {
    /// Its name.
    pub name: ProgramName,
    /// The program that started it, of the same tenant.
    pub parent: Option<String>,
    /// It ended.
    pub ended: bool,
    /// Where its calls ended, at most [`MAX_PROGRAM_TIPS`].
    pub tips: Vec<ShardKey>,
    /// Where its latest call ended, at most as many.
    pub context: Vec<ShardKey>,
}

/// A program that is to be forgotten, or was abandoned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramEnd {
    /// Its name.
    pub name: ProgramName,
    /// Of one that was abandoned: what it wrote up to this sequence comes back only where somebody else holds it.
    pub abandoned_up_to: Option<u64>,
}

impl ProgramName {
    fn bytes(&self) -> usize {
        1 + 2 * 2 + self.tenant.as_str().len() + self.id.len()
    }

    fn encode(&self, writer: &mut Writer<'_>) {
        writer.u8(u8::from(self.session)).text(self.tenant.as_str()).text(&self.id);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let session = match reader.u8()? {
            0 => false,
            1 => true,
            _ => return Err(Malformed("neither a program nor a session")),
        };
        let tenant = TenantId::new(reader.text()?).map_err(|_| Malformed("bad tenant id"))?;
        Ok(Self { session, tenant, id: id(reader)? })
    }

    pub(super) const fn is_writable(&self) -> bool {
        self.id.len() <= MAX_ID_BYTES
    }
}

fn id(reader: &mut Reader<'_>) -> Result<String, Malformed> {
    let text = reader.text()?;
    if text.len() > MAX_ID_BYTES {
        return Err(Malformed("a program's name is longer than its bound"));
    }
    Ok(text.to_owned())
}

impl ProgramRecord {
    /// Whether it can be written.
    pub(super) fn is_writable(&self) -> bool {
        let bounded = self.tips.len() <= MAX_PROGRAM_TIPS && self.context.len() <= MAX_PROGRAM_TIPS;
        bounded && self.name.is_writable() && self.parent.as_ref().is_none_or(|p| p.len() <= MAX_ID_BYTES)
    }

    pub(super) fn payload_bytes(&self) -> usize {
        let parent = self.parent.as_ref().map_or(0, |p| 2 + p.len());
        self.name.bytes() + 1 + parent + 2 + (self.tips.len() + self.context.len()) * KEY_BYTES
    }

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        self.name.encode(writer);
        let flags = if self.ended { ENDED } else { 0 } | if self.parent.is_some() { HAS_PARENT } else { 0 };
        writer.u8(flags);
        if let Some(parent) = &self.parent {
            writer.text(parent);
        }
        writer.u16(u16::try_from(self.tips.len()).expect("tips are bounded"));
        for key in self.tips.iter().chain(&self.context) {
            writer.key(key);
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let name = ProgramName::decode(reader)?;
        let flags = reader.u8()?;
        if flags & !(ENDED | HAS_PARENT) != 0 {
            return Err(Malformed("unknown flags of a program"));
        }
        let parent = if flags & HAS_PARENT == 0 { None } else { Some(id(reader)?) };
        let count = usize::from(reader.u16()?);
        if count > MAX_PROGRAM_TIPS || reader.0.len() > 2 * MAX_PROGRAM_TIPS * KEY_BYTES {
            return Err(Malformed("more tips than a program may have"));
        }
        let tips = (0..count).map(|_| reader.key()).collect::<Result<_, _>>()?;
        let mut context = Vec::with_capacity(reader.0.len() / KEY_BYTES);
        while !reader.0.is_empty() {
            context.push(reader.key()?);
        }
        Ok(Self { name, parent, ended: flags & ENDED != 0, tips, context })
    }
}

impl ProgramEnd {
    pub(super) fn payload_bytes(&self) -> usize {
        self.name.bytes() + 1 + 8
    }

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        self.name.encode(writer);
        writer.u8(if self.abandoned_up_to.is_some() { ABANDONED } else { 0 }).u64(self.abandoned_up_to.unwrap_or(0));
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let name = ProgramName::decode(reader)?;
        let (flags, up_to) = (reader.u8()?, reader.u64()?);
        match flags {
            0 => Ok(Self { name, abandoned_up_to: None }),
            ABANDONED => Ok(Self { name, abandoned_up_to: Some(up_to) }),
            _ => Err(Malformed("unknown flags of a program's end")),
        }
    }
}

/// What the entries so far amount to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ProgramFacts {
    pub(super) live: BTreeMap<ProgramName, ProgramRecord>,
    pub(super) abandoned: BTreeMap<ProgramName, u64>,
}

impl ProgramFacts {
    pub(super) fn record(&mut self, record: &ProgramRecord) {
        if self.live.len() < MAX_PROGRAMS || self.live.contains_key(&record.name) {
            self.live.insert(record.name.clone(), record.clone());
        }
    }

    pub(super) fn end(&mut self, end: &ProgramEnd) {
        self.live.remove(&end.name);
        let Some(up_to) = end.abandoned_up_to else { return };
        if self.abandoned.len() >= MAX_ABANDONED && !self.abandoned.contains_key(&end.name) {
            self.make_room();
        }
        let known = self.abandoned.entry(end.name.clone()).or_default();
        *known = (*known).max(up_to);
    }

    /// Forgets the earliest abandoned program of the tenant that has most of them, as the core does.
    fn make_room(&mut self) {
        let mut counts: BTreeMap<&TenantId, usize> = BTreeMap::new();
        for name in self.abandoned.keys() {
            *counts.entry(&name.tenant).or_default() += 1;
        }
        let most = self.abandoned.iter().map(|(name, up_to)| (counts[&name.tenant], Reverse((*up_to, name))));
        if let Some(name) = most.max().map(|(_, Reverse((_, name)))| name.clone()) {
            self.abandoned.remove(&name);
        }
    }

    /// Those of a snapshot.
    pub(super) fn ends(&self) -> impl Iterator<Item = ProgramEnd> + '_ {
        self.abandoned.iter().map(|(name, up_to)| ProgramEnd { name: name.clone(), abandoned_up_to: Some(*up_to) })
    }

    /// Bytes of a snapshot's payloads.
    pub(super) fn snapshot_bytes(&self) -> usize {
        let live: usize = self.live.values().map(|record| record.payload_bytes() + 3).sum();
        live + self.abandoned.keys().map(|name| name.bytes() + 12).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tenant_that_abandoned_most_is_forgotten_first() {
        let name = |tenant: &str, id: &str| {
            let tenant = TenantId::new(tenant).expect("a good id");
            ProgramName { session: false, tenant, id: id.into() }
        };
        let mut facts = ProgramFacts::default();
        facts.abandoned.insert(name("quiet", "a"), 1);
        facts.abandoned.insert(name("loud", "b"), 3);
        facts.abandoned.insert(name("loud", "c"), 2);
        facts.make_room();
        assert!(!facts.abandoned.contains_key(&name("loud", "c")), "the earliest of the tenant that has most");
        facts.make_room();
        assert!(!facts.abandoned.contains_key(&name("quiet", "a")), "of equals the earliest");
        assert_eq!(facts.abandoned.len(), 1);
    }
}
