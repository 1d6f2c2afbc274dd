//! Two cores and a directory, by hand; the storms are the simulator's.

use std::time::Duration;

use kvtier_types::{Edition, NodeId, NodeNumber, Origin, Outcome, RequestHints, TenantId, Tier};

use super::tests::{BLOCK, Bench, NOW, key};
use super::*;
use crate::catalog::Source;
use crate::directory::{DirectoryKey, NodeRecord, NodeState, Table};
use crate::publication::Verdict;

fn record(id: &NodeId, core: &Core) -> NodeRecord {
    NodeRecord {
        id: id.clone(),
        edition: core.edition().unwrap(),
        state: NodeState::Ready,
        warming: false,
        peer: String::new(),
        free_host_bytes: 0,
        packs: Vec::new(),
    }
}

pub(super) struct Pair {
    table: Table,
    pub(super) owner: Bench,
    pub(super) reader: Bench,
    names: [NodeId; 2],
}

impl Pair {
    pub(super) fn new(reader_blocks: u64) -> Self {
        let names = [NodeId::new("owner").unwrap(), NodeId::new("reader").unwrap()];
        let (mut owner, mut reader) = (Bench::new(8, false), Bench::new(reader_blocks, false));
        owner.core.join(&names[0], 1);
        reader.core.join(&names[1], 1);
        Self { table: Table::default(), owner, reader, names }
    }

    pub(super) fn gossip(&mut self) {
        let ttl = Duration::from_secs(5);
        self.table.heartbeat(NOW, &record(&self.names[0], &self.owner.core), ttl);
        let all = self.table.heartbeat(NOW, &record(&self.names[1], &self.reader.core), ttl);
        self.owner.core.heard(NOW, &all);
        self.reader.core.heard(NOW, &all);
    }

    /// Publishes until the directory was told everything. Answers whether it all was taken at the first try.
    pub(super) fn publish(&mut self) -> Verdict {
        let mut verdict = Verdict::Whole;
        loop {
            match self.owner.core.publish() {
                Publish::Nothing => return verdict,
                Publish::Again => {}
                Publish::Flight(edition, batches) => {
                    let node = self.names[0].number();
                    let answers: Vec<_> = batches.iter().map(|b| self.table.apply(node, edition, b)).collect();
                    let landed = self.owner.core.published(Some(&answers));
                    verdict = if landed == Verdict::Whole { verdict } else { landed };
                }
            }
        }
    }

    pub(super) fn request(&self, request_id: &str, keys: &[u8]) -> LookupRequest {
        let range = LookupRange { group: 0, first_block: 0, keys: keys.iter().map(|n| key(*n)).collect() };
        LookupRequest {
            attachment: self.reader.who,
            request_id: request_id.into(),
            ranges: vec![range],
            local_tokens: 0,
            tenant: TenantId::shared(),
            hints: RequestHints::default(),
        }
    }

    pub(super) fn locate(&self, unknown: &[ShardKey]) -> Located {
        let digests: Vec<DirectoryKey> = unknown.iter().map(DirectoryKey::of).collect();
        self.reader.core.located(NOW, unknown, &self.table.locate(&digests), &[])
    }

    fn lookup(&mut self, request_id: &str, keys: &[u8]) -> LeaseId {
        let request = self.request(request_id, keys);
        let look = self.reader.core.look_whole(&request).unwrap();
        let located = self.locate(look.unknown());
        self.reader.core.lookup_located(NOW, request, (&look, &located)).unwrap()
    }

    /// The owner's answer to fetches.
    pub(super) fn serve(&mut self, fetches: &[(MoveId, ShardKey, Source)]) {
        let (lease, answers) = self.export(fetches.iter().map(|(_, key, _)| *key).collect(), 1).unwrap();
        for ((id, ..), answer) in fetches.iter().zip(answers) {
            let Exported::Ready(ready) = answer else { panic!("{answer:?}") };
            self.reader.core.fetched(NOW, *id, FetchEnd::Done(Box::new(ready.1)));
        }
        self.owner.core.release_export(lease);
    }

    pub(super) fn fetches(&mut self) -> Vec<(MoveId, ShardKey, Source)> {
        let fetch = |action| match action {
            Action::Fetch { id, key, from, .. } => Some((id, key, from)),
            _ => None,
        };
        std::iter::from_fn(|| self.reader.core.poll_action()).filter_map(fetch).collect()
    }

