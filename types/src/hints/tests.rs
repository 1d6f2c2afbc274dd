use std::time::Duration;

use proptest::prelude::{Strategy, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest};
use serde_json::{Value, json};

use super::{BadHints, ClientHints, MAX_ACTIONS, MAX_JSON_BYTES, Part, Resolution, Resume, Said, read_envelope_json};
use crate::{Outcome, SemanticType};

fn read(document: &Value) -> ClientHints {
    ClientHints::read(document.to_string().as_bytes()).unwrap()
}

fn resolution(hints: &ClientHints) -> Resolution<'_> {
    Resolution::new(hints.carriers().to_vec(), hints.prompt_tokens)
}

fn envelope(actions: &[(&str, Value)]) -> Value {
    let row = |(n, (kind, payload)): (usize, &(&str, Value))| json!({"action_id": format!("a{n}"), "action_type": kind, "action_version": "1.0", "payload": payload});
    json!({"protocol_version": "0.1", "message_id": "m", "actions": actions.iter().enumerate().map(row).collect::<Vec<_>>()})
}

fn told(said: &Said) -> Vec<(String, Outcome)> {
    said.told().map(|note| (note.action_type.clone(), note.outcome())).collect()
}

#[test]
fn an_earlier_carrier_wins_field_by_field() {
    let hints = read(&json!({
        "v": 1,
        "kv_hints": envelope(&[("kvtier.annotate", json!({"program_id": "from-envelope", "spans": [{"start": 0, "end": 16, "type": "SKILL"}]}))]),
        "xargs": {"agentic_context": {"program_id": "from-xargs", "parent_agent_id": "parent", "priority": 70}},
        "session_id": "from-header",
        "params": {"session_id": "from-params", "semantic": "DOCUMENT", "ttl": "5m", "priority": 10},
    }));
    let all = resolution(&hints);
    let request = all.request();
    assert_eq!(request.block.program_id, "from-envelope");
    assert_eq!(request.parent_program_id, "parent");
    assert_eq!(request.session_id, "from-header");
    assert_eq!(request.retain, Some((70, Duration::from_secs(300))));
    assert_eq!(all.block(0..16).block.semantic, SemanticType::Skill);
    assert_eq!(all.block(16..32).block.semantic, SemanticType::Document);
}

#[test]
fn a_block_that_spans_two_types_takes_the_more_durable_and_all_taints() {
    let spans = json!([
        {"start": 0, "end": 20, "type": "system_prompt", "taints": ["a:NoOffload"], "priority": 90, "ttl": 60},
        {"start": 20, "end": 40, "type": "SCRATCHPAD", "taints": ["b=c:PreferEvict"], "priority": 1, "ttl": 5},
    ]);
    let hints = read(&json!({"v": 1, "params": {"program_id": "x", "semantic": "DOCUMENT", "spans": spans}}));
    let all = resolution(&hints);
    let block = |n: u32| all.block(n * 16..n * 16 + 16);
    let types = [0, 1, 2, 3].map(|n| block(n).block.semantic);
    let (system, scratch) = (SemanticType::SystemPrompt, SemanticType::Scratchpad);
    assert_eq!(types, [system, system, scratch, SemanticType::Document]);
    assert_eq!([0, 1, 2, 3].map(|n| block(n).block.taints.len()), [1, 2, 1, 0]);
    assert_eq!(block(1).retain, Some((90, Duration::from_secs(60))));
    assert_eq!(block(2).retain, Some((1, Duration::from_secs(5))));
    assert_eq!(block(3).retain, None);
}

#[test]
fn retain_reaches_its_tokens_and_the_output() {
    let directives = json!([
        {"start": 0, "end": 32, "priority": 90, "duration": 3600},
        {"covers_output": true, "priority": 20},
        {"start": 40, "end": 32},
        {"start": 0, "end": 8, "priority": 900},
    ]);
    let hints = read(&json!({"v": 1, "prompt_tokens": 48,
        "kv_hints": envelope(&[("kv.retain", json!({"scope": null, "directives": directives}))])}));
    let all = resolution(&hints);
    assert_eq!(all.block(16..32).retain, Some((90, Duration::from_secs(3600))));
    assert_eq!(all.block(32..48).retain, None);
    assert_eq!(all.block(48..64).retain, Some((20, super::DEFAULT_TTL)));
    assert_eq!(told(&hints.envelope), [("kv.retain".to_owned(), Outcome::Clipped)]);
}

