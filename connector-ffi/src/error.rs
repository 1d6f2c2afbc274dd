//! The crate's error and its one mapping to C status codes.

/// What a call of a session cannot do. Pending, miss and busy are values, not errors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is null, malformed or out of range.
    #[error("invalid argument: {0}")]
    InvalidArgument(String),
    /// The session was opened by another process: a child opens its own.
    #[error("the session belongs to the process that opened it, before a fork")]
    Forked,
    /// The session was closed.
    #[error("the session is closed")]
    Closed,
    /// A bug in this library; the session is still usable.
    #[error("a call panicked")]
    Panicked,
    /// The daemon refuses this session.
    #[error("refused: {0}")]
    Refused(String),
    /// One of the session's bounds is reached: try again later, or do without.
    #[error("limit reached: {0}")]
    Limit(&'static str),
    /// The caller's buffer is too small for the answer.
    #[error("the buffer is too small, {needed} are needed")]
    BufferTooSmall {
        /// Entries or bytes that the answer needs.
        needed: usize,
    },
    /// A file, a thread or a runtime could not be had.
    #[error("{what}: {reason}")]
    Io {
        /// What was attempted.
        what: String,
        /// The system's reason.
        reason: String,
    },
}

impl Error {
    /// An [`Error::InvalidArgument`] that names what is wrong.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::InvalidArgument(what.into())
    }

    /// An [`Error::Io`] from the system's own error.
    pub fn io(what: impl Into<String>, source: &std::io::Error) -> Self {
        Self::Io { what: what.into(), reason: source.to_string() }
    }

    /// The C status of this error, one of the negative `KVTIER_*` constants.
    #[must_use]
    pub const fn status(&self) -> i32 {
        match self {
            Self::InvalidArgument(_) => -1,
            Self::Forked => -2,
            Self::Closed => -3,
            Self::Panicked => -4,
            Self::Refused(_) => -5,
            Self::Limit(_) => -6,
            Self::BufferTooSmall { .. } => -7,
            Self::Io { .. } => -8,
        }
    }
}
