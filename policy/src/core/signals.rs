//! Signals: what programs say of how they go on, taken in steps of [`HOLDER_STEP`] blocks or programs.
//!
//! The shell calls [`Core::signal_some`] until nothing is left, and gives no other signal a turn before that. In between
//! programs call, and others make room: who is gone by then is left out.

use std::time::Duration;

use kvtier_types::{Instant, Outcome};

use super::Core;
use super::forking::Forking;
use super::programs::{HOLDER_STEP, ProgramEvent};
use crate::evict::survival::StopReason;
use crate::holders::{HolderId, HolderName, HolderState, Kin, Line};

/// Children named in one signal.
pub const MAX_CHILDREN_PER_SIGNAL: usize = 1024;

/// What a program says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SignalKind {
    /// It waits for a tool.
    ToolWait,
    /// It goes on.
    Continuation,
    /// It splits into children, which start with its latest context.
    Fork,
    /// Children came together in it: what only they hold is freed.
    Join,
    /// Its context was rewritten: what its next call does not use any more goes first.
    Compaction,
    /// It ended well: what only it and its children hold goes first.
    Completion,
    /// It was abandoned: what only it and its children hold is freed.
    Cancellation,
}

/// A signal.
#[derive(Debug, Clone)]
pub struct Signal {
    /// Who.
    pub program: HolderName,
    /// Who started it, where that is known.
    pub parent: Option<HolderName>,
    /// What.
    pub kind: SignalKind,
    /// Of a fork or a join.
    pub children: Vec<HolderName>,
    /// When it is back, of one that waits for a tool.
    pub returns_in: Option<Duration>,
}

/// What a signal came to, but for what is freed.
#[derive(Debug, Clone)]
pub struct SignalAnswer {
    /// The outcome.
    pub outcome: Outcome,
    /// Why.
    pub reason: &'static str,
    /// Whose blocks are to be freed now, by [`Core::abandon_program`].
    pub abandoned: Vec<HolderName>,
}

/// A signal that is being taken in.
#[derive(Debug)]
pub struct Signaling {
    signal: Signal,
    step: Step,
    answer: SignalAnswer,
}

#[derive(Debug)]
enum Step {
    /// What others left is settled before anybody ends or forks.
    Settle,
    Begin,
    Fork(Box<Forking>),
    /// Of a join: who is above the parent is none of its children.
    Above(Line),
    /// All that are abandoned are gathered; whether the program itself is one of them.
    Gather(Kin, bool),
    /// All that end well are gathered; then they end, one after another.
    Family(Kin),
    End(std::vec::IntoIter<HolderName>, Option<HolderName>),
    Fade,
    Done,
}

impl Signaling {
    /// Of a signal.
    #[must_use]
    pub const fn new(signal: Signal) -> Self {
        let answer = SignalAnswer { outcome: Outcome::Applied, reason: "", abandoned: Vec::new() };
        Self { signal, step: Step::Settle, answer }
    }

    /// The signal.
    #[must_use]
    pub const fn signal(&self) -> &Signal {
        &self.signal
    }

    /// What it came to, once nothing is left to do.
    #[must_use]
    pub fn answer(self) -> SignalAnswer {
        self.answer
    }
}

impl Core {
    /// Takes a program's word on how it goes on. What is abandoned is still to be freed.
    pub fn signal(&mut self, now: Instant, signal: &Signal) -> SignalAnswer {
        let mut signaling = Signaling::new(signal.clone());
        while self.signal_some(now, &mut signaling) {}
        signaling.answer()
    }

    /// Goes on with a signal. Answers whether something is left to do.
    pub fn signal_some(&mut self, now: Instant, signaling: &mut Signaling) -> bool {
        self.clock = self.clock.max(now);
        let left = &mut { HOLDER_STEP };
        signaling.step = match std::mem::replace(&mut signaling.step, Step::Done) {
            Step::Settle if passes(signaling.signal.kind) => self.begin_signal(now, signaling),
            Step::Settle => {
                if self.settle_holders() {
                    Step::Settle
                } else {
                    Step::Begin
                }
            }
            Step::Begin => self.begin_signal(now, signaling),
            Step::Fork(mut forking) => {
                signaling.answer.outcome = forking.outcome();
                if self.fork_some(now, &mut forking) {
                    Step::Fork(forking)
                } else {
                    self.note_fork(now, &signaling.signal);
                    Step::Done
                }
            }
            Step::Above(mut line) => {
                if self.catalog.holders.line_some(&mut line, left) {
                    Step::Above(line)
                } else {
                    Step::Gather(self.joined(&signaling.signal.children, &line), true)
                }
            }
            Step::Gather(mut kin, whole) => {
                if self.catalog.holders.kin_some(&mut kin, left) {
                    Step::Gather(kin, whole)
                } else {
                    gathered(signaling, kin.into_members(), whole);
                    Step::Done
                }
            }
            Step::Family(mut kin) => {
                if self.catalog.holders.kin_some(&mut kin, left) {
                    Step::Family(kin)
                } else {
                    Step::End(kin.into_members().into_iter(), None)
                }
            }
            Step::End(mut members, mut current) => {
                if self.end_some(&mut members, &mut current, left) {
                    Step::End(members, current)
                } else {
                    Step::Fade
                }
            }
            Step::Fade => {
                if self.settle_holders() {
                    Step::Fade
                } else {
                    Step::Done
                }
            }
            Step::Done => Step::Done,
        };
        !matches!(signaling.step, Step::Done)
    }

