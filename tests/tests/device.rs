//! The device tier, over the twin: the daemon's pool is imported by engines whose memory lies on the same twin, in other
//! processes, and what they read there is what was sealed.

use std::fs::{OpenOptions, read_dir, read_link};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use kvtier_proto::convert::block_targets;
use kvtier_proto::v1::{self, Outcome, Tier};
use kvtier_tests::daemon::count;
use kvtier_tests::shape::content;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::BlockKey;

const BLOCKS: u32 = 20;
const TOKENS: u32 = BLOCKS * 16;
const BLOCK: u64 = 64 << 10;
const TWIN: &str = "[device]\nmemory = \"8MiB\"\nbackend = \"twin\"\nextent = \"2MiB\"\n";

fn setup() -> Setup {
    Setup { sections: TWIN.into(), ..Setup::default() }
}

/// A daemon with a device tier, an engine on the device, and a prompt in host memory.
fn stored(setup: Setup) -> (Daemon, Engine, Prompt, Vec<BlockKey>) {
    let daemon = daemon!(setup);
    let shape = Shape::on_device();
    let engine = Engine::attach(&daemon, &shape);
    let prompt = Prompt::new("system", BLOCKS);
    engine.put_all(&prompt);
    let keys = shape.keys(0, &prompt);
    (daemon, engine, prompt, keys)
}

/// As [`stored`], with the prompt on the device.
fn on_device() -> (Daemon, Engine, Prompt, Vec<BlockKey>) {
    let (daemon, engine, prompt, keys) = stored(setup());
    assert_eq!(daemon.control().move_to(&keys, Tier::Device).expect("moved").done(), (BLOCKS.into(), 0));
    (daemon, engine, prompt, keys)
}

fn evict(daemon: &Daemon, keys: &[BlockKey], tier: Tier) {
    let targets = vec![block_targets(keys)];
    let request = v1::EvictRequest { targets, tiers: vec![tier.into()], ..Default::default() };
    daemon.wait_status("the leases to end", |status| status.attachments.iter().all(|a| a.leases == 0));
    let outcomes = daemon.control().evict_from(request).expect("evicted");
    assert!(outcomes.iter().all(|o| o.outcome() == Outcome::Applied), "{outcomes:?}");
}

/// Gets the prompt whole: tokens from a device, from host memory.
fn get(engine: &Engine, prompt: &Prompt) -> (u32, u32) {
    let got = engine.get(prompt);
    assert_eq!(got.whole(), Some(prompt.tokens()));
    (got.hit.device_tokens, got.hit.host_tokens)
}

#[test]
fn what_was_moved_to_a_device_is_read_there_and_comes_back() {
    let (daemon, engine, prompt, keys) = on_device();
    let tier = daemon.tier(Tier::Device);
    assert_eq!((tier.state.as_str(), tier.blocks), ("ok", BLOCKS.into()));
    assert_eq!((tier.capacity_bytes, tier.used_bytes), (8 << 20, u64::from(BLOCKS) * BLOCK));
    assert_eq!(get(&engine, &prompt), (TOKENS, 0));
    evict(&daemon, &keys, Tier::Host);
    assert_eq!(get(&engine, &prompt), (TOKENS, 0), "its bytes lie nowhere else in memory");
    daemon.wait_status("the ledger", |status| count(&status.ledger, "device") == 2 * u64::from(TOKENS));
    assert_eq!(daemon.tier(Tier::Host).blocks, 0, "nothing was brought up for it");
    // An engine in host memory is handed host frames, filled from the device.
    let blind = Engine::attach(&daemon, &Shape::default());
    assert_eq!(blind.get(&prompt).whole(), Some(TOKENS));
    daemon.wait_blocks(Tier::Host, BLOCKS.into());
    assert_eq!(daemon.control().move_to(&keys, Tier::Host).unwrap().done(), (BLOCKS.into(), 0));
    assert_eq!((daemon.tier(Tier::Device).blocks, get(&engine, &prompt)), (0, (0, TOKENS)));
    let located = daemon.control().locate(&keys[..1]).unwrap();
    assert!(located[0].replicas.iter().all(|r| r.tier() != Tier::Device), "{located:?}");
    let prefetch =
        v1::PrefetchRequest { targets: vec![block_targets(&keys)], to: Tier::Device.into(), ..Default::default() };
    let fetched = daemon.control().work(async |mut client| client.prefetch(prefetch).await).unwrap();
    assert_eq!((fetched.done(), get(&engine, &prompt)), ((BLOCKS.into(), 0), (TOKENS, 0)));
    assert_eq!(daemon.status().corrupt_blocks, 0);
}

