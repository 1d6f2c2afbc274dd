//! Crashes at every byte, damage, newer formats, compaction.

use std::fs;

use kvtier_types::{BlockKey, LayoutId};
use proptest::prelude::{any, proptest};

use super::format::{HEADER_BYTES, Parsed};
use super::*;
use crate::codec::{Writer, crc64};

fn key(n: u64) -> ShardKey {
    let mut digest = [7; 32];
    digest[..8].copy_from_slice(&n.to_le_bytes());
    ShardKey { block: BlockKey::new(digest), layout: LayoutId::new([1; 32]), shard: 0 }
}

fn evicted(n: u64) -> Entry {
    Entry::Evicted { key: key(n), up_to_sequence: n * 10 }
}

/// Batches and the file they make.
fn file(batches: &[Vec<Entry>]) -> Vec<u8> {
    let mut bytes = encode_header();
    batches.iter().for_each(|batch| bytes.extend(encode_frame(batch)));
    bytes
}

fn batches() -> Vec<Vec<Entry>> {
    vec![
        vec![Entry::Incarnation(3)],
        vec![evicted(1), evicted(2)],
        vec![evicted(3)],
        vec![Entry::Incarnation(4), evicted(1)],
    ]
}

fn facts(batches: &[Vec<Entry>]) -> Facts {
    let mut facts = Facts::default();
    batches.iter().flatten().for_each(|entry| facts.apply(entry));
    facts
}

fn open_bytes(bytes: &[u8]) -> (tempfile::TempDir, Result<(Journal, JournalState), StorageError>) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(FILE), bytes).unwrap();
    let opened = Journal::open(dir.path());
    (dir, opened)
}

#[test]
fn what_was_appended_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, state) = Journal::open(&dir.path().join("a/b")).unwrap();
    assert!(state.created && !state.damaged && state.notes.is_empty());
    for batch in batches() {
        journal.append(&batch).unwrap();
    }
    drop(journal);
    for _ in 0..2 {
        let (_journal, state) = Journal::open(&dir.path().join("a/b")).unwrap();
        assert!(!state.created && !state.damaged && state.notes.is_empty(), "{state:?}");
        assert_eq!(state.incarnation, 4);
        assert_eq!(state.evicted, facts(&batches()).evicted);
    }
}

#[test]
fn torn_at_every_byte_it_holds_whole_appends_only() {
    let batches = batches();
    let bytes = file(&batches);
    let ends: Vec<usize> = (0..=batches.len()).map(|n| file(&batches[..n]).len()).collect();
    for cut in HEADER_BYTES..bytes.len() {
        // The tail is missing, or allocated but never written, or something else.
        for (fill, len) in [(0, 0), (0, 100), (0x5a, bytes.len() - cut)] {
            let torn = [&bytes[..cut], &vec![fill; len]].concat();
            let whole = ends.iter().filter(|end| **end <= cut).count() - 1;
            let parsed = parse(&torn).unwrap();
            assert_eq!((parsed.whole_bytes, parsed.damaged_at), (ends[whole], None), "cut at {cut}");
            assert_eq!(parsed.facts, facts(&batches[..whole]), "cut at {cut}");
            // Opening syncs files, so it is tried at some of the cuts.
            if cut % 13 != 0 && !ends.contains(&cut) {
                continue;
            }
            let (_dir, opened) = open_bytes(&torn);
            let (journal, state) = opened.unwrap();
            assert_eq!(state.evicted, facts(&batches[..whole]).evicted, "cut at {cut}");
            assert_eq!(state.incarnation, facts(&batches[..whole]).incarnation);
            assert!(!state.damaged, "a torn tail is no damage: cut at {cut}");
            assert_eq!(state.notes.is_empty(), ends.contains(&cut) && len == 0);
            journal.append(&[evicted(9)]).unwrap();
        }
    }
}

