//! Room in host memory: frames, and what makes way for them.

use std::time::Duration;

use kvtier_types::Tier;

use super::Core;
use crate::catalog::BlockId;
use crate::entry::Entry;
use crate::frame::{Allocation, FrameRef};
use crate::limits::VICTIM_SCAN;

/// Extents examined for one that can serve another size.
const EXTENT_SCAN: usize = 4;
/// How long a size that found no extent goes without looking again: looking takes time, and a request asks for thousands.
const ROOM_PAUSE: Duration = Duration::from_millis(20);
/// Blocks that one pass over a queue leaves waiting for room before it ends: those of sizes that have room go on meanwhile.
pub(super) const MAX_WITHOUT_ROOM: usize = 64;

/// Blocks that found no room in one pass over a queue.
#[derive(Debug, Default)]
pub(super) struct WithoutRoom {
    blocks: Vec<BlockId>,
    classes: Vec<u64>,
}

impl WithoutRoom {
    pub(super) fn is_full(&self) -> bool {
        self.blocks.len() >= MAX_WITHOUT_ROOM
    }

    /// The blocks, last first: they stay first in line, since a lease that ends, or growth, makes room.
    pub(super) fn last_first(self) -> impl Iterator<Item = BlockId> {
        self.blocks.into_iter().rev()
    }
}

impl Core {
    /// A frame for a block of a queue, unless one of its size found none before in the same pass.
    pub(super) fn frame_in_pass(&mut self, id: BlockId, pass: &mut WithoutRoom) -> Option<FrameRef> {
        let bytes = u64::from(self.catalog.get(id).bytes);
        let class = self.frames.class(bytes);
        let frame = if pass.classes.contains(&class) { None } else { self.host_frame(bytes) };
        if frame.is_none() {
            pass.blocks.push(id);
            pass.classes.push(class);
        }
        frame
    }

    /// A frame of host memory, evicting if that is what it takes. `None`: no room now.
    pub(super) fn host_frame(&mut self, bytes: u64) -> Option<FrameRef> {
        // One victim frees one frame of its class. A third try covers an extent that first has to change its class.
        for _ in 0..3 {
            match self.frames.alloc(bytes) {
                Allocation::Granted(frame) => {
                    self.host_used_bytes += self.frames.class(bytes);
                    return Some(frame);
                }
                Allocation::Growing => return None,
                Allocation::Full => {
                    if !self.evict_host(bytes) && !self.empty_extent(bytes) {
                        return None;
                    }
                }
            }
        }
        None
    }

    /// Evicts one block of the size class of `bytes`: the first in rank with a lower copy among the first few, else
    /// the first.
    fn evict_host(&mut self, bytes: u64) -> bool {
        let class = u32::try_from(bytes).unwrap_or(u32::MAX);
        let victim = self.host_victim(class);
        if let Some(victim) = victim {
            self.evict_copy(victim, Tier::Host);
        }
        victim.is_some()
    }

    /// Of the first few in rank the one that loses least: what it is worth to have it, times what it costs to have it again.
    fn host_victim(&mut self, class: u32) -> Option<BlockId> {
        let candidates = self.catalog.victims(Tier::Host, class, VICTIM_SCAN);
        let loss = |id: &BlockId| self.catalog.worth(*id) * self.costs.again(self.catalog.get(*id));
        // Of equal ones the first.
        candidates.into_iter().map(|id| (loss(&id), id)).min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, id)| id)
    }

    /// Evicts everything in an extent of another class, if all of it may go: of the few that hold least, the first such. While
    /// one waits for what is moving in or out of it, no other is emptied. When there was none, it is not looked for again at
    /// once.
    fn empty_extent(&mut self, bytes: u64) -> bool {
        let class = self.frames.class(bytes);
        if self.without_room.get(&class).is_some_and(|since| self.clock.since(*since) < ROOM_PAUSE) {
            return false;
        }
        // What a claim keeps may go where it can be brought back into another extent, which it is at once.
        let stays = |e: &Entry| e.in_use() || e.keeps(Tier::Host) && e.disk.is_none() && e.object.is_none();
        for extent in self.frames.victim_extents(bytes, EXTENT_SCAN) {
            let inside = self.catalog.in_host_extent(extent);
            if inside.is_empty() {
                break;
            }
            if inside.iter().any(|id| stays(self.catalog.get(*id))) {
                continue;
            }
            for id in inside {
                if self.catalog.try_get(id).is_some() {
                    self.evict_copy(id, Tier::Host);
                }
            }
            self.without_room.remove(&class);
            return true;
        }
        self.without_room.insert(class, self.clock);
        false
    }
}
