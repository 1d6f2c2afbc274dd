//! `kvtier events`: block events as they happen, over the daemon's restarts.
//!
//! *Bounds*: the pause between two attempts grows from [`FIRST_PAUSE`] to [`LAST_PAUSE`]; attempts go on until somebody
//! ends the command, since a daemon that comes back is what it waits for.

use std::io::Write;
use std::time::Duration;

use kvtier_proto::v1;
use serde::Serialize;
use serde_json::json;
use tonic::Code;

use crate::args::EventsArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::keys::short;
use crate::parse::EventKind;
use crate::report::Report;
use crate::status::tier_text;
use crate::table::printable;
use crate::units::bytes_text;

/// First pause before the daemon is asked again.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause between two attempts.
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// An event as a line of JSON.
#[derive(Debug, Serialize)]
struct Event<'a> {
    incarnation: u64,
    sequence: u64,
    kind: String,
    key: String,
    tier: String,
    semantic: &'a str,
    program_id: &'a str,
    reason: &'a str,
    bytes: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    step_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    graph: &'a str,
}

/// Writes events to `out` as lines until the wanted number came, or nobody reads them any more.
///
/// # Errors
/// [`CliError`] when the daemon cannot be asked at all; once it answered, its absence is waited out.
pub(crate) async fn watch(
    client: &mut Client,
    args: &EventsArgs,
    as_json: bool,
    out: &mut impl Write,
) -> Result<Report, CliError> {
    let mut printer = Printer { out, as_json, left: args.count };
    let mut request = v1::WatchRequest {
        incarnation: args.after.map_or(0, |p| p.incarnation),
        after_sequence: args.after.map_or(0, |p| p.sequence),
        kinds: args.kinds.iter().map(|kind| kind.0.into()).collect(),
        model_contains: args.model.clone().unwrap_or_default(),
    };
    let mut pause = FIRST_PAUSE;
    let mut answered = false;
    loop {
        match listen(client, &mut request, &mut printer, &mut answered).await {
            Ok(Heard::Enough) => return Ok(Report::printed()),
            Ok(Heard::Something) => pause = FIRST_PAUSE,
            Ok(Heard::Nothing) => {}
            Err(error) if !answered || !mended_by_restart(&error) => return Err(error),
            Err(_) => {}
        }
        if pause == FIRST_PAUSE {
            eprintln!("kvtier: the daemon went away: trying again");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// How a stream ended.
enum Heard {
    /// All that was wanted.
    Enough,
    /// It broke after some answers.
    Something,
    /// It broke at once.
    Nothing,
}

/// One stream, to its end; `request` moves on with what was heard.
async fn listen<W: Write>(
    client: &mut Client,
    request: &mut v1::WatchRequest,
    printer: &mut Printer<'_, W>,
    answered: &mut bool,
) -> Result<Heard, CliError> {
    let mut stream = client.watch(request.clone()).await?;
    *answered = true;
    let mut heard = Heard::Nothing;
    loop {
        let reply = match client.next_events(&mut stream).await {
            Ok(Some(reply)) => reply,
            Ok(None) => return Ok(heard),
            Err(error) if mended_by_restart(&error) => return Ok(heard),
            Err(error) => return Err(error),
        };
        heard = Heard::Something;
        (request.incarnation, request.after_sequence) = (reply.incarnation, reply.sequence);
        if !printer.print(&reply) {
            return Ok(Heard::Enough);
        }
    }
}

/// True for what a restart of the daemon mends: a stream that breaks ends with any of these.
fn mended_by_restart(error: &CliError) -> bool {
    let broken = |code| matches!(code, Code::Cancelled | Code::Unknown | Code::Internal);
    error.may_pass() || matches!(error, CliError::Refused { status, .. } if broken(status.code()))
}

/// Where lines go.
struct Printer<'a, W> {
    out: &'a mut W,
    as_json: bool,
    /// Events still wanted; all when `None`.
    left: Option<u64>,
}

impl<W: Write> Printer<'_, W> {
    /// Prints what there is in a reply; false when no more is wanted.
    fn print(&mut self, reply: &v1::WatchReply) -> bool {
        if reply.lost && !self.line(&lost(reply, self.as_json)) {
            return false;
        }
        for event in &reply.events {
            if self.left == Some(0) {
                return false;
            }
            let line = if self.as_json { json_line(reply.incarnation, event) } else { text_line(event) };
            // A reader that closed the pipe has had all it wanted.
            if !self.line(&line) {
                return false;
            }
            self.left = self.left.map(|left| left - 1);
        }
        self.left != Some(0) && self.out.flush().is_ok()
    }

    fn line(&mut self, line: &str) -> bool {
        writeln!(self.out, "{line}").and_then(|()| self.out.flush()).is_ok()
    }
}

fn lost(reply: &v1::WatchReply, as_json: bool) -> String {
    if as_json {
        return json!({ "lost": true, "incarnation": reply.incarnation, "sequence": reply.sequence }).to_string();
    }
    "-- events were lost here: `kvtier ls` lists what there is --".to_owned()
}

fn kind_text(value: i32) -> String {
    v1::EventKind::try_from(value).map_or_else(|_| format!("KIND {value}"), |kind| EventKind::name(kind).to_owned())
}

fn json_line(incarnation: u64, event: &v1::BlockEvent) -> String {
    let semantic = kvtier_proto::convert::semantic(event.semantic);
    let line = Event {
        incarnation,
        sequence: event.sequence,
        kind: kind_text(event.kind),
        key: hex::encode(&event.key),
        tier: if event.tier == 0 { String::new() } else { tier_text(event.tier) },
        semantic: semantic.name(),
        program_id: &event.program_id,
        reason: &event.reason,
        bytes: event.bytes,
        step_id: &event.step_id,
        graph: &event.graph,
    };
    serde_json::to_string(&line).unwrap_or_default()
}

fn text_line(event: &v1::BlockEvent) -> String {
    let tier = if event.tier == 0 { "-".to_owned() } else { tier_text(event.tier) };
    let of_step = || format!("  {} of {}", printable(&event.step_id), printable(&event.graph));
    let step = if event.step_id.is_empty() { String::new() } else { of_step() };
    let line = format!(
        "{:>8}  {:<13}  {:<18}  {tier:<6}  {:>10}  {:<20}  {}  {}{}",
        event.sequence,
        kind_text(event.kind),
        printable(&short(&event.key)),
        bytes_text(event.bytes),
        kvtier_proto::convert::semantic(event.semantic).name(),
        printable(&event.program_id),
        printable(&event.reason),
        step
    );
    line.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(sequence: u64) -> v1::BlockEvent {
        v1::BlockEvent {
            sequence,
            kind: v1::EventKind::BlockRemoved.into(),
            key: vec![0xab; 32].into(),
            tier: v1::Tier::Host.into(),
            semantic: v1::SemanticType::Scratchpad.into(),
            reason: "evicted\u{1b}".into(),
            bytes: 4096,
            ..v1::BlockEvent::default()
        }
    }

    fn printed(reply: &v1::WatchReply, as_json: bool, left: Option<u64>) -> (String, bool) {
        let mut out = Vec::new();
        let more = Printer { out: &mut out, as_json, left }.print(reply);
        (String::from_utf8(out).unwrap(), more)
    }

    #[test]
    fn an_event_is_a_line() {
        let reply = v1::WatchReply { incarnation: 3, sequence: 8, lost: true, events: vec![event(7), event(8)] };
        let (text, more) = printed(&reply, false, None);
        assert!(more);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].contains("events were lost"), "{text}");
        assert_eq!(
            lines[1],
            "       7  REMOVED        abababababababab..  host       4.0 KiB  SCRATCHPAD            -  evicted?"
        );
        let (text, more) = printed(&reply, true, Some(1));
        assert!(!more);
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!((&last["sequence"], &last["kind"], &last["tier"]), (&json!(7), &json!("REMOVED"), &json!("host")));
    }

    #[test]
    fn only_what_a_restart_mends_is_waited_out() {
        let refused = |code| CliError::Refused { verb: "events", status: Box::new(tonic::Status::new(code, "")) };
        assert!(mended_by_restart(&refused(Code::Unavailable)));
        assert!(!mended_by_restart(&refused(Code::PermissionDenied)));
        assert!(!mended_by_restart(&refused(Code::InvalidArgument)));
        assert!(!mended_by_restart(&CliError::Unknown { verb: "events", words: String::new() }));
    }
}
