//! Copies of prefixes that many calls share: on as many nodes as their use is worth, and on nodes that join.
//!
//! A node spreads what its own engines use. One prefix is copied at a time, behind what somebody waits for, and none that is
//! larger than what may be brought up ahead of programs. The node that gets a copy says what became of it, and takes no more
//! than may lie there unread.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvtier_policy::Core;
use kvtier_policy::programs::replicas;
use kvtier_proto::v1;
use kvtier_types::{BlockKey, Instant, NodeNumber, TenantId};
use tokio::time::interval;

use super::{Cluster, copies, warming};
use crate::node::Node;
use crate::operations::{self, Operations, Terms, Wish};
use crate::services::KEYS_PER_CORE_CALL;

/// How often it is looked for what is worth copies.
const EVERY: Duration = Duration::from_secs(2);
/// Prefixes looked at.
const MOST: usize = 32;
/// Prefixes that a node gets when it joins.
const ON_JOINING: usize = 16;
/// Blocks of a prefix.
const LONGEST: usize = 4096;
/// Copies that were made are not looked for again before.
const AGAIN: Duration = Duration::from_secs(300);
/// Copies that could not all be made are tried again after so long, and after twice as long each time, up to [`AGAIN`]: a node
/// may have been slow, or the directory away.
const RETRY: Duration = Duration::from_secs(5);
/// Longest that copying one prefix may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Why a prefix is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    /// It is used so often.
    Use,
    /// Branches are about to read it.
    FanOut,
    /// A node joined.
    Joined,
}

/// Bytes that were copied, by reason.
#[derive(Debug, Default)]
pub(crate) struct Spread([AtomicU64; 3]);

impl Spread {
    /// By the name of the reason.
    pub(crate) fn bytes(&self) -> [(&'static str, u64); 3] {
        let [used, fan_out, joined] = [0, 1, 2].map(|at: usize| self.0[at].load(Ordering::Relaxed));
        [("use", used), ("fan_out", fan_out), ("joined", joined)]
    }
}

/// What was seen to of a prefix.
#[derive(Debug, Default)]
struct Seen {
    copies: usize,
    /// Until when it is not looked at again for as many.
    until: Instant,
    /// Times in a row that they could not all be made.
    failed: u32,
}

impl Seen {
    /// So many copies were to be made, and all were or not.
    fn note(&mut self, now: Instant, copies: usize, is_done: bool) {
        self.copies = copies;
        self.failed = if is_done { 0 } else { self.failed.saturating_add(1) };
        let pause = RETRY * 2_u32.saturating_pow(self.failed.saturating_sub(1));
        self.until = now + if is_done { AGAIN } else { pause.min(AGAIN) };
    }

