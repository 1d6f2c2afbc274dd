//! What this node tells the directory: which shards it holds, in batches with sequence numbers, one flight at a time.
//!
//! Each entry remembers what was last published of it; where that is not what is, it waits in a queue. A flight that
//! fails is repeated as it was, so the directory's sequence numbers make repeats harmless. The directory answers each
//! batch, and each audit, with digests of what it holds: one that differs from what it should hold (it lost entries, it
//! came back with an old state) makes the node publish everything anew under its next [`Edition`], beside which whatever
//! the directory still holds of the former one is void.
//!
//! *Bounds*: the queue has each entry once; departed entries wait in it until their removal was published, at most
//! [`MAX_UNPUBLISHED_REMOVALS`] of them.

use std::collections::{BTreeMap, VecDeque};

use kvtier_types::Edition;

use crate::catalog::BlockId;
use crate::directory::{BUCKETS, Batch, Change, Digest, DirectoryKey, Tiers};
use crate::limits::MAX_UNPUBLISHED_REMOVALS;

/// What became of a flight of batches, or of an audit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The directory holds what it should.
    Whole,
    /// It does not: everything is published anew under another edition.
    Anew,
    /// It counts a later edition than ours: another daemon runs under this node's name, or the clock was set back and this
    /// one's journal was lost.
    Superseded(Edition),
}

/// Counts that only grow, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PublicationCounts {
    /// Changes the directory took.
    pub changes: u64,
    /// Flights that failed and were repeated.
    pub repeats: u64,
    /// Times that everything was published anew.
    pub anew: u64,
}

/// The state of publication.
#[derive(Debug)]
pub(crate) struct Publication {
    edition: Edition,
    sequence: u64,
    expected: Vec<Digest>,
    queue: VecDeque<BlockId>,
    /// Entries in the queue of which nothing is left.
    departed: usize,
    /// Entries at the head of the queue that were put there under a former edition: the walk over all will see to them.
    shed: usize,
    /// The slab index from which on nothing was published under this edition yet; `None` when all was.
    walk: Option<u32>,
    flight: Option<Vec<Batch>>,
    counts: PublicationCounts,
}

impl Publication {
    pub(crate) fn new(edition: Edition) -> Self {
        Self {
            edition,
            sequence: 0,
            expected: vec![Digest::default(); BUCKETS],
            queue: VecDeque::new(),
            departed: 0,
            shed: 0,
            walk: Some(0),
            flight: None,
            counts: PublicationCounts::default(),
        }
    }

    pub(crate) const fn edition(&self) -> Edition {
        self.edition
    }

    pub(crate) const fn counts(&self) -> PublicationCounts {
        self.counts
    }

    /// Changes that the directory has not taken yet; a walk under way counts as one.
    pub(crate) fn waiting(&self) -> usize {
        let flying: usize = self.flight.iter().flatten().map(|b| b.changes.len()).sum();
        self.queue.len() + flying + usize::from(self.walk.is_some())
    }

    /// Whether all was published and taken.
    pub(crate) fn settled(&self) -> bool {
        self.queue.is_empty() && self.walk.is_none() && self.flight.is_none()
    }

    /// What an entry's `published` field says under the current edition.
    pub(crate) const fn told(&self, published: u16) -> Tiers {
        let [low, _] = published.to_le_bytes();
        if published >> 4 == self.mark() { Tiers::from_bits(low) } else { Tiers::NONE }
    }

    /// The `published` field for `tiers`.
    pub(crate) fn tell(&self, tiers: Tiers) -> u16 {
        self.mark() << 4 | u16::from(tiers.bits())
    }

    /// Twelve bits of the edition.
    const fn mark(&self) -> u16 {
        (self.edition.get() & 0xfff) as u16
    }

    /// Puts an entry in the queue. Its flag says that it is there.
    pub(crate) fn enqueue(&mut self, id: BlockId, departed: bool) {
        self.queue.push_back(id);
        self.note_departed(departed);
    }

