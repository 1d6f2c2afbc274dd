use std::collections::BTreeMap;
use std::time::Duration;

use kvtier_types::{BlockHints, BlockKey, Instant, LayoutId, NamespaceId, RecordMeta, ShardKey, TenantId};

use super::{ExportNumber, HEAD_START, PeerSession, ReadEnd, SessionAction, SessionConfig, Wanted};
use crate::core::{FetchEnd, MoveId};

fn at(millis: u64) -> Instant {
    Instant::ZERO + Duration::from_millis(millis)
}

fn wanted(n: u8, bytes: u64) -> Wanted {
    let key = ShardKey { block: BlockKey::new([n; 32]), layout: LayoutId::new([1; 32]), shard: 0 };
    Wanted { id: MoveId::new(u64::from(n)), key, bytes, deadline: at(5_000) }
}

fn meta(shard: &Wanted) -> RecordMeta {
    RecordMeta {
        key: shard.key,
        namespace: NamespaceId::new([2; 32]),
        tenant: TenantId::shared(),
        hints: BlockHints::default(),
        parent: None,
        depth_blocks: 0,
        group: 0,
        needs_ancestors: true,
        model: "m".into(),
        bytes: shard.bytes,
        checksum: 7,
        sequence: 1,
        expires_ms: None,
    }
}

fn drain(session: &mut PeerSession<u8>) -> Vec<SessionAction<u8>> {
    std::iter::from_fn(|| session.poll_action()).collect()
}

fn config() -> SessionConfig {
    SessionConfig { window_bytes: 250, max_exports: 2, ttl: Duration::from_secs(3), ..SessionConfig::default() }
}

#[test]
fn small_shards_share_an_export_and_the_window_bounds_what_is_asked() {
    let mut session = PeerSession::new(config());
    let shards: Vec<Wanted> = (1..=4).map(|n| wanted(n, 100)).collect();
    session.want_all(at(0), shards.clone());
    let actions = drain(&mut session);
    let [SessionAction::Export { export, keys, .. }] = actions.as_slice() else { panic!("{actions:?}") };
    assert_eq!(keys.len(), 2, "the window holds two");
    session.granted(at(1), *export, vec![Some((1, meta(&shards[0]))), None]);
    let actions = drain(&mut session);
    assert!(matches!(actions[0], SessionAction::Read { id, .. } if id == shards[0].id));
    assert_eq!(actions[1], SessionAction::Ended { id: shards[1].id, end: FetchEnd::Gone });
    session.read_ended(at(2), *export, shards[0].id, ReadEnd::Arrived { checksum: 7 });
    let actions = drain(&mut session);
    assert!(matches!(&actions[0], SessionAction::Ended { end: FetchEnd::Done(_), .. }), "{actions:?}");
    assert_eq!(actions[1], SessionAction::Release { export: *export });
    assert!(matches!(&actions[2], SessionAction::Export { keys, .. } if keys.len() == 2));
}

#[test]
fn exports_begin_short_and_grow_once_they_are_answered() {
    let config = SessionConfig { window_bytes: 1 << 20, max_exports: 3, max_shards: 100, ..config() };
    let mut session: PeerSession<u8> = PeerSession::new(config);
    let shards: Vec<Wanted> = (0..250).map(|n| wanted(n, 1)).collect();
    session.want_all(at(0), shards.clone());
    assert_eq!(asked(&mut session), [(1, 16)], "the first one has the peer for itself");
    let end = session.poll_timeout().unwrap();
    assert_eq!(end, at(0) + HEAD_START);
    session.expire(end);
    assert_eq!(asked(&mut session), [(2, 16), (3, 16)], "short ones wait behind nothing long");
    assert!(session.poll_timeout().unwrap() > end, "it has passed");
    let answer = |session: &mut PeerSession<u8>, export: u64, of: &[Wanted]| {
        session.granted(at(1), ExportNumber(export), of.iter().map(|s| Some((1, meta(s)))).collect());
        for shard in of {
            let checksum = meta(shard).checksum;
            session.read_ended(at(1), ExportNumber(export), shard.id, ReadEnd::Arrived { checksum });
        }
    };
    answer(&mut session, 1, &shards[..16]);
    assert_eq!(asked(&mut session), [(4, 16)], "others are not answered yet");
    answer(&mut session, 2, &shards[16..32]);
    assert_eq!(asked(&mut session), [(5, 100)], "as long as is allowed, now that the peer answers");
}

