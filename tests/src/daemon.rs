//! A `kvtierd` process with directories of its own.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use kvtier_proto::v1;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::rpc::Control;
use crate::wait::{PATIENCE, until, within};

/// Bytes of the log shown when a test fails.
const LOG_TAIL: u64 = 6_000;

/// How a daemon is configured.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Host memory.
    pub host_mib: u64,
    /// Length of an extent.
    pub extent_mib: u64,
    /// Capacity of the disk tier, `None` for none.
    pub disk_mib: Option<u64>,
    /// Length of a log segment.
    pub segment_mib: u64,
    /// Whether the disk tier may bypass the page cache.
    pub direct: bool,
    /// Whether there is an object tier, in a directory.
    pub object: bool,
    /// Where everything lies; in the daemon's own directory by default.
    pub data_dir: Option<PathBuf>,
    /// `[offload]` fields.
    pub offload: String,
    /// `[limits]` fields.
    pub limits: String,
    /// The node's name.
    pub node_id: String,
    /// `[object]` fields beside `enabled`.
    pub object_fields: String,
    /// The cluster's directory, `None` for a node that is alone.
    pub directory: Option<String>,
    /// `[transport]` fields beside where to listen.
    pub transport: String,
    /// Whole sections of the configuration beside these.
    pub sections: String,
    /// Soft limit of file sizes, in bytes: writing beyond it fails.
    pub file_limit: Option<u64>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            host_mib: 64,
            extent_mib: 4,
            disk_mib: Some(64),
            segment_mib: 4,
            direct: true,
            object: false,
            data_dir: None,
            offload: String::new(),
            limits: String::new(),
            node_id: "test".into(),
            object_fields: "write = \"all\"".into(),
            directory: None,
            transport: String::new(),
            sections: String::new(),
            file_limit: None,
        }
    }
}

impl Setup {
    fn toml(&self, root: &Path) -> String {
        let disk = match self.disk_mib {
            Some(mib) => {
                format!("capacity = \"{mib}MiB\"\nsegment = \"{}MiB\"\ndirect = {}", self.segment_mib, self.direct)
            }
            None => "enabled = false".into(),
        };
        let cluster = self.directory.as_ref().map(|directory| {
            format!(
                "[cluster]\ndirectory = {directory:?}\nlisten = \"127.0.0.1:0\"\nheartbeat = \"100ms\"\n\
                 drain_on_stop = false\n\n[transport]\ntcp_listen = \"127.0.0.1:0\"\n{}\n",
                self.transport
            )
        });
        let cluster = cluster.unwrap_or_default();
        let data = self.data_dir.clone().unwrap_or_else(|| root.join("data"));
        format!(
            "node_id = {node:?}\nrun_dir = {run:?}\ndata_dir = {data:?}\n\n[host]\ncapacity = \"{host}MiB\"\n\
             extent = \"{extent}MiB\"\npages = \"plain\"\n\n[disk]\n{disk}\n\n[object]\nenabled = {object}\n{object_fields}\n\n\
             [offload]\n{offload}\n\n[limits]\n{limits}\n\n{cluster}\n{sections}\n",
            sections = self.sections,
            node = self.node_id,
            object_fields = self.object_fields,
            run = root.join("run"),
            host = self.host_mib,
            extent = self.extent_mib,
            object = self.object,
            offload = self.offload,
            limits = self.limits,
        )
    }
}

/// A daemon that can be killed and started again in the same directories.
#[derive(Debug)]
pub struct Daemon {
    program: PathBuf,
    setup: Setup,
    dir: TempDir,
    child: Option<Child>,
    control: Control,
}

impl Daemon {
    /// Starts `program` and waits until it serves. See [`crate::daemon!`].
    ///
    /// # Panics
    /// When it does not start; its log says why.
    #[must_use]
    pub fn start(program: &str, setup: Setup) -> Self {
        let mut this = Self::prepare(program, setup);
        this.restart();
        this
    }

