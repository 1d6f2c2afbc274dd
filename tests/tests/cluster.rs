//! Nodes of one cluster: real daemons, a real Valkey or Redis, TCP between them, kill -9.

use kvtier_proto::v1::{Outcome, Tier};
use kvtier_tests::daemon::count;
use kvtier_tests::valkey::Valkey;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};

const BLOCKS: u32 = 20;
const TOKENS: u32 = BLOCKS * 16;

fn setup(node_id: &str, valkey: &Valkey) -> Setup {
    Setup { node_id: node_id.into(), directory: Some(valkey.url()), ..Setup::default() }
}

fn start(node_id: &str, valkey: &Valkey) -> Daemon {
    daemon!(setup(node_id, valkey))
}

/// Waits until a node has told everything, and knows so many nodes.
fn wait_told(daemon: &Daemon, nodes: usize) {
    until("the directory to be told", || {
        let reply = daemon.control().nodes().ok()?;
        (reply.directory_state == "ok" && reply.unpublished == 0 && reply.nodes.len() == nodes).then_some(())
    });
}

fn loaded(daemon: &Daemon, origin: &str) -> u64 {
    count(&daemon.status().blocks_loaded, origin)
}

/// A directory, or the word that there is none to be had here.
#[test]
fn what_one_node_wrote_another_reads() {
    let Some(valkey) = Valkey::start() else { return };
    let (a, b) = (start("a", &valkey), start("b", &valkey));
    let shape = Shape::default();
    let (on_a, on_b) = (Engine::attach(&a, &shape), Engine::attach(&b, &shape));
    let prompt = Prompt::new("shared", BLOCKS);
    on_a.put_all(&prompt);
    wait_told(&a, 2);
    wait_told(&b, 2);
    assert_eq!(on_b.get(&prompt).whole(), Some(TOKENS));
    assert_eq!(loaded(&b, "peer"), u64::from(BLOCKS));
    assert_eq!(on_b.get(&prompt).whole(), Some(TOKENS));
    assert_eq!(loaded(&b, "peer"), u64::from(BLOCKS), "what was fetched stays");
    let nodes = b.control().nodes().unwrap().nodes;
    let link = nodes.iter().find(|n| n.node_id == "a").unwrap();
    assert_eq!((link.transport.as_str(), link.read_bytes > 0), ("tcp", true));
    let located = b.control().locate(&shape.keys(0, &prompt)).unwrap();
    for block in &located {
        let holders: std::collections::BTreeSet<&str> = block.replicas.iter().map(|r| r.node_id.as_str()).collect();
        assert_eq!(holders.into_iter().collect::<Vec<_>>(), ["a", "b"]);
    }
    // Parts that another node has count from where it stops having them.
    let longer = Prompt::new("shared", BLOCKS + 5);
    assert_eq!(on_b.get(&longer).hit.tokens, TOKENS);
}

#[test]
fn blocks_on_the_owners_disk_are_read_too() {
    let Some(valkey) = Valkey::start() else { return };
    let mut a = start("a", &valkey);
    let b = start("b", &valkey);
    let shape = Shape::default();
    let prompt = Prompt::new("from disk", BLOCKS);
    {
        let on_a = Engine::attach(&a, &shape);
        on_a.put_all(&prompt);
        a.wait_blocks(Tier::Disk, u64::from(BLOCKS));
    }
    a.kill();
    a.restart();
    wait_told(&a, 2);
    let life = |daemon: &Daemon| {
        let nodes = daemon.control().nodes().ok()?.nodes;
        nodes.iter().find(|n| n.node_id == "a").map(|n| n.incarnation)
    };
    until("b to know a's new life", || (life(&b)? == life(&a)?).then_some(()));
    assert_eq!(Engine::attach(&b, &shape).get(&prompt).whole(), Some(TOKENS), "{}", b.log());
    assert_eq!(loaded(&b, "peer"), u64::from(BLOCKS));
}