#[test]
fn unknown_actions_are_ignored_and_counted() {
    let hints = read(&json!({"v": 1, "kv_hints": envelope(&[
        ("vllm.set_priority", json!({"value": 3})),
        ("kv.fetch", json!({"block_hashes": [1], "mode": "copy"})),
        ("kv.fetch", json!({"mode": "move"})),
        ("kvtier.signal", json!({"kind": "tool_wait", "expected_resume": 2.5, "children": ["c"]})),
        ("kvtier.signal", json!({"kind": "DANCE"})),
        ("kvtier.taint", json!({"taints": ["a:NoServe"], "start": 0, "end": 9})),
        ("kvtier.pin", json!({"ttl": "1h"})),
        ("kv.retain", json!(3)),
        ("kvtier.annotate", json!({})),
    ])}));
    let outcomes: Vec<Outcome> = told(&hints.envelope).into_iter().map(|(_, outcome)| outcome).collect();
    assert_eq!(
        outcomes,
        [
            Outcome::Unsupported,
            Outcome::Accepted,
            Outcome::Unsupported,
            Outcome::Applied,
            Outcome::Rejected,
            Outcome::Applied,
            Outcome::Applied,
            Outcome::Rejected,
            Outcome::Rejected,
        ]
    );
    let note = &hints.envelope.notes[0];
    assert_eq!((note.kind, note.action_type.as_str(), note.action_id.as_str()), ("unknown", "vllm.set_priority", "a0"));
    assert_eq!(hints.envelope.signals[0].expected_resume, Duration::from_millis(2500));
    let [run] = &resolution(&hints).runs(1..9, 16)[..] else { panic!("one run") };
    assert_eq!((run.blocks.clone(), run.pin), (1..9, Some(Duration::from_secs(3600))));
    assert_eq!(resolution(&hints).request().retain, None);
}

#[test]
fn roles_and_returns_are_read_wherever_our_fields_are() {
    let fields = json!({"program_id": "p", "agent_role": "coder", "blocks_parent": false, "expected_resume": "90s"});
    for document in [
        json!({"v": 1, "kv_hints": envelope(&[("kvtier.annotate", fields.clone())])}),
        json!({"v": 1, "xargs": {"agentic_context": fields.to_string()}}),
        json!({"v": 1, "xargs": {"kvtier": fields}}),
        json!({"v": 1, "params": fields, "finished": true}),
    ] {
        let hints = read(&document);
        let all = resolution(&hints);
        let request = all.request();
        assert_eq!((request.agent_role.as_str(), request.blocks_parent), ("coder", Some(false)), "{document}");
        assert_eq!(all.resume(), Some(Resume::In(Duration::from_secs(90))), "{document}");
        assert_eq!(hints.finished, document["finished"] == json!(true));
    }
}

#[test]
fn a_return_is_a_span_or_a_time_and_never_both_a_signals_and_a_requests() {
    let of = |fields: Value| {
        let hints = read(&json!({"v": 1, "params": fields}));
        (resolution(&hints).resume(), hints.params.signals.first().map(|s| s.expected_resume))
    };
    let span = |seconds| Some(Resume::In(Duration::from_secs(seconds)));
    assert_eq!(of(json!({"expected_resume": 5})), (span(5), None));
    assert_eq!(of(json!({"expected_resume_ms": 7000})), (span(7), None));
    assert_eq!(of(json!({"expected_resume": 1_800_000_000.5})), (Some(Resume::At(1_800_000_000_500)), None));
    for none in [json!(0), json!(-1), json!(9e6), json!(1e13), json!("soon"), json!([1])] {
        assert_eq!(of(json!({"expected_resume": none})), (None, None));
    }
    let both = of(json!({"signal": "TOOL_WAIT", "expected_resume": 5}));
    assert_eq!(both, (None, Some(Duration::from_secs(5))));
    let apart = of(json!({"signal": {"kind": "TOOL_WAIT", "expected_resume": 2}, "expected_resume": 5}));
    assert_eq!(apart, (span(5), Some(Duration::from_secs(2))));
    assert_eq!(Resume::At(5_000).from_now(3_000), Duration::from_secs(2));
    assert_eq!(Resume::At(5_000).from_now(9_000), Duration::ZERO);
    assert_eq!(Resume::At(u64::MAX).from_now(0), super::MAX_TTL);
}

