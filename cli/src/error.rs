//! Why a command did not run. Every message says what to do about it.

use std::time::Duration;

use crate::address::Address;
use crate::units::duration_text;

/// A command that did not run to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// Nobody answers at the address.
    #[error("no daemon at {address}: {reason}\n{advice}")]
    Unreachable {
        /// Where it was looked for.
        address: Address,
        /// What the connection said.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// The daemon took longer than `--timeout`.
    #[error(
        "the daemon at {address} did not answer within {}\nIt may be starting or overloaded: raise --timeout, and see its log.",
        duration_text(*timeout)
    )]
    Late {
        /// Where the daemon is.
        address: Address,
        /// The limit.
        timeout: Duration,
    },
    /// The daemon refused the call.
    #[error("the daemon refused `{verb}`: {} ({})", status.message(), status.code())]
    Refused {
        /// The verb as on the command line.
        verb: &'static str,
        /// Its answer.
        #[source]
        status: Box<tonic::Status>,
    },
    /// The daemon answered with something that cannot be.
    #[error(
        "the daemon's answer to `{verb}` is wrong: {what}\nIts version may differ from this tool's: compare `kvtier --version` and `kvtier status`."
    )]
    BadAnswer {
        /// The verb as on the command line.
        verb: &'static str,
        /// What is wrong.
        what: String,
    },
    /// A key prefix that more than one block has.
    #[error("key prefix {prefix} is ambiguous: it could be\n{}\nGive more digits.", candidates.join("\n"))]
    Ambiguous {
        /// The prefix.
        prefix: String,
        /// Keys that begin with it, and possibly a line that says how many more there are.
        candidates: Vec<String>,
    },
    /// A key prefix that no block has.
    #[error("no block here has a key that begins with {prefix}\n`kvtier ls` lists the blocks of this node.")]
    UnknownPrefix {
        /// The prefix.
        prefix: String,
    },
    /// `evict --all` without `--yes`.
    #[error("`evict --all` drops every block{}: say --yes, or see what it would do with --dry-run", scope)]
    Unconfirmed {
        /// ` of tier X`, or nothing.
        scope: String,
    },
}

impl CliError {
    /// True when the command line is to blame, and nothing was asked of the daemon.
    #[must_use]
    pub const fn is_usage(&self) -> bool {
        matches!(self, Self::Unconfirmed { .. })
    }
}
