//! The Evict verb and its promise: what was evicted does not come back.

use kvtier_proto::convert::block_targets;
use kvtier_proto::v1::{self, Outcome, Tier};
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::BlockKey;

fn outcomes(answer: &[v1::TargetOutcome]) -> Vec<Outcome> {
    answer.iter().map(|target| target.outcome()).collect()
}

/// A daemon, an engine, and a prompt of 20 blocks in memory and on disk.
fn stored() -> (Daemon, Engine, Prompt, Vec<BlockKey>) {
    let daemon = daemon!(Setup::default());
    let shape = Shape::default();
    let engine = Engine::attach(&daemon, &shape);
    let prompt = Prompt::new("evict me", 20);
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Disk, 20);
    let keys = shape.keys(0, &prompt);
    (daemon, engine, prompt, keys)
}

#[test]
fn an_evicted_block_stays_away_after_a_kill() {
    let (mut daemon, engine, prompt, keys) = stored();
    let answer = daemon.control().evict(&keys[12..], false).unwrap();
    daemon.kill();
    assert_eq!(outcomes(&answer), [Outcome::Applied; 8]);
    for _ in 0..3 {
        daemon.restart();
        engine.wait_attached();
        assert_eq!(engine.get(&prompt).whole(), Some(12 * 16));
        assert_eq!(daemon.tier(Tier::Disk).blocks, 12);
        daemon.kill();
    }
    // Putting it anew brings it back for good.
    daemon.restart();
    engine.wait_attached();
    engine.put_all(&prompt);
    daemon.wait_blocks(Tier::Disk, 20);
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&prompt).whole(), Some(320));
}

#[test]
fn an_evicted_block_stays_away_after_a_clean_stop() {
    let (mut daemon, engine, prompt, keys) = stored();
    daemon.control().evict(&keys, false).unwrap();
    for _ in 0..2 {
        assert!(daemon.terminate().success());
        daemon.restart();
        engine.wait_attached();
        assert_eq!(engine.get(&prompt).whole(), Some(0));
    }
}

#[test]
fn a_leased_block_is_hidden_at_once_and_stays_away() {
    let (mut daemon, engine, prompt, keys) = stored();
    let (request, hit) = engine.lookup(&prompt);
    assert_eq!(hit.tokens, 320);
    let answer = daemon.control().evict(&keys, false).unwrap();
    assert_eq!(outcomes(&answer), [Outcome::Deferred; 20]);
    assert!(answer[0].reason.contains("in use"));
    assert_eq!(engine.get(&prompt).hit.tokens, 0, "nobody finds it any more");
    let frames = engine.frames(&request, 0, 0, hit.tokens);
    assert_eq!(frames.len(), 20, "the one who has it may finish");
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&prompt).hit.tokens, 0, "not even after a kill");
    assert_eq!(daemon.tier(Tier::Disk).blocks, 0);
}

#[test]
fn a_released_block_goes_when_it_was_evicted() {
    let (daemon, engine, prompt, keys) = stored();
    let (request, _) = engine.lookup(&prompt);
    daemon.control().evict(&keys, false).unwrap();
    engine.release(&request, 0, 0);
    daemon.wait_status("the memory to be free", |status| status.tiers.iter().all(|tier| tier.blocks == 0));
    assert_eq!(daemon.tier(Tier::Host).used_bytes, 0);
    assert_eq!(engine.put_all(&prompt).granted, 20);
}

#[test]
fn a_block_on_its_way_to_disk_is_evicted_for_good() {
    let mut daemon = daemon!(Setup::default());
    let shape = Shape::default();
    let engine = Engine::attach(&daemon, &shape);
    for round in 0..5 {
        let prompt = Prompt::new(format!("race {round}"), 60);
        // No waiting for the disk: some are there, some on their way, some not yet begun.
        engine.put_all(&prompt);
        daemon.control().evict(&shape.keys(0, &prompt), false).unwrap();
        daemon.kill();
        daemon.restart();
        engine.wait_attached();
        assert_eq!(engine.get(&prompt).hit.tokens, 0, "round {round}");
        assert_eq!(daemon.tier(Tier::Disk).blocks, 0, "round {round}");
    }
}