    /// Everything but the process.
    ///
    /// # Panics
    /// When there is no room for a directory.
    #[must_use]
    pub fn prepare(program: &str, setup: Setup) -> Self {
        // Another build than this run's, to test what is to be released.
        let program = std::env::var_os("KVTIER_DAEMON").map_or_else(|| PathBuf::from(program), PathBuf::from);
        let dir = tempfile::Builder::new().prefix("kvt").tempdir().expect("a directory");
        let control = Control::new(&dir.path().join("run/kvtierd.sock"));
        Self { program, setup, dir, child: None, control }
    }

    /// Starts the process, which must not run, and waits until it serves.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.spawn();
        let Self { child, control, .. } = self;
        let served = within(PATIENCE, || {
            let ended = child.as_mut().is_none_or(|c| c.try_wait().is_ok_and(|status| status.is_some()));
            if ended { Some(false) } else { control.serves().then_some(true) }
        });
        assert_eq!(served, Some(true), "the daemon did not start");
        // The first extent is made ready behind the scenes; reservations before that are busy.
        until("host memory", || self.tier(v1::Tier::Host).detail.contains("MiB").then_some(()));
    }

    /// Starts the process and does not wait for anything.
    ///
    /// # Panics
    /// When it runs already or cannot be started.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "the daemon runs already");
        let config = self.dir.path().join("kvtier.toml");
        std::fs::write(&config, self.setup.toml(self.dir.path())).expect("the configuration is written");
        let log = File::options().create(true).append(true).open(self.log_path()).expect("a log");
        let mut command = match self.setup.file_limit {
            None => Command::new(&self.program),
            Some(bytes) => {
                let mut shell = Command::new("bash");
                // In units of 1,024 bytes; beyond it, the signal ends the process unless it is ignored.
                let script = format!("trap '' XFSZ; ulimit -S -f {}; exec \"$0\" \"$@\"", bytes / 1024);
                shell.args(["-c", &script]).arg(&self.program);
                shell
            }
        };
        let command = command.arg("--config").arg(&config).env_remove("KVTIER_LOG");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        self.child = Some(child.unwrap_or_else(|e| panic!("cannot start {}: {e}", self.program.display())));
    }

    /// Another configuration from the next start on.
    pub fn reconfigure(&mut self, change: impl FnOnce(&mut Setup)) {
        change(&mut self.setup);
    }

    /// Calls to it.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Path of its gRPC socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("run/kvtierd.sock")
    }

    /// Path of its descriptor socket.
    #[must_use]
    pub fn fd_socket(&self) -> PathBuf {
        self.dir.path().join("run/kvtierd.fd.sock")
    }

    /// Where its state lies.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.setup.data_dir.clone().unwrap_or_else(|| self.dir.path().join("data"))
    }

    /// Where its log segments lie.
    #[must_use]
    pub fn disk_dir(&self) -> PathBuf {
        self.data_dir().join("disk")
    }

    /// Waits until every verb that it holds for nodes that were away has been taken by them.
    pub fn wait_all_told(&self) {
        let outbox = self.data_dir().join("outbox");
        let waiting = || Some(std::fs::read_dir(&outbox).ok()?.flatten().filter(is_verb).count());
        until("the outbox to be empty", || (waiting()? == 0).then_some(()));
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("kvtierd.log")
    }

    /// What it logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Process id.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self) -> Pid {
        let child = self.child.as_ref().expect("the daemon runs");
        Pid::from_raw(i32::try_from(child.id()).expect("process ids are small")).expect("and positive")
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the daemon runs");
    }

    /// SIGSTOP, and waits until every thread has stopped: they do so one by one.
    ///
    /// # Panics
    /// When it does not run.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.pid().as_raw_nonzero());
        let stopped = |task: &Path| {
            let stat = std::fs::read_to_string(task.join("stat")).unwrap_or_default();
            // The state follows the name, which is in parentheses.
            stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('T'))
        };
        until("all threads to stop", || {
            let mut threads = std::fs::read_dir(&tasks).expect("the daemon runs").flatten();
            threads.all(|thread| stopped(&thread.path())).then_some(())
        });
    }

    /// SIGCONT.
    ///
    /// # Panics
    /// When it does not run.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// `kill -9`, and waits until it is gone.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the daemon runs");
        child.kill().expect("it can be killed");
        child.wait().expect("it ends");
    }

    /// SIGTERM, and waits until it ended by itself.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait_for_end()
    }

    /// Waits until it ended by itself.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("the daemon runs");
        until("the daemon's end", || child.try_wait().expect("a child"))
    }

    /// State of the node.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn status(&self) -> v1::StatusReply {
        self.control.status().expect("the daemon answers Status")
    }

    /// State of a tier.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn tier(&self, tier: v1::Tier) -> v1::TierStatus {
        let mut tiers = self.status().tiers;
        tiers.retain(|t| t.tier == i32::from(tier));
        tiers.pop().expect("status has every tier")
    }

    /// Waits until a tier has as many block shards.
    ///
    /// # Panics
    /// When that does not happen in time.
    pub fn wait_blocks(&self, tier: v1::Tier, blocks: u64) {
        let mut last = v1::TierStatus::default();
        let came = within(PATIENCE, || {
            last = self.tier(tier);
            (last.blocks == blocks).then_some(())
        });
        assert!(came.is_some(), "waited {PATIENCE:?} for {blocks} blocks: {last:?}");
    }

    /// Waits until nothing is on its way down to disk.
    pub fn wait_offloaded(&self) {
        until("offloads", || (self.tier(v1::Tier::Disk).pending_writes == 0).then_some(()));
    }

    /// Waits until the node's state is as asked.
    pub fn wait_status(&self, what: &str, look: impl Fn(&v1::StatusReply) -> bool) {
        let mut last = String::new();
        let came = within(PATIENCE, || {
            let status = self.status();
            last = format!("{status:?}");
            look(&status).then_some(())
        });
        assert!(came.is_some(), "waited {PATIENCE:?} for {what}: {last}");
    }

    /// Descriptors it has open.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn open_descriptors(&self) -> usize {
        let dir = format!("/proc/{}/fd", self.pid().as_raw_nonzero());
        std::fs::read_dir(dir).expect("the daemon runs").count()
    }

    /// Bytes of memory it shares with engines.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn resident_shared_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid().as_raw_nonzero());
        let status = std::fs::read_to_string(path).expect("the daemon runs");
        let line = status.lines().find_map(|l| l.strip_prefix("RssShmem:")).expect("Linux says so");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    }
}

/// Value of a counter by name.
#[must_use]
pub fn count(counts: &[v1::Count], name: &str) -> u64 {
    counts.iter().find(|c| c.name == name).map_or(0, |c| c.value)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Also ends one that is stopped.
            drop(child.kill());
            drop(child.wait());
        }
        if std::thread::panicking()
            && let Ok(mut log) = File::open(self.log_path())
        {
            let len = log.metadata().map_or(0, |m| m.len());
            let mut tail = String::new();
            let read =
                log.seek(SeekFrom::Start(len.saturating_sub(LOG_TAIL))).and_then(|_| log.read_to_string(&mut tail));
            eprintln!("--- the daemon's log ends with ({read:?}):\n{tail}---");
        }
    }
}

/// A section for tests that count on the oldest blocks to go: survival ranking keeps what was used again, and learns.
pub const OLDEST_FIRST: &str = "[eviction]\npolicy = \"lru\"\n";
/// How long a connector's call may take beyond its own deadline, on a machine busy with others.
pub const SLACK: Duration = Duration::from_secs(3);

fn is_verb(file: &std::fs::DirEntry) -> bool {
    file.path().extension().is_some_and(|extension| extension == "verb")
}
