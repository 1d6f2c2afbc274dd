//! Declared programs: what should run next, on every node and after a kill.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use kvtier_proto::v1::{self, Outcome, SignalKind};
use kvtier_tests::rpc::Control;
use kvtier_tests::valkey::Valkey;
use kvtier_tests::wait::until;
use kvtier_tests::{Engine, Prompt, Setup, Shape, daemon};
use tonic::Code;

/// Where the calls of another user go, when this process is that user's.
const SOCKET: &str = "KVTIER_TEST_GRAPHS_SOCKET";

fn step(id: &str, after: &[&str], expected_ms: u64) -> v1::GraphStep {
    v1::GraphStep {
        step_id: id.into(),
        after: after.iter().map(|a| (*a).to_owned()).collect(),
        expected_ms,
        kind: format!("kind of {id}"),
        ..Default::default()
    }
}

/// `plan`, then `short` and `long`, which another branch runs, then after a tool `sum`.
fn plan() -> Vec<v1::GraphStep> {
    let long = v1::GraphStep { program_id: "plan-7/long".into(), ..step("long", &["plan"], 40_000) };
    let sum = v1::GraphStep { tool_gap_ms: 5_000, ..step("sum", &["short", "long"], 2_000) };
    vec![sum, long, step("short", &["plan"], 1_000), step("plan", &[], 10_000)]
}

fn declaration(program: &str, steps: Vec<v1::GraphStep>) -> v1::DeclareRequest {
    v1::DeclareRequest { program_id: program.into(), steps, ..Default::default() }
}

fn declare(control: &Control, request: v1::DeclareRequest) -> v1::DeclareReply {
    control.of_programs(async |mut client| client.declare(request).await).expect("the declaration is answered")
}

fn refusal(control: &Control, request: v1::DeclareRequest) -> String {
    let answered = control.of_programs(async |mut client| client.declare(request).await);
    let refused = answered.expect_err("it is refused");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    refused.message().to_owned()
}

fn progress(control: &Control, program: &str, began: &[&str], ended: &[&str]) -> v1::ProgressReply {
    let owned = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
    let (began, ended) = (owned(began), owned(ended));
    let request = v1::ProgressRequest { program_id: program.into(), began, ended, ..Default::default() };
    control.of_programs(async |mut client| client.progress(request).await).expect("progress is answered")
}

fn graphs(control: &Control, program: &str) -> Vec<v1::Graph> {
    let request = v1::GetGraphRequest { program_id: program.into(), ..Default::default() };
    control.of_programs(async |mut client| client.get_graph(request).await).expect("graphs are shown").graphs
}

fn states(control: &Control, program: &str) -> Vec<(String, String)> {
    let graph = graphs(control, program).into_iter().next().unwrap_or_default();
    graph.steps.into_iter().map(|s| (s.step.unwrap_or_default().step_id, s.state)).collect()
}

fn next(control: &Control, request: v1::NextStepsRequest) -> Vec<v1::NextStep> {
    control.of_programs(async |mut client| client.next_steps(request).await).expect("what is next is answered").steps
}

fn all(control: &Control) -> Vec<v1::NextStep> {
    next(control, v1::NextStepsRequest::default())
}

fn of_program(control: &Control, program: &str) -> Vec<v1::NextStep> {
    next(control, v1::NextStepsRequest { program_ids: vec![program.into()], ..Default::default() })
}

fn ids(steps: &[v1::NextStep]) -> Vec<(&str, &str)> {
    steps.iter().map(|s| (s.program_id.as_str(), s.step_id.as_str())).collect()
}

fn end(control: &Control, program: &str, kind: SignalKind) -> Outcome {
    let request = v1::SignalRequest { program_id: program.into(), kind: kind.into(), ..Default::default() };
    control.signal(request).expect("the signal is taken").outcome()
}

