//! What a verb is about, the same on every command line: block keys, a session, a program, the tokens of a prompt.

use std::path::PathBuf;
use std::str::FromStr;

use clap::ArgGroup;

use crate::keys::KeyArg;

/// The ids of the arguments that each name blocks.
const NAMES: [&str; 5] = ["keys", "keys_file", "session", "program", "tokens_file"];

/// Wants at least one target.
pub(super) fn required() -> ArgGroup {
    ArgGroup::new("target").required(true).multiple(true).args(NAMES)
}

/// Wants at least one target, or `--all`.
pub(super) fn required_or_all() -> ArgGroup {
    required().arg("all")
}

/// What a verb is about.
#[derive(Debug, Clone, Default, clap::Args)]
#[group(skip)]
pub struct TargetArgs {
    /// Block keys: 64 hexadecimal digits, or the first 8 or more.
    pub keys: Vec<KeyArg>,
    /// Block keys of a file: words, or JSON such as `kvtier ls --json` prints; - is standard input.
    #[arg(long, value_name = "FILE", help_heading = "Targets")]
    pub keys_file: Option<PathBuf>,
    /// The blocks of the latest context of this session.
    #[arg(long, value_name = "ID", help_heading = "Targets")]
    pub session: Option<String>,
    /// Only these tokens of the session's context, such as 0..2048, 512.. or ..512: blocks that overlap count.
    #[arg(long, value_name = "START..END", requires = "session", help_heading = "Targets")]
    pub tokens: Option<Span>,
    /// The blocks of this program.
    #[arg(long, value_name = "ID", help_heading = "Targets")]
    pub program: Option<String>,
    /// Its children's blocks too.
    #[arg(long, requires = "program", help_heading = "Targets")]
    pub descendants: bool,
    /// Only what no other live program holds.
    #[arg(long, requires = "program", help_heading = "Targets")]
    pub exclusive: bool,
    /// The blocks of the prompt with these token ids: a JSON array, or numbers with blanks between; - is standard input.
    #[arg(long, value_name = "FILE", requires = "model", help_heading = "Targets")]
    pub tokens_file: Option<PathBuf>,
    /// The prompt's model, by name, or by the 64 digits of its namespace.
    #[arg(long, value_name = "NAME", requires = "tokens_file", help_heading = "Targets")]
    pub model: Option<String>,
    /// The prompt's cache salt.
    #[arg(long, value_name = "SALT", requires = "tokens_file", help_heading = "Targets")]
    pub salt: Option<String>,
    /// Whose session or program it is. Operators only: others' targets are their own.
    #[arg(long, value_name = "TENANT", help_heading = "Targets")]
    pub tenant: Option<String>,
}

impl TargetArgs {
    /// Whether nothing was named.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let files = self.keys_file.is_none() && self.tokens_file.is_none();
        self.keys.is_empty() && files && self.session.is_none() && self.program.is_none()
    }
}

/// Tokens `[start, end)`; to the last one when `end` is zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub start: u32,
    /// The one after the last.
    pub end: u32,
}

/// A text that is no span of tokens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected START..END with the end above the start, START.. or ..END, such as 0..2048")]
pub struct BadSpan;

impl FromStr for Span {
    type Err = BadSpan;

    fn from_str(s: &str) -> Result<Self, BadSpan> {
        let (start, end) = s.split_once("..").ok_or(BadSpan)?;
        if start.is_empty() && end.is_empty() {
            return Err(BadSpan);
        }
        let number = |text: &str| if text.is_empty() { Ok(0) } else { text.parse().map_err(|_| BadSpan) };
        let span = Self { start: number(start)?, end: number(end)? };
        // On the wire an end of zero is the last token: only a missing end may mean that.
        if !end.is_empty() && span.start >= span.end { Err(BadSpan) } else { Ok(span) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_a_start_an_end_or_both() {
        for (text, start, end) in [("0..2048", 0, 2048), ("512..", 512, 0), ("..512", 0, 512), ("7..8", 7, 8)] {
            assert_eq!(text.parse(), Ok(Span { start, end }), "{text}");
        }
        for text in ["", "..", "5", "5..5", "6..5", "0..0", "a..b", "-1..5", "0..4294967296", "1...5", "1..=5"] {
            assert_eq!(text.parse::<Span>(), Err(BadSpan), "{text}");
        }
    }
}