#[test]
fn a_disk_that_is_away_for_a_while_brings_nothing_back() {
    let (mut daemon, engine, prompt, keys) = stored();
    daemon.control().evict(&keys[5..], false).unwrap();
    daemon.kill();
    // One life without the disk: its directory cannot be used.
    let away = daemon.data_dir().join("away");
    std::fs::rename(daemon.disk_dir(), &away).unwrap();
    std::fs::write(daemon.disk_dir(), "in the way").unwrap();
    daemon.restart();
    assert_eq!(daemon.tier(Tier::Disk).state, "absent");
    daemon.kill();
    // And one with the tier switched off.
    daemon.reconfigure(|setup| setup.disk_mib = None);
    daemon.restart();
    daemon.kill();
    std::fs::remove_file(daemon.disk_dir()).unwrap();
    std::fs::rename(&away, daemon.disk_dir()).unwrap();
    daemon.reconfigure(|setup| setup.disk_mib = Some(64));
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&prompt).whole(), Some(5 * 16));
}

#[test]
fn a_dry_run_changes_nothing() {
    let (daemon, engine, prompt, keys) = stored();
    let answer = daemon.control().evict(&keys, true).unwrap();
    assert_eq!(outcomes(&answer), [Outcome::Applied; 20]);
    assert_eq!(daemon.tier(Tier::Disk).blocks, 20);
    assert_eq!(engine.get(&prompt).whole(), Some(320));
    let unknown = daemon.control().evict(&[BlockKey::new([9; 32])], true).unwrap();
    assert_eq!(outcomes(&unknown), [Outcome::Missing]);
}

#[test]
fn one_tier_can_be_evicted_alone() {
    let (mut daemon, engine, prompt, keys) = stored();
    let wire = block_targets(&keys);
    let from = |tier: Tier| v1::EvictRequest {
        targets: vec![wire.clone()],
        tiers: vec![tier.into()],
        ..v1::EvictRequest::default()
    };
    daemon.control().evict_from(from(Tier::Host)).unwrap();
    assert_eq!((daemon.tier(Tier::Host).blocks, daemon.tier(Tier::Disk).blocks), (0, 20));
    assert_eq!(engine.get(&prompt).hit.disk_tokens, 320);
    daemon.wait_status("the leases to end", |status| status.attachments.iter().all(|a| a.leases == 0));
    daemon.control().evict_from(from(Tier::Disk)).unwrap();
    assert_eq!((daemon.tier(Tier::Host).blocks, daemon.tier(Tier::Disk).blocks), (20, 0));
    assert_eq!(engine.get(&prompt).hit.host_tokens, 320);
    daemon.kill();
    daemon.restart();
    engine.wait_attached();
    assert_eq!(engine.get(&prompt).hit.tokens, 0, "memory is gone, and the disk's copies were evicted");
}

#[test]
fn locate_and_list_say_where_blocks_are() {
    let (daemon, engine, prompt, keys) = stored();
    let unknown = BlockKey::new([7; 32]);
    let (request, _) = engine.lookup(&prompt);
    let blocks = daemon.control().locate(&[keys[3], unknown]).unwrap();
    let tiers: Vec<_> = blocks[0].replicas.iter().map(|r| (r.tier(), r.bytes)).collect();
    assert_eq!(tiers, [(Tier::Host, 65_536), (Tier::Disk, 65_536)]);
    assert_eq!((blocks[0].outcome(), blocks[0].leases, blocks[0].depth_blocks), (Outcome::Applied, 1, 3));
    assert_eq!((blocks[0].model.as_str(), blocks[0].tenant.as_str()), ("tiny", "shared"));
    assert_eq!(blocks[1].outcome(), Outcome::Missing);
    engine.release(&request, 0, 0);
    let mut seen = std::collections::BTreeSet::new();
    let mut request = v1::ListRequest { page_size: 7, ..v1::ListRequest::default() };
    let mut pages = 0;
    loop {
        let page = daemon.control().list(request.clone()).unwrap();
        assert!(page.blocks.len() <= 7);
        seen.extend(page.blocks.into_iter().map(|block| block.key));
        pages += 1;
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!((pages, seen.len()), (3, 20));
    assert!(keys.iter().all(|key| seen.contains(&key.as_bytes()[..])));
    let of = |request: v1::ListRequest| daemon.control().list(request).unwrap().blocks.len();
    assert_eq!(of(v1::ListRequest { model_contains: "nope".into(), ..v1::ListRequest::default() }), 0);
    assert_eq!(of(v1::ListRequest { tier: Tier::Object.into(), ..v1::ListRequest::default() }), 0);
    assert_eq!(of(v1::ListRequest { tier: Tier::Disk.into(), page_size: 1000, ..v1::ListRequest::default() }), 20);
}
