//! What waits, waits in order, within bounds, and through a restart.

use super::*;

fn verb(program: &str) -> Verb {
    Verb::Signal(v1::SignalRequest { program_id: program.into(), ..Default::default() })
}

fn node(name: &str) -> NodeId {
    NodeId::new(name).expect("a valid name")
}

/// More than an eighth of what may wait.
fn large() -> Verb {
    verb(&"p".repeat(MAX_BYTES / 8))
}

/// Tells a node all that waits for it; answers how much that was.
fn tell(outbox: &Outbox, id: &NodeId) -> usize {
    assert!(outbox.begin(id));
    let mut told = 0;
    while outbox.next(id).is_some() {
        outbox.told(id, v1::NodeOutcome::default());
        told += 1;
    }
    told
}

fn program(letter: &Letter) -> &str {
    let Verb::Signal(signal) = &letter.verb else { panic!("only signals are said here") };
    &signal.program_id
}

#[test]
fn what_waited_is_said_in_order_after_a_restart_and_then_gone() {
    let dir = tempfile::tempdir().expect("a directory");
    let (own, away) = (node("own"), node("away"));
    let outbox = Outbox::open(dir.path()).expect("opens");
    outbox.tend([own.clone(), away.clone()].into_iter());
    for name in ["first", "second"] {
        let queued = outbox.queue(&own, verb(name));
        assert_eq!(queued.answers.len(), 1, "the node itself is not told");
        outbox.keep(&queued.letter, std::slice::from_ref(&away)).expect("is written");
    }
    drop(outbox);

    let outbox = Outbox::open(dir.path()).expect("opens");
    assert!(outbox.begin(&away));
    assert!(!outbox.begin(&away), "one sender at a time");
    for name in ["first", "second"] {
        assert_eq!(program(&outbox.next(&away).expect("it waits")), name);
        outbox.told(&away, v1::NodeOutcome::default());
    }
    assert!(outbox.next(&away).is_none());
    assert_eq!(outbox.size(), (0, 0, 0));
    assert_eq!(outbox.queue(&own, verb("third")).answers.len(), 1, "the node is remembered");
    drop(outbox);
    assert_eq!(Outbox::open(dir.path()).expect("opens").size(), (0, 0, 0));
}

#[test]
fn a_damaged_letter_is_dropped_and_the_rest_counts() {
    let dir = tempfile::tempdir().expect("a directory");
    let (own, away) = (node("own"), node("away"));
    let outbox = Outbox::open(dir.path()).expect("opens");
    outbox.tend(std::iter::once(away.clone()));
    let damaged = outbox.queue(&own, verb("damaged")).letter;
    let whole = outbox.queue(&own, verb("whole")).letter;
    for letter in [&damaged, &whole] {
        outbox.keep(letter, std::slice::from_ref(&away)).expect("is written");
    }
    fs::write(outbox.path(damaged.number), b"no letter").expect("is written");
    drop(outbox);
    let outbox = Outbox::open(dir.path()).expect("opens");
    assert_eq!(program(&outbox.next(&away).expect("it waits")), "whole");
}

#[test]
fn a_full_queue_refuses() {
    let dir = tempfile::tempdir().expect("a directory");
    let own = node("own");
    let outbox = Outbox::open(dir.path()).expect("opens");
    outbox.tend(std::iter::once(node("away")));
    for _ in 0..MAX_WAITING {
        assert!(outbox.queue(&own, verb("p")).refused.is_empty());
    }
    let refused = outbox.queue(&own, verb("p"));
    assert_eq!((refused.refused.len(), refused.answers.len()), (1, 0));
    assert_eq!(outbox.size().2, 1);
}

