//! Which steps should run, in which order.
//!
//! Of a declared program, a step's turn comes so long after it could have run as its program still takes, and as the step
//! may be put off without holding its program up: short programs first, and of one the critical path. Since what came later
//! goes first only by that much, nobody waits for ever. Of programs that declared nothing, what engines took for them so far
//! stands for what they will take, in octaves.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Bound;
use std::time::Duration;

use kvtier_types::{Instant, TenantId};

use super::graph::Graph;
use super::{GraphName, Graphs};
use crate::programs::{Rank, attained_floor};

/// Ranks are looked up anew when they are older.
const FRESH: Duration = Duration::from_secs(1);
/// Steps that one part of a search looks at: it holds the graphs' lock. A graph's are looked at together.
const MOST_LOOKED_AT: usize = 2048;

/// Who asks for what.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// Whose steps; `None` for everybody's.
    pub tenant: Option<&'a TenantId>,
    /// Only of these programs and branches; all when empty.
    pub programs: &'a BTreeSet<String>,
    /// Steps that run already too.
    pub running: bool,
    /// Steps answered at most.
    pub limit: usize,
}

/// A question that is being answered, graph by graph. What changes between two parts of the search counts as it is when its
/// graph is looked at, or at the end.
#[derive(Debug)]
pub struct Search<'a> {
    question: Question<'a>,
    /// The graph that was looked at last.
    after: Option<GraphName>,
    /// The first so far: one more than are wanted, at most.
    found: BTreeSet<(Rank, GraphName, u32)>,
}

impl<'a> Search<'a> {
    /// Of a question.
    #[must_use]
    pub const fn new(question: Question<'a>) -> Self {
        Self { question, after: None, found: BTreeSet::new() }
    }

    fn keep(&mut self, step: (Rank, GraphName, u32)) {
        let is_first = self.found.len() <= self.question.limit || self.found.last().is_some_and(|last| step < *last);
        if is_first {
            self.found.insert(step);
        }
        if self.found.len() > self.question.limit + 1 {
            self.found.pop_last();
        }
    }
}

/// Why a step stands where it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// It runs.
    Runs,
    /// The tool before it is expected back in a while.
    Early(Duration),
    /// It waited longer than all that is before it.
    Aged(Duration),
    /// It is on the critical path: so long to the end of the program.
    Critical(Duration, String),
    /// It may be put off for the first without holding its program up, of the second to the end.
    Slack(Duration, Duration, String),
    /// A program that declared nothing and for which engines took so long.
    Attained(Duration),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = |span: &Duration| format!("{:.1} s", span.as_secs_f64());
        match self {
            Self::Runs => write!(f, "it runs"),
            Self::Early(due) => write!(f, "its tool is expected back in {}", s(due)),
            Self::Aged(waited) => write!(f, "aged: waited {}", s(waited)),
            Self::Critical(path, program) => write!(f, "critical path: {} to the end of {program}", s(path)),
            Self::Slack(slack, path, program) => {
                write!(f, "{} off the critical path: {} to the end of {program}", s(slack), s(path))
            }
            Self::Attained(service) => write!(f, "attained service {}", s(service)),
        }
    }
}

/// A step that may run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextStep {
    /// Its place: the smallest goes first.
    pub order: Rank,
    /// Whose.
    pub tenant: TenantId,
    /// Who runs it.
    pub program: String,
    /// The program that declared it and its id in there; empty for one that declared nothing.
    pub graph: String,
    /// See `graph`.
    pub step: String,
    /// As declared.
    pub kind: String,
    /// From its beginning, or from now if it runs, to the end of the program.
    pub rank: Duration,
    /// What engines are expected to take for all of its program that has not ended.
    pub remaining: Duration,
    /// What they took so far.
    pub attained: Duration,
    /// Since it could have run, until it did.
    pub waited: Duration,
    /// Until the tool before it is expected back.
    pub due_in: Duration,
    /// Whether it runs.
    pub running: bool,
    /// Why it stands here.
    pub reason: Reason,
}

/// A program that declared nothing.
#[derive(Debug, Clone, Copy)]
pub struct Undeclared<'a> {
    /// Whose.
    pub tenant: &'a TenantId,
    /// Its name.
    pub program: &'a str,
    /// What engines took for it so far.
    pub attained: Duration,
    /// Since when it waits, or when it is expected to.
    pub since: Instant,
}

impl NextStep {
    /// The next step of a program that declared nothing.
    #[must_use]
    pub fn undeclared(now: Instant, of: Undeclared<'_>) -> Self {
        let counts = attained_floor(of.attained);
        let order = Rank::new(of.since.as_nanos(), counts, counts);
        let (waited, due_in) = (now.since(of.since), of.since.since(now));
        let reason = match () {
            () if !due_in.is_zero() => Reason::Early(due_in),
            () if is_aged(order, now, waited) => Reason::Aged(waited),
            () => Reason::Attained(of.attained),
        };
        Self {
            order,
            tenant: of.tenant.clone(),
            program: of.program.to_owned(),
            graph: String::new(),
            step: String::new(),
            kind: String::new(),
            rank: Duration::ZERO,
            remaining: Duration::ZERO,
            attained: of.attained,
            waited,
            due_in,
            running: false,
            reason,
        }
    }
}

