//! Keys on the command line: whole, or a prefix that the daemon's list of blocks completes.
//!
//! *Bounds*: at most [`MAX_CANDIDATES`] candidates are kept for a prefix.

use std::collections::BTreeMap;
use std::str::FromStr;

use kvtier_proto::v1;
use kvtier_types::{BlockKey, DIGEST_BYTES};

use crate::client::Client;
use crate::error::CliError;

/// Fewest digits of a prefix: 32 bits single one block out of any node's.
pub const MIN_PREFIX_DIGITS: usize = 8;
/// Candidates named for an ambiguous prefix.
pub const MAX_CANDIDATES: usize = 10;
/// Digits of a key shown in tables: enough to be given back as a prefix.
pub const SHOWN_DIGITS: usize = 16;

/// A key as given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyArg {
    /// All 64 digits.
    Whole(BlockKey),
    /// At least [`MIN_PREFIX_DIGITS`] digits, in lower case.
    Prefix(String),
}

/// A text that is not a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a block key has {} hexadecimal digits, of which at least {MIN_PREFIX_DIGITS} must be given", DIGEST_BYTES * 2)]
pub struct BadKey;

impl FromStr for KeyArg {
    type Err = BadKey;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        // Tables print a key as its first digits and two dots: accept what was copied from one.
        let digits = s.strip_suffix("..").unwrap_or(s).to_ascii_lowercase();
        if let Ok(key) = digits.parse() {
            return Ok(Self::Whole(key));
        }
        let fits = (MIN_PREFIX_DIGITS..DIGEST_BYTES * 2).contains(&digits.len());
        if fits && digits.bytes().all(|b| b.is_ascii_hexdigit()) { Ok(Self::Prefix(digits)) } else { Err(BadKey) }
    }
}

/// The first digits of a key, for tables.
#[must_use]
pub fn short(key: &[u8]) -> String {
    let text = hex::encode(key);
    match text.get(..SHOWN_DIGITS) {
        Some(head) if text.len() > SHOWN_DIGITS => format!("{head}.."),
        _ => text,
    }
}

/// Blocks found so far for one prefix.
#[derive(Debug)]
struct Search<'a> {
    prefix: &'a str,
    found: Vec<String>,
    more: u64,
}

impl Search<'_> {
    fn offer(&mut self, key: &str) {
        if !key.starts_with(self.prefix) || self.found.iter().any(|k| k == key) {
            return;
        }
        if self.found.len() < MAX_CANDIDATES {
            self.found.push(key.to_owned());
        } else {
            self.more += 1;
        }
    }

    fn settle(mut self) -> Result<BlockKey, CliError> {
        let prefix = self.prefix.to_owned();
        match self.found.as_slice() {
            [] => Err(CliError::UnknownPrefix { prefix }),
            [only] => only.parse().map_err(|_| CliError::BadAnswer { verb: "ls", what: format!("key {only}") }),
            _ => {
                self.found.sort_unstable();
                if self.more > 0 {
                    self.found.push(format!("and {} more", self.more));
                }
                Err(CliError::Ambiguous { prefix, candidates: self.found })
            }
        }
    }
}

/// The digits that every prefix has: whoever looks for many asks for these first.
fn head(digits: &str) -> &str {
    digits.get(..MIN_PREFIX_DIGITS).unwrap_or(digits)
}

/// The keys meant, in the order given. Prefixes cost one walk through the daemon's list, whole keys nothing.
///
/// # Errors
/// [`CliError::Ambiguous`] and [`CliError::UnknownPrefix`], and what the daemon's answers can be.
pub async fn resolve(client: &mut Client, args: &[KeyArg]) -> Result<Vec<BlockKey>, CliError> {
    let prefixes = args.iter().filter_map(|arg| match arg {
        KeyArg::Whole(_) => None,
        KeyArg::Prefix(prefix) => Some(prefix.as_str()),
    });
    let mut searches: Vec<Search<'_>> = prefixes.map(|prefix| Search { prefix, found: Vec::new(), more: 0 }).collect();
    if !searches.is_empty() {
        let mut by_head: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (index, search) in searches.iter().enumerate() {
            by_head.entry(head(search.prefix)).or_default().push(index);
        }
        let mut pages = client.pages(v1::ListRequest::default());
        while let Some(blocks) = pages.next(client).await? {
            for block in blocks {
                let key = hex::encode(&block.key);
                let sought = by_head.get(head(&key)).into_iter().flatten();
                sought.for_each(|index| searches[*index].offer(&key));
            }
        }
    }
    let mut settled = searches.into_iter().map(Search::settle);
    args.iter()
        .map(|arg| match arg {
            KeyArg::Whole(key) => Ok(*key),
            KeyArg::Prefix(prefix) => {
                settled.next().unwrap_or_else(|| Err(CliError::UnknownPrefix { prefix: prefix.clone() }))
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "00112233445566778899AABBCCDDEEFF00112233445566778899aabbccddeeff";

    #[test]
    fn whole_keys_and_prefixes_are_told_apart() {
        let whole: KeyArg = KEY.parse().unwrap();
        assert!(matches!(whole, KeyArg::Whole(key) if key.to_string() == KEY.to_lowercase()));
        assert_eq!("0011AABB".parse(), Ok(KeyArg::Prefix("0011aabb".to_owned())));
        assert_eq!("0011223344556677..".parse(), Ok(KeyArg::Prefix("0011223344556677".to_owned())));
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "0011aab", "0011aabg", "zz", &format!("{KEY}0"), "0011 aabb", "é0112233"] {
            assert_eq!(text.parse::<KeyArg>(), Err(BadKey), "{text}");
        }
    }

    #[test]
    fn shown_keys_can_be_given_back() {
        let bytes = hex::decode(KEY).unwrap();
        assert_eq!(short(&bytes), "0011223344556677..");
        assert!(short(&bytes).parse::<KeyArg>().is_ok());
        assert_eq!(short(&[1, 2]), "0102");
    }

    #[test]
    fn many_candidates_are_counted_not_listed() {
        let mut search = Search { prefix: "00000000", found: Vec::new(), more: 0 };
        for n in 0..25 {
            search.offer(&format!("00000000{n:056x}"));
        }
        search.offer(&format!("{:064x}", 1u128 << 127));
        let CliError::Ambiguous { candidates, .. } = search.settle().unwrap_err() else { panic!("not ambiguous") };
        assert_eq!(candidates.len(), MAX_CANDIDATES + 1);
        assert_eq!(candidates.last().unwrap(), "and 16 more");
    }
}
