//! Graphs that were removed: a declaration that is older and comes late, from another node, does not bring them back.
//!
//! *Bounds*: [`MAX_REMOVED`] for [`REMEMBERED`]; of the tenant that has most the oldest make room. A restart forgets them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvtier_types::Instant;

use super::GraphName;
use crate::holders::Shares;

/// Removed graphs that are remembered: as many as there are graphs.
const MAX_REMOVED: usize = super::MAX_GRAPHS;
/// How long they are: far longer than a declaration is on its way to a node that lives.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// The latest removals.
#[derive(Debug, Default)]
pub(super) struct Removed {
    revisions: BTreeMap<GraphName, (u64, Instant)>,
    order: BTreeSet<(Instant, GraphName)>,
    shares: Shares<GraphName>,
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
            self.shares.remove(&name.tenant, at.as_nanos(), name.clone());
        }
        self.shares.insert(&name.tenant, now.as_nanos(), name.clone());
        self.order.insert((now, name));
        while self.order.len() > MAX_REMOVED {
            let Some(oldest) = self.shares.first_to_go().cloned() else { return };
            self.forget(&oldest);
        }
    }

    /// Forgets what is too long ago.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((_, name)) = self.order.first().filter(|(at, _)| now.since(*at) > REMEMBERED) {
            let name = name.clone();
            self.forget(&name);
        }
    }

    fn forget(&mut self, name: &GraphName) {
        let Some((_, at)) = self.revisions.remove(name) else { return };
        self.order.remove(&(at, name.clone()));
        self.shares.remove(&name.tenant, at.as_nanos(), name.clone());
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
