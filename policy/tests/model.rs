//! Random sequences of calls against a naive model: what the core promises holds after every step.
//!
//! The model knows the bytes: a sealed block's checksum is its key, and every frame remembers what was last written to
//! it. A hit whose frame holds something else would be wrong bytes.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_policy::{
    Action, AttachSpec, AttachmentId, Core, CoreConfig, ExtentWalk, FrameRef, LeaseId, LoadReport, LoadResult,
    LookupRange, LookupRequest, MarkChange, MoveEnd, ReleaseReport, Reservation, ReserveRequest, Role, SealRequest,
    TaintPattern, TierBudget, TwinPool,
};
use kvtier_types::{
    BlockKey, DeviceNumber, Effect, GroupKind, GroupSpec, HashAlgorithm, Instant, Layout, Location, Namespace, Outcome,
    RequestHints, SemanticType, Taint, TenantId, Tier,
};
use proptest::prelude::{Strategy, prop, proptest};

const BLOCK: u64 = 4096;
const FRAMES: u64 = 12;
const DEVICE_FRAMES: u64 = 5;
const DEVICE: DeviceNumber = DeviceNumber::new(3).unwrap();
const CHAINS: u8 = 4;
const LENGTH: u8 = 6;

#[derive(Debug, Clone)]
enum Step {
    Reserve { chain: u8, first: u8, count: u8 },
    Seal { pick: u8, abandon: bool },
    Lookup { chain: u8, request: u8, loads: Loads },
    Release { request: u8, lost: bool },
    Act { outcome: u8 },
    Evict { chain: u8, block: u8, all: bool },
    Move { chain: u8, to: Tier },
    Vacate { claimed: bool },
    LoseDevice,
    LetGo,
    Mark { chain: u8, block: u8, what: u8, add: bool },
    Reclaim,
    Reattach,
    Wait { seconds: u8 },
}

/// What an engine says of the frames it was handed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Loads {
    Nothing,
    Loaded,
    /// The first of them is no good, whatever it holds.
    Corrupt,
}

fn loads() -> impl Strategy<Value = Loads> {
    let just = prop::strategy::Just;
    prop::strategy::Union::new_weighted(vec![
        (4, just(Loads::Nothing)),
        (8, just(Loads::Loaded)),
        (1, just(Loads::Corrupt)),
    ])
}

fn step() -> impl Strategy<Value = Step> {
    let chain = 0..CHAINS;
    prop::strategy::Union::new_weighted(vec![
        (
            4,
            (chain.clone(), 0..LENGTH, 1..LENGTH)
                .prop_map(|(chain, first, count)| Step::Reserve { chain, first, count })
                .boxed(),
        ),
        (6, (0..8u8, prop::bool::weighted(0.1)).prop_map(|(pick, abandon)| Step::Seal { pick, abandon }).boxed()),
        (
            6,
            (chain.clone(), 0..4u8, loads())
                .prop_map(|(chain, request, loads)| Step::Lookup { chain, request, loads })
                .boxed(),
        ),
        (3, (0..4u8, prop::bool::ANY).prop_map(|(request, lost)| Step::Release { request, lost }).boxed()),
        (8, (0..10u8).prop_map(|outcome| Step::Act { outcome }).boxed()),
        (4, (chain.clone(), 0..3usize).prop_map(|(chain, to)| Step::Move { chain, to: Tier::ALL[to] }).boxed()),
        (1, prop::bool::ANY.prop_map(|claimed| Step::Vacate { claimed }).boxed()),
        (1, prop::strategy::Just(Step::LetGo).boxed()),
        (
            1,
            (chain, 0..LENGTH, prop::bool::ANY)
                .prop_map(|(chain, block, all)| Step::Evict { chain, block, all })
                .boxed(),
        ),
        (
            3,
            (0..CHAINS, 0..LENGTH, 0..5u8, prop::bool::weighted(0.7))
                .prop_map(|(chain, block, what, add)| Step::Mark { chain, block, what, add })
                .boxed(),
        ),
        (1, prop::strategy::Just(Step::Reclaim).boxed()),
        (1, prop::strategy::Just(Step::Reattach).boxed()),
        // Once in a few runs: what comes after is without a device.
        (1, (0..32u8).prop_map(|n| if n == 0 { Step::LoseDevice } else { Step::Reclaim }).boxed()),
        (1, (1..40u8).prop_map(|seconds| Step::Wait { seconds }).boxed()),
    ])
}

