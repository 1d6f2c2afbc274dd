//! What the directory is told of this node, and what it tells of others.

use std::time::Duration;

use kvtier_types::{Edition, Instant, NodeId, ShardKey};
use rustc_hash::FxHashMap;

use super::Core;
use crate::catalog::Source;
use crate::directory::{Batch, Digest, DirectoryKey, MAX_CHANGES_PER_BATCH, NodeRecord, Replica, Tiers};
use crate::limits::{MAX_SOURCES, MAX_TOUCHES_PER_CALL};
use crate::members::Members;
use crate::publication::{Publication, PublicationCounts, Verdict};

/// A node that finds a later life of its own name in the directory goes on above it at most so often.
const OUTLIVE_EVERY: Duration = Duration::from_secs(60);

/// What is to be done for publication now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Publish {
    /// Nothing: the directory was told everything.
    Nothing,
    /// Ask again soon: there was work to do before anything could be told.
    Again,
    /// Carry these out and report with [`Core::published`].
    Flight(Edition, Vec<Batch>),
}

/// Where shards that are not here can be had, best source first.
#[derive(Debug, Clone, Default)]
pub struct Located(FxHashMap<ShardKey, Vec<Source>>);

impl Located {
    /// Adds the sources of a shard; without any it is as if nobody had it.
    pub fn add(&mut self, key: ShardKey, mut sources: Vec<Source>) {
        sources.truncate(MAX_SOURCES);
        if !sources.is_empty() {
            self.0.insert(key, sources);
        }
    }

    /// A shard's sources.
    #[must_use]
    pub fn get(&self, key: &ShardKey) -> Option<&[Source]> {
        self.0.get(key).map(Vec::as_slice)
    }

    /// Shards that can be had.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing can be had.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Core {
    /// Makes this core a member of a cluster: from now on it publishes what it holds.
    pub fn join(&mut self, node: &NodeId, incarnation: u64) {
        self.members = Members::new(node.number());
        self.catalog.publication = Some(Publication::new(Edition::first(incarnation)));
        self.incarnation = incarnation;
    }

    /// The edition that entries are published under, `None` outside of a cluster.
    #[must_use]
    pub fn edition(&self) -> Option<Edition> {
        self.catalog.publication.as_ref().map(Publication::edition)
    }

    /// What the directory must be told now.
    pub fn publish(&mut self) -> Publish {
        let Some(publication) = &self.catalog.publication else { return Publish::Nothing };
        if let Some(flight) = publication.open_flight() {
            return Publish::Flight(publication.edition(), flight.to_vec());
        }
        let mut touches = 0;
        while touches < MAX_TOUCHES_PER_CALL && self.publication().is_some_and(|p| p.sheds()) {
            touches += 1;
            if let Some(id) = self.catalog.publication.as_mut().and_then(Publication::dequeue) {
                self.catalog.shed(id);
            }
        }
        if self.publication().is_some_and(|p| p.sheds()) {
            return Publish::Again;
        }
        let mut changes = Vec::new();
        self.queued_changes(&mut touches, &mut changes);
        self.walked_changes(touches, &mut changes);
        let nothing_told = changes.is_empty();
        let Some(publication) = &mut self.catalog.publication else { return Publish::Nothing };
        publication.take_off(&changes);
        match publication.open_flight() {
            Some(flight) => Publish::Flight(publication.edition(), flight.to_vec()),
            None if nothing_told && publication.settled() => Publish::Nothing,
            None => Publish::Again,
        }
    }

    const fn publication(&self) -> Option<&Publication> {
        self.catalog.publication.as_ref()
    }

    fn queued_changes(&mut self, touches: &mut usize, changes: &mut Vec<Told>) {
        while *touches < MAX_TOUCHES_PER_CALL && changes.len() < MAX_CHANGES_PER_BATCH {
            let Some(id) = self.catalog.publication.as_mut().and_then(Publication::dequeue) else { return };
            *touches += 1;
            changes.extend(self.catalog.tell(id).map(told));
        }
    }

