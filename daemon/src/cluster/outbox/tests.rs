//! What waits, waits in order, within bounds, and through a restart.

use super::*;

fn verb(program: &str) -> Verb {
    Verb::Signal(v1::SignalRequest { program_id: program.into(), ..Default::default() })
}

fn node(name: &str) -> NodeId {
    NodeId::new(name).expect("a valid name")
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
