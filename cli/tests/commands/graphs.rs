//! Declared programs and what should run next.

use kvtier_proto::v1;

use super::fake::Asked;
use super::{daemon, kvtier};

const PLAN: &str = r#"{"program_id": "p", "steps": [{"step_id": "a", "expected_ms": 900},
    {"step_id": "b", "after": ["a"], "program_id": "p/b", "tool_gap_ms": 50}]}"#;
const TRACE: &str = r#"{"spans": [
    {"trace_id": "t", "span_id": "x", "start_time": "2026-02-25T12:00:00.000000", "end_time": "2026-02-25T12:00:01.000000",
     "attributes": {"gen_ai.operation.name": "chat"}, "resource_attributes": {"service.name": "lead"}},
    {"trace_id": "t", "span_id": "y", "start_time": "2026-02-25T12:00:02.000000", "end_time": "2026-02-25T12:00:03.500000",
     "attributes": {"gen_ai.operation.name": "chat"}, "resource_attributes": {"service.name": "other"}}]}"#;

#[tokio::test]
async fn programs_are_declared_from_our_files_and_from_traces() {
    let daemon = daemon();
    let served = daemon.serve();
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let file = dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        file.display().to_string()
    };
    let (plan, trace) = (write("plan.json", PLAN), write("trace.json", TRACE));
    let declared = kvtier(&served, &["graph", "declare", &plan, "--tenant", "acme"]).await.unwrap();
    let Asked::Declare(asked) = daemon.last() else { panic!("no declaration") };
    assert_eq!((asked.program_id.as_str(), asked.tenant.as_str(), asked.steps.len()), ("p", "acme", 2));
    assert_eq!((asked.steps[1].after[0].as_str(), asked.steps[1].tool_gap_ms), ("a", 50));
    assert!(
        declared.complete && declared.text == "program p APPLIED, 2 steps: as the fake says\n",
        "{}",
        declared.text
    );
    assert_eq!(declared.json["revision"], 7);

    let words = ["graph", "declare", "--otel", &trace, "--program", "again"];
    let before = daemon.asked().len();
    let dry = kvtier(&served, &[&words[..], &["--dry-run"]].concat()).await.unwrap();
    assert_eq!(daemon.asked().len(), before, "nothing was asked");
    let row: Vec<&str> = dry.text.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    assert_eq!(row, ["again", "2", "2s"]);
    let again = write("again.json", &dry.json_text());
    kvtier(&served, &["graph", "declare", &again]).await.unwrap();
    let Asked::Declare(from_file) = daemon.last() else { panic!("no declaration") };
    kvtier(&served, &words).await.unwrap();
    let Asked::Declare(from_trace) = daemon.last() else { panic!("no declaration") };
    assert_eq!(from_file, from_trace, "a dry run's file is what would be declared");
    assert_eq!(from_trace.steps[1].program_id, "again/other");

    let both = write("both.json", &format!("[{PLAN}, {}]", PLAN.replace("\"p\"", "\"full\"")));
    let partly = kvtier(&served, &["graph", "declare", &both]).await.unwrap();
    assert!(!partly.complete && partly.text.contains("program full REJECTED"), "{}", partly.text);
    assert_eq!(partly.json["programs"][1]["outcome"], "REJECTED");
    for (name, text) in [("no.json", "{"), ("none.json", r#"{"spans": []}"#)] {
        let file = write(name, text);
        let error = kvtier(&served, &["graph", "declare", "--otel", &file]).await.unwrap_err();
        assert!(error.is_usage(), "{error}");
    }
    let words = ["graph", "declare", &both, "--program", "x"];
    assert!(kvtier(&served, &words).await.unwrap_err().to_string().contains("the file has 2"));
}

#[tokio::test]
async fn graphs_are_shown_moved_on_and_removed() {
    let daemon = daemon();
    let served = daemon.serve();
    let shown = kvtier(&served, &["graph", "show", "p"]).await.unwrap();
    assert!(shown.text.starts_with("program p of shared, revision 7: 0 of 1 steps ended"), "{}", shown.text);
    assert!(shown.text.contains("a, c, d and 1 more"), "{}", shown.text);
    assert_eq!(shown.json["graphs"][0]["steps"][0]["rank_ms"], 12_300);
    assert!(!kvtier(&served, &["graph", "show", "nobody"]).await.unwrap().complete);
    kvtier(&served, &["graph", "progress", "p", "--began", "b", "--ended", "a"]).await.unwrap();
    let Asked::Progress(asked) = daemon.last() else { panic!("no progress") };
    assert_eq!((asked.began, asked.ended), (vec!["b".to_owned()], vec!["a".to_owned()]));
    kvtier(&served, &["graph", "remove", "p"]).await.unwrap();
    assert_eq!(daemon.last(), Asked::Declare(v1::DeclareRequest { program_id: "p".to_owned(), ..Default::default() }));
    let next = kvtier(&served, &["next", "--program", "p", "--limit", "1", "--running"]).await.unwrap();
    let Asked::Next(asked) = daemon.last() else { panic!("no question") };
    assert_eq!((asked.program_ids.as_slice(), asked.limit, asked.include_running), (&["p".to_owned()][..], 1, true));
    assert!(next.text.contains("1700000000000  critical path: 12.3 s to the end of p"), "{}", next.text);
    assert!(next.text.ends_with("1 steps, the first to run first; there are more: raise --limit\n"), "{}", next.text);
}
