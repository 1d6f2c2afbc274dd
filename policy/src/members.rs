//! The nodes of the cluster as this one knows them: who lives, under which edition, and who failed us lately.
//!
//! *Invariant*: a replica counts only under its node's current edition, so what a former life of a node published is void
//! the moment its successor is heard of (`replicas_of_a_former_life_do_not_count`).
//!
//! *Bounds*: [`MAX_NODES`] records; a node that fails is left alone for at most [`MAX_PAUSE`].

use std::collections::BTreeMap;
use std::time::Duration;

use kvtier_types::{Edition, Instant, NodeNumber, Tier};

use crate::directory::{NodeRecord, NodeState, Replica};
use crate::limits::MAX_NODES;

/// First pause after a failure; it doubles with every further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// A node that joined gets copies of what many calls share before steps are placed on it: for so long at most.
pub const WARM_UP: Duration = Duration::from_secs(10);

/// What is known of one node.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its own word.
    pub record: NodeRecord,
    failures: u32,
    paused_until: Instant,
    /// When it is warm whatever it says.
    warm_from: Instant,
}

impl Member {
    /// Whether it failed lately and is left alone for a while.
    #[must_use]
    pub fn paused(&self, now: Instant) -> bool {
        self.paused_until > now
    }
}

/// The nodes heard of, this one excluded.
#[derive(Debug, Default)]
pub struct Members {
    own: Option<NodeNumber>,
    nodes: BTreeMap<NodeNumber, Member>,
    /// The latest edition heard of each node, of those too that are gone: a directory with an old state may tell of
    /// former lives.
    latest: BTreeMap<NodeNumber, Edition>,
}

impl Members {
    /// The members of a cluster but `own`.
    #[must_use]
    pub const fn new(own: NodeNumber) -> Self {
        Self { own: Some(own), nodes: BTreeMap::new(), latest: BTreeMap::new() }
    }

    /// Takes the directory's word for who lives. A record of an older edition than one known does not replace it.
    pub fn heard(&mut self, now: Instant, records: &[NodeRecord]) {
        let warm_from = now + WARM_UP;
        let mut known = std::mem::take(&mut self.nodes);
        for record in records.iter().take(MAX_NODES) {
            let number = record.id.number();
            if Some(number) == self.own {
                continue;
            }
            if self.latest.get(&number).is_some_and(|latest| *latest > record.edition) && !known.contains_key(&number) {
                continue;
            }
            let former = known.remove(&number);
            let member = match former {
                Some(former) if former.record.edition > record.edition => former,
                Some(former) if former.record.edition.incarnation() == record.edition.incarnation() => {
                    Member { record: record.clone(), ..former }
                }
                _ => Member { record: record.clone(), failures: 0, paused_until: Instant::ZERO, warm_from },
            };
            if self.latest.len() < MAX_NODES * 2 || self.latest.contains_key(&number) {
                self.latest.insert(number, member.record.edition);
            }
            self.nodes.insert(number, member);
        }
        if self.latest.len() >= MAX_NODES * 2 {
            self.latest.retain(|number, _| self.nodes.contains_key(number));
        }
    }

    /// Whether a later life of a node was heard of.
    #[must_use]
    pub fn is_over(&self, node: NodeNumber, incarnation: u64) -> bool {
        self.latest.get(&node).is_some_and(|latest| latest.incarnation() > incarnation)
    }

    /// A node's entry.
    #[must_use]
    pub fn get(&self, node: NodeNumber) -> Option<&Member> {
        self.nodes.get(&node)
    }

    /// Every node, by number.
    pub fn iter(&self) -> impl Iterator<Item = (NodeNumber, &Member)> {
        self.nodes.iter().map(|(number, member)| (*number, member))
    }

    /// Whether a node joined a moment ago and is given copies: steps are better placed on others. Its own word, for
    /// [`WARM_UP`] at most.
    #[must_use]
    pub fn is_warming(&self, now: Instant, node: NodeNumber) -> bool {
        self.nodes.get(&node).is_some_and(|member| member.record.warming && member.warm_from > now)
    }

    /// Whether a replica's word still counts.
    #[must_use]
    pub fn current(&self, replica: &Replica) -> bool {
        self.nodes.get(&replica.node).is_some_and(|m| m.record.edition == replica.edition)
    }

    /// A call to a node failed for the node's or the link's sake.
    pub fn failed(&mut self, now: Instant, node: NodeNumber) {
        if let Some(member) = self.nodes.get_mut(&node) {
            let pause = FIRST_PAUSE * (1 << member.failures.min(10));
            member.failures += 1;
            member.paused_until = now + pause.min(MAX_PAUSE);
        }
    }

    /// A call to a node went well.
    pub fn answered(&mut self, node: NodeNumber) {
        if let Some(member) = self.nodes.get_mut(&node) {
            member.failures = 0;
            member.paused_until = Instant::ZERO;
        }
    }

