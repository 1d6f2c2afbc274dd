//! The arguments of commands that show what there is, and of those about operations and rules.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use kvtier_types::{SemanticType, Tier};

use super::target::{TargetArgs, required};
use crate::keys::KeyArg;
use crate::parse::{EventKind, Position, parse_semantic};
use crate::units::{parse_duration, parse_ttl};

/// Which blocks to look for.
#[derive(Debug, clap::Args)]
#[command(group = required())]
pub struct LocateArgs {
    /// Which blocks.
    #[command(flatten)]
    pub targets: TargetArgs,
}

/// Which blocks to list.
#[derive(Debug, clap::Args)]
pub struct LsArgs {
    /// Only blocks with a copy in this tier: device, host, disk or object.
    #[arg(long)]
    pub tier: Option<Tier>,
    /// Only blocks of models whose name contains this.
    #[arg(long)]
    pub model: Option<String>,
    /// Only blocks of this semantic type, such as tool-definition.
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_semantic)]
    pub semantic: Option<SemanticType>,
    /// Only blocks that this program wrote or holds.
    #[arg(long, value_name = "ID")]
    pub program: Option<String>,
    /// Only blocks with a taint of this key.
    #[arg(long, value_name = "KEY")]
    pub taint: Option<String>,
    /// Print at most this many blocks.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: u32,
}

/// Which claims.
#[derive(Debug, clap::Args)]
pub struct ClaimsArgs {
    /// Claims to release, by name; all of the owner's without any.
    #[arg(requires = "release")]
    pub claims: Vec<String>,
    /// Only claims of this owner.
    #[arg(long)]
    pub owner: Option<String>,
    /// Only claims of this tenant. Operators only.
    #[arg(long)]
    pub tenant: Option<String>,
    /// End the owner's claims, whoever made them. Operators only.
    #[arg(long, requires = "owner")]
    pub release: bool,
    /// Confirms --release of all claims of an owner.
    #[arg(long)]
    pub yes: bool,
    /// Print at most this many claims.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: u32,
}

/// What to do about the rules.
#[derive(Debug, Subcommand)]
pub enum RulesCommand {
    /// The rules in force, where they come from, and why the last reload was refused if it was.
    Show,
    /// Which rule decided each part of a block's lifecycle.
    Explain {
        /// The block's key: 64 hexadecimal digits, or the first 8 or more.
        block: KeyArg,
    },
    /// Let the daemon read its rules file again; the old rules stay in force when the new ones are not valid.
    Reload,
    /// What is wrong with a rules file, and where. Needs no daemon.
    Check {
        /// The file.
        file: PathBuf,
    },
}

/// Which events.
#[derive(Debug, clap::Args)]
pub struct EventsArgs {
    /// Only events of this kind: stored, removed, tainted, claimed, released, program-ended, corrupt. May be given
    /// several times.
    #[arg(long = "kind", value_name = "KIND")]
    pub kinds: Vec<EventKind>,
    /// Only events of models whose name contains this.
    #[arg(long)]
    pub model: Option<String>,
    /// Go on after this event: INCARNATION:SEQUENCE, as --json shows them. From now on without it.
    #[arg(long, value_name = "POSITION")]
    pub after: Option<Position>,
    /// End after so many events.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
}

/// How to wait for an operation.
#[derive(Debug, clap::Args)]
pub struct WaitArgs {
    /// The operation's id, as a verb or `kvtier operations` prints it.
    pub id: String,
    /// Wait at most so long; to its end without it.
    #[arg(long = "for", value_name = "SPAN", value_parser = parse_ttl)]
    pub at_most: Option<Duration>,
}

/// How to draw the live view.
#[derive(Debug, clap::Args)]
pub struct TopArgs {
    /// Time between two looks.
    #[arg(long, value_parser = parse_duration, default_value = "2s")]
    pub interval: Duration,
    /// Print one frame and end; needs no terminal.
    #[arg(long)]
    pub once: bool,
}
