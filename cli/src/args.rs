//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use kvtier_types::Tier;

use crate::address::Address;
use crate::keys::KeyArg;
use crate::units::parse_duration;

/// Ask a node's kvtierd what it holds and tell it what to drop; check what the machine offers.
#[derive(Debug, Parser)]
#[command(name = "kvtier", version, arg_required_else_help = true)]
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
    Status,
    /// Where blocks lie.
    Locate {
        /// Block keys: 64 hexadecimal digits, or the first 8 or more.
        #[arg(required = true)]
        keys: Vec<KeyArg>,
    },
    /// The nodes of the cluster, as the daemon knows them.
    Nodes,
    /// Give what only one node holds to other nodes or the object store, and let it take nothing more: before it leaves.
    Drain {
        /// The node's id, as `kvtier nodes` shows it; may be another than the daemon asked.
        node: String,
        /// How long it may take: what is left then is reported.
        #[arg(long, value_parser = parse_duration, default_value = "10m")]
        deadline: Duration,
    },
    /// The blocks of this node.
    Ls {
        /// Only blocks with a copy in this tier: device, host, disk or object.
        #[arg(long)]
        tier: Option<Tier>,
        /// Only blocks of models whose name contains this.
        #[arg(long)]
        model: Option<String>,
        /// Print at most this many blocks.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Drop blocks; what is dropped does not come back after a crash.
    Evict(EvictArgs),
    /// What this machine offers kvtierd, and what to change. Needs no daemon.
    Doctor {
        /// Read /proc, /sys and /dev below this directory: a host's root mounted into a container.
        #[arg(long, default_value = "/")]
        root: PathBuf,
        /// The daemon's disk tier: checked for space and direct I/O.
        #[arg(long, default_value = "/var/lib/kvtier")]
        data_dir: PathBuf,
    },
}

/// Which blocks to drop, and where.
#[derive(Debug, clap::Args)]
pub struct EvictArgs {
    /// Block keys: 64 hexadecimal digits, or the first 8 or more.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub keys: Vec<KeyArg>,
    /// Every block (of the given tiers).
    #[arg(long)]
    pub all: bool,
    /// Only the copies in this tier: device, host, disk or object. May be given several times; all tiers without it.
    #[arg(long = "tier")]
    pub tiers: Vec<Tier>,
    /// Say what would be dropped, and drop nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Confirms --all.
    #[arg(long)]
    pub yes: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

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
        assert_eq!(evict.keys.len(), 2);
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
}
