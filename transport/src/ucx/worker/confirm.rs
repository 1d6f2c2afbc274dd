//! Confirms reads: a read counts only if the peer's greeting could be read after it, unchanged.
//!
//! Where UCX reads the memory of another process by its number, that process may have ended, and another have its number;
//! or the transport there was closed while its memory is still mapped. A peer clears its greeting before it closes.
//!
//! *Bounds*: one small read of the greeting per link at a time, for all reads that became whole before it began.

use std::mem::take;
use std::rc::Rc;
use std::sync::Arc;

use kvtier_memory::IoBuf;

use super::{Engine, Why};
use crate::ucx::raw::{Endpoint, Failure, Get, Landing, Posted, RemoteKey};
use crate::ucx::start::{GREETING_BYTES, greeting};
use crate::ucx::wire::Address;

/// Marks the tag of a greeting's read; the rest is its link. Reads count up from one and never get there.
const GREETING: u64 = 1 << 63;

/// The link whose greeting is read with this tag, if it is such a tag.
pub(super) fn link_of(tag: u64) -> Option<u64> {
    (tag & GREETING != 0).then_some(tag & !GREETING)
}

/// A link's reads to confirm.
#[derive(Debug)]
pub(super) struct Confirming {
    /// Reads whose bytes are all there and that no reading of the greeting is in flight for.
    pub(super) whole: Vec<u64>,
    /// Reads that the greeting in flight is for.
    asked: Vec<u64>,
    in_flight: bool,
    key: Rc<RemoteKey>,
    remote: u64,
    expected: [u8; GREETING_BYTES],
    landing: Arc<Landing>,
}

impl Confirming {
    pub(super) fn new(endpoint: &Endpoint, address: &Address) -> Result<Self, Failure> {
        Ok(Self {
            whole: Vec::new(),
            asked: Vec::new(),
            in_flight: false,
            key: Rc::new(endpoint.unpack(&address.key)?),
            remote: address.greeting,
            expected: greeting(address.token),
            landing: Arc::new(Landing::new(IoBuf::heap(GREETING_BYTES))),
        })
    }

    fn is_as_expected(&self) -> bool {
        let mut answered = [0; GREETING_BYTES];
        self.landing.copy_out(&mut answered);
        answered == self.expected
    }
}

impl Engine {
    /// Asks for greetings where reads wait for it; returns whether one was asked for.
    pub(super) fn confirm_all(&mut self) -> bool {
        let ready =
            self.links.iter().filter(|(_, link)| !link.confirming.in_flight && !link.confirming.whole.is_empty());
        let ready: Vec<u64> = ready.map(|(id, _)| *id).collect();
        for link in &ready {
            self.ask(*link);
        }
        !ready.is_empty()
    }

    fn ask(&mut self, link_id: u64) {
        let Some(link) = self.links.get_mut(&link_id) else { return };
        let confirming = &mut link.confirming;
        let Some(endpoint) = &link.endpoint else { return confirming.whole.clear() };
        confirming.asked = take(&mut confirming.whole);
        let (key, landing) = (Rc::clone(&confirming.key), Arc::clone(&confirming.landing));
        let get = Get { tag: GREETING | link_id, key, remote: confirming.remote, landing, at: 0, len: GREETING_BYTES };
        match endpoint.get(get) {
            Ok(Posted::Done) => self.answered(link_id, Ok(())),
            Ok(Posted::InFlight) => confirming.in_flight = true,
            Err(failure) => self.answered(link_id, Err(failure)),
        }
    }

    /// The greeting was read, or not.
    pub(super) fn answered(&mut self, link_id: u64, result: Result<(), Failure>) {
        let Some(link) = self.links.get_mut(&link_id) else { return };
        let confirming = &mut link.confirming;
        confirming.in_flight = false;
        let asked = take(&mut confirming.asked);
        match result {
            Err(failure) => self.fail_link(link_id, &Why::Failed(failure)),
            Ok(()) if !confirming.is_as_expected() => self.fail_link(link_id, &Why::Gone),
            Ok(()) => asked.into_iter().for_each(|tag| self.confirm(tag)),
        }
    }

    fn confirm(&mut self, tag: u64) {
        // It may have been given up, or failed with its link.
        if let Some(active) = self.jobs.get_mut(&tag) {
            active.confirmed = true;
            active.job.confirm(active.sum);
            self.retire(tag);
        }
    }
}
