//! Files that are right, files that are not, and who decides.

use super::*;

fn subject(semantic: SemanticType) -> Subject<'static> {
    Subject { semantic, taints: &[], model: "meta/llama-3", tenant: "shared" }
}

#[test]
fn the_shipped_rules_are_valid() {
    let rules = RuleSet::shipped();
    assert_eq!(rules.warnings(), []);
    let of = |semantic| rules.lifecycle(&subject(semantic));
    assert_eq!(of(SemanticType::ToolDefinition).replicate, Copies::All);
    assert_eq!(of(SemanticType::ExecutionCheckpoint).offload, OffloadRule::Never);
    let scratchpad = of(SemanticType::Scratchpad);
    assert_eq!(scratchpad.evict, EvictOrder::First);
    assert!(!scratchpad.tiers.has(crate::Tier::Disk));
    assert_eq!(of(SemanticType::Unspecified), Lifecycle::default());
    assert_eq!((of(SemanticType::Skill).priority, of(SemanticType::SystemPrompt).priority), (Some(90), Some(90)));
}

#[test]
fn for_each_field_the_first_rule_that_sets_it_decides() {
    let text = r#"
[[rule]]
name = "a"
when = { type = "tool-result", model = "*llama*" }
then = { priority = 10 }
[[rule]]
name = "b"
when = { type = ["TOOL_RESULT", "DOCUMENT"] }
then = { priority = 20, ttl = "90m", tiers = ["host", "disk"] }
[[rule]]
name = "c"
when = { taint = "secret" }
then = { pin = true, replicate = 2, offload = ["disk"], write_behind = "none" }
"#;
    let rules = parse(text).unwrap();
    let decisions = rules.explain(&subject(SemanticType::ToolResult));
    let of = |field| decisions.iter().find(|d| d.field == field).map(|d| (d.value.as_str(), d.rule.as_str(), d.line));
    assert_eq!(of("priority"), Some(("10", "a", 2)));
    assert_eq!(of("ttl"), Some(("90m", "b", 6)));
    assert_eq!(of("tiers"), Some(("[\"host\", \"disk\"]", "b", 6)));
    assert_eq!(of("pin"), Some(("false", "", 0)));
    assert_eq!(rules.first(&subject(SemanticType::Document)).unwrap().name, "b");
    let taints = ["secret=pii:NoServe".parse().unwrap()];
    let tainted = Subject { taints: &taints, ..subject(SemanticType::Unspecified) };
    let lifecycle = rules.lifecycle(&tainted);
    assert!(lifecycle.pin && lifecycle.replicate == Copies::Some(2));
    assert_eq!(lifecycle.write_behind, Some(WriteWhen::Nothing));
    assert_eq!(decisions.len(), Setting::FIELDS.len());
}

#[test]
fn mistakes_are_told_with_line_column_and_what_to_write() {
    let rule = |body: &str| format!("[[rule]]\nname = \"x\"\n{body}\n");
    let then = |body: &str| rule(&format!("then = {{ {body} }}"));
    let cases = [
        ("[[rul]]\n".to_owned(), (1, 3), "did you mean \"rule\"?"),
        (rule("thn = { pin = true }"), (3, 1), "did you mean \"then\"?"),
        (then("priorty = 3"), (3, 10), "did you mean \"priority\"?"),
        (then("priority = 101"), (3, 21), "0 to 100"),
        (then("priority = \"high\""), (3, 21), "0 to 100"),
        (then("ttl = \"1 hour\""), (3, 16), "\"2h\""),
        (then("ttl = \"0s\""), (3, 16), "above zero"),
        (then("tiers = [\"host\", \"disc\"]"), (3, 27), "did you mean \"disk\"?"),
        (then("tiers = [\"disk\"]"), (3, 18), "where engines write"),
        (then("offload = [\"host\"]"), (3, 20), "slower tiers"),
        (then("offload = \"no\""), (3, 20), "\"never\""),
        (then("replicate = \"some\""), (3, 22), "\"all\""),
        (then("evict = \"last\""), (3, 18), "\"first\", \"normal\""),
        (then("pin = \"yes\""), (3, 16), "true or false"),
        (then(""), (3, 8), "says nothing"),
        (rule("when = { type = \"TOOL_RESULTS\" }\nthen = { pin = true }"), (3, 17), "did you mean \"TOOL_RESULT\"?"),
        (rule("when = { taint = \"a:Serve\" }\nthen = { pin = true }"), (3, 18), "unknown effect"),
        (rule(""), (1, 1), "something to say"),
        ("[[rule]]\nthen = { pin = true }\n".to_owned(), (1, 1), "needs a name"),
        ("[[rule]\n".to_owned(), (1, 8), "not TOML"),
        (format!("{}{}", then("pin = true"), then("pin = true")), (5, 8), "line 1 is called \"x\" too"),
    ];
    for (text, place, want) in cases {
        let errors = parse(&text).unwrap_err();
        let told = errors.iter().find(|e| e.message.contains(want)).unwrap_or_else(|| panic!("{text}: {errors:?}"));
        assert_eq!((told.line, told.column), place, "{text}: {errors:?}");
    }
    let two = parse(&format!("{}[[rule]]\nname = 3\n", then("evict = 1"))).unwrap_err();
    assert!(two.len() >= 2, "all mistakes at once: {two:?}");
}

#[test]
fn a_rule_that_never_decides_is_warned_of() {
    let text = "[[rule]]\nname = \"all\"\nthen = { priority = 1 }\n\
                [[rule]]\nname = \"late\"\nwhen = { type = \"SKILL\" }\nthen = { priority = 90 }\n\
                [[rule]]\nname = \"more\"\nwhen = { type = \"SKILL\" }\nthen = { priority = 90, pin = true }\n";
    let rules = parse(text).unwrap();
    assert_eq!(rules.warnings().len(), 1);
    assert!(rules.warnings()[0].line == 4 && rules.warnings()[0].message.contains("\"late\""), "{rules:?}");
}

proptest::proptest! {
    #[test]
    fn no_text_panics(text in "[a-z\\[\\]{}=\", \n0-9]{0,200}") {
        let _parsed = parse(&text);
        let _parsed = parse(&format!("[[rule]]\nname=\"a\"\nthen={{{text}}}"));
    }
}
