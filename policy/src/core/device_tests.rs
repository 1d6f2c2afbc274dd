//! The device tier, against hand-made situations.

use kvtier_types::{
    BlockKey, ClaimKind, ClaimName, DeviceNumber, Location, Origin, Outcome, RequestHints, SemanticType, TenantId, Tier,
};

use super::tests::{BLOCK, NOW, full, key, layout, spec};
use super::*;
use crate::attachment::{AttachSpec, Role};
use crate::claims::TierBudget;
use crate::frame::TwinPool;
use crate::ledger::MissReason;

const GPU: DeviceNumber = DeviceNumber::new(0).unwrap();
const OTHER: DeviceNumber = DeviceNumber::new(1).unwrap();

/// A core with two devices, and an engine whose worker reads the first.
struct Bench {
    core: Core,
    who: AttachmentId,
    copied: Vec<(FrameRef, FrameRef)>,
    records: u32,
}

fn attach(core: &mut Core, engine: &str, role: Role, devices: &[DeviceNumber]) -> AttachmentId {
    let spec = AttachSpec { engine: engine.into(), role, devices: devices.to_vec(), ..spec(layout(1, full())) };
    core.attach(NOW, spec).unwrap()
}

impl Bench {
    fn new(host_blocks: u64, device_blocks: u64) -> Self {
        let mut config = CoreConfig { disk: true, eager_offload: false, ..CoreConfig::default() };
        config.claims.budgets = [TierBudget { node_bytes: 8 * BLOCK, owner_bytes: 8 * BLOCK }; Tier::ALL.len()];
        let pool = |number| -> (DeviceNumber, Box<dyn FramePool>) {
            (number, Box::new(TwinPool::on_device(number, device_blocks * BLOCK)))
        };
        let mut core = Core::new(config, Box::new(TwinPool::new(host_blocks * BLOCK)), |bytes| bytes)
            .with_devices(vec![pool(GPU), pool(OTHER)]);
        let who = attach(&mut core, "e", Role::Scheduler, &[]);
        attach(&mut core, "e", Role::Worker, &[GPU]);
        Self { core, who, copied: Vec::new(), records: 0 }
    }

    fn write(&mut self, keys: &[u8], semantic: SemanticType) {
        let mut hints = RequestHints::default();
        hints.block.semantic = semantic;
        let request = ReserveRequest {
            attachment: self.who,
            parent: None,
            group: 0,
            first_block: 0,
            keys: keys.iter().map(|n| key(*n)).collect(),
            tenant: TenantId::shared(),
            hints,
        };
        let answers = self.core.reserve(NOW, &request).unwrap();
        for (n, answer) in keys.iter().zip(answers) {
            let Reservation::Granted(frames) = answer else { panic!("block {n}: {answer:?}") };
            let seal =
                SealRequest { key: key(*n), shard: 0, frame: frames[0], checksum: u64::from(*n), abandoned: false };
            assert_eq!(self.core.seal(self.who, &[seal]).unwrap(), [SealOutcome::Applied]);
        }
    }

    fn lookup_by(&mut self, who: AttachmentId, request_id: &str, keys: &[u8]) -> LeaseId {
        let range = LookupRange { group: 0, first_block: 0, keys: keys.iter().map(|n| key(*n)).collect() };
        let request = LookupRequest {
            attachment: who,
            request_id: request_id.into(),
            ranges: vec![range],
            local_tokens: 0,
            tenant: TenantId::shared(),
            hints: RequestHints::default(),
        };
        self.core.lookup(NOW, request).unwrap()
    }

    /// A request that loads all it is offered: where each block came from.
    fn read(&mut self, keys: &[u8]) -> Vec<Option<Origin>> {
        let lease = self.lookup_by(self.who, "read", keys);
        self.carry_out();
        let answer = self.core.collect(lease).unwrap();
        let range = &answer.ranges[0];
        for (n, frame) in keys.iter().zip(&range.frames) {
            let on_device = crate::catalog::device_of(frame.frame).is_some();
            assert_eq!(frame.source == Origin::Tier(Tier::Device), on_device, "block {n}");
            self.report(*n, frame, LoadResult::Loaded);
        }
        let tokens = u32::try_from(range.frames.len()).unwrap() * 16;
        let report = ReleaseReport { local_tokens: 0, claimed_tokens: tokens, lost_tokens: 0 };
        self.core.release(self.who, "read", report);
        self.carry_out();
        range.found.clone()
    }

