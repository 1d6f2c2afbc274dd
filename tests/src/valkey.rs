//! Valkey or Redis servers of a test's own: on free ports, with directories of their own, killed when dropped.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::wait::{until, within};

/// Names a server may be installed under, each with its client's.
const PROGRAMS: [(&str, &str); 2] = [("valkey-server", "valkey-cli"), ("redis-server", "redis-cli")];
/// Times a port that someone else took meanwhile is given up for another.
const TRIES: usize = 8;
/// How long a server may take to answer before its port is given up.
const START: Duration = Duration::from_secs(10);
/// What a server's second port lies above its first by: the cluster bus.
const BUS: u16 = 10_000;

/// The server's and the client's program, or `None`, said loudly, where there is none.
#[must_use]
pub fn installed() -> Option<(&'static str, &'static str)> {
    let runs = |program: &str| {
        let status = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.is_ok_and(|s| s.success())
    };
    let found = PROGRAMS.into_iter().find(|(server, client)| runs(server) && runs(client));
    if found.is_none() {
        eprintln!("SKIPPED: neither valkey-server nor redis-server is installed");
    }
    found
}

/// A server without persistence: once killed, it comes back empty.
#[derive(Debug)]
pub struct Valkey {
    server: &'static str,
    client: &'static str,
    port: u16,
    dir: PathBuf,
    cluster: bool,
    child: Option<Child>,
}

impl Valkey {
    /// Starts one, or answers `None`, said loudly, where none is installed.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start() -> Option<Self> {
        Self::start_as(false)
    }

    /// Starts masters that form a cluster.
    ///
    /// # Panics
    /// If they do not.
    #[must_use]
    pub fn start_cluster(masters: usize) -> Option<Vec<Self>> {
        let servers: Option<Vec<_>> = (0..masters).map(|_| Self::start_as(true)).collect();
        let servers = servers?;
        let mut create = Command::new(servers.first()?.client);
        create.args(["--cluster", "create"]).args(servers.iter().map(Self::address)).arg("--cluster-yes");
        let made = create.stdin(Stdio::null()).output().expect("the client runs");
        assert!(made.status.success(), "no cluster: {}", String::from_utf8_lossy(&made.stdout));
        for server in &servers {
            until("the cluster to be whole", || {
                server.cli(&["cluster", "info"]).contains("cluster_state:ok").then_some(())
            });
        }
        Some(servers)
    }

    fn start_as(cluster: bool) -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let (server, client) = installed()?;
        let name = format!("kvtier-valkey-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).expect("a directory for the server");
        let mut one = Self { server, client, port: 0, dir, cluster, child: None };
        for _ in 0..TRIES {
            one.port = free_port();
            one.spawn();
            if within(START, || one.alive().then_some(())).is_some() {
                return Some(one);
            }
            one.kill();
        }
        panic!("{server} does not start");
    }

    fn spawn(&mut self) {
        let mut command = Command::new(self.server);
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no"]);
        command.arg("--port").arg(self.port.to_string()).arg("--dir").arg(&self.dir);
        if self.cluster {
            command.args(["--cluster-enabled", "yes", "--cluster-node-timeout", "5000"]);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.child = Some(child.expect("the server's program runs"));
    }

    fn alive(&self) -> bool {
        self.cli(&["info", "server"]).contains(&format!("process_id:{}", self.child.as_ref().map_or(0, Child::id)))
    }

    /// `host:port`.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The URL of it alone.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// What its client prints, without the line's end.
    ///
    /// # Panics
    /// If the client cannot be run.
    pub fn cli(&self, args: &[&str]) -> String {
        let port = self.port.to_string();
        let output = Command::new(self.client).args(["-h", "127.0.0.1", "-p", &port]).args(args).output();
        String::from_utf8_lossy(&output.expect("the client runs").stdout).trim_end().to_owned()
    }

    /// Kills it without warning.
    ///
    /// # Panics
    /// If it cannot be killed.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("the server can be killed");
            child.wait().expect("the server ends");
        }
    }

    /// Starts it again after [`Self::kill`], on the same port, holding nothing.
    ///
    /// # Panics
    /// If it does not start.
    pub fn restart(&mut self) {
        self.kill();
        self.spawn();
        until("the server to be back", || self.alive().then_some(()));
    }
}

impl Drop for Valkey {
    fn drop(&mut self) {
        self.kill();
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            eprintln!("left {} behind: {error}", self.dir.display());
        }
    }
}

/// The URL of a cluster.
#[must_use]
pub fn cluster_url(servers: &[Valkey]) -> String {
    let addresses: Vec<_> = servers.iter().map(Valkey::address).collect();
    format!("redis+cluster://{}", addresses.join(","))
}

/// A port that is free now, as is the one for the cluster bus above it.
fn free_port() -> u16 {
    until("a pair of free ports", || {
        let listener = TcpListener::bind("127.0.0.1:0").ok()?;
        let port = listener.local_addr().ok()?.port();
        TcpListener::bind(("127.0.0.1", port.checked_add(BUS)?)).ok()?;
        Some(port)
    })
}
