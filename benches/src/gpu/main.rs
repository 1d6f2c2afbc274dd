//! `kvtier-gpu-bench`: what a device's copies must reach, against plain copies of the same bytes on the same machine.
//!
//! ```text
//! paged    blocks of 2 MiB of a paged layout (32 layers, keys and values apart) to frames and back, checksums made on the
//!          device                                        against one pinned copy of as many bytes, floor 0.9
//! runs     the same with runs of 64 KiB                  as above
//! within   frames of a pool into such a layout           against one copy within the device, floor 0.8
//! staged   a pool's frames through host frames to a peer over TCP, both at once      against the slower half, floor 0.85
//! start    10 GiB of host memory registered, 10 GiB of pool allocated                against a second each
//! ```
//! *Fairness*: both sides move the same bytes between the same buffers, which are larger than every cache, in rounds that
//! alternate; a ratio is the median of the rounds'. Over the twin the numbers mean nothing: it shows that the program runs.

mod copies;
#[path = "../frames.rs"]
mod frames;
mod staged;
mod start;
#[path = "../stats.rs"]
mod stats;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use kvtier_device::{Backend, Device};
use serde::Serialize;

/// Benchmarks of a device's copies against plain ones.
#[derive(Debug, Parser)]
struct Args {
    /// `cuda`, or `twin` to see the program run.
    #[arg(long, default_value = "cuda")]
    backend: Backend,
    /// Which device.
    #[arg(long, default_value_t = 0)]
    ordinal: u32,
    /// Fewer and smaller rounds.
    #[arg(long)]
    quick: bool,
    /// Where the results go, as JSON.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// One ratio with its floor.
#[derive(Debug, Serialize)]
struct Ratio {
    name: String,
    ratio: f64,
    floor: f64,
    /// What the subject reached, for people.
    reached: String,
}

impl Ratio {
    fn new(name: impl Into<String>, (ratio, floor): (f64, f64), reached: String) -> Self {
        let this = Self { name: name.into(), ratio, floor, reached };
        let verdict = if this.ratio >= this.floor { "pass" } else { "MISS" };
        println!("{:52} {:>6.2} of at least {:<4} {verdict}   {}", this.name, this.ratio, this.floor, this.reached);
        this
    }
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Results {
    device: String,
    driver: u32,
    methods: Vec<String>,
    notes: Vec<String>,
    ratios: Vec<Ratio>,
}

/// What every benchmark is given.
struct Setting {
    device: Arc<dyn Device>,
    quick: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(missed) => {
            println!("{missed} floors missed");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("kvtier-gpu-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<usize> {
    let device = kvtier_device::open(args.backend, args.ordinal).context("opening the device")?;
    let facts = device.facts().clone();
    println!("{} ({}), driver {}, methods {:?}", facts.name, facts.id, facts.driver, facts.methods);
    let setting = Setting { device, quick: args.quick };
    let mut ratios = copies::run(&setting).context("copies")?;
    ratios.extend(staged::run(&setting).context("staged")?);
    ratios.extend(start::run(&setting).context("start")?);
    let missed = ratios.iter().filter(|r| r.ratio < r.floor).count();
    let results = Results {
        device: facts.name,
        driver: facts.driver,
        methods: facts.methods.iter().map(|m| m.name().to_owned()).collect(),
        notes: facts.notes,
        ratios,
    };
    if let Some(path) = &args.out {
        std::fs::write(path, serde_json::to_string_pretty(&results)? + "\n").context("writing the results")?;
    }
    Ok(missed)
}
