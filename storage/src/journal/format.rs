//! Bytes of the journal.
//!
//! ```text
//! header   magic 8 | version u32 | CRC-64/NVME of both u64
//! frame    length of the entries u32 | entries | CRC-64/NVME of length and entries u64      one frame per append
//! entry    kind u8 | length u16 | payload
//! kind 1   incarnation u64
//! kind 2   evicted: shard key 66 | up to sequence u64
//! kind 3   part of a claim: see `claims.rs`
//! kind 4   claim ended: name
//! kind 5   mark: see `marks.rs`
//! kind 6   program, kind 7 program ended: see `programs.rs`
//! kind 8   part of a declared graph, kind 9 its progress, kind 10 graph ended: see `graphs.rs`
//! kind 11  wiped: up to sequence u64
//! kind 12  tier used: its position in `Tier::ALL` u8
//! ```
//! New kinds may be added without a new version: a build that does not know a kind refuses the file.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_types::{BlockKey, ClaimName, ShardKey, Tier};

use super::claims::{self, ClaimFacts, ClaimPart};
use super::graphs::{GraphFacts, GraphKey, GraphPart, GraphProgress};
use super::marks::MarkRecord;
use super::programs::{ProgramEnd, ProgramFacts, ProgramRecord};
use crate::codec::{Malformed, Reader, Writer, crc64};

const MAGIC: [u8; 8] = *b"KVTJNL\0\n";
pub(super) const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: usize = 8 + 4 + 8;

const KIND_INCARNATION: u8 = 1;
const KIND_EVICTED: u8 = 2;
const KIND_CLAIM: u8 = 3;
const KIND_CLAIM_ENDED: u8 = 4;
const KIND_MARK: u8 = 5;
const KIND_PROGRAM: u8 = 6;
const KIND_PROGRAM_ENDED: u8 = 7;
const KIND_GRAPH: u8 = 8;
const KIND_GRAPH_PROGRESS: u8 = 9;
const KIND_GRAPH_ENDED: u8 = 10;
const KIND_WIPED: u8 = 11;
const KIND_TIER_USED: u8 = 12;
/// Bytes before an entry's payload.
const ENTRY_HEAD_BYTES: usize = 1 + 2;
const EVICTED_BYTES: usize = 66 + 8;
/// Bytes of the longest entry of a length that is always the same.
pub(super) const MAX_FIXED_BYTES: usize = ENTRY_HEAD_BYTES + EVICTED_BYTES;

/// Longest frame: what a reader allocates at most, and the most that a torn append can leave.
pub(super) const MAX_FRAME_BYTES: usize = 1 << 20;

/// A fact that must outlive the process.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Entry {
    /// The number of this start of the daemon; the highest counts.
    Incarnation(u64),
    /// A verb evicted a shard: its records of at most that sequence stay dead, wherever they come up again.
    Evicted {
        /// The shard.
        key: ShardKey,
        /// The highest sequence that the verb covered.
        up_to_sequence: u64,
    },
    /// A piece of a claim: see [`super::ClaimRecord::parts`].
    Claim(ClaimPart),
    /// A claim is over.
    ClaimEnded(ClaimName),
    /// A verb said what a block means and is marked with; the latest word counts.
    Mark(BlockKey, MarkRecord),
    /// What a program or session holds; the latest word counts.
    Program(ProgramRecord),
    /// A program is forgotten, or was abandoned.
    ProgramEnded(ProgramEnd),
    /// A piece of a declared graph: see [`super::GraphRecord::parts`].
    Graph(GraphPart),
    /// How far the steps of a graph are; the latest word counts.
    GraphProgress(GraphProgress),
    /// A graph is forgotten.
    GraphEnded(GraphKey),
    /// What was evicted before is not known any more: all records of at most that sequence stay dead, whatever their
    /// keys and wherever they come up again. The highest counts, for good.
    Wiped {
        /// A sequence that no record of before is above.
        up_to_sequence: u64,
    },
    /// From now on a tier may hold records that this journal is about.
    TierUsed(Tier),
}

