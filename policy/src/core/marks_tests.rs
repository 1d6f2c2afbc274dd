//! Taints, types, lifetimes and rules, against hand-made situations.

use std::time::Duration;

use kvtier_types::rules::{self, Copies};
use kvtier_types::{
    BlockHints, BlockKey, Instant, Location, NodeId, Outcome, RecordMeta, RequestHints, SemanticType, Taint, TenantId,
    Tier, Toleration,
};

use super::tests::{BLOCK, Bench, NOW, key};
use super::*;
use crate::claims::TierBudget;
use crate::evict::Standing;
use crate::frame::TwinPool;
use crate::ledger::MissReason;

const EPOCH_MS: u64 = 1_700_000_000_000;

fn bench(blocks: u64, disk: bool, kept_blocks: u64) -> Bench {
    let mut config = CoreConfig { disk, ..CoreConfig::default() };
    let budget = TierBudget { node_bytes: kept_blocks * BLOCK, owner_bytes: kept_blocks * BLOCK };
    config.claims.budgets = [budget; Tier::ALL.len()];
    let mut bench = Bench::new(blocks, disk);
    bench.core = Core::new(config, Box::new(TwinPool::new(blocks * BLOCK)), |bytes| bytes);
    bench.core.set_epoch(EPOCH_MS);
    bench.who = bench.core.attach(NOW, bench.core_spec()).unwrap();
    bench
}

fn at(seconds: u64) -> Instant {
    NOW + Duration::from_secs(seconds)
}

fn taint(text: &str) -> Taint {
    text.parse().unwrap()
}

fn add(texts: &[&str]) -> MarkChange {
    MarkChange { add: texts.iter().map(|t| taint(t)).collect(), ..MarkChange::default() }
}

fn remove(text: &str) -> MarkChange {
    MarkChange { remove: vec![text.parse().unwrap()], ..MarkChange::default() }
}

impl Bench {
    fn mark(&mut self, keys: &[u8], change: &MarkChange) -> MarkPlan {
        let keys: Vec<BlockKey> = keys.iter().map(|n| key(*n)).collect();
        self.core.mark(NOW, &keys, change)
    }

    fn outcome(&mut self, n: u8, change: &MarkChange) -> Outcome {
        self.mark(&[n], change).outcomes[0].0
    }

    fn write_as(&mut self, keys: &[u8], semantic: SemanticType, taints: &[&str]) {
        let block = BlockHints { semantic, taints: taints.iter().map(|t| taint(t)).collect(), ..BlockHints::default() };
        let request = ReserveRequest {
            attachment: self.who,
            parent: None,
            group: 0,
            first_block: 0,
            keys: keys.iter().map(|n| key(*n)).collect(),
            tenant: TenantId::shared(),
            hints: RequestHints { block, ..RequestHints::default() },
        };
        let answers = self.core.reserve(NOW, &request).unwrap();
        for (n, answer) in keys.iter().zip(answers) {
            if let Reservation::Granted(frames) = answer {
                let seal = SealRequest { key: key(*n), shard: 0, frame: frames[0], checksum: 1, abandoned: false };
                assert_eq!(self.core.seal(self.who, &[seal]).unwrap(), [SealOutcome::Applied]);
            }
        }
    }

    /// Blocks answered to a request that tolerates this much, and whether it claimed them.
    fn served(&mut self, keys: &[u8], tolerations: &[&str]) -> usize {
        let tolerations: Vec<Toleration> = tolerations.iter().map(|t| t.parse().unwrap()).collect();
        let range = LookupRange { group: 0, first_block: 0, keys: keys.iter().map(|n| key(*n)).collect() };
        let request = LookupRequest {
            attachment: self.who,
            request_id: "served".into(),
            ranges: vec![range],
            local_tokens: 0,
            tenant: TenantId::shared(),
            hints: RequestHints { tolerations, ..RequestHints::default() },
        };
        let lease = self.core.lookup(NOW, request).unwrap();
        let found = self.core.collect(lease).unwrap().ranges[0].found.iter().flatten().count();
        let tokens = u32::try_from(found * 16).unwrap();
        self.release("served", tokens, 0);
        found
    }

    fn here(&self, n: u8) -> bool {
        self.core.locate(&key(n)).is_some()
    }

    fn standing(&self, n: u8) -> Standing {
        let id = self.core.catalog.find_all(&key(n))[0];
        self.core.catalog.get(id).standing
    }

