//! What is evicted from packs is found by nobody, as long as a record of it is in the store.

use super::*;
use crate::conformance::buffer;

/// A burial of record `n` of a writer, and of whatever it wrote of its block before.
fn burial(name: &str, n: u64, up_to_sequence: u64) -> Burial {
    Burial { writer: NodeId::new(name).unwrap(), block: key(n).block, up_to_sequence }
}

async fn refreshed(floor: &Floor) {
    floor.refresh().await.unwrap();
}

/// A reader with a name of its own.
fn reader(store: &Arc<Switched>, name: &str) -> Floor {
    floor_as(store, FloorConfig { own: NodeId::new(name).unwrap(), ..floor_config(nowhere()) })
}

fn news(floor: &Floor) -> Vec<String> {
    floor.recent_tombstones().into_iter().collect()
}

fn has(floor: &Floor, n: u64) -> bool {
    find(floor, n).is_some()
}

#[tokio::test]
async fn it_is_found_by_nobody_and_what_is_written_later_is() {
    let store = Arc::new(Switched::default());
    let (a, b) = (writer(&store, "a").await, writer(&store, "b").await);
    let (first, _) = put(&a, 1, LEN).await.unwrap();
    for (tier, n) in [(&a, 2), (&b, 1)] {
        put(tier, n, LEN).await.unwrap();
    }
    let (here, there) = (reader(&store, "here"), reader(&store, "there"));
    refreshed(&here).await;
    refreshed(&there).await;
    assert_eq!(here.writers_of(&[key(1).block, key(3).block]).iter().map(Vec::len).collect::<Vec<_>>(), [2, 0]);
    let newest = here.writers_of(&[key(1).block]).remove(0);
    here.bury(&[burial("b", 1, newest[1].1)]).await.unwrap();
    let known = |floor: &Floor| find(floor, 1).map(|record| record.writer.to_string());
    assert_eq!((known(&here).as_deref(), known(&there).as_deref()), (Some("a"), Some("b")), "a's was not evicted");
    here.bury(&[burial("a", 1, first.sequence)]).await.unwrap();
    let again = store.objects().await.len();
    here.bury(&[burial("a", 1, first.sequence)]).await.unwrap();
    assert_eq!(store.objects().await.len(), again, "what is dead needs no second file");
    // By word of mouth, by a listing, and after a restart of either.
    there.announced(&news(&here)).await;
    let listed = reader(&store, "there");
    refreshed(&listed).await;
    let restarted = reader(&store, "here");
    refreshed(&restarted).await;
    for floor in [&here, &there, &listed, &restarted] {
        assert!(!has(floor, 1) && has(floor, 2), "{:?}", floor.usage());
        assert!(floor.writers_of(&[key(1).block])[0].is_empty());
    }
    // The same block anew, with a higher sequence.
    let anew = RecordMeta { sequence: first.sequence + 1000, ..first };
    a.write(anew, buffer(&payload(1, LEN))).await.result.unwrap();
    for floor in [&here, &restarted] {
        refreshed(floor).await;
        read(floor, 1).await.unwrap();
    }
}

#[tokio::test]
async fn nothing_is_found_before_it_is_known_what_is_dead() {
    let store = Arc::new(Switched::default());
    let a = writer(&store, "a").await;
    let (dead, _) = put(&a, 1, LEN).await.unwrap();
    put(&a, 2, LEN).await.unwrap();
    let here = reader(&store, "here");
    here.bury(&[burial("a", 1, dead.sequence)]).await.unwrap();
    let joining = reader(&store, "joining");
    let found = joining.announced(&a.recent_packs()).await;
    assert_eq!(found, Announced { waiting: 2, ..Announced::default() });
    assert!(!has(&joining, 1) && !has(&joining, 2));
    refreshed(&joining).await;
    assert!(!has(&joining, 1) && has(&joining, 2));
    // A file cannot be read for a while: nothing is found, and what was announced with it waits again.
    let (dead, _) = put(&a, 3, LEN).await.unwrap();
    put(&a, 4, LEN).await.unwrap();
    for n in [3, 4] {
        here.bury(&[burial("a", n, dead.sequence + n - 3)]).await.unwrap();
    }
    let before = joining.recent_tombstones();
    assert_eq!(before, None, "it buried nothing");
    store.set_down(true);
    let names: Vec<String> = news(&here).into_iter().chain(a.recent_packs()).collect();
    let found = joining.announced(&names).await;
    assert_eq!((found.unavailable, found.waiting), (1, 2), "{found:?}");
    assert!(!has(&joining, 2), "nobody knows whether it is dead");
    store.set_down(false);
    until("a listing", async || joining.refresh().await.is_ok()).await;
    assert_eq!([2, 3, 4].map(|n| has(&joining, n)), [true, false, false], "the file before the last one was read too");
}

