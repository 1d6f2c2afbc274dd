//! Crashes at every byte, damage, newer formats, compaction.

use std::fs;
use std::time::Duration;

use kvtier_types::{BlockKey, ClaimBlock, ClaimKind, ClaimName, Effect, LayoutId, SemanticType, Taint, TenantId, Tier};
use proptest::prelude::{any, proptest};

use super::batches as batches_of;
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

fn name(id: u32) -> ClaimName {
    ClaimName { tenant: TenantId::new("team").unwrap(), owner: "owner".into(), id: format!("claim {id}") }
}

fn claim(id: u32, revision: u64, blocks: u64) -> ClaimRecord {
    let block = |n| ClaimBlock { key: key(n).block, bytes: n };
    let kind = if id.is_multiple_of(2) { ClaimKind::Pin(Tier::Host) } else { ClaimKind::Retain(90) };
    ClaimRecord { name: name(id), revision, kind, until_unix_ms: 77, blocks: (0..blocks).map(block).collect() }
}

fn claimed(claim: &ClaimRecord) -> Vec<Entry> {
    claim.parts().into_iter().map(Entry::Claim).collect()
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
        claimed(&claim(1, 1, 2)),
        [claimed(&claim(2, 1, 0)), vec![evicted(4)]].concat(),
        [claimed(&claim(2, 2, 3)), vec![Entry::ClaimEnded(name(1))]].concat(),
        vec![evicted(3)],
        vec![program("a", 3), program("b", 0), Entry::ProgramEnded(end("a", Some(9)))],
        vec![program("b", 2), program("c", 1), Entry::ProgramEnded(end("c", None)), program("a", 1)],
    ]
}

fn program_name(id: &str) -> ProgramName {
    ProgramName { session: id == "b", tenant: TenantId::new("team").unwrap(), id: id.into() }
}

fn program(id: &str, tips: u64) -> Entry {
    Entry::Program(ProgramRecord {
        name: program_name(id),
        parent: (id == "a").then(|| "parent".into()),
        ended: id == "c",
        tips: (0..tips).map(key).collect(),
        context: vec![key(tips)],
    })
}

fn end(id: &str, abandoned_up_to: Option<u64>) -> ProgramEnd {
    ProgramEnd { name: program_name(id), abandoned_up_to }
}

fn facts(batches: &[Vec<Entry>]) -> Facts {
    let mut facts = Facts::default();
    batches.iter().flatten().for_each(|entry| facts.apply(entry));
    facts
}

fn live(batches: &[Vec<Entry>]) -> Vec<ClaimRecord> {
    facts(batches).claims.live.into_values().collect()
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
    let wiped_up_to = state.wiped_up_to;
    for batch in batches() {
        journal.append(&batch).unwrap();
    }
    drop(journal);
    for _ in 0..2 {
        let (_journal, state) = Journal::open(&dir.path().join("a/b")).unwrap();
        assert!(!state.created && !state.damaged && state.notes.is_empty(), "{state:?}");
        assert_eq!(state.incarnation, 4);
        assert_eq!(state.evicted, facts(&batches()).evicted);
        assert_eq!(state.claims, [claim(2, 2, 3)]);
        assert_eq!(state.wiped_up_to, wiped_up_to);
    }
}

#[test]
fn marks_survive_and_go_when_nothing_is_left_that_they_are_about() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let part = "x".repeat(Taint::MAX_PART_BYTES);
    let long = Taint::new(&part, &part, Effect::Ephemeral(Duration::from_secs(1))).unwrap();
    let mark = |n: u64, taints: Vec<Taint>| {
        let record = MarkRecord { semantic: SemanticType::Skill, taints, expires_ms: Some(n), up_to_sequence: n };
        Entry::Mark(key(n).block, record)
    };
    let many: Vec<Entry> = (1..2001).map(|n| mark(n, vec![long.clone(); 8])).collect();
    assert!(matches!(journal.append(&many), Err(StorageError::Refused { .. })), "more than a frame");
    assert!(batches_of(&many).count() > 1);
    batches_of(&many).for_each(|batch| journal.append(batch).unwrap());
    journal.append(&[mark(7, vec!["a=b:NoServe".parse().unwrap()])]).unwrap();
    assert!(matches!(journal.append(&[mark(1, vec![long; 9])]), Err(StorageError::Refused { .. })));
    drop(journal);
    let (journal, state) = Journal::open(dir.path()).unwrap();
    assert_eq!(state.marks.len(), 2000);
    assert_eq!(state.marks[&key(7).block].taints, ["a=b:NoServe".parse().unwrap()], "the latest word counts");
    journal.retain_marks(|_, mark| mark.up_to_sequence <= 10).unwrap();
    drop(journal);
    assert_eq!(Journal::open(dir.path()).unwrap().1.marks.len(), 10);
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
            assert_eq!(state.claims, live(&batches[..whole]), "cut at {cut}");
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
        assert!(state.wiped_up_to > all.last_sequence() && again.wiped_up_to == state.wiped_up_to, "but kept");
    }
}

