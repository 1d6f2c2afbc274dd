//! What the daemon pays in memory for a block that it knows: 200,000 sealed blocks in the policy core.

use std::time::{Duration, Instant as Clock};

use anyhow::{bail, ensure};
use kvtier_policy::{
    AttachSpec, AttachmentId, Core, CoreConfig, Located, Look, LookupRange, LookupRequest, ReleaseReport, Reservation,
    ReserveRequest, Role, SealRequest, TwinPool,
};
use kvtier_types::{BlockKey, Instant, RequestHints, TenantId};

use crate::engine::{Shape, digest};
use crate::machine::resident_bytes;
use crate::report::{Floor, Report, Row};
use crate::{Setting, engine};

const BLOCKS: u64 = 200_000;
/// Blocks of one prefix.
const CHAIN_BLOCKS: u64 = 1000;
const BLOCK_BYTES: u64 = 2 << 20;
const LOOKUPS: u64 = 101;
/// The design's bound on the core's lock.
const HOLD_MICROS: f64 = 50.0;
/// Aim of the design.
const MOST_BYTES: f64 = 300.0;

pub(crate) fn run(_: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let before = resident_bytes();
    let pool = TwinPool::new(BLOCKS * BLOCK_BYTES);
    let mut core = Core::new(CoreConfig::default(), Box::new(pool), |bytes| bytes);
    let spec = engine::spec(&Shape { layers: 32, block_bytes: BLOCK_BYTES }, "scheduler", "/nonexistent".as_ref())?;
    let who = AttachSpec {
        engine: "bench".into(),
        role: Role::Scheduler,
        rank: 0,
        shard: 0,
        devices: Vec::new(),
        pid: 1,
        namespace: spec.namespace,
        layout: spec.layout,
    };
    let who = core.attach(Instant::ZERO, who)?;
    for chain in 0..BLOCKS / CHAIN_BLOCKS {
        fill(&mut core, who, chain)?;
    }
    let (entries, counted) = core.catalog_size();
    ensure!(entries as u64 == BLOCKS, "{entries} entries");
    let grown = resident_bytes().saturating_sub(before);
    let per_block = |bytes: u64| vec![bytes as f64 / BLOCKS as f64];
    report.add(Row::value("memory per resident block, as grown", "B", per_block(grown), Floor::AtMost(MOST_BYTES)));
    report.add(Row::value("memory per resident block, as counted", "B", per_block(counted as u64), Floor::None));
    holds(&mut core, who, report)
}

/// How long each call of a lookup of 1,000 keys takes in the core: the shell holds its lock as long. It looks in steps, of
/// which the longest counts.
fn holds(core: &mut Core, attachment: AttachmentId, report: &mut Report) -> anyhow::Result<()> {
    let mut micros = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    for number in 0..LOOKUPS {
        let keys: Vec<BlockKey> = (0..CHAIN_BLOCKS).map(|n| BlockKey::new(digest(number * 37 % 200, n))).collect();
        let range = LookupRange { group: 0, first_block: 0, keys };
        let request = LookupRequest {
            attachment,
            request_id: "r".into(),
            ranges: vec![range],
            local_tokens: 0,
            tenant: TenantId::shared(),
            hints: RequestHints::default(),
        };
        let (mut look, mut longest, mut more) = (Look::default(), Duration::ZERO, true);
        while more {
            let begin = Clock::now();
            more = core.look(&request, &mut look)?;
            longest = longest.max(begin.elapsed());
        }
        let begin = Clock::now();
        let lease = core.lookup_located(Instant::ZERO, request, (&look, &Located::default()))?;
        let looked_up = Clock::now();
        let answer = core.collect(lease)?;
        let collected = Clock::now();
        let release = ReleaseReport { local_tokens: 0, claimed_tokens: u32::MAX, lost_tokens: 0 };
        core.release(attachment, "r", release);
        let spans = [longest, looked_up - begin, collected - looked_up, collected.elapsed()];
        ensure!(answer.ranges[0].frames.len() as u64 == CHAIN_BLOCKS, "not all were found");
        micros.iter_mut().zip(spans).for_each(|(all, span)| all.push(span.as_secs_f64() * 1e6));
    }
    for (call, micros) in ["a step of a look", "lookup after it", "collect", "release"].into_iter().zip(micros) {
        report.add(Row::value(
            &format!("core: {call}, of 1,000 keys of 200,000"),
            "us",
            micros,
            Floor::AtMost(HOLD_MICROS),
        ));
    }
    Ok(())
}

fn fill(core: &mut Core, attachment: AttachmentId, chain: u64) -> anyhow::Result<()> {
    let keys: Vec<BlockKey> = (0..CHAIN_BLOCKS).map(|n| BlockKey::new(digest(chain, n))).collect();
    let request = ReserveRequest {
        attachment,
        parent: None,
        group: 0,
        first_block: 0,
        keys: keys.clone(),
        tenant: TenantId::shared(),
        hints: RequestHints::default(),
    };
    let mut seals = Vec::with_capacity(keys.len());
    for (key, answer) in keys.iter().zip(core.reserve(Instant::ZERO, &request)?) {
        let Reservation::Granted(frames) = answer else { bail!("{answer:?}") };
        seals.push(SealRequest { key: *key, shard: 0, frame: frames[0], checksum: 1, abandoned: false });
    }
    core.seal(attachment, &seals)?;
    Ok(())
}