#[test]
fn a_dead_owner_is_a_miss_and_a_frozen_one_too() {
    let Some(valkey) = Valkey::start() else { return };
    let (mut a, b) = (start("a", &valkey), start("b", &valkey));
    let shape = Shape::default();
    let (on_a, on_b) = (Engine::attach(&a, &shape), Engine::attach(&b, &shape));
    let (first, second) = (Prompt::new("first", BLOCKS), Prompt::new("second", BLOCKS));
    on_a.put_all(&first);
    on_a.put_all(&second);
    wait_told(&a, 2);
    wait_told(&b, 2);
    a.freeze();
    assert_eq!(on_b.get(&first).hit.tokens, 0);
    a.thaw();
    a.kill();
    assert_eq!(on_b.get(&second).hit.tokens, 0);
    a.restart();
    wait_told(&a, 2);
    until("the survivor to be read again", || (on_b.get(&first).whole() == Some(TOKENS)).then_some(()));
    assert_eq!(b.status().corrupt_blocks, 0);
}

#[test]
fn the_directory_may_lose_everything_and_may_go_away() {
    let Some(mut valkey) = Valkey::start() else { return };
    let (a, b) = (start("a", &valkey), start("b", &valkey));
    let shape = Shape::default();
    let (on_a, on_b) = (Engine::attach(&a, &shape), Engine::attach(&b, &shape));
    let prompts: Vec<Prompt> = (0..3).map(|n| Prompt::new(format!("prompt {n}"), BLOCKS)).collect();
    on_a.put_all(&prompts[0]);
    wait_told(&a, 2);
    wait_told(&b, 2);
    valkey.cli(&["FLUSHALL"]);
    on_a.put_all(&prompts[1]);
    for prompt in &prompts[..2] {
        until("what was flushed to be told again", || (on_b.get(prompt).whole() == Some(TOKENS)).then_some(()));
    }
    valkey.kill();
    until("the loss to be noticed", || {
        let state = b.control().nodes().ok()?.directory_state;
        state.contains("away").then_some(())
    });
    assert_eq!(on_b.get(&prompts[0]).whole(), Some(TOKENS), "what is here is served");
    on_a.put_all(&prompts[2]);
    assert_eq!(on_b.get(&prompts[2]).hit.tokens, 0);
    valkey.restart();
    until("the directory to be whole again", || (on_b.get(&prompts[2]).whole() == Some(TOKENS)).then_some(()));
}

#[test]
fn packs_outlive_their_nodes_even_without_a_directory() {
    let Some(mut valkey) = Valkey::start() else { return };
    let store = tempfile::tempdir().unwrap();
    let url = format!("url = \"file://{}\"\nlist_every = \"200ms\"", store.path().display());
    let with_store = |node_id: &str| Setup {
        object: true,
        object_fields: format!("{url}\nwrite = \"all\""),
        ..setup(node_id, &valkey)
    };
    let (mut a, d) = (daemon!(with_store("a")), with_store("d"));
    let shape = Shape::default();
    let prompt = Prompt::new("outlives", BLOCKS);
    let on_a = Engine::attach(&a, &shape);
    on_a.put_all(&prompt);
    a.wait_blocks(Tier::Object, u64::from(BLOCKS));
    a.kill();
    valkey.kill();
    let d = daemon!(d);
    let on_d = Engine::attach(&d, &shape);
    until("the packs to be found", || (on_d.get(&prompt).whole() == Some(TOKENS)).then_some(()));
    assert!(loaded(&d, "object") >= u64::from(BLOCKS), "{:?}", d.status().blocks_loaded);
    let located = d.control().locate(&shape.keys(0, &prompt)).unwrap();
    let of_a = |r: &kvtier_proto::v1::Replica| r.node_id == "a" && r.tier() == Tier::Object;
    assert!(located.iter().all(|b| b.replicas.iter().any(of_a)));
}

