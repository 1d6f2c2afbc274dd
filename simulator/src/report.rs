//! Counts of what a run did, and how a campaign is told.

use std::collections::BTreeMap;
use std::fmt;

/// Counts by kind and name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats(BTreeMap<(&'static str, &'static str), u64>);

impl Stats {
    pub(crate) fn count(&mut self, kind: &'static str, name: &'static str) {
        *self.0.entry((kind, name)).or_default() += 1;
    }

    /// Adds another run's counts.
    pub fn add(&mut self, other: &Self) {
        for (what, count) in &other.0 {
            *self.0.entry(*what).or_default() += count;
        }
    }

    /// How often something happened.
    #[must_use]
    pub fn get(&self, kind: &'static str, name: &'static str) -> u64 {
        self.0.get(&(kind, name)).copied().unwrap_or(0)
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kind = "";
        for ((of, name), count) in &self.0 {
            if *of == kind {
                write!(f, ", {name} {count}")?;
            } else {
                let end = if kind.is_empty() { "" } else { "\n" };
                write!(f, "{end}{of}: {name} {count}")?;
                kind = of;
            }
        }
        Ok(())
    }
}
