//! Damage: on disk between a kill and a restart, and in memory behind the daemon's back. It is noticed, counted and
//! never delivered; the harness fails on any wrong byte by itself.

use std::path::PathBuf;

use kvtier::jobs::job::{Fate, Kind, Transfer};
use kvtier_proto::v1::Tier;
use kvtier_tests::daemon::count;
use kvtier_tests::disk::{Place, files, find, find_payload, is_sealed};
use kvtier_tests::shape::content;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};

/// Bytes of a block in these tests.
const BYTES: u64 = 64 << 10;
/// Blocks of the prompt on disk: nearly two log segments of 4 MiB.
const BLOCKS: u32 = 100;
/// Blocks of a prompt, so few that three prompts lie in one log segment.
const FEW: u32 = 10;

/// A killed daemon with a prompt on disk, and its engine.
fn on_disk() -> (Daemon, Engine, Prompt) {
    let mut daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("on disk", BLOCKS);
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Disk, BLOCKS.into());
    // The footer of the first segment is written behind the last record's back.
    until("a sealed segment", || segments(&daemon).iter().any(|path| is_sealed(path)).then_some(()));
    daemon.kill();
    (daemon, engine, prompt)
}

fn segments(daemon: &Daemon) -> Vec<PathBuf> {
    let all = files(&daemon.disk_dir()).into_iter();
    all.filter(|path| path.extension().is_some_and(|extension| extension == "kvt")).collect()
}

fn payload_of(prompt: &Prompt, block: u32) -> Vec<u8> {
    content(&prompt.hashes()[block as usize], 0, 0, BYTES)
}

/// The place of a block's payload on disk.
fn place_of(daemon: &Daemon, prompt: &Prompt, block: u32) -> Place {
    let places = find_payload(&daemon.disk_dir(), &payload_of(prompt, block));
    assert_eq!(places.len(), 1, "block {block} is on disk once");
    places[0].clone()
}

/// Some block in a log segment that is sealed, or in one that is not.
fn block_in(daemon: &Daemon, prompt: &Prompt, sealed: bool) -> (u32, Place) {
    let places = (0..BLOCKS).map(|block| (block, place_of(daemon, prompt, block)));
    let mut fitting = places.filter(|(block, place)| *block > 2 && is_sealed(&place.path) == sealed);
    fitting.nth(5).expect("there are segments of both kinds")
}

#[test]
fn a_flipped_payload_in_a_sealed_segment_is_found_when_it_is_read() {
    let (mut daemon, engine, prompt) = on_disk();
    let (block, place) = block_in(&daemon, &prompt, true);
    place.flip(BYTES - 1);
    daemon.restart();
    engine.wait_attached();
    daemon.wait_blocks(Tier::Disk, BLOCKS.into());
    let got = engine.get(&prompt);
    assert_eq!((got.whole(), got.loaded), (Some(block * 16), block), "everything before it is good");
    assert_eq!(daemon.status().corrupt_blocks, 1);
    daemon.wait_blocks(Tier::Disk, u64::from(BLOCKS) - 1);
    // It is not tried again, and it can be put anew.
    assert_eq!(engine.get(&prompt).whole(), Some(block * 16));
    assert_eq!(engine.put_all(&prompt).granted, 1);
    assert_eq!(engine.get(&prompt).whole(), Some(BLOCKS * 16));
    daemon.wait_blocks(Tier::Disk, BLOCKS.into());
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&prompt).whole(), Some(BLOCKS * 16), "the new copy is the one that is found");
    assert!(count(&daemon.status().ledger, "corrupt") == 0 && daemon.status().corrupt_blocks == 0);
}

#[test]
fn a_flipped_payload_in_an_unsealed_segment_cuts_it_there() {
    let (mut daemon, engine, prompt) = on_disk();
    let (block, place) = block_in(&daemon, &prompt, false);
    place.flip(77);
    daemon.restart();
    let notes = daemon.status().notes;
    assert!(notes.iter().any(|note| note.contains("its payload is not whole")), "{notes:?}");
    engine.wait_attached();
    let got = engine.get(&prompt);
    assert!(got.whole().is_some_and(|tokens| tokens <= block * 16), "{got:?}");
    engine.put_all(&prompt);
    assert_eq!(engine.get(&prompt).whole(), Some(BLOCKS * 16));
}

