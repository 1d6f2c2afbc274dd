//! The core against hand-made situations; sequences against a naive model are in `tests/model.rs`.

use kvtier_types::{
    BlockKey, GroupKind, GroupSpec, HashAlgorithm, Instant, Layout, Location, Namespace, Origin, Outcome, RecordMeta,
    RequestHints, TenantId, Tier,
};

use super::*;
use crate::attachment::{AttachSpec, Role};
use crate::frame::TwinPool;
use crate::ledger::MissReason;

pub(super) const BLOCK: u64 = 4096;
pub(super) const NOW: Instant = Instant::ZERO;

pub(super) fn layout(shards: u16, groups: Vec<GroupSpec>) -> Layout {
    Layout {
        attention_backend: "CPU".into(),
        isa: String::new(),
        layout: "L".into(),
        tensor_parallel: shards,
        pipeline_parallel: 1,
        prefill_context_parallel: 1,
        decode_context_parallel: 1,
        shards,
        block_bytes: vec![BLOCK; groups.len()],
        groups,
    }
}

pub(super) fn full() -> Vec<GroupSpec> {
    vec![GroupSpec { kind: GroupKind::Full, block_tokens: 16, layers: vec!["l".into()] }]
}

pub(super) fn spec(layout: Layout) -> AttachSpec {
    let namespace = Namespace {
        model: "m".into(),
        weights_digest: "w".into(),
        kv_dtype: "bf16".into(),
        quantization: String::new(),
        adapter_digest: String::new(),
        hash_algorithm: HashAlgorithm::Sha256Cbor,
        hash_seed: "0".into(),
        hash_block_tokens: 16,
        revision: String::new(),
    };
    AttachSpec {
        engine: "e".into(),
        role: Role::Scheduler,
        rank: 0,
        shard: 0,
        devices: Vec::new(),
        pid: 1,
        namespace,
        layout,
    }
}

pub(super) fn key(n: u8) -> BlockKey {
    BlockKey::new([n; 32])
}

pub(super) struct Bench {
    pub(super) core: Core,
    pub(super) who: AttachmentId,
}

impl Bench {
    pub(super) fn new(blocks: u64, disk: bool) -> Self {
        Self::with_layout(blocks, disk, layout(1, full()))
    }

    fn with_layout(blocks: u64, disk: bool, layout: Layout) -> Self {
        let config = CoreConfig { disk, ..CoreConfig::default() };
        let mut core = Core::new(config, Box::new(TwinPool::new(blocks * BLOCK)), |bytes| bytes);
        let who = core.attach(NOW, spec(layout)).unwrap();
        Self { core, who }
    }

    /// What another attachment of the same engine says of itself.
    pub(super) fn core_spec(&self) -> AttachSpec {
        spec(layout(1, full()))
    }

    pub(super) fn reserve(&mut self, keys: &[u8]) -> Vec<Reservation> {
        self.reserve_at(keys, 0, None)
    }

    fn reserve_at(&mut self, keys: &[u8], first_block: u32, parent: Option<u8>) -> Vec<Reservation> {
        let request = ReserveRequest {
            attachment: self.who,
            parent: parent.map(key),
            group: 0,
            first_block,
            keys: keys.iter().map(|n| key(*n)).collect(),
            tenant: TenantId::shared(),
            hints: RequestHints::default(),
        };
        self.core.reserve(NOW, &request).unwrap()
    }

    pub(super) fn write(&mut self, keys: &[u8]) {
        let answers = self.reserve(keys);
        for (n, answer) in keys.iter().zip(answers) {
            let Reservation::Granted(frames) = answer else { panic!("block {n}: {answer:?}") };
            for (shard, frame) in (0..).zip(frames) {
                assert_eq!(self.seal(*n, shard, frame), SealOutcome::Applied);
            }
        }
    }

    fn seal(&mut self, n: u8, shard: u16, frame: FrameRef) -> SealOutcome {
        let seal = SealRequest { key: key(n), shard, frame, checksum: u64::from(n), abandoned: false };
        self.core.seal(self.who, &[seal]).unwrap()[0]
    }

    pub(super) fn lookup(&mut self, request_id: &str, keys: &[u8]) -> LeaseId {
        let range = LookupRange { group: 0, first_block: 0, keys: keys.iter().map(|n| key(*n)).collect() };
        let request = LookupRequest {
            attachment: self.who,
            request_id: request_id.into(),
            ranges: vec![range],
            local_tokens: 0,
            tenant: TenantId::shared(),
            hints: RequestHints::default(),
        };
        self.core.lookup(NOW, request).unwrap()
    }

