//! The cluster as this node is part of it: the directory's client, the transports, the sessions with peers, the floor of
//! other nodes' packs, and the tasks that keep them.
//!
//! Decisions are the core's ([`kvtier_policy::Core`], [`kvtier_policy::peer::PeerSession`]); here is the I/O.

mod beat;
mod copies;
mod drain;
mod elsewhere;
mod exposures;
pub(crate) mod fanout;
mod floor;
mod homes;
mod locate;
mod outbox;
pub(crate) mod peers;
mod publish;
mod reap;
mod session;
mod spread;
mod transports;
mod warming;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::Context;
use kvtier_policy::directory::NodeRecord;
use kvtier_policy::{FrameRef, MoveId, Source};
use kvtier_storage::object::Floor;
use kvtier_types::{Instant, NodeId, ShardKey};
use parking_lot::Mutex;
use tokio::sync::Notify;

pub use drain::{DrainReport, drain};
pub(crate) use elsewhere::find_elsewhere;
pub(crate) use exposures::Exposures;
pub(crate) use homes::{push, to_object_store, to_peers};
pub use locate::locate_missing;
pub(crate) use locate::{ask_directory, replicas};
pub use transports::Transports;

use crate::config::Config;
use crate::directory::{Directory, EmbeddedDirectory, ValkeyDirectory};
use crate::node::Node;
use outbox::Outbox;
use peers::Peers;
use spread::Spread;
use warming::Warming;

/// A fetch as the core wants it.
#[derive(Debug, Clone, Copy)]
pub struct Fetch {
    /// The core's movement.
    pub id: MoveId,
    /// The shard.
    pub key: ShardKey,
    /// Where from.
    pub from: Source,
    /// Where to.
    pub into: FrameRef,
    /// Its length.
    pub bytes: u64,
    /// When it is given up.
    pub deadline: Instant,
}

/// How the directory was found last.
#[derive(Debug, Clone, Default)]
pub struct DirectoryState {
    /// Since when it is away, on the node's clock, and why; `None` while it answers.
    pub away: Option<(Instant, String)>,
}

