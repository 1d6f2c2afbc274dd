//! One declared graph: how far each step is, what may run, and how far it is from there to the end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvtier_types::{Instant, TenantId};

use super::learnt::Learnt;
use super::plan::Plan;
use crate::programs::upward_ranks;

/// How far a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum StepState {
    /// It has not begun.
    #[default]
    Waiting,
    /// It runs.
    Running,
    /// It ended.
    Ended,
}

/// A step that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) began: Instant,
    /// When it could have begun.
    pub(super) due: Instant,
}

/// How long things take, as of the last look.
#[derive(Debug, Clone, Default)]
pub(super) struct Ranks {
    /// What each step still takes.
    pub(super) takes: Vec<Duration>,
    /// From each step's beginning, or from now if it runs, to the end of the program.
    pub(super) ranks: Vec<Duration>,
    /// What all steps together still take.
    pub(super) remaining: Duration,
    /// The longest way to the end of those that run or may.
    pub(super) longest: Duration,
}

/// A graph.
#[derive(Debug)]
pub(super) struct Graph {
    pub(super) revision: u64,
    pub(super) plan: Plan,
    states: Vec<StepState>,
    /// Steps before each that have not ended.
    missing: Vec<u32>,
    /// Steps that may run, and since when.
    ready: BTreeMap<u32, Instant>,
    /// Those of them whose turn was not told yet.
    untold: BTreeSet<u32>,
    running: BTreeMap<u32, Run>,
    ended: usize,
    /// What the steps took that ended.
    served: Duration,
    /// When something was last heard of it.
    pub(super) heard: Instant,
    ranks: Ranks,
    ranked: Option<Instant>,
}

impl Graph {
    pub(super) fn new(now: Instant, revision: u64, plan: Plan) -> Self {
        let states = vec![StepState::Waiting; plan.steps().len()];
        let mut graph = Self {
            revision,
            plan,
            states,
            missing: Vec::new(),
            ready: BTreeMap::new(),
            untold: BTreeSet::new(),
            running: BTreeMap::new(),
            ended: 0,
            served: Duration::ZERO,
            heard: now,
            ranks: Ranks::default(),
            ranked: None,
        };
        graph.settle(now);
        graph
    }

    /// Takes over how far steps of the same id were in a former declaration.
    pub(super) fn inherit(&mut self, now: Instant, former: &Self) {
        let of_id: BTreeMap<&str, u32> =
            (0..).zip(former.plan.steps()).map(|(number, step)| (step.id.as_str(), number)).collect();
        let mut told = BTreeSet::new();
        for (number, step) in (0..).zip(self.plan.steps()) {
            let Some(then) = of_id.get(step.id.as_str()) else { continue };
            self.states[number as usize] = former.states[*then as usize];
            if let Some(run) = former.running.get(then) {
                self.running.insert(number, *run);
            }
            if let Some(since) = former.ready.get(then) {
                self.ready.insert(number, *since);
                if !former.untold.contains(then) {
                    told.insert(number);
                }
            }
        }
        self.served = former.served;
        self.settle(now);
        self.untold.retain(|number| !told.contains(number));
    }

    /// Takes over how far steps were, in the plan's order; those that run begin anew for what they take.
    pub(super) fn resume(&mut self, now: Instant, states: &[StepState]) {
        for (own, state) in self.states.iter_mut().zip(states) {
            *own = *state;
        }
        self.settle(now);
    }

    /// Counts what is before each step, and finds those that may run, from the states alone.
    fn settle(&mut self, now: Instant) {
        let is_ended = |n: &u32| self.states[*n as usize] == StepState::Ended;
        self.missing = self
            .plan
            .before()
            .iter()
            .map(|b| u32::try_from(b.iter().filter(|n| !is_ended(n)).count()).unwrap_or(0))
            .collect();
        self.ended = self.states.iter().filter(|s| **s == StepState::Ended).count();
        let (ready, running) = (std::mem::take(&mut self.ready), std::mem::take(&mut self.running));
        self.untold.clear();
        for (number, state) in (0..).zip(&self.states) {
            match state {
                StepState::Waiting if self.missing[number as usize] == 0 => {
                    let since = ready.get(&number).copied().unwrap_or_else(|| due(&self.plan, number, now));
                    self.ready.insert(number, since);
                    self.untold.insert(number);
                }
                StepState::Running => {
                    let run = running.get(&number).copied().unwrap_or(Run { began: now, due: now });
                    self.running.insert(number, run);
                }
                _ => {}
            }
        }
        self.ranked = None;
    }

    pub(super) fn state(&self, number: u32) -> StepState {
        self.states[number as usize]
    }

    pub(super) fn states(&self) -> &[StepState] {
        &self.states
    }

    /// Steps that ended.
    pub(super) const fn ended(&self) -> usize {
        self.ended
    }

    /// Whether all steps ended.
    pub(super) fn is_over(&self) -> bool {
        self.ended == self.states.len()
    }