    fn report(&mut self, n: u8, frame: &AnswerFrame, result: LoadResult) {
        let (source, generation) = (frame.source, frame.frame.generation);
        let report = LoadReport { key: key(n), shard: 0, source, generation, result };
        self.core.report_loads(self.who, "read", &[report]).unwrap();
    }

    /// Carries out what the core wants done.
    fn carry_out(&mut self) {
        while let Some(action) = self.core.poll_action() {
            match action {
                Action::Copy { id, from, into, expect, key } => {
                    assert_eq!(u64::from(key.block.as_bytes()[0]), expect.checksum);
                    self.copied.push((from, into));
                    self.core.moved(id, MoveEnd::Done(None));
                }
                Action::Offload { id, .. } => {
                    self.records += 1;
                    self.core.moved(id, MoveEnd::Done(Some(Location { segment: 0, offset: self.records })));
                }
                Action::Onboard { id, .. } => self.core.moved(id, MoveEnd::Done(None)),
                _ => {}
            }
        }
    }

    /// Moves blocks by verb: how each ended.
    fn fly(&mut self, keys: &[u8], to: Tier) -> Vec<Outcome> {
        let keys: Vec<BlockKey> = keys.iter().map(|n| key(*n)).collect();
        let lease = self.core.hold_blocks(NOW, &keys, Some(to)).unwrap();
        let mut ended = Vec::new();
        for _ in 0..4 {
            let left: Vec<BlockKey> =
                keys.iter().filter(|k| ended.iter().all(|m: &Moved| m.key != **k)).copied().collect();
            ended.extend(self.core.step_move(lease, &left, to).ended);
            self.carry_out();
        }
        self.core.release_export(lease);
        keys.iter().filter_map(|key| ended.iter().find(|m| m.key == *key).map(|m| m.outcome)).collect()
    }

    fn pin(&mut self, keys: &[u8]) -> ClaimAnswer {
        let name = ClaimName { tenant: TenantId::shared(), owner: "o".into(), id: "pin".into() };
        let kind = ClaimKind::Pin(Tier::Device);
        let mut survey = Survey::new(kind, keys.iter().map(|n| key(*n)).collect());
        while self.core.survey(&mut survey) {}
        let request = ClaimRequest { name, revision: 1, kind, ttl: Duration::from_secs(60) };
        let answer = self.core.claim(NOW, &request, survey, false);
        while self.core.settle_claims() {}
        self.carry_out();
        answer
    }

    fn tiers(&self, n: u8) -> Vec<Tier> {
        let view = self.core.locate(&key(n));
        view.map(|view| view.replicas.iter().map(|r| r.tier).collect()).unwrap_or_default()
    }

    fn on_device(&self, keys: &[u8]) -> Vec<u8> {
        keys.iter().copied().filter(|n| self.tiers(*n).contains(&Tier::Device)).collect()
    }
}

const DEVICE: Option<Origin> = Some(Origin::Tier(Tier::Device));
const HOST: Option<Origin> = Some(Origin::Tier(Tier::Host));

#[test]
fn a_shared_prefix_that_was_read_comes_onto_the_device_by_itself() {
    let mut b = Bench::new(8, 8);
    b.write(&[1, 2], SemanticType::SystemPrompt);
    b.write(&[3], SemanticType::ConversationTurn);
    assert_eq!(b.read(&[1, 2, 3]), [HOST; 3]);
    assert!(b.copied.is_empty(), "nobody had read it before");
    assert_eq!(b.read(&[1, 2, 3]), [DEVICE, DEVICE, HOST], "copied while it was waited for");
    assert_eq!(b.copied.len(), 2);
    assert!(b.copied.iter().all(|(from, into)| {
        let device = crate::catalog::device_of;
        (device(*from), device(*into)) == (None, Some(GPU))
    }));
    assert_eq!(b.read(&[1, 2, 3]), [DEVICE, DEVICE, HOST], "what only one program has stays where it is");
    let ledger = b.core.ledger();
    assert_eq!((ledger.served(Tier::Device), ledger.served(Tier::Host)), (64, 80));
    assert_eq!(b.core.counts().loaded[Origin::Tier(Tier::Device).index()], 4);
    assert_eq!(b.core.tier_use(Tier::Device).copies, 2);
    assert_eq!(b.core.pending_device_copies(), 0);
}

