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

/// A program that was not heard of for so long is not counted as under way.
const SILENCE: Duration = Duration::from_secs(600);

/// Programs about to call, of those looked at.
#[derive(Debug, Clone, Default)]
pub struct Due {
    /// They.
    pub turns: Vec<ProgramTurn>,
    /// How many of those looked at, of any tenant, are under way: being served, or waiting for a tool.
    pub under_way: u32,
    /// After which program to go on, if there are more.
    pub next: Option<HolderName>,
}

impl Core {
    /// Tells watchers of a turn that begins: of a step, by the program that declared it and its id, or of a program that
    /// declared nothing.
    pub fn turn_began(&mut self, program: &HolderName, reason: &'static str, step: Option<(String, String)>) {
        self.catalog.events.turn_began(program, reason, step.map(Box::new));
    }

    /// How many programs should be under way at most while so many are.
    pub fn advise(&mut self, under_way: u32) -> u32 {
        self.admission.advise(under_way)
    }

    /// What a program is to whoever schedules it.
    #[must_use]
    pub fn program_turn(&self, name: &HolderName) -> Option<ProgramTurn> {
        self.catalog.holders.find(name).map(|id| turn(self.catalog.holders.get(id)))
    }

    /// Programs that said they are about to call, or when, after a name: of one tenant, or of all. Looks at
    /// [`MAX_TOUCHES_PER_CALL`] programs at most, and says after which to go on if there are more.
    #[must_use]
    pub fn programs_due(&self, now: Instant, after: Option<&HolderName>, tenant: Option<&TenantId>) -> Due {
        let (mut due, mut last) = (Due::default(), None);
        for (count, holder) in self.catalog.holders.after(after).enumerate() {
            // Sessions come after all programs.
            if holder.name.kind == HolderKind::Session {
                return due;
            }
            if count == MAX_TOUCHES_PER_CALL {
                due.next = last;
                return due;
            }
            last = Some(holder.name.clone());
            let goes_on = holder.service.is_served() || matches!(holder.state, HolderState::Waiting { .. });
            due.under_way += u32::from(goes_on && holder.state != HolderState::Ended && holder.idle(now) < SILENCE);
            if tenant.is_none_or(|t| *t == holder.name.tenant) {
                due.turns.extend(
                    Some(turn(holder)).filter(|turn| (turn.waits.is_some() || turn.returns.is_some()) && !turn.ended),
                );
            }
        }
        due
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
