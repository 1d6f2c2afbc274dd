//! Who is told of changes: watchers of what happens, and the directory of what is where.

use kvtier_types::{ShardKey, Tier};

use super::{BlockId, Catalog};
use crate::directory::Tiers;
use crate::entry::Flags;
use crate::events::{Event, EventKind};

impl Catalog {
    /// Notes for watchers what happens to an entry.
    pub(crate) fn note_event(&mut self, id: BlockId, kind: EventKind, tier: Option<Tier>) {
        let entry = self.get(id);
        let event = Event {
            sequence: 0,
            kind,
            key: Some(entry.key),
            tier,
            semantic: entry.semantic,
            program: self.programs.get(entry.program).clone(),
            tenant: self.scopes.get(entry.scope).tenant.clone(),
            model: self.scopes.get(entry.scope).model.clone(),
            reason: "",
            bytes: u64::from(entry.bytes),
            step: None,
        };
        self.events.push(event);
    }

    /// Queues an entry of which the directory was told something else than what is.
    pub(super) fn note_change(&mut self, id: BlockId) {
        let Some(publication) = &mut self.publication else { return };
        let entry = self.slab[id.0 as usize].as_mut().expect("changed entries are present");
        let tiers = entry.tiers();
        if entry.flags.has(Flags::DIRTY) {
            publication.note_departed(tiers.is_empty());
            return;
        }
        if publication.told(entry.published) == tiers {
            return;
        }
        entry.flags.set(Flags::DIRTY, true);
        publication.enqueue(id, tiers.is_empty());
    }

    /// Ends an entry's wait in the queue of publication without telling anything of it.
    pub(crate) fn shed(&mut self, id: BlockId) {
        if let Some(entry) = self.slab[id.0 as usize].as_mut() {
            entry.flags.set(Flags::DIRTY, false);
            entry.published = 0;
            self.drop_if_empty(id);
        }
    }

    /// Ends an entry's wait in the queue of publication: what to tell of it, if anything, and what was told before.
    pub(crate) fn tell(&mut self, id: BlockId) -> Option<(ShardKey, Tiers, Tiers)> {
        let publication = self.publication.as_mut()?;
        let entry = self.slab[id.0 as usize].as_mut()?;
        let (old, new) = (publication.told(entry.published), entry.tiers());
        entry.flags.set(Flags::DIRTY, false);
        entry.published = publication.tell(new);
        let key = ShardKey { block: entry.key, layout: self.layouts[usize::from(entry.layout)], shard: entry.shard };
        self.drop_if_empty(id);
        (old != new).then_some((key, old, new))
    }

    /// Whether an entry waits in the queue of publication.
    pub(crate) fn is_dirty(&self, id: BlockId) -> bool {
        self.get(id).flags.has(Flags::DIRTY)
    }
}