/// Blocks from here on may be ephemeral, those before may be secret: one that ends takes what was said of it along.
const EPHEMERAL_FROM: u8 = 4;
/// Blocks that marks may keep in a tier.
const KEPT: u64 = 4;

fn taint(what: u8, block: u8) -> Taint {
    let text = match what {
        0 if block < EPHEMERAL_FROM => "a:NoServe",
        0 => "a:Ephemeral(20s)",
        1 => "b:NoEvict",
        2 => "c:NoOffload",
        3 => "d:PreferEvict",
        _ => "e:NoReplicate",
    };
    text.parse().expect("a taint")
}

/// A chain's block; the first two blocks are the same in every chain, like a shared system prompt.
fn key(chain: u8, block: u8) -> BlockKey {
    let chain = if block < 2 { 0 } else { chain };
    let mut bytes = [chain; 32];
    bytes[0] = block;
    BlockKey::new(bytes)
}

/// What one chain has is worth sharing by its type.
fn hints(chain: u8) -> RequestHints {
    let mut hints = RequestHints::default();
    if chain == 0 {
        hints.block.semantic = SemanticType::SystemPrompt;
    }
    hints
}

fn checksum(key: &BlockKey) -> u64 {
    u64::from(key.as_bytes()[0]) << 8 | u64::from(key.as_bytes()[1])
}

struct World {
    core: Core,
    who: AttachmentId,
    worker: AttachmentId,
    /// Whether the worker reads the device.
    reads: bool,
    now: Instant,
    /// What each frame holds, by place: the generation it was written under and the bytes' checksum.
    frames: BTreeMap<(u32, u32), (u64, u64)>,
    disk: BTreeMap<Location, (BlockKey, u64)>,
    reserved: Vec<(BlockKey, FrameRef)>,
    leases: BTreeMap<u8, LeaseId>,
    actions: Vec<Action>,
    /// Generations of frames that engines or movements called corrupt: another movement that reads one may find it gone.
    quarantined: BTreeSet<u64>,
    /// Blocks that move by verb, and where to.
    flight: Option<(LeaseId, Vec<BlockKey>, Tier)>,
    next_offset: u32,
    /// Blocks that nobody may be handed.
    secret: BTreeSet<BlockKey>,
    /// When blocks end.
    ends: BTreeMap<BlockKey, Instant>,
}

