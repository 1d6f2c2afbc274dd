//! Puts and gets of 64 blocks of 2 MiB: the whole way of an engine over the C interface, the socket and a real daemon.
//!
//! ```text
//! put   reserve_submit, reserve_poll .. save_submit, job_wait      (and until the seals are applied)
//! get   lookup_submit, lookup_poll, lookup_frames .. load_submit, job_wait
//! ```
//! The baseline copies the same runs between the same engine buffers and the same frames: an attachment of its own maps
//! the daemon's extents into this process. One thread copies on either side.

use std::ffi::CString;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;
use kvtier::ffi::types::{Frame, RegionInfo, TransferInfo};
use kvtier_memory::AlignedBuf;
use kvtier_memory::copy::{Direction, Run};

use self::mapped::Extents;
use crate::Setting;
use crate::daemon::Daemon;
use crate::engine::{self, BLOCK_TOKENS, Shape};
use crate::raw::{checksummed, memcpy, streamed};
use crate::report::{Floor, Report, Row};
use crate::session::Session;
use crate::stats::Round;

mod mapped;

const SHAPE: Shape = Shape { layers: 32, block_bytes: 2 << 20 };
/// Blocks of one call.
const BLOCKS: u64 = 64;
/// Puts that fit into host memory: what is put is evicted this many puts later.
const KEPT_PUTS: u64 = 8;
/// The design's floor, checksums included.
const FLOOR: Floor = Floor::Ratio(0.9);

pub(crate) fn run(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let dir = setting.scratch.join("transfer");
    let capacity = KEPT_PUTS * BLOCKS * SHAPE.block_bytes;
    let config = format!("[host]\ncapacity = {capacity}\nextent = {}\n[disk]\nenabled = false", 256 << 20);
    let daemon = Daemon::start(&dir, &config)?;
    let windows = setting.working_set_bytes().div_ceil(BLOCKS * SHAPE.block_bytes).max(2);
    let mut bench = Bench::open(&daemon.socket(), windows)?;
    for number in 0..KEPT_PUTS + windows {
        bench.warm(number)?;
    }
    let rounds = if setting.quick { 15 } else { 41 };
    let taken: Vec<Taken> = (0..rounds).map(|round| bench.round(round)).collect::<anyhow::Result<_>>()?;
    let bytes = BLOCKS * SHAPE.block_bytes;
    let mut add = |name: &str, baseline, pick: fn(&Taken) -> Round, floor| {
        let rounds: Vec<Round> = taken.iter().map(pick).collect();
        report.add(Row::ratio(name, (bytes, &rounds), baseline, floor));
    };
    add("put 64 x 2 MiB", "memcpy", |t| Round { subject_s: t.put, baseline_s: t.put_memcpy }, FLOOR);
    add(
        "put 64 x 2 MiB, until visible",
        "memcpy",
        |t| Round { subject_s: t.put_visible, baseline_s: t.put_memcpy },
        FLOOR,
    );
    add("put 64 x 2 MiB", "streamed", |t| Round { subject_s: t.put, baseline_s: t.put_streamed }, Floor::None);
    add("get 64 x 2 MiB", "memcpy", |t| Round { subject_s: t.get, baseline_s: t.get_memcpy }, FLOOR);
    add("get 64 x 2 MiB", "streamed", |t| Round { subject_s: t.get, baseline_s: t.get_streamed }, Floor::None);
    let copied = |t: &Taken| Round { subject_s: t.put_checksummed, baseline_s: t.put_memcpy };
    add("  the put's copy alone", "memcpy", copied, Floor::None);
    let copied = |t: &Taken| Round { subject_s: t.get_checksummed, baseline_s: t.get_memcpy };
    add("  the get's copy alone", "memcpy", copied, Floor::None);
    let micros = |pick: fn(&Taken) -> f64| taken.iter().map(|t| pick(t) * 1e6).collect::<Vec<f64>>();
    report.add(Row::value("  of the put, reserving", "us", micros(|t| t.reserve), Floor::None));
    report.add(Row::value("  of the get, looking up", "us", micros(|t| t.lookup), Floor::None));
    let singles = if setting.quick { 50 } else { 200 };
    let (puts, gets) = bench.singles(singles)?;
    report.add(Row::value("put of one block, until visible", "us", puts, Floor::None));
    report.add(Row::value("get of one block", "us", gets, Floor::None));
    drop(bench);
    daemon.stop()
}