#[test]
fn a_drained_node_takes_nothing_with_it() {
    let Some(valkey) = Valkey::start() else { return };
    let (mut a, b, c) = (start("a", &valkey), start("b", &valkey), start("c", &valkey));
    let shape = Shape::default();
    let prompt = Prompt::new("drained", BLOCKS);
    let on_a = Engine::attach(&a, &shape);
    on_a.put_all(&prompt);
    for node in [&a, &b, &c] {
        wait_told(node, 3);
    }
    let report = c.control().drain("a").unwrap();
    assert!(report.done, "{report:?}");
    assert_eq!((report.to_peers, report.failures.len()), (u64::from(BLOCKS), 0), "{report:?}\n{}", a.log());
    a.kill();
    let on_c = Engine::attach(&c, &shape);
    until("the new owner to be read", || (on_c.get(&prompt).whole() == Some(TOKENS)).then_some(()));
    let alone = c.control().drain("nobody");
    assert!(alone.is_err(), "a node that is not there cannot be drained");
    drop(b);
}

#[test]
fn a_drain_turns_to_peers_when_the_object_store_takes_nothing() {
    let Some(valkey) = Valkey::start() else { return };
    let store = tempfile::tempdir().unwrap();
    let place = store.path().join("store");
    let with_store = Setup {
        object: true,
        object_fields: format!("url = \"file://{}\"\nwrite = \"none\"", place.display()),
        limits: "drain = \"20s\"".into(),
        ..setup("a", &valkey)
    };
    let (a, b) = (daemon!(with_store), start("b", &valkey));
    let on_a = Engine::attach(&a, &Shape::default());
    on_a.put_all(&Prompt::new("drained without a store", BLOCKS));
    wait_told(&a, 2);
    wait_told(&b, 2);
    std::fs::remove_dir_all(&place).unwrap();
    std::fs::write(&place, "no directory").unwrap();
    let report = a.control().drain("a").unwrap();
    let became = (report.to_object, report.to_peers, report.failures.len());
    assert_eq!(became, (0, u64::from(BLOCKS), 0), "{report:?}\n{}", a.log());
}

#[test]
fn what_may_not_be_copied_is_reported() {
    let Some(valkey) = Valkey::start() else { return };
    let a = start("a", &valkey);
    let on_a = Engine::attach(&a, &Shape::default());
    on_a.put_all(&Prompt::new("alone", BLOCKS));
    wait_told(&a, 1);
    let report = a.control().drain("a").unwrap();
    let failure = &report.failures[0];
    assert_eq!((failure.shards, failure.keys.len()), (u64::from(BLOCKS), 16));
    assert!(failure.reason.contains("neither an object store"), "{}", failure.reason);
    assert_eq!(a.status().state, "draining");
}

#[test]
fn hostile_calls_of_the_peer_service_change_nothing() {
    use kvtier_proto::v1;
    use kvtier_proto::v1::peer_client::PeerClient;
    let Some(valkey) = Valkey::start() else { return };
    let a = start("a", &valkey);
    let shape = Shape::default();
    let on_a = Engine::attach(&a, &shape);
    let prompt = Prompt::new("guarded", BLOCKS);
    on_a.put_all(&prompt);
    wait_told(&a, 1);
    let this = a.control().nodes().unwrap().nodes.remove(0);
    let (peer, life) = (this.peer, this.incarnation);
    a.control().block_on(async {
        let mut client = PeerClient::connect(format!("http://{peer}")).await.unwrap();
        let hello = v1::HandshakeRequest { protocol_version: 999, node_id: "x".into(), ..Default::default() };
        assert_eq!(client.handshake(hello).await.unwrap_err().code(), tonic::Code::FailedPrecondition);
        let export = |incarnation, keys| v1::ExportRequest {
            node_id: "x".into(),
            incarnation,
            keys,
            ttl_ms: 1_000,
            wait_ms: 100,
            transport: "tcp".into(),
            ..Default::default()
        };
        let former = client.export(export(77, Vec::new())).await.unwrap_err();
        assert_eq!(former.code(), tonic::Code::FailedPrecondition);
        let short = v1::ShardKey { key: vec![1].into(), layout_id: vec![2; 32].into(), shard: 0 };
        assert_eq!(client.export(export(life, vec![short])).await.unwrap_err().code(), tonic::Code::InvalidArgument);
        let unknown = v1::ShardKey { key: vec![1; 32].into(), layout_id: vec![2; 32].into(), shard: 9 };
        let many = client.export(export(life, vec![unknown.clone(); 2_000])).await.unwrap_err();
        assert_eq!(many.code(), tonic::Code::ResourceExhausted);
        let missing = client.export(export(life, vec![unknown])).await.unwrap().into_inner();
        assert_eq!(missing.shards[0].outcome(), Outcome::Missing);
        let release = v1::ReleaseExportsRequest { incarnation: life, leases: vec![u64::MAX, 1, 2, 3] };
        client.release(release).await.unwrap();
    });
    assert_eq!(on_a.get(&prompt).whole(), Some(TOKENS));
}

