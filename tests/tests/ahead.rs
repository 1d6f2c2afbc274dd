//! A program's state is back in host memory before the program is.

use kvtier_proto::v1::{self, Tier};
use kvtier_tests::daemon::{OLDEST_FIRST, count};
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use serde_json::json;

const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = 20;
const TOKENS: u32 = BLOCKS * 16;

fn signal(daemon: &Daemon, program: &str, kind: v1::SignalKind, expected_resume_ms: u64) {
    let signal =
        v1::SignalRequest { program_id: program.into(), kind: kind.into(), expected_resume_ms, ..Default::default() };
    let reply = daemon.control().signal(signal).expect("an answer");
    assert_eq!(reply.outcome(), v1::Outcome::Applied, "{reply:?}");
}

/// A program whose context lies on disk only, since others took its place in memory.
fn displaced(daemon: &Daemon, engine: &mut Engine, program: &str) -> Prompt {
    let prompt = Prompt::new(program, BLOCKS);
    engine.speak_for(program, "", "");
    engine.put_all(&prompt);
    press(daemon, engine, program);
    prompt
}

/// Others need more than there is of host memory.
fn press(daemon: &Daemon, engine: &mut Engine, when: &str) {
    engine.speak_for("others", "", "");
    for n in 0..12 {
        engine.put_all(&Prompt::new(format!("{when}: pressure {n}"), 32));
        daemon.wait_offloaded();
    }
}

/// How many blocks of a prompt are in host memory.
fn in_memory(daemon: &Daemon, prompt: &Prompt) -> usize {
    let blocks = daemon.control().locate(&Shape::default().keys(0, prompt)).expect("blocks");
    blocks.iter().filter(|b| b.replicas.iter().any(|r| r.tier() == Tier::Host)).count()
}

fn brought(daemon: &Daemon, fate: &str, bytes: u64) {
    let name = format!("prefetch_{fate}_bytes");
    daemon.wait_status(&name, |status| count(&status.policy, &name) == bytes);
}

#[test]
fn what_a_program_needs_is_back_before_it_returns() {
    let sections = format!("{OLDEST_FIRST}[programs]\nprefetch_share_percent = 10\n");
    let daemon = daemon!(Setup { host_mib: 16, sections, ..Setup::default() });
    let mut engine = Engine::attach(&daemon, &Shape::default());
    let prompt = displaced(&daemon, &mut engine, "tool user");
    assert!(
        daemon.control().locate(&Shape::default().keys(0, &prompt)[..1]).expect("blocks")[0]
            .replicas
            .iter()
            .all(|replica| replica.tier() == Tier::Disk)
    );
    // One in ten is back after a third of what was announced, as long as announcements are not known to be better.
    signal(&daemon, "tool user", v1::SignalKind::ToolWait, 1_500);
    brought(&daemon, "outstanding", u64::from(BLOCKS) * BLOCK);
    let keys = Shape::default().keys(0, &prompt);
    kvtier_tests::wait::until("the context in memory", || {
        let blocks = daemon.control().locate(&keys).ok()?;
        blocks.iter().all(|b| b.replicas.iter().any(|r| r.tier() == Tier::Host)).then_some(())
    });
    engine.speak_for("tool user", "", "");
    let got = engine.get(&prompt);
    assert_eq!((got.whole(), got.hit.host_tokens), (Some(TOKENS), TOKENS));
    brought(&daemon, "useful", u64::from(BLOCKS) * BLOCK);

    // A program that ends instead: what was brought for it was for nothing.
    displaced(&daemon, &mut engine, "quitter");
    signal(&daemon, "quitter", v1::SignalKind::ToolWait, 1_500);
    brought(&daemon, "outstanding", u64::from(BLOCKS) * BLOCK);
    signal(&daemon, "quitter", v1::SignalKind::Completion, 0);
    brought(&daemon, "wasted", u64::from(BLOCKS) * BLOCK);
    brought(&daemon, "outstanding", 0);
}

