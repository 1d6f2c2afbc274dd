//! Turns as they begin, told to watchers: declared steps that may run from now on, and programs that declared nothing and are
//! about to call.
//!
//! *Bounds*: turns are told within [`EVERY`]; [`MAX_RETURNS`] returns are waited for at once, those beyond are not told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::HolderName;
use kvtier_types::Instant;
use parking_lot::Mutex;
use tokio::time::interval;

use crate::node::Node;

/// How often it is looked whose turn began.
const EVERY: Duration = Duration::from_millis(20);
/// Programs whose return is waited for at once.
const MAX_RETURNS: usize = 16_384;
/// Turns told in one hold of the core.
const AT_ONCE: usize = 256;

/// Programs that wait for tools, by when they are about to be back.
#[derive(Debug, Default)]
pub(crate) struct Returns(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    order: BTreeSet<(Instant, HolderName)>,
    at: BTreeMap<HolderName, Instant>,
}

impl Returns {
    /// A program is about to be back then; not to be expected, with `None`.
    pub(crate) fn expect(&self, name: &HolderName, at: Option<Instant>) {
        let inner = &mut *self.0.lock();
        if let Some(former) = inner.at.remove(name) {
            inner.order.remove(&(former, name.clone()));
        }
        if let Some(at) = at.filter(|_| inner.at.len() < MAX_RETURNS) {
            inner.at.insert(name.clone(), at);
            inner.order.insert((at, name.clone()));
        }
    }

    fn take(&self, now: Instant) -> Vec<HolderName> {
        let inner = &mut *self.0.lock();
        let mut due = Vec::new();
        while due.len() < AT_ONCE {
            let Some((at, name)) = inner.order.first().filter(|(at, _)| *at <= now).cloned() else { break };
            inner.order.remove(&(at, name.clone()));
            inner.at.remove(&name);
            due.push(name);
        }
        due
    }
}

/// Tells turns until the node stops.
pub(crate) async fn run(node: Arc<Node>) {
    let mut ticks = interval(EVERY);
    loop {
        tokio::select! {
            () = node.stopping.cancelled() => return,
            _ = ticks.tick() => tell(&node).await,
        }
    }
}

async fn tell(node: &Arc<Node>) {
    let now = node.now();
    while let Some(turns) = node.graphs.with(|graphs| graphs.take_turns(now)) {
        for some in turns.chunks(AT_ONCE) {
            node.with_core(|core, _| {
                for turn in some {
                    let program = HolderName::program(&turn.tenant, &turn.program);
                    core.turn_began(&program, "ready", Some((turn.graph.clone(), turn.step.clone())));
                }
            });
        }
        tokio::task::yield_now().await;
    }
    loop {
        let due = node.returns.take(now);
        if due.is_empty() {
            return;
        }
        due.iter().for_each(|name| undeclared(node, name, "returns"));
        tokio::task::yield_now().await;
    }
}

/// A program is about to call; of one that declared its steps these are told instead.
pub(crate) fn undeclared(node: &Arc<Node>, name: &HolderName, reason: &'static str) {
    if !node.graphs.with(|graphs| graphs.covers(&name.tenant, &name.id)) {
        node.with_core(|core, _| core.turn_began(name, reason, None));
    }
}

#[cfg(test)]
mod tests {
    use kvtier_types::TenantId;

    use super::*;

    #[test]
    fn a_return_is_told_once_and_the_latest_word_counts() {
        let at = Instant::from_nanos;
        let name = |id: &str| HolderName::program(&TenantId::shared(), id);
        let returns = Returns::default();
        returns.expect(&name("a"), Some(at(5)));
        returns.expect(&name("b"), Some(at(3)));
        returns.expect(&name("a"), Some(at(9)));
        assert_eq!(returns.take(at(6)), [name("b")]);
        assert_eq!(returns.take(at(6)), []);
        returns.expect(&name("a"), None);
        assert_eq!(returns.take(at(99)), []);
        (0..MAX_RETURNS + 5).for_each(|n| returns.expect(&name(&n.to_string()), Some(at(1))));
        assert_eq!(returns.0.lock().order.len(), MAX_RETURNS);
    }
}
