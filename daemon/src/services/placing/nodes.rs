//! The nodes that a step may run on, and those that may have its context.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::directory::{NodeState, Replica};
use kvtier_policy::programs::Server;
use kvtier_proto::{convert, v1};
use kvtier_types::{Edition, NodeId, NodeNumber};
use tonic::Status;

use super::MAX_CANDIDATES;
use crate::node::Node;
use crate::services::wire_status;

/// A node that the step may run on.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub(super) id: NodeId,
    pub(super) server: Server,
    /// Whether it is this node, or one that was heard of.
    pub(super) known: bool,
}

/// A node that was heard of.
#[derive(Debug, Clone)]
struct Member {
    id: NodeId,
    edition: Edition,
    is_ready: bool,
    free_bytes: u64,
    /// Its number among all nodes of one placement.
    number: u32,
}

/// All of them, numbered: candidates first, as they were named.
#[derive(Debug, Clone)]
pub(super) struct Nodes {
    pub(super) candidates: Vec<Candidate>,
    /// Where the last step ran, if that is a candidate.
    pub(super) current: Option<u32>,
    /// This node.
    pub(super) own: NodeId,
    /// Its number.
    pub(super) own_number: u32,
    members: BTreeMap<NodeNumber, Member>,
}

impl Nodes {
    /// Those of a request; without candidates, all that take requests.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for too many, one named twice, or what is no name.
    pub(super) fn of(node: &Arc<Node>, message: &v1::PlaceRequest) -> Result<Self, Status> {
        if message.candidates.len() > MAX_CANDIDATES {
            let many = message.candidates.len();
            return Err(Status::invalid_argument(format!("{many} candidates, at most {MAX_CANDIDATES}: name fewer")));
        }
        let own = convert::node(&node.config.node_id).map_err(wire_status)?;
        let stats = node.arena.stats();
        let own_free = stats.capacity_bytes.saturating_sub(stats.used_bytes);
        let mut members = members(node);
        let mut named = named(message)?;
        if named.is_empty() {
            let is_warming = node.cluster.as_ref().is_some_and(|cluster| cluster.warming.is_on(node.now()));
            named = all_ready(&own, node.is_draining() || is_warming, &members);
        }
        let number = |at: usize| u32::try_from(at).expect("nodes are bounded");
        let mut candidates: Vec<Candidate> = Vec::with_capacity(named.len());
        for (at, (id, asked)) in named.into_iter().enumerate() {
            let member = members.get_mut(&id.number());
            let known = id == own || member.is_some();
            let free_bytes = if id == own { Some(own_free) } else { member.as_ref().map(|m| m.free_bytes) };
            if let Some(member) = member {
                member.number = number(at);
            }
            let server = Server {
                node: number(at),
                queue: Duration::from_millis(asked.queue_ms.into()),
                prefill_tokens_per_second: asked.prefill_tokens_per_second,
                free_bytes,
            };
            candidates.push(Candidate { id, server, known });
        }
        let of = |id: &NodeId| candidates.iter().find(|c| c.id == *id).map(|c| c.server.node);
        let current = match message.current_node_id.as_str() {
            "" => None,
            id => of(&convert::node(id).map_err(wire_status)?),
        };
        let own_number = of(&own);
        let unnamed = members.values_mut().filter(|m| m.number == u32::MAX);
        let mut next = number(candidates.len());
        for member in unnamed {
            member.number = next;
            next += 1;
        }
        Ok(Self { candidates, current, own_number: own_number.unwrap_or(next), own, members })
    }

    /// The number of a node whose word on a shard still counts.
    pub(super) fn holder(&self, replica: &Replica) -> Option<u32> {
        self.members.get(&replica.node).filter(|m| m.edition == replica.edition).map(|m| m.number)
    }

    /// Whom to ask for a program's context: the current node alone, where that is known, else candidates first, at most
    /// `most`.
    pub(super) fn to_ask(&self, most: usize) -> Vec<NodeNumber> {
        let current = self.current.and_then(|at| self.candidates.get(at as usize));
        if let Some(current) = current.filter(|c| c.known) {
            return if current.id == self.own { Vec::new() } else { vec![current.id.number()] };
        }
        let mut others: Vec<&Member> = self.members.values().collect();
        others.sort_by_key(|m| m.number);
        others.into_iter().take(most).map(|m| m.id.number()).collect()
    }
}

/// The other nodes heard of, without numbers yet.
fn members(node: &Arc<Node>) -> BTreeMap<NodeNumber, Member> {
    let now = node.now();
    node.read_core(|core| {
        let member = |(number, member): (NodeNumber, &kvtier_policy::Member)| {
            let record = &member.record;
            // One that joined is given copies of what many calls share first.
            let is_ready = record.state == NodeState::Ready && !core.members().is_warming(now, number);
            let (id, edition, free_bytes) = (record.id.clone(), record.edition, record.free_host_bytes);
            (number, Member { id, edition, is_ready, free_bytes, number: u32::MAX })
        };
        core.members().iter().map(member).collect()
    })
}

fn named(message: &v1::PlaceRequest) -> Result<Vec<(NodeId, v1::PlaceCandidate)>, Status> {
    let mut seen = BTreeSet::new();
    let named = message.candidates.iter().map(|candidate| {
        let id = convert::node(&candidate.node_id).map_err(wire_status)?;
        if !seen.insert(id.clone()) {
            return Err(Status::invalid_argument(format!("candidate {id} is named twice")));
        }
        Ok((id, candidate.clone()))
    });
    named.collect()
}

/// This node, unless it is not ready, and the others that take requests; this one in any case when there is no other.
fn all_ready(
    own: &NodeId,
    is_unready: bool,
    members: &BTreeMap<NodeNumber, Member>,
) -> Vec<(NodeId, v1::PlaceCandidate)> {
    let mut ready: Vec<NodeId> = members.values().filter(|m| m.is_ready).map(|m| m.id.clone()).collect();
    if !is_unready || ready.is_empty() {
        ready.push(own.clone());
    }
    ready.sort();
    ready.truncate(MAX_CANDIDATES);
    ready.into_iter().map(|id| (id, v1::PlaceCandidate::default())).collect()
}
