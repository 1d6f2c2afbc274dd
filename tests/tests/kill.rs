//! `kill -9` of daemons and engines, at any time.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvtier_memory::fdpass::{Access, FdClient, Request};
use kvtier_proto::PROTOCOL_VERSION;
use kvtier_proto::v1::{self, Tier};
use kvtier_tests::wait::{PATIENCE, until, within};
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use rustix::fs::fstat;
use rustix::process::{Signal, kill_process};

/// Bytes of a block in memory.
const BYTES: u64 = 64 << 10;

/// A small seeded generator: a failure names its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn seed() -> u64 {
    let given = std::env::var("KVTIER_SEED").ok().and_then(|seed| seed.parse().ok());
    given.unwrap_or_else(|| u64::from(std::process::id()) * 0x9e37_79b9 + 1)
}

/// What the loop knows of the daemon's content.
struct Ledger {
    prompts: Vec<Prompt>,
    /// Evicted, acknowledged, and not put since.
    evicted: Vec<bool>,
    hits: u64,
}

/// Puts, gets and evicts until the daemon is gone.
fn work(random: &mut Random, daemon: &Daemon, engine: &Engine, known: &mut Ledger, dead: &AtomicBool) {
    let shape = Shape::default();
    while !dead.load(Ordering::Acquire) {
        // The first prompt is left alone.
        let n = 1 + usize::try_from(random.below(known.prompts.len() as u64 - 1)).expect("a small number");
        match random.below(8) {
            0 => {
                let keys = shape.keys(0, &known.prompts[n]);
                if daemon.control().evict(&keys, false).is_ok() {
                    known.evicted[n] = true;
                }
            }
            1..4 => {
                // From here on it may be there or not.
                known.evicted[n] = false;
                engine.put(&known.prompts[n]);
            }
            _ => {
                let got = engine.get(&known.prompts[n]);
                assert_eq!(got.corrupt, 0, "nothing was damaged");
                known.hits += u64::from(got.loaded);
            }
        }
    }
}

#[test]
fn a_daemon_killed_at_any_time_never_serves_wrong_bytes() {
    let rounds = if std::env::var_os("KVTIER_LONG").is_some() { 400 } else { 8 };
    let seed = seed();
    println!("KVTIER_SEED={seed}");
    let mut random = Random(seed);
    let mut daemon = daemon!(Setup { host_mib: 16, ..Setup::default() });
    let mut engine = Engine::attach(&daemon, &Shape { call_timeout_ms: 500, ..Shape::default() });
    engine.deadline = Duration::from_secs(1);
    let prompts: Vec<Prompt> = (0..16).map(|n| Prompt::new(format!("{seed} {n}"), 24)).collect();
    engine.put_all(&prompts[0]);
    daemon.wait_blocks(Tier::Disk, 24);
    let mut known = Ledger { evicted: vec![false; prompts.len()], prompts, hits: 0 };
    for round in 0..rounds {
        let (dead, pid, delay) = (AtomicBool::new(false), daemon.pid(), Duration::from_millis(random.below(250)));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Not to wait for something, but to hit any moment.
                std::thread::sleep(delay);
                kill_process(pid, Signal::KILL).expect("the daemon runs");
                dead.store(true, Ordering::Release);
            });
            work(&mut random, &daemon, &engine, &mut known, &dead);
        });
        daemon.kill();
        if random.below(2) == 0 {
            // Once more, while it starts.
            daemon.spawn();
            std::thread::sleep(Duration::from_millis(random.below(40)));
            daemon.kill();
        }
        daemon.restart();
        engine.wait_attached();
        for (prompt, evicted) in known.prompts.iter().zip(&known.evicted) {
            let got = engine.get(prompt);
            assert_eq!((got.corrupt, got.lost), (0, 0), "round {round}: {prompt:?}");
            assert!(!evicted || got.hit.tokens == 0, "round {round}: {prompt:?} came back from its eviction");
        }
        assert_eq!(engine.get(&known.prompts[0]).whole(), Some(384), "round {round}: what was on disk is there");
        assert_eq!(daemon.status().corrupt_blocks, 0, "round {round}");
    }
    println!("{} block shards loaded and verified while the daemon was being killed", known.hits);
    assert!(known.hits > 0, "the loop did what it is for");
}

