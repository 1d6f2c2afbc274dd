//! The directory in Valkey or Redis, standalone or cluster.
//!
//! How the data lies there is drawn in `format`; what must not be torn is done by scripts in the server.
//!
//! *Bounds*: a call ends within the configured timeout, whatever the servers do; while a server is away, calls fail at
//! once between two attempts to connect; one that is full takes what makes it no fuller. *Trust*: what a server answers is
//! checked; what is no data of ours is refused or passed over with a warning.

mod format;
mod place;
mod route;
mod scripts;
mod server;
mod slots;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kvtier_policy::directory::{BUCKETS, Batch, Digest, DirectoryKey, NodeRecord, Replica};
use kvtier_types::{Edition, NodeId, NodeNumber};
use redis::{Cmd, Value, cmd};
use tokio::time::Instant;

use self::route::{Op, Router};
use self::server::Login;
use super::{Cursor, Directory, DirectoryError};

/// Fields a step of the walk looks at.
const WALK_COUNT: usize = 1000;
/// Entries of one run of the reaping script: short enough not to hold up the server.
const REAP_AT_ONCE: usize = 512;
/// Longest prefix.
const MAX_PREFIX: usize = 64;

/// Where the directory is and how to use it.
#[derive(Debug, Clone)]
pub struct ValkeyConfig {
    /// `redis://host:port` or `valkey://host:port` for one server, `redis+cluster://host:port,host:port` for a cluster.
    pub url: String,
    /// What all its keys begin with: one for each kvtier cluster. Letters, digits, `-`, `_`, `.` and `:`.
    pub prefix: String,
    /// User to log in as, if not the default one.
    pub user: Option<String>,
    /// Environment variable that holds the password.
    pub password_env: Option<String>,
    /// Longest that a call takes.
    pub timeout: Duration,
}

impl Default for ValkeyConfig {
    fn default() -> Self {
        let (url, prefix) = ("redis://127.0.0.1:6379".to_owned(), "kvtier".to_owned());
        Self { url, prefix, user: None, password_env: None, timeout: Duration::from_secs(1) }
    }
}

/// A setting that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("bad directory setting {field}: {reason}")]
pub struct BadValkeyConfig {
    /// The setting.
    pub field: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

/// The directory in Valkey or Redis.
#[derive(Debug)]
pub struct ValkeyDirectory {
    router: Router,
    timeout: Duration,
    nodes: Keyed,
    buckets: Vec<Keyed>,
    /// Whether the data was seen to be of our format. Heartbeats look every time.
    checked: AtomicBool,
}

/// A key of the server and its slot.
#[derive(Debug)]
struct Keyed {
    key: String,
    slot: u16,
}

impl Keyed {
    fn new(key: String) -> Self {
        Self { slot: slots::slot_of(key.as_bytes()), key }
    }

    fn op(&self, command: Cmd) -> Op {
        Op { slot: self.slot, command }
    }
}

impl ValkeyDirectory {
    /// Makes the client. It connects when it is first used: a server that is away is no error here.
    ///
    /// # Errors
    /// [`BadValkeyConfig`].
    pub fn open(config: &ValkeyConfig) -> Result<Self, BadValkeyConfig> {
        let bad = |field, reason: String| BadValkeyConfig { field, reason };
        let place = place::parse(&config.url).map_err(|reason| bad("url", reason))?;
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
        let prefix = &config.prefix;
        if prefix.is_empty() || prefix.len() > MAX_PREFIX || !prefix.bytes().all(plain) {
            return Err(bad("prefix", format!("1 to {MAX_PREFIX} letters, digits, '-', '_', '.' and ':'")));
        }
        if config.timeout.is_zero() {
            return Err(bad("timeout", "it is zero".to_owned()));
        }
        let password = config
            .password_env
            .as_ref()
            .map(|name| std::env::var(name).map_err(|_| bad("password_env", format!("{name} is not set"))));
        let login = Login { user: config.user.clone(), password: password.transpose()? };
        Ok(Self {
            router: Router::new(place, login),
            timeout: config.timeout,
            nodes: Keyed::new(format!("{prefix}:nodes")),
            buckets: (0..BUCKETS).map(|bucket| Keyed::new(format!("{prefix}:b{bucket:02x}"))).collect(),
            checked: AtomicBool::new(false),
        })
    }

    fn bucket(&self, bucket: u8) -> &Keyed {
        &self.buckets[usize::from(bucket)]
    }

    /// Runs commands on data that is of our format.
    async fn run(&self, ops: &[Op]) -> Result<Vec<Value>, DirectoryError> {
        let deadline = Instant::now() + self.timeout;
        if !self.checked.load(Ordering::Acquire) {
            self.check(deadline).await?;
        }
        self.router.run(ops, deadline).await
    }

