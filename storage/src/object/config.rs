//! Where packs go, how large and how late they are, and how patient the tier is.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use crate::store::StorageError;

/// Configuration of [`super::ObjectStoreTier`].
#[derive(Debug, Clone)]
pub struct ObjectConfig {
    /// Which store.
    pub place: ObjectPlace,
    /// Path below which everything lies, without slashes at the ends; may be empty. Exactly one daemon may write below a
    /// prefix: it deletes packs in which nothing is alive by its own account. Others may delete there once this one is
    /// dead: see [`super::Floor::collect`].
    pub prefix: String,
    /// Most bytes of packs.
    pub capacity_bytes: u64,
    /// A pack is sealed when it has this many bytes; a longer record gets a pack of its own.
    pub pack_bytes: u64,
    /// A pack is sealed this long after its first record at the latest.
    pub max_linger: Duration,
    /// Most bytes staged or being uploaded, and as many being read; at least one record is let through.
    pub max_inflight_bytes: u64,
    /// How long calls try.
    pub retry: RetryPolicy,
    /// How long recovery tries.
    pub recovery: RecoveryLimits,
}

impl ObjectConfig {
    /// The defaults for `place`: 8 MiB packs, 500 ms linger, 64 MiB in flight.
    #[must_use]
    pub fn new(place: ObjectPlace, capacity_bytes: u64) -> Self {
        Self {
            place,
            prefix: "kvtier".into(),
            capacity_bytes,
            pack_bytes: 8 << 20,
            max_linger: Duration::from_millis(500),
            max_inflight_bytes: 64 << 20,
            retry: RetryPolicy::default(),
            recovery: RecoveryLimits::default(),
        }
    }
}

/// An object store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObjectPlace {
    /// A directory, created if need be. Durable: files and directories are fsynced.
    Local(PathBuf),
    /// An S3 bucket, which must exist.
    S3(S3Place),
}

/// An S3 bucket and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Place {
    /// The bucket.
    pub bucket: String,
    /// URL of the server; `None` for AWS.
    pub endpoint: Option<String>,
    /// The region; servers other than AWS's mostly take any.
    pub region: String,
    /// Environment variables that hold the access key id and the secret; `None` for the platform's own credentials
    /// (instance or pod identity, or the usual `AWS_` variables).
    pub credentials: Option<S3CredentialNames>,
    /// Whether plain HTTP is allowed.
    pub allow_http: bool,
    /// Whether the bucket is in the host name rather than in the path.
    pub virtual_hosted: bool,
}

/// Names of environment variables, never the secrets themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3CredentialNames {
    /// Variable that holds the access key id.
    pub access_key: String,
    /// Variable that holds the secret access key.
    pub secret_key: String,
}

impl S3Place {
    /// A bucket in AWS with the platform's credentials.
    #[must_use]
    pub fn new(bucket: &str) -> Self {
        Self {
            bucket: bucket.to_owned(),
            endpoint: None,
            region: "us-east-1".into(),
            credentials: None,
            allow_http: false,
            virtual_hosted: false,
        }
    }
}

/// A place that is neither `file:///path`, nor an absolute path, nor `s3://bucket`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a place for objects: expected file:///absolute/path, /absolute/path or s3://bucket")]
pub struct UnknownPlace(pub String);

impl FromStr for ObjectPlace {
    type Err = UnknownPlace;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        if let Some(bucket) = s.strip_prefix("s3://") {
            let bucket = bucket.trim_end_matches('/');
            let plain = !bucket.is_empty() && !bucket.contains('/');
            return if plain { Ok(Self::S3(S3Place::new(bucket))) } else { Err(UnknownPlace(s.to_owned())) };
        }
        let path = PathBuf::from(s.strip_prefix("file://").unwrap_or(s));
        if path.is_absolute() { Ok(Self::Local(path)) } else { Err(UnknownPlace(s.to_owned())) }
    }
}

/// How long calls try before they say [`StorageError::Unavailable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Most attempts of a call, at least 1.
    pub attempts: u32,
    /// Pause after the first failed attempt; it doubles with each further one.
    pub first_backoff: Duration,
    /// Longest pause.
    pub max_backoff: Duration,
    /// Longest attempt.
    pub attempt_timeout: Duration,
    /// Longest read of a record or footer, retries included.
    pub read_deadline: Duration,
    /// Longest upload of a pack, or deletion, retries included.
    pub write_deadline: Duration,
    /// How long calls fail at once after one exhausted its retries; then a probe decides.
    pub fail_fast: Duration,
}

impl RetryPolicy {
    /// The pause after failed attempt number `attempt`, counted from 1.
    pub(super) fn backoff(&self, attempt: u32) -> Duration {
        let doublings = attempt.saturating_sub(1).min(16);
        self.first_backoff.saturating_mul(1 << doublings).min(self.max_backoff)
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 5,
            first_backoff: Duration::from_millis(50),
            max_backoff: Duration::from_secs(2),
            attempt_timeout: Duration::from_secs(10),
            read_deadline: Duration::from_secs(10),
            write_deadline: Duration::from_secs(30),
            fail_fast: Duration::from_secs(5),
        }
    }
}

