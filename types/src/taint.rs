//! Taints: what may not, or must, be done with a block, as `key=value:effect`; and what a request bears with.
//!
//! ```text
//! taint       key=value:effect        key:effect         secret=pii:NoServe     scratch:Ephemeral(30s)
//! toleration  key=value:effect, any part may be missing: `secret`, `secret=pii`, `:NoServe`, `*`
//! ```

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What a taint does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Effect {
    /// Its copies are not removed from a tier to make room there; further copies are allowed.
    NoOffload,
    /// No copies on other nodes are made on our own account.
    NoReplicate,
    /// Not evicted: a hard claim on the budget of whoever set it.
    NoEvict,
    /// First to go.
    PreferEvict,
    /// A copy on every node.
    AlwaysReplicate,
    /// Handed only to requests that tolerate it.
    NoServe,
    /// Gone everywhere after so long.
    Ephemeral(Duration),
}

impl Effect {
    /// Names of all effects, without the span of the last.
    pub const NAMES: [&'static str; 7] =
        ["NoOffload", "NoReplicate", "NoEvict", "PreferEvict", "AlwaysReplicate", "NoServe", "Ephemeral"];

    /// The name, without a span.
    #[must_use]
    pub const fn name(self) -> &'static str {
        Self::NAMES[self.index()]
    }

    /// Number of the effect: [`Self::NAMES`]' order, whatever its span.
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::NoOffload => 0,
            Self::NoReplicate => 1,
            Self::NoEvict => 2,
            Self::PreferEvict => 3,
            Self::AlwaysReplicate => 4,
            Self::NoServe => 5,
            Self::Ephemeral(_) => 6,
        }
    }

    /// The effect of a number and a span, which only [`Effect::Ephemeral`] has.
    #[must_use]
    pub const fn from_index(index: usize, ttl: Duration) -> Option<Self> {
        Some(match index {
            0 => Self::NoOffload,
            1 => Self::NoReplicate,
            2 => Self::NoEvict,
            3 => Self::PreferEvict,
            4 => Self::AlwaysReplicate,
            5 => Self::NoServe,
            6 => Self::Ephemeral(ttl),
            _ => return None,
        })
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ephemeral(ttl) => write!(f, "Ephemeral({}ms)", ttl.as_millis()),
            other => f.write_str(other.name()),
        }
    }
}

/// A mark on a block, with an effect.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Taint {
    /// What it is about.
    pub key: String,
    /// May be empty.
    pub value: String,
    /// What it does.
    pub effect: Effect,
}

/// A text that is no taint or toleration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no taint: {reason}; write key=value:Effect, with one of NoOffload, NoReplicate, NoEvict, PreferEvict, AlwaysReplicate, NoServe, Ephemeral(30s)"
)]
pub struct BadTaint {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Taint {
    /// Longest key or value, in bytes.
    pub const MAX_PART_BYTES: usize = 63;
    /// Most taints of one block.
    pub const MAX_PER_BLOCK: usize = 8;

    /// Checks the parts of a taint.
    ///
    /// # Errors
    /// [`BadTaint`]: an empty key, a part that is too long or has other characters than letters, digits, `-`, `_`, `.`
    /// and `/`, or an ephemeral taint that ends at once.
    pub fn new(key: &str, value: &str, effect: Effect) -> Result<Self, BadTaint> {
        let bad = |reason| Err(BadTaint { text: format!("{key}={value}:{effect}"), reason });
        if key.is_empty() {
            return bad("its key is empty");
        }
        if key.len() > Self::MAX_PART_BYTES || value.len() > Self::MAX_PART_BYTES {
            return bad("its key or value is longer than 63 bytes");
        }
        if !key.bytes().chain(value.bytes()).all(plain) {
            return bad("keys and values have letters, digits, '-', '_', '.' and '/' only");
        }
        if effect == Effect::Ephemeral(Duration::ZERO) {
            return bad("it would end at once");
        }
        Ok(Self { key: key.to_owned(), value: value.to_owned(), effect })
    }
}

const fn plain(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/')
}

impl fmt::Display for Taint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)?;
        if !self.value.is_empty() {
            write!(f, "={}", self.value)?;
        }
        write!(f, ":{}", self.effect)
    }
}

