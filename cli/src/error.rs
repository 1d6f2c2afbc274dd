//! Why a command did not run. Every message says what to do about it.

use std::path::Path;
use std::time::Duration;

use tonic::Code;

use crate::address::Address;
use crate::table::printable;
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
    #[error("the daemon refused `{verb}`: {} ({})\n{}", printable(status.message()), code_name(status.code()), advice(status.code()))]
    Refused {
        /// The verb as on the command line.
        verb: &'static str,
        /// Its answer.
        #[source]
        status: Box<tonic::Status>,
    },
    /// The daemon has no such verb.
    #[error(
        "this kvtierd does not know `{verb}`{words}\nIt is older than this kvtier, or was not set up for it: `kvtier capabilities` lists its verbs; compare `kvtier --version` and `kvtier status`."
    )]
    Unknown {
        /// The verb as on the command line.
        verb: &'static str,
        /// What it said of it, in parentheses; mostly nothing.
        words: String,
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
    /// A file on the command line that cannot be used.
    #[error("{file}: {reason}")]
    File {
        /// As given; `-` is standard input.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A command line whose parts do not go together.
    #[error("{0}")]
    Usage(String),
    /// The terminal cannot be drawn on.
    #[error("cannot draw on this terminal: {0}\nUse `kvtier top --once`, or --json.")]
    Terminal(#[source] std::io::Error),
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
        matches!(self, Self::Unconfirmed { .. } | Self::Usage(_) | Self::File { .. })
    }

    /// True when no daemon answered, or one that cannot answer now: the same command may work a little later.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Late { .. } => true,
            Self::Refused { status, .. } => matches!(status.code(), Code::Unavailable | Code::Aborted),
            _ => false,
        }
    }

    /// A file that cannot be used.
    pub(crate) fn file(file: &Path, reason: String) -> Self {
        Self::File { file: file.display().to_string(), reason }
    }
}

/// A code as the protocol writes it: `PERMISSION_DENIED`.
fn code_name(code: Code) -> String {
    let mut name = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

/// What to do about a refusal, where the daemon's own words may not say it.
const fn advice(code: Code) -> &'static str {
    match code {
        Code::PermissionDenied | Code::Unauthenticated => {
            "Run it as root, as the daemon's user, or as an operator of its config; a tenant's users may act on their own tenant's blocks."
        }
        Code::Unavailable | Code::Aborted => {
            "See `kvtier status` and the daemon's log, and try again: what was done already stays done, and may be asked for once more."
        }
        Code::ResourceExhausted => {
            "A bound was reached (`kvtier capabilities` lists them): ask for less at once, or wait for what is under way."
        }
        Code::InvalidArgument | Code::OutOfRange => {
            "Nothing was done: change the command; `kvtier capabilities` lists bounds."
        }
        Code::NotFound => {
            "It may have ended or never have been here: `kvtier operations`, `claims`, `programs` and `ls` list what there is."
        }
        Code::FailedPrecondition => "See `kvtier status` for the state it is in.",
        _ => "This is a fault of the daemon: its log says more.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: Code, message: &str) -> CliError {
        CliError::Refused { verb: "pin", status: Box::new(tonic::Status::new(code, message)) }
    }

    #[test]
    fn a_refusal_says_who_may_and_what_to_do() {
        let text = refused(Code::PermissionDenied, "user 7 is no operator\u{1b}").to_string();
        assert!(
            text.starts_with("the daemon refused `pin`: user 7 is no operator? (PERMISSION_DENIED)\nRun it as root")
        );
        assert!(refused(Code::Internal, "").to_string().contains("its log says more"));
    }

    #[test]
    fn only_what_may_pass_is_worth_another_try() {
        assert!(refused(Code::Unavailable, "").may_pass());
        assert!(!refused(Code::PermissionDenied, "").may_pass());
        assert!(!CliError::Usage(String::new()).may_pass());
    }
}
