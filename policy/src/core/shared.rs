//! Prefixes that many calls share, and the way up from their last block.

use kvtier_types::{BlockKey, Instant, SemanticType, TenantId};

use super::Core;

impl Core {
    /// Prefixes that many calls share, by the key of their last block, the most used first, with uses per second.
    #[must_use]
    pub fn hottest(&self, now: Instant, most: usize) -> Vec<(BlockKey, f64)> {
        self.hot.hottest(now).take(most).collect()
    }

    /// What a block means, and whether it is of a tenant or of all. `None` where nothing of it is here.
    #[must_use]
    pub fn meaning_of(&self, key: &BlockKey, tenant: &TenantId) -> Option<(SemanticType, bool)> {
        let entry = self.catalog.get(*self.catalog.find_all(key).first()?);
        let owner = &self.catalog.scopes.get(entry.scope).tenant;
        Some((entry.semantic, owner == tenant || *owner == TenantId::shared()))
    }

    /// The block before this one in the prefix, and the bytes of this one's shards. `None` where nothing of it is here, or it may
    /// not go to other nodes.
    #[must_use]
    pub fn step_up(&self, key: &BlockKey) -> Option<(Option<BlockKey>, u64)> {
        let shards = self.catalog.find_all(key);
        let entry = self.catalog.get(*shards.first()?);
        if !shards.iter().all(|id| self.may_leave(self.catalog.get(*id))) {
            return None;
        }
        let bytes = shards.iter().map(|id| u64::from(self.catalog.get(*id).bytes)).sum();
        Some((entry.parent.map(|parent| self.catalog.get(parent).key), bytes))
    }
}
