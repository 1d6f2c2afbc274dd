//! The object tier over a real S3 server. Needs `tests/s3/ceph-radosgw.sh start DIR` and its environment:
//!
//! ```text
//! KVTIER_TEST_S3              endpoint; without it everything here is skipped, loudly
//! KVTIER_TEST_S3_BUCKET       a bucket that exists
//! KVTIER_TEST_S3_ACCESS_KEY   credentials
//! KVTIER_TEST_S3_SECRET_KEY
//! KVTIER_TEST_S3_RIG          "SCRIPT DIR" of the rig, to kill its gateway; without it that test is skipped, loudly
//! ```

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use kvtier_storage::conformance::{self, Fixture, Opened, get, put};
use kvtier_storage::object::{
    ObjectConfig, ObjectPlace, ObjectStoreTier, RecoveryLimits, RetryPolicy, S3CredentialNames, S3Place,
};
use kvtier_storage::{BlockStore, StorageError};
use tokio::sync::Mutex;

/// The tests share one server, and one of them kills it.
static SERVER: Mutex<()> = Mutex::const_new(());

const FAIL_FAST: Duration = Duration::from_millis(300);

/// A fresh prefix of the test bucket, `None` (said loudly) where there is no server.
fn config(test: &str) -> Option<ObjectConfig> {
    static PREFIXES: AtomicU32 = AtomicU32::new(0);
    let Ok(endpoint) = std::env::var("KVTIER_TEST_S3") else {
        eprintln!("SKIPPED: {test}: KVTIER_TEST_S3 is not set; see tests/s3/ceph-radosgw.sh");
        return None;
    };
    let bucket = std::env::var("KVTIER_TEST_S3_BUCKET").expect("KVTIER_TEST_S3_BUCKET names the test bucket");
    let credentials = S3CredentialNames {
        access_key: "KVTIER_TEST_S3_ACCESS_KEY".into(),
        secret_key: "KVTIER_TEST_S3_SECRET_KEY".into(),
    };
    let place =
        S3Place { endpoint: Some(endpoint), credentials: Some(credentials), allow_http: true, ..S3Place::new(&bucket) };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("the clock is set").as_nanos();
    Some(ObjectConfig {
        prefix: format!("test/{now}-{}", PREFIXES.fetch_add(1, Ordering::Relaxed)),
        pack_bytes: 1 << 20,
        max_linger: Duration::from_millis(5),
        max_inflight_bytes: 4 << 20,
        retry: RetryPolicy {
            attempts: 3,
            first_backoff: Duration::from_millis(20),
            fail_fast: FAIL_FAST,
            ..RetryPolicy::default()
        },
        recovery: RecoveryLimits { open_wait: Duration::from_secs(30), ..RecoveryLimits::default() },
        ..ObjectConfig::new(ObjectPlace::S3(place), 6 << 20)
    })
}

async fn open(config: &ObjectConfig) -> (ObjectStoreTier, kvtier_storage::object::Recovered) {
    ObjectStoreTier::open(config.clone()).await.expect("the configuration is right")
}

struct Prefix(ObjectConfig);

