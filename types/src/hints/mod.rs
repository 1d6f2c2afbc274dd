//! Hints that clients give with requests, or ahead of them: read from JSON, bounded, never trusted here.
//!
//! ```text
//! carriers    kv_hints envelope > vllm_xargs > session id > (what ApplyHints left) > kv_transfer_params
//!             each is read into one `Said`; an earlier one wins, field by field
//! notes       one for each action or carrier: what became of it, told to whoever sent it
//! ```
//! *Invariants*: reading never fails halfway: what is not valid is dropped, with a reason in its note
//! (`junk_is_dropped_with_a_reason`); what one carrier says stays apart from the others until it is asked for
//! (`an_earlier_carrier_wins_field_by_field`).
//!
//! *Bounds*: [`MAX_JSON_BYTES`], [`MAX_ACTIONS`], [`MAX_DIRECTIVES`], [`MAX_SPANS`], and those of taints and ids.

mod carriers;
mod envelope;
mod fields;
mod foreign;
pub mod headers;
mod note;
mod resolve;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::time::Duration;

use crate::{SemanticType, Taint, Toleration};

pub use carriers::{BadHints, ClientHints};
pub use envelope::{ACTIONS, Action, read_envelope, read_envelope_json};
pub use note::{KINDS, Note};
pub use resolve::{Resolution, Run};

/// Longest document of hints, in bytes.
pub const MAX_JSON_BYTES: usize = 64 * 1024;
/// Most actions of an envelope, as in vLLM.
pub const MAX_ACTIONS: usize = 16;
/// Most directives of one `kv.retain`, as in vLLM.
pub const MAX_DIRECTIVES: usize = 128;
/// Most spans of one carrier.
pub const MAX_SPANS: usize = 256;
/// Most children of one signal.
pub const MAX_CHILDREN: usize = 64;
/// Longest time that anything is asked to be kept, as in vLLM.
pub const MAX_TTL: Duration = Duration::from_secs(30 * 86_400);
/// Time of a claim whose priority alone was said.
pub const DEFAULT_TTL: Duration = Duration::from_secs(300);
/// Priority of a claim whose time alone was said.
pub const DEFAULT_PRIORITY: u8 = 50;
/// Highest priority.
pub const MAX_PRIORITY: u8 = 100;

/// Which tokens of a request something is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// All of them, unless a part of the request says otherwise.
    Whole,
    /// Tokens `start..end`.
    Tokens(Range<u32>),
    /// What it generates.
    Output,
}

/// What is said of some blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Which.
    pub part: Part,
    /// What they mean.
    pub semantic: Option<SemanticType>,
    /// What may not, or must, be done with them.
    pub taints: Vec<Taint>,
    /// How much they are worth keeping, 0 to 100.
    pub priority: Option<u8>,
    /// How long.
    pub ttl: Option<Duration>,
    /// Whether they shall not be evicted at all for that long.
    pub pin: bool,
    /// Note of the action that said so: index in [`Said::notes`].
    pub note: usize,
}

impl Span {
    /// Says nothing yet.
    #[must_use]
    pub const fn new(part: Part, note: usize) -> Self {
        Self { part, semantic: None, taints: Vec::new(), priority: None, ttl: None, pin: false, note }
    }

    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { semantic, taints, priority, ttl, pin, .. } = self;
        semantic.is_none() && taints.is_empty() && priority.is_none() && ttl.is_none() && !pin
    }
}

/// What a program does, in the words of the wire's `SignalKind`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signal {
    /// One of [`Signal::KINDS`].
    pub kind: &'static str,
    /// The program; that of the request when empty.
    pub program_id: String,
    /// Its parent; empty for none said.
    pub parent_program_id: String,
    /// Programs that fork off or come together.
    pub children: Vec<String>,
    /// When it is expected to go on.
    pub expected_resume: Duration,
    /// Note of the action: index in [`Said::notes`].
    pub note: usize,
}

impl Signal {
    /// All kinds, by the names of the wire.
    pub const KINDS: [&'static str; 7] =
        ["TOOL_WAIT", "CONTINUATION", "FORK", "JOIN", "COMPACTION", "COMPLETION", "CANCELLATION"];

    /// Whether it can free blocks or lower their worth: more than identity.
    #[must_use]
    pub fn frees(&self) -> bool {
        matches!(self.kind, "JOIN" | "COMPACTION" | "COMPLETION" | "CANCELLATION")
    }
}

/// When a program says that it will be back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// So long after the request ended.
    In(Duration),
    /// At this time, in milliseconds of Unix time.
    At(u64),
}

impl Resume {
    /// How long from now on, asked as the request ends; at most [`MAX_TTL`].
    #[must_use]
    pub fn from_now(self, now_unix_ms: u64) -> Duration {
        match self {
            Self::In(span) => span,
            Self::At(at) => Duration::from_millis(at.saturating_sub(now_unix_ms)).min(MAX_TTL),
        }
    }
}

/// What one carrier said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Said {
    /// The program.
    pub program_id: Option<String>,
    /// The program that started it.
    pub parent_program_id: Option<String>,
    /// The client's conversation.
    pub session_id: Option<String>,
    /// What the program is for: those of one role behave alike.
    pub agent_role: Option<String>,
    /// Whether the parent program waits for this one's end.
    pub blocks_parent: Option<bool>,
    /// When the program will be back after this request.
    pub expected_resume: Option<Resume>,
    /// Taints that the request bears with.
    pub tolerations: Vec<Toleration>,
    /// Of its blocks.
    pub spans: Vec<Span>,
    /// Of its program.
    pub signals: Vec<Signal>,
    /// What became of each action, or of the carrier.
    pub notes: Vec<Note>,
}

impl Said {
    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { program_id, parent_program_id, session_id, tolerations, spans, signals, .. } = self;
        let Self { agent_role, blocks_parent, expected_resume, notes: _, .. } = self;
        let texts = [program_id, parent_program_id, session_id, agent_role];
        texts.into_iter().all(Option::is_none)
            && blocks_parent.is_none()
            && expected_resume.is_none()
            && tolerations.is_empty()
            && spans.is_empty()
            && signals.is_empty()
    }

    /// A note for a new action; its index.
    pub(crate) fn begin(&mut self, action_id: &str, action_type: &str) -> usize {
        self.notes.push(Note::new(action_id, action_type));
        self.notes.len() - 1
    }

    /// Notes that say anything.
    pub fn told(&self) -> impl Iterator<Item = &Note> {
        self.notes.iter().filter(|note| !note.is_empty())
    }
}
