//! What became of one action of a client's hints, or of one carrier.

use crate::Outcome;

/// Longest reason or foreign name that is told back, in bytes.
const MAX_TEXT_BYTES: usize = 160;

/// Names under which hints are counted: the actions that are known, the carriers beside the envelope, and the rest.
pub const KINDS: [&str; 18] = [
    "kv.retain",
    "kv.fetch",
    "kvtier.annotate",
    "kvtier.taint",
    "kvtier.pin",
    "kvtier.signal",
    "kv_hints",
    "agentic_context",
    "kvtier",
    "session_id",
    "kv_transfer_params",
    "prompt_cache_retention",
    "prompt_cache_options",
    "cache_control",
    "agent_hints",
    "lmcache_retention_ttl_sec",
    "token_range_retention",
    "unknown",
];

/// Parts of it that were taken and dropped, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// As the client named it; empty for carriers without ids.
    pub action_id: String,
    /// As the client named it, cut.
    pub action_type: String,
    /// One of [`KINDS`].
    pub kind: &'static str,
    kept: u32,
    dropped: u32,
    reason: String,
    settled: Option<Outcome>,
}

impl Note {
    /// Of an action of which nothing was read yet.
    #[must_use]
    pub fn new(action_id: &str, action_type: &str) -> Self {
        let kind = KINDS.into_iter().find(|kind| *kind == action_type).unwrap_or("unknown");
        Self {
            action_id: cut(action_id),
            action_type: cut(action_type),
            kind,
            kept: 0,
            dropped: 0,
            reason: String::new(),
            settled: None,
        }
    }

    /// A part was taken.
    pub fn keep(&mut self) {
        self.kept += 1;
    }

    /// A part was dropped; the first reason is told.
    pub fn refuse(&mut self, reason: &str) {
        self.dropped += 1;
        if self.reason.is_empty() {
            self.reason = cut(reason);
        }
    }

    /// A part that had been taken is dropped after all.
    pub fn revoke(&mut self, reason: &str) {
        self.kept = self.kept.saturating_sub(1);
        self.refuse(reason);
    }

    /// A part was taken in a smaller measure.
    pub fn clip(&mut self, reason: &str) {
        self.kept += 1;
        self.refuse(reason);
    }

    /// What became of it as a whole, whatever its parts.
    pub fn settle(&mut self, outcome: Outcome, reason: &str) {
        self.settled = Some(outcome);
        self.reason = cut(reason);
    }

    /// Whether it says nothing: a carrier with nothing for us.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.kept == 0 && self.dropped == 0 && self.settled.is_none()
    }

    /// What became of it.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.settled.unwrap_or(match (self.kept, self.dropped) {
            (_, 0) => Outcome::Applied,
            (0, _) => Outcome::Rejected,
            _ => Outcome::Clipped,
        })
    }

    /// Why it was not simply taken.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

fn cut(text: &str) -> String {
    let end = (0..=text.len().min(MAX_TEXT_BYTES)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..end].to_owned()
}
