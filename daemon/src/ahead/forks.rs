//! Programs that forked: their stem stays in host memory until every branch has called, and their context is brought back
//! when the last branch is about a transfer from its end.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::programs::{Kind, Return};
use kvtier_policy::{HolderName, Holdings};
use kvtier_types::{BlockKey, Instant};

use super::{Inner, MAX_WAITS, Wait, absent, kind, kind_of, transfer_of};
use crate::claims::settle;
use crate::node::Node;
use crate::services::{KEYS_PER_CORE_CALL, gather};

/// A stem is held for branches that do not come for so long.
pub(super) const STEM_PATIENCE: Duration = Duration::from_secs(60);

/// A program that forked.
pub(super) struct Fork {
    name: HolderName,
    /// What is held for its branches, and until when.
    stem: Vec<BlockKey>,
    until: Instant,
    branches: u32,
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
        gone.extend(inner.follow(at, (number, kind(&name, "")), branches.iter().map(HolderName::number)));
        let branches = u32::try_from(branches.len()).unwrap_or(u32::MAX);
        let fork = Fork { name, stem: held, until: at + STEM_PATIENCE, branches };
        gone.extend(inner.forks.insert(number, fork));
        inner.changed.insert(number);
    }
    for fork in gone {
        let_go(node, &fork.stem);
    }
    settle(node).await;
}

/// A program says that its parent waits for its end, or that it does not.
pub(super) async fn blocks(node: &Arc<Node>, name: &HolderName, (parent, waits): (HolderName, bool), at: Instant) {
    let (number, of_parent) = (name.number(), parent.number());
    let mut gone = Vec::new();
    let kind_of_it = kind_of(node, name);
    {
        let inner = &mut *node.ahead.inner.lock();
        if waits {
            let dropped = inner.follow(at, (of_parent, kind(name, "")), [number]);
            gone.extend(dropped.into_iter().flat_map(|fork| fork.stem));
            let none = Fork { name: parent, stem: Vec::new(), until: at, branches: 0 };
            inner.forks.entry(of_parent).or_insert(none);
            inner.joins.called(at, number, kind_of_it);
        }
        let changed = if waits { Some(of_parent) } else { inner.joins.leave(number) };
        inner.changed.extend(changed);
        gone.extend(changed.into_iter().flat_map(|parent| inner.stem_of(parent)));
    }
    release(node, &gone).await;
}

/// A branch made its first call, or a program its first since it forked.
pub(super) async fn called(node: &Arc<Node>, name: &HolderName, at: Instant) {
    let (number, kind) = (name.number(), kind_of(node, name));
    let is_brought = node.ahead.inner.lock().proactive.holds(number);
    let is_here = !is_brought || absent(node, name).0.is_empty();
    let mut gone = Vec::new();
    {
        let inner = &mut *node.ahead.inner.lock();
        if let Some(parent) = inner.joins.called(at, number, kind) {
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
pub(super) async fn ended(node: &Arc<Node>, name: &HolderName, kind: Kind, at: Instant) {
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
                inner.branches.observe(kind, None, took);
            }
            gone.extend(inner.stem_of(parent));
            inner.changed.insert(parent);
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

/// Plans anew for programs whose branches changed since it was last called: once for all that changed of one, because each
/// plan looks at all branches.
pub(super) fn plan(node: &Arc<Node>, now: Instant) {
    let changed = std::mem::take(&mut node.ahead.inner.lock().changed);
    changed.into_iter().for_each(|number| expect(node, number, now));
}

/// Plans to bring back the context of a program that forked. The core is asked while nothing here is locked.
fn expect(node: &Arc<Node>, number: u64, at: Instant) {
    let wanted = {
        let inner = &mut *node.ahead.inner.lock();
        inner.expected(number, at)
    };
    let Some((name, expected)) = wanted else { return };
    node.returns.expect(&name, Some(at + expected.early));
    let (bytes, kind) = node.read_core(|core| (core.context_bytes(&name), kind(&name, core.program_role(&name))));
    let inner = &mut *node.ahead.inner.lock();
    if !inner.forks.contains_key(&number) || inner.proactive.holds(number) {
        return;
    }
    if inner.waits.len() >= MAX_WAITS && !inner.waits.contains_key(&number) {
        inner.forget_oldest();
    }
    inner.proactive.wait(at, number, (expected, transfer_of(bytes, inner.rate)));
    inner.waits.insert(number, Wait { name, kind, began: at, announced: None, joins: true });
}

impl super::Ahead {
    /// The last block of each stem whose branches did not all come yet, and how many branches there are; and of what
    /// declared steps are about to read, how many do.
    pub(crate) fn fan_outs(&self) -> Vec<(BlockKey, u32)> {
        let inner = self.inner.lock();
        let of = |fork: &Fork| Some((*fork.stem.last()?, fork.branches));
        inner.forks.values().filter_map(of).chain(inner.shared.fan_outs()).collect()
    }
}

impl Inner {
    /// Branches of a program are followed from now on. Answers with forks that are not any more, for want of room.
    fn follow(&mut self, at: Instant, program: (u64, Kind), branches: impl IntoIterator<Item = u64>) -> Vec<Fork> {
        let mut gone = Vec::new();
        for dropped in self.joins.forked(at, program, branches) {
            gone.extend(self.forks.remove(&dropped));
            if self.waits.get(&dropped).is_some_and(|wait| wait.joins) {
                self.waits.remove(&dropped);
                self.proactive.ended(dropped);
            }
        }
        gone
    }

    /// A program that forked and waits for nothing else, and when its last branch is expected to end.
    fn expected(&self, number: u64, at: Instant) -> Option<(HolderName, Return)> {
        let name = self.forks.get(&number)?.name.clone();
        if self.proactive.holds(number) || self.waits.get(&number).is_some_and(|wait| !wait.joins) {
            return None;
        }
        let left = |kind, took| self.branches.expect(kind, None, took);
        let expected = self.joins.rest(at, number, left)?;
        Some((name, expected))
    }

    /// The stem of a program all of whose branches have called or ended.
    fn stem_of(&mut self, program: u64) -> Vec<BlockKey> {
        if !self.joins.all_called(program) {
            return Vec::new();
        }
        self.forks.get_mut(&program).map(|fork| std::mem::take(&mut fork.stem)).unwrap_or_default()
    }
}

pub(super) async fn release(node: &Arc<Node>, stem: &[BlockKey]) {
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
