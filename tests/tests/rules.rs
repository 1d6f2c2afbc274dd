//! Rules: what becomes of blocks by their types, read at start and again, and told.

use std::path::Path;

use kvtier_proto::v1::{self, Outcome, Tier};
use kvtier_tests::daemon::count;
use kvtier_tests::valkey::Valkey;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::SemanticType;
use rustix::process::Signal;
use serde_json::json;

const BLOCKS: u32 = 20;
const TOKENS: u32 = BLOCKS * 16;

fn engine(daemon: &Daemon, semantic: SemanticType) -> Engine {
    let mut engine = Engine::attach(daemon, &Shape::default());
    engine.says(&json!({"semantic": semantic.name()}));
    engine
}

fn with_rules(file: &Path) -> Setup {
    Setup { sections: format!("[rules]\nfile = {file:?}"), ..Setup::default() }
}

fn copies(daemon: &Daemon, semantic: v1::SemanticType, tier: Tier) -> u64 {
    let types = daemon.status().types;
    types.iter().find(|t| t.tier() == tier && t.semantic() == semantic).map_or(0, |t| t.copies)
}

fn decided(daemon: &Daemon, prompt: &Prompt, field: &str) -> (String, String, u32) {
    let explained = daemon.control().explain_rules(&Shape::default().keys(0, prompt)[0]).expect("an answer");
    assert_eq!(explained.outcome(), Outcome::Applied);
    let decision = explained.decisions.into_iter().find(|d| d.field == field).expect("every field is decided");
    (decision.value, decision.rule, decision.line)
}

#[test]
fn the_shipped_rules_keep_scratchpads_off_the_disk_and_let_them_go_first() {
    let daemon = daemon!(Setup { host_mib: 16, ..Setup::default() });
    let (scratch, turns) = (engine(&daemon, SemanticType::Scratchpad), engine(&daemon, SemanticType::ConversationTurn));
    let (thought, turn) = (Prompt::new("thought", BLOCKS), Prompt::new("turn", BLOCKS));
    turns.put_all(&turn);
    scratch.put_all(&thought);
    daemon.wait_blocks(Tier::Disk, BLOCKS.into());
    assert_eq!(copies(&daemon, v1::SemanticType::Scratchpad, Tier::Host), u64::from(BLOCKS));
    assert_eq!(copies(&daemon, v1::SemanticType::Scratchpad, Tier::Disk), 0);
    assert_eq!(decided(&daemon, &thought, "evict").0, "first");
    assert_eq!(decided(&daemon, &thought, "ttl"), ("30m".into(), "scratchpad goes first".into(), 18));
    assert_eq!(decided(&daemon, &turn, "priority"), ("none".into(), String::new(), 0));
    // 40 blocks more than there is room for.
    for n in 0..8 {
        turns.put_all(&Prompt::new(format!("more {n}"), 32));
    }
    assert_eq!(scratch.get(&thought).hit.tokens, 0, "gone, though it was younger than the turn");
    let missing = daemon.control().explain_rules(&Shape::default().keys(0, &Prompt::new("nowhere", 1))[0]).unwrap();
    assert_eq!(missing.outcome(), Outcome::Missing);
}

#[test]
fn checkpoints_stay_in_memory_as_far_as_the_budget_goes() {
    let daemon = daemon!(Setup { host_mib: 16, disk_mib: Some(256), ..Setup::default() });
    let (states, turns) =
        (engine(&daemon, SemanticType::ExecutionCheckpoint), engine(&daemon, SemanticType::ConversationTurn));
    let state = Prompt::new("state", BLOCKS);
    states.put_all(&state);
    for n in 0..24 {
        turns.put_all(&Prompt::new(format!("pressure {n}"), 32));
    }
    let got = states.get(&state);
    assert_eq!((got.whole(), got.hit.host_tokens), (Some(TOKENS), TOKENS));
    daemon.wait_offloaded();
    assert_eq!(
        copies(&daemon, v1::SemanticType::ExecutionCheckpoint, Tier::Disk),
        u64::from(BLOCKS),
        "copied all the same"
    );
}