#[test]
fn steps_come_in_order_and_outlive_a_kill() {
    let mut daemon = daemon!(Setup::default());
    let control = |daemon: &kvtier_tests::Daemon| Control::new(&daemon.socket());
    let asks = control(&daemon);
    let declared = declare(&asks, declaration("plan-7", plan()));
    assert_eq!((declared.outcome(), declared.steps), (Outcome::Applied, 4), "{declared:?}");
    assert_eq!(declare(&asks, declaration("plan-7", plan())).outcome(), Outcome::Duplicate);
    declare(&asks, declaration("quick", vec![step("only", &[], 3_000)]));
    let first = all(&asks);
    assert_eq!(ids(&first), [("quick", "only"), ("plan-7", "plan")], "the short program first: {first:?}");
    assert!(first[0].priority < first[1].priority);
    assert_eq!((first[1].rank_ms, first[1].remaining_ms), (57_000, 53_000));
    assert_eq!(first[1].reason, "critical path: 57.0 s to the end of plan-7");

    assert_eq!(progress(&asks, "plan-7", &["plan"], &[]).outcome(), Outcome::Applied);
    assert!(of_program(&asks, "plan-7").is_empty(), "it runs");
    assert_eq!(progress(&asks, "plan-7", &[], &["plan"]).steps, 1);
    assert_eq!(ids(&of_program(&asks, "plan-7")), [("plan-7/long", "long"), ("plan-7", "short")]);
    assert_eq!(ids(&of_program(&asks, "plan-7/long")), [("plan-7/long", "long")]);
    let clipped = progress(&asks, "plan-7", &["long", "nothing"], &[]);
    assert_eq!((clipped.outcome(), clipped.reason.as_str()), (Outcome::Clipped, "1 steps are not declared: nothing"));
    let running =
        v1::NextStepsRequest { program_ids: vec!["plan-7".into()], include_running: true, ..Default::default() };
    let running = next(&asks, running);
    assert_eq!(running.iter().filter(|s| s.running).map(|s| s.step_id.as_str()).collect::<Vec<_>>(), ["long"]);

    // A clean stop writes how far steps are; a kill may forget the last seconds of it, never what was declared.
    assert!(daemon.terminate().success());
    daemon.restart();
    let again = [("plan", "ended"), ("long", "running"), ("short", "ready"), ("sum", "waiting")];
    let again = again.map(|(id, state)| (id.to_owned(), state.to_owned()));
    let told = |control: &Control| {
        let mut told = states(control, "plan-7");
        told.sort_by_key(|(id, _)| ["plan", "long", "short", "sum"].iter().position(|known| known == id));
        told
    };
    assert_eq!(told(&control(&daemon)), again);
    declare(&control(&daemon), declaration("late", vec![step("x", &[], 500)]));
    assert_eq!(end(&control(&daemon), "quick", SignalKind::Completion), Outcome::Applied);
    assert_eq!(end(&control(&daemon), "quick", SignalKind::Completion), Outcome::Missing);
    daemon.kill();
    daemon.restart();
    let asks = control(&daemon);
    assert_eq!(told(&asks), again);
    assert_eq!(ids(&all(&asks)), [("late", "x"), ("plan-7", "short")], "what ended does not come back");
    assert_eq!(graphs(&asks, "plan-7")[0].revision, declared.revision);
    // A step that begins makes up for what was not heard.
    assert_eq!(progress(&asks, "plan-7", &["sum"], &[]).steps, 3);
    assert_eq!(declare(&asks, declaration("late", Vec::new())).outcome(), Outcome::Applied);
    assert_eq!(declare(&asks, declaration("late", Vec::new())).outcome(), Outcome::Missing);
    daemon.kill();
    daemon.restart();
    assert!(graphs(&control(&daemon), "late").is_empty());
}

