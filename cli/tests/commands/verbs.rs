//! Verbs that change something: what they ask of the daemon, and what they say of its answer.

use kvtier_proto::v1::target::Target as Kind;
use kvtier_proto::v1::{self, SemanticType, TaintEffect, Tier};
use serde_json::json;

use super::fake::Asked;
use super::{daemon, keys, kvtier};

/// A session's target, with its tokens.
fn session(id: &str, start_token: u32, end_token: u32) -> v1::Target {
    let kind = Kind::Session(v1::SessionTarget { session_id: id.to_owned(), start_token, end_token });
    v1::Target { target: Some(kind), ..Default::default() }
}

#[tokio::test]
async fn all_targets_of_a_line_go_in_one_call() {
    let daemon = daemon();
    let served = daemon.serve();
    let dir = tempfile::tempdir().unwrap();
    let (ids, listed) = (dir.path().join("ids"), dir.path().join("keys"));
    std::fs::write(&ids, "[1, 2, 3]").unwrap();
    std::fs::write(&listed, format!("{{\"blocks\": [{{\"key\": \"{}\"}}]}}", keys()[1])).unwrap();
    let (ids, listed) = (ids.display().to_string(), listed.display().to_string());
    let [prefix, whole] = [&keys()[0][..8], &keys()[1][..]].map(str::to_owned);
    let words = ["move", &prefix, "--keys-file", &listed, "--to", "disk", "--session", "s", "--tokens", "16..48"];
    let more = ["--program", "p", "--exclusive", "--tokens-file", &ids, "--model", "m", "--salt", "x", "--dry-run"];
    let report = kvtier(&served, &[&words[..], &more].concat()).await.unwrap();
    let Asked::Move(asked) = daemon.last() else { panic!("{:?}", daemon.last()) };
    assert_eq!((asked.to(), asked.dry_run, asked.targets.len()), (Tier::Disk, true, 4));
    let Some(Kind::Blocks(blocks)) = &asked.targets[0].target else { panic!("no keys") };
    assert_eq!(hex::encode(&blocks.keys), format!("{}{whole}", keys()[0]));
    assert_eq!(asked.targets[1], session("s", 16, 48));
    let Some(Kind::Tokens(prompt)) = &asked.targets[3].target else { panic!("no prompt") };
    assert_eq!((prompt.model.as_str(), prompt.cache_salt.as_str(), prompt.token_ids.len()), ("m", "x", 12));
    assert!(report.complete && report.text.ends_with("dry run: 5 APPLIED\n"), "{}", report.text);
    assert!(report.text.contains("session s 16..48"), "{}", report.text);
}

#[tokio::test]
async fn a_file_that_is_wrong_asks_nothing() {
    let daemon = daemon();
    let served = daemon.serve();
    for words in [["evict", "--keys-file", "no-such-file"], ["evict", "--keys-file", "/dev/null"]] {
        let error = kvtier(&served, &words).await.unwrap_err();
        assert!(error.is_usage(), "{error}");
    }
    assert_eq!(daemon.asked(), []);
}

#[tokio::test]
async fn a_pin_says_what_its_owner_holds() {
    let daemon = daemon();
    let served = daemon.serve();
    let key = &keys()[0];
    let words =
        ["pin", key, "--claim", "prompts", "--owner", "ops", "--revision", "7", "--tier", "disk", "--ttl", "2h"];
    let report = kvtier(&served, &words).await.unwrap();
    let Asked::Pin(asked) = daemon.last() else { panic!("no pin") };
    assert_eq!((asked.claim_id.as_str(), asked.owner.as_str(), asked.revision), ("prompts", "ops", 7));
    assert_eq!((asked.tier(), asked.ttl_ms, asked.dry_run), (Tier::Disk, 7_200_000, false));
    assert!(report.complete);
    assert!(report.text.ends_with("claim prompts APPLIED\nops holds 64.0 KiB of the 1.0 MiB it may pin there\n"));
}

