//! The table, for people and as JSON.

use std::fmt;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

use crate::machine::Machine;
use crate::stats::{Round, Summary};

/// What a row is held against.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Floor {
    /// The ratio to the baseline must be at least this.
    Ratio(f64),
    /// The value, or the time as a multiple of the baseline's, must be at most this.
    AtMost(f64),
    /// Shown only.
    None,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    name: String,
    unit: &'static str,
    subject: Summary,
    baseline: Option<Summary>,
    baseline_name: &'static str,
    ratio: Option<Summary>,
    floor: Floor,
    pass: Option<bool>,
}

impl Row {
    /// Work of `bytes` a round, as a ratio to a baseline.
    pub(crate) fn ratio(
        name: &str,
        (bytes, rounds): (u64, &[Round]),
        baseline_name: &'static str,
        floor: Floor,
    ) -> Self {
        let rate =
            |seconds: fn(&Round) -> f64| Summary::of(rounds.iter().map(|r| bytes as f64 / seconds(r) / 1e9).collect());
        let ratio = Summary::of(rounds.iter().map(|r| r.ratio()).collect());
        let pass = if let Floor::Ratio(least) = floor { Some(ratio.median >= least) } else { None };
        Self {
            name: name.to_owned(),
            unit: "GB/s",
            subject: rate(|r| r.subject_s),
            baseline: Some(rate(|r| r.baseline_s)),
            baseline_name,
            ratio: Some(ratio),
            floor,
            pass,
        }
    }

    /// Work whose time may be at most so many times the baseline's.
    pub(crate) fn times(name: &str, rounds: &[Round], baseline_name: &'static str, floor: Floor) -> Self {
        let micros = |seconds: fn(&Round) -> f64| Summary::of(rounds.iter().map(|r| seconds(r) * 1e6).collect());
        let ratio = Summary::of(rounds.iter().map(|r| 1.0 / r.ratio()).collect());
        let pass = if let Floor::AtMost(most) = floor { Some(ratio.median <= most) } else { None };
        Self {
            name: name.to_owned(),
            unit: "us",
            subject: micros(|r| r.subject_s),
            baseline: Some(micros(|r| r.baseline_s)),
            baseline_name,
            ratio: Some(ratio),
            floor,
            pass,
        }
    }

    /// A value with a bound, or without.
    pub(crate) fn value(name: &str, unit: &'static str, samples: Vec<f64>, floor: Floor) -> Self {
        let subject = Summary::of(samples);
        let pass = if let Floor::AtMost(most) = floor { Some(subject.median <= most) } else { None };
        Self { name: name.to_owned(), unit, subject, baseline: None, baseline_name: "", ratio: None, floor, pass }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |value: f64| if value < 100.0 { format!("{value:.2}") } else { format!("{value:.0}") };
        let subject = format!("{} {}", number(self.subject.median), self.unit);
        let baseline = match &self.baseline {
            Some(baseline) => format!("{} {}", number(baseline.median), self.baseline_name),
            None => String::new(),
        };
        let shown = self.ratio.as_ref().unwrap_or(&self.subject);
        let ratio = self.ratio.as_ref().map_or_else(String::new, |r| number(r.median));
        let spread = format!("{}..{} ({})", number(shown.least), number(shown.most), shown.samples);
        let floor = match self.floor {
            Floor::Ratio(least) => format!(">= {least}"),
            Floor::AtMost(most) => format!("<= {most}"),
            Floor::None => String::new(),
        };
        let verdict = self.pass.map_or("", |pass| if pass { "pass" } else { "MISS" });
        let name = &self.name;
        write!(f, "{name:46} {subject:>15} {baseline:>18} {ratio:>6} {spread:>22} {floor:>9} {verdict}")
    }
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    quick: bool,
    pub(crate) rows: Vec<Row>,
    notes: Vec<String>,
}

impl Report {
    pub(crate) const fn new(machine: Machine, quick: bool) -> Self {
        Self { machine, quick, rows: Vec::new(), notes: Vec::new() }
    }

    /// Adds a row, and shows it at once.
    pub(crate) fn add(&mut self, row: Row) {
        eprintln!("{row}");
        self.rows.push(row);
    }

    /// Adds what a reader of the numbers must know.
    pub(crate) fn note(&mut self, note: String) {
        eprintln!("note: {note}");
        self.notes.push(note);
    }

    pub(crate) fn missed(&self) -> usize {
        self.rows.iter().filter(|row| row.pass == Some(false)).count()
    }

    /// Writes the JSON.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let json = serde_json::to_string_pretty(self)?;
        std::fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, subject, baseline) = ("name", "subject", "baseline");
        writeln!(f, "{name:46} {subject:>15} {baseline:>18} {:>6} {:>22} {:>9}", "ratio", "spread (samples)", "floor")?;
        self.rows.iter().try_for_each(|row| writeln!(f, "{row}"))?;
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}
