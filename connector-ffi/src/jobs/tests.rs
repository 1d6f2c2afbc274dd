//! Jobs against a real arena, its extents handed over the memory crate's own descriptor server.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvtier_device::twin::{TwinConfig, TwinDevice};
use kvtier_device::{Device, PoolMemory};
use kvtier_memory::fdpass::{FdStatus, Grant, serve_one};
use kvtier_memory::plan::Region;
use kvtier_memory::{Arena, ArenaConfig, ExtentFds, FrameId, GenerationTable, PageKind};
use kvtier_proto::v1;
use kvtier_types::{BlockKey, DeviceNumber};
use parking_lot::Mutex;

use super::job::{Fate, Kind, Transfer};
use super::{JobPoll, Jobs};
use crate::counters::Counters;
use crate::device::DeviceSide;
use crate::error::Error;
use crate::frame::FrameRef;
use crate::link::LinkState;
use crate::link::tests::attachment;
use crate::regions::Regions;
use crate::report::{Queue, Report, Reports};
use crate::shared::Shared;
use crate::spec::Spec;
use crate::spec::tests::sample;

pub(super) const BLOCK: usize = 8192;
const BLOCKS: usize = 8;
const POOL_BYTES: u64 = 2 << 20;
const TOKEN: [u8; 16] = [5; 16];
pub(super) const LONG: Duration = Duration::from_secs(30);

pub(super) struct Rig {
    pub(super) arena: Arena,
    pub(super) pool: Arc<Pool>,
    pub(super) shared: Arc<Shared>,
    pub(super) jobs: Jobs,
    pub(super) queue: Queue,
    /// While somebody holds it, no request for an extent is answered.
    pub(super) hold: Arc<Mutex<()>>,
    /// Requests for extents that came.
    pub(super) asked: Arc<AtomicUsize>,
    /// Two layers, each with half a block a run.
    pub(super) layers: [Vec<u8>; 2],
    _runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
}

/// What a daemon's device tier hands out: one extent.
pub(super) struct Pool {
    memory: Arc<dyn PoolMemory>,
    pub(super) table: GenerationTable,
}

impl Pool {
    /// The number of its extent.
    pub(super) fn extent() -> u32 {
        DeviceNumber::new(0).unwrap().extent(0).unwrap()
    }

    fn new() -> Self {
        let twin = TwinDevice::new(TwinConfig::default()).unwrap();
        Self { memory: twin.allocate(POOL_BYTES).unwrap(), table: GenerationTable::create(POOL_BYTES).unwrap() }
    }

    /// The daemon's memory, which is the twin's, which is this process's.
    pub(super) fn base(&self) -> usize {
        usize::try_from(self.memory.span().base).unwrap()
    }

    fn grant(&self) -> Grant {
        let fds = ExtentFds { extent: self.memory.export().unwrap(), generations: self.table.descriptor().unwrap() };
        Grant::Device { fds, bytes: POOL_BYTES }
    }
}

/// A session whose engine computes on the host, and one whose engine computes on a device.
fn rigs() -> [Rig; 2] {
    [rig(None), rig(Some(Arc::new(TwinDevice::new(TwinConfig::default()).unwrap())))]
}

