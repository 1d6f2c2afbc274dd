//! A link as its user has it: a name of the worker's link, with what is checked before the worker is asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::FutureExt;
use futures::future::{BoxFuture, ready};
use kvtier_memory::IoBuf;
use kvtier_memory::checksum::EMPTY;

use super::inbox::{Command, Inbox};
use super::job::{Job, follow};
use super::stats::Counters;
use super::wire::{Place, Token};
use crate::{Descriptor, Link, ReadDone, ReadTerms, TransportError};

/// What the worker answers to a connect: its name for the link, and whether it still works.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) link: u64,
    pub(super) alive: Arc<AtomicBool>,
}

/// A link to a peer.
#[derive(Debug)]
pub(super) struct UcxLink {
    pub(super) connected: Connected,
    /// The peer's.
    pub(super) token: Token,
    pub(super) inbox: Arc<Inbox>,
    pub(super) counters: Arc<Counters>,
}

impl UcxLink {
    /// Begins a read of `place`.
    pub(super) fn begin(&self, place: Place, into: IoBuf, terms: ReadTerms) -> BoxFuture<'static, ReadDone> {
        if let Err(refused) = self.check(&place, &into, &terms) {
            return self.refuse(into, refused);
        }
        if into.is_empty() {
            return ready(ReadDone { into, result: Ok(EMPTY) }).boxed();
        }
        let job = Arc::new(Job::new(place, into, terms.deadline.into_std()));
        let command = Command::Read { link: self.connected.link, job: Arc::clone(&job) };
        if let Err(refused) = self.inbox.send(command) {
            job.fail(refused.into());
        }
        follow(job, Arc::clone(&self.inbox), Arc::clone(&self.counters), terms).boxed()
    }

    fn check(&self, place: &Place, into: &IoBuf, terms: &ReadTerms) -> Result<(), TransportError> {
        if place.token != self.token {
            return Err(TransportError::Gone);
        }
        let wanted = into.len() as u64;
        if place.len != wanted {
            return Err(TransportError::Length { exposed: place.len, wanted });
        }
        if terms.cancel.is_cancelled() {
            return Err(TransportError::Cancelled);
        }
        if terms.deadline <= tokio::time::Instant::now() {
            return Err(TransportError::Deadline);
        }
        if self.is_alive() { Ok(()) } else { Err(TransportError::LinkDown { source: None }) }
    }

    fn refuse(&self, into: IoBuf, refused: TransportError) -> BoxFuture<'static, ReadDone> {
        self.counters.count_read(None);
        ready(ReadDone { into, result: Err(refused) }).boxed()
    }
}

impl Link for UcxLink {
    fn read(&self, from: &Descriptor, into: IoBuf, terms: ReadTerms) -> BoxFuture<'static, ReadDone> {
        match Place::decode(from) {
            Ok(place) => self.begin(place, into, terms),
            Err(refused) => self.refuse(into, refused),
        }
    }

    fn is_alive(&self) -> bool {
        self.connected.alive.load(Ordering::Acquire)
    }
}

impl Drop for UcxLink {
    fn drop(&mut self) {
        // Refused only when the worker has ended, and its links with it.
        let _ended = self.inbox.send(Command::Drop { link: self.connected.link });
    }
}
