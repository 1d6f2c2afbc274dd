//! The directory in Valkey or Redis: 1,000 keys of 100,000 located, in one server and in a cluster of three.
//!
//! Baselines in the cluster, of the same crate: `MGET` of the same 1,000 keys as plain strings over its cluster client, and,
//! without a bound, the directory's own questions put to each master as one pipeline by hand, answers unread.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use kvtier_policy::directory::{DirectoryKey, NodeRecord};
use kvtier_tests::valkey::{Valkey, cluster_url};
use kvtier_types::{Edition, NodeNumber};
use kvtierd::directory::{Directory, ValkeyConfig, ValkeyDirectory, conformance};
use redis::aio::MultiplexedConnection;
use redis::cluster_async::ClusterConnection;
use redis::{Client, Value, cmd, pipe};

use crate::Setting;
use crate::report::{Floor, Report, Row};
use crate::stats::Round;

/// Entries of each of the 256 buckets: 100,000 in all.
const PER_BUCKET: u32 = 391;
const KEYS: usize = 1000;
/// Sets of keys that questions go through.
const WINDOWS: usize = 10;
const MASTERS: usize = 3;
const TTL: Duration = Duration::from_secs(3600);

pub(crate) fn run(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let Some(alone) = Valkey::start() else {
        report.note("skipped: the directory, because there is neither valkey-server nor redis-server".to_owned());
        return Ok(());
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let rounds = if setting.quick { 50 } else { 500 };
    let used = used_memory(&alone)?;
    let directory = runtime.block_on(filled(&alone.url()))?;
    let entries = f64::from(PER_BUCKET) * 256.0;
    let per_entry = (used_memory(&alone)? - used) / entries;
    let micros = runtime.block_on(async {
        let mut micros = Vec::new();
        for number in 0..rounds {
            micros.push(locate(&directory, &keys(number)).await? * 1e6);
        }
        anyhow::Ok(micros)
    })?;
    report.add(Row::value("directory: 1,000 keys located", "us", micros, Floor::AtMost(2000.0)));
    report.add(Row::value("directory: server memory per entry", "B", vec![per_entry], Floor::None));
    drop(alone);

    let servers = Valkey::start_cluster(MASTERS).context("the server was there before")?;
    let taken = runtime.block_on(in_cluster(&servers, rounds))?;
    let pick = |baseline: fn(&[f64; 3]) -> f64| -> Vec<Round> {
        taken.iter().map(|t| Round { subject_s: t[0], baseline_s: baseline(t) }).collect()
    };
    let name = "directory: 1,000 keys located, 3 masters";
    report.add(Row::times(name, &pick(|t| t[1]), "MGET", Floor::AtMost(1.3)));
    report.add(Row::times(name, &pick(|t| t[2]), "pipelines by hand", Floor::None));
    Ok(())
}

fn used_memory(server: &Valkey) -> anyhow::Result<f64> {
    let info = server.cli(&["info", "memory"]);
    let used = info.lines().find_map(|line| line.strip_prefix("used_memory:"));
    Ok(used.context("the server does not tell its memory")?.trim().parse()?)
}

/// Key `n` of those there are, spread over the buckets.
fn key(n: usize) -> DirectoryKey {
    let bucket = u8::try_from(n % 256).expect("below 256");
    conformance::key(bucket, u32::try_from(n / 256).expect("benchmarks have 100,000 keys"))
}

/// A set of keys.
fn keys(window: usize) -> Vec<DirectoryKey> {
    let first = window % WINDOWS * KEYS;
    (first..first + KEYS).map(key).collect()
}

/// A directory with one node's entries.
async fn filled(url: &str) -> anyhow::Result<ValkeyDirectory> {
    let config = ValkeyConfig { url: url.to_owned(), timeout: Duration::from_secs(30), ..ValkeyConfig::default() };
    let directory = ValkeyDirectory::open(&config)?;
    let record: NodeRecord = conformance::record("bench", Edition::first(1));
    directory.heartbeat(&record, TTL).await?;
    let entries: Vec<_> = (0..PER_BUCKET).map(|n| (n, 1)).collect();
    let batches: Vec<_> = (0..=255).map(|bucket| conformance::batch(bucket, 1, &entries)).collect();
    directory.apply(NodeNumber::new(1), record.edition, &batches).await?;
    Ok(directory)
}

/// Seconds until the keys are located.
async fn locate(directory: &ValkeyDirectory, keys: &[DirectoryKey]) -> anyhow::Result<f64> {
    let begin = Instant::now();
    let found = directory.locate(keys).await?;
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(found.iter().all(|replicas| replicas.len() == 1), "an entry is missing");
    Ok(seconds)
}

/// Seconds of our way, of a plain multi-get, and of pipelines by hand, by round.
async fn in_cluster(servers: &[Valkey], rounds: usize) -> anyhow::Result<Vec<[f64; 3]>> {
    let directory = filled(&cluster_url(servers)).await?;
    let client = redis::cluster::ClusterClient::new(servers.iter().map(Valkey::url).collect::<Vec<_>>())?;
    let mut plain = client.get_async_connection().await?;
    for window in 0..WINDOWS {
        let mut set = cmd("MSET");
        for key in keys(window) {
            // As long as an entry of one replica.
            set.arg(key.as_bytes()).arg(&[7_u8; 17]);
        }
        set.query_async::<()>(&mut plain).await?;
    }
    let mut by_hand = ByHand::open(servers).await?;
    let mut taken = Vec::new();
    for number in 0..rounds {
        let keys = keys(number);
        let mut round = [0.0; 3];
        for step in 0..3 {
            let which = (step + number) % 3;
            round[which] = match which {
                0 => locate(&directory, &keys).await?,
                1 => multi_get(&mut plain, &keys).await?,
                _ => by_hand.ask(&keys).await?,
            };
        }
        taken.push(round);
    }
    Ok(taken)
}

async fn multi_get(on: &mut ClusterConnection, keys: &[DirectoryKey]) -> anyhow::Result<f64> {
    let begin = Instant::now();
    let mut get = cmd("MGET");
    get.arg(keys.iter().map(DirectoryKey::as_bytes).collect::<Vec<_>>());
    let values: Vec<Option<Vec<u8>>> = get.query_async(on).await?;
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(values.len() == keys.len() && values.iter().all(Option::is_some), "a value is missing");
    Ok(seconds)
}

/// A connection to each master, and which of them has each bucket.
struct ByHand {
    masters: Vec<MultiplexedConnection>,
    owners: Vec<usize>,
}

impl ByHand {
    async fn open(servers: &[Valkey]) -> anyhow::Result<Self> {
        let mut masters = Vec::new();
        for server in servers {
            masters.push(Client::open(server.url())?.get_multiplexed_async_connection().await?);
        }
        let mut owners = vec![usize::MAX; 256];
        for (master, connection) in masters.iter_mut().enumerate() {
            for (bucket, owner) in owners.iter_mut().enumerate() {
                // Those that have it not answer with a redirection.
                if cmd("HLEN").arg(name(bucket)).query_async::<u64>(connection).await.is_ok() {
                    *owner = master;
                }
            }
        }
        ensure!(owners.iter().all(|owner| *owner < masters.len()), "a bucket has no master");
        Ok(Self { masters, owners })
    }

    async fn ask(&mut self, keys: &[DirectoryKey]) -> anyhow::Result<f64> {
        let begin = Instant::now();
        let mut by_bucket: Vec<Vec<&DirectoryKey>> = vec![Vec::new(); 256];
        keys.iter().for_each(|key| by_bucket[usize::from(key.bucket())].push(key));
        let mut pipes = vec![pipe(); self.masters.len()];
        for (bucket, keys) in by_bucket.iter().enumerate().filter(|(_, keys)| !keys.is_empty()) {
            let mut get = cmd("HMGET");
            get.arg(name(bucket)).arg(keys.iter().map(|key| key.as_bytes()).collect::<Vec<_>>());
            pipes[self.owners[bucket]].add_command(get);
        }
        let asked = pipes.iter().zip(&mut self.masters).map(|(pipe, master)| pipe.query_async::<Vec<Value>>(master));
        futures::future::try_join_all(asked).await?;
        Ok(begin.elapsed().as_secs_f64())
    }
}

/// What the directory calls a bucket in the server.
fn name(bucket: usize) -> String {
    format!("{}:b{bucket:02x}", ValkeyConfig::default().prefix)
}
