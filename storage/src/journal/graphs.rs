//! Declared graphs in the journal: what programs said they would do, and how far they were.
//!
//! ```text
//! name      tenant str | program str
//! kind 8    part of a declaration: flags u8 (1 first, 2 last) | name | revision u64 | bytes to the entry's end
//! kind 9    progress: name | revision u64 | steps u16 | two bits a step, four steps a byte, the first lowest
//! kind 10   graph ended: name
//! ```
//! The bytes of a declaration are its writer's business. Its parts follow each other; until its last one it does not count.
//! A later declaration of a name replaces the one before it, and its progress. Progress of another revision is left out.

use std::collections::BTreeMap;

use kvtier_types::TenantId;

use crate::codec::{Malformed, Reader, Writer};

/// Declarations that are kept at most.
pub const MAX_GRAPHS: usize = 1 << 13;
/// Bytes of one declaration: its parts fit one frame, so that it is durable as a whole or not at all.
pub const MAX_GRAPH_BYTES: usize = 900 << 10;
/// Bytes of all declarations.
pub const MAX_GRAPHS_BYTES: usize = 40 << 20;
/// Steps whose progress is kept, of one graph.
pub const MAX_GRAPH_STEPS: usize = 4096;

const MAX_ID_BYTES: usize = 128;
/// Bytes of one part: what an entry has room for, less its head.
const PART_BYTES: usize = 60_000;
const FIRST: u8 = 1;
const LAST: u8 = 2;
const STEPS_PER_BYTE: usize = 4;

/// Names a graph.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct GraphKey {
    /// Whose it is.
    pub tenant: TenantId,
    /// The program that declared it, at most 128 bytes.
    pub program: String,
}

/// A declaration, and how far it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GraphRecord {
    /// Its name.
    pub key: GraphKey,
    /// Its revision.
    pub revision: u64,
    /// The declaration, at most [`MAX_GRAPH_BYTES`].
    pub bytes: Vec<u8>,
    /// How far its steps were: numbers from 0 to 3, in the order of the declaration; empty when none had begun.
    pub progress: Vec<u8>,
}

/// A piece of a declaration that one entry has room for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GraphPart {
    key: GraphKey,
    revision: u64,
    bytes: Vec<u8>,
    flags: u8,
}

/// How far the steps of a graph are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GraphProgress {
    /// Its name.
    pub key: GraphKey,
    /// The revision that the steps are of.
    pub revision: u64,
    /// Numbers from 0 to 3, in the order of the declaration, at most [`MAX_GRAPH_STEPS`].
    pub steps: Vec<u8>,
}

impl GraphKey {
    fn bytes(&self) -> usize {
        2 * 2 + self.tenant.as_str().len() + self.program.len()
    }

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        writer.text(self.tenant.as_str()).text(&self.program);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let tenant = TenantId::new(reader.text()?).map_err(|_| Malformed("bad tenant id"))?;
        let program = reader.text()?.to_owned();
        if program.len() > MAX_ID_BYTES {
            return Err(Malformed("a program's name is longer than its bound"));
        }
        Ok(Self { tenant, program })
    }

    pub(super) const fn is_writable(&self) -> bool {
        self.program.len() <= MAX_ID_BYTES
    }

    pub(super) fn payload_bytes(&self) -> usize {
        self.bytes()
    }
}

impl GraphRecord {
    /// The pieces to append, in order, in one call.
    #[must_use]
    pub fn parts(&self) -> Vec<GraphPart> {
        let last = self.bytes.chunks(PART_BYTES).count().saturating_sub(1);
        let part = |(at, bytes): (usize, &[u8])| {
            let flags = if at == 0 { FIRST } else { 0 } | if at == last { LAST } else { 0 };
            GraphPart { key: self.key.clone(), revision: self.revision, bytes: bytes.to_vec(), flags }
        };
        self.bytes.chunks(PART_BYTES).enumerate().map(part).collect()
    }
}

impl GraphPart {
    pub(super) const fn key(&self) -> &GraphKey {
        &self.key
    }

    pub(super) fn payload_bytes(&self) -> usize {
        1 + self.key.bytes() + 8 + self.bytes.len()
    }

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        writer.u8(self.flags);
        self.key.encode(writer);
        writer.u64(self.revision).raw(&self.bytes);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let flags = reader.u8()?;
        if flags & !(FIRST | LAST) != 0 {
            return Err(Malformed("unknown flags of a declaration"));
        }
        let (key, revision) = (GraphKey::decode(reader)?, reader.u64()?);
        let bytes = reader.raw(reader.0.len())?.to_vec();
        Ok(Self { key, revision, bytes, flags })
    }
}

