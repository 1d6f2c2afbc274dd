//! Workloads: programs of four kinds, each with four knobs, with sizes from published distributions.

mod author;
mod pipeline;
mod presets;
mod react;
mod recorded;
mod swarm;
mod tot;

use std::time::Duration;

pub(crate) use author::Author;
pub(crate) use presets::Preset;
pub(crate) use recorded::read as read_recorded;

use super::dist::exponential;
use super::engine::seconds;
use super::tree::Work;
use crate::rng::Rng;

/// Kinds of programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Workload {
    /// Tree of thought: branches from a common stem, judged, few of them kept.
    Tot,
    /// A loop of model calls and tools.
    React,
    /// An orchestrator with workers, and they with theirs.
    Swarm,
    /// Agents one after another, with a fork and a join in the middle.
    Pipeline,
    /// Sessions from a file.
    Recorded,
}

impl Workload {
    /// Its name in commands and reports.
    #[must_use]
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Tot => "tot",
            Self::React => "react",
            Self::Swarm => "swarm",
            Self::Pipeline => "pipeline",
            Self::Recorded => "recorded",
        }
    }
}

/// The four knobs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Knobs {
    /// Share of a program's first prompt that other programs have too.
    pub(crate) overlap: f64,
    /// Branches of a fork, workers of a round, calls of a tool at once.
    pub(crate) branching: u32,
    /// Share of model calls that call a tool.
    pub(crate) tools: f64,
    /// Levels of thought, of delegation, or stages.
    pub(crate) depth: u32,
}

impl Knobs {
    /// Those of a workload, where nothing else is asked for.
    pub(crate) const fn of(workload: Workload) -> Self {
        match workload {
            Workload::Tot => Self { overlap: 0.5, branching: 4, tools: 0.3, depth: 3 },
            Workload::React | Workload::Recorded => Self { overlap: 0.5, branching: 1, tools: 0.9, depth: 0 },
            Workload::Swarm => Self { overlap: 0.5, branching: 4, tools: 0.7, depth: 1 },
            Workload::Pipeline => Self { overlap: 0.5, branching: 3, tools: 0.5, depth: 5 },
        }
    }
}

/// When programs come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arrivals {
    /// A population: when one ends the next begins.
    Closed,
    /// One by one, at a mean rate.
    Poisson,
    /// In bursts, at a mean rate.
    Bursts,
}

/// What to make.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) workload: Workload,
    pub(crate) knobs: Knobs,
    pub(crate) preset: Preset,
    pub(crate) programs: u32,
    pub(crate) seed: u64,
    pub(crate) block_tokens: u32,
    pub(crate) arrivals: Arrivals,
    /// Programs per second, where they come at a rate.
    pub(crate) rate: f64,
    /// At once, where they are a population.
    pub(crate) population: u32,
}

/// Programs that arrive together in a burst, on average.
const BURST: f64 = 8.0;

/// Makes the programs of a run.
pub(crate) fn make(plan: &Plan) -> Work {
    let mut author = Author::new(plan);
    for _ in 0..plan.programs {
        author.begin();
        match plan.workload {
            Workload::Tot => tot::write(&mut author),
            Workload::Swarm => swarm::write(&mut author),
            Workload::Pipeline => pipeline::write(&mut author),
            Workload::React | Workload::Recorded => react::write(&mut author),
        }
        author.finish();
    }
    let mut work = author.work();
    arrive(&mut work, plan);
    work
}

/// Says when programs arrive.
pub(crate) fn arrive(work: &mut Work, plan: &Plan) {
    let mut rng = Rng::new(plan.seed ^ 0x6172_7269_7665);
    let mut at = Duration::ZERO;
    for program in &mut work.programs {
        let gap = match plan.arrivals {
            Arrivals::Closed => f64::from(RAMP_SECONDS) / f64::from(plan.population.max(1)),
            Arrivals::Poisson => exponential(&mut rng) / plan.rate,
            Arrivals::Bursts if rng.chance(1000 / 8) => BURST * exponential(&mut rng) / plan.rate,
            Arrivals::Bursts => 0.0,
        };
        at += seconds(gap);
        program.arrives = at;
    }
}

/// The first of a population begin within this time.
const RAMP_SECONDS: u32 = 60;
