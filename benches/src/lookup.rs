//! Lookups of 1,000 keys over the socket, and how long the core's lock is held meanwhile.

use std::ffi::CString;
use std::time::Instant;

use anyhow::ensure;
use kvtier::ffi::types::RegionInfo;
use kvtier_memory::AlignedBuf;

use crate::Setting;
use crate::daemon::Daemon;
use crate::engine::{self, BLOCK_TOKENS, Shape};
use crate::report::{Floor, Report, Row};
use crate::session::Session;
use crate::transfer::transfers;

pub(crate) const SHAPE: Shape = Shape { layers: 1, block_bytes: 4096 };
/// Keys of one lookup.
const KEYS: u64 = 1000;
/// Prompts in the catalog: lookups go from one to the next.
pub(crate) const PROMPTS: u64 = 20;
/// Lookups between two looks at the lock's longest hold.
const LOOKUPS_PER_SCRAPE: usize = 10;
pub(crate) const HOLD: &str = "kvtier_core_lock_hold_max_microseconds";

pub(crate) fn run(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let dir = setting.scratch.join("lookup");
    let config = "[host]\ncapacity = \"256MiB\"\nextent = \"128MiB\"\n[disk]\nenabled = false";
    let daemon = Daemon::start(&dir, config)?;
    let scheduler = Session::open(&engine::spec_text(&SHAPE, "scheduler", &daemon.socket()))?;
    let worker = Session::open(&engine::spec_text(&SHAPE, "worker", &daemon.socket()))?;
    fill(&scheduler, &worker)?;

    let samples = if setting.quick { 300 } else { 2000 };
    let prompts: Vec<_> = (0..PROMPTS).map(|number| engine::prompt(number, KEYS)).collect();
    let (mut micros, mut holds) = (Vec::new(), Vec::new());
    daemon.metric(HOLD)?;
    for (number, prompt) in (0..samples).zip(prompts.iter().cycle()) {
        let request = CString::new(format!("request-{number}"))?;
        let begin = Instant::now();
        let tokens = scheduler.lookup(&request, prompt)?;
        micros.push(begin.elapsed().as_secs_f64() * 1e6);
        ensure!(u64::from(tokens) == KEYS * u64::from(BLOCK_TOKENS), "{tokens} tokens were found");
        scheduler.release(&request, tokens)?;
        if number % LOOKUPS_PER_SCRAPE == LOOKUPS_PER_SCRAPE - 1 {
            holds.push(daemon.metric(HOLD)?);
        }
    }
    let summary = crate::stats::Summary::of(micros.clone());
    report.add(Row::value("lookup of 1,000 keys", "us", micros, Floor::AtMost(1000.0)));
    report.add(Row::value("  its 99th percentile", "us", vec![summary.p99], Floor::None));
    report.add(Row::value("longest hold of the core's lock, of 10 lookups", "us", holds, Floor::AtMost(50.0)));
    drop((scheduler, worker));
    daemon.stop()
}

/// Stores the prompts.
pub(crate) fn fill(scheduler: &Session, worker: &Session) -> anyhow::Result<()> {
    let bytes = KEYS * SHAPE.block_bytes;
    let mut memory = AlignedBuf::zeroed(usize::try_from(bytes)?);
    let region = RegionInfo {
        size: 48,
        group: 0,
        base: memory.as_mut_slice().as_mut_ptr().expose_provenance() as u64,
        span_bytes: bytes,
        block_stride: SHAPE.block_bytes,
        run_bytes: SHAPE.block_bytes,
        block_count: KEYS,
    };
    worker.register(&[region])?;
    let (mut stored, mut prompt) = (0, 0);
    let begin = Instant::now();
    while prompt < PROMPTS {
        ensure!(begin.elapsed().as_secs() < 30, "host memory does not grow");
        let grant = scheduler.reserve(&engine::prompt(prompt, KEYS))?;
        let (granted, blocks): (Vec<_>, Vec<_>) =
            grant.frames.iter().zip(0..).filter(|(frame, _)| frame.key != [0; 32]).unzip();
        let first: Option<&u64> = blocks.first();
        worker.save(&transfers(&granted, first.copied().unwrap_or(0)))?;
        stored += granted.len() as u64;
        worker.wait_sealed(stored)?;
        if stored == (prompt + 1) * KEYS {
            prompt += 1;
        }
    }
    Ok(())
}
