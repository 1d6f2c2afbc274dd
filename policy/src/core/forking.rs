//! Forks: children hold their parent's latest context from now on, brought to them in steps.
//!
//! The tips of all children go down the parent's path together, and are handed out where it ends.

use std::collections::BTreeSet;

use kvtier_types::{Instant, Outcome};

use super::Core;
use super::programs::HOLDER_STEP;
use crate::catalog::{BlockId, Spot};
use crate::holders::{Descent, HolderId, HolderName};

/// A fork that is being carried out.
#[derive(Debug)]
pub(super) struct Forking {
    parent: HolderName,
    children: Vec<HolderName>,
    /// Ends of the parent's context to which no tips were brought yet.
    context: Vec<Spot>,
    /// Where the tips of the children were handed out.
    reached: Vec<Spot>,
    stage: Stage,
    /// A child that was not known before is among them.
    fresh: bool,
    /// When all children were known.
    touched: u64,
}

/// What is done next, and for which of the children.
#[derive(Debug)]
enum Stage {
    Hear(usize),
    Bring,
    Descend(Descent),
    Give(Descent, usize),
    Finish(usize),
}

impl Forking {
    pub(super) const fn outcome(&self) -> Outcome {
        if self.fresh || self.children.is_empty() { Outcome::Applied } else { Outcome::Duplicate }
    }
}

impl Core {
    /// Begins a fork into these children; the parent is none of them.
    pub(super) fn begin_fork(&mut self, parent: HolderId, children: &[HolderName]) -> Forking {
        let holder = self.catalog.holders.get(parent);
        let context = holder.context.iter().map(|id| self.catalog.spot(*id)).collect();
        let parent = holder.name.clone();
        let children: BTreeSet<&HolderName> = children.iter().filter(|name| **name != parent).collect();
        let children = children.into_iter().cloned().collect();
        Forking { parent, children, context, reached: Vec::new(), stage: Stage::Hear(0), fresh: false, touched: 0 }
    }

    /// Goes on with a fork. Answers whether something is left to do.
    pub(super) fn fork_some(&mut self, now: Instant, forking: &mut Forking) -> bool {
        let left = &mut { HOLDER_STEP };
        forking.stage = match std::mem::replace(&mut forking.stage, Stage::Bring) {
            Stage::Hear(next) => match self.hear_children(now, forking, next, left) {
                Some(next) => Stage::Hear(next),
                None => {
                    forking.touched = self.catalog.holders.touch();
                    Stage::Bring
                }
            },
            Stage::Bring => match (forking.context.pop(), u32::try_from(forking.children.len())) {
                (Some(to), Ok(count @ 1..)) => Stage::Descend(Descent::new(to, count)),
                _ => Stage::Finish(0),
            },
            Stage::Descend(mut descent) => {
                let mut revived = Vec::new();
                let more = self.catalog.descend_some(&mut descent, left, &mut revived);
                self.restand_all(revived);
                if more { Stage::Descend(descent) } else { Stage::Give(descent, 0) }
            }
            Stage::Give(mut descent, next) => match self.give_some(forking, &mut descent, next, left) {
                Some(next) => Stage::Give(descent, next),
                None => Stage::Bring,
            },
            Stage::Finish(next) => match self.finish_some(forking, next, left) {
                Some(next) => Stage::Finish(next),
                None => return false,
            },
        };
        true
    }

    /// The children are known from now on. Answers with the next one.
    fn hear_children(&mut self, now: Instant, forking: &mut Forking, from: usize, left: &mut usize) -> Option<usize> {
        for (at, name) in forking.children.iter().enumerate().skip(from) {
            if *left == 0 {
                return Some(at);
            }
            // Another may have to make room, with all its tips.
            *left = left.saturating_sub(HOLDER_STEP / 16);
            forking.fresh |= self.catalog.holders.find(name).is_none();
            let child = self.catalog.hear(now, name);
            if let Some(parent) = self.catalog.holders.find(&forking.parent) {
                self.catalog.holders.adopt(child, parent);
                let called = self.catalog.holders.get(parent).called;
                let holder = self.catalog.holders.get_mut(child);
                holder.called = holder.called.or(called);
            }
        }
        None
    }

    /// Hands tips out that came down. Answers with the next child.
    fn give_some(
        &mut self,
        forking: &mut Forking,
        descent: &mut Descent,
        from: usize,
        left: &mut usize,
    ) -> Option<usize> {
        for (at, name) in forking.children.iter().enumerate().skip(from) {
            if *left == 0 {
                return Some(at);
            }
            let Some(child) = self.catalog.holders.find(name) else { continue };
            *left = left.saturating_sub(1 + self.catalog.holders.get(child).tips.len());
            let reached = self.catalog.give_tip(descent, child, forking.touched);
            let reached = reached.map(|id| self.catalog.spot(id));
            if let Some(spot) = reached.filter(|spot| forking.reached.last().is_none_or(|r| r.place != spot.place)) {
                forking.reached.push(spot);
            }
        }
        self.catalog.give_back(descent);
        None
    }

    /// The children are as if they had called where their parent did. Answers with the next one.
    fn finish_some(&mut self, forking: &Forking, from: usize, left: &mut usize) -> Option<usize> {
        for (at, name) in forking.children.iter().enumerate().skip(from) {
            if *left == 0 {
                return Some(at);
            }
            let Some(child) = self.catalog.holders.find(name) else { continue };
            let holder = self.catalog.holders.get(child);
            *left = left.saturating_sub(1 + forking.reached.len() + holder.tips.len());
            // One that called meanwhile is further already.
            if holder.was_heard_since(forking.touched) {
                continue;
            }
            let here: Vec<BlockId> = forking.reached.iter().filter_map(|spot| self.catalog.at(spot)).collect();
            self.catalog.called(child, forking.touched, &here);
        }
        None
    }
}