fn fork(daemon: &Daemon, program: &str, branches: [&str; 2]) {
    let children = branches.map(str::to_owned).to_vec();
    let kind = v1::SignalKind::Fork.into();
    let signal = v1::SignalRequest { program_id: program.into(), kind, children, ..Default::default() };
    assert_eq!(daemon.control().signal(signal).expect("an answer").outcome(), v1::Outcome::Applied);
}

#[test]
fn a_stem_stays_in_memory_until_every_branch_has_called() {
    let daemon = daemon!(Setup { host_mib: 16, sections: OLDEST_FIRST.into(), ..Setup::default() });
    let mut engine = Engine::attach(&daemon, &Shape::default());
    let stem = Prompt::new("stem", BLOCKS);
    engine.speak_for("main", "", "");
    engine.put_all(&stem);
    fork(&daemon, "main", ["left", "right"]);
    let held = |blocks: u64| {
        daemon.wait_status("the stem", |status| count(&status.policy, "claims_stem_blocks") == blocks);
    };
    held(BLOCKS.into());
    press(&daemon, &mut engine, "nobody came");
    assert_eq!(in_memory(&daemon, &stem), BLOCKS as usize);
    engine.speak_for("left", "main", "");
    assert_eq!(engine.get(&stem).hit.host_tokens, TOKENS);
    press(&daemon, &mut engine, "one came");
    assert_eq!(in_memory(&daemon, &stem), BLOCKS as usize, "the other is still to come");
    // One that ends without ever having called needs it no more either.
    signal(&daemon, "right", v1::SignalKind::Cancellation, 0);
    held(0);
    press(&daemon, &mut engine, "all came");
    assert_eq!(in_memory(&daemon, &stem), 0);
}

#[test]
fn what_declared_steps_share_stays_in_memory_until_they_begin() {
    let daemon = daemon!(Setup { host_mib: 16, sections: OLDEST_FIRST.into(), ..Setup::default() });
    let mut engine = Engine::attach(&daemon, &Shape::default());
    let stem = Prompt::new("stem", BLOCKS);
    engine.speak_for("boss", "", "");
    engine.put_all(&stem);
    let shared = v1::SharedContext { program_id: "boss".into(), end_token: 160, ..Default::default() };
    let step = |id: &str| v1::GraphStep {
        step_id: id.into(),
        program_id: format!("swarm/{id}"),
        shared_context: Some(shared.clone()),
        ..Default::default()
    };
    let declared =
        v1::DeclareRequest { program_id: "swarm".into(), steps: ["a", "b"].map(step).to_vec(), ..Default::default() };
    let reply = daemon.control().of_programs(async |mut client| client.declare(declared).await).expect("an answer");
    assert_eq!(reply.outcome(), v1::Outcome::Applied, "{reply:?}");
    let held = |blocks: u64| {
        daemon.wait_status("the part that is shared", |status| count(&status.policy, "claims_stem_blocks") == blocks);
    };
    held(10);
    press(&daemon, &mut engine, "none began");
    assert_eq!(in_memory(&daemon, &stem), 10);
    for began in ["a", "b"] {
        let progress =
            v1::ProgressRequest { program_id: "swarm".into(), began: vec![began.into()], ..Default::default() };
        daemon.control().of_programs(async |mut client| client.progress(progress).await).expect("an answer");
    }
    held(0);
    press(&daemon, &mut engine, "all began");
    assert_eq!(in_memory(&daemon, &stem), 0);
}