    fn missed(&self, why: MissReason) -> u64 {
        let rows: Vec<_> = self.core.ledger().rows().collect();
        rows.iter().find(|(name, _)| *name == why.name()).map_or(0, |(_, tokens)| *tokens)
    }
}

#[test]
fn a_no_serve_block_is_handed_to_those_only_who_tolerate_it() {
    let mut b = bench(8, false, 4);
    b.write(&[1, 2, 3]);
    let plan = b.mark(&[2], &add(&["secret=pii:NoServe"]));
    assert_eq!(plan.outcomes[0].0, Outcome::Applied);
    assert_eq!(plan.journal[0].1.taints, [taint("secret=pii:NoServe")]);
    assert_eq!(b.served(&[1, 2, 3], &[]), 1);
    assert_eq!(b.missed(MissReason::Denied), 32, "it, and what stands on it");
    assert_eq!(b.served(&[1, 2, 3], &["other"]), 1);
    assert_eq!(b.served(&[1, 2, 3], &["secret=pii:NoServe"]), 3);
    assert_eq!(b.served(&[1, 2, 3], &["*"]), 3);
    assert_eq!(b.outcome(2, &add(&["secret=pii:NoServe"])), Outcome::Duplicate);
    assert_eq!(b.outcome(2, &remove("secret")), Outcome::Applied);
    assert_eq!(b.served(&[1, 2, 3], &[]), 3);
    assert_eq!(b.outcome(9, &add(&["secret:NoServe"])), Outcome::Missing);
}

#[test]
fn one_that_is_tainted_after_it_was_promised_is_not_handed_out() {
    let mut b = bench(8, false, 4);
    b.write(&[1, 2]);
    let range = LookupRange { group: 0, first_block: 0, keys: vec![key(1), key(2)] };
    let request = LookupRequest {
        attachment: b.who,
        request_id: "r".into(),
        ranges: vec![range],
        local_tokens: 0,
        tenant: TenantId::shared(),
        hints: RequestHints::default(),
    };
    let lease = b.core.lookup(NOW, request).unwrap();
    b.mark(&[2], &add(&["s:NoServe"]));
    let found = b.core.collect(lease).unwrap().ranges[0].found.iter().flatten().count();
    assert_eq!(found, 1);
}

#[test]
fn what_was_said_of_a_block_holds_when_it_is_written_anew() {
    let mut b = bench(8, false, 4);
    b.write(&[1]);
    b.mark(&[1], &add(&["s:NoServe"]));
    b.core.apply_evict(&[key(1)], &[]);
    assert!(!b.here(1));
    b.write(&[1]);
    assert_eq!((b.served(&[1], &[]), b.served(&[1], &["s"])), (0, 1));
    // And of one that was never here.
    let absent = MarkChange { absent: true, ..add(&["s:NoServe"]) };
    assert_eq!(b.outcome(2, &absent), Outcome::Deferred);
    b.write(&[2]);
    assert_eq!(b.served(&[2], &[]), 0);
    b.core.apply_evict(&[key(2)], &[]);
    assert_eq!(b.outcome(2, &remove("s")), Outcome::Missing, "not by those who may not mark what is not here");
    let by_operator = MarkChange { absent: true, ..remove("s") };
    assert_eq!(b.outcome(2, &by_operator), Outcome::Deferred, "it is unmarked though it is not here");
    b.write(&[2]);
    assert_eq!(b.served(&[2], &[]), 1);
}

/// What a rule ends ends with its time; what was said by verb beside it does not.
#[test]
fn the_end_of_a_block_is_not_the_end_of_what_was_said_of_it() {
    let mut b = bench(8, false, 4);
    b.write(&[1]);
    b.mark(&[1], &add(&["s:NoServe", "t:Ephemeral(10s)"]));
    b.core.tell_time(at(11));
    b.core.heartbeat(at(11), b.who).unwrap();
    b.core.expire(at(11));
    assert!(!b.here(1));
    b.write(&[1]);
    assert_eq!((b.served(&[1], &[]), b.served(&[1], &["s"])), (0, 1), "a new block, that may not be handed out either");
    b.core.expire(at(12));
    assert!(b.here(1), "its time does not end at once");
}

