//! Programs that forked: their stem stays in host memory until every branch has called, and their context is brought back
//! when the last branch is about a transfer from its end.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::{HolderName, Holdings};
use kvtier_types::{BlockKey, Instant};

use super::{Inner, MAX_WAITS, Wait, absent, transfer_of};
use crate::claims::settle;
use crate::node::Node;
use crate::services::{KEYS_PER_CORE_CALL, gather};

/// A stem is held for branches that do not come for so long.
const STEM_PATIENCE: Duration = Duration::from_secs(60);

/// A program that forked.
pub(super) struct Fork {
    name: HolderName,
    /// What is held for its branches, and until when.
    stem: Vec<BlockKey>,
    until: Instant,
    branches: u32,
}

/// Branches of one tenant are of a kind.
fn kind(name: &HolderName) -> u64 {
    HolderName::program(&name.tenant, "").number()
}

/// A program split into branches, each of which begins with its context.
pub(super) async fn forked(node: &Arc<Node>, name: HolderName, branches: &[HolderName], at: Instant) {
    let number = name.number();
    let stem = gather(node, Holdings::of_session(&name, (0, 0))).unwrap_or_default();
    let mut held = Vec::with_capacity(stem.len());
    for page in stem.chunks(KEYS_PER_CORE_CALL) {
        let count = node.with_core(|core, _| core.hold_stem(page));
        held.extend_from_slice(&page[..count]);
        if count < page.len() {
            break;
        }
    }
    let mut gone = Vec::new();
    {
        let inner = &mut *node.ahead.inner.lock();
        for dropped in inner.joins.forked(at, number, branches.iter().map(HolderName::number)) {
            gone.extend(inner.forks.remove(&dropped));
        }
        let branches = u32::try_from(branches.len()).unwrap_or(u32::MAX);
        let fork = Fork { name, stem: held, until: at + STEM_PATIENCE, branches };
        gone.extend(inner.forks.insert(number, fork));
        expect(node, inner, number, at);
    }
    for fork in gone {
        let_go(node, &fork.stem);
    }
    settle(node).await;
}

/// A branch made its first call, or a program its first since it forked.
pub(super) async fn called(node: &Arc<Node>, name: &HolderName, at: Instant) {
    let number = name.number();
    let is_brought = node.ahead.inner.lock().proactive.holds(number);
    let is_here = !is_brought || absent(node, name).0.is_empty();
    let mut gone = Vec::new();
    {
        let inner = &mut *node.ahead.inner.lock();
        if let Some(parent) = inner.joins.called(at, number) {
            gone.extend(inner.stem_of(parent));
        }
        if let Some(fork) = inner.forks.remove(&number) {
            inner.joins.forget(number);
            gone.extend(fork.stem);
            if inner.waits.get(&number).is_some_and(|wait| wait.joins) {
                inner.waits.remove(&number);
                inner.proactive.back(number, is_here);
            }
        }
    }
    release(node, &gone).await;
}

/// A program ended: what its parent waits for is one less.
pub(super) async fn ended(node: &Arc<Node>, name: &HolderName, at: Instant) {
    let number = name.number();
    let mut gone = Vec::new();
    {
        let inner = &mut *node.ahead.inner.lock();
        if let Some(fork) = inner.forks.remove(&number) {
            inner.joins.forget(number);
            gone.extend(fork.stem);
        }
        if let Some((parent, took)) = inner.joins.ended(at, number) {
            if let Some(took) = took {
                inner.branches.observe(kind(name), None, took);
            }
            gone.extend(inner.stem_of(parent));
            expect(node, inner, parent, at);
        }
    }
    release(node, &gone).await;
}

/// Lets go of stems whose branches did not come.
pub(super) async fn give_up(node: &Arc<Node>, now: Instant) {
    let late = |fork: &mut Fork| if fork.until <= now { std::mem::take(&mut fork.stem) } else { Vec::new() };
    let gone: Vec<BlockKey> = node.ahead.inner.lock().forks.values_mut().flat_map(late).collect();
    release(node, &gone).await;
}

/// Plans to bring back the context of a program that forked.
fn expect(node: &Arc<Node>, inner: &mut Inner, number: u64, at: Instant) {
    let Some(name) = inner.forks.get(&number).map(|fork| fork.name.clone()) else { return };
    if inner.proactive.holds(number) || inner.waits.get(&number).is_some_and(|wait| !wait.joins) {
        return;
    }
    if inner.waits.len() >= MAX_WAITS && !inner.waits.contains_key(&number) {
        return;
    }
    let left = |took| inner.branches.expect(kind(&name), None, took);
    let Some(expected) = inner.joins.rest(at, number, left) else { return };
    let transfer = transfer_of(node.read_core(|core| core.context_bytes(&name)), inner.rate);
    inner.proactive.wait(at, number, (expected, transfer));
    inner.waits.insert(number, Wait { name, began: at, announced: None, joins: true });
}

impl super::Ahead {
    /// The last block of each stem whose branches did not all come yet, and how many branches there are.
    pub(crate) fn fan_outs(&self) -> Vec<(BlockKey, u32)> {
        let inner = self.inner.lock();
        let of = |fork: &Fork| Some((*fork.stem.last()?, fork.branches));
        inner.forks.values().filter_map(of).collect()
    }
}

impl Inner {
    /// The stem of a program all of whose branches have called or ended.
    fn stem_of(&mut self, program: u64) -> Vec<BlockKey> {
        if !self.joins.all_called(program) {
            return Vec::new();
        }
        self.forks.get_mut(&program).map(|fork| std::mem::take(&mut fork.stem)).unwrap_or_default()
    }
}

async fn release(node: &Arc<Node>, stem: &[BlockKey]) {
    if !stem.is_empty() {
        let_go(node, stem);
        settle(node).await;
    }
}

fn let_go(node: &Arc<Node>, stem: &[BlockKey]) {
    for page in stem.chunks(KEYS_PER_CORE_CALL) {
        node.with_core(|core, _| core.let_stem_go(page));
    }
}