impl Entry {
    /// Bytes of its payload, at most 64 KiB.
    fn payload_bytes(&self) -> usize {
        match self {
            Self::Incarnation(_) | Self::Wiped { .. } => 8,
            Self::TierUsed(_) => 1,
            Self::Evicted { .. } => EVICTED_BYTES,
            Self::Claim(part) => part.payload_bytes(),
            Self::ClaimEnded(name) => claims::ended_bytes(name),
            Self::Mark(_, mark) => mark.payload_bytes(),
            Self::Program(record) => record.payload_bytes(),
            Self::ProgramEnded(end) => end.payload_bytes(),
            Self::Graph(part) => part.payload_bytes(),
            Self::GraphProgress(progress) => progress.payload_bytes(),
            Self::GraphEnded(key) => key.payload_bytes(),
        }
    }

    /// Its bytes.
    pub(super) fn bytes(&self) -> usize {
        ENTRY_HEAD_BYTES + self.payload_bytes()
    }

    fn encode(&self, body: &mut Vec<u8>) {
        let kind = match self {
            Self::Incarnation(_) => KIND_INCARNATION,
            Self::Evicted { .. } => KIND_EVICTED,
            Self::Claim(_) => KIND_CLAIM,
            Self::ClaimEnded(_) => KIND_CLAIM_ENDED,
            Self::Mark(..) => KIND_MARK,
            Self::Program(_) => KIND_PROGRAM,
            Self::ProgramEnded(_) => KIND_PROGRAM_ENDED,
            Self::Graph(_) => KIND_GRAPH,
            Self::GraphProgress(_) => KIND_GRAPH_PROGRESS,
            Self::GraphEnded(_) => KIND_GRAPH_ENDED,
            Self::Wiped { .. } => KIND_WIPED,
            Self::TierUsed(_) => KIND_TIER_USED,
        };
        let len = u16::try_from(self.payload_bytes()).expect("no payload is longer than 64 KiB");
        let mut writer = Writer(body);
        writer.u8(kind).u16(len);
        match self {
            Self::Incarnation(n) | Self::Wiped { up_to_sequence: n } => drop(writer.u64(*n)),
            Self::TierUsed(tier) => drop(writer.u8(u8::try_from(tier.index()).expect("there are four tiers"))),
            Self::Evicted { key, up_to_sequence } => drop(writer.key(key).u64(*up_to_sequence)),
            Self::Claim(part) => part.encode(&mut writer),
            Self::ClaimEnded(name) => claims::encode_name(name, &mut writer),
            Self::Mark(block, mark) => mark.encode(block, &mut writer),
            Self::Program(record) => record.encode(&mut writer),
            Self::ProgramEnded(end) => end.encode(&mut writer),
            Self::Graph(part) => part.encode(&mut writer),
            Self::GraphProgress(progress) => progress.encode(&mut writer),
            Self::GraphEnded(key) => key.encode(&mut writer),
        }
    }
}

/// Cuts entries into runs that each fit one frame.
pub fn batches(entries: &[Entry]) -> impl Iterator<Item = &[Entry]> {
    let mut rest = entries;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |entry: &&Entry| {
            bytes += entry.bytes();
            bytes <= MAX_FRAME_BYTES
        };
        let count = rest.iter().take_while(fits).count();
        let (batch, left) = rest.split_at(count);
        rest = left;
        (count > 0).then_some(batch)
    })
}

/// What the entries so far amount to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) incarnation: u64,
    pub(super) evicted: BTreeMap<ShardKey, u64>,
    pub(super) claims: ClaimFacts,
    pub(super) marks: BTreeMap<BlockKey, MarkRecord>,
    pub(super) programs: ProgramFacts,
    pub(super) graphs: GraphFacts,
    /// Records of at most this sequence are dead, whatever their keys; zero when nothing was lost.
    pub(super) wiped_up_to: u64,
    /// Tiers that hold records, as far as anybody said.
    pub(super) tiers: BTreeSet<Tier>,
}

