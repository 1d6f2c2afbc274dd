//! Disks that are full, odd or not there.

use std::path::Path;
use std::process::Command;

use kvtier_proto::convert::block_targets;
use kvtier_proto::v1::{self, Outcome, Tier};
use kvtier_tests::daemon::OLDEST_FIRST;
use kvtier_tests::disk::allocated_bytes;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::BlockKey;

const MIB: u64 = 1 << 20;

fn prompts(count: u32) -> Vec<Prompt> {
    (0..count).map(|n| Prompt::new(format!("prompt {n}"), 32)).collect()
}

/// Puts prompts of 2 MiB, looking at the disk after each; then gets them all. Answers how many were whole.
fn put_and_get(daemon: &Daemon, engine: &Engine, prompts: &[Prompt], limit_bytes: u64) -> usize {
    for prompt in prompts {
        engine.put_all(prompt);
        let used = allocated_bytes(&daemon.disk_dir());
        assert!(used <= limit_bytes, "{used} bytes on disk, at most {limit_bytes} are allowed");
    }
    daemon.wait_offloaded();
    let disk = daemon.tier(Tier::Disk);
    println!("{} blocks on disk, {} of {} bytes in use", disk.blocks, disk.used_bytes, disk.capacity_bytes);
    let room = limit_bytes / (64 << 10);
    assert!(disk.blocks >= room / 3, "{} blocks are left on a disk for {room}: too much was dropped", disk.blocks);
    let got = prompts.iter().map(|prompt| engine.get(prompt));
    got.filter(|got| got.whole() == Some(512)).count()
}

#[test]
fn a_full_disk_makes_room_and_stays_within_its_capacity() {
    let setup = Setup { host_mib: 16, disk_mib: Some(32), ..Setup::default() };
    let mut daemon = daemon!(setup);
    let engine = Engine::attach(&daemon, &Shape::default());
    // 128 MiB through 32 MiB of disk. The lock and the journal's pages are not blocks.
    let prompts = prompts(64);
    let whole = put_and_get(&daemon, &engine, &prompts, 32 * MIB + MIB);
    assert!(whole >= 6, "{whole} prompts of 2 MiB are left of a disk of 32 MiB");
    assert_eq!(engine.get(&prompts[63]).whole(), Some(512), "the last one is there");
    assert_eq!(daemon.tier(Tier::Disk).state, "ok");
    daemon.wait_offloaded();
    let before = daemon.tier(Tier::Disk).blocks;
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    let after = daemon.tier(Tier::Disk).blocks;
    assert!(after >= before, "{before} blocks before the kill, {after} after it");
    let whole = prompts.iter().filter(|prompt| engine.get(prompt).whole() == Some(512)).count();
    assert!(whole >= 6, "{whole} prompts are left after a restart");
    assert_eq!(daemon.status().corrupt_blocks, 0);
    // It goes on making room.
    let more: Vec<Prompt> = (0..20).map(|n| Prompt::new(format!("more {n}"), 32)).collect();
    assert!(put_and_get(&daemon, &engine, &more, 32 * MIB + MIB) >= 6);
}

#[test]
fn a_file_system_smaller_than_the_capacity_is_used_as_far_as_it_goes() {
    let Some(mount) = Mount::tmpfs("24m") else {
        println!("SKIPPED: mounting a tmpfs is not permitted here");
        return;
    };
    let mut daemon = daemon!(on_small_disk(&mount));
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompts = prompts(40);
    let whole = put_and_get(&daemon, &engine, &prompts, 24 * MIB);
    assert!(whole >= 4, "{whole} prompts of 2 MiB are left of a file system of 24 MiB");
    assert_eq!(daemon.tier(Tier::Disk).state, "ok", "{:?}", daemon.tier(Tier::Disk));
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    let whole = prompts.iter().filter(|prompt| engine.get(prompt).whole() == Some(512)).count();
    assert!(whole >= 3, "{whole} prompts are left after a restart");
    daemon.kill();
}

/// A disk of 64 MiB on a file system that has room for a third of it.
fn on_small_disk(mount: &Mount) -> Setup {
    let data_dir = Some(mount.0.path().to_owned());
    Setup { host_mib: 16, disk_mib: Some(64), segment_mib: 2, data_dir, ..Setup::default() }
}