#[test]
fn a_daemon_killed_while_blocks_are_on_their_way_down_keeps_a_prefix() {
    let mut daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    for round in 0..4 {
        let prompt = Prompt::new(format!("falling {round}"), 60);
        engine.put_all(&prompt);
        daemon.kill();
        daemon.restart();
        engine.wait_attached();
        let got = engine.get(&prompt);
        let whole = got.whole().expect("what is offered can be loaded");
        assert_eq!(got.loaded * 16, whole);
        // Behind the first gap some may be there that are of no use yet.
        let put = engine.put_all(&prompt);
        assert!(put.granted <= 60 - got.loaded, "{put:?} after {got:?}");
        assert_eq!(engine.get(&prompt).whole(), Some(960));
    }
}

#[test]
fn descriptors_do_not_pile_up() {
    let daemon = daemon!(Setup::default());
    let prompt = Prompt::new("fds", 4);
    let cycle = || {
        let engine = Engine::attach(&daemon, &Shape::default());
        engine.put_all(&prompt);
        assert_eq!(engine.get(&prompt).whole(), Some(64));
        engine.close();
        daemon.wait_status("the engine to be gone", |status| status.attachments.is_empty());
    };
    // Threads, log segments and the arena have theirs by then.
    (0..5).for_each(|_| cycle());
    daemon.wait_offloaded();
    let before = daemon.open_descriptors();
    (0..50).for_each(|_| cycle());
    // Status itself is a connection, which closes soon.
    let settled = within(PATIENCE, || (daemon.open_descriptors() <= before).then_some(()));
    assert!(settled.is_some(), "{before} descriptors before 50 engines, {} after", daemon.open_descriptors());
}

/// An engine in a process of its own.
struct Victim(Child);

impl Victim {
    fn start(daemon: &Daemon, prompt: &str, leased: u32, reserved: u32) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvtier-test-engine"));
        command.arg(daemon.socket()).arg(prompt).arg(leased.to_string()).arg(reserved.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a process");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        assert_eq!(line.trim(), format!("leased {leased} reserved {reserved}"));
        Self(child)
    }

    fn kill(mut self) {
        self.0.kill().expect("it can be killed");
        self.0.wait().expect("it ends");
    }
}

#[test]
fn a_killed_engine_leaves_nothing_behind() {
    let daemon = daemon!(Setup { disk_mib: None, ..Setup::default() });
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("shared", 10);
    engine.put_all(&prompt);
    assert_eq!(daemon.tier(Tier::Host).used_bytes, 10 * BYTES);
    for _ in 0..3 {
        let victim = Victim::start(&daemon, "shared", 10, 20);
        let status = daemon.status();
        let held: Vec<_> = status.attachments.iter().map(|a| (a.leases, a.reservations)).collect();
        assert_eq!(held.iter().map(|(leases, _)| leases).sum::<u32>(), 1, "{held:?}");
        assert!(held.iter().any(|(_, reservations)| *reservations == 20), "{held:?}");
        assert_eq!(daemon.tier(Tier::Host).used_bytes, 30 * BYTES);
        let keys = Shape::default().keys(0, &prompt);
        assert_eq!(daemon.control().locate(&keys[..1]).unwrap()[0].leases, 1);
        victim.kill();
        daemon.wait_status("the engine to be reaped", |status| status.attachments.len() == 2);
        assert_eq!(daemon.tier(Tier::Host).used_bytes, 10 * BYTES, "only sealed blocks are left");
        assert_eq!(daemon.control().locate(&keys[..1]).unwrap()[0].leases, 0);
    }
    assert_eq!(engine.get(&prompt).whole(), Some(160));
}

