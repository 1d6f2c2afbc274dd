//! Makes room on a lower tier: the core chooses what goes, and what remains in an emptying log segment or pack moves on.
//!
//! Space comes back in whole segments. The core drops the least valuable copies until some segment is mostly dead; the
//! living rest is rewritten, which costs at most a third of what it frees. What claims and marks keep on disk is never lost
//! for want of room: as long as it cannot be written elsewhere it stays, and another segment is emptied.
//!
//! *Bounds*: one at a time makes room, in at most [`DROP_ROUNDS`] rounds of dropping and over [`CANDIDATES`] segments, whether
//! something comes of it or not.
//! *Cancellation*: room is made in a task of its own: whoever waits for it may give up, what was begun is ended
//! (`room_is_made_to_the_end_though_whoever_waits_gives_up`).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvtier_memory::IoBuf;
use kvtier_storage::disk::DiskStore;
use kvtier_storage::{BlockStore, StorageError};
use kvtier_types::{Expect, Location, ShardKey, Tier};

use crate::node::Node;

/// A segment is emptied by rewriting once less than this share of it, in percent, is alive.
const REWRITE_BELOW_PERCENT: u64 = 25;
/// A segment is left alone where more than this share of it, in percent, is kept: rewriting that would take three times what
/// it frees.
const KEPT_UP_TO_PERCENT: u64 = 75;
/// Rounds of dropping before the emptiest segment is dropped whole.
const DROP_ROUNDS: u32 = 64;
/// Segments looked at, the emptiest first, until one can be emptied.
const CANDIDATES: usize = 64;
/// Free log segments kept, so that rewriting always has where to write.
const SPARE_SEGMENTS: u64 = 2;
/// With fewer free than this, new records wait until there is room again: what is left is for rewriting.
const LAST_SEGMENTS: u64 = 1;

/// A record, where it lies, and its payload's bytes.
type Record = (ShardKey, Location, u64);

/// Why a record could not leave its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stuck {
    /// It is kept, and there is no room for it elsewhere.
    NoRoom,
    /// The store takes no writes.
    Refused,
}

/// Makes room ahead of a new record: behind the scenes while there is some, and at once where the last of it would be taken.
pub(crate) async fn look_ahead(node: &Arc<Node>, tier: Tier) {
    if tier != Tier::Disk {
        return;
    }
    let spare = spare_segments(node);
    if spare < LAST_SEGMENTS {
        make_room_if(node, tier, |node: &Node| spare_segments(node) < LAST_SEGMENTS).await;
    } else if spare < SPARE_SEGMENTS {
        let node_of_task = Arc::clone(node);
        node.tasks.spawn(async move {
            let Ok(_only_one) = node_of_task.reclaiming.try_lock() else { return };
            if spare_segments(&node_of_task) < SPARE_SEGMENTS {
                free(&node_of_task, Tier::Disk).await;
            }
        });
    }
}

/// Whole log segments that can be filled before one must be emptied.
fn spare_segments(node: &Node) -> u64 {
    node.stores.disk.as_ref().map_or(u64::MAX, |disk| disk.room_bytes() / node.config.disk.segment.0)
}

/// Makes room for a record that was refused. Of many that were refused at once, one makes room for all
/// (`a_full_disk_makes_room_and_stays_within_its_capacity`).
pub(crate) async fn make_room(node: &Arc<Node>, tier: Tier) {
    let before = node.rooms_made.load(Ordering::Acquire);
    make_room_if(node, tier, move |node: &Node| node.rooms_made.load(Ordering::Acquire) == before).await;
}

/// Makes room unless that is no longer wanted when its turn comes.
async fn make_room_if(node: &Arc<Node>, tier: Tier, wanted: impl Fn(&Node) -> bool + Send + 'static) {
    // The turn is waited for where that can be given up: tasks do not pile up behind a disk that does not answer.
    drop(node.reclaiming.lock().await);
    if !wanted(node) {
        return;
    }
    let node_of_task = Arc::clone(node);
    let task = node.tasks.spawn(async move {
        let _only_one = node_of_task.reclaiming.lock().await;
        if wanted(&node_of_task) {
            free(&node_of_task, tier).await;
            node_of_task.rooms_made.fetch_add(1, Ordering::AcqRel);
        }
    });
    if let Err(error) = task.await {
        tracing::error!(%error, "the task that makes room died");
    }
}

async fn free(node: &Arc<Node>, tier: Tier) {
    match tier {
        Tier::Disk => {
            if let Some(disk) = node.stores.disk.clone() {
                free_segment(node, &disk).await;
            }
        }
        Tier::Object => {
            if let Some(object) = node.stores.object.clone() {
                let bytes = node.config.object.capacity.0 / 64;
                node.with_core(|core, _| core.reclaim(Tier::Object, bytes));
                if let Some(pack) = object.reclaim_candidate() {
                    for (key, at, _) in object.live_records(pack) {
                        node.with_core(|core, _| core.drop_record(Tier::Object, &key, at));
                    }
                }
            }
        }
        Tier::Device | Tier::Host => {}
    }
}