#[test]
fn what_is_pinned_stays_on_a_file_system_smaller_than_the_capacity() {
    let Some(mount) = Mount::tmpfs("24m") else {
        println!("SKIPPED: mounting a tmpfs is not permitted here");
        return;
    };
    let mut daemon = daemon!(Setup { sections: OLDEST_FIRST.into(), ..on_small_disk(&mount) });
    let shape = Shape::default();
    let engine = Engine::attach(&daemon, &shape);
    // A fifth of a log segment: whenever the rest of one has gone, these are to be written elsewhere.
    let pinned = Prompt::new("pinned", 6);
    engine.put_all(&pinned);
    let keys = shape.keys(0, &pinned);
    let pin = v1::PinRequest {
        claim_id: "small disk".into(),
        owner: "tests".into(),
        revision: 1,
        targets: vec![block_targets(&keys)],
        ttl_ms: 3_600_000,
        ..Default::default()
    };
    assert_eq!(daemon.control().pin(pin).expect("a pin").outcome(), Outcome::Applied);
    for round in 0..2 {
        // 60 MiB through some 20; after a restart nothing is free at first.
        let others: Vec<Prompt> = (0..30).map(|n| Prompt::new(format!("round {round}, {n}"), 32)).collect();
        put_and_get(&daemon, &engine, &others, 24 * MIB);
        assert!(all_on_disk(&daemon, &keys), "what is pinned was lost in round {round}");
        assert_eq!(daemon.tier(Tier::Disk).state, "ok", "{:?}", daemon.tier(Tier::Disk));
        daemon.kill();
        daemon.restart();
        engine.wait_attached();
        assert_eq!(engine.get(&pinned).whole(), Some(96), "after restart {round}");
    }
    daemon.kill();
}

fn all_on_disk(daemon: &Daemon, keys: &[BlockKey]) -> bool {
    let blocks = daemon.control().locate(keys).expect("the daemon answers");
    blocks.len() == keys.len() && blocks.iter().all(|b| b.replicas.iter().any(|r| r.tier() == Tier::Disk))
}

#[test]
fn direct_io_or_not_works_and_is_said() {
    let data = tempfile::Builder::new().prefix("kvt").tempdir_in("/dev/shm").unwrap();
    let data_dir = Some(data.path().to_owned());
    let mut daemon = daemon!(Setup { data_dir, ..Setup::default() });
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("tmpfs", 40);
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Disk, 40);
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&prompt).whole(), Some(640));
    let (detail, notes) = (daemon.tier(Tier::Disk).detail, daemon.status().notes);
    if direct_io_works(data.path()) {
        assert!(detail.contains(", direct I/O"), "{detail}");
    } else {
        assert!(detail.contains("buffered I/O"), "{detail}");
        assert!(notes.iter().any(|note| note.contains("no direct I/O here")), "{notes:?}");
    }
    // What was written one way is read the other way.
    assert!(daemon.terminate().success());
    daemon.reconfigure(|setup| setup.direct = false);
    daemon.restart();
    engine.wait_attached();
    assert!(daemon.tier(Tier::Disk).detail.contains(", buffered I/O"), "{:?}", daemon.tier(Tier::Disk));
    assert_eq!(engine.get(&prompt).hit.disk_tokens, 640);
}

#[test]
fn a_disk_directory_that_cannot_be_used_is_said_and_survived() {
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("disk"), "a file where the directory should be").unwrap();
    let daemon = daemon!(Setup { data_dir: Some(data.path().into()), ..Setup::default() });
    let disk = daemon.tier(Tier::Disk);
    assert_eq!(disk.state, "absent");
    assert!(disk.detail.contains("disk"), "it says what is wrong: {disk:?}");
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("memory only", 40);
    engine.put_all(&prompt);
    assert_eq!(engine.get(&prompt).whole(), Some(640));
    daemon.wait_offloaded();
    // More than fits in memory still goes in.
    for prompt in prompts(40) {
        engine.put_all(&prompt);
    }
    assert_eq!(engine.get(&Prompt::new("prompt 39", 32)).whole(), Some(512));
}

#[test]
fn a_disk_that_refuses_writes_leaves_memory_working() {
    // Log segments are longer than any file may be: what a read-only or dying disk does to root, too.
    let setup = Setup { segment_mib: 16, file_limit: Some(8 * MIB), ..Setup::default() };
    let daemon = daemon!(setup);
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("refused", 40);
    engine.put_all(&prompt);
    daemon.wait_offloaded();
    assert_eq!(engine.get(&prompt).whole(), Some(640));
    let disk = daemon.tier(Tier::Disk);
    assert_eq!(disk.blocks, 0);
    assert!(allocated_bytes(&daemon.disk_dir()) < MIB, "nothing half made is left");
    assert!(daemon.log().contains("EFBIG") || daemon.log().contains("too large"), "the log says why");
}

fn direct_io_works(dir: &Path) -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).expect("a small flag");
    let mut options = std::fs::OpenOptions::new();
    options.create(true).truncate(true).write(true).custom_flags(direct).open(dir.join("probe")).is_ok()
}

/// A mounted file system, unmounted at the end.
struct Mount(tempfile::TempDir);

impl Mount {
    fn tmpfs(size: &str) -> Option<Self> {
        let dir = tempfile::Builder::new().prefix("kvt").tempdir().expect("a directory");
        let args = ["-t", "tmpfs", "-o", &format!("size={size}"), "kvtier-test"];
        let mounted = Command::new("mount").args(args).arg(dir.path()).output().is_ok_and(|o| o.status.success());
        mounted.then_some(Self(dir))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.path().display());
        }
    }
}
