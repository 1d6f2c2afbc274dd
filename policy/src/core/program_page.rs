//! The programs and sessions of a node, page by page: what each holds is counted in steps.

use std::time::Duration;

use kvtier_types::{Instant, TenantId};

use super::programs::HOLDER_STEP;
use super::{Core, HolderRecord, ProgramCounts};
use crate::holders::{Counting, HolderName, HolderState};

/// Programs answered by one page of a listing.
pub const MAX_PROGRAMS_PAGE: usize = 256;
/// Blocks that one page counts; it ends after the program that goes beyond.
const MAX_PAGE_BLOCKS: u64 = 262_144;

/// A program or session as it is.
#[derive(Debug, Clone)]
pub struct ProgramView {
    /// Its name.
    pub name: HolderName,
    /// Who started it.
    pub parent: Option<HolderName>,
    /// What it does.
    pub state: HolderState,
    /// How long it has been silent.
    pub idle: Duration,
    /// Block shards that it holds here.
    pub blocks: u64,
    /// Those that nobody else does.
    pub exclusive: u64,
    /// What it says that it is for.
    pub role: String,
    /// Whether its parent waits for its end, as it says.
    pub blocks_parent: Option<bool>,
}

/// A page that is being filled.
#[derive(Debug)]
pub struct ProgramPage {
    tenant: Option<TenantId>,
    limit: usize,
    programs: Vec<ProgramView>,
    /// The last name that was looked at.
    after: Option<HolderName>,
    current: Option<(ProgramView, Counting)>,
    counted: u64,
    more: bool,
}

impl ProgramPage {
    /// Of programs and sessions after a name: of one tenant, or of all. At most [`MAX_PROGRAMS_PAGE`], and fewer where they
    /// hold much.
    #[must_use]
    pub fn new(after: Option<HolderName>, tenant: Option<TenantId>, limit: usize) -> Self {
        let limit = limit.clamp(1, MAX_PROGRAMS_PAGE);
        Self { tenant, limit, programs: Vec::new(), after, current: None, counted: 0, more: false }
    }

    /// The programs of the page, once it is filled, and whether there are more after them.
    #[must_use]
    pub fn programs(self) -> (Vec<ProgramView>, bool) {
        (self.programs, self.more)
    }

    fn is_full(&self) -> bool {
        self.programs.len() == self.limit || self.counted > MAX_PAGE_BLOCKS
    }
}

impl Core {
    /// Fills a page further. Answers whether something is left to do.
    pub fn fill_page(&self, now: Instant, page: &mut ProgramPage) -> bool {
        let left = &mut { HOLDER_STEP };
        while *left > 0 {
            if let Some((mut view, mut counting)) = page.current.take() {
                if self.catalog.count_some(&mut counting, left) {
                    page.current = Some((view, counting));
                    return true;
                }
                (view.blocks, view.exclusive) = counting.totals();
                page.counted += view.blocks;
                page.programs.push(view);
                continue;
            }
            *left -= 1;
            let Some(holder) = self.catalog.holders.after(page.after.as_ref()).next() else { return false };
            if page.tenant.as_ref().is_none_or(|tenant| holder.name.tenant == *tenant) {
                if page.is_full() {
                    page.more = true;
                    return false;
                }
                let view = ProgramView {
                    name: holder.name.clone(),
                    parent: holder.parent.clone(),
                    state: holder.state,
                    idle: holder.idle(now),
                    blocks: 0,
                    exclusive: 0,
                    role: holder.role.clone(),
                    blocks_parent: holder.blocks_parent,
                };
                let mut counting = Counting::default();
                self.catalog.count_tips(&mut counting, holder);
                *left = left.saturating_sub(holder.tips.len());
                page.current = Some((view, counting));
            }
            page.after = Some(holder.name.clone());
        }
        true
    }

    /// A whole page: see [`ProgramPage`].
    #[cfg(test)]
    pub(crate) fn programs_after(
        &self,
        now: Instant,
        (after, tenant): (Option<&HolderName>, Option<&TenantId>),
        limit: usize,
    ) -> (Vec<ProgramView>, bool) {
        let mut page = ProgramPage::new(after.cloned(), tenant.cloned(), limit);
        while self.fill_page(now, &mut page) {}
        page.programs()
    }

    /// What of a program or session outlives a restart, as it is now.
    #[must_use]
    pub fn holder_record(&self, name: &HolderName) -> Option<HolderRecord> {
        self.catalog.holders.find(name).map(|id| self.holder_as_is(id))
    }

    /// Programs and sessions known, and counts of their signals.
    #[must_use]
    pub fn program_counts(&self) -> (usize, ProgramCounts) {
        (self.catalog.holders.len(), self.program_counts)
    }
}
