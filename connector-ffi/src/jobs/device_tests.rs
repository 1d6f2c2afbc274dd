//! What is different where the engine's memory is a device's: order, ends, the daemon's pool, a device that misbehaves.
//! The twin's memory is this process's, so that what lies there can be looked at.
#![expect(unsafe_code, reason = "writes into memory that stands for a device's")]

use std::sync::Arc;
use std::time::Duration;

use kvtier_device::twin::{TwinConfig, TwinDevice};
use kvtier_memory::FrameId;
use kvtier_memory::checksum::checksum;

use super::JobPoll;
use super::job::{Fate, Kind};
use super::tests::{BLOCK, LONG, Pool, Rig, load, rig, transfer};
use crate::link::LinkState;

const A_WHILE: Duration = Duration::from_millis(100);

fn twin_and_rig() -> (Arc<TwinDevice>, Rig) {
    let twin = Arc::new(TwinDevice::new(TwinConfig::default()).unwrap());
    (Arc::clone(&twin), rig(Some(twin)))
}

/// A block's bytes in a frame: its halves.
fn bytes(byte: u8) -> Vec<u8> {
    [[byte; BLOCK / 2], [byte + 1; BLOCK / 2]].concat()
}

/// Writes where a test knows memory to be.
fn put(at: usize, bytes: &[u8]) {
    let at = std::ptr::with_exposed_provenance_mut::<u8>(at);
    // SAFETY: the tests name places inside of the rig's pool and layers, which nobody else uses at the time.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
}

/// A frame of the daemon's pool that holds a block.
fn in_pool(rig: &Rig, offset: u64, byte: u8) -> FrameId {
    put(rig.pool.base() + usize::try_from(offset).unwrap(), &bytes(byte));
    rig.pool.table.set(offset, 7);
    FrameId { extent: Pool::extent(), offset, bytes: BLOCK as u64, generation: 7 }
}

#[test]
fn blocks_of_the_daemons_pool_are_read_and_never_written() {
    let (twin, rig) = twin_and_rig();
    let frame = in_pool(&rig, 8192, 40);
    let sum = checksum(&bytes(40));
    assert_eq!(rig.run(load(), vec![transfer(frame, sum, 3)]), [Fate::Done]);
    assert!(rig.holds(3, 40));
    assert_eq!(rig.shared.counters.device_load_bytes.get(), BLOCK as u64);
    assert_eq!(rig.run(load(), vec![transfer(frame, sum ^ 1, 3)]), [Fate::Corrupt]);
    twin.flip_next(1);
    assert_eq!(rig.run(load(), vec![transfer(frame, sum, 3)]), [Fate::Corrupt], "a byte changed on the way");
    assert_eq!(rig.run(Kind::Save, vec![transfer(frame, 0, 3)]), [Fate::Lost]);
    rig.pool.table.set(8192, 8);
    assert_eq!(rig.run(load(), vec![transfer(frame, sum, 3)]), [Fate::Lost], "another block lies there now");
    let outside = FrameId { offset: 1 << 40, ..frame };
    assert_eq!(rig.run(load(), vec![transfer(outside, sum, 3)]), [Fate::Lost]);
}

#[test]
fn a_block_that_leaves_the_pool_while_it_is_read_is_lost() {
    let (twin, rig) = twin_and_rig();
    let frame = in_pool(&rig, 0, 50);
    twin.stall();
    let one = vec![transfer(frame, checksum(&bytes(50)), 3)];
    let job = rig.jobs.submit(load(), one, (LONG, 0)).unwrap();
    assert_eq!(rig.jobs.wait(job, A_WHILE, 1), Ok(JobPoll::Pending));
    rig.pool.table.set(0, 0);
    twin.resume();
    assert_eq!(rig.jobs.wait(job, LONG, 1), Ok(JobPoll::Over(vec![Fate::Lost])));
}

#[test]
fn copies_come_after_what_the_engines_stream_was_given() {
    let (twin, mut rig) = twin_and_rig();
    let frame = rig.frame();
    rig.fill(1, 10);
    let stream = twin.stream();
    let layers = rig.layers.each_mut().map(|layer| layer.as_mut_ptr().expose_provenance());
    stream.give(move || {
        for (layer, byte) in layers.into_iter().zip(60..) {
            put(layer + BLOCK / 2, &[byte; BLOCK / 2]);
        }
    });
    let job = rig.jobs.submit(Kind::Save, vec![transfer(frame, 0, 1)], (LONG, stream.handle().0)).unwrap();
    assert_eq!(rig.jobs.wait(job, A_WHILE, 1), Ok(JobPoll::Pending), "the engine has not computed the block yet");
    stream.run();
    assert_eq!(rig.jobs.wait(job, LONG, 1), Ok(JobPoll::Over(vec![Fate::Done])));
    assert_eq!(rig.seals(), [(checksum(&bytes(60)), false)], "what was saved is what the engine computed");
    let unknown = rig.jobs.submit(Kind::Save, vec![transfer(frame, 0, 1)], (LONG, 99)).unwrap();
    assert_eq!(rig.jobs.wait(unknown, LONG, 1), Ok(JobPoll::Over(vec![Fate::Lost])), "of no stream nothing is known");
}

