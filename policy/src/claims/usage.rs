//! Bytes charged to the node and to each owner, by tier.

use std::collections::BTreeMap;

use kvtier_types::{ClaimName, TenantId, Tier};

use super::Sums;

/// Charges so far. Owners are numbered while they have claims.
#[derive(Debug, Default)]
pub(super) struct Usage {
    pub(super) node: Sums,
    owners: Vec<Owner>,
    numbers: BTreeMap<(TenantId, String), u32>,
    free: Vec<u32>,
}

#[derive(Debug, Default, Clone)]
struct Owner {
    bytes: Sums,
    claims: usize,
}

impl Usage {
    /// The number of a claim's owner, if it has claims.
    pub(super) fn owner_of(&self, name: &ClaimName) -> Option<u32> {
        self.numbers.get(&(name.tenant.clone(), name.owner.clone())).copied()
    }

    /// The number of a claim's owner, with one more claim.
    pub(super) fn acquire(&mut self, name: &ClaimName) -> u32 {
        let number = self.owner_of(name).unwrap_or_else(|| {
            let number = self.free.pop().unwrap_or_else(|| {
                self.owners.push(Owner::default());
                u32::try_from(self.owners.len() - 1).expect("claims are bounded, and so are owners")
            });
            self.numbers.insert((name.tenant.clone(), name.owner.clone()), number);
            number
        });
        self.owners[number as usize].claims += 1;
        number
    }

    /// One claim of an owner less.
    pub(super) fn release(&mut self, number: u32, name: &ClaimName) {
        let owner = &mut self.owners[number as usize];
        owner.claims -= 1;
        if owner.claims == 0 {
            assert_eq!(owner.bytes, [0; Tier::ALL.len()], "an owner without claims holds nothing");
            self.numbers.remove(&(name.tenant.clone(), name.owner.clone()));
            self.free.push(number);
        }
    }

    pub(super) fn of_owner(&self, number: u32) -> Sums {
        self.owners[number as usize].bytes
    }

    /// Charges the node, the owner, or both.
    pub(super) fn add(&mut self, tier: Tier, owner: u32, (node, own): (bool, bool), bytes: u64) {
        if node {
            self.node[tier.index()] += bytes;
        }
        if own {
            self.owners[owner as usize].bytes[tier.index()] += bytes;
        }
    }

    pub(super) fn set(&mut self, owner: u32, node: Sums, own: Sums) {
        self.node = node;
        self.owners[owner as usize].bytes = own;
    }
}