impl GraphProgress {
    pub(super) const fn is_writable(&self) -> bool {
        self.key.is_writable() && self.steps.len() <= MAX_GRAPH_STEPS
    }

    pub(super) fn payload_bytes(&self) -> usize {
        self.key.bytes() + 8 + 2 + self.steps.len().div_ceil(STEPS_PER_BYTE)
    }

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        self.key.encode(writer);
        writer.u64(self.revision).u16(u16::try_from(self.steps.len()).expect("steps are bounded"));
        for four in self.steps.chunks(STEPS_PER_BYTE) {
            let byte = four.iter().rev().fold(0, |byte, state| byte << 2 | (state & 3));
            writer.u8(byte);
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let (key, revision) = (GraphKey::decode(reader)?, reader.u64()?);
        let count = usize::from(reader.u16()?);
        if count > MAX_GRAPH_STEPS {
            return Err(Malformed("more steps than a graph may have"));
        }
        let bytes = reader.raw(count.div_ceil(STEPS_PER_BYTE))?;
        let of_byte = |byte: &u8| [0, 2, 4, 6].map(|shift| byte >> shift & 3);
        let mut steps: Vec<u8> = bytes.iter().flat_map(of_byte).collect();
        steps.truncate(count);
        Ok(Self { key, revision, steps })
    }
}

/// What the entries so far amount to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct GraphFacts {
    pub(super) live: BTreeMap<GraphKey, GraphRecord>,
    /// Bytes of all declarations.
    bytes: usize,
    /// A declaration whose last part is still to come.
    arriving: Option<GraphRecord>,
}

impl GraphFacts {
    /// Whether there is room for these parts.
    pub(super) fn has_room<'a>(&self, parts: impl Iterator<Item = &'a GraphPart> + Clone) -> bool {
        let more: usize = parts.clone().map(|part| part.bytes.len()).sum();
        let fresh = parts.filter(|part| part.flags & FIRST != 0 && !self.live.contains_key(&part.key)).count();
        self.bytes + more <= MAX_GRAPHS_BYTES && self.live.len() + fresh <= MAX_GRAPHS
    }

    pub(super) fn part(&mut self, part: &GraphPart) {
        if part.flags & FIRST != 0 {
            let (key, revision) = (part.key.clone(), part.revision);
            self.arriving = Some(GraphRecord { key, revision, bytes: Vec::new(), progress: Vec::new() });
        }
        let belongs = |a: &&mut GraphRecord| a.key == part.key && a.revision == part.revision;
        let Some(arriving) = self.arriving.as_mut().filter(belongs) else { return };
        arriving.bytes.extend(&part.bytes);
        if part.flags & LAST != 0
            && let Some(whole) = self.arriving.take()
        {
            self.end(&whole.key);
            if whole.bytes.len() <= MAX_GRAPH_BYTES && self.live.len() < MAX_GRAPHS {
                self.bytes += whole.bytes.len();
                self.live.insert(whole.key.clone(), whole);
            }
        }
    }

    pub(super) fn progress(&mut self, progress: &GraphProgress) {
        let live = self.live.get_mut(&progress.key);
        if let Some(graph) = live.filter(|graph| graph.revision == progress.revision) {
            graph.progress.clone_from(&progress.steps);
        }
    }

    pub(super) fn end(&mut self, key: &GraphKey) {
        if let Some(gone) = self.live.remove(key) {
            self.bytes -= gone.bytes.len();
        }
    }

    /// Those of a snapshot: the parts of each declaration, and then its progress.
    pub(super) fn all(&self) -> impl Iterator<Item = (Vec<GraphPart>, Option<GraphProgress>)> + '_ {
        self.live.values().map(|graph| {
            let (key, revision, steps) = (graph.key.clone(), graph.revision, graph.progress.clone());
            (graph.parts(), (!steps.is_empty()).then_some(GraphProgress { key, revision, steps }))
        })
    }

    /// About as many bytes as those of a snapshot have.
    pub(super) fn snapshot_bytes(&self) -> usize {
        let heads = |graph: &GraphRecord| {
            let parts = graph.bytes.len().div_ceil(PART_BYTES);
            (parts + 1) * (graph.key.bytes() + 16) + graph.progress.len().div_ceil(STEPS_PER_BYTE)
        };
        self.bytes + self.live.values().map(heads).sum::<usize>()
    }
}
