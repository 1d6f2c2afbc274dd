//! `kvtier top` on a terminal of its own, and without one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use super::exits::binary;
use super::{daemon, kvtier};

/// Nothing here takes so long: a test that hangs would say nothing.
const LIMIT: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };
const ENTER: &str = "\x1b[?1049h";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// The command on a terminal.
struct Live {
    child: Child,
    ours: File,
    theirs: OwnedFd,
    said: String,
}

impl Live {
    fn start(socket: &Path) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal works");
        grantpt(&ours).expect("a terminal works");
        unlockpt(&ours).expect("a terminal works");
        let name = ptsname(&ours, Vec::new()).expect("a terminal works");
        let theirs = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("a terminal works");
        tcsetwinsize(&ours, Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 }).expect("a terminal works");
        let ends = || theirs.try_clone().expect("a terminal works");
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvtier"));
        command.args(["top", "--interval", "20ms"]).env("KVTIER_ADDRESS", socket);
        let child = command.stdin(ends()).stdout(ends()).stderr(ends()).spawn().expect("a terminal works");
        Self { child, ours: ours.into(), theirs, said: String::new() }
    }

    /// Reads until the terminal was told `text`, and forgets what was said up to there.
    fn until(&mut self, text: &str) {
        let mut bytes = [0; 4096];
        let began = Instant::now();
        loop {
            if let Some(at) = self.said.find(text) {
                self.said.drain(..at + text.len());
                return;
            }
            let mut news = [PollFd::new(&self.ours, PollFlags::IN)];
            let waited = poll(&mut news, Some(&LIMIT)).expect("a terminal works");
            let late = waited == 0 || began.elapsed() > Duration::from_secs(60);
            assert!(!late, "{text:?} does not come; {:?} did", self.said);
            let n = self.ours.read(&mut bytes).expect("a terminal works");
            self.said.push_str(&String::from_utf8_lossy(&bytes[..n]));
        }
    }

    fn echoes(&self) -> bool {
        tcgetattr(&self.theirs).expect("a terminal works").local_modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }

    fn kill(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a terminal works");
    }

    /// Returns once the kernel says that it is stopped.
    fn stopped(&self) {
        let file = format!("/proc/{}/stat", self.child.id());
        loop {
            let stat = std::fs::read_to_string(&file).expect("a terminal works");
            assert!(!stat.contains(") Z "), "it ended");
            if stat.contains(") T ") {
                return;
            }
            std::thread::yield_now();
        }
    }

    fn end(mut self) -> ExitStatus {
        self.until(LEAVE);
        let status = self.child.wait().expect("a terminal works");
        assert!(self.echoes(), "the terminal is as it was");
        status
    }
}

/// Runs `test` beside the daemon.
async fn live(test: impl FnOnce(Live) + Send + 'static) {
    let served = daemon().serve();
    let live = Live::start(&served.socket);
    tokio::task::spawn_blocking(move || test(live)).await.expect("a terminal works");
}

#[tokio::test]
async fn a_key_ends_the_view_and_the_terminal_is_as_it_was() {
    live(|mut top| {
        top.until(ENTER);
        top.until("HIT RATE  75.0 %");
        assert!(!top.echoes());
        top.until("rates over");
        top.ours.write_all(b"xq").unwrap();
        assert_eq!(top.end().code(), Some(0));
    })
    .await;
}

#[tokio::test]
async fn signals_end_the_view_and_the_terminal_is_as_it_was() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
        live(move |mut top| {
            top.until("TIERS");
            top.kill(signal);
            assert_eq!(top.end().code(), Some(0), "{signal:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_suspended_view_gives_the_terminal_back_until_it_goes_on() {
    live(|mut top| {
        top.until("TIERS");
        top.kill(Signal::TSTP);
        top.until(LEAVE);
        top.stopped();
        assert!(top.echoes());
        top.kill(Signal::CONT);
        top.until(ENTER);
        top.until("TIERS");
        top.ours.write_all(b"q").unwrap();
        assert_eq!(top.end().code(), Some(0));
    })
    .await;
}

#[test]
fn a_daemon_that_goes_away_is_said_and_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kvtierd.sock");
    let serve = || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let entered = runtime.enter();
        daemon().serve_at(&socket);
        drop(entered);
        runtime
    };
    let first = serve();
    let mut top = Live::start(&socket);
    top.until("\x1b[Hnode node-1");
    drop(first);
    top.until("\x1b[H! no daemon at unix://");
    std::fs::remove_file(&socket).unwrap();
    let _second = serve();
    top.until("\x1b[Hnode node-1");
    top.ours.write_all(b"q").unwrap();
    assert_eq!(top.end().code(), Some(0));
}

#[tokio::test]
async fn without_a_terminal_there_is_one_frame() {
    let served = daemon().serve();
    for words in [&["top"][..], &["top", "--once"]] {
        let output = binary(&served, words, "").await;
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        assert!(text.starts_with("node node-1") && !text.contains('\x1b'), "{text}");
        assert_eq!(text.matches("PROGRAMS  2").count(), 1);
    }
    let report = kvtier(&served, &["top", "--json"]).await.unwrap();
    assert_eq!((&report.json["hit_tokens"], &report.json["since_start"]), (&750.into(), &true.into()));
    assert_eq!(report.json["programs"][0]["program_id"], "p-large");
}
