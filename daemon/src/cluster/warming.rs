//! A node that joined is warm once every node that was there before has copied to it what it meant to.
//!
//! It says so in its heartbeats: until then steps are placed on it only where it is named. Whoever was there tells it when
//! it is done, also when there was nothing to copy.
//!
//! *Bounds*: [`WARM_UP`]; nodes that went meanwhile are not waited for.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::Context;
use kvtier_policy::WARM_UP;
use kvtier_policy::directory::{NodeRecord, NodeState};
use kvtier_proto::v1;
use kvtier_types::{Instant, NodeNumber};
use parking_lot::Mutex;
use tokio::time::timeout;

use super::peers;
use crate::node::Node;

/// Longest that a node is told for.
const TELL_LIMIT: std::time::Duration = std::time::Duration::from_secs(2);
/// Nodes that told before this one heard who there is: more need not be remembered.
const MAX_TOLD: usize = kvtier_policy::limits::MAX_NODES;

/// Who has yet to say that it copied all that it meant to.
#[derive(Debug, Default)]
pub(crate) struct Warming(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// When it is warm in any case; `None` until the directory was heard.
    until: Option<Instant>,
    awaited: BTreeSet<NodeNumber>,
    told: BTreeSet<NodeNumber>,
    warm: bool,
}

impl Warming {
    /// Whether this node is still being warmed: no longer than [`WARM_UP`], whoever is away.
    pub(crate) fn is_on(&self, now: Instant) -> bool {
        let inner = self.0.lock();
        !inner.warm && now < inner.until.unwrap_or(Instant::ZERO + WARM_UP)
    }

    /// The directory said who there is. Answers whether this node is warm since.
    pub(super) fn heard(&self, now: Instant, own: NodeNumber, records: &[NodeRecord]) -> bool {
        let inner = &mut *self.0.lock();
        let others = records.iter().filter(|r| r.state == NodeState::Ready).map(|r| r.id.number());
        let others: BTreeSet<NodeNumber> = others.filter(|number| *number != own).collect();
        if inner.until.is_none() {
            inner.until = Some(now + WARM_UP);
            inner.awaited = others;
        } else {
            inner.awaited.retain(|number| others.contains(number));
        }
        inner.settle(now)
    }

    /// A node says that it copied all that it meant to. Answers whether this node is warm since.
    pub(crate) fn told(&self, now: Instant, by: NodeNumber) -> bool {
        let inner = &mut *self.0.lock();
        if !inner.warm && inner.told.len() < MAX_TOLD {
            inner.told.insert(by);
        }
        inner.settle(now)
    }
}

impl Inner {
    fn settle(&mut self, now: Instant) -> bool {
        let Some(until) = self.until.filter(|_| !self.warm) else { return false };
        self.warm = until <= now || self.awaited.is_subset(&self.told);
        self.warm
    }
}

/// Tells a node that joined that all was copied to it that was meant to be.
pub(super) async fn tell(node: &Arc<Node>, peer: NodeNumber) -> anyhow::Result<()> {
    let tell = async {
        let mut client = peers::client(node, peer, TELL_LIMIT).await?;
        let message = v1::WarmedRequest { node_id: node.config.node_id.clone() };
        client.warmed(message).await?;
        Ok(())
    };
    timeout(TELL_LIMIT, tell).await.context("it did not answer in time")?
}

#[cfg(test)]
mod tests {
    use kvtier_types::{Edition, NodeId};

    use super::*;

    fn record(id: &str) -> NodeRecord {
        NodeRecord {
            id: NodeId::new(id).unwrap(),
            edition: Edition::first(1),
            state: NodeState::Ready,
            warming: false,
            peer: String::new(),
            free_host_bytes: 0,
            packs: Vec::new(),
        }
    }

    fn number(id: &str) -> NodeNumber {
        NodeId::new(id).unwrap().number()
    }

    #[test]
    fn a_node_is_warm_once_all_that_were_there_have_told_it() {
        let (now, warming) = (Instant::ZERO, Warming::default());
        assert!(warming.is_on(now) && !warming.is_on(now + WARM_UP));
        assert!(!warming.told(now, number("a")), "it may be told before it heard who there is");
        assert!(!warming.heard(now, number("own"), &[record("own"), record("a"), record("b"), record("c")]));
        assert!(!warming.told(now, number("b")));
        assert!(!warming.heard(now, number("own"), &[record("a"), record("b"), record("c"), record("later")]));
        assert!(warming.heard(now, number("own"), &[record("a"), record("b")]), "nobody waits for one that went");
        assert!(!warming.is_on(now));
        assert!(!warming.told(now, number("c")), "it is no news any more");
    }

    #[test]
    fn a_node_is_warm_in_any_case_after_a_while_and_at_once_when_alone() {
        let warming = Warming::default();
        assert!(!warming.heard(Instant::ZERO, number("own"), &[record("a")]));
        assert!(warming.heard(Instant::ZERO + WARM_UP, number("own"), &[record("a")]));
        assert!(Warming::default().heard(Instant::ZERO, number("own"), &[record("own")]));
    }
}
