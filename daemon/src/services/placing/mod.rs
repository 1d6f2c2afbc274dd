//! `Place`: where to run a program's next step, from where its context lies and how long nodes would wait.
//!
//! ```text
//! context.rs   which blocks: of the targets, of a program as this node or another one knows it
//! places.rs    where they lie: this node's catalog, the directory for the others, packs
//! policy       what the step costs on each node, and the choice (programs::Costing, programs::choose)
//! start.rs     what is brought there, if asked        words.rs   the choice in a sentence
//! ```
//! *Invariants*: stateless; what cannot be found out in time costs the choice only, and the reason says so; blocks that the
//! caller may not know of count as being nowhere, wherever they are.
//! *Bounds*: [`MAX_CANDIDATES`], [`context::MAX_BLOCKS`], [`MAX_AT_ONCE`]; nothing is waited for beyond [`MAX_LIMIT`].

mod context;
mod nodes;
mod places;
mod start;
mod words;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvtier_policy::programs::{Bill, Choice, Costing, Reason, Step, choose};
use kvtier_proto::v1;
use kvtier_types::{BlockHints, Origin, Tier};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tonic::Status;

use super::caller::Caller;
use super::wire_status;
use crate::node::Node;
use context::Context;
use nodes::Nodes;

pub(super) use context::of_peer;

/// Nodes that one step may run on.
pub(crate) const MAX_CANDIDATES: usize = 1024;
/// How long it is found out what lies where, when the caller does not say.
const DEFAULT_LIMIT: Duration = Duration::from_millis(25);
/// Longest that may be asked for.
const MAX_LIMIT: Duration = Duration::from_secs(1);
/// Placements that ask other nodes and the directory at once; beyond, they go by queues.
const MAX_AT_ONCE: usize = 64;
/// Looks at a block, all candidates together, that a thread of the runtime does on the side.
const MAX_LOOKS_ON_THE_SIDE: usize = 65_536;

/// Placements so far, and who is at it.
#[derive(Debug)]
pub(crate) struct Placements {
    gate: Semaphore,
    by_reason: [AtomicU64; 4],
}

impl Default for Placements {
    fn default() -> Self {
        Self { gate: Semaphore::new(MAX_AT_ONCE), by_reason: Default::default() }
    }
}

