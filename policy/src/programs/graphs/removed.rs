//! Graphs that were removed: a declaration that is older and comes late, from another node, does not bring them back.
//!
//! *Bounds*: [`MAX_REMOVED`] for [`REMEMBERED`]; the oldest make room. A restart forgets them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvtier_types::Instant;

use super::GraphName;

/// Removed graphs that are remembered: as many as there are graphs.
const MAX_REMOVED: usize = super::MAX_GRAPHS;
/// How long they are: far longer than a declaration is on its way to a node that lives.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// The latest removals.
#[derive(Debug, Default)]
pub(super) struct Removed {
    revisions: BTreeMap<GraphName, (u64, Instant)>,
    order: BTreeSet<(Instant, GraphName)>,
}

impl Removed {
    /// The revision that removed a graph; zero where none is remembered.
    pub(super) fn revision(&self, name: &GraphName) -> u64 {
        self.revisions.get(name).map_or(0, |(revision, _)| *revision)
    }

    /// A revision removed a graph.
    pub(super) fn note(&mut self, now: Instant, name: GraphName, revision: u64) {
        let former = self.revisions.insert(name.clone(), (revision, now));
        if let Some((_, at)) = former {
            self.order.remove(&(at, name.clone()));
        }
        self.order.insert((now, name));
        while self.order.len() > MAX_REMOVED {
            self.forget_oldest();
        }
    }

    /// Forgets what is too long ago.
    pub(super) fn expire(&mut self, now: Instant) {
        while self.order.first().is_some_and(|(at, _)| now.since(*at) > REMEMBERED) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, name)) = self.order.pop_first() {
            self.revisions.remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use kvtier_types::TenantId;

    use super::*;

    #[test]
    fn removals_are_bounded_in_number_and_time() {
        let name = |n: usize| GraphName { tenant: TenantId::shared(), program: n.to_string() };
        let mut removed = Removed::default();
        (0..=MAX_REMOVED).for_each(|n| removed.note(Instant::from_nanos(n as u64), name(n), 7));
        removed.note(Instant::from_nanos(MAX_REMOVED as u64), name(1), 9);
        assert_eq!([0, 1, 2].map(|n| removed.revision(&name(n))), [0, 9, 7]);
        assert_eq!((removed.order.len(), removed.revisions.len()), (MAX_REMOVED, MAX_REMOVED));
        removed.expire(Instant::ZERO + REMEMBERED + Duration::from_nanos(4));
        assert_eq!([2, 3, 4].map(|n| removed.revision(&name(n))), [0, 0, 7]);
    }
}