async fn free_segment(node: &Arc<Node>, disk: &Arc<DiskStore>) {
    // What lies on a disk that takes no more writes is still read: room there is of no use.
    if disk.health().is_err() || drop_copies(node, disk) {
        return;
    }
    // Where no segment is sparse by now, all is in use or claimed, or value is spread evenly: the emptiest goes whole.
    let mut may_write = true;
    for segment in disk.reclaim_candidates(CANDIDATES) {
        match empty(node, disk, segment, may_write).await {
            Ok(true) | Err(Stuck::Refused) => return,
            Ok(false) => {}
            Err(Stuck::NoRoom) => may_write = false,
        }
    }
}

/// Drops the least valuable copies until the emptiest segment is sparse. Whether that made room already.
fn drop_copies(node: &Arc<Node>, disk: &DiskStore) -> bool {
    let before = disk.room_bytes();
    let quarter = node.config.disk.segment.0 / 4;
    for _ in 0..DROP_ROUNDS {
        if disk.room_bytes() > before {
            return true;
        }
        let Some(segment) = disk.reclaim_candidate() else { return false };
        if is_sparse(node, &disk.live_records(segment)) {
            return false;
        }
        if node.with_core(|core, _| core.reclaim(Tier::Disk, quarter)).copies == 0 {
            return false;
        }
    }
    false
}

/// Moves or drops what lives in a segment. False where it is left alone: it is kept for the most part, or must be written
/// elsewhere and nothing can be.
async fn empty(node: &Arc<Node>, disk: &Arc<DiskStore>, segment: u32, may_write: bool) -> Result<bool, Stuck> {
    let live = disk.live_records(segment);
    let sparse = is_sparse(node, &live);
    let keeps = |(key, at, _): &Record| node.read_core(|core| core.keeps_record(key, *at));
    let (kept, rest): (Vec<Record>, Vec<Record>) = live.into_iter().partition(keeps);
    let mostly_kept = payload_bytes(&kept) * 100 > node.config.disk.segment.0 * KEPT_UP_TO_PERCENT;
    if mostly_kept || (!may_write && !kept.is_empty()) {
        return Ok(false);
    }
    // What is kept goes first: as long as it stays, nothing is won by dropping the rest.
    for record in kept {
        rewrite(node, disk, record).await?;
    }
    for record in rest {
        if sparse || !drop_unless_kept(node, &record) {
            rewrite(node, disk, record).await?;
        }
    }
    Ok(true)
}

fn is_sparse(node: &Node, live: &[Record]) -> bool {
    payload_bytes(live) * 100 <= node.config.disk.segment.0 * REWRITE_BELOW_PERCENT
}

fn payload_bytes(records: &[Record]) -> u64 {
    records.iter().map(|(_, _, bytes)| bytes).sum()
}

/// Drops a record from the disk, unless it is kept by now: whether it was not.
fn drop_unless_kept(node: &Arc<Node>, (key, at, _): &Record) -> bool {
    node.with_core(|core, _| {
        let kept = core.keeps_record(key, *at);
        if !kept {
            core.drop_record(Tier::Disk, key, *at);
        }
        !kept
    })
}

