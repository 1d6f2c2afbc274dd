//! Hints of requests: what a client says of its blocks holds for them, as far as it is trusted and as budgets reach.

use bytes::Bytes;
use kvtier::hints::{Hints, OutcomesPoll};
use kvtier_proto::v1::{self, Outcome};
use kvtier_tests::daemon::{OLDEST_FIRST, count};
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use serde_json::{Value, json};

const BLOCK: u64 = 64 << 10;
const OWNER: &str = "request hints";

/// 16 MiB of host memory: 256 blocks, of which 51 may be one owner's; no disk.
fn small(trust: &str) -> Setup {
    let sections = format!("{OLDEST_FIRST}[hints]\ntrust = \"{trust}\"\n");
    Setup { host_mib: 16, disk_mib: None, sections, ..Setup::default() }
}

fn start(trust: &str) -> (Daemon, Engine) {
    let daemon = daemon!(small(trust));
    let engine = Engine::attach(&daemon, &Shape::default());
    (daemon, engine)
}

fn document(fields: &[(&str, Value)]) -> Bytes {
    let mut all = json!({"v": 1, "prompt_tokens": 320});
    for (key, value) in fields {
        all[*key] = value.clone();
    }
    Bytes::from(all.to_string())
}

fn action(kind: &str, payload: Value) -> Value {
    json!({"protocol_version": "0.1", "message_id": "m", "actions": [
        {"action_id": "a", "action_type": kind, "action_version": "1.0", "payload": payload}]})
}

/// What the daemon answers to a request's hints: action and outcome.
fn told(engine: &Engine, hints: &Bytes) -> Vec<(String, String)> {
    let request = Hints { request_id: "told".into(), cache_salt: String::new(), client_hints: hints.clone() };
    engine.scheduler().submit_hints(request).expect("hints within bounds");
    let json = until("the outcomes of hints", || match engine.scheduler().poll_hints("told") {
        OutcomesPoll::Ready(json) => Some(json),
        OutcomesPoll::Pending => None,
        OutcomesPoll::Unknown => panic!("the daemon did not answer"),
    });
    let rows: Vec<Value> = serde_json::from_str(&json).expect("a list");
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    rows.iter().map(|row| (text(row, "action_type"), text(row, "outcome"))).collect()
}

fn pair(action: &str, outcome: &str) -> (String, String) {
    (action.into(), outcome.into())
}

/// Puts a prompt whose requests say so.
fn put(engine: &mut Engine, prompt: &Prompt, hints: &Bytes) {
    engine.hints = hints.clone();
    engine.put_all(prompt);
    engine.hints = Bytes::new();
}

fn press(engine: &Engine) {
    for n in 0..24 {
        engine.put_all(&Prompt::new(format!("pressure {n}"), 32));
    }
}

fn of_blocks(daemon: &Daemon, prompt: &Prompt) -> Vec<(String, String)> {
    let blocks = daemon.control().locate(&Shape::default().keys(0, prompt)).expect("blocks");
    blocks.iter().map(|b| (b.semantic().as_str_name().to_owned(), b.program_id.clone())).collect()
}

fn counted(daemon: &Daemon, name: &str) -> u64 {
    count(&daemon.status().policy, name)
}

fn hinted(daemon: &Daemon) -> u64 {
    counted(daemon, "claims_hint_blocks")
}

#[test]
fn spans_and_programs_reach_the_blocks_of_every_carrier() {
    let (daemon, mut engine) = start("identity");
    let spans = json!([
        {"start": 0, "end": 40, "type": "SYSTEM_PROMPT"},
        {"start": 40, "end": 64, "type": "SCRATCHPAD"},
        {"start": 64, "end": 80, "type": "TOOL_RESULT"},
    ]);
    let fields = json!({"program_id": "p", "spans": spans});
    let carriers = [
        ("kv_hints", action("kvtier.annotate", fields.clone())),
        ("xargs", json!({"agentic_context": fields.to_string()})),
        ("xargs", json!({"kvtier": fields.to_string()})),
        ("params", fields.clone()),
    ];
    for (n, (carrier, value)) in carriers.into_iter().enumerate() {
        let prompt = Prompt::new(format!("carrier {n}"), 6);
        put(&mut engine, &prompt, &document(&[(carrier, value)]));
        let (types, programs): (Vec<_>, Vec<_>) = of_blocks(&daemon, &prompt).into_iter().unzip();
        // Block 2 spans two types: the more durable one counts.
        let system = "SYSTEM_PROMPT";
        assert_eq!(types, [system, system, system, "SCRATCHPAD", "TOOL_RESULT", "SEMANTIC_TYPE_UNSPECIFIED"]);
        assert!(programs.iter().all(|program| program == "p"), "{programs:?}");
    }
}

