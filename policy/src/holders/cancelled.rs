//! Abandoned programs that are remembered, so that nothing that they wrote comes back.

use std::collections::BTreeMap;

use super::HolderName;
use super::shares::Shares;
use crate::limits::MAX_CANCELLED;

/// Abandoned programs, each with the last sequence that it may have written under. At most [`MAX_CANCELLED`]; beyond, the
/// earliest one of the tenant that has most makes room.
#[derive(Debug)]
pub(crate) struct Cancelled {
    up_to: BTreeMap<HolderName, u64>,
    shares: Shares<HolderName>,
    limit: usize,
}

impl Default for Cancelled {
    fn default() -> Self {
        Self { up_to: BTreeMap::new(), shares: Shares::default(), limit: MAX_CANCELLED }
    }
}

impl Cancelled {
    /// What a program wrote up to a sequence is dead, where nobody else holds it.
    pub(crate) fn insert(&mut self, name: HolderName, up_to_sequence: u64) {
        let before = self.up_to.get(&name).copied();
        if before.is_none() && self.up_to.len() >= self.limit {
            self.make_room();
        }
        let up_to = up_to_sequence.max(before.unwrap_or_default());
        if let Some(before) = before {
            self.shares.remove(&name.tenant, before, name.clone());
        }
        self.shares.insert(&name.tenant, up_to, name.clone());
        self.up_to.insert(name, up_to);
    }

    fn make_room(&mut self) {
        let Some(name) = self.shares.first_to_go().cloned() else { return };
        if let Some(up_to) = self.up_to.remove(&name) {
            self.shares.remove(&name.tenant.clone(), up_to, name);
        }
    }

    /// The last sequence that an abandoned program may have written under.
    pub(crate) fn up_to(&self, name: &HolderName) -> Option<u64> {
        self.up_to.get(name).copied()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.up_to.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use kvtier_types::TenantId;

    use super::*;

    #[test]
    fn the_tenant_that_abandoned_most_is_forgotten_first() {
        let name = |tenant: &str, id: &str| HolderName::program(&TenantId::new(tenant).unwrap(), id);
        let mut cancelled = Cancelled { limit: 4, ..Cancelled::default() };
        cancelled.insert(name("quiet", "q"), 1);
        for (up_to, id) in (2..).zip(["a", "b", "c"]) {
            cancelled.insert(name("loud", id), up_to);
        }
        cancelled.insert(name("loud", "a"), 9);
        assert_eq!(cancelled.up_to(&name("loud", "a")), Some(9));
        cancelled.insert(name("loud", "d"), 10);
        assert_eq!(cancelled.up_to(&name("quiet", "q")), Some(1), "the other tenant's is as it was");
        assert_eq!(cancelled.up_to(&name("loud", "b")), None, "the earliest of the tenant that has most");
        cancelled.insert(name("loud", "c"), 1);
        assert_eq!(cancelled.up_to(&name("loud", "c")), Some(4), "it is not forgotten by a late word");
    }
}