#[test]
fn damage_before_the_tail_is_told_and_kept() {
    let batches = batches();
    let bytes = file(&batches);
    let last = file(&batches[..batches.len() - 1]).len();
    for at in 0..last {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x20;
        assert!(parse(&damaged).unwrap().damaged_at.is_some(), "byte {at}");
        if at % 7 != 0 {
            continue;
        }
        let (dir, opened) = open_bytes(&damaged);
        let (journal, state) = opened.unwrap();
        assert!(state.damaged, "byte {at}");
        assert!(state.notes[0].contains("journal.corrupt-0"), "{:?}", state.notes);
        assert_eq!(fs::read(dir.path().join("journal.corrupt-0")).unwrap(), damaged);
        assert!(state.evicted.contains_key(&key(1)), "what is whole counts");
        let all = facts(&batches);
        assert!(state.evicted.iter().all(|(key, sequence)| all.evicted[key] >= *sequence), "nothing is made up");
        drop(journal);
        let (_journal, again) = Journal::open(dir.path()).unwrap();
        assert!(!again.damaged, "told once");
        assert_eq!(again.evicted, state.evicted);
    }
}

#[test]
fn a_file_without_a_header_is_damage() {
    for bytes in [&b""[..], b"KVT", &[0; 4096]] {
        let (_dir, opened) = open_bytes(bytes);
        assert!(opened.unwrap().1.damaged, "{bytes:?}");
    }
}

#[test]
fn newer_files_are_refused_and_left_alone() {
    let mut version = Vec::new();
    Writer(&mut version).raw(b"KVTJNL\0\n").u32(2);
    let crc = crc64(&version);
    Writer(&mut version).u64(crc);
    let mut kind = encode_header();
    let mut frame = Vec::new();
    Writer(&mut frame).u32(4).u8(200).u16(1).u8(1);
    let crc = crc64(&frame);
    Writer(&mut frame).u64(crc);
    kind.extend(&frame);
    for (bytes, word) in [(version, "version 2"), (kind, "kind 200")] {
        let (dir, opened) = open_bytes(&bytes);
        let Err(StorageError::Open { reason, what }) = opened else { panic!("{opened:?}") };
        assert!(reason.contains(word) && what.ends_with("journal"), "{what}: {reason}");
        assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), bytes);
    }
}

#[test]
fn the_file_is_compacted() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let batch: Vec<Entry> = (0..100).map(evicted).collect();
    for _ in 0..200 {
        journal.append(&batch).unwrap();
        assert!(journal.file_bytes() <= COMPACT_MIN_BYTES + 8000, "{}", journal.file_bytes());
        assert_eq!(fs::metadata(dir.path().join(FILE)).unwrap().len(), journal.file_bytes());
    }
    drop(journal);
    let (journal, state) = Journal::open(dir.path()).unwrap();
    assert_eq!(state.evicted.len(), 100);
    journal.retain_evicted(|_, sequence| sequence >= 500).unwrap();
    drop(journal);
    assert_eq!(Journal::open(dir.path()).unwrap().1.evicted.len(), 50);
}

#[test]
fn a_leftover_snapshot_is_ignored() {
    let (dir, opened) = open_bytes(&file(&batches()));
    drop(opened);
    fs::write(dir.path().join(NEW_FILE), b"half a snap").unwrap();
    let (_journal, state) = Journal::open(dir.path()).unwrap();
    assert_eq!(state.evicted, facts(&batches()).evicted);
}

#[test]
fn bounds_and_second_openers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let many = vec![evicted(1); MAX_BATCH + 1];
    assert!(matches!(journal.append(&many), Err(StorageError::Refused { .. })));
    journal.append(&many[1..]).unwrap();
    assert!(matches!(Journal::open(dir.path()), Err(StorageError::Open { .. })));
}

#[test]
fn an_append_that_fails_poisons() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    journal.inner.lock().file = OpenOptions::new().write(true).open("/dev/full").unwrap();
    assert!(matches!(journal.append(&[evicted(1)]), Err(StorageError::Io { .. })));
    assert!(matches!(journal.append(&[evicted(1)]), Err(StorageError::Poisoned { .. })));
    assert!(matches!(journal.retain_evicted(|_, _| false), Err(StorageError::Poisoned { .. })));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), framed in any::<bool>()) {
        let mut file = encode_header();
        if framed {
            let mut frame = Vec::new();
            Writer(&mut frame).u32(u32::try_from(bytes.len()).unwrap()).raw(&bytes);
            let crc = crc64(&frame);
            Writer(&mut frame).u64(crc);
            file.extend(frame);
        } else {
            file.extend(&bytes);
        }
        let _parsed: Result<Parsed, _> = parse(&file);
        let _parsed = parse(&bytes);
    }
}
