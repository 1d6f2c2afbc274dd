//! Declared graphs against hand-made situations, and random ones against brute force.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_types::{BlockKey, SemanticType};
use proptest::prelude::*;

use super::*;

const fn s(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn at(secs: u64) -> Instant {
    Instant::from_nanos(secs * 1_000_000_000)
}

fn name(program: &str) -> GraphName {
    GraphName { tenant: TenantId::shared(), program: program.into() }
}

fn step(id: &str, after: &[&str], secs: u64) -> Step {
    Step {
        id: id.into(),
        after: after.iter().map(|a| (*a).to_owned()).collect(),
        expected: Some(s(secs)),
        kind: id.into(),
        ..Step::default()
    }
}

fn plan(steps: &[Step]) -> Plan {
    Plan::new(steps.to_vec()).unwrap()
}

fn declare(graphs: &mut Graphs, now: Instant, program: &str, steps: &[Step]) -> Answer {
    let answer = graphs.check(&name(program), &plan(steps), 0, 1);
    if answer.outcome == Outcome::Applied {
        graphs.declare(now, name(program), (answer.revision, plan(steps)));
    }
    answer
}

fn report(graphs: &mut Graphs, now: Instant, program: &str, began: &[&str], ended: &[&str]) -> Answer {
    let owned = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
    graphs.progress(now, &name(program), (&owned(began), &owned(ended)))
}

fn next(graphs: &mut Graphs, now: Instant) -> Vec<NextStep> {
    let question = Question { tenant: None, programs: &BTreeSet::new(), running: false, limit: 1024 };
    graphs.next(now, question).0
}

fn ids(steps: &[NextStep]) -> Vec<&str> {
    steps.iter().map(|s| s.step.as_str()).collect()
}

/// `a`, then `b` and `c` of which `c` takes longer, then after a tool of 5 s `d`.
fn diamond() -> Vec<Step> {
    let last = Step { gap: s(5), ..step("d", &["b", "c"], 2) };
    vec![last, step("c", &["a"], 4), step("b", &["a"], 1), step("a", &[], 1)]
}

#[test]
fn what_is_wrong_with_a_declaration_is_said() {
    let said = |steps: &[Step]| Plan::new(steps.to_vec()).unwrap_err().to_string();
    assert_eq!(said(&[step("a", &["x"], 1)]), "step \"a\" waits for \"x\", which is not declared");
    assert_eq!(
        said(&[step("a", &[], 1), step("a", &[], 1)]),
        "two steps are called \"a\": ids are unique in a program"
    );
    let circle = [step("x", &[], 1), step("a", &["x", "c"], 1), step("b", &["a"], 1), step("c", &["b"], 1)];
    assert_eq!(said(&circle), "steps wait for each other: b -> c -> a -> b");
    assert_eq!(said(&[step("a", &["a"], 1)]), "steps wait for each other: a -> a");
    let ring: Vec<Step> = (0..20).map(|n| step(&n.to_string(), &[&((n + 1) % 20).to_string()], 1)).collect();
    assert!(said(&ring).contains("12 more"), "{}", said(&ring));
    assert!(said(&[step("", &[], 1)]).contains("step 0 has an id of 0 bytes"));
    assert!(said(&[step(&"x".repeat(129), &[], 1)]).contains("129 bytes"));
    let many: Vec<String> = (0..=MAX_BEFORE).map(|n| n.to_string()).collect();
    let wide = Step { after: many, ..step("w", &[], 1) };
    assert!(said(&[wide]).contains("waits for 65 steps"));
    assert!(said(&vec![step("a", &[], 1); MAX_STEPS_PER_GRAPH + 1]).contains("4097 steps"));
    let long =
        |n: usize| Step { kind: "k".repeat(128), program: "p".repeat(128), ..step(&format!("{n:0>128}"), &[], 1) };
    assert!(said(&(0..4000).map(long).collect::<Vec<_>>()).contains("bytes in all"));
}

#[test]
fn steps_are_offered_when_all_before_them_ended() {
    let mut graphs = Graphs::default();
    assert_eq!(declare(&mut graphs, at(0), "p", &diamond()).outcome, Outcome::Applied);
    let first = next(&mut graphs, at(0));
    assert_eq!(ids(&first), ["a"]);
    assert_eq!((first[0].rank, first[0].remaining), (s(12), s(8)));
    assert_eq!(first[0].reason.to_string(), "critical path: 12.0 s to the end of p");
    assert_eq!(report(&mut graphs, at(1), "p", &["a"], &[]).outcome, Outcome::Applied);
    assert!(next(&mut graphs, at(1)).is_empty());
    assert_eq!(report(&mut graphs, at(2), "p", &[], &["a"]).steps, 1);
    let both = next(&mut graphs, at(2));
    assert_eq!(ids(&both), ["c", "b"], "the critical path first");
    assert_eq!(both[1].reason.to_string(), "3.0 s off the critical path: 8.0 s to the end of p");
    assert_eq!(both[0].attained, s(1));
    report(&mut graphs, at(3), "p", &["b", "c"], &[]);
    // What runs counts its rest.
    let view = graphs.view(at(5), &name("p")).unwrap();
    assert_eq!((view.remaining, view.longest, view.attained), (s(2 + 2), s(2 + 5 + 2), s(1 + 4)));
    report(&mut graphs, at(7), "p", &[], &["c", "b"]);
    let last = next(&mut graphs, at(8));
    assert_eq!((ids(&last), last[0].due_in, last[0].waited), (vec!["d"], s(4), s(0)));
    assert_eq!(last[0].reason.to_string(), "its tool is expected back in 4.0 s");
    assert_eq!(next(&mut graphs, at(15))[0].reason.to_string(), "aged: waited 3.0 s");
    assert!(graphs.covers(&TenantId::shared(), "p"));
    report(&mut graphs, at(16), "p", &["d"], &["d"]);
    assert!(!graphs.covers(&TenantId::shared(), "p"), "what it calls from now on was not declared");
    assert_eq!(graphs.counts(), GraphCounts { graphs: 1, ended: 4, ..GraphCounts::default() });
    assert_eq!(graphs.expire(at(16) + OVER), []);
    assert_eq!(graphs.expire(at(17) + OVER), [name("p")]);
    assert_eq!(graphs.counts(), GraphCounts::default());
}

#[test]
fn lost_reports_are_made_up_for() {
    let mut graphs = Graphs::default();
    declare(&mut graphs, at(0), "p", &diamond());
    assert_eq!(report(&mut graphs, at(1), "p", &["d"], &[]).steps, 4, "all before it must have ended");
    assert_eq!(graphs.counts(), GraphCounts { graphs: 1, running: 1, ended: 3, waiting: 0 });
    let again = report(&mut graphs, at(1), "p", &["a", "d"], &["b"]);
    assert_eq!(again.outcome, Outcome::Duplicate);
    let partly = report(&mut graphs, at(2), "p", &["x"], &["d", "y"]);
    assert_eq!((partly.outcome, partly.reason.as_str()), (Outcome::Clipped, "2 steps are not declared: x, y"));
    assert_eq!(report(&mut graphs, at(2), "p", &["x"], &[]).outcome, Outcome::Missing);
    assert_eq!(report(&mut graphs, at(2), "q", &["a"], &[]).outcome, Outcome::Missing);
}

#[test]
fn the_last_declaration_counts_and_keeps_how_far_steps_are() {
    let mut graphs = Graphs::default();
    let answer = |graphs: &Graphs, steps: &[Step], revision| {
        let answer = graphs.check(&name("p"), &plan(steps), revision, 100);
        (answer.outcome, answer.revision)
    };
    assert_eq!(answer(&graphs, &[], 0).0, Outcome::Missing);
    assert_eq!(answer(&graphs, &diamond(), 7), (Outcome::Applied, 7));
    graphs.declare(at(0), name("p"), (7, plan(&diamond())));
    assert_eq!(answer(&graphs, &diamond(), 0), (Outcome::Duplicate, 7));
    assert_eq!(answer(&graphs, &diamond(), 7), (Outcome::Duplicate, 7));
    let more = [diamond(), vec![step("e", &["a"], 30)]].concat();
    assert_eq!(answer(&graphs, &more, 7).0, Outcome::Rejected);
    assert_eq!(answer(&graphs, &more, 6).0, Outcome::Rejected);
    assert_eq!(answer(&graphs, &more, 0), (Outcome::Applied, 100));
    report(&mut graphs, at(1), "p", &["a"], &[]);
    report(&mut graphs, at(2), "p", &["b"], &["a"]);
    graphs.declare(at(3), name("p"), (8, plan(&more)));
    let steps = next(&mut graphs, at(4));
    assert_eq!(ids(&steps), ["e", "c"]);
    assert_eq!((steps[1].waited, steps[0].waited), (s(2), s(1)), "{steps:?}");
    assert_eq!(graphs.counts(), GraphCounts { graphs: 1, waiting: 3, running: 1, ended: 1 });
    assert_eq!(answer(&graphs, &[], 8), (Outcome::Applied, 8));
    graphs.declare(at(5), name("p"), (8, Plan::default()));
    assert_eq!((graphs.counts(), graphs.steps, graphs.bytes), (GraphCounts::default(), 0, 0));
    assert!(graphs.runners.is_empty() && graphs.tenant_steps.is_empty());
}

#[test]
fn a_graph_resumes_where_it_was() {
    let mut graphs = Graphs::default();
    declare(&mut graphs, at(0), "p", &diamond());
    report(&mut graphs, at(1), "p", &["a"], &["a"]);
    report(&mut graphs, at(2), "p", &["b"], &[]);
    let changes = graphs.take_changes(9);
    assert_eq!(changes.len(), 1);
    assert_eq!(graphs.take_changes(9), []);
    let (_, revision, states) = &changes[0];
    let mut again = Graphs::default();
    // What is written is in the plan's order, which stays what it is.
    let view = graphs.view(at(2), &name("p")).unwrap();
    let written: Vec<Step> = view.steps.into_iter().map(|s| s.step).collect();
    assert_eq!(plan(&written).steps(), written);
    again.restore(at(0), name("p"), (*revision, plan(&written)), states);
    assert_eq!(again.counts(), graphs.counts());
    assert_eq!(ids(&next(&mut again, at(1))), ["c"]);
}

#[test]
fn only_the_programs_asked_for_are_answered() {
    let mut graphs = Graphs::default();
    let of = |program: &str, step: Step| Step { program: program.into(), ..step };
    declare(&mut graphs, at(0), "p", &[of("p/x", step("x", &[], 1)), step("y", &[], 1), of("p/z", step("z", &[], 1))]);
    declare(&mut graphs, at(0), "q", &[step("q", &[], 1)]);
    let other = GraphName { tenant: TenantId::new("other").unwrap(), program: "p".into() };
    graphs.declare(at(0), other.clone(), (1, plan(&[step("o", &[], 1)])));
    report(&mut graphs, at(0), "p", &["x"], &[]);
    let mut asked = |programs: &[&str], tenant: Option<&TenantId>, running| {
        let programs = programs.iter().map(|p| (*p).to_owned()).collect();
        let question = Question { tenant, programs: &programs, running, limit: 9 };
        let mut found: Vec<String> = graphs.next(at(1), question).0.into_iter().map(|s| s.step).collect();
        found.sort();
        found.concat()
    };
    let shared = TenantId::shared();
    assert_eq!(asked(&[], None, true), "oqxyz");
    assert_eq!(asked(&[], Some(&shared), true), "qxyz");
    assert_eq!(asked(&[], Some(&other.tenant), true), "o");
    assert_eq!(asked(&["p"], Some(&shared), false), "yz");
    assert_eq!(asked(&["p/x"], Some(&shared), true), "x");
    assert_eq!(asked(&["p/z", "q"], None, false), "qz");
    assert_eq!(asked(&["nobody"], None, true), "");
    assert!(graphs.covers(&shared, "p/x") && graphs.covers(&shared, "q") && !graphs.covers(&other.tenant, "p/x"));
    assert_eq!(graphs.named("p", None).len(), 2);
    assert_eq!(graphs.named("p", Some(&other.tenant)), [other]);
}

#[test]
fn a_tenant_and_a_node_have_bounds() {
    let mut graphs = Graphs::default();
    let many: Vec<Step> = (0..MAX_STEPS_PER_GRAPH).map(|n| step(&n.to_string(), &[], 1)).collect();
    for n in 0..MAX_TENANT_STEPS / MAX_STEPS_PER_GRAPH {
        assert_eq!(declare(&mut graphs, at(0), &n.to_string(), &many).outcome, Outcome::Applied);
    }
    let full = declare(&mut graphs, at(0), "more", &[step("a", &[], 1)]);
    assert_eq!(full.outcome, Outcome::Rejected);
    assert!(full.reason.starts_with("no room: at most 32768 declared steps of a tenant"), "{}", full.reason);
    assert_eq!(declare(&mut graphs, at(0), "0", &many[1..]).outcome, Outcome::Applied, "a smaller one in its place");
    assert_eq!(declare(&mut graphs, at(0), "more", &[step("a", &[], 1)]).outcome, Outcome::Applied);
    let other = GraphName { tenant: TenantId::new("other").unwrap(), program: "p".into() };
    assert_eq!(graphs.check(&other, &plan(&many), 0, 1).outcome, Outcome::Applied, "others have room of their own");
    let gone = graphs.expire(at(1) + SILENCE);
    assert_eq!((gone.len(), graphs.steps), (MAX_TENANT_STEPS / MAX_STEPS_PER_GRAPH + 1, 0));
}

#[test]
fn undeclared_programs_go_by_service_and_age() {
    let tenant = TenantId::shared();
    let of = |program, attained, since| {
        NextStep::undeclared(at(100), Undeclared { tenant: &tenant, program, attained: s(attained), since: at(since) })
    };
    let mut all = [of("long", 40, 100), of("old", 40, 20), of("short", 2, 100), of("away", 2, 103)];
    all.sort_by_key(|step| step.order);
    assert_eq!(all.each_ref().map(|step| step.program.as_str()), ["old", "short", "away", "long"]);
    let said = all.map(|step| step.reason.to_string());
    assert_eq!(
        said,
        [
            "aged: waited 80.0 s",
            "attained service 2.0 s",
            "its tool is expected back in 3.0 s",
            "attained service 40.0 s"
        ]
    );
}

/// Steps with random earlier ones before them.
fn any_steps() -> impl Strategy<Value = Vec<Step>> {
    let one = (prop::collection::vec(any::<prop::sample::Index>(), 0..4), 1u64..20, 0u64..5);
    prop::collection::vec(one, 1..30).prop_map(|all| {
        let of = |(number, (before, secs, gap)): (usize, &(Vec<prop::sample::Index>, u64, u64))| {
            let before: BTreeSet<String> =
                before.iter().filter(|_| number > 0).map(|b| b.index(number).to_string()).collect();
            Step { after: before.into_iter().collect(), gap: s(*gap), ..step(&number.to_string(), &[], *secs) }
        };
        all.iter().enumerate().map(of).collect()
    })
}

/// From a step's beginning to the end, by walking every way.
fn longest(steps: &BTreeMap<&str, &Step>, id: &str) -> Duration {
    let later = steps.values().filter(|s| s.after.iter().any(|a| a == id));
    let beyond = later.map(|s| s.gap + longest(steps, &s.id)).max().unwrap_or_default();
    steps[id].expected.unwrap_or_default() + beyond
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn random_graphs_run_in_order(steps in any_steps(), shuffle in any::<u64>(), pick in any::<prop::sample::Index>()) {
        let by_id: BTreeMap<&str, &Step> = steps.iter().map(|s| (s.id.as_str(), s)).collect();
        let mut declared = steps.clone();
        declared.sort_by_key(|s| s.id.parse::<u64>().unwrap_or(0).wrapping_mul(shuffle | 1));
        let mut graphs = Graphs::default();
        declare(&mut graphs, at(0), "p", &declared);
        if steps.len() <= 14 {
            for step in graphs.view(at(0), &name("p")).unwrap().steps {
                prop_assert_eq!(step.rank, longest(&by_id, &step.step.id));
            }
        }
        let mut ended = BTreeSet::new();
        let mut now = 0;
        while ended.len() < steps.len() {
            let offered = next(&mut graphs, at(now));
            let waiting = |s: &&Step| !ended.contains(s.id.as_str());
            let free = steps.iter().filter(waiting).filter(|s| s.after.iter().all(|a| ended.contains(a.as_str())));
            let free: BTreeSet<&str> = free.map(|s| s.id.as_str()).collect();
            prop_assert_eq!(ids(&offered).into_iter().collect::<BTreeSet<_>>(), free);
            prop_assert!(offered.windows(2).all(|pair| pair[0].order <= pair[1].order));
            let chosen = offered[pick.index(offered.len())].step.clone();
            report(&mut graphs, at(now), "p", &[&chosen], &[]);
            now += by_id[chosen.as_str()].expected.unwrap().as_secs();
            report(&mut graphs, at(now), "p", &[], &[&chosen]);
            ended.insert(by_id[chosen.as_str()].id.as_str());
        }
        prop_assert_eq!(graphs.view(at(now), &name("p")).unwrap().remaining, Duration::ZERO);
    }

    /// One engine, and every second a short program more: the long one's steps all run all the same.
    #[test]
    fn nobody_waits_for_ever(steps in any_steps()) {
        let mut graphs = Graphs::default();
        declare(&mut graphs, at(0), "long", &steps);
        let work: u64 = steps.iter().map(|s| s.expected.unwrap().as_secs() + s.gap.as_secs()).sum();
        // Each of its steps waits no longer than what remains and it may be put off, and short ones that came before.
        let bound = 4 * work * (steps.len() as u64 + 1) + 100;
        let mut now = 0;
        while graphs.counts().graphs > 0 && graphs.view(at(now), &name("long")).unwrap().remaining > Duration::ZERO {
            prop_assert!(now < bound, "still {:?} at {}", graphs.view(at(now), &name("long")).unwrap().remaining, now);
            declare(&mut graphs, at(now), &format!("short-{now}"), &[step("s", &[], 1)]);
            let first = next(&mut graphs, at(now)).remove(0);
            report(&mut graphs, at(now), &first.graph, &[&first.step], &[]);
            now += first.rank.min(graphs.view(at(now), &name(&first.graph)).unwrap().steps.iter()
                .find(|s| s.step.id == first.step).unwrap().step.expected.unwrap()).as_secs().max(1);
            report(&mut graphs, at(now), &first.graph, &[], &[&first.step]);
        }
    }
}

fn key(n: u8) -> BlockKey {
    BlockKey::new([n; 32])
}

fn sharing(graphs: &Graphs, before: Instant) -> Vec<(String, SharedPart)> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let (some, next) = graphs.sharing_some(before, after.as_ref());
        all.extend(some.into_iter().map(|s| (s.program, s.part)));
        if next.is_none() {
            return all;
        }
        after = next;
    }
}