/// Whether its turn is over: whatever comes from now on goes after it.
fn is_aged(order: Rank, now: Instant, waited: Duration) -> bool {
    !waited.is_zero() && order.turn_ns() <= now.as_nanos()
}

impl Graphs {
    /// Goes on with a search for steps that may run. Answers whether something is left to do.
    pub fn search_some(&mut self, now: Instant, search: &mut Search<'_>) -> bool {
        let (question, learnt, mut looked_at) = (search.question, &self.learnt, 0);
        let of_tenant = |tenant: &TenantId| GraphName { tenant: tenant.clone(), program: String::new() };
        let start = match (search.after.take(), question.tenant) {
            (Some(after), _) => Bound::Excluded(after),
            (None, Some(tenant)) => Bound::Included(of_tenant(tenant)),
            (None, None) => Bound::Unbounded,
        };
        for (name, graph) in self.graphs.range_mut((start, Bound::Unbounded)) {
            if question.tenant.is_some_and(|t| *t != name.tenant) {
                return false;
            }
            looked_at += 1;
            let asked = question.programs.is_empty() || question.programs.contains(&name.program);
            if asked || runs_any(graph, question.programs) {
                looked_at += graph.plan.steps().len();
                graph.rank(now, (&name.tenant, learnt), FRESH);
                let graph = &*graph;
                let running = graph.running().keys().filter(|_| question.running);
                for number in graph.ready().keys().chain(running) {
                    let runner = &graph.plan.steps()[*number as usize].program;
                    if asked || question.programs.contains(runner) {
                        search.keep((graph.order(*number), name.clone(), *number));
                    }
                }
            }
            if looked_at >= MOST_LOOKED_AT {
                search.after = Some(name.clone());
                return true;
            }
        }
        false
    }

    /// What a search found, the first to run first, and whether there are more.
    pub fn found(&mut self, now: Instant, search: Search<'_>) -> (Vec<NextStep>, bool) {
        let (question, learnt) = (search.question, &self.learnt);
        let truncated = search.found.len() > question.limit;
        let mut steps = Vec::with_capacity(search.found.len().min(question.limit));
        for (order, name, number) in search.found.into_iter().take(question.limit) {
            let Some(graph) = self.graphs.get_mut(&name) else { continue };
            let runs = graph.running().contains_key(&number);
            if graph.ready().contains_key(&number) || (runs && question.running) {
                graph.rank(now, (&name.tenant, learnt), FRESH);
                steps.push(graph.next_step(now, &name, (order, number)));
            }
        }
        (steps, truncated)
    }

    /// The answer to a question in one go.
    #[cfg(test)]
    pub(crate) fn next(&mut self, now: Instant, question: Question<'_>) -> (Vec<NextStep>, bool) {
        let mut search = Search::new(question);
        while self.search_some(now, &mut search) {}
        self.found(now, search)
    }
}

fn runs_any(graph: &Graph, programs: &BTreeSet<String>) -> bool {
    let active = graph.ready().keys().chain(graph.running().keys());
    active.map(|n| &graph.plan.steps()[*n as usize].program).any(|p| !p.is_empty() && programs.contains(p))
}

impl Graph {
    fn due(&self, number: u32) -> Instant {
        let running = self.running().get(&number).map(|run| run.due);
        running.or_else(|| self.ready().get(&number).copied()).unwrap_or(self.heard)
    }

    /// The place of a step that runs or may; by ranks of the last look.
    fn order(&self, number: u32) -> Rank {
        let ranks = self.last_ranks();
        let path = ranks.ranks[number as usize];
        let put_off = ranks.longest.saturating_sub(path);
        Rank::new(self.due(number).as_nanos(), ranks.remaining.saturating_add(put_off), path)
    }

    fn next_step(&self, now: Instant, name: &GraphName, (order, number): (Rank, u32)) -> NextStep {
        let ranks = self.last_ranks();
        let step = &self.plan.steps()[number as usize];
        let rank = ranks.ranks[number as usize];
        let (due, run) = (self.due(number), self.running().get(&number));
        let waited = run.map_or(now, |run| run.began).since(due);
        let (due_in, slack) = (due.since(now), ranks.longest.saturating_sub(rank));
        let reason = match () {
            () if run.is_some() => Reason::Runs,
            () if !due_in.is_zero() => Reason::Early(due_in),
            () if is_aged(order, now, waited) => Reason::Aged(waited),
            () if slack.is_zero() => Reason::Critical(rank, name.program.clone()),
            () => Reason::Slack(slack, rank, name.program.clone()),
        };
        NextStep {
            order,
            tenant: name.tenant.clone(),
            program: if step.program.is_empty() { name.program.clone() } else { step.program.clone() },
            graph: name.program.clone(),
            step: step.id.clone(),
            kind: step.kind.clone(),
            rank,
            remaining: ranks.remaining,
            attained: self.attained(now),
            waited,
            due_in,
            running: run.is_some(),
            reason,
        }
    }
}