#[test]
fn only_what_all_workers_of_the_shard_read_is_answered_from_a_device() {
    let mut b = Bench::new(8, 8);
    b.write(&[1], SemanticType::SystemPrompt);
    b.read(&[1]);
    assert_eq!(b.read(&[1]), [DEVICE]);
    // A rank that shares the shard, and reads it from its own device only.
    let other = attach(&mut b.core, "e", Role::Worker, &[OTHER]);
    assert_eq!(b.read(&[1]), [HOST]);
    b.core.detach(other);
    attach(&mut b.core, "e", Role::Worker, &[OTHER, GPU]);
    assert_eq!(b.read(&[1]), [DEVICE]);
    // Another engine that reads none.
    let blind = attach(&mut b.core, "blind", Role::Scheduler, &[]);
    let lease = b.lookup_by(blind, "r", &[1]);
    assert_eq!(b.core.collect(lease).unwrap().ranges[0].found, [HOST]);
}

#[test]
fn a_copy_on_a_device_alone_serves_and_comes_back_into_host_memory() {
    let mut b = Bench::new(8, 8);
    b.write(&[1], SemanticType::SystemPrompt);
    assert_eq!(b.fly(&[1], Tier::Device), [Outcome::Applied]);
    b.core.apply_evict(&[key(1)], &[Tier::Host]);
    assert_eq!(b.tiers(1), [Tier::Device]);
    let lease = b.lookup_by(b.who, "r", &[1]);
    assert_eq!(b.core.waiting(lease), Ok(0), "it needs no copy in host memory");
    assert_eq!(b.core.collect(lease).unwrap().ranges[0].found, [DEVICE]);
    assert!(b.core.poll_action().is_none());
    let blind = attach(&mut b.core, "blind", Role::Scheduler, &[]);
    let lease = b.lookup_by(blind, "r", &[1]);
    assert_eq!(b.core.waiting(lease), Ok(1));
    b.copied.clear();
    b.carry_out();
    assert_eq!(b.core.waiting(lease), Ok(0));
    let answer = b.core.collect(lease).unwrap();
    assert_eq!(answer.ranges[0].found, [DEVICE], "from where it came");
    assert_eq!(answer.ranges[0].frames[0].frame, b.copied[0].1, "handed out in host memory");
    assert_eq!(b.tiers(1), [Tier::Device, Tier::Host]);
}

#[test]
fn copies_make_way_in_turn_and_those_used_since_once_later() {
    let mut b = Bench::new(8, 2);
    b.write(&[1, 2, 3, 4], SemanticType::SystemPrompt);
    assert_eq!(b.fly(&[1, 2], Tier::Device), [Outcome::Applied; 2]);
    b.read(&[1]);
    assert_eq!(b.fly(&[3], Tier::Device), [Outcome::Applied]);
    assert_eq!(b.on_device(&[1, 2, 3]), [1, 3], "the first was used since it came");
    let lease = b.lookup_by(b.who, "r", &[1]);
    assert_eq!(b.fly(&[4], Tier::Device), [Outcome::Applied]);
    assert_eq!(b.on_device(&[1, 3, 4]), [1, 4], "the first is leased");
    let other = b.lookup_by(b.who, "s", &[4]);
    assert!(b.fly(&[2], Tier::Device).is_empty(), "nothing may go: it is not copied, and nothing waits");
    assert_eq!(b.core.pending_device_copies(), 0);
    for lease in [lease, other] {
        assert_eq!(b.core.collect(lease).unwrap().ranges[0].found, [DEVICE]);
    }
    assert_eq!(b.core.counts().evicted[Tier::Device.index()], 2);
    assert_eq!(b.tiers(2), [Tier::Host], "what made way is still in host memory");
}