#[test]
fn what_several_programs_read_comes_onto_the_device_by_itself() {
    let (daemon, mut engine, prompt, _) = stored(setup());
    for program in ["a", "b", "c"] {
        engine.speak_for(program, "", "");
        assert_eq!(engine.get(&prompt).whole(), Some(TOKENS));
    }
    daemon.wait_blocks(Tier::Device, BLOCKS.into());
    assert_eq!(get(&engine, &prompt), (TOKENS, 0));
    // What one program alone has stays in host memory, however often it reads.
    let own = Prompt::new("its own", 4);
    engine.put_all(&own);
    (0..4).for_each(|_| assert_eq!(get(&engine, &own), (0, own.tokens())));
    assert_eq!(daemon.tier(Tier::Device).blocks, u64::from(BLOCKS));
}

#[test]
fn a_pin_holds_a_block_on_the_device() {
    let (daemon, engine, prompt, keys) = stored(setup());
    let pin = v1::PinRequest {
        claim_id: "system".into(),
        owner: "team".into(),
        revision: 1,
        targets: vec![block_targets(&keys)],
        tier: Tier::Device.into(),
        ttl_ms: 3_600_000,
        ..Default::default()
    };
    let pinned = daemon.control().pin(pin).unwrap();
    assert_eq!(pinned.outcome(), Outcome::Applied, "{pinned:?}");
    daemon.wait_blocks(Tier::Device, BLOCKS.into());
    // Twice what the pool holds passes through it.
    for n in 0..8 {
        let other = Prompt::new(format!("other {n}"), 32);
        engine.put_all(&other);
        let moved = daemon.control().move_to(&Shape::on_device().keys(0, &other), Tier::Device).unwrap();
        assert_eq!(moved.done(), (32, 0), "{n}");
    }
    assert_eq!(get(&engine, &prompt), (TOKENS, 0));
    assert!(daemon.tier(Tier::Device).used_bytes <= 8 << 20);
    let refused = v1::EvictRequest {
        targets: vec![block_targets(&keys)],
        tiers: vec![Tier::Device.into()],
        ..Default::default()
    };
    let outcomes = daemon.control().evict_from(refused).unwrap();
    assert!(outcomes.iter().all(|o| o.outcome() == Outcome::Rejected), "{outcomes:?}");
}

/// Open files of a process whose name contains this.
fn files_of(daemon: &Daemon, name: &str) -> Vec<PathBuf> {
    let dir = format!("/proc/{}/fd", daemon.pid().as_raw_nonzero());
    let all = read_dir(dir).expect("the daemon runs").filter_map(Result::ok).map(|entry| entry.path());
    all.filter(|path| read_link(path).is_ok_and(|to| to.to_string_lossy().contains(name))).collect()
}

/// Flips a bit of a block behind the daemon's back, in its pool on the twin.
fn flip(daemon: &Daemon, prompt: &Prompt, block: usize) {
    let want = content(&prompt.hashes()[block], 0, 0, BLOCK);
    let flipped = files_of(daemon, "kvtier-twin").into_iter().filter(|path| {
        let bytes = std::fs::read(path).expect("the twin's memory can be read");
        let Some(at) = (0..bytes.len()).step_by(4096).find(|at| bytes[*at..].starts_with(&want[..64])) else {
            return false;
        };
        let file = OpenOptions::new().write(true).open(path).expect("and written");
        file.write_all_at(&[want[77] ^ 1], at as u64 + 77).expect("one byte");
        true
    });
    assert_eq!(flipped.count(), 1, "the block lies in one extent");
}