    fn export(&mut self, keys: Vec<ShardKey>, incarnation: u64) -> Result<(LeaseId, Vec<Exported>), ExportError> {
        let ttl = Duration::from_secs(10);
        let request = ExportRequest { peer: self.names[1].number(), peer_incarnation: 1, incarnation, keys, ttl };
        let lease = self.owner.core.export(NOW, &request)?;
        Ok((lease, self.owner.core.collect_export(lease).unwrap()))
    }
}

#[test]
fn a_block_written_on_one_node_is_read_on_another() {
    let mut pair = Pair::new(8);
    pair.owner.write(&[1, 2, 3]);
    assert_eq!(pair.publish(), Verdict::Whole);
    pair.gossip();
    assert_eq!(pair.table.len(), 3);
    let first = pair.lookup("a", &[1, 2, 3, 4]);
    let second = pair.lookup("b", &[1, 2]);
    let fetches = pair.fetches();
    assert_eq!(fetches.len(), 3, "two readers of one block share its transfer");
    assert!(fetches.iter().all(|(_, _, from)| matches!(from, Source::Peer { incarnation: 1, .. })));
    pair.serve(&fetches);
    assert_eq!((pair.reader.core.waiting(first), pair.reader.core.waiting(second)), (Ok(0), Ok(0)));
    let answer = pair.reader.core.collect(first).unwrap();
    assert_eq!(answer.ranges[0].found, [Some(Origin::Peer), Some(Origin::Peer), Some(Origin::Peer), None]);
    assert_eq!(answer.ranges[0].frames[1].checksum, 2);
    pair.reader.core.collect(second).unwrap();
    pair.reader.release("a", 48, 0);
    pair.reader.release("b", 32, 0);
    assert_eq!(pair.reader.core.ledger().served(Origin::Peer), 48 + 32);
    assert_eq!(pair.reader.found(&[1, 2, 3]), 3, "what was fetched stays");
}

#[test]
fn a_lease_for_a_former_life_is_refused_and_the_next_source_is_tried() {
    let mut pair = Pair::new(8);
    pair.owner.write(&[1]);
    pair.publish();
    pair.gossip();
    let lease = pair.lookup("a", &[1]);
    let fetches = pair.fetches();
    assert_eq!(pair.export(vec![fetches[0].1], 7), Err(ExportError::Incarnation { current: 1 }));
    pair.reader.core.fetched(NOW, fetches[0].0, FetchEnd::Gone);
    assert_eq!(pair.reader.core.waiting(lease), Ok(0));
    assert_eq!(pair.reader.core.collect(lease).unwrap().ranges[0].found, [None]);
    pair.reader.release("a", 0, 0);
    assert_eq!(pair.reader.core.ledger().missed(crate::MissReason::Unavailable), 16);
    assert_eq!(pair.reader.core.catalog_size().0, 0, "nothing is left of it");
}

#[test]
fn exported_frames_stay_until_the_lease_ends() {
    let mut pair = Pair::new(8);
    pair.owner.write(&[1, 2, 3, 4, 5, 6, 7, 8]);
    pair.publish();
    pair.gossip();
    pair.lookup("a", &[1, 2, 3, 4, 5, 6, 7, 8]);
    let keys: Vec<ShardKey> = pair.fetches().into_iter().map(|(_, key, _)| key).collect();
    let (lease, _) = pair.export(keys, 1).unwrap();
    assert!(pair.owner.reserve(&[20]).contains(&Reservation::Busy), "every frame is leased");
    let ends = pair.owner.core.poll_timeout().unwrap();
    pair.owner.core.expire(ends);
    assert_eq!(pair.owner.core.exports(), 0, "leases run out by themselves");
    pair.owner.core.release_export(lease);
    let who = pair.owner.core.attach(ends, pair.owner.core_spec()).unwrap();
    pair.owner.who = who;
    assert!(!pair.owner.reserve(&[20]).contains(&Reservation::Busy));
}

#[test]
fn what_is_evicted_while_it_comes_does_not_stay() {
    let mut pair = Pair::new(8);
    pair.owner.write(&[1, 2]);
    pair.publish();
    pair.gossip();
    let lease = pair.lookup("a", &[1, 2]);
    let fetches = pair.fetches();
    let (coming, only_host) = ([key(2)], [Tier::Host]);
    assert_eq!(pair.reader.core.plan_evict(&coming, &only_host).outcomes[0].1, Outcome::Missing, "nothing lies there");
    let plan = pair.reader.core.plan_evict(&coming, &[]);
    assert_eq!(plan.outcomes[0].1, Outcome::Deferred, "{plan:?}");
    pair.reader.core.apply_evict(&coming, &[]);
    pair.serve(&fetches);
    assert_eq!(pair.reader.core.waiting(lease), Ok(0), "nobody waits for it for ever");
    pair.reader.core.collect(lease).unwrap();
    pair.reader.release("a", 32, 0);
    assert_eq!((pair.reader.found(&[1, 2]), pair.reader.core.catalog_size().0), (1, 1), "the other alone is left");
}