impl Placements {
    /// How many there were, by reason.
    pub(crate) fn counts(&self) -> [(&'static str, u64); 4] {
        let count = |at: usize| self.by_reason[at].load(Ordering::Relaxed);
        [("stays", count(0)), ("state", count(1)), ("queue", count(2)), ("unknown_state", count(3))]
    }

    fn count(&self, reason: v1::PlaceReason) {
        let at = match reason {
            v1::PlaceReason::Stays => 0,
            v1::PlaceReason::State => 1,
            v1::PlaceReason::Queue => 2,
            v1::PlaceReason::UnknownState | v1::PlaceReason::Unspecified => 3,
        };
        self.by_reason[at].fetch_add(1, Ordering::Relaxed);
    }
}

/// What is known when a choice is made.
struct Known {
    nodes: Nodes,
    /// The context, or why it is not known.
    context: Result<Context, String>,
    places: places::Places,
}

impl Known {
    /// Why a choice by costs would be blind, if it would.
    fn blind(&self) -> Option<String> {
        if let Err(reason) = &self.context {
            return Some(reason.clone());
        }
        if !self.nodes.candidates.iter().any(|c| c.known) {
            return Some("no candidate is a node that this one has heard of".to_owned());
        }
        let others = self.nodes.candidates.iter().any(|c| c.id != self.nodes.own);
        self.places
            .directory_is_away
            .then(|| "the directory does not say what other nodes have".to_owned())
            .filter(|_| others)
    }
}

/// Places a step.
///
/// # Errors
/// `INVALID_ARGUMENT` for what makes no sense, `PERMISSION_DENIED` for another tenant's.
pub(super) async fn place(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::PlaceRequest,
) -> Result<v1::PlaceReply, Status> {
    let caller = caller.acting_for(&message.tenant)?;
    let wanted = context::wanted(node, &caller, message)?;
    let nodes = Nodes::of(node, message)?;
    let limit = match message.deadline_ms {
        0 => DEFAULT_LIMIT,
        ms => Duration::from_millis(ms.into()).min(MAX_LIMIT),
    };
    let known = find_out(node, (wanted, nodes), Instant::now() + limit).await;
    let blocks = &known.places.blocks;
    let (groups, block_bytes) = match &known.context {
        Ok(context) => (context.layout.groups.as_slice(), context.whole_block_bytes()),
        Err(_) => (&[][..], Vec::new()),
    };
    let step = Step { groups, block_bytes: &block_bytes, prompt_tokens: message.prompt_tokens, blocks };
    let rates = node.read_core(kvtier_policy::Core::load_rates);
    let work = || {
        let costing = Costing::new(step, rates);
        let bills: Vec<Bill> = known.nodes.candidates.iter().map(|c| costing.bill(&c.server)).collect();
        (costing, bills)
    };
    let is_large = known.nodes.candidates.len().saturating_mul(blocks.len()) > MAX_LOOKS_ON_THE_SIDE;
    let (costing, bills) = if is_large { tokio::task::block_in_place(work) } else { work() };
    let blind = known.blind();
    let (choice, reason) = decide(&bills, known.nodes.current, blind.is_some())?;
    let mut reply = v1::PlaceReply {
        node_id: known.nodes.candidates[choice].id.to_string(),
        reason: reason.into(),
        explanation: words::explain(&known.nodes, &bills, choice, (reason, blind.as_deref())),
        costs: known.nodes.candidates.iter().zip(&bills).map(|(c, bill)| cost(c, bill)).collect(),
        started: Vec::new(),
    };
    if let (true, None, Ok(context)) = (message.start, &blind, &known.context) {
        let bill = &bills[choice];
        let needed = costing.needed(bill.candidate.node, bill.served_tokens());
        reply.started = start::start(node, &caller, (&known.nodes, choice), (context, needed));
    }
    node.placements.count(reason);
    Ok(reply)
}

/// Finds out what is known in time.
async fn find_out(node: &Arc<Node>, (wanted, nodes): (Vec<context::Wanted>, Nodes), until: Instant) -> Known {
    let Ok(_permit) = node.placements.gate.try_acquire() else {
        let why = format!("{MAX_AT_ONCE} placements are under way here already");
        return Known { nodes, context: Err(why), places: places::Places::default() };
    };
    let context = context::find(node, (wanted, &nodes), until).await;
    let places = match &context {
        Ok(context) => places::look(node, context, &nodes, until).await,
        Err(_) => places::Places::default(),
    };
    Known { nodes, context, places }
}

/// The choice, as its place among the candidates, and why.
fn decide(bills: &[Bill], current: Option<u32>, is_blind: bool) -> Result<(usize, v1::PlaceReason), Status> {
    let none = || Status::internal("there is no node to choose from");
    if is_blind {
        let here = bills.iter().position(|bill| Some(bill.candidate.node) == current);
        let shortest = || (0..bills.len()).min_by_key(|at| bills[*at].candidate.queue);
        return Ok((here.or_else(shortest).ok_or_else(none)?, v1::PlaceReason::UnknownState));
    }
    let Choice { node, reason, .. } = choose(bills, current).ok_or_else(none)?;
    let reason = match reason {
        Reason::Stays => v1::PlaceReason::Stays,
        Reason::State => v1::PlaceReason::State,
        Reason::Queue => v1::PlaceReason::Queue,
    };
    Ok((bills.iter().position(|bill| bill.candidate.node == node).ok_or_else(none)?, reason))
}

fn cost(candidate: &nodes::Candidate, bill: &Bill) -> v1::PlaceCost {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let served = |origin: Origin| bill.served[origin.index()];
    v1::PlaceCost {
        node_id: candidate.id.to_string(),
        queue_us: micros(bill.candidate.queue),
        recompute_us: micros(bill.candidate.recompute),
        load_us: micros(bill.candidate.load),
        displaced_us: micros(bill.candidate.displaced),
        host_tokens: served(Origin::Tier(Tier::Host)),
        disk_tokens: served(Origin::Tier(Tier::Disk)),
        object_tokens: served(Origin::Tier(Tier::Object)),
        peer_tokens: served(Origin::Peer),
        recompute_tokens: bill.recompute_tokens,
        prefill_tokens_per_second: bill.prefill_tokens_per_second,
        known: candidate.known,
    }
}

/// A name within the bounds of names of programs and sessions.
fn name<'a>(field: &'static str, id: &'a str) -> Result<&'a str, Status> {
    kvtier_proto::convert::bounded(field, id, BlockHints::MAX_PROGRAM_ID_BYTES).map_err(wire_status)
}

#[cfg(test)]
mod tests {
    use kvtier_policy::programs::{LoadRates, Server};

    use super::*;

    fn bills(queues: &[u64]) -> Vec<Bill> {
        let step = Step { groups: &[], block_bytes: &[], prompt_tokens: 100, blocks: &[] };
        let rates = LoadRates { nanos_per_byte: [1.0; 5], latency: [Duration::ZERO; 5] };
        let costing = Costing::new(step, rates);
        let server = |(node, queue): (u32, &u64)| Server {
            node,
            queue: Duration::from_millis(*queue),
            prefill_tokens_per_second: 1_000,
            free_bytes: None,
        };
        (0..).zip(queues).map(|(node, queue)| costing.bill(&server((node, queue)))).collect()
    }

    #[test]
    fn without_sight_it_stays_or_goes_where_least_waits() {
        let bills = bills(&[9, 5, 7]);
        assert_eq!(decide(&bills, Some(2), true).unwrap(), (2, v1::PlaceReason::UnknownState));
        assert_eq!(decide(&bills, None, true).unwrap(), (1, v1::PlaceReason::UnknownState));
        assert_eq!(decide(&bills, Some(8), true).unwrap(), (1, v1::PlaceReason::UnknownState));
        assert_eq!(decide(&bills, Some(0), false).unwrap(), (0, v1::PlaceReason::Stays));
        assert_eq!(decide(&bills, None, false).unwrap(), (1, v1::PlaceReason::Queue));
        assert!(decide(&[], None, true).is_err());
    }

    #[test]
    fn placements_are_counted_by_reason() {
        let placements = Placements::default();
        for reason in [v1::PlaceReason::State, v1::PlaceReason::State, v1::PlaceReason::UnknownState] {
            placements.count(reason);
        }
        assert_eq!(placements.counts().map(|(_, n)| n), [0, 2, 0, 1]);
    }
}