#[test]
fn a_flipped_bit_in_the_pool_is_reported_and_never_served() {
    let (daemon, engine, prompt, keys) = on_device();
    flip(&daemon, &prompt, 7);
    let got = engine.get(&prompt);
    assert_eq!((got.hit.device_tokens, got.loaded, got.corrupt), (TOKENS, BLOCKS - 1, 1));
    daemon.wait_status("the report", |status| status.corrupt_blocks == 1);
    assert_eq!(daemon.tier(Tier::Device).blocks, u64::from(BLOCKS) - 1, "that copy goes, and no other");
    assert_eq!(daemon.tier(Tier::Host).blocks, u64::from(BLOCKS));
    assert_eq!(get(&engine, &prompt), (TOKENS - 16, 16));
    // On the way into host memory the daemon notices by itself.
    flip(&daemon, &prompt, 9);
    evict(&daemon, &keys[9..10], Tier::Host);
    let blind = Engine::attach(&daemon, &Shape::default());
    assert_eq!(blind.get(&prompt).whole(), Some(TOKENS), "from the disk then");
    daemon.wait_status("what the daemon found", |status| status.corrupt_blocks == 2);
    assert_eq!(daemon.tier(Tier::Device).blocks, u64::from(BLOCKS) - 2);
}

#[test]
fn a_killed_daemon_takes_its_pool_along_and_nobody_reads_wrong_bytes() {
    let (mut daemon, engine, prompt, _) = on_device();
    let (request, hit) = engine.lookup(&prompt);
    assert_eq!(hit.device_tokens, TOKENS);
    daemon.kill();
    engine.wait_detached();
    engine.release(&request, 0, 0);
    assert_eq!(engine.get(&prompt).hit.tokens, 0, "a dead daemon is a miss");
    daemon.restart();
    engine.wait_attached();
    assert_eq!(daemon.tier(Tier::Device).blocks, 0);
    // What the disk had is served, from host memory; the device is filled anew.
    engine.put_all(&prompt);
    assert_eq!(engine.get(&prompt).whole(), Some(TOKENS));
    let keys = Shape::on_device().keys(0, &prompt);
    assert_eq!(daemon.control().move_to(&keys, Tier::Device).unwrap().done(), (BLOCKS.into(), 0));
    assert_eq!(get(&engine, &prompt), (TOKENS, 0));
}

#[test]
fn frames_in_use_when_the_daemon_dies_are_right_or_lost() {
    let (mut daemon, engine, prompt, _) = on_device();
    assert_eq!(get(&engine, &prompt), (TOKENS, 0), "the pool is mapped from now on");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| (0..40).map(|_| engine.get(&prompt).loaded).sum::<u32>());
        until("some loads", || (engine.counter("loads_done") > u64::from(BLOCKS) * 3).then_some(()));
        daemon.kill();
        // Every byte that counted as loaded was compared with what was put.
        assert!(reader.join().expect("no wrong bytes") > 2 * BLOCKS);
    });
    daemon.restart();
    engine.wait_attached();
    engine.put_all(&prompt);
    assert_eq!(engine.get(&prompt).whole(), Some(TOKENS));
}

#[test]
fn without_cuda_the_daemon_serves_and_says_why_there_is_no_device_tier() {
    let sections = "[device]\nmemory = \"1GiB\"\n".into();
    let (daemon, engine, prompt, keys) = stored(Setup { sections, ..Setup::default() });
    let tier = daemon.tier(Tier::Device);
    if tier.state == "ok" {
        eprintln!("SKIPPED: this machine has CUDA ({})", tier.detail);
        return;
    }
    assert_eq!((tier.state.as_str(), tier.capacity_bytes), ("absent", 0));
    assert!(!tier.detail.is_empty());
    let refused = daemon.control().move_to(&keys, Tier::Device).unwrap();
    assert_eq!(refused.outcomes, vec![Outcome::Unsupported; keys.len()]);
    assert!(refused.reasons[0].reason.contains(&tier.detail), "{:?}", refused.reasons[0]);
    let capabilities = daemon.control().capabilities().unwrap();
    assert!(!capabilities.tiers.contains(&Tier::Device.into()));
    // The engine's memory lies on a twin that this daemon does not have.
    assert_eq!(get(&engine, &prompt), (0, TOKENS));
}