#[test]
fn what_steps_share_is_told_while_they_may_run_and_have_not_begun() {
    let tokens = |program: &str, start, end| SharedContext::Tokens { program: program.into(), start, end };
    let a = Step { shares: SemanticType::SystemPrompt, ..step("a", &[], 1) };
    let of_parent = Step { shared: Some(tokens("boss", 16, 64)), ..step("b", &["a"], 1) };
    let by_branch = Step {
        program: "p/x".into(),
        shares: SemanticType::Document,
        shared: Some(tokens("", 0, 0)),
        gap: s(30),
        ..step("c", &["a"], 1)
    };
    let last = Step { shared: Some(SharedContext::Blocks(vec![key(1)])), ..step("d", &["b"], 1) };
    let mut graphs = Graphs::default();
    declare(&mut graphs, at(0), "p", &[a, of_parent, by_branch, last]);
    declare(&mut graphs, at(0), "q", &[step("alone", &[], 1)]);
    let system = ("p".to_owned(), SharedPart::Type(SemanticType::SystemPrompt));
    assert_eq!(sharing(&graphs, at(60)), [system]);
    report(&mut graphs, at(1), "p", &["a"], &[]);
    assert_eq!(sharing(&graphs, at(60)), [], "it began");
    report(&mut graphs, at(2), "p", &[], &["a"]);
    let (boss, own) = (("boss".to_owned(), SharedPart::Tokens(16, 64)), ("p".to_owned(), SharedPart::Tokens(0, 0)));
    assert_eq!(sharing(&graphs, at(60)), [boss.clone(), own]);
    assert_eq!(sharing(&graphs, at(20)), [boss], "the other's tool takes longer");
    report(&mut graphs, at(3), "p", &["b"], &["b"]);
    assert_eq!(sharing(&graphs, at(9)), [("p".to_owned(), SharedPart::Blocks(vec![key(1)]))]);
    let by = |graphs: &Graphs, program| graphs.shared_by(&TenantId::shared(), program).map(|s| s.part);
    assert_eq!(by(&graphs, "p/x"), Some(SharedPart::Tokens(0, 0)));
    assert_eq!(by(&graphs, "q"), None);
    declare(&mut graphs, at(4), "p", &[]);
    assert_eq!((sharing(&graphs, at(60)), by(&graphs, "p/x")), (vec![], None), "what is removed is not told");
}

