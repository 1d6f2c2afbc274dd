//! The arguments of verbs that change what the daemon keeps, where, and for how long.

use std::path::PathBuf;
use std::time::Duration;

use kvtier_types::{SemanticType, Taint, Tier};

use super::target::{TargetArgs, required, required_or_all};
use crate::parse::{SignalKind, TaintPattern, parse_semantic};
use crate::units::{parse_duration, parse_ttl};

/// Which blocks to drop, and where.
#[derive(Debug, clap::Args)]
#[command(group = required_or_all())]
pub struct EvictArgs {
    /// Which blocks.
    #[command(flatten)]
    pub targets: TargetArgs,
    /// Every block of this node (of the given tiers).
    #[arg(long, conflicts_with_all = ["keys", "keys_file", "session", "program", "tokens_file", "everywhere"])]
    pub all: bool,
    /// Only the copies in this tier: device, host, disk or object. May be given several times; all tiers without it.
    #[arg(long = "tier")]
    pub tiers: Vec<Tier>,
    /// On every node of the cluster, not only on the one asked.
    #[arg(long)]
    pub everywhere: bool,
    /// Say what would be dropped, and drop nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Confirms --all.
    #[arg(long)]
    pub yes: bool,
}

/// What to do about the end of the operation that a verb began.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct EndArgs {
    /// Wait at most so long for the operation's end: 500ms, 30s, 10m; to its end without it.
    #[arg(long, value_name = "SPAN", value_parser = parse_ttl, conflicts_with = "no_wait")]
    pub wait: Option<Duration>,
    /// Print the operation's id and do not wait for its end.
    #[arg(long)]
    pub no_wait: bool,
}

/// Where to move blocks.
#[derive(Debug, clap::Args)]
#[command(group = required())]
pub struct MoveArgs {
    /// Which blocks.
    #[command(flatten)]
    pub targets: TargetArgs,
    /// The tier in which their fastest copy shall lie: device, host, disk or object.
    #[arg(long, value_name = "TIER")]
    pub to: Tier,
    /// Say what would be moved, and move nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// What to do about its end.
    #[command(flatten)]
    pub end: EndArgs,
}

/// What to bring up.
#[derive(Debug, clap::Args)]
#[command(group = required())]
pub struct PrefetchArgs {
    /// Which blocks.
    #[command(flatten)]
    pub targets: TargetArgs,
    /// Where to: host or device.
    #[arg(long, value_name = "TIER", default_value = "host")]
    pub to: Tier,
    /// When it is given up.
    #[arg(long, value_name = "SPAN", value_parser = parse_duration, default_value = "30s")]
    pub deadline: Duration,
    /// What to do about its end.
    #[command(flatten)]
    pub end: EndArgs,
}

/// What to copy to other nodes.
#[derive(Debug, clap::Args)]
#[command(group = required())]
pub struct ReplicateArgs {
    /// Which blocks.
    #[command(flatten)]
    pub targets: TargetArgs,
    /// Copies on other nodes that there shall be.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub copies: u32,
    /// On this node, as `kvtier nodes` shows it. May be given several times; the roomiest without it.
    #[arg(long = "node", value_name = "NODE")]
    pub nodes: Vec<String>,
    /// When it is given up; the daemon's own limit without it.
    #[arg(long, value_name = "SPAN", value_parser = parse_duration)]
    pub deadline: Option<Duration>,
    /// What to do about its end.
    #[command(flatten)]
    pub end: EndArgs,
}

/// What to commit.
#[derive(Debug, clap::Args)]
#[command(group = required())]
pub struct CheckpointArgs {
    /// Which blocks.
    #[command(flatten)]
    pub targets: TargetArgs,
    /// How long the call waits for the copies; then the work goes on as an operation.
    #[arg(long, value_name = "SPAN", value_parser = parse_duration, default_value = "30s")]
    pub deadline: Duration,
    /// What to do about its end.
    #[command(flatten)]
    pub end: EndArgs,
}

/// Which claim, and whose.
#[derive(Debug, clap::Args)]
pub struct ClaimArgs {
    /// The claim's name among those of its owner.
    #[arg(long, value_name = "NAME")]
    pub claim: String,
    /// Who asks: budgets are per owner.
    #[arg(long, default_value = "operator", env = "KVTIER_OWNER")]
    pub owner: String,
    /// A later revision replaces the claim, the same one again is a DUPLICATE, an earlier one is REJECTED. The time now,
    /// in milliseconds, without it.
    #[arg(long, value_name = "N")]
    pub revision: Option<u64>,
}