#[test]
fn what_was_lost_is_said_for_good_and_with_the_first_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    // Nobody knows whether it is the first start.
    let (journal, state) = Journal::open(dir.path()).unwrap();
    let first = state.wiped_up_to;
    assert!(state.created && first > 0 && state.last_sequence == first);
    drop(journal);
    let of_file = fs::read(&path).unwrap();
    assert_eq!(parse(&of_file).unwrap().facts.wiped_up_to, first, "the file never was without it");
    // What goes on is not lost: a plain start, a torn tail, what is dropped and what is appended.
    for torn in [&b""[..], b"torn"] {
        fs::write(&path, [&of_file[..], torn].concat()).unwrap();
        let (journal, state) = Journal::open(dir.path()).unwrap();
        assert!(!state.created && !state.damaged && state.wiped_up_to == first, "{state:?}");
        journal.append(&[evicted(1)]).unwrap();
        journal.retain_evicted(|_, _| false).unwrap();
        drop(journal);
        assert_eq!(Journal::open(dir.path()).unwrap().1.wiped_up_to, first);
    }
    // Damage after it, of which the snapshot did not get into its place yet.
    let far = 1 << 60;
    let known = vec![Entry::Evicted { key: key(2), up_to_sequence: far }];
    let mut damaged = file(&[vec![evicted(1)], known]);
    damaged[HEADER_BYTES + 9] ^= 1;
    for _ in 0..2 {
        fs::write(&path, &damaged).unwrap();
        fs::write(dir.path().join(NEW_FILE), file(&batches())).unwrap();
        let (_journal, state) = Journal::open(dir.path()).unwrap();
        assert!(state.damaged);
        assert_eq!((state.wiped_up_to, state.last_sequence), (far, far), "above all it knows, whatever the clock says");
    }
    let (journal, state) = Journal::open(dir.path()).unwrap();
    assert!(!state.damaged && state.wiped_up_to == far);
    let wiped = |up_to_sequence| Entry::Wiped { up_to_sequence };
    journal.append(&[wiped(far + 2), wiped(far + 1)]).unwrap();
    drop(journal);
    assert_eq!(Journal::open(dir.path()).unwrap().1.wiped_up_to, far + 2, "the highest counts");
    fs::remove_file(&path).unwrap();
    let again = Journal::open(dir.path()).unwrap().1;
    assert!(again.created && again.wiped_up_to >= first, "a file that went is a loss like any other");
}

