//! The in-process twin of a transport: reads are copies, with faults to inject. For tests and simulations.
//!
//! A [`TwinNetwork`] joins the transports started on it; its [`Faults`] meet every read of every link.
//!
//! *Lock order*: the network's state is one mutex, a leaf.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use kvtier_memory::{FramePin, IoBuf};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::{Descriptor, Exposure, Kind, Link, ReadDone, ReadTerms, Transport, TransportError, TransportStats};

/// What addresses and descriptors of twins begin with.
const MAGIC: &[u8; 4] = b"twin";

/// Faults that the next reads meet.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// How long every read takes.
    pub delay: Duration,
    /// Reads are never answered: they end at their deadline.
    pub silent: bool,
    /// Reads fail as over a link that was cut, which stays so.
    pub cut: bool,
    /// One bit of every read's bytes arrives flipped; the checksum returned is of what arrived.
    pub corrupt: bool,
    /// Reads fail after half of the bytes arrived.
    pub tear: bool,
    /// Of each two reads the second one ends first; one that stays alone waits until its deadline.
    pub reorder: bool,
    /// Nobody can connect.
    pub refuse: bool,
}

#[derive(Debug, Default)]
struct State {
    /// Nodes that are open, with what they expose.
    nodes: BTreeMap<u64, Node>,
    next_id: u64,
    faults: Faults,
    /// The read that waits for another one to overtake it.
    held: Option<oneshot::Sender<()>>,
}

#[derive(Debug)]
struct Node {
    exposed: BTreeMap<u64, Arc<FramePin>>,
    closed: CancellationToken,
}

/// What twins find each other on. Clones are the same network.
#[derive(Debug, Clone, Default)]
pub struct TwinNetwork {
    state: Arc<Mutex<State>>,
}

impl TwinNetwork {
    /// A network without nodes and faults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a transport that exposes at most `max_exposures` frames.
    #[must_use]
    pub fn start(&self, max_exposures: usize) -> TwinTransport {
        let mut state = self.state.lock();
        state.next_id += 1;
        let (id, closed) = (state.next_id, CancellationToken::new());
        state.nodes.insert(id, Node { exposed: BTreeMap::new(), closed: closed.clone() });
        let counters = Arc::default();
        TwinTransport { network: self.clone(), id, max_exposures, closed, counters }
    }

    /// Sets the faults that reads meet from now on; those under way keep theirs.
    pub fn set_faults(&self, faults: Faults) {
        self.state.lock().faults = faults;
    }
}

#[derive(Debug, Default)]
struct Counters {
    read_bytes: AtomicU64,
    reads: AtomicU64,
    failed_reads: AtomicU64,
    links: AtomicU64,
}

/// A transport within this process.
#[derive(Debug)]
pub struct TwinTransport {
    network: TwinNetwork,
    id: u64,
    max_exposures: usize,
    closed: CancellationToken,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct TwinExposure {
    network: TwinNetwork,
    node: u64,
    frame: u64,
    descriptor: Descriptor,
}

impl Exposure for TwinExposure {
    fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }
}

impl Drop for TwinExposure {
    fn drop(&mut self) {
        let mut state = self.network.state.lock();
        let pin = state.nodes.get_mut(&self.node).and_then(|node| node.exposed.remove(&self.frame));
        drop(state);
        drop(pin);
    }
}

#[async_trait]
impl Transport for TwinTransport {
    fn kind(&self) -> Kind {
        Kind::Twin
    }

    fn address(&self) -> Bytes {
        encode(&[self.id])
    }

    fn expose(&self, frame: FramePin) -> Result<Box<dyn Exposure>, TransportError> {
        let mut state = self.network.state.lock();
        state.next_id += 1;
        let id = state.next_id;
        let node = state.nodes.get_mut(&self.id).ok_or(TransportError::LinkDown { source: None })?;
        if node.exposed.len() >= self.max_exposures {
            return Err(TransportError::Limit { what: "exposed frames", max: self.max_exposures });
        }
        let descriptor = Descriptor::new(encode(&[self.id, id, frame.len() as u64]))?;
        node.exposed.insert(id, Arc::new(frame));
        Ok(Box::new(TwinExposure { network: self.network.clone(), node: self.id, frame: id, descriptor }))
    }

    async fn connect(&self, address: &[u8], _deadline: Duration) -> Result<Box<dyn Link>, TransportError> {
        let [peer] = decode::<1>(address).ok_or(TransportError::BadDescriptor { what: "no address of a twin" })?;
        let state = self.network.state.lock();
        let down = TransportError::LinkDown { source: None };
        let peer_closed = match state.nodes.get(&peer) {
            Some(node) if !state.faults.refuse && !self.closed.is_cancelled() => node.closed.clone(),
            _ => return Err(down),
        };
        self.counters.links.fetch_add(1, Ordering::Relaxed);
        let shared = LinkState {
            network: self.network.clone(),
            peer,
            peer_closed,
            own_closed: self.closed.child_token(),
            cut: AtomicBool::new(false),
            counters: Arc::clone(&self.counters),
        };
        Ok(Box::new(TwinLink { shared: Arc::new(shared) }))
    }

    fn stats(&self) -> TransportStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let exposed = self.network.state.lock().nodes.get(&self.id).map_or(0, |node| node.exposed.len() as u64);
        TransportStats {
            read_bytes: count(&self.counters.read_bytes),
            reads: count(&self.counters.reads),
            failed_reads: count(&self.counters.failed_reads),
            served_bytes: 0,
            links: count(&self.counters.links),
            exposed,
        }
    }

    async fn close(&self, _deadline: Duration) {
        self.closed.cancel();
        let node = self.network.state.lock().nodes.remove(&self.id);
        drop(node);
    }
}

