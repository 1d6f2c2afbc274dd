//! The disk tier against a bare io_uring loop: same buffers, sizes, depth and directory, direct I/O, files written before.
//!
//! What the tier does more: a header page for each record, checksums of what goes in and comes out, the index, the footers.
//! Writes end with a flush on its side and an fdatasync on the other.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use kvtier_memory::IoBuf;
use kvtier_storage::{BlockStore, DiskConfig, DiskStore, Location, RecordMeta, StorageError};
use kvtier_types::{BlockHints, BlockKey, LayoutId, NamespaceId, ShardKey, TenantId};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::Setting;
use crate::engine::{self, digest};
use crate::raw::{Way, uring_loop};
use crate::report::{Floor, Report, Row};
use crate::stats::Round;

const DEPTH: u32 = 16;
/// Room for several rounds: a round writes over segments that had a life before.
const CAPACITY_BYTES: u64 = 2 << 30;
const SEGMENT_BYTES: u64 = 128 << 20;
const FLOOR: Floor = Floor::Ratio(0.9);
const ROUNDS: u64 = 9;

pub(crate) fn run(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    for (bytes, name) in [(2_u64 << 20, "2 MiB"), (64 << 10, "64 KiB")] {
        let dir = setting.scratch.join(format!("disk-{bytes}"));
        let mut bench = Bench::open(&dir, bytes, setting.working_set_bytes())?;
        let (mut writes, mut reads) = (Vec::new(), Vec::new());
        for number in 0..ROUNDS {
            let (write, read) = bench.round(number)?;
            writes.push(write);
            reads.push(read);
        }
        let total = bench.buffers.len() as u64 * bytes;
        report.add(Row::ratio(&format!("disk write of {name}"), (total, &writes), "io_uring", FLOOR));
        report.add(Row::ratio(&format!("disk read of {name}"), (total, &reads), "io_uring", FLOOR));
        bench.close()?;
        std::fs::remove_dir_all(&dir)?;
    }
    Ok(())
}

/// A record's meta with a key of its own.
pub(crate) fn meta(number: u64, bytes: u64, checksum: u64) -> RecordMeta {
    RecordMeta {
        key: ShardKey { block: BlockKey::new(digest(7, number)), layout: LayoutId::new([2; 32]), shard: 0 },
        namespace: NamespaceId::new([3; 32]),
        tenant: TenantId::shared(),
        hints: BlockHints::default(),
        parent: None,
        depth_blocks: 0,
        group: 0,
        needs_ancestors: true,
        model: "bench".into(),
        bytes,
        checksum,
        sequence: number + 1,
        expires_ms: None,
    }
}

