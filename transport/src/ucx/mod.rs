//! UCX, opened at run time: RDMA, shared memory, device memory.
//!
//! ```text
//! UcxTransport, UcxLink --Command--> Inbox --> Engine (one thread) --> raw (the unsafe wall) --> libucp
//! read futures <----checksum or failure--------- Job <-----'
//! ```
//! *Invariants*
//! - One thread owns everything of UCX. It never runs code of its users, and they never wait for it without a deadline.
//! - Both ends handle peer errors, so reads from a peer that died end: at once where there is a connection, within
//!   [`UcxConfig::keepalive`] where there is none.
//! - A link is made only to a peer whose greeting can be read, and a read succeeds only if it could be read again after, so
//!   path, version and process are right, and the peer's transport was not closed before the bytes were read.
//! - A read that ends early while UCX may still write its buffer, or the thread still reads it, answers with fresh heap
//!   memory in [`crate::ReadDone::into`]; the buffer it was given goes back to its owner when nothing uses it any more.
//!
//! *Bounds*: those of [`worker`], `inbox` and `registry`; [`UcxConfig::max_exposures`].
//!
//! Dropping an [`crate::Exposure`] does not end reads of it that a peer begins with what it knows: UCX cannot revoke a key
//! before the whole extent is unregistered. The reader's comparison of checksums is the guard.

mod config;
mod inbox;
mod job;
mod link;
mod raw;
mod registry;
mod start;
mod stats;
mod wire;
mod worker;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use kvtier_memory::{FramePin, IoBuf};
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

pub use self::config::UcxConfig;
use self::inbox::Command;
use self::link::{Connected, UcxLink};
use self::registry::Registered;
use self::start::GREETING_BYTES;
use self::stats::Counters;
use self::wire::{Address, Place, Token};
use self::worker::Shared;
use crate::{Descriptor, Exposure, Kind, Link, ReadTerms, Transport, TransportError, TransportStats};

/// Longest wait for an extent to be registered: UCX pins its pages at some GiB per second.
const REGISTER_LIMIT: Duration = Duration::from_secs(10);
/// How long the thread of a transport that is dropped without being closed has to end its links.
const DROP_LIMIT: Duration = Duration::from_secs(1);

/// The UCX transport.
#[derive(Debug)]
pub struct UcxTransport {
    shared: Shared,
    /// UCX's major and minor version.
    version: (u16, u16),
    token: Token,
    max_exposures: usize,
    address: Bytes,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// True once the thread has ended everything.
    ended: watch::Receiver<bool>,
}

impl UcxTransport {
    /// UCX's version, as `major.minor`.
    #[must_use]
    pub fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    fn registered(&self, frame: &FramePin) -> Result<Arc<Registered>, TransportError> {
        if let Some(registered) = self.shared.registry.get(frame.extent()) {
            return Ok(registered);
        }
        let (reply, answer) = sync_channel(1);
        self.shared.inbox.send(Command::Register { extent: Arc::clone(frame.extent()), reply })?;
        answer.recv_timeout(REGISTER_LIMIT).unwrap_or(Err(TransportError::Deadline))
    }

    /// Connects, and reads the peer's greeting to know that the link works and who answers.
    async fn greet(&self, address: Address, deadline: tokio::time::Instant) -> Result<Box<dyn Link>, TransportError> {
        let (token, greeting_at, key) = (address.token, address.greeting, address.key.clone());
        let (reply, answer) = oneshot::channel();
        self.shared.inbox.send(Command::Connect { address, reply })?;
        let connected: Connected = answer.await.map_err(|_| TransportError::LinkDown { source: None })??;
        let (inbox, counters) = (Arc::clone(&self.shared.inbox), Arc::new(Counters::default()));
        let mut link = UcxLink { connected, token, inbox, counters };
        let place = Place { token, address: greeting_at, len: GREETING_BYTES as u64, key };
        let terms = ReadTerms { deadline, cancel: CancellationToken::new() };
        let done = link.begin(place, IoBuf::heap(GREETING_BYTES), terms).await;
        // Like every read it succeeds only where the greeting is as it should be.
        done.result?;
        // From here on its reads are its user's, and count.
        link.counters = Arc::clone(&self.shared.counters);
        Ok(Box::new(link))
    }
}

#[async_trait]
impl Transport for UcxTransport {
    fn kind(&self) -> Kind {
        Kind::Ucx
    }

    fn address(&self) -> Bytes {
        self.address.clone()
    }

    fn expose_waits(&self) -> bool {
        true
    }

    /// The first exposure of an extent registers it, which waits for UCX to pin its pages.
    fn expose(&self, frame: FramePin) -> Result<Box<dyn Exposure>, TransportError> {
        let exposed = &self.shared.counters.exposed;
        if exposed.load(Ordering::Relaxed) >= self.max_exposures as u64 {
            return Err(TransportError::Limit { what: "frames exposed over UCX", max: self.max_exposures });
        }
        let registered = self.registered(&frame)?;
        let address = frame.as_ptr().expose_provenance() as u64;
        let place = Place { token: self.token, address, len: frame.len() as u64, key: registered.key.clone() };
        let descriptor = place.encode()?;
        exposed.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(UcxExposure {
            descriptor,
            registered: Some(registered),
            shared: self.shared.clone(),
            _frame: frame,
        }))
    }

    async fn connect(&self, address: &[u8], deadline: Duration) -> Result<Box<dyn Link>, TransportError> {
        let address = Address::decode(address, self.version)?;
        let deadline = tokio::time::Instant::now() + deadline;
        tokio::time::timeout_at(deadline, self.greet(address, deadline)).await.unwrap_or(Err(TransportError::Deadline))
    }

    fn stats(&self) -> TransportStats {
        self.shared.counters.now()
    }

    async fn close(&self, deadline: Duration) {
        let close = Command::Close { deadline: Instant::now() + deadline };
        if self.shared.inbox.send(close).is_err() {
            return;
        }
        let mut ended = self.ended.clone();
        // The thread ends by the deadline by itself; what is added is for its last steps.
        let ended = tokio::time::timeout(deadline + DROP_LIMIT, ended.wait_for(|ended| *ended)).await;
        let thread = self.thread.lock().take();
        match (ended, thread) {
            // It has nothing left to do but to return.
            (Ok(_), Some(thread)) => drop(thread.join()),
            (Ok(_), None) => {}
            (Err(_), _) => tracing::warn!("UCX's thread did not end in time: it is left behind"),
        }
    }
}

impl Drop for UcxTransport {
    fn drop(&mut self) {
        // Refused only when it was closed before.
        let _closed = self.shared.inbox.send(Command::Close { deadline: Instant::now() + DROP_LIMIT });
    }
}

/// An exposed frame.
#[derive(Debug)]
struct UcxExposure {
    descriptor: Descriptor,
    /// Taken when it is dropped.
    registered: Option<Arc<Registered>>,
    shared: Shared,
    _frame: FramePin,
}

impl Exposure for UcxExposure {
    fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }
}

impl Drop for UcxExposure {
    fn drop(&mut self) {
        self.shared.counters.exposed.fetch_sub(1, Ordering::Relaxed);
        // Besides this one the registry has one: it may have been the last exposure.
        let last = self.registered.take().is_some_and(|registered| Arc::strong_count(&registered) <= 2);
        if last {
            self.shared.inbox.notice();
        }
    }
}
