//! What happened to blocks lately: a ring that watchers read from where they left off.
//!
//! *Bounds*: the latest [`MAX_EVENTS`]; a watcher that is further behind is told that events are lost to it.

use std::collections::VecDeque;

use kvtier_types::{BlockKey, SemanticType, TenantId, Tier};

use crate::holders::HolderName;

/// Events that are remembered.
pub const MAX_EVENTS: usize = 32_768;
/// Events in one answer.
pub const MAX_EVENTS_PAGE: usize = 512;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EventKind {
    /// A copy appeared in a tier.
    Stored,
    /// A copy left a tier.
    Removed,
    /// What a block is marked with changed.
    Tainted,
    /// A claim came to hold it.
    Claimed,
    /// No claim holds it any more.
    Released,
    /// A program ended, or was abandoned.
    ProgramEnded,
    /// A copy's bytes turned out to be wrong.
    Corrupt,
    /// A step may run from now on, or a program is about to call.
    Turn,
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its number within the life of the core; the first is 1.
    pub sequence: u64,
    /// What happened.
    pub kind: EventKind,
    /// To which block; none of a program's end or turn.
    pub key: Option<BlockKey>,
    /// In which tier.
    pub tier: Option<Tier>,
    /// What the block means.
    pub semantic: SemanticType,
    /// The program that wrote it, that ended, or whose turn it is.
    pub program: String,
    /// Whose block or program it is.
    pub tenant: TenantId,
    /// Of the block's namespace.
    pub model: String,
    /// Why.
    pub reason: &'static str,
    /// The block's length.
    pub bytes: u64,
    /// Of the turn of a declared step: the program that declared it, and the step's id.
    pub step: Option<Box<(String, String)>>,
}

/// The latest events.
#[derive(Debug, Default)]
pub(crate) struct Events {
    ring: VecDeque<Event>,
    last: u64,
    reason: &'static str,
}

impl Events {
    /// Notes an event; its number is given here.
    pub(crate) fn push(&mut self, event: Event) {
        self.last += 1;
        if self.ring.len() >= MAX_EVENTS {
            self.ring.pop_front();
        }
        let reason = if event.reason.is_empty() { self.reason } else { event.reason };
        self.ring.push_back(Event { sequence: self.last, reason, ..event });
    }

    /// A program ended.
    pub(crate) fn program_ended(&mut self, program: &HolderName, reason: &'static str) {
        self.of_program(EventKind::ProgramEnded, program, (reason, None));
    }

    /// A program's turn began, or that of a declared step that it runs.
    pub(crate) fn turn_began(
        &mut self,
        program: &HolderName,
        reason: &'static str,
        step: Option<Box<(String, String)>>,
    ) {
        self.of_program(EventKind::Turn, program, (reason, step));
    }

    fn of_program(
        &mut self,
        kind: EventKind,
        program: &HolderName,
        (reason, step): (&'static str, Option<Box<(String, String)>>),
    ) {
        self.push(Event {
            sequence: 0,
            kind,
            key: None,
            tier: None,
            semantic: SemanticType::Unspecified,
            program: program.id.clone(),
            tenant: program.tenant.clone(),
            model: String::new(),
            reason,
            bytes: 0,
            step,
        });
    }

    /// Whether what happens now makes room.
    pub(crate) fn is_eviction(&self) -> bool {
        self.reason == "evicted"
    }

    /// Why what follows happens. Answers with the former reason, to be set again.
    pub(crate) const fn because(&mut self, reason: &'static str) -> &'static str {
        std::mem::replace(&mut self.reason, reason)
    }

    pub(crate) const fn last(&self) -> u64 {
        self.last
    }

    /// Events after a sequence, at most [`MAX_EVENTS_PAGE`], and whether some before them are lost.
    pub(crate) fn after(&self, sequence: u64) -> (Vec<Event>, bool) {
        let first = self.last + 1 - self.ring.len() as u64;
        // A number that was never given out is from another life.
        let lost = sequence + 1 < first || sequence > self.last;
        let skip = usize::try_from((sequence + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        let from = if sequence > self.last { 0 } else { skip };
        (self.ring.iter().skip(from).take(MAX_EVENTS_PAGE).cloned().collect(), lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(id: &str) -> HolderName {
        HolderName::program(&TenantId::shared(), id)
    }

    #[test]
    fn a_watcher_goes_on_where_it_was_and_is_told_of_gaps() {
        let mut events = Events::default();
        assert_eq!(events.after(0), (Vec::new(), false));
        for n in 0..3 {
            events.program_ended(&name(&format!("p{n}")), "completed");
        }
        let (seen, lost) = events.after(1);
        assert_eq!((seen.iter().map(|e| e.sequence).collect::<Vec<_>>(), lost), (vec![2, 3], false));
        assert_eq!(events.after(3), (Vec::new(), false));
        let (all, lost) = events.after(99);
        assert_eq!((all.len(), lost), (3, true), "a number of another life");
        for _ in 0..MAX_EVENTS {
            events.program_ended(&name("p"), "completed");
        }
        assert!(events.after(2).1);
        let (page, lost) = events.after(3);
        assert_eq!((page.len(), page[0].sequence, lost), (MAX_EVENTS_PAGE, 4, false));
    }

    #[test]
    fn a_reason_holds_until_it_is_taken_back() {
        let mut events = Events::default();
        let former = events.because("evicted");
        events.program_ended(&name("p"), "");
        events.because(former);
        events.program_ended(&name("p"), "");
        let reasons: Vec<&str> = events.after(0).0.iter().map(|e| e.reason).collect();
        assert_eq!(reasons, ["evicted", ""]);
    }
}