impl FromStr for Taint {
    type Err = BadTaint;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = |reason| BadTaint { text: s.to_owned(), reason };
        let (name, effect) = s.rsplit_once(':').ok_or_else(|| bad("it has no effect"))?;
        let (key, value) = name.split_once('=').unwrap_or((name, ""));
        let effect = parse_effect(effect).ok_or_else(|| bad("unknown effect"))?;
        Self::new(key, value, effect)
    }
}

fn parse_effect(s: &str) -> Option<Effect> {
    if let Some(span) = s.strip_prefix("Ephemeral(").and_then(|rest| rest.strip_suffix(')')) {
        return parse_span(span).map(Effect::Ephemeral);
    }
    // Ephemeral needs its span.
    let index = Effect::NAMES[..Effect::NAMES.len() - 1].iter().position(|name| *name == s)?;
    Effect::from_index(index, Duration::ZERO)
}

/// A span as people write it: `500ms`, `30s`, `10m`, `2h`, `7d`.
#[must_use]
pub fn parse_span(s: &str) -> Option<Duration> {
    let split = s.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = s.split_at(split);
    let number: u64 = number.parse().ok()?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 3600 * 1000,
        "d" => 86_400 * 1000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
}

/// Taints that a request bears with: parts that are missing match anything.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Toleration {
    /// Of this key only.
    pub key: Option<String>,
    /// Of this value only.
    pub value: Option<String>,
    /// Of this effect only: its index.
    pub effect: Option<usize>,
}

impl Toleration {
    /// Most tolerations of one request.
    pub const MAX_PER_REQUEST: usize = 16;

    /// Whether it bears with a taint.
    #[must_use]
    pub fn tolerates(&self, taint: &Taint) -> bool {
        self.key.as_ref().is_none_or(|k| *k == taint.key)
            && self.value.as_ref().is_none_or(|v| *v == taint.value)
            && self.effect.is_none_or(|e| e == taint.effect.index())
    }
}

impl FromStr for Toleration {
    type Err = BadTaint;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = |reason| BadTaint { text: s.to_owned(), reason };
        if s == "*" {
            return Ok(Self::default());
        }
        let (name, effect) = s.split_once(':').map_or((s, None), |(name, effect)| (name, Some(effect)));
        let effect = match effect {
            None | Some("") => None,
            Some(name) => {
                let index = Effect::NAMES.iter().position(|known| *known == name);
                Some(index.ok_or_else(|| bad("unknown effect"))?)
            }
        };
        let (key, value) = name.split_once('=').map_or((name, None), |(key, value)| (key, Some(value)));
        if !key.bytes().chain(value.unwrap_or_default().bytes()).all(plain) {
            return Err(bad("keys and values have letters, digits, '-', '_', '.' and '/' only"));
        }
        if key.is_empty() && value.is_none() && effect.is_none() {
            return Err(bad("it is empty; `*` tolerates everything"));
        }
        let some = |part: &str| (!part.is_empty()).then(|| part.to_owned());
        Ok(Self { key: some(key), value: value.and_then(some), effect })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_taints_are_the_same() {
        for text in ["secret=pii:NoServe", "scratch:PreferEvict", "tmp=a.b/c:Ephemeral(1500ms)"] {
            assert_eq!(text.parse::<Taint>().unwrap().to_string(), text);
        }
        let ephemeral: Taint = "tmp:Ephemeral(2h)".parse().unwrap();
        assert_eq!(ephemeral.effect, Effect::Ephemeral(Duration::from_secs(7200)));
    }

    #[test]
    fn what_is_no_taint_is_refused_with_a_reason() {
        for (text, reason) in [
            ("secret", "no effect"),
            (":NoServe", "key is empty"),
            ("a=b:Serve", "unknown effect"),
            ("a:Ephemeral", "unknown effect"),
            ("a:Ephemeral(0s)", "end at once"),
            ("a b:NoServe", "letters"),
        ] {
            let error = text.parse::<Taint>().unwrap_err();
            assert!(error.reason.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn a_toleration_matches_by_the_parts_it_has() {
        let taint: Taint = "secret=pii:NoServe".parse().unwrap();
        for text in ["*", "secret", "secret=pii", ":NoServe", "secret:NoServe", "secret=pii:NoServe"] {
            assert!(text.parse::<Toleration>().unwrap().tolerates(&taint), "{text}");
        }
        for text in ["other", "secret=card", ":NoEvict"] {
            assert!(!text.parse::<Toleration>().unwrap().tolerates(&taint), "{text}");
        }
        assert!("".parse::<Toleration>().is_err());
    }
}
