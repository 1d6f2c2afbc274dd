//! A real `kvtierd` of its own, in a scratch directory.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::net::UnixStream;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Longest a daemon may take to serve before the benchmark gives up.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often it is looked at meanwhile: the resolution of start-up times.
const START_POLL: Duration = Duration::from_millis(1);
/// Longest it may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    dir: PathBuf,
    /// From exec to an answer of "serving".
    pub(crate) startup: Duration,
}

impl Daemon {
    /// Starts one with its directories under `dir` and these lines of configuration, and waits until it serves.
    ///
    /// # Errors
    /// When there is no binary beside this one, or it does not serve in time.
    pub(crate) fn start(dir: &Path, config: &str) -> anyhow::Result<Self> {
        let run = dir.join("run");
        std::fs::create_dir_all(&run)?;
        let quoted = |path: &Path| format!("{:?}", path.display().to_string());
        let head = format!("run_dir = {}\ndata_dir = {}\n", quoted(&run), quoted(&dir.join("data")));
        let file = dir.join("kvtier.toml");
        std::fs::write(&file, format!("{head}[listen]\nhttp = \"127.0.0.1:0\"\n{config}\n"))?;
        let binary = std::env::current_exe()?.with_file_name("kvtierd");
        let log = File::create(dir.join("log"))?;
        let begin = Instant::now();
        let mut command = Command::new(&binary);
        command.arg("--config").arg(&file).arg("--log-json").stderr(log);
        let child = command.spawn().with_context(|| format!("cannot start {}: build it first", binary.display()))?;
        let mut this = Self { child, dir: dir.to_owned(), startup: Duration::ZERO };
        this.wait_until_serving(begin)?;
        this.startup = begin.elapsed();
        Ok(this)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("run/kvtierd.sock")
    }

    fn wait_until_serving(&mut self, begin: Instant) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        while begin.elapsed() < START_TIMEOUT {
            if let Some(status) = self.child.try_wait()? {
                bail!("kvtierd ended with {status}: {}", self.log());
            }
            if runtime.block_on(serves(&self.socket())) {
                return Ok(());
            }
            std::thread::sleep(START_POLL);
        }
        bail!("kvtierd does not serve: {}", self.log())
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// The value of a metric without labels.
    ///
    /// # Errors
    /// When the daemon does not answer or has no such metric.
    pub(crate) fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let log = self.log();
        let bound = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let mut bound = bound.filter_map(|line| line["fields"]["bound"].as_str().map(str::to_owned));
        let address = bound.next().context("the log has no HTTP address")?;
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.with_context(|| format!("no metric {name}"))
    }

    /// Asks it to stop and waits until it has.
    ///
    /// # Errors
    /// When it does not stop in time.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let begin = Instant::now();
        while self.child.try_wait()?.is_none() {
            if begin.elapsed() > STOP_TIMEOUT {
                bail!("kvtierd does not stop: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.child.kill();
        let _waited = self.child.wait();
    }
}

/// Whether a daemon answers the standard health check there.
async fn serves(socket: &Path) -> bool {
    if UnixStream::connect(socket).await.is_err() {
        return false;
    }
    let Ok(endpoint) = Endpoint::new(format!("unix://{}", socket.display())) else { return false };
    let Ok(channel) = endpoint.connect().await else { return false };
    let request = HealthCheckRequest { service: "kvtier.v1.Engine".into() };
    let answer = HealthClient::new(channel).check(request).await;
    answer.is_ok_and(|a| a.into_inner().status() == ServingStatus::Serving)
}
