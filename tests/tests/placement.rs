//! Where a program's next step goes: real daemons, a real directory, contexts on some of them.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use kvtier_proto::convert::block_targets;
use kvtier_proto::v1::{self, OperationState, PlaceReason, PlaceWork, Tier};
use kvtier_tests::rpc::Control;
use kvtier_tests::valkey::Valkey;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::BlockKey;

use crate::movement::{put_tokens, tokens_target};

const BLOCKS: u32 = 20;
const TOKENS: u32 = BLOCKS * 16;
/// What a machine busy with other tests has answered by.
const PATIENT_MS: u32 = 1_000;
/// Where the calls of another user go, when this process is that user's.
const SOCKET: &str = "KVTIER_TEST_PLACE_SOCKET";
/// The keys it names, and whether they are its tenant's.
const KEYS: &str = "KVTIER_TEST_PLACE_KEYS";
const OWNS: &str = "KVTIER_TEST_PLACE_OWNS";

fn start(node_id: &str, valkey: &Valkey, sections: &str) -> Daemon {
    let directory = Some(valkey.url());
    daemon!(Setup { node_id: node_id.into(), directory, sections: sections.into(), ..Setup::default() })
}

/// Waits until a node has told everything, and knows so many nodes.
fn wait_told(daemon: &Daemon, nodes: usize) {
    until("the directory to be told", || {
        let reply = daemon.control().nodes().ok()?;
        (reply.directory_state == "ok" && reply.unpublished == 0 && reply.nodes.len() == nodes).then_some(())
    });
}

/// A step of a program, on candidates with queues in milliseconds.
fn step(program: &str, candidates: &[(&str, u32)]) -> v1::PlaceRequest {
    let candidate = |(node, queue_ms): &(&str, u32)| v1::PlaceCandidate {
        node_id: (*node).to_owned(),
        queue_ms: *queue_ms,
        prefill_tokens_per_second: 0,
    };
    v1::PlaceRequest {
        program_id: program.to_owned(),
        candidates: candidates.iter().map(candidate).collect(),
        deadline_ms: PATIENT_MS,
        ..Default::default()
    }
}

/// Asks until what lies where was found out in time.
fn sighted(daemon: &Daemon, request: &v1::PlaceRequest) -> v1::PlaceReply {
    until("a placement that is not blind", || {
        let reply = daemon.control().place(request.clone()).expect("a well-formed request is answered");
        (reply.reason() != PlaceReason::UnknownState).then_some(reply)
    })
}

fn chosen(reply: &v1::PlaceReply) -> (&str, PlaceReason) {
    (&reply.node_id, reply.reason())
}

