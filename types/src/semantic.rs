//! What a block means, and the hints a request carries about it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::taint::{Taint, Toleration};

/// The meaning of a block's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(u8)]
pub enum SemanticType {
    /// Nobody said.
    #[default]
    Unspecified = 0,
    /// A system prompt.
    SystemPrompt = 1,
    /// Tool or function definitions.
    ToolDefinition = 2,
    /// One of several lines of thought.
    ReasoningBranch = 3,
    /// A state from which execution can be resumed.
    ExecutionCheckpoint = 4,
    /// A turn of a conversation.
    ConversationTurn = 5,
    /// What a tool returned.
    ToolResult = 6,
    /// A retrieved document.
    Document = 7,
    /// Thought that nobody will read again.
    Scratchpad = 8,
    /// A loaded skill.
    Skill = 9,
}

impl SemanticType {
    /// Every type, in the order of its wire number.
    pub const ALL: [Self; 10] = [
        Self::Unspecified,
        Self::SystemPrompt,
        Self::ToolDefinition,
        Self::ReasoningBranch,
        Self::ExecutionCheckpoint,
        Self::ConversationTurn,
        Self::ToolResult,
        Self::Document,
        Self::Scratchpad,
        Self::Skill,
    ];

    /// Types from the least to the most durable: a block that spans two takes the more durable one.
    const BY_DURABILITY: [Self; 10] = [
        Self::Unspecified,
        Self::Scratchpad,
        Self::ReasoningBranch,
        Self::ToolResult,
        Self::ConversationTurn,
        Self::Document,
        Self::ExecutionCheckpoint,
        Self::Skill,
        Self::ToolDefinition,
        Self::SystemPrompt,
    ];

    /// The type of a block that spans both.
    #[must_use]
    pub fn more_durable(self, other: Self) -> Self {
        let rank = |kind| Self::BY_DURABILITY.iter().position(|k| *k == kind);
        if rank(self) >= rank(other) { self } else { other }
    }

    /// The field's name, as in the wire format and in hints.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "UNSPECIFIED",
            Self::SystemPrompt => "SYSTEM_PROMPT",
            Self::ToolDefinition => "TOOL_DEFINITION",
            Self::ReasoningBranch => "REASONING_BRANCH",
            Self::ExecutionCheckpoint => "EXECUTION_CHECKPOINT",
            Self::ConversationTurn => "CONVERSATION_TURN",
            Self::ToolResult => "TOOL_RESULT",
            Self::Document => "DOCUMENT",
            Self::Scratchpad => "SCRATCHPAD",
            Self::Skill => "SKILL",
        }
    }

    /// The type with wire number `n`; unknown numbers are [`SemanticType::Unspecified`], so that a newer peer's
    /// type is kept as a block without meaning rather than refused.
    #[must_use]
    pub fn from_number(n: u8) -> Self {
        Self::ALL.get(usize::from(n)).copied().unwrap_or_default()
    }
}

impl fmt::Display for SemanticType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A semantic type name that is not in the list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown semantic type {0:?}")]
pub struct UnknownSemanticType(pub String);

impl FromStr for SemanticType {
    type Err = UnknownSemanticType;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|t| t.name() == s).ok_or_else(|| UnknownSemanticType(s.to_owned()))
    }
}

/// What the request that wrote a block said of it. Carried and stored with the block.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockHints {
    /// The program the request belongs to; empty when it named none.
    pub program_id: String,
    /// The meaning of the block's tokens.
    pub semantic: SemanticType,
    /// What may not, or must, be done with it; sorted, at most [`Taint::MAX_PER_BLOCK`].
    pub taints: Vec<Taint>,
}

impl BlockHints {
    /// Longest program or session id kept, in bytes; longer ones are refused at the wire.
    pub const MAX_PROGRAM_ID_BYTES: usize = 128;
}

/// What a request said of itself and of the blocks that it reads or writes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RequestHints {
    /// Of the blocks it writes.
    pub block: BlockHints,
    /// The client's conversation; empty when it named none.
    pub session_id: String,
    /// The program that started this one; empty for none.
    pub parent_program_id: String,
    /// What the program is for: those of one role take alike; empty when it said none. No longer than a program's id.
    pub agent_role: String,
    /// Whether the program that started this one waits for its end; `None` when nobody said.
    pub blocks_parent: Option<bool>,
    /// Taints that it bears with.
    pub tolerations: Vec<Toleration>,
    /// A soft claim on the blocks it writes: priority, and for how long.
    pub retain: Option<(u8, Duration)>,
}
