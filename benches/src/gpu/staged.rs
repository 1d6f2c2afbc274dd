//! A pool's frames on their way to a peer: copied to host frames and read from there over TCP, while others are copied.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures::StreamExt;
use kvtier_device::{Method, PoolFrame, RegisteredExtent, off_device};
use kvtier_memory::{FramePin, IoBuf};
use kvtier_transport::tcp::{TcpConfig, TcpTransport};
use kvtier_transport::{Exposure, Link, ReadTerms, Transport};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::frames::frames;
use crate::stats::{Round, Summary};
use crate::{Ratio, Setting};

/// Bytes of a block.
const BLOCK: u64 = 2 << 20;
/// Blocks on their way at once: host frames that they need.
const WINDOW: usize = 32;
const STREAMS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(60);
const FLOOR: f64 = 0.85;

pub(crate) fn run(setting: &Setting) -> anyhow::Result<Vec<Ratio>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (blocks, count) = if setting.quick { (64, 3) } else { (1024, 9) };
    let rig = runtime.block_on(Rig::start(setting, blocks))?;
    let mut rounds = Vec::with_capacity(count);
    for number in 0..=count {
        let time = |way| runtime.block_on(async { rig.pass(way).await });
        let (copied, read) = (time(Pass::Copy)?, time(Pass::Read)?);
        let round = Round { subject_s: time(Pass::Both)?, baseline_s: copied.max(read) };
        if number > 0 {
            rounds.push(round);
        }
    }
    let median = |of: fn(&Round) -> f64| Summary::of(rounds.iter().map(of).collect()).median;
    let rate = |seconds: f64| blocks as f64 * BLOCK as f64 / seconds / 1e9;
    let reached =
        format!("{:.1} GB/s, the slower half {:.1}", rate(median(|r| r.subject_s)), rate(median(|r| r.baseline_s)));
    Ok(vec![Ratio::new("a pool's frames to a peer over TCP", (median(|r| r.ratio()), FLOOR), reached)])
}

/// What a pass does with every block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Copy,
    Read,
    Both,
}

struct Rig<'a> {
    setting: &'a Setting,
    pool: Vec<PoolFrame>,
    ring: Vec<FramePin>,
    exposures: Vec<Box<dyn Exposure>>,
    there: Vec<FramePin>,
    link: Box<dyn Link>,
    _registered: Vec<RegisteredExtent>,
    _ends: [TcpTransport; 2],
}

impl<'a> Rig<'a> {
    async fn start(setting: &'a Setting, blocks: u64) -> anyhow::Result<Self> {
        // Fewer than blocks: the copies come from all over the pool, again and again.
        let memory = setting.device.allocate(blocks.min(256) * BLOCK).context("the pool")?;
        let frame = |i: u64| PoolFrame::new(Arc::clone(&memory), i % blocks.min(256) * BLOCK, BLOCK);
        let pool = (0..blocks).map(frame).collect::<Result<_, _>>()?;
        let ring = frames(BLOCK, WINDOW)?;
        let mut extents: Vec<_> = ring.iter().map(|pin| Arc::clone(pin.extent())).collect();
        extents.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let register = |extent| RegisteredExtent::new(&*setting.device, extent);
        let registered = extents.into_iter().map(register).collect::<Result<_, _>>().context("registering")?;
        let config = TcpConfig { streams_per_link: STREAMS, ..TcpConfig::new("127.0.0.1:0".parse()?) };
        let owner = TcpTransport::start(config.clone()).await?;
        let reader = TcpTransport::start(config).await?;
        let exposures = ring.iter().map(|frame| owner.expose(frame.clone())).collect::<Result<_, _>>()?;
        let link = reader.connect(&owner.address(), PATIENCE).await?;
        let there = frames(BLOCK, WINDOW)?;
        Ok(Self { setting, pool, ring, exposures, there, link, _registered: registered, _ends: [owner, reader] })
    }

    /// Seconds that a pass over all blocks takes. A slot of the ring has one block at a time.
    async fn pass(&self, pass: Pass) -> anyhow::Result<f64> {
        let began = Instant::now();
        let lanes = (0..WINDOW).map(|slot| async move {
            for block in (slot..self.pool.len()).step_by(WINDOW) {
                self.block(pass, slot, block).await?;
            }
            anyhow::Ok(())
        });
        let mut running: futures::stream::FuturesUnordered<_> = lanes.collect();
        while let Some(end) = running.next().await {
            end?;
        }
        Ok(began.elapsed().as_secs_f64())
    }

    async fn block(&self, pass: Pass, slot: usize, block: usize) -> anyhow::Result<()> {
        if pass != Pass::Read {
            let (told, end) = oneshot::channel();
            let frames = (self.pool[block].clone(), self.ring[slot].clone());
            let on_copied = Box::new(move |result| drop::<Result<(), _>>(told.send(result)));
            off_device(&*self.setting.device, Method::Single, frames, on_copied)?;
            end.await??;
        }
        if pass != Pass::Copy {
            let terms =
                ReadTerms { deadline: tokio::time::Instant::now() + PATIENCE, cancel: CancellationToken::new() };
            let into = IoBuf::Frame(self.there[slot].clone());
            let done = self.link.read(self.exposures[slot].descriptor(), into, terms).await;
            ensure!(done.result? == self.ring[slot].checksum(), "other bytes arrived than were sent");
        }
        Ok(())
    }
}
