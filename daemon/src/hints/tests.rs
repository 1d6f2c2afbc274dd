use std::time::Duration;

use kvtier_types::hints::{Said, read_envelope_json};
use kvtier_types::{BlockHints, Instant, Outcome, RequestHints, SemanticType, TenantId};
use serde_json::{Value, json};

use super::{Config, Heard, Hints, Left, Owner, Trust, joined};
use crate::units::{ByteSize, Span};

fn hints(trust: Trust) -> Hints {
    Hints::new(&Config { trust, max_ttl: Span(Duration::from_secs(3600)), store: ByteSize(64 << 10) })
}

fn hear(hints: &Hints, document: &Value, tenant: &TenantId, now: Instant) -> Heard {
    hints.hear(document.to_string().as_bytes(), tenant, now).unwrap()
}

fn rich() -> Value {
    json!({"v": 1, "session_id": "s", "params": {
        "program_id": "p", "semantic": "SYSTEM_PROMPT", "tolerations": ["*"], "taints": ["a:NoEvict"], "priority": 99,
        "ttl": "48h", "signal": "CANCELLATION"}})
}

fn outcomes(heard: &Heard) -> Vec<(String, Outcome)> {
    heard.notes().map(|note| (note.action_type.clone(), note.outcome())).collect()
}

fn left(said: Said, id: &str) -> Left {
    Left { message_id: id.into(), said, bytes: 100, ttl: Duration::from_secs(60) }
}

fn annotate(fields: &Value) -> Said {
    let json = json!({"actions": [{"action_id": "a", "action_type": "kvtier.annotate", "payload": fields}]});
    read_envelope_json(&json.to_string()).unwrap().1
}

fn of_session(id: &str) -> Vec<Owner> {
    vec![Owner::Session(id.into())]
}

#[test]
fn identity_takes_no_priorities_taints_or_ends() {
    let heard = hear(&hints(Trust::Identity), &rich(), &TenantId::shared(), Instant::ZERO);
    let request = heard.resolution().request();
    assert_eq!((request.block.program_id.as_str(), request.session_id.as_str()), ("p", "s"));
    assert_eq!((request.block.semantic, request.tolerations.len()), (SemanticType::SystemPrompt, 1));
    assert_eq!(request.block.taints, []);
    assert_eq!(request.retain, Some((50, Duration::from_secs(3600))), "a time is taken, up to the most there is");
    assert_eq!(heard.signals().count(), 0);
    let told = outcomes(&heard);
    assert_eq!(told[0], ("session_id".into(), Outcome::Applied));
    assert_eq!(told[1].1, Outcome::Rejected, "a cancellation is refused loudly: {told:?}");
}

#[test]
fn all_takes_everything_but_longer_times_and_none_takes_nothing() {
    let heard = hear(&hints(Trust::All), &rich(), &TenantId::shared(), Instant::ZERO);
    let request = heard.resolution().request();
    assert_eq!((request.block.taints.len(), heard.signals().count()), (1, 1));
    assert_eq!(request.retain, Some((99, Duration::from_secs(3600))));
    assert_eq!(outcomes(&heard)[1].1, Outcome::Clipped);
    let heard = hear(&hints(Trust::None), &rich(), &TenantId::shared(), Instant::ZERO);
    assert_eq!(heard.resolution().request(), RequestHints::default());
    assert!(outcomes(&heard).iter().all(|(_, outcome)| *outcome == Outcome::Rejected));
}

#[test]
fn a_pin_of_a_client_leaves_no_claim() {
    let pin = json!({"actions": [{"action_id": "a", "action_type": "kvtier.pin", "payload": {"ttl": 60}}]});
    let heard = hear(&hints(Trust::Identity), &json!({"v": 1, "kv_hints": pin}), &TenantId::shared(), Instant::ZERO);
    assert_eq!(outcomes(&heard), [("kvtier.pin".into(), Outcome::Rejected)]);
    assert_eq!(heard.resolution().request(), RequestHints::default());
}

