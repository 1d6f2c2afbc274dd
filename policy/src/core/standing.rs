//! What claims, taints and rules together mean for one block: which of its copies stay, and its place in the order.

use kvtier_types::rules::{EvictOrder, Lifecycle, OffloadRule};
use kvtier_types::{Effect, Taint, Tier};

use super::Core;
use crate::catalog::BlockId;
use crate::entry::{Entry, Flags, Kept};
use crate::events::EventKind;
use crate::evict::Standing;

impl Core {
    /// Takes in what is said of a block now. To be called after anything that is said of it changed, and after it got a
    /// copy. Whoever claims a block outranks what it is marked with.
    pub(super) fn restand(&mut self, id: BlockId) {
        let (kept, claimed) = self.said_by_claims(id);
        let entry = self.catalog.get(id);
        let (stays, clipped) = self.kept_by_marks(entry);
        let said = self.standing_by_marks(entry);
        let standing = match (claimed, said) {
            (None, said) => said,
            (Some(priority), Standing::Retained(by_rule)) => Standing::Retained(priority.max(by_rule)),
            (Some(priority), _) => Standing::Retained(priority),
        };
        self.counts.clipped_keeps += u64::from(clipped);
        let is_claimed = kept != Kept::default() || claimed.is_some();
        let was_claimed = entry.flags.has(Flags::CLAIMED);
        let changed = (entry.kept, entry.stays, entry.standing, was_claimed) != (kept, stays, standing, is_claimed);
        let change = |e: &mut Entry| {
            (e.kept, e.stays, e.standing) = (kept, stays, standing);
            e.flags.set(Flags::CLAIMED, is_claimed);
        };
        if changed && !self.catalog.update(id, change) {
            return;
        }
        match (was_claimed, is_claimed) {
            (false, true) => self.catalog.note_event(id, EventKind::Claimed, None),
            (true, false) => self.catalog.note_event(id, EventKind::Released, None),
            _ => {}
        }
        self.uphold(id);
    }

    /// As [`Self::restand`], for an entry that got a copy, and may be gone: then, or because of where the copy lies.
    pub(super) fn restand_copy(&mut self, id: BlockId) {
        if self.catalog.try_get(id).is_some_and(|e| e.taints != 0 || e.life != 0) {
            self.restand(id);
            self.confine(id);
        }
    }

    /// Copies that taints and rules keep in place, as far as the budgets of claims reach; whether some did not fit.
    fn kept_by_marks(&self, entry: &Entry) -> (Kept, bool) {
        let lifecycle = self.lifecycle(entry);
        let wanted = self.is_marked_to_stay(entry) || lifecycle.offload == OffloadRule::Never || lifecycle.pin;
        if !wanted {
            return (Kept::default(), false);
        }
        let here = |tier: Tier| matches!(tier, Tier::Host | Tier::Disk) && entry.resident(tier);
        let stays = Kept::of(|t| here(t) && (entry.stays.has(t) || self.marks_have_room(entry, t)));
        (stays, Tier::ALL.into_iter().any(|t| here(t) && !stays.has(t)))
    }

    /// Whether a taint keeps its copies where they are.
    pub(super) fn is_marked_to_stay(&self, entry: &Entry) -> bool {
        self.taints(entry).iter().any(|t| matches!(t.effect, Effect::NoOffload | Effect::NoEvict))
    }

    /// Whether budgets let a mark keep a copy: what taints and rules keep of a tenant's blocks is charged as one owner's
    /// claims are, and to the node as all claims are.
    fn marks_have_room(&self, entry: &Entry, tier: Tier) -> bool {
        let budget = self.config.claims.budgets[tier.index()];
        let census = self.catalog.census();
        let tenant = &self.catalog.scopes.get(entry.scope).tenant;
        let bytes = self.frames.class(u64::from(entry.bytes));
        let node = self.claims.node_bytes()[tier.index()] + census.kept(tier).bytes + bytes;
        node <= budget.node_bytes && census.kept_of(tenant, tier) + bytes <= budget.owner_bytes
    }

    fn standing_by_marks(&self, entry: &Entry) -> Standing {
        let lifecycle = self.lifecycle(entry);
        if lifecycle.evict == EvictOrder::First || self.taints(entry).iter().any(|t| t.effect == Effect::PreferEvict) {
            return Standing::First;
        }
        // What an operator's rule keeps outlives the program that used it last.
        let unsaid = if entry.flags.has(Flags::FADED) { Standing::First } else { Standing::Normal };
        lifecycle.priority.map_or(unsaid, Standing::Retained)
    }

    pub(super) fn taints(&self, entry: &Entry) -> &[Taint] {
        self.catalog.taints.get(entry.taints)
    }

    /// What the rules say of it.
    pub(super) fn lifecycle(&self, entry: &Entry) -> &Lifecycle {
        &self.catalog.lives.get(entry.life).lifecycle
    }
}
