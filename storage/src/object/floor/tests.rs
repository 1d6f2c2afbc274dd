//! Two writers and readers that share nothing but the store: what is found, what is refused, what is deleted.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use object_store::ObjectStoreExt;
use tokio::time::Instant;

use super::refresh::now_ms;
use super::*;
use crate::conformance::{meta, payload, put};
use crate::object::tests::{Switched, close, config, is_unavailable, open_as, until};
use crate::object::{ObjectConfig, ObjectPlace, ObjectStoreTier, RetryPolicy};
use crate::store::BlockStore;

mod evicted;

const LEN: usize = 3000;

fn nowhere() -> ObjectPlace {
    ObjectPlace::Local("/unused".into())
}

fn tier_config(place: ObjectPlace, name: &str) -> ObjectConfig {
    ObjectConfig { prefix: format!("kvtier/{name}"), ..config(place) }
}

async fn writer(store: &Arc<Switched>, name: &str) -> ObjectStoreTier {
    open_as(store, tier_config(nowhere(), name)).await.0
}

fn floor_config(place: ObjectPlace) -> FloorConfig {
    let millis = Duration::from_millis;
    let retry = RetryPolicy {
        attempts: 2,
        first_backoff: millis(1),
        max_backoff: millis(4),
        fail_fast: millis(20),
        ..RetryPolicy::default()
    };
    FloorConfig { retry, ..FloorConfig::new(place, NodeId::new("reader").unwrap()) }
}

fn floor(store: &Arc<Switched>) -> Floor {
    floor_as(store, floor_config(nowhere()))
}

/// A floor that knows what is dead.
async fn joined(store: &Arc<Switched>) -> Floor {
    let floor = floor(store);
    floor.refresh().await.unwrap();
    floor
}

fn floor_as(store: &Arc<Switched>, config: FloorConfig) -> Floor {
    Floor::open_with(config, Arc::clone(store) as Arc<dyn ObjectStore>).unwrap()
}

fn key(n: u64) -> ShardKey {
    meta(n, &payload(n, LEN)).key
}

fn find(floor: &Floor, n: u64) -> Option<FloorRecord> {
    floor.find(&[key(n)]).remove(0)
}

/// Reads record number `n` at `record`. Wrong bytes are a panic.
async fn read_at(floor: &Floor, n: u64, record: &FloorRecord) -> Result<RecordMeta, StorageError> {
    let back = floor.read(&key(n), record, IoBuf::heap(LEN)).await;
    let found = back.result?;
    let mut bytes = vec![0; LEN];
    back.into.copy_out(&mut bytes);
    assert_eq!(bytes, payload(n, LEN), "wrong bytes were served");
    Ok(found)
}

async fn read(floor: &Floor, n: u64) -> Result<RecordMeta, StorageError> {
    let record = find(floor, n).ok_or(StorageError::NotFound)?;
    read_at(floor, n, &record).await
}

/// Stores these records, each in a pack of its own.
async fn store_each(tier: &ObjectStoreTier, numbers: impl IntoIterator<Item = u64>) {
    for n in numbers {
        let before = now_ms();
        put(tier, n, LEN).await.unwrap();
        // Ages differ.
        until("the clock moves on", async || now_ms() > before).await;
    }
}

