//! Programs: an abandoned branch frees what only it holds, on every tier and node, for good.

use kvtier_proto::v1::{self, Outcome, SignalKind, Tier};
use kvtier_tests::valkey::Valkey;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::BlockKey;

/// Blocks of what both branches begin with.
const STEM: u32 = 10;
const LEFT: u32 = 6;
const RIGHT: u32 = 4;

fn signal(program: &str, kind: SignalKind, children: &[&str]) -> v1::SignalRequest {
    v1::SignalRequest {
        program_id: program.into(),
        kind: kind.into(),
        children: children.iter().map(|c| (*c).to_owned()).collect(),
        ..Default::default()
    }
}

fn say(daemon: &Daemon, program: &str, kind: SignalKind) -> v1::SignalReply {
    daemon.control().signal(signal(program, kind, &[])).expect("the signal is taken")
}

struct Branches {
    stem: Prompt,
    left: Prompt,
    right: Prompt,
}

impl Branches {
    fn new() -> Self {
        let stem = Prompt::new("stem", STEM);
        Self { left: stem.branch("left", LEFT), right: stem.branch("right", RIGHT), stem }
    }

    /// Program `main` writes the stem, and its children go on.
    fn put(&self, engine: &mut Engine) {
        for (program, parent, prompt) in
            [("main", "", &self.stem), ("left", "main", &self.left), ("right", "main", &self.right)]
        {
            engine.speak_for(program, parent, "");
            engine.put_all(prompt);
        }
    }

    fn keys(&self, shape: &Shape) -> [Vec<BlockKey>; 3] {
        let all = [&self.stem, &self.left, &self.right].map(|prompt| shape.keys(0, prompt));
        let [stem, left, right] = all;
        [stem, left[STEM as usize..].to_vec(), right[STEM as usize..].to_vec()]
    }
}

const ALL: u64 = (STEM + LEFT + RIGHT) as u64;
const LEFT_GONE: u64 = (STEM + RIGHT) as u64;

/// Whether each of these blocks has a copy here.
fn here(daemon: &Daemon, keys: &[BlockKey]) -> bool {
    let located = daemon.control().locate(keys).expect("the node answers");
    let count = located.iter().filter(|b| !b.replicas.is_empty()).count();
    assert!(count == 0 || count == keys.len(), "{count} of {}", keys.len());
    count > 0
}

#[test]
fn an_abandoned_branch_is_freed_on_every_tier_and_stays_away_after_a_kill() {
    let shape = Shape::default();
    let setup = Setup { object: true, object_fields: "write = \"all\"".into(), ..Setup::default() };
    let mut daemon = daemon!(setup);
    let mut engine = Engine::attach(&daemon, &shape);
    let branches = Branches::new();
    branches.put(&mut engine);
    for tier in [Tier::Disk, Tier::Object] {
        daemon.wait_blocks(tier, ALL);
    }
    let reply = say(&daemon, "left", SignalKind::Cancellation);
    assert_eq!((reply.outcome(), reply.blocks), (Outcome::Applied, u64::from(LEFT)), "{reply:?}");
    let [stem, left, right] = branches.keys(&shape);
    for life in 0..3 {
        for tier in [Tier::Disk, Tier::Object] {
            daemon.wait_blocks(tier, LEFT_GONE);
        }
        assert!(here(&daemon, &stem) && here(&daemon, &right) && !here(&daemon, &left), "life {life}");
        daemon.kill();
        daemon.restart();
        engine.wait_attached();
    }
    engine.speak_for("left", "main", "");
    assert_eq!(engine.get(&branches.left).whole(), Some(STEM * 16));
    assert_eq!(engine.get(&branches.right).whole(), Some(branches.right.tokens()));
    // A later life of the branch is its own.
    engine.put_all(&branches.left);
    daemon.wait_blocks(Tier::Disk, ALL);
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&branches.left).whole(), Some(branches.left.tokens()));
}