    pub(super) fn found(&mut self, keys: &[u8]) -> usize {
        let lease = self.lookup("probe", keys);
        let answer = self.core.collect(lease).unwrap();
        self.release("probe", 0, 0);
        answer.ranges[0].found.iter().flatten().count()
    }

    pub(super) fn release(&mut self, request_id: &str, claimed_tokens: u32, lost_tokens: u32) {
        self.core.release(self.who, request_id, ReleaseReport { local_tokens: 0, claimed_tokens, lost_tokens });
    }

    /// Ends every offload well and returns how many there were.
    pub(super) fn offload_all(&mut self) -> usize {
        let mut done = 0;
        while let Some(action) = self.core.poll_action() {
            if let Action::Offload { id, .. } = action {
                done += 1;
                self.core.moved(id, MoveEnd::Done(Some(Location { segment: 1, offset: done })));
            }
        }
        done as usize
    }
}

#[test]
fn only_sealed_blocks_are_visible() {
    let mut b = Bench::new(8, false);
    let answers = b.reserve(&[1, 2]);
    assert_eq!(b.found(&[1, 2]), 0);
    assert_eq!(b.reserve(&[1]), [Reservation::Busy]);
    let Reservation::Granted(frames) = &answers[0] else { panic!() };
    assert_eq!(b.seal(1, 0, frames[0]), SealOutcome::Applied);
    assert_eq!(b.seal(1, 0, frames[0]), SealOutcome::Duplicate);
    assert_eq!(b.found(&[1, 2]), 1);
    assert_eq!(b.reserve(&[1]), [Reservation::Present]);
    assert_eq!(b.core.ledger().missed(MissReason::Busy), 16 + 32);
}

#[test]
fn a_hit_needs_every_shard() {
    let mut b = Bench::with_layout(8, false, layout(2, full()));
    let answers = b.reserve(&[1]);
    let Reservation::Granted(frames) = &answers[0] else { panic!() };
    assert_eq!(frames.len(), 2);
    b.seal(1, 0, frames[0]);
    assert_eq!(b.found(&[1]), 0);
    b.seal(1, 1, frames[1]);
    assert_eq!(b.found(&[1]), 1);
}

#[test]
fn leaves_go_before_their_parents_and_leased_blocks_stay() {
    let mut b = Bench::new(4, false);
    b.write(&[1, 2, 3]);
    let lease = b.lookup("r", &[1, 2]);
    b.core.collect(lease).unwrap();
    b.write(&[9]);
    assert!(matches!(b.reserve(&[10])[0], Reservation::Granted(_)));
    assert_eq!(b.found(&[1, 2, 3]), 2, "the unleased leaf went");
    assert!(matches!(b.reserve(&[11])[0], Reservation::Granted(_)), "then the other free leaf");
    assert_eq!(b.reserve(&[12]), [Reservation::Busy], "nothing else may go");
    b.release("r", 32, 0);
    assert!(matches!(b.reserve(&[13])[0], Reservation::Granted(_)));
    assert_eq!(b.found(&[1, 2]), 1, "the deeper one went first");
}

#[test]
fn the_ledger_says_what_became_of_every_token() {
    let mut b = Bench::new(8, false);
    b.write(&[1, 2, 3]);
    let lease = b.lookup("r", &[1, 2, 3, 4]);
    b.core.collect(lease).unwrap();
    let report = LoadReport {
        key: key(3),
        shard: 0,
        source: Origin::Tier(Tier::Host),
        generation: 3,
        result: LoadResult::Corrupt,
    };
    b.core.report_loads(b.who, "r", &[report]).unwrap();
    b.release("r", 48, 16);
    let ledger = b.core.ledger();
    assert_eq!(ledger.served(Tier::Host), 32);
    assert_eq!(ledger.missed(MissReason::Corrupt), 16);
    assert_eq!(ledger.missed(MissReason::Novel), 16);
    assert_eq!(ledger.looked_up(), 64);
    assert_eq!(b.core.counts().corrupt, 1);
    assert_eq!(b.found(&[1, 2, 3]), 2, "the corrupt copy is gone");
}

