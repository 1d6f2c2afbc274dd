//! What happened to blocks lately, and whose turn began: two rings that watchers read from where they left off.
//!
//! Turns have a ring of their own, because programs begin as many of them as they like: they push out each other, and no
//! event of a block.
//!
//! *Bounds*: the latest [`MAX_EVENTS`] of each; a watcher that is further behind is told that events are lost to it.

use std::collections::VecDeque;

use kvtier_types::{BlockKey, SemanticType, TenantId, Tier};

use crate::holders::HolderName;

/// Events that are remembered, of blocks and of turns.
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
    blocks: Ring,
    turns: Ring,
    last: u64,
    reason: &'static str,
}

/// The latest events of some kinds, by their numbers.
#[derive(Debug, Default)]
struct Ring {
    events: VecDeque<Event>,
    /// The number of the last one that is not remembered any more.
    forgotten: u64,
}

impl Ring {
    fn push(&mut self, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            self.forgotten = self.events.pop_front().map_or(self.forgotten, |oldest| oldest.sequence);
        }
        self.events.push_back(event);
    }

    fn after(&self, sequence: u64) -> impl Iterator<Item = &Event> {
        self.events.range(self.events.partition_point(|event| event.sequence <= sequence)..)
    }
}

impl Events {
    /// Notes an event; its number is given here.
    pub(crate) fn push(&mut self, event: Event) {
        self.last += 1;
        let reason = if event.reason.is_empty() { self.reason } else { event.reason };
        let ring = if event.kind == EventKind::Turn { &mut self.turns } else { &mut self.blocks };
        ring.push(Event { sequence: self.last, reason, ..event });
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

    /// Events after a sequence, turns only if asked for, at most [`MAX_EVENTS_PAGE`], and the number of the last of them that
    /// is lost, if any is.
    pub(crate) fn after(&self, sequence: u64, with_turns: bool) -> (Vec<Event>, Option<u64>) {
        // A number that was never given out is from another life.
        let is_foreign = sequence > self.last;
        let from = if is_foreign { 0 } else { sequence };
        let turns = with_turns.then_some(&self.turns);
        let forgotten = self.blocks.forgotten.max(turns.map_or(0, |turns| turns.forgotten));
        let lost = if is_foreign { Some(self.last) } else { Some(forgotten).filter(|forgotten| from < *forgotten) };
        let turns = turns.into_iter().flat_map(|turns| turns.after(from).take(MAX_EVENTS_PAGE));
        let mut page: Vec<&Event> = self.blocks.after(from).take(MAX_EVENTS_PAGE).chain(turns).collect();
        // Two runs that are in order.
        page.sort_by_key(|event| event.sequence);
        (page.into_iter().take(MAX_EVENTS_PAGE).cloned().collect(), lost)
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
        assert_eq!(events.after(0, true), (Vec::new(), None));
        for n in 0..3 {
            events.program_ended(&name(&format!("p{n}")), "completed");
        }
        let (seen, lost) = events.after(1, true);
        assert_eq!((seen.iter().map(|e| e.sequence).collect::<Vec<_>>(), lost), (vec![2, 3], None));
        assert_eq!(events.after(3, true), (Vec::new(), None));
        let (all, lost) = events.after(99, true);
        assert_eq!((all.len(), lost), (3, Some(3)), "a number of another life");
        for _ in 0..MAX_EVENTS {
            events.program_ended(&name("p"), "completed");
        }
        assert_eq!(events.after(2, true).1, Some(3));
        let (page, lost) = events.after(3, true);
        assert_eq!((page.len(), page[0].sequence, lost), (MAX_EVENTS_PAGE, 4, None));
    }

    #[test]
    fn turns_push_out_turns_and_no_events_of_blocks() {
        let mut events = Events::default();
        events.program_ended(&name("p"), "completed");
        for _ in 0..=MAX_EVENTS {
            events.turn_began(&name("busy"), "ready", None);
        }
        events.program_ended(&name("q"), "completed");
        let of = |(page, lost): (Vec<Event>, Option<u64>)| (page.iter().map(|e| e.sequence).collect::<Vec<_>>(), lost);
        let last = events.last();
        assert_eq!(of(events.after(0, false)), (vec![1, last], None));
        let (page, lost) = of(events.after(0, true));
        assert_eq!((page.len(), &page[..3], lost), (MAX_EVENTS_PAGE, &[1, 3, 4][..], Some(2)));
        assert_eq!(of(events.after(last - 2, true)), (vec![last - 1, last], None), "in order");
        assert_eq!(of(events.after(last, true)), (vec![], None));
    }

    #[test]
    fn a_reason_holds_until_it_is_taken_back() {
        let mut events = Events::default();
        let former = events.because("evicted");
        events.program_ended(&name("p"), "");
        events.because(former);
        events.program_ended(&name("p"), "");
        let reasons: Vec<&str> = events.after(0, true).0.iter().map(|e| e.reason).collect();
        assert_eq!(reasons, ["evicted", ""]);
    }
}
