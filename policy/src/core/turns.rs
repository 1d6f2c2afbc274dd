//! Programs as whoever schedules them sees them: what they had of engines, and which are about to call.

use std::time::Duration;

use kvtier_types::{Instant, TenantId};

use super::Core;
use crate::holders::{Holder, HolderKind, HolderName, HolderState};
use crate::limits::MAX_TOUCHES_PER_CALL;

/// What a program is to whoever schedules it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramTurn {
    /// Its name.
    pub name: HolderName,
    /// What engines took for it so far, as far as this node sees it.
    pub attained: Duration,
    /// Since when it said that it is about to call, and did not.
    pub waits: Option<Instant>,
    /// When it said that it is back from a tool.
    pub returns: Option<Instant>,
    /// Whether it ended.
    pub ended: bool,
}

impl Core {
    /// What a program is to whoever schedules it.
    #[must_use]
    pub fn program_turn(&self, name: &HolderName) -> Option<ProgramTurn> {
        self.catalog.holders.find(name).map(|id| turn(self.catalog.holders.get(id)))
    }

    /// Programs that said they are about to call, or when, after a name: of one tenant, or of all. Looks at
    /// [`MAX_TOUCHES_PER_CALL`] programs at most, and says after which to go on if there are more.
    #[must_use]
    pub fn programs_due(
        &self,
        after: Option<&HolderName>,
        tenant: Option<&TenantId>,
    ) -> (Vec<ProgramTurn>, Option<HolderName>) {
        let (mut due, mut last) = (Vec::new(), None);
        for (count, holder) in self.catalog.holders.after(after).enumerate() {
            // Sessions come after all programs.
            if holder.name.kind == HolderKind::Session {
                return (due, None);
            }
            if count == MAX_TOUCHES_PER_CALL {
                return (due, last);
            }
            last = Some(holder.name.clone());
            if tenant.is_none_or(|t| *t == holder.name.tenant) {
                due.extend(
                    Some(turn(holder)).filter(|turn| (turn.waits.is_some() || turn.returns.is_some()) && !turn.ended),
                );
            }
        }
        (due, None)
    }
}

fn turn(holder: &Holder) -> ProgramTurn {
    let returns = if let HolderState::Waiting { until } = holder.state { until } else { None };
    ProgramTurn {
        name: holder.name.clone(),
        attained: holder.service.attained(),
        waits: holder.service.waits(),
        returns,
        ended: holder.state == HolderState::Ended,
    }
}