impl Facts {
    pub(super) fn apply(&mut self, entry: &Entry) {
        match entry {
            Entry::Incarnation(n) => self.incarnation = self.incarnation.max(*n),
            Entry::Evicted { key, up_to_sequence } => {
                let sequence = self.evicted.entry(*key).or_default();
                *sequence = (*sequence).max(*up_to_sequence);
            }
            Entry::Mark(block, mark) => {
                self.marks.insert(*block, mark.clone());
            }
            Entry::Claim(part) => self.claims.part(part),
            Entry::ClaimEnded(name) => self.claims.ended(name),
            Entry::Program(record) => self.programs.record(record),
            Entry::ProgramEnded(end) => self.programs.end(end),
            Entry::Graph(part) => self.graphs.part(part),
            Entry::GraphProgress(progress) => self.graphs.progress(progress),
            Entry::GraphEnded(key) => self.graphs.end(key),
            Entry::Wiped { up_to_sequence } => self.wiped_up_to = self.wiped_up_to.max(*up_to_sequence),
            Entry::TierUsed(tier) => {
                self.tiers.insert(*tier);
            }
        }
    }

    /// The highest sequence that an entry names.
    pub(super) fn last_sequence(&self) -> u64 {
        let evicted = self.evicted.values().copied();
        let marked = self.marks.values().map(|mark| mark.up_to_sequence);
        let abandoned = self.programs.abandoned.values().copied();
        evicted.chain(marked).chain(abandoned).fold(self.wiped_up_to, u64::max)
    }

    /// The entries of a snapshot.
    pub(super) fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        let evicted = self.evicted.iter().map(|(&key, &up_to_sequence)| Entry::Evicted { key, up_to_sequence });
        let claims = self.claims.parts().map(Entry::Claim);
        // An abandoned program may have begun anew.
        let programs = self
            .programs
            .ends()
            .map(Entry::ProgramEnded)
            .chain(self.programs.live.values().cloned().map(Entry::Program));
        let marks = self.marks.iter().map(|(block, mark)| Entry::Mark(*block, mark.clone()));
        let of_graph = |(parts, progress): (Vec<GraphPart>, Option<GraphProgress>)| {
            parts.into_iter().map(Entry::Graph).chain(progress.map(Entry::GraphProgress))
        };
        let graphs = self.graphs.all().flat_map(of_graph);
        let wiped = (self.wiped_up_to > 0).then_some(Entry::Wiped { up_to_sequence: self.wiped_up_to });
        let tiers = self.tiers.iter().copied().map(Entry::TierUsed);
        let first = std::iter::once(Entry::Incarnation(self.incarnation)).chain(wiped).chain(tiers);
        first.chain(evicted).chain(claims).chain(marks).chain(programs).chain(graphs)
    }

    /// About as many bytes as a snapshot has.
    pub(super) fn snapshot_bytes(&self) -> u64 {
        let marks: usize = self.marks.values().map(|m| ENTRY_HEAD_BYTES + m.payload_bytes()).sum();
        let parts =
            self.claims.snapshot_bytes() + marks + self.programs.snapshot_bytes() + self.graphs.snapshot_bytes();
        // One entry for the incarnation and one for what is wiped.
        ((self.evicted.len() + self.tiers.len() + 2) * MAX_FIXED_BYTES + parts) as u64
    }
}

/// Why a journal cannot be used by this build. The file is left as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Newer {
    #[error("it has version {0}, this build knows up to {VERSION}")]
    Version(u32),
    #[error("it has an entry of kind {kind} at byte {offset}, which this build does not know")]
    Kind { kind: u8, offset: usize },
}

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    pub(super) facts: Facts,
    /// Where the last frame ends before which all is whole.
    pub(super) whole_bytes: usize,
    /// Where the first damage lies, if something after it is whole: then it is no torn tail.
    pub(super) damaged_at: Option<usize>,
}

pub(super) fn encode_header() -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES);
    Writer(&mut out).raw(&MAGIC).u32(VERSION);
    let crc = crc64(&out);
    Writer(&mut out).u64(crc);
    out
}

/// One frame of `entries`, which together have at most [`MAX_FRAME_BYTES`].
pub(super) fn encode_frame(entries: &[Entry]) -> Vec<u8> {
    let mut body = Vec::with_capacity(entries.iter().map(Entry::bytes).sum());
    entries.iter().for_each(|entry| entry.encode(&mut body));
    let mut frame = Vec::with_capacity(body.len() + 12);
    let len = u32::try_from(body.len()).expect("a frame is shorter than MAX_FRAME_BYTES");
    Writer(&mut frame).u32(len).raw(&body);
    let crc = crc64(&frame);
    Writer(&mut frame).u64(crc);
    frame
}