/// Seconds of one round.
#[derive(Debug, Default)]
struct Taken {
    reserve: f64,
    put: f64,
    put_visible: f64,
    lookup: f64,
    get: f64,
    put_memcpy: f64,
    put_streamed: f64,
    get_memcpy: f64,
    get_streamed: f64,
    put_checksummed: f64,
    get_checksummed: f64,
}

struct Bench {
    scheduler: Session,
    worker: Session,
    extents: Extents,
    memory: AlignedBuf,
    /// Engine blocks are used in windows of [`BLOCKS`], so that no cache keeps a round's bytes for the next.
    windows: u64,
    /// Number of the next prompt.
    prompt: u64,
    sealed: u64,
    /// Frames of the latest puts, by window: what the baseline copies.
    latest: Vec<Vec<Frame>>,
}

impl Bench {
    fn open(socket: &Path, windows: u64) -> anyhow::Result<Self> {
        let bytes = usize::try_from(windows * BLOCKS * SHAPE.block_bytes)?;
        let mut memory = AlignedBuf::zeroed(bytes);
        engine::fill(memory.as_mut_slice(), 1);
        let worker = Session::open(&engine::spec_text(&SHAPE, "worker", socket))?;
        let blocks = windows * BLOCKS;
        let base = memory.as_mut_slice().as_mut_ptr().expose_provenance() as u64;
        let span_bytes = blocks * SHAPE.run_bytes();
        let region = |layer| RegionInfo {
            size: 48,
            group: 0,
            base: base + layer * span_bytes,
            span_bytes,
            block_stride: SHAPE.run_bytes(),
            run_bytes: SHAPE.run_bytes(),
            block_count: blocks,
        };
        worker.register(&(0..SHAPE.layers).map(region).collect::<Vec<_>>())?;
        Ok(Self {
            scheduler: Session::open(&engine::spec_text(&SHAPE, "scheduler", socket))?,
            worker,
            extents: Extents::attach(&engine::spec(&SHAPE, "worker", socket)?)?,
            memory,
            windows,
            prompt: 0,
            sealed: 0,
            latest: vec![Vec::new(); usize::try_from(windows)?],
        })
    }