#[test]
fn ephemeral_blocks_end_on_time_on_every_tier() {
    let mut b = bench(8, true, 4);
    b.write_as(&[1], SemanticType::Unspecified, &["t:Ephemeral(10s)"]);
    b.write(&[2]);
    b.offload_all();
    assert_eq!(b.core.tier_use(Tier::Disk).copies, 2);
    b.core.expire(at(9));
    assert!(b.here(1));
    b.core.tell_time(at(10));
    assert_eq!(b.served(&[1], &["*"]), 0, "not even before it is let go");
    assert_eq!(b.missed(MissReason::Expired), 16);
    b.core.heartbeat(at(10), b.who).unwrap();
    b.core.expire(at(10));
    assert!(!b.here(1) && b.here(2));
    assert_eq!(b.core.tier_use(Tier::Disk).copies, 1);
    assert_eq!(b.core.counts().expired_blocks, 1);
    assert_eq!(b.served(&[1], &[]), 0);
    assert_eq!(b.missed(MissReason::Expired), 32, "and it is remembered why");
}

#[test]
fn records_tell_when_their_blocks_end_and_do_not_come_back() {
    let mut b = bench(8, true, 4);
    b.write_as(&[1, 2], SemanticType::ToolResult, &["t:Ephemeral(10s)"]);
    let metas: Vec<RecordMeta> = std::iter::from_fn(|| b.core.poll_action())
        .filter_map(|a| if let Action::Offload { meta, .. } = a { Some(meta) } else { None })
        .collect();
    assert_eq!(metas[0].expires_ms, Some(EPOCH_MS + 10_000));
    assert_eq!(metas[0].hints.taints, [taint("t:Ephemeral(10s)")]);
    let mut later = bench(8, true, 4);
    later.core.set_epoch(EPOCH_MS + 9_000);
    later.core.recover(Tier::Disk, &metas[0], Location { segment: 0, offset: 0 });
    assert!(later.here(1));
    later.core.expire(at(1));
    assert!(!later.here(1), "its span does not begin anew with the daemon");
    let mut too_late = bench(8, true, 4);
    too_late.core.set_epoch(EPOCH_MS + 11_000);
    too_late.core.recover(Tier::Disk, &metas[1], Location { segment: 0, offset: 0 });
    assert!(!too_late.here(2));
    assert!(matches!(too_late.core.poll_action(), Some(Action::Forget { .. })));
}

#[test]
fn marks_overrule_records_that_are_older() {
    let mut b = bench(8, true, 4);
    b.write(&[1]);
    let Some(Action::Offload { meta, .. }) = b.core.poll_action() else { panic!("an offload") };
    let change = MarkChange { semantic: Some(SemanticType::Skill), ..add(&["s:NoServe"]) };
    let (block, mark) = b.mark(&[1], &change).journal.remove(0);
    let mut next = bench(8, true, 4);
    next.core.remember_mark(block, mark.clone());
    next.core.recover(Tier::Disk, &meta, Location { segment: 0, offset: 0 });
    let view = next.core.locate(&key(1)).unwrap();
    assert_eq!((view.semantic, view.taints), (SemanticType::Skill, vec![taint("s:NoServe")]));
    let newer = RecordMeta { sequence: mark.up_to_sequence + 1, ..meta };
    let mut other = bench(8, true, 4);
    other.core.remember_mark(block, mark);
    other.core.recover(Tier::Disk, &newer, Location { segment: 0, offset: 0 });
    assert_eq!(other.core.locate(&key(1)).unwrap().taints, []);
}

#[test]
fn what_shall_stay_stays_within_the_budget() {
    let mut b = bench(6, false, 2);
    b.write(&[1, 2, 3]);
    assert_eq!(b.outcome(1, &add(&["a:NoEvict"])), Outcome::Applied);
    assert_eq!(b.outcome(2, &add(&["a:NoOffload"])), Outcome::Applied);
    let (outcome, reason) = b.mark(&[3], &add(&["a:NoEvict"])).outcomes[0];
    assert_eq!(outcome, Outcome::Clipped, "{reason}");
    assert_eq!(b.core.kept_use(Tier::Host).copies, 2);
    for n in 10..30 {
        b.write(&[n]);
    }
    assert!(b.here(1) && b.here(2) && !b.here(3));
    assert_eq!(b.core.plan_evict(&[key(1)], &[]).outcomes[0].1, Outcome::Rejected);
    assert_eq!(b.core.plan_evict(&[key(2)], &[]).outcomes[0].1, Outcome::Applied);
    b.mark(&[1, 2], &remove("a"));
    assert_eq!(b.core.kept_use(Tier::Host).copies, 0);
    for n in 10..30 {
        b.write(&[n]);
    }
    assert!(!b.here(1) && !b.here(2));
}