#[test]
fn shards_that_are_wanted_behind_a_slow_export_are_asked_for_at_once() {
    let mut session: PeerSession<u8> = PeerSession::new(SessionConfig { max_exports: 2, ..config() });
    session.want(at(0), wanted(1, 10));
    session.want(at(0), wanted(2, 10));
    assert_eq!(asked(&mut session), [(1, 1)], "a few milliseconds later");
    session.want(at(5), wanted(3, 10));
    assert_eq!(asked(&mut session), [(2, 2)]);
}

#[test]
fn what_waits_for_a_peer_that_does_not_answer_is_given_up_with_what_was_asked() {
    for is_refused in [true, false] {
        let mut session: PeerSession<u8> = PeerSession::new(SessionConfig { max_exports: 1, ..config() });
        session.want_all(at(0), (1..=40).map(|n| wanted(n, 1)));
        assert_eq!(asked(&mut session), [(1, 16)]);
        match is_refused {
            true => session.refused(at(1), ExportNumber(1), false),
            false => session.expire(at(0) + SessionConfig::default().answer),
        }
        let actions = drain(&mut session);
        let failed = |a: &&SessionAction<u8>| matches!(a, SessionAction::Ended { end: FetchEnd::Failed, .. });
        assert_eq!(actions.iter().filter(failed).count(), 40, "{actions:?}");
        assert_eq!(actions.iter().filter(|a| matches!(a, SessionAction::Unreachable)).count(), 1);
        assert!(session.is_idle());
    }
}

/// Numbers of exports asked for since, and how many shards each has.
fn asked(session: &mut PeerSession<u8>) -> Vec<(u64, usize)> {
    let of = |action| match action {
        SessionAction::Export { export, keys, .. } => Some((export.0, keys.len())),
        _ => None,
    };
    drain(session).into_iter().filter_map(of).collect()
}

#[test]
fn a_shard_larger_than_the_window_is_asked_for_alone() {
    let mut session: PeerSession<u8> = PeerSession::new(config());
    session.want_all(at(0), [wanted(1, 1_000), wanted(2, 10)]);
    let actions = drain(&mut session);
    assert!(matches!(&actions[..], [SessionAction::Export { keys, .. }] if keys.len() == 1));
}

#[test]
fn bytes_that_arrive_after_the_lease_do_not_count() {
    let mut session = PeerSession::new(config());
    let shard = wanted(1, 10);
    session.want(at(0), shard);
    drain(&mut session);
    session.granted(at(1), ExportNumber(1), vec![Some((1, meta(&shard)))]);
    drain(&mut session);
    // The lease of three seconds ends after two as the reader reckons.
    session.expire(at(2_000));
    let actions = drain(&mut session);
    assert_eq!(
        actions,
        [SessionAction::Stop { id: shard.id }, SessionAction::Ended { id: shard.id, end: FetchEnd::Failed }]
    );
    session.read_ended(at(2_100), ExportNumber(1), shard.id, ReadEnd::Arrived { checksum: 7 });
    assert_eq!(
        drain(&mut session),
        [SessionAction::Release { export: ExportNumber(1) }],
        "released once the read ended"
    );
    assert!(session.is_idle());
}

#[test]
fn wrong_bytes_and_wrong_shards_are_told_apart_from_silence() {
    let mut session = PeerSession::new(SessionConfig { max_exports: 8, ..config() });
    let shards: Vec<Wanted> = (1..=3).map(|n| wanted(n, 200)).collect();
    for shard in &shards {
        session.want(at(0), *shard);
    }
    drain(&mut session);
    session.granted(at(1), ExportNumber(1), vec![Some((1, meta(&shards[0])))]);
    session.read_ended(at(2), ExportNumber(1), shards[0].id, ReadEnd::Arrived { checksum: 8 });
    let actions = drain(&mut session);
    assert!(actions.contains(&SessionAction::Ended { id: shards[0].id, end: FetchEnd::Corrupt }), "{actions:?}");
    session.granted(at(3), ExportNumber(2), vec![Some((1, meta(&shards[0])))]);
    let actions = drain(&mut session);
    assert!(actions.contains(&SessionAction::Ended { id: shards[1].id, end: FetchEnd::Gone }), "another shard's bytes");
    session.expire(at(4_000));
    let actions = drain(&mut session);
    assert!(actions.contains(&SessionAction::Ended { id: shards[2].id, end: FetchEnd::Failed }), "{actions:?}");
    assert!(actions.contains(&SessionAction::Unreachable));
    session.granted(at(4_001), ExportNumber(3), vec![Some((1, meta(&shards[2])))]);
    assert_eq!(drain(&mut session), [SessionAction::Release { export: ExportNumber(3) }], "a late grant is given back");
}