    /// Steps that may run, each with when it was, or will be, its tool's turn to be back.
    pub(super) const fn ready(&self) -> &BTreeMap<u32, Instant> {
        &self.ready
    }

    /// Steps that run.
    pub(super) const fn running(&self) -> &BTreeMap<u32, Run> {
        &self.running
    }

    /// What engines took for it so far.
    pub(super) fn attained(&self, now: Instant) -> Duration {
        self.running.values().fold(self.served, |sum, run| sum.saturating_add(now.since(run.began)))
    }

    /// A step began: all before it must have ended. Says how many steps changed.
    pub(super) fn begin(&mut self, now: Instant, number: u32) -> u32 {
        if self.state(number) != StepState::Waiting {
            return 0;
        }
        let mut changed = 1;
        let mut left = self.plan.before()[number as usize].clone();
        while let Some(earlier) = left.pop() {
            if self.state(earlier) != StepState::Ended {
                left.extend(&self.plan.before()[earlier as usize]);
                self.end(now, earlier);
                changed += 1;
            }
        }
        self.untold.remove(&number);
        let due = self.ready.remove(&number).unwrap_or(now).min(now);
        self.states[number as usize] = StepState::Running;
        self.running.insert(number, Run { began: now, due });
        self.ranked = None;
        changed
    }

    /// A step ended: how long it took, if it is known when it began, and whether that is news.
    pub(super) fn end(&mut self, now: Instant, number: u32) -> (bool, Option<Duration>) {
        if self.state(number) == StepState::Ended {
            return (false, None);
        }
        let took = self.running.remove(&number).map(|run| now.since(run.began));
        self.served = self.served.saturating_add(took.unwrap_or_default());
        self.ready.remove(&number);
        self.untold.remove(&number);
        self.states[number as usize] = StepState::Ended;
        self.ended += 1;
        for later in &self.plan.next()[number as usize] {
            self.missing[*later as usize] -= 1;
            if self.missing[*later as usize] == 0 && self.states[*later as usize] == StepState::Waiting {
                self.ready.insert(*later, due(&self.plan, *later, now));
                self.untold.insert(*later);
            }
        }
        self.ranked = None;
        (true, took)
    }

    /// When the next turn begins that was not told.
    pub(super) fn next_turn(&self) -> Option<Instant> {
        self.untold.iter().filter_map(|number| self.ready.get(number)).min().copied()
    }

    /// Steps whose turn has begun, told once each.
    pub(super) fn take_turns(&mut self, now: Instant) -> Vec<u32> {
        let has_begun = |number: &u32| self.ready.get(number).is_some_and(|due| *due <= now);
        let (begun, later): (Vec<u32>, Vec<u32>) = std::mem::take(&mut self.untold).into_iter().partition(has_begun);
        self.untold.extend(later);
        begun
    }

    /// How long things take: looked up anew when something happened, or after `fresh`.
    pub(super) fn rank(&mut self, now: Instant, (tenant, learnt): (&TenantId, &Learnt), fresh: Duration) -> &Ranks {
        if self.ranked.is_none_or(|at| now.since(at) > fresh) {
            self.ranks = self.ranked_at(now, tenant, learnt);
            self.ranked = Some(now);
        }
        &self.ranks
    }

    /// How long things took at the last [`Self::rank`].
    pub(super) const fn last_ranks(&self) -> &Ranks {
        &self.ranks
    }

    fn ranked_at(&self, now: Instant, tenant: &TenantId, learnt: &Learnt) -> Ranks {
        let takes: Vec<Duration> = (0..)
            .zip(self.plan.steps())
            .map(|(number, step)| match self.state(number) {
                StepState::Ended => Duration::ZERO,
                StepState::Waiting => learnt.expect(tenant, step),
                StepState::Running => {
                    let began = self.running.get(&number).map_or(now, |run| run.began);
                    learnt.expect(tenant, step).saturating_sub(now.since(began))
                }
            })
            .collect();
        let gap = |(number, step): (u32, &super::plan::Step)| {
            if self.state(number) == StepState::Waiting { step.gap } else { Duration::ZERO }
        };
        let gaps: Vec<Duration> = (0..).zip(self.plan.steps()).map(gap).collect();
        let ranks = upward_ranks(self.plan.before(), &takes, &gaps);
        let active = self.ready.keys().chain(self.running.keys());
        let longest = active.map(|n| ranks[*n as usize]).max().unwrap_or_default();
        let remaining = takes.iter().fold(Duration::ZERO, |sum, takes| sum.saturating_add(*takes));
        Ranks { takes, ranks, remaining, longest }
    }
}

/// When a step's tool is expected back, if all before it ended now.
fn due(plan: &Plan, number: u32, now: Instant) -> Instant {
    // Nothing ran before the first steps, so no tool did either.
    let first = plan.before()[number as usize].is_empty();
    if first { now } else { now + plan.steps()[number as usize].gap }
}
