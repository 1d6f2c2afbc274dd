//! `kvtier-sim run`: a workload on a cluster under every policy, and what came of it.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::cache::{DEVICE, DISK, HOST};
use super::config::Config;
use super::cost::Cost;
use super::decisions::{Decisions, Turn};
use super::metrics::Metrics;
use super::report::{Report, Row};
use super::tree::Work;
use super::workloads::{Arrivals, Knobs, Plan, Preset, Workload, arrive, make, read_recorded};
use super::world::World;
use super::{html, report};
use crate::replay::progress::Progress;

/// What is to be run: a cluster, a workload, and knobs.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Setting {
    /// The kind of programs.
    #[arg(long, value_enum)]
    pub(crate) workload: Workload,
    /// Nodes, of one engine each.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) nodes: u32,
    /// Seed of everything that is left to chance.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Share of the live working set that device and host memory hold together.
    #[arg(long, default_value_t = 0.4, value_parser = share)]
    pub(crate) pressure: f64,
    /// Programs at once on each node, where they are a population. Default: by workload.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) population: Option<u32>,
    /// Programs in all. Default: four times the population.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub(crate) programs: Option<u32>,
    /// When programs come.
    #[arg(long, value_enum, default_value_t = Arrivals::Closed)]
    pub(crate) arrivals: Arrivals,
    /// Programs per hour and node, where they come at a rate.
    #[arg(long, default_value_t = 60.0, value_parser = positive)]
    pub(crate) rate: f64,
    /// Where sizes and times are from.
    #[arg(long, value_enum, default_value_t = Preset::ClaudeCode)]
    pub(crate) preset: Preset,
    /// Share of a program's first prompt that others have too. Default of this and the next three: by workload.
    #[arg(long, value_parser = share)]
    pub(crate) overlap: Option<f64>,
    /// Branches of a fork, workers of a round, tools at once.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) branching: Option<u32>,
    /// Share of model calls that call a tool.
    #[arg(long, value_parser = share)]
    pub(crate) tools: Option<f64>,
    /// Levels of thought, of delegation, or stages.
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=16))]
    pub(crate) depth: Option<u32>,
    /// A model and accelerator whose timings were fitted.
    #[arg(long, default_value = "llama-3.1-8b-rtxpro6000", value_parser = model)]
    pub(crate) model: String,
    /// Tokens of a block.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(16..=1024))]
    pub(crate) block_tokens: u32,
    /// Share of device and host memory that is the device's.
    #[arg(long, default_value_t = 0.4, value_parser = share)]
    pub(crate) device_share: f64,
    /// Blocks of a node's disk over those of its device and host memory.
    #[arg(long, default_value_t = 1.0, value_parser = amount)]
    pub(crate) disk_factor: f64,
    /// Blocks of the shared storage over those of all devices and hosts.
    #[arg(long, default_value_t = 16.0, value_parser = amount)]
    pub(crate) store_factor: f64,
    /// GB/s from host memory to the device.
    #[arg(long, default_value_t = 50.0, value_parser = positive)]
    pub(crate) bus_gb: f64,
    /// GB/s that a node reads from its disk.
    #[arg(long, default_value_t = 6.0, value_parser = positive)]
    pub(crate) disk_gb: f64,
    /// GB/s that a node writes to its disk.
    #[arg(long, default_value_t = 3.0, value_parser = positive)]
    pub(crate) disk_write_gb: f64,
    /// GB/s of a node's network.
    #[arg(long, default_value_t = 3.0, value_parser = positive)]
    pub(crate) network_gb: f64,
    /// GB/s that all nodes together read from the shared storage, for each node.
    #[arg(long, default_value_t = 1.5, value_parser = positive)]
    pub(crate) store_gb: f64,
    /// Sessions of a coding agent, for the workload `recorded`.
    #[arg(long)]
    pub(crate) sessions: Option<PathBuf>,
    /// Every policy admits first come, first served: what the order of steps is worth.
    #[arg(long)]
    pub(crate) first_come: bool,
    /// Policies, separated by commas. Default: all.
    #[arg(long, value_delimiter = ',', value_parser = policy)]
    pub(crate) policy: Vec<String>,
}

fn number(text: &str, low: f64, high: f64) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (low..=high).contains(&number) { Ok(number) } else { Err(format!("not between {low} and {high}")) }
}

fn share(text: &str) -> Result<f64, String> {
    number(text, 0.0, 1.0)
}

fn amount(text: &str) -> Result<f64, String> {
    number(text, 0.0, 1e6)
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, 1e-6, 1e6)
}

fn model(text: &str) -> Result<String, String> {
    let names: Vec<&str> = Cost::ALL.iter().map(|cost| cost.name).collect();
    if names.contains(&text) { Ok(text.to_owned()) } else { Err(format!("one of {}", names.join(", "))) }
}

fn policy(text: &str) -> Result<String, String> {
    let names: Vec<&str> = Decisions::ALL.iter().map(|how| how.name).collect();
    if names.contains(&text) { Ok(text.to_owned()) } else { Err(format!("one of {}", names.join(", "))) }
}