#[test]
fn what_was_left_ahead_is_joined_by_session() {
    let (daemon, mut engine) = start("identity");
    let envelope = action("kvtier.annotate", json!({"program_id": "left", "type": "SKILL"}));
    let request = v1::ApplyHintsRequest {
        session_id: "s".into(),
        envelope_json: envelope.to_string(),
        ..v1::ApplyHintsRequest::default()
    };
    let reply = daemon.control().kv(async |mut client| client.apply_hints(request).await).expect("an answer");
    assert_eq!(reply.outcomes.iter().map(v1::HintOutcome::outcome).collect::<Vec<_>>(), [Outcome::Accepted]);
    let (said, silent) = (Prompt::new("said", 4), Prompt::new("silent", 4));
    put(&mut engine, &said, &document(&[("session_id", json!("s"))]));
    put(&mut engine, &silent, &document(&[("session_id", json!("other"))]));
    assert_eq!(of_blocks(&daemon, &said), vec![pair("SKILL", "left"); 4]);
    assert_eq!(of_blocks(&daemon, &silent), vec![pair("SEMANTIC_TYPE_UNSPECIFIED", ""); 4]);
}

#[test]
fn what_is_written_or_read_is_retained() {
    let (daemon, mut engine) = start("identity");
    let prompt = Prompt::new("retained", 20);
    let hints = document(&[("xargs", json!({"prompt_cache_retention": "24h"}))]);
    put(&mut engine, &prompt, &hints);
    until("the retained blocks", || (hinted(&daemon) == 20).then_some(()));
    // A request that only reads retains what it read.
    let read = Prompt::new("read", 20);
    engine.put_all(&read);
    engine.hints = document(&[(
        "kv_hints",
        action("kv.retain", json!({"directives": [{"start": 0, "end": 160, "duration": 600}]})),
    )]);
    assert_eq!(engine.get(&read).whole(), Some(320));
    engine.hints = Bytes::new();
    until("the blocks that were read", || (hinted(&daemon) == 30).then_some(()));
    press(&engine);
    assert_eq!(engine.get(&prompt).whole(), Some(320), "what was retained outlives what was not");
    assert_eq!(engine.get(&read).whole(), Some(160));
}

#[test]
fn pins_are_claims_within_the_budget_when_clients_are_trusted() {
    let (daemon, mut engine) = start("all");
    let hints = document(&[
        ("xargs", json!({"agentic_context": {"program_id": "p"}})),
        ("kv_hints", action("kvtier.pin", json!({"start": 0, "end": 160, "ttl": "10m"}))),
    ]);
    assert_eq!(told(&engine, &hints), [pair("kvtier.pin", "ACCEPTED"), pair("agentic_context", "APPLIED")]);
    let prompt = Prompt::new("pinned", 20);
    put(&mut engine, &prompt, &hints);
    let claim = || {
        let claims = daemon.control().list_claims(v1::ListClaimsRequest::default()).expect("claims").claims;
        claims.into_iter().find(|c| (c.owner.as_str(), c.claim_id.as_str()) == (OWNER, "program p"))
    };
    let first = until("the claim", || claim().filter(|c| c.blocks == 10));
    assert_eq!((first.kind(), first.bytes), (v1::ClaimKind::Pin, 10 * BLOCK));
    press(&engine);
    assert_eq!(engine.get(&prompt).whole(), Some(160));
    // Far more than an owner's 51 blocks.
    let whole = document(&[
        ("xargs", json!({"agentic_context": {"program_id": "p"}})),
        ("kv_hints", action("kvtier.pin", json!({"ttl": "10m"}))),
    ]);
    for n in 0..4 {
        put(&mut engine, &Prompt::new(format!("more {n}"), 32), &whole);
    }
    until("a clipped pin", || (counted(&daemon, "hints_not_held") > 0).then_some(()));
    assert!(claim().is_some_and(|c| c.bytes <= 51 * BLOCK), "{:?}", claim());
}

