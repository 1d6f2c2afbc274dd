//! The configuration file, `kvtier.toml`. Every field has a default; unknown fields are refused.

mod claims;
pub mod cluster;
mod derived;
mod device;
mod eviction;
mod programs;
pub mod rules;
pub mod tenants;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvtier_storage::DiskConfig;
use kvtier_types::NodeId;
use kvtier_types::hints::MAX_TTL;
use serde::Deserialize;

use crate::hints::Trust;
use crate::units::{ByteSize, Span};
pub use claims::Claims;
pub use cluster::{Cluster, Transport};
pub use device::Device;
pub use eviction::Eviction;
pub use programs::Programs;
pub use rules::Rules;
pub use tenants::{Operators, Tenancy, Tenant};

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of the node in replies and metrics; the host name by default.
    pub node_id: String,
    /// Directory of the sockets; engines must be able to reach it.
    pub run_dir: PathBuf,
    /// Directory of what survives restarts: the journal, and the disk and object tiers unless they name their own.
    pub data_dir: PathBuf,
    /// Addresses beside the Unix sockets.
    pub listen: Listen,
    /// Device memory.
    pub device: Device,
    /// Host memory.
    pub host: Host,
    /// The disk tier.
    pub disk: Disk,
    /// The object tier.
    pub object: Object,
    /// When blocks move to slower tiers.
    pub offload: Offload,
    /// The cluster this node is part of.
    pub cluster: Cluster,
    /// How bytes move between nodes.
    pub transport: Transport,
    /// How it evicts.
    pub eviction: Eviction,
    /// Budgets of claims.
    pub claims: Claims,
    /// Where the rules are.
    pub rules: Rules,
    /// What clients may say with their requests.
    pub hints: Hints,
    /// What the daemon does for programs on its own account.
    pub programs: Programs,
    /// Deadlines.
    pub limits: Limits,
    /// Who may act for all tenants.
    pub operators: Operators,
    /// Whose blocks are whose.
    pub tenants: Vec<Tenant>,
}

/// Addresses beside the Unix sockets. Neither is protected: bind them to an address only operators reach.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// gRPC control plane over TCP (never the Engine service); none by default.
    pub grpc: Option<SocketAddr>,
    /// Prometheus metrics and health over HTTP; none by default.
    pub http: Option<SocketAddr>,
    /// Permissions of the Unix sockets, octal; `0600` by default: only who runs the daemon, and root.
    pub socket_mode: Option<String>,
}

/// Host memory.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Host {
    /// Most memory for blocks.
    pub capacity: ByteSize,
    /// Size of an extent, the unit in which memory is taken and given back: at least four blocks, at most 1 GiB.
    pub extent: ByteSize,
    /// Best pages to try for: `huge`, `transparent` or `plain`.
    pub pages: String,
}

/// The disk tier.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Disk {
    /// Whether there is one.
    pub enabled: bool,
    /// Its directory; `data_dir/disk` by default.
    pub dir: Option<PathBuf>,
    /// Most bytes of log segments.
    pub capacity: ByteSize,
    /// Size of a log segment. Changing it wipes the tier.
    pub segment: ByteSize,
    /// How bytes move: `auto`, `uring` or `threads`.
    pub io: String,
    /// Transfers in the kernel at once.
    pub depth: u32,
    /// Bypass the page cache where the file system can.
    pub direct: bool,
    /// Most bytes a second that are written on the daemon's own account; as many as come where it is not set.
    pub write_rate: Option<ByteSize>,
}

/// The object tier.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Object {
    /// Whether there is one.
    pub enabled: bool,
    /// `file:///directory` or `s3://bucket`; `data_dir/object` by default.
    pub url: Option<String>,
    /// Path below which everything lies, in a folder of the node's name: give each node a name of its own, and all nodes
    /// of a cluster one prefix, so that they find each other's blocks.
    pub prefix: String,
    /// Most bytes of this node's packs.
    pub capacity: ByteSize,
    /// Most bytes of all nodes' packs: beyond, those whose nodes are gone are deleted, oldest first.
    pub cluster_capacity: ByteSize,
    /// Which blocks are written: `read` (those that were read at least once), `all`, or `none` (only a drain writes).
    pub write: String,
    /// How often other nodes' new packs are looked for, beside what heartbeats tell.
    pub list_every: Span,
    /// S3 only: server, for others than AWS.
    pub endpoint: Option<String>,
    /// S3 only: region.
    pub region: String,
    /// S3 only: environment variables that hold the access key id and the secret key.
    pub credentials_env: Option<[String; 2]>,
    /// S3 only: allow plain HTTP.
    pub allow_http: bool,
}

/// When blocks move to slower tiers.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Offload {
    /// `eager`: as soon as a block is sealed; `watermark`: when host memory is nearly full.
    pub mode: String,
    /// Share of host memory in percent at which `watermark` starts.
    pub high_watermark_percent: u8,
    /// Movements down at once.
    pub max_in_flight: usize,
    /// Movements up at once.
    pub max_onboards_in_flight: usize,
}

/// What clients may say with their requests.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hints {
    /// How far they are believed: `none`, `identity` or `all`.
    pub trust: Trust,
    /// Longest that anything is kept because a client, or `ApplyHints`, said so.
    pub max_ttl: Span,
    /// Most memory for what `ApplyHints` left for requests to come; a quarter of it for one tenant.
    pub store: ByteSize,
}

