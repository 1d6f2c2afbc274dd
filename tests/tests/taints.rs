//! Taints: who may be handed a block, when it ends and where it may go, on every tier and node, through restarts.

use kvtier_proto::convert::block_targets;
use kvtier_proto::v1::{self, Outcome, Tier};
use kvtier_tests::daemon::{OLDEST_FIRST, count};
use kvtier_tests::valkey::Valkey;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::{BlockKey, Taint};
use serde_json::json;

const BLOCKS: u32 = 20;
const TOKENS: u32 = BLOCKS * 16;
/// Tokens before the first tainted block.
const FREE: u32 = 12 * 16;

fn request(keys: &[BlockKey], taints: &[&str]) -> v1::TaintRequest {
    let taints = taints.iter().map(|t| v1::Taint::from(&t.parse::<Taint>().expect("a taint"))).collect();
    v1::TaintRequest { targets: vec![block_targets(keys)], taints, ..Default::default() }
}

fn taint(daemon: &Daemon, keys: &[BlockKey], taints: &[&str]) -> v1::TaintReply {
    let reply = daemon.control().taint(request(keys, taints)).expect("the node answers");
    assert_eq!(reply.outcomes.len(), keys.len());
    assert!(reply.outcomes.iter().all(|o| o.outcome() == Outcome::Applied), "{reply:?}");
    reply
}

/// An engine whose requests bear with these taints.
fn tolerant(daemon: &Daemon, shape: &Shape, tolerations: &[&str]) -> Engine {
    let mut engine = Engine::attach(daemon, shape);
    engine.says(&json!({"tolerations": tolerations}));
    engine
}

fn start(node_id: &str, valkey: &Valkey, setup: Setup) -> Daemon {
    daemon!(Setup { node_id: node_id.into(), directory: Some(valkey.url()), ..setup })
}

fn wait_told(daemon: &Daemon, nodes: usize) {
    until("the directory to be told", || {
        let reply = daemon.control().nodes().ok()?;
        (reply.directory_state == "ok" && reply.unpublished == 0 && reply.nodes.len() == nodes).then_some(())
    });
}

fn denied(daemon: &Daemon) -> u64 {
    count(&daemon.status().ledger, "denied")
}

#[test]
fn a_no_serve_block_is_refused_and_counted_and_stays_so_through_a_kill() {
    let mut daemon = daemon!(Setup::default());
    let shape = Shape::default();
    let (engine, cleared) = (Engine::attach(&daemon, &shape), tolerant(&daemon, &shape, &["secret=pii"]));
    let prompt = Prompt::new("secret", BLOCKS);
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Disk, BLOCKS.into());
    let keys = shape.keys(0, &prompt);
    taint(&daemon, &keys[12..], &["secret=pii:NoServe"]);
    let again = daemon.control().taint(request(&keys[12..], &["secret=pii:NoServe"])).unwrap();
    assert!(again.outcomes.iter().all(|o| o.outcome() == Outcome::Duplicate), "{again:?}");
    for round in 1..=2 {
        assert_eq!(engine.get(&prompt).whole(), Some(FREE));
        until("the ledger", || (denied(&daemon) == u64::from(TOKENS - FREE)).then_some(()));
        assert_eq!(cleared.get(&prompt).whole(), Some(TOKENS));
        let block = &daemon.control().locate(&keys[12..13]).unwrap()[0];
        assert_eq!((block.taints.len(), block.taints[0].key.as_str()), (1, "secret"), "round {round}");
        daemon.kill();
        daemon.restart();
        engine.wait_attached();
        cleared.wait_attached();
    }
    let mut going = request(&keys[12..], &["secret=pii:NoServe"]);
    going.taints[0].effect = 0;
    let reply = daemon.control().untaint(going).unwrap();
    assert!(reply.outcomes.iter().all(|o| o.outcome() == Outcome::Applied), "{reply:?}");
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&prompt).whole(), Some(TOKENS), "what was untainted stays so");
}

