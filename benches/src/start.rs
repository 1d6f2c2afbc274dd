//! From exec to serving: with a large arena, and over a full disk.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use kvtier_memory::{AlignedBuf, IoBuf};
use kvtier_storage::journal::Journal;
use kvtier_storage::{BlockStore, DiskConfig, DiskStore};
use kvtier_types::RecordMeta;

use crate::Setting;
use crate::daemon::Daemon;
use crate::disk::{meta, write_all};
use crate::engine;
use crate::report::{Floor, Report, Row};

const RECORD_BYTES: u64 = 2 << 20;
const DEPTH: u32 = 16;
const STARTS: u64 = 7;
const RESTARTS: u64 = 7;

pub(crate) fn run(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let mut seconds = Vec::new();
    for number in 0..STARTS {
        let dir = setting.scratch.join(format!("start-{number}"));
        let daemon = Daemon::start(&dir, "[host]\ncapacity = \"16GiB\"\n[disk]\nenabled = false")?;
        seconds.push(daemon.startup.as_secs_f64());
        daemon.stop()?;
    }
    report.add(Row::value("start with an arena of 16 GiB", "s", seconds, Floor::AtMost(2.0)));
    restarts(setting, report)
}

fn restarts(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let gib = if setting.quick { 2 } else { 20 };
    if setting.quick {
        report.note("quick: the restart is over 2 GiB on disk, not 20".to_owned());
    }
    let dir = setting.scratch.join("restart");
    let records = (gib << 30) / RECORD_BYTES;
    let capacity = (gib + 4) << 30;
    make_store(&dir.join("data/disk"), records, capacity)?;
    let config = format!("[host]\ncapacity = \"1GiB\"\n[disk]\ncapacity = {capacity}");
    let (mut stopped, mut killed) = (Vec::new(), Vec::new());
    for number in 0..RESTARTS * 2 {
        let daemon = Daemon::start(&dir, &config)?;
        let known = daemon.metric("kvtier_catalog_entries")?;
        ensure!(known == records as f64, "{known} of {records} blocks are back: {}", daemon.log());
        // The first start is after the store's own clean end.
        let after_kill = number % 2 == 1;
        if after_kill { &mut killed } else { &mut stopped }.push(daemon.startup.as_secs_f64());
        if after_kill { daemon.stop()? } else { drop(daemon) }
    }
    let name = |how: &str| format!("restart over {gib} GiB on disk, {how}");
    report.add(Row::value(&name("after a stop"), "s", stopped, Floor::AtMost(5.0)));
    report.add(Row::value(&name("after kill -9"), "s", killed, Floor::AtMost(5.0)));
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

/// Fills a disk tier with records of the same bytes and different keys.
fn make_store(dir: &Path, records: u64, capacity: u64) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)?;
    // Records older than the journal would be dropped: their evictions may have been in the one that is missing.
    let (journal, state) = Journal::open(&dir.with_file_name("journal"))?;
    drop(journal);
    let (store, _) = DiskStore::open(&DiskConfig::new(dir.to_owned(), capacity))?;
    let store = Arc::new(store);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut buffers = Vec::new();
    for number in 0..u64::from(DEPTH) {
        let mut heap = AlignedBuf::zeroed(usize::try_from(RECORD_BYTES)?);
        engine::fill(heap.as_mut_slice(), number);
        buffers.push(IoBuf::from(heap));
    }
    let mut next = 0;
    while next < records {
        let batch = buffers.drain(..).zip(next..records);
        let since_journal = |buffer: &IoBuf, n| {
            let meta = meta(n, RECORD_BYTES, buffer.checksum());
            RecordMeta { sequence: meta.sequence + state.wiped_up_to, ..meta }
        };
        let batch: Vec<_> = batch.map(|(buffer, n)| (since_journal(&buffer, n), buffer)).collect();
        next += batch.len() as u64;
        buffers = runtime.block_on(write_all(&store, batch, DEPTH))?.1;
    }
    runtime.block_on(async {
        store.flush().await?;
        store.close(Duration::from_secs(60)).await
    })?;
    Ok(())
}