#[tokio::test]
async fn a_clipped_claim_is_no_success() {
    let daemon = daemon();
    let served = daemon.serve();
    let missing = "f".repeat(64);
    let words = ["retain", &keys()[0], &missing, "--claim", "c", "--priority", "80", "--dry-run"];
    let report = kvtier(&served, &words).await.unwrap();
    let Asked::Retain(asked) = daemon.last() else { panic!("no retain") };
    assert_eq!((asked.priority, asked.dry_run), (80, true));
    assert!(asked.revision > 1_600_000_000_000, "the time is the revision of who names none");
    assert!(!report.complete);
    assert!(report.text.contains("dry run: claim c CLIPPED: the budget ends here\n"), "{}", report.text);
    assert_eq!(report.json["totals"], json!({"APPLIED": 1, "MISSING": 1}));
}

#[tokio::test]
async fn unpin_without_targets_is_the_whole_claim() {
    let daemon = daemon();
    let report = kvtier(&daemon.serve(), &["unpin", "--claim", "prompts"]).await.unwrap();
    let Asked::Unpin(asked) = daemon.last() else { panic!("no unpin") };
    assert_eq!((asked.targets.len(), asked.owner.as_str()), (0, "operator"));
    assert!(report.complete && report.text.starts_with("claim prompts APPLIED"), "{}", report.text);
}

#[tokio::test]
async fn long_work_is_followed_to_its_end() {
    let daemon = daemon();
    let served = daemon.serve();
    for words in
        [["prefetch", "--session", "s"], ["replicate", "--session", "s"], ["commit-checkpoint", "--session", "s"]]
    {
        let report = kvtier(&served, &words).await.unwrap();
        assert!(report.complete, "{}", report.text);
        assert_eq!(report.json["operation"]["state"], "DONE");
        assert_eq!(report.json["outcomes"][0]["outcome"], "ACCEPTED");
        let waits = daemon.asked().into_iter().filter(|a| matches!(a, Asked::Operation("wait", _))).count();
        assert_eq!(waits % 3, 0, "the fake's operations end at the third wait");
    }
    let replicate = daemon.asked().into_iter().find_map(|a| if let Asked::Replicate(r) = a { Some(r) } else { None });
    assert_eq!(replicate.unwrap().copies, 1);
}

#[tokio::test]
async fn long_work_may_be_left_alone_looked_at_and_given_up() {
    let mut daemon = daemon();
    daemon.stuck = true;
    let served = daemon.serve();
    let begun = kvtier(&served, &["move", &keys()[0], "--to", "disk", "--no-wait"]).await.unwrap();
    assert!(begun.complete && begun.text.contains("`kvtier cancel op-1` gives it up"), "{}", begun.text);
    let waited = kvtier(&served, &["wait", "op-1", "--for", "1ms"]).await.unwrap();
    assert!(!waited.complete && waited.text.contains("it goes on"), "{}", waited.text);
    let short = kvtier(&served, &["prefetch", "--program", "p", "--wait", "1ms"]).await.unwrap();
    assert!(!short.complete && short.json["operation"]["state"] == "RUNNING", "{}", short.json);
    let listed = kvtier(&served, &["operations"]).await.unwrap();
    assert_eq!(listed.json["operations"].as_array().unwrap().len(), 2);
    let ended = kvtier(&served, &["cancel", "op-1"]).await.unwrap();
    assert!(ended.complete && ended.text.contains("CANCELLED"), "{}", ended.text);
    let one = kvtier(&served, &["operations", "op-1"]).await.unwrap();
    assert!(!one.complete, "it did not come to its end");
    let error = kvtier(&served, &["wait", "op-9"]).await.unwrap_err().to_string();
    assert!(error.contains("no such operation (NOT_FOUND)") && error.contains("kvtier operations"), "{error}");
}