#[test]
fn an_ephemeral_block_ends_on_time_and_never_comes_back() {
    let mut daemon = daemon!(Setup { object: true, ..Setup::default() });
    let shape = Shape::default();
    let engine = Engine::attach(&daemon, &shape);
    let (short, long) = (Prompt::new("short", BLOCKS), Prompt::new("long", BLOCKS));
    engine.put_all(&short);
    engine.put_all(&long);
    daemon.wait_blocks(Tier::Object, u64::from(BLOCKS) * 2);
    taint(&daemon, &shape.keys(0, &short), &["t:Ephemeral(1s)"]);
    daemon.wait_blocks(Tier::Object, BLOCKS.into());
    assert_eq!(daemon.tier(Tier::Disk).blocks, u64::from(BLOCKS));
    assert_eq!(engine.get(&short).hit.tokens, 0);
    assert_eq!(count(&daemon.status().policy, "expired_blocks"), u64::from(BLOCKS));
    until("the ledger", || (count(&daemon.status().ledger, "expired") == u64::from(TOKENS)).then_some(()));
    // Its records are still there, and know nothing of an end.
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&short).hit.tokens, 0);
    assert_eq!(engine.get(&long).whole(), Some(TOKENS));
    // One whose time ends while nobody is there.
    taint(&daemon, &shape.keys(0, &long), &["t:Ephemeral(300ms)"]);
    daemon.kill();
    std::thread::sleep(std::time::Duration::from_millis(400));
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&long).hit.tokens, 0);
    assert_eq!(engine.put_all(&long).granted, BLOCKS, "written anew, it is a new block");
    assert_eq!(engine.get(&long).whole(), Some(TOKENS));
}

#[test]
fn what_engines_say_of_blocks_is_kept_with_their_records() {
    let mut daemon = daemon!(Setup { sections: "[hints]\ntrust = \"all\"".into(), ..Setup::default() });
    let shape = Shape::default();
    let mut engine = Engine::attach(&daemon, &shape);
    engine.says(&json!({"semantic": "TOOL_RESULT", "taints": ["a=b:NoServe"]}));
    let prompt = Prompt::new("hinted", BLOCKS);
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Disk, BLOCKS.into());
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&prompt).hit.tokens, 0);
    let types = daemon.status().types;
    let of = |tier: Tier| {
        let row = types.iter().find(|t| t.tier() == tier && t.semantic() == v1::SemanticType::ToolResult);
        row.map_or(0, |t| t.copies)
    };
    assert_eq!((of(Tier::Disk), of(Tier::Object)), (u64::from(BLOCKS), 0), "{types:?}");
    let retyped = v1::TaintRequest {
        semantic: v1::SemanticType::ExecutionCheckpoint.into(),
        ..request(&shape.keys(0, &prompt), &[])
    };
    daemon.control().taint(retyped).unwrap();
    daemon.kill();
    daemon.restart();
    let types = daemon.status().types;
    assert!(types.iter().all(|t| t.semantic() == v1::SemanticType::ExecutionCheckpoint), "{types:?}");
}

#[test]
fn marked_blocks_stay_within_a_budget_and_others_go_first() {
    // 256 blocks, of which marks may keep 51 of one tenant.
    let daemon = daemon!(Setup { host_mib: 16, disk_mib: None, sections: OLDEST_FIRST.into(), ..Setup::default() });
    let shape = Shape::default();
    let engine = Engine::attach(&daemon, &shape);
    let (kept, other) = (Prompt::new("kept", BLOCKS), Prompt::new("other", BLOCKS));
    engine.put_all(&kept);
    engine.put_all(&other);
    taint(&daemon, &shape.keys(0, &kept), &["a:NoOffload"]);
    for n in 0..24 {
        engine.put_all(&Prompt::new(format!("pressure {n}"), 32));
    }
    assert_eq!(engine.get(&kept).whole(), Some(TOKENS));
    assert_eq!(engine.get(&other).hit.tokens, 0);
    let much = Prompt::new("much", 48);
    engine.put_all(&much);
    let reply = daemon.control().taint(request(&shape.keys(0, &much), &["a:NoEvict"])).unwrap();
    let clipped = reply.outcomes.iter().filter(|o| o.outcome() == Outcome::Clipped).count();
    assert_eq!(clipped, 48 + 20 - 51, "{reply:?}");
    assert!(count(&daemon.status().policy, "kept_host_bytes") <= 51 * (64 << 10));
    let refused = daemon.control().evict(&shape.keys(0, &much)[..1], false).unwrap();
    assert_eq!(refused[0].outcome(), Outcome::Rejected);
}

