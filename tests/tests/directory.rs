//! The directory client against real servers: what it means, and what it does when they are away, empty, silent or not ours.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kvtier_policy::directory::{Batch, Change, Table, Tiers};
use kvtier_tests::valkey::{Valkey, cluster_url};
use kvtier_types::{Edition, NodeNumber};
use kvtierd::directory::conformance::{self, batch, digest, key, record};
use kvtierd::directory::{Directory, DirectoryError, EmbeddedDirectory, ValkeyConfig, ValkeyDirectory};
use proptest::prelude::{ProptestConfig, Strategy, prop_assert_eq, proptest};

/// What a call may take when the servers do not answer.
const TIMEOUT: Duration = Duration::from_millis(300);
/// Far more than that, on a machine busy with others; far less than no deadline at all.
const ENDS: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_secs(600);
const NODE: NodeNumber = NodeNumber::new(1);
const EDITION: Edition = Edition::first(1);

/// A client with a prefix, and so with data, of its own.
fn fresh(url: &str, timeout: Duration) -> ValkeyDirectory {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let prefix = format!("test-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    client(url, &prefix, timeout)
}

fn client(url: &str, prefix: &str, timeout: Duration) -> ValkeyDirectory {
    let config = ValkeyConfig { url: url.into(), prefix: prefix.into(), timeout, ..ValkeyConfig::default() };
    ValkeyDirectory::open(&config).expect("the settings make sense")
}

fn is_away<T>(result: Result<T, DirectoryError>) -> bool {
    matches!(result, Err(DirectoryError::Away { .. }))
}

/// What the directory says when it refuses.
fn refusal<T>(result: Result<T, DirectoryError>) -> String {
    match result {
        Err(DirectoryError::Refused { reason, .. }) => reason,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

/// Whether it says that there is no room, and that the server's memory is why.
fn is_full<T>(result: Result<T, DirectoryError>) -> bool {
    matches!(result, Err(DirectoryError::Full { reason, .. }) if reason.contains("maxmemory"))
}

/// Calls until one is answered: a client does not try again at once.
async fn back(on: &dyn Directory) {
    let deadline = Instant::now() + ENDS;
    while is_away(on.locate(&[key(1, 1)]).await) {
        assert!(Instant::now() < deadline, "the client does not come back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_embedded_directory_keeps_its_promises() {
    conformance::run(|| Arc::new(EmbeddedDirectory::default())).await;
}

#[tokio::test]
async fn one_server_keeps_the_promises() {
    let Some(server) = Valkey::start() else { return };
    conformance::run(|| Arc::new(fresh(&server.url(), ENDS))).await;
}

#[tokio::test]
async fn a_cluster_keeps_the_promises_and_so_does_one_that_moves_a_slot() {
    let Some(servers) = Valkey::start_cluster(3) else { return };
    let url = cluster_url(&servers);
    conformance::run(|| Arc::new(fresh(&url, ENDS))).await;

    let on = client(&url, "moving", ENDS);
    on.apply(NODE, EDITION, &[batch(7, 1, &[(1, 1)]), batch(8, 1, &[(1, 2)])]).await.unwrap();
    let slot = servers[0].cli(&["cluster", "keyslot", "moving:b07"]);
    let holds = |s: &&Valkey| s.cli(&["exists", "moving:b07"]) == "1";
    let from = servers.iter().find(holds).unwrap();
    let to = servers.iter().find(|s| s.port() != from.port()).unwrap();
    let (from_id, to_id) = (from.cli(&["cluster", "myid"]), to.cli(&["cluster", "myid"]));
    assert_eq!(to.cli(&["cluster", "setslot", &slot, "importing", &from_id]), "OK");
    assert_eq!(from.cli(&["cluster", "setslot", &slot, "migrating", &to_id]), "OK");
    let keys = [key(7, 1), key(8, 1)];
    assert!(on.locate(&keys).await.unwrap().iter().all(|found| found.len() == 1));
    let port = to.port().to_string();
    assert_eq!(from.cli(&["migrate", "127.0.0.1", &port, "moving:b07", "0", "5000"]), "OK");
    // Its owner still has the slot, but no longer the key: it says where to ask.
    assert!(on.locate(&keys).await.unwrap().iter().all(|found| found.len() == 1));
    let answer = on.apply(NODE, EDITION, &[batch(7, 2, &[(2, 1)])]).await.unwrap();
    assert_eq!(answer[0].1, digest(7, 2, &[(1, 1), (2, 1)]));
    for server in [to, from] {
        assert_eq!(server.cli(&["cluster", "setslot", &slot, "node", &to_id]), "OK");
    }
    assert!(on.locate(&keys).await.unwrap().iter().all(|found| found.len() == 1));
    assert_eq!(to.cli(&["exists", "moving:b07"]), "1");
    assert_eq!(on.digests(NODE, EDITION).await.unwrap()[7], Some(digest(7, 2, &[(1, 1), (2, 1)])));
}

#[tokio::test]
async fn a_master_that_dies_takes_only_its_share_and_calls_end_in_time() {
    let Some(mut servers) = Valkey::start_cluster(3) else { return };
    let on = client(&cluster_url(&servers), "share", TIMEOUT);
    let batches: Vec<_> = (0..=255).map(|bucket| batch(bucket, 1, &[(1, 1)])).collect();
    on.apply(NODE, EDITION, &batches).await.unwrap();
    let victim = servers.iter().position(|s| s.cli(&["exists", "share:b00"]) == "1").unwrap();
    let other = (1..=255)
        .find(|b| {
            servers
                .iter()
                .enumerate()
                .any(|(i, s)| i != victim && s.cli(&["exists", &format!("share:b{b:02x}")]) == "1")
        })
        .unwrap();
    for server in &servers {
        server.cli(&["config", "set", "cluster-require-full-coverage", "no"]);
    }
    servers[victim].kill();
    let started = Instant::now();
    assert!(is_away(on.locate(&[key(0, 1)]).await));
    for _ in 0..50 {
        assert!(is_away(on.locate(&[key(0, 1)]).await));
        assert_eq!(on.locate(&[key(other, 1)]).await.unwrap()[0].len(), 1);
    }
    assert!(started.elapsed() < ENDS);
}

#[tokio::test]
async fn a_server_killed_and_back_empty_fails_calls_in_time_and_then_knows_nothing() {
    let Some(mut server) = Valkey::start() else { return };
    let on = fresh(&server.url(), TIMEOUT);
    on.heartbeat(&record("a", EDITION), LONG).await.unwrap();
    on.apply(NODE, EDITION, &[batch(7, 4, &[(1, 1)])]).await.unwrap();
    server.kill();
    let started = Instant::now();
    for _ in 0..200 {
        assert!(is_away(on.locate(&[key(7, 1)]).await));
        assert!(is_away(on.heartbeat(&record("a", EDITION), LONG).await));
    }
    assert!(started.elapsed() < ENDS, "calls pile up");
    server.restart();
    back(&on).await;
    assert_eq!(on.digests(NODE, EDITION).await.unwrap(), vec![None; 256]);
    let answer = on.apply(NODE, EDITION, &[batch(7, 5, &[(1, 1)])]).await.unwrap();
    assert_eq!(answer, [(EDITION, digest(7, 5, &[(1, 1)]))]);
    assert_eq!(on.heartbeat(&record("a", EDITION), LONG).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_server_away_at_the_start_is_found_later() {
    let Some(mut server) = Valkey::start() else { return };
    server.kill();
    let on = fresh(&server.url(), TIMEOUT);
    assert!(is_away(on.heartbeat(&record("a", EDITION), LONG).await));
    server.restart();
    back(&on).await;
    on.heartbeat(&record("a", EDITION), LONG).await.unwrap();
}

#[tokio::test]
async fn a_server_flushed_of_data_and_scripts_knows_nothing_and_goes_on() {
    let Some(server) = Valkey::start() else { return };
    let on = fresh(&server.url(), ENDS);
    on.heartbeat(&record("a", EDITION), LONG).await.unwrap();
    on.apply(NODE, EDITION, &[batch(7, 4, &[(1, 1)])]).await.unwrap();
    assert_eq!(server.cli(&["flushall"]), "OK");
    assert_eq!(server.cli(&["script", "flush"]), "OK");
    assert_eq!(on.digests(NODE, EDITION).await.unwrap()[7], None);
    let answer = on.apply(NODE, EDITION, &[batch(7, 5, &[(2, 1)])]).await.unwrap();
    assert_eq!(answer, [(EDITION, digest(7, 5, &[(2, 1)]))]);
    assert_eq!(on.heartbeat(&record("b", EDITION), LONG).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_server_that_never_answers_holds_no_call_beyond_its_time() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    for scheme in ["redis", "redis+cluster"] {
        let on = Arc::new(fresh(&format!("{scheme}://127.0.0.1:{port}"), TIMEOUT));
        let started = Instant::now();
        let calls: Vec<_> = (0..100)
            .map(|_| {
                let on = Arc::clone(&on);
                tokio::spawn(async move { is_away(on.locate(&[key(7, 1)]).await) })
            })
            .collect();
        for call in calls {
            assert!(call.await.unwrap());
        }
        assert!(started.elapsed() < ENDS, "calls wait for one another");
    }
}

#[tokio::test]
async fn a_server_that_stops_answering_holds_no_call_beyond_its_time() {
    let Some(server) = Valkey::start() else { return };
    let on = fresh(&server.url(), TIMEOUT);
    on.apply(NODE, EDITION, &[batch(7, 1, &[(1, 1)])]).await.unwrap();
    assert_eq!(server.cli(&["client", "pause", "3000", "all"]), "OK");
    let started = Instant::now();
    assert!(is_away(on.locate(&[key(7, 1)]).await));
    for _ in 0..100 {
        assert!(is_away(on.locate(&[key(7, 1)]).await), "the pause is over too early");
        if started.elapsed() > 3 * TIMEOUT {
            break;
        }
    }
    back(&on).await;
    assert_eq!(on.locate(&[key(7, 1)]).await.unwrap()[0].len(), 1);
}

#[tokio::test]
async fn data_that_is_not_ours_is_refused_or_passed_over() {
    let Some(server) = Valkey::start() else { return };
    let on = client(&server.url(), "mixed", ENDS);
    on.heartbeat(&record("a", EDITION), LONG).await.unwrap();
    server.cli(&["set", "mixed:b07", "text"]);
    assert!(refusal(on.locate(&[key(7, 1)]).await).contains("another program"));
    assert!(refusal(on.apply(NODE, EDITION, &[batch(7, 1, &[(1, 1)])]).await).contains("another program"));
    assert!(refusal(on.digests(NODE, EDITION).await).contains("another program"));
    assert!(refusal(on.walk(Some(vec![7; 9])).await).contains("another program"));
    server.cli(&["hset", "mixed:b08", "field", "value", "0123456789abcdef", "odd"]);
    assert!(on.walk(Some([&[8][..], &[0; 8]].concat())).await.unwrap().0.is_empty());
    server.cli(&["hset", "mixed:nodes", "b", "odd", "c", &"\u{7f}".repeat(40)]);
    assert_eq!(on.heartbeat(&record("a", EDITION), LONG).await.unwrap().len(), 1);
    assert!(on.locate(&[key(9, 1)]).await.unwrap()[0].is_empty(), "the rest goes on");

    server.cli(&["hset", "later:nodes", "", "kvtier directory 2"]);
    let later = client(&server.url(), "later", ENDS);
    assert!(refusal(later.locate(&[key(1, 1)]).await).contains("another version"));
    assert!(refusal(later.heartbeat(&record("a", EDITION), LONG).await).contains("another version"));
    server.cli(&["hset", "theirs:nodes", "x", "y"]);
    assert!(
        refusal(client(&server.url(), "theirs", ENDS).heartbeat(&record("a", EDITION), LONG).await).contains("version")
    );
    server.cli(&["set", "text:nodes", "x"]);
    assert!(refusal(client(&server.url(), "text", ENDS).locate(&[key(1, 1)]).await).contains("another program"));
}

#[tokio::test]
async fn a_server_without_memory_or_that_wants_a_password_refuses_and_tears_nothing() {
    let Some(server) = Valkey::start() else { return };
    let on = fresh(&server.url(), ENDS);
    on.apply(NODE, EDITION, &[batch(7, 1, &[(1, 1)])]).await.unwrap();
    server.cli(&["config", "set", "maxmemory", "1"]);
    assert!(is_full(on.apply(NODE, EDITION, &[batch(7, 2, &[(1, 0), (2, 1), (3, 1)])]).await));
    assert_eq!(on.digests(NODE, EDITION).await.unwrap()[7], Some(digest(7, 1, &[(1, 1)])));
    assert_eq!(on.locate(&[key(7, 1)]).await.unwrap()[0].len(), 1);
    server.cli(&["config", "set", "maxmemory", "0"]);
    server.cli(&["config", "set", "requirepass", "secret"]);
    assert!(refusal(fresh(&server.url(), ENDS).locate(&[key(7, 1)]).await).contains("password"));
}

#[tokio::test]
async fn a_full_server_takes_what_makes_it_no_fuller() {
    let Some(server) = Valkey::start() else { return };
    let (on, other) = (fresh(&server.url(), ENDS), NodeNumber::new(2));
    on.heartbeat(&record("a", EDITION), LONG).await.unwrap();
    on.apply(NODE, EDITION, &[batch(7, 1, &[(1, 1), (2, 1), (3, 1)])]).await.unwrap();
    on.apply(other, EDITION, &[batch(7, 1, &[(1, 1), (2, 1)])]).await.unwrap();
    server.cli(&["config", "set", "maxmemory", "1"]);
    for id in ["a", "b"] {
        assert!(!on.heartbeat(&record(id, EDITION), LONG).await.unwrap().is_empty(), "{id} lives on");
    }
    assert!(is_full(on.apply(NODE, EDITION, &[batch(7, 2, &[(4, 1)])]).await));
    assert!(is_full(on.apply(NODE, EDITION, &[batch(7, 2, &[(1, 0), (4, 1)])]).await), "a record is no room for a key");
    // One that another node has too, one that nobody else has, another tier, and a key for a key.
    let batches = [(2, [(1, 0)]), (3, [(3, 0)]), (4, [(2, 4)])].map(|(sequence, one)| batch(7, sequence, &one));
    on.apply(NODE, EDITION, &batches).await.unwrap();
    on.apply(other, EDITION, &[batch(7, 2, &[(1, 0), (5, 2)])]).await.unwrap();
    assert_eq!(on.digests(NODE, EDITION).await.unwrap()[7], Some(digest(7, 4, &[(2, 4)])));
    assert_eq!(on.digests(other, EDITION).await.unwrap()[7], Some(digest(7, 2, &[(2, 1), (5, 2)])));

    let found = on.locate(&[key(7, 1), key(7, 2), key(7, 5)]).await.unwrap();
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [0, 2, 1]);
    assert_eq!(on.reap(&[(key(7, 2), found[1][1])]).await.unwrap(), 1, "another's stays there");
    assert_eq!(on.reap(&[(key(7, 5), found[2][0])]).await.unwrap(), 1);
    assert_eq!(on.digests(other, EDITION).await.unwrap()[7], None);
    assert_eq!(on.locate(&[key(7, 2)]).await.unwrap(), [vec![found[1][0]]]);
    // A node that starts over replaces what it had.
    let again = on.apply(NODE, EDITION.next(), &[batch(7, 1, &[(2, 4)])]).await.unwrap();
    assert_eq!(again, [(EDITION.next(), digest(7, 1, &[(2, 4)]))]);
}

/// Passes each connection on to the server whose port is named when it is opened; it stays with that one.
async fn proxy(to: u16) -> (String, Arc<AtomicU16>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("redis://{}", listener.local_addr().expect("it has an address"));
    let target = Arc::new(AtomicU16::new(to));
    let named = Arc::clone(&target);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let port = named.load(Ordering::Relaxed);
            tokio::spawn(async move {
                let mut server = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("the server listens");
                // How a connection ends is for its ends to see.
                drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
            });
        }
    });
    (url, target)
}

/// Beats until a heartbeat is taken.
async fn beats_again(on: &dyn Directory) {
    let deadline = Instant::now() + ENDS;
    while is_away(on.heartbeat(&record("a", EDITION), LONG).await) {
        assert!(Instant::now() < deadline, "the client does not leave a replica");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_server_that_became_a_replica_is_left_for_whom_its_name_leads_to() {
    let (Some(first), Some(second)) = (Valkey::start(), Valkey::start()) else { return };
    let (url, target) = proxy(first.port()).await;
    let on = client(&url, "renamed", ENDS);
    on.heartbeat(&record("a", EDITION), LONG).await.unwrap();
    assert_eq!(first.cli(&["exists", "renamed:nodes"]), "1");

    // Of a master that is not there: what counts is that it takes nothing.
    assert_eq!(first.cli(&["replicaof", "127.0.0.1", "1"]), "OK");
    assert!(is_away(on.heartbeat(&record("a", EDITION), LONG).await));
    target.store(second.port(), Ordering::Relaxed);
    beats_again(&on).await;
    assert_eq!(second.cli(&["exists", "renamed:nodes"]), "1");

    // One cut off from its master answers nothing at all.
    assert_eq!(first.cli(&["replicaof", "no", "one"]), "OK");
    assert_eq!(first.cli(&["flushall"]), "OK");
    assert_eq!(second.cli(&["config", "set", "replica-serve-stale-data", "no"]), "OK");
    assert_eq!(second.cli(&["replicaof", "127.0.0.1", "1"]), "OK");
    assert!(is_away(on.locate(&[key(7, 1)]).await));
    target.store(first.port(), Ordering::Relaxed);
    beats_again(&on).await;
    assert_eq!(first.cli(&["exists", "renamed:nodes"]), "1");
}

#[tokio::test]
async fn what_is_reaped_too_early_is_missing_from_its_digest() {
    let Some(server) = Valkey::start() else { return };
    let on = fresh(&server.url(), ENDS);
    on.apply(NODE, EDITION, &[batch(7, 1, &[(1, 1), (2, 2)])]).await.unwrap();
    let found = on.locate(&[key(7, 1), key(7, 2)]).await.unwrap();
    assert_eq!(on.reap(&[(key(7, 1), found[0][0])]).await.unwrap(), 1);
    assert_eq!(on.digests(NODE, EDITION).await.unwrap()[7], Some(digest(7, 1, &[(2, 2)])));
    assert_eq!(on.reap(&[(key(7, 2), found[1][0])]).await.unwrap(), 1);
    assert_eq!(on.digests(NODE, EDITION).await.unwrap()[7], None, "names that never come back leave nothing");
}

/// One step of the comparison with the table.
type Step = (u64, u64, Batch);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let change = (0..6_u32, 0..16_u8);
    let step = (0..3_u64, 0..4_u64, 0..2_u8, 0..7_u64, proptest::collection::vec(change, 0..9));
    let step = step.prop_map(|(node, edition, bucket, sequence, changes)| {
        let change = |(n, tiers): (u32, u8)| Change { key: key(bucket, n), tiers: Tiers::from_bits(tiers) };
        (node, edition, Batch { bucket, sequence, changes: changes.into_iter().map(change).collect() })
    });
    proptest::collection::vec(step, 1..60)
}

#[test]
fn batches_mean_what_they_mean_in_the_table() {
    let Some(server) = Valkey::start() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let keys: Vec<_> = (0..12).map(|n| key(u8::from(n >= 6), n % 6)).collect();
    proptest!(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() }, |(steps in steps())| {
        let on = fresh(&server.url(), ENDS);
        let mut table = Table::default();
        for (number, (node, edition, batch)) in steps.iter().enumerate() {
            let (node, edition) = (NodeNumber::new(*node), Edition::new(*edition));
            let answer = runtime.block_on(on.apply(node, edition, std::slice::from_ref(batch))).unwrap();
            prop_assert_eq!(answer[0], table.apply(node, edition, batch));
            if number % 8 == 7 {
                // Of whatever no longer counts, half.
                let counts = |(key, r): &(_, kvtier_policy::directory::Replica)| {
                    let key: &kvtier_policy::directory::DirectoryKey = key;
                    table.digests(r.node, r.edition)[usize::from(key.bucket())].is_some()
                };
                let dead: Vec<_> = table.page(None, 1000).into_iter().filter(|e| !counts(e)).step_by(2).collect();
                let removed = dead.iter().filter(|(key, replica)| table.remove(key, replica)).count();
                prop_assert_eq!(runtime.block_on(on.reap(&dead)).unwrap(), removed);
            }
        }
        prop_assert_eq!(runtime.block_on(on.locate(&keys)).unwrap(), table.locate(&keys));
        for node in (0..3).map(NodeNumber::new) {
            for edition in (0..4).map(Edition::new) {
                prop_assert_eq!(runtime.block_on(on.digests(node, edition)).unwrap(), table.digests(node, edition));
            }
        }
    });
}