#[test]
fn what_left_host_memory_comes_back_from_disk() {
    let mut b = Bench::new(2, true);
    b.write(&[1, 2]);
    assert_eq!(b.offload_all(), 2);
    b.write(&[3, 4]);
    assert_eq!(b.offload_all(), 2);
    let lease = b.lookup("r", &[1, 2]);
    assert_eq!(b.core.waiting(lease), Ok(2));
    let mut onboarded = 0;
    while let Some(action) = b.core.poll_action() {
        if let Action::Onboard { id, from, .. } = action {
            assert_eq!(from, Tier::Disk);
            onboarded += 1;
            b.core.moved(id, MoveEnd::Done(None));
        }
    }
    assert_eq!(onboarded, 2);
    assert_eq!(b.core.waiting(lease), Ok(0));
    let answer = b.core.collect(lease).unwrap();
    assert_eq!(answer.ranges[0].found, [Some(Tier::Disk.into()), Some(Tier::Disk.into())]);
    b.release("r", 32, 0);
    assert_eq!(b.core.ledger().served(Tier::Disk), 32);
}

#[test]
fn a_corrupt_record_is_a_shorter_prefix_and_is_forgotten() {
    let mut b = Bench::new(2, true);
    b.write(&[1, 2]);
    b.offload_all();
    b.write(&[3, 4]);
    b.offload_all();
    let lease = b.lookup("r", &[1, 2]);
    let mut forgotten = 0;
    while let Some(action) = b.core.poll_action() {
        match action {
            Action::Onboard { id, expect, .. } if expect.checksum == 2 => b.core.moved(id, MoveEnd::Corrupt),
            Action::Onboard { id, .. } => b.core.moved(id, MoveEnd::Done(None)),
            Action::Forget { .. } => forgotten += 1,
            other => assert!(matches!(other, Action::Offload { .. }), "{other:?}"),
        }
    }
    assert_eq!(b.core.collect(lease).unwrap().ranges[0].found, [Some(Tier::Disk.into()), None]);
    assert_eq!(forgotten, 1);
    assert_eq!(b.core.counts().corrupt, 1);
}

#[test]
fn the_dead_leave_nothing_behind() {
    let mut b = Bench::new(4, false);
    b.write(&[1]);
    b.reserve(&[2, 3]);
    let lease = b.lookup("r", &[1]);
    b.core.collect(lease).unwrap();
    b.core.detach(b.who);
    assert_eq!(b.core.counts().reaped_reservations, 2);
    assert_eq!(b.core.ledger().missed(MissReason::Unavailable), 16);
    assert_eq!(b.core.tier_use(Tier::Host).copies, 1);
    assert_eq!(b.core.host_used_bytes, BLOCK);
    assert!(b.core.reserved.is_empty() && b.core.leases.is_empty());
}

#[test]
fn silence_is_death_and_reservations_have_a_deadline() {
    let mut b = Bench::new(4, false);
    b.reserve(&[1]);
    let later = NOW + CoreConfig::default().attachment_ttl;
    b.core.heartbeat(later, b.who).unwrap();
    let overdue = NOW + CoreConfig::default().reserve_ttl;
    b.core.heartbeat(overdue, b.who).unwrap();
    assert!(b.core.expire(overdue).is_empty());
    assert_eq!(b.core.counts().reaped_reservations, 1);
    let silent = overdue + CoreConfig::default().attachment_ttl;
    assert_eq!(b.core.poll_timeout(), Some(silent));
    assert_eq!(b.core.expire(silent), [b.who]);
    assert_eq!(b.core.heartbeat(silent, b.who), Err(CoreError::UnknownAttachment));
}

#[test]
fn evicting_by_verb_hides_at_once_and_drops_when_the_lease_ends() {
    let mut b = Bench::new(4, true);
    b.write(&[1, 2]);
    b.offload_all();
    let lease = b.lookup("r", &[1]);
    b.core.collect(lease).unwrap();
    let keys = [key(1), key(2), key(7)];
    let plan = b.core.plan_evict(&keys, &[]);
    let outcomes: Vec<Outcome> = plan.outcomes.iter().map(|(_, o, _)| *o).collect();
    assert_eq!(outcomes, [Outcome::Deferred, Outcome::Applied, Outcome::Missing]);
    assert_eq!(plan.journal.len(), 2);
    b.core.apply_evict(&keys, &[]);
    assert_eq!(b.found(&[1]), 0);
    assert_eq!(b.core.tier_use(Tier::Host).copies, 1, "still under its lease");
    b.release("r", 16, 0);
    assert_eq!(b.core.tier_use(Tier::Host).copies, 0);
    let forgets = std::iter::from_fn(|| b.core.poll_action()).filter(|a| matches!(a, Action::Forget { .. })).count();
    assert_eq!(forgets, 2);
}

