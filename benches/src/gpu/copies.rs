//! Copies between a paged layout and frames, and within the device.
#![expect(unsafe_code, reason = "submits copies between memory that the benchmark keeps")]

use std::sync::{Arc, mpsc};
use std::time::Instant;

use anyhow::{Context, ensure};
use kvtier_device::{Device, Method, Methods, PoolMemory, RegisteredExtent, Span, Way, Work, choose};
use kvtier_memory::copy::{Direction, Run};
use kvtier_memory::plan::{FrameSpan, Region, plan};
use kvtier_memory::{Extent, PageKind};

use crate::stats::{Round, Summary};
use crate::{Ratio, Setting};

/// Bytes of a block.
const BLOCK: u64 = 2 << 20;
/// Layers of the layout.
const LAYERS: u64 = 32;

/// A layout, its memory, and frames for half of its blocks.
struct Rig<'a> {
    device: &'a dyn Device,
    regions: Vec<Region>,
    engine: Arc<dyn PoolMemory>,
    pool: Arc<dyn PoolMemory>,
    frames: RegisteredExtent,
    blocks: u64,
}

pub(crate) fn run(setting: &Setting) -> anyhow::Result<Vec<Ratio>> {
    let mut ratios = Vec::new();
    for (name, run_bytes) in [("2 MiB blocks of 32 layers", BLOCK / LAYERS / 2), ("runs of 64 KiB", 64 << 10)] {
        let rig = Rig::new(setting, run_bytes)?;
        let methods = choose(rig.device, run_bytes);
        for way in Way::ALL {
            ratios.push(rig.measure(setting, name, (way, methods))?);
        }
    }
    Ok(ratios)
}

impl<'a> Rig<'a> {
    fn new(setting: &'a Setting, run_bytes: u64) -> anyhow::Result<Self> {
        let blocks = if setting.quick { 32 } else { 256 };
        let device = &*setting.device;
        let engine = device.allocate(2 * blocks * BLOCK).context("memory of the layout")?;
        let pool = device.allocate(blocks * BLOCK).context("the pool")?;
        let extent = Arc::new(Extent::create(blocks * BLOCK, PageKind::Huge).context("frames")?);
        let frames = RegisteredExtent::new(device, extent).context("registering frames")?;
        let span = 2 * blocks * run_bytes;
        let region = |index: u64| Region {
            base: usize::try_from(engine.span().base + index * span).expect("64 bits"),
            block_count: 2 * blocks,
            block_stride: run_bytes,
            run_bytes,
            span,
        };
        let regions = (0..BLOCK / run_bytes).map(region).collect();
        Ok(Self { device, regions, engine, pool, frames, blocks })
    }

    fn bytes(&self) -> u64 {
        self.blocks * BLOCK
    }

    /// Where frames lie for a way of copying.
    fn frames(&self, way: Way) -> u64 {
        match way {
            Way::Within => self.pool.span().base,
            Way::ToHost | Way::FromHost => self.frames.extent().base().expose_provenance() as u64,
        }
    }

    /// The product's copy of all frames: scattered blocks, checksums, in works as large as the connector's.
    fn subject(&self, way: Way, method: Method) -> anyhow::Result<f64> {
        let direction = if way == Way::ToHost { Direction::IntoFrame } else { Direction::FromFrame };
        let base = self.frames(way);
        let mut works = Vec::new();
        // Every other block, from the end: neighbors in a frame are none in the layout.
        for batch in (0..self.blocks).collect::<Vec<_>>().chunks(8) {
            let mut work = Work { way, runs: Vec::new(), method, after: None, sums: Vec::new(), keeps: Box::new(()) };
            for index in batch {
                let frame = FrameSpan { base: usize::try_from(base + index * BLOCK)?, bytes: BLOCK };
                let runs = plan(&self.regions, 2 * (self.blocks - 1 - index), frame, direction)?;
                let engine_side = |run: &Run| match direction {
                    Direction::IntoFrame => Span { base: run.src.addr() as u64, bytes: run.len as u64 },
                    Direction::FromFrame => Span { base: run.dst.addr() as u64, bytes: run.len as u64 },
                };
                if self.device.facts().sums {
                    work.sums.push(runs.iter().map(engine_side).collect());
                }
                work.runs.extend(runs);
            }
            works.push(work);
        }
        self.time(works)
    }

    /// One plain copy of as many bytes.
    fn baseline(&self, way: Way) -> anyhow::Result<f64> {
        let (engine, frames) = (self.engine.span().base, self.frames(way));
        let (from, to) = if way == Way::ToHost { (engine, frames) } else { (frames, engine) };
        let run = Run {
            src: std::ptr::with_exposed_provenance(usize::try_from(from)?),
            dst: std::ptr::with_exposed_provenance_mut(usize::try_from(to)?),
            len: usize::try_from(self.bytes())?,
        };
        let method = Method::Single;
        self.time(vec![Work { way, runs: vec![run], method, after: None, sums: Vec::new(), keeps: Box::new(()) }])
    }

    /// Seconds that works take, at most eight at once.
    fn time(&self, works: Vec<Work>) -> anyhow::Result<f64> {
        let (told, ends) = mpsc::channel();
        let began = Instant::now();
        let (mut begun, mut ended) = (0_usize, 0);
        let mut end = |begun: usize| -> anyhow::Result<()> {
            while ended < begun {
                let result: Result<kvtier_device::Done, kvtier_device::DeviceError> = ends.recv()?;
                result?;
                ended += 1;
            }
            Ok(())
        };
        for work in works {
            let told = told.clone();
            // SAFETY: the layout, the pool and the frames live as long as the rig; nobody else uses them.
            unsafe { self.device.submit(work, Box::new(move |result| drop(told.send(result)))) }?;
            begun += 1;
            end(begun.saturating_sub(8))?;
        }
        end(begun)?;
        Ok(began.elapsed().as_secs_f64())
    }

    fn measure(&self, setting: &Setting, name: &str, (way, methods): (Way, Methods)) -> anyhow::Result<Ratio> {
        let method = methods.of(way);
        self.subject(way, method)?;
        self.baseline(way)?;
        let count = if setting.quick { 3 } else { 15 };
        let round = |_| Ok(Round { subject_s: self.subject(way, method)?, baseline_s: self.baseline(way)? });
        let rounds = (0..count).map(round).collect::<anyhow::Result<Vec<Round>>>()?;
        ensure!(!rounds.is_empty());
        let median = |of: fn(&Round) -> f64| Summary::of(rounds.iter().map(of).collect()).median;
        let rate = self.bytes() as f64 / median(|r| r.subject_s) / 1e9;
        let floor = if way == Way::Within { 0.8 } else { 0.9 };
        let reached = format!("{rate:.1} GB/s by {}", method.name());
        Ok(Ratio::new(format!("{name}, {}", way.name()), (median(|r| r.ratio()), floor), reached))
    }
}