pub(super) fn rig(twin: Option<Arc<TwinDevice>>) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("fd.sock");
    let config = ArenaConfig {
        capacity_bytes: 1 << 20,
        extent_bytes: 1 << 20,
        page_kind: PageKind::Plain,
        first_generation: 1 << 40,
    };
    let arena = Arena::new(config).unwrap();
    assert!(arena.grow().unwrap());
    let pool = Arc::new(Pool::new());
    let (listener, served) = (UnixListener::bind(&socket).unwrap(), (arena.clone(), Arc::clone(&pool)));
    let (hold, asked) = (Arc::new(Mutex::new(())), Arc::new(AtomicUsize::new(0)));
    let (held, counted) = (Arc::clone(&hold), Arc::clone(&asked));
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let decide = |request: &kvtier_memory::fdpass::Request| {
                assert_eq!(request.attachment, TOKEN);
                counted.fetch_add(1, Ordering::AcqRel);
                drop(held.lock());
                if request.extent == Pool::extent() {
                    return Ok(served.1.grant());
                }
                served.0.extent(request.extent).map(Grant::Host).ok_or(FdStatus::UnknownExtent)
            };
            while matches!(serve_one(&stream, decide), Ok(kvtier_memory::fdpass::Served::Granted(_))) {}
        }
    });
    let counters = Arc::new(Counters::default());
    let (reports, queue) = Reports::new(Arc::clone(&counters));
    let spec = Spec::parse(&sample().to_string()).unwrap();
    let side = twin.map(|twin| Arc::new(DeviceSide::new(twin, None)));
    let shared = Arc::new(Shared::new(spec, side, (counters, reports)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let attachment = runtime.block_on(async { attachment(&shared, TOKEN, &socket) });
    shared.link.attached(attachment, String::new());
    let jobs = Jobs::start(&shared).unwrap();
    let mut layers = [(); 2].map(|()| vec![0_u8; BLOCK / 2 * BLOCKS]);
    let regions = layers.each_mut().map(|layer| {
        let half = BLOCK as u64 / 2;
        let base = layer.as_mut_ptr().expose_provenance();
        let region =
            Region { base, block_count: BLOCKS as u64, block_stride: half, run_bytes: half, span: layer.len() as u64 };
        (0, region)
    });
    jobs.register(Regions::new(&shared.spec.layout, &regions).unwrap());
    Rig { arena, pool, shared, jobs, queue, hold, asked, layers, _runtime: runtime, _dir: dir }
}

impl Rig {
    pub(super) fn frame(&self) -> FrameId {
        self.arena.alloc(BLOCK as u64).granted().unwrap()
    }

    pub(super) fn fill(&mut self, block: usize, byte: u8) {
        for (layer, add) in self.layers.iter_mut().zip(0..) {
            layer[block * BLOCK / 2..(block + 1) * BLOCK / 2].fill(byte + add);
        }
    }

    pub(super) fn holds(&self, block: usize, byte: u8) -> bool {
        let run = |layer: &[u8], byte| layer[block * BLOCK / 2..(block + 1) * BLOCK / 2].iter().all(|b| *b == byte);
        run(&self.layers[0], byte) && run(&self.layers[1], byte + 1)
    }

    pub(super) fn run(&self, kind: Kind, transfers: Vec<Transfer>) -> Vec<Fate> {
        let count = transfers.len();
        let job = self.jobs.submit(kind, transfers, (LONG, 0)).unwrap();
        match self.jobs.wait(job, LONG, count) {
            Ok(JobPoll::Over(fates)) => fates,
            other => panic!("{other:?}"),
        }
    }

    fn reports(&mut self) -> Vec<Report> {
        std::iter::from_fn(|| self.queue.try_recv().ok()).collect()
    }

    /// Seals waiting to be told: (checksum, abandoned).
    pub(super) fn seals(&mut self) -> Vec<(u64, bool)> {
        let seals = |report| match report {
            Report::Seal { frame, .. } => vec![(frame.checksum, frame.abandoned)],
            Report::Abandon { frames, .. } => vec![(0, true); frames.len()],
            Report::SaveOver => Vec::new(),
            other => panic!("{other:?}"),
        };
        self.reports().into_iter().flat_map(seals).collect()
    }

    fn load_results(&mut self) -> Vec<i32> {
        match self.reports().as_slice() {
            [Report::Loads { frames, .. }] => frames.iter().map(|frame| frame.result).collect(),
            other => panic!("{other:?}"),
        }
    }
}

pub(super) fn load() -> Kind {
    Kind::Load { request_id: "r".into() }
}

pub(super) fn transfer(id: FrameId, checksum: u64, block_id: u32) -> Transfer {
    let frame = FrameRef {
        key: BlockKey::new([3; 32]),
        group: 0,
        shard: 0,
        extent: id.extent,
        source: 2,
        offset: id.offset,
        bytes: id.bytes,
        generation: id.generation,
        checksum,
    };
    Transfer { frame, block_id }
}

#[test]
fn what_is_saved_is_sealed_and_loads_again() {
    for mut rig in rigs() {
        rig.fill(1, 10);
        rig.fill(2, 20);
        let (one, two) = (rig.frame(), rig.frame());
        assert_eq!(rig.run(Kind::Save, vec![transfer(one, 0, 1), transfer(two, 0, 2)]), [Fate::Done; 2]);
        let seals = rig.seals();
        assert!(seals.iter().all(|(_, abandoned)| !abandoned));
        let pin = rig.arena.pin(one).unwrap();
        let mut bytes = vec![10; BLOCK / 2];
        bytes.extend([11; BLOCK / 2]);
        let sum_one = kvtier_memory::checksum::checksum(&bytes);
        assert!(seals.contains(&(sum_one, false)), "layer by layer in the frame of {} bytes", pin.len());
        let sum_two = seals.iter().map(|(sum, _)| *sum).find(|sum| *sum != sum_one).unwrap();
        assert_eq!(rig.run(load(), vec![transfer(one, sum_one, 5), transfer(two, sum_two, 6)]), [Fate::Done; 2]);
        assert!(rig.holds(5, 10) && rig.holds(6, 20));
        assert_eq!(rig.load_results(), [i32::from(v1::LoadResult::Loaded); 2]);
        assert_eq!(rig.shared.counters.load_bytes.get(), 2 * BLOCK as u64);
        let mapped = rig.shared.counters.extents_mapped.get();
        assert_eq!(mapped, 2, "once to write and once to read, however many threads want it");
    }
}

#[test]
fn changed_bytes_are_corrupt_and_a_freed_frame_is_lost() {
    for mut rig in rigs() {
        rig.fill(1, 10);
        let (changed, freed) = (rig.frame(), rig.frame());
        rig.run(Kind::Save, vec![transfer(changed, 0, 1), transfer(freed, 0, 1)]);
        let sum = rig.seals()[0].0;
        rig.arena.pin(changed).unwrap().copy_in(&[99]);
        rig.arena.free(freed);
        let fates = rig.run(load(), vec![transfer(changed, sum, 5), transfer(freed, sum, 6)]);
        assert_eq!(fates, [Fate::Corrupt, Fate::Lost]);
        assert!(rig.holds(6, 0) || !rig.holds(6, 10), "nothing was copied from the freed frame");
        assert_eq!(rig.load_results(), [i32::from(v1::LoadResult::Corrupt), i32::from(v1::LoadResult::Lost)]);
        assert_eq!(rig.run(Kind::Save, vec![transfer(freed, 0, 1)]), [Fate::Lost]);
        assert_eq!(rig.seals(), [(0, true)], "what was not written is given up");
    }
}

#[test]
fn frames_that_do_not_exist_are_lost_and_touch_nothing() {
    for rig in rigs() {
        let real = rig.frame();
        let cases = [
            FrameId { extent: real.extent + 1, ..real },
            FrameId { offset: 1 << 30, ..real },
            FrameId { offset: real.offset + 1, ..real },
            FrameId { offset: u64::MAX, ..real },
            FrameId { offset: real.offset + 4096, generation: 0, ..real },
            FrameId { generation: real.generation - 1, ..real },
        ];
        for id in cases {
            assert_eq!(rig.run(load(), vec![transfer(id, 0, 1)]), [Fate::Lost], "{id:?}");
            assert_eq!(rig.run(Kind::Save, vec![transfer(id, 0, 1)]), [Fate::Lost], "{id:?}");
        }
    }
}

#[test]
fn transfers_that_do_not_fit_the_engine_are_refused_whole() {
    for rig in rigs() {
        let good = transfer(rig.frame(), 0, 1);
        let wrong = |change: fn(&mut Transfer)| {
            let mut transfer = good;
            change(&mut transfer);
            let result = rig.jobs.submit(load(), vec![good, transfer], (LONG, 0));
            assert!(matches!(result, Err(Error::InvalidArgument(_))), "{transfer:?}");
        };
        wrong(|t| t.block_id = 8);
        wrong(|t| t.frame.group = 1);
        wrong(|t| t.frame.bytes -= 1);
        wrong(|t| t.frame.shard = 1);
        assert_eq!(rig.jobs.wait(1, LONG, 9), Ok(JobPoll::Unknown));
    }
}

#[test]
fn without_the_attachment_of_its_submission_a_job_is_lost() {
    for mut rig in rigs() {
        let frame = rig.frame();
        rig.shared.link.lost(LinkState::Absent, "gone".into());
        assert_eq!(rig.run(load(), vec![transfer(frame, 0, 1)]), [Fate::Lost]);
        assert_eq!(rig.reports().len(), 1);
    }
}

#[test]
fn late_and_cancelled_jobs_begin_no_copy() {
    for mut rig in rigs() {
        let frame = rig.frame();
        let late = rig.jobs.submit(load(), vec![transfer(frame, 0, 1)], (Duration::ZERO, 0)).unwrap();
        assert_eq!(rig.jobs.wait(late, LONG, 0), Err(Error::BufferTooSmall { needed: 1 }), "the job stays");
        assert_eq!(rig.jobs.wait(late, LONG, 1), Ok(JobPoll::Over(vec![Fate::Lost])));
        assert_eq!(rig.jobs.wait(late, LONG, 1), Ok(JobPoll::Unknown));
        assert!(!rig.jobs.cancel(late));
        rig.reports();
        // However far the job has come, its frames are sealed or given up, each once.
        let job = rig.jobs.submit(Kind::Save, vec![transfer(frame, 0, 1); 64], (LONG, 0)).unwrap();
        assert!(rig.jobs.cancel(job));
        let Ok(JobPoll::Over(fates)) = rig.jobs.wait(job, LONG, 64) else { panic!("not over") };
        let done = fates.iter().filter(|fate| **fate == Fate::Done).count();
        let seals = rig.seals();
        assert_eq!(seals.len(), 64);
        assert_eq!(seals.iter().filter(|(_, abandoned)| !abandoned).count(), done);
    }
}

#[test]
fn a_transfer_that_waits_for_its_extent_is_cancelled_at_once() {
    for mut rig in rigs() {
        let frame = rig.frame();
        rig.fill(1, 10);
        let hold = Arc::clone(&rig.hold);
        let held = hold.lock();
        let job = rig.jobs.submit(Kind::Save, vec![transfer(frame, 0, 1)], (LONG, 0)).unwrap();
        let until = Instant::now() + LONG;
        while rig.asked.load(Ordering::Acquire) == 0 {
            assert!(Instant::now() < until, "the extent is asked for");
            std::thread::yield_now();
        }
        assert!(rig.jobs.cancel(job));
        let over = rig.jobs.wait(job, Duration::ZERO, 1);
        assert_eq!(over, Ok(JobPoll::Over(vec![Fate::Cancelled])));
        assert_eq!(rig.seals(), [(0, true)], "its frame is given up");
        drop(held);
        // The extent comes all the same, and the next one has it.
        assert_eq!(rig.run(Kind::Save, vec![transfer(frame, 0, 1)]), [Fate::Done]);
        assert_eq!(rig.seals().len(), 1);
        assert_eq!(rig.shared.counters.saves_done.get(), 1, "nothing was copied for the first");
    }
}

#[test]
fn jobs_are_bounded_until_they_are_collected() {
    for rig in rigs() {
        let submit = || rig.jobs.submit(load(), Vec::new(), (LONG, 0));
        let jobs: Vec<_> = (0..8).map(|_| submit().unwrap()).collect();
        assert_eq!(submit(), Err(Error::Limit("jobs")));
        assert_eq!(rig.jobs.wait(jobs[0], LONG, 0), Ok(JobPoll::Over(Vec::new())));
        assert!(submit().is_ok());
    }
}

#[test]
fn after_close_nothing_is_copied() {
    for mut rig in rigs() {
        let frame = rig.frame();
        rig.fill(1, 10);
        let job = rig.jobs.submit(Kind::Save, vec![transfer(frame, 0, 1); 1000], (LONG, 0)).unwrap();
        rig.jobs.close();
        let copied = rig.shared.counters.saves_done.get();
        let start = Instant::now();
        assert!(matches!(rig.jobs.wait(job, LONG, 1000), Ok(JobPoll::Over(_))));
        assert!(start.elapsed() < LONG / 2, "it is over because of the close, not its deadline");
        assert_eq!(rig.run(Kind::Save, vec![transfer(frame, 0, 1)]), [Fate::Lost]);
        assert!(copied <= 1000);
    }
}