    /// Goes on with the walk over all entries that a new edition needs.
    fn walked_changes(&mut self, mut touches: usize, changes: &mut Vec<Told>) {
        let Some(mut at) = self.publication().and_then(Publication::walk) else { return };
        while touches < MAX_TOUCHES_PER_CALL && changes.len() < MAX_CHANGES_PER_BATCH {
            let next = self.catalog.iter_from(at).next().map(|(id, _)| id);
            let Some(id) = next else {
                self.catalog.publication.iter_mut().for_each(|p| p.walked(None));
                return;
            };
            touches += 1;
            at = id.index() + 1;
            // What waits in the queue is told from there.
            if !self.catalog.is_dirty(id) {
                changes.extend(self.catalog.tell(id).map(told));
            }
        }
        self.catalog.publication.iter_mut().for_each(|p| p.walked(Some(at)));
    }

    /// Takes the directory's answers to a flight; `None` when it did not answer in time.
    pub fn published(&mut self, answers: Option<&[(Edition, Digest)]>) -> Verdict {
        let verdict = self.catalog.publication.as_mut().map_or(Verdict::Whole, |p| p.landed(answers));
        if let Verdict::Superseded(later) = verdict {
            self.outlive(later);
        }
        verdict
    }

    /// Goes on under a number above that of the life that the directory knows, but not again at once: two daemons of one name
    /// would never come to an end.
    fn outlive(&mut self, later: Edition) {
        let Some(publication) = &mut self.catalog.publication else { return };
        if self.outlived.is_some_and(|at| self.clock.since(at) < OUTLIVE_EVERY) {
            return;
        }
        self.outlived = Some(self.clock);
        let edition = Edition::first(later.incarnation().saturating_add(1));
        publication.start_over(edition);
        self.incarnation = edition.incarnation();
    }

    /// Takes the directory's digests of this node's edition. Ask for them only while [`Self::publish`] has no flight open.
    pub fn audited(&mut self, edition: Edition, digests: &[Option<Digest>]) -> Verdict {
        let publication = self.catalog.publication.as_mut().filter(|p| p.edition() == edition);
        publication.map_or(Verdict::Whole, |p| p.audited(digests))
    }

    /// Whether the directory was told everything and took it.
    #[must_use]
    pub fn publication_settled(&self) -> bool {
        self.publication().is_none_or(Publication::settled)
    }

    /// Entries waiting to be published, and counts so far.
    #[must_use]
    pub fn publication_state(&self) -> (usize, PublicationCounts) {
        self.publication().map_or_else(Default::default, |p| (p.waiting(), p.counts()))
    }

    /// Takes the directory's word for who lives. What a node's former lives had leased is given back.
    pub fn heard(&mut self, now: Instant, records: &[NodeRecord]) {
        self.clock = self.clock.max(now);
        let lives = |members: &Members| -> Vec<_> {
            members.iter().map(|(number, m)| (number, m.record.edition.incarnation())).collect()
        };
        let before = lives(&self.members);
        self.members.heard(now, records);
        if lives(&self.members).iter().any(|life| !before.contains(life)) {
            // It may be to have copies.
            self.look_again();
        }
        self.drop_exports_of_former_lives();
    }

    /// The other nodes.
    #[must_use]
    pub const fn members(&self) -> &Members {
        &self.members
    }

    /// Says whether a call to a node went well, for whom to ask next time.
    pub fn called(&mut self, now: Instant, node: kvtier_types::NodeNumber, well: bool) {
        if well { self.members.answered(node) } else { self.members.failed(now, node) }
    }

    /// Puts together where shards can be had: `replicas` from the directory, and `floor` says whether other nodes' packs
    /// have it. As many of each as keys.
    #[must_use]
    pub fn located(&self, now: Instant, keys: &[ShardKey], replicas: &[Vec<Replica>], floor: &[bool]) -> Located {
        let mut located = Located::default();
        for (at, key) in keys.iter().enumerate() {
            let spread = crate::ghost::short(&key.block);
            let replicas = replicas.get(at).map(Vec::as_slice).unwrap_or_default();
            let peers = self.members.readers_choice(now, replicas, spread).into_iter().take(MAX_SOURCES - 1);
            let peers = peers.map(|(node, incarnation)| Source::Peer { node, incarnation });
            let floor = floor.get(at).is_some_and(|f| *f).then_some(Source::Floor);
            located.add(*key, peers.chain(floor).collect());
        }
        located
    }
}

/// A change, and what was told before.
type Told = (DirectoryKey, Tiers, Tiers);

fn told((key, old, new): (ShardKey, Tiers, Tiers)) -> Told {
    (DirectoryKey::of(&key), old, new)
}
