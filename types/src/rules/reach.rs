//! Rules that never decide anything, because earlier ones decide all of it.

use super::{Rule, RuleError, Setting, When};

/// Whether every subject of `b` is one of `a`, as far as can be told from the conditions alone.
fn covers(a: &When, b: &When) -> bool {
    let types = a.types.is_empty() || (!b.types.is_empty() && b.types.iter().all(|t| a.types.contains(t)));
    let taint = a.taint.is_none() || a.taint == b.taint;
    let pattern = |a: &Option<String>, b: &Option<String>| a.as_deref().is_none_or(|p| p == "*") || a == b;
    types && taint && pattern(&a.model, &b.model) && pattern(&a.tenant, &b.tenant)
}

/// A warning for each such rule.
pub(super) fn unreachable(rules: &[Rule]) -> Vec<RuleError> {
    let mut warnings = Vec::new();
    for (at, rule) in rules.iter().enumerate() {
        let decider = |setting: &Setting| {
            let sets = |earlier: &&Rule| earlier.then.iter().any(|s| s.index() == setting.index());
            rules[..at].iter().find(|earlier| sets(earlier) && covers(&earlier.when, &rule.when))
        };
        let deciders: Option<Vec<&Rule>> = rule.then.iter().map(decider).collect();
        if let Some(first) = deciders.as_deref().and_then(|d| d.first()) {
            warnings.push(RuleError {
                line: rule.line,
                column: 1,
                message: format!(
                    "rule {:?} never decides anything: earlier rules ({:?}, line {}) match whatever it matches and set all it sets; move it up, or remove it",
                    rule.name, first.name, first.line
                ),
            });
        }
    }
    warnings
}