#[test]
fn a_slow_source_is_given_up_for_another() {
    let mut pair = Pair::new(8);
    pair.owner.write(&[1]);
    pair.publish();
    pair.gossip();
    let request = pair.request("r", &[1]);
    let look = pair.reader.core.look_whole(&request).unwrap();
    let unknown = look.unknown();
    let replicas = pair.table.locate(&[DirectoryKey::of(&unknown[0])]);
    let located = pair.reader.core.located(NOW, unknown, &replicas, &[true]);
    let lease = pair.reader.core.lookup_located(NOW, request, (&look, &located)).unwrap();
    let first = pair.fetches();
    let patience = NOW + FetchConfig::default().patience;
    pair.reader.core.expire(patience);
    let second = pair.fetches();
    assert_eq!(second[0].2, Source::Floor, "from a peer to the object store");
    pair.reader.core.fetched(patience, first[0].0, FetchEnd::Failed);
    assert_eq!(pair.reader.core.waiting(lease), Ok(1), "the end of what was given up changes nothing");
    pair.reader.core.fetched(patience, second[0].0, FetchEnd::Corrupt);
    assert_eq!(pair.reader.core.collect(lease).unwrap().ranges[0].found, [None]);
}

#[test]
fn a_directory_that_lost_everything_is_told_everything_again() {
    let mut pair = Pair::new(8);
    pair.owner.write(&[1, 2, 3]);
    pair.publish();
    let before = pair.owner.core.edition().unwrap();
    pair.table = Table::default();
    let digests = pair.table.digests(pair.names[0].number(), before);
    assert_eq!(pair.owner.core.audited(before, &digests), Verdict::Anew);
    assert_eq!(pair.publish(), Verdict::Whole);
    let after = pair.owner.core.edition().unwrap();
    assert!(after > before);
    assert_eq!(pair.table.len(), 3);
    let digests = pair.table.digests(pair.names[0].number(), after);
    assert_eq!(pair.owner.core.audited(after, &digests), Verdict::Whole);
}

#[test]
fn what_left_is_withdrawn_and_leaves_no_trace() {
    let mut pair = Pair::new(8);
    pair.owner.write(&[1, 2]);
    pair.publish();
    pair.owner.core.apply_evict(&[key(2)], &[]);
    assert_eq!(pair.owner.core.catalog_size().0, 2, "its withdrawal is still to be told");
    pair.publish();
    assert_eq!((pair.table.len(), pair.owner.core.catalog_size().0), (1, 1));
    assert!(pair.owner.core.publication_settled());
}

#[test]
fn a_flight_that_gets_no_answer_is_repeated_as_it_was() {
    let mut pair = Pair::new(8);
    pair.owner.write(&[1]);
    let Publish::Flight(edition, batches) = pair.owner.core.publish() else { panic!() };
    // It arrived, the answer did not.
    pair.table.apply(pair.names[0].number(), edition, &batches[0]);
    pair.owner.core.published(None);
    pair.owner.write(&[2]);
    assert_eq!(pair.owner.core.publish(), Publish::Flight(edition, batches));
    assert_eq!(pair.publish(), Verdict::Whole);
    assert_eq!(pair.table.len(), 2);
}

#[test]
fn a_node_that_leaves_gives_its_only_copies_to_another() {
    let mut pair = Pair::new(2);
    pair.owner.write(&[1, 2, 3]);
    pair.publish();
    pair.gossip();
    let (metas, rest) = pair.owner.core.holdings(0, 100, true);
    assert_eq!((metas.len(), rest), (3, None));
    let from: (NodeNumber, u64) = (pair.names[0].number(), 1);
    let lease = pair.reader.core.adopt(NOW, from, &metas, (Duration::from_secs(30), None)).unwrap();
    let fetches = pair.fetches();
    assert_eq!(fetches.len(), 2, "there is room for two");
    for (id, key, _) in &fetches {
        let meta = metas.iter().find(|m| m.key == *key).unwrap().clone();
        pair.reader.core.fetched(NOW, *id, FetchEnd::Done(Box::new(meta)));
    }
    let outcomes = pair.reader.core.adoption_outcomes(lease).unwrap();
    assert_eq!(outcomes.iter().filter(|(o, _)| *o == Outcome::Applied).count(), 2);
    assert_eq!(outcomes[2].0, kvtier_types::Outcome::Missing, "{outcomes:?}");
    pair.reader.core.release_export(lease);
    assert_eq!(pair.reader.core.tier_use(Tier::Host).bytes, 2 * BLOCK);
    assert_eq!(pair.reader.core.catalog_size().0, 2);
}

