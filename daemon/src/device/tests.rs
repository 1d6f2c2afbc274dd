//! The tier of a node over a twin that is told what to do: pressure on its memory, damage, and loss.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use kvtier_device::Device;
use kvtier_device::twin::{TwinConfig, TwinDevice};
use kvtier_policy::{AttachSpec, AttachmentId, Reservation, ReserveRequest, Role, SealOutcome, SealRequest};
use kvtier_types::{
    BlockKey, DeviceNumber, GroupKind, GroupSpec, HashAlgorithm, Layout, Namespace, RequestHints, TenantId, Tier,
};
use tempfile::TempDir;
use tokio::time::Instant;

use super::{lose, tend};
use crate::config::Config;
use crate::node::Node;
use crate::pool::frame_id;
use crate::recovery;

const MIB: u64 = 1 << 20;
/// One block fills half an extent.
const BLOCK: u64 = MIB;
const EXTENT: u64 = 2 * MIB;
const RESERVE: u64 = 64 * MIB;
const MEMORY: u64 = 256 * MIB;
const SOON: Duration = Duration::from_secs(20);

struct Bench {
    node: Arc<Node>,
    twin: Arc<TwinDevice>,
    who: AttachmentId,
    _dir: TempDir,
}

fn spec() -> AttachSpec {
    let group = GroupSpec { kind: GroupKind::Full, block_tokens: 16, layers: vec!["l".into()] };
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
        groups: vec![group],
        block_bytes: vec![BLOCK],
    };
    let (engine, devices) = ("e".to_owned(), Vec::new());
    AttachSpec { engine, role: Role::Scheduler, rank: 0, shard: 0, devices, pid: 1, namespace, layout }
}

fn key(n: u8) -> BlockKey {
    BlockKey::new([n; 32])
}

impl Bench {
    /// A node with a pool of at most four extents, and four blocks in its host memory.
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let toml = format!(
            "node_id = \"n\"\nrun_dir = {run:?}\ndata_dir = {data:?}\n[host]\ncapacity = \"16MiB\"\nextent = \"8MiB\"\n\
             pages = \"plain\"\n[disk]\nenabled = false\n[device]\nmemory = \"8MiB\"\nextent = \"2MiB\"\nreserve = \"64MiB\"\n",
            run = dir.path().join("run"),
            data = dir.path().join("data"),
        );
        let config: Config = toml::from_str(&toml).unwrap();
        let twin = TwinDevice::new(TwinConfig { memory_bytes: MEMORY, ..TwinConfig::default() }).unwrap();
        let twin = Arc::new(twin);
        let opened = (DeviceNumber::new(0).unwrap(), Arc::clone(&twin) as Arc<dyn Device>);
        let node = recovery::open_with(config, Box::new(move |_| (vec![opened], String::new()))).await.unwrap();
        assert!(node.arena.grow().unwrap());
        let who = node.with_core(|core, now| core.attach(now, spec())).unwrap();
        let this = Self { node, twin, who, _dir: dir };
        (1..=4).for_each(|n| this.write(n));
        this
    }

    fn write(&self, n: u8) {
        let request = ReserveRequest {
            attachment: self.who,
            parent: None,
            group: 0,
            first_block: 0,
            keys: vec![key(n)],
            tenant: TenantId::shared(),
            hints: RequestHints::default(),
        };
        let answers = self.node.with_core(|core, now| core.reserve(now, &request)).unwrap();
        let [Reservation::Granted(frames)] = &answers[..] else { panic!("{answers:?}") };
        let pin = self.node.arena.pin(frame_id(frames[0], BLOCK)).unwrap();
        let checksum = pin.copy_in(&vec![n; usize::try_from(BLOCK).unwrap()]);
        let seal = SealRequest { key: key(n), shard: 0, frame: frames[0], checksum, abandoned: false };
        let sealed = self.node.with_core(|core, _| core.seal(self.who, &[seal])).unwrap();
        assert_eq!(sealed, [SealOutcome::Applied]);
    }

    fn round(&self) {
        tend::round(&self.node, &self.node.devices.gpus()[0]);
    }

    /// Moves blocks to the device: how many are there then.
    async fn bring(&self, blocks: std::ops::RangeInclusive<u8>) -> u64 {
        let keys: Vec<BlockKey> = blocks.map(key).collect();
        for key in &keys {
            let one = std::slice::from_ref(key);
            let lease = self.node.with_core(|core, now| core.hold_blocks(now, one, Some(Tier::Device))).unwrap();
            self.node.with_core(|core, _| core.step_move(lease, one, Tier::Device));
            // Memory may be wanted for it.
            self.round();
            let idle = |core: &kvtier_policy::Core| Ok::<_, Infallible>(core.pending_device_copies() == 0);
            self.node.wait_until(Instant::now() + SOON, idle).await.unwrap();
            self.node.with_core(|core, _| core.release_export(lease));
        }
        self.copies()
    }

    fn copies(&self) -> u64 {
        self.node.read_core(|core| core.tier_use(Tier::Device).copies)
    }

    fn resident(&self) -> u64 {
        self.node.devices.stats().resident_bytes
    }
}

