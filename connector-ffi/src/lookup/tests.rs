use super::answer::{Answer, Hit, RangeKeys};
use super::table::Settlement;
use super::{HitPoll, Lookups, MAX_BLOCK_SHARDS, Query, RELEASES_PER_LOOKUP, ranges};
use crate::counters::Counters;
use crate::keys::KeySpace;
use crate::link::tests::attachment;
use crate::report::Reports;
use crate::report::releases::EndedRequest;
use crate::shared::Shared;
use crate::spec::Spec;
use crate::spec::tests::sample;
use bytes::Bytes;
use kvtier_proto::v1;
use kvtier_types::EngineHash;
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

fn query(hashes: u32, local_tokens: u32) -> Query {
    let hash = |i: u32| {
        let mut bytes = [7; 32];
        bytes[..4].copy_from_slice(&i.to_le_bytes());
        EngineHash::new(&bytes).unwrap()
    };
    Query {
        request_id: "r".into(),
        hashes: (0..hashes).map(hash).collect(),
        local_tokens,
        cache_salt: String::new(),
        hints: Bytes::new(),
        deadline: Duration::from_secs(1),
    }
}

fn hybrid() -> (Spec, KeySpace) {
    let mut spec = sample();
    spec["layout"]["shards"] = json!(2);
    spec["layout"]["groups"] = json!([
        {"kind": "full", "block_tokens": 16, "layers": ["a"]},
        {"kind": "state", "block_tokens": 64, "layers": ["b"]},
    ]);
    spec["layout"]["block_bytes"] = json!([64, 64]);
    let spec = Spec::parse(&spec.to_string()).unwrap();
    let keys = KeySpace::new(spec.namespace.clone(), &spec.layout.groups);
    (spec, keys)
}

#[test]
fn every_group_is_asked_at_its_own_granularity_from_the_first_block_not_held() {
    let (spec, keys) = hybrid();
    let asked = ranges(&keys, &query(10, 100), &spec.layout);
    let shape: Vec<_> = asked.iter().map(|r| (r.first_block, r.keys.len())).collect();
    assert_eq!(shape, [(6, 4), (1, 1)], "160 tokens are 10 blocks and 2.5 blocks; 100 tokens hold 6 and 1 of them");
    let all = ranges(&keys, &query(10, 0), &spec.layout);
    assert_eq!(asked[0].keys, all[0].keys[6..]);
    assert_eq!(asked[1].keys, all[1].keys[1..]);
}

#[test]
fn a_prefix_too_long_for_a_reply_is_asked_in_part() {
    let (spec, keys) = hybrid();
    let many = u32::try_from(MAX_BLOCK_SHARDS).unwrap();
    for local_tokens in [0, 1600, u32::MAX] {
        let asked = ranges(&keys, &query(many, local_tokens), &spec.layout);
        let shards: usize = asked.iter().map(|r| r.keys.len() * 2).sum();
        assert!(shards <= MAX_BLOCK_SHARDS, "{local_tokens}: {shards}");
    }
    assert!(ranges(&keys, &query(0, 0), &spec.layout).iter().all(|r| r.keys.is_empty()));
}

/// What a session shares that is attached to a daemon that does not answer.
fn attached() -> Arc<Shared> {
    let counters = Arc::new(Counters::default());
    let (reports, _queue) = Reports::new(Arc::clone(&counters));
    let spec = Spec::parse(&sample().to_string()).unwrap();
    let shared = Arc::new(Shared::new(spec, None, (counters, reports)));
    shared.link.attached(attachment(&shared, [5; 16], Path::new("/nonexistent")), String::new());
    shared
}

#[tokio::test]
async fn only_an_answer_that_is_owed_makes_the_daemon_silent() {
    let shared = attached();
    let (lookups, epoch, now) = (Lookups::new(2), shared.link.epoch(), Instant::now());
    let is_silent = || shared.link.current().unwrap().silent.load(Ordering::Relaxed);
    let nothing = HitPoll::Ready(Hit::default());
    let asked = vec![RangeKeys { first_block: 0, keys: Vec::new() }];
    let reply = v1::LookupReply { ranges: vec![v1::RangeFrames::default()] };
    let answer = Answer::check(asked, reply, &shared.spec.layout).unwrap();
    let late = lookups.table.lock().begin("late", epoch, now).unwrap();
    lookups.table.lock().end(late, Some(answer), now);
    assert_eq!(lookups.poll(&shared, "late", 0, 1000), nothing);
    assert_eq!(shared.counters.lookups_expired.get(), 1);
    assert!(!is_silent(), "the daemon has answered");
    lookups.table.lock().begin("owed", epoch, now).unwrap();
    assert_eq!(lookups.poll(&shared, "owed", 0, 1000), nothing);
    assert_eq!(shared.counters.lookups_expired.get(), 2);
    assert!(is_silent());
}

#[tokio::test]
async fn a_daemon_that_takes_no_releases_is_asked_for_no_more_leases() {
    let shared = attached();
    let lookups = Arc::new(Lookups::new(1));
    lookups.submit(&shared, &Handle::current(), query(1, 0)).unwrap();
    assert_eq!(lookups.poll(&shared, "r", 0, 1000), HitPoll::Pending);
    let epoch = shared.link.epoch().unwrap();
    for number in 0..RELEASES_PER_LOOKUP {
        let settlement = Settlement::default();
        shared.reports.release(EndedRequest { epoch, request_id: number.to_string(), settlement });
    }
    lookups.submit(&shared, &Handle::current(), query(1, 0)).unwrap();
    assert_eq!(lookups.poll(&shared, "r", 0, 1000), HitPoll::Ready(Hit::default()));
    assert_eq!(shared.counters.lookups_unavailable.get(), 1);
}

/// Not a benchmark: a guard against a tenfold slowdown (hashing a key's 150 bytes takes a few hundred nanoseconds).
#[test]
fn deriving_a_thousand_keys_is_fast() {
    let spec = Spec::parse(&sample().to_string()).unwrap();
    let keys = KeySpace::new(spec.namespace.clone(), &spec.layout.groups);
    let query = query(1000, 0);
    let best = (0..20).map(|_| {
        let start = Instant::now();
        assert_eq!(ranges(&keys, &query, &spec.layout)[0].keys.len(), 1000);
        start.elapsed()
    });
    let best = best.min().unwrap();
    println!("1,000 keys in {best:?}");
    assert!(best < Duration::from_millis(5), "{best:?}");
}
