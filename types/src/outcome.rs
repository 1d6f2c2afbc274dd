//! What became of one target of a control verb.

use std::fmt;

/// The outcome of a control verb for one target; every reply carries one per target, with a reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Done, and durable where the verb promises it.
    Applied,
    /// Taken on; it completes later.
    Accepted,
    /// Done in part, up to a budget.
    Clipped,
    /// Not possible now (a lease is held, say); it will be done when that ends.
    Deferred,
    /// The same call was applied before.
    Duplicate,
    /// Refused by a rule, a budget or the caller's rights.
    Rejected,
    /// No such target here.
    Missing,
    /// This build or configuration cannot do it.
    Unsupported,
}

impl Outcome {
    /// The wire and CLI name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Applied => "APPLIED",
            Self::Accepted => "ACCEPTED",
            Self::Clipped => "CLIPPED",
            Self::Deferred => "DEFERRED",
            Self::Duplicate => "DUPLICATE",
            Self::Rejected => "REJECTED",
            Self::Missing => "MISSING",
            Self::Unsupported => "UNSUPPORTED",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
