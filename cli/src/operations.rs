//! `kvtier operations`, `wait` and `cancel`: long work, its progress and its end.
//!
//! *Cancellation*: a wait that is broken off (Ctrl-C, `--wait`, `--for`) leaves the operation as it is; only `cancel` ends it.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use kvtier_proto::v1;
use serde::Serialize;

use crate::client::Client;
use crate::error::CliError;
use crate::outcomes::Outcomes;
use crate::report::Report;
use crate::table::{Align, Table, printable};
use crate::units::{bytes_text, duration_text, millis_32};

/// One call's wait on a terminal: how often the bar moves.
const BAR_STEP: Duration = Duration::from_millis(250);
/// One call's wait where nobody looks.
const QUIET_STEP: Duration = Duration::from_secs(10);
/// Cells of the progress bar.
const BAR_CELLS: u64 = 30;

/// An operation as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Operation {
    operation_id: String,
    verb: String,
    state: String,
    total: u64,
    done: u64,
    failed: u64,
    bytes: u64,
    age_ms: u64,
    /// Of those that failed, the first few.
    failures: Outcomes,
}

impl From<&v1::Operation> for Operation {
    fn from(wire: &v1::Operation) -> Self {
        Self {
            operation_id: wire.operation_id.clone(),
            verb: wire.verb.clone(),
            state: state_text(wire.state),
            total: wire.total,
            done: wire.done,
            failed: wire.failed,
            bytes: wire.bytes,
            age_ms: wire.age_ms,
            failures: Outcomes::new(&wire.failures, &[], &[]),
        }
    }
}

fn state_text(value: i32) -> String {
    v1::OperationState::try_from(value).map_or_else(|_| format!("STATE {value}"), |s| s.as_str_name().to_owned())
}

/// True when it came to its end and nothing failed.
pub(crate) fn succeeded(operation: &v1::Operation) -> bool {
    operation.state() == v1::OperationState::Done && operation.failed == 0
}

/// The operations, or one of them.
///
/// # Errors
/// What the daemon's answers can be.
pub(crate) async fn show(client: &mut Client, id: Option<&str>) -> Result<Report, CliError> {
    if let Some(id) = id {
        let operation = client.get_operation(asked(id)).await?;
        return Ok(one(&operation, operation.state() == v1::OperationState::Running || succeeded(&operation)));
    }
    let reply = client.list_operations(v1::ListOperationsRequest {}).await?;
    let operations: Vec<Operation> = reply.operations.iter().map(Operation::from).collect();
    #[derive(Serialize)]
    struct Listed {
        operations: Vec<Operation>,
    }
    let text = if operations.is_empty() { "no operations\n".to_owned() } else { table(&operations).render(0) };
    Ok(Report::new(text, &Listed { operations }, true))
}

fn asked(id: &str) -> v1::OperationRequest {
    v1::OperationRequest { operation_id: id.to_owned(), wait_ms: 0 }
}

/// Gives an operation up.
///
/// # Errors
/// What the daemon's answers can be.
pub(crate) async fn cancel(client: &mut Client, id: &str) -> Result<Report, CliError> {
    let operation = client.cancel_operation(asked(id)).await?;
    Ok(one(&operation, operation.state() == v1::OperationState::Cancelled))
}

/// Waits for the end of an operation.
///
/// # Errors
/// What the daemon's answers can be.
pub(crate) async fn wait(client: &mut Client, id: &str, at_most: Option<Duration>) -> Result<Report, CliError> {
    let operation = follow(client, id, at_most).await?;
    Ok(one(&operation, succeeded(&operation)))
}

/// Follows an operation to its end, for `at_most`, or until Ctrl-C; with a progress bar when standard error is a terminal.
///
/// # Errors
/// What the daemon's answers can be.
pub(crate) async fn follow(
    client: &mut Client,
    id: &str,
    at_most: Option<Duration>,
) -> Result<v1::Operation, CliError> {
    let bar = std::io::stderr().is_terminal();
    let ended = tokio::select! {
        ended = to_its_end(client.clone(), id, at_most, bar) => ended,
        Ok(()) = tokio::signal::ctrl_c() => client.get_operation(asked(id)).await,
    };
    if bar {
        draw("");
    }
    ended
}