#[test]
fn copies_made_ahead_are_useful_once_read_and_wasted_if_they_go_unread() {
    let mut pair = Pair::new(8);
    pair.owner.write(&[1, 2, 3, 4]);
    pair.publish();
    pair.gossip();
    let (metas, _) = pair.owner.core.holdings(0, 100, true);
    let from: (NodeNumber, u64) = (pair.names[0].number(), 1);
    // As much as three blocks may lie there unread.
    let terms = (Duration::from_secs(30), Some(3 * BLOCK));
    let lease = pair.reader.core.adopt(NOW, from, &metas, terms).unwrap();
    let fetches = pair.fetches();
    assert_eq!(fetches.len(), 3);
    let again = pair.reader.core.adopt(NOW, from, &metas[3..], terms).unwrap();
    assert_eq!(pair.reader.core.spread_counts().refused_bytes, 2 * BLOCK, "what is on its way counts");
    pair.reader.core.release_export(again);
    // A reader comes for the first while it is on its way.
    let read = pair.lookup("late", &[1]);
    for (id, key, _) in &fetches {
        let meta = metas.iter().find(|m| m.key == *key).unwrap().clone();
        pair.reader.core.fetched(NOW, *id, FetchEnd::Done(Box::new(meta)));
    }
    pair.reader.core.release_export(lease);
    assert_eq!(pair.reader.core.waiting(read).unwrap(), 0);
    let counts = pair.reader.core.spread_counts();
    assert_eq!((counts.late_bytes, counts.unread_bytes), (BLOCK, 2 * BLOCK), "{counts:?}");
    pair.lookup("early", &[1, 2]);
    let counts = pair.reader.core.spread_counts();
    assert_eq!((counts.useful_bytes, counts.unread_bytes), (BLOCK, BLOCK), "{counts:?}");
    pair.lookup("again", &[1, 2]);
    assert_eq!(pair.reader.core.spread_counts(), counts, "it counts once");
    let id = pair.reader.core.catalog.find_all(&key(3))[0];
    pair.reader.core.drop_all(id);
    let counts = pair.reader.core.spread_counts();
    assert_eq!((counts.wasted_bytes, counts.unread_bytes), (BLOCK, 0), "{counts:?}");
}

#[test]
fn a_source_restarted_since_it_was_found_is_not_asked() {
    let mut pair = Pair::new(1);
    pair.owner.write(&[1, 2]);
    pair.publish();
    pair.gossip();
    // There is room for one: the other waits.
    let lease = pair.lookup("a", &[1, 2]);
    assert_eq!(pair.fetches().len(), 1);
    pair.owner.core.join(&pair.names[0], 2);
    pair.gossip();
    pair.reader.core.frames_grew();
    pair.reader.core.release(
        pair.reader.who,
        "a",
        ReleaseReport { local_tokens: 0, claimed_tokens: 0, lost_tokens: 0 },
    );
    assert_eq!(pair.fetches().len(), 0);
    assert!(pair.reader.core.collect(lease).is_err());
}

#[test]
fn a_node_whose_clock_was_set_back_goes_on_above_its_former_life() {
    let mut pair = Pair::new(8);
    pair.owner.core.join(&pair.names[0], 1_000);
    pair.owner.write(&[1]);
    pair.gossip();
    assert_eq!(pair.publish(), Verdict::Whole);
    pair.owner = Bench::new(8, false);
    pair.owner.core.join(&pair.names[0], 1);
    pair.owner.write(&[1, 2]);
    assert_eq!(pair.publish(), Verdict::Superseded(Edition::first(1_000)));
    assert_eq!(pair.owner.core.edition(), Some(Edition::first(1_001)));
    assert_eq!(pair.owner.core.incarnation(), 1_001);
    assert_eq!(pair.publish(), Verdict::Whole, "everything was published under the new number");
}