#[test]
fn a_step_goes_where_its_context_is_unless_it_would_wait() {
    let Some(valkey) = Valkey::start() else { return };
    let (a, b, c) = (start("a", &valkey, ""), start("b", &valkey, ""), start("c", &valkey, ""));
    let mut on_b = Engine::attach(&b, &Shape::default());
    on_b.speak_for("planner", "", "");
    on_b.put_all(&Prompt::new("planner", BLOCKS));
    for node in [&a, &b, &c] {
        wait_told(node, 3);
    }
    // Nodes that joined are offered once they have what was meant for them: here at once, since nothing was.
    until("all nodes to be warm", || {
        let reply = a.control().nodes().ok()?;
        reply.nodes.iter().all(|n| n.state == "ready").then_some(())
    });
    let unnamed = sighted(&a, &step("planner", &[]));
    assert_eq!((chosen(&unnamed).0, unnamed.costs.len()), ("b", 3), "{unnamed:?}");
    // Whoever is asked: it finds out who knows the program.
    for asked in [&a, &b, &c] {
        let all = sighted(asked, &step("planner", &[("a", 0), ("b", 0), ("c", 0)]));
        assert_eq!((chosen(&all), all.costs.len()), (("b", PlaceReason::State), 3), "{all:?}");
        let [on_a, on_b, _] = &all.costs[..] else { panic!("{all:?}") };
        assert_eq!((on_b.host_tokens, on_b.recompute_tokens), (TOKENS, 0), "{all:?}");
        assert_eq!((on_a.peer_tokens, on_a.recompute_tokens), (TOKENS, 0), "{all:?}");
        assert!(on_a.load_us > on_b.load_us && all.explanation.contains("320 tokens"), "{all:?}");
    }
    let waits = sighted(&a, &step("planner", &[("a", 5), ("b", 10_000)]));
    assert_eq!(chosen(&waits), ("a", PlaceReason::Queue), "{waits:?}");
    let current = |queue_ms, node: &str| v1::PlaceRequest {
        current_node_id: node.to_owned(),
        ..step("planner", &[("a", queue_ms), ("b", queue_ms)])
    };
    assert_eq!(chosen(&sighted(&a, &current(0, "b"))), ("b", PlaceReason::Stays));
    // Loading 1.3 MB from another node is more than a tenth of nothing, and less than one of a second.
    let by_keys = |request| {
        let targets = vec![block_targets(&Shape::default().keys(0, &Prompt::new("planner", BLOCKS)))];
        v1::PlaceRequest { targets, ..request }
    };
    assert_eq!(chosen(&sighted(&b, &by_keys(current(0, "a")))), ("b", PlaceReason::State));
    assert_eq!(chosen(&sighted(&b, &by_keys(current(1_000, "a")))), ("a", PlaceReason::Stays));
    let longer = v1::PlaceRequest { prompt_tokens: 1_000, ..step("planner", &[("b", 0)]) };
    let longer = sighted(&b, &longer);
    assert_eq!((longer.costs[0].host_tokens, longer.costs[0].recompute_tokens), (TOKENS, 1_000 - TOKENS));
    assert_eq!(longer.costs[0].prefill_tokens_per_second, 8_000, "the rate that was assumed is told");
    let strangers = sighted(&b, &step("planner", &[("b", 0), ("elsewhere", 0)]));
    assert_eq!((chosen(&strangers).0, strangers.costs[1].known), ("b", false));
}

#[test]
fn what_is_not_known_costs_the_choice_only() {
    let Some(mut valkey) = Valkey::start() else { return };
    let (a, b) = (start("a", &valkey, ""), start("b", &valkey, ""));
    let mut on_a = Engine::attach(&a, &Shape::default());
    on_a.speak_for("p", "", "");
    on_a.put_all(&Prompt::new("p", BLOCKS));
    wait_told(&a, 2);
    wait_told(&b, 2);
    let place = |request| a.control().place(request).expect("it is answered");
    let stranger = place(step("nobody", &[("a", 9), ("b", 3)]));
    assert_eq!(chosen(&stranger), ("b", PlaceReason::UnknownState));
    assert!(stranger.explanation.contains("knows a context of program \"nobody\""), "{stranger:?}");
    let nowhere = place(step("p", &[("x", 9), ("y", 3)]));
    assert_eq!(chosen(&nowhere), ("y", PlaceReason::UnknownState));
    valkey.kill();
    until("the loss to be noticed", || a.control().nodes().ok()?.directory_state.contains("away").then_some(()));
    let candidates = [("a", 9), ("b", 3)];
    let blind = place(step("p", &candidates));
    assert_eq!(chosen(&blind), ("b", PlaceReason::UnknownState));
    assert!(blind.explanation.contains("directory"), "{blind:?}");
    assert_eq!(blind.costs[0].host_tokens, TOKENS, "what this node has it knows");
    let stays = v1::PlaceRequest { current_node_id: "a".into(), start: true, ..step("p", &candidates) };
    let stays = place(stays);
    assert_eq!((chosen(&stays), stays.started.len()), (("a", PlaceReason::UnknownState), 0));
    assert_eq!(chosen(&place(step("p", &[("a", 0)]))).1, PlaceReason::Queue, "of itself it knows all");
    let many: Vec<String> = (0..1_025).map(|n| format!("n{n}")).collect();
    let many: Vec<(&str, u32)> = many.iter().map(|n| (n.as_str(), 0)).collect();
    let keys = vec![BlockKey::new([1; 32]); 4_097];
    let bad = [
        v1::PlaceRequest::default(),
        step("p", &many),
        step("p", &[("a", 0), ("a", 1)]),
        step("p", &[("not a name", 0)]),
        step(&"x".repeat(129), &[]),
        v1::PlaceRequest { targets: vec![block_targets(&keys)], ..step("p", &[]) },
        v1::PlaceRequest { targets: vec![v1::Target::default()], ..step("p", &[]) },
        v1::PlaceRequest { targets: vec![block_targets(&keys[..1]); 65], ..step("p", &[]) },
        v1::PlaceRequest { tenant: "no tenant".into(), ..step("p", &[]) },
    ];
    for bad in bad {
        let error = a.control().place(bad).unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
    }
}