#[test]
fn a_flipped_record_header_is_a_miss() {
    for sealed in [true, false] {
        let (mut daemon, engine, prompt) = on_disk();
        let (block, place) = block_in(&daemon, &prompt, sealed);
        // The header is the page before the payload; this is within the key.
        Place { offset: place.offset - 4096, ..place }.flip(40);
        daemon.restart();
        engine.wait_attached();
        let got = engine.get(&prompt);
        assert!(got.whole().is_some_and(|tokens| tokens <= block * 16), "{got:?}");
        let status = daemon.status();
        let told = status.corrupt_blocks == 1 || status.notes.iter().any(|note| note.contains("checksum differs"));
        assert!(told, "sealed {sealed}: {:?}", status.notes);
    }
}

#[test]
fn a_flipped_footer_costs_only_a_slow_start() {
    for in_trailer in [true, false] {
        let (mut daemon, engine, prompt) = on_disk();
        let (_, place) = block_in(&daemon, &prompt, true);
        let len = place.path.metadata().unwrap().len();
        let last_page = Place { path: place.path, offset: len - 4096 };
        // The footer lies in the pages before the trailer; its first page holds entries.
        let footer = find(&daemon.disk_dir(), b"KVTFTR", 4096);
        assert!(footer.contains(&last_page));
        if in_trailer {
            last_page.flip(20);
        } else {
            Place { offset: last_page.offset - 4096, ..last_page }.flip(9);
        }
        daemon.restart();
        let notes = daemon.status().notes;
        assert!(notes.iter().any(|n| n.contains("found by reading it")), "trailer {in_trailer}: {notes:?}");
        daemon.wait_blocks(Tier::Disk, BLOCKS.into());
        engine.wait_attached();
        assert_eq!(engine.get(&prompt).whole(), Some(BLOCKS * 16));
    }
}

#[test]
fn a_damaged_segment_header_costs_its_segment() {
    let (mut daemon, engine, prompt) = on_disk();
    let (block, place) = block_in(&daemon, &prompt, true);
    Place { offset: 0, ..place }.flip(17);
    daemon.restart();
    let notes = daemon.status().notes;
    assert!(notes.iter().any(|note| note.contains("header is not whole")), "{notes:?}");
    engine.wait_attached();
    let got = engine.get(&prompt);
    assert!(got.whole().is_some_and(|tokens| tokens <= block * 16), "{got:?}");
    engine.put_all(&prompt);
    assert_eq!(engine.get(&prompt).whole(), Some(BLOCKS * 16));
}

#[test]
fn random_damage_never_becomes_wrong_bytes() {
    let (mut daemon, engine, prompt) = on_disk();
    let mut state = 0x5eed_u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for round in 0..4 {
        for path in segments(&daemon) {
            for _ in 0..3 {
                let offset = random(path.metadata().unwrap().len());
                Place { path: path.clone(), offset }.flip(0);
            }
        }
        daemon.restart();
        engine.wait_attached();
        let got = engine.get(&prompt);
        assert_eq!((got.corrupt, got.lost), (0, 0), "round {round}: what is damaged is not even offered");
        engine.put_all(&prompt);
        daemon.wait_offloaded();
        daemon.kill();
    }
}

/// Overwrites a sealed frame by saving other bytes into it, through a mapping that a reservation once opened: what an
/// engine that has lost its mind does.
fn scribble(engine: &Engine, prompt: &Prompt, block: u32) {
    let (request, hit) = engine.lookup(prompt);
    let frames = engine.frames(&request, 0, 0, hit.tokens);
    let (_, frame) = frames[block as usize];
    let (session, kv) = engine.worker(0);
    kv.spoil(0, 0);
    let fates = engine.run_job(session, Kind::Save, vec![Transfer { frame, block_id: 0 }]);
    assert_eq!(fates, [Fate::Done], "the frame can be written while its mapping is there");
    engine.release(&request, 0, 0);
}

#[test]
fn an_overwritten_frame_is_reported_and_quarantined() {
    let daemon = daemon!(Setup { disk_mib: None, ..Setup::default() });
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("scribbled", 20);
    engine.put_all(&prompt);
    scribble(&engine, &prompt, 7);
    let got = engine.get(&prompt);
    assert_eq!((got.hit.tokens, got.loaded, got.corrupt), (320, 19, 1));
    daemon.wait_status("the report", |status| status.corrupt_blocks == 1);
    daemon.wait_status("the ledger", |status| count(&status.ledger, "corrupt") == 320);
    assert_eq!(engine.get(&prompt).whole(), Some(7 * 16), "it is gone");
    assert_eq!(engine.put_all(&prompt).granted, 1);
    assert_eq!(engine.get(&prompt).whole(), Some(320));
    assert_eq!(daemon.status().corrupt_blocks, 1);
}

