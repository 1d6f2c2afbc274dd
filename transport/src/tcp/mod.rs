//! Our own framing over TCP: several streams a link, bytes straight from and into frames.
//!
//! ```text
//! reader                                               owner
//! read -> parts -> lanes --requests (many a write)-->  table of exposed frames
//!         memory  <------- replies (in order) -------  vectored sends from the frames
//! ```
//! A restarted owner is another instance: what the former one handed out is gone.
//!
//! *Cancellation*: every task ends with its link or with the transport, and [`TcpTransport`]'s `close` waits for them.

mod address;
mod exposures;
mod lane;
mod link;
mod raw;
mod read;
mod server;
mod socket;
mod wire;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::try_join_all;
use kvtier_memory::FramePin;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::{Exposure, Kind, Link, Transport, TransportError, TransportStats};
use address::{Address, other_version};
use exposures::Exposures;
use link::{Setup, TcpLink};
use server::{Server, ServerCounters};
pub use socket::HOST_BUFFER_BYTES;
use socket::{prepare, receive_hello, send_hello};
use wire::{Hello, Welcome, token};

/// Most streams of one link.
const MAX_STREAMS: usize = 64;

/// What a transport is started with.
#[derive(Debug, Clone)]
pub struct TcpConfig {
    /// Where to listen; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Host name or address that peers reach this node by; the one listened on if it is `None`.
    pub advertise: Option<String>,
    /// TCP connections of one link, 1 to 64: one alone does not fill a fast network.
    pub streams_per_link: usize,
    /// Most bytes that one link has asked for and not received.
    pub max_inflight_bytes: u32,
    /// Most connections that peers can have here, their links' streams counted one by one.
    pub max_connections: usize,
    /// Most frames exposed at a time.
    pub max_exposures: usize,
    /// A peer that moves no byte for so long, with some to move, is dead.
    pub silence: Duration,
    /// Most time that a new connection has to say hello.
    pub handshake: Duration,
}

impl TcpConfig {
    /// The defaults.
    #[must_use]
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            advertise: None,
            streams_per_link: 4,
            max_inflight_bytes: 64 << 20,
            max_connections: 1024,
            max_exposures: 64 << 10,
            silence: Duration::from_secs(10),
            handshake: Duration::from_secs(5),
        }
    }
}

/// What the reading side counts.
#[derive(Debug, Default)]
struct Counters {
    read_bytes: AtomicU64,
    reads: AtomicU64,
    failed_reads: AtomicU64,
    links: AtomicU64,
}

