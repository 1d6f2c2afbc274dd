//! Claims: what was pinned stays, within its budget and for its time, whatever happens to the daemon.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use kvtier_proto::convert::block_targets;
use kvtier_proto::v1::{self, Outcome, Tier};
use kvtier_tests::daemon::{OLDEST_FIRST, count};
use kvtier_tests::rpc::Control;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::BlockKey;

const BLOCK: u64 = 64 << 10;
/// Tells the process that is started as another user where to call.
const AS_STRANGER: &str = "KVTIER_TEST_STRANGER_SOCKET";

fn pin(keys: &[BlockKey]) -> v1::PinRequest {
    v1::PinRequest {
        claim_id: "system prompt".into(),
        owner: "team a".into(),
        revision: 1,
        targets: vec![block_targets(keys)],
        ttl_ms: 3_600_000,
        ..Default::default()
    }
}

/// 16 MiB of host memory: 256 blocks, of which 51 may be one owner's and 128 everybody's.
fn small() -> Setup {
    Setup { host_mib: 16, sections: OLDEST_FIRST.into(), ..Setup::default() }
}

/// A prompt of 20 blocks, stored and pinned.
fn pinned(setup: Setup) -> (Daemon, Engine, Prompt, Vec<BlockKey>) {
    let daemon = daemon!(setup);
    let shape = Shape::default();
    let engine = Engine::attach(&daemon, &shape);
    let prompt = Prompt::new("pinned", 20);
    engine.put_all(&prompt);
    let keys = shape.keys(0, &prompt);
    let reply = daemon.control().pin(pin(&keys)).expect("a pin");
    assert_eq!(reply.outcome(), Outcome::Applied, "{reply:?}");
    assert!(reply.outcomes.iter().all(|o| o.outcome() == Outcome::Applied), "{reply:?}");
    assert_eq!(reply.claimed_bytes, 20 * BLOCK);
    (daemon, engine, prompt, keys)
}

/// Puts three times what host memory holds.
fn press(engine: &Engine) {
    for n in 0..24 {
        engine.put_all(&Prompt::new(format!("pressure {n}"), 32));
    }
}

fn host_tokens(engine: &Engine, prompt: &Prompt) -> u32 {
    let got = engine.get(prompt);
    assert_eq!(got.whole(), Some(got.hit.tokens));
    got.hit.host_tokens
}

fn claims(daemon: &Daemon) -> Vec<v1::Claim> {
    daemon.control().list_claims(v1::ListClaimsRequest::default()).expect("claims").claims
}

#[test]
fn a_pinned_block_survives_pressure_that_evicts_everything_else() {
    let (daemon, engine, prompt, keys) = pinned(Setup { disk_mib: None, ..small() });
    let other = Prompt::new("not pinned", 20);
    engine.put_all(&other);
    press(&engine);
    assert_eq!(engine.get(&other).hit.tokens, 0, "the pressure was enough to evict");
    assert_eq!(host_tokens(&engine, &prompt), 320);
    let evicted = daemon.control().evict(&keys[..1], false).unwrap();
    assert_eq!(evicted[0].outcome(), Outcome::Rejected, "not by verb either: {evicted:?}");
    assert_eq!(daemon.control().locate(&keys[..1]).unwrap()[0].claims, ["system prompt"]);
    let unpin =
        v1::UnpinRequest { claim_id: "system prompt".into(), owner: "team a".into(), revision: 2, targets: Vec::new() };
    assert_eq!(daemon.control().unpin(unpin.clone()).unwrap().outcome(), Outcome::Applied);
    assert_eq!(daemon.control().unpin(unpin).unwrap().outcome(), Outcome::Missing);
    press(&engine);
    assert_eq!(engine.get(&prompt).hit.tokens, 0, "it goes as any other once it is let go");
}