    /// Looks whether the data is of our format; a directory that is empty has none yet.
    async fn check(&self, deadline: Instant) -> Result<(), DirectoryError> {
        let mut read = cmd("HGET");
        read.arg(&self.nodes.key).arg("");
        match self.router.run(&[self.nodes.op(read)], deadline).await?.pop() {
            Some(Value::BulkString(found)) if found == format::FORMAT.as_bytes() => {
                self.checked.store(true, Ordering::Release);
                Ok(())
            }
            Some(Value::Nil) => Ok(()),
            _ => Err(self.router.refused("data of another version lies under our prefix: change it")),
        }
    }

    fn nonsense(&self, what: &str) -> DirectoryError {
        self.router.refused(format!("{what} is not what we store: another program's data lies under our prefix"))
    }

    /// A digest as the scripts and buckets give it.
    fn digest(&self, value: &Value) -> Result<(Edition, Digest), DirectoryError> {
        let read = bytes(value).and_then(format::digest);
        read.ok_or_else(|| self.nonsense("a digest"))
    }
}

#[async_trait]
impl Directory for ValkeyDirectory {
    async fn heartbeat(&self, record: &NodeRecord, ttl: Duration) -> Result<Vec<NodeRecord>, DirectoryError> {
        let written = format::record(record).map_err(|reason| self.router.refused(reason))?;
        let ttl = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).min(1 << 40);
        let mut beat = self.router.scripts.heartbeat.run(&self.nodes.key);
        beat.arg(format::FORMAT).arg(record.id.as_str()).arg(ttl).arg(written);
        let answer = self.router.run(&[self.nodes.op(beat)], Instant::now() + self.timeout).await;
        self.checked.store(answer.is_ok(), Ordering::Release);
        let answer = answer?.pop();
        let Some(Value::Array(records)) = answer else { return Err(self.nonsense("the list of nodes")) };
        let mut live = Vec::with_capacity(records.len());
        for value in &records {
            match bytes(value).and_then(format::read_record) {
                Some(record) => live.push(record),
                None => tracing::warn!(key = self.nodes.key, "passed over a node's record that cannot be read"),
            }
        }
        live.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        Ok(live)
    }

    async fn apply(
        &self,
        node: NodeNumber,
        edition: Edition,
        batches: &[Batch],
    ) -> Result<Vec<(Edition, Digest)>, DirectoryError> {
        let op = |batch: &Batch| {
            let bucket = self.bucket(batch.bucket);
            let mut apply = self.router.scripts.apply.run(&bucket.key);
            apply.arg(&format::node_field(node)).arg(&edition.get().to_be_bytes());
            apply.arg(&batch.sequence.to_be_bytes()).arg(format::changes(batch));
            bucket.op(apply)
        };
        let ops: Vec<_> = batches.iter().map(op).collect();
        self.run(&ops).await?.iter().map(|value| self.digest(value)).collect()
    }

    async fn locate(&self, keys: &[DirectoryKey]) -> Result<Vec<Vec<Replica>>, DirectoryError> {
        let mut by_bucket: Vec<Vec<usize>> = vec![Vec::new(); BUCKETS];
        for (index, key) in keys.iter().enumerate() {
            by_bucket[usize::from(key.bucket())].push(index);
        }
        let asked: Vec<_> = self.buckets.iter().zip(by_bucket).filter(|(_, indexes)| !indexes.is_empty()).collect();
        let op = |(bucket, indexes): &(&Keyed, Vec<usize>)| {
            let mut get = cmd("HMGET");
            get.arg(&bucket.key);
            for index in indexes {
                get.arg(keys[*index].as_bytes());
            }
            bucket.op(get)
        };
        let ops: Vec<_> = asked.iter().map(op).collect();
        let answers = self.run(&ops).await?;
        let mut found: Vec<Vec<Replica>> = vec![Vec::new(); keys.len()];
        for ((bucket, indexes), answer) in asked.iter().zip(&answers) {
            let Value::Array(values) = answer else { return Err(self.nonsense("a bucket")) };
            if values.len() != indexes.len() {
                return Err(self.nonsense("a bucket"));
            }
            for (index, value) in indexes.iter().zip(values) {
                match bytes(value).map(format::entries) {
                    Some(Some(replicas)) => found[*index] = replicas,
                    Some(None) => tracing::warn!(key = bucket.key, "passed over an entry that cannot be read"),
                    None => {}
                }
            }
        }
        Ok(found)
    }

