//! From a command line to a report.

use crate::args::{Args, Command};
use crate::client::Client;
use crate::error::CliError;
use crate::report::Report;
use crate::{doctor, drain, evict, locate, ls, nodes, status};

/// Runs the command.
///
/// # Errors
/// [`CliError`] when it did not run to its end; a command that ran but left targets undone is a [`Report`].
pub async fn run(args: &Args) -> Result<Report, CliError> {
    match &args.command {
        Command::Doctor { root, data_dir } => {
            let mut findings = doctor::examine(root, data_dir);
            findings.extend(doctor::daemon(&args.address, args.timeout).await);
            Ok(doctor::report(&findings))
        }
        Command::Status => Ok(status::report(&connect(args).await?.status().await?)),
        Command::Nodes => Ok(nodes::report(&connect(args).await?.nodes().await?)),
        Command::Drain { node, deadline } => drain::drain(&mut connect(args).await?, node, *deadline).await,
        Command::Locate { keys } => locate::locate(&mut connect(args).await?, keys).await,
        Command::Ls { tier, model, limit } => {
            let filter = ls::Filter { tier: *tier, model: model.clone(), limit: *limit };
            ls::ls(&mut connect(args).await?, &filter).await
        }
        Command::Evict(what) => {
            evict::confirmed(what)?;
            evict::evict(&mut connect(args).await?, what).await
        }
    }
}

async fn connect(args: &Args) -> Result<Client, CliError> {
    Client::connect(&args.address, args.timeout).await
}