#[test]
fn ranges_that_no_prompt_has_are_refused() {
    let mut b = Bench::new(4, false);
    let range = |group, first_block| LookupRange { group, first_block, keys: vec![key(1), key(2)] };
    let cases = [vec![range(0, u32::MAX)], vec![range(0, u32::MAX / 16)], vec![range(0, 0), range(0, 0)]];
    for ranges in cases {
        let request = LookupRequest {
            attachment: b.who,
            request_id: "r".into(),
            ranges,
            local_tokens: 0,
            tenant: TenantId::shared(),
            hints: RequestHints::default(),
        };
        assert!(matches!(b.core.lookup(NOW, request), Err(CoreError::BadRange { .. })));
    }
    assert!(b.core.list(u32::MAX, 10, &ListFilter::default(), None).0.is_empty(), "nor do pages beyond the last");
}

#[test]
fn recovered_records_serve_again_and_the_latest_of_a_key_wins() {
    let mut first = Bench::new(4, true);
    first.write(&[1, 2]);
    let mut metas = Vec::new();
    while let Some(action) = first.core.poll_action() {
        if let Action::Offload { meta, .. } = action {
            metas.push(meta);
        }
    }
    let mut second = Bench::new(4, true);
    for (offset, meta) in (0..).zip(&metas) {
        second.core.recover(Tier::Disk, meta, Location { segment: 0, offset });
    }
    let again = RecordMetaAt::later(&metas[0]);
    second.core.recover(Tier::Disk, &again, Location { segment: 5, offset: 0 });
    assert_eq!(second.core.tier_use(Tier::Disk).copies, 2);
    assert_eq!(second.core.locate(&key(1)).unwrap().replicas[0].place, "log segment 5 page 0");
    assert!(second.core.last_sequence() >= again.sequence);
    let lease = second.lookup("r", &[1, 2]);
    assert_eq!(second.core.waiting(lease), Ok(2));
}

struct RecordMetaAt;

impl RecordMetaAt {
    fn later(meta: &RecordMeta) -> RecordMeta {
        RecordMeta { sequence: meta.sequence + 100, ..meta.clone() }
    }
}

#[test]
fn disk_room_is_reclaimed_leaf_first() {
    let mut b = Bench::new(8, true);
    b.write(&[1, 2, 3]);
    b.offload_all();
    let reclaimed = b.core.reclaim(Tier::Disk, BLOCK + 1);
    assert_eq!(reclaimed.copies, 2);
    assert!(b.core.locate(&key(1)).unwrap().replicas.iter().any(|r| r.tier == Tier::Disk));
    assert!(b.core.locate(&key(3)).unwrap().replicas.iter().all(|r| r.tier == Tier::Host));
}

#[test]
fn a_second_layout_for_one_engine_is_refused() {
    let mut b = Bench::new(4, false);
    let err = b.core.attach(NOW, spec(layout(2, full()))).unwrap_err();
    assert!(err.to_string().contains("layout"), "{err}");
    let far = ReserveRequest {
        attachment: b.who,
        parent: None,
        group: 3,
        first_block: 0,
        keys: vec![key(1)],
        tenant: TenantId::shared(),
        hints: RequestHints::default(),
    };
    assert!(matches!(b.core.reserve(NOW, &far), Err(CoreError::UnknownGroup { .. })));
}

#[test]
fn a_block_read_while_it_is_offloaded_is_offloaded_once() {
    let mut b = Bench::new(4, true);
    b.core.config.object = true;
    b.write(&[1]);
    let offload = |action| match action {
        Action::Offload { id, to, .. } => Some((id, to)),
        _ => None,
    };
    let first: Vec<_> = std::iter::from_fn(|| b.core.poll_action()).filter_map(offload).collect();
    assert_eq!(first.len(), 1);
    b.lookup("r", &[1]);
    let report = LoadReport {
        key: key(1),
        shard: 0,
        source: Origin::Tier(Tier::Host),
        generation: 1,
        result: LoadResult::Loaded,
    };
    b.core.report_loads(b.who, "r", &[report]).unwrap();
    b.release("r", 16, 0);
    assert_eq!(b.core.poll_action(), None, "it is on its way to disk already");
    let at = Location { segment: 0, offset: 0 };
    b.core.moved(first[0].0, MoveEnd::Done(Some(at)));
    let second: Vec<_> = std::iter::from_fn(|| b.core.poll_action()).filter_map(offload).collect();
    assert!(matches!(second[..], [(_, Tier::Object)]), "having been read, it goes on: {second:?}");
    b.core.apply_evict(&[key(1)], &[]);
    b.core.moved(second[0].0, MoveEnd::Done(Some(at)));
    assert_eq!(b.core.catalog_size().0, 0);
}
