//! One read while it lasts: divided in parts that the link's streams fill, and its end.
//!
//! *Cancellation*: however the read ends, its memory is taken back first, so nothing is written to it after. Bytes still
//! under way are received and dropped by their streams; the room they take in flight is free once they came.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvtier_memory::IoBuf;
use kvtier_memory::checksum::combine;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Counters;
use super::raw::{Landing, PART_BYTES, Part};
use crate::{ReadDone, TransportError};

/// What the parts of a read share.
#[derive(Debug)]
struct Tally {
    state: Mutex<TallyState>,
    /// Room in flight, held until the last part ended.
    _room: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct TallyState {
    /// Checksum of each part that is complete, by its place.
    parts: Vec<Option<u64>>,
    left: usize,
    done: Option<oneshot::Sender<Result<u64, TransportError>>>,
}

/// A part on its way. Dropping it before it is complete fails the read.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) part: Part,
    place: usize,
    tally: Arc<Tally>,
}

impl Piece {
    /// Ends a part: well only if all of its bytes came.
    pub(super) fn end(self) {
        if self.part.missing() == 0 {
            self.tally.complete(self.place, self.part.checksum());
        }
    }

    /// Fails the read.
    pub(super) fn fail(self, error: TransportError) {
        self.tally.fail(error);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // After a complete part this finds nothing to do.
        let ended = self.tally.state.lock().parts.get(self.place).is_some_and(Option::is_some);
        if !ended {
            self.tally.fail(TransportError::LinkDown { source: None });
        }
    }
}

impl Tally {
    fn complete(&self, place: usize, checksum: u64) {
        let mut state = self.state.lock();
        state.parts[place] = Some(checksum);
        state.left -= 1;
        if state.left > 0 {
            return;
        }
        let checksum =
            state.parts.iter().flatten().copied().reduce(|first, next| combine(first, next, PART_BYTES as u64));
        if let (Some(done), Some(checksum)) = (state.done.take(), checksum) {
            // The reader may have gone.
            let _unclaimed = done.send(Ok(checksum));
        }
    }

    fn fail(&self, error: TransportError) {
        if let Some(done) = self.state.lock().done.take() {
            // The reader may have gone.
            let _unclaimed = done.send(Err(error));
        }
    }
}

/// The reader's end.
#[derive(Debug)]
pub(super) struct Reading {
    landing: Arc<Landing>,
    pub(super) done: oneshot::Receiver<Result<u64, TransportError>>,
    counters: Arc<Counters>,
}

/// Divides a read.
pub(super) fn begin(into: IoBuf, room: OwnedSemaphorePermit, counters: Arc<Counters>) -> (Reading, Vec<Piece>) {
    let (landing, parts) = Landing::divide(into, PART_BYTES);
    let (sender, done) = oneshot::channel();
    let state = TallyState { parts: vec![None; parts.len()], left: parts.len(), done: Some(sender) };
    let tally = Arc::new(Tally { state: Mutex::new(state), _room: room });
    let piece = |(place, part)| Piece { part, place, tally: Arc::clone(&tally) };
    let pieces = parts.into_iter().enumerate().map(piece).collect();
    (Reading { landing, done, counters }, pieces)
}

impl Reading {
    /// Ends the read and gives its memory back.
    pub(super) fn end(self, result: Result<u64, TransportError>) -> ReadDone {
        let into = self.landing.take().expect("only the end of a read takes its memory");
        self.counters.count(&result, into.len());
        ReadDone { into, result }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let abandoned = self.landing.take();
        if abandoned.is_some() {
            self.counters.failed_reads.fetch_add(1, Ordering::Relaxed);
        }
    }
}