#[test]
fn a_parent_is_back_when_the_last_child_that_blocks_it_ends() {
    let sections = format!("{OLDEST_FIRST}[programs]\nprefetch_share_percent = 10\n");
    let daemon = daemon!(Setup { host_mib: 16, sections, ..Setup::default() });
    let mut engine = Engine::attach(&daemon, &Shape::default());
    let stem = displaced(&daemon, &mut engine, "boss");
    for (child, blocks) in [("one", true), ("two", true), ("aside", false)] {
        let fields = json!({
            "program_id": child, "parent_program_id": "boss", "agent_role": "worker", "blocks_parent": blocks});
        engine.says(&fields);
        engine.put_all(&Prompt::new(format!("of {child}"), 4));
        engine.get(&Prompt::new(format!("of {child}"), 4));
    }
    let listed = daemon.control().programs().expect("programs");
    let one = listed.iter().find(|p| p.program_id == "one").expect("it is known");
    assert_eq!((one.agent_role.as_str(), one.blocks_parent), ("worker", Some(true)));
    signal(&daemon, "one", v1::SignalKind::Completion, 0);
    assert_eq!(in_memory(&daemon, &stem), 0, "another child is still at work");
    signal(&daemon, "two", v1::SignalKind::Completion, 0);
    brought(&daemon, "outstanding", u64::from(BLOCKS) * BLOCK);
    kvtier_tests::wait::until("the context in memory", || (in_memory(&daemon, &stem) == BLOCKS as usize).then_some(()));
    engine.speak_for("boss", "", "");
    assert_eq!(engine.get(&stem).hit.host_tokens, TOKENS);
    brought(&daemon, "useful", u64::from(BLOCKS) * BLOCK);
}

#[test]
fn a_request_says_when_its_program_is_back() {
    let sections = format!("{OLDEST_FIRST}[programs]\nprefetch_share_percent = 10\n");
    let daemon = daemon!(Setup { host_mib: 16, sections, ..Setup::default() });
    let mut engine = Engine::attach(&daemon, &Shape::default());
    let prompt = displaced(&daemon, &mut engine, "pauser");
    let hint = |finished: bool| {
        let params = json!({"program_id": "pauser", "expected_resume_ms": 1_500});
        let document = json!({"v": 1, "prompt_tokens": TOKENS, "params": params, "finished": finished});
        let request = kvtier::hints::Hints {
            request_id: "r".into(),
            cache_salt: String::new(),
            client_hints: document.to_string().into(),
        };
        engine.scheduler().submit_hints(request).expect("hints within bounds");
    };
    let state = || {
        let listed = daemon.control().programs().ok()?;
        listed.into_iter().find(|p| p.program_id == "pauser").map(|p| p.state)
    };
    hint(false);
    assert_eq!(state().as_deref(), Some("active"), "the request is under way");
    hint(true);
    kvtier_tests::wait::until("the program to wait", || (state()? == "tool_wait").then_some(()));
    brought(&daemon, "outstanding", u64::from(BLOCKS) * BLOCK);
    engine.speak_for("pauser", "", "");
    kvtier_tests::wait::until("the context in memory", || {
        (in_memory(&daemon, &prompt) == BLOCKS as usize).then_some(())
    });
    assert_eq!(engine.get(&prompt).hit.host_tokens, TOKENS);
    brought(&daemon, "useful", u64::from(BLOCKS) * BLOCK);
}

#[test]
fn the_context_of_a_program_is_back_when_its_last_branch_ends() {
    let sections = format!("{OLDEST_FIRST}[programs]\nprefetch_share_percent = 10\n");
    let daemon = daemon!(Setup { host_mib: 16, sections, ..Setup::default() });
    let mut engine = Engine::attach(&daemon, &Shape::default());
    let stem = Prompt::new("stem", BLOCKS);
    engine.speak_for("main", "", "");
    engine.put_all(&stem);
    fork(&daemon, "main", ["left", "right"]);
    for branch in ["left", "right"] {
        engine.speak_for(branch, "main", "");
        assert_eq!(engine.get(&stem).hit.host_tokens, TOKENS);
    }
    press(&daemon, &mut engine, "branches work");
    assert_eq!(in_memory(&daemon, &stem), 0);
    signal(&daemon, "left", v1::SignalKind::Completion, 0);
    signal(&daemon, "right", v1::SignalKind::Completion, 0);
    brought(&daemon, "outstanding", u64::from(BLOCKS) * BLOCK);
    kvtier_tests::wait::until("the context in memory", || (in_memory(&daemon, &stem) == BLOCKS as usize).then_some(()));
    engine.speak_for("main", "", "");
    assert_eq!(engine.get(&stem).hit.host_tokens, TOKENS);
    brought(&daemon, "useful", u64::from(BLOCKS) * BLOCK);
}