#[test]
fn memory_is_gone_with_its_processes() {
    let mut daemon = daemon!(Setup::default());
    let victim = Victim::start(&daemon, "nothing", 0, 20);
    daemon.kill();
    victim.kill();
    let shm = std::fs::read_dir("/dev/shm").unwrap().flatten();
    let left: Vec<_> = shm.map(|e| e.file_name()).filter(|n| n.to_string_lossy().contains("kvtier")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(daemon.socket().exists(), "a killed daemon cannot remove its socket");
    daemon.restart();
}

/// Inodes of daemons' memory that a process maps.
fn mapped(process: &str) -> BTreeSet<String> {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).expect("the process runs");
    let of_daemons = maps.lines().filter(|line| line.contains("memfd:kvtier-"));
    // The fifth column: they are the same in every process, and no other memory's.
    of_daemons.filter_map(|line| Some(line.split_whitespace().nth(4)?.to_owned())).collect()
}

#[test]
fn an_idle_engine_lets_go_of_a_dead_daemons_memory() {
    let mut daemon = daemon!(Setup { disk_mib: None, ..Setup::default() });
    let engine = Engine::attach(&daemon, &Shape::default());
    engine.put_all(&Prompt::new("mapped", 4));
    let of_daemon = mapped(&daemon.pid().as_raw_nonzero().to_string());
    // Engines of other tests, which run in this process too, map the memory of other daemons.
    let of_it_here = || mapped("self").intersection(&of_daemon).count();
    assert!(of_it_here() >= 2, "an extent and its generations");
    daemon.kill();
    until("the engine to let go of it", || (of_it_here() == 0).then_some(()));
    assert!(!engine.is_attached());
}

#[test]
fn a_daemon_that_stops_gives_its_memory_back_whoever_holds_it() {
    let mut daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    engine.put_all(&Prompt::new("held", 4));
    let spec = Shape::default().spec("/nowhere", "holder", "worker", 0);
    let request = v1::AttachRequest {
        protocol_version: PROTOCOL_VERSION,
        build_version: "test".into(),
        pid: 1,
        engine_id: "holder".into(),
        role: v1::Role::Worker.into(),
        namespace: Some(v1::Namespace::from(&spec.namespace)),
        layout: Some(v1::Layout::from(&spec.layout)),
        ..v1::AttachRequest::default()
    };
    let extent = {
        let attached = daemon.control().attach(request).unwrap();
        let attachment: [u8; 16] = attached.said.attachment[..].try_into().expect("a token has 16 bytes");
        let request = Request { attachment, extent: 0, access: Access::ReadOnly };
        let (fds, _bytes) = FdClient::new(&daemon.fd_socket()).request(&request, PATIENCE).unwrap();
        fds.extent
    };
    let held_blocks = || fstat(&extent).unwrap().st_blocks;
    assert!(held_blocks() > 0);
    assert!(daemon.terminate().success());
    assert_eq!(held_blocks(), 0, "nothing is left of it, though it is still open here");
}

#[test]
fn reservations_that_nobody_seals_are_reaped_while_the_engine_lives() {
    let limits = "reserve_ttl = \"1s\"".into();
    let daemon = daemon!(Setup { disk_mib: None, limits, ..Setup::default() });
    let engine = Engine::attach(&daemon, &Shape::default());
    let hashes = Prompt::new("forgotten", 30).block_hashes(16);
    let (states, _frames) = engine.reserve(0, 0, hashes.clone(), None).unwrap();
    assert_eq!(states, [1; 30]);
    daemon.wait_status("the reservations to end", |status| status.attachments.iter().all(|a| a.reservations == 0));
    assert_eq!(daemon.tier(Tier::Host).used_bytes, 0);
    assert_eq!(engine.reserve(0, 0, hashes, None).unwrap().0, [1; 30], "and can be made again");
}
