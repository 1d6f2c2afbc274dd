//! Sizes and durations as people write them: `4GiB`, `256 MiB`, `30s`, `200ms`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "Written")]
pub struct ByteSize(pub u64);

/// A span of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Span(pub Duration);

#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u64),
    Text(String),
}

/// A text that is no size or duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not a {what}: write a number and a unit, like {example}")]
pub struct BadUnit {
    given: String,
    what: &'static str,
    example: &'static str,
}

const SIZES: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

const SPANS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim())?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

impl FromStr for ByteSize {
    type Err = BadUnit;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = || BadUnit { given: s.to_owned(), what: "size", example: "\"4GiB\" or \"256MiB\"" };
        parse(s, &SIZES).map(Self).ok_or_else(bad)
    }
}

impl TryFrom<Written> for ByteSize {
    type Error = BadUnit;

    fn try_from(written: Written) -> Result<Self, Self::Error> {
        match written {
            Written::Number(n) => Ok(Self(n)),
            Written::Text(text) => text.parse(),
        }
    }
}

impl TryFrom<String> for Span {
    type Error = BadUnit;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let bad = || BadUnit { given: text.clone(), what: "duration", example: "\"30s\" or \"200ms\"" };
        parse(&text, &SPANS).map(|ms| Self(Duration::from_millis(ms))).ok_or_else(bad)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary = SIZES.iter().take(4).find(|(_, size)| self.0 >= *size && self.0.is_multiple_of(*size));
        match binary {
            Some((unit, size)) => write!(f, "{} {unit}", self.0 / size),
            None => write!(f, "{} B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans_parse_with_units_only() {
        let cases =
            [("4GiB", Some(4 << 30)), ("256 MiB", Some(256 << 20)), ("10B", Some(10)), ("1MB", Some(1_000_000))];
        for (text, want) in cases {
            assert_eq!(text.parse::<ByteSize>().ok().map(|b| b.0), want, "{text}");
        }
        for bad in ["4", "GiB", "-1GiB", "1.5GiB", "99999999999999TiB", "4gib"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
        assert_eq!(Span::try_from("2m".to_owned()).unwrap().0, Duration::from_secs(120));
        assert!(Span::try_from("2".to_owned()).is_err());
        assert_eq!(ByteSize(4 << 30).to_string(), "4 GiB");
    }
}
