//! Where the servers are: the forms of a directory's URL.

use std::fmt;

/// Most servers a URL or a cluster may name.
pub(super) const MAX_SERVERS: usize = 1024;
/// What servers listen on unless told otherwise.
const DEFAULT_PORT: u16 = 6379;

/// A server's address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Address {
    pub(super) host: String,
    pub(super) port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Address {
    /// Reads `host`, `host:port`, `[v6]:port`, and `v6:port` as servers write it in redirections.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (host, port) = match text.rsplit_once(':') {
            Some((_, after)) if after.ends_with(']') => (text, DEFAULT_PORT),
            Some((host, port)) => (host, port.parse().ok()?),
            None => (text, DEFAULT_PORT),
        };
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
        let ok = !host.is_empty() && host.len() <= 253 && host.chars().all(plain) && port != 0;
        ok.then(|| Self { host: host.to_owned(), port })
    }
}

/// The servers to begin with, and whether they form a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) cluster: bool,
    pub(super) seeds: Vec<Address>,
}

/// Why a URL is none.
pub(super) fn parse(url: &str) -> Result<Place, String> {
    let (scheme, rest) = url.split_once("://").ok_or("it has no scheme")?;
    let cluster = match scheme {
        "redis" | "valkey" => false,
        "redis+cluster" | "valkey+cluster" => true,
        "rediss" | "valkeys" | "rediss+cluster" | "valkeys+cluster" => {
            return Err("TLS is not built in: use a network that needs none, or a local TLS proxy".into());
        }
        other => return Err(format!("its scheme {other:?} is none of redis, valkey, redis+cluster, valkey+cluster")),
    };
    if rest.contains('@') {
        return Err("it holds a user or password: those have settings of their own".into());
    }
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let seeds: Option<Vec<_>> = rest.split(',').map(Address::parse).collect();
    let seeds = seeds.ok_or("what follows the scheme is no host:port, nor several with commas between them")?;
    if seeds.len() > MAX_SERVERS || (!cluster && seeds.len() > 1) {
        return Err("too many servers: several are for a cluster".into());
    }
    Ok(Place { cluster, seeds })
}

#[cfg(test)]
mod tests {
    use super::{Address, parse};

    #[test]
    fn urls_name_one_server_or_a_cluster_of_several() {
        let address = |host: &str, port| Address { host: host.into(), port };
        for (url, cluster, seeds) in [
            ("redis://a:1", false, vec![address("a", 1)]),
            ("valkey://a/", false, vec![address("a", 6379)]),
            ("redis://[::1]:7", false, vec![address("::1", 7)]),
            ("redis+cluster://a:1,b:2", true, vec![address("a", 1), address("b", 2)]),
        ] {
            let place = parse(url).unwrap();
            assert_eq!((place.cluster, place.seeds), (cluster, seeds), "{url}");
        }
        for bad in [
            "a:1",
            "http://a:1",
            "redis://",
            "redis://a:x",
            "redis://a:0",
            "redis://a,b",
            "redis://u:p@a:1",
            "rediss://a:1",
            "redis://a:1/x",
            "redis+cluster://a:1,,b:1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
