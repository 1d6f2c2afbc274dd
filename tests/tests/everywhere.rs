//! Verbs for every node of a cluster: those that answer are told at once, those that are away once they are back.

use std::path::Path;

use kvtier_proto::convert::block_targets;
use kvtier_proto::v1::{self, Outcome, Tier};
use kvtier_tests::valkey::Valkey;
use kvtier_tests::wait::{PATIENCE, until, within};
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::BlockKey;

const BLOCKS: u32 = 20;

fn start(node_id: &str, valkey: &Valkey) -> Daemon {
    daemon!(Setup { node_id: node_id.into(), directory: Some(valkey.url()), ..Setup::default() })
}

fn wait_nodes(daemon: &Daemon, nodes: usize) {
    until("the nodes to know each other", || (daemon.control().nodes().ok()?.nodes.len() == nodes).then_some(()));
}

fn evict(daemon: &Daemon, keys: &[BlockKey]) -> v1::EvictReply {
    let request = v1::EvictRequest { targets: vec![block_targets(keys)], everywhere: true, ..Default::default() };
    daemon.control().evict_everywhere(request).expect("the node answers")
}

/// Two nodes that both have a prompt of 20 blocks, in memory and on disk.
fn both_have_it() -> Option<(Valkey, [Daemon; 2], Vec<BlockKey>)> {
    let valkey = Valkey::start()?;
    let nodes = [start("a", &valkey), start("b", &valkey)];
    let (shape, prompt) = (Shape::default(), Prompt::new("everywhere", BLOCKS));
    for node in &nodes {
        wait_nodes(node, 2);
        Engine::attach(node, &shape).put_all(&prompt);
        node.wait_blocks(Tier::Disk, u64::from(BLOCKS));
    }
    Some((valkey, nodes, shape.keys(0, &prompt)))
}

#[test]
fn a_node_that_answers_is_told_at_once() {
    let Some((_valkey, [a, b], keys)) = both_have_it() else { return };
    let reply = evict(&a, &keys[12..]);
    assert!(reply.outcomes.iter().all(|o| o.outcome() == Outcome::Applied));
    let told: Vec<_> = reply.nodes.iter().map(|n| (n.node_id.as_str(), n.outcome(), n.blocks)).collect();
    assert_eq!(told, [("b", Outcome::Applied, 8)], "{}", b.log());
    for node in [&a, &b] {
        assert_eq!(node.tier(Tier::Disk).blocks, 12);
    }
    let again = evict(&b, &keys[12..]);
    assert_eq!(again.nodes[0].outcome(), Outcome::Missing);
}

#[test]
fn a_node_that_is_away_is_told_once_it_is_back_even_if_the_teller_was_killed() {
    let Some((_valkey, [mut a, mut b], keys)) = both_have_it() else { return };
    b.kill();
    let reply = evict(&a, &keys[12..]);
    assert_eq!(reply.nodes[0].outcome(), Outcome::Deferred, "{reply:?}");
    // It is on disk: another life of the teller tells it, and of a second verb that comes later.
    a.kill();
    a.restart();
    let reply = evict(&a, &keys[6..]);
    assert_eq!(reply.nodes[0].outcome(), Outcome::Deferred, "{reply:?}");
    b.restart();
    b.wait_blocks(Tier::Disk, 6);
    a.wait_all_told();
    b.kill();
    b.restart();
    assert_eq!(b.tier(Tier::Disk).blocks, 6, "what it was told of is durable there too");
    let life_of_b = |daemon: &Daemon| {
        let nodes = daemon.control().nodes().ok()?.nodes;
        nodes.into_iter().find(|n| n.node_id == "b").map(|n| n.incarnation)
    };
    until("the teller to hear of b's new life", || (life_of_b(&a)? == life_of_b(&b)?).then_some(()));
    assert_eq!(evict(&a, &keys[..6]).nodes[0].outcome(), Outcome::Applied);
}

/// A node over a shared object store, to which it writes `write`.
fn start_storing(node_id: &str, valkey: &Valkey, store: &Path, (write, list_every): (&str, &str)) -> Daemon {
    let url = store.display();
    let object_fields = format!("write = \"{write}\"\nurl = \"file://{url}\"\nlist_every = \"{list_every}\"");
    let directory = Some(valkey.url());
    let setup = Setup { object: true, object_fields, disk_mib: None, ..Setup::default() };
    daemon!(Setup { node_id: node_id.into(), directory, ..setup })
}

fn wait_prefix(engine: &Engine, prompt: &Prompt, tokens: u32) {
    let mut last = None;
    let found = within(PATIENCE, || {
        last = engine.get(prompt).whole();
        (last == Some(tokens)).then_some(())
    });
    assert!(found.is_some(), "{tokens} tokens of the prompt, the last answer was {last:?}");
}

fn is_applied(reply: &v1::EvictReply) -> bool {
    reply.outcomes.iter().all(|o| o.outcome() == Outcome::Applied)
}

