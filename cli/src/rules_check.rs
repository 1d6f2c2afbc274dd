//! `kvtier rules check`: what is wrong with a rules file, and where; no daemon is asked.

use std::path::Path;

use kvtier_types::rules::{MAX_FILE_BYTES, RuleError, parse};
use serde::Serialize;

use crate::error::CliError;
use crate::report::Report;
use crate::table::printable;

#[derive(Debug, Serialize)]
struct Checked {
    file: String,
    rules: usize,
    errors: Vec<Place>,
    /// What is allowed but surely not meant.
    warnings: Vec<Place>,
}

#[derive(Debug, Serialize)]
struct Place {
    line: u32,
    column: u32,
    message: String,
}

impl From<&RuleError> for Place {
    fn from(error: &RuleError) -> Self {
        Self { line: error.line, column: error.column, message: error.message.clone() }
    }
}

/// Checks a file. Incomplete when it has mistakes.
///
/// # Errors
/// [`CliError::File`] when it cannot be read.
pub(crate) fn check(file: &Path) -> Result<Report, CliError> {
    let unreadable = |error: std::io::Error| CliError::file(file, format!("cannot be read: {error}"));
    if std::fs::metadata(file).map_err(unreadable)?.len() > MAX_FILE_BYTES as u64 {
        return Err(CliError::file(file, format!("is longer than {MAX_FILE_BYTES} bytes")));
    }
    let text = std::fs::read_to_string(file).map_err(unreadable)?;
    let mut checked = Checked { file: file.display().to_string(), rules: 0, errors: Vec::new(), warnings: Vec::new() };
    match parse(&text) {
        Ok(rules) => {
            checked.rules = rules.rules().len();
            checked.warnings = rules.warnings().iter().map(Place::from).collect();
        }
        Err(errors) => checked.errors = errors.iter().map(Place::from).collect(),
    }
    Ok(Report::new(words(&checked), &checked, checked.errors.is_empty()))
}

fn words(checked: &Checked) -> String {
    let file = printable(&checked.file);
    let line = |kind: &str, p: &Place| format!("{file}:{}:{}: {kind}{}\n", p.line, p.column, printable(&p.message));
    let errors = checked.errors.iter().map(|p| line("", p));
    let warnings = checked.warnings.iter().map(|p| line("warning: ", p));
    let mut out: String = errors.chain(warnings).collect();
    if checked.errors.is_empty() {
        out.push_str(&format!("{file}: {} rules, ok\n", checked.rules));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Report {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rules.toml");
        std::fs::write(&file, text).unwrap();
        check(&file).unwrap()
    }

    #[test]
    fn mistakes_and_warnings_are_told_with_their_places() {
        let good = checked(kvtier_types::rules::DEFAULT_RULES);
        assert!(good.complete && good.text.ends_with("6 rules, ok\n"), "{}", good.text);
        let bad = checked("[[rule]]\nname = \"a\"\nthen = { priorty = 3, pin = 1 }\n");
        assert!(!bad.complete);
        let lines: Vec<&str> = bad.text.lines().collect();
        assert!(lines[0].contains("rules.toml:3:10: ") && lines[0].contains("did you mean \"priority\"?"), "{lines:?}");
        assert_eq!((lines.len(), bad.json["errors"][1]["column"].as_u64()), (2, Some(29)), "{lines:?}");
        let odd =
            checked("[[rule]]\nname = \"a\"\nthen = { pin = true }\n[[rule]]\nname = \"b\"\nthen = { pin = false }\n");
        assert!(odd.complete && odd.text.contains(":4:1: warning: "), "{}", odd.text);
        assert!(check(Path::new("/nowhere/rules")).unwrap_err().to_string().contains("cannot be read"));
    }
}
