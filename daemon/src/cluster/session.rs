//! The I/O of one [`PeerSession`]: messages over gRPC, bytes over the transport, ends to the core.
//!
//! *Bounds*: the session's own; every call has a deadline. *Shutdown*: ends with the node; what it had under way the core
//! gives up at its deadlines.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvtier_memory::IoBuf;
use kvtier_policy::peer::{ExportNumber, Granted, PeerSession, ReadEnd, SessionAction, SessionConfig, Wanted};
use kvtier_policy::{FetchEnd, FrameRef, MoveId};
use kvtier_proto::{PROTOCOL_VERSION, convert, v1};
use kvtier_transport::{Descriptor, Link, ReadTerms, TransportError};
use kvtier_types::{Expect, Instant};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::peers::{Client, PeerLife, client};
use super::{Cluster, Fetch};
use crate::claims::unix_ms;
use crate::node::Node;
use crate::pool::frame_id;

/// A session without work ends, and its links with it.
const IDLE: Duration = Duration::from_secs(120);
/// Longest handshake, all transports tried.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Longest a release may take; the lease ends by itself anyway.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);
/// Most reads whose ends are told together: each may let the core begin others.
const ENDS_AT_ONCE: usize = 16;

/// What a session is told.
#[derive(Debug)]
pub(super) enum Command {
    Fetch(Vec<Fetch>),
    Cancel(MoveId),
}

/// What is shown of a session.
#[derive(Debug, Default)]
pub(super) struct Progress {
    transport: Mutex<String>,
    read_bytes: AtomicU64,
}

impl Progress {
    pub(super) fn get(&self) -> (String, u64) {
        (self.transport.lock().clone(), self.read_bytes.load(Ordering::Relaxed))
    }
}

/// What its own tasks tell it.
enum Event {
    Granted(ExportNumber, Box<Lease>, Vec<Granted<Descriptor>>),
    Refused { export: ExportNumber, gone: bool },
    Read(ExportNumber, MoveId, ReadEnd),
}

/// A connection that works: control and data.
#[derive(Clone)]
struct Connected {
    client: Client,
    kind: &'static str,
    link: Arc<dyn Link>,
}

/// A lease at the peer, and the connection that its descriptors are for.
struct Lease {
    number: u64,
    connected: Connected,
}

struct Driver {
    node: Arc<Node>,
    cluster: Arc<Cluster>,
    peer: PeerLife,
    name: String,
    session: PeerSession<Descriptor>,
    frames: BTreeMap<MoveId, (FrameRef, u64)>,
    reads: BTreeMap<MoveId, CancellationToken>,
    leases: BTreeMap<ExportNumber, Box<Lease>>,
    connected: Arc<tokio::sync::Mutex<Option<Connected>>>,
    events: mpsc::UnboundedSender<Event>,
    progress: Arc<Progress>,
}

/// Runs until it was idle for long, or the node stops.
pub(super) async fn run(
    node: Arc<Node>,
    cluster: Arc<Cluster>,
    peer: PeerLife,
    (mut commands, progress): (mpsc::UnboundedReceiver<Command>, Arc<Progress>),
) {
    let config = SessionConfig { ttl: node.config.transport.lease.0, ..SessionConfig::default() };
    let (events, mut told) = mpsc::unbounded_channel();
    let name = node.read_core(|core| core.members().get(peer.0).map(|m| m.record.id.to_string()));
    let stopping = node.stopping.clone();
    let mut driver = Driver {
        node,
        cluster,
        peer,
        name: name.unwrap_or_else(|| peer.0.to_string()),
        session: PeerSession::new(config),
        frames: BTreeMap::new(),
        reads: BTreeMap::new(),
        leases: BTreeMap::new(),
        connected: Arc::new(tokio::sync::Mutex::new(None)),
        events,
        progress,
    };
    loop {
        let now = driver.node.now();
        let wait = driver.session.poll_timeout().map_or(IDLE, |at| at.since(now).max(Duration::from_millis(1)));
        tokio::select! {
            () = stopping.cancelled() => return,
            command = commands.recv() => match command {
                Some(command) => driver.take(command),
                None => return,
            },
            Some(event) = told.recv() => {
                let mut is_read = driver.hear(event);
                for _ in 1..ENDS_AT_ONCE {
                    // Only reads: what follows from anything else comes before what is heard next.
                    let Some(event) = is_read.then(|| told.try_recv().ok()).flatten() else { break };
                    is_read = driver.hear(event);
                }
            }
            () = tokio::time::sleep(wait) => {
                driver.session.expire(driver.node.now());
                if driver.session.is_idle() && driver.cluster.peers.retire(&peer) {
                    return;
                }
            }
        }
        driver.act();
    }
}

