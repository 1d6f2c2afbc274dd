//! `kvtier rules`: which there are, and what decided a block's lifecycle.

use kvtier_proto::v1;
use serde::Serialize;

use crate::args::RulesCommand;
use crate::client::Client;
use crate::error::CliError;
use crate::keys::{KeyArg, resolve};
use crate::locate::{outcome_text, taint_text};
use crate::report::Report;
use crate::rules_check;
use crate::table::{Align, Table, printable};

#[derive(Debug, Serialize)]
struct Rules<'a> {
    /// Empty for the shipped defaults.
    file: &'a str,
    generation: u64,
    /// Why the last reload was refused; empty when it was not.
    error: &'a str,
    text: &'a str,
}

#[derive(Debug, Serialize)]
struct Explained {
    key: String,
    outcome: String,
    semantic: String,
    taints: Vec<String>,
    model: String,
    tenant: String,
    decisions: Vec<Decision>,
}

#[derive(Debug, Serialize)]
struct Decision {
    field: String,
    value: String,
    /// Empty for the built-in default.
    rule: String,
    line: u32,
}

/// What is asked of the daemon about its rules.
///
/// # Errors
/// What resolving keys and asking the daemon can fail with.
pub(crate) async fn rules(client: &mut Client, command: Option<&RulesCommand>) -> Result<Report, CliError> {
    match command {
        None | Some(RulesCommand::Show) => Ok(shown(&client.rules(v1::RulesRequest {}).await?)),
        Some(RulesCommand::Reload) => Ok(reloaded(&client.reload_rules(v1::ReloadRulesRequest {}).await?)),
        Some(RulesCommand::Explain { block }) => explain(client, block).await,
        Some(RulesCommand::Check { file }) => rules_check::check(file),
    }
}

fn digest(reply: &v1::RulesReply) -> Rules<'_> {
    Rules { file: &reply.file, generation: reply.generation, error: &reply.error, text: &reply.text }
}

fn head(rules: &Rules<'_>) -> String {
    let from = if rules.file.is_empty() { "the shipped defaults".to_owned() } else { printable(rules.file) };
    let refused = match rules.error {
        "" => String::new(),
        error => format!("# the last reload was refused, these stay in force: {}\n", lines_printable(error)),
    };
    format!("# rules from {from}, loaded {} times\n{refused}", rules.generation)
}

/// Printable text of several lines.
fn lines_printable(text: &str) -> String {
    text.lines()
        .map(|line| if line.is_empty() { String::new() } else { printable(line) })
        .collect::<Vec<_>>()
        .join("\n")
}

fn shown(reply: &v1::RulesReply) -> Report {
    let rules = digest(reply);
    Report::new(format!("{}{}\n", head(&rules), lines_printable(rules.text)), &rules, true)
}

/// Complete when the new rules are in force.
fn reloaded(reply: &v1::RulesReply) -> Report {
    let rules = digest(reply);
    Report::new(head(&rules), &rules, rules.error.is_empty())
}

async fn explain(client: &mut Client, block: &KeyArg) -> Result<Report, CliError> {
    let keys = resolve(client, std::slice::from_ref(block)).await?;
    let key = keys.first().map(|key| key.as_bytes().to_vec()).unwrap_or_default();
    let reply = client.explain_rules(v1::ExplainRulesRequest { key: key.clone().into() }).await?;
    Ok(explained(&key, &reply))
}

fn explained(key: &[u8], reply: &v1::ExplainRulesReply) -> Report {
    let decision = |d: &v1::RuleDecision| Decision {
        field: d.field.clone(),
        value: d.value.clone(),
        rule: d.rule.clone(),
        line: d.line,
    };
    let explained = Explained {
        key: hex::encode(key),
        outcome: outcome_text(reply.outcome),
        semantic: kvtier_proto::convert::semantic(reply.semantic).name().to_owned(),
        taints: reply.taints.iter().map(taint_text).collect(),
        model: reply.model.clone(),
        tenant: reply.tenant.clone(),
        decisions: reply.decisions.iter().map(decision).collect(),
    };
    let complete = reply.outcome() == v1::Outcome::Applied;
    Report::new(text(&explained, complete), &explained, complete)
}

fn text(explained: &Explained, known: bool) -> String {
    if !known {
        return format!("block {}\n  {}\n", explained.key, explained.outcome);
    }
    let mut table = Table::new(&[("DECIDES", Align::Left), ("VALUE", Align::Left), ("RULE", Align::Left)]);
    for d in &explained.decisions {
        let rule = match (d.rule.as_str(), d.line) {
            ("", _) => "built in".to_owned(),
            (name, 0) => name.to_owned(),
            (name, line) => format!("{name} (line {line})"),
        };
        table.row([&d.field, &d.value, &rule]);
    }
    format!(
        "block {}\n  {}  taints {}  model {}  tenant {}\n{}",
        explained.key,
        explained.semantic,
        printable(&explained.taints.join(", ")),
        printable(&explained.model),
        printable(&explained.tenant),
        table.render(2)
    )
}
