//! How many copies of each semantic type lie in each tier, and what marks keep in place: counted as entries change, never
//! by walking them.

use std::collections::BTreeMap;

use kvtier_types::{SemanticType, TenantId, Tier};

use crate::core::TierUse;
use crate::entry::{Entry, Kept};

/// What an entry counts for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counted {
    resident: Kept,
    stays: Kept,
    semantic: SemanticType,
    bytes: u32,
    /// The room it takes, as budgets count it.
    room: u64,
    pub(crate) scope: u32,
}

impl Counted {
    pub(crate) fn of(entry: &Entry, room: u64) -> Self {
        let resident = Kept::of(|t| entry.resident(t));
        let stays = Kept::of(|t| resident.has(t) && entry.stays.has(t));
        Self { resident, stays, semantic: entry.semantic, bytes: entry.bytes, room, scope: entry.scope }
    }
}

/// The counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Census {
    types: [[TierUse; Tier::ALL.len()]; SemanticType::ALL.len()],
    /// Copies that taints and rules keep from making room.
    kept: [TierUse; Tier::ALL.len()],
    /// Bytes of those, by whose blocks they are; tenants without any are left out.
    of_tenants: BTreeMap<TenantId, [u64; Tier::ALL.len()]>,
}

impl Census {
    /// Counts an entry that changed; tenants are those of its scopes then and now.
    pub(crate) fn recount(&mut self, before: (Counted, &TenantId), after: (Counted, &TenantId)) {
        if before.0 == after.0 {
            return;
        }
        for tier in Tier::ALL {
            if before.0.resident.has(tier) {
                self.types[before.0.semantic as usize][tier.index()].take(u64::from(before.0.bytes));
            }
            if after.0.resident.has(tier) {
                self.types[after.0.semantic as usize][tier.index()].add(u64::from(after.0.bytes));
            }
            if before.0.stays.has(tier) {
                self.keep_no_more(tier, before.0.room, before.1);
            }
            if after.0.stays.has(tier) {
                self.kept[tier.index()].add(after.0.room);
                self.of_tenants.entry(after.1.clone()).or_default()[tier.index()] += after.0.room;
            }
        }
    }

    fn keep_no_more(&mut self, tier: Tier, room: u64, tenant: &TenantId) {
        self.kept[tier.index()].take(room);
        let Some(bytes) = self.of_tenants.get_mut(tenant) else { return };
        bytes[tier.index()] -= room;
        if bytes.iter().all(|b| *b == 0) {
            self.of_tenants.remove(tenant);
        }
    }

    /// Copies of a type in a tier.
    pub(crate) const fn of(&self, semantic: SemanticType, tier: Tier) -> TierUse {
        self.types[semantic as usize][tier.index()]
    }

    /// Copies in a tier that taints and rules keep from making room, with the room they take.
    pub(crate) const fn kept(&self, tier: Tier) -> TierUse {
        self.kept[tier.index()]
    }

    /// Of those, the bytes of one tenant's.
    pub(crate) fn kept_of(&self, tenant: &TenantId, tier: Tier) -> u64 {
        self.of_tenants.get(tenant).map_or(0, |bytes| bytes[tier.index()])
    }

    /// All copies in a tier.
    pub(crate) fn tier(&self, tier: Tier) -> TierUse {
        let sum = |mut sum: TierUse, of: TierUse| {
            sum.copies += of.copies;
            sum.bytes += of.bytes;
            sum
        };
        self.types.iter().map(|t| t[tier.index()]).fold(TierUse::default(), sum)
    }
}

impl TierUse {
    const fn add(&mut self, bytes: u64) {
        self.copies += 1;
        self.bytes += bytes;
    }

    const fn take(&mut self, bytes: u64) {
        self.copies -= 1;
        self.bytes -= bytes;
    }
}
