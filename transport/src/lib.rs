//! Moves block bytes between nodes: one-sided reads of frames that their owner exposed.
//!
//! The owner [exposes](Transport::expose) a frame and sends its [`Descriptor`] to a reader through the control plane;
//! the reader [connects](Transport::connect) once and [reads](Link::read) into memory of its own. Who may read what and
//! for how long is the peer protocol's business; bytes are the transport's.
//!
//! *Invariants* (pinned for every implementation by [`conformance`])
//! - A read that returns `Ok` filled exactly the exposed frame's bytes, and the checksum it returns is of the bytes as they
//!   lie in the destination. Anything else is an error, and then the buffer's content is unspecified.
//! - Memory given to a read belongs to it until nothing can write to it any more, even if its future is dropped; an exposed
//!   frame stays pinned until the last transfer begun from it has ended.
//! - Once an [`Exposure`] is dropped no *new* read of it succeeds where the transport can know (TCP); where it cannot
//!   (RDMA), the reader's checksum comparison and the lease's deadline are the guard.
//! - A dead peer, a cut link or a silent one ends every read with an error by its deadline.
//! - Hostile or damaged input from the network closes that connection, nothing else.
//!
//! *Bounds*: bytes in flight per link, connections per peer, descriptors and addresses have constants beside them.

pub mod conformance;
pub mod devices;
mod error;
pub mod tcp;
pub mod twin;
pub mod ucx;

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use kvtier_memory::{FramePin, IoBuf};
use tokio_util::sync::CancellationToken;

pub use error::TransportError;

/// Longest [`Descriptor`], in bytes.
pub const MAX_DESCRIPTOR_BYTES: usize = 512;
/// Longest address, in bytes.
pub const MAX_ADDRESS_BYTES: usize = 4096;

/// The transports there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Within one process: the in-memory twin.
    Twin,
    /// Our own framing over TCP.
    Tcp,
    /// UCX: RDMA, shared memory, device memory.
    Ucx,
}

impl Kind {
    /// The name used in config, metrics and CLI.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Twin => "twin",
            Self::Tcp => "tcp",
            Self::Ucx => "ucx",
        }
    }
}

/// Where a peer finds exposed bytes. Opaque to everyone but the transport that made it; knowing it is the right to read.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Descriptor(Bytes);

impl Descriptor {
    /// Wraps what came over the wire.
    ///
    /// # Errors
    /// [`TransportError::BadDescriptor`] when it is longer than [`MAX_DESCRIPTOR_BYTES`].
    pub fn new(bytes: Bytes) -> Result<Self, TransportError> {
        if bytes.len() > MAX_DESCRIPTOR_BYTES {
            return Err(TransportError::BadDescriptor { what: "it is too long" });
        }
        Ok(Self(bytes))
    }

    /// Its bytes, for the wire.
    #[must_use]
    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }
}

/// A frame that peers can read until this value is dropped.
pub trait Exposure: Debug + Send + Sync {
    /// What a reader needs.
    fn descriptor(&self) -> &Descriptor;
}

/// The end of a read, with its buffer.
#[derive(Debug)]
pub struct ReadDone {
    /// The buffer given to the read.
    pub into: IoBuf,
    /// CRC-64/NVME of the bytes as they lie in `into`, computed while they arrived where that is possible.
    pub result: Result<u64, TransportError>,
}

/// One read's terms.
#[derive(Debug, Clone)]
pub struct ReadTerms {
    /// The read ends by then, well or not.
    pub deadline: tokio::time::Instant,
    /// Cancelling it ends the read early with [`TransportError::Cancelled`].
    pub cancel: CancellationToken,
}

/// What a transport did, for metrics: counts that only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TransportStats {
    /// Bytes read from peers.
    pub read_bytes: u64,
    /// Reads that ended well.
    pub reads: u64,
    /// Reads that failed, cancelled ones included.
    pub failed_reads: u64,
    /// Bytes served to peers, where the transport can know.
    pub served_bytes: u64,
    /// Links open now.
    pub links: u64,
    /// Frames exposed now.
    pub exposed: u64,
}

/// A way to move bytes between nodes.
#[async_trait]
pub trait Transport: Debug + Send + Sync {
    /// Which one it is.
    fn kind(&self) -> Kind;

    /// What a peer needs to connect; at most [`MAX_ADDRESS_BYTES`], opaque.
    fn address(&self) -> Bytes;

    /// Whether [`Self::expose`] may wait for the system, to register memory.
    fn expose_waits(&self) -> bool {
        false
    }

    /// Lets peers read a frame's bytes until the answer is dropped.
    ///
    /// # Errors
    /// [`TransportError`] when there are too many exposures or the memory cannot be registered.
    fn expose(&self, frame: FramePin) -> Result<Box<dyn Exposure>, TransportError>;

    /// Connects to a peer's [`Self::address`].
    ///
    /// # Errors
    /// [`TransportError`] when the peer does not answer within the deadline, or is no peer of this kind and version.
    async fn connect(&self, address: &[u8], deadline: Duration) -> Result<Box<dyn Link>, TransportError>;

    /// What it did so far.
    fn stats(&self) -> TransportStats;

    /// Ends every link and listener, within the deadline.
    async fn close(&self, deadline: Duration);
}

/// A connection to one peer, for reading from it. Dropping it ends it.
pub trait Link: Debug + Send + Sync {
    /// Reads the bytes behind a descriptor into `into`, whose length must be the exposed frame's. The read begins with
    /// the call, in the order of calls while there is room in flight; small reads are coalesced on the wire.
    fn read(&self, from: &Descriptor, into: IoBuf, terms: ReadTerms) -> BoxFuture<'static, ReadDone>;

    /// Whether reads can still succeed: once false it stays so, and the caller connects anew.
    fn is_alive(&self) -> bool;
}
