//! Lookups that are begun part after part.

use kvtier_types::{Origin, Tier};

use super::cluster_tests::Pair;
use super::tests::{NOW, key};
use super::*;
use crate::entry::Flags;

/// A reader that knows of the owner's blocks.
fn pair(reader_blocks: u64, written: &[u8]) -> Pair {
    let mut pair = Pair::new(reader_blocks);
    pair.owner.write(written);
    pair.publish();
    pair.gossip();
    pair
}

#[test]
fn what_is_located_first_is_fetched_before_the_rest_is_located() {
    let mut pair = pair(8, &[1, 2, 3, 4, 5, 6]);
    let request = pair.request("r", &[1, 2, 3, 4, 5, 6]);
    let look = pair.reader.core.look_whole(&request).unwrap();
    let parts: Vec<_> = look.parts(2, 3).collect();
    assert_eq!(parts, [0..2, 2..5, 5..6]);
    assert_eq!(look.parts(1, 1).collect::<Vec<_>>(), [0..1, 1..2, 2..4, 4..6]);
    let mut fetches = Vec::new();
    for part in &parts[..2] {
        let located = pair.locate(&look.unknown()[part.clone()]);
        assert!(pair.reader.core.begin_part(NOW, &request, (&look, part.clone(), &located)).unwrap());
        let begun = pair.fetches();
        let keys: Vec<_> = begun.iter().map(|(_, wanted, _)| *wanted).collect();
        assert_eq!(keys, look.unknown()[part.clone()]);
        // One of them is here before the lookup, the others are still on their way.
        pair.serve(&begun[..1]);
        fetches.extend_from_slice(&begun[1..]);
    }
    assert_eq!(pair.reader.core.leases.len(), 1);
    let located = pair.locate(&look.unknown()[parts[2].clone()]);
    let lease = pair.reader.core.lookup_located(NOW, request, (&look, &located)).unwrap();
    assert_eq!(pair.reader.core.waiting(lease), Ok(4));
    let last = pair.fetches();
    assert_eq!(last.len(), 1, "nothing is fetched twice");
    pair.serve(&fetches);
    pair.serve(&last);
    let answer = pair.reader.core.collect(lease).unwrap();
    assert_eq!(answer.ranges[0].found, [Some(Origin::Peer); 6], "what came early came from a peer too");
    pair.reader.release("r", 96, 0);
    assert_eq!(pair.reader.core.ledger().served(Origin::Peer), 96);
    assert!(pair.reader.core.leases.is_empty() && pair.reader.core.waiters.is_empty());
    let parents =
        |n: u8| pair.reader.core.catalog.find(&key(n), 0, 0).and_then(|id| pair.reader.core.catalog.get(id).parent);
    assert!((2..=6).all(|n| parents(n).is_some()), "each has its parent, across parts");
}

#[test]
fn what_was_begun_ends_with_its_request_or_its_attachment() {
    for detached in [false, true] {
        let mut pair = pair(8, &[1, 2, 3, 4, 5]);
        let request = pair.request("r", &[1, 2, 3, 4, 5]);
        let look = pair.reader.core.look_whole(&request).unwrap();
        let part = look.parts(2, 3).next().unwrap();
        let located = pair.locate(&look.unknown()[part.clone()]);
        // Asked again, it takes the place of what was begun before.
        for _ in 0..2 {
            assert!(pair.reader.core.begin_part(NOW, &request, (&look, part.clone(), &located)).unwrap());
            assert_eq!(pair.reader.core.leases.len(), 1);
        }
        let fetches = pair.fetches();
        if detached {
            pair.reader.core.detach(pair.reader.who);
        } else {
            pair.reader.release("r", 0, 0);
        }
        pair.serve(&fetches);
        assert!(pair.reader.core.leases.is_empty() && pair.reader.core.waiters.is_empty());
        assert_eq!(pair.reader.core.counts().moved[Tier::Host.index()], 2, "what was under way arrived");
    }
}

#[test]
fn nothing_is_begun_beyond_a_block_that_is_nowhere_or_that_the_engine_has() {
    let mut pair = Pair::new(8);
    pair.owner.write(&[1, 2]);
    pair.owner.write(&[4, 5]);
    pair.publish();
    pair.gossip();
    let request = LookupRequest { local_tokens: 16, ..pair.request("r", &[1, 2, 3, 4, 5]) };
    let look = pair.reader.core.look_whole(&request).unwrap();
    assert!(look.parts(2, 1).eq(std::iter::once(0..4)), "a short rest is no reason to ask twice");
    let located = pair.locate(look.unknown());
    assert!(!pair.reader.core.begin_part(NOW, &request, (&look, 0..4, &located)).unwrap());
    assert_eq!(pair.fetches().iter().map(|(_, wanted, _)| wanted.block).collect::<Vec<_>>(), [key(2)]);
    pair.reader.release("r", 0, 0);
    assert!(pair.reader.core.leases.is_empty());
}