#[test]
fn other_vocabularies_map_onto_claims() {
    for (fields, priority, seconds) in [
        (json!({"prompt_cache_retention": "24h"}), 50, 86_400),
        (json!({"prompt_cache_retention": "in_memory"}), 50, 600),
        (json!({"prompt_cache_options": {"ttl": "30m", "mode": "auto"}}), 50, 1800),
        (json!({"cache_control": {"type": "ephemeral"}}), 50, 300),
        (json!({"cache_control": {"type": "ephemeral", "ttl": "1h"}}), 50, 3600),
        (json!({"agent_hints": {"priority": 80}}), 80, 300),
        (json!({"nvext": {"agent_hints": {"priority": 7}}}), 7, 300),
        (json!({"lmcache_retention_ttl_sec": 90}), 50, 90),
    ] {
        for carrier in ["xargs", "params"] {
            let hints = read(&json!({"v": 1, carrier: fields}));
            assert_eq!(resolution(&hints).request().retain, Some((priority, Duration::from_secs(seconds))), "{fields}");
            assert!(hints.carriers().iter().all(|said| told(said).iter().all(|(_, o)| *o == Outcome::Applied)));
        }
    }
    let ranges = json!([{"tokenStart": 0, "tokenEnd": 16, "priority": 100, "durationMs": 1500}, {"tokenStart": 16}]);
    let hints = read(&json!({"v": 1, "params": {"token_range_retention_configs": ranges}}));
    assert_eq!(resolution(&hints).block(0..16).retain, Some((100, Duration::from_millis(1500))));
    assert_eq!(resolution(&hints).block(16..32).retain, None);
    let context = json!({"agent_context": {"session_id": "s", "trajectory_id": "t", "parent_trajectory_id": "p"}});
    let hints = read(&json!({"v": 1, "xargs": {"nvext": context}}));
    let request = resolution(&hints).request();
    assert_eq!(
        (request.session_id, request.block.program_id, request.parent_program_id),
        ("s".into(), "t".into(), "p".into())
    );
}

#[test]
fn junk_is_dropped_with_a_reason() {
    for params in [
        json!({"program_id": 3}),
        json!({"program_id": "x".repeat(200)}),
        json!({"semantic": "NONSENSE"}),
        json!({"semantic": 3}),
        json!({"spans": "x"}),
        json!({"spans": [null, {"start": 5, "end": 5, "type": "SKILL"}, {"start": true, "end": 9, "type": "SKILL"}]}),
        json!({"taints": ["a=b:Serve"]}),
        json!({"tolerations": "x"}),
        json!({"priority": 101}),
        json!({"ttl": "soon"}),
        json!({"ttl": -3}),
        json!({"ttl": 1e300}),
        json!({"cache_control": {"type": "permanent"}}),
        json!({"prompt_cache_retention": "week"}),
        json!({"signal": "DANCE"}),
    ] {
        let hints = read(&json!({"v": 1, "params": params}));
        assert!(hints.params.is_empty(), "{params}: {:?}", hints.params);
        let notes: Vec<_> = hints.params.told().collect();
        assert!(
            notes.iter().all(|n| n.outcome() == Outcome::Rejected && !n.reason().is_empty()),
            "{params}: {notes:?}"
        );
        assert!(!notes.is_empty(), "{params}");
    }
    let hints = read(&json!({"v": 1, "xargs": {"kvtier": "{not json", "agentic_context": [1]}, "session_id": 4}));
    assert_eq!(hints.xargs.told().count() + hints.session.told().count(), 3);
    assert!(hints.carriers().iter().all(|said| said.is_empty()));
}