    fn begin_signal(&mut self, now: Instant, signaling: &mut Signaling) -> Step {
        let Signaling { signal, answer, .. } = signaling;
        self.program_counts.signals[signal.kind as usize] += 1;
        let known = self.catalog.holders.find(&signal.program);
        if known.is_none() && matches!(signal.kind, SignalKind::Completion | SignalKind::Cancellation) {
            (answer.outcome, answer.reason) = (Outcome::Missing, "this node knows no such program");
            // What it wrote in a former life may still come up.
            if signal.kind == SignalKind::Cancellation {
                answer.abandoned.push(signal.program.clone());
            }
            return Step::Done;
        }
        let id = self.catalog.hear(now, &signal.program);
        if let Some(parent) = &signal.parent {
            let parent = self.catalog.hear(now, parent);
            // Room for another may have taken it.
            if self.catalog.holders.find(&signal.program) == Some(id) {
                self.catalog.holders.adopt(id, parent);
            }
        }
        let Some(id) = self.catalog.holders.find(&signal.program) else {
            (answer.outcome, answer.reason) = (Outcome::Rejected, "too many programs at once");
            return Step::Done;
        };
        self.take_signal(now, signaling, id)
    }

    fn take_signal(&mut self, now: Instant, Signaling { signal, answer, .. }: &mut Signaling, id: HolderId) -> Step {
        let service = &mut self.catalog.holders.get_mut(id).service;
        let took = match signal.kind {
            SignalKind::Continuation => service.wait(now),
            _ => service.end(now),
        };
        self.admission.observe(now, took, Duration::ZERO);
        match signal.kind {
            SignalKind::ToolWait => {
                let until = signal.returns_in.map(|span| now + span);
                self.catalog.holders.get_mut(id).state = HolderState::Waiting { until };
                self.call_pauses(&signal.program, StopReason::ToolUse, signal.returns_in);
                let (name, returns_in) = (signal.program.clone(), signal.returns_in);
                self.note_program(ProgramEvent::Waits { name, returns_in, at: now });
                Step::Done
            }
            SignalKind::Continuation => {
                self.note_back(now, &signal.program);
                self.catalog.holders.get_mut(id).state = HolderState::Active;
                self.note_program(ProgramEvent::GoesOn { name: signal.program.clone() });
                Step::Done
            }
            SignalKind::Fork => {
                self.call_pauses(&signal.program, StopReason::Join, signal.returns_in);
                Step::Fork(Box::new(self.begin_fork(id, &signal.children)))
            }
            SignalKind::Join if signal.children.is_empty() => Step::Gather(Kin::of([signal.program.clone()]), false),
            SignalKind::Join => Step::Above(Line::of(signal.program.clone())),
            SignalKind::Compaction => {
                self.catalog.holders.get_mut(id).rewritten = true;
                Step::Done
            }
            SignalKind::Completion => {
                if self.catalog.holders.get(id).state == HolderState::Ended {
                    answer.outcome = Outcome::Duplicate;
                }
                Step::Family(Kin::of([signal.program.clone()]))
            }
            SignalKind::Cancellation => Step::Gather(Kin::of([signal.program.clone()]), true),
        }
    }

    /// A program forked: its next call and the first of each branch are to be told of.
    fn note_fork(&mut self, at: Instant, Signal { program, children, .. }: &Signal) {
        let branches: Vec<HolderName> = children.iter().filter(|name| *name != program).cloned().collect();
        if !branches.is_empty() {
            branches.iter().chain([program]).for_each(|name| self.catalog.holders.await_call(name));
            self.note_program(ProgramEvent::Forked { name: program.clone(), branches, at });
        }
    }

    /// Those of a join's children that are known and not above it.
    fn joined(&self, children: &[HolderName], above: &Line) -> Kin {
        let named = children.iter().filter(|name| !above.has(name));
        Kin::of(named.filter(|name| self.catalog.holders.find(name).is_some()).cloned())
    }

    /// Ends some programs well. Answers whether some are left.
    fn end_some(
        &mut self,
        members: &mut std::vec::IntoIter<HolderName>,
        current: &mut Option<HolderName>,
        left: &mut usize,
    ) -> bool {
        while let Some(name) = current.take().or_else(|| members.next()) {
            let Some(id) = self.catalog.holders.find(&name) else { continue };
            if *left == 0 || self.catalog.outlive_some(id, u64::MAX, left) {
                *current = Some(name);
                return true;
            }
            *left = left.saturating_sub(1);
            let holder = self.catalog.holders.get_mut(id);
            (holder.state, holder.blocks_parent) = (HolderState::Ended, None);
            let role = holder.role.clone();
            self.catalog.holders.changed(id);
            self.calls_end(&name);
            self.note_program(ProgramEvent::Ended { name: name.clone(), role, at: self.clock });
            self.catalog.events.program_ended(&name, "completed");
        }
        false
    }
}

/// It is known who is abandoned: all of them, or all but the first.
fn gathered(Signaling { signal, answer, .. }: &mut Signaling, mut members: Vec<HolderName>, whole: bool) {
    members.drain(..usize::from(!whole));
    if signal.kind == SignalKind::Join && members.is_empty() {
        answer.outcome = Outcome::Duplicate;
    }
    answer.abandoned = members;
}

/// Whether it says only what a program does right now.
const fn passes(kind: SignalKind) -> bool {
    matches!(kind, SignalKind::ToolWait | SignalKind::Continuation | SignalKind::Compaction)
}