#[test]
fn claims_and_marks_share_one_budget() {
    let mut b = bench(8, false, 3);
    for n in 1..=5 {
        b.write(&[n]);
    }
    b.mark(&[1, 2], &add(&["a:NoEvict"]));
    let name = ClaimName { tenant: TenantId::shared(), owner: "o".into(), id: "c".into() };
    let kind = kvtier_types::ClaimKind::Pin(Tier::Host);
    let mut survey = Survey::new(kind, vec![key(3), key(4)]);
    while b.core.survey(&mut survey) {}
    let request = ClaimRequest { name, revision: 1, kind, ttl: Duration::from_secs(60) };
    let answer = b.core.claim(NOW, &request, survey, false);
    assert_eq!(answer.outcome, Outcome::Clipped, "{}", answer.reason);
    while b.core.settle_claims() {}
    assert_eq!(b.outcome(5, &add(&["a:NoEvict"])), Outcome::Clipped);
}

#[test]
fn who_prefers_to_go_goes_first_and_claims_outrank_it() {
    let mut b = bench(4, false, 4);
    b.write(&[1]);
    b.write(&[2]);
    b.mark(&[2], &add(&["a:PreferEvict"]));
    assert_eq!(b.standing(2), Standing::First);
    b.write(&[3]);
    b.write(&[4]);
    b.write(&[5]);
    assert!(b.here(1) && !b.here(2), "though it is younger");
    b.mark(&[3], &add(&["a:PreferEvict"]));
    b.core.retain_hint(NOW, &[key(3)], 70, Duration::from_secs(60));
    while b.core.settle_claims() {}
    assert_eq!(b.standing(3), Standing::Retained(70));
}

#[test]
fn what_a_later_writer_says_to_confine_a_block_holds() {
    let mut b = bench(8, false, 4);
    b.write(&[1, 2]);
    b.write_as(
        &[1],
        SemanticType::Unspecified,
        &["pii:NoServe", "pii:NoReplicate", "old:PreferEvict", "x:Ephemeral(1s)"],
    );
    assert_eq!(b.core.locate(&key(1)).unwrap().taints, [taint("pii:NoReplicate"), taint("pii:NoServe")]);
    assert_eq!((b.served(&[1, 2], &[]), b.served(&[1, 2], &["*"])), (0, 2));
    assert_eq!(b.core.poll_marks().len(), 1, "it is journaled soon");
    b.write_as(&[1], SemanticType::Unspecified, &["pii:NoServe"]);
    assert!(b.core.poll_marks().is_empty(), "that was known");
}

#[test]
fn a_block_that_spans_two_types_is_of_the_more_durable_one() {
    let mut b = bench(8, false, 4);
    let of = |b: &Bench, n| b.core.locate(&key(n)).unwrap().semantic;
    b.write_as(&[1], SemanticType::Scratchpad, &[]);
    b.write_as(&[1], SemanticType::SystemPrompt, &[]);
    assert_eq!(of(&b, 1), SemanticType::SystemPrompt);
    b.write_as(&[1], SemanticType::Scratchpad, &[]);
    assert_eq!(of(&b, 1), SemanticType::SystemPrompt);
    let hints = RequestHints {
        block: BlockHints {
            semantic: SemanticType::ToolResult,
            taints: vec![taint("a:NoServe")],
            ..Default::default()
        },
        ..RequestHints::default()
    };
    b.core.annotate(b.who, &[key(1)], &hints).unwrap();
    assert_eq!(of(&b, 1), SemanticType::SystemPrompt);
    assert_eq!(b.core.locate(&key(1)).unwrap().taints, [taint("a:NoServe")]);
    let marks = b.core.poll_marks();
    assert_eq!((marks.len(), marks[0].1.semantic), (1, SemanticType::SystemPrompt), "it is journaled soon");
    assert!(b.core.poll_marks().is_empty());
    // A verb may say otherwise.
    assert_eq!(
        b.outcome(1, &MarkChange { semantic: Some(SemanticType::Scratchpad), ..MarkChange::default() }),
        Outcome::Applied
    );
    assert_eq!(of(&b, 1), SemanticType::Scratchpad);
    assert_eq!(b.core.type_use(SemanticType::Scratchpad, Tier::Host).copies, 1);
    assert_eq!(b.core.type_use(SemanticType::SystemPrompt, Tier::Host).copies, 0);
}