/// Reads a whole file. What cannot be read is skipped and told; entries after it still count, since a fact applied
/// without its neighbors is still a fact.
pub(super) fn parse(file: &[u8]) -> Result<Parsed, Newer> {
    let mut parsed = Parsed::default();
    let mut at = match check_header(file) {
        Ok(VERSION) => HEADER_BYTES,
        Ok(version) => return Err(Newer::Version(version)),
        Err(_) => 0,
    };
    parsed.whole_bytes = at;
    let mut bad = (at == 0).then_some(0);
    parsed.damaged_at = bad;
    while at < file.len() {
        match frame_at(&file[at..]) {
            Some(body) => {
                apply_body(&mut parsed.facts, body, at)?;
                at += body.len() + 12;
                parsed.damaged_at = bad;
                if bad.is_none() {
                    parsed.whole_bytes = at;
                }
            }
            None => {
                bad = bad.or(Some(at));
                at += 1;
            }
        }
    }
    Ok(parsed)
}

fn check_header(file: &[u8]) -> Result<u32, Malformed> {
    let mut reader = Reader(file);
    let head = reader.raw(12)?;
    if reader.u64()? != crc64(head) || !head.starts_with(&MAGIC) {
        return Err(Malformed("no journal header"));
    }
    Reader(&head[8..]).u32()
}

/// The entries of the frame that starts here, if a whole one does.
fn frame_at(bytes: &[u8]) -> Option<&[u8]> {
    let len = usize::try_from(Reader(bytes).u32().ok()?).ok()?;
    if len == 0 || len > MAX_FRAME_BYTES {
        return None;
    }
    let (framed, rest) = bytes.split_at_checked(4 + len)?;
    (Reader(rest).u64().ok()? == crc64(framed)).then_some(&framed[4..])
}

fn apply_body(facts: &mut Facts, body: &[u8], offset: usize) -> Result<(), Newer> {
    let mut reader = Reader(body);
    while !reader.0.is_empty() {
        let entry = entry(&mut reader).map_err(|kind| Newer::Kind { kind, offset })?;
        facts.apply(&entry);
    }
    Ok(())
}

/// One entry, or the kind that is not understood: under a right checksum, only a newer build writes those.
fn entry(reader: &mut Reader<'_>) -> Result<Entry, u8> {
    let kind = reader.u8().map_err(|_| 0)?;
    let len = reader.u16().map_err(|_| kind)?;
    let mut payload = Reader(reader.raw(usize::from(len)).map_err(|_| kind)?);
    let entry = match kind {
        KIND_INCARNATION => payload.u64().map(Entry::Incarnation),
        KIND_EVICTED => {
            payload.key().and_then(|key| payload.u64().map(|up_to_sequence| Entry::Evicted { key, up_to_sequence }))
        }
        KIND_CLAIM => ClaimPart::decode(&mut payload).map(Entry::Claim),
        KIND_CLAIM_ENDED => claims::decode_name(&mut payload).map(Entry::ClaimEnded),
        KIND_MARK => MarkRecord::decode(&mut payload).map(|(block, mark)| Entry::Mark(block, mark)),
        KIND_PROGRAM => ProgramRecord::decode(&mut payload).map(Entry::Program),
        KIND_PROGRAM_ENDED => ProgramEnd::decode(&mut payload).map(Entry::ProgramEnded),
        KIND_GRAPH => GraphPart::decode(&mut payload).map(Entry::Graph),
        KIND_GRAPH_PROGRESS => GraphProgress::decode(&mut payload).map(Entry::GraphProgress),
        KIND_GRAPH_ENDED => GraphKey::decode(&mut payload).map(Entry::GraphEnded),
        KIND_WIPED => payload.u64().map(|up_to_sequence| Entry::Wiped { up_to_sequence }),
        KIND_TIER_USED => payload.u8().and_then(tier).map(Entry::TierUsed),
        _ => return Err(kind),
    };
    if payload.0.is_empty() { entry.map_err(|_| kind) } else { Err(kind) }
}

fn tier(position: u8) -> Result<Tier, Malformed> {
    Tier::ALL.get(usize::from(position)).copied().ok_or(Malformed("an unknown tier"))
}