#[test]
fn a_rules_file_is_read_again_and_a_bad_one_changes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("rules.toml");
    let write = |text: &str| std::fs::write(&file, text).expect("a file");
    write("[[rule]]\nname = \"stay\"\nwhen = { type = \"DOCUMENT\" }\nthen = { priority = 60 }\n");
    let mut daemon = daemon!(with_rules(&file));
    let documents = engine(&daemon, SemanticType::Document);
    let prompt = Prompt::new("document", BLOCKS);
    documents.put_all(&prompt);
    daemon.wait_blocks(Tier::Disk, BLOCKS.into());
    assert_eq!(decided(&daemon, &prompt, "priority"), ("60".into(), "stay".into(), 1));
    assert_eq!(daemon.control().locate(&Shape::default().keys(0, &prompt)[..1]).unwrap()[0].rule, "stay");

    write("[[rule]]\nname = \"stay\"\nwhen = { type = \"DOCUMENT\" }\nthen = { priority = 600 }\n");
    let refused = daemon.control().reload_rules().unwrap();
    assert!(refused.error.contains("rules.toml:4:21: priority is a number from 0 to 100"), "{refused:?}");
    assert!(refused.text.contains("priority = 60 "), "the text is that of the rules in force: {refused:?}");
    assert_eq!(refused.generation, 1);
    assert_eq!(decided(&daemon, &prompt, "priority").0, "60");
    assert_eq!(count(&daemon.status().policy, "rules_refused"), 1);

    write("[[rule]]\nname = \"brief\"\nwhen = { type = \"DOCUMENT\" }\nthen = { ttl = \"1s\", tiers = [\"host\"] }\n");
    daemon.signal(Signal::HUP);
    until("the new rules", || (daemon.control().rules().ok()?.generation == 2).then_some(()));
    assert_eq!(daemon.control().rules().unwrap().error, "");
    daemon.wait_blocks(Tier::Disk, 0);
    until("the documents to end", || (copies(&daemon, v1::SemanticType::Document, Tier::Host) == 0).then_some(()));
    // Its turn comes when the end of the documents is durable.
    daemon.control().release_claims("nobody").expect("an answer");
    write("");
    daemon.kill();
    daemon.restart();
    documents.wait_attached();
    assert_eq!(documents.get(&prompt).hit.tokens, 0, "what ended stays so, whatever the rules say now");
}

#[test]
fn a_daemon_does_not_start_with_a_bad_rules_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("rules.toml");
    std::fs::write(&file, "[[rule]]\nname = \"a\"\nthen = { evict = \"last\" }\n").expect("a file");
    let mut daemon = Daemon::prepare(env!("CARGO_BIN_EXE_kvtierd-under-test"), with_rules(&file));
    daemon.spawn();
    assert!(!daemon.wait_for_end().success());
    assert!(daemon.log().contains("rules.toml:3:18"), "{}", daemon.log());
}

#[test]
fn tool_definitions_are_copied_to_every_node_and_new_nodes_too() {
    let Some(valkey) = Valkey::start() else { return };
    let start = |id: &str| daemon!(Setup { node_id: id.into(), directory: Some(valkey.url()), ..Setup::default() });
    let (a, b) = (start("a"), start("b"));
    let (tools, turns) = (engine(&a, SemanticType::ToolDefinition), engine(&a, SemanticType::ConversationTurn));
    let prompt = Prompt::new("tools", BLOCKS);
    tools.put_all(&prompt);
    turns.put_all(&Prompt::new("turn", BLOCKS));
    let everywhere = |daemon: &Daemon| {
        until("the copies", || {
            (copies(daemon, v1::SemanticType::ToolDefinition, Tier::Host) == u64::from(BLOCKS)).then_some(())
        });
    };
    everywhere(&b);
    let c = start("c");
    everywhere(&c);
    for node in [&b, &c] {
        assert_eq!(copies(node, v1::SemanticType::ConversationTurn, Tier::Host), 0);
    }
    drop(a);
    let got = engine(&c, SemanticType::Unspecified).get(&prompt);
    assert_eq!((got.whole(), got.hit.host_tokens), (Some(TOKENS), TOKENS));
}