#[tokio::test]
async fn what_two_writers_stored_is_found_after_a_refresh() {
    let store = Arc::new(Switched::default());
    let (a, b) = (writer(&store, "a").await, writer(&store, "b").await);
    let written =
        [put(&a, 1, LEN).await.unwrap().0, put(&a, 2, LEN).await.unwrap().0, put(&b, 3, LEN).await.unwrap().0];
    let floor = floor(&store);
    assert_eq!(find(&floor, 1), None, "nothing is known yet");
    let found = floor.refresh().await.unwrap();
    assert_eq!(found, Refreshed { new_packs: 3, ..Refreshed::default() });
    for (n, written) in (1..).zip(&written) {
        assert_eq!(read(&floor, n).await.unwrap(), *written, "what the record says comes with its bytes");
    }
    assert_eq!(find(&floor, 3).unwrap().writer.as_str(), "b");
    assert_eq!(find(&floor, 4), None);
    let calls = store.calls();
    assert_eq!(floor.refresh().await.unwrap(), Refreshed::default(), "a second refresh finds nothing new");
    assert_eq!(store.calls() - calls, 1, "and reads no footer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_outlive_their_writers_in_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let place = ObjectPlace::Local(directory.path().to_owned());
    for (name, n) in [("a", 1), ("b", 2)] {
        let (tier, _) = ObjectStoreTier::open(tier_config(place.clone(), name)).await.unwrap();
        put(&tier, n, LEN).await.unwrap();
        close(&tier).await;
    }
    let floor = Arc::new(Floor::open(floor_config(place.clone())).unwrap());
    let fresh = Arc::clone(&floor);
    let keeping = tokio::spawn(async move { fresh.keep_fresh().await });
    until("both are found", async || read(&floor, 1).await.is_ok() && read(&floor, 2).await.is_ok()).await;
    keeping.abort();
    let report = floor.collect(0, &BTreeSet::from(["b".to_owned()]), Duration::ZERO).await.unwrap();
    assert_eq!(report.deleted_packs, 1);
    assert_eq!((find(&floor, 1), read(&floor, 2).await.is_ok()), (None, true));
    let (tier, recovered) = ObjectStoreTier::open(tier_config(place, "b")).await.unwrap();
    assert_eq!(recovered.records.len(), 1, "the writer finds its own as ever");
    close(&tier).await;
}

#[tokio::test]
async fn what_a_peer_announces_is_found_without_a_listing() {
    let store = Arc::new(Switched::default());
    let tier = writer(&store, "a").await;
    let floor = joined(&store).await;
    put(&tier, 1, LEN).await.unwrap();
    let lists = store.lists();
    let found = floor.announced(&tier.recent_packs()).await;
    assert_eq!(found, Announced { new_packs: 1, ..Announced::default() });
    read(&floor, 1).await.unwrap();
    let again = floor.announced(&tier.recent_packs()).await;
    assert_eq!(again, Announced { known: 1, ..Announced::default() });
    assert_eq!(store.lists(), lists);
    floor.refresh().await.unwrap();
    assert_eq!(floor.usage().records, 1, "it is not known twice");
}

#[tokio::test]
async fn recent_packs_are_bounded_newest_last_and_without_deleted_ones() {
    let store = Arc::new(Switched::default());
    let tier = writer(&store, "a").await;
    assert!(tier.recent_packs().is_empty());
    let floor = joined(&store).await;
    let mut last = None;
    for n in 0..70 {
        last = Some(put(&tier, n, 10).await.unwrap());
    }
    let names = tier.recent_packs();
    assert_eq!(names.len(), MAX_ANNOUNCED);
    assert_eq!(floor.announced(&names[MAX_ANNOUNCED - 1..]).await.new_packs, 1);
    assert!(floor.find(&[last.clone().unwrap().0.key])[0].is_some());
    let (meta, at) = last.unwrap();
    tier.forget(at, meta.bytes);
    until("the pack is deleted", async || store.packs().await.len() == 69).await;
    assert_eq!(tier.recent_packs(), names[..MAX_ANNOUNCED - 1]);
    close(&tier).await;
    assert!(writer(&store, "a").await.recent_packs().is_empty(), "they are those of one opening");
}

#[tokio::test]
async fn a_pack_uploaded_or_announced_twice_is_one_pack() {
    let store = Arc::new(Switched::default());
    let tier = writer(&store, "a").await;
    let floor = joined(&store).await;
    put(&tier, 1, LEN).await.unwrap();
    let names = [tier.recent_packs(), tier.recent_packs()].concat();
    floor.announced(&names).await;
    let (path, bytes) = store.packs().await.remove(0);
    store.replace(&path, bytes).await;
    floor.refresh().await.unwrap();
    let usage = floor.usage();
    assert_eq!((usage.packs, usage.records), (1, 1));
}

#[tokio::test]
async fn the_own_folder_is_left_out_unless_asked_for() {
    let store = Arc::new(Switched::default());
    let tier = writer(&store, "reader").await;
    put(&tier, 1, LEN).await.unwrap();
    let floor = floor(&store);
    floor.refresh().await.unwrap();
    let found = floor.announced(&tier.recent_packs()).await;
    assert_eq!((find(&floor, 1), found.known), (None, 1));
    let all = floor_as(&store, FloorConfig { skip_own: false, ..floor_config(nowhere()) });
    all.refresh().await.unwrap();
    read(&all, 1).await.unwrap();
}

#[tokio::test]
async fn a_flipped_byte_is_never_served_and_its_record_leaves_the_index() {
    let store = Arc::new(Switched::default());
    let tier = writer(&store, "a").await;
    put(&tier, 1, LEN).await.unwrap();
    let floor = floor(&store);
    floor.refresh().await.unwrap();
    let record = find(&floor, 1).unwrap();
    let (path, good) = store.packs().await.remove(0);
    let record_bytes = record.header_bytes as usize + LEN;
    for flipped in (0..record_bytes).step_by(11) {
        let mut bad = good.to_vec();
        bad[flipped] ^= 0x20;
        store.replace(&path, bad).await;
        let result = read_at(&floor, 1, &record).await;
        assert!(matches!(result, Err(StorageError::Corrupt { .. })), "byte {flipped}: {result:?}");
        assert_eq!(find(&floor, 1), None);
    }
    for len in [record_bytes - 1, 1, 0] {
        store.replace(&path, good.slice(..len)).await;
        let result = read_at(&floor, 1, &record).await;
        assert!(matches!(result, Err(StorageError::Corrupt { .. })), "{len} bytes: {result:?}");
    }
    store.replace(&path, good).await;
    read_at(&floor, 1, &record).await.expect("wrong bytes do not open the breaker");
    assert_eq!(find(&floor, 1), None, "it does not come back");
}

#[tokio::test]
async fn a_record_that_does_not_fit_its_place_or_its_buffer_is_refused() {
    let store = Arc::new(Switched::default());
    let tier = writer(&store, "a").await;
    let both = tokio::join!(put(&tier, 1, LEN), put(&tier, 2, LEN));
    assert!(both.0.is_ok() && both.1.is_ok());
    let floor = floor(&store);
    floor.refresh().await.unwrap();
    let record = find(&floor, 1).unwrap();
    let short = floor.read(&key(1), &record, IoBuf::heap(LEN - 1)).await;
    assert!(matches!(short.result, Err(StorageError::Refused { .. })));
    assert_eq!(short.into.len(), LEN - 1, "the buffer comes back");
    let made_up = [
        FloorRecord { offset: u64::MAX, ..record.clone() },
        FloorRecord { offset: 1 << 40, ..record.clone() },
        FloorRecord { header_bytes: 0, ..record.clone() },
        FloorRecord { bytes: record.bytes - 1, ..record.clone() },
        FloorRecord { checksum: 1, ..record.clone() },
        FloorRecord { offset: record.offset + 1, ..record.clone() },
    ];
    for wrong in made_up {
        let result = read_at(&floor, 1, &wrong).await;
        assert!(matches!(result, Err(StorageError::Corrupt { .. })), "{wrong:?}: {result:?}");
    }
    let result = read_at(&floor, 2, &record).await;
    assert!(matches!(result, Err(StorageError::Corrupt { .. })), "another key's record: {result:?}");
    read_at(&floor, 1, &record).await.expect("the breaker did not open");
}

#[tokio::test]
async fn another_writers_copy_is_served_when_one_is_corrupt_or_gone() {
    let store = Arc::new(Switched::default());
    for name in ["a", "b", "c"] {
        store_each(&writer(&store, name).await, [1]).await;
    }
    let floor = floor(&store);
    floor.refresh().await.unwrap();
    let first = find(&floor, 1).unwrap();
    assert_eq!(first.writer.as_str(), "c", "the newest copy is the one that stays longest");
    let packs = store.packs().await;
    let mut bad = packs[2].1.to_vec();
    bad[LEN / 2] ^= 1;
    store.replace(&packs[2].0, bad).await;
    assert!(matches!(read(&floor, 1).await, Err(StorageError::Corrupt { .. })));
    assert_eq!(find(&floor, 1).unwrap().writer.as_str(), "b");
    store.inner.delete(&packs[1].0).await.unwrap();
    assert!(matches!(read(&floor, 1).await, Err(StorageError::NotFound)));
    assert_eq!(find(&floor, 1).unwrap().writer.as_str(), "a");
    read(&floor, 1).await.unwrap();
}

#[tokio::test]
async fn a_deleted_pack_leaves_the_index_when_it_is_read_or_listed() {
    let store = Arc::new(Switched::default());
    let tier = writer(&store, "a").await;
    store_each(&tier, [1, 2, 3]).await;
    let floor = floor(&store);
    floor.refresh().await.unwrap();
    let path = |n| find(&floor, n).unwrap().pack_at().path(&floor.shared.root);
    store.inner.delete(&path(1)).await.unwrap();
    store.inner.delete(&path(2)).await.unwrap();
    assert!(matches!(read(&floor, 1).await, Err(StorageError::NotFound)));
    assert_eq!((find(&floor, 1), floor.usage().packs), (None, 2));
    assert_eq!(floor.refresh().await.unwrap().gone_packs, 1);
    assert_eq!(find(&floor, 2), None);
    read(&floor, 3).await.unwrap();
}

/// A pack whose trailer says another version, with its checksum made to fit.
fn of_another_version(pack: &Bytes) -> Vec<u8> {
    let mut bytes = pack.to_vec();
    let at = bytes.len() - crate::object::pack::TRAILER_LEN;
    bytes[at + 8] = 9;
    let crc_at = bytes.len() - 8;
    let crc = crate::codec::crc64(&bytes[at..crc_at]);
    bytes[crc_at..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[tokio::test]
async fn hostile_packs_are_reported_and_neither_read_again_nor_deleted() {
    let store = Arc::new(Switched::default());
    let tier = writer(&store, "a").await;
    store_each(&tier, 0..6).await;
    let packs = store.packs().await;
    let (paths, good): (Vec<_>, Vec<_>) = packs.into_iter().unzip();
    store.replace(&paths[0], good[0].slice(..good[0].len() / 2)).await;
    store.replace(&paths[1], vec![0xa5; 5000]).await;
    store.replace(&paths[2], of_another_version(&good[2])).await;
    store.replace(&paths[3], Bytes::new()).await;
    store.replace(&paths[4], good[5].clone()).await;
    let (floor, floor_knowing_nothing) = (floor(&store), floor(&store));
    let first = floor.refresh().await.unwrap();
    assert_eq!((first.new_packs, first.unreadable.len()), (1, 0), "once may be an accident");
    let second = floor.refresh().await.unwrap();
    assert_eq!((second.new_packs, second.unreadable.len()), (0, 5));
    assert_eq!(floor.usage().unreadable_packs, 5);
    let calls = store.calls();
    floor.refresh().await.unwrap();
    assert_eq!(store.calls() - calls, 1, "only the listing");
    let report = floor_knowing_nothing.collect(0, &BTreeSet::new(), Duration::ZERO).await.unwrap();
    assert_eq!((report.deleted_packs, report.unreadable.len()), (1, 0), "it looks before it deletes");
    let report = floor.collect(0, &BTreeSet::new(), Duration::ZERO).await.unwrap();
    assert_eq!((report.deleted_packs, report.unreadable.len()), (0, 5));
    assert_eq!(store.packs().await.len(), 5, "what is not understood is left alone");
    assert!(report.excess_bytes > 0);
}

#[tokio::test]
async fn hostile_announcements_cost_nothing_and_say_nothing_about_good_packs() {
    let store = Arc::new(Switched::default());
    let tier = writer(&store, "a").await;
    let floor = joined(&store).await;
    put(&tier, 1, LEN).await.unwrap();
    let good = tier.recent_packs().remove(0);
    let (stem, bytes) = good.rsplit_once('-').unwrap();
    let bytes: u64 = bytes.parse().unwrap();
    let calls = store.calls();
    let refused = ["", "../a", "a/../../etc/passwd", "a/v2/00/x.pack", &good.to_uppercase(), &format!("{good}0000000")];
    let found = floor.announced(&refused.map(str::to_owned)).await;
    assert_eq!((found, store.calls()), (Announced { refused: 6, ..Announced::default() }, calls));
    let lies: Vec<String> = [1, 47, 48, bytes - 1, bytes + 1, 100_000, u64::from(u32::MAX)]
        .into_iter()
        .map(|lie| format!("{stem}-{lie}"))
        .chain([format!("a/{}-1000", "00".repeat(32)), good.replacen('a', "b", 1)])
        .collect();
    for _ in 0..3 {
        let found = floor.announced(&lies).await;
        assert_eq!(found, Announced { wrong: lies.len(), ..Announced::default() });
    }
    let many = vec![good.clone(); 1000];
    let found = floor.announced(&many).await;
    assert_eq!((found.new_packs, found.refused), (1, 1000 - MAX_ANNOUNCED));
    read(&floor, 1).await.unwrap();
    assert_eq!(floor.refresh().await.unwrap(), Refreshed::default());
}

#[tokio::test]
async fn the_oldest_packs_are_left_out_of_a_full_index() {
    let store = Arc::new(Switched::default());
    let tier = writer(&store, "a").await;
    store_each(&tier, 0..5).await;
    let floor = floor_as(&store, FloorConfig { max_records: 3, concurrency: 1, ..floor_config(nowhere()) });
    floor.refresh().await.unwrap();
    let known = |floor: &Floor| (0..7).map(|n| u8::from(find(floor, n).is_some())).collect::<Vec<_>>();
    assert_eq!(known(&floor), [0, 0, 1, 1, 1, 0, 0]);
    assert_eq!((floor.usage().records, floor.usage().left_out_packs), (3, 2));
    let calls = store.calls();
    floor.refresh().await.unwrap();
    assert_eq!(store.calls() - calls, 1, "what is left out is not read again");
    store_each(&tier, [5]).await;
    floor.announced(&tier.recent_packs()[5..]).await;
    assert_eq!(known(&floor), [0, 0, 0, 1, 1, 1, 0]);
    store_each(&tier, [6]).await;
    floor.refresh().await.unwrap();
    assert_eq!((known(&floor), floor.usage().left_out_packs), (vec![0, 0, 0, 0, 1, 1, 1], 4));
    for n in [5, 6] {
        store.inner.delete(&find(&floor, n).unwrap().pack_at().path(&floor.shared.root)).await.unwrap();
    }
    floor.refresh().await.unwrap();
    assert_eq!((known(&floor), floor.usage().left_out_packs), (vec![0, 0, 1, 1, 1, 0, 0], 2), "there is room again");
}

#[tokio::test]
async fn a_store_that_is_away_at_the_start_is_found_once_it_is_back() {
    let store = Arc::new(Switched::default());
    let tier = writer(&store, "a").await;
    put(&tier, 1, LEN).await.unwrap();
    store.set_down(true);
    let floor = floor(&store);
    assert!(is_unavailable(&floor.refresh().await));
    assert_eq!(floor.announced(&tier.recent_packs()).await.waiting, 1);
    assert_eq!(find(&floor, 1), None);
    assert!(is_unavailable(&floor.collect(0, &BTreeSet::new(), Duration::ZERO).await));
    store.set_down(false);
    until("it is found", async || floor.refresh().await.is_ok()).await;
    read(&floor, 1).await.unwrap();
}

#[tokio::test]
async fn a_refresh_goes_on_where_a_failure_ended_it() {
    let store = Arc::new(Switched::default());
    store_each(&writer(&store, "a").await, 0..6).await;
    let floor = floor_as(&store, FloorConfig { concurrency: 1, ..floor_config(nowhere()) });
    // A listing and two footers.
    store.fails_from.store(store.calls() + 3, Ordering::SeqCst);
    assert!(is_unavailable(&floor.refresh().await));
    assert!(find(&floor, 5).is_some() && find(&floor, 4).is_some() && find(&floor, 3).is_none(), "the newest first");
    store.fails_from.store(0, Ordering::SeqCst);
    let mut rest = None;
    until("it goes on", async || {
        rest = floor.refresh().await.ok();
        rest.is_some()
    })
    .await;
    assert_eq!(rest.unwrap().new_packs, 4, "and no footer is read twice");
}

#[tokio::test]
async fn a_pack_that_cannot_be_read_does_not_keep_others_from_being_learnt() {
    let store = Arc::new(Switched::default());
    store_each(&writer(&store, "a").await, 0..4).await;
    let floor = floor_as(&store, FloorConfig { concurrency: 1, ..floor_config(nowhere()) });
    let newest = {
        let all = floor_as(&store, floor_config(nowhere()));
        all.refresh().await.unwrap();
        find(&all, 3).unwrap().pack_at().path(&floor.shared.root)
    };
    *store.bad_sector.lock() = Some(newest);
    until("the others are known", async || {
        assert!(is_unavailable(&floor.refresh().await));
        floor.usage().packs == 3
    })
    .await;
    *store.bad_sector.lock() = None;
    until("it is learnt", async || floor.refresh().await.is_ok()).await;
    assert_eq!(floor.usage().packs, 4);
}

#[tokio::test]
async fn its_futures_can_be_spawned() {
    fn spawnable<F: Future + Send>(_: F) {}
    let floor = floor(&Arc::new(Switched::default()));
    let record = FloorRecord {
        writer: NodeId::new("a").unwrap(),
        pack: [0; 32],
        offset: 0,
        header_bytes: 0,
        bytes: 0,
        checksum: 0,
    };
    spawnable(floor.refresh());
    spawnable(floor.announced(&[]));
    spawnable(floor.read(&key(1), &record, IoBuf::heap(0)));
    spawnable(floor.collect(0, &BTreeSet::new(), Duration::ZERO));
    spawnable(floor.keep_fresh());
}

#[tokio::test]
async fn a_store_that_hangs_is_given_up_and_then_costs_nothing() {
    let store = Arc::new(Switched::default());
    put(&writer(&store, "a").await, 1, LEN).await.unwrap();
    let mut config = floor_config(nowhere());
    config.retry.attempt_timeout = Duration::from_millis(30);
    config.retry.read_deadline = Duration::from_millis(80);
    let floor = floor_as(&store, config);
    floor.refresh().await.unwrap();
    store.hangs.store(true, Ordering::SeqCst);
    assert!(is_unavailable(&read(&floor, 1).await));
    store.set_down(true);
    let calls = store.calls();
    for _ in 0..1000 {
        assert!(is_unavailable(&read(&floor, 1).await));
    }
    assert!(store.calls() - calls < 100, "calls fail at once while the store is away");
    store.hangs.store(false, Ordering::SeqCst);
    store.set_down(false);
    until("reads go on", async || read(&floor, 1).await.is_ok()).await;
}

#[tokio::test]
async fn only_dead_writers_oldest_packs_are_deleted_and_only_beyond_the_budget() {
    let store = Arc::new(Switched::default());
    let tiers = [writer(&store, "alive").await, writer(&store, "dead").await, writer(&store, "reader").await];
    store_each(&tiers[0], [0, 1]).await;
    store_each(&tiers[1], [2, 3, 4]).await;
    store_each(&tiers[2], [5]).await;
    let floor = floor(&store);
    floor.refresh().await.unwrap();
    let alive = BTreeSet::from(["alive".to_owned()]);
    let all = floor.collect(u64::MAX, &alive, Duration::ZERO).await.unwrap();
    assert_eq!((all.deleted_packs, all.excess_bytes, all.bytes_by_writer.len()), (0, 0, 3));
    let sum: u64 = store.packs().await.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    assert_eq!((all.total_bytes, all.bytes_by_writer.values().sum::<u64>()), (sum, sum));
    let spared = floor.collect(0, &alive, Duration::from_secs(3600)).await.unwrap();
    assert_eq!((spared.deleted_packs, spared.excess_bytes), (0, sum), "none is dead for so long");
    let one = floor.collect(sum - 1, &alive, Duration::ZERO).await.unwrap();
    assert_eq!((one.deleted_packs, one.excess_bytes), (1, 0));
    assert_eq!((find(&floor, 2), find(&floor, 3).is_some()), (None, true), "the oldest of the dead");
    let again = floor.collect(sum - 1, &alive, Duration::ZERO).await.unwrap();
    assert_eq!(
        (again.deleted_packs, again.total_bytes),
        (0, sum - one.deleted_bytes),
        "doing it again changes nothing"
    );
    let rest = floor.collect(0, &alive, Duration::ZERO).await.unwrap();
    assert_eq!((rest.deleted_packs, rest.excess_bytes), (2, again.total_bytes - rest.deleted_bytes));
    let left = store.packs().await;
    assert_eq!(left.len(), 3);
    assert!(left.iter().all(|(path, _)| !path.as_ref().contains("/dead/")), "{left:?}");
}

#[tokio::test]
async fn a_writer_that_lived_a_moment_ago_keeps_its_old_packs() {
    let store = Arc::new(Switched::default());
    store_each(&writer(&store, "idle").await, [1, 2]).await;
    let stored = now_ms();
    let long = Duration::from_millis(20);
    until("its packs are old", async || now_ms() > stored + 20).await;
    let (floor, nobody) = (floor(&store), BTreeSet::new());
    // Ahead of the clock, so that the time this test takes does not count.
    let heard_at = Instant::now() + Duration::from_secs(3600);
    floor.shared.presence.lock().heard(heard_at, [NodeId::new("idle").unwrap()]);
    let spared = floor.collect(0, &nobody, long).await.unwrap();
    assert_eq!((spared.deleted_packs, store.packs().await.len()), (0, 2), "the directory may have forgotten it");
    floor.shared.presence.lock().heard(heard_at + long, []);
    assert_eq!(floor.collect(0, &nobody, long).await.unwrap().deleted_packs, 2, "it stayed away");
}

#[tokio::test]
async fn a_writer_first_seen_a_moment_ago_keeps_its_old_packs() {
    let store = Arc::new(Switched::default());
    store_each(&writer(&store, "idle").await, [1]).await;
    let stored = now_ms();
    let long = Duration::from_millis(20);
    until("its pack is old", async || now_ms() > stored + 20).await;
    let (floor, nobody) = (floor(&store), BTreeSet::new());
    let seen_at = Instant::now() + Duration::from_secs(3600);
    floor.shared.presence.lock().heard(seen_at, []);
    assert_eq!(floor.collect(0, &nobody, long).await.unwrap().deleted_packs, 0, "this node only just started");
    floor.shared.presence.lock().heard(seen_at + long, []);
    assert_eq!(floor.collect(0, &nobody, long).await.unwrap().deleted_packs, 1);
}

#[tokio::test]
async fn nodes_that_collect_at_once_delete_what_one_would() {
    let store = Arc::new(Switched::default());
    store_each(&writer(&store, "dead").await, 1..7).await;
    let sum: u64 = store.packs().await.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    let (a, b) = (floor(&store), floor(&store));
    let nobody = BTreeSet::new();
    let (a, b) = tokio::join!(a.collect(sum / 2, &nobody, Duration::ZERO), b.collect(sum / 2, &nobody, Duration::ZERO));
    assert!(a.is_ok() && b.is_ok(), "{a:?} {b:?}");
    assert_eq!(store.packs().await.len(), 3);
}

#[tokio::test]
async fn what_cannot_work_is_refused_by_name() {
    for (broken, field) in [
        (FloorConfig { max_records: 0, ..floor_config(nowhere()) }, "max_records"),
        (FloorConfig { concurrency: 0, ..floor_config(nowhere()) }, "concurrency"),
        (FloorConfig { max_inflight_bytes: 0, ..floor_config(nowhere()) }, "max_inflight_bytes"),
        (FloorConfig { prefix: "a//b".into(), ..floor_config(nowhere()) }, "prefix"),
    ] {
        let error = Floor::open_with(broken, Arc::new(Switched::default())).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
}