/// Runs a workload under every policy.
#[derive(Debug, Clone, clap::Args)]
pub struct RunArgs {
    #[command(flatten)]
    setting: Setting,
    /// Write all figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the table to this file.
    #[arg(long)]
    csv: Option<PathBuf>,
    /// Write a page with plots to this file.
    #[arg(long)]
    html: Option<PathBuf>,
}

impl RunArgs {
    /// Runs, and prints and writes what came of it.
    ///
    /// # Errors
    /// Why a file cannot be read or written.
    pub fn run(&self) -> Result<()> {
        let mut progress = Progress::new(1);
        let report = self.setting.run(&mut progress)?;
        progress.end();
        print!("{}", report.table());
        let json = || serde_json::to_string_pretty(&report.json()).context("a report is JSON");
        write(self.json.as_ref(), || Ok(json()? + "\n"))?;
        write(self.csv.as_ref(), || Ok(report.csv()))?;
        write(self.html.as_ref(), || Ok(html::page(&report)))
    }
}

/// Writes a file, where one is asked for.
pub(super) fn write(path: Option<&PathBuf>, text: impl FnOnce() -> Result<String>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, text()?).with_context(|| format!("cannot write {}", path.display()))
}

impl Setting {
    /// Programs at once on a node.
    fn population(&self) -> u32 {
        self.population.unwrap_or(match self.workload {
            Workload::React | Workload::Recorded => 24,
            Workload::Tot => 12,
            Workload::Swarm => 8,
            Workload::Pipeline => 16,
        })
    }

    /// The knobs, as asked for or by workload.
    pub(super) fn knobs(&self) -> Knobs {
        let usual = Knobs::of(self.workload);
        Knobs {
            overlap: self.overlap.unwrap_or(usual.overlap),
            branching: self.branching.unwrap_or(usual.branching),
            tools: self.tools.unwrap_or(usual.tools),
            depth: self.depth.unwrap_or(usual.depth),
        }
    }

    fn work(&self) -> Result<Work> {
        let population = self.population() * self.nodes;
        let plan = Plan {
            workload: self.workload,
            knobs: self.knobs(),
            preset: self.preset,
            programs: self.programs.unwrap_or(4 * population),
            seed: self.seed,
            block_tokens: self.block_tokens,
            arrivals: self.arrivals,
            rate: self.rate * f64::from(self.nodes) / 3600.0,
            population,
        };
        if self.workload != Workload::Recorded {
            return Ok(make(&plan));
        }
        let path = self.sessions.as_ref().context("the workload `recorded` needs --sessions")?;
        let mut work = read_recorded(path, self.block_tokens, plan.programs as usize)?;
        arrive(&mut work, &plan);
        Ok(work)
    }

    fn config(&self, live_blocks: f64) -> Config {
        let fast = self.pressure * live_blocks / f64::from(self.nodes);
        let blocks = |share: f64| super::dist::whole((fast * share).max(1.0)) as usize;
        let mut capacity = [0; 3];
        capacity[DEVICE] = blocks(self.device_share);
        capacity[HOST] = blocks(1.0 - self.device_share);
        capacity[DISK] = if self.disk_factor > 0.0 { blocks(self.disk_factor) } else { 0 };
        let store = super::dist::whole(fast * f64::from(self.nodes) * self.store_factor) as usize;
        Config {
            cost: Cost::named(&self.model).expect("the command line was checked"),
            nodes: self.nodes,
            block_tokens: self.block_tokens,
            capacity,
            store_blocks: store,
            bus_gb: self.bus_gb,
            disk_gb: self.disk_gb,
            disk_write_gb: self.disk_write_gb,
            network_gb: self.network_gb,
            store_gb: self.store_gb * f64::from(self.nodes),
            population: if self.arrivals == Arrivals::Closed { self.population() * self.nodes } else { 0 },
            seed: self.seed,
        }
    }

    fn policies(&self) -> Vec<Decisions> {
        let asked = |how: &Decisions| self.policy.is_empty() || self.policy.iter().any(|name| name == how.name);
        let turn = |how: Decisions| if self.first_come { Decisions { turn: Turn::First, ..how } } else { how };
        Decisions::ALL.into_iter().filter(asked).map(turn).collect()
    }

    /// Runs all policies.
    ///
    /// # Errors
    /// Sessions that cannot be read.
    pub(super) fn run(&self, progress: &mut Progress) -> Result<Report> {
        let work = self.work()?;
        let policies = self.policies();
        ensure!(!policies.is_empty(), "no policies");
        progress.restart((policies.len() + 1) * work.programs.len());
        progress.what("free", 0);
        let free = World::new(&work, &self.config(1.0), Decisions::FREE).run(&mut || progress.step());
        let config = self.config(free.live_blocks);
        let mut rows = Vec::new();
        for how in policies {
            progress.what(how.name, 0);
            let metrics = World::new(&work, &config, how).run(&mut || progress.step());
            rows.push(Row::new(how, &metrics, (&free, &config)));
        }
        Ok(report::Report {
            setting: self.clone(),
            knobs: self.knobs(),
            config,
            live_blocks: free.live_blocks,
            free: base(&free),
            rows,
        })
    }
}

/// Completions of a cache without costs, in seconds.
fn base(free: &Metrics) -> Vec<f64> {
    free.completions.iter().flatten().map(std::time::Duration::as_secs_f64).collect()
}