#[test]
fn a_taint_reaches_every_node_and_travels_with_the_block() {
    let Some(valkey) = Valkey::start() else { return };
    let [a, b] = ["a", "b"].map(|id| start(id, &valkey, Setup::default()));
    let shape = Shape::default();
    let (on_a, on_b) = (Engine::attach(&a, &shape), Engine::attach(&b, &shape));
    let (both, alone) = (Prompt::new("both", BLOCKS), Prompt::new("alone", BLOCKS));
    wait_told(&a, 2);
    wait_told(&b, 2);
    on_a.put_all(&both);
    on_a.put_all(&alone);
    on_b.put_all(&both);
    wait_told(&a, 2);
    let reply = taint(&a, &shape.keys(0, &both)[12..], &["s:NoServe"]);
    assert_eq!((reply.nodes.len(), reply.nodes[0].outcome(), reply.nodes[0].blocks), (1, Outcome::Applied, 8));
    assert_eq!(on_b.get(&both).whole(), Some(FREE));
    // b has nothing of this one; what it would fetch comes with its taint, and b was told besides.
    taint(&a, &shape.keys(0, &alone)[12..], &["s:NoServe"]);
    assert_eq!(on_b.get(&alone).whole(), Some(FREE));
    until("both refusals to be settled", || (denied(&b) == u64::from(TOKENS - FREE) * 2).then_some(()));
    assert_eq!(tolerant(&b, &shape, &["s"]).get(&alone).whole(), Some(TOKENS));
    let reply = b.control().untaint(request(&shape.keys(0, &alone)[12..], &["s:NoServe"])).unwrap();
    assert_eq!(reply.nodes[0].outcome(), Outcome::Applied, "{reply:?}");
    for engine in [&on_a, &on_b] {
        assert_eq!(engine.get(&alone).whole(), Some(TOKENS));
    }
}

#[test]
fn a_taint_holds_for_what_a_dead_node_left_in_the_object_store() {
    let Some(valkey) = Valkey::start() else { return };
    let store = tempfile::tempdir().expect("a directory");
    let setup = || Setup {
        object: true,
        object_fields: format!("write = \"all\"\nurl = \"file://{}\"\nlist_every = \"1s\"", store.path().display()),
        ..Setup::default()
    };
    let mut a = start("a", &valkey, setup());
    let b = start("b", &valkey, setup());
    wait_told(&a, 2);
    let shape = Shape::default();
    let prompt = Prompt::new("left behind", BLOCKS);
    let keys = shape.keys(0, &prompt);
    Engine::attach(&a, &shape).put_all(&prompt);
    a.wait_blocks(Tier::Object, BLOCKS.into());
    // Its packs were written before, and say nothing of it.
    let reply = taint(&a, &keys[12..], &["s:NoServe"]);
    assert_eq!(reply.nodes[0].outcome(), Outcome::Deferred, "it marks them once they come: {reply:?}");
    a.kill();
    let (on_b, cleared) = (Engine::attach(&b, &shape), tolerant(&b, &shape, &["s"]));
    until("b to find the packs", || (on_b.get(&prompt).hit.tokens > 0).then_some(()));
    until("all that may be had", || (on_b.get(&prompt).whole() == Some(FREE)).then_some(()));
    until("all of it for those who may", || (cleared.get(&prompt).whole() == Some(TOKENS)).then_some(()));
    assert_eq!(on_b.get(&prompt).whole(), Some(FREE));
}
