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
    #[test]
    fn they_cover_what_a_naive_model_covers(
        ops in proptest::collection::vec((0u8..4, 0u8..6, 0u8..3, 0u8..4, 1u64..6), 1..60)
    ) {
        let mut tombs = Tombstones::new(1000);
        // What each file says, and what waits.
        let mut files: BTreeMap<u8, (u8, u8, u64)> = BTreeMap::new();
        let mut waiting: BTreeMap<(u8, u8), u64> = BTreeMap::new();
        for (op, name, writer, n, sequence) in ops {
            let dead = |w, b, files: &BTreeMap<u8, (u8, u8, u64)>, waiting: &BTreeMap<(u8, u8), u64>| {
                let of_files = files.values().filter(|(fw, fb, _)| (*fw, *fb) == (w, b)).map(|(_, _, up_to)| *up_to);
                of_files.chain(waiting.get(&(w, b)).copied()).max().unwrap_or(0)
            };
            match op {
                0 => {
                    tombs.bury(&[burial(writer, n, sequence)]).unwrap();
                    if dead(writer, n, &files, &waiting) < sequence {
                        waiting.insert((writer, n), sequence);
                    }
                }
                1 => {
                    let sections = Sections::from([(node(writer), vec![tomb(n, sequence)])]);
                    tombs.insert(file(name), 1, 1, &sections);
                    files.entry(name).or_insert((writer, n, sequence));
                }
                2 => {
                    tombs.remove(&[file(name)]);
                    files.remove(&name);
                }
                // One of those that wait is written.
                _ => {
                    let sections = tombs.waiting(1);
                    if let Some(((w, b), up_to)) = waiting.clone().into_iter().find(|((w, b), up_to)| {
                        sections.get(&node(*w)).is_some_and(|tombs| tombs.contains(&tomb(*b, *up_to)))
                    }) {
                        let name = name + 100;
                        if let Entry::Vacant(free) = files.entry(name) {
                            tombs.insert(file(name), 1, 1, &sections);
                            tombs.written(&sections);
                            free.insert((w, b, up_to));
                            waiting.remove(&(w, b));
                        }
                    }
                }
            }
            prop_assert_eq!(tombs.len(), files.len() + waiting.len());
            for (w, b) in (0..3).flat_map(|w| (0..4).map(move |b| (w, b))) {
                let up_to = dead(w, b, &files, &waiting);
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
    let sections = Sections::from([(node(1), vec![tomb(2, 7), tomb(3, 4)]), (node(2), vec![tomb(2, 9)])]);
    assert!(!tombs.insert(file(1), 1, 1, &sections), "not each is kept");
    assert!(covers(&tombs, 1, 2, 7) && covers(&tombs, 1, 3, 4) && covers(&tombs, 2, 2, 9));
    assert!(covers(&tombs, 1, 9, 7) && !covers(&tombs, 1, 9, 8), "all that the writer wrote until then");
    let many: Vec<Burial> = (10..13).map(|n| burial(3, n, 1)).collect();
    assert!(matches!(tombs.bury(&many), Err(StorageError::Full)));
    assert!(!covers(&tombs, 3, 10, 1), "a refusal buries nothing");
    tombs.remove(&[file(1)]);
    assert!(!covers(&tombs, 1, 9, 7) && covers(&tombs, 1, 1, 5));
}

#[test]
fn a_file_is_useless_once_every_pack_of_its_writers_is_newer() {
    let mut tombs = Tombstones::new(100);
    let sections = Sections::from([(node(1), vec![tomb(1, 1)]), (node(2), vec![tomb(1, 1)])]);
    tombs.insert(file(1), 1000, 1, &sections);
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
fn many_files_become_one_that_says_the_same() {
    let mut tombs = Tombstones::new(10_000);
    for n in 0..u8::try_from(MERGE_FILES).unwrap() {
        assert_eq!(tombs.mergeable(&node(0), 1000), None);
        tombs.insert(file(n), 1, 1, &Sections::from([(node(1), vec![tomb(n % 20, u64::from(n))])]));
    }
    assert_eq!(tombs.mergeable(&node(5), 1000), None, "of this node only");
    let (files, sections) = tombs.mergeable(&node(0), 1000).unwrap();
    assert_eq!((files.len(), sections[&node(1)].len()), (MERGE_FILES, 20));
    tombs.insert(file(200), 1, 1, &sections);
    tombs.remove(&files);
    assert!((0..32).all(|n| covers(&tombs, 1, n % 20, u64::from(n))));
    assert_eq!(tombs.len(), 20);
}
