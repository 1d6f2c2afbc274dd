//! What the UCX transport is started with, and what that means in UCX's own settings.

use std::path::PathBuf;
use std::time::Duration;

use super::raw::Setting;

/// UCX's names for transports over memory that processes share, and for sets of transports with them.
const SHARED_MEMORY: [&str; 6] = ["posix", "sysv", "sm", "shm", "mm", "all"];

/// How the UCX transport is started.
#[derive(Debug, Clone)]
pub struct UcxConfig {
    /// The library `libucp.so.0`; without one, the system's.
    pub library: Option<PathBuf>,
    /// UCX's transports (`UCX_TLS`), such as `rc,cma`; without, UCX chooses.
    pub tls: Option<String>,
    /// UCX's network devices (`UCX_NET_DEVICES`), such as `mlx5_0:1`; without, UCX chooses.
    pub net_devices: Option<String>,
    /// How often UCX asks whether a peer of a transport without connections still lives: a dead one is noticed by then.
    pub keepalive: Duration,
    /// Most bytes in flight per link.
    pub window_bytes: usize,
    /// Most frames exposed at once.
    pub max_exposures: usize,
    /// How long an extent that nothing exposes any more stays registered. Registering pins its pages, which takes about a
    /// second for some GiB on RDMA devices; while it is registered its memory is not given back.
    pub registration_linger: Duration,
}

impl Default for UcxConfig {
    fn default() -> Self {
        Self {
            library: None,
            tls: None,
            net_devices: None,
            keepalive: Duration::from_secs(1),
            window_bytes: 16 << 20,
            max_exposures: 1 << 20,
            registration_linger: Duration::from_secs(10),
        }
    }
}

impl UcxConfig {
    /// In UCX's words. They win over the environment's `UCX_*`.
    pub(super) fn settings(&self) -> Vec<Setting> {
        let keepalive = format!("{}ms", self.keepalive.as_millis().max(1));
        let mut settings = vec![Setting { name: "KEEPALIVE_INTERVAL", value: keepalive, required: false }];
        // Without it, shared memory is refused for endpoints that handle peer errors. UCX warns where nothing uses it.
        if self.tls.as_deref().is_none_or(|tls| SHARED_MEMORY.iter().any(|name| tls.contains(name))) {
            settings.push(Setting { name: "MM_ERROR_HANDLING", value: "y".to_owned(), required: false });
        }
        let chosen = [("TLS", &self.tls), ("NET_DEVICES", &self.net_devices)];
        for (name, value) in chosen {
            settings.extend(value.clone().map(|value| Setting { name, value, required: true }));
        }
        settings
    }
}