#[test]
fn programs_that_declare_nothing_go_by_what_engines_took() {
    let daemon = daemon!(Setup::default());
    let shape = Shape::default();
    let mut engine = Engine::attach(&daemon, &shape);
    let asks = Control::new(&daemon.socket());
    for program in ["one", "two"] {
        engine.speak_for(program, "", "");
        engine.put_all(&Prompt::new(program, 4));
    }
    let asked =
        v1::NextStepsRequest { program_ids: vec!["one".into(), "two".into(), "stranger".into()], ..Default::default() };
    let mut steps = next(&asks, asked);
    assert!(steps.iter().all(|s| s.reason.starts_with("attained service") && s.step_id.is_empty()), "{steps:?}");
    steps.sort_by(|a, b| a.program_id.cmp(&b.program_id));
    assert_eq!(ids(&steps), [("one", ""), ("stranger", ""), ("two", "")]);
    assert!(all(&asks).is_empty(), "nobody said that it waits");
    assert_eq!(end(&asks, "two", SignalKind::Continuation), Outcome::Applied);
    let wait = v1::SignalRequest {
        program_id: "one".into(),
        kind: SignalKind::ToolWait.into(),
        expected_resume_ms: 60_000,
        ..Default::default()
    };
    asks.signal(wait).unwrap();
    declare(&asks, declaration("far", vec![step("x", &[], 600_000)]));
    let steps = all(&asks);
    assert_eq!(ids(&steps), [("two", ""), ("one", ""), ("far", "x")], "{steps:?}");
    assert!(steps[1].due_in_ms > 30_000 && steps[1].reason.starts_with("its tool is expected back in"));
}

#[test]
fn what_cannot_be_declared_is_refused_with_the_reason() {
    let daemon = daemon!(Setup::default());
    let asks = Control::new(&daemon.socket());
    let circle = vec![step("a", &["c"], 1), step("b", &["a"], 1), step("c", &["b"], 1), step("d", &[], 1)];
    let said = refusal(&asks, declaration("p", circle));
    assert_eq!(said, "nothing was declared: steps wait for each other: b -> c -> a -> b");
    let said = refusal(&asks, declaration("p", vec![step("a", &["x"], 1)]));
    assert_eq!(said, "nothing was declared: step \"a\" waits for \"x\", which is not declared");
    assert!(refusal(&asks, declaration("p", vec![step("a", &[], 1); 2])).contains("two steps are called \"a\""));
    assert!(refusal(&asks, declaration("", vec![step("a", &[], 1)])).contains("program_id is empty"));
    let many = |count: usize| (0..count).map(|n| step(&n.to_string(), &[], 1)).collect::<Vec<_>>();
    assert!(refusal(&asks, declaration("p", many(4097))).contains("4097 steps, at most 4096 a program"));
    assert!(graphs(&asks, "p").is_empty());
    // A tenant's room is bounded, and what ends makes room.
    for n in 0..8 {
        assert_eq!(declare(&asks, declaration(&format!("full-{n}"), many(4096))).outcome(), Outcome::Applied);
    }
    let full = declare(&asks, declaration("p", many(1)));
    assert_eq!(full.outcome(), Outcome::Rejected);
    assert!(full.reason.starts_with("no room: at most 32768 declared steps of a tenant"), "{}", full.reason);
    assert_eq!(end(&asks, "full-0", SignalKind::Completion), Outcome::Applied);
    assert_eq!(declare(&asks, declaration("p", many(1))).outcome(), Outcome::Applied);
    let page = next(&asks, v1::NextStepsRequest { limit: 5_000, ..Default::default() });
    assert_eq!(page.len(), 1024, "a page is bounded");
    let old = v1::DeclareRequest { revision: 1, ..declaration("p", many(2)) };
    let old = declare(&asks, old);
    assert_eq!(old.outcome(), Outcome::Rejected);
    assert!(old.reason.contains("revision 1 is older than"), "{}", old.reason);
    assert_eq!(progress(&asks, "nobody", &["x"], &[]).outcome(), Outcome::Missing);
}

