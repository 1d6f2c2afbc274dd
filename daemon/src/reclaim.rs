//! Makes room on a lower tier: the core chooses what goes, and what remains in an emptying log segment or pack moves on.
//!
//! Space comes back in whole segments. The core drops the least valuable copies until some segment is mostly dead; the
//! living rest is rewritten, which costs at most a third of what it frees.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvtier_memory::IoBuf;
use kvtier_storage::BlockStore;
use kvtier_storage::disk::DiskStore;
use kvtier_types::{Expect, Location, ShardKey, Tier};

use crate::node::Node;

/// A segment is emptied by rewriting once less than this share of it, in percent, is alive.
const REWRITE_BELOW_PERCENT: u64 = 25;
/// Rounds of dropping before the emptiest segment is dropped whole.
const DROP_ROUNDS: u32 = 64;
/// Free log segments kept, so that rewriting always has where to write.
const SPARE_SEGMENTS: u64 = 2;

/// Starts making room ahead of need.
pub(crate) fn look_ahead(node: &Arc<Node>, tier: Tier) {
    if tier != Tier::Disk || !scarce(node) {
        return;
    }
    let node_of_task = Arc::clone(node);
    node.tasks.spawn(async move {
        let Ok(_only_one) = node_of_task.reclaiming.try_lock() else { return };
        if !scarce(&node_of_task) {
            return;
        }
        if let Some(disk) = node_of_task.stores.disk.clone() {
            free_segment(&node_of_task, &disk).await;
        }
    });
}

fn scarce(node: &Node) -> bool {
    let Some(disk) = &node.stores.disk else { return false };
    let usage = disk.usage();
    usage.capacity_bytes - usage.used_bytes.min(usage.capacity_bytes) < SPARE_SEGMENTS * node.config.disk.segment.0
}

/// Makes room for a record that was refused. Of many that were refused at once, one makes room for all
/// (`a_full_disk_makes_room_and_stays_within_its_capacity`).
pub(crate) async fn make_room(node: &Arc<Node>, tier: Tier) {
    let before = node.rooms_made.load(Ordering::Acquire);
    let _only_one = node.reclaiming.lock().await;
    if node.rooms_made.load(Ordering::Acquire) != before {
        return;
    }
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
                        drop_record(node, Tier::Object, &key, at);
                    }
                }
            }
        }
        Tier::Device | Tier::Host => {}
    }
    node.rooms_made.fetch_add(1, Ordering::AcqRel);
}

fn drop_record(node: &Arc<Node>, tier: Tier, key: &ShardKey, at: Location) {
    node.with_core(|core, _| core.drop_record(tier, key, at));
}

async fn free_segment(node: &Arc<Node>, disk: &Arc<DiskStore>) {
    let segment_bytes = node.config.disk.segment.0;
    for _ in 0..DROP_ROUNDS {
        let Some(segment) = disk.reclaim_candidate() else { return };
        let live = disk.live_records(segment);
        let live_bytes: u64 = live.iter().map(|(_, _, bytes)| bytes).sum();
        if live_bytes * 100 <= segment_bytes * REWRITE_BELOW_PERCENT {
            for record in live {
                rewrite(node, disk, record).await;
            }
            return;
        }
        let dropped = node.with_core(|core, _| core.reclaim(Tier::Disk, segment_bytes / 4));
        if dropped.copies == 0 {
            break;
        }
    }
    // Everything is in use or claimed, or value is spread evenly: the emptiest segment goes whole.
    if let Some(segment) = disk.reclaim_candidate() {
        for (key, at, bytes) in disk.live_records(segment) {
            // Claims have budgets, so rewriting what they keep always frees something.
            if node.read_core(|core| core.keeps_record(&key, at)) {
                rewrite(node, disk, (key, at, bytes)).await;
            } else {
                drop_record(node, Tier::Disk, &key, at);
            }
        }
    }
}

/// Writes a living record anew; if that fails it is lost, which is a miss later.
async fn rewrite(node: &Arc<Node>, disk: &Arc<DiskStore>, (key, at, bytes): (ShardKey, Location, u64)) {
    let Some(meta) = node.with_core(|core, _| core.relocate(&key, at)) else {
        disk.forget(at, bytes);
        return;
    };
    let expect = Expect { bytes: meta.bytes, checksum: meta.checksum };
    let len = usize::try_from(meta.bytes).expect("blocks fit in memory");
    let read = disk.read(&key, at, expect, IoBuf::heap(len)).await;
    let sequence = meta.sequence;
    let to = match read.result {
        Ok(()) => disk.write(meta, read.into).await.result.ok(),
        Err(_) => None,
    };
    node.with_core(|core, _| core.relocated(&key, at, to.map(|to| (to, sequence))));
}
