//! Segments on file systems with room for fewer files than there may be, the keeper played by hand.

use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::conformance::meta;

const SEGMENT: u64 = 1 << 20;
/// One record fills more than half of a segment: every one lies in a segment of its own.
const RECORD: usize = 600_000;

struct Played {
    index: Arc<Index>,
    told: Receiver<Command>,
    /// Files that the file system has room for.
    room: u32,
    made: u32,
    refused: u32,
    written: u64,
}

impl Played {
    fn new(segments: u32, room: u32) -> Self {
        let (commands, told) = channel();
        let absent = (0..segments).map(|_| Segment::absent()).collect();
        let index = Arc::new(Index::new(absent, SEGMENT, commands));
        Self { index, told, room, made: 0, refused: 0, written: 0 }
    }

    /// Does what the keeper was told.
    fn work(&mut self) {
        while let Ok(command) = self.told.try_recv() {
            match command {
                Command::Prepare(segment) => self.prepare(segment),
                Command::Seal(segment) => self.index.sealed(segment),
                other => panic!("{other:?}"),
            }
        }
    }

    fn prepare(&mut self, segment: u32) {
        if let Some(file) = self.index.file_of(segment) {
            self.index.prepared(segment, 1, file);
        } else if self.made < self.room {
            self.made += 1;
            self.index.prepared(segment, 1, Arc::new(tempfile::tempfile().unwrap()));
        } else {
            self.refused += 1;
            self.index.prepare_failed(segment, None);
        }
    }

    /// Where the next record goes; `None` when nothing is free.
    fn write(&mut self) -> Option<Location> {
        let meta = meta(self.written, &vec![0u8; RECORD]);
        self.written += 1;
        loop {
            match self.index.reserve(&meta) {
                Reserve::Granted(reservation) => {
                    let at = reservation.commit(meta);
                    self.work();
                    return Some(at);
                }
                Reserve::Wait => self.work(),
                Reserve::Full => return None,
            }
        }
    }

    /// As many as there is room for, at three files.
    fn full() -> (Self, [Location; 3]) {
        let mut this = Self::new(8, 3);
        assert_eq!(this.index.room_bytes(), 8 * SEGMENT);
        let written = [(); 3].map(|()| this.write().unwrap());
        assert_eq!(written.map(|at| at.segment), [0, 1, 2]);
        assert_eq!(this.refused, 1);
        (this, written)
    }

    fn refused_long_ago(&self) {
        let then = Instant::now().checked_sub(GROW_RETRY).expect("the machine is up for a minute");
        self.index.inner.lock().no_file_since = Some(then);
    }
}

#[test]
fn only_files_that_exist_are_room_once_another_was_refused() {
    let (mut this, written) = Played::full();
    assert!(this.index.room_bytes() < SEGMENT, "{}", this.index.room_bytes());
    assert_eq!(this.write(), None);
    this.work();
    assert_eq!(this.index.room_bytes(), 0);
    this.index.forget(written[1]);
    assert_eq!(this.index.room_bytes(), SEGMENT);
    assert_eq!(this.write().unwrap().segment, 1, "what is free is used though no other file can be had");
    assert_eq!(this.index.usage().capacity_bytes, 8 * SEGMENT);
}

#[test]
fn another_file_is_asked_for_again_after_a_while_and_what_is_free_does_not_wait_for_it() {
    let (mut this, written) = Played::full();
    this.index.forget(written[0]);
    this.refused_long_ago();
    assert_eq!(this.write().unwrap().segment, 0, "refused again");
    assert!(this.refused >= 2);
    this.index.forget(written[1]);
    this.room = 4;
    this.refused_long_ago();
    assert_eq!(this.write().unwrap().segment, 3, "there is room now");
    assert!(this.index.room_bytes() >= 5 * SEGMENT, "{}", this.index.room_bytes());
}

#[test]
fn candidates_are_the_emptiest_first() {
    let (mut this, written) = Played::full();
    assert_eq!(this.write(), None);
    this.work();
    assert_eq!(this.index.reclaim_candidates(8), [0, 1, 2]);
    assert_eq!(this.index.reclaim_candidates(2), [0, 1]);
    this.index.forget(written[0]);
    assert_eq!(this.index.reclaim_candidates(8), [1, 2]);
    assert_eq!(this.index.reclaim_candidate(), Some(1));
}
