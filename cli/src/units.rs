//! Bytes, durations and shares as people read them, and the durations they write.

use std::time::Duration;

const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

/// `n` bytes in the largest binary unit that leaves at least one, with one decimal: `1.5 GiB`, `512 B`.
#[must_use]
pub fn bytes_text(n: u64) -> String {
    let Some((unit, shift)) = UNITS.into_iter().find(|(_, shift)| n >> shift > 0) else {
        return format!("{n} B");
    };
    // Tenths, rounded down, so that a full tier never reads as fuller than it is.
    let tenths = (u128::from(n) * 10) >> shift;
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

/// `part` of `whole` in percent with one decimal, or `-` of nothing.
#[must_use]
pub fn share_text(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".to_owned();
    }
    let permille = (u128::from(part) * 1000 + u128::from(whole) / 2) / u128::from(whole);
    format!("{}.{} %", permille / 10, permille % 10)
}

/// A duration in its two largest units: `3d 4h`, `12m 5s`, `850ms`.
#[must_use]
pub fn duration_text(d: Duration) -> String {
    let seconds = d.as_secs();
    let (days, hours, minutes, secs) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes, secs) {
        (0, 0, 0, 0) => format!("{}ms", d.subsec_millis()),
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s}s"),
        (0, h, m, _) => format!("{h}h {m}m"),
        (d, h, _, _) => format!("{d}d {h}h"),
    }
}

/// A duration that is not a number with a unit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a number above zero and a unit: 500ms, 5s or 2m")]
pub struct BadDuration;

/// Longest duration accepted: a day.
const MAX_DURATION: Duration = Duration::from_secs(86_400);

/// Reads `500ms`, `5s` or `2m`.
///
/// # Errors
/// [`BadDuration`] for anything else, for zero and for more than a day.
pub fn parse_duration(s: &str) -> Result<Duration, BadDuration> {
    let digits = s.find(|c: char| !c.is_ascii_digit()).ok_or(BadDuration)?;
    let (number, unit) = s.split_at(digits);
    let number: u64 = number.parse().map_err(|_| BadDuration)?;
    let millis = match unit {
        "ms" => number,
        "s" => number.saturating_mul(1_000),
        "m" => number.saturating_mul(60_000),
        _ => return Err(BadDuration),
    };
    let duration = Duration::from_millis(millis);
    if duration.is_zero() || duration > MAX_DURATION { Err(BadDuration) } else { Ok(duration) }
}

/// A lifetime that is not a number with a unit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a number above zero and a unit: 500ms, 30s, 10m, 2h or 7d")]
pub struct BadTtl;

/// Longest lifetime accepted: a year.
const MAX_TTL: Duration = Duration::from_secs(365 * 86_400);

/// Reads `500ms`, `30s`, `10m`, `2h` or `7d`.
///
/// # Errors
/// [`BadTtl`] for anything else, for zero and for more than a year.
pub fn parse_ttl(s: &str) -> Result<Duration, BadTtl> {
    kvtier_types::parse_span(s).filter(|span| !span.is_zero() && *span <= MAX_TTL).ok_or(BadTtl)
}

/// A duration for a field in milliseconds.
#[must_use]
pub fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// A duration for a field of 32 bits in milliseconds.
#[must_use]
pub fn millis_32(span: Duration) -> u32 {
    u32::try_from(span.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_units() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1023.9 KiB"),
            (3 << 30, "3.0 GiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(bytes_text(n), text);
        }
    }

    #[test]
    fn shares_are_rounded() {
        assert_eq!(share_text(1, 3), "33.3 %");
        assert_eq!(share_text(2, 3), "66.7 %");
        assert_eq!(share_text(0, 0), "-");
        assert_eq!(share_text(u64::MAX, u64::MAX), "100.0 %");
    }

    #[test]
    fn durations_read_and_print() {
        for (text, millis) in [("500ms", 500), ("5s", 5_000), ("2m", 120_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)));
        }
        for text in ["", "5", "s", "0s", "-1s", "1.5s", "5h", "99999999999999999999s", "2000m", "5 s"] {
            assert_eq!(parse_duration(text), Err(BadDuration), "{text}");
        }
        for (seconds, text) in [(5, "5s"), (65, "1m 5s"), (3_700, "1h 1m"), (90_000, "1d 1h")] {
            assert_eq!(duration_text(Duration::from_secs(seconds)), text);
        }
        assert_eq!(duration_text(Duration::from_millis(85)), "85ms");
    }

    #[test]
    fn lifetimes_have_hours_and_days_too() {
        for (text, seconds) in [("30s", 30), ("2h", 7_200), ("7d", 604_800)] {
            assert_eq!(parse_ttl(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "0s", "5", "h", "366d", "1w", "-1s"] {
            assert_eq!(parse_ttl(text), Err(BadTtl), "{text}");
        }
    }
}