#[test]
fn what_is_shared_is_told_in_looks_of_a_bounded_length() {
    let shares = Step { shares: SemanticType::Skill, ..step("a", &[], 1) };
    let mut graphs = Graphs::default();
    (0..2000).for_each(|n| drop(declare(&mut graphs, at(0), &n.to_string(), std::slice::from_ref(&shares))));
    let (first, next) = graphs.sharing_some(at(0), None);
    assert!(first.len() < 1024 && next.is_some(), "{}", first.len());
    assert_eq!(sharing(&graphs, at(0)).len(), 2000);
}

#[test]
fn a_part_of_a_context_that_is_none_is_refused() {
    let said = |shared| Plan::new(vec![Step { shared: Some(shared), ..step("a", &[], 1) }]).map(|plan| plan.bytes());
    let tokens = |program: &str, start, end| SharedContext::Tokens { program: program.into(), start, end };
    let refused = |shared| said(shared).unwrap_err().to_string();
    assert_eq!(refused(tokens("", 9, 9)), "step \"a\" shares tokens 9 to 9, which are none");
    assert!(refused(tokens(&"x".repeat(129), 0, 9)).contains("a program_id of what it shares of 129 bytes"));
    assert!(refused(SharedContext::Blocks(vec![key(1); MAX_SHARED_KEYS + 1])).contains("17 blocks"));
    let plain = Plan::new(vec![step("a", &[], 1)]).unwrap().bytes();
    assert!(said(SharedContext::Blocks(vec![key(1); 2])).unwrap() >= plain + 64, "keys count");
    assert!(said(tokens("boss", 9, 0)).unwrap() > plain);
}

