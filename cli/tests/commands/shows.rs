//! Commands that show what there is: claims, programs, rules, capabilities, blocks by what they mean.

use kvtier_proto::v1::SemanticType;

use super::fake::Asked;
use super::{daemon, keys, kvtier};

#[tokio::test]
async fn claims_are_listed_over_pages_with_the_nodes_budgets() {
    let daemon = daemon();
    let served = daemon.serve();
    let all = kvtier(&served, &["claims", "--owner", "operator"]).await.unwrap();
    assert_eq!(all.json["claims"].as_array().unwrap().len(), 4);
    assert_eq!(all.json["truncated"], false);
    assert!(all.text.ends_with("4 claims\npinned in host: 10.0 MiB of at most 1.0 GiB\n"), "{}", all.text);
    let some = kvtier(&served, &["claims", "--limit", "3"]).await.unwrap();
    assert_eq!((some.json["claims"].as_array().unwrap().len(), &some.json["truncated"]), (3, &true.into()));
}

#[tokio::test]
async fn releasing_all_claims_of_an_owner_wants_yes() {
    let daemon = daemon();
    let served = daemon.serve();
    let all = ["claims", "--owner", "gone", "--release"];
    assert!(kvtier(&served, &all).await.unwrap_err().is_usage());
    assert_eq!(daemon.asked(), []);
    let released = kvtier(&served, &[&all[..], &["--yes"]].concat()).await.unwrap();
    assert_eq!((released.text.as_str(), released.complete), ("4 claims released\n", true));
    let named = kvtier(&served, &["claims", "a", "b", "--owner", "gone", "--release"]).await.unwrap();
    let Asked::Release(asked) = daemon.last() else { panic!("no release") };
    assert_eq!(asked.claim_ids, ["a", "b"]);
    assert!(!named.complete, "one of the two was not there");
}

#[tokio::test]
async fn programs_come_by_their_size() {
    let report = kvtier(&daemon().serve(), &["programs"]).await.unwrap();
    assert_eq!(report.json["programs"][0]["program_id"], "p-large");
    assert!(report.text.ends_with("2 programs\n"), "{}", report.text);
}

#[tokio::test]
async fn rules_are_shown_explained_and_reloaded() {
    let served = daemon().serve();
    let shown = kvtier(&served, &["rules"]).await.unwrap();
    assert!(
        shown.text.starts_with("# rules from /etc/kvtier/rules.toml, loaded 2 times\n[[rule]]\n"),
        "{}",
        shown.text
    );
    assert_eq!(kvtier(&served, &["rules", "show"]).await.unwrap().text, shown.text);
    let explained = kvtier(&served, &["rules", "explain", &keys()[0][..8]]).await.unwrap();
    for line in ["  priority  90     system prompts stay (line 9)", "  ttl       none   built in"] {
        assert!(explained.text.lines().any(|l| l == line), "{line:?} is not in\n{}", explained.text);
    }
    let unknown = kvtier(&served, &["rules", "explain", &"f".repeat(64)]).await.unwrap();
    assert!(!unknown.complete && unknown.text.contains("MISSING"), "{}", unknown.text);
    let refused = kvtier(&served, &["rules", "reload"]).await.unwrap();
    assert!(!refused.complete && refused.text.contains("line 3, column 8: no such type"), "{}", refused.text);
}

#[tokio::test]
async fn capabilities_name_verbs_and_bounds() {
    let report = kvtier(&daemon().serve(), &["capabilities"]).await.unwrap();
    for line in ["kvtierd 0.1.0  protocol 1", "verbs    Evict Pin", "tiers    host disk", "keys   65536"] {
        assert!(report.text.lines().any(|l| l == line), "{line:?} is not in\n{}", report.text);
    }
}

#[tokio::test]
async fn ls_asks_for_what_blocks_mean_and_who_holds_them() {
    let daemon = daemon();
    let words = ["ls", "--type", "tool-definition", "--program", "p", "--taint", "secret", "--limit", "7"];
    kvtier(&daemon.serve(), &words).await.unwrap();
    let Asked::List(asked) = daemon.last() else { panic!("no list") };
    assert_eq!((asked.semantic(), asked.program_id.as_str()), (SemanticType::ToolDefinition, "p"));
    assert_eq!((asked.taint_key.as_str(), asked.page_size), ("secret", 7));
}

#[tokio::test]
async fn place_says_where_why_and_what_was_started() {
    let daemon = daemon();
    let words = ["place", "p-1", "--candidate", "node-1", "--candidate", "node-2:250:9000", "--current", "node-1"];
    let more = ["--start", "--session", "s", "--tenant", "acme", "--prompt-tokens", "4096"];
    let report = kvtier(&daemon.serve(), &[words.as_slice(), &more].concat()).await.unwrap();
    let Asked::Place(asked) = daemon.last() else { panic!("no place") };
    let second = &asked.candidates[1];
    assert_eq!((second.node_id.as_str(), second.queue_ms, second.prefill_tokens_per_second), ("node-2", 250, 9_000));
    assert_eq!((asked.program_id.as_str(), asked.current_node_id.as_str(), asked.targets.len()), ("p-1", "node-1", 1));
    assert_eq!((asked.start, asked.tenant.as_str(), asked.prompt_tokens), (true, "acme", 4_096));
    for part in ["node-2 (STATE): the context is nearest", "prefetch of 20 blocks, 5.0 MiB, to node-2: operation 7"] {
        assert!(report.text.contains(part), "{part:?} is not in\n{}", report.text);
    }
    assert_eq!((&report.json["reason"], &report.json["costs"][0]["host_tokens"]), (&"STATE".into(), &320.into()));
}

#[tokio::test]
async fn locate_takes_any_target() {
    let daemon = daemon();
    let report = kvtier(&daemon.serve(), &["locate", "--session", "s", "--tenant", "acme"]).await.unwrap();
    let Asked::Locate(asked) = daemon.last() else { panic!("no locate") };
    assert_eq!((asked.keys.len(), asked.targets.len(), asked.targets[0].tenant.as_str()), (0, 1, "acme"));
    assert!(!report.complete && report.text.contains("no blocks"), "{}", report.text);
}
