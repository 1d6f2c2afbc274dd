//! The index against a naive model, and its memory.

use std::fs;
use std::process::Command;

use kvtier_types::NodeId;
use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

use super::*;
use crate::conformance::meta;
use crate::object::pack::PackName;

fn at(n: u8) -> PackAt {
    PackAt { writer: NodeId::new("a").unwrap(), name: PackName([n; 32]) }
}

fn listed(n: u8, modified_ms: u64) -> Listed {
    Listed { modified_ms, at: at(n), bytes: 1000 }
}

fn entry(key: u64, checksum: u64) -> Entry {
    let mut meta = meta(key, b"payload");
    meta.checksum = checksum;
    Entry { offset: key * 1000, header_bytes: 400, meta }
}

fn key(n: u64) -> ShardKey {
    meta(n, b"payload").key
}

/// An index to which nothing is dead.
fn known(max_records: usize) -> Index {
    let mut index = Index::new(max_records);
    index.tombs.set_listed(0);
    index
}

#[test]
fn a_pack_learnt_since_a_listing_began_is_not_dropped_by_it() {
    let mut index = known(100);
    index.insert(listed(1, 1), Slots::of(&[entry(1, 1)]));
    let listing = index.begin_listing();
    index.insert(listed(2, 2), Slots::of(&[entry(2, 2)]));
    assert_eq!(index.drop_absent(0, listing, |_| false), (1, None));
    assert!(index.find(&key(1)).is_none() && index.find(&key(2)).is_some());
    let listing = index.begin_listing();
    assert_eq!(index.drop_absent(0, listing, |_| false), (1, None));
    assert_eq!(index.usage(), FloorUsage::default());
}

#[test]
fn every_field_of_a_record_comes_back() {
    let mut index = known(100);
    index.insert(listed(7, 1), Slots::of(&[entry(3, 0xfedc_ba98_7654_3210)]));
    let found = index.find(&key(3)).unwrap();
    let expected = FloorRecord {
        writer: NodeId::new("a").unwrap(),
        pack: [7; 32],
        offset: 3000,
        header_bytes: 400,
        bytes: 7,
        checksum: 0xfedc_ba98_7654_3210,
    };
    assert_eq!(found, expected);
}

proptest! {
    /// Packs of up to 4 of 8 keys come and go; the ages decide who stays.
    #[test]
    fn it_holds_what_a_naive_model_holds(ops in proptest::collection::vec((0u8..6, 0u8..16, 0u64..8, 1u64..5), 1..80)) {
        const MOST: usize = 10;
        let mut index = known(MOST);
        let mut model: BTreeMap<u8, (u64, BTreeSet<u64>)> = BTreeMap::new();
        for (op, pack, first, count) in ops {
            let age = u64::from(pack);
            match op {
                0 => {
                    index.drop_pack(&at(pack));
                    model.remove(&pack);
                }
                1 => {
                    if let Some(record) = index.find(&key(first)) {
                        index.drop_record(&key(first), &record);
                        model.get_mut(&record.pack[0]).unwrap().1.remove(&first);
                    }
                }
                _ => {
                    let keys: BTreeSet<u64> = (first..first + count).collect();
                    let entries: Vec<Entry> = keys.iter().map(|&k| entry(k, k)).collect();
                    let before = index.usage().records;
                    if index.insert(listed(pack, age), Slots::of(&entries)) {
                        model.retain(|n, _| index.knows(&at(*n)));
                        model.insert(pack, (age, keys));
                    } else if !model.contains_key(&pack) {
                        model.retain(|n, _| index.knows(&at(*n)));
                        prop_assert!(before + entries.len() > MOST, "left out for want of room only");
                        prop_assert!(index.is_too_old(age));
                    }
                }
            }
            prop_assert!(index.usage().records <= MOST);
            prop_assert_eq!(index.usage().packs, model.len());
            for k in 0..12 {
                let newest = model.values().filter(|(_, keys)| keys.contains(&k)).map(|(age, _)| *age).max();
                let found = index.find(&key(k)).map(|record| u64::from(record.pack[0]));
                prop_assert_eq!(found, newest, "key {}", k);
            }
        }
    }
}

/// Resident memory of this process, in pages of 4 KiB.
fn resident_pages() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Measured in a process of its own: this test runs itself.
#[test]
fn a_record_takes_at_most_64_bytes() {
    const CHILD: &str = "KVTIER_TEST_MEASURE_INDEX";
    const PACKS: u32 = 200;
    const RECORDS: u32 = 2000;
    if std::env::var_os(CHILD).is_none() {
        let name = std::thread::current().name().unwrap().to_owned();
        let child = Command::new(std::env::current_exe().unwrap()).args(["--exact", &name]).env(CHILD, "1").output();
        let child = child.unwrap();
        let said = String::from_utf8_lossy(&child.stdout).into_owned();
        assert!(child.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let mut index = known((PACKS * RECORDS) as usize);
    let before = resident_pages();
    for pack in 0..PACKS {
        let numbers = (0..RECORDS).map(|n| u64::from(pack * RECORDS + n));
        let entries: Vec<Entry> = numbers.map(|n| Entry { offset: 0, ..entry(n, n) }).collect();
        let name = PackName(*blake3::hash(&pack.to_le_bytes()).as_bytes());
        let at = PackAt { writer: NodeId::new("a").unwrap(), name };
        assert!(index.insert(Listed { modified_ms: u64::from(pack), at, bytes: 1 }, Slots::of(&entries)));
    }
    let each = (resident_pages() - before) * 4096 / u64::from(PACKS * RECORDS);
    assert_eq!(index.usage().records, (PACKS * RECORDS) as usize);
    println!("{each} bytes a record");
    assert!((40..=64).contains(&each), "{each} bytes a record");
}
