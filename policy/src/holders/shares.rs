//! Who makes room in a table that tenants share: of the tenant that has most, what came first.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use kvtier_types::TenantId;

/// What tenants have in a table, by age. Finding who makes room costs the logarithm of how many there are.
#[derive(Debug)]
pub(crate) struct Shares<T> {
    of: BTreeMap<TenantId, BTreeSet<(u64, T)>>,
    /// How much each tenant has, and the age of what came first.
    sizes: BTreeSet<(usize, Reverse<u64>, TenantId)>,
}

impl<T> Default for Shares<T> {
    fn default() -> Self {
        Self { of: BTreeMap::new(), sizes: BTreeSet::new() }
    }
}

impl<T: Ord> Shares<T> {
    /// A tenant has something, as old as `age` says: the lower the older.
    pub(crate) fn insert(&mut self, tenant: &TenantId, age: u64, of: T) {
        self.change(tenant, |share| share.insert((age, of)));
    }

    /// It has it no more.
    pub(crate) fn remove(&mut self, tenant: &TenantId, age: u64, of: T) {
        self.change(tenant, |share| share.remove(&(age, of)));
    }

    /// What makes room: the oldest of the tenant that has most; where several have, of the one whose oldest is oldest.
    pub(crate) fn first_to_go(&self) -> Option<&T> {
        let (_, _, tenant) = self.sizes.last()?;
        self.of.get(tenant)?.first().map(|(_, of)| of)
    }

    fn change(&mut self, tenant: &TenantId, change: impl FnOnce(&mut BTreeSet<(u64, T)>) -> bool) {
        let size = |share: &BTreeSet<(u64, T)>| Some((share.len(), Reverse(share.first()?.0), tenant.clone()));
        let share = self.of.entry(tenant.clone()).or_default();
        if let Some(before) = size(share) {
            self.sizes.remove(&before);
        }
        change(share);
        match size(share) {
            Some(after) => drop(self.sizes.insert(after)),
            None => drop(self.of.remove(tenant)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tenant_that_has_most_makes_room_with_its_oldest() {
        let (a, b) = (TenantId::new("a").unwrap(), TenantId::new("b").unwrap());
        let mut shares = Shares::default();
        assert_eq!(shares.first_to_go(), None);
        shares.insert(&a, 1, "a1");
        shares.insert(&b, 2, "b2");
        assert_eq!(shares.first_to_go(), Some(&"a1"), "of equals the one whose oldest is oldest");
        shares.insert(&b, 3, "b3");
        assert_eq!(shares.first_to_go(), Some(&"b2"));
        shares.remove(&b, 2, "b2");
        shares.remove(&a, 1, "a1");
        assert_eq!(shares.first_to_go(), Some(&"b3"));
        shares.remove(&b, 3, "b3");
        assert_eq!(shares.first_to_go(), None);
    }
}
