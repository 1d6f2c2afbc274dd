//! Who holds which blocks: programs and sessions, by the tips of what they read and write.
//!
//! ```text
//!            system prompt - tools - turn 1 - turn 2            P holds its tip and all above: held 1
//!      held        3           3     \  1        1   ^tip of P
//!                                     \ turn 1' - turn 2'       Q forked from R: both hold turn 1'
//!                                         2         1   ^tip of Q
//!                                         ^tip of R
//! ```
//! A holder has a tip wherever a call of it ended. Every tip counts once in each block of its path ([`Entry::held`]), so
//! that what falls to zero when a holder's tips are taken away is exactly what only it held. Blocks that somebody used who
//! did not say who he is are *common*: nobody's end frees them. Tips that a program outlived (its context was rewritten, or
//! it ended) are *former*: what only they lead to is *faded*, and goes first.
//!
//! Tips that a holder leaves, and those that a fork hands on, are carried block by block in steps. On their way they belong to
//! *bearers*: holders without a name. So they count where they are, and move on as all tips do when their block goes.
//!
//! *Invariants*: a block's `held` is the number of tips at and below it, those of bearers too. A common block's ancestors are
//! common, or held by a bearer that makes them so. A tip is at a block that the catalog has: when that goes, the tip moves to
//! the parent (`tips_agree_with_a_naive_model`, `steps_come_to_what_one_walk_does`).
//! *Bounds*: [`MAX_HOLDERS`] holders, [`MAX_TIPS_PER_HOLDER`] tips and as many former ones of each; a bearer has one tip at a
//! block at most. A holder or tip that makes room leaves what only it held common. Of tenants the one that has most holders
//! makes room.

mod cancelled;
mod counting;
mod descent;
mod former;
mod kin;
mod leaving;
mod paths;
mod service;
mod shares;
#[cfg(test)]
mod steps_tests;
mod table;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvtier_types::{FieldHasher, Instant, TenantId};

use crate::catalog::BlockId;
use former::Former;

pub(crate) use cancelled::Cancelled;
pub(crate) use counting::Counting;
pub(crate) use descent::Descent;
pub(crate) use kin::{Kin, Line};
pub(crate) use service::Service;
pub(crate) use shares::Shares;
pub(crate) use table::Holders;

/// Programs and sessions that are known at once.
pub const MAX_HOLDERS: usize = 65_536;
/// Tips of one holder: branches times groups times shards.
pub(crate) const MAX_TIPS_PER_HOLDER: usize = 1024;
/// Ancestors of a holder that are looked through before it becomes the parent of another.
pub(crate) const MAX_GENERATIONS: usize = 256;

/// What kind of holder it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HolderKind {
    /// A program.
    Program,
    /// A session whose requests named no program.
    Session,
}

/// Names a holder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HolderName {
    /// What it is.
    pub kind: HolderKind,
    /// The name its client gave it.
    pub id: String,
    /// Whose it is.
    pub tenant: TenantId,
}

impl HolderName {
    /// A program.
    #[must_use]
    pub fn program(tenant: &TenantId, id: &str) -> Self {
        Self { tenant: tenant.clone(), kind: HolderKind::Program, id: id.to_owned() }
    }

    /// A session.
    #[must_use]
    pub fn session(tenant: &TenantId, id: &str) -> Self {
        Self { tenant: tenant.clone(), kind: HolderKind::Session, id: id.to_owned() }
    }

    /// A number for it, never zero. Clients choose names: nobody may find one with another tenant's number.
    #[must_use]
    pub fn number(&self) -> u64 {
        let mut hasher = FieldHasher::new("kvtier holder");
        hasher.number((self.kind == HolderKind::Session).into()).text(self.tenant.as_str()).text(&self.id);
        let digest = hasher.finish();
        let (head, _) = digest.split_first_chunk::<8>().expect("a digest has 32 bytes");
        u64::from_le_bytes(*head) | 1
    }
}

/// What a holder does, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HolderState {
    /// It calls, or may any moment.
    #[default]
    Active,
    /// It waits for a tool, or for a person.
    Waiting {
        /// When it said it would be back.
        until: Option<Instant>,
    },
    /// It ended: what only it held goes first, or is gone.
    Ended,
}

/// Number of a holder in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HolderId(u32);

impl HolderId {
    /// Bears tips up whose holder outlived them: what nobody holds behind them is faded.
    pub(crate) const FADING: Self = Self(0);
    /// Bears tips up that made room: what nobody holds behind them is common.
    pub(crate) const YIELDING: Self = Self(1);
    /// Bears those of them up that left something common behind: all above is common too.
    pub(crate) const MARKING: Self = Self(2);
    /// Bears tips down that a fork hands on.
    pub(crate) const COMING: Self = Self(3);
    /// How many bearers there are: the first numbers are theirs.
    const BEARERS: u32 = 4;

    const fn is_bearer(self) -> bool {
        self.0 < Self::BEARERS
    }
}

/// Tips at one block: more than one where blocks between them went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tip {
    count: u32,
    touched: u64,
}

/// A program or session.
#[derive(Debug)]
pub(crate) struct Holder {
    pub(crate) name: HolderName,
    pub(crate) parent: Option<HolderName>,
    pub(crate) children: BTreeSet<HolderName>,
    pub(crate) state: HolderState,
    pub(crate) seen: Instant,
    /// When it, or who forked it, called an engine of this node last: copies of its blocks come without it, too.
    pub(crate) called: Option<Instant>,
    /// What it holds, counted in the blocks.
    pub(crate) tips: BTreeMap<BlockId, Tip>,
    /// What it held.
    pub(crate) former: Former,
    /// Where its latest call ended, one of each group and shard of each layout. Not counted.
    pub(crate) context: BTreeSet<BlockId>,
    /// Its context was rewritten: tips older than its next call are former.
    pub(crate) rewritten: bool,
    /// It forked, or was forked, and did not call since.
    pub(crate) awaited: bool,
    /// What engines took for it, and whether it waits for one.
    pub(crate) service: Service,
    /// How often it left tips behind, or moved them up.
    pub(crate) left: u64,
    /// What it says that it is for.
    pub(crate) role: String,
    /// Whether its parent waits for its end, as it says.
    pub(crate) blocks_parent: Option<bool>,
    touched: u64,
}

impl Holder {
    fn new(name: HolderName, now: Instant, touched: u64) -> Self {
        Self {
            name,
            parent: None,
            children: BTreeSet::new(),
            state: HolderState::default(),
            seen: now,
            called: None,
            tips: BTreeMap::new(),
            former: Former::default(),
            context: BTreeSet::new(),
            rewritten: false,
            awaited: false,
            service: Service::default(),
            left: 0,
            role: String::new(),
            blocks_parent: None,
            touched,
        }
    }

    /// How long it has been silent.
    pub(crate) fn idle(&self, now: Instant) -> Duration {
        now.since(self.seen)
    }

    /// Whether it was heard of after a touch.
    pub(crate) const fn was_heard_since(&self, touched: u64) -> bool {
        self.touched > touched
    }

    fn is_at(&self, id: BlockId) -> bool {
        self.tips.contains_key(&id) || self.former.contains(id) || self.context.contains(&id)
    }
}