impl Counters {
    fn count(&self, result: &Result<u64, TransportError>, len: usize) {
        if result.is_ok() {
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.read_bytes.fetch_add(len as u64, Ordering::Relaxed);
        } else {
            self.failed_reads.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Connections that were turned away, counts that only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TurnedAway {
    /// For what they sent, for sending nothing, or for taking nothing.
    pub garbage: u64,
    /// For being too many.
    pub too_many: u64,
}

/// A transport over TCP. Dropping it ends its tasks without waiting for them.
#[derive(Debug)]
pub struct TcpTransport {
    config: TcpConfig,
    address: Bytes,
    server: Arc<Server>,
    counters: Arc<Counters>,
}

impl TcpTransport {
    /// Listens, and serves what will be exposed. Tasks run on the caller's runtime.
    ///
    /// # Errors
    /// [`TransportError::Unavailable`] when the configuration cannot work or the port cannot be had.
    pub async fn start(config: TcpConfig) -> Result<Self, TransportError> {
        let unavailable = |reason| TransportError::Unavailable { kind: Kind::Tcp.name(), reason };
        if config.streams_per_link == 0 || config.streams_per_link > MAX_STREAMS || config.max_inflight_bytes == 0 {
            let rule = format!("a link has 1 to {MAX_STREAMS} streams and at least one byte in flight");
            return Err(unavailable(rule));
        }
        let cannot = |error: io::Error| unavailable(format!("cannot listen on {}: {error}", config.listen));
        let listener = TcpListener::bind(config.listen).await.map_err(cannot)?;
        let bound = listener.local_addr().map_err(cannot)?;
        let host = match &config.advertise {
            Some(host) if host.contains(':') && !host.starts_with('[') => format!("[{host}]:{}", bound.port()),
            Some(host) => format!("{host}:{}", bound.port()),
            None if bound.ip().is_unspecified() => {
                return Err(unavailable(format!("peers cannot reach {bound}: set the host to advertise")));
            }
            None => bound.to_string(),
        };
        if host.len() > usize::from(u8::MAX) {
            return Err(unavailable(format!("{host} is too long a host to advertise")));
        }
        let instance = token();
        let server = Arc::new(Server {
            exposures: Exposures::new(instance, config.max_exposures),
            counters: Arc::default(),
            connections: Arc::new(Semaphore::new(config.max_connections.min(Semaphore::MAX_PERMITS))),
            silence: config.silence,
            handshake: config.handshake,
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        server.tasks.spawn(Arc::clone(&server).accept(listener));
        let address = Address { instance, hosts: vec![host] }.encode();
        Ok(Self { config, address, server, counters: Arc::default() })
    }

    /// Connections turned away so far.
    #[must_use]
    pub fn turned_away(&self) -> TurnedAway {
        let ServerCounters { garbage, refused, .. } = &*self.server.counters;
        TurnedAway { garbage: garbage.load(Ordering::Relaxed), too_many: refused.load(Ordering::Relaxed) }
    }

    async fn open(&self, address: &Address) -> Result<Vec<TcpStream>, TransportError> {
        let mut failed = TransportError::LinkDown { source: None };
        for host in &address.hosts {
            let streams = (0..self.config.streams_per_link).map(|_| self.open_stream(host, address.instance));
            match try_join_all(streams).await {
                Ok(streams) => return Ok(streams),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    async fn open_stream(&self, host: &str, instance: wire::Token) -> Result<TcpStream, TransportError> {
        let down = |error| TransportError::LinkDown { source: Some(error) };
        let mut stream = TcpStream::connect(host).await.map_err(down)?;
        prepare(&stream, self.config.silence).map_err(down)?;
        send_hello(&mut stream, Hello::new(Welcome::Ok, instance)).await.map_err(down)?;
        let theirs = receive_hello(&mut stream).await.map_err(down)?;
        if let Some(error) = other_version(theirs.version) {
            return Err(error);
        }
        match theirs.welcome {
            Welcome::Ok if theirs.instance == instance => Ok(stream),
            Welcome::Ok | Welcome::OtherInstance => Err(TransportError::Gone),
            Welcome::Full => {
                let full = io::Error::new(io::ErrorKind::ConnectionRefused, "the peer has all its connections");
                Err(down(full))
            }
        }
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        self.server.closed.cancel();
    }
}

#[async_trait]
impl Transport for TcpTransport {
    fn kind(&self) -> Kind {
        Kind::Tcp
    }

    fn address(&self) -> Bytes {
        self.address.clone()
    }

    fn expose(&self, frame: FramePin) -> Result<Box<dyn Exposure>, TransportError> {
        Ok(Box::new(self.server.exposures.add(frame)?))
    }

    async fn connect(&self, address: &[u8], deadline: Duration) -> Result<Box<dyn Link>, TransportError> {
        let address = Address::decode(address)?;
        let closed = self.server.closed.child_token();
        let streams = tokio::select! {
            () = closed.cancelled() => return Err(TransportError::LinkDown { source: None }),
            opened = timeout(deadline, self.open(&address)) => opened.map_err(|_| TransportError::Deadline)??,
        };
        let setup = Setup {
            instance: address.instance,
            max_inflight_bytes: self.config.max_inflight_bytes,
            silence: self.config.silence,
            closed,
            counters: Arc::clone(&self.counters),
        };
        Ok(Box::new(TcpLink::start(setup, streams, &self.server.tasks)))
    }

    fn stats(&self) -> TransportStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TransportStats {
            read_bytes: count(&self.counters.read_bytes),
            reads: count(&self.counters.reads),
            failed_reads: count(&self.counters.failed_reads),
            served_bytes: count(&self.server.counters.served_bytes),
            links: count(&self.counters.links),
            exposed: self.server.exposures.len() as u64,
        }
    }

    async fn close(&self, deadline: Duration) {
        self.server.closed.cancel();
        self.server.tasks.close();
        if timeout(deadline, self.server.tasks.wait()).await.is_err() {
            tracing::warn!(left = self.server.tasks.len(), "transport tasks did not end by the deadline");
        }
    }
}

#[cfg(test)]
mod tests;
