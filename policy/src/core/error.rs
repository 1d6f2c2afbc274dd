//! Why the core refuses.

/// Why the core refuses a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CoreError {
    /// The attachment is unknown: never attached, detached, or reaped. Attach again.
    #[error("unknown attachment: attach again")]
    UnknownAttachment,
    /// A bound of [`crate::limits`] was reached.
    #[error("limit reached: {what} (at most {max})")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        max: usize,
    },
    /// A group index outside the attachment's layout.
    #[error("group {group} is not in the layout, which has {groups}")]
    UnknownGroup {
        /// The index given.
        group: u32,
        /// Groups of the layout.
        groups: usize,
    },
    /// Blocks that no prompt has.
    #[error("range of blocks: {what}")]
    BadRange {
        /// What is wrong with it.
        what: &'static str,
    },
    /// Two attachments of one engine disagree.
    #[error("engine {engine} is attached with another {what}: restart the engine, or give each engine its own id")]
    EngineMismatch {
        /// The engine.
        engine: String,
        /// `namespace` or `layout`.
        what: &'static str,
    },
    /// The lease is unknown: released, or expired.
    #[error("unknown lease")]
    UnknownLease,
}
