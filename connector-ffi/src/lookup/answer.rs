//! What the daemon answered to one lookup, checked against the question.

use bytes::Bytes;
use kvtier_proto::v1;
use kvtier_types::{BlockKey, GroupSpec, Layout, prefix_step, usable_prefix};

use crate::frame::FrameRef;

/// Keys of one group that a lookup asks for; a lookup has one of these for every group, in order.
#[derive(Debug, Clone)]
pub struct RangeKeys {
    /// Index of the first block.
    pub first_block: u32,
    /// Keys of it and the following blocks.
    pub keys: Vec<BlockKey>,
}

/// The usable part of a lookup's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hit {
    /// Usable prefix in tokens, from the first token; zero when nothing beyond the computed part is usable.
    pub tokens: u32,
    /// Tokens beyond the computed part that are in a device's memory.
    pub device_tokens: u32,
    /// Those that came from host memory.
    pub host_tokens: u32,
    /// Those that came from disk.
    pub disk_tokens: u32,
    /// Those that came from the object store.
    pub object_tokens: u32,
    /// Those that came from another node.
    pub peer_tokens: u32,
}

/// A reply that does not fit its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the daemon's reply does not fit the request: {0}")]
pub struct BadReply(pub &'static str);

/// A checked answer.
#[derive(Debug)]
pub struct Answer {
    ranges: Vec<RangeAnswer>,
    shards: usize,
    /// Tokens the lookup covered, the local ones included.
    covered_tokens: u32,
}

#[derive(Debug)]
struct RangeAnswer {
    first_block: u32,
    keys: Vec<BlockKey>,
    found: Bytes,
    /// For each block, how many were found before it.
    rank: Vec<u32>,
    frames: Vec<v1::Frame>,
}

impl Answer {
    /// Checks a reply to a lookup of `asked` under `layout`.
    ///
    /// # Errors
    /// [`BadReply`] when counts or sizes differ from what was asked: such a reply is not used at all.
    pub fn check(asked: Vec<RangeKeys>, reply: v1::LookupReply, layout: &Layout) -> Result<Self, BadReply> {
        if reply.ranges.len() != asked.len() || asked.len() != layout.groups.len() {
            return Err(BadReply("another number of ranges"));
        }
        let shards = usize::from(layout.shards);
        let mut covered_tokens = 0;
        let mut ranges = Vec::with_capacity(asked.len());
        for (group, (keys, wire)) in asked.into_iter().zip(reply.ranges).enumerate() {
            let blocks = keys.first_block.saturating_add(u32::try_from(keys.keys.len()).unwrap_or(u32::MAX));
            covered_tokens = covered_tokens.max(blocks.saturating_mul(layout.groups[group].block_tokens));
            ranges.push(RangeAnswer::check(keys, wire, shards, layout.block_bytes[group])?);
        }
        Ok(Self { ranges, shards, covered_tokens })
    }

    /// The longest prefix usable by an engine that has computed `computed_tokens` itself and wants at most
    /// `max_tokens`.
    #[must_use]
    pub fn hit(&self, groups: &[GroupSpec], computed_tokens: u32, max_tokens: u32) -> Hit {
        let max_tokens = max_tokens.min(self.covered_tokens);
        let tokens = usable_prefix(groups, computed_tokens, max_tokens, |group, block| self.found(group, block) != 0);
        let mut hit = Hit { tokens, ..Hit::default() };
        let Some(step) = prefix_step(groups) else { return hit };
        let mut start = computed_tokens;
        while start < tokens {
            let end = (start / step + 1).saturating_mul(step).min(tokens);
            let part = end - start;
            match self.slowest(groups, tokens, start..end) {
                v1::Origin::Device => hit.device_tokens += part,
                v1::Origin::Unspecified | v1::Origin::Host => hit.host_tokens += part,
                v1::Origin::Disk => hit.disk_tokens += part,
                v1::Origin::Object => hit.object_tokens += part,
                v1::Origin::Peer => hit.peer_tokens += part,
            }
            start = end;
        }
        hit
    }

    /// The slowest origin among the blocks that cover `part` and are needed for a prefix of `tokens`.
    fn slowest(&self, groups: &[GroupSpec], tokens: u32, part: std::ops::Range<u32>) -> v1::Origin {
        let mut slowest = 0;
        for (index, group) in groups.iter().enumerate() {
            let needed = group.needed_blocks(tokens);
            let first = (part.start / group.block_tokens).max(needed.start);
            let last = part.end.div_ceil(group.block_tokens).min(needed.end);
            for block in first..last {
                slowest = slowest.max(self.found(index, block));
            }
        }
        v1::Origin::try_from(i32::from(slowest)).unwrap_or_default()
    }

    /// Zero for a block not found, else the wire's number of the slowest origin of its shards.
    fn found(&self, group: usize, block: u32) -> u8 {
        let Some(range) = self.ranges.get(group) else { return 0 };
        let Some(index) = block.checked_sub(range.first_block) else { return 0 };
        range.found.get(index as usize).copied().unwrap_or(0)
    }

    /// The frame of one shard of one block; `None` when the block was not found or not asked for.
    #[must_use]
    pub fn frame(&self, group: u32, shard: u32, block: u32) -> Option<FrameRef> {
        let range = self.ranges.get(group as usize)?;
        let index = block.checked_sub(range.first_block)? as usize;
        if *range.found.get(index)? == 0 || shard as usize >= self.shards {
            return None;
        }
        let frame = range.frames.get(range.rank[index] as usize * self.shards + shard as usize)?;
        Some(FrameRef::from_wire(range.keys[index], group, shard, frame))
    }
}

impl RangeAnswer {
    fn check(asked: RangeKeys, wire: v1::RangeFrames, shards: usize, block_bytes: u64) -> Result<Self, BadReply> {
        if wire.found.len() != asked.keys.len() {
            return Err(BadReply("another number of blocks"));
        }
        let mut count: u32 = 0;
        let mut rank = Vec::with_capacity(wire.found.len());
        for &found in &wire.found {
            rank.push(count);
            count += u32::from(found != 0);
        }
        if wire.frames.len() != count as usize * shards {
            return Err(BadReply("another number of frames than blocks found"));
        }
        if wire.frames.iter().any(|frame| frame.bytes != block_bytes) {
            return Err(BadReply("a frame of another size than the group's blocks"));
        }
        Ok(Self { first_block: asked.first_block, keys: asked.keys, found: wire.found, rank, frames: wire.frames })
    }
}

#[cfg(test)]
mod tests;