    /// How many it has, as far as that is not to be looked at again.
    fn has(&self, now: Instant) -> usize {
        if now < self.until { self.copies } else { 0 }
    }
}

/// What was done so far.
#[derive(Default)]
struct Done {
    /// Copies on other nodes that prefixes have or were to get, and until when that is not looked at again.
    copies: BTreeMap<BlockKey, Seen>,
    /// Nodes that were here already, with their lives.
    nodes: Option<BTreeSet<(NodeNumber, u64)>>,
    /// Nodes that joined and are yet to be told that all was copied to them.
    untold: BTreeSet<NodeNumber>,
}

/// Spreads prefixes until this node stops.
pub(super) async fn run(node: Arc<Node>, cluster: Arc<Cluster>) {
    let (mut ticks, mut done) = (interval(EVERY), Done::default());
    loop {
        tokio::select! {
            () = node.stopping.cancelled() => return,
            _ = ticks.tick() => {}
        }
        if !node.is_draining() && cluster.directory_state().away.is_none() {
            look(&node, &cluster, &mut done).await;
        }
    }
}

async fn look(node: &Arc<Node>, cluster: &Cluster, done: &mut Done) {
    let ready = copies::ready(node);
    let now = node.now();
    let replicates = node.config.programs.replicate;
    let hot = if replicates { node.read_core(|core| core.hottest(now, MOST)) } else { Vec::new() };
    for newcomer in newcomers(node, &ready, done) {
        let mut has_all = true;
        for (prefix, _) in hot.iter().take(ON_JOINING) {
            let wish = Wish { copies: 1, nodes: vec![newcomer], ahead: true };
            has_all &= copy(node, cluster, prefix, (wish, Reason::Joined)).await;
        }
        if !has_all {
            // It is warm when its time is over.
            done.untold.remove(&newcomer);
        }
    }
    tell_warm(node, &ready, done).await;
    if !replicates {
        return;
    }
    let mut wanted: BTreeMap<BlockKey, (f64, u32)> = hot.into_iter().map(|(key, rate)| (key, (rate, 0))).collect();
    let mut fan_outs = node.ahead.fan_outs();
    fan_outs.sort_unstable_by_key(|(_, branches)| std::cmp::Reverse(*branches));
    for (prefix, branches) in fan_outs.into_iter().take(MOST) {
        let wanted = &mut wanted.entry(prefix).or_default().1;
        *wanted = (*wanted).max(branches);
    }
    done.copies.retain(|key, _| wanted.contains_key(key));
    let nodes = u32::try_from(ready.len() + 1).unwrap_or(u32::MAX);
    for (prefix, (rate, branches)) in wanted {
        if node.stopping.is_cancelled() || node.is_draining() {
            return;
        }
        let copies = replicas(rate, branches, nodes).saturating_sub(1) as usize;
        let has = done.copies.get(&prefix).map_or(0, |seen| seen.has(now));
        if copies <= has {
            continue;
        }
        let reason =
            if replicas(rate, 0, nodes) < replicas(rate, branches, nodes) { Reason::FanOut } else { Reason::Use };
        let wish = Wish { copies, nodes: Vec::new(), ahead: true };
        let is_done = copy(node, cluster, &prefix, (wish, reason)).await;
        done.copies.entry(prefix).or_default().note(node.now(), copies, is_done);
    }
}

/// Tells nodes that joined that all was copied to them that was meant to be.
async fn tell_warm(node: &Arc<Node>, ready: &[NodeNumber], done: &mut Done) {
    done.untold.retain(|number| ready.contains(number));
    let is_warming = |number: &NodeNumber| node.read_core(|core| core.members().is_warming(node.now(), *number));
    for number in std::mem::take(&mut done.untold).into_iter().filter(is_warming) {
        if let Err(error) = warming::tell(node, number).await {
            tracing::debug!(peer = %number, %error, "a node that joined was not told that it is warm");
            done.untold.insert(number);
        }
    }
}

/// Nodes that were not here when it was last looked, to be told once all was copied to them; none to copy to the first time,
/// when this node is itself the newcomer.
fn newcomers(node: &Arc<Node>, ready: &[NodeNumber], done: &mut Done) -> Vec<NodeNumber> {
    let lives: BTreeSet<(NodeNumber, u64)> = node.read_core(|core| {
        let life = |number: &NodeNumber| Some((*number, core.members().get(*number)?.record.edition.incarnation()));
        ready.iter().filter_map(life).collect()
    });
    let former = done.nodes.replace(lives.clone());
    let is_first = former.is_none();
    let news: Vec<NodeNumber> = lives.difference(&former.unwrap_or_default()).map(|(number, _)| *number).collect();
    done.untold.extend(&news);
    if is_first { Vec::new() } else { news }
}

/// A block and those before it, the first first; nothing where that is more than is worth it, or may not leave this node.
fn prefix_to(node: &Arc<Node>, last: BlockKey) -> Option<Vec<BlockKey>> {
    let (mut next, mut keys, mut bytes) = (Some(last), Vec::new(), 0);
    let mut walk = |core: &Core| {
        for _ in 0..KEYS_PER_CORE_CALL {
            let Some(key) = next else { return Ok(false) };
            let (before, own) = core.step_up(&key).ok_or(())?;
            keys.push(key);
            bytes += own;
            next = before;
        }
        if keys.len() < LONGEST { Ok(true) } else { Err(()) }
    };
    node.read_core_in_steps(&mut walk).ok()?;
    keys.reverse();
    (bytes <= node.config.prefetch_budget()).then_some(keys)
}

/// Copies a prefix. Answers whether all copies are there now, or none is to be made.
async fn copy(node: &Arc<Node>, cluster: &Cluster, prefix: &BlockKey, (wish, reason): (Wish, Reason)) -> bool {
    let Some(keys) = prefix_to(node, *prefix) else { return true };
    let goals: Vec<_> = keys.into_iter().map(|key| (0, key)).collect();
    let terms = Terms { verb: "Replicate ahead", tenant: TenantId::shared(), total: goals.len() as u64, limit: LIMIT };
    let of_work = Arc::clone(node);
    let begun = Operations::begin(node, terms, |operation| operations::replicate(of_work, operation, goals, wish));
    let Some(operation) = begun else { return false };
    operation.ended(LIMIT).await;
    let view = operation.view();
    let (copied, failed) = (view.bytes, view.failed);
    cluster.spread.0[reason as usize].fetch_add(copied, Ordering::Relaxed);
    tracing::debug!(%prefix, ?reason, copied, failed, "a shared prefix was copied to other nodes");
    view.state() == v1::OperationState::Done && failed == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_copied_is_tried_again_and_ever_more_rarely() {
        let (mut seen, mut now) = (Seen::default(), Instant::ZERO);
        assert_eq!(seen.has(now), 0);
        for pause in [RETRY, RETRY * 2, RETRY * 4] {
            seen.note(now, 3, false);
            assert_eq!((seen.has(now), seen.has(now + pause)), (3, 0), "{pause:?}");
            now = now + pause;
        }
        (0..40).for_each(|_| seen.note(now, 3, false));
        assert_eq!(seen.has(now + AGAIN), 0, "never later than what was made is looked at again");
        seen.note(now, 3, true);
        assert_eq!((seen.has(now + RETRY), seen.has(now + AGAIN)), (3, 0));
        seen.note(now, 2, false);
        assert_eq!(seen.has(now + RETRY), 0, "what went well is no reason to wait");
    }
}