#[test]
fn an_overwritten_frame_with_a_good_copy_on_disk_is_read_from_there() {
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("scribbled", 20);
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Disk, 20);
    scribble(&engine, &prompt, 7);
    assert_eq!(engine.get(&prompt).corrupt, 1);
    daemon.wait_status("the report", |status| status.corrupt_blocks == 1);
    let got = engine.get(&prompt);
    assert_eq!((got.whole(), got.loaded), (Some(320), 20));
    assert_eq!(got.hit.disk_tokens, 16);
}

#[test]
fn an_overwritten_frame_is_not_offloaded() {
    // Nothing is offloaded before a quarter of 64 MiB is in use.
    let offload = "mode = \"watermark\"\nhigh_watermark_percent = 25".into();
    let daemon = daemon!(Setup { offload, ..Setup::default() });
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("scribbled", 20);
    engine.put_all(&prompt);
    assert_eq!(daemon.tier(Tier::Disk).blocks, 0);
    scribble(&engine, &prompt, 19);
    engine.put_all(&Prompt::new("pressure", 256));
    daemon.wait_status("the offload of the damaged block", |status| status.corrupt_blocks == 1);
    assert_eq!(engine.get(&prompt).whole(), Some(19 * 16), "dropped, not stored");
    let damaged = kvtier_tests::disk::find(&daemon.disk_dir(), &[0xff; 64], 4096);
    assert!(damaged.is_empty(), "{damaged:?}");
}

/// A killed daemon that had evicted two of three prompts by verb, one after the other; all three lie in a log segment.
fn evicted() -> (Daemon, Engine, [Prompt; 3]) {
    let mut daemon = daemon!(Setup::default());
    let notes = daemon.status().notes;
    assert!(!notes.iter().any(|note| note.contains("journal")), "a first start has nothing to tell: {notes:?}");
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompts = ["first", "second", "third"].map(|name| Prompt::new(name, FEW));
    for prompt in &prompts {
        engine.put_all(prompt);
    }
    daemon.wait_blocks(Tier::Disk, u64::from(FEW) * 3);
    for prompt in &prompts[..2] {
        daemon.control().evict(&Shape::default().keys(0, prompt), false).expect("evicted");
    }
    daemon.kill();
    (daemon, engine, prompts)
}

/// Starts the daemon again and again, and checks that nothing of the prompts comes back while what is put anew stays.
fn starts_without(daemon: &mut Daemon, engine: &Engine, prompts: &[Prompt], why: &str) {
    let nothing = |start: &str| {
        engine.wait_attached();
        for prompt in prompts {
            assert_eq!(engine.get(prompt).hit.tokens, 0, "{prompt:?} came back at {start}");
        }
    };
    daemon.restart();
    let notes = daemon.status().notes;
    let told = |note: &String| note.contains(why) && note.contains("30 records of before are dropped");
    assert!(notes.iter().any(told), "{notes:?}");
    nothing("the start that noticed");
    assert!(daemon.terminate().success());
    daemon.restart();
    nothing("the start after it");
    let new = Prompt::new("new", FEW);
    engine.put_all(&new);
    daemon.wait_blocks(Tier::Disk, FEW.into());
    daemon.kill();
    daemon.restart();
    nothing("the start after a kill");
    assert_eq!(engine.get(&new).whole(), Some(FEW * 16));
}

#[test]
fn what_a_damaged_journal_knew_to_be_evicted_never_comes_back() {
    let (mut daemon, engine, prompts) = evicted();
    let key = Shape::default().keys(0, &prompts[0])[0];
    let places = find(&daemon.data_dir().join("journal"), key.as_bytes(), 1);
    assert_eq!(places.len(), 1, "its eviction is journaled once");
    places[0].flip(0);
    starts_without(&mut daemon, &engine, &prompts, "the journal was damaged");
}

#[test]
fn what_a_lost_journal_knew_to_be_evicted_never_comes_back() {
    let (mut daemon, engine, prompts) = evicted();
    std::fs::remove_dir_all(daemon.data_dir().join("journal")).unwrap();
    starts_without(&mut daemon, &engine, &prompts, "there was no journal");
}
