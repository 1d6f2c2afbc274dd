//! The object tier in a directory: it alone, and below a disk that is lost.

use kvtier_proto::v1::{Outcome, Tier};
use kvtier_tests::daemon::count;
use kvtier_tests::disk::find;
use kvtier_tests::shape::content;
use kvtier_tests::{Engine, Prompt, Setup, Shape, daemon};

#[test]
fn blocks_survive_the_loss_of_the_disk() {
    let mut daemon = daemon!(Setup { object: true, ..Setup::default() });
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("packed", 60);
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Object, 60);
    daemon.kill();
    std::fs::remove_dir_all(daemon.disk_dir()).unwrap();
    daemon.restart();
    engine.wait_attached();
    daemon.wait_blocks(Tier::Object, 60);
    let got = engine.get(&prompt);
    assert_eq!((got.whole(), got.loaded, got.hit.object_tokens), (Some(960), 60, 960));
    daemon.wait_status("the report", |status| count(&status.blocks_loaded, "object") == 60);
    assert_eq!(daemon.status().corrupt_blocks, 0);
}

#[test]
fn an_object_tier_without_a_disk_works() {
    let mut daemon = daemon!(Setup { object: true, disk_mib: None, ..Setup::default() });
    let shape = Shape::hybrid();
    let engine = Engine::attach(&daemon, &shape);
    let prompt = Prompt::new("packed", 40);
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Object, 60);
    for _ in 0..2 {
        daemon.kill();
        daemon.restart();
        engine.wait_attached();
        daemon.wait_blocks(Tier::Object, 60);
        let got = engine.get(&prompt);
        assert_eq!((got.whole(), got.loaded, got.hit.object_tokens), (Some(640), 42, 640));
    }
}

#[test]
fn a_disk_that_cannot_be_opened_does_not_keep_blocks_from_the_object_tier() {
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("disk"), "in the way").unwrap();
    let daemon = daemon!(Setup { object: true, data_dir: Some(data.path().into()), ..Setup::default() });
    assert_eq!(daemon.tier(Tier::Disk).state, "absent");
    let engine = Engine::attach(&daemon, &Shape::default());
    engine.put_all(&Prompt::new("no disk", 10));
    daemon.wait_blocks(Tier::Object, 10);
}

#[test]
fn an_evicted_block_stays_away_from_packs_too() {
    let mut daemon = daemon!(Setup { object: true, ..Setup::default() });
    let shape = Shape::default();
    let engine = Engine::attach(&daemon, &shape);
    let prompt = Prompt::new("packed", 20);
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Object, 20);
    let answer = daemon.control().evict(&shape.keys(0, &prompt)[8..], false).unwrap();
    daemon.kill();
    assert!(answer.iter().all(|target| target.outcome() == Outcome::Applied), "{answer:?}");
    for _ in 0..2 {
        daemon.restart();
        engine.wait_attached();
        daemon.wait_blocks(Tier::Object, 8);
        assert_eq!(engine.get(&prompt).whole(), Some(128));
        daemon.kill();
    }
}

#[test]
fn a_flipped_byte_in_a_pack_is_found_when_it_is_read() {
    let mut daemon = daemon!(Setup { object: true, disk_mib: None, ..Setup::default() });
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("packed", 20);
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Object, 20);
    daemon.kill();
    let payload = content(&prompt.hashes()[11], 0, 0, 64 << 10);
    let places = find(&daemon.data_dir().join("object"), &payload[..32], 1);
    assert_eq!(places.len(), 1, "the block is in one pack");
    places[0].flip(40_000);
    daemon.restart();
    engine.wait_attached();
    daemon.wait_blocks(Tier::Object, 20);
    assert_eq!(engine.get(&prompt).whole(), Some(11 * 16));
    assert_eq!(daemon.status().corrupt_blocks, 1);
    assert_eq!(engine.put_all(&prompt).granted, 1);
    assert_eq!(engine.get(&prompt).whole(), Some(320));
}
