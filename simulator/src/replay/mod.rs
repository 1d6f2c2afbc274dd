//! Replays traces on the eviction policies that ship, and on Belady's for comparison.

mod belady;
mod chart;
mod claude_code;
mod engine;
mod mooncake;
pub(crate) mod progress;
mod report;
#[cfg(test)]
mod tests;
mod trace;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;

use engine::{Run, Tally};
use progress::Progress;
use report::{Report, Row};
use trace::Trace;

/// Formats of traces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Sessions of a coding agent with nested sub-agents.
    ClaudeCode,
    /// Requests with block numbers.
    Mooncake,
}

/// Policies to replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Policy {
    /// Leaf-first LRU.
    Lru,
    /// Leaf-first S3-FIFO.
    S3fifo,
    /// Leaf-first ARC.
    Arc,
    /// Knows the future.
    Belady,
    /// Survival with the guard; the same without it is added.
    Survival,
    /// Survival without the guard.
    SurvivalUnguarded,
    /// Survival with the guard, told when tools return, with an error.
    SurvivalEta,
}

impl Policy {
    /// Its name in commands, tables and files.
    #[must_use]
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::S3fifo => "s3fifo",
            Self::Arc => "arc",
            Self::Belady => "belady",
            Self::Survival => "survival",
            Self::SurvivalUnguarded => "survival-unguarded",
            Self::SurvivalEta => "survival-eta",
        }
    }
}

/// What to replay.
#[derive(Debug, Clone, clap::Args)]
pub struct ReplayArgs {
    /// The trace, one JSON object a line; a name that ends in .gz is unpacked.
    #[arg(long)]
    trace: PathBuf,
    /// Its format.
    #[arg(long, value_enum)]
    format: Format,
    /// Policies, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "lru,s3fifo,arc,belady,survival")]
    policy: Vec<Policy>,
    /// Capacities of host memory in blocks, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "2000,5000", value_parser = clap::value_parser!(u32).range(1..))]
    capacity: Vec<u32>,
    /// Write the figures to this file, ratios as fractions.
    #[arg(long)]
    csv: Option<PathBuf>,
    /// Draw prefix hits over capacity into this file.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Seed of the error in announced returns.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds between the starts of sessions, where the trace has no times of its own for them.
    #[arg(long, default_value_t = 30.0, value_parser = seconds)]
    spacing: f64,
    /// How many times the blocks of host memory the disk has room for; 0: there is no disk.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(0..=1024))]
    disk_factor: u32,
    /// Bytes of KV per token, for what is moved.
    #[arg(long, default_value_t = 131_072, value_parser = clap::value_parser!(u64).range(1..))]
    bytes_per_token: u64,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=86_400.0).contains(&seconds) { Ok(seconds) } else { Err("not between 0 and 86400".to_owned()) }
}

/// Time that a processor spent on this thread: what others do on the machine does not count.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("time spent is not negative")
}

impl ReplayArgs {
    /// Replays, and prints and writes what came of it.
    ///
    /// # Errors
    /// Why the trace cannot be replayed, or a file not be written.
    pub fn run(&self) -> anyhow::Result<()> {
        let trace = trace::read(&self.trace, self.format, Duration::from_secs_f64(self.spacing))?;
        let name = self.trace.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let report = self.report(&name, &trace);
        print!("{}", report.table());
        for (path, text) in [(&self.csv, report.csv()), (&self.svg, chart::svg(&report))] {
            if let Some(path) = path {
                std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        Ok(())
    }

    fn report(&self, name: &str, trace: &Trace) -> Report {
        let mut policies: Vec<Policy> = Vec::new();
        for policy in &self.policy {
            let bare = (*policy == Policy::Survival).then_some(Policy::SurvivalUnguarded);
            for policy in bare.into_iter().chain([*policy]) {
                if !policies.contains(&policy) {
                    policies.push(policy);
                }
            }
        }
        let host = || policies.iter().flat_map(|p| self.capacity.iter().map(|c| (*p, *c as usize)));
        // What is compared with, and the disk below.
        let ends = self.capacity.iter().flat_map(|c| [(Policy::Lru, *c as usize), (Policy::Belady, *c as usize)]);
        let disk = host().filter(|_| self.disk_factor > 0).map(|(p, c)| (p, c * self.disk_factor as usize));
        let mut jobs: Vec<(Policy, usize)> = host().chain(ends).chain(disk).collect();
        jobs.sort_unstable();
        jobs.dedup();
        let mut done = BTreeMap::new();
        let mut progress = Progress::new(jobs.len() * trace.calls.len());
        for (policy, capacity) in jobs {
            let start = processor_time();
            progress.what(policy.name(), capacity);
            let run = Run { policy, capacity, seed: self.seed };
            let tally = engine::replay(trace, run, &mut || progress.step());
            done.insert((policy, capacity), (tally, processor_time().saturating_sub(start).as_secs_f64()));
        }
        progress.end();
        let rows = host().map(|(p, c)| self.row((p, c), &done)).collect();
        let unique = trace.semantics.len() as u64;
        Report { trace: name.to_owned(), calls: trace.calls.len(), blocks: trace.blocks.len() as u64, unique, rows }
    }

    fn row(&self, at: (Policy, usize), done: &BTreeMap<(Policy, usize), (Tally, f64)>) -> Row {
        let (policy, capacity) = at;
        let (host, seconds) = done[&at];
        let disk = done.get(&(policy, capacity * self.disk_factor as usize)).map_or(host, |(tally, _)| *tally);
        let hits = |policy: Policy| done[&(policy, capacity)].0.hits as f64;
        let (lru, best) = (hits(Policy::Lru), hits(Policy::Belady));
        Row {
            policy,
            capacity,
            host,
            disk_hits: disk.hits.saturating_sub(host.hits),
            offloaded: if self.disk_factor > 0 { disk.taken_in } else { 0 },
            gap_closed: (best > lru).then(|| (host.hits as f64 - lru) / (best - lru)),
            bytes_per_token: self.bytes_per_token,
            accesses_per_second: host.blocks as f64 / seconds.max(1e-9),
        }
    }
}