/// Runs this file's [`calls_of_another_user`] as a user.
fn as_user(uid: u32, socket: &Path) {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "graphs::calls_of_another_user", "--nocapture"]).uid(uid).gid(uid);
    let output = command.env(SOCKET, socket).output().expect("a second process");
    assert!(output.status.success(), "user {uid}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "user {uid}: it was not run");
}

#[test]
fn calls_of_another_user() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let asks = Control::new(Path::new(&socket));
    let is_a = rustix::process::geteuid().as_raw() == 70001;
    if is_a {
        assert_eq!(declare(&asks, declaration("mine", plan())).outcome(), Outcome::Applied);
        assert_eq!(ids(&all(&asks)), [("mine", "plan")]);
        return;
    }
    assert!(all(&asks).is_empty() && graphs(&asks, "mine").is_empty());
    assert_eq!(progress(&asks, "mine", &["plan"], &[]).outcome(), Outcome::Missing);
    assert_eq!(declare(&asks, declaration("mine", Vec::new())).outcome(), Outcome::Missing);
    assert_eq!(end(&asks, "mine", SignalKind::Cancellation), Outcome::Missing);
    let other = v1::NextStepsRequest { tenant: "a".into(), ..Default::default() };
    let denied = asks.of_programs(async |mut client| client.next_steps(other).await).unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
}

#[test]
fn a_tenant_sees_its_own_programs_only() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can call as other users");
        return;
    }
    let sections = "[listen]\nsocket_mode = \"0666\"\n[[tenants]]\nid = \"a\"\nuids = [70001]\n\
                    [[tenants]]\nid = \"b\"\nuids = [70002]";
    let daemon = daemon!(Setup { sections: sections.into(), ..Setup::default() });
    let run = daemon.socket().parent().unwrap().to_owned();
    for dir in [run.parent().unwrap(), &run] {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    as_user(70001, &daemon.socket());
    as_user(70002, &daemon.socket());
    let asks = Control::new(&daemon.socket());
    assert_eq!(graphs(&asks, "mine")[0].tenant, "a", "operators see all");
    let of_b = v1::NextStepsRequest { tenant: "b".into(), ..Default::default() };
    assert!(next(&asks, of_b).is_empty());
}

#[test]
fn every_node_knows_what_was_declared() {
    let Some(valkey) = Valkey::start() else { return };
    let start = |id: &str| daemon!(Setup { node_id: id.into(), directory: Some(valkey.url()), ..Setup::default() });
    let (a, mut b) = (start("a"), start("b"));
    for node in [&a, &b] {
        until("the nodes to know each other", || (node.control().nodes().ok()?.nodes.len() == 2).then_some(()));
    }
    let (of_a, of_b) = (Control::new(&a.socket()), Control::new(&b.socket()));
    let declared = declare(&of_a, declaration("plan-7", plan()));
    let told: Vec<_> = declared.nodes.iter().map(|n| (n.node_id.as_str(), n.outcome())).collect();
    assert_eq!(told, [("b", Outcome::Applied)], "{}", b.log());
    assert_eq!(graphs(&of_b, "plan-7")[0].revision, declared.revision);
    let reported = progress(&of_b, "plan-7", &["plan"], &["plan"]);
    assert_eq!(reported.nodes[0].outcome(), Outcome::Applied, "{reported:?}");
    for asks in [&of_a, &of_b] {
        assert_eq!(ids(&all(asks)), [("plan-7/long", "long"), ("plan-7", "short")]);
    }
    // A node that is away is told once it is back.
    b.kill();
    let late = declare(&of_a, declaration("late", vec![step("x", &[], 5)]));
    assert_eq!(late.nodes[0].outcome(), Outcome::Deferred, "{late:?}");
    b.restart();
    let of_b = Control::new(&b.socket());
    until("the node to be told", || (!graphs(&of_b, "late").is_empty()).then_some(()));
    assert_eq!(end(&of_b, "late", SignalKind::Completion), Outcome::Applied);
    until("the other node to be told", || graphs(&of_a, "late").is_empty().then_some(()));
}