#[test]
fn a_turn_is_told_once_when_it_begins() {
    let mut graphs = Graphs::default();
    let told = |graphs: &mut Graphs, now| -> Vec<String> {
        let mut all = Vec::new();
        while let Some(turns) = graphs.take_turns(now) {
            all.extend(turns.into_iter().map(|turn| format!("{} {}", turn.program, turn.step)));
        }
        all.sort();
        all
    };
    let branch = Step { program: "p/x".into(), ..step("b", &["a"], 1) };
    let plan = [step("a", &[], 1), branch, Step { gap: s(5), ..step("c", &["b"], 1) }];
    declare(&mut graphs, at(0), "p", &plan);
    assert_eq!(told(&mut graphs, at(0)), ["p a"]);
    assert_eq!(told(&mut graphs, at(9)), [""; 0]);
    report(&mut graphs, at(10), "p", &["a"], &["a"]);
    assert_eq!(told(&mut graphs, at(10)), ["p/x b"]);
    report(&mut graphs, at(11), "p", &["b"], &["b"]);
    assert_eq!(told(&mut graphs, at(15)), [""; 0], "its tool runs");
    // What grows meanwhile is told beside it; what was told is not told again.
    declare(&mut graphs, at(15), "p", &[&plan[..], &[step("d", &[], 1)]].concat());
    assert_eq!(told(&mut graphs, at(16)), ["p c", "p d"]);
    declare(&mut graphs, at(17), "p", &[&plan[..], &[step("d", &[], 1), step("e", &["d"], 1)]].concat());
    assert_eq!(told(&mut graphs, at(20)), [""; 0]);
    report(&mut graphs, at(21), "p", &[], &["d"]);
    declare(&mut graphs, at(21), "p", &[]);
    assert_eq!(told(&mut graphs, at(99)), [""; 0], "a graph that is gone has no turns");
}

