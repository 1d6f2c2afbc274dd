//! An inference engine: continuous batching with chunked prefill, step by step.
//!
//! Each step decodes one token of every running sequence and computes prompt tokens up to the batch's budget, first come
//! first served. Steps in which nothing is computed but decoded tokens are taken many at once, up to the next end of a
//! sequence, and cut short at a step's boundary when a sequence joins.

use std::collections::VecDeque;
use std::time::Duration;

use kvtier_types::Instant;

use super::cost::Cost;

/// A request as an engine sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) id: u32,
    /// Tokens whose KV is there.
    pub(crate) context: u64,
    /// Tokens to be computed: at least one.
    pub(crate) missing: u64,
    /// Tokens to be generated: at least one.
    pub(crate) output: u64,
}

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The first token of a job is out.
    First(u32),
    /// All of a job is.
    Done(u32),
    /// There was no memory to go on with a job: it is out, and what it had is lost.
    Preempted(Job),
}

#[derive(Debug, Clone, Copy)]
struct Decoding {
    id: u32,
    /// The step after which it has ended.
    ends: u64,
    /// Its context less the number of steps so far: constant while it decodes.
    base: u64,
}

/// Steps under way.
#[derive(Debug)]
struct Plan {
    began: Instant,
    ends: Instant,
    steps: u64,
    /// Tokens computed of the first sequences in line.
    chunks: Vec<u64>,
}

/// The engine.
#[derive(Debug)]
pub(crate) struct Engine {
    cost: Cost,
    /// Tokens of KV it has room for, where that is what bounds it.
    memory_tokens: Option<u64>,
    prefilling: VecDeque<Job>,
    decoding: Vec<Decoding>,
    /// Contexts of what decodes, summed.
    context: u64,
    steps: u64,
    plan: Option<Plan>,
    /// Time in steps so far.
    pub(crate) busy: Duration,
}

impl Engine {
    pub(crate) const fn new(cost: Cost, memory_tokens: Option<u64>) -> Self {
        Self {
            cost,
            memory_tokens,
            prefilling: VecDeque::new(),
            decoding: Vec::new(),
            context: 0,
            steps: 0,
            plan: None,
            busy: Duration::ZERO,
        }
    }

    /// Sequences in the batch.
    pub(crate) fn running(&self) -> usize {
        self.prefilling.len() + self.decoding.len()
    }

    /// Whether another may join, of so many tokens.
    pub(crate) fn has_room(&self, tokens: u64) -> bool {
        let used = self.context + self.prefilling.iter().map(|job| job.context + job.missing).sum::<u64>();
        self.running() < self.cost.max_sequences && self.memory_tokens.is_none_or(|most| used + tokens <= most)
    }

    /// Prompt tokens to be computed of what runs.
    pub(crate) fn backlog(&self) -> u64 {
        self.prefilling.iter().map(|job| job.missing).sum()
    }

    /// Seconds that a step takes at present without prompt tokens.
    pub(crate) fn decode_step(&self) -> f64 {
        self.cost.step(0.0, 0.0, self.decoding.len() as f64, self.context as f64)
    }

    /// A job joins the batch at the next step.
    pub(crate) fn join(&mut self, now: Instant, job: Job) {
        self.prefilling.push_back(job);
        let Some(plan) = self.plan.as_mut().filter(|plan| plan.steps > 1) else { return };
        // The step under way ends; later ones do not begin.
        let (sequences, context) = (self.decoding.len() as f64, self.context as f64);
        let ends = |steps: u64| plan.began + seconds(self.cost.decode(steps as f64, sequences, context));
        let (mut low, mut high) = (1, plan.steps);
        while low < high {
            let middle = low.midpoint(high);
            if ends(middle) < now { low = middle + 1 } else { high = middle }
        }
        (plan.steps, plan.ends) = (low, ends(low).max(now));
    }

    /// When the steps under way end; plans the next if there are none.
    pub(crate) fn next(&mut self, now: Instant) -> Option<Instant> {
        if self.plan.is_none() {
            self.plan = self.next_plan(now);
        }
        self.plan.as_ref().map(|plan| plan.ends)
    }

    fn next_plan(&self, now: Instant) -> Option<Plan> {
        let (sequences, context) = (self.decoding.len() as f64, self.context as f64);
        if self.prefilling.is_empty() {
            let most = self.decoding.iter().map(|d| d.ends - self.steps).min()?;
            let room = self.memory_tokens.map_or(u64::MAX, |m| m.saturating_sub(self.context));
            let steps = most.min((room / self.decoding.len() as u64).max(1));
            let ends = now + seconds(self.cost.decode(steps as f64, sequences, context));
            return Some(Plan { began: now, ends, steps, chunks: Vec::new() });
        }
        let mut budget = self.cost.max_batched_tokens.saturating_sub(self.decoding.len() as u64).max(1);
        let (mut chunks, mut tokens, mut attended) = (Vec::new(), 0.0, 0.0);
        for job in &self.prefilling {
            let chunk = job.missing.min(budget);
            if chunk == 0 {
                break;
            }
            budget -= chunk;
            chunks.push(chunk);
            tokens += chunk as f64;
            attended += chunk as f64 * (job.context as f64 + chunk as f64 / 2.0);
        }
        let ends = now + seconds(self.cost.step(tokens, attended, sequences, context));
        Some(Plan { began: now, ends, steps: 1, chunks })
    }

    /// The steps under way have ended, if this is when they do: tells what came of them.
    pub(crate) fn finish(&mut self, now: Instant, progress: &mut Vec<Progress>) {
        let Some(plan) = self.plan.take_if(|plan| plan.ends <= now) else { return };
        self.busy += plan.ends.since(plan.began);
        self.steps += plan.steps;
        self.context += plan.steps * self.decoding.len() as u64;
        let steps = self.steps;
        let context = &mut self.context;
        self.decoding.retain(|d| {
            if d.ends <= steps {
                *context -= d.base.wrapping_add(steps);
                progress.push(Progress::Done(d.id));
            }
            d.ends > steps
        });
        for (job, chunk) in self.prefilling.iter_mut().zip(&plan.chunks) {
            job.context += chunk;
            job.missing -= chunk;
        }
        while let Some(job) = self.prefilling.pop_front_if(|job| job.missing == 0) {
            progress.push(Progress::First(job.id));
            if job.output <= 1 {
                progress.push(Progress::Done(job.id));
                continue;
            }
            // The first token is out and its KV is computed with the second.
            self.context += job.context + 1;
            let base = (job.context + 1).wrapping_sub(self.steps);
            self.decoding.push(Decoding { id: job.id, ends: self.steps + job.output - 1, base });
        }
        self.preempt(progress);
    }

    /// Those that joined last give way until the rest can take a step.
    fn preempt(&mut self, progress: &mut Vec<Progress>) {
        let Some(most) = self.memory_tokens else { return };
        let waiting: u64 = self.prefilling.iter().map(|job| job.context + job.missing).sum();
        while self.decoding.len() > 1 && self.context + waiting + self.decoding.len() as u64 > most {
            let Some(last) = self.decoding.pop() else { break };
            let context = last.base.wrapping_add(self.steps);
            self.context -= context;
            let output = last.ends - self.steps;
            progress.push(Progress::Preempted(Job { id: last.id, context: 0, missing: context, output }));
        }
    }
}

/// A duration of so many seconds.
pub(crate) fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}
