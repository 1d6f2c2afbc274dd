//! Tombstones against a naive model, and their bound.

use std::collections::btree_map::Entry;

use proptest::prelude::{prop_assert_eq, proptest};

use super::*;

const DAY_MS: u64 = 24 * 3600 * 1000;

fn node(n: u8) -> NodeId {
    NodeId::new(&format!("node-{n}")).unwrap()
}

fn block(n: u8) -> BlockKey {
    BlockKey::new([n; 32])
}

fn file(n: u8) -> TombAt {
    TombAt { burier: node(0), name: [n; 32] }
}

fn words(sections: impl IntoIterator<Item = (u8, Vec<Tomb>)>) -> Words {
    let sections = sections.into_iter().map(|(writer, tombs)| (node(writer), tombs)).collect();
    Words { said_ms: 1000, sections }
}

fn tomb(n: u8, up_to_sequence: u64) -> Tomb {
    Tomb { block: block_digest(&block(n)), up_to_sequence }
}

fn burial(writer: u8, n: u8, up_to_sequence: u64) -> Burial {
    Burial { writer: node(writer), block: block(n), up_to_sequence }
}

fn covers(tombs: &Tombstones, writer: u8, n: u8, sequence: u64) -> bool {
    tombs.covers(&node(writer), block_digest(&block(n)), sequence)
}

proptest! {
    /// As far as anybody said, as long as a file or a waiting word says anything of it.
    #[test]
    fn they_cover_what_a_naive_model_covers(
        ops in proptest::collection::vec((0u8..4, 0u8..6, 0u8..3, 0u8..4, 1u64..6), 1..60)
    ) {
        let mut tombs = Tombstones::new(1000);
        // What each file says, what waits, and the most that was said of what is dead.
        let mut files: BTreeMap<u8, (u8, u8, u64)> = BTreeMap::new();
        let mut waiting: BTreeMap<(u8, u8), u64> = BTreeMap::new();
        let mut dead: BTreeMap<(u8, u8), u64> = BTreeMap::new();
        for (op, name, writer, n, sequence) in ops {
            let key = (writer, n);
            match op {
                0 => {
                    tombs.bury(&[burial(writer, n, sequence)]).unwrap();
                    if dead.get(&key).is_none_or(|up_to| *up_to < sequence) {
                        waiting.insert(key, sequence);
                        dead.insert(key, sequence);
                    }
                }
                1 => {
                    tombs.insert(file(name), 1, &words([(writer, vec![tomb(n, sequence)])]));
                    if let Entry::Vacant(free) = files.entry(name) {
                        free.insert((writer, n, sequence));
                        let up_to = dead.entry(key).or_default();
                        *up_to = (*up_to).max(sequence);
                    }
                }
                2 => {
                    tombs.remove(&[file(name)]);
                    files.remove(&name);
                }
                // One of those that wait is written.
                _ => {
                    let sections = tombs.waiting(1);
                    let says = |w: u8, b: u8, up_to| {
                        sections.get(&node(w)).is_some_and(|tombs| tombs.contains(&tomb(b, up_to)))
                    };
                    let (name, found) = (name + 100, waiting.iter().find(|((w, b), up_to)| says(*w, *b, **up_to)));
                    if let (Some((&(w, b), &up_to)), Entry::Vacant(free)) = (found, files.entry(name)) {
                        tombs.written(file(name), 1, &Words { said_ms: 1, sections });
                        free.insert((w, b, up_to));
                        waiting.remove(&(w, b));
                    }
                }
            }
            let said = |key: &(u8, u8)| waiting.contains_key(key) || files.values().any(|(w, b, _)| (*w, *b) == *key);
            dead.retain(|key, _| said(key));
            prop_assert_eq!(tombs.len(), dead.len());
            for (w, b) in (0..3).flat_map(|w| (0..4).map(move |b| (w, b))) {
                let up_to = dead.get(&(w, b)).copied().unwrap_or(0);
                for sequence in 1..7 {
                    prop_assert_eq!(covers(&tombs, w, b, sequence), sequence <= up_to, "{} {} {}", w, b, sequence);
                }
            }
        }
    }
}

