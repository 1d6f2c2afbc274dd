//! The life of blocks over the lives of engines and daemons.

use kvtier_proto::v1::Tier;
use kvtier_tests::daemon::count;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};

#[test]
fn what_is_put_is_got() {
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("hello", 40);
    assert_eq!(engine.get(&prompt).hit.tokens, 0, "nothing is there yet");
    let put = engine.put_all(&prompt);
    assert_eq!((put.granted, put.saved), (40, 40));
    let got = engine.get(&prompt);
    assert_eq!((got.whole(), got.loaded, got.hit.host_tokens), (Some(640), 40, 640));
    assert_eq!(engine.put(&prompt).present, 40, "a second put copies nothing");
    assert_eq!(engine.get(&Prompt::new("hello", 7)).whole(), Some(112), "a prefix of it is a hit, too");
    assert_eq!(engine.get(&Prompt::new("hello", 60)).whole(), Some(640), "and so is what it is a prefix of");
    // Blocks of another model never match.
    let other = Engine::attach(&daemon, &Shape { model: "other".into(), ..Shape::default() });
    assert_eq!(other.get(&prompt).hit.tokens, 640, "the model's display name is not its identity");
    let wider = Engine::attach(&daemon, &Shape::sharded(2));
    assert_eq!(wider.get(&prompt).hit.tokens, 0, "another layout");
}

#[test]
fn the_ledger_sums_to_what_was_looked_up() {
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("ledger", 10);
    engine.get(&prompt);
    engine.put_all(&prompt);
    engine.get(&prompt);
    engine.get(&Prompt::new("ledger", 16));
    daemon.wait_status("all requests to be settled", |status| status.looked_up_tokens == 160 + 160 + 256);
    let status = daemon.status();
    assert_eq!(status.ledger.iter().map(|c| c.value).sum::<u64>(), status.looked_up_tokens);
    assert_eq!((count(&status.ledger, "host"), count(&status.ledger, "novel")), (320, 256));
    // Reports of loads come on their own stream: a request may be settled before them.
    daemon.wait_status("all loads to be reported", |status| count(&status.blocks_loaded, "host") == 20);
}

#[test]
fn a_new_engine_reads_what_a_gone_one_wrote() {
    let daemon = daemon!(Setup::default());
    let first = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("legacy", 30);
    first.put_all(&prompt);
    first.close();
    daemon.wait_status("the engine to be gone", |status| status.attachments.is_empty());
    let second = Engine::attach(&daemon, &Shape::default());
    assert_eq!(second.get(&prompt).whole(), Some(480));
}

#[test]
fn a_killed_daemon_finds_its_blocks_on_disk() {
    let mut daemon = daemon!(Setup::default());
    let prompts = [Prompt::new("a", 40), Prompt::new("b", 40)];
    let engine = Engine::attach(&daemon, &Shape::default());
    for prompt in &prompts {
        engine.put_all(prompt);
    }
    daemon.wait_blocks(Tier::Disk, 80);
    daemon.kill();
    daemon.restart();
    daemon.wait_blocks(Tier::Disk, 80);
    engine.wait_attached();
    for prompt in &prompts {
        let got = engine.get(prompt);
        assert_eq!((got.whole(), got.loaded, got.hit.disk_tokens), (Some(640), 40, 640));
        assert_eq!(engine.get(prompt).hit.host_tokens, 640, "now they are in memory");
    }
    let status = daemon.status();
    assert_eq!((status.incarnation, status.corrupt_blocks), (2, 0));
    daemon.wait_status("all loads to be reported", |status| count(&status.blocks_loaded, "disk") == 80);
}

#[test]
fn a_stopped_daemon_takes_everything_along() {
    // Nothing goes to disk before the end but what passes a mark that is never reached.
    let offload = "mode = \"eager\"\nmax_in_flight = 1".into();
    let mut daemon = daemon!(Setup { offload, ..Setup::default() });
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("drain", 300);
    engine.put_all(&prompt);
    let status = daemon.terminate();
    assert!(status.success(), "{status:?}");
    engine.wait_detached();
    assert_eq!(engine.get(&prompt).hit.tokens, 0, "no daemon is a miss");
    for socket in [daemon.socket(), daemon.fd_socket()] {
        assert!(!socket.exists(), "{} is left behind", socket.display());
    }
    daemon.restart();
    assert!(daemon.status().notes.is_empty(), "a clean stop seals everything: {:?}", daemon.status().notes);
    engine.wait_attached();
    assert_eq!(engine.get(&prompt).whole(), Some(4800));
}

#[test]
fn sessions_wait_for_a_daemon_and_come_back_to_it_by_themselves() {
    let mut daemon = Daemon::prepare(env!("CARGO_BIN_EXE_kvtierd-under-test"), Setup::default());
    let engine = Engine::open(&daemon.socket().to_string_lossy(), &Shape::default());
    let prompt = Prompt::new("early", 10);
    assert_eq!(engine.get(&prompt).hit.tokens, 0);
    assert_eq!(engine.put(&prompt).busy, 10);
    daemon.restart();
    engine.wait_attached();
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Disk, 10);
    for life in 2..4 {
        daemon.kill();
        engine.wait_detached();
        assert_eq!(engine.get(&prompt).hit.tokens, 0);
        assert_eq!(engine.put(&prompt).busy, 10);
        daemon.restart();
        engine.wait_attached();
        assert_eq!(engine.get(&prompt).whole(), Some(160), "life {life}");
    }
    assert_eq!(engine.counter("attached"), 2 * 3, "two sessions, three lives");
}

#[test]
fn every_worker_has_its_shard() {
    let mut daemon = daemon!(Setup::default());
    let shape = Shape::sharded(2);
    let engine = Engine::attach(&daemon, &shape);
    let prompt = Prompt::new("sharded", 20);
    assert_eq!(engine.put_all(&prompt).saved, 40);
    assert_eq!((engine.get(&prompt).whole(), engine.get(&prompt).loaded), (Some(320), 40));
    daemon.wait_blocks(Tier::Disk, 40);
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!((engine.get(&prompt).whole(), engine.get(&prompt).loaded), (Some(320), 40));
}

#[test]
fn groups_load_what_their_kind_needs() {
    let mut daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::hybrid());
    // 40 full blocks of 16 tokens and 20 window blocks of 32.
    let prompt = Prompt::new("hybrid", 40);
    assert_eq!(engine.put_all(&prompt).saved, 60);
    // The next token sees 63 tokens before it: two window blocks.
    assert_eq!((engine.get(&prompt).whole(), engine.get(&prompt).loaded), (Some(640), 42));
    daemon.wait_blocks(Tier::Disk, 60);
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!((engine.get(&prompt).whole(), engine.get(&prompt).loaded), (Some(640), 42));
    assert_eq!(engine.get(&Prompt::new("hybrid", 9)).whole(), Some(128), "prefixes end where blocks of every group do");
}

#[test]
fn a_second_daemon_is_refused_and_the_first_goes_on() {
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("only one", 4);
    engine.put_all(&prompt);
    let config = daemon.socket().with_file_name("../kvtier.toml");
    let program = env!("CARGO_BIN_EXE_kvtierd-under-test");
    let mut second = std::process::Command::new(program).arg("--config").arg(config).spawn().unwrap();
    let status = until("the second daemon's end", || second.try_wait().unwrap());
    assert!(!status.success());
    assert_eq!(engine.get(&prompt).whole(), Some(64));
}
