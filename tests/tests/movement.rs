//! The verbs of movement: where the next load comes from, and that copies exist before anybody is told so.

use kvtier::jobs::job::{Fate, Kind, Transfer};
use kvtier_proto::convert::block_targets;
use kvtier_proto::v1::{self, OperationState, Outcome, Tier};
use kvtier_tests::daemon::count;
use kvtier_tests::shape::content;
use kvtier_tests::valkey::Valkey;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::chain::HashChain;
use kvtier_types::{BlockKey, EngineHash};

const BLOCKS: u32 = 20;
const TOKENS: u32 = BLOCKS * 16;

/// A daemon with both lower tiers, an engine, and a prompt of 20 blocks in memory and on disk.
fn stored(object: bool) -> (Daemon, Engine, Prompt, Vec<BlockKey>) {
    let object_fields = "write = \"none\"".into();
    let daemon = daemon!(Setup { object, object_fields, ..Setup::default() });
    let shape = Shape::default();
    let engine = Engine::attach(&daemon, &shape);
    let prompt = Prompt::new("move me", BLOCKS);
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Disk, u64::from(BLOCKS));
    let keys = shape.keys(0, &prompt);
    (daemon, engine, prompt, keys)
}

/// Gets the prompt whole, and waits until nothing holds it any more.
fn get(daemon: &Daemon, engine: &Engine, prompt: &Prompt) -> kvtier::lookup::answer::Hit {
    let got = engine.get(prompt);
    assert_eq!(got.whole(), Some(prompt.tokens()));
    daemon.wait_status("the leases to end", |status| status.attachments.iter().all(|a| a.leases == 0));
    got.hit
}

fn served(daemon: &Daemon, fate: &str) -> u64 {
    count(&daemon.status().ledger, fate)
}

fn copies(daemon: &Daemon) -> [u64; 3] {
    [Tier::Host, Tier::Disk, Tier::Object].map(|tier| daemon.tier(tier).blocks)
}

#[test]
fn move_and_prefetch_decide_where_the_next_load_comes_from() {
    let (daemon, engine, prompt, keys) = stored(true);
    let control = daemon.control();
    let all = u64::from(BLOCKS);
    assert_eq!(control.move_to(&keys, Tier::Disk).unwrap().done(), (all, 0));
    assert_eq!(copies(&daemon), [0, all, 0]);
    assert_eq!(get(&daemon, &engine, &prompt).disk_tokens, TOKENS);
    // Loading brought them up again.
    assert_eq!(control.move_to(&keys, Tier::Disk).unwrap().done(), (all, 0));
    assert_eq!(control.prefetch(vec![block_targets(&keys)], 0).unwrap().done(), (all, 0));
    assert_eq!(get(&daemon, &engine, &prompt).host_tokens, TOKENS);
    assert_eq!(control.move_to(&keys, Tier::Object).unwrap().done(), (all, 0));
    assert_eq!(copies(&daemon), [0, 0, all]);
    assert_eq!(get(&daemon, &engine, &prompt).object_tokens, TOKENS);
    assert_eq!(control.move_to(&keys, Tier::Object).unwrap().done(), (all, 0));
    assert_eq!(control.move_to(&keys, Tier::Disk).unwrap().done(), (all, 0));
    assert_eq!(copies(&daemon), [0, all, all]);
    assert_eq!(control.move_to(&keys, Tier::Host).unwrap().done(), (all, 0));
    assert_eq!(get(&daemon, &engine, &prompt).host_tokens, TOKENS);
    for (fate, loads) in [("host", 2), ("disk", 1), ("object", 1)] {
        assert_eq!(served(&daemon, fate), loads * u64::from(TOKENS), "{fate}");
    }
    assert_eq!(daemon.status().corrupt_blocks, 0);
}

