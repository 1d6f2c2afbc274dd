//! The cluster's part of the configuration.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{Config, ConfigError};
use crate::directory::{ValkeyConfig, ValkeyDirectory};
use crate::units::{ByteSize, Span};

/// The cluster this node is part of.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// `embedded`: this node is alone. `redis://host:port`, `valkey://host:port`, or, for a server in cluster mode,
    /// `redis+cluster://host:port,host:port` (or `valkey+cluster://`).
    pub directory: String,
    /// What every key in the directory begins with: another one for each cluster that shares a server.
    pub prefix: String,
    /// Environment variable that holds the directory's password; none by default.
    pub password_env: Option<String>,
    /// Where the Peer service listens. Not encrypted: an address that only the cluster's nodes reach.
    pub listen: SocketAddr,
    /// Host or address under which peers reach this node; that of `listen` by default. `KVTIER_ADVERTISE` overrides it.
    pub advertise: Option<String>,
    /// How often the node says that it lives. Five silent ones and it counts as dead.
    pub heartbeat: Span,
    /// Longest the directory may take to answer.
    pub directory_timeout: Span,
    /// Whether a stop first gives what only this node holds to others, within `limits.drain`.
    pub drain_on_stop: bool,
}

/// How bytes move between nodes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Transport {
    /// Transports to use, best first: `ucx`, `tcp`. Both ends must have one; falling back is logged.
    pub order: Vec<String>,
    /// Where TCP transfers listen. Not encrypted.
    pub tcp_listen: SocketAddr,
    /// TCP connections to one peer.
    pub tcp_streams: usize,
    /// Path of `libucp.so.0`; found by the system's loader by default.
    pub ucx_library: Option<PathBuf>,
    /// UCX's own choice of transports (its `UCX_TLS`); UCX chooses by default.
    pub ucx_tls: Option<String>,
    /// UCX's network devices (its `UCX_NET_DEVICES`); UCX chooses by default.
    pub ucx_net_devices: Option<String>,
    /// Most bytes on their way from peers at once.
    pub max_in_flight: ByteSize,
    /// How long one source may take for a block before another one is tried.
    pub patience: Span,
    /// How long one source may take for a block when there is no other.
    pub deadline: Span,
    /// How long a peer's frames are leased for one batch of reads.
    pub lease: Span,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            directory: "embedded".into(),
            prefix: "kvtier".into(),
            password_env: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 7471)),
            advertise: None,
            heartbeat: Span(Duration::from_secs(1)),
            directory_timeout: Span(Duration::from_secs(1)),
            drain_on_stop: true,
        }
    }
}

impl Default for Transport {
    fn default() -> Self {
        Self {
            order: vec!["ucx".into(), "tcp".into()],
            tcp_listen: SocketAddr::from(([127, 0, 0, 1], 7472)),
            tcp_streams: 4,
            ucx_library: None,
            ucx_tls: None,
            ucx_net_devices: None,
            max_in_flight: ByteSize(256 << 20),
            patience: Span(Duration::from_secs(2)),
            deadline: Span(Duration::from_secs(10)),
            lease: Span(Duration::from_secs(15)),
        }
    }
}

impl Cluster {
    /// Whether the node is alone.
    #[must_use]
    pub fn is_embedded(&self) -> bool {
        self.directory == "embedded"
    }
}

impl Config {
    /// What the environment says of a node where one configuration serves many.
    pub(super) fn take_environment(&mut self) {
        if let Ok(node) = std::env::var("KVTIER_NODE_ID") {
            self.node_id = node;
        }
        if let Ok(host) = std::env::var("KVTIER_ADVERTISE") {
            self.cluster.advertise = Some(host);
        }
    }

    pub(super) fn check_cluster(&self) -> Result<(), ConfigError> {
        let field = |field, reason: String| Err(ConfigError::Field { field, reason });
        let (cluster, transport) = (&self.cluster, &self.transport);
        if let Some(bad) = transport.order.iter().find(|t| !matches!(t.as_str(), "ucx" | "tcp")) {
            return field("transport.order", format!("{bad:?} is not ucx or tcp"));
        }
        if cluster.is_embedded() {
            return Ok(());
        }
        // The password need not be at hand where a configuration is only checked.
        let without_password = ValkeyConfig { password_env: None, ..self.valkey() };
        if let Err(bad) = ValkeyDirectory::open(&without_password) {
            return field("cluster.directory", bad.to_string());
        }
        if transport.order.is_empty() {
            return field("transport.order", "at least one of ucx, tcp".into());
        }
        if !(1..=64).contains(&transport.tcp_streams) {
            return field("transport.tcp_streams", "must be 1 to 64".into());
        }
        let beat = cluster.heartbeat.0;
        if beat < Duration::from_millis(50) || beat > Duration::from_secs(60) {
            return field("cluster.heartbeat", "must be 50ms to 60s".into());
        }
        if cluster.listen.ip().is_unspecified() && cluster.advertise.is_none() {
            let reason =
                format!("peers cannot reach {}: set cluster.advertise or KVTIER_ADVERTISE", cluster.listen.ip());
            return field("cluster.listen", reason);
        }
        if transport.patience.0 > transport.deadline.0 {
            return field("transport.patience", "must not be longer than transport.deadline".into());
        }
        if transport.lease.0 < Duration::from_secs(2) || transport.lease.0 > kvtier_policy::MAX_EXPORT_TTL {
            return field("transport.lease", "must be 2s to 60s".into());
        }
        Ok(())
    }

    /// The directory client's part.
    #[must_use]
    pub fn valkey(&self) -> ValkeyConfig {
        ValkeyConfig {
            url: self.cluster.directory.clone(),
            prefix: self.cluster.prefix.clone(),
            user: None,
            password_env: self.cluster.password_env.clone(),
            timeout: self.cluster.directory_timeout.0,
        }
    }

    /// Host under which peers reach this node.
    #[must_use]
    pub fn advertised_host(&self) -> String {
        self.cluster.advertise.clone().unwrap_or_else(|| self.cluster.listen.ip().to_string())
    }
}
