//! The event queue: what happens next, ordered by time, then by the order in which it was scheduled.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use kvtier_policy::{FrameRef, MoveId};
use kvtier_types::{Expect, Instant, Location, RecordMeta, ShardKey, Tier};

use crate::network::{Message, Party};

/// Something that happens.
#[derive(Debug)]
pub(crate) enum Event {
    /// A message arrives.
    Deliver { from: Party, to: Party, message: Message },
    /// Something in the life of a node; nothing if that life is over.
    OnNode { node: usize, life: u64, duty: Duty },
    /// The next piece of a one-sided read.
    Chunk { read: u64 },
    /// A planned fault begins or ends.
    Fault { index: usize, begins: bool },
    /// A crashed node starts again.
    Restart { node: usize },
    /// The directory saves its state, to be restored by a fault later.
    Snapshot,
}

/// What a node does at a time it set itself.
#[derive(Debug)]
pub(crate) enum Duty {
    /// A timer of the core or of a session.
    Wake,
    /// Tell the directory that it lives.
    Heartbeat,
    /// Tell the directory what it holds.
    Publish,
    /// A call to the directory is given up.
    CallTimeout { call: u64 },
    /// An engine does something.
    Engine,
    /// Engines renew their attachments.
    EngineBeat,
    /// A lookup's deadline.
    Deadline { request: u64 },
    /// An engine finished loading what it was offered.
    Loaded { request: u64 },
    /// An engine finished computing the rest.
    Computed { request: u64 },
    /// A movement between tiers ends.
    Moved(Work),
}

/// A movement between tiers under way.
#[derive(Debug)]
pub(crate) enum Work {
    Offload { id: MoveId, to: Tier, meta: Box<RecordMeta>, frame: FrameRef },
    Onboard { id: MoveId, key: ShardKey, from: Tier, at: Location, expect: Expect, into: FrameRef },
    Floor { id: MoveId, key: ShardKey, into: FrameRef },
}

#[derive(Debug)]
struct Slot {
    at: Instant,
    sequence: u64,
    event: Event,
}

impl PartialEq for Slot {
    fn eq(&self, other: &Self) -> bool {
        self.sequence == other.sequence
    }
}

impl Eq for Slot {}

impl PartialOrd for Slot {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Slot {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.sequence).cmp(&(other.at, other.sequence))
    }
}

/// Everything that is going to happen.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    heap: BinaryHeap<Reverse<Slot>>,
    next: u64,
}

impl Queue {
    pub(crate) fn push(&mut self, at: Instant, event: Event) {
        self.heap.push(Reverse(Slot { at, sequence: self.next, event }));
        self.next += 1;
    }

    pub(crate) fn pop(&mut self) -> Option<(Instant, Event)> {
        self.heap.pop().map(|Reverse(slot)| (slot.at, slot.event))
    }

    pub(crate) fn len(&self) -> usize {
        self.heap.len()
    }
}