#[test]
fn a_load_is_over_only_when_the_device_has_let_go_of_its_blocks() {
    let (twin, mut rig) = twin_and_rig();
    rig.fill(1, 10);
    let frame = rig.frame();
    assert_eq!(rig.run(Kind::Save, vec![transfer(frame, 0, 1)]), [Fate::Done]);
    let sum = rig.seals()[0].0;
    twin.stall();
    let job = rig.jobs.submit(load(), vec![transfer(frame, sum, 5)], (A_WHILE, 0)).unwrap();
    // Its deadline passes, it is cancelled, and the daemon dies: the device still has the copy.
    assert_eq!(rig.jobs.wait(job, 3 * A_WHILE, 1), Ok(JobPoll::Pending));
    rig.jobs.cancel(job);
    rig.shared.link.lost(LinkState::Absent, "the daemon died".into());
    assert_eq!(rig.jobs.wait(job, A_WHILE, 1), Ok(JobPoll::Pending));
    assert!(!rig.holds(5, 10));
    twin.resume();
    assert_eq!(rig.jobs.wait(job, LONG, 1), Ok(JobPoll::Over(vec![Fate::Done])), "its bytes are right all the same");
    assert!(rig.holds(5, 10));
}

#[test]
fn a_device_that_fails_is_a_miss_and_a_lost_one_stays_lost() {
    let (twin, mut rig) = twin_and_rig();
    rig.fill(1, 10);
    let frame = rig.frame();
    twin.fail_next(1);
    assert_eq!(rig.run(Kind::Save, vec![transfer(frame, 0, 1)]), [Fate::Lost]);
    assert_eq!(rig.seals(), [(0, true)]);
    assert_eq!(rig.run(Kind::Save, vec![transfer(frame, 0, 1)]), [Fate::Done]);
    let sum = rig.seals()[0].0;
    twin.flip_next(1);
    assert_eq!(rig.run(load(), vec![transfer(frame, sum, 5)]), [Fate::Corrupt]);
    assert_eq!(rig.run(load(), vec![transfer(frame, sum, 5)]), [Fate::Done]);
    twin.lose();
    assert_eq!(rig.run(load(), vec![transfer(frame, sum, 5)]), [Fate::Lost]);
    assert_eq!(rig.run(Kind::Save, vec![transfer(frame, 0, 1)]), [Fate::Lost]);
    rig.jobs.close();
}

#[test]
fn a_device_without_checksums_is_checked_on_the_host() {
    let twin = TwinDevice::new(TwinConfig { sums: false, ..TwinConfig::default() }).unwrap();
    let mut rig = rig(Some(Arc::new(twin)));
    rig.fill(1, 10);
    let frame = rig.frame();
    assert_eq!(rig.run(Kind::Save, vec![transfer(frame, 0, 1)]), [Fate::Done]);
    assert_eq!(rig.seals(), [(checksum(&bytes(10)), false)]);
    assert_eq!(rig.run(load(), vec![transfer(frame, checksum(&bytes(10)), 5)]), [Fate::Done]);
    assert_eq!(rig.run(load(), vec![transfer(frame, 1, 5)]), [Fate::Corrupt]);
    // What lies in the pool could not be checked, so it is not read.
    assert!(rig.shared.device.as_ref().unwrap().readable().is_empty());
    assert_eq!(rig.run(load(), vec![transfer(in_pool(&rig, 0, 9), checksum(&bytes(9)), 5)]), [Fate::Lost]);
}

#[test]
fn extents_are_registered_while_copies_go_on() {
    let (_twin, rig) = twin_and_rig();
    let frame = rig.frame();
    let many = vec![transfer(frame, 0, 1); 5000];
    assert_eq!(rig.run(Kind::Save, many), vec![Fate::Done; 5000]);
    let until = std::time::Instant::now() + LONG;
    while rig.shared.counters.extents_pinned.get() == 0 {
        assert!(std::time::Instant::now() < until, "the extent is registered in the background");
        std::thread::yield_now();
    }
}