#[test]
fn what_a_dead_node_left_in_packs_is_evicted_for_every_node_and_every_later_one() {
    let Some(valkey) = Valkey::start() else { return };
    let store = tempfile::tempdir().expect("a directory");
    let start = |node_id, write| start_storing(node_id, &valkey, store.path(), (write, "1s"));
    let mut a = start("a", "all");
    let (shape, prompt) = (Shape::default(), Prompt::new("left behind", BLOCKS));
    let keys = shape.keys(0, &prompt);
    Engine::attach(&a, &shape).put_all(&prompt);
    a.wait_blocks(Tier::Object, BLOCKS.into());
    let (mut b, c) = (start("b", "none"), start("c", "none"));
    let (on_b, on_c) = (Engine::attach(&b, &shape), Engine::attach(&c, &shape));
    a.kill();
    // Only packs have it.
    until("b to miss a and know c", || {
        let nodes = b.control().nodes().ok()?.nodes;
        nodes.iter().map(|n| n.node_id.as_str()).eq(["b", "c"]).then_some(())
    });
    let request = |keys: &[BlockKey], dry_run| {
        let targets = vec![block_targets(keys)];
        v1::EvictRequest { targets, everywhere: true, dry_run, ..Default::default() }
    };
    let evict = |node: &Daemon, dry_run| node.control().evict_everywhere(request(&keys[12..], dry_run)).unwrap();
    until("b to know the packs", || is_applied(&evict(&b, true)).then_some(()));
    wait_prefix(&on_c, &prompt, BLOCKS * 16);
    assert_eq!(on_b.get(&prompt).whole(), Some(BLOCKS * 16), "a dry run evicts nothing");
    let reply = evict(&b, false);
    // Its engine may not have let go of what it read.
    let gone = |o: &v1::TargetOutcome| matches!(o.outcome(), Outcome::Applied | Outcome::Deferred);
    assert!(reply.outcomes.iter().all(gone), "{reply:?}");
    let told: Vec<_> = reply.nodes.iter().map(|n| (n.node_id.as_str(), n.outcome())).collect();
    assert_eq!(told, [("a", Outcome::Deferred), ("c", Outcome::Applied)]);
    // It does not come back: c was told what is dead before it was told to drop it.
    assert_eq!(on_c.get(&prompt).whole(), Some(12 * 16));
    // Nor does it with another life, or on a node that was not there.
    b.kill();
    b.restart();
    on_b.wait_attached();
    let d = start("d", "none");
    let on_d = Engine::attach(&d, &shape);
    for engine in [&on_b, &on_d, &on_c] {
        wait_prefix(engine, &prompt, 12 * 16);
        assert_eq!(engine.get(&prompt).whole(), Some(12 * 16));
    }
    assert_eq!(evict(&c, false).outcomes[0].outcome(), Outcome::Missing);
    // Written anew it is a block like any other.
    on_c.put_all(&prompt);
    wait_prefix(&on_d, &prompt, BLOCKS * 16);
}

#[test]
fn a_writer_that_comes_back_does_not_serve_what_was_evicted_from_its_packs() {
    // They never meet, so that nothing waits for the writer in the other's outbox: only the store is common to both.
    let (Some(of_a), Some(of_b)) = (Valkey::start(), Valkey::start()) else { return };
    let store = tempfile::tempdir().expect("a directory");
    let mut a = start_storing("a", &of_a, store.path(), ("all", "1s"));
    let (shape, prompt) = (Shape::default(), Prompt::new("it comes back", BLOCKS));
    let keys = shape.keys(0, &prompt);
    let on_a = Engine::attach(&a, &shape);
    on_a.put_all(&prompt);
    a.wait_blocks(Tier::Object, BLOCKS.into());
    a.kill();
    let b = start_storing("b", &of_b, store.path(), ("none", "1s"));
    // It needs no layout to know what is meant.
    let targets = vec![block_targets(&keys[12..])];
    let request = v1::EvictRequest { targets, everywhere: true, ..Default::default() };
    until("b to list the packs", || {
        let reply = b.control().evict_everywhere(request.clone()).ok()?;
        assert!(reply.nodes.is_empty(), "{reply:?}");
        is_applied(&reply).then_some(())
    });
    a.restart();
    assert_eq!(a.tier(Tier::Object).blocks, 12, "{}", a.log());
    // Anew it has a sequence that nobody said to be dead.
    on_a.wait_attached();
    on_a.put_all(&prompt);
    a.wait_blocks(Tier::Object, BLOCKS.into());
    a.kill();
    let c = start_storing("c", &of_b, store.path(), ("none", "1s"));
    wait_prefix(&Engine::attach(&c, &shape), &prompt, BLOCKS * 16);
}

#[test]
fn what_a_living_node_evicts_is_not_read_from_its_packs() {
    let Some(valkey) = Valkey::start() else { return };
    let store = tempfile::tempdir().expect("a directory");
    let start = |node_id, write| start_storing(node_id, &valkey, store.path(), (write, "300s"));
    let a = start("a", "all");
    let (shape, prompt) = (Shape::default(), Prompt::new("evicted alone", BLOCKS));
    let keys = shape.keys(0, &prompt);
    Engine::attach(&a, &shape).put_all(&prompt);
    a.wait_blocks(Tier::Object, BLOCKS.into());
    let evict = |keys: &[BlockKey]| {
        let evicted = a.control().evict(keys, false).expect("the node answers");
        assert!(evicted.iter().all(|o| o.outcome() == Outcome::Applied));
    };
    evict(&keys[12..]);
    // One listing, at its start.
    let b = start("b", "none");
    let on_b = Engine::attach(&b, &shape);
    let in_packs = || {
        let blocks = b.control().locate(&keys).ok()?;
        let stored = |block: &v1::BlockInfo| block.replicas.iter().any(|r| r.tier() == Tier::Object);
        Some(blocks.iter().map(stored).collect::<Vec<_>>())
    };
    let first = |count| (0..20).map(|n| n < count).collect::<Vec<_>>();
    until("b to list the packs", || (in_packs()? == first(12)).then_some(()));
    // From here on a heartbeat tells it.
    evict(&keys[6..12]);
    until("b to hear of it", || (in_packs()? == first(6)).then_some(()));
    wait_prefix(&on_b, &prompt, 6 * 16);
    assert_eq!(on_b.get(&prompt).whole(), Some(6 * 16));
}
