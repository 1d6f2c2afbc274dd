//! What the UCX transport is started with, and what that means in UCX's own settings.

use std::path::PathBuf;
use std::time::Duration;

use super::raw::Setting;

/// UCX's names for transports over memory that processes share, and for sets of transports with them.
const SHARED_MEMORY: [&str; 6] = ["posix", "sysv", "sm", "shm", "mm", "all"];
/// The same for sockets.
const SOCKETS: [&str; 2] = ["tcp", "all"];
/// Bytes of one message over a socket. UCX sends 8 KiB with each system call and receives 64 KiB; what is sent must fit into
/// what the peer receives, so both are set.
const SEGMENT: &str = "64k";
/// UCX's first version whose `ucp_config_modify` knows a transport's settings by the same names as the environment.
const PREFIXES_SINCE: (u16, u16) = (1, 17);

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
    /// In the words of UCX of this version. They win over the environment's `UCX_*`.
    pub(super) fn settings(&self, version: (u16, u16)) -> Vec<Setting> {
        let keepalive = format!("{}ms", self.keepalive.as_millis().max(1));
        let mut settings = vec![Setting { name: "KEEPALIVE_INTERVAL", value: keepalive, required: false }];
        // UCX warns of settings that nothing uses.
        let names = |of: &[&str]| self.tls.as_deref().map(|tls| of.iter().any(|name| tls.contains(name)));
        let excluded = self.tls.as_deref().is_some_and(|tls| tls.starts_with('^'));
        // Of an exclusion of some the others are left.
        if names(&SHARED_MEMORY).is_none_or(|named| named || excluded) {
            // Without it, shared memory is refused for endpoints that handle peer errors.
            settings.push(Setting { name: "MM_ERROR_HANDLING", value: "y".to_owned(), required: false });
        }
        // Among named devices those of sockets may be missing.
        if names(&SOCKETS).map_or(self.net_devices.is_none(), |named| named != excluded) {
            let segments = if version < PREFIXES_SINCE {
                ["TX_SEG_SIZE", "RX_SEG_SIZE"]
            } else {
                ["TCP_TX_SEG_SIZE", "TCP_RX_SEG_SIZE"]
            };
            settings.extend(segments.map(|name| Setting { name, value: SEGMENT.to_owned(), required: false }));
        }
        let chosen = [("TLS", &self.tls), ("NET_DEVICES", &self.net_devices)];
        for (name, value) in chosen {
            settings.extend(value.clone().map(|value| Setting { name, value, required: true }));
        }
        settings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_have_the_names_of_the_version_and_only_where_something_uses_them() {
        let names = |tls: Option<&str>, version| -> Vec<&str> {
            let config = UcxConfig { tls: tls.map(str::to_owned), ..UcxConfig::default() };
            config.settings(version).iter().map(|setting| setting.name).collect()
        };
        let all = ["KEEPALIVE_INTERVAL", "MM_ERROR_HANDLING", "TCP_TX_SEG_SIZE", "TCP_RX_SEG_SIZE"];
        assert_eq!(names(None, (1, 22)), all);
        assert_eq!(names(Some("tcp"), (1, 16)), ["KEEPALIVE_INTERVAL", "TX_SEG_SIZE", "RX_SEG_SIZE", "TLS"]);
        assert_eq!(names(Some("rc,cma"), (1, 17)), ["KEEPALIVE_INTERVAL", "TLS"]);
        assert_eq!(names(Some("^tcp"), (1, 17)), ["KEEPALIVE_INTERVAL", "MM_ERROR_HANDLING", "TLS"]);
        let of_posix = ["KEEPALIVE_INTERVAL", "MM_ERROR_HANDLING", "TCP_TX_SEG_SIZE", "TCP_RX_SEG_SIZE", "TLS"];
        assert_eq!(names(Some("^sysv"), (1, 17)), of_posix);
    }
}
