//! Commands against a daemon in this process, through a real Unix socket.
#![forbid(unsafe_code)]

mod document;
mod events;
mod exits;
mod fake;
mod graphs;
mod live;
mod shows;
mod verbs;

use clap::Parser;
use fake::{FakeDaemon, Served};
use kvtier_cli::args::Args;
use kvtier_cli::error::CliError;
use kvtier_cli::report::Report;
use kvtier_cli::run::run;
use kvtier_cli::status;
use kvtier_proto::v1::{StatusReply, Tier};
use serde_json::json;

/// Keys that differ in their first digits, but for the last two, which share twenty.
fn keys() -> Vec<String> {
    let mut keys: Vec<String> = (0u64..8).map(|n| format!("{:08x}{:056x}", 0x1000_0000 * (n + 1), n)).collect();
    keys.push(format!("{:0<20}{:044x}", "abcdef", 1));
    keys.push(format!("{:0<20}{:044x}", "abcdef", 2));
    keys
}

fn daemon() -> FakeDaemon {
    let tier = |n: usize| if n < 5 { Tier::Host } else { Tier::Disk };
    let blocks: Vec<(String, Tier)> = keys().into_iter().enumerate().map(|(n, key)| (key, tier(n))).collect();
    FakeDaemon::new(&blocks, &keys()[7])
}

async fn kvtier(served: &Served, words: &[&str]) -> Result<Report, CliError> {
    let socket = served.socket.display().to_string();
    let line = ["kvtier", "--address", &socket].into_iter().chain(words.iter().copied());
    run(&Args::try_parse_from(line).expect("a command line of this file is right")).await
}

#[tokio::test]
async fn status_prints_tiers_engines_and_a_ledger_that_sums_to_the_whole() {
    let served = daemon().serve();
    let report = kvtier(&served, &["status"]).await.unwrap();
    assert!(report.complete);
    for line in [
        "node node-1  kvtierd 0.1.0  serving  up 1h 2m  incarnation 3",
        "  host    ok        1000  1.0 GiB   4.0 GiB  25.0 %        0  hugepages",
        "  object  absent       0      0 B       0 B       -        0  -",
        "  engine-a  worker     0   42  tiny-llama       2         1  1m 1s",
        "  host          600   60.0 %",
        "  looked up    1000  100.0 %",
        "CORRUPT BLOCKS  1",
        "  disk: recovered 12 records",
    ] {
        assert!(report.text.lines().any(|l| l == line), "{line:?} is not in\n{}", report.text);
    }
}

#[tokio::test]
async fn status_json_is_stable() {
    let served = daemon().serve();
    let report = kvtier(&served, &["status", "--json"]).await.unwrap();
    assert_eq!(report.json["tiers"][0]["used_bytes"], 1u64 << 30);
    assert_eq!(report.json["attachments"][0]["engine_id"], "engine-a");
    assert_eq!(
        report.json["ledger"],
        json!({
            "looked_up_tokens": 1000, "sum_tokens": 1000, "balanced": true,
            "parts": [{"name": "host", "value": 600}, {"name": "disk", "value": 150}, {"name": "novel", "value": 250}]
        })
    );
    let fields: Vec<&String> = report.json.as_object().unwrap().keys().collect();
    let expected = [
        "attachments",
        "blocks_loaded",
        "cluster",
        "corrupt_blocks",
        "incarnation",
        "ledger",
        "node_id",
        "notes",
        "policy",
        "state",
        "tiers",
        "transports",
        "types",
        "uptime_ms",
        "version",
    ];
    assert_eq!(fields, expected);
}

#[test]
fn a_ledger_that_does_not_sum_is_told() {
    let reply = StatusReply { looked_up_tokens: 999, ..fake::status() };
    let report = status::report(&reply);
    assert!(report.text.contains("the parts sum to 1000, not to 999"), "{}", report.text);
    assert_eq!(report.json["ledger"]["balanced"], false);
}

#[tokio::test]
async fn locate_takes_whole_keys_and_prefixes() {
    let served = daemon().serve();
    let keys = keys();
    let report = kvtier(&served, &["locate", &keys[6], &keys[1][..8]]).await.unwrap();
    assert!(report.complete);
    assert_eq!(report.json["blocks"][0]["key"], keys[6]);
    assert_eq!(report.json["blocks"][1]["key"], keys[1]);
    assert_eq!(
        report.json["blocks"][0]["replicas"][0],
        json!({
            "shard": 0, "tier": "disk", "bytes": 65536, "checksum": "fedcba9876543210",
            "layout_id": "07".repeat(32), "place": "extent 0 offset 4096", "node_id": "node-1"
        })
    );
    assert!(
        report.text.contains("64.0 KiB  fedcba9876543210  0707070707070707..  extent 0 offset 4096"),
        "{}",
        report.text
    );
}

#[tokio::test]
async fn locate_of_an_unknown_key_is_not_complete() {
    let served = daemon().serve();
    let report = kvtier(&served, &["locate", &"f".repeat(64)]).await.unwrap();
    assert!(!report.complete);
    assert_eq!(report.json["blocks"][0]["outcome"], "MISSING");
    assert!(report.text.contains("MISSING on every node that node-1 reaches"));
}