fn wait_end(daemon: &Daemon, started: &v1::PlaceStarted) -> v1::Operation {
    let wait = v1::OperationRequest { operation_id: started.operation_id.clone(), wait_ms: 15_000 };
    daemon.control().kv(async |mut client| client.wait_operation(wait).await).expect("the operation is known")
}

#[test]
fn what_is_started_can_be_waited_for() {
    let Some(valkey) = Valkey::start() else { return };
    let (a, b, c) = (start("a", &valkey, ""), start("b", &valkey, ""), start("c", &valkey, ""));
    let mut on_b = Engine::attach(&b, &Shape::default());
    on_b.speak_for("p", "", "");
    on_b.put_all(&Prompt::new("p", BLOCKS));
    for node in [&a, &b, &c] {
        wait_told(node, 3);
    }
    let begin = |node: &str| v1::PlaceRequest { start: true, ..step("p", &[(node, 0)]) };
    for (asked, to, kind) in [(&a, "a", PlaceWork::Prefetch), (&b, "c", PlaceWork::Replicate)] {
        let reply = sighted(asked, &begin(to));
        let [started] = &reply.started[..] else { panic!("{reply:?}") };
        assert_eq!((started.kind(), started.node_id.as_str(), started.blocks), (kind, to, u64::from(BLOCKS)));
        let ended = wait_end(asked, started);
        assert_eq!((ended.state(), ended.done), (OperationState::Done, u64::from(BLOCKS)), "{ended:?}");
        until("the directory to hear of it", || {
            let there = sighted(asked, &begin(to));
            (there.costs[0].host_tokens == TOKENS && there.started.is_empty()).then_some(())
        });
    }
}

#[test]
fn tokens_and_sessions_name_contexts_too() {
    let daemon = daemon!(Setup::default());
    let mut engine = Engine::attach(&daemon, &Shape::default());
    engine.speak_for("", "", "chat");
    let tokens: Vec<u32> = (0..6 * 16 + 5).collect();
    put_tokens(&engine, &tokens);
    daemon.wait_blocks(Tier::Disk, 6);
    let session = v1::SessionTarget { session_id: "chat".into(), ..Default::default() };
    let session = v1::Target { target: Some(v1::target::Target::Session(session)), ..Default::default() };
    for target in [tokens_target("tiny", &tokens), session] {
        let request = v1::PlaceRequest { targets: vec![target], prompt_tokens: 101, ..step("", &[]) };
        let reply = sighted(&daemon, &request);
        let cost = &reply.costs[0];
        assert_eq!((reply.node_id.as_str(), cost.host_tokens, cost.recompute_tokens), ("test", 96, 5), "{reply:?}");
    }
    let huge = v1::PlaceRequest { targets: vec![tokens_target("huge", &tokens)], ..step("", &[]) };
    let reply = daemon.control().place(huge).expect("it is answered");
    assert_eq!(chosen(&reply), ("test", PlaceReason::UnknownState));
    assert!(reply.explanation.contains("huge"), "{reply:?}");
}

/// Runs this file's [`placements_of_another_user`] as a user.
fn as_user(uid: u32, socket: &Path, keys: &[BlockKey], owns: bool) {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "placement::placements_of_another_user", "--nocapture"]).uid(uid).gid(uid);
    let keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
    let command = command.env(SOCKET, socket).env(KEYS, keys.join(" ")).env(OWNS, owns.to_string());
    let output = command.output().expect("a second process");
    assert!(output.status.success(), "user {uid}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "user {uid}: it was not run");
}

