//! The command line.

mod graphs;
mod place;
mod shows;
mod target;
mod verbs;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::address::Address;
use crate::units::parse_duration;

pub use graphs::{DeclareArgs, GraphCommand, NextArgs};
pub use place::{BadCandidate, CandidateArg, PlaceArgs};
pub use shows::{ClaimsArgs, EventsArgs, LocateArgs, LsArgs, RulesCommand, TopArgs, WaitArgs};
pub use target::{BadSpan, Span, TargetArgs};
pub use verbs::{
    CheckpointArgs, ClaimArgs, EndArgs, EvictArgs, HintsArgs, MoveArgs, PinArgs, PrefetchArgs, ReplicateArgs,
    RetainArgs, SignalArgs, TaintArgs, UnpinArgs, UntaintArgs,
};

/// Ask a node's kvtierd what it holds, tell it what to keep, move, mark or drop, and check what the machine offers.
#[derive(Debug, Parser)]
#[command(name = "kvtier", version, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed or some target was not done, 2 wrong usage, 3 no daemon answered."
)]
pub struct Args {
    /// The daemon: unix:///path/to/kvtierd.sock or http://host:port.
    #[arg(long, global = true, env = "KVTIER_ADDRESS", default_value_t = Address::of_this_user())]
    pub address: Address,
    /// How long one call to the daemon may take: 500ms, 5s, 2m.
    #[arg(long, global = true, default_value = "5s", value_parser = parse_duration)]
    pub timeout: Duration,
    /// Print JSON instead of tables.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tiers, attached engines, what became of looked-up tokens.
    #[command(after_help = "Example:\n  kvtier status --json")]
    Status,
    /// A live view: tiers, types, hit rates, transfers, programs, claims.
    #[command(after_help = "q ends it. Examples:\n  kvtier top --interval 1s\n  kvtier top --once")]
    Top(TopArgs),
    /// Where blocks lie, and what is known of them.
    #[command(after_help = "Examples:\n  kvtier locate 0f3a9c21\n  kvtier locate --session chat-7 --tokens 0..2048")]
    Locate(LocateArgs),
    /// The blocks of this node.
    #[command(after_help = "Example:\n  kvtier ls --tier host --type tool-definition --limit 20")]
    Ls(LsArgs),
    /// The programs that this node knows, and what they hold.
    #[command(after_help = "Example:\n  kvtier programs")]
    Programs {
        /// Print at most this many programs.
        #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Block events as they happen; goes on by itself when the daemon restarts.
    #[command(after_help = "Examples:\n  kvtier events --kind stored --kind removed\n  kvtier events --json | jq .key")]
    Events(EventsArgs),
    /// What this kvtierd can do: verbs, tiers, types, effects, bounds.
    #[command(after_help = "Example:\n  kvtier capabilities")]
    Capabilities,
    /// The nodes of the cluster, as the daemon knows them.
    #[command(after_help = "Example:\n  kvtier nodes")]
    Nodes,
    /// Hard claim: blocks are not evicted from a tier before its end, within the owner's budget.
    #[command(after_help = "Example:\n  kvtier pin 0f3a9c21 --claim prompts --ttl 2h")]
    Pin(PinArgs),
    /// End a claim, or take blocks out of it.
    #[command(after_help = "Example:\n  kvtier unpin --claim prompts")]
    Unpin(UnpinArgs),
    /// Soft claim: a priority that eviction reads.
    #[command(after_help = "Example:\n  kvtier retain --session chat-7 --claim chat-7 --priority 80 --ttl 10m")]
    Retain(RetainArgs),
    /// The claims, by owner; or release them.
    #[command(
        after_help = "Examples:\n  kvtier claims --owner operator\n  kvtier claims prompts --owner operator --release"
    )]
    Claims(ClaimsArgs),
    /// Drop blocks; what is dropped does not come back after a crash.
    #[command(
        after_help = "Examples:\n  kvtier evict 0f3a9c21 --tier host\n  kvtier evict --program p-1 --exclusive --everywhere"
    )]
    Evict(EvictArgs),
    /// Move blocks so that their fastest copy lies in a tier.
    #[command(after_help = "Example:\n  kvtier move 0f3a9c21 --to disk")]
    Move(MoveArgs),
    /// Bring blocks up into host memory before they are asked for.
    #[command(after_help = "Example:\n  kvtier prefetch --session chat-7")]
    Prefetch(PrefetchArgs),
    /// Make copies on other nodes.
    #[command(after_help = "Example:\n  kvtier replicate 0f3a9c21 --copies 2")]
    Replicate(ReplicateArgs),
    /// Mark blocks as an execution checkpoint: done once a verified copy of every one exists off this node.
    #[command(after_help = "Example:\n  kvtier commit-checkpoint --program p-1")]
    CommitCheckpoint(CheckpointArgs),
    /// Mark blocks with taints, or say what they mean, on every node that has them.
    #[command(
        after_help = "Examples:\n  kvtier taint 0f3a9c21 --taint secret=pii:NoServe\n  kvtier taint --session chat-7 --type scratchpad"
    )]
    Taint(TaintArgs),
    /// Take taints off blocks.
    #[command(after_help = "Example:\n  kvtier untaint 0f3a9c21 --taint secret")]
    Untaint(UntaintArgs),
    /// Say what a program does.
    #[command(
        after_help = "Examples:\n  kvtier signal p-1 tool-wait --expected-resume 30s\n  kvtier signal p-1 fork --child p-1a --child p-1b"
    )]
    Signal(SignalArgs),
    /// What a program declares that it will do: steps, and what each waits for.
    #[command(
        after_help = "Examples:\n  kvtier graph declare plan.json\n  kvtier graph declare --otel trace.json --dry-run\n  kvtier graph show plan-7"
    )]
    Graph {
        /// What to do about it.
        #[command(subcommand)]
        command: GraphCommand,
    },
    /// The steps that may run now, in the order in which they should.
    #[command(after_help = "Example:\n  kvtier next --program plan-7")]
    Next(NextArgs),
    /// Where to run a program's next step, and what it would cost on each node.
    #[command(
        after_help = "Examples:\n  kvtier place p-1 --current node-2\n  kvtier place p-1 --candidate node-1 --candidate node-2:250:8000 --start"
    )]
    Place(PlaceArgs),
    /// Give hints for requests that are still to come.
    #[command(after_help = "Example:\n  kvtier apply-hints envelope.json --session chat-7")]
    ApplyHints(HintsArgs),
    /// The operations that the daemon works on, or one of them.
    #[command(after_help = "Examples:\n  kvtier operations\n  kvtier operations 7")]
    Operations {
        /// Only this one.
        id: Option<String>,
    },
    /// Wait for the end of an operation.
    #[command(after_help = "Example:\n  kvtier wait 7 --for 2m")]
    Wait(WaitArgs),
    /// Give an operation up; what it has done stays done.
    #[command(after_help = "Example:\n  kvtier cancel 7")]
    Cancel {
        /// The operation's id.
        id: String,
    },
    /// The rules in force; explain a block, reload.
    #[command(
        after_help = "Examples:\n  kvtier rules\n  kvtier rules explain 0f3a9c21\n  kvtier rules check rules.toml\n  kvtier rules reload"
    )]
    Rules {
        /// What to do about them; show them without it.
        #[command(subcommand)]
        command: Option<RulesCommand>,
    },
    /// Give what only one node holds to other nodes or the object store, and let it take nothing more: before it leaves.
    #[command(after_help = "Example:\n  kvtier drain node-3 --deadline 5m")]
    Drain {
        /// The node's id, as `kvtier nodes` shows it; may be another than the daemon asked.
        node: String,
        /// How long it may take: what is left then is reported.
        #[arg(long, value_parser = parse_duration, default_value = "10m")]
        deadline: Duration,
    },
    /// What this machine offers kvtierd, and what to change. Needs no daemon.
    #[command(after_help = "Example:\n  kvtier doctor --root /host")]
    Doctor {
        /// Read /proc, /sys and /dev below this directory: a host's root mounted into a container.
        #[arg(long, default_value = "/")]
        root: PathBuf,
        /// The daemon's disk tier: checked for space and direct I/O.
        #[arg(long, default_value = "/var/lib/kvtier")]
        data_dir: PathBuf,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use kvtier_types::Tier;

    const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from(std::iter::once("kvtier").chain(words.iter().copied()))
    }

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn global_options_stand_on_either_side() {
        let args = parse(&["--json", "status", "--timeout", "500ms", "--address", "http://h:1"]).unwrap();
        assert!(args.json);
        assert_eq!(args.timeout, Duration::from_millis(500));
        assert_eq!(args.address, Address::Http("http://h:1".to_owned()));
    }

    #[test]
    fn evict_wants_keys_or_all() {
        assert!(parse(&["evict"]).is_err());
        assert!(parse(&["evict", "--all", KEY]).is_err());
        let args = parse(&["evict", KEY, "0011aabb", "--tier", "host", "--tier", "disk"]).unwrap();
        let Command::Evict(evict) = args.command else { panic!("not evict") };
        assert_eq!(evict.targets.keys.len(), 2);
        assert_eq!(evict.tiers, [Tier::Host, Tier::Disk]);
    }

    #[test]
    fn wrong_usage_is_code_2() {
        let lines: [&[&str]; 7] = [
            &["locate"],
            &["locate", "xyz"],
            &["ls", "--tier", "tape"],
            &["ls", "--limit", "0"],
            &["status", "--timeout", "5"],
            &["status", "--address", "nowhere"],
            &["frobnicate"],
        ];
        for words in lines {
            assert_eq!(parse(words).unwrap_err().exit_code(), 2, "{words:?}");
        }
    }

    #[test]
    fn targets_may_be_named_in_any_way() {
        let lines: [&[&str]; 5] = [
            &["locate", "--session", "s", "--tokens", "0..16"],
            &["move", "--program", "p", "--descendants", "--exclusive", "--to", "disk"],
            &["prefetch", "--tokens-file", "ids", "--model", "m", "--salt", "x"],
            &["evict", KEY, "--session", "s", "--program", "p", "--tenant", "acme", "--everywhere"],
            &["unpin", "--claim", "c"],
        ];
        for words in lines {
            assert!(parse(words).is_ok(), "{words:?}: {}", parse(words).unwrap_err());
        }
    }

    #[test]
    fn verbs_refuse_what_does_not_go_together() {
        let lines: [&[&str]; 16] = [
            &["move", KEY],
            &["move", "--to", "disk"],
            &["pin", KEY],
            &["retain", KEY, "--claim", "c", "--priority", "101"],
            &["locate", KEY, "--tokens", "0..4"],
            &["locate", KEY, "--descendants"],
            &["locate", "--tokens-file", "f"],
            &["locate", KEY, "--model", "m"],
            &["evict", "--all", "--session", "s"],
            &["evict", "--all", "--everywhere"],
            &["taint", KEY],
            &["taint", KEY, "--taint", "secret"],
            &["untaint", KEY],
            &["signal", "p", "sleep"],
            &["apply-hints", "f"],
            &["claims", "c"],
        ];
        for words in lines {
            assert_eq!(parse(words).unwrap_err().exit_code(), 2, "{words:?}");
        }
    }

    #[test]
    fn every_command_has_an_example() {
        for command in Args::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains(&format!("\n  kvtier {}", command.get_name())), "{}: {help}", command.get_name());
        }
    }
}