#[test]
fn a_pin_brings_a_block_onto_a_device_and_keeps_it_there() {
    let mut b = Bench::new(8, 2);
    b.write(&[1, 2, 3], SemanticType::SystemPrompt);
    let answer = b.pin(&[1]);
    assert_eq!(answer.outcomes, [(Outcome::Accepted, "on its way to that tier")]);
    assert_eq!(b.tiers(1), [Tier::Device, Tier::Host, Tier::Disk], "the disk's copy survives a restart");
    assert_eq!(b.fly(&[2, 3], Tier::Device), [Outcome::Applied; 2]);
    assert_eq!(b.on_device(&[1, 2, 3]), [1, 3]);
    assert_eq!(b.core.plan_evict(&[key(1)], &[Tier::Device]).outcomes[0].1, Outcome::Rejected);
    assert_eq!(b.fly(&[1], Tier::Host), [Outcome::Rejected], "nor is it moved away");
    // Its memory is wanted, and then is there again.
    let extent = GPU.extent(0).unwrap();
    assert_eq!(b.core.vacate_extent(extent, false, ExtentWalk::default()), None);
    assert_eq!(b.on_device(&[1, 2, 3]), [1]);
    assert_eq!(b.core.vacate_extent(extent, true, ExtentWalk::default()), None);
    assert!(b.on_device(&[1, 2, 3]).is_empty());
    b.carry_out();
    assert_eq!(b.on_device(&[1, 2, 3]), [1]);
}

#[test]
fn a_pin_brings_up_what_only_the_disk_has() {
    let mut b = Bench::new(8, 2);
    b.write(&[1], SemanticType::SystemPrompt);
    assert_eq!(b.fly(&[1], Tier::Disk), [Outcome::Applied]);
    assert_eq!(b.tiers(1), [Tier::Disk]);
    b.pin(&[1]);
    assert_eq!(b.tiers(1), [Tier::Device, Tier::Host, Tier::Disk]);
}

#[test]
fn moving_away_from_the_device_takes_the_copy_there() {
    let mut b = Bench::new(8, 2);
    b.write(&[1, 2], SemanticType::SystemPrompt);
    b.fly(&[1, 2], Tier::Device);
    assert_eq!(b.core.plan_move(&[key(1)], Tier::Device)[0].outcome, Outcome::Duplicate);
    assert_eq!(b.fly(&[1], Tier::Host), [Outcome::Applied]);
    assert_eq!(b.tiers(1), [Tier::Host]);
    b.core.apply_evict(&[key(2)], &[Tier::Host]);
    assert_eq!(b.fly(&[2], Tier::Disk), [Outcome::Applied], "by way of host memory");
    assert_eq!(b.tiers(2), [Tier::Disk]);
    b.core.apply_evict(&[key(1)], &[]);
    assert!(b.tiers(1).is_empty());
}

#[test]
fn corrupt_copies_go_alone() {
    let mut b = Bench::new(8, 8);
    b.write(&[1], SemanticType::SystemPrompt);
    b.fly(&[1], Tier::Device);
    let lease = b.lookup_by(b.who, "read", &[1]);
    let frame = b.core.collect(lease).unwrap().ranges[0].frames[0];
    b.report(1, &frame, LoadResult::Corrupt);
    assert_eq!(b.tiers(1), [Tier::Host], "the copy that it was read from goes, and no other");
    assert_eq!((b.core.counts().corrupt, b.core.tier_use(Tier::Device).copies), (1, 0));
    b.core.release(b.who, "read", ReleaseReport { local_tokens: 0, claimed_tokens: 16, lost_tokens: 16 });
    assert_eq!(b.core.ledger().missed(MissReason::Corrupt), 16);
    assert_eq!(b.read(&[1]), [HOST]);
    // Found on the way down, and on the way up.
    b.fly(&[1], Tier::Device);
    b.core.apply_evict(&[key(1)], &[Tier::Host]);
    let held = b.core.hold_blocks(NOW, &[key(1)], None).unwrap();
    let Some(Action::Copy { id, .. }) = b.core.poll_action() else { panic!() };
    b.core.moved(id, MoveEnd::Corrupt);
    assert_eq!(b.core.export_waiting(held), 0);
    assert!(b.tiers(1).is_empty());
    b.core.release_export(held);
    b.write(&[2], SemanticType::SystemPrompt);
    let held = b.core.hold_blocks(NOW, &[key(2)], Some(Tier::Device)).unwrap();
    b.core.step_move(held, &[key(2)], Tier::Device);
    let Some(Action::Copy { id, .. }) = b.core.poll_action() else { panic!() };
    b.core.moved(id, MoveEnd::Corrupt);
    assert_eq!((b.tiers(2), b.core.counts().corrupt), (vec![], 3));
    b.core.release_export(held);
    assert_eq!(b.core.catalog_size().0, 0);
}

