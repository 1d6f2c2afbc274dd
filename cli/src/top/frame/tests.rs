//! Frames of looks: what is told, and that it fits.

use std::time::{Duration, Instant};

use super::{Size, fitted, json, text};
use crate::error::CliError;
use crate::top::Look;
use crate::top::change::Change;
use kvtier_proto::v1;

fn count(name: &str, value: u64) -> v1::Count {
    v1::Count { name: name.to_owned(), value }
}

fn look() -> Look {
    let status = v1::StatusReply {
        node_id: "node-1".into(),
        version: "0.1.0".into(),
        incarnation: 1,
        uptime_ms: 10_000,
        state: "serving".into(),
        tiers: vec![v1::TierStatus {
            tier: v1::Tier::Host.into(),
            state: "ok".into(),
            capacity_bytes: 4 << 30,
            used_bytes: 3 << 30,
            blocks: 12,
            ..Default::default()
        }],
        ledger: vec![count("host", 600), count("peer", 150), count("novel", 250)],
        looked_up_tokens: 1_000,
        blocks_loaded: vec![count("host", 40), count("peer", 10)],
        types: vec![v1::TypeUse {
            semantic: v1::SemanticType::ToolDefinition.into(),
            tier: v1::Tier::Host.into(),
            copies: 3,
            bytes: 3 << 20,
        }],
        transports: vec![v1::TransportStatus { kind: "tcp".into(), read_bytes: 20 << 20, ..Default::default() }],
        policy: vec![count("evicted", 30), count("pins", 0)],
        ..Default::default()
    };
    let program = |n: u64| v1::Program { program_id: format!("p-{n}"), blocks: 100 - n, ..Default::default() };
    let claim = v1::Claim { claim_id: "prompts".into(), owner: "operator".into(), ..Default::default() };
    let budget = v1::ClaimBudget { tier: v1::Tier::Host.into(), claimed_bytes: 1 << 30, budget_bytes: 2 << 30 };
    Look {
        at: Instant::now(),
        status,
        programs: Ok((0..50).map(program).collect()),
        claims: Ok(v1::ListClaimsReply { claims: vec![claim], budgets: vec![budget], ..Default::default() }),
    }
}

#[test]
fn a_frame_tells_tiers_types_hits_transfers_programs_and_claims() {
    let look = look();
    let text = text(&look, &Change::since_start(&look.status));
    for line in [
        "node node-1  kvtierd 0.1.0  serving  up 10s  0 engines  rates since its start",
        "HIT RATE  75.0 % of 100 tokens/s looked up",
        "  served  host 60.0 %  peer 15.0 %",
        "  missed  novel 25.0 %",
        "  host  ok     [#########...] 75.0 %  3.0 GiB   4.0 GiB      12         4        0",
        "  peer  -      -                            -         -       -         1        -",
        "  TOOL_DEFINITION       3       -  3.0 MiB     -       -",
        "  tcp        -      2.0 MiB       0 B             0      0",
        "PROGRAMS  50",
        "CLAIMS  1  pinned in host 1.0 GiB of 2.0 GiB",
        "evicted     30           3",
    ] {
        assert!(text.lines().any(|l| l == line), "{line:?} is not in\n{text}");
    }
    assert_eq!(text.matches("\n  p-").count(), super::LISTED_ROWS);
    assert!(!text.contains("pins"), "{text}");
}

#[test]
fn a_frame_fits_its_terminal() {
    let look = look();
    let change = Change::since_start(&look.status);
    for (rows, columns) in [(24, 80), (60, 200), (5, 10), (1, 1)] {
        let lines = fitted(&look, &change, None, Size { rows, columns });
        assert!(lines.len() <= rows && lines.iter().all(|l| l.chars().count() <= columns), "{rows}x{columns}");
    }
    let large = fitted(&look, &change, None, Size { rows: 60, columns: 200 });
    assert!(large.iter().filter(|l| l.starts_with("  p-")).count() > super::FEWEST_ROWS);
}

#[test]
fn a_daemon_that_is_away_is_said_above_what_was_last_seen() {
    let look = look();
    let late = CliError::Late { address: "/run/k.sock".parse().unwrap(), timeout: Duration::from_secs(5) };
    let lines = fitted(&look, &Change::since_start(&look.status), Some(&late), Size { rows: 24, columns: 200 });
    assert_eq!(lines[0], "! the daemon at unix:///run/k.sock did not answer within 5s");
    assert!(lines[1].starts_with("node node-1"));
}

#[test]
fn what_a_daemon_does_not_tell_is_said_and_null_in_json() {
    let unknown = CliError::Unknown { verb: "programs", words: String::new() };
    let look = Look { programs: Err(unknown), ..look() };
    let change = Change::since_start(&look.status);
    assert!(text(&look, &change).contains("\nPROGRAMS  this kvtierd does not know `programs`\n"));
    let json = json(&look, &change);
    assert!(json["programs"].is_null());
    assert_eq!((&json["hit_tokens"], &json["over_ms"]), (&750.into(), &10_000.into()));
    assert_eq!(json["transfers"]["tcp"]["read_bytes"], 20 << 20);
}