#[test]
fn documents_and_envelopes_are_bounded() {
    type Expected = fn(&BadHints) -> bool;
    let cases: [(Vec<u8>, Expected); 4] = [
        (vec![b' '; MAX_JSON_BYTES + 1], |e| matches!(e, BadHints::TooLong { .. })),
        (b"[1]".to_vec(), |e| matches!(e, BadHints::NotJson { .. })),
        (b"\xff".to_vec(), |e| matches!(e, BadHints::NotJson { .. })),
        (b"{\"v\": 2}".to_vec(), |e| matches!(e, BadHints::Version { found: 2 })),
    ];
    for (bytes, expected) in cases {
        assert!(expected(&ClientHints::read(&bytes).unwrap_err()));
    }
    let deep = "[".repeat(30_000);
    assert!(ClientHints::read(deep.as_bytes()).is_err());
    assert!(ClientHints::read(b"").unwrap().is_empty());
    let many: Vec<_> = (0..MAX_ACTIONS + 5).map(|_| ("kvtier.annotate", json!({"program_id": "p"}))).collect();
    let (id, said) = read_envelope_json(&envelope(&many).to_string()).unwrap();
    assert_eq!((id.as_str(), said.notes.len()), ("m", MAX_ACTIONS + 1));
    assert_eq!(said.notes[MAX_ACTIONS].outcome(), Outcome::Rejected);
    let spans: Vec<_> = (0..1000).map(|n| json!({"start": n, "end": n + 1, "type": "SKILL"})).collect();
    let hints = read(&json!({"v": 1, "params": {"spans": spans}}));
    assert_eq!(hints.params.spans.len(), super::MAX_SPANS);
    assert!(hints.params.spans.iter().all(|span| matches!(span.part, Part::Tokens(_))));
}

fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0..140u32).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z=:. _]{0,12}".prop_map(Value::from),
        proptest::strategy::Just(Value::Null),
    ];
    let keys = prop_oneof![
        proptest::sample::select(vec![
            "program_id",
            "session_id",
            "type",
            "semantic",
            "spans",
            "taints",
            "tolerations",
            "agent_role",
            "blocks_parent",
            "expected_resume",
            "expected_resume_ms",
            "priority",
            "ttl",
            "ttl_ms",
            "start",
            "end",
            "directives",
            "payload",
            "actions",
            "action_type",
            "signal",
            "kind",
            "children",
            "kvtier",
            "agentic_context",
            "cache_control",
            "nvext",
            "agent_hints",
            "tokenStart",
            "durationMs",
            "token_range_retention_configs",
        ])
        .prop_map(str::to_owned),
        "[a-z]{1,4}",
    ];
    leaf.prop_recursive(4, 48, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::hash_map(keys.clone(), inner, 0..6).prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_document_is_read_within_its_bounds(a in anything(), b in anything(), c in anything(), d in anything()) {
        let document = json!({"v": 1, "kv_hints": a, "xargs": b, "session_id": c, "params": d});
        let hints = ClientHints::read(document.to_string().as_bytes()).unwrap();
        let all = resolution(&hints);
        for block in [all.request(), all.block(0..16), all.block(u32::MAX - 16..u32::MAX)] {
            prop_assert!(block.retain.is_none_or(|(p, ttl)| p <= 100 && ttl <= super::MAX_TTL && !ttl.is_zero()));
            prop_assert!(block.block.taints.len() <= crate::Taint::MAX_PER_BLOCK);
            prop_assert!(block.tolerations.len() <= crate::Toleration::MAX_PER_REQUEST);
        }
        for first in [0, u32::MAX / 16 - 8] {
            let runs = all.runs(first..first + 8, 16);
            let blocks: Vec<u32> = runs.iter().flat_map(|run| run.blocks.clone()).collect();
            prop_assert_eq!(blocks, (first..first + 8).collect::<Vec<_>>());
            for run in runs {
                prop_assert!(run.blocks.clone().all(|n| all.block(n * 16..n * 16 + 16) == run.hints));
            }
        }
        for said in hints.carriers() {
            prop_assert!(said.spans.iter().all(|span| span.note < said.notes.len()));
        }
    }
}