#[test]
fn what_is_claimed_or_held_by_another_session_stays() {
    let shape = Shape::default();
    let daemon = daemon!(Setup::default());
    let mut engine = Engine::attach(&daemon, &shape);
    let branches = Branches::new();
    branches.put(&mut engine);
    engine.speak_for("", "", "guest");
    assert_eq!(engine.get(&Prompt { hash_blocks: STEM + 2, ..branches.left.clone() }).whole(), Some((STEM + 2) * 16));
    let [stem, left, right] = branches.keys(&shape);
    let pin = v1::PinRequest {
        claim_id: "keep".into(),
        targets: vec![kvtier_proto::convert::block_targets(&right[1..2])],
        ttl_ms: 60_000,
        ..Default::default()
    };
    let pinned = daemon.control().kv(async |mut client| client.pin(pin).await).unwrap();
    assert_eq!(pinned.outcome(), Outcome::Applied, "{pinned:?}");
    // The parent's end is that of its children.
    let reply = say(&daemon, "main", SignalKind::Cancellation);
    assert_eq!(reply.blocks, u64::from(LEFT - 2 + RIGHT - 2), "{reply:?}");
    assert!(here(&daemon, &stem) && here(&daemon, &left[..2]) && here(&daemon, &right[..2]));
    assert!(!here(&daemon, &left[2..]) && !here(&daemon, &right[2..]));
}

#[test]
fn programs_are_listed_and_are_targets_of_verbs() {
    let shape = Shape::default();
    let mut daemon = daemon!(Setup::default());
    let mut engine = Engine::attach(&daemon, &shape);
    let branches = Branches::new();
    branches.put(&mut engine);
    engine.speak_for("right", "main", "talk");
    assert_eq!(engine.get(&branches.right).whole(), Some(branches.right.tokens()));
    daemon.wait_blocks(Tier::Disk, ALL);
    let of = |daemon: &Daemon, id: &str| {
        let programs = daemon.control().programs().unwrap();
        programs.into_iter().find(|p| p.program_id == id).unwrap_or_else(|| panic!("{id} is known"))
    };
    let left = of(&daemon, "left");
    assert_eq!((left.parent_program_id.as_str(), left.state.as_str()), ("main", "active"));
    assert_eq!((left.blocks, left.exclusive_blocks), (u64::from(STEM + LEFT), u64::from(LEFT)));
    assert!(of(&daemon, "talk").is_session);
    let wait = v1::SignalRequest { expected_resume_ms: 60_000, ..signal("left", SignalKind::ToolWait, &[]) };
    assert_eq!(daemon.control().signal(wait).unwrap().outcome(), Outcome::Applied);
    assert_eq!(of(&daemon, "left").state, "tool_wait");
    assert!(of(&daemon, "left").resumes_in_ms > 0);

    let dry_evict = |daemon: &Daemon, target: v1::target::Target| {
        let targets = vec![v1::Target { target: Some(target), tenant: String::new() }];
        let request = v1::EvictRequest { targets, dry_run: true, ..Default::default() };
        daemon.control().evict_from(request).unwrap().remove(0)
    };
    let program = |descendants, exclusive| {
        let program_id = "main".to_owned();
        v1::target::Target::Program(v1::ProgramTarget { program_id, descendants, exclusive })
    };
    let session = |start_token, end_token| {
        let session_id = "talk".to_owned();
        v1::target::Target::Session(v1::SessionTarget { session_id, start_token, end_token })
    };
    assert_eq!(dry_evict(&daemon, program(false, false)).blocks, u64::from(STEM));
    assert_eq!(dry_evict(&daemon, program(false, true)).outcome(), Outcome::Missing);
    assert_eq!(dry_evict(&daemon, program(true, true)).blocks, ALL);
    assert_eq!(dry_evict(&daemon, session(0, 0)).blocks, u64::from(STEM + RIGHT));
    assert_eq!(dry_evict(&daemon, session(STEM * 16, 0)).blocks, u64::from(RIGHT));

    let list = |daemon: &Daemon, program: &str| {
        let request = v1::ListRequest { program_id: program.into(), page_size: 1000, ..Default::default() };
        daemon.control().list(request).unwrap().blocks
    };
    assert_eq!(list(&daemon, "left").len() as u64, u64::from(STEM + LEFT));
    assert!(list(&daemon, "left").iter().all(|b| b.holders >= 1));
    assert!(list(&daemon, "nobody").is_empty());

    // Who holds what outlives a clean stop, and most of it a crash.
    assert!(daemon.terminate().success());
    daemon.restart();
    engine.wait_attached();
    assert_eq!(of(&daemon, "left").exclusive_blocks, u64::from(LEFT));
    assert_eq!(dry_evict(&daemon, session(0, 0)).blocks, u64::from(STEM + RIGHT));
    let reply = daemon.control().signal(signal("main", SignalKind::Join, &["left", "right"])).unwrap();
    assert_eq!((reply.outcome(), reply.blocks), (Outcome::Applied, u64::from(LEFT + RIGHT)), "{reply:?}");
}