/// Works on every item, at most `depth` at once; the results, in order.
async fn each<T, R, F, W>(items: Vec<T>, depth: u32, work: F) -> anyhow::Result<Vec<R>>
where
    T: Send + 'static,
    R: Send + 'static,
    F: Fn(T) -> W + Clone + Send + 'static,
    W: Future<Output = anyhow::Result<R>> + Send,
{
    let queue = Arc::new(Mutex::new(items.into_iter().enumerate()));
    let mut workers = JoinSet::new();
    for _ in 0..depth {
        let (queue, work) = (Arc::clone(&queue), work.clone());
        workers.spawn(async move {
            let next = || queue.lock().expect("taking the next item does not panic").next();
            let mut done = Vec::new();
            while let Some((index, item)) = next() {
                done.push((index, work(item).await?));
            }
            anyhow::Ok(done)
        });
    }
    let mut done = Vec::new();
    while let Some(ended) = workers.join_next().await {
        done.extend(ended??);
    }
    done.sort_unstable_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

/// Writes records, at most `depth` at once; where they lie, in order, and the buffers back.
///
/// # Errors
/// The store's.
pub(crate) async fn write_all(
    store: &Arc<DiskStore>,
    records: Vec<(RecordMeta, IoBuf)>,
    depth: u32,
) -> anyhow::Result<(Vec<(RecordMeta, Location)>, Vec<IoBuf>)> {
    let store = Arc::clone(store);
    let write = move |(meta, buffer)| {
        let store = Arc::clone(&store);
        async move { write_one(&store, meta, buffer).await }
    };
    Ok(each(records, depth, write).await?.into_iter().unzip())
}

/// Writes one record, again as long as the keeper is still making room.
async fn write_one(
    store: &DiskStore,
    meta: RecordMeta,
    mut buffer: IoBuf,
) -> anyhow::Result<((RecordMeta, Location), IoBuf)> {
    loop {
        let written = store.write(meta.clone(), buffer).await;
        buffer = written.payload;
        match written.result {
            Ok(at) => return Ok(((meta, at), buffer)),
            Err(StorageError::Full) => tokio::time::sleep(Duration::from_millis(1)).await,
            Err(error) => return Err(error.into()),
        }
    }
}

struct Bench {
    runtime: Runtime,
    store: Arc<DiskStore>,
    raw: File,
    buffers: Vec<IoBuf>,
    checksums: Vec<u64>,
    bytes: u64,
    /// Number of the next record.
    next: u64,
    living: Vec<(RecordMeta, Location)>,
}

impl Bench {
    fn open(dir: &Path, bytes: u64, working_set_bytes: u64) -> anyhow::Result<Self> {
        let mut config = DiskConfig::new(dir.join("store"), CAPACITY_BYTES);
        config.segment_bytes = SEGMENT_BYTES;
        config.depth = DEPTH;
        std::fs::create_dir_all(dir)?;
        let (store, recovered) = DiskStore::open(&config)?;
        ensure!(recovered.cut.is_empty(), "{:?}", recovered.cut);
        let count = working_set_bytes.div_ceil(bytes);
        let mut buffers: Vec<IoBuf> = Vec::new();
        for number in 0..count {
            let mut heap = kvtier_memory::AlignedBuf::zeroed(usize::try_from(bytes)?);
            engine::fill(heap.as_mut_slice(), number);
            buffers.push(heap.into());
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).custom_flags(libc::O_DIRECT);
        let raw = options.open(dir.join("raw")).context("a file with direct I/O")?;
        uring_loop(&raw, Way::Write, &mut buffers, DEPTH)?;
        raw.sync_all()?;
        let checksums = buffers.iter().map(IoBuf::checksum).collect();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let store = Arc::new(store);
        let mut this = Self { runtime, store, raw, buffers, checksums, bytes, next: 0, living: Vec::new() };
        // Every segment lives once before anything is timed.
        let mut lived = 0;
        while lived <= CAPACITY_BYTES {
            this.write()?;
            lived += working_set_bytes;
        }
        Ok(this)
    }

    /// Forgets what the round before wrote, writes the buffers as new records, and flushes; seconds.
    fn write(&mut self) -> anyhow::Result<f64> {
        for (meta, at) in std::mem::take(&mut self.living) {
            self.store.forget(at, meta.bytes);
        }
        let numbers = self.next..;
        self.next += self.buffers.len() as u64;
        let buffers = std::mem::take(&mut self.buffers);
        let records = numbers.zip(&self.checksums).zip(buffers);
        let records: Vec<_> = records.map(|((n, sum), buffer)| (meta(n, self.bytes, *sum), buffer)).collect();
        let begin = Instant::now();
        let (living, buffers) = self.runtime.block_on(async {
            let written = write_all(&self.store, records, DEPTH).await?;
            self.store.flush().await?;
            anyhow::Ok(written)
        })?;
        (self.living, self.buffers) = (living, buffers);
        Ok(begin.elapsed().as_secs_f64())
    }

    fn read(&mut self) -> anyhow::Result<f64> {
        let jobs: Vec<_> = self.living.iter().cloned().zip(std::mem::take(&mut self.buffers)).collect();
        let store = &self.store;
        let begin = Instant::now();
        self.buffers = self.runtime.block_on(read_all(store, jobs))?;
        Ok(begin.elapsed().as_secs_f64())
    }

    fn raw(&mut self, way: Way) -> anyhow::Result<f64> {
        let begin = Instant::now();
        uring_loop(&self.raw, way, &mut self.buffers, DEPTH)?;
        if way == Way::Write {
            self.raw.sync_data()?;
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    /// Writes and reads of both sides; who is first alternates.
    fn round(&mut self, number: u64) -> anyhow::Result<(Round, Round)> {
        let (subject, baseline) = if number.is_multiple_of(2) {
            let subject = (self.write()?, self.read()?);
            (subject, (self.raw(Way::Write)?, self.raw(Way::Read)?))
        } else {
            let baseline = (self.raw(Way::Write)?, self.raw(Way::Read)?);
            ((self.write()?, self.read()?), baseline)
        };
        let round = |subject_s, baseline_s| Round { subject_s, baseline_s };
        Ok((round(subject.0, baseline.0), round(subject.1, baseline.1)))
    }

    fn close(self) -> anyhow::Result<()> {
        Ok(self.runtime.block_on(self.store.close(Duration::from_secs(20)))?)
    }
}

type Reading = ((RecordMeta, Location), IoBuf);

/// Reads records, at most [`DEPTH`] at once; the buffers back, in order.
async fn read_all(store: &Arc<DiskStore>, jobs: Vec<Reading>) -> anyhow::Result<Vec<IoBuf>> {
    let store = Arc::clone(store);
    let read = move |((meta, at), buffer): Reading| {
        let store = Arc::clone(&store);
        async move {
            let read = store.read(&meta.key, at, meta.expect(), buffer).await;
            read.result?;
            Ok(read.into)
        }
    };
    each(jobs, DEPTH, read).await
}