#[test]
fn every_shard_ends_once() {
    // A small deterministic storm: answers, failures, cancellations and time in every order that the seed gives.
    for seed in 0..200_u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = |n: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % n
        };
        let mut session = PeerSession::new(config());
        let shards: BTreeMap<MoveId, Wanted> =
            (1..=40).map(|n| wanted(n, 1 + random(120))).map(|w| (w.id, w)).collect();
        let mut ends: BTreeMap<MoveId, usize> = BTreeMap::new();
        let mut cancelled = 0;
        session.want_all(at(0), shards.values().copied());
        let mut open: Vec<SessionAction<u8>> = Vec::new();
        for step in 0..400 {
            let now = at(step * 40);
            for action in drain(&mut session) {
                match action {
                    SessionAction::Ended { id, .. } => *ends.entry(id).or_default() += 1,
                    other => open.push(other),
                }
            }
            if random(20) == 0 {
                let id = MoveId::new(1 + random(40));
                if let std::collections::btree_map::Entry::Vacant(end) = ends.entry(id) {
                    session.cancel(now, id);
                    end.insert(1);
                    cancelled += 1;
                }
            }
            if open.is_empty() || random(3) == 0 {
                session.expire(now);
                continue;
            }
            let at_random = usize::try_from(random(open.len() as u64)).unwrap();
            match open.swap_remove(at_random) {
                SessionAction::Export { export, keys, .. } => match random(4) {
                    0 => session.refused(now, export, random(2) == 0),
                    1 => {}
                    _ => {
                        let of_key = |key| shards.values().find(|w| w.key == key).map(|w| (0, meta(w)));
                        session.granted(now, export, keys.into_iter().map(of_key).collect());
                    }
                },
                SessionAction::Read { export, id, .. } => {
                    let end = [ReadEnd::Arrived { checksum: 7 }, ReadEnd::Gone, ReadEnd::LinkDown, ReadEnd::Failed];
                    session.read_ended(now, export, id, end[usize::try_from(random(4)).unwrap()]);
                }
                _ => {}
            }
        }
        session.expire(at(100_000));
        for action in drain(&mut session) {
            if let SessionAction::Ended { id, .. } = action {
                *ends.entry(id).or_default() += 1;
            }
        }
        assert_eq!(ends.len(), 40, "seed {seed}: every shard ends ({cancelled} were cancelled)");
        assert!(ends.values().all(|n| *n == 1), "seed {seed}: {ends:?}");
    }
}

#[test]
fn a_shard_given_up_before_the_answer_costs_the_others_nothing() {
    let mut session = PeerSession::new(SessionConfig { window_bytes: 1_000, ..config() });
    let shards: Vec<Wanted> = (1..=3).map(|n| wanted(n, 100)).collect();
    session.want_all(at(0), shards.clone());
    drain(&mut session);
    session.cancel(at(1), shards[0].id);
    session.granted(at(2), ExportNumber(1), shards.iter().map(|w| Some((1, meta(w)))).collect());
    let actions = drain(&mut session);
    let reads = actions.iter().filter(|a| matches!(a, SessionAction::Read { .. })).count();
    assert_eq!((reads, actions.len()), (2, 2), "{actions:?}");
}

#[test]
fn a_short_answer_ends_every_shard() {
    let mut session = PeerSession::new(SessionConfig { window_bytes: 1_000, ..config() });
    let shards: Vec<Wanted> = (1..=3).map(|n| wanted(n, 100)).collect();
    session.want_all(at(0), shards.clone());
    drain(&mut session);
    session.granted(at(1), ExportNumber(1), vec![Some((1, meta(&shards[0])))]);
    let actions = drain(&mut session);
    let gone = actions.iter().filter(|a| matches!(a, SessionAction::Ended { end: FetchEnd::Gone, .. })).count();
    assert_eq!((gone, actions.len()), (2, 3), "{actions:?}");
}
