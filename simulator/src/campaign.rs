//! A campaign: many seeds, each run twice and compared, then the planted bugs.
//!
//! *Bounds*: one run a thread at a time; each run bounds itself.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::report::Stats;
use crate::world::{Options, Outcome, Sabotage, run};

/// Failing seeds that are remembered at most.
const MAX_KEPT: usize = 100;
/// Seeds in which a planted bug must be caught at the latest.
const PLANTED_SEEDS: u64 = 50;

/// What to run.
#[derive(Debug, Clone)]
pub struct Campaign {
    /// The first seed.
    pub first: u64,
    /// Seeds.
    pub seeds: u64,
    /// Nodes of each cluster.
    pub nodes: usize,
    /// Requests of each run.
    pub steps: u64,
    /// Threads.
    pub jobs: usize,
    /// Where failing seeds are kept, to be run first next time.
    pub keep: PathBuf,
    /// Whether every event is printed.
    pub verbose: bool,
}

/// A seed that failed, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// The seed.
    pub seed: u64,
    /// Nodes of its cluster.
    pub nodes: usize,
    /// Requests of its run.
    pub steps: u64,
    /// The checker that failed.
    pub checker: String,
    /// What it saw.
    pub what: String,
    /// How to see it again.
    pub replay: String,
}

/// What a campaign came to.
#[derive(Debug)]
pub struct Summary {
    seeds: usize,
    events: u64,
    stats: Stats,
    failures: Vec<Kept>,
    planted: Vec<(Sabotage, Option<(&'static str, u64)>)>,
    took: Duration,
}

impl Summary {
    /// Whether every seed passed and every planted bug was caught.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.failures.is_empty() && self.planted.iter().all(|(_, caught)| caught.is_some())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} seeds, {} events, {:.1} s", self.seeds, self.events, self.took.as_secs_f64())?;
        writeln!(f, "{}", self.stats)?;
        for (bug, caught) in &self.planted {
            match caught {
                Some((checker, seed)) => writeln!(f, "planted bug {}: caught by {checker}, seed {seed}", bug.name())?,
                None => writeln!(f, "planted bug {}: NOT CAUGHT", bug.name())?,
            }
        }
        let same = self.failures.iter().all(|k| k.checker != "deterministic");
        writeln!(f, "deterministic: {}", if same { "yes, each seed was run twice and compared" } else { "NO" })?;
        for kept in &self.failures {
            writeln!(f, "FAILED seed {}: {}: {}\n  {}", kept.seed, kept.checker, kept.what, kept.replay)?;
        }
        write!(f, "{}", if self.passed() { "passed" } else { "failed" })
    }
}

impl Campaign {
    fn options(&self, seed: u64) -> Options {
        let (nodes, steps, verbose) = (self.nodes, self.steps, self.verbose);
        Options { seed, nodes, steps, faults: true, sabotage: None, verbose }
    }

    /// Runs it.
    ///
    /// # Errors
    /// When the file of failing seeds cannot be read or written.
    pub fn run(&self) -> anyhow::Result<Summary> {
        let started = Instant::now();
        let kept = self.kept()?;
        let again = kept.iter().map(|k| Options { nodes: k.nodes, steps: k.steps, ..self.options(k.seed) });
        let mut all: Vec<Options> = again.collect();
        all.extend((self.first..self.first.saturating_add(self.seeds)).map(|seed| self.options(seed)));
        let planted = Sabotage::ALL.map(|bug| (bug, self.caught(bug))).to_vec();
        let (mut stats, mut events, mut failures) = (Stats::default(), 0, Vec::new());
        for (options, (outcome, failure)) in all.iter().zip(self.run_all(&all)) {
            if let Some(outcome) = outcome {
                stats.add(&outcome.stats);
                events += outcome.events;
            }
            failures.extend(failure.map(|(checker, what)| keep(options, checker, what)));
        }
        failures.dedup();
        self.write(&failures)?;
        Ok(Summary { seeds: all.len(), events, stats, failures, planted, took: started.elapsed() })
    }

    fn run_all(&self, all: &[Options]) -> Vec<Verdict> {
        let next = AtomicUsize::new(0);
        let verdicts: Mutex<Vec<Option<Verdict>>> = Mutex::new((0..all.len()).map(|_| None).collect());
        std::thread::scope(|scope| {
            for _ in 0..self.jobs.max(1) {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(options) = all.get(at) else { return };
                        let verdict = twice(*options);
                        if let Some((checker, what)) = &verdict.1 {
                            eprintln!("seed {}: {checker}: {what}", options.seed);
                        } else if at % 100 == 99 {
                            eprintln!("{} of {} seeds", at + 1, all.len());
                        }
                        verdicts.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[at] = Some(verdict);
                    }
                });
            }
        });
        let verdicts = verdicts.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        verdicts.into_iter().flatten().collect()
    }

    /// The checker and seed that catch a planted bug.
    fn caught(&self, bug: Sabotage) -> Option<(&'static str, u64)> {
        let seeds = self.first..self.first.saturating_add(PLANTED_SEEDS);
        seeds.into_iter().find_map(|seed| {
            let options = Options { sabotage: Some(bug), verbose: false, ..self.options(seed) };
            let outcome = once(options).ok()?;
            outcome.failure.map(|failure| (failure.checker, seed))
        })
    }

    fn kept(&self) -> anyhow::Result<Vec<Kept>> {
        match std::fs::read_to_string(&self.keep) {
            Ok(text) => Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).take(MAX_KEPT).collect()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(anyhow::Error::new(error).context(format!("reading {}", self.keep.display()))),
        }
    }

    fn write(&self, failures: &[Kept]) -> anyhow::Result<()> {
        if failures.is_empty() && !self.keep.exists() {
            return Ok(());
        }
        if let Some(folder) = self.keep.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let lines: Result<Vec<String>, _> = failures.iter().take(MAX_KEPT).map(serde_json::to_string).collect();
        let text: String = lines?.into_iter().map(|line| line + "\n").collect();
        std::fs::write(&self.keep, text)?;
        Ok(())
    }
}

fn keep(options: &Options, checker: String, what: String) -> Kept {
    let Options { seed, nodes, steps, .. } = *options;
    let replay = format!("kvtier-sim faults --seed {seed} --seeds 1 --nodes {nodes} --steps {steps} --verbose");
    Kept { seed, nodes, steps, checker, what, replay }
}

/// What a seed came to: its first run, and the checker that failed with what it saw.
type Verdict = (Option<Outcome>, Option<(String, String)>);

fn twice(options: Options) -> Verdict {
    match (once(options), once(Options { verbose: false, ..options })) {
        (Ok(first), Ok(second)) => {
            let failure = if first.digest == second.digest {
                first.failure.clone().map(|f| (f.checker.to_owned(), format!("at {:?}: {}", f.at, f.what)))
            } else {
                Some(("deterministic".to_owned(), "two runs of the seed differ".to_owned()))
            };
            (Some(first), failure)
        }
        (Err(panic), _) | (_, Err(panic)) => (None, Some(("no-panic".to_owned(), panic))),
    }
}

/// A panic of the core is a finding like any other.
fn once(options: Options) -> Result<Outcome, String> {
    catch_unwind(AssertUnwindSafe(|| run(options))).map_err(|panic| message(panic.as_ref()))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_else(|| "a panic".to_owned())
}