#[test]
fn a_copy_that_is_not_verified_is_not_there() {
    let mut b = Bench::new(8, 8);
    b.write(&[1], SemanticType::SystemPrompt);
    let held = b.core.hold_blocks(NOW, &[key(1)], Some(Tier::Device)).unwrap();
    let step = b.core.step_move(held, &[key(1)], Tier::Device);
    assert_eq!(step.queued, [key(1)]);
    assert_eq!(b.tiers(1), [Tier::Host]);
    b.core.apply_evict(&[key(1)], &[Tier::Host]);
    assert_eq!(b.tiers(1), [Tier::Host], "what is being copied stays");
    let Some(Action::Copy { id, .. }) = b.core.poll_action() else { panic!() };
    b.core.moved(id, MoveEnd::Failed);
    assert_eq!(b.tiers(1), [Tier::Host]);
    assert_eq!(b.core.counts().move_failures[Tier::Device.index()], 1);
    assert_eq!(b.core.devices.pools[0].used_bytes, 0, "its frame is given back");
}

#[test]
fn a_lost_device_is_read_no_more_and_forgotten() {
    let mut b = Bench::new(8, 8);
    b.write(&[1, 2, 3], SemanticType::SystemPrompt);
    b.fly(&[1, 2], Tier::Device);
    b.core.apply_evict(&[key(2)], &[Tier::Host]);
    let held = b.core.hold_blocks(NOW, &[key(3)], Some(Tier::Device)).unwrap();
    b.core.step_move(held, &[key(3)], Tier::Device);
    b.core.lose_device(GPU);
    assert_eq!(b.read(&[1, 2]), [HOST, None]);
    assert!(!b.core.forget_lost_devices());
    b.carry_out();
    b.core.release_export(held);
    assert_eq!(b.core.tier_use(Tier::Device).copies, 0, "what was on its way is forgotten too");
    assert_eq!(b.core.devices.pools[0].used_bytes, 0);
    assert_eq!((b.tiers(1), b.tiers(2)), (vec![Tier::Host], vec![]));
    assert!(b.core.has_devices(), "the other one is there");
    assert_eq!(b.fly(&[1], Tier::Device), [Outcome::Applied]);
    b.core.without(Tier::Device);
    assert!(!b.core.has_devices() && !b.core.forget_lost_devices());
    assert_eq!(b.tiers(1), [Tier::Host]);
    assert_eq!(b.pin(&[1]).outcome, Outcome::Unsupported);
}

#[test]
fn an_engine_that_cannot_load_from_its_device_is_handed_no_more_frames_there() {
    let mut b = Bench::new(8, 8);
    b.write(&[1], SemanticType::SystemPrompt);
    b.fly(&[1], Tier::Device);
    for n in 0..=8 {
        let lease = b.lookup_by(b.who, "read", &[1]);
        let frame = b.core.collect(lease).unwrap().ranges[0].frames[0];
        assert_eq!(Some(frame.source), if n < 8 { DEVICE } else { HOST }, "after {n}");
        b.report(1, &frame, LoadResult::Lost);
    }
}

#[test]
fn rules_that_allow_no_copy_there_are_kept() {
    let mut b = Bench::new(8, 8);
    b.write(&[1, 2], SemanticType::SystemPrompt);
    b.fly(&[1], Tier::Device);
    let rules = "[[rule]]\nname = \"r\"\nthen = { tiers = [\"host\", \"disk\"] }\n";
    b.core.set_rules(kvtier_types::rules::parse(rules).unwrap());
    while b.core.walk() {}
    assert_eq!(b.tiers(1), [Tier::Host]);
    assert_eq!(b.core.plan_move(&[key(2)], Tier::Device)[0].outcome, Outcome::Rejected);
    b.read(&[1, 2]);
    assert_eq!(b.read(&[1, 2]), [HOST; 2]);
}