impl Driver {
    fn take(&mut self, command: Command) {
        let now = self.node.now();
        match command {
            Command::Fetch(fetches) => {
                self.frames.extend(fetches.iter().map(|f| (f.id, (f.into, f.bytes))));
                let wanted = |f: &Fetch| Wanted { id: f.id, key: f.key, bytes: f.bytes, deadline: f.deadline };
                self.session.want_all(now, fetches.iter().map(wanted));
            }
            Command::Cancel(id) => {
                self.frames.remove(&id);
                self.session.cancel(now, id);
            }
        }
    }

    /// Takes an event in; answers whether it was the end of a read.
    fn hear(&mut self, event: Event) -> bool {
        let now = self.node.now();
        match event {
            Event::Granted(export, lease, answers) => {
                self.act();
                self.leases.insert(export, lease);
                self.node.with_core(|core, now| core.called(now, self.peer.0, true));
                self.session.granted(now, export, answers);
            }
            Event::Refused { export, gone } => self.session.refused(now, export, gone),
            Event::Read(export, id, end) => {
                self.reads.remove(&id);
                if let (ReadEnd::Arrived { .. }, Some((_, bytes))) = (end, self.frames.get(&id)) {
                    self.progress.read_bytes.fetch_add(*bytes, Ordering::Relaxed);
                }
                self.session.read_ended(now, export, id, end);
                return true;
            }
        }
        false
    }

    fn act(&mut self) {
        let mut ended = Vec::new();
        while let Some(action) = self.session.poll_action() {
            match action {
                SessionAction::Export { export, keys, ttl, wait } => {
                    let request = v1::ExportRequest {
                        node_id: self.node.config.node_id.clone(),
                        node_incarnation: self.node.read_core(kvtier_policy::Core::incarnation),
                        incarnation: self.peer.1,
                        keys: keys.iter().map(Into::into).collect(),
                        ttl_ms: millis(ttl),
                        wait_ms: millis(wait),
                        transport: String::new(),
                    };
                    self.export(export, request);
                }
                SessionAction::Read { export, id, at, expect, deadline } => {
                    self.read((export, id), &at, expect, deadline);
                }
                SessionAction::Stop { id } => {
                    if let Some(cancel) = self.reads.get(&id) {
                        cancel.cancel();
                    }
                }
                SessionAction::Release { export } => self.release(export),
                SessionAction::Ended { id, end } => ended.push((id, end)),
                SessionAction::Unreachable => {
                    self.node.with_core(|core, now| core.called(now, self.peer.0, false));
                }
            }
        }
        self.report(ended);
    }

    fn report(&mut self, ended: Vec<(MoveId, FetchEnd)>) {
        if ended.is_empty() {
            return;
        }
        for (id, end) in &ended {
            self.frames.remove(id);
            self.cluster.peers.ended(&self.peer, *id);
            if *end == FetchEnd::Corrupt {
                tracing::error!(peer = self.name, "a block arrived corrupt; it was not served");
            }
        }
        self.node.with_core(|core, now| ended.into_iter().for_each(|(id, end)| core.fetched(now, id, end)));
        self.node.movement.notify_waiters();
    }

    fn export(&self, export: ExportNumber, mut request: v1::ExportRequest) {
        let (node, cluster, peer) = (Arc::clone(&self.node), Arc::clone(&self.cluster), self.peer);
        let (connected, events) = (Arc::clone(&self.connected), self.events.clone());
        let (name, progress) = (self.name.clone(), Arc::clone(&self.progress));
        self.node.tasks.spawn(async move {
            let asked = async {
                let mut connected = connect(&node, &cluster, peer, &connected).await?;
                connected.kind.clone_into(&mut progress.transport.lock());
                connected.kind.clone_into(&mut request.transport);
                let reply = connected.client.export(request).await.map_err(Refusal::of)?.into_inner();
                Ok::<_, Refusal>((
                    Box::new(Lease { number: reply.lease, connected }),
                    reply.shards.into_iter().map(granted).collect(),
                ))
            };
            let limit = SessionConfig::default().answer + CONNECT_LIMIT;
            let event = match timeout(limit, asked).await {
                Ok(Ok((lease, answers))) => Event::Granted(export, lease, answers),
                Ok(Err(refusal)) => {
                    tracing::warn!(peer = name, reason = refusal.reason, "the peer granted nothing");
                    if !refusal.gone {
                        *connected.lock().await = None;
                    }
                    Event::Refused { export, gone: refusal.gone }
                }
                Err(_) => Event::Refused { export, gone: false },
            };
            // The session may have ended meanwhile; a lease granted to nobody ends by itself.
            drop(events.send(event));
        });
    }