    /// Whom to ask for a shard, best first: those that have it in memory, then those that have it on disk; those that
    /// failed lately last. `spread` varies which of equals is asked first.
    #[must_use]
    pub fn readers_choice(&self, now: Instant, replicas: &[Replica], spread: u64) -> Vec<(NodeNumber, u64)> {
        let holds = |r: &Replica| r.tiers.has(Tier::Host) || r.tiers.has(Tier::Disk) || r.tiers.has(Tier::Device);
        let mut chosen: Vec<_> = replicas.iter().filter(|r| self.current(r) && holds(r)).collect();
        chosen.sort_by_key(|r| {
            let paused = self.nodes.get(&r.node).is_some_and(|m| m.paused(now));
            (paused, !r.tiers.has(Tier::Host), (r.node.get() ^ spread).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        });
        chosen.iter().map(|r| (r.node, r.edition.incarnation())).collect()
    }

    /// The node that can best take copies: ready, not paused, with the most free memory.
    #[must_use]
    pub fn roomiest(&self, now: Instant, except: &[NodeNumber]) -> Option<(NodeNumber, &Member)> {
        let ready = |(number, m): &(NodeNumber, &Member)| {
            m.record.state == NodeState::Ready && !m.paused(now) && !except.contains(number)
        };
        self.iter().filter(ready).max_by_key(|(_, m)| m.record.free_host_bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kvtier_types::{Edition, Instant, NodeId, NodeNumber, Tier};

    use super::Members;
    use crate::directory::{NodeRecord, NodeState, Replica, Tiers};

    const NOW: Instant = Instant::from_nanos(1);

    fn record(id: &str, edition: Edition) -> NodeRecord {
        let id = NodeId::new(id).unwrap();
        let peer = format!("{id}:1");
        NodeRecord { id, edition, state: NodeState::Ready, warming: false, peer, free_host_bytes: 1, packs: Vec::new() }
    }

    fn replica(id: &str, edition: Edition, tier: Tier) -> Replica {
        Replica { node: NodeId::new(id).unwrap().number(), edition, tiers: Tiers::NONE.with(tier) }
    }

    #[test]
    fn replicas_of_a_former_life_do_not_count() {
        let mut members = Members::new(NodeNumber::new(0));
        let (old, new) = (Edition::first(1), Edition::first(2));
        members.heard(NOW, &[record("a", old)]);
        assert!(members.current(&replica("a", old, Tier::Host)));
        members.heard(NOW, &[record("a", new)]);
        assert!(!members.current(&replica("a", old, Tier::Host)));
        assert!(members.current(&replica("a", new, Tier::Host)));
        members.heard(NOW, &[record("a", old)]);
        assert!(members.current(&replica("a", new, Tier::Host)), "a stale record does not bring a former life back");
        members.heard(NOW, &[]);
        assert!(!members.current(&replica("a", new, Tier::Host)));
        members.heard(NOW, &[record("a", old)]);
        assert!(!members.current(&replica("a", old, Tier::Host)), "not even when the node was gone in between");
        let number = NodeId::new("a").unwrap().number();
        assert!(members.is_over(number, 1) && !members.is_over(number, 2));
    }

    #[test]
    fn memory_before_disk_and_the_unreliable_last() {
        let mut members = Members::new(NodeNumber::new(0));
        let edition = Edition::first(1);
        members.heard(NOW, &[record("a", edition), record("b", edition), record("c", edition)]);
        let replicas = [
            replica("a", edition, Tier::Disk),
            replica("b", edition, Tier::Host),
            replica("c", edition, Tier::Host),
            replica("d", edition, Tier::Host),
        ];
        let now = Instant::ZERO;
        members.failed(now, NodeId::new("b").unwrap().number());
        let names = |chosen: Vec<(NodeNumber, u64)>| chosen.into_iter().map(|(n, _)| n).collect::<Vec<_>>();
        let number = |id| NodeId::new(id).unwrap().number();
        let chosen = names(members.readers_choice(now, &replicas, 7));
        assert_eq!(chosen, [number("c"), number("a"), number("b")]);
        let later = now + Duration::from_secs(60);
        assert_eq!(names(members.readers_choice(later, &replicas, 7)).last(), Some(&number("a")));
    }

    #[test]
    fn who_says_that_it_is_warmed_is_believed_for_a_while() {
        let mut members = Members::new(NodeId::new("own").unwrap().number());
        let (first, second) = (Edition::first(1), Edition::first(2));
        let number = |id: &str| NodeId::new(id).unwrap().number();
        let warming = |id, edition| NodeRecord { warming: true, ..record(id, edition) };
        members.heard(NOW, &[record("a", first), warming("b", first), warming("c", first)]);
        assert!(!members.is_warming(NOW, number("a")) && members.is_warming(NOW, number("b")));
        let later = NOW + super::WARM_UP / 2;
        members.heard(later, &[record("a", first), record("b", first), warming("c", first)]);
        assert!(!members.is_warming(later, number("b")), "all that was meant for it is there");
        assert!(members.is_warming(later, number("c")) && !members.is_warming(NOW + super::WARM_UP, number("c")));
        let last = NOW + super::WARM_UP;
        members.heard(last, &[record("a", first), record("b", first), warming("c", second)]);
        assert!(members.is_warming(last, number("c")), "another life begins cold");
    }
}