#[test]
fn bytes_move_over_ucx_where_it_is_asked_for() {
    let Some(valkey) = Valkey::start() else { return };
    for tls in ["posix,cma,self", "tcp"] {
        let transport = format!("order = [\"ucx\", \"tcp\"]\nucx_tls = \"{tls}\"");
        let over_ucx = |node_id: &str| Setup { transport: transport.clone(), ..setup(node_id, &valkey) };
        let (mut a, b) = (daemon!(over_ucx("a")), daemon!(over_ucx("b")));
        let transports = b.status().transports;
        let ucx = transports.iter().find(|t| t.kind == "ucx").unwrap();
        if ucx.state.contains("not available") {
            eprintln!("SKIPPED: {}", ucx.state);
            return;
        }
        assert_eq!(ucx.state, "ok");
        let shape = Shape::default();
        let (on_a, on_b) = (Engine::attach(&a, &shape), Engine::attach(&b, &shape));
        let prompt = Prompt::new("over ucx", BLOCKS);
        let other = Prompt::new("too late", BLOCKS);
        on_a.put_all(&prompt);
        on_a.put_all(&other);
        wait_told(&a, 2);
        wait_told(&b, 2);
        assert_eq!(on_b.get(&prompt).whole(), Some(TOKENS), "{tls}\n{}", b.log());
        let nodes = b.control().nodes().unwrap().nodes;
        assert_eq!(nodes.iter().find(|n| n.node_id == "a").unwrap().transport, "ucx");
        a.kill();
        assert_eq!(on_b.get(&other).hit.tokens, 0, "a dead peer is a miss in time");
        assert_eq!(on_b.get(&prompt).whole(), Some(TOKENS));
    }
}

#[test]
fn a_peer_without_ucx_is_read_over_tcp() {
    let Some(valkey) = Valkey::start() else { return };
    let both = Setup { transport: "order = [\"ucx\", \"tcp\"]\nucx_tls = \"tcp\"".into(), ..setup("a", &valkey) };
    let broken = "order = [\"ucx\", \"tcp\"]\nucx_tls = \"tcp\"\nucx_library = \"/nowhere/libucp.so.0\"";
    let (a, b) = (daemon!(both), daemon!(Setup { transport: broken.into(), ..setup("b", &valkey) }));
    let shape = Shape::default();
    let (on_a, on_b) = (Engine::attach(&a, &shape), Engine::attach(&b, &shape));
    let prompt = Prompt::new("fall back", BLOCKS);
    on_a.put_all(&prompt);
    wait_told(&a, 2);
    wait_told(&b, 2);
    assert_eq!(on_b.get(&prompt).whole(), Some(TOKENS));
    let ucx = b.status().transports.into_iter().find(|t| t.kind == "ucx").unwrap();
    assert!(ucx.state.contains("/nowhere/libucp.so.0"), "{}", ucx.state);
    assert!(b.log().contains("transport not used"));
    assert_eq!(b.control().nodes().unwrap().nodes.iter().find(|n| n.node_id == "a").unwrap().transport, "tcp");
}