#[test]
fn half_of_what_may_wait_is_a_crowd() {
    let dir = tempfile::tempdir().expect("a directory");
    let (own, away) = (node("own"), node("away"));
    let outbox = Outbox::open(dir.path()).expect("opens");
    outbox.tend(std::iter::once(away.clone()));
    for _ in 0..MAX_WAITING / 2 {
        outbox.queue(&own, verb("p"));
    }
    assert!(!outbox.is_crowded());
    outbox.queue(&own, verb("p"));
    assert!(outbox.is_crowded());
    assert!(outbox.begin(&away) && outbox.next(&away).is_some());
    outbox.told(&away, v1::NodeOutcome::default());
    assert!(!outbox.is_crowded());
}

#[test]
fn what_waits_for_one_that_is_away_keeps_no_verb_from_one_that_answers() {
    let dir = tempfile::tempdir().expect("a directory");
    let (own, away, here) = (node("own"), node("away"), node("here"));
    let outbox = Outbox::open(dir.path()).expect("opens");
    outbox.tend([away.clone(), here.clone()].into_iter());
    outbox.tend(std::iter::once(here.clone()));
    for _ in 0..7 {
        let queued = outbox.queue(&own, large());
        assert!(queued.refused.is_empty());
        assert_eq!(tell(&outbox, &here), 1);
        outbox.keep(&queued.letter, std::slice::from_ref(&away)).expect("is written");
    }
    let refused_for_one = |outbox: &Outbox| {
        let queued = outbox.queue(&own, large());
        assert_eq!(queued.refused, std::slice::from_ref(&away));
        assert_eq!(queued.answers.iter().map(|(id, _)| id).collect::<Vec<_>>(), [&here]);
    };
    for _ in 0..4 {
        refused_for_one(&outbox);
    }
    assert_eq!((outbox.size().0, outbox.size().2), (7 + 4, 4));
    assert!(outbox.queue(&own, verb("small")).refused.is_empty(), "what fits still waits");
    assert_eq!(tell(&outbox, &here), 5);
    drop(outbox);

    let outbox = Outbox::open(dir.path()).expect("opens");
    outbox.tend(std::iter::once(here.clone()));
    refused_for_one(&outbox);
    outbox.tend([away.clone(), here.clone()].into_iter());
    assert!(outbox.queue(&own, large()).refused.is_empty(), "it is back");
    assert_eq!((tell(&outbox, &away), tell(&outbox, &here)), (8, 2));
    assert_eq!(outbox.size(), (0, 0, 1));
}

#[test]
fn one_that_answers_no_longer_keeps_what_there_is_room_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let (own, falters, here) = (node("own"), node("falters"), node("here"));
    let outbox = Outbox::open(dir.path()).expect("opens");
    outbox.tend([falters.clone(), here.clone()].into_iter());
    let mut answers = Vec::new();
    for _ in 0..15 {
        let queued = outbox.queue(&own, large());
        assert!(queued.refused.is_empty());
        answers.extend(queued.answers.into_iter().filter(|(id, _)| *id == falters));
    }
    assert_eq!(outbox.queue(&own, large()).refused.len(), 2, "all that waits is bounded, whoever it waits for");
    assert!(outbox.begin(&falters) && outbox.next(&falters).is_some());
    outbox.failed(&falters);
    let rejected = |(_, mut answer): (NodeId, oneshot::Receiver<v1::NodeOutcome>)| {
        answer.try_recv().is_ok_and(|outcome| outcome.outcome() == v1::Outcome::Rejected)
    };
    assert_eq!(answers.into_iter().map(rejected).filter(|rejected| *rejected).count(), 8);
    assert_eq!(outbox.size().2, 2 + 8);
    assert_eq!(tell(&outbox, &here), 15);
    assert!(outbox.size().1 <= MAX_BYTES);
    assert_eq!(outbox.queue(&own, large()).refused, std::slice::from_ref(&falters));
    assert_eq!((tell(&outbox, &here), tell(&outbox, &falters)), (1, 7));
    assert!(outbox.queue(&own, large()).refused.is_empty(), "it answers again");
    outbox.tend(std::iter::empty());
    assert_eq!((tell(&outbox, &here), tell(&outbox, &falters)), (1, 1), "who is gone keeps what there is room for");
    assert_eq!((outbox.size().0, outbox.size().1), (0, 0));
}