/// The cluster's parts.
pub struct Cluster {
    /// This node.
    pub id: NodeId,
    /// The directory.
    pub directory: Arc<dyn Directory>,
    /// What moves bytes.
    pub transports: Transports,
    /// Other nodes' packs.
    pub floor: Option<Arc<Floor>>,
    /// Frames exposed for peers, by lease.
    pub(crate) exposures: Exposures,
    /// Woken when something is to be published.
    pub publishing: Notify,
    /// Woken when the next heartbeat cannot wait.
    pub beating: Notify,
    /// Blocks whose bytes came from other nodes' packs.
    pub(crate) floor_reads: AtomicU64,
    /// Verbs that wait for nodes that are away.
    pub(crate) outbox: Arc<Outbox>,
    /// Shared prefixes that were copied to other nodes.
    pub(crate) spread: Spread,
    /// Whether this node joined a moment ago.
    pub(crate) warming: Warming,
    peers: Peers,
    state: Mutex<DirectoryState>,
    records: Mutex<Vec<NodeRecord>>,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Cluster {
    /// Opens the parts; nothing is contacted yet but the ports listened on.
    ///
    /// # Errors
    /// When the configuration cannot work, or a port cannot be had.
    pub async fn open(config: &Config) -> anyhow::Result<Arc<Self>> {
        let id = NodeId::new(&config.node_id)?;
        let directory: Arc<dyn Directory> = if config.cluster.is_embedded() {
            Arc::new(EmbeddedDirectory::default())
        } else {
            Arc::new(ValkeyDirectory::open(&config.valkey())?)
        };
        let outbox = Outbox::open(&config.data_dir).context("cannot open the outbox in data_dir")?;
        let transports = Transports::open(config).await?;
        let shared = config.object.enabled && !config.cluster.is_embedded();
        let floor = if shared { Some(Arc::new(Floor::open(config.floor_config()?)?)) } else { None };
        Ok(Arc::new(Self {
            id,
            directory,
            transports,
            floor,
            exposures: Exposures::default(),
            publishing: Notify::new(),
            beating: Notify::new(),
            floor_reads: AtomicU64::new(0),
            outbox: Arc::new(outbox),
            spread: Spread::default(),
            warming: Warming::default(),
            peers: Peers::default(),
            state: Mutex::new(DirectoryState::default()),
            records: Mutex::new(Vec::new()),
        }))
    }

    /// Starts the tasks.
    pub fn start(self: &Arc<Self>, node: &Arc<Node>) {
        let incarnation = incarnation(node);
        node.with_core(|core, _| core.join(&self.id, incarnation));
        node.tasks.spawn(beat::run(Arc::clone(node), Arc::clone(self)));
        node.tasks.spawn(publish::run(Arc::clone(node), Arc::clone(self)));
        node.tasks.spawn(copies::run(Arc::clone(node), Arc::clone(self)));
        node.tasks.spawn(spread::run(Arc::clone(node), Arc::clone(self)));
        node.tasks.spawn(reap::run(Arc::clone(node), Arc::clone(self)));
        node.tasks.spawn(fanout::run(Arc::clone(node), Arc::clone(&self.outbox)));
        if let Some(floor) = &self.floor {
            let (floor, stopping) = (Arc::clone(floor), node.stopping.clone());
            node.tasks.spawn(async move {
                tokio::select! {
                    () = stopping.cancelled() => {}
                    () = floor.keep_fresh() => {}
                }
            });
        }
    }

    /// Begins fetches that the core wants, those of one peer together.
    pub fn fetch(self: &Arc<Self>, node: &Arc<Node>, fetches: Vec<Fetch>) {
        let mut by_peer: BTreeMap<(kvtier_types::NodeNumber, u64), Vec<Fetch>> = BTreeMap::new();
        for fetch in fetches {
            match fetch.from {
                Source::Peer { node, incarnation } => by_peer.entry((node, incarnation)).or_default().push(fetch),
                Source::Floor => floor::fetch(node, self, fetch),
            }
        }
        for ((peer, incarnation), fetches) in by_peer {
            self.peers.fetch(node, self, (peer, incarnation), fetches);
        }
    }

    /// Ends a fetch early.
    pub fn cancel(&self, id: MoveId) {
        self.peers.cancel(id);
    }

    /// What moves bytes to and from a node at the moment: the transport's name, and bytes read from it.
    #[must_use]
    pub fn link_of(&self, node: kvtier_types::NodeNumber) -> (String, u64) {
        self.peers.link_of(node)
    }

    /// A client of a peer's service.
    ///
    /// # Errors
    /// When the node is not known or does not answer.
    pub(crate) async fn peer_client(&self, node: &Arc<Node>, id: &NodeId) -> anyhow::Result<peers::Client> {
        peers::client(node, id.number(), Duration::from_secs(3)).await
    }

    /// Ends what peers read, and the transports.
    pub async fn close(&self, limit: Duration) {
        self.exposures.clear();
        self.transports.close(limit).await;
    }

    /// How the directory was found last.
    #[must_use]
    pub fn directory_state(&self) -> DirectoryState {
        self.state.lock().clone()
    }

    /// The nodes heard of last, this one included.
    #[must_use]
    pub fn records(&self) -> Vec<NodeRecord> {
        self.records.lock().clone()
    }

    /// Takes note of whether the directory answered; says so in the log when that changed.
    fn note_directory(&self, now: Instant, error: Option<String>) {
        let mut state = self.state.lock();
        match (error, &state.away) {
            (Some(reason), None) => {
                tracing::warn!(reason, "the directory is away: serving what this node has and knows");
                state.away = Some((now, reason));
            }
            (None, Some((since, _))) => {
                tracing::info!(away_s = now.since(*since).as_secs(), "the directory answers again");
                state.away = None;
            }
            _ => {}
        }
    }
}

/// The number of this start as the cluster counts it: the time, so that a node that comes back without its journal is not
/// taken for a former life; never less than the journal's own count. Should the clock have been set back, the directory
/// knows a later life and the core goes on from there.
fn incarnation(node: &Node) -> u64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or_default().max(node.incarnation)
}
