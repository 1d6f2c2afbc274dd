//! Messages between nodes and the directory, and what becomes of them on the way.

use std::collections::BTreeSet;
use std::time::Duration;

use kvtier_policy::directory::{Batch, Digest, DirectoryKey, NodeRecord, Replica};
use kvtier_policy::peer::{ExportNumber, Granted};
use kvtier_policy::{ExportRequest, FrameRef};
use kvtier_types::{Edition, Instant, NodeNumber, RecordMeta};

use crate::events::Event;
use crate::world::World;

/// Who sends and receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Party {
    Node(usize),
    Directory,
}

/// An export of a reader, by the name both sides call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ExportName {
    pub(crate) reader: usize,
    pub(crate) reader_life: u64,
    pub(crate) owner: usize,
    /// The owner's life that the reader has in mind.
    pub(crate) owner_life: u64,
    pub(crate) number: ExportNumber,
}

/// Where a peer's bytes lie: a remote key, void once its owner is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) owner_life: u64,
    pub(crate) frame: FrameRef,
}

/// What a node asks of the directory.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    Heartbeat(Box<NodeRecord>),
    Apply(Edition, Vec<Batch>),
    Digests(Edition),
    Locate(Vec<DirectoryKey>),
}

/// What the directory answers.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Heard(Vec<NodeRecord>),
    Applied(Vec<(Edition, Digest)>),
    Digests(Edition, Vec<Option<Digest>>),
    Located(Vec<Vec<Replica>>),
}

/// A message.
#[derive(Debug, Clone)]
pub(crate) enum Message {
    Ask {
        life: u64,
        call: u64,
        node: NodeNumber,
        ask: Ask,
    },
    Answer {
        life: u64,
        call: u64,
        answer: Answer,
    },
    /// `counts_until`: how long the reader will count on what it is granted.
    Export {
        name: ExportName,
        request: ExportRequest,
        wait: Duration,
        counts_until: Instant,
    },
    /// `Err(true)`: the owner is in another life.
    Exported {
        name: ExportName,
        granted: Result<Vec<Granted<Place>>, bool>,
    },
    Release {
        name: ExportName,
    },
    /// A node on its way out asks for care of its copies.
    Adopt {
        from: NodeNumber,
        incarnation: u64,
        metas: Vec<RecordMeta>,
    },
}

/// The state of the network.
#[derive(Debug, Default)]
pub(crate) struct Network {
    /// Pairs between which nothing gets through, by direction.
    pub(crate) cut: BTreeSet<(Party, Party)>,
    /// Pairs between which everything is slow.
    pub(crate) slow: BTreeSet<(Party, Party)>,
    /// Messages lost, in a thousand.
    pub(crate) loss: u64,
    /// Messages that come twice.
    pub(crate) duplicates: u64,
    /// Messages that others overtake.
    pub(crate) reorders: u64,
    /// Messages that come seconds late, and in time too.
    pub(crate) echoes: u64,
    /// Reads of which a bit is flipped on the way.
    pub(crate) corrupt_reads: u64,
}

impl World {
    /// Sends a message. It may be lost, late, or come twice.
    pub(crate) fn send(&mut self, from: Party, to: Party, message: Message) {
        self.stats.count("messages", "sent");
        let lost = self.network.cut.contains(&(from, to)) || self.rng.chance(self.network.loss);
        if lost {
            self.stats.count("faults", "message lost");
            return;
        }
        let mut delay = self.rng.micros(50, 400);
        if self.network.slow.contains(&(from, to)) {
            delay += self.rng.millis(30, 500);
        }
        if self.rng.chance(self.network.reorders) {
            self.stats.count("faults", "message overtaken");
            delay += self.rng.millis(1, 250);
        }
        let again = [
            self.rng.chance(self.network.duplicates).then(|| self.rng.millis(0, 50)),
            self.rng.chance(self.network.echoes).then(|| self.rng.millis(500, 6000)),
        ];
        for later in again.into_iter().flatten() {
            self.stats.count("faults", "message repeated");
            self.queue.push(self.now + delay + later, Event::Deliver { from, to, message: message.clone() });
        }
        self.queue.push(self.now + delay, Event::Deliver { from, to, message });
    }
}