#[test]
fn a_pinned_block_survives_a_kill_and_is_brought_back() {
    let (mut daemon, engine, prompt, _) = pinned(small());
    daemon.wait_offloaded();
    for _ in 0..2 {
        daemon.kill();
        daemon.restart();
        engine.wait_attached();
        until("the pinned blocks in host memory", || {
            claims(&daemon).iter().any(|c| c.resident_bytes == 20 * BLOCK).then_some(())
        });
        assert_eq!(host_tokens(&engine, &prompt), 320);
        // Both copies are held.
        press(&engine);
        daemon.wait_offloaded();
        assert_eq!(host_tokens(&engine, &prompt), 320);
    }
    let [claim] = &claims(&daemon)[..] else { panic!("{:?}", claims(&daemon)) };
    assert_eq!((claim.blocks, claim.bytes, claim.kind()), (20, 20 * BLOCK, v1::ClaimKind::Pin));
    assert!(claim.remaining_ms > 3_000_000 && claim.remaining_ms <= 3_600_000, "{claim:?}");
}

#[test]
fn a_pinned_record_survives_a_disk_that_makes_room() {
    let (mut daemon, engine, prompt, _) = pinned(Setup { disk_mib: Some(32), ..small() });
    for _ in 0..4 {
        press(&engine);
        daemon.wait_offloaded();
    }
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&prompt).whole(), Some(320), "128 MiB went through 32 MiB of disk");
}

#[test]
fn claims_end_on_time_and_stay_ended() {
    let (mut daemon, _engine, _prompt, keys) = pinned(small());
    let short = v1::PinRequest { claim_id: "short".into(), ttl_ms: 1_000, ..pin(&keys[..5]) };
    assert_eq!(daemon.control().pin(short).unwrap().outcome(), Outcome::Applied);
    assert_eq!(claims(&daemon).len(), 2);
    until("the short claim to end", || (claims(&daemon).len() == 1).then_some(()));
    assert_eq!(count(&daemon.status().policy, "claims_expired"), 1);
    // And one whose time ends while nobody is there.
    let short = v1::PinRequest { claim_id: "shorter".into(), ttl_ms: 300, ..pin(&keys[..5]) };
    daemon.control().pin(short).unwrap();
    daemon.kill();
    // Nobody is there to be asked whether the time has come.
    std::thread::sleep(std::time::Duration::from_millis(400));
    daemon.restart();
    let names: Vec<String> = claims(&daemon).into_iter().map(|c| c.claim_id).collect();
    assert_eq!(names, ["system prompt"]);
    assert_eq!(daemon.control().release_claims("team a").unwrap().released, 1);
    daemon.kill();
    daemon.restart();
    assert_eq!(claims(&daemon), [], "what was released does not come back");
}

#[test]
fn over_budget_is_clipped_in_prefix_order_and_never_overcommitted() {
    let daemon = daemon!(small());
    let shape = Shape::default();
    let engine = Engine::attach(&daemon, &shape);
    let prompt = Prompt::new("long", 80);
    engine.put_all(&prompt);
    let keys = shape.keys(0, &prompt);
    let dry = daemon.control().pin(v1::PinRequest { dry_run: true, ..pin(&keys) }).unwrap();
    assert_eq!((dry.outcome(), claims(&daemon)), (Outcome::Clipped, vec![]), "a dry run changes nothing");
    // A fifth of 16 MiB, and no part of a block more.
    let reply = daemon.control().pin(pin(&keys)).unwrap();
    assert_eq!(reply.outcome(), Outcome::Clipped);
    let fits = usize::try_from(reply.budget_bytes / BLOCK).unwrap();
    assert_eq!(fits, 51);
    let outcomes: Vec<Outcome> = reply.outcomes.iter().map(v1::TargetOutcome::outcome).collect();
    assert_eq!(outcomes, [vec![Outcome::Applied; fits], vec![Outcome::Clipped; 80 - fits]].concat());
    assert_eq!(dry.outcomes, reply.outcomes);
    assert!(reply.claimed_bytes <= reply.budget_bytes);
    let more = v1::PinRequest { claim_id: "more".into(), ..pin(&keys[70..]) };
    let more = daemon.control().pin(more).unwrap();
    assert_eq!(more.outcome(), Outcome::Rejected, "{more:?}");
    assert!(more.reason.contains("owner's budget"), "{more:?}");
    // Other owners, until half of the tier is taken: each pays for the prefix that its block needs.
    for n in 0..4 {
        let other = Prompt::new(format!("other {n}"), 40);
        engine.put_all(&other);
        let keys = shape.keys(0, &other);
        let deepest = v1::PinRequest { owner: format!("owner {n}"), ..pin(&keys[39..]) };
        let outcome = daemon.control().pin(deepest).unwrap();
        let want = if n == 0 { Outcome::Applied } else { Outcome::Rejected };
        assert_eq!(outcome.outcome(), want, "owner {n}: {outcome:?}");
    }
    let list = daemon.control().list_claims(v1::ListClaimsRequest::default()).unwrap();
    let host = list.budgets.iter().find(|b| b.tier() == Tier::Host).unwrap();
    assert_eq!(host.claimed_bytes, 91 * BLOCK);
    assert!(host.claimed_bytes <= host.budget_bytes);
    press(&engine);
    assert_eq!(host_tokens(&engine, &prompt) / 16, 51);
}