/// Writes a living record anew. Without room for it a kept one stays where it is
/// (`what_is_claimed_stays_where_nothing_can_be_written`). Another is lost then, as is what cannot be read: a miss later.
async fn rewrite(node: &Arc<Node>, disk: &Arc<DiskStore>, (key, at, bytes): Record) -> Result<(), Stuck> {
    let Some(meta) = node.with_core(|core, _| core.relocate(&key, at)) else {
        disk.forget(at, bytes);
        return Ok(());
    };
    let expect = Expect { bytes: meta.bytes, checksum: meta.checksum };
    let len = usize::try_from(meta.bytes).expect("blocks fit in memory");
    let read = disk.read(&key, at, expect, IoBuf::heap(len)).await;
    let sequence = meta.sequence;
    let written = match read.result {
        Ok(()) => Some(disk.write(meta, read.into).await.result),
        Err(_) => None,
    };
    node.with_core(|core, _| {
        let stuck = match written {
            Some(Ok(to)) => {
                core.relocated(&key, at, Some((to, sequence)));
                return Ok(());
            }
            Some(Err(StorageError::Full)) => core.keeps_record(&key, at).then_some(Stuck::NoRoom),
            Some(Err(_)) => Some(Stuck::Refused),
            None => None,
        };
        match stuck {
            Some(_) => core.not_relocated(&key),
            None => core.relocated(&key, at, None),
        }
        stuck.map_or(Ok(()), Err)
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kvtier_policy::{ClaimRequest, Survey};
    use kvtier_storage::conformance::{get, put};
    use kvtier_storage::journal::Journal;
    use kvtier_types::{BlockKey, ClaimKind, ClaimName, Outcome, RecordMeta, TenantId};
    use tempfile::TempDir;

    use super::*;
    use crate::config::Config;
    use crate::recovery;

    const SEGMENT: u64 = 1 << 20;
    /// Some 40 in a segment.
    const RECORD: usize = 20_000;

    struct Bench {
        node: Arc<Node>,
        disk: Arc<DiskStore>,
        records: Vec<(RecordMeta, Location)>,
        _dir: TempDir,
    }

    impl Bench {
        /// A node with room for four segments, of which so many are full of records that go oldest first.
        async fn new(full: u64) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let toml = format!(
                "node_id = \"n\"\nrun_dir = {run:?}\ndata_dir = {data:?}\n[host]\ncapacity = \"16MiB\"\nextent = \"8MiB\"\n\
                 pages = \"plain\"\n[disk]\ncapacity = \"4MiB\"\nsegment = \"1MiB\"\n[eviction]\npolicy = \"lru\"\n",
                run = dir.path().join("run"),
                data = dir.path().join("data"),
            );
            let config: Config = toml::from_str(&toml).unwrap();
            // What is older than the journal does not come back.
            let (journal, state) = Journal::open(&config.data_dir.join("journal")).unwrap();
            drop(journal);
            let (store, _) = DiskStore::open(&config.disk_config().unwrap()).unwrap();
            let mut records = Vec::new();
            while store.usage().used_bytes < full * SEGMENT - SEGMENT / 10 {
                let record = put(&store, state.wiped_up_to + 1 + records.len() as u64, RECORD).await.unwrap();
                records.push(record);
            }
            store.close(Duration::from_secs(20)).await.unwrap();
            drop(store);
            let node = recovery::open(config).await.unwrap();
            let disk = node.stores.disk.clone().unwrap();
            Self { node, disk, records, _dir: dir }
        }

        /// A record of each of these segments that needs no other.
        fn one_of_each(&self, segments: std::ops::Range<u32>) -> Vec<RecordMeta> {
            let one_of = |segment: u32| {
                let mut records = self.records.iter();
                records.find(|(meta, at)| at.segment == segment && !meta.needs_ancestors)
            };
            segments.map(|segment| one_of(segment).unwrap().0.clone()).collect()
        }

        fn claim(&self, metas: &[RecordMeta]) {
            let keys: Vec<BlockKey> = metas.iter().map(|meta| meta.key.block).collect();
            let kind = ClaimKind::Pin(Tier::Disk);
            let name = ClaimName { tenant: TenantId::shared(), owner: "o".into(), id: "c".into() };
            let request = ClaimRequest { name, revision: 1, kind, ttl: Duration::ZERO };
            let mut survey = Survey::new(kind, keys);
            while self.node.read_core(|core| core.survey(&mut survey)) {}
            let answer = self.node.with_core(|core, now| core.claim(now, &request, survey, false));
            assert_eq!(answer.outcome, Outcome::Applied, "{answer:?}");
            while self.node.with_core(|core, _| core.settle_claims()) {}
        }

        async fn assert_whole(&self, metas: &[RecordMeta]) {
            for meta in metas {
                let (at, _) = self.node.read_core(|core| core.record_of(&meta.key, Tier::Disk)).expect("still on disk");
                // The number of a record is its first sequence.
                get(&*self.disk, meta.sequence, meta, at).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn what_is_claimed_stays_where_nothing_can_be_written() {
        let bench = Bench::new(4).await;
        let claimed = bench.one_of_each(0..3);
        bench.claim(&claimed);
        assert_eq!(bench.disk.room_bytes(), 0);
        make_room(&bench.node, Tier::Disk).await;
        bench.assert_whole(&claimed).await;
        assert!(bench.disk.room_bytes() >= SEGMENT, "the segment without claims was emptied");
        // From now on there is where to write, until little else is left.
        for _ in 0..16 {
            make_room(&bench.node, Tier::Disk).await;
            bench.assert_whole(&claimed).await;
        }
        assert!(bench.disk.room_bytes() >= 2 * SEGMENT, "{}", bench.disk.room_bytes());
    }

    #[tokio::test]
    async fn room_is_made_to_the_end_though_whoever_waits_gives_up() {
        let bench = Bench::new(3).await;
        tokio::select! {
            biased;
            () = make_room(&bench.node, Tier::Disk) => panic!("reading and writing takes a while"),
            () = std::future::ready(()) => {}
        }
        bench.node.tasks.close();
        tokio::time::timeout(Duration::from_secs(20), bench.node.tasks.wait()).await.expect("it ends");
        assert_eq!(bench.node.rooms_made.load(Ordering::Acquire), 1);
        // Nothing is on its way for good: all of it may go.
        bench.node.with_core(|core, _| core.reclaim(Tier::Disk, u64::MAX));
        assert_eq!(bench.disk.usage().live_bytes, 0);
    }
}
