//! Who may do what: users of this machine, as the kernel says who they are.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use kvtier_proto::convert::block_targets;
use kvtier_proto::v1::{self, Outcome, Tier};
use kvtier_tests::rpc::Control;
use kvtier_tests::{Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::BlockKey;

/// Where the calls of another user go, when this process is that user's.
const SOCKET: &str = "KVTIER_TEST_TENANT_SOCKET";
/// The key it names.
const KEY: &str = "KVTIER_TEST_TENANT_KEY";
/// What is expected of it.
const EXPECT: &str = "KVTIER_TEST_TENANT_EXPECT";

/// Runs this file's [`calls_of_another_user`] as a user.
fn as_user(uid: u32, socket: &Path, key: &BlockKey, expect: &str) {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "tenancy::calls_of_another_user", "--nocapture"]).uid(uid).gid(uid);
    let output =
        command.env(SOCKET, socket).env(KEY, key.to_string()).env(EXPECT, expect).output().expect("a second process");
    assert!(output.status.success(), "user {uid}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "user {uid}: it was not run");
}

#[test]
fn calls_of_another_user() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let control = Control::new(Path::new(&socket));
    let key: BlockKey = std::env::var(KEY).unwrap().parse().unwrap();
    let expect = std::env::var(EXPECT).unwrap();
    let evict = control.evict(&[key], true);
    let drained = control.drain("").unwrap_err();
    assert_eq!(drained.code(), tonic::Code::PermissionDenied, "{drained}");
    if expect == "denied" {
        assert_eq!(evict.unwrap_err().code(), tonic::Code::PermissionDenied);
        assert_eq!(control.locate(&[key]).unwrap_err().code(), tonic::Code::PermissionDenied);
        return;
    }
    let outcome = &evict.unwrap()[0];
    assert_eq!(outcome.outcome().as_str_name(), expect, "{}", outcome.reason);
    let request = v1::MoveRequest { targets: vec![block_targets([&key])], to: Tier::Disk.into(), dry_run: true };
    let moved = control.work(async |mut client| client.r#move(request).await).unwrap();
    assert_eq!(moved.outcomes[0] == Outcome::Rejected, expect == "REJECTED", "{moved:?}");
    let listed = control.list(v1::ListRequest::default()).unwrap().blocks;
    let of_a = listed.iter().filter(|block| block.tenant == "a").count();
    let is_a = rustix::process::geteuid().as_raw() == 70001;
    assert_eq!((of_a, listed.len()), if is_a { (2, 4) } else { (0, 2) }, "others' blocks are not listed: {listed:?}");
    let explained = control.explain_rules(&key).unwrap();
    assert_eq!(explained.outcome() == Outcome::Rejected, !is_a && explained.tenant.is_empty(), "{explained:?}");
}

#[test]
fn a_tenant_controls_its_own_blocks_and_no_others() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can call as other users");
        return;
    }
    let sections = "[listen]\nsocket_mode = \"0666\"\n[[tenants]]\nid = \"a\"\nuids = [70001]\nsalts = [\"pepper\"]\n\
                    [[tenants]]\nid = \"b\"\nuids = [70002]";
    let daemon = daemon!(Setup { sections: sections.into(), ..Setup::default() });
    let run = daemon.socket().parent().unwrap().to_owned();
    for dir in [run.parent().unwrap(), &run] {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let shape = Shape::default();
    let mut engine = Engine::attach(&daemon, &shape);
    let (shared, salted) = (Prompt::new("shared", 2), Prompt::new("salted", 2));
    engine.put_all(&shared);
    engine.cache_salt = "pepper".into();
    engine.put_all(&salted);
    daemon.wait_blocks(Tier::Disk, 4);
    let key = |prompt: &Prompt| shape.keys(0, prompt)[1];
    let located = daemon.control().locate(&[key(&shared), key(&salted)]).unwrap();
    assert_eq!(located.iter().map(|b| b.tenant.as_str()).collect::<Vec<_>>(), ["shared", "a"]);
    let socket = daemon.socket();
    as_user(70001, &socket, &key(&salted), "APPLIED");
    as_user(70002, &socket, &key(&salted), "REJECTED");
    as_user(70001, &socket, &key(&shared), "REJECTED");
    as_user(70003, &socket, &key(&salted), "denied");
    let evicted = daemon.control().evict(&[key(&salted)], false).unwrap();
    assert_eq!(evicted[0].outcome(), Outcome::Applied, "operators act for all");
}
