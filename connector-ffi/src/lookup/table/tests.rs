use std::time::{Duration, Instant};

use super::{CALLS_PER_ENTRY, Poll, Release, Settlement, Table, Voided};
use crate::lookup::answer::Answer;
use crate::spec::Spec;
use crate::spec::tests::sample;
use kvtier_proto::v1;

const EPOCH: Option<u64> = Some(1);

fn answer() -> Answer {
    let layout = Spec::parse(&sample().to_string()).unwrap().layout;
    let range = crate::lookup::answer::RangeKeys { first_block: 0, keys: Vec::new() };
    let reply = v1::LookupReply { ranges: vec![v1::RangeFrames::default()] };
    Answer::check(vec![range], reply, &layout).unwrap()
}

fn settlement() -> Settlement {
    Settlement { local_tokens: 1, claimed_tokens: 2, lost_tokens: 3 }
}

/// A table with one pending lookup "r", its call, and its deadline.
fn pending() -> (Table, u64, Instant) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut table = Table::new(2);
    let call = table.begin("r", EPOCH, deadline).unwrap();
    (table, call, deadline)
}

fn before(deadline: Instant) -> Instant {
    deadline.checked_sub(Duration::from_secs(1)).unwrap()
}

#[test]
fn a_lookup_is_pending_until_it_is_answered() {
    let (mut table, call, deadline) = pending();
    let now = before(deadline);
    assert!(matches!(table.poll("other", EPOCH, now).0, Poll::Unknown));
    assert!(matches!(table.poll("r", EPOCH, now).0, Poll::Pending));
    assert_eq!(table.end(call, Some(answer()), now), (None, true));
    assert!(matches!(table.poll("r", EPOCH, deadline).0, Poll::Answered(_)), "an answer outlives its deadline");
    assert_eq!(table.release("r", settlement()), Release::Now(1));
    assert!(matches!(table.poll("r", EPOCH, now).0, Poll::Unknown));
    assert_eq!(table.release("r", settlement()), Release::Unknown);
}

#[test]
fn a_lookup_that_was_answered_zero_stays_zero() {
    let (mut table, call, deadline) = pending();
    let (poll, voided) = table.poll("r", EPOCH, deadline);
    assert!(matches!(poll, Poll::Zero));
    assert_eq!(voided, Some(Voided::Expired { is_owed: true }));
    assert_eq!(table.end(call, Some(answer()), before(deadline)), (None, false));
    let (poll, voided) = table.poll("r", EPOCH, before(deadline));
    assert!(matches!(poll, Poll::Zero));
    assert_eq!(voided, None, "counted once");
    assert_eq!(table.release("r", settlement()), Release::Now(1), "the lease is released all the same");
}

#[test]
fn a_late_answer_is_no_answer() {
    let (mut table, call, deadline) = pending();
    assert_eq!(table.end(call, Some(answer()), deadline), (None, false));
    let (poll, voided) = table.poll("r", EPOCH, deadline);
    assert!(matches!(poll, Poll::Zero));
    assert_eq!(voided, Some(Voided::Expired { is_owed: false }), "and no silence");
}

#[test]
fn a_failed_call_answers_zero_at_once() {
    let (mut table, call, deadline) = pending();
    table.end(call, None, before(deadline));
    assert!(matches!(table.poll("r", EPOCH, before(deadline)).0, Poll::Zero));
}

#[test]
fn a_lost_attachment_voids_answers_too() {
    for current in [None, Some(2)] {
        let (mut table, call, deadline) = pending();
        table.end(call, Some(answer()), before(deadline));
        let (poll, voided) = table.poll("r", current, before(deadline));
        assert!(matches!(poll, Poll::Zero), "{current:?}");
        assert_eq!(voided, Some(Voided::Detached));
        assert!(matches!(table.poll("r", EPOCH, before(deadline)).0, Poll::Zero), "it does not come back");
    }
}

#[test]
fn without_a_daemon_a_lookup_is_zero_and_nothing_is_released() {
    let now = Instant::now();
    let mut table = Table::new(1);
    table.begin("r", None, now + Duration::from_secs(60)).unwrap();
    assert!(matches!(table.poll("r", None, now).0, Poll::Zero));
    assert!(matches!(table.poll("r", EPOCH, now).0, Poll::Zero), "even if a daemon has come since");
    assert_eq!(table.release("r", settlement()), Release::Nothing);
}

#[test]
fn a_release_waits_for_the_call_to_end() {
    let (mut table, call, deadline) = pending();
    assert_eq!(table.release("r", settlement()), Release::Nothing);
    assert_eq!(table.end(call, Some(answer()), before(deadline)), (Some(settlement()), false));
    assert_eq!(table.end(call, None, deadline), (None, false), "once");
}

#[test]
fn a_lookup_of_the_same_name_replaces_the_first() {
    let (mut table, first, deadline) = pending();
    let now = before(deadline);
    let second = table.begin("r", EPOCH, deadline).unwrap();
    assert_eq!(table.end(first, Some(answer()), now), (None, false));
    assert!(matches!(table.poll("r", EPOCH, now).0, Poll::Pending), "the first answer is not the second's");
    assert_eq!(table.end(second, Some(answer()), now), (None, true));
    assert_eq!(table.release("r", settlement()), Release::Now(1));
}

#[test]
fn a_replaced_call_that_ends_last_releases_what_it_may_have_leased() {
    let (mut table, first, deadline) = pending();
    let now = before(deadline);
    let second = table.begin("r", EPOCH, deadline).unwrap();
    table.end(second, Some(answer()), now);
    table.release("r", settlement());
    assert_eq!(table.end(first, Some(answer()), now), (Some(Settlement::default()), false));
}

#[test]
fn a_namespace_switch_voids_everything_but_the_release() {
    let (mut table, call, deadline) = pending();
    assert_eq!(table.void_all(), 1);
    assert_eq!(table.void_all(), 0);
    table.end(call, Some(answer()), before(deadline));
    assert!(matches!(table.poll("r", EPOCH, before(deadline)).0, Poll::Zero));
    assert_eq!(table.release("r", settlement()), Release::Now(1));
}

#[test]
fn lookups_and_their_calls_are_bounded() {
    let (mut table, _, deadline) = pending();
    table.begin("s", EPOCH, deadline).unwrap();
    assert!(table.begin("t", EPOCH, deadline).is_err(), "two are held");
    assert!(table.begin("s", EPOCH, deadline).is_ok(), "a replacement takes no room");
    for _ in 0..20 {
        table.release("s", settlement());
        drop(table.begin("s", EPOCH, deadline));
    }
    assert_eq!(table.calls.len(), 2 * CALLS_PER_ENTRY, "calls that do not end are bounded too");
    assert!(table.begin("u", None, deadline).is_ok(), "a lookup without a call is still possible");
}
