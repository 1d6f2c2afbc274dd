//! `kvtier top`: tiers, types, hit rates, transfers, programs and claims of a node, as they change.
//!
//! Without a terminal, with `--once` and with `--json` it looks once, and what is told is since the daemon's start.
//!
//! *Bounds*: [`MAX_PROGRAMS`] programs and one page of claims are asked for; a daemon that goes away is asked again at each
//! look, whatever the interval.

mod change;
mod frame;
mod screen;

use std::future::Future;
use std::io::IsTerminal;
use std::pin::Pin;
use std::time::{Duration, Instant};

use kvtier_proto::v1;

use crate::args::TopArgs;
use crate::client::{Client, PAGE_BLOCKS};
use crate::error::CliError;
use crate::programs;
use crate::report::Report;

use change::Change;
use screen::{Event, Screen};

/// Programs asked for: of more, the largest may not be shown.
const MAX_PROGRAMS: u32 = PAGE_BLOCKS;

/// What one look found.
#[derive(Debug)]
struct Look {
    at: Instant,
    status: v1::StatusReply,
    /// Largest first; an error where this daemon does not tell.
    programs: Result<Vec<v1::Program>, CliError>,
    claims: Result<v1::ListClaimsReply, CliError>,
}

/// Shows the node, live where there is a terminal.
///
/// # Errors
/// What the daemon's answers can be, and [`CliError::Terminal`]; once the view is live, a daemon that is away is shown.
pub(crate) async fn top(client: &mut Client, how: &TopArgs, as_json: bool) -> Result<Report, CliError> {
    let first = look(client.clone()).await?;
    if how.once || as_json || !std::io::stdout().is_terminal() {
        let change = Change::since_start(&first.status);
        return Ok(Report::new(frame::text(&first, &change), &frame::json(&first, &change), true));
    }
    live(client, how.interval, first).await
}

/// One look. What the daemon does not know or does not tell this caller is no failure of the whole.
async fn look(mut client: Client) -> Result<Look, CliError> {
    let status = client.status().await?;
    let at = Instant::now();
    let programs = told(programs::every(&mut client, MAX_PROGRAMS).await)?.map(|(programs, _)| programs);
    let request = v1::ListClaimsRequest { page_size: PAGE_BLOCKS, ..Default::default() };
    let claims = told(client.list_claims(request).await)?;
    Ok(Look { at, status, programs, claims })
}

/// Parts what the daemon refuses from a daemon that does not answer.
fn told<T>(answer: Result<T, CliError>) -> Result<Result<T, CliError>, CliError> {
    match answer {
        Err(error) if error.may_pass() => Err(error),
        answer => Ok(answer),
    }
}

type Looking = Pin<Box<dyn Future<Output = Result<Look, CliError>>>>;

fn look_after(pause: Duration, client: &Client) -> Looking {
    let client = client.clone();
    Box::pin(async move {
        tokio::time::sleep(pause).await;
        look(client).await
    })
}

async fn live(client: &Client, interval: Duration, first: Look) -> Result<Report, CliError> {
    let mut change = Change::since_start(&first.status);
    let (mut now, mut away) = (first, None);
    let mut screen = Screen::open().map_err(CliError::Terminal)?;
    let mut next = look_after(interval, client);
    loop {
        screen.draw(&frame::fitted(&now, &change, away.as_ref(), screen.size())).map_err(CliError::Terminal)?;
        tokio::select! {
            found = &mut next => {
                match found {
                    Ok(found) => {
                        change = Change::between(&now.status, &found.status, found.at.duration_since(now.at));
                        (now, away) = (found, None);
                    }
                    Err(error) if error.may_pass() => away = Some(error),
                    Err(error) => return Err(error),
                }
                next = look_after(interval, client);
            }
            event = screen.event() => match event {
                Event::Quit => return Ok(Report::printed()),
                Event::Look => next = look_after(Duration::ZERO, client),
                Event::Redraw => {}
                Event::Suspend => screen.suspend().map_err(CliError::Terminal)?,
            },
        }
    }
}
