//! `kvtier apply-hints`: an envelope of hints for requests that are still to come.

use kvtier_proto::v1;
use serde::Serialize;
use serde_json::Value;

use crate::args::HintsArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::files::read_file;
use crate::locate::outcome_text;
use crate::outcomes::is_done;
use crate::report::Report;
use crate::table::{Align, Table};
use crate::units::millis;

#[derive(Debug, Serialize)]
struct Applied {
    outcomes: Vec<Hint>,
}

#[derive(Debug, Serialize)]
struct Hint {
    action_id: String,
    action_type: String,
    outcome: String,
    reason: String,
}

/// The envelope of a file, checked to be a JSON object.
///
/// # Errors
/// [`CliError::File`].
pub(crate) fn envelope(args: &HintsArgs) -> Result<String, CliError> {
    let bad = |reason: String| CliError::file(&args.file, reason);
    let text = read_file(&args.file)?;
    match serde_json::from_str::<Value>(&text) {
        Ok(Value::Object(_)) => Ok(text),
        Ok(_) => Err(bad("an envelope is a JSON object, with protocol_version, message_id and actions".to_owned())),
        Err(error) => Err(bad(format!("it is no JSON: {error}"))),
    }
}

/// Hands the hints over.
///
/// # Errors
/// [`CliError::File`], and what the daemon's answers can be.
pub(crate) async fn apply(client: &mut Client, args: &HintsArgs) -> Result<Report, CliError> {
    let message = v1::ApplyHintsRequest {
        session_id: args.session.clone().unwrap_or_default(),
        program_id: args.program.clone().unwrap_or_default(),
        envelope: None,
        envelope_json: envelope(args)?,
        ttl_ms: args.ttl.map(millis).unwrap_or_default(),
    };
    Ok(report(&client.apply_hints(message).await?))
}

/// Complete when every action is done or taken on.
fn report(reply: &v1::ApplyHintsReply) -> Report {
    let hint = |h: &v1::HintOutcome| Hint {
        action_id: h.action_id.clone(),
        action_type: h.action_type.clone(),
        outcome: outcome_text(h.outcome),
        reason: h.reason.clone(),
    };
    let applied = Applied { outcomes: reply.outcomes.iter().map(hint).collect() };
    let columns = [("ACTION", Align::Left), ("TYPE", Align::Left), ("OUTCOME", Align::Left), ("REASON", Align::Left)];
    let mut table = Table::new(&columns);
    applied.outcomes.iter().for_each(|h| table.row([&h.action_id, &h.action_type, &h.outcome, &h.reason]));
    let text = if table.is_empty() { "the envelope has no actions\n".to_owned() } else { table.render(0) };
    Report::new(text, &applied, reply.outcomes.iter().all(|h| is_done(h.outcome())))
}