    /// An entry in the queue lost its last copy.
    pub(crate) const fn note_departed(&mut self, departed: bool) {
        if departed {
            self.departed += 1;
        }
    }

    pub(crate) fn dequeue(&mut self) -> Option<BlockId> {
        let next = self.queue.pop_front();
        self.shed = self.shed.saturating_sub(1);
        if self.queue.is_empty() {
            self.departed = 0;
        }
        next
    }

    /// Whether the head of the queue is of a former edition.
    pub(crate) const fn sheds(&self) -> bool {
        self.shed > 0
    }

    /// Where the walk over all entries stands.
    pub(crate) const fn walk(&self) -> Option<u32> {
        self.walk
    }

    pub(crate) const fn walked(&mut self, to: Option<u32>) {
        self.walk = to;
    }

    /// The batches to be carried out now, if a flight is open already.
    pub(crate) fn open_flight(&self) -> Option<&[Batch]> {
        self.flight.as_deref()
    }

    /// Opens a flight of changes, each given with what was told before.
    pub(crate) fn take_off(&mut self, changes: &[(DirectoryKey, Tiers, Tiers)]) {
        let mut by_bucket: BTreeMap<u8, Vec<Change>> = BTreeMap::new();
        for (key, old, new) in changes {
            self.expected[usize::from(key.bucket())].count(key, *old, *new);
            by_bucket.entry(key.bucket()).or_default().push(Change { key: *key, tiers: *new });
        }
        if by_bucket.is_empty() {
            return;
        }
        let mut batches = Vec::with_capacity(by_bucket.len());
        for (bucket, changes) in by_bucket {
            self.sequence += 1;
            self.expected[usize::from(bucket)].sequence = self.sequence;
            batches.push(Batch { bucket, sequence: self.sequence, changes });
        }
        self.flight = Some(batches);
    }

    /// The directory's answers to the open flight; `None` when it did not answer.
    pub(crate) fn landed(&mut self, answers: Option<&[(Edition, Digest)]>) -> Verdict {
        let Some(answers) = answers else {
            self.counts.repeats += 1;
            return if self.departed > MAX_UNPUBLISHED_REMOVALS { self.anew() } else { Verdict::Whole };
        };
        let Some(flight) = self.flight.take() else { return Verdict::Whole };
        if let Some(later) = answers.iter().map(|(edition, _)| *edition).filter(|edition| *edition > self.edition).max()
        {
            return Verdict::Superseded(later);
        }
        self.counts.changes += flight.iter().map(|b| b.changes.len() as u64).sum::<u64>();
        let held = |batch: &Batch| self.expected[usize::from(batch.bucket)];
        let whole = answers.len() == flight.len()
            && flight
                .iter()
                .zip(answers)
                .all(|(batch, (edition, digest))| *edition == self.edition && *digest == held(batch));
        if whole { Verdict::Whole } else { self.anew() }
    }

    /// The directory's digests of every bucket, asked for while no flight was open.
    pub(crate) fn audited(&mut self, digests: &[Option<Digest>]) -> Verdict {
        if self.flight.is_some() || digests.len() != BUCKETS {
            return Verdict::Whole;
        }
        let same = |(expected, found): (&Digest, &Option<Digest>)| {
            // A bucket that nothing was ever told of is not there.
            found.map_or(expected.sequence == 0, |found| found == *expected)
        };
        if self.expected.iter().zip(digests).all(same) { Verdict::Whole } else { self.anew() }
    }

    /// Starts over under the next edition.
    pub(crate) fn anew(&mut self) -> Verdict {
        self.start_over(self.edition.next())
    }

    /// Starts over under an edition that is later than any the directory knows.
    pub(crate) fn start_over(&mut self, edition: Edition) -> Verdict {
        self.edition = edition;
        self.expected.fill(Digest::default());
        self.flight = None;
        self.walk = Some(0);
        self.departed = 0;
        self.shed = self.queue.len();
        self.counts.anew += 1;
        Verdict::Anew
    }
}