#[tokio::test]
async fn what_is_shielded_is_not_found_for_a_while() {
    let store = Arc::new(Switched::default());
    let a = writer(&store, "a").await;
    let (meta, _) = put(&a, 1, LEN).await.unwrap();
    let here = joined(&store).await;
    let writer = NodeId::new("a").unwrap();
    assert!(has(&here, 1) && here.lives(&writer, &meta));
    here.shield(&[meta.key.block], Duration::from_millis(50));
    assert!(!has(&here, 1) && !here.lives(&writer, &meta));
    until("its end", async || has(&here, 1)).await;
}

#[tokio::test]
async fn while_the_store_is_down_it_is_dead_here_and_told_later() {
    let store = Arc::new(Switched::default());
    let a = writer(&store, "a").await;
    let (dead, _) = put(&a, 1, LEN).await.unwrap();
    let (here, there) = (reader(&store, "here"), reader(&store, "there"));
    refreshed(&here).await;
    store.set_down(true);
    assert!(is_unavailable(&here.bury(&[burial("a", 1, dead.sequence)]).await));
    assert!(!has(&here, 1));
    store.set_down(false);
    until("the store is used again", async || here.refresh().await.is_ok()).await;
    until("it is written", async || {
        refreshed(&here).await;
        refreshed(&there).await;
        !has(&there, 1)
    })
    .await;
    assert!(!has(&here, 1));
}

#[tokio::test]
async fn own_files_become_one_and_others_are_left_alone() {
    let store = Arc::new(Switched::default());
    let a = writer(&store, "a").await;
    let mut dead = Vec::new();
    for n in 0..40 {
        dead.push(put(&a, n, LEN).await.unwrap().0.sequence);
    }
    let of = |name: &str, keep_merged| {
        floor_as(&store, FloorConfig { own: NodeId::new(name).unwrap(), keep_merged, ..floor_config(nowhere()) })
    };
    let (here, there) = (of("here", Duration::ZERO), of("there", Duration::from_secs(60)));
    refreshed(&here).await;
    refreshed(&there).await;
    tokio::time::pause();
    for (n, sequence) in (0..38).zip(&dead) {
        here.bury(&[burial("a", n, *sequence)]).await.unwrap();
    }
    tokio::time::resume();
    there.bury(&[burial("a", 38, dead[38])]).await.unwrap();
    let files = async || {
        let objects = store.objects().await;
        objects.iter().filter(|(path, _)| path.as_ref().contains("/evicted/")).count()
    };
    assert_eq!(files().await, 39);
    refreshed(&there).await;
    assert_eq!(files().await, 39, "they are not this node's");
    let told = news(&here);
    refreshed(&here).await;
    assert_eq!(files().await, 40, "whoever lists meanwhile finds the parts or the one");
    refreshed(&here).await;
    assert_eq!(files().await, 2);
    for floor in [here, there, reader(&store, "new")] {
        refreshed(&floor).await;
        let found: Vec<u64> = (0..40).filter(|n| has(&floor, *n)).collect();
        assert_eq!(found, [39]);
        assert_eq!(floor.usage().tombstones, 39);
        // A letter that names a file of before: what it said is known.
        floor.announced(&told).await;
        assert!(floor.is_ready() && has(&floor, 39));
    }
}

#[tokio::test]
async fn a_spoilt_file_costs_what_it_said_and_no_more() {
    let store = Arc::new(Switched::default());
    let a = writer(&store, "a").await;
    let one = put(&a, 1, LEN).await.unwrap().0.sequence;
    let two = put(&a, 2, LEN).await.unwrap().0.sequence;
    let here = reader(&store, "here");
    refreshed(&here).await;
    here.bury(&[burial("a", 1, one)]).await.unwrap();
    let objects = store.objects().await;
    let (path, bytes) = objects.iter().find(|(path, _)| path.as_ref().contains("/evicted/")).unwrap();
    let mut spoilt = bytes.to_vec();
    spoilt[20] ^= 1;
    store.replace(path, spoilt).await;
    here.bury(&[burial("a", 2, two)]).await.unwrap();
    let there = reader(&store, "there");
    refreshed(&there).await;
    assert!(has(&there, 1) && !has(&there, 2));
}