    fn read(&mut self, (export, id): (ExportNumber, MoveId), at: &Descriptor, expect: Expect, deadline: Instant) {
        let events = self.events.clone();
        let fail = |end| drop(events.send(Event::Read(export, id, end)));
        let Some((frame, _)) = self.frames.get(&id) else { return fail(ReadEnd::Failed) };
        let Some(pin) = self.node.arena.pin(frame_id(*frame, expect.bytes)) else { return fail(ReadEnd::Failed) };
        let Some(link) = self.leases.get(&export).map(|l| Arc::clone(&l.connected.link)) else {
            return fail(ReadEnd::Failed);
        };
        let cancel = CancellationToken::new();
        self.reads.insert(id, cancel.clone());
        let left = deadline.since(self.node.now());
        let terms = ReadTerms { deadline: tokio::time::Instant::now() + left, cancel };
        let read = link.read(at, IoBuf::Frame(pin), terms);
        let (name, connected) = (self.name.clone(), Arc::clone(&self.connected));
        self.node.tasks.spawn(async move {
            let done = read.await;
            drop(done.into);
            let end = match done.result {
                Ok(checksum) => ReadEnd::Arrived { checksum },
                Err(TransportError::Gone) => ReadEnd::Gone,
                Err(error) => {
                    tracing::debug!(peer = name, %error, "a read failed");
                    if link.is_alive() { ReadEnd::Failed } else { ReadEnd::LinkDown }
                }
            };
            if end == ReadEnd::LinkDown {
                let mut connected = connected.lock().await;
                if connected.as_ref().is_some_and(|c| !c.link.is_alive()) {
                    tracing::warn!(peer = name, "the link is down");
                    *connected = None;
                }
            }
            drop(events.send(Event::Read(export, id, end)));
        });
    }

    fn release(&mut self, export: ExportNumber) {
        let Some(lease) = self.leases.remove(&export) else { return };
        let incarnation = self.peer.1;
        self.node.tasks.spawn(async move {
            let mut client = lease.connected.client;
            let request = v1::ReleaseExportsRequest { incarnation, leases: vec![lease.number] };
            // Not released is not lost: the lease ends by itself.
            drop(timeout(RELEASE_LIMIT, client.release(request)).await);
        });
    }
}

/// Why a peer granted nothing.
#[derive(Debug)]
struct Refusal {
    reason: String,
    /// It is another life of the node, or speaks another version: what it held is void for us.
    gone: bool,
}

impl Refusal {
    #[expect(clippy::needless_pass_by_value, reason = "used as `map_err(Refusal::of)`")]
    fn of(status: tonic::Status) -> Self {
        Self { reason: status.message().to_owned(), gone: status.code() == Code::FailedPrecondition }
    }
}

/// The connection, made if there is none.
async fn connect(
    node: &Arc<Node>,
    cluster: &Cluster,
    peer: PeerLife,
    connected: &tokio::sync::Mutex<Option<Connected>>,
) -> Result<Connected, Refusal> {
    let mut connected = connected.lock().await;
    if let Some(there) = connected.as_ref().filter(|c| c.link.is_alive()) {
        return Ok(there.clone());
    }
    let failed = |reason: String| Refusal { reason, gone: false };
    let mut client = client(node, peer.0, CONNECT_LIMIT).await.map_err(|e| failed(e.to_string()))?;
    let hello = v1::HandshakeRequest {
        protocol_version: PROTOCOL_VERSION,
        node_id: node.config.node_id.clone(),
        incarnation: node.read_core(kvtier_policy::Core::incarnation),
        build: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let welcome = client.handshake(hello).await.map_err(Refusal::of)?.into_inner();
    if welcome.protocol_version != PROTOCOL_VERSION {
        let reason = format!("it speaks protocol version {}, this node {PROTOCOL_VERSION}", welcome.protocol_version);
        return Err(Refusal { reason, gone: true });
    }
    if welcome.incarnation != peer.1 {
        return Err(Refusal {
            reason: format!("it was restarted: its incarnation is {}", welcome.incarnation),
            gone: true,
        });
    }
    let linked = cluster.transports.connect(&welcome.node_id, &welcome.transports, CONNECT_LIMIT).await;
    let (kind, link) = linked.map_err(|e| failed(e.to_string()))?;
    tracing::info!(peer = welcome.node_id, build = welcome.build, kind, "linked");
    let fresh = Connected { client, kind, link: Arc::from(link) };
    *connected = Some(fresh.clone());
    Ok(fresh)
}

fn granted(shard: v1::ExportedShard) -> Granted<Descriptor> {
    if shard.outcome != i32::from(v1::Outcome::Applied) {
        return None;
    }
    let meta = convert::record_meta(shard.meta.as_ref()?, unix_ms()).ok()?;
    Some((Descriptor::new(shard.descriptor).ok()?, meta))
}

fn millis(span: Duration) -> u32 {
    u32::try_from(span.as_millis()).unwrap_or(u32::MAX)
}
