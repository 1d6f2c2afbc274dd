//! The command as a process: what goes where, and how it ends.

use std::process::{Command, Output, Stdio};

use tonic::Code;

use super::fake::Served;
use super::{daemon, keys};

/// Runs the command against a daemon of this process, without blocking it.
pub(crate) async fn binary(served: &Served, words: &[&str], input: &'static str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvtier"));
    command.env("KVTIER_ADDRESS", &served.socket).args(words);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = move || {
        let mut child = command.spawn().expect("the command starts");
        std::io::Write::write_all(&mut child.stdin.take().expect("it is piped"), input.as_bytes()).ok();
        child.wait_with_output().expect("the command ends")
    };
    tokio::task::spawn_blocking(run).await.expect("it does not panic")
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

#[tokio::test]
async fn exit_codes_tell_apart_done_undone_wrong_and_no_daemon() {
    let served = daemon().serve();
    let missing = "f".repeat(64);
    let key = keys()[0].clone();
    let lines: [(&[&str], i32); 6] = [
        (&["status"], 0),
        (&["locate", &key], 0),
        (&["locate", &missing], 1),
        (&["locate", "xyz"], 2),
        (&["evict", "--all"], 2),
        (&["--address", "/nowhere/kvtierd.sock", "status"], 3),
    ];
    for (words, expected) in lines {
        let output = binary(&served, words, "").await;
        assert_eq!(code(&output), Some(expected), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stdout.is_empty(), expected > 1, "{words:?}");
    }
}

#[tokio::test]
async fn a_refusal_says_what_to_do_and_how_it_ends() {
    for (refuses, says, expected) in [
        (Code::Unimplemented, "does not know `pin` (the fake refuses)\nIt is older than this kvtier", 1),
        (Code::PermissionDenied, "refused `pin`: the fake refuses (PERMISSION_DENIED)\nRun it as root", 1),
        (Code::Unavailable, "refused `pin`: the fake refuses (UNAVAILABLE)\nSee `kvtier status`", 3),
    ] {
        let mut daemon = daemon();
        daemon.refuses = Some(refuses);
        let output = binary(&daemon.serve(), &["pin", "--session", "s", "--claim", "c"], "").await;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(says), "{said}");
        assert_eq!((code(&output), output.stdout.len()), (Some(expected), 0), "{said}");
    }
}

#[tokio::test]
async fn keys_come_from_standard_input() {
    let daemon = daemon();
    let served = daemon.serve();
    let output = binary(&served, &["evict", "--keys-file", "-", "--json"], "10000000 # the first\n20000000..\n").await;
    assert_eq!(code(&output), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["totals"]["APPLIED"], 2);
    assert_eq!(daemon.len(), 8);
}
