//! Where a daemon is reached: a Unix socket or a TCP address.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where a daemon of the system listens.
const SYSTEM_SOCKET: &str = "/run/kvtier/kvtierd.sock";

/// An address of a daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket, absolute or relative to the working directory.
    Unix(PathBuf),
    /// `http://host:port`.
    Http(String),
}

impl Address {
    /// Where a daemon listens that was not told where: the system's, or this user's own if that one runs.
    #[must_use]
    pub fn of_this_user() -> Self {
        let uid = rustix::process::geteuid();
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).unwrap_or_else(std::env::temp_dir);
        let own = runtime.join(format!("kvtier-{}", uid.as_raw())).join("kvtierd.sock");
        Self::Unix(if !uid.is_root() && own.exists() { own } else { PathBuf::from(SYSTEM_SOCKET) })
    }

    /// The socket's path, if it is one.
    #[must_use]
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Http(_) => None,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Http(url) => f.write_str(url),
        }
    }
}

/// An address in a form that is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected unix:///path/to/kvtierd.sock, a path with a slash, or http://host:port")]
pub struct BadAddress;

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        if let Some(path) = s.strip_prefix("unix://").or_else(|| s.strip_prefix("unix:")) {
            return if path.is_empty() { Err(BadAddress) } else { Ok(Self::Unix(PathBuf::from(path))) };
        }
        if let Some(authority) = s.strip_prefix("http://") {
            let host = authority.trim_end_matches('/');
            let plain = !host.is_empty() && !host.contains('/') && !host.starts_with(':');
            return if plain { Ok(Self::Http(format!("http://{host}"))) } else { Err(BadAddress) };
        }
        if s.contains('/') && !s.contains("://") { Ok(Self::Unix(PathBuf::from(s))) } else { Err(BadAddress) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_sockets_paths_and_http() {
        for (text, printed) in [
            ("unix:///run/k.sock", "unix:///run/k.sock"),
            ("unix:/run/k.sock", "unix:///run/k.sock"),
            ("/run/k.sock", "unix:///run/k.sock"),
            ("./k.sock", "unix://./k.sock"),
            ("http://10.0.0.1:7400", "http://10.0.0.1:7400"),
            ("http://node-1:7400/", "http://node-1:7400"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), printed);
        }
    }

    #[test]
    fn refuses_other_forms() {
        for text in [
            "",
            "unix://",
            "kvtierd.sock",
            "http://",
            "http:///x",
            "http://:80",
            "http://h/x",
            "https://h:1",
            "tcp://h:1",
        ] {
            assert_eq!(text.parse::<Address>(), Err(BadAddress), "{text}");
        }
    }
}