#[test]
fn revisions_say_which_call_counts() {
    let (daemon, _engine, _prompt, keys) = pinned(small());
    let again =
        |revision, keys: &[BlockKey]| daemon.control().pin(v1::PinRequest { revision, ..pin(keys) }).unwrap().outcome();
    assert_eq!(again(1, &keys), Outcome::Duplicate);
    assert_eq!(again(0, &keys), Outcome::Rejected);
    assert_eq!(again(7, &keys[..4]), Outcome::Applied);
    assert_eq!(again(6, &keys), Outcome::Rejected);
    let soft = v1::RetainRequest {
        claim_id: "soft".into(),
        owner: "team b".into(),
        targets: vec![block_targets(&keys)],
        priority: 80,
        ..Default::default()
    };
    assert_eq!(daemon.control().retain(soft).unwrap().outcome(), Outcome::Applied);
    let some = v1::UnpinRequest {
        claim_id: "system prompt".into(),
        owner: "team a".into(),
        revision: 8,
        targets: vec![block_targets(&keys[2..6])],
    };
    let some = daemon.control().unpin(some).unwrap();
    let outcomes: Vec<Outcome> = some.outcomes.iter().map(v1::TargetOutcome::outcome).collect();
    assert_eq!(outcomes, [Outcome::Applied, Outcome::Applied, Outcome::Missing, Outcome::Missing]);
    let request = v1::ListClaimsRequest { page_size: 1, ..Default::default() };
    let page = daemon.control().list_claims(request.clone()).unwrap();
    assert_eq!((page.claims.len(), page.claims[0].blocks, page.claims[0].revision), (1, 2, 8));
    let request = v1::ListClaimsRequest { page_token: page.next_page_token, ..request };
    let page = daemon.control().list_claims(request).unwrap();
    assert_eq!((page.claims[0].claim_id.as_str(), page.claims[0].priority), ("soft", 80));
    assert!(page.next_page_token.is_empty());
    let unknown = daemon.control().pin(v1::PinRequest { claim_id: "x".into(), ..pin(&[BlockKey::new([9; 32])]) });
    assert_eq!(unknown.unwrap().outcome(), Outcome::Missing);
    let nameless = daemon.control().pin(v1::PinRequest { claim_id: String::new(), ..pin(&keys) });
    assert_eq!(nameless.unwrap_err().code(), tonic::Code::InvalidArgument);
}

#[test]
fn another_user_is_refused() {
    if let Ok(socket) = std::env::var(AS_STRANGER) {
        let refused = Control::new(socket.as_ref()).pin(pin(&[BlockKey::new([1; 32])])).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused:?}");
        return;
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can call as another user");
        return;
    }
    let (daemon, ..) = pinned(small());
    // Reachable for all, so that it is the daemon that refuses.
    let socket = daemon.socket();
    let open = |path: &std::path::Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    let mut above = socket.as_path();
    while let Some(dir) =
        above.parent().filter(|dir| dir.starts_with(std::env::temp_dir()) && **dir != std::env::temp_dir())
    {
        open(dir);
        above = dir;
    }
    open(&socket);
    // A copy that anybody can reach and run.
    let program = daemon.socket().with_file_name("stranger");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    open(&program);
    let mut command = Command::new(&program);
    command.args(["--exact", "claims::another_user_is_refused"]).env(AS_STRANGER, &socket).uid(65_534).gid(65_534);
    let output = command.output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
}