#[test]
fn what_was_left_is_joined_between_the_session_id_and_transfer_params() {
    let hints = hints(Trust::Identity);
    let now = Instant::ZERO;
    let said = annotate(&json!({"program_id": "left", "type": "SKILL", "priority": 90, "taints": ["a:NoServe"]}));
    let (_, new) = hints.leave(of_session("s"), left(said, "m1"), None, now).unwrap();
    assert!(new);
    let of_program = annotate(&json!({"parent_program_id": "boss"}));
    hints.leave(vec![Owner::Program("left".into())], left(of_program, "m2"), None, now).unwrap();
    let document = json!({"v": 1, "session_id": "s", "params": {"program_id": "weak", "semantic": "DOCUMENT"}});
    let request = hear(&hints, &document, &TenantId::shared(), now).resolution().request();
    assert_eq!((request.block.program_id.as_str(), request.block.semantic), ("left", SemanticType::Skill));
    assert_eq!(request.retain.map(|(priority, _)| priority), Some(90), "an authenticated caller may say priorities");
    assert_eq!(request.block.taints.len(), 1);
    let stronger = json!({"v": 1, "session_id": "s", "xargs": {"kvtier": {"program_id": "mine"}}});
    assert_eq!(hear(&hints, &stronger, &TenantId::shared(), now).resolution().request().block.program_id, "mine");
    let later = now + Duration::from_secs(61);
    assert_eq!(hear(&hints, &document, &TenantId::shared(), later).resolution().request().block.program_id, "weak");
}

#[test]
fn what_was_left_is_joined_within_its_tenant() {
    let hints = hints(Trust::Identity);
    let (a, b) = (TenantId::new("a").unwrap(), TenantId::new("b").unwrap());
    let said = annotate(&json!({"type": "SKILL"}));
    hints.leave(of_session("s"), left(said, ""), Some(a.clone()), Instant::ZERO).unwrap();
    let document = json!({"v": 1, "session_id": "s"});
    let of = |tenant| hear(&hints, &document, tenant, Instant::ZERO).resolution().request().block.semantic;
    assert_eq!((of(&a), of(&b)), (SemanticType::Skill, SemanticType::Unspecified));
}

#[test]
fn the_store_is_bounded_and_knows_repeats() {
    let hints = hints(Trust::Identity);
    let tenant = Some(TenantId::new("a").unwrap());
    let leave = |n: u32, id: &str, tenant, now| {
        hints.leave(of_session(&n.to_string()), left(annotate(&json!({"type": "SKILL"})), id), tenant, now)
    };
    assert!(leave(0, "m", tenant.clone(), Instant::ZERO).unwrap().1);
    assert!(!leave(0, "m", tenant.clone(), Instant::ZERO).unwrap().1, "a repeat is known");
    let fits = (1..1000).take_while(|n| leave(*n, "", tenant.clone(), Instant::ZERO).is_ok()).count();
    assert!((10..40).contains(&fits), "a quarter of 64 KiB: {fits}");
    assert!(leave(5000, "", None, Instant::ZERO).is_ok(), "operators have the rest");
    assert!(leave(2000, "", tenant, Instant::ZERO + Duration::from_secs(61)).is_ok(), "what expired makes room");
    for _ in 0..20 {
        leave(7000, "", None, Instant::ZERO).unwrap();
    }
    let document = json!({"v": 1, "session_id": "7000"});
    assert_eq!(hear(&hints, &document, &TenantId::shared(), Instant::ZERO).left.len(), 4);
}

#[test]
fn the_engines_own_word_comes_first() {
    let block = |program: &str| BlockHints { program_id: program.into(), ..Default::default() };
    let own = RequestHints { block: block("own"), ..Default::default() };
    let client = RequestHints { block: block("client"), session_id: "s".into(), ..Default::default() };
    let both = joined(own, client);
    assert_eq!((both.block.program_id.as_str(), both.session_id.as_str()), ("own", "s"));
}