#[test]
fn it_is_known_which_tiers_hold_records() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, state) = Journal::open(dir.path()).unwrap();
    assert!(state.tiers.is_empty());
    journal.append(&[Entry::TierUsed(Tier::Object), Entry::TierUsed(Tier::Object)]).unwrap();
    drop(journal);
    for _ in 0..2 {
        assert_eq!(Journal::open(dir.path()).unwrap().1.tiers, BTreeSet::from([Tier::Object]));
    }
    let (_dir, opened) = open_bytes(&file(&[vec![evicted(1)]]));
    let state = opened.unwrap().1;
    assert_eq!((state.wiped_up_to, state.tiers), (0, BTreeSet::from([Tier::Disk])), "a build that did not say it");
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
    let of_kind = |kind: u8, payload: u8| {
        let mut frame = Vec::new();
        Writer(&mut frame).u32(4).u8(kind).u16(1).u8(payload);
        let crc = crc64(&frame);
        Writer(&mut frame).u64(crc);
        [encode_header(), frame].concat()
    };
    for (bytes, word) in [(version, "version 2"), (of_kind(200, 1), "kind 200"), (of_kind(12, 9), "kind 12")] {
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
fn a_claim_of_many_frames_counts_with_its_last() {
    let (old, new) = (claim(2, 1, 3), claim(2, 2, 30_000));
    let entries = claimed(&new);
    let frames: Vec<Vec<Entry>> = batches_of(&entries).map(<[Entry]>::to_vec).collect();
    assert!(frames.len() > 1, "it is longer than a frame");
    for whole in 0..=frames.len() {
        let (dir, opened) = open_bytes(&file(&[claimed(&old)]));
        let (journal, _) = opened.unwrap();
        for frame in &frames[..whole] {
            journal.append(frame).unwrap();
        }
        // What came of it so far outlives a compaction, and then counts once it is complete.
        journal.append(&[evicted(1)]).unwrap();
        journal.retain_evicted(|_, _| false).unwrap();
        if whole == 1 {
            journal.append(&frames[1]).unwrap();
        }
        drop(journal);
        let (_journal, state) = Journal::open(dir.path()).unwrap();
        let want = if whole == 0 { &old } else { &new };
        assert!(state.claims == [want.clone()], "{whole} of {} frames", frames.len());
    }
    let (dir, opened) = open_bytes(&file(&[claimed(&old), frames[0].clone()]));
    assert_eq!(opened.unwrap().1.claims, [old], "a crash among its frames leaves the claim as it was");
    drop(dir);
}

#[test]
fn claims_are_bounded() {
    let (_dir, opened) = open_bytes(&file(&[]));
    let (journal, _) = opened.unwrap();
    let most = claimed(&claim(2, 1, MAX_CLAIM_BLOCKS as u64));
    for batch in batches_of(&most) {
        journal.append(batch).unwrap();
    }
    assert!(matches!(journal.append(&claimed(&claim(3, 1, 1))), Err(StorageError::Full)));
    journal.append(&[Entry::ClaimEnded(name(2))]).unwrap();
    journal.append(&claimed(&claim(3, 1, 1))).unwrap();
    let mut long = claim(3, 2, 1);
    long.name.owner = "o".repeat(ClaimName::MAX_PART_BYTES + 1);
    assert!(matches!(journal.append(&claimed(&long)), Err(StorageError::Refused { .. })));
    assert!(matches!(journal.append(&most), Err(StorageError::Refused { .. })), "one frame at a time");
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

#[test]
fn programs_are_known_until_they_end_and_abandoned_ones_until_nothing_of_them_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    journal.append(&[program("a", 2), program("b", 1), program("c", 1)]).unwrap();
    journal.append(&[Entry::ProgramEnded(end("a", Some(5))), Entry::ProgramEnded(end("c", None))]).unwrap();
    journal.append(&[Entry::ProgramEnded(end("a", Some(3)))]).unwrap();
    drop(journal);
    let (journal, state) = Journal::open(dir.path()).unwrap();
    let live: Vec<&str> = state.programs.iter().map(|p| p.name.id.as_str()).collect();
    assert_eq!(live, ["b"]);
    assert_eq!(state.abandoned, [(program_name("a"), 5)]);
    journal.retain_abandoned(|_, up_to| up_to > 5).unwrap();
    drop(journal);
    assert!(Journal::open(dir.path()).unwrap().1.abandoned.is_empty());
    let long = ProgramName { id: "x".repeat(129), ..program_name("a") };
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let refused = journal.append(&[Entry::ProgramEnded(ProgramEnd { name: long, abandoned_up_to: None })]);
    assert!(matches!(refused, Err(StorageError::Refused { .. })));
}

fn graph_key(program: &str) -> GraphKey {
    GraphKey { tenant: TenantId::new("team").unwrap(), program: program.into() }
}

fn graph(program: &str, revision: u64, bytes: usize) -> GraphRecord {
    let bytes = (0..bytes).map(|n| u8::try_from(n % 251).unwrap()).collect();
    GraphRecord { key: graph_key(program), revision, bytes, progress: Vec::new() }
}

fn declared(graph: &GraphRecord) -> Vec<Entry> {
    graph.parts().into_iter().map(Entry::Graph).collect()
}

#[test]
fn declared_graphs_are_known_with_their_progress_until_they_end() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let (small, large) = (graph("small", 1, 10), graph("large", 2, MAX_GRAPH_BYTES));
    for one in [&small, &large, &graph("gone", 1, 10)] {
        journal.append(&declared(one)).unwrap();
    }
    let progress = |program: &str, revision, steps: &[u8]| {
        Entry::GraphProgress(GraphProgress { key: graph_key(program), revision, steps: steps.to_vec() })
    };
    journal.append(&[progress("small", 1, &[2, 1, 0, 0, 2]), progress("large", 1, &[1])]).unwrap();
    journal.append(&[progress("nobody", 1, &[1]), Entry::GraphEnded(graph_key("gone"))]).unwrap();
    drop(journal);
    let told = |state: &JournalState| state.graphs.clone();
    let expected = [large.clone(), GraphRecord { progress: vec![2, 1, 0, 0, 2], ..small }];
    for _ in 0..2 {
        assert_eq!(told(&Journal::open(dir.path()).unwrap().1), expected);
    }
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let later = graph("small", 5, 70_000);
    journal.append(&declared(&later)).unwrap();
    let long = GraphKey { program: "x".repeat(129), ..graph_key("a") };
    let refused = journal.append(&[Entry::GraphEnded(long)]);
    assert!(matches!(refused, Err(StorageError::Refused { .. })));
    drop(journal);
    assert_eq!(told(&Journal::open(dir.path()).unwrap().1), [large, later]);
}

#[test]
fn graphs_are_bounded_and_a_part_alone_is_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let half = declared(&graph("half", 1, 100_000));
    assert_eq!(half.len(), 2);
    journal.append(&half[1..]).unwrap();
    journal.append(&half[..1]).unwrap();
    let most = MAX_GRAPHS_BYTES / MAX_GRAPH_BYTES;
    for n in 0..most {
        journal.append(&declared(&graph(&n.to_string(), 1, MAX_GRAPH_BYTES))).unwrap();
    }
    let over = declared(&graph("over", 1, MAX_GRAPH_BYTES));
    assert!(matches!(journal.append(&over), Err(StorageError::Full)));
    journal.append(&[Entry::GraphEnded(graph_key("0"))]).unwrap();
    journal.append(&over).unwrap();
    drop(journal);
    assert_eq!(Journal::open(dir.path()).unwrap().1.graphs.len(), most);
}