#[derive(Debug)]
struct LinkState {
    network: TwinNetwork,
    peer: u64,
    peer_closed: CancellationToken,
    /// Cancelled with the transport and with the link.
    own_closed: CancellationToken,
    cut: AtomicBool,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct TwinLink {
    shared: Arc<LinkState>,
}

impl Drop for TwinLink {
    fn drop(&mut self) {
        self.shared.own_closed.cancel();
        self.shared.counters.links.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Link for TwinLink {
    fn read(&self, from: &Descriptor, into: IoBuf, terms: ReadTerms) -> BoxFuture<'static, ReadDone> {
        let (link, from) = (Arc::clone(&self.shared), from.clone());
        // A task, so that the read goes on, and keeps its memory, when its future is dropped.
        let task = tokio::spawn(async move { link.read(&from, into, terms).await });
        Box::pin(async move { task.await.expect("the read's task neither panics nor is aborted") })
    }

    fn is_alive(&self) -> bool {
        self.shared.is_alive()
    }
}

impl LinkState {
    fn is_alive(&self) -> bool {
        !self.cut.load(Ordering::Acquire) && !self.peer_closed.is_cancelled() && !self.own_closed.is_cancelled()
    }

    async fn read(&self, from: &Descriptor, mut into: IoBuf, terms: ReadTerms) -> ReadDone {
        let result = tokio::select! {
            biased;
            () = terms.cancel.cancelled() => Err(TransportError::Cancelled),
            // A timer is up to a millisecond late, even one that is due.
            () = std::future::ready(()), if terms.deadline <= tokio::time::Instant::now() => Err(TransportError::Deadline),
            () = tokio::time::sleep_until(terms.deadline) => Err(TransportError::Deadline),
            () = self.peer_closed.cancelled() => Err(TransportError::LinkDown { source: None }),
            () = self.own_closed.cancelled() => Err(TransportError::LinkDown { source: None }),
            result = self.transfer(from, &mut into) => result,
        };
        let counters = &self.counters;
        match &result {
            Ok(_) => {
                counters.reads.fetch_add(1, Ordering::Relaxed);
                counters.read_bytes.fetch_add(into.len() as u64, Ordering::Relaxed);
            }
            Err(_) => {
                counters.failed_reads.fetch_add(1, Ordering::Relaxed);
            }
        }
        ReadDone { into, result }
    }

    async fn transfer(&self, from: &Descriptor, into: &mut IoBuf) -> Result<u64, TransportError> {
        let [node, id, len] =
            decode::<3>(from.as_bytes()).ok_or(TransportError::BadDescriptor { what: "no descriptor of a twin" })?;
        if len != into.len() as u64 {
            return Err(TransportError::Length { exposed: len, wanted: into.len() as u64 });
        }
        let (faults, overtaken) = self.faults();
        if !faults.delay.is_zero() {
            tokio::time::sleep(faults.delay).await;
        }
        if faults.silent {
            std::future::pending::<()>().await;
        }
        if faults.cut || !self.is_alive() {
            self.cut.store(true, Ordering::Release);
            return Err(TransportError::LinkDown { source: None });
        }
        if let Some(Turn::Waits(overtaken)) = overtaken {
            // An error means that nobody is left to overtake: the read goes on.
            let _overtaken = overtaken.await;
            return self.copy(node, id, &faults, into);
        }
        let copied = self.copy(node, id, &faults, into);
        if let Some(Turn::Overtakes(held)) = overtaken {
            // The other may have reached its deadline.
            let _gone = held.send(());
        }
        copied
    }

    fn faults(&self) -> (Faults, Option<Turn>) {
        let mut state = self.network.state.lock();
        let faults = state.faults.clone();
        let turn = faults.reorder.then(|| match state.held.take() {
            Some(held) if !held.is_closed() => Turn::Overtakes(held),
            _ => {
                let (held, overtaken) = oneshot::channel();
                state.held = Some(held);
                Turn::Waits(overtaken)
            }
        });
        (faults, turn)
    }

    fn copy(&self, node: u64, id: u64, faults: &Faults, into: &mut IoBuf) -> Result<u64, TransportError> {
        let found = {
            let state = self.network.state.lock();
            let node = state.nodes.get(&self.peer).filter(|_| node == self.peer);
            node.and_then(|node| node.exposed.get(&id).cloned())
        };
        let mut bytes = {
            let pin = found.ok_or(TransportError::Gone)?;
            let mut bytes = vec![0; pin.len()];
            pin.copy_out(&mut bytes);
            bytes
        };
        if bytes.len() != into.len() {
            return Err(TransportError::Length { exposed: bytes.len() as u64, wanted: into.len() as u64 });
        }
        if faults.corrupt {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
        if faults.tear {
            into.copy_in(&bytes[..bytes.len() / 2]);
            self.cut.store(true, Ordering::Release);
            return Err(TransportError::LinkDown { source: None });
        }
        Ok(into.copy_in(&bytes))
    }
}

/// A read's part in a reordering.
#[derive(Debug)]
enum Turn {
    Waits(oneshot::Receiver<()>),
    Overtakes(oneshot::Sender<()>),
}

fn encode(words: &[u64]) -> Bytes {
    let words = words.iter().flat_map(|word| word.to_le_bytes());
    MAGIC.iter().copied().chain(words).collect()
}

fn decode<const N: usize>(bytes: &[u8]) -> Option<[u64; N]> {
    let words = bytes.strip_prefix(MAGIC)?;
    if words.len() != 8 * N {
        return None;
    }
    let mut decoded = [0; N];
    for (into, word) in decoded.iter_mut().zip(words.as_chunks().0) {
        *into = u64::from_le_bytes(*word);
    }
    Some(decoded)
}

#[cfg(test)]
mod tests;