#[test]
fn beyond_the_bound_more_is_dead_never_less() {
    let mut tombs = Tombstones::new(3);
    tombs.bury(&[burial(1, 1, 5)]).unwrap();
    let many = words([
        (1, vec![tomb(2, 7), tomb(3, 4), tomb(4, 1), tomb(5, 1), tomb(6, 1)]),
        (2, vec![tomb(2, 9), tomb(3, 1)]),
    ]);
    assert!(!tombs.insert(file(1), 1, &many), "not each is kept");
    assert!(covers(&tombs, 1, 2, 7) && covers(&tombs, 1, 3, 4) && covers(&tombs, 2, 2, 9));
    assert!(covers(&tombs, 1, 9, 7) && !covers(&tombs, 1, 9, 8), "all that the writer wrote until then");
    let three: Vec<Burial> = (10..13).map(|n| burial(3, n, 1)).collect();
    assert!(matches!(tombs.bury(&three), Err(StorageError::Full)));
    assert!(!covers(&tombs, 3, 10, 1), "a refusal buries nothing");
    // What is covered as a whole is said of the block all the same: others may have room for each.
    tombs.bury(&[burial(1, 9, 6), burial(1, 1, 5)]).unwrap();
    tombs.remove(&[file(1)]);
    assert!(covers(&tombs, 1, 9, 6) && !covers(&tombs, 1, 9, 7) && covers(&tombs, 1, 1, 5));
    assert_eq!((tombs.newest_of(&node(1)), tombs.newest_of(&node(2))), (6, 0));
}

#[test]
fn nothing_is_ready_while_a_known_file_is_unread() {
    let mut tombs = Tombstones::new(3);
    assert!(!tombs.is_ready());
    tombs.set_listed(1);
    tombs.set_unread(file(1), 1);
    tombs.set_unread(file(2), 1);
    assert!(!tombs.is_ready());
    tombs.insert(file(1), 1, &words([]));
    assert!(!tombs.is_ready());
    tombs.set_unread(file(1), 1);
    tombs.set_listed(1);
    assert!(!tombs.is_ready(), "that listing began before it was known of, and may not show it");
    tombs.set_listed(2);
    assert!(tombs.is_ready(), "it became part of another, which was read");
}

#[test]
fn shields_end() {
    let (mut tombs, now) = (Tombstones::new(3), Instant::now());
    let digest = |n| block_digest(&block(n));
    tombs.shield([digest(1)], now, Duration::from_secs(60));
    tombs.shield([digest(2)], now, Duration::ZERO);
    assert_eq!([1, 2, 3].map(|n| tombs.is_shielded(digest(n))), [true, false, false]);
}

#[test]
fn a_file_is_useless_once_every_pack_of_its_writers_is_newer() {
    let mut tombs = Tombstones::new(100);
    tombs.insert(file(1), 1, &words([(1, vec![tomb(1, 1)]), (2, vec![tomb(1, 1)])]));
    let useless = |oldest: &[(u8, u64)], now_ms| {
        let oldest = oldest.iter().map(|(n, at)| (node(*n), *at)).collect();
        tombs.is_useless(&file(1), &oldest, now_ms)
    };
    let later = 1000 + DAY_MS + 1;
    assert!(useless(&[], later), "no pack of its writers is left");
    assert!(useless(&[(1, later), (3, 1)], later), "others' do not matter");
    assert!(!useless(&[(1, later), (2, later - 1)], later));
    assert!(!useless(&[], later - 1), "what was on its way may not be listed yet");
}

#[test]
fn many_files_of_a_week_become_one_that_says_the_same() {
    let mut tombs = Tombstones::new(10_000);
    let all = |tombs: &Tombstones, of: u8| tombs.mergeable(&node(of), 1000, |_| true);
    for n in 0..u8::try_from(MERGE_FILES).unwrap() {
        assert_eq!(all(&tombs, 0), None);
        let other_week = Words { said_ms: 10 * WEEK_MS, ..words([(1, vec![tomb(100 + n, 1)])]) };
        if n > 0 {
            tombs.insert(file(100 + n), 1, &other_week);
        }
        tombs.insert(file(n), 1, &words([(1, vec![tomb(n % 20, u64::from(n))])]));
    }
    assert_eq!(all(&tombs, 5), None, "of this node only");
    assert_eq!(tombs.mergeable(&node(0), 1000, |at| *at != file(3)), None, "one is part of another already");
    let (files, merged) = all(&tombs, 0).unwrap();
    assert_eq!((files.len(), merged.sections[&node(1)].len(), merged.said_ms), (MERGE_FILES, 20, 1000));
    tombs.insert(file(200), 1, &merged);
    tombs.remove(&files);
    assert!((0..32).all(|n| covers(&tombs, 1, n % 20, u64::from(n))));
    assert_eq!(tombs.len(), 20 + MERGE_FILES - 1);
}
