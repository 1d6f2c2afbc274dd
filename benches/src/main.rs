//! `kvtier-bench`: the numbers the data path must reach, each against a baseline or a bound, in one table.
//!
//! ```text
//! transfer   64 blocks of 2 MiB in and out over the C interface and a real daemon   against memcpy of the same buffers
//! lookup     1,000 keys over the socket, and how long the core's lock is held       against bounds
//! disk       the disk tier's writes and reads                                       against a bare io_uring loop
//! catalog    daemon memory per block                                                against a bound
//! start      a large arena, and a restart over a full disk                          against bounds
//! tcp        reads of peers' blocks over loopback                                   against plain sockets
//! ucx        reads of another process's blocks                                      against ucx_perftest
//! directory  1,000 keys located in Valkey or Redis, one server and three            against bounds and a plain multi-get
//! cluster    a prefix written on one node and looked up on another                  against a bound
//! verbs      verbs a second, calls about 10,000 blocks, placements                  shown
//! ```
//! *Fairness*: both sides of a ratio use the same buffers, prefaulted, over at least eight times the last-level cache, with
//! as many threads, in files of the same state, in rounds that alternate. The table has the median of the rounds' ratios and
//! their spread. Checksums are on: they are what the subject does more than the baseline.

mod alternate;
mod catalog;
mod cluster;
mod daemon;
mod directory;
mod disk;
mod engine;
mod frames;
mod lookup;
mod machine;
mod placing;
mod raw;
mod report;
mod session;
mod start;
mod stats;
mod tcp;
mod transfer;
mod ucx;
mod verbs;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, ValueEnum};

use crate::report::Report;

/// Benchmarks of kvtier against their floors.
#[derive(Debug, Parser)]
struct Args {
    /// Fewer samples, and 2 GiB on disk instead of 20.
    #[arg(long)]
    quick: bool,
    /// Exit with 1 when a floor is missed.
    #[arg(long)]
    strict: bool,
    /// Only these; may be given several times.
    #[arg(long, value_enum)]
    only: Vec<Group>,
    /// Where the results go.
    #[arg(long, default_value = "benches/results/cpu.json")]
    out: PathBuf,
    /// Directory for daemons and stores, on the disk to be measured; what is made in it is deleted.
    #[arg(long, default_value = "target")]
    scratch: PathBuf,
    /// Serves frames to another process of this program: UCX's transports, bytes of a frame, frames.
    #[arg(long, hide = true, num_args = 3)]
    ucx_owner: Vec<String>,
}

/// What can be run by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    Catalog,
    Transfer,
    Lookup,
    Disk,
    Start,
    Tcp,
    Ucx,
    Directory,
    Cluster,
    Verbs,
}

/// What every benchmark is given.
#[derive(Debug)]
struct Setting {
    quick: bool,
    /// A directory of its own; deleted at the end.
    scratch: PathBuf,
    llc_bytes: u64,
}

impl Setting {
    /// Bytes that no cache keeps from one round to the next.
    const fn working_set_bytes(&self) -> u64 {
        self.llc_bytes * 8
    }
}

type Bench = fn(&Setting, &mut Report) -> anyhow::Result<()>;

/// The catalog goes first: it measures this process's own growth.
const BENCHES: [(Group, Bench); 10] = [
    (Group::Catalog, catalog::run),
    (Group::Transfer, transfer::run),
    (Group::Lookup, lookup::run),
    (Group::Disk, disk::run),
    (Group::Start, start::run),
    (Group::Tcp, tcp::run),
    (Group::Ucx, ucx::run),
    (Group::Directory, directory::run),
    (Group::Cluster, cluster::run),
    (Group::Verbs, verbs::run),
];

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kvtier-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let [tls, bytes, frames] = args.ucx_owner.as_slice() {
        ucx::own(&ucx::Terms { tls: tls.clone(), block: bytes.parse()?, frames: frames.parse()? })?;
        return Ok(ExitCode::SUCCESS);
    }
    std::fs::create_dir_all(&args.scratch)?;
    let parent = args.scratch.canonicalize()?;
    let scratch = tempfile::Builder::new().prefix("bench-").tempdir_in(parent).context("scratch directory")?;
    let machine = machine::describe();
    println!("{machine}");
    let setting =
        Setting { quick: args.quick, scratch: scratch.path().to_owned(), llc_bytes: machine.last_level_cache_bytes };
    let mut report = Report::new(machine, args.quick);
    for (group, bench) in BENCHES {
        if args.only.is_empty() || args.only.contains(&group) {
            eprintln!("... {group:?}");
            bench(&setting, &mut report).with_context(|| format!("{group:?}"))?;
        }
    }
    println!("{report}");
    report.write(&args.out)?;
    let missed = report.missed();
    println!("{} rows, {missed} floors missed; {}", report.rows.len(), args.out.display());
    Ok(if missed > 0 && args.strict { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