#[test]
fn a_late_declaration_does_not_bring_a_removed_graph_back() {
    let mut graphs = Graphs::default();
    let late = declare(&mut graphs, at(0), "p", &diamond()).revision;
    let removal = graphs.check(&name("p"), &Plan::default(), 0, late);
    graphs.declare(at(1), name("p"), (removal.revision, Plan::default()));
    let again = graphs.check(&name("p"), &plan(&diamond()), late, late);
    assert_eq!((again.outcome, again.revision), (Outcome::Rejected, removal.revision));
    assert_eq!(report(&mut graphs, at(2), "p", &["a"], &[]).outcome, Outcome::Missing, "nor does progress");
    let anew = graphs.check(&name("p"), &plan(&diamond()), 0, late);
    assert_eq!((anew.outcome, anew.revision > removal.revision), (Outcome::Applied, true), "who declares anew may");
    graphs.expire(at(4000));
    assert_eq!(graphs.check(&name("p"), &plan(&diamond()), late, late).outcome, Outcome::Applied, "it is forgotten");
}

#[test]
fn what_is_declared_after_a_program_ended_has_a_place_wherever_its_end_was_heard_late() {
    let (mut graphs, mut behind) = (Graphs::default(), Graphs::default());
    let first = declare(&mut graphs, at(0), "p", &diamond()).revision;
    behind.declare(at(0), name("p"), (first, plan(&diamond())));
    // It ends, and is declared anew; elsewhere both are heard later, by a clock that is ahead.
    graphs.declare(at(1), name("p"), (graphs.revision(&name("p")), Plan::default()));
    let anew = graphs.check(&name("p"), &plan(&diamond()), 0, first + 5).revision;
    let ended = behind.check(&name("p"), &Plan::default(), behind.revision(&name("p")), first + 3_600_000);
    assert_eq!((ended.outcome, ended.revision), (Outcome::Applied, first));
    behind.declare(at(9), name("p"), (ended.revision, Plan::default()));
    assert_eq!(behind.check(&name("p"), &plan(&diamond()), anew, 0).outcome, Outcome::Applied);
    assert_eq!(behind.check(&name("p"), &plan(&diamond()), first, 0).outcome, Outcome::Rejected);
}

