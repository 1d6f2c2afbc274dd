//! `kvtier events` over a stream that breaks.

use super::daemon;
use super::exits::binary;
use super::fake::Asked;

#[tokio::test]
async fn a_broken_stream_goes_on_where_it_broke() {
    let daemon = daemon();
    let served = daemon.serve();
    let output = binary(&served, &["events", "--kind", "stored", "--json", "--count", "5"], "").await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["lost"], true);
    let sequences: Vec<u64> = lines[1..].iter().map(|line| line["sequence"].as_u64().unwrap()).collect();
    assert_eq!(sequences, [1, 2, 3, 4, 5]);
    let resumed: Vec<(u64, u64)> = daemon
        .asked()
        .into_iter()
        .filter_map(|asked| if let Asked::Watch(w) = asked { Some((w.incarnation, w.after_sequence)) } else { None })
        .collect();
    assert_eq!(resumed, [(0, 0), (3, 2), (3, 4)]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("trying again"));
}

#[tokio::test]
async fn a_position_is_where_it_begins() {
    let daemon = daemon();
    let output = binary(&daemon.serve(), &["events", "--after", "3:40", "--count", "1"], "").await;
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("      41  STORED") && text.lines().count() == 1, "{text}");
    let Asked::Watch(asked) = daemon.last() else { panic!("no watch") };
    assert_eq!((asked.incarnation, asked.after_sequence), (3, 40));
}
