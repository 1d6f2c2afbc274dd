//! From a command line to a report.

use crate::args::{Args, Command, GraphCommand, RulesCommand};
use crate::client::Client;
use crate::error::CliError;
use crate::report::Report;
use crate::{
    capabilities, claims, doctor, drain, events, evict, graphs, hints, locate, ls, movement, nodes, operations, place,
    programs, rules, rules_check, status, taint, top,
};

/// Runs the command.
///
/// # Errors
/// [`CliError`] when it did not run to its end; a command that ran but left targets undone is a [`Report`].
pub async fn run(args: &Args) -> Result<Report, CliError> {
    plausible(&args.command)?;
    match &args.command {
        Command::Doctor { root, data_dir } => {
            let mut findings = doctor::examine(root, data_dir);
            findings.extend(doctor::daemon(&args.address, args.timeout).await);
            Ok(doctor::report(&findings))
        }
        Command::Rules { command: Some(RulesCommand::Check { file }) } => rules_check::check(file),
        Command::Graph { command: GraphCommand::Declare(what) } if what.dry_run => graphs::dry_run(what),
        _ => ask(args, &mut Client::connect(&args.address, args.timeout).await?).await,
    }
}

/// Finds what is wrong with a command line before anything is asked of the daemon.
fn plausible(command: &Command) -> Result<(), CliError> {
    match command {
        Command::Evict(what) => evict::confirmed(what),
        Command::Claims(what) => claims::confirmed(what),
        Command::Signal(what) => programs::plausible(what),
        Command::ApplyHints(what) if what.file.as_os_str() != "-" => hints::envelope(what).map(drop),
        _ => Ok(()),
    }
}

async fn ask(args: &Args, client: &mut Client) -> Result<Report, CliError> {
    match &args.command {
        Command::Status => Ok(status::report(&client.status().await?)),
        Command::Top(how) => top::top(client, how, args.json).await,
        Command::Nodes => Ok(nodes::report(&client.nodes().await?)),
        Command::Drain { node, deadline } => drain::drain(client, node, *deadline).await,
        Command::Locate(what) => locate::locate(client, what).await,
        Command::Ls(filter) => ls::ls(client, filter).await,
        Command::Programs { limit } => programs::list(client, *limit).await,
        Command::Events(what) => events::watch(client, what, args.json, &mut std::io::stdout()).await,
        Command::Next(what) => graphs::next(client, what).await,
        Command::Capabilities => Ok(capabilities::report(&client.capabilities(Default::default()).await?)),
        Command::Operations { id } => operations::show(client, id.as_deref()).await,
        Command::Wait(what) => operations::wait(client, &what.id, what.at_most).await,
        Command::Rules { command } => rules::rules(client, command.as_ref()).await,
        Command::Claims(what) => claims::claims(client, what).await,
        Command::Place(what) => place::place(client, what).await,
        changing => change(changing, client).await,
    }
}

/// The verbs that change something.
async fn change(command: &Command, client: &mut Client) -> Result<Report, CliError> {
    match command {
        Command::Evict(what) => evict::evict(client, what).await,
        Command::Pin(what) => claims::pin(client, what).await,
        Command::Unpin(what) => claims::unpin(client, what).await,
        Command::Retain(what) => claims::retain(client, what).await,
        Command::Move(what) => movement::to_tier(client, what).await,
        Command::Prefetch(what) => movement::prefetch(client, what).await,
        Command::Replicate(what) => movement::replicate(client, what).await,
        Command::CommitCheckpoint(what) => movement::commit(client, what).await,
        Command::Taint(what) => taint::taint(client, what).await,
        Command::Untaint(what) => taint::untaint(client, what).await,
        Command::Signal(what) => programs::signal(client, what).await,
        Command::Graph { command } => graphs::graph(client, command).await,
        Command::ApplyHints(what) => hints::apply(client, what).await,
        Command::Cancel { id } => operations::cancel(client, id).await,
        other => unreachable!("{other:?} is answered by another function"),
    }
}
