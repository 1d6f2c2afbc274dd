//! Measurements, run by hand: `cargo test --release -p kvtier-storage speed -- --ignored --nocapture --test-threads 1`, with
//! `TMPDIR` on the device in question.

use std::time::Instant;

use super::*;
use crate::conformance::{buffer, meta, payload};
use crate::disk::segment::{SegmentHeader, encode_tail, fresh_epoch};

/// Sealed segments of 256 MiB without their payloads: what a start reads of a tier that is full of records of `len` bytes.
fn sparse_tier(config: &DiskConfig, segments: u32, len: u64) -> u64 {
    std::fs::create_dir_all(&config.dir).unwrap();
    let (medium, _) = Medium::probe(&config.dir, config.segment_bytes, false).unwrap();
    let record = record_pages(len);
    let fits = config.segment_bytes / (record * PAGE_BYTES as u64 + 400) - 1;
    for segment in 0..segments {
        let file = std::fs::File::create_new(medium.path(segment)).unwrap();
        file.set_len(config.segment_bytes).unwrap();
        let header = SegmentHeader { epoch: fresh_epoch().unwrap(), segment, bytes: config.segment_bytes };
        let entries: Vec<_> = (0..fits)
            .map(|n| {
                let record_meta = RecordMeta { bytes: len, ..meta(u64::from(segment) * fits + n, b"x") };
                (segment::page_number(1 + n * record), record_meta)
            })
            .collect();
        let tail = encode_tail(&header, &entries);
        medium.write_pages(&file, 0, &*header.encode()).unwrap();
        medium.write_pages(&file, config.segment_bytes - tail.len() as u64, &tail).unwrap();
    }
    fits * u64::from(segments)
}

#[test]
#[ignore = "a measurement to run by hand; `make bench` has its own"]
fn recovery_of_20_gib() {
    for len in [2 << 20, 256 << 10, 16 << 10] {
        let dir = tempfile::tempdir().unwrap();
        let config = DiskConfig::new(dir.path().join("disk"), 20 << 30);
        let records = sparse_tier(&config, 80, len);
        for round in ["first", "again"] {
            let start = Instant::now();
            let (store, recovered) = DiskStore::open(&config).unwrap();
            let took = start.elapsed();
            assert_eq!(recovered.records.len() as u64, records);
            println!(
                "open of 80 segments, {records} records of {} KiB, {round}: {took:?} ({})",
                len >> 10,
                store.describe()
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement to run by hand; `make bench` has its own"]
async fn throughput() {
    const LEN: usize = 2 << 20;
    const COUNT: u64 = 500;
    for io in [IoEngine::Uring, IoEngine::Threads] {
        let dir = tempfile::tempdir().unwrap();
        let config = DiskConfig { io, ..DiskConfig::new(dir.path().join("disk"), 2 << 30) };
        let (store, _) = DiskStore::open(&config).unwrap();
        let store = Arc::new(store);
        let bytes = payload(1, LEN);
        let template = meta(1, &bytes);
        let mut places = Vec::new();
        for round in ["write, new segments", "write, reused segments"] {
            for at in places.drain(..) {
                store.forget(at, LEN as u64);
            }
            let start = Instant::now();
            let next = Arc::new(std::sync::atomic::AtomicU64::new(0));
            let tasks: Vec<_> = (0..8)
                .map(|_| {
                    let (store, next, template, bytes) =
                        (Arc::clone(&store), Arc::clone(&next), template.clone(), bytes.clone());
                    tokio::spawn(async move {
                        let (mut buf, mut places) = (buffer(&bytes), Vec::new());
                        loop {
                            let sequence = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            if sequence >= COUNT {
                                return places;
                            }
                            let written = store.write(RecordMeta { sequence, ..template.clone() }, buf).await;
                            places.push(written.result.unwrap());
                            buf = written.payload;
                        }
                    })
                })
                .collect();
            for task in tasks {
                places.extend(task.await.unwrap());
            }
            report(&store, round, start, COUNT * LEN as u64);
            store.flush().await.unwrap();
            report(&store, "  with flush", start, COUNT * LEN as u64);
            // Makes them reusable: only sealed segments are.
            store.index.retire_active();
        }
        raw_read(&store, &template, &places).await;
        let places = Arc::new(Mutex::new(places));
        let start = Instant::now();
        let tasks: Vec<_> = (0..8)
            .map(|_| {
                let (store, places, template) = (Arc::clone(&store), Arc::clone(&places), template.clone());
                tokio::spawn(async move {
                    let mut buf = IoBuf::heap(LEN);
                    loop {
                        let Some(at) = places.lock().pop() else { return };
                        let back = store.read(&template.key, at, template.expect(), buf).await;
                        back.result.unwrap();
                        buf = back.into;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        report(&store, "read", start, COUNT * LEN as u64);
    }
}

/// The same transfers by the engine alone: no header, no check, no budget.
async fn raw_read(store: &DiskStore, template: &RecordMeta, places: &[Location]) {
    let start = Instant::now();
    let next = Arc::new(Mutex::new(places.to_vec()));
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (io, index, next, key) =
                (Arc::clone(&store.io), Arc::clone(&store.index), Arc::clone(&next), template.key);
            let len = usize::try_from(template.bytes).unwrap();
            tokio::spawn(async move {
                let mut buf = IoBuf::heap(len);
                loop {
                    let Some(at) = next.lock().pop() else { return };
                    let file = Arc::clone(&index.pin(&key, at).unwrap().file);
                    let offset = u64::from(at.offset + 1) * PAGE_BYTES as u64;
                    let transfer = Transfer::new(file, Direction::Read, offset, vec![Part { buf, len }]);
                    let finished = io.run(transfer).await;
                    finished.result.unwrap();
                    buf = take_payload(finished.parts);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    report(store, "raw read by the engine alone", start, places.len() as u64 * template.bytes);
}

fn report(store: &DiskStore, what: &str, start: Instant, bytes: u64) {
    let took = start.elapsed();
    let engine = store.describe().split(", ").next().unwrap_or_default();
    println!("{engine}: {what}: {:.2} GB/s", bytes as f64 / took.as_secs_f64() / 1e9);
}