    async fn digests(&self, node: NodeNumber, edition: Edition) -> Result<Vec<Option<Digest>>, DirectoryError> {
        let op = |bucket: &Keyed| {
            let mut get = cmd("HGET");
            get.arg(&bucket.key).arg(&format::node_field(node));
            bucket.op(get)
        };
        let ops: Vec<_> = self.buckets.iter().map(op).collect();
        let of_edition = |value: &Value| match value {
            Value::Nil => Ok(None),
            value => self.digest(value).map(|(of, digest)| (of == edition).then_some(digest)),
        };
        self.run(&ops).await?.iter().map(of_edition).collect()
    }

    async fn walk(
        &self,
        from: Option<Cursor>,
    ) -> Result<(Vec<(DirectoryKey, Replica)>, Option<Cursor>), DirectoryError> {
        let from = from.map_or(Some(Position::default()), |cursor| Position::read(&cursor));
        let from = from.ok_or_else(|| self.router.refused("that is no position of its walk"))?;
        let bucket = self.bucket(from.bucket);
        let mut scan = cmd("HSCAN");
        scan.arg(&bucket.key).arg(from.within).arg("COUNT").arg(WALK_COUNT);
        let answer = self.run(&[bucket.op(scan)]).await?.pop();
        let (within, fields) = answer.as_ref().and_then(scanned).ok_or_else(|| self.nonsense("a bucket"))?;
        let mut page = Vec::new();
        for pair in fields.chunks_exact(2) {
            let entry = bytes(&pair[0]).zip(bytes(&pair[1])).and_then(|(f, v)| format::entry_field(f, v));
            let replicas = entry.into_iter().flat_map(|(key, of_key)| of_key.into_iter().map(move |r| (key, r)));
            page.extend(replicas);
        }
        Ok((page, from.next(within).map(Position::write)))
    }

    async fn reap(&self, entries: &[(DirectoryKey, Replica)]) -> Result<usize, DirectoryError> {
        let mut by_bucket: Vec<Vec<&(DirectoryKey, Replica)>> = vec![Vec::new(); BUCKETS];
        for entry in entries {
            by_bucket[usize::from(entry.0.bucket())].push(entry);
        }
        let mut ops = Vec::new();
        for (bucket, entries) in self.buckets.iter().zip(&by_bucket) {
            for some in entries.chunks(REAP_AT_ONCE) {
                let mut packed = Vec::new();
                for (key, replica) in some {
                    packed.extend_from_slice(key.as_bytes());
                    format::put_entry(&mut packed, replica);
                }
                let mut reap = self.router.scripts.reap.run(&bucket.key);
                reap.arg(packed);
                ops.push(bucket.op(reap));
            }
        }
        let count = |value: &Value| match value {
            Value::Int(count) => usize::try_from(*count).map_err(|_| self.nonsense("a count")),
            _ => Err(self.nonsense("a count")),
        };
        self.run(&ops).await?.iter().map(count).sum()
    }

    async fn leave(&self, node: &NodeId, edition: Edition) -> Result<(), DirectoryError> {
        let mut leave = self.router.scripts.leave.run(&self.nodes.key);
        leave.arg(node.as_str()).arg(&edition.get().to_be_bytes());
        self.run(&[self.nodes.op(leave)]).await?;
        Ok(())
    }
}

/// Where a walk is: a bucket, and the server's cursor within it.
#[derive(Debug, Clone, Copy, Default)]
struct Position {
    bucket: u8,
    within: u64,
}

impl Position {
    fn read(cursor: &[u8]) -> Option<Self> {
        let (bucket, within) = cursor.split_first()?;
        Some(Self { bucket: *bucket, within: u64::from_be_bytes(within.try_into().ok()?) })
    }

    fn write(self) -> Cursor {
        let mut cursor = vec![self.bucket];
        cursor.extend_from_slice(&self.within.to_be_bytes());
        cursor
    }

    /// The position after a step that left the server's cursor at `within`.
    fn next(self, within: u64) -> Option<Self> {
        match within {
            0 => self.bucket.checked_add(1).map(|bucket| Self { bucket, within: 0 }),
            within => Some(Self { within, ..self }),
        }
    }
}

/// The cursor and the fields and values of an answer to `HSCAN`.
fn scanned(value: &Value) -> Option<(u64, &[Value])> {
    let Value::Array(parts) = value else { return None };
    let [cursor, Value::Array(fields)] = parts.as_slice() else { return None };
    let cursor = std::str::from_utf8(bytes(cursor)?).ok()?.parse().ok()?;
    Some((cursor, fields))
}

fn bytes(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.as_bytes()),
        _ => None,
    }
}
