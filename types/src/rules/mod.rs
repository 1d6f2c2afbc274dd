//! Rules: a file that maps types, taints, models and tenants to lifecycles. For each field the first rule that matches and
//! sets it decides.
//!
//! ```toml
//! [[rule]]
//! name = "tool definitions everywhere"
//! when = { type = "TOOL_DEFINITION" }         # also: taint = "key=value:Effect", model = "glob*", tenant = "glob*"
//! then = { replicate = "all", priority = 90 } # also: tiers, offload, ttl, pin, evict, write_behind
//! ```
//! *Bounds*: [`MAX_RULES`] rules, [`MAX_FILE_BYTES`] of text.

mod file;
mod glob;
mod lifecycle;
mod reach;

#[cfg(test)]
mod tests;

use crate::semantic::SemanticType;
use crate::taint::{Taint, Toleration};

pub use file::parse;
pub use lifecycle::{Copies, EvictOrder, Lifecycle, OffloadRule, Setting, TierSet, WriteWhen};

/// Most rules of a file.
pub const MAX_RULES: usize = 1024;
/// Most bytes of a file.
pub const MAX_FILE_BYTES: usize = 1 << 20;
/// The rules that are in force where no file is named.
pub const DEFAULT_RULES: &str = include_str!("default.toml");

/// What is wrong in a file, and where; lines and columns count from one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct RuleError {
    /// The line.
    pub line: u32,
    /// The column, in characters.
    pub column: u32,
    /// What is wrong, and what to write instead.
    pub message: String,
}

/// What a rule is about: all that is given must match.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct When {
    /// Any of these types; empty for all.
    pub types: Vec<SemanticType>,
    /// Blocks with such a taint.
    pub taint: Option<Toleration>,
    /// Models whose name matches, with `*` and `?`.
    pub model: Option<String>,
    /// Tenants whose id matches, with `*` and `?`.
    pub tenant: Option<String>,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Its name, unique within the file.
    pub name: String,
    /// Its line.
    pub line: u32,
    /// What it is about.
    pub when: When,
    /// What it says, each field once.
    pub then: Vec<Setting>,
}

/// What rules look at.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The block's type.
    pub semantic: SemanticType,
    /// Its taints.
    pub taints: &'a [Taint],
    /// Its model's name.
    pub model: &'a str,
    /// Its owner.
    pub tenant: &'a str,
}

/// Who decided a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The field.
    pub field: &'static str,
    /// What was decided, as it would be written in a file.
    pub value: String,
    /// The rule's name; empty for the built-in default.
    pub rule: String,
    /// The rule's line; zero for the built-in default.
    pub line: u32,
}

/// The rules of a file, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuleSet {
    rules: Vec<Rule>,
    warnings: Vec<RuleError>,
}

impl When {
    /// Whether it is about that subject.
    #[must_use]
    pub fn matches(&self, subject: &Subject<'_>) -> bool {
        (self.types.is_empty() || self.types.contains(&subject.semantic))
            && self.taint.as_ref().is_none_or(|t| subject.taints.iter().any(|taint| t.tolerates(taint)))
            && self.model.as_ref().is_none_or(|m| glob::matches(m, subject.model))
            && self.tenant.as_ref().is_none_or(|t| glob::matches(t, subject.tenant))
    }
}

impl RuleSet {
    /// The shipped rules.
    ///
    /// # Panics
    /// Never: `the_shipped_rules_are_valid` pins it.
    #[must_use]
    pub fn shipped() -> Self {
        parse(DEFAULT_RULES).expect("the shipped rules are valid")
    }

    /// The rules in order.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// What is allowed but surely not meant: rules that never decide anything.
    #[must_use]
    pub fn warnings(&self) -> &[RuleError] {
        &self.warnings
    }

    /// For each field, the setting and the rule of the first rule that matches and sets it.
    fn deciding(&self, subject: &Subject<'_>) -> [Option<(Setting, &Rule)>; Setting::FIELDS.len()] {
        let mut decided = [None; Setting::FIELDS.len()];
        for rule in self.rules.iter().filter(|r| r.when.matches(subject)) {
            for setting in &rule.then {
                decided[setting.index()].get_or_insert((*setting, rule));
            }
        }
        decided
    }

    /// What the rules say of a subject.
    #[must_use]
    pub fn lifecycle(&self, subject: &Subject<'_>) -> Lifecycle {
        let mut lifecycle = Lifecycle::default();
        for (setting, _) in self.deciding(subject).into_iter().flatten() {
            setting.apply(&mut lifecycle);
        }
        lifecycle
    }

    /// The first rule, in the file's order, that decides anything of a subject.
    #[must_use]
    pub fn first(&self, subject: &Subject<'_>) -> Option<&Rule> {
        self.deciding(subject).into_iter().flatten().map(|(_, rule)| rule).min_by_key(|rule| rule.line)
    }

    /// Which rule decided each field.
    #[must_use]
    pub fn explain(&self, subject: &Subject<'_>) -> Vec<Decision> {
        let defaults = [
            lifecycle::TierSet::ALL.to_string(),
            lifecycle::TierSet::ALL.to_string(),
            "0".into(),
            "none".into(),
            "none".into(),
            "false".into(),
            "normal".into(),
            "as configured".into(),
        ];
        let fields = Setting::FIELDS.into_iter().zip(defaults).zip(self.deciding(subject));
        fields
            .map(|((field, default), decided)| match decided {
                Some((setting, rule)) => {
                    Decision { field, value: setting.to_string(), rule: rule.name.clone(), line: rule.line }
                }
                None => Decision { field, value: default, rule: String::new(), line: 0 },
            })
            .collect()
    }
}
