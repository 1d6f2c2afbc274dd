//! Starts over what a former life left in the object tier, with its journal and without.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use futures::future::join_all;
use kvtier_memory::IoBuf;
use kvtier_policy::Core;
use kvtier_storage::BlockStore;
use kvtier_storage::journal::{Entry, Journal, JournalState};
use kvtier_storage::object::ObjectStoreTier;
use kvtier_types::{BlockHints, BlockKey, LayoutId, NamespaceId, RecordMeta, ShardKey, TenantId, Tier};

use super::{RECORDS_AT_ONCE, open};
use crate::config::Config;
use crate::node::Node;

const BYTES: usize = 512;

fn config(dir: &Path, object: bool) -> Config {
    let toml = format!(
        "node_id = \"n\"\nrun_dir = {run:?}\ndata_dir = {data:?}\n[host]\ncapacity = \"16MiB\"\nextent = \"8MiB\"\n\
         pages = \"plain\"\n[disk]\nenabled = false\n[object]\nenabled = {object}\n",
        run = dir.join("run"),
        data = dir.join("data"),
    );
    toml::from_str(&toml).unwrap()
}

fn key(number: u64) -> ShardKey {
    let mut digest = [7; 32];
    digest[..8].copy_from_slice(&number.to_le_bytes());
    ShardKey { block: BlockKey::new(digest), layout: LayoutId::new([2; 32]), shard: 0 }
}

/// The record of that number, which is its sequence too.
fn meta(number: u64, checksum: u64) -> RecordMeta {
    RecordMeta {
        key: key(number),
        namespace: NamespaceId::new([3; 32]),
        tenant: TenantId::shared(),
        hints: BlockHints::default(),
        parent: None,
        depth_blocks: 0,
        group: 0,
        needs_ancestors: false,
        model: "m".into(),
        bytes: BYTES as u64,
        checksum,
        sequence: number,
        expires_ms: None,
    }
}

fn journal(dir: &Path) -> (Journal, JournalState) {
    Journal::open(&dir.join("data/journal")).unwrap()
}

/// Packs with records of these numbers.
async fn store(dir: &Path, numbers: Range<u64>) {
    let (store, _) = ObjectStoreTier::open(config(dir, true).object_config().unwrap()).await.unwrap();
    let writes = numbers.map(|number| {
        let payload = IoBuf::heap(BYTES);
        store.write(meta(number, payload.checksum()), payload)
    });
    for written in join_all(writes).await {
        written.result.unwrap();
    }
    store.close(Duration::from_secs(20)).await.unwrap();
}

fn records(node: &Node) -> u64 {
    node.read_core(|core| core.tier_use(Tier::Object)).copies
}

#[tokio::test]
async fn more_records_than_one_call_takes_come_in() {
    let dir = tempfile::tempdir().unwrap();
    let first = journal(dir.path()).1.wiped_up_to + 1;
    let count = 2 * RECORDS_AT_ONCE as u64 + 1;
    store(dir.path(), first..first + count).await;
    let node = open(config(dir.path(), true)).await.unwrap();
    assert_eq!(records(&node), count);
    assert!(node.read_core(Core::last_sequence) >= first + count - 1);
    assert!(node.notes.is_empty(), "{:?}", node.notes);
}

#[tokio::test]
async fn what_is_older_than_the_journal_stays_away_though_its_store_was_away_when_that_was_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let first = journal(dir.path()).1.wiped_up_to + 1;
    store(dir.path(), first..first + 10).await;
    std::fs::remove_dir_all(dir.path().join("data/journal")).unwrap();
    drop(open(config(dir.path(), false)).await.unwrap());
    // What is written from now on is no part of it.
    let next = journal(dir.path()).1.last_sequence + 1;
    store(dir.path(), next..next + 3).await;
    for _ in 0..2 {
        let node = open(config(dir.path(), true)).await.unwrap();
        assert_eq!(records(&node), 3);
    }
}

#[tokio::test]
async fn records_above_what_the_clock_said_are_wiped_for_good_too() {
    let dir = tempfile::tempdir().unwrap();
    // As after a clock that was set back.
    let far = 1 << 60;
    store(dir.path(), far..far + 10).await;
    let node = open(config(dir.path(), true)).await.unwrap();
    assert_eq!(records(&node), 0);
    drop(node);
    assert_eq!(journal(dir.path()).1.wiped_up_to, far + 9);
}

#[tokio::test]
async fn a_tier_that_is_off_for_a_while_brings_nothing_back() {
    let dir = tempfile::tempdir().unwrap();
    let first = journal(dir.path()).1.wiped_up_to + 1;
    store(dir.path(), first..first + 10).await;
    drop(open(config(dir.path(), true)).await.unwrap());
    let evicted = |number| Entry::Evicted { key: key(number), up_to_sequence: first + 9 };
    journal(dir.path()).0.append(&[evicted(first + 2), evicted(first + 3), evicted(first + 20)]).unwrap();
    drop(open(config(dir.path(), false)).await.unwrap());
    assert_eq!(journal(dir.path()).1.evicted.len(), 3, "what it may hold is not known");
    let node = open(config(dir.path(), true)).await.unwrap();
    assert_eq!(records(&node), 8);
    drop(node);
    assert_eq!(journal(dir.path()).1.evicted.len(), 2, "what is nowhere is said no more");
}