/// What to pin.
#[derive(Debug, clap::Args)]
#[command(group = required())]
pub struct PinArgs {
    /// Which blocks.
    #[command(flatten)]
    pub targets: TargetArgs,
    /// The claim.
    #[command(flatten)]
    pub claim: ClaimArgs,
    /// The tier in which they shall stay; slower copies stay too.
    #[arg(long, default_value = "host")]
    pub tier: Tier,
    /// For how long: 30s, 10m, 2h, 7d; as long as the daemon allows without it.
    #[arg(long, value_name = "SPAN", value_parser = parse_ttl)]
    pub ttl: Option<Duration>,
    /// Say what would be pinned, and pin nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// What to let go.
#[derive(Debug, clap::Args)]
pub struct UnpinArgs {
    /// Which blocks: all of the claim without any.
    #[command(flatten)]
    pub targets: TargetArgs,
    /// The claim.
    #[command(flatten)]
    pub claim: ClaimArgs,
}

/// What to retain.
#[derive(Debug, clap::Args)]
#[command(group = required())]
pub struct RetainArgs {
    /// Which blocks.
    #[command(flatten)]
    pub targets: TargetArgs,
    /// The claim.
    #[command(flatten)]
    pub claim: ClaimArgs,
    /// From 0, first to go, to 100.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub priority: u32,
    /// For how long: 30s, 10m, 2h, 7d; as long as the daemon allows without it.
    #[arg(long, value_name = "SPAN", value_parser = parse_ttl)]
    pub ttl: Option<Duration>,
    /// Say what would be retained, and retain nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// What to mark, and how.
#[derive(Debug, clap::Args)]
#[command(group = required())]
#[command(group = clap::ArgGroup::new("mark").required(true).multiple(true).args(["taints", "semantic"]))]
pub struct TaintArgs {
    /// Which blocks.
    #[command(flatten)]
    pub targets: TargetArgs,
    /// key=value:Effect or key:Effect, with NoOffload, NoReplicate, NoEvict, PreferEvict, AlwaysReplicate, NoServe or
    /// Ephemeral(30s). May be given several times.
    #[arg(long = "taint", value_name = "TAINT")]
    pub taints: Vec<Taint>,
    /// The blocks' new semantic type, such as tool-result.
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_semantic)]
    pub semantic: Option<SemanticType>,
}

/// What to unmark.
#[derive(Debug, clap::Args)]
#[command(group = required())]
pub struct UntaintArgs {
    /// Which blocks.
    #[command(flatten)]
    pub targets: TargetArgs,
    /// Taints to take off: key, key=value, key:Effect or key=value:Effect. May be given several times.
    #[arg(long = "taint", value_name = "TAINT", required = true)]
    pub taints: Vec<TaintPattern>,
}

/// What a program does.
#[derive(Debug, clap::Args)]
pub struct SignalArgs {
    /// The program's id.
    pub program: String,
    /// tool-wait, continuation, fork, join, compaction, completion or cancellation.
    pub kind: SignalKind,
    /// The program that started it.
    #[arg(long, value_name = "PROGRAM")]
    pub parent: Option<String>,
    /// A child of a fork or a join. May be given several times.
    #[arg(long = "child", value_name = "PROGRAM")]
    pub children: Vec<String>,
    /// When a waiting program is expected to go on.
    #[arg(long, value_name = "SPAN", value_parser = parse_ttl)]
    pub expected_resume: Option<Duration>,
    /// Whose program it is. Operators only.
    #[arg(long)]
    pub tenant: Option<String>,
}

/// Hints for requests that are still to come.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("whose").required(true).multiple(true).args(["session", "program"]))]
pub struct HintsArgs {
    /// The `kv_hints` envelope as JSON; - is standard input.
    pub file: PathBuf,
    /// For requests of this session.
    #[arg(long, value_name = "ID")]
    pub session: Option<String>,
    /// For requests of this program.
    #[arg(long, value_name = "ID")]
    pub program: Option<String>,
    /// How long they wait for a request; 10 minutes without it.
    #[arg(long, value_name = "SPAN", value_parser = parse_ttl)]
    pub ttl: Option<Duration>,
}
