//! What a lookup's lease offers, and what became of the tokens asked for.

use std::sync::Arc;
use std::time::Duration;

use kvtier_types::{GroupSpec, Origin, Tier, usable_prefix};

use super::lookup::{reference_group, to_u16, to_u32};
use super::readers::Readers;
use super::{Core, CoreError};
use crate::entry::Flags;
use crate::frame::FrameRef;
use crate::lease::{Lease, LeaseId, Leased, Run};
use crate::ledger::{Fate, MissReason};

/// A frame to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerFrame {
    /// Where the bytes are.
    pub frame: FrameRef,
    /// How many.
    pub bytes: u32,
    /// Their CRC-64/NVME.
    pub checksum: u64,
    /// Where they came from.
    pub source: Origin,
}

/// The answer for one range.
#[derive(Debug, Clone, Default)]
pub struct RangeAnswer {
    /// For each block asked, the slowest origin of its shards, `None` for a miss.
    pub found: Vec<Option<Origin>>,
    /// Frames of the found blocks, shard by shard.
    pub frames: Vec<AnswerFrame>,
}

/// The answer to a lookup, ranges as asked.
#[derive(Debug, Clone, Default)]
pub struct LookupAnswer {
    /// One answer a range.
    pub ranges: Vec<RangeAnswer>,
}

impl Core {
    /// Shards of a lease still on their way up.
    ///
    /// # Errors
    /// [`CoreError::UnknownLease`].
    pub fn waiting(&self, lease: LeaseId) -> Result<usize, CoreError> {
        self.leases.get(&lease).map(|l| l.waiting).ok_or(CoreError::UnknownLease)
    }

    /// The answer as it stands: what is in host memory now, or on a device that its readers can read. What is still on its
    /// way counts as late.
    ///
    /// # Errors
    /// [`CoreError::UnknownLease`].
    pub fn collect(&mut self, lease: LeaseId) -> Result<LookupAnswer, CoreError> {
        let held = self.leases.get(&lease).ok_or(CoreError::UnknownLease)?;
        let attachment = self.attached(held.attachment)?;
        let layout = Arc::clone(&attachment.layout);
        let shards = usize::from(layout.shards);
        let readers = self.readers(attachment.engine);
        // Leased shards are grouped by block, in shard order, and the blocks of a group are consecutive: from a group's
        // first, its others are found by counting.
        let starts: Vec<(usize, u32)> = (0..layout.groups.len())
            .map(|group| {
                let start = held.blocks.partition_point(|l| usize::from(l.group) < group);
                (start, held.blocks.get(start).map_or(0, |l| l.block))
            })
            .collect();
        // It may have come with a taint, or have got one since it was leased.
        let denied = |l: &Leased| self.denies(self.catalog.get(l.id), &held.tolerations);
        let over = |l: &Leased| self.catalog.get(l.id).expires <= self.clock;
        let ready = |group: usize, block: u32| -> Option<&[Leased]> {
            let (start, first) = *starts.get(group)?;
            let start = start + block.checked_sub(first)? as usize * shards;
            let run = held.blocks.get(start..start + shards)?;
            let key = (to_u16(to_u32(group)), block);
            let here = |l: &Leased| self.in_host(l.id) || self.readable(l.id, (l.shard, &readers)).is_some();
            let complete = run.iter().all(|l| (l.group, l.block) == key && here(l) && !denied(l) && !over(l));
            complete.then_some(run)
        };
        let end = held.asked.iter().map(|(g, first, n)| (first + n) * layout.groups[usize::from(*g)].block_tokens);
        let max_tokens = end.max().unwrap_or(0);
        let usable = usable_prefix(&layout.groups, held.local_tokens, max_tokens, |g, b| ready(g, b).is_some());
        let mut answer = LookupAnswer::default();
        for (group, first, count) in &held.asked {
            let needed = layout.groups[usize::from(*group)].needed_blocks(usable);
            let frames = needed.len().min(*count as usize) * shards;
            let mut range =
                RangeAnswer { found: Vec::with_capacity(*count as usize), frames: Vec::with_capacity(frames) };
            for block in *first..first + count {
                let run = if needed.contains(&block) { ready(usize::from(*group), block) } else { None };
                let first = range.frames.len();
                range.frames.extend(run.unwrap_or_default().iter().map(|l| self.answer_frame(l, &readers)));
                range.found.push(range.frames[first..].iter().map(|frame| frame.source).max());
            }
            answer.ranges.push(range);
        }
        let why = |leased: &Leased| {
            let entry = self.catalog.get(leased.id);
            if denied(leased) {
                return MissReason::Denied;
            }
            if over(leased) {
                return MissReason::Expired;
            }
            let coming = entry.flags.has(Flags::TO_HOST) || entry.visible();
            if coming { MissReason::Late } else { self.ghost.get(&entry.key).unwrap_or(MissReason::Unavailable) }
        };
        let runs = fates(held, &layout.groups, usable, (&answer, &why));
        if let Some(held) = self.leases.get_mut(&lease) {
            held.runs = runs;
            if let Some(since) = held.waits_since.take() {
                self.admission.observe(self.clock, Duration::ZERO, self.clock.since(since));
            }
        }
        Ok(answer)
    }

    fn answer_frame(&self, leased: &Leased, readers: &Readers) -> AnswerFrame {
        let entry = self.catalog.get(leased.id);
        let (bytes, checksum) = (entry.bytes, entry.checksum);
        if let Some(frame) = self.readable(leased.id, (leased.shard, readers)) {
            return AnswerFrame { frame, bytes, checksum, source: Origin::Tier(Tier::Device) };
        }
        let frame = entry.host.expect("collected shards are in host memory, or on a device");
        AnswerFrame { frame, bytes, checksum, source: leased.source }
    }
}

/// Fates of the tokens beyond the engine's own, in prefix order.
fn fates(
    held: &Lease,
    groups: &[GroupSpec],
    usable: u32,
    (answer, why): (&LookupAnswer, &dyn Fn(&Leased) -> MissReason),
) -> Vec<Run> {
    let reference = reference_group(groups);
    let Some(at) = held.asked.iter().position(|(g, _, _)| usize::from(*g) == reference) else { return Vec::new() };
    let (_, first, _) = held.asked[at];
    let tokens = groups[reference].block_tokens;
    let found = &answer.ranges[at].found;
    let slowest = |origin: &Option<Origin>| origin.unwrap_or(Origin::Tier(Tier::Host));
    let mut runs: Vec<Run> = Vec::new();
    for (index, tier) in found.iter().enumerate() {
        let block = first + to_u32(index);
        if (block + 1) * tokens <= held.local_tokens {
            continue;
        }
        let fate = if (block + 1) * tokens <= usable {
            Fate::Served(slowest(tier))
        } else {
            let wanted = (to_u16(to_u32(reference)), block);
            let leased = held.blocks.binary_search_by_key(&(wanted.0, wanted.1, 0), |l| (l.group, l.block, l.shard));
            let reason = held.reasons.get(index).copied().unwrap_or(MissReason::Novel);
            Fate::Missed(leased.map_or(reason, |at| why(&held.blocks[at])))
        };
        match runs.last_mut() {
            Some(Run { fate: last, tokens: sum }) if *last == fate => *sum += tokens,
            _ => runs.push(Run { fate, tokens }),
        }
    }
    runs
}