#[test]
fn placements_of_another_user() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let control = Control::new(Path::new(&socket));
    let keys: Vec<BlockKey> = std::env::var(KEYS).unwrap().split(' ').map(|key| key.parse().unwrap()).collect();
    let owns = std::env::var(OWNS).unwrap() == "true";
    let of_program = step("secret", &[("a", 0), ("b", 0)]);
    let by_keys = v1::PlaceRequest { targets: vec![block_targets(&keys)], prompt_tokens: TOKENS, ..of_program.clone() };
    let served = |reply: &v1::PlaceReply| reply.costs.iter().map(|c| TOKENS - c.recompute_tokens).max().unwrap();
    if owns {
        until("the owner to find its context", || {
            let reply = control.place(of_program.clone()).unwrap();
            (chosen(&reply) == ("b", PlaceReason::State) && served(&reply) == TOKENS).then_some(())
        });
        return;
    }
    let reply = control.place(of_program).unwrap();
    assert_eq!(chosen(&reply), ("a", PlaceReason::UnknownState), "{reply:?}");
    let reply = control.place(by_keys.clone()).unwrap();
    assert_eq!((chosen(&reply), served(&reply)), (("a", PlaceReason::Queue), 0), "{reply:?}");
    let foreign = v1::PlaceRequest { tenant: "owner".into(), ..by_keys };
    assert_eq!(control.place(foreign).unwrap_err().code(), tonic::Code::PermissionDenied);
}

#[test]
fn another_tenant_learns_nothing_of_what_lies_where() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can call as other users");
        return;
    }
    let Some(valkey) = Valkey::start() else { return };
    let sections = "[listen]\nsocket_mode = \"0666\"\n[[tenants]]\nid = \"owner\"\nuids = [70001]\nsalts = [\"pepper\"]\n\
                    [[tenants]]\nid = \"other\"\nuids = [70002]";
    let (a, b) = (start("a", &valkey, sections), start("b", &valkey, sections));
    let shape = Shape::default();
    let _on_a = Engine::attach(&a, &shape);
    let mut on_b = Engine::attach(&b, &shape);
    on_b.cache_salt = "pepper".into();
    on_b.speak_for("secret", "", "");
    let prompt = Prompt::new("secret", BLOCKS);
    on_b.put_all(&prompt);
    wait_told(&a, 2);
    wait_told(&b, 2);
    let keys = shape.keys(0, &prompt);
    for daemon in [&a, &b] {
        let socket = daemon.socket();
        let run = socket.parent().unwrap();
        for dir in [run.parent().unwrap(), run] {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        as_user(70001, &socket, &keys, true);
        as_user(70002, &socket, &keys, false);
    }
}

#[test]
fn a_branch_that_never_called_is_placed_where_the_context_is_that_it_shares() {
    let Some(valkey) = Valkey::start() else { return };
    let (a, b) = (start("a", &valkey, ""), start("b", &valkey, ""));
    let mut on_b = Engine::attach(&b, &Shape::default());
    on_b.speak_for("boss", "", "");
    on_b.put_all(&Prompt::new("boss", BLOCKS));
    [&a, &b].iter().for_each(|node| wait_told(node, 2));
    let shared = v1::SharedContext { program_id: "boss".into(), end_token: 160, ..Default::default() };
    let branch = v1::GraphStep {
        step_id: "only".into(),
        program_id: "swarm/x".into(),
        shared_context: Some(shared),
        ..Default::default()
    };
    let declared = v1::DeclareRequest { program_id: "swarm".into(), steps: vec![branch], ..Default::default() };
    a.control().of_programs(async |mut client| client.declare(declared).await).expect("an answer");
    for asked in [&a, &b] {
        let reply = sighted(asked, &step("swarm/x", &[("a", 0), ("b", 0)]));
        assert_eq!(chosen(&reply), ("b", PlaceReason::State), "{reply:?}");
        assert_eq!(reply.costs[1].host_tokens, 160, "{reply:?}");
    }
}
