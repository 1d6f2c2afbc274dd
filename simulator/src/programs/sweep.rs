//! `kvtier-sim sweep`: one knob after another value, everything else the same.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Result, bail};

use super::run::{Setting, write};
use crate::replay::progress::Progress;

/// What may be varied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Knob {
    /// Share of a program's first prompt that others have too.
    Overlap,
    /// Branches, workers, tools at once.
    Branching,
    /// Share of calls that call a tool.
    Tools,
    /// Levels or stages.
    Depth,
    /// Share of the live working set that device and host memory hold.
    Pressure,
    /// Programs at once on each node.
    Population,
    /// Seed.
    Seed,
    /// GB/s from the shared storage, for each node.
    Store,
    /// Blocks of disk over those of device and host memory.
    Disk,
}

impl Knob {
    const fn name(self) -> &'static str {
        match self {
            Self::Overlap => "overlap",
            Self::Branching => "branching",
            Self::Tools => "tools",
            Self::Depth => "depth",
            Self::Pressure => "pressure",
            Self::Population => "population",
            Self::Seed => "seed",
            Self::Store => "store_gb",
            Self::Disk => "disk_factor",
        }
    }

    /// The setting with this knob at a value.
    fn set(self, setting: &mut Setting, value: f64) -> Result<()> {
        let whole = super::dist::whole(value);
        match self {
            Self::Overlap | Self::Tools | Self::Pressure if !(0.0..=1.0).contains(&value) => {
                bail!("{} is a share, not {value}", self.name())
            }
            Self::Branching | Self::Population if whole == 0 => bail!("{} is at least one", self.name()),
            Self::Store if value <= 0.0 => bail!("{} is above zero", self.name()),
            Self::Overlap => setting.overlap = Some(value),
            Self::Branching => setting.branching = Some(whole),
            Self::Tools => setting.tools = Some(value),
            Self::Depth => setting.depth = Some(whole),
            Self::Pressure => setting.pressure = value,
            Self::Population => setting.population = Some(whole),
            Self::Seed => setting.seed = u64::from(whole),
            Self::Store => setting.store_gb = value,
            Self::Disk => setting.disk_factor = value,
        }
        Ok(())
    }
}

/// Runs a workload at several values of a knob.
#[derive(Debug, Clone, clap::Args)]
pub struct SweepArgs {
    #[command(flatten)]
    setting: Setting,
    /// What is varied.
    #[arg(long, value_enum)]
    knob: Knob,
    /// Its values, separated by commas.
    #[arg(long, value_delimiter = ',', required = true)]
    values: Vec<f64>,
    /// Write all figures to this file.
    #[arg(long)]
    csv: Option<PathBuf>,
}

impl SweepArgs {
    /// Runs, and prints and writes what came of it.
    ///
    /// # Errors
    /// A value that the knob does not take, or files that cannot be read or written.
    pub fn run(&self) -> Result<()> {
        let name = self.knob.name();
        let mut progress = Progress::new(1);
        let (mut text, mut csv) = (String::new(), String::new());
        for (at, value) in self.values.iter().enumerate() {
            let mut setting = self.setting.clone();
            self.knob.set(&mut setting, *value)?;
            progress.part(at, self.values.len());
            let report = setting.run(&mut progress)?;
            if at == 0 {
                text = report.configuration();
                let _ignored = write!(text, "completion p50 in seconds (zero recompute)\n{name:<12}");
                report.rows.iter().for_each(|row| {
                    let _ignored = write!(text, "{:>20}", row.name);
                });
                let _ignored = writeln!(text, "{:>10}", "gain");
            }
            let _ignored = write!(text, "{value:<12}");
            for row in &report.rows {
                let figures = format!("{:.1} ({:.3})", row.figure("completion_p50_s"), row.figure("zero_recompute"));
                let _ignored = write!(text, "{figures:>20}");
            }
            let _ignored =
                writeln!(text, "{:>10}", report.gain("kvtier-hints").map_or_else(String::new, |g| format!("{g:.2}")));
            for (line, row) in report.csv().lines().enumerate() {
                match (at, line) {
                    (0, 0) => csv = format!("{name},{row}\n"),
                    (_, 0) => {}
                    _ => {
                        let _ignored = writeln!(csv, "{value},{row}");
                    }
                }
            }
        }
        progress.end();
        print!("{text}");
        write(self.csv.as_ref(), || Ok(csv))
    }
}
