//! Begins to bring a step's context to where it will run: what is slower than host memory here comes up, what another node
//! lacks and this one has is copied there. Within the budget of what is brought ahead of programs.

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::v1;
use kvtier_types::{BlockKey, NodeId, Origin, Tier};

use super::context::Context;
use super::nodes::Nodes;
use crate::node::Node;
use crate::operations::{self, Goal, Operations, Terms, Wish};
use crate::services::caller::Caller;
use crate::services::targets::KEYS_PER_CORE_CALL;

/// When it is given up: the step should have begun by then.
const LIMIT: Duration = Duration::from_secs(30);

/// Begins what helps the step on the node chosen; `needed` are the blocks that it loads, with where from.
pub(super) fn start(
    node: &Arc<Node>,
    caller: &Caller,
    (nodes, choice): (&Nodes, usize),
    (context, needed): (&Context, Vec<(usize, Origin)>),
) -> Vec<v1::PlaceStarted> {
    let id = &nodes.candidates[choice].id;
    let is_here = *id == nodes.own;
    let wanted = needed.into_iter().filter(|(_, from)| match from {
        Origin::Tier(Tier::Device | Tier::Host) => false,
        Origin::Tier(Tier::Disk) => is_here,
        Origin::Tier(Tier::Object) | Origin::Peer => true,
    });
    let keys: Vec<BlockKey> = wanted.map(|(at, _)| context.blocks[at].key).collect();
    let (goals, bytes) = affordable(node, (context, &keys), is_here);
    if goals.is_empty() {
        return Vec::new();
    }
    let (verb, kind) = if is_here {
        ("Prefetch for a step", v1::PlaceWork::Prefetch)
    } else {
        ("Replicate for a step", v1::PlaceWork::Replicate)
    };
    let blocks = goals.len() as u64;
    let terms = Terms { verb, tenant: caller.tenant.clone(), total: blocks, limit: LIMIT };
    let operation = if is_here {
        let of_work = (Arc::clone(node), caller.clone());
        Operations::begin(node, terms, |operation| {
            operations::prefetch(of_work.0, operation, goals, (of_work.1, Tier::Host))
        })
    } else {
        let (of_work, wish) = (Arc::clone(node), to_node(id));
        Operations::begin(node, terms, |operation| operations::replicate(of_work, operation, goals, wish))
    };
    // Too many run: nothing is begun, and the step finds what it finds.
    let Some(operation) = operation else { return Vec::new() };
    let operation_id = operation.id().to_owned();
    vec![v1::PlaceStarted { kind: kind.into(), node_id: id.to_string(), blocks, bytes, operation_id }]
}

fn to_node(id: &NodeId) -> Wish {
    Wish { copies: 1, nodes: vec![id.number()], ahead: false }
}

/// The blocks that something can be done about here, as many of the first as the budget has room for, and their bytes.
fn affordable(node: &Arc<Node>, (context, keys): (&Context, &[BlockKey]), is_here: bool) -> (Vec<Goal>, u64) {
    let budget = node.config.prefetch_budget();
    let whole = context.whole_block_bytes().into_iter().max().unwrap_or(0);
    let (mut goals, mut sum) = (Vec::new(), 0);
    for portion in keys.chunks(KEYS_PER_CORE_CALL) {
        let known: Vec<_> = node.read_core(|core| {
            let known = |key: &BlockKey| (*key, core.weigh(key), core.may_replicate(key));
            portion.iter().map(known).collect()
        });
        for (key, (shards, bytes), may_leave) in known {
            // What comes from elsewhere is as large as any.
            let bytes = if shards == 0 { whole } else { bytes };
            if !is_here && (shards == 0 || !may_leave) {
                continue;
            }
            if sum + bytes > budget {
                return (goals, sum);
            }
            sum += bytes;
            goals.push((0, key));
        }
    }
    (goals, sum)
}