#[tokio::test]
async fn under_pressure_memory_is_given_back_and_taken_again_once_there_is_plenty() {
    let b = Bench::new().await;
    b.round();
    assert_eq!(b.bring(1..=4).await, 4);
    assert_eq!(b.resident(), 2 * EXTENT);
    // Engines take what is free but for a little less than the reserve: one extent is enough.
    let hog = b.twin.allocate(b.twin.free_bytes().unwrap() - RESERVE + EXTENT).unwrap();
    b.round();
    assert_eq!((b.copies(), b.resident()), (2, EXTENT), "the emptiest went, or one of equals");
    assert_eq!(b.twin.free_bytes().unwrap(), RESERVE);
    // No more than the reserve is free: nothing is taken.
    b.round();
    assert_eq!(b.bring(1..=4).await, 2, "others make way for those that come");
    assert_eq!(b.resident(), EXTENT);
    drop(hog);
    b.round();
    assert_eq!(b.bring(1..=4).await, 4);
    // What is leased stays, and its memory with it, until the lease ends.
    let hog = b.twin.allocate(b.twin.free_bytes().unwrap() - 2 * MIB).unwrap();
    let lease = b.node.with_core(|core, now| core.hold_blocks(now, &[key(1)], None)).unwrap();
    b.round();
    assert_eq!((b.copies(), b.resident()), (1, EXTENT));
    b.node.with_core(|core, _| core.release_export(lease));
    b.round();
    assert_eq!((b.copies(), b.resident()), (0, 0));
    assert_eq!(b.node.read_core(|core| core.tier_use(Tier::Host).copies), 4, "and all is in host memory as before");
    drop(hog);
}

#[tokio::test]
async fn what_arrives_damaged_is_not_used_and_what_was_damaged_before_goes() {
    let b = Bench::new().await;
    b.round();
    b.twin.flip_next(1);
    assert_eq!(b.bring(1..=1).await, 0);
    assert_eq!(b.node.read_core(|core| core.counts().corrupt), 0, "the copy in host memory is good");
    assert_eq!(b.bring(1..=1).await, 1);
    b.twin.fail_next(1);
    assert_eq!(b.bring(2..=2).await, 1);
    // Somebody with a writable mapping scribbled.
    let third = kvtier_memory::FrameId { extent: 0, offset: 2 * BLOCK, bytes: BLOCK, generation: 0 };
    let generation = b.node.arena.extent(0).unwrap().generation(third.offset);
    b.node.arena.pin(kvtier_memory::FrameId { generation, ..third }).unwrap().fill(0xee);
    assert_eq!(b.bring(3..=3).await, 1);
    let (corrupt, host) = b.node.read_core(|core| (core.counts().corrupt, core.tier_use(Tier::Host).copies));
    assert_eq!((corrupt, host), (1, 3));
}

#[tokio::test]
async fn a_lost_device_is_forgotten_and_the_node_goes_on() {
    let b = Bench::new().await;
    b.round();
    assert_eq!(b.bring(1..=2).await, 2);
    b.twin.lose();
    assert_eq!(b.bring(3..=3).await, 0, "the copy that fails tells of it");
    let why = b.node.devices.why_absent().unwrap();
    assert!(why.contains("lost"), "{why}");
    assert!(!b.node.read_core(kvtier_policy::Core::has_devices));
    assert_eq!(b.node.read_core(|core| core.tier_use(Tier::Host).copies), 4);
    assert_eq!(b.node.devices.stats().capacity_bytes, 0);
    lose(&b.node, &b.node.devices.gpus()[0], "again");
    assert_eq!(b.node.devices.why_absent().unwrap(), why, "once is enough");
}