#[tokio::test]
async fn blocks_are_marked_and_told_what_they_mean() {
    let daemon = daemon();
    let served = daemon.serve();
    let key = &keys()[0];
    let words =
        ["taint", key, "--taint", "secret=pii:NoServe", "--taint", "tmp:Ephemeral(30s)", "--type", "scratchpad"];
    let report = kvtier(&served, &words).await.unwrap();
    let Asked::Taint(asked) = daemon.last() else { panic!("no taint") };
    assert_eq!(asked.semantic(), SemanticType::Scratchpad);
    assert_eq!((asked.taints[0].effect(), asked.taints[0].value.as_str()), (TaintEffect::NoServe, "pii"));
    assert_eq!((asked.taints[1].effect(), asked.taints[1].ttl_ms), (TaintEffect::Ephemeral, 30_000));
    assert!(report.complete && report.text.ends_with("1 APPLIED\n"), "{}", report.text);
    let report = kvtier(&served, &["untaint", "--session", "s", "--taint", "secret"]).await.unwrap();
    let Asked::Untaint(asked) = daemon.last() else { panic!("no untaint") };
    assert_eq!((asked.taints[0].key.as_str(), asked.taints[0].effect), ("secret", 0));
    assert_eq!(report.json["outcomes"][0]["blocks"], 2);
}

#[tokio::test]
async fn what_other_nodes_did_is_told() {
    let daemon = daemon();
    let served = daemon.serve();
    let evicted = kvtier(&served, &["evict", "--program", "p", "--exclusive", "--everywhere"]).await.unwrap();
    let Asked::Evict(asked) = daemon.last() else { panic!("no evict") };
    assert!(asked.everywhere && asked.tiers.is_empty());
    assert!(evicted.complete && evicted.text.contains("node-2  APPLIED       1  64.0 KiB"), "{}", evicted.text);
    let words = ["signal", "p-1", "fork", "--child", "p-1a", "--child", "p-1b", "--parent", "p-0", "--tenant", "acme"];
    let signaled = kvtier(&served, &words).await.unwrap();
    let Asked::Signal(asked) = daemon.last() else { panic!("no signal") };
    assert_eq!((asked.kind(), asked.children.len(), asked.tenant.as_str()), (v1::SignalKind::Fork, 2, "acme"));
    assert!(!signaled.complete, "a node that is away has not heard of it yet");
    assert!(signaled.text.contains("freed here: 5 blocks, 5.0 MiB"), "{}", signaled.text);
    assert_eq!(signaled.json["nodes"][0]["outcome"], "DEFERRED");
}

#[tokio::test]
async fn a_signal_must_say_what_its_kind_needs() {
    let daemon = daemon();
    let served = daemon.serve();
    let lines: [&[&str]; 3] = [
        &["signal", "p", "fork"],
        &["signal", "p", "completion", "--child", "c"],
        &["signal", "p", "completion", "--expected-resume", "5s"],
    ];
    for words in lines {
        assert!(kvtier(&served, words).await.unwrap_err().is_usage(), "{words:?}");
    }
    assert_eq!(daemon.asked(), []);
}

#[tokio::test]
async fn hints_are_an_object_and_each_action_is_answered() {
    let daemon = daemon();
    let served = daemon.serve();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("envelope.json");
    let path = file.display().to_string();
    std::fs::write(&file, "[]").unwrap();
    assert!(kvtier(&served, &["apply-hints", &path, "--session", "s"]).await.unwrap_err().is_usage());
    std::fs::write(&file, "{\"actions\": []}").unwrap();
    let report = kvtier(&served, &["apply-hints", &path, "--session", "s", "--ttl", "1m"]).await.unwrap();
    let Asked::Hints(asked) = daemon.last() else { panic!("no hints") };
    assert_eq!((asked.session_id.as_str(), asked.ttl_ms), ("s", 60_000));
    assert_eq!(asked.envelope_json, "{\"actions\": []}");
    assert!(!report.complete && report.text.contains("b       kv.retain  UNSUPPORTED"), "{}", report.text);
}