#[test]
fn a_forked_child_holds_its_stem_through_a_kill() {
    let shape = Shape::default();
    let mut daemon = daemon!(Setup::default());
    let mut engine = Engine::attach(&daemon, &shape);
    let stem = Prompt::new("stem", STEM);
    engine.speak_for("main", "", "");
    engine.put_all(&stem);
    daemon.wait_blocks(Tier::Disk, u64::from(STEM));
    let fork = daemon.control().signal(signal("main", SignalKind::Fork, &["child"])).unwrap();
    assert_eq!(fork.outcome(), Outcome::Applied);
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    // The child is still the parent's, so that its end is told apart: only the parent's own end takes both.
    let child = daemon.control().programs().unwrap().into_iter().find(|p| p.program_id == "child").unwrap();
    assert_eq!((child.parent_program_id.as_str(), child.blocks), ("main", u64::from(STEM)));
    assert_eq!(say(&daemon, "child", SignalKind::Cancellation).blocks, 0);
    assert_eq!(say(&daemon, "main", SignalKind::Cancellation).blocks, u64::from(STEM));
    assert_eq!(daemon.tier(Tier::Disk).blocks, 0);
}

#[test]
fn an_abandoned_branch_is_freed_on_a_node_that_was_away() {
    let Some(valkey) = Valkey::start() else { return };
    let start = |id: &str| daemon!(Setup { node_id: id.into(), directory: Some(valkey.url()), ..Setup::default() });
    let (a, mut b) = (start("a"), start("b"));
    let shape = Shape::default();
    let branches = Branches::new();
    for node in [&a, &b] {
        until("the nodes to know each other", || (node.control().nodes().ok()?.nodes.len() == 2).then_some(()));
        branches.put(&mut Engine::attach(node, &shape));
        node.wait_blocks(Tier::Disk, ALL);
    }
    let right = say(&a, "right", SignalKind::Cancellation);
    let told: Vec<_> = right.nodes.iter().map(|n| (n.node_id.as_str(), n.outcome(), n.blocks)).collect();
    assert_eq!(told, [("b", Outcome::Applied, u64::from(RIGHT))], "{}", b.log());
    b.kill();
    let left = say(&a, "left", SignalKind::Cancellation);
    assert_eq!((left.blocks, left.nodes[0].outcome()), (u64::from(LEFT), Outcome::Deferred), "{left:?}");
    b.restart();
    b.wait_blocks(Tier::Disk, u64::from(STEM));
    a.wait_all_told();
    let [stem, left, right] = branches.keys(&shape);
    let own = |daemon: &Daemon, key: &BlockKey| {
        let info = daemon.control().locate(std::slice::from_ref(key)).unwrap().remove(0);
        info.replicas.iter().any(|r| r.node_id == "b")
    };
    b.kill();
    b.restart();
    assert!(stem.iter().all(|key| own(&b, key)), "what the parent holds stays");
    assert!(left.iter().chain(&right).all(|key| !own(&b, key)));
}

#[test]
fn signals_that_mean_nothing_are_refused() {
    let daemon = daemon!(Setup::default());
    let code = |request| daemon.control().signal(request).unwrap_err().code();
    assert_eq!(code(signal("", SignalKind::Fork, &[])), tonic::Code::InvalidArgument);
    assert_eq!(code(signal("p", SignalKind::Unspecified, &[])), tonic::Code::InvalidArgument);
    assert_eq!(code(signal("p", SignalKind::Fork, &[""])), tonic::Code::InvalidArgument);
    assert_eq!(say(&daemon, "nobody", SignalKind::Cancellation).outcome(), Outcome::Missing);
    let capabilities = daemon.control().capabilities().unwrap();
    for verb in ["Signal", "Taint", "ApplyHints"] {
        assert!(capabilities.verbs.iter().any(|known| known == verb), "{verb}: {capabilities:?}");
    }
    assert!(capabilities.taint_effects.iter().any(|effect| effect == "NoServe"));
    assert!(capabilities.hint_actions.iter().any(|action| action == "kv.retain"));
    assert!(capabilities.limits.iter().any(|limit| limit.name == "programs" && limit.value > 0));
}
