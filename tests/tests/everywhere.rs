//! Verbs for every node of a cluster: those that answer are told at once, those that are away once they are back.

use kvtier_proto::convert::block_targets;
use kvtier_proto::v1::{self, Outcome, Tier};
use kvtier_tests::valkey::Valkey;
use kvtier_tests::wait::until;
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