#[test]
fn a_removal_that_overtakes_its_declaration_is_remembered() {
    let mut graphs = Graphs::default();
    assert_eq!(graphs.check(&name("p"), &Plan::default(), 8, 0).outcome, Outcome::Missing);
    graphs.removed_ahead(at(0), name("p"), 8);
    graphs.removed_ahead(at(0), name("p"), 3);
    assert_eq!(graphs.check(&name("p"), &plan(&diamond()), 7, 0).outcome, Outcome::Rejected);
    assert_eq!(graphs.check(&name("p"), &plan(&diamond()), 9, 0).outcome, Outcome::Applied);
}

#[test]
fn a_search_in_parts_finds_what_one_would_and_leaves_out_what_changed() {
    let mut graphs = Graphs::default();
    (0..3000_u64).for_each(|n| drop(declare(&mut graphs, at(n), &n.to_string(), &[step("a", &[], n % 97 + 1)])));
    let all = BTreeSet::new();
    let question = Question { tenant: None, programs: &all, running: false, limit: 50 };
    let (whole, more) = graphs.next(at(9000), question);
    assert_eq!((whole.len(), more), (50, true));
    let mut search = Search::new(question);
    assert!(graphs.search_some(at(9000), &mut search), "there are more than one part looks at");
    while graphs.search_some(at(9000), &mut search) {}
    report(&mut graphs, at(9000), &whole[0].graph, &["a"], &[]);
    declare(&mut graphs, at(9000), &whole[1].graph, &[]);
    let (found, more) = graphs.found(at(9000), search);
    assert_eq!((found.len(), more), (48, true));
    assert_eq!(found[0].graph, whole[2].graph);
    let other = TenantId::new("other").unwrap();
    assert!(graphs.next(at(9000), Question { tenant: Some(&other), ..question }).0.is_empty());
    let one = BTreeSet::from(["17".to_owned()]);
    let asked = graphs.next(at(9000), Question { tenant: Some(&TenantId::shared()), programs: &one, ..question }).0;
    assert_eq!(asked.iter().map(|s| s.graph.as_str()).collect::<Vec<_>>(), ["17"]);
}