/// How long, and how widely, footers are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoveryLimits {
    /// Footers read at once.
    pub concurrency: usize,
    /// How long opening waits for recovery before it leaves it to [`super::ObjectStoreTier::recover`].
    pub open_wait: Duration,
    /// Longest round of background recovery; the next one goes on with the footers not read yet.
    pub round: Duration,
}

impl Default for RecoveryLimits {
    fn default() -> Self {
        Self { concurrency: 16, open_wait: Duration::from_secs(10), round: Duration::from_secs(120) }
    }
}

impl ObjectPlace {
    /// The client for it. Does no network I/O.
    ///
    /// # Errors
    /// [`StorageError::Open`] when the configuration cannot work.
    pub(super) fn connect(&self, retry: &RetryPolicy) -> Result<Arc<dyn ObjectStore>, StorageError> {
        match self {
            Self::Local(path) => {
                let refuse = |reason: String| StorageError::Open { what: path.display().to_string(), reason };
                std::fs::create_dir_all(path).map_err(|e| refuse(e.to_string()))?;
                let store = LocalFileSystem::new_with_prefix(path).map_err(|e| refuse(e.to_string()))?;
                Ok(Arc::new(store.with_fsync(true)))
            }
            Self::S3(place) => place.connect(retry),
        }
    }
}

impl S3Place {
    fn connect(&self, retry: &RetryPolicy) -> Result<Arc<dyn ObjectStore>, StorageError> {
        let refuse = |reason: String| StorageError::Open { what: format!("s3://{}", self.bucket), reason };
        let secret = |name: &str| {
            std::env::var(name).map_err(|_| refuse(format!("environment variable {name} (a credential) is not set")))
        };
        let builder = match &self.credentials {
            None => AmazonS3Builder::from_env(),
            Some(names) => AmazonS3Builder::new()
                .with_access_key_id(secret(&names.access_key)?)
                .with_secret_access_key(secret(&names.secret_key)?),
        };
        let client =
            ClientOptions::new().with_timeout(retry.attempt_timeout).with_connect_timeout(retry.attempt_timeout);
        let no_retries =
            RetryConfig { backoff: BackoffConfig::default(), max_retries: 0, retry_timeout: retry.attempt_timeout };
        let mut builder = builder
            .with_bucket_name(&self.bucket)
            .with_region(&self.region)
            .with_client_options(client)
            .with_allow_http(self.allow_http)
            .with_virtual_hosted_style_request(self.virtual_hosted)
            // Plain DELETE: not every server knows the bulk request.
            .with_disable_bulk_delete(true)
            .with_retry(no_retries);
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        Ok(Arc::new(builder.build().map_err(|e| refuse(e.to_string()))?))
    }
}

impl ObjectConfig {
    /// The path below which packs lie: `<prefix>/v1`.
    pub(super) fn root(&self) -> Result<Path, StorageError> {
        let prefix = Path::parse(&self.prefix)
            .map_err(|e| StorageError::Open { what: format!("prefix {:?}", self.prefix), reason: e.to_string() })?;
        Ok(prefix.join("v2"))
    }

    /// Whether it is within its bounds.
    ///
    /// # Errors
    /// [`StorageError::Open`], which says what is not.
    pub fn check(&self) -> Result<(), StorageError> {
        let bounds = [
            ("pack_bytes is 0 or above 1 GiB", self.pack_bytes == 0 || self.pack_bytes > 1 << 30),
            ("capacity_bytes is below two packs", self.capacity_bytes < 2 * self.pack_bytes),
            ("max_inflight_bytes is below pack_bytes", self.max_inflight_bytes < self.pack_bytes),
            ("max_inflight_bytes is above 1 TiB", self.max_inflight_bytes > 1 << 40),
            ("retry.attempts is 0", self.retry.attempts == 0),
            ("recovery.concurrency is 0", self.recovery.concurrency == 0),
        ];
        match bounds.into_iter().find(|(_, broken)| *broken) {
            None => Ok(()),
            Some((what, _)) => Err(StorageError::Open { what: "the object tier".into(), reason: what.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_parse() {
        assert_eq!("file:///a/b".parse(), Ok(ObjectPlace::Local("/a/b".into())));
        assert_eq!("/a/b".parse(), Ok(ObjectPlace::Local("/a/b".into())));
        assert_eq!("s3://bucket/".parse(), Ok(ObjectPlace::S3(S3Place::new("bucket"))));
        for bad in ["", "a/b", "s3://", "s3://b/prefix", "http://x"] {
            assert!(bad.parse::<ObjectPlace>().is_err(), "{bad}");
        }
    }

    #[test]
    fn backoff_doubles_up_to_its_bound() {
        let retry = RetryPolicy::default();
        let millis = |n| retry.backoff(n).as_millis();
        assert_eq!([millis(1), millis(2), millis(3), millis(100)], [50, 100, 200, 2000]);
    }

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        let mut config = ObjectConfig::new("/tmp/x".parse().unwrap(), 1);
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains("capacity_bytes"), "{error}");
        config.capacity_bytes = 1 << 30;
        config.check().unwrap();
    }
}