#[test]
fn what_cannot_be_moved_is_told_at_once() {
    let (daemon, engine, prompt, keys) = stored(false);
    let control = daemon.control();
    let device = control.move_to(&keys, Tier::Device).unwrap();
    assert_eq!(device.outcomes, [Outcome::Unsupported; 20]);
    assert!(device.operation.is_none() && device.reasons[0].reason.contains("device.memory"));
    let absent = control.move_to(&keys, Tier::Object).unwrap();
    assert_eq!(absent.outcomes, [Outcome::Unsupported; 20]);
    assert!(absent.reasons[0].reason.contains("disabled in the configuration"));
    let here = control.move_to(&keys, Tier::Host).unwrap();
    assert_eq!((here.outcomes, here.operation), (vec![Outcome::Duplicate; 20], None));
    let unknown = BlockKey::new([9; 32]);
    assert_eq!(control.move_to(&[unknown], Tier::Disk).unwrap().outcomes, [Outcome::Missing]);
    let dry = v1::MoveRequest { targets: vec![block_targets(&keys)], to: Tier::Disk.into(), dry_run: true };
    let dry = control.work(async |mut client| client.r#move(dry).await).unwrap();
    assert_eq!((dry.outcomes, dry.operation), (vec![Outcome::Accepted; 20], None));
    assert_eq!(copies(&daemon)[0], 20, "a dry run changes nothing");
    let nowhere = v1::MoveRequest { targets: vec![block_targets(&keys)], ..Default::default() };
    let refused = control.work(async |mut client| client.r#move(nowhere).await).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert_eq!(get(&daemon, &engine, &prompt).host_tokens, TOKENS);
    let gone = control.prefetch(vec![block_targets([&unknown])], 0).unwrap();
    assert_eq!(gone.done(), (0, 1));
    assert!(gone.operation.unwrap().failures[0].reason.contains("no node"));
}

#[test]
fn a_leased_block_moves_when_its_reader_lets_go() {
    let (daemon, engine, prompt, keys) = stored(false);
    let (request, _) = engine.lookup(&prompt);
    let moving = v1::MoveRequest { targets: vec![block_targets(&keys)], to: Tier::Disk.into(), dry_run: false };
    let reply = daemon.control().kv(async |mut client| client.r#move(moving).await).unwrap();
    assert_eq!(engine.frames(&request, 0, 0, TOKENS).len(), 20, "the reader keeps what it was promised");
    assert_eq!(copies(&daemon)[0], 20);
    engine.release(&request, 0, 0);
    let wait = v1::OperationRequest { operation_id: reply.operation_id, wait_ms: 15_000 };
    let ended = daemon.control().kv(async |mut client| client.wait_operation(wait).await).unwrap();
    assert_eq!((ended.state(), ended.done, copies(&daemon)[0]), (OperationState::Done, 20, 0));
    assert_eq!(ended.bytes, 20 * 65_536);
}

#[test]
fn ten_thousand_targets_go_in_one_call() {
    let (daemon, engine, prompt, keys) = stored(false);
    let key = |n: u32| {
        let mut bytes = [7; 32];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        keys.get(n as usize * 2).copied().unwrap_or(BlockKey::new(bytes))
    };
    let targets: Vec<v1::Target> = (0..10_000).map(|n| block_targets([&key(n)])).collect();
    let request = v1::EvictRequest { targets, ..Default::default() };
    let outcomes = daemon.control().evict_from(request).unwrap();
    assert_eq!(outcomes.len(), 10_000);
    assert!(outcomes[..10].iter().all(|o| o.outcome() == Outcome::Applied));
    assert!(outcomes[10..].iter().all(|o| o.outcome() == Outcome::Missing));
    assert_eq!((outcomes[9_999].target, copies(&daemon)[1]), (9_999, 10));
    assert_eq!(engine.get(&prompt).hit.tokens, 0, "the first block went");
    let too_many: Vec<BlockKey> = (100..70_000).map(key).collect();
    let refused = daemon.control().evict(&too_many, true).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert!(refused.message().contains("split it"), "{refused}");
}

/// Blocks as vLLM names them by their tokens, put into the daemon: their keys are the namespace's.
pub(crate) fn put_tokens(engine: &Engine, tokens: &[u32]) -> u32 {
    let mut chain = HashChain::new("0");
    let hashes: Vec<EngineHash> = tokens.chunks_exact(16).map(|block| chain.push(block, &[])).collect();
    let (session, kv) = engine.worker(0);
    let granted = until("room", || {
        let (states, frames) = engine.reserve(0, 0, hashes.clone(), None)?;
        states.iter().all(|state| *state == 1).then_some(frames)
    });
    let mut transfers = Vec::new();
    for ((hash, frame), slot) in hashes.iter().zip(granted).zip(0..) {
        kv.fill(0, slot, &content(hash, 0, 0, 65_536));
        transfers.push(Transfer { frame: frame.expect("a frame"), block_id: slot });
    }
    assert!(engine.run_job(session, Kind::Save, transfers).iter().all(|fate| *fate == Fate::Done));
    u32::try_from(hashes.len()).expect("few blocks")
}

pub(crate) fn tokens_target(model: &str, tokens: &[u32]) -> v1::Target {
    let token_ids = tokens.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>().into();
    let tokens = v1::TokensTarget { model: model.into(), token_ids, ..Default::default() };
    v1::Target { target: Some(v1::target::Target::Tokens(tokens)), ..Default::default() }
}

#[test]
fn prompts_are_named_by_their_tokens() {
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    let tokens: Vec<u32> = (0..6 * 16 + 5).collect();
    let blocks = put_tokens(&engine, &tokens);
    daemon.wait_blocks(Tier::Disk, u64::from(blocks));
    let control = daemon.control();
    let request =
        v1::MoveRequest { targets: vec![tokens_target("tiny", &tokens)], to: Tier::Disk.into(), dry_run: false };
    let moved = control.work(async |mut client| client.r#move(request).await).unwrap();
    assert_eq!((moved.outcomes.clone(), moved.done()), (vec![Outcome::Accepted], (6, 0)));
    assert_eq!(moved.reasons[0].blocks, 6);
    let up = control.prefetch(vec![tokens_target("tiny", &tokens[..40])], 0).unwrap();
    assert_eq!(up.done(), (2, 0), "full blocks only");
    assert_eq!(copies(&daemon)[0], 2);
    let evict = |target| v1::EvictRequest { targets: vec![target], ..Default::default() };
    let other = control.evict_from(evict(tokens_target("huge", &tokens))).unwrap();
    assert_eq!((other[0].outcome(), other[0].blocks), (Outcome::Missing, 0));
    assert!(other[0].reason.contains("huge"), "{}", other[0].reason);
    let evicted = control.evict_from(evict(tokens_target("tiny", &tokens))).unwrap();
    assert_eq!((evicted.len(), evicted[0].outcome(), evicted[0].blocks), (1, Outcome::Applied, 6));
    assert_eq!(copies(&daemon)[1], 0);
}

fn setup(node_id: &str, valkey: &Valkey) -> Setup {
    Setup { node_id: node_id.into(), directory: Some(valkey.url()), ..Setup::default() }
}

/// A setup with an object store that all nodes share, written to by verb only.
fn with_store(node_id: &str, valkey: &Valkey, store: &std::path::Path) -> Setup {
    let url = format!("url = \"file://{}\"\nlist_every = \"200ms\"\nwrite = \"none\"", store.display());
    Setup { object: true, object_fields: url, ..setup(node_id, valkey) }
}

/// Waits until a node has told everything, and knows so many nodes.
fn wait_told(daemon: &Daemon, nodes: usize) {
    until("the directory to be told", || {
        let reply = daemon.control().nodes().ok()?;
        (reply.directory_state == "ok" && reply.unpublished == 0 && reply.nodes.len() == nodes).then_some(())
    });
}

/// Two nodes, and a prompt that the first one wrote.
fn pair(valkey: &Valkey) -> (Daemon, Daemon, Shape, Prompt, Vec<BlockKey>) {
    let (a, b) = (daemon!(setup("a", valkey)), daemon!(setup("b", valkey)));
    let shape = Shape::default();
    let prompt = Prompt::new("travels", BLOCKS);
    let on_a = Engine::attach(&a, &shape);
    on_a.put_all(&prompt);
    wait_told(&a, 2);
    wait_told(&b, 2);
    let keys = shape.keys(0, &prompt);
    (a, b, shape, prompt, keys)
}

#[test]
fn a_prefetch_brings_blocks_from_a_peer_before_anybody_asks() {
    let Some(valkey) = Valkey::start() else { return };
    let (mut a, b, shape, prompt, keys) = pair(&valkey);
    // No engine was ever attached to b: keys alone name what is to come.
    let brought = b.control().prefetch(vec![block_targets(&keys)], 0).unwrap();
    assert_eq!(brought.done(), (20, 0), "{brought:?}\n{}", b.log());
    let again = b.control().prefetch(vec![block_targets(&keys)], 0).unwrap();
    assert_eq!((again.outcomes, again.operation), (vec![Outcome::Duplicate; 20], None));
    a.kill();
    assert_eq!(get(&b, &Engine::attach(&b, &shape), &prompt).host_tokens, TOKENS);
    let block = &b.control().locate(&keys[4..5]).unwrap()[0];
    assert_eq!((block.model.as_str(), block.depth_blocks), ("tiny", 4), "what it is came with it");
}

#[test]
fn a_prefetch_brings_blocks_from_packs_of_a_node_that_is_gone() {
    let Some(valkey) = Valkey::start() else { return };
    let store = tempfile::tempdir().unwrap();
    let mut a = daemon!(with_store("a", &valkey, store.path()));
    let b = daemon!(with_store("b", &valkey, store.path()));
    let shape = Shape::default();
    let (on_a, on_b) = (Engine::attach(&a, &shape), Engine::attach(&b, &shape));
    let prompt = Prompt::new("packed", BLOCKS);
    on_a.put_all(&prompt);
    let keys = shape.keys(0, &prompt);
    assert_eq!(a.control().move_to(&keys, Tier::Object).unwrap().done(), (20, 0));
    a.kill();
    until("b to find the packs", || {
        let brought = b.control().prefetch(vec![block_targets(&keys)], 0).unwrap();
        (brought.outcomes == [Outcome::Duplicate; 20]).then_some(())
    });
    assert_eq!(get(&b, &on_b, &prompt).host_tokens, TOKENS);
    let block = &b.control().locate(&keys[4..5]).unwrap()[0];
    assert_eq!((block.model.as_str(), block.depth_blocks), ("tiny", 4), "the record says what it is");
}

#[test]
fn replicas_outlive_the_node_that_made_them() {
    let Some(valkey) = Valkey::start() else { return };
    let (mut a, b, shape, prompt, keys) = pair(&valkey);
    let replicate = |copies: u32, node_ids: &[&str]| {
        let node_ids = node_ids.iter().map(|id| (*id).to_owned()).collect();
        let request = v1::ReplicateRequest { targets: vec![block_targets(&keys)], copies, node_ids, deadline_ms: 0 };
        a.control().work(async |mut client| client.replicate(request).await).unwrap()
    };
    assert_eq!(replicate(1, &["b"]).done(), (20, 0));
    let clipped = replicate(2, &[]);
    assert_eq!(clipped.done(), (0, 20));
    let failure = &clipped.operation.as_ref().unwrap().failures[0];
    assert_eq!((failure.outcome(), failure.reason.contains("1 of 2")), (Outcome::Clipped, true), "{failure:?}");
    assert_eq!(replicate(1, &["nobody"]).done(), (0, 20));
    wait_told(&b, 2);
    assert_eq!(replicate(0, &[]).done(), (20, 0), "copies that exist count");
    a.kill();
    assert_eq!(get(&b, &Engine::attach(&b, &shape), &prompt).host_tokens, TOKENS);
}

fn commit(daemon: &Daemon, keys: &[BlockKey], deadline_ms: u32) -> v1::OperationReply {
    let request = v1::CommitCheckpointRequest { targets: vec![block_targets(keys)], deadline_ms };
    daemon.control().kv(async |mut client| client.commit_checkpoint(request).await).expect("a commit")
}

fn outcomes(reply: &v1::OperationReply) -> Vec<Outcome> {
    reply.outcomes.iter().map(v1::TargetOutcome::outcome).collect()
}

#[test]
fn a_committed_checkpoint_is_restored_on_another_node_from_a_peer() {
    let Some(valkey) = Valkey::start() else { return };
    let (mut a, b, shape, prompt, keys) = pair(&valkey);
    let reply = commit(&a, &keys, 0);
    a.kill();
    assert_eq!((outcomes(&reply), reply.operation_id.as_str()), (vec![Outcome::Applied; 20], ""), "{reply:?}");
    let on_b = Engine::attach(&b, &shape);
    assert_eq!(on_b.get(&prompt).whole(), Some(TOKENS));
    let block = &b.control().locate(&keys[..1]).unwrap()[0];
    assert_eq!(block.semantic(), v1::SemanticType::ExecutionCheckpoint);
}

#[test]
fn a_committed_checkpoint_is_restored_on_another_node_from_the_object_store() {
    let Some(valkey) = Valkey::start() else { return };
    let store = tempfile::tempdir().unwrap();
    let mut a = daemon!(with_store("a", &valkey, store.path()));
    let shape = Shape::default();
    let prompt = Prompt::new("checkpoint", BLOCKS);
    Engine::attach(&a, &shape).put_all(&prompt);
    let keys = shape.keys(0, &prompt);
    let reply = commit(&a, &keys, 0);
    a.kill();
    assert_eq!(outcomes(&reply), [Outcome::Applied; 20], "{reply:?}");
    let b = daemon!(with_store("b", &valkey, store.path()));
    let on_b = Engine::attach(&b, &shape);
    until("all blocks to be restored", || (on_b.get(&prompt).whole() == Some(TOKENS)).then_some(()));
}

#[test]
fn without_another_home_nothing_is_promised() {
    let daemon = daemon!(Setup { object: true, ..Setup::default() });
    let shape = Shape::default();
    let prompt = Prompt::new("alone", 3);
    Engine::attach(&daemon, &shape).put_all(&prompt);
    let mut keys = shape.keys(0, &prompt);
    keys.push(BlockKey::new([9; 32]));
    // The object store is a directory of this very node.
    let reply = commit(&daemon, &keys, 200);
    let rejected = Outcome::Rejected;
    assert_eq!(outcomes(&reply), [rejected, rejected, rejected, Outcome::Missing]);
    assert!(reply.outcomes[0].reason.contains("object.url"), "{}", reply.outcomes[0].reason);
}

#[test]
fn a_checkpoint_that_is_late_goes_on_as_an_operation() {
    let Some(valkey) = Valkey::start() else { return };
    let (a, b, _shape, _prompt, keys) = pair(&valkey);
    b.freeze();
    let reply = commit(&a, &keys, 300);
    assert_eq!(outcomes(&reply), [Outcome::Deferred; 20]);
    b.thaw();
    let operation = until("the copies", || {
        let request = v1::OperationRequest { operation_id: reply.operation_id.clone(), wait_ms: 5_000 };
        let operation = a.control().kv(async |mut client| client.wait_operation(request).await).unwrap();
        (operation.state() != OperationState::Running).then_some(operation)
    });
    assert_eq!(
        (operation.state(), operation.done, operation.verb.as_str()),
        (OperationState::Done, 20, "CommitCheckpoint")
    );
    assert_eq!(b.tier(Tier::Host).blocks, 20);
}

#[test]
fn operations_are_given_up_by_verb_and_by_deadline() {
    let Some(valkey) = Valkey::start() else { return };
    let (mut a, b, _shape, _prompt, _keys) = pair(&valkey);
    b.freeze();
    // The frozen node is asked, and does not answer.
    let unknown = || vec![block_targets([&BlockKey::new([9; 32])])];
    let expired = a.control().prefetch(unknown(), 300).unwrap().operation.unwrap();
    assert_eq!(expired.state(), OperationState::Expired);
    let request = v1::PrefetchRequest { targets: unknown(), deadline_ms: 60_000, ..Default::default() };
    let reply = a.control().kv(async |mut client| client.prefetch(request).await).unwrap();
    assert_eq!(reply.outcomes[0].outcome(), Outcome::Accepted);
    let id = v1::OperationRequest { operation_id: reply.operation_id, wait_ms: 0 };
    let cancelled = a.control().kv(async |mut client| client.cancel_operation(id.clone()).await).unwrap();
    assert_eq!(cancelled.state(), OperationState::Cancelled);
    let again = a.control().kv(async |mut client| client.cancel_operation(id).await).unwrap();
    assert_eq!(again.state(), OperationState::Cancelled, "cancelling twice is no fault");
    let list = a.control().kv(async |mut client| client.list_operations(v1::ListOperationsRequest {}).await).unwrap();
    let states: Vec<_> = list.operations.iter().map(v1::Operation::state).collect();
    assert_eq!(states, [OperationState::Cancelled, OperationState::Expired], "the latest first");
    let unknown = v1::OperationRequest { operation_id: "ab".into(), wait_ms: 0 };
    let refused = a.control().kv(async |mut client| client.get_operation(unknown).await).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::NotFound);
    assert!(a.terminate().success(), "nothing of it keeps the daemon from stopping");
}