    /// A put that is not timed: host memory grows, extents are mapped on both sides, every frame is touched once.
    fn warm(&mut self, number: u64) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            let hashes = engine::prompt(self.prompt, BLOCKS);
            let grant = self.scheduler.reserve(&hashes)?;
            if grant.refused == 0 {
                grant.frames.iter().try_for_each(|frame| self.extents.map(frame))?;
                let window = number % self.windows;
                self.worker.save(&transfers(&grant.frames, window * BLOCKS))?;
                self.sealed += BLOCKS;
                self.worker.wait_sealed(self.sealed)?;
                self.latest[usize::try_from(window)?] = grant.frames;
                self.prompt += 1;
                return Ok(());
            }
            ensure!(begin.elapsed() < Duration::from_secs(30), "host memory does not grow");
            self.scheduler.abandon(&grant.frames)?;
            std::thread::sleep(Duration::from_millis(20));
            self.prompt += 1;
        }
    }

    /// The subject in one window of engine memory, the baselines in the one used longest ago; who is first alternates.
    fn round(&mut self, number: u64) -> anyhow::Result<Taken> {
        let mut taken = Taken::default();
        if number.is_multiple_of(2) {
            self.baselines(number + 1, &mut taken)?;
            self.subject(number, &mut taken)?;
        } else {
            self.subject(number, &mut taken)?;
            self.baselines(number + 1, &mut taken)?;
        }
        Ok(taken)
    }

    fn subject(&mut self, number: u64, taken: &mut Taken) -> anyhow::Result<()> {
        let window = number % self.windows;
        let hashes = engine::prompt(self.prompt, BLOCKS);
        self.prompt += 1;
        let begin = Instant::now();
        let grant = self.scheduler.reserve(&hashes)?;
        taken.reserve = begin.elapsed().as_secs_f64();
        ensure!(grant.refused == 0, "{} blocks were refused", grant.refused);
        self.worker.save(&transfers(&grant.frames, window * BLOCKS))?;
        taken.put = begin.elapsed().as_secs_f64();
        self.sealed += BLOCKS;
        self.worker.wait_sealed(self.sealed)?;
        taken.put_visible = begin.elapsed().as_secs_f64();
        self.latest[usize::try_from(window)?] = grant.frames;

        let request = CString::new(format!("get-{number}"))?;
        let begin = Instant::now();
        let tokens = self.scheduler.lookup(&request, &hashes)?;
        let frames = self.scheduler.frames(&request, hashes.len())?;
        taken.lookup = begin.elapsed().as_secs_f64();
        ensure!(u64::from(tokens) == BLOCKS * u64::from(BLOCK_TOKENS), "{tokens} tokens were found");
        self.worker.load(&request, &transfers(&frames, window * BLOCKS))?;
        taken.get = begin.elapsed().as_secs_f64();
        self.scheduler.release(&request, tokens)
    }

    /// Copies the same bytes between the same places, so that checksums stay right.
    fn baselines(&mut self, window: u64, taken: &mut Taken) -> anyhow::Result<()> {
        let window = window % self.windows;
        let frames = &self.latest[usize::try_from(window)?];
        let runs = |direction| self.runs(frames, window * BLOCKS, direction);
        let (into, from) = (runs(Direction::IntoFrame)?, runs(Direction::FromFrame)?);
        taken.put_memcpy = memcpy(&into);
        taken.get_memcpy = memcpy(&from);
        taken.put_streamed = streamed(&into, Direction::IntoFrame);
        taken.get_streamed = streamed(&from, Direction::FromFrame);
        taken.put_checksummed = checksummed(&into, Direction::IntoFrame);
        taken.get_checksummed = checksummed(&from, Direction::FromFrame);
        Ok(())
    }

    fn runs(&self, frames: &[Frame], first_block: u64, direction: Direction) -> anyhow::Result<Vec<Run>> {
        let (run_bytes, blocks) = (SHAPE.run_bytes(), self.windows * BLOCKS);
        let len = usize::try_from(run_bytes)?;
        let mut runs = Vec::with_capacity(frames.len() * 32);
        for (frame, block) in frames.iter().zip(first_block..) {
            let in_extent = self.extents.frame(frame)?;
            for layer in 0..SHAPE.layers {
                let at = usize::try_from((layer * blocks + block) * run_bytes)?;
                let tensor = self.memory.as_slice()[at..at + len].as_ptr().cast_mut();
                let frame = in_extent.wrapping_add(usize::try_from(layer * run_bytes)?);
                let (src, dst) = if direction == Direction::IntoFrame { (tensor, frame) } else { (frame, tensor) };
                runs.push(Run { src, dst, len });
            }
        }
        Ok(runs)
    }

    /// Microseconds of puts, until visible, and gets of one block each.
    fn singles(&mut self, count: u64) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
        let (mut puts, mut gets) = (Vec::new(), Vec::new());
        for number in 0..count {
            let hashes = engine::prompt(self.prompt, 1);
            self.prompt += 1;
            let block = number * 7 % (self.windows * BLOCKS);
            let begin = Instant::now();
            let grant = self.scheduler.reserve(&hashes)?;
            ensure!(grant.refused == 0, "the block was refused");
            self.worker.save(&transfers(&grant.frames, block))?;
            self.sealed += 1;
            self.worker.wait_sealed(self.sealed)?;
            puts.push(begin.elapsed().as_secs_f64() * 1e6);
            let request = CString::new(format!("one-{number}"))?;
            let begin = Instant::now();
            let tokens = self.scheduler.lookup(&request, &hashes)?;
            let frames = self.scheduler.frames(&request, 1)?;
            self.worker.load(&request, &transfers(&frames, block))?;
            gets.push(begin.elapsed().as_secs_f64() * 1e6);
            self.scheduler.release(&request, tokens)?;
        }
        Ok((puts, gets))
    }
}

/// Frames and consecutive engine blocks.
pub(crate) fn transfers(frames: &[Frame], first_block: u64) -> Vec<TransferInfo> {
    let block = |block: u64| u32::try_from(block).expect("benchmarks have a few thousand blocks");
    frames.iter().zip(first_block..).map(|(f, b)| TransferInfo { frame: *f, block_id: block(b), reserved: 0 }).collect()
}
