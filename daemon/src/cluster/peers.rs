//! Sessions with peers: one task for each peer that something is fetched from, made when first needed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::MoveId;
use kvtier_proto::MAX_MESSAGE_BYTES;
use kvtier_proto::v1::peer_client::PeerClient;
use kvtier_types::NodeNumber;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};

use super::session::{self, Command, Progress};
use super::{Cluster, Fetch};
use crate::node::Node;

/// A client of a peer's service.
pub(crate) type Client = PeerClient<Channel>;

/// A peer in one of its lives.
pub(super) type PeerLife = (NodeNumber, u64);

/// A running session.
#[derive(Debug)]
struct Session {
    commands: mpsc::UnboundedSender<Command>,
    progress: Arc<Progress>,
    /// Fetches handed to it that the core may still cancel.
    fetching: BTreeSet<MoveId>,
}

/// All sessions. What waits in their queues is bounded by the fetches that the core has under way.
#[derive(Debug, Default)]
pub(super) struct Peers(Mutex<BTreeMap<PeerLife, Session>>);

impl Peers {
    /// Hands fetches to the session with a peer.
    pub(super) fn fetch(&self, node: &Arc<Node>, cluster: &Arc<Cluster>, peer: PeerLife, fetches: Vec<Fetch>) {
        let mut sessions = self.0.lock();
        let ids: Vec<MoveId> = fetches.iter().map(|f| f.id).collect();
        let mut command = Command::Fetch(fetches);
        // A session that has just ended for want of work takes nothing more: a second try meets a new one.
        for _ in 0..2 {
            let session = sessions.entry(peer).or_insert_with(|| start(node, cluster, peer));
            match session.commands.send(command) {
                Ok(()) => {
                    session.fetching.extend(&ids);
                    return;
                }
                Err(returned) => {
                    command = returned.0;
                    sessions.remove(&peer);
                }
            }
        }
    }

    /// Tells the session that has a fetch to end it.
    pub(super) fn cancel(&self, id: MoveId) {
        let mut sessions = self.0.lock();
        if let Some(session) = sessions.values_mut().find(|s| s.fetching.contains(&id)) {
            session.fetching.remove(&id);
            // A session that has ended cancelled everything.
            drop(session.commands.send(Command::Cancel(id)));
        }
    }

    /// A fetch ended.
    pub(super) fn ended(&self, peer: &PeerLife, id: MoveId) {
        if let Some(session) = self.0.lock().get_mut(peer) {
            session.fetching.remove(&id);
        }
    }

    /// A session ends if nothing came for it meanwhile.
    pub(super) fn retire(&self, peer: &PeerLife) -> bool {
        let mut sessions = self.0.lock();
        let idle = sessions.get(peer).is_none_or(|s| s.fetching.is_empty());
        if idle {
            sessions.remove(peer);
        }
        idle
    }

    pub(super) fn link_of(&self, node: NodeNumber) -> (String, u64) {
        let sessions = self.0.lock();
        let mut latest_first = sessions.iter().rev();
        latest_first.find(|((number, _), _)| *number == node).map(|(_, s)| s.progress.get()).unwrap_or_default()
    }
}

fn start(node: &Arc<Node>, cluster: &Arc<Cluster>, peer: PeerLife) -> Session {
    let (commands, queue) = mpsc::unbounded_channel();
    let progress = Arc::new(Progress::default());
    node.tasks.spawn(session::run(Arc::clone(node), Arc::clone(cluster), peer, (queue, Arc::clone(&progress))));
    Session { commands, progress, fetching: BTreeSet::new() }
}

/// Connects to a peer's service.
pub(crate) async fn client(node: &Arc<Node>, peer: NodeNumber, limit: Duration) -> anyhow::Result<Client> {
    let address = node.read_core(|core| core.members().get(peer).map(|m| m.record.peer.clone()));
    let address = address.ok_or_else(|| anyhow::anyhow!("node {peer} is not known to live"))?;
    let endpoint = Endpoint::new(format!("http://{address}"))?.connect_timeout(limit).tcp_nodelay(true);
    let channel = tokio::time::timeout(limit, endpoint.connect()).await??;
    Ok(PeerClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES))
}