/// Deadlines.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Longest a lookup may wait for slower tiers, whatever the engine asks.
    pub lookup: Span,
    /// How long a lease lives without a heartbeat.
    pub lease_ttl: Span,
    /// How long a frame may stay reserved and unsealed.
    pub reserve_ttl: Span,
    /// Silence after which an engine's process is taken for dead.
    pub attachment_ttl: Span,
    /// How long a stop may take to finish what is under way.
    pub drain: Span,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_id: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            run_dir: default_run_dir(),
            data_dir: default_data_dir(),
            listen: Listen::default(),
            device: Device::default(),
            host: Host::default(),
            disk: Disk::default(),
            object: Object::default(),
            offload: Offload::default(),
            cluster: Cluster::default(),
            transport: Transport::default(),
            eviction: Eviction::default(),
            claims: Claims::default(),
            rules: Rules::default(),
            hints: Hints::default(),
            programs: Programs::default(),
            limits: Limits::default(),
            operators: Operators::default(),
            tenants: Vec::new(),
        }
    }
}

impl Default for Hints {
    fn default() -> Self {
        Self { trust: Trust::default(), max_ttl: Span(Duration::from_secs(3_600)), store: ByteSize(16 << 20) }
    }
}

impl Default for Host {
    fn default() -> Self {
        Self { capacity: ByteSize(4 << 30), extent: ByteSize(256 << 20), pages: "transparent".into() }
    }
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            enabled: true,
            dir: None,
            capacity: ByteSize(16 << 30),
            segment: ByteSize(DiskConfig::SEGMENT_BYTES),
            io: "auto".into(),
            depth: DiskConfig::DEPTH,
            direct: true,
            write_rate: None,
        }
    }
}

impl Default for Object {
    fn default() -> Self {
        Self {
            enabled: false,
            url: None,
            prefix: "kvtier".into(),
            capacity: ByteSize(64 << 30),
            cluster_capacity: ByteSize(1 << 40),
            write: "read".into(),
            list_every: Span(Duration::from_secs(30)),
            endpoint: None,
            region: "us-east-1".into(),
            credentials_env: None,
            allow_http: false,
        }
    }
}

impl Default for Offload {
    fn default() -> Self {
        Self { mode: "eager".into(), high_watermark_percent: 80, max_in_flight: 16, max_onboards_in_flight: 32 }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            lookup: Span(Duration::from_secs(5)),
            lease_ttl: Span(Duration::from_secs(30)),
            reserve_ttl: Span(Duration::from_secs(60)),
            attachment_ttl: Span(Duration::from_secs(15)),
            drain: Span(Duration::from_secs(20)),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not valid; the message names line and field.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A field's value is out of range.
    #[error("{field}: {reason}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong, and what to write instead.
        reason: String,
    },
}

impl Config {
    /// Reads and checks a file; without one, the defaults.
    ///
    /// # Errors
    /// [`ConfigError`] naming file, line or field.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let mut config = match path {
            None => Self::default(),
            Some(path) => {
                let read = |source| ConfigError::Read { path: path.to_owned(), source };
                let text = std::fs::read_to_string(path).map_err(read)?;
                let parse = |source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) };
                toml::from_str(&text).map_err(parse)?
            }
        };
        config.take_environment();
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let field = |field, reason: String| Err(ConfigError::Field { field, reason });
        let (capacity, extent) = (self.host.capacity, self.host.extent);
        if extent.0 < 1 << 20 || extent.0 > 1 << 30 || !extent.0.is_multiple_of(2 << 20) && extent.0 != 1 << 20 {
            return field("host.extent", format!("{extent} is not a multiple of 2 MiB between 1 MiB and 1 GiB"));
        }
        if self.disk.write_rate.is_some_and(|rate| rate.0 == 0) {
            return field("disk.write_rate", "nothing could be written: leave it out for as much as comes".into());
        }
        if let Err(error) = NodeId::new(&self.node_id) {
            return field("node_id", error.to_string());
        }
        if capacity < extent {
            return field("host.capacity", format!("{capacity} is less than one extent of {extent}"));
        }
        if !(1..=100).contains(&self.offload.high_watermark_percent) {
            return field("offload.high_watermark_percent", "must be 1 to 100".into());
        }
        if self.offload.max_in_flight == 0 || self.offload.max_onboards_in_flight == 0 {
            return field("offload", "at least one movement at once".into());
        }
        if self.limits.lookup.0 > Duration::from_secs(60) {
            return field("limits.lookup", "at most 60s: an engine's request waits for it".into());
        }
        if self.hints.max_ttl.0 > MAX_TTL {
            return field("hints.max_ttl", "at most 720h".into());
        }
        self.page_kind()?;
        self.eager()?;
        self.write_behind()?;
        self.check_cluster()?;
        self.check_device()?;
        self.check_claims()?;
        self.check_programs()?;
        self.socket_mode()?;
        self.tenancy()?;
        if self.disk.enabled {
            self.disk_config()?;
        }
        if self.object.enabled {
            self.object_config()?;
        }
        Ok(())
    }

    /// Path of the gRPC socket.
    #[must_use]
    pub fn grpc_socket(&self) -> PathBuf {
        self.run_dir.join("kvtierd.sock")
    }

    /// Path of the descriptor socket.
    #[must_use]
    pub fn fd_socket(&self) -> PathBuf {
        self.run_dir.join("kvtierd.fd.sock")
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn default_run_dir() -> PathBuf {
    if is_root() {
        return PathBuf::from("/run/kvtier");
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    runtime.unwrap_or_else(std::env::temp_dir).join(format!("kvtier-{}", rustix::process::geteuid().as_raw()))
}

fn default_data_dir() -> PathBuf {
    if is_root() {
        return PathBuf::from("/var/lib/kvtier");
    }
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_else(std::env::temp_dir);
    home.join(".local/share/kvtier")
}

#[cfg(test)]
mod tests;
