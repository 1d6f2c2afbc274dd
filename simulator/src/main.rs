//! The `kvtier-sim` command.
//!
//! Exit codes: 0 everything held, 1 something did not, 2 wrong usage.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use kvtier_simulator::{CalibrateArgs, Campaign, ReplayArgs, RunArgs, SweepArgs};

/// Runs kvtier's policy core over virtual time.
#[derive(Debug, Parser)]
#[command(name = "kvtier-sim", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs clusters in which everything goes wrong, and checks what must hold all the same.
    Faults(Faults),
    /// Replays a trace on eviction policies and tells how far they are from the best possible.
    Replay(ReplayArgs),
    /// Runs agent programs on a cluster in closed loop, under every policy.
    Run(Box<RunArgs>),
    /// The same at several values of one knob.
    Sweep(Box<SweepArgs>),
    /// Fits the cost model of engines to measured requests, and prints how far off it is.
    Calibrate(CalibrateArgs),
}

#[derive(Debug, Args)]
struct Faults {
    /// Seeds to run, each twice.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Nodes of each cluster.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(2..=64))]
    nodes: u64,
    /// Requests of engines in each run.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    steps: u64,
    /// Threads; each run is one thread's.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Where failing seeds are kept, to be run first next time.
    #[arg(long, default_value = "target/sim-failures.txt")]
    keep: PathBuf,
    /// Print every event.
    #[arg(long)]
    verbose: bool,
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Faults(faults) => run_faults(faults),
        Command::Replay(replay) => told(replay.run()),
        Command::Run(run) => told(run.run()),
        Command::Sweep(sweep) => told(sweep.run()),
        Command::Calibrate(calibrate) => told(calibrate.run()),
    }
}

fn told(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvtier-sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_faults(faults: Faults) -> ExitCode {
    let campaign = Campaign {
        first: faults.seed,
        seeds: faults.seeds,
        nodes: usize::try_from(faults.nodes).expect("at most 64"),
        steps: faults.steps,
        jobs: if faults.verbose { 1 } else { faults.jobs },
        keep: faults.keep,
        verbose: faults.verbose,
    };
    match campaign.run() {
        Ok(summary) => {
            println!("{summary}");
            if summary.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("kvtier-sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}