#[test]
fn what_is_here_of_a_prefix_stays_while_its_rest_is_fetched() {
    let mut pair = pair(4, &[1, 2, 3, 4, 5, 6]);
    pair.reader.write(&[1, 2]);
    pair.reader.write(&[8, 9]);
    let request = pair.request("r", &[1, 2, 3, 4, 5, 6]);
    let look = pair.reader.core.look_whole(&request).unwrap();
    let part = look.parts(1, 1).next().unwrap();
    let located = pair.locate(look.unknown());
    assert!(pair.reader.core.begin_part(NOW, &request, (&look, part, &located)).unwrap());
    let fetches = pair.fetches();
    pair.serve(&fetches);
    let here = |n: u8| pair.reader.core.catalog.find(&key(n), 0, 0).is_some_and(|id| pair.reader.core.in_host(id));
    assert_eq!([1, 2, 3, 8, 9].map(here), [true, true, true, true, false]);
}

#[test]
fn a_block_that_came_before_its_lookup_counts_as_used_once() {
    let mut pair = pair(8, &[1, 2, 3, 4, 5]);
    let mut request = pair.request("r", &[1, 2, 3, 4, 5]);
    request.hints.block.program_id = "p".into();
    let look = pair.reader.core.look_whole(&request).unwrap();
    let part = look.parts(2, 3).next().unwrap();
    let located = pair.locate(look.unknown());
    assert!(pair.reader.core.begin_part(NOW, &request, (&look, part, &located)).unwrap());
    let fetches = pair.fetches();
    pair.serve(&fetches[..1]);
    let entry = |pair: &Pair, n: u8| {
        let id = pair.reader.core.catalog.find(&key(n), 0, 0).unwrap();
        pair.reader.core.catalog.get(id).clone()
    };
    assert_eq!(
        (entry(&pair, 1).held, entry(&pair, 1).flags.has(Flags::COMMON)),
        (0, false),
        "nobody knows whose it is"
    );
    let before = entry(&pair, 1).touched;
    pair.reader.core.lookup_located(NOW, request, (&look, &located)).unwrap();
    let (came, comes, late) = (entry(&pair, 1), entry(&pair, 2), entry(&pair, 3));
    assert_eq!((came.touched, comes.touched), (before, before), "they were used when they were begun");
    assert!(late.touched > before);
    assert_eq!(came.segment, comes.segment, "what came is as what is still on its way");
    assert_eq!((came.held, came.flags.has(Flags::COMMON)), (1, false), "it is its reader's");
}

#[test]
fn what_came_for_a_lookup_that_never_came_is_its_writers() {
    let mut pair = pair(8, &[1, 2, 3, 4, 5]);
    let request = pair.request("r", &[1, 2, 3, 4, 5]);
    let look = pair.reader.core.look_whole(&request).unwrap();
    let parts: Vec<_> = look.parts(2, 2).collect();
    let located = pair.locate(look.unknown());
    assert!(pair.reader.core.begin_part(NOW, &request, (&look, parts[0].clone(), &located)).unwrap());
    let fetches = pair.fetches();
    pair.serve(&fetches);
    pair.reader.release("r", 0, 0);
    let id = pair.reader.core.catalog.find(&key(2), 0, 0).unwrap();
    assert!(pair.reader.core.catalog.get(id).flags.has(Flags::COMMON), "its writer named no program");
    let more = pair.reader.core.begin_part(NOW, &request, (&look, parts[1].clone(), &located));
    assert!(!more.unwrap(), "the request was ended between two parts");
    assert!(pair.reader.core.leases.is_empty() && pair.fetches().is_empty());
}

#[test]
fn a_key_that_is_named_twice_is_waited_for_as_often() {
    let mut pair = pair(8, &[1, 2, 3, 4, 5]);
    let request = pair.request("r", &[1, 2, 2, 3, 4, 5]);
    let look = pair.reader.core.look_whole(&request).unwrap();
    let located = pair.locate(look.unknown());
    assert!(pair.reader.core.begin_part(NOW, &request, (&look, 0..3, &located)).unwrap());
    let fetches = pair.fetches();
    assert_eq!(fetches.len(), 2);
    pair.serve(&fetches);
    assert!(pair.reader.core.leases.values().all(|lease| lease.waiting == 0));
    pair.reader.release("r", 0, 0);
    assert!(pair.reader.core.leases.is_empty() && pair.reader.core.waiters.is_empty());
}

#[test]
fn a_block_that_is_being_written_here_ends_what_is_begun() {
    let mut pair = pair(8, &[1, 2, 3, 4, 5]);
    pair.reader.reserve(&[1, 2]);
    let request = pair.request("r", &[1, 2, 3, 4, 5]);
    let look = pair.reader.core.look_whole(&request).unwrap();
    assert_eq!(look.unknown().len(), 3, "somebody brings the others");
    let located = pair.locate(look.unknown());
    let part = look.parts(1, 1).next().unwrap();
    assert!(!pair.reader.core.begin_part(NOW, &request, (&look, part, &located)).unwrap());
    assert!(pair.fetches().is_empty());
}
