//! The rules file: read at start, and again on `SIGHUP` and `Admin.ReloadRules`.
//!
//! *Invariant*: a file with a mistake changes nothing: the rules that were in force stay so, and [`RulesFile::state`] says
//! what is wrong, and where. At start it ends the start.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvtier_types::rules::{DEFAULT_RULES, MAX_FILE_BYTES, RuleError, RuleSet, parse};
use parking_lot::Mutex;

use crate::config::Config;
use crate::node::Node;

/// The file and what became of it.
#[derive(Debug)]
pub struct RulesFile {
    path: Option<PathBuf>,
    state: Mutex<RulesState>,
    /// Held by whoever loads it.
    turn: tokio::sync::Mutex<()>,
}

/// The rules in force.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RulesState {
    /// Their text.
    pub text: String,
    /// Why the last file was refused; empty when it was not.
    pub refused: String,
    /// Times that rules were put in force since start.
    pub generation: u64,
}

impl RulesFile {
    /// Reads the file that the configuration names.
    ///
    /// # Errors
    /// When it cannot be read or has mistakes: each with its line and column.
    pub fn open(config: &Config) -> anyhow::Result<(Self, RuleSet)> {
        let path = config.rules.file.clone();
        let (text, rules) = read(path.as_deref()).map_err(|refused| anyhow::anyhow!("rules.file: {refused}"))?;
        let state = RulesState { text, refused: String::new(), generation: 1 };
        Ok((Self { path, state: Mutex::new(state), turn: tokio::sync::Mutex::new(()) }, rules))
    }

    /// Where the rules come from; `None` for the shipped ones.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The rules in force, and what is wrong with the file if it was refused.
    #[must_use]
    pub fn state(&self) -> RulesState {
        self.state.lock().clone()
    }
}

/// Reads the file again and puts its rules in force, unless it has a mistake. Answers with what is in force then.
pub async fn reload(node: &Arc<Node>) -> RulesState {
    let _turn = node.rules.turn.lock().await;
    let path = node.rules.path.clone();
    let loaded = tokio::task::spawn_blocking(move || read(path.as_deref())).await;
    match loaded.unwrap_or_else(|_| Err("the task that read it died".to_owned())) {
        Ok((text, rules)) => {
            tracing::info!(rules = rules.rules().len(), "rules loaded");
            node.with_core(|core, _| core.set_rules(rules));
            {
                let mut state = node.rules.state.lock();
                *state = RulesState { text, refused: String::new(), generation: state.generation + 1 };
            }
            apply(node);
        }
        Err(refused) => {
            tracing::error!("the rules stay as they were: {refused}");
            node.rules.state.lock().refused = refused;
        }
    }
    node.rules.state()
}

/// Looks at all blocks anew, in steps that leave others their turn.
fn apply(node: &Arc<Node>) {
    let of_task = Arc::clone(node);
    node.tasks.spawn(async move {
        while !of_task.stopping.is_cancelled() && of_task.with_core(|core, _| core.walk()) {
            tokio::task::yield_now().await;
        }
    });
}

/// Text and rules of a file, or of the shipped one; what is wrong is told a line a mistake.
fn read(path: Option<&Path>) -> Result<(String, RuleSet), String> {
    let Some(path) = path else { return Ok((DEFAULT_RULES.to_owned(), RuleSet::shipped())) };
    let shown = path.display();
    let unreadable = |error: std::io::Error| format!("cannot read {shown}: {error}");
    let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
    if bytes > MAX_FILE_BYTES as u64 {
        return Err(format!("{shown} has {bytes} bytes, at most {MAX_FILE_BYTES}"));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let place = |e: &RuleError| format!("{shown}:{}:{}: {}", e.line, e.column, e.message);
    let rules = parse(&text).map_err(|errors| errors.iter().map(place).collect::<Vec<_>>().join("\n"))?;
    for warning in rules.warnings() {
        tracing::warn!("{}", place(warning));
    }
    Ok((text, rules))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_mistakes_is_told_line_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rules.toml");
        std::fs::write(&path, "[[rule]]\nname = \"a\"\nthen = { ttl = \"1 hour\", evict = \"last\" }\n").unwrap();
        let refused = read(Some(&path)).unwrap_err();
        let lines: Vec<&str> = refused.lines().collect();
        assert_eq!(lines.len(), 2, "{refused}");
        assert!(lines[0].contains("rules.toml:3:16: ttl"), "{refused}");
        assert!(read(Some(Path::new("/nowhere"))).unwrap_err().contains("cannot read"));
        assert_eq!(read(None).unwrap().1, RuleSet::shipped());
    }
}
