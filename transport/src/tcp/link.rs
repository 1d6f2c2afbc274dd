//! A link to one peer: several streams, and the room in flight that its reads share.
//!
//! *Invariants*: a link whose stream ended is dead as a whole, and stays so.
//!
//! *Bounds*: `max_inflight_bytes` asked for and not received; further reads wait for room, first come, first served.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use kvtier_memory::IoBuf;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Counters;
use super::address::Exposed;
use super::lane::{Ask, Lane};
use super::read::{Reading, begin};
use super::wire::Token;
use crate::{Descriptor, Link, ReadDone, ReadTerms, TransportError};

/// What a link is made of.
pub(super) struct Setup {
    pub(super) instance: Token,
    pub(super) max_inflight_bytes: u32,
    pub(super) silence: Duration,
    pub(super) closed: CancellationToken,
    pub(super) counters: Arc<Counters>,
}

/// A link.
#[derive(Debug)]
pub(super) struct TcpLink {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    instance: Token,
    lanes: Vec<Lane>,
    room: Arc<Semaphore>,
    most_room: u32,
    alive: AtomicBool,
    /// Why it ended, where it was not closed on purpose.
    reason: Mutex<Option<(io::ErrorKind, String)>>,
    closed: CancellationToken,
    counters: Arc<Counters>,
}

impl TcpLink {
    /// Starts the tasks of streams that were greeted.
    pub(super) fn start(setup: Setup, streams: Vec<TcpStream>, tasks: &TaskTracker) -> Self {
        setup.counters.links.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            instance: setup.instance,
            lanes: streams.iter().map(|_| Lane::new()).collect(),
            room: Arc::new(Semaphore::new(setup.max_inflight_bytes.try_into().unwrap_or(usize::MAX >> 3))),
            most_room: setup.max_inflight_bytes,
            alive: AtomicBool::new(true),
            reason: Mutex::new(None),
            closed: setup.closed,
            counters: setup.counters,
        });
        for (n, stream) in streams.into_iter().enumerate() {
            let (shared, silence) = (Arc::clone(&shared), setup.silence);
            tasks.spawn(async move { shared.run(n, stream, silence).await });
        }
        Self { shared }
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.shared.end();
        self.shared.counters.links.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A read that has not begun: it was refused, or waits for room.
enum Start {
    Refused(IoBuf, TransportError),
    Begun(Reading),
    Waits(IoBuf, u32),
}

impl Link for TcpLink {
    fn read(&self, from: &Descriptor, into: IoBuf, terms: ReadTerms) -> BoxFuture<'static, ReadDone> {
        let shared = Arc::clone(&self.shared);
        let (start, capability) = match shared.admit(from, &into, &terms) {
            Ok(capability) => (shared.start(capability, into), capability),
            Err(error) => (Start::Refused(into, error), Token::default()),
        };
        Box::pin(async move {
            let reading = match start {
                Start::Refused(into, error) => return shared.refuse(into, error),
                Start::Begun(reading) => reading,
                Start::Waits(into, bytes) => match shared.room(bytes, &terms).await {
                    Ok(room) => shared.begin(capability, into, room),
                    Err(error) => return shared.refuse(into, error),
                },
            };
            shared.finish(reading, &terms).await
        })
    }

    fn is_alive(&self) -> bool {
        self.shared.is_alive()
    }
}

impl Shared {
    /// Serves one stream until it, or the link, ends.
    async fn run(&self, n: usize, stream: TcpStream, silence: Duration) {
        tokio::select! {
            () = self.closed.cancelled() => {}
            error = self.lanes[n].run(stream, silence) => {
                tracing::debug!(%error, "a transport link ended");
                self.reason.lock().get_or_insert((error.kind(), error.to_string()));
            }
        }
        self.end();
        self.lanes[n].end();
    }

    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire) && !self.closed.is_cancelled()
    }

    fn end(&self) {
        self.alive.store(false, Ordering::Release);
        self.closed.cancel();
    }

    /// The capability to read with, if the read makes sense.
    fn admit(&self, from: &Descriptor, into: &IoBuf, terms: &ReadTerms) -> Result<Token, TransportError> {
        let exposed = Exposed::decode(from)?;
        let wanted = into.len() as u64;
        if exposed.bytes != wanted {
            return Err(TransportError::Length { exposed: exposed.bytes, wanted });
        }
        if exposed.instance != self.instance {
            return Err(TransportError::Gone);
        }
        if terms.cancel.is_cancelled() {
            return Err(TransportError::Cancelled);
        }
        if terms.deadline <= Instant::now() {
            return Err(TransportError::Deadline);
        }
        if !self.is_alive() {
            return Err(self.down());
        }
        Ok(exposed.capability)
    }

    fn start(&self, capability: Token, into: IoBuf) -> Start {
        let bytes = u32::try_from(into.len()).unwrap_or(u32::MAX).clamp(1, self.most_room);
        match Arc::clone(&self.room).try_acquire_many_owned(bytes) {
            Ok(room) => Start::Begun(self.begin(capability, into, room)),
            Err(_) => Start::Waits(into, bytes),
        }
    }

    fn begin(&self, capability: Token, into: IoBuf, room: OwnedSemaphorePermit) -> Reading {
        let (reading, pieces) = begin(into, room, Arc::clone(&self.counters));
        for piece in pieces {
            let lane = self.lanes.iter().min_by_key(|lane| lane.load()).expect("a link has streams");
            lane.ask(Ask { piece, capability });
        }
        reading
    }

    async fn room(&self, bytes: u32, terms: &ReadTerms) -> Result<OwnedSemaphorePermit, TransportError> {
        tokio::select! {
            biased;
            () = terms.cancel.cancelled() => Err(TransportError::Cancelled),
            () = self.closed.cancelled() => Err(self.down()),
            room = Arc::clone(&self.room).acquire_many_owned(bytes) => room.map_err(|_| self.down()),
            () = sleep_until(terms.deadline) => Err(TransportError::Deadline),
        }
    }

    async fn finish(&self, mut reading: Reading, terms: &ReadTerms) -> ReadDone {
        let result = tokio::select! {
            biased;
            ended = &mut reading.done => match ended {
                Ok(Err(TransportError::LinkDown { source: None })) | Err(_) => Err(self.down()),
                Ok(ended) => ended,
            },
            () = terms.cancel.cancelled() => Err(TransportError::Cancelled),
            () = sleep_until(terms.deadline) => Err(TransportError::Deadline),
        };
        reading.end(result)
    }

    fn refuse(&self, into: IoBuf, error: TransportError) -> ReadDone {
        let result = Err(error);
        self.counters.count(&result, into.len());
        ReadDone { into, result }
    }

    fn down(&self) -> TransportError {
        let reason = self.reason.lock().clone();
        TransportError::LinkDown { source: reason.map(|(kind, why)| io::Error::new(kind, why)) }
    }
}
