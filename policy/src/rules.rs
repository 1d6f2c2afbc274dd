//! The rules in force, and what they say of blocks: worked out once for all blocks of one scope, type and taints.

use kvtier_types::rules::{Lifecycle, RuleSet, Subject};
use rustc_hash::FxHashMap;

use crate::catalog::{BlockId, Catalog};
use crate::entry::Entry;

/// Most answers remembered; beyond, they are worked out anew.
const MAX_MEMO: usize = 4096;

/// What the rules say of blocks of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Life {
    pub(crate) lifecycle: Lifecycle,
    /// The first rule that decided anything; empty when none did.
    pub(crate) rule: String,
}

/// Which blocks have one answer: stamps of scope and taints, which no later value shares, and the type.
type Kind = (u64, u8, u64);

/// The rules in force.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    set: RuleSet,
    /// Numbers of lives; each counts as a user, so that it stays.
    memo: FxHashMap<Kind, u32>,
}

impl Rules {
    pub(crate) const fn set(&self) -> &RuleSet {
        &self.set
    }

    /// Puts other rules in force.
    pub(crate) fn replace(&mut self, catalog: &mut Catalog, set: RuleSet) {
        self.forget(catalog);
        self.set = set;
    }

    /// Drops what was remembered.
    pub(crate) fn forget(&mut self, catalog: &mut Catalog) {
        for (_, life) in self.memo.drain() {
            catalog.lives.release(life);
        }
    }

    /// The number of an entry's life, with one more user.
    pub(crate) fn life(&mut self, catalog: &mut Catalog, id: BlockId) -> u32 {
        if self.set.rules().is_empty() {
            return 0;
        }
        let entry = catalog.get(id);
        let kind = (catalog.scopes.stamp(entry.scope), entry.semantic as u8, catalog.taints.stamp(entry.taints));
        if let Some(&life) = self.memo.get(&kind) {
            return catalog.lives.share(life);
        }
        let subject = subject(catalog, entry);
        let rule = self.set.first(&subject).map(|r| r.name.clone()).unwrap_or_default();
        let life = Life { lifecycle: self.set.lifecycle(&subject), rule };
        if self.memo.len() >= MAX_MEMO {
            self.forget(catalog);
        }
        let life = catalog.lives.acquire(&life);
        self.memo.insert(kind, life);
        catalog.lives.share(life)
    }
}

/// An entry as rules see it.
pub(crate) fn subject<'a>(catalog: &'a Catalog, entry: &Entry) -> Subject<'a> {
    let scope = catalog.scopes.get(entry.scope);
    Subject {
        semantic: entry.semantic,
        taints: catalog.taints.get(entry.taints),
        model: &scope.model,
        tenant: scope.tenant.as_str(),
    }
}