const RULES: &str = r#"
[[rule]]
name = "memory only"
when = { type = "SCRATCHPAD" }
then = { tiers = ["host"], evict = "first", ttl = "30s" }
[[rule]]
name = "results"
when = { type = "TOOL_RESULT", model = "m*" }
then = { priority = 40, offload = ["object"] }
[[rule]]
name = "stay"
when = { taint = "keep" }
then = { pin = true }
"#;

#[test]
fn rules_decide_and_say_so_and_are_looked_at_anew_when_they_change() {
    let mut b = bench(8, true, 4);
    b.core.set_rules(rules::parse(RULES).unwrap());
    b.write_as(&[1], SemanticType::Scratchpad, &[]);
    b.write_as(&[2], SemanticType::ToolResult, &[]);
    b.write_as(&[3], SemanticType::Document, &["keep:PreferEvict"]);
    assert_eq!(b.offload_all(), 1, "the third only: the first must not, the second need not");
    assert_eq!(b.standing(1), Standing::First);
    assert_eq!(b.standing(2), Standing::Retained(40));
    assert_eq!(b.core.kept_use(Tier::Host).copies, 1);
    assert_eq!(b.core.locate(&key(2)).unwrap().rule, "results");
    let explained = b.core.explain(&key(1)).unwrap();
    let ttl = explained.decisions.iter().find(|d| d.field == "ttl").unwrap();
    assert_eq!((ttl.value.as_str(), ttl.rule.as_str(), ttl.line), ("30s", "memory only", 2));
    assert!(b.core.explain(&key(9)).is_none());

    b.core.set_rules(
        rules::parse(
            "[[rule]]\nname = \"x\"\nwhen = { type = \"DOCUMENT\" }\nthen = { tiers = [\"host\"], ttl = \"5s\" }\n",
        )
        .unwrap(),
    );
    while b.core.walk() {}
    assert_eq!(b.core.tier_use(Tier::Disk).copies, 0, "it lay where it may not");
    assert_eq!((b.standing(1), b.standing(2)), (Standing::Normal, Standing::Normal));
    assert_eq!(b.core.kept_use(Tier::Host).copies, 0);
    b.core.expire(at(6));
    assert!(!b.here(3));
    // Its record said nothing of an end.
    let over = b.core.poll_expired_records();
    assert_eq!((over.len(), over[0].0.block), (1, key(3)));
    b.core.heartbeat(at(29), b.who).unwrap();
    b.core.expire(at(40));
    assert!(b.here(1), "no rule ends it any more");
}

#[test]
fn a_copy_that_comes_where_it_may_not_lie_any_more_goes() {
    let mut b = bench(8, true, 4);
    b.core.set_rules(rules::parse(RULES).unwrap());
    b.write(&[1]);
    let Some(Action::Offload { id, .. }) = b.core.poll_action() else { panic!("an offload") };
    let change = MarkChange { semantic: Some(SemanticType::Scratchpad), ..MarkChange::default() };
    assert_eq!(b.outcome(1, &change), Outcome::Applied);
    b.core.moved(id, MoveEnd::Done(Some(Location { segment: 0, offset: 0 })));
    assert_eq!(b.core.tier_use(Tier::Disk).copies, 0);
    assert!(b.here(1) && matches!(b.core.poll_action(), Some(Action::Forget { .. })));
}

#[test]
fn what_goes_first_is_not_spared_for_a_copy_below() {
    let mut b = bench(4, true, 4);
    b.core.set_rules(rules::parse(RULES).unwrap());
    b.write_as(&[1], SemanticType::Document, &[]);
    b.offload_all();
    b.write_as(&[2], SemanticType::Scratchpad, &[]);
    for n in 3..6 {
        b.write(&[n]);
        b.offload_all();
    }
    assert!(!b.here(2));
    let first = b.core.locate(&key(1)).unwrap();
    assert!(first.replicas.iter().any(|r| r.tier == Tier::Host), "though it has a copy on disk, and is older");
}