#[test]
fn identity_takes_no_pins_and_none_takes_nothing() {
    let hints = document(&[
        ("kv_hints", action("kvtier.pin", json!({"ttl": "10m"}))),
        ("params", json!({"program_id": "p", "semantic": "SKILL", "priority": 99, "taints": ["a:NoServe"]})),
    ]);
    let prompt = Prompt::new("trust", 4);
    for (trust, params, wanted) in
        [("identity", "CLIPPED", pair("SKILL", "p")), ("none", "REJECTED", pair("SEMANTIC_TYPE_UNSPECIFIED", ""))]
    {
        let (daemon, mut engine) = start(trust);
        assert_eq!(told(&engine, &hints), [pair("kvtier.pin", "REJECTED"), pair("kv_transfer_params", params)]);
        put(&mut engine, &prompt, &hints);
        assert_eq!(of_blocks(&daemon, &prompt), vec![wanted; 4]);
        assert_eq!(engine.get(&prompt).whole(), Some(64), "no taint keeps it back");
        let claims = daemon.control().list_claims(v1::ListClaimsRequest::default()).expect("claims").claims;
        assert!(claims.is_empty() && hinted(&daemon) == 0, "{claims:?}");
    }
}

#[test]
fn hints_hold_blocks_of_their_own_tenant() {
    let (daemon, mut engine) = start("all");
    let prompt = Prompt::new("shared", 8);
    engine.put_all(&prompt);
    engine.cache_salt = "somebody".into();
    engine.hints = document(&[("params", json!({"priority": 90})), ("kv_hints", action("kvtier.pin", json!({})))]);
    assert_eq!(engine.get(&prompt).whole(), Some(128), "what is shared is read by all");
    let own = Prompt::new("own", 4);
    engine.put_all(&own);
    until("the own blocks", || (hinted(&daemon) >= 4).then_some(()));
    assert_eq!(hinted(&daemon), 4);
}

#[test]
fn hostile_hints_cost_the_hints_only() {
    let (daemon, mut engine) = start("all");
    let unreadable: Vec<Vec<u8>> = vec![
        b"[".repeat(60_000),
        b"{\"v\":1,\"params\":".repeat(4_000),
        b"\xff\xfe".to_vec(),
        b"null".to_vec(),
        b"{\"v\":99}".to_vec(),
        vec![0; 65_536],
    ];
    let odd = [
        json!({"v": 1, "kv_hints": {"actions": vec![json!(null); 20_000]}}),
        json!({"v": 1, "kv_hints": {"actions": {"0": []}}, "xargs": [[]], "session_id": [], "params": 3}),
        json!({"v": 1, "params": {"spans": (0..1_000).map(|n| json!({"start": n * 3, "end": n * 3 + 2, "type": "SKILL"})).collect::<Vec<_>>()}}),
        json!({"v": 1, "params": {"priority": -1, "ttl": 1e308, "taints": {}, "tolerations": "*", "program_id": {}}}),
    ];
    let readable = odd.iter().map(|value| value.to_string().into_bytes());
    let bad = unreadable.len();
    for (n, bytes) in unreadable.into_iter().chain(readable).enumerate() {
        let hints = Bytes::from(bytes);
        let outcomes = told(&engine, &hints);
        let refused = outcomes.iter().any(|(_, outcome)| outcome == "REJECTED" || outcome == "CLIPPED");
        assert!(refused || n == bad + 2 && !outcomes.is_empty(), "{n}: {outcomes:?}");
        let prompt = Prompt::new(format!("hostile {n}"), 4);
        put(&mut engine, &prompt, &hints);
        engine.hints = hints;
        assert_eq!(engine.get(&prompt).whole(), Some(64), "{n}: the request goes on");
        engine.hints = Bytes::new();
    }
    assert!(counted(&daemon, "hints_rejected") >= bad as u64);
}