fn spec() -> AttachSpec {
    let groups = vec![GroupSpec { kind: GroupKind::Full, block_tokens: 16, layers: vec!["l".into()] }];
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
    let layout = Layout {
        attention_backend: "CPU".into(),
        isa: String::new(),
        layout: "L".into(),
        tensor_parallel: 1,
        pipeline_parallel: 1,
        prefill_context_parallel: 1,
        decode_context_parallel: 1,
        shards: 1,
        groups,
        block_bytes: vec![BLOCK],
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

fn worker(reads: bool) -> AttachSpec {
    let devices = if reads { vec![DEVICE] } else { Vec::new() };
    AttachSpec { role: Role::Worker, devices, ..spec() }
}

impl World {
    fn new() -> Self {
        let mut config = CoreConfig { disk: true, max_offloads: 3, max_onboards: 2, ..CoreConfig::default() };
        let budget = TierBudget { node_bytes: KEPT * BLOCK, owner_bytes: KEPT * BLOCK };
        config.claims.budgets = [budget; Tier::ALL.len()];
        let mut core = Core::new(config, Box::new(TwinPool::new(FRAMES * BLOCK)), |bytes| bytes)
            .with_devices(vec![(DEVICE, Box::new(TwinPool::on_device(DEVICE, DEVICE_FRAMES * BLOCK)))]);
        let now = Instant::from_nanos(1);
        let who = core.attach(now, spec()).expect("a first attachment is admitted");
        let worker = core.attach(now, worker(true)).expect("and a second");
        Self {
            core,
            who,
            worker,
            reads: true,
            now,
            frames: BTreeMap::new(),
            disk: BTreeMap::new(),
            reserved: Vec::new(),
            leases: BTreeMap::new(),
            actions: Vec::new(),
            quarantined: BTreeSet::new(),
            flight: None,
            next_offset: 0,
            secret: BTreeSet::new(),
            ends: BTreeMap::new(),
        }
    }

    fn write(&mut self, frame: FrameRef, sum: u64) {
        self.frames.insert((frame.extent, frame.page), (frame.generation, sum));
    }

    fn read(&self, frame: FrameRef) -> Option<u64> {
        let (generation, sum) = self.frames.get(&(frame.extent, frame.page))?;
        (*generation == frame.generation).then_some(*sum)
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Reserve { chain, first, count } => self.reserve(chain, first, count),
            Step::Seal { pick, abandon } => self.seal(pick, abandon),
            Step::Lookup { chain, request, loads } => self.lookup(chain, request, loads),
            Step::Release { request, lost } => self.release(request, lost),
            Step::Act { outcome } => self.act(outcome),
            Step::Evict { chain, block, all } => {
                let tiers: &[Tier] = if all { &[] } else { &[Tier::Host] };
                self.core.apply_evict(&[key(chain, block)], tiers);
            }
            Step::Move { chain, to } => self.step_move(chain, to),
            Step::Vacate { claimed } => {
                let extent = DEVICE.extent(0).expect("the first");
                assert_eq!(self.core.vacate_extent(extent, claimed, ExtentWalk::default()), None, "few copies");
            }
            Step::LoseDevice => {
                self.core.lose_device(DEVICE);
                assert!(!self.core.forget_lost_devices(), "few copies");
                assert_eq!(self.core.tier_use(Tier::Device).copies, 0);
            }
            Step::LetGo => self.let_go(),
            Step::Mark { chain, block, what, add } => self.mark(&key(chain, block), taint(what, block), add),
            Step::Reclaim => {
                self.core.reclaim(Tier::Disk, BLOCK);
            }
            Step::Reattach => {
                self.core.detach(self.who);
                self.core.detach(self.worker);
                self.reserved.clear();
                self.leases.clear();
                self.reads = !self.reads;
                self.who = self.core.attach(self.now, spec()).expect("there is room for one");
                self.worker = self.core.attach(self.now, worker(self.reads)).expect("and another");
            }
            Step::Wait { seconds } => {
                self.now = self.now + std::time::Duration::from_secs(seconds.into());
                self.core.heartbeat(self.now, self.who).expect("attached");
                self.core.heartbeat(self.now, self.worker).expect("attached");
                self.core.expire(self.now);
                let now = self.now;
                for over in self.ends.extract_if(.., |_, at| *at <= now).map(|(key, _)| key).collect::<Vec<_>>() {
                    assert!(self.core.locate(&over).is_none(), "{over} outlived its time");
                }
            }
        }
        self.take_actions();
    }

    /// Goes on with what moves, or begins to move a chain.
    fn step_move(&mut self, chain: u8, to: Tier) {
        let (lease, mut keys, to) = self.flight.take().unwrap_or_else(|| {
            let keys: Vec<BlockKey> = (1..LENGTH).map(|block| key(chain, block)).collect();
            let lease = self.core.hold_blocks(self.now, &keys, Some(to)).expect("few blocks");
            (lease, keys, to)
        });
        let step = self.core.step_move(lease, &keys, to);
        for moved in step.ended {
            keys.retain(|key| *key != moved.key);
            if moved.outcome != Outcome::Applied || to != Tier::Disk {
                continue;
            }
            // A faster copy goes only when the slower one is there.
            assert!(self.disk.values().any(|(stored, _)| *stored == moved.key), "no record of what was moved to disk");
            assert_eq!(self.core.lies_in(&moved.key, Tier::Disk), Some((true, BLOCK)));
            assert_eq!(self.core.lies_in(&moved.key, Tier::Host), Some((false, BLOCK)));
        }
        self.flight = Some((lease, keys, to));
        if self.flight.as_ref().is_some_and(|(_, keys, _)| keys.is_empty()) {
            self.let_go();
        }
    }

    fn let_go(&mut self) {
        if let Some((lease, ..)) = self.flight.take() {
            self.core.release_export(lease);
        }
    }

    fn mark(&mut self, key: &BlockKey, taint: Taint, add: bool) {
        let pattern = TaintPattern { key: Some(taint.key.clone()), ..TaintPattern::default() };
        let change = if add {
            MarkChange { absent: true, add: vec![taint.clone()], ..MarkChange::default() }
        } else {
            MarkChange { remove: vec![pattern], ..MarkChange::default() }
        };
        let (outcome, _) = self.core.mark(self.now, &[*key], &change).outcomes[0];
        match taint.effect {
            Effect::NoServe if add => drop(self.secret.insert(*key)),
            // Nothing was said of it, then.
            Effect::NoServe => drop(self.secret.remove(key)),
            Effect::Ephemeral(span) if add && matches!(outcome, Outcome::Applied | Outcome::Clipped) => {
                self.ends.insert(*key, self.now + span);
            }
            Effect::Ephemeral(_) => drop(self.ends.remove(key)),
            _ => {}
        }
    }

    fn take_actions(&mut self) {
        while let Some(action) = self.core.poll_action() {
            if let Action::Forget { at, .. } = action {
                self.disk.remove(&at);
            } else {
                self.actions.push(action);
            }
        }
    }

    fn reserve(&mut self, chain: u8, first: u8, count: u8) {
        let keys: Vec<BlockKey> = (first..(first + count).min(LENGTH)).map(|b| key(chain, b)).collect();
        let request = ReserveRequest {
            attachment: self.who,
            parent: first.checked_sub(1).map(|b| key(chain, b)),
            group: 0,
            first_block: first.into(),
            keys: keys.clone(),
            tenant: TenantId::shared(),
            hints: hints(chain),
        };
        let answers = self.core.reserve(self.now, &request).expect("attached");
        for (key, answer) in keys.into_iter().zip(answers) {
            if let Reservation::Granted(frames) = answer {
                // Its time begins anew.
                self.ends.remove(&key);
                self.reserved.push((key, frames[0]));
            }
        }
    }

    fn seal(&mut self, pick: u8, abandoned: bool) {
        if self.reserved.is_empty() {
            return;
        }
        let (key, frame) = self.reserved.remove(usize::from(pick) % self.reserved.len());
        // A reservation that was reaped: its frame may be somebody else's by now, as with a stalled writer. The late
        // write does happen on real machines; there the checksum catches it, here the seal must be refused.
        let live = self.frames.get(&(frame.extent, frame.page)).is_none_or(|(g, _)| *g <= frame.generation);
        if live {
            self.write(frame, checksum(&key));
        }
        let seal = SealRequest { key, shard: 0, frame, checksum: checksum(&key), abandoned };
        self.core.seal(self.who, &[seal]).expect("attached");
    }

    fn lookup(&mut self, chain: u8, request: u8, loads: Loads) {
        let keys = (0..LENGTH).map(|b| key(chain, b)).collect();
        let lookup = LookupRequest {
            attachment: self.who,
            request_id: request.to_string(),
            ranges: vec![LookupRange { group: 0, first_block: 0, keys }],
            local_tokens: 0,
            tenant: TenantId::shared(),
            hints: RequestHints::default(),
        };
        let lease = self.core.lookup(self.now, lookup).expect("attached");
        self.leases.insert(request, lease);
        // The blocks must come as one prefix, and hold what was sealed under their keys.
        let answer = self.core.collect(lease).expect("just leased");
        let found = &answer.ranges[0].found;
        let hits = found.iter().take_while(|f| f.is_some()).count();
        assert!(found[hits..].iter().all(Option::is_none), "a hit is a prefix: {found:?}");
        for (block, frame) in (0..).zip(&answer.ranges[0].frames) {
            let want = checksum(&key(chain, block));
            assert!(!self.secret.contains(&key(chain, block)), "a secret was handed out");
            assert_eq!(frame.checksum, want, "the catalog's checksum is another block's");
            assert_eq!(self.read(frame.frame), Some(want), "the frame holds something else");
            let on_device = DeviceNumber::of_extent(frame.frame.extent).is_some();
            assert!(self.reads || !on_device, "handed to who cannot read it");
        }
        let result = if loads == Loads::Corrupt { LoadResult::Corrupt } else { LoadResult::Loaded };
        let count = if loads == Loads::Loaded { hits } else { usize::from(loads == Loads::Corrupt) };
        let frames = (0..).zip(&answer.ranges[0].frames).take(count);
        let report = |(block, frame): (u8, &kvtier_policy::AnswerFrame)| {
            let (key, source) = (key(chain, block), frame.source);
            LoadReport { key, shard: 0, source, generation: frame.frame.generation, result }
        };
        let reports: Vec<LoadReport> = frames.map(report).collect();
        if loads == Loads::Corrupt {
            self.quarantined.extend(reports.iter().map(|report| report.generation));
        }
        self.core.report_loads(self.who, &request.to_string(), &reports).expect("attached");
    }

    fn release(&mut self, request: u8, lost: bool) {
        self.leases.remove(&request);
        let report = ReleaseReport { local_tokens: 0, claimed_tokens: 48, lost_tokens: if lost { 16 } else { 0 } };
        self.core.release(self.who, &request.to_string(), report);
    }

    /// Ends one movement: mostly well.
    fn act(&mut self, outcome: u8) {
        if self.actions.is_empty() {
            return;
        }
        match self.actions.remove(usize::from(outcome) % self.actions.len()) {
            Action::Offload { id, frame: from, .. } | Action::Copy { id, from, .. }
                if self.quarantined.contains(&from.generation) =>
            {
                self.core.moved(id, MoveEnd::Failed);
            }
            Action::Offload { id, meta, frame, .. } => {
                assert_eq!(self.read(frame), Some(meta.checksum), "an offload reads what was sealed");
                let at = Location { segment: 0, offset: self.next_offset };
                self.next_offset += 1;
                let end = match outcome {
                    0 => MoveEnd::Failed,
                    1 => self.corrupt(frame),
                    _ => {
                        self.disk.insert(at, (meta.key.block, meta.checksum));
                        MoveEnd::Done(Some(at))
                    }
                };
                self.core.moved(id, end);
            }
            Action::Onboard { id, key, at, expect, into, .. } => {
                let end = match (self.disk.get(&at).copied(), outcome) {
                    (None, _) => MoveEnd::Gone,
                    (_, 0) => MoveEnd::Failed,
                    (_, 1) => MoveEnd::Corrupt,
                    (Some((stored, sum)), _) => {
                        assert_eq!((stored, sum), (key.block, expect.checksum), "the catalog points at another record");
                        self.write(into, sum);
                        MoveEnd::Done(None)
                    }
                };
                self.core.moved(id, end);
            }
            Action::Copy { id, key, expect, from, into } => {
                assert_eq!(self.read(from), Some(expect.checksum), "a copy reads what was sealed");
                assert_eq!(expect.checksum, checksum(&key.block));
                let end = match outcome {
                    0 => MoveEnd::Failed,
                    1 => self.corrupt(from),
                    _ => {
                        self.write(into, expect.checksum);
                        MoveEnd::Done(None)
                    }
                };
                self.core.moved(id, end);
            }
            Action::Forget { .. } => {}
            other => panic!("nobody else is here to ask: {other:?}"),
        }
    }

    fn corrupt(&mut self, frame: FrameRef) -> MoveEnd {
        self.quarantined.insert(frame.generation);
        MoveEnd::Corrupt
    }

    fn check(&self) {
        let ledger = self.core.ledger();
        assert_eq!(ledger.rows().map(|(_, n)| n).sum::<u64>(), ledger.looked_up(), "the parts sum to the whole");
        for tier in [Tier::Host, Tier::Disk] {
            assert!(self.core.kept_use(tier).bytes <= KEPT * BLOCK, "marks keep no more than they may");
        }
        assert!(self.core.tier_use(Tier::Host).bytes <= FRAMES * BLOCK, "capacity is never exceeded");
        assert!(self.core.tier_use(Tier::Device).bytes <= DEVICE_FRAMES * BLOCK, "nor a device's");
        assert_eq!(self.core.tier_use(Tier::Disk).copies, self.disk.len() as u64, "the disk's records are all known");
    }

    /// Ends everything that is under way, and lets everybody go: nothing may be left over.
    fn wind_down(&mut self) {
        self.core.detach(self.who);
        self.core.detach(self.worker);
        self.let_go();
        self.take_actions();
        while !self.actions.is_empty() {
            self.act(9);
            self.take_actions();
        }
        let every: Vec<BlockKey> = (0..CHAINS).flat_map(|c| (0..LENGTH).map(move |b| key(c, b))).collect();
        let unmark = MarkChange { remove: vec![TaintPattern::default()], ..MarkChange::default() };
        self.core.mark(self.now, &every, &unmark);
        assert_eq!(self.core.kept_use(Tier::Host).copies + self.core.kept_use(Tier::Disk).copies, 0);
        self.core.apply_evict(&every, &[]);
        self.take_actions();
        assert_eq!(self.core.tier_use(Tier::Host).copies, 0);
        assert_eq!(self.core.tier_use(Tier::Device).copies, 0);
        assert_eq!(self.core.catalog_size().0, 0, "an entry outlived everything it was for");
        assert!(self.disk.is_empty(), "a record was forgotten by the catalog but not on disk");
        assert_eq!(self.core.pending_offloads() + self.core.pending_onboards(), 0);
        assert_eq!(self.core.pending_device_copies(), 0);
    }
}

proptest! {
    #[test]
    fn promises_hold_after_every_step(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        for step in &steps {
            world.run(step);
            world.check();
        }
        world.wind_down();
    }
}