#[test]
fn tool_definitions_want_copies_everywhere_and_some_must_not_leave() {
    let mut b = bench(8, true, 4);
    b.core.join(&NodeId::new("a").unwrap(), 1);
    b.core.set_rules(rules::RuleSet::shipped());
    b.write_as(&[1], SemanticType::ToolDefinition, &[]);
    b.write_as(&[2], SemanticType::ToolDefinition, &["a:NoReplicate"]);
    b.write_as(&[3], SemanticType::Document, &["a:AlwaysReplicate"]);
    b.write_as(&[4], SemanticType::Document, &[]);
    let wanted = b.core.poll_replication(10);
    let wanted: Vec<_> = wanted.into_iter().map(|(meta, copies)| (meta.key.block, copies)).collect();
    assert_eq!(wanted, [(key(1), Copies::All), (key(3), Copies::All)]);
    assert_eq!(b.core.pending_replications(), 0);
    assert!(b.core.poll_replication(10).is_empty(), "each is told once");
    b.core.look_again();
    while b.core.walk() {}
    assert_eq!(b.core.pending_replications(), 2);
}

#[test]
fn a_block_has_few_taints_and_those_that_matter_most_stay() {
    let mut b = bench(8, false, 4);
    b.write(&[1]);
    for n in 0..8 {
        assert_eq!(b.outcome(1, &add(&[&format!("k{n}:PreferEvict")])), Outcome::Applied);
    }
    assert_eq!(b.outcome(1, &add(&["z:NoServe"])), Outcome::Rejected);
    let hints = RequestHints {
        block: BlockHints { taints: vec![taint("z:NoServe")], ..Default::default() },
        ..RequestHints::default()
    };
    b.core.annotate(b.who, &[key(1)], &hints).unwrap();
    let taints = b.core.locate(&key(1)).unwrap().taints;
    assert!(taints.len() == 8 && taints.contains(&taint("z:NoServe")), "{taints:?}");
}

#[test]
fn room_for_marks_is_made_of_what_is_not_here_and_was_said_longest_ago() {
    let mut b = bench(8, false, 4);
    b.write(&[1]);
    b.mark(&[1], &add(&["a:NoServe"]));
    let absent = |n: u32| {
        let mut bytes = [0xff; 32];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        BlockKey::new(bytes)
    };
    let most = u32::try_from(crate::limits::MAX_MARKS).unwrap();
    for n in 1..most {
        b.core.remember_mark(absent(n), Mark { up_to_sequence: u64::from(n) + 100, ..Mark::default() });
    }
    let mut sweep = MarkSweep::new(0);
    while b.core.sweep_marks(&mut sweep) {}
    assert!(!sweep.forgot() && b.core.marks() == crate::limits::MAX_MARKS, "there is room for no more");
    let mut sweep = MarkSweep::new(10);
    while b.core.sweep_marks(&mut sweep) {}
    assert!(sweep.forgot() && b.core.has_mark(&key(1)), "what is here stays");
    let gone = 10 + most / 8;
    assert_eq!(b.core.marks(), (most - gone) as usize);
    assert!(!b.core.has_mark(&absent(gone)) && b.core.has_mark(&absent(gone + 1)), "the oldest went");
}

/// A bench with one block, whose only copy is in the object store.
fn packed(n: u8) -> Bench {
    let mut b = bench(8, true, 4);
    b.write(&[n]);
    let meta = std::iter::from_fn(|| b.core.poll_action())
        .find_map(|a| if let Action::Offload { meta, .. } = a { Some(meta) } else { None })
        .expect("it is on its way to disk");
    let mut later = bench(8, false, 4);
    later.core.recover(Tier::Object, &meta, Location { segment: 0, offset: 0 });
    assert!(later.here(n));
    later
}

#[test]
fn a_writer_that_forbids_the_only_copy_is_to_write_it() {
    let mut b = packed(1);
    b.write_as(&[1, 2], SemanticType::Unspecified, &["pii:NoReplicate"]);
    let places = |n| b.core.locate(&key(n)).unwrap().replicas.iter().map(|r| r.tier).collect::<Vec<_>>();
    assert_eq!((places(1), places(2)), (vec![Tier::Host], vec![Tier::Host]));
}

#[test]
fn an_annotation_may_take_the_last_copy() {
    let mut b = packed(1);
    let hints = RequestHints {
        block: BlockHints { taints: vec![taint("pii:NoReplicate")], program_id: "p".into(), ..Default::default() },
        ..RequestHints::default()
    };
    assert_eq!(b.core.annotate(b.who, &[key(1)], &hints).unwrap(), [true]);
    assert!(!b.here(1));
}