#[tokio::test]
async fn a_prefix_must_name_one_block() {
    let served = daemon().serve();
    let keys = keys();
    let error = kvtier(&served, &["locate", "abcdef000"]).await.unwrap_err();
    let CliError::Ambiguous { candidates, .. } = &error else { panic!("{error}") };
    assert_eq!(*candidates, keys[8..]);
    let error = kvtier(&served, &["evict", "99999999"]).await.unwrap_err();
    assert!(matches!(error, CliError::UnknownPrefix { .. }), "{error}");
}

#[tokio::test]
async fn ls_walks_pages_up_to_its_limit() {
    let served = daemon().serve();
    let listed = |report: &Report| report.json["blocks"].as_array().unwrap().len();
    let all = kvtier(&served, &["ls"]).await.unwrap();
    assert_eq!((listed(&all), &all.json["truncated"]), (10, &json!(false)));
    let some = kvtier(&served, &["ls", "--limit", "4"]).await.unwrap();
    assert_eq!((listed(&some), &some.json["truncated"]), (4, &json!(true)));
    assert!(some.text.ends_with("4 blocks; there may be more: raise --limit\n"), "{}", some.text);
    let disk = kvtier(&served, &["ls", "--tier", "disk", "--model", "llama"]).await.unwrap();
    assert_eq!(listed(&disk), 5);
    assert!(disk.text.contains("abcdef0000000000..  disk "), "{}", disk.text);
    let none = kvtier(&served, &["ls", "--model", "gpt"]).await.unwrap();
    assert_eq!(none.text, "no blocks\n");
}

#[tokio::test]
async fn evict_reports_each_target() {
    let (daemon, keys) = (daemon(), keys());
    let served = daemon.serve();
    let dry = kvtier(&served, &["evict", &keys[0], "--dry-run"]).await.unwrap();
    assert!(dry.complete && dry.text.ends_with("dry run: 1 APPLIED\n"), "{}", dry.text);
    assert_eq!(daemon.len(), 10);
    let done = kvtier(&served, &["evict", &keys[0], &keys[7]]).await.unwrap();
    assert!(!done.complete, "a deferred target is not applied");
    assert_eq!(done.json["totals"], json!({"APPLIED": 1, "DEFERRED": 1}));
    assert_eq!(done.json["outcomes"][1], json!({"key": keys[7], "outcome": "DEFERRED", "reason": "1 lease"}));
    assert_eq!(daemon.len(), 9);
}

#[tokio::test]
async fn evict_all_wants_yes_and_takes_a_tier() {
    let daemon = daemon();
    let served = daemon.serve();
    let error = kvtier(&served, &["evict", "--all", "--tier", "host"]).await.unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("of tier host"), "{error}");
    let host = kvtier(&served, &["evict", "--all", "--tier", "host", "--yes"]).await.unwrap();
    assert!(host.complete);
    assert_eq!((daemon.len(), host.text.as_str()), (5, "5 APPLIED\n"));
    let rest = kvtier(&served, &["evict", "--all", "--yes"]).await.unwrap();
    assert!(!rest.complete, "one block is leased");
    assert_eq!(daemon.len(), 1);
    assert!(rest.text.ends_with("4 APPLIED, 1 DEFERRED\n"), "{}", rest.text);
}

#[tokio::test]
async fn a_daemon_that_hangs_is_late() {
    let mut daemon = daemon();
    daemon.hangs = true;
    let served = daemon.serve();
    let error = kvtier(&served, &["status", "--timeout", "50ms"]).await.unwrap_err();
    assert!(error.to_string().contains("did not answer within 50ms"), "{error}");
}

#[tokio::test]
async fn a_refusal_is_told_in_the_daemons_words() {
    let mut daemon = daemon();
    daemon.journal_fails = true;
    let error = kvtier(&daemon.serve(), &["evict", &keys()[0]]).await.unwrap_err();
    assert!(error.to_string().contains("refused `evict`: nothing was evicted"), "{error}");
}

#[tokio::test]
async fn without_a_daemon_the_error_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kvtierd.sock");
    let ask = async || {
        let address = socket.display().to_string();
        run(&Args::try_parse_from(["kvtier", "--address", &address, "status"]).unwrap()).await.unwrap_err().to_string()
    };
    let absent = ask().await;
    assert!(absent.contains("the socket does not exist") && absent.contains("kvtierd --config"), "{absent}");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let ended = ask().await;
    assert!(ended.contains("nobody listens"), "{ended}");
}

#[tokio::test]
async fn doctor_finds_a_serving_daemon() {
    let served = daemon().serve();
    let root = tempfile::tempdir().unwrap();
    let report = kvtier(&served, &["doctor", "--root", &root.path().display().to_string()]).await.unwrap();
    assert!(report.complete);
    assert!(report.text.contains("node-1 serving at unix://"), "{}", report.text);
}
