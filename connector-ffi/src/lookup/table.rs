//! The state machine of lookups: pure, told the time and the epoch.
//!
//! ```text
//! begin -> Pending -> answer -> Answered -> release
//!             \-> deadline, lost attachment, dropped -> Zero -> release
//! ```
//!
//! # Invariants
//! - A lookup that was answered with zero stays zero: the engine has acted on it.
//! - Every lookup the daemon was asked is released once: by its release if its call has ended by then, else when the
//!   call ends, so that a lease taken late is not forgotten (`a_release_waits_for_the_call_to_end`).
//!
//! # Bounds
//! `capacity` entries, [`CALLS_PER_ENTRY`] times as many calls.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::answer::Answer;
use crate::error::Error;

/// Calls may outlive their entry by a timeout; more of them than this per entry means the daemon is stuck.
const CALLS_PER_ENTRY: usize = 4;

/// How a request's tokens are settled when it is released.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settlement {
    /// Tokens the engine held itself.
    pub local_tokens: u32,
    /// Tokens of the looked-up prefix that it took.
    pub claimed_tokens: u32,
    /// Of those, tokens whose load failed.
    pub lost_tokens: u32,
}

/// What is known of a lookup.
#[derive(Debug, Clone)]
pub enum Poll {
    /// No such lookup.
    Unknown,
    /// Neither answered nor late yet.
    Pending,
    /// It has nothing to offer.
    Zero,
    /// Answered.
    Answered(Arc<Answer>),
}

/// Why a lookup has just turned to zero, for the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Voided {
    /// Its deadline passed.
    Expired {
        /// Whether the daemon has not answered since, either.
        is_owed: bool,
    },
    /// Its attachment is gone.
    Detached,
}

/// What to tell the daemon upon a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// The lookup is unknown.
    Unknown,
    /// Nothing: the daemon was never asked, or will be told when the call ends.
    Nothing,
    /// The release, now, in this epoch.
    Now(u64),
}

#[derive(Debug)]
struct Entry {
    serial: u64,
    /// Epoch in which the daemon was asked; `None` if it was not.
    epoch: Option<u64>,
    deadline: Instant,
    state: State,
}

#[derive(Debug)]
enum State {
    Pending,
    Zero,
    Answered(Arc<Answer>),
}

#[derive(Debug)]
struct Call {
    request_id: String,
    release: Option<Settlement>,
}

/// All lookups of a session.
#[derive(Debug)]
pub struct Table {
    entries: HashMap<String, Entry>,
    calls: HashMap<u64, Call>,
    capacity: usize,
    serial: u64,
}

impl Table {
    /// A table of at most `capacity` lookups.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { entries: HashMap::new(), calls: HashMap::new(), capacity, serial: 0 }
    }

    /// Begins a lookup, in place of an earlier one of the same name, and names its call. `epoch` is `None` when there
    /// is nobody to ask: such a lookup is zero from the start.
    ///
    /// # Errors
    /// [`Error::Limit`].
    pub fn begin(&mut self, request_id: &str, epoch: Option<u64>, deadline: Instant) -> Result<u64, Error> {
        if self.entries.len() >= self.capacity && !self.entries.contains_key(request_id) {
            return Err(Error::Limit("lookups"));
        }
        self.serial += 1;
        let serial = self.serial;
        if epoch.is_some() {
            if self.calls.len() >= self.capacity.saturating_mul(CALLS_PER_ENTRY) {
                return Err(Error::Limit("lookup calls"));
            }
            self.calls.insert(serial, Call { request_id: request_id.to_owned(), release: None });
        }
        let state = if epoch.is_some() { State::Pending } else { State::Zero };
        self.entries.insert(request_id.to_owned(), Entry { serial, epoch, deadline, state });
        Ok(serial)
    }

    /// The call `serial` ended, with an answer or without. Answers the settlement to tell the daemon now, if nobody
    /// else will, and whether the answer came in time for somebody.
    pub fn end(&mut self, serial: u64, answer: Option<Answer>, now: Instant) -> (Option<Settlement>, bool) {
        let Some(call) = self.calls.remove(&serial) else { return (None, false) };
        let Some(entry) = self.entries.get_mut(&call.request_id) else {
            return (Some(call.release.unwrap_or_default()), false);
        };
        if entry.serial != serial {
            return (call.release, false);
        }
        let pending = matches!(entry.state, State::Pending);
        match answer {
            Some(answer) if pending && now < entry.deadline => {
                entry.state = State::Answered(Arc::new(answer));
                (None, true)
            }
            // A late answer is left to `poll` to count.
            Some(_) => (None, false),
            None => {
                entry.state = State::Zero;
                (None, false)
            }
        }
    }

    /// What is known of a lookup, and whether it has just turned to zero.
    pub fn poll(&mut self, request_id: &str, current: Option<u64>, now: Instant) -> (Poll, Option<Voided>) {
        let Some(entry) = self.entries.get_mut(request_id) else { return (Poll::Unknown, None) };
        let voided = match entry.state {
            State::Zero => return (Poll::Zero, None),
            _ if entry.epoch != current => Voided::Detached,
            State::Answered(ref answer) => return (Poll::Answered(Arc::clone(answer)), None),
            State::Pending if now < entry.deadline => return (Poll::Pending, None),
            State::Pending => Voided::Expired { is_owed: self.calls.contains_key(&entry.serial) },
        };
        entry.state = State::Zero;
        (Poll::Zero, Some(voided))
    }

    /// The request is over.
    pub fn release(&mut self, request_id: &str, settlement: Settlement) -> Release {
        let Some(entry) = self.entries.remove(request_id) else { return Release::Unknown };
        let Some(epoch) = entry.epoch else { return Release::Nothing };
        match self.calls.get_mut(&entry.serial) {
            Some(call) => {
                call.release = Some(settlement);
                Release::Nothing
            }
            None => Release::Now(epoch),
        }
    }

    /// Turns every lookup to zero; they still wait for their release. Answers how many changed.
    pub fn void_all(&mut self) -> usize {
        let mut changed = 0;
        for entry in self.entries.values_mut().filter(|e| !matches!(e.state, State::Zero)) {
            entry.state = State::Zero;
            changed += 1;
        }
        changed
    }
}

#[cfg(test)]
mod tests;