#[async_trait]
impl Fixture for Prefix {
    async fn open(&self) -> Opened {
        let (tier, recovered) = open(&self.0).await;
        assert!(recovered.complete && recovered.notes.is_empty(), "{:?}", recovered.notes);
        Opened { store: Arc::new(tier), records: recovered.records }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms_over_s3() {
    let _server = SERVER.lock().await;
    if config("conforms_over_s3").is_none() {
        return;
    }
    conformance::suite(|| Prefix(config("conforms_over_s3").expect("set above"))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_credentials_and_a_missing_bucket_are_unavailable_not_a_failure_to_open() {
    let _server = SERVER.lock().await;
    let Some(good) = config("wrong_credentials") else { return };
    let ObjectPlace::S3(place) = good.place.clone() else { panic!("configured as S3") };
    let swapped = S3CredentialNames {
        access_key: "KVTIER_TEST_S3_SECRET_KEY".into(),
        secret_key: "KVTIER_TEST_S3_ACCESS_KEY".into(),
    };
    let wrong =
        [S3Place { credentials: Some(swapped), ..place.clone() }, S3Place { bucket: "no-such-bucket".into(), ..place }];
    for place in wrong {
        let (tier, recovered) = open(&ObjectConfig { place: ObjectPlace::S3(place), ..good.clone() }).await;
        assert!(!recovered.complete);
        eprintln!("note: {}", recovered.notes[0]);
        assert!(is_unavailable(&put(&tier, 1, 1000).await));
        close(&tier).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outlives_a_server_that_is_killed() {
    let _server = SERVER.lock().await;
    let Some(config) = config("outlives_a_server_that_is_killed") else { return };
    let Some(rig) = Rig::from_env() else {
        eprintln!("SKIPPED: outlives_a_server_that_is_killed: KVTIER_TEST_S3_RIG is not set");
        return;
    };
    let (tier, _) = open(&config).await;
    let tier = Arc::new(tier);
    let mut stored = Vec::new();
    for n in 0..8 {
        let (meta, at) = put(&*tier, n, 100_000).await.expect("the server is up");
        stored.push((n, meta, at));
    }
    // Killed while records are on their way: what is acknowledged is there afterwards, the rest is Unavailable.
    let writes = (100..130).map(|n| {
        let tier = Arc::clone(&tier);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis((n - 100) * 10)).await;
            (n, put(&*tier, n, 100_000).await)
        })
    });
    let writes: Vec<_> = writes.collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    rig.run("kill-gateway");
    let mut refused = 0;
    for write in writes {
        match write.await.expect("no panic") {
            (n, Ok((meta, at))) => stored.push((n, meta, at)),
            (_, result) => {
                assert!(is_unavailable(&result), "{result:?}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0, "the kill came too late to test anything");
    let (_, meta, at) = stored[0].clone();
    assert!(is_unavailable(&get(&*tier, 0, &meta, at).await));
    let begun = Instant::now();
    for n in 0..1000 {
        assert!(is_unavailable(&put(&*tier, 1000 + n, 100).await));
        assert!(is_unavailable(&get(&*tier, 0, &meta, at).await));
    }
    let fast = begun.elapsed();
    eprintln!("{} acknowledged, {refused} refused; 2,000 calls of a dead store took {fast:?}", stored.len());
    assert!(fast < Duration::from_secs(2), "calls of a dead store wait: {fast:?}");
    let (other, recovered) = open(&ObjectConfig { prefix: config.prefix.clone(), ..config.clone() }).await;
    assert!(!recovered.complete, "opening beside a dead store is not an error");
    close(&other).await;

    rig.run("start-gateway");
    let begun = Instant::now();
    while !(get(&*tier, 0, &meta, at).await.is_ok() && put(&*tier, 2000, 1000).await.is_ok()) {
        assert!(begun.elapsed() < Duration::from_secs(60), "it does not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eprintln!("back {:?} after the server", begun.elapsed());
    for (n, meta, at) in &stored {
        get(&*tier, *n, meta, *at).await.expect("what was acknowledged is there");
    }
    close(&tier).await;
    let (tier, recovered) = open(&config).await;
    for (n, meta, _) in &stored {
        let (_, at) = recovered.records.iter().find(|(found, _)| found == meta).expect("and recovered");
        get(&tier, *n, meta, *at).await.expect("and read");
    }
    close(&tier).await;
}

/// The rig's script and directory.
struct Rig(Vec<String>);

impl Rig {
    fn from_env() -> Option<Self> {
        let rig = std::env::var("KVTIER_TEST_S3_RIG").ok()?;
        Some(Self(rig.split_whitespace().map(str::to_owned).collect()))
    }

    fn run(&self, command: &str) {
        let status = Command::new(&self.0[0]).arg(command).arg(&self.0[1]).status().expect("the rig's script runs");
        assert!(status.success(), "{command}: {status}");
    }
}

async fn close(tier: &ObjectStoreTier) {
    tier.close(Duration::from_secs(60)).await.expect("closes in time");
}

fn is_unavailable<T>(result: &Result<T, StorageError>) -> bool {
    matches!(result, Err(StorageError::Unavailable { .. }))
}
