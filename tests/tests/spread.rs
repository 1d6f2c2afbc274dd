//! Prefixes that many calls share get copies on other nodes.

use std::time::Instant;

use kvtier_policy::WARM_UP;
use kvtier_proto::v1;
use kvtier_tests::daemon::count;
use kvtier_tests::valkey::Valkey;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use serde_json::json;

const BLOCKS: u32 = 20;

fn start(node_id: &str, valkey: &Valkey) -> Daemon {
    daemon!(Setup { node_id: node_id.into(), directory: Some(valkey.url()), ..Setup::default() })
}

/// A node that wrote a prompt, and its engine.
fn with_prompt(valkey: &Valkey, program: &str) -> (Daemon, Engine, Prompt) {
    let a = start("a", valkey);
    let mut engine = Engine::attach(&a, &Shape::default());
    let prompt = Prompt::new("shared", BLOCKS);
    engine.says(&json!({"program_id": program, "semantic": "SYSTEM_PROMPT"}));
    engine.put_all(&prompt);
    (a, engine, prompt)
}

fn has_all(daemon: &Daemon, prompt: &Prompt) {
    let keys = Shape::default().keys(0, prompt);
    let own = daemon.status().node_id;
    until("copies of all blocks", || {
        let blocks = daemon.control().locate(&keys).ok()?;
        let here = |b: &v1::BlockInfo| b.replicas.iter().any(|r| r.node_id == own);
        (blocks.len() == keys.len() && blocks.iter().all(here)).then_some(())
    });
}

#[test]
fn what_is_used_often_gets_a_copy_and_so_does_a_node_that_joins() {
    let Some(valkey) = Valkey::start() else { return };
    let (a, mut engine, prompt) = with_prompt(&valkey, "first");
    let b = start("b", &valkey);
    until("the nodes to know each other", || (a.control().nodes().ok()?.nodes.len() == 2).then_some(()));
    for n in 0..8 {
        engine.speak_for(&format!("program {n}"), "", "");
        engine.get(&prompt);
    }
    has_all(&b, &prompt);
    let (began, c) = (Instant::now(), start("c", &valkey));
    // It is offered once it has what was meant for it, and on a machine that is this slow after a while.
    let ready = || {
        let reply = c.control().nodes().ok()?;
        (reply.nodes.len() == 3 && reply.nodes.iter().all(|n| n.state == "ready")).then_some(())
    };
    until("the node that joined to be warm", ready);
    let keys = Shape::default().keys(0, &prompt);
    let blocks = c.control().locate(&keys).expect("blocks");
    let has_all_of_it = blocks.iter().all(|b| b.replicas.iter().any(|r| r.node_id == "c"));
    assert!(has_all_of_it || began.elapsed() >= WARM_UP, "{blocks:?}");
    has_all(&c, &prompt);
}

#[test]
fn declared_steps_that_share_a_context_are_reason_enough() {
    let Some(valkey) = Valkey::start() else { return };
    let (a, _engine, prompt) = with_prompt(&valkey, "main");
    let b = start("b", &valkey);
    until("the nodes to know each other", || (a.control().nodes().ok()?.nodes.len() == 2).then_some(()));
    let last = *Shape::default().keys(0, &prompt).last().expect("a prompt has blocks");
    let step = |n: u32| v1::GraphStep {
        step_id: n.to_string(),
        program_id: format!("swarm/{n}"),
        shared_context: Some(v1::SharedContext {
            keys: kvtier_proto::convert::pack_keys(&[last]),
            ..Default::default()
        }),
        ..Default::default()
    };
    let declared =
        v1::DeclareRequest { program_id: "swarm".into(), steps: (0..4).map(step).collect(), ..Default::default() };
    a.control().of_programs(async |mut client| client.declare(declared).await).expect("an answer");
    has_all(&b, &prompt);
}

#[test]
fn branches_that_are_to_come_are_reason_enough() {
    let Some(valkey) = Valkey::start() else { return };
    let (a, _engine, prompt) = with_prompt(&valkey, "main");
    let b = start("b", &valkey);
    until("the nodes to know each other", || (a.control().nodes().ok()?.nodes.len() == 2).then_some(()));
    let fork = v1::SignalRequest {
        program_id: "main".into(),
        kind: v1::SignalKind::Fork.into(),
        children: (0..4).map(|n| format!("branch {n}")).collect(),
        ..Default::default()
    };
    a.control().signal(fork).expect("an answer");
    has_all(&b, &prompt);
    // The node that got the copy says what became of it.
    let bytes = u64::from(BLOCKS) * (64 << 10);
    let counts = |name: &'static str, bytes: u64| {
        b.wait_status(name, |status| count(&status.policy, name) == bytes);
    };
    counts("spread_unread_bytes", bytes);
    let mut on_b = Engine::attach(&b, &Shape::default());
    on_b.speak_for("branch 0", "main", "");
    assert_eq!(on_b.get(&prompt).hit.host_tokens, BLOCKS * 16);
    counts("spread_useful_bytes", bytes);
    counts("spread_unread_bytes", 0);
}
