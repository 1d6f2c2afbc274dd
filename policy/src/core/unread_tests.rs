//! Reads that fail: another copy is tried, and a block without one counts as missing for a while.

use std::time::Duration;

use kvtier_types::Tier;

use super::tests::{BLOCK, Bench, NOW, full, layout, spec};
use super::*;
use crate::frame::TwinPool;

/// Fails every onboard from these tiers and ends the others well; answers with where they came from.
fn fail_from(b: &mut Bench, tiers: &[Tier]) -> Vec<Tier> {
    let mut tried = Vec::new();
    while let Some(action) = b.core.poll_action() {
        if let Action::Onboard { id, from, .. } = action {
            tried.push(from);
            b.core.moved(id, if tiers.contains(&from) { MoveEnd::Failed } else { MoveEnd::Done(None) });
        }
    }
    tried
}

#[test]
fn another_copy_is_read_when_one_cannot_be() {
    let config = CoreConfig { disk: true, object: true, write_behind: WriteBehind::All, ..CoreConfig::default() };
    let mut core = Core::new(config, Box::new(TwinPool::new(BLOCK)), |bytes| bytes);
    let who = core.attach(NOW, spec(layout(1, full()))).unwrap();
    let mut b = Bench { core, who };
    b.write(&[1]);
    assert_eq!(b.offload_all(), 2, "to the disk, then to the object store");
    b.write(&[2]);
    b.offload_all();
    let lease = b.lookup("r", &[1]);
    assert_eq!(fail_from(&mut b, &[Tier::Disk]), [Tier::Disk, Tier::Object]);
    assert_eq!(b.core.collect(lease).unwrap().ranges[0].frames.len(), 1);
}

#[test]
fn a_block_that_cannot_be_read_is_written_anew_or_tried_again_later() {
    let mut b = Bench::new(2, true);
    for keys in [[1, 2], [3, 4]] {
        b.write(&keys);
        b.offload_all();
    }
    let lease = b.lookup("r", &[1, 2]);
    assert_eq!(fail_from(&mut b, &[Tier::Disk]), [Tier::Disk; 2]);
    assert_eq!(b.core.collect(lease).unwrap().ranges[0].found, [None, None]);
    b.release("r", 0, 0);
    assert_eq!(b.found(&[1, 2]), 0);
    assert!(fail_from(&mut b, &[]).is_empty(), "nobody waits for it again at once");
    b.write(&[1]);
    assert_eq!(b.found(&[1]), 1, "what was computed again is here");
    let later = NOW + Duration::from_secs(10);
    assert!(b.core.poll_timeout().is_some_and(|at| at <= later));
    b.core.expire(later);
    let lease = b.lookup("later", &[2]);
    assert_eq!(fail_from(&mut b, &[]), [Tier::Disk]);
    assert_eq!(b.core.collect(lease).unwrap().ranges[0].frames.len(), 1);
}