async fn to_its_end(
    mut client: Client,
    id: &str,
    at_most: Option<Duration>,
    bar: bool,
) -> Result<v1::Operation, CliError> {
    let began = Instant::now();
    loop {
        let left = at_most.map_or(Duration::MAX, |limit| limit.saturating_sub(began.elapsed()));
        // The wire's zero is the daemon's own limit.
        let step = left.min(if bar { BAR_STEP } else { QUIET_STEP }).max(Duration::from_millis(1));
        let message = v1::OperationRequest { operation_id: id.to_owned(), wait_ms: millis_32(step) };
        let operation = client.wait_operation(message).await?;
        if operation.state() != v1::OperationState::Running || left.is_zero() {
            return Ok(operation);
        }
        if bar {
            draw(&progress(&operation));
        }
    }
}

/// Replaces the bar's line; a terminal that takes no bar does without.
fn draw(line: &str) {
    let mut out = std::io::stderr().lock();
    let drawn = write!(out, "\r\x1b[K{line}").and_then(|()| out.flush());
    drop(drawn);
}

fn progress(operation: &v1::Operation) -> String {
    let (total, ended) = (operation.total, operation.done.saturating_add(operation.failed));
    let filled = (BAR_CELLS * ended.min(total)).checked_div(total).unwrap_or(0);
    let bar: String = (0..BAR_CELLS).map(|cell| if cell < filled { '#' } else { '.' }).collect();
    let failed = if operation.failed > 0 { format!(", {} failed", operation.failed) } else { String::new() };
    format!(
        "{} [{bar}] {}/{total} blocks{failed}  {}  {}",
        printable(&operation.verb),
        operation.done,
        bytes_text(operation.bytes),
        duration_text(Duration::from_millis(operation.age_ms))
    )
}

fn one(wire: &v1::Operation, complete: bool) -> Report {
    let operation = Operation::from(wire);
    Report::new(text(&operation), &operation, complete)
}

/// An operation, what of it failed, and what to do while it goes on.
pub(crate) fn text(operation: &Operation) -> String {
    let table = table(std::slice::from_ref(operation)).render(0);
    let running = operation.state == v1::OperationState::Running.as_str_name();
    let more = if running { goes_on(&operation.operation_id) } else { String::new() };
    table + &operation.failures.rows(|_| false) + &more
}

/// What to do about an operation that is not at its end.
pub(crate) fn goes_on(id: &str) -> String {
    let id = printable(id);
    format!("it goes on: `kvtier wait {id}` waits for its end, `kvtier cancel {id}` gives it up\n")
}

fn table(operations: &[Operation]) -> Table {
    let mut table = Table::new(&[
        ("OPERATION", Align::Left),
        ("VERB", Align::Left),
        ("STATE", Align::Left),
        ("BLOCKS", Align::Right),
        ("DONE", Align::Right),
        ("FAILED", Align::Right),
        ("BYTES", Align::Right),
        ("AGE", Align::Right),
    ]);
    for o in operations {
        let numbers = [o.total, o.done, o.failed].map(|n| n.to_string());
        let (bytes, age) = (bytes_text(o.bytes), duration_text(Duration::from_millis(o.age_ms)));
        let [total, done, failed] = &numbers;
        table.row([&o.operation_id, &o.verb, &o.state, total, done, failed, &bytes, &age]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_fills_with_what_ended() {
        let operation =
            |total, done, failed| v1::Operation { verb: "move".into(), total, done, failed, ..Default::default() };
        assert!(
            progress(&operation(4, 1, 1)).starts_with("move [###############...............] 1/4 blocks, 1 failed")
        );
        assert!(progress(&operation(0, 0, 0)).contains("[..............................] 0/0 blocks "));
        assert!(progress(&operation(1, 9, 0)).contains("[##############################]"));
    }
}
